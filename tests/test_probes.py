"""Probes of a language model, against what they say they compute."""

import numpy as np
import pytest
import torch

from minimamba import probes
from minimamba.language_model import MambaConfig, MambaLM

FILE = '''"""The name, and a rename, and the name."""
naïve = 'name' + "ñ"; name = 1  # name
def f(name):
    r"""No names but name."""
    return f.name, name2, "ä", name
'''.encode()


@pytest.mark.parametrize("kind, count", [("docstring", 3), ("code", 4)])
def test_places(kind, count):
    found = probes.places(FILE, b"name", kind)
    assert len(found) == count == len(set(found)) and found == sorted(found)
    assert all(FILE[end - 3 : end + 1] == b"name" for end in found)
    opened = [FILE[:end].count(b'"""') % 2 for end in found]
    assert opened == [kind == "docstring"] * count


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=16, n_layer=3, d_state=4), dtype=torch.float64)
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)
    return model


def test_selected_is_what_the_scan_gets(model, monkeypatch):
    import minimamba.mamba_block as block

    given, scan = [], block.selective_scan
    monkeypatch.setattr(block, "selective_scan", lambda *args, **more: given.append(args) or scan(*args, **more))
    tokens = torch.randint(256, (2, 9))
    chosen = probes.selected(model, tokens)
    assert len(chosen) == len(given) == 3
    for (delta, B, C), (_, before, _, given_B, given_C, _) in zip(chosen, given, strict=True):
        assert torch.allclose(delta, torch.log1p(before.exp()))
        assert torch.equal(B, given_B) and torch.equal(C, given_C)
    assert not model.backbone.layers[0].mixer.x_proj._forward_hooks


def test_missed_leaves_one_byte_out(model):
    """Against the text that really lacks the byte: what stands behind it moves by one place."""
    tokens = torch.randint(256, (1, 24))
    with torch.no_grad():
        got = probes.missed(model, tokens, [3, 10], after=2, until=6)
        whole = model(tokens)[0].softmax(-1).numpy()
        for t, bits in zip((3, 10), got, strict=True):
            shorter = torch.cat([tokens[:, :t], tokens[:, t + 1 :]], dim=1)
            other = model(shorter)[0].softmax(-1).numpy()
            by_hand = sum((whole[s] * np.log2(whole[s] / other[s - 1])).sum() for s in range(t + 2, t + 7))
            assert bits.item() == pytest.approx(by_hand, rel=1e-9) and by_hand > 0
