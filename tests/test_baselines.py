"""The models to compare with: counts by hand, probabilities that sum to one, a Transformer of equal size."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimamba.baselines import NGram, Transformer
from minimamba.language_model import MambaConfig, MambaLM


def probability(text, context, x):
    """Interpolated Witten-Bell by its definition, with dictionaries of byte strings."""
    p = 1 / 256
    for n in range(len(context) + 1):
        c = context[len(context) - n :]
        follow = Counter(text[i + n : i + n + 1] for i in range(len(text) - n) if text[i : i + n] == c)
        if follow:
            p = (follow[x] + len(follow) * p) / (follow.total() + len(follow))
    return p


def array(text):
    return np.frombuffer(text, np.uint8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(b"abc"), min_size=6, max_size=40),
    st.integers(0, 4),
    st.lists(st.sampled_from(b"abcd"), min_size=5, max_size=12),
)
def test_ngram_against_counting_by_hand(letters, order, other):
    text, judged = bytes(letters), bytes(other)
    model = NGram(array(text), order)
    p = model.probabilities(array(judged)[None])
    assert p.shape == (1, 256)
    assert p.sum() == pytest.approx(1)
    context = judged[len(judged) - order :]
    for x in (b"a", b"b", b"d", b"\xff"):
        assert p[0, x[0]] == pytest.approx(probability(text, context, x), rel=1e-12)
    for n, bits in enumerate(model.bits(array(judged))):
        by_hand = [
            probability(text, judged[max(0, i - n) : i], judged[i : i + 1]) for i in range(len(judged))
        ]  # the first bytes have less before them
        assert bits == pytest.approx(-np.log2(by_hand).mean(), rel=1e-12)


def test_ngram_generates_what_it_has_seen():
    model = NGram(array(b"abcd" * 300), 3)
    (text,) = model.generate(array(b"dab")[None], 40, temperature=0.2, seed=1)
    assert bytes(text) == b"cdab" * 10
    (greedy,) = model.generate(array(b"dab")[None], 8, temperature=0)
    assert bytes(greedy) == b"cdabcdab"
    assert model.generate(array(b"dab")[None], 0).shape == (1, 0)
    one, two = (model.generate(array(b"xyz" * 2)[None], 30, temperature=2.0, seed=seed) for seed in (1, 2))
    assert one.shape == (1, 30) and one.dtype == np.uint8 and (one != two).any()


def test_ngram_bad_input():
    with pytest.raises(ValueError, match=r"^order: expected an integer >= 0, got -1"):
        NGram(array(b"abc"), -1)
    with pytest.raises(ValueError, match=r"^text: expected more than order = 3 bytes, got 3"):
        NGram(array(b"abc"), 3)
    with pytest.raises(ValueError, match=r"^texts: expected at least order = 2 bytes in each, got 1"):
        NGram(array(b"abcdef"), 2).probabilities(array(b"a")[None])


@pytest.mark.parametrize("sizes", [{"d_model": 256, "n_layer": 8}, {"d_model": 64, "n_layer": 4}])
def test_transformer_has_as_many_parameters(sizes):
    config = MambaConfig(**sizes)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MambaLM(config).parameters())
        model = Transformer(config, parameters)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert len(model.backbone.layers) == config.n_layer // 2


def test_transformer_is_causal_and_generates_with_its_cache():
    torch.manual_seed(0)
    model = Transformer(MambaConfig(d_model=64, n_layer=2), 90000).eval()
    tokens = torch.randint(256, (2, 12))
    with torch.no_grad():
        logits = model(tokens)
        assert logits.shape == (2, 12, 256) and logits.dtype == torch.float32
        assert torch.allclose(model(tokens[:, :7]), logits[:, :7], atol=1e-5)
    before = torch.random.get_rng_state()
    following = model.generate(tokens, 5, temperature=0)
    drawn = [model.generate(tokens, 5, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(before, torch.random.get_rng_state())
    text = tokens
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(following, text[:, 12:])
