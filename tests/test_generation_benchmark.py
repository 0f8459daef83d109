"""The measurement of a step after a context: three models that agree, what is kept, a text read in pieces."""

import json
import sys

import pytest
import torch

from minimamba import generation, text
from minimamba import generation_benchmark as benchmark
from minimamba.language_model import MambaConfig

CONFIG = MambaConfig(d_model=64, n_layer=4, vocab_size=50, d_state=16)


@pytest.fixture(scope="module")
def models():
    return benchmark.models(CONFIG, torch.float32, "cpu")


@torch.no_grad()
def test_a_step_goes_on_where_reading_ended(models):
    """After a context of 11 tokens the step's logits are those of the whole row of 12, for each of the three."""
    tokens = torch.randint(50, (1, 12))
    logits = {}
    for name, (runner, model) in models.items():
        one = runner(model)
        one.read(tokens[:, :11])
        logits[name] = one.step(tokens[:, 11]).flatten()
        whole = model(tokens)
        whole = getattr(whole, "logits", whole)[0, -1]
        assert torch.allclose(logits[name], whole, atol=1e-5), name
    assert torch.allclose(logits["minimamba"], logits["transformers_mamba"], atol=1e-5)
    assert not torch.allclose(logits["minimamba"], logits["transformer"], atol=1e-2)


def test_what_is_kept(models):
    rows = {
        (name, context): benchmark.measure(*models[name], context, "cpu") for name in models for context in (16, 64)
    }
    inner = 2 * CONFIG.d_model
    state = CONFIG.n_layer * inner * (CONFIG.d_state + CONFIG.d_conv) * 4
    for context in (16, 64):
        assert rows["minimamba", context]["kept_bytes"] == state
        assert rows["transformers_mamba", context]["kept_bytes"] == pytest.approx(state, rel=0.1)
        reserved = context + benchmark.STEPS + 2
        keys_and_values = 2 * (CONFIG.n_layer // 2) * CONFIG.d_model * 4 * reserved
        assert rows["transformer", context]["kept_bytes"] == pytest.approx(keys_and_values, rel=0.01)
    assert all(row["read_seconds"] > 0 and row["step_seconds"] > 0 for row in rows.values())


def test_the_three_have_equal_size(models):
    counts = {name: sum(p.numel() for p in model.parameters()) for name, (_, model) in models.items()}
    # transformers' Mamba has no rows that only pad the vocabulary
    assert counts["minimamba"] - counts["transformers_mamba"] == 6 * CONFIG.d_model
    assert counts["transformer"] == pytest.approx(counts["minimamba"], rel=0.06)


def test_the_program(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        benchmark, "SIZES", {"cpu": ({"d_model": 64, "n_layer": 2, "vocab_size": 50}, torch.float32, [])}
    )
    monkeypatch.setattr(benchmark, "MILESTONES", (50, 200))
    monkeypatch.setattr(generation, "PIECE", 64)
    monkeypatch.setattr(text, "load", lambda: text.Text(torch.arange(999).to(torch.uint8), None))
    command = ["--device", "cpu", "--contexts", "8", "--save", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["generation_benchmark", *command])
    benchmark.main()
    result = json.loads((tmp_path / "x.json").read_text())
    assert [(row["model"], row["context"]) for row in result["rows"]] == [
        (name, 8) for name in ("minimamba", "transformers_mamba", "transformer")
    ]
    assert [row["bytes"] for row in result["million"]] == [64, 200]
    seconds = [row["seconds"] for row in result["million"]]
    assert seconds == sorted(seconds) and all(row["peak_bytes"] > 1e6 for row in result["million"])
    assert result["command"] == "python -m minimamba.generation_benchmark " + " ".join(command)
