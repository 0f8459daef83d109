"""The stack of S4D layers: what padding, order and time may change, training, and its command line."""

import json
import math
import sys

import pytest
import torch

from minimamba import datasets, s4, sequence_classifier
from minimamba.sequence_classifier import SequenceClassifier


def make(**options):
    torch.manual_seed(0)
    return SequenceClassifier(3, 4, **({"width": 8, "layers": 2, "state_size": 4} | options)).double().eval()


def draw(batch=5, length=11):
    torch.manual_seed(1)
    lengths = torch.tensor([length, 1, 4, length - 1, 7])[:batch]
    return torch.randn(batch, length, 3, dtype=torch.float64), lengths


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"init": "s4"}, {"init": "s4", "bidirectional": True}]
)
def test_what_stands_after_the_end_does_not_count(options):
    model, (u, lengths) = make(**options), draw()
    logits = model(u, lengths)
    assert logits.shape == (5, 4)
    for row, (sequence, length) in enumerate(zip(u, lengths, strict=True)):
        alone = model(sequence[None, :length])  # cut to its length, with no `lengths`
        assert torch.allclose(logits[row], alone[0], rtol=0, atol=1e-12)
    other = torch.where((torch.arange(11) < lengths[:, None])[..., None], u, 1e3)
    assert torch.allclose(model(other, lengths), logits, rtol=0, atol=1e-12)


def test_the_order_of_time_counts():
    model, (u, _) = make(), draw()
    assert not torch.allclose(model(u), model(u.flip(1)))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_block_is_its_formula(bidirectional):
    model, (u, _) = make(layers=1, bidirectional=bidirectional), draw()
    (block,) = model.blocks
    assert isinstance(block.ssm, s4.S4D) and block.ssm.bidirectional == bidirectional
    x = u @ model.encoder.weight.T + model.encoder.bias

    def normalize(x, norm):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return x * norm.weight + norm.bias

    y = block.ssm(normalize(x, block.norm))
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2  # GELU
    value, gate = (y @ block.mix.weight.T + block.mix.bias).chunk(2, dim=-1)
    x = x + value / (1 + torch.exp(-gate))
    expected = normalize(x, model.norm).mean(1) @ model.decoder.weight.T + model.decoder.bias
    assert torch.allclose(model(u), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", sequence_classifier.LAYERS)
def test_gradients_reach_every_parameter(init):
    model, (u, lengths) = make(init=init), draw()
    model(u, lengths).square().sum().backward()
    for name, parameter in model.named_parameters():
        if init == "real" and "frequency" in name:
            continue  # a real state does not turn
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_a_model_is_saved_and_loaded(tmp_path):
    model, (u, lengths) = make(), draw()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make(init="random")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(u, lengths), model(u, lengths))


def toy(sequences, seed, vary=False):
    """Class 0 swings slowly, class 1 fast; with a random phase, and lengths that vary if asked for."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(sequences) % 2
    phase = 6.3 * torch.rand(sequences, generator=generator)
    u = torch.sin(torch.arange(24.0) * (0.4 + 0.8 * labels[:, None]) + phase[:, None])[..., None]
    lengths = torch.randint(12, 25, (sequences,), generator=generator) if vary else None
    return datasets.Split(u, labels, lengths)


@pytest.mark.parametrize("vary", [False, True])
def test_training_learns_and_can_be_repeated(vary):
    def once():
        torch.manual_seed(3)
        model = SequenceClassifier(1, 2, width=32, layers=2, state_size=8, dropout=0.0)
        return sequence_classifier.train(model, toy(61, 0, vary), toy(40, 1, vary), epochs=10, batch_size=16, lr=1e-2)

    history = once()
    assert [row["epoch"] for row in history] == list(range(1, 11))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["test_accuracy"] >= 0.95
    without_time = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert without_time(once()) == without_time(history)


def test_accuracy_counts_over_uneven_batches():
    model = make(dropout=0.9).float()
    torch.nn.init.zeros_(model.decoder.bias)
    split = datasets.Split(3 * torch.randn(70, 2, 3), torch.arange(70) % 4)
    hits = (model(split.u).argmax(-1) == split.labels).sum().item()
    assert sequence_classifier.accuracy(model.train(), split, batch_size=3) == hits / 70  # without dropout


def test_the_command_line_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    full = datasets.japanese_vowels()
    tiny = tuple(datasets.Split(*(x[::40] for x in split)) for split in full)
    monkeypatch.setitem(sequence_classifier.TASKS, "japanese_vowels", (lambda: tiny, {"width": 8}, {"epochs": 9}))
    path = tmp_path / "out.json"
    arguments = "--dataset japanese_vowels --init lin real --seed 0 4 --device cpu --epochs 2"
    monkeypatch.setattr(sys, "argv", ["x", *arguments.split(" "), "--save", str(path)])
    sequence_classifier.main()
    results = json.loads(path.read_text())
    assert results["command"] == "python -m minimamba.sequence_classifier " + arguments
    assert results["torch"] == torch.__version__ and results["device"] and results["date"]
    assert [(run["init"], run["seed"]) for run in results["runs"]] == [("lin", 0), ("lin", 4), ("real", 0), ("real", 4)]
    for run in results["runs"]:
        assert len(run["history"]) == run["epochs"] == 2
        assert run["test_accuracy"] == run["history"][-1]["test_accuracy"]
    assert not list(tmp_path.glob("*.part"))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_classifier_names_the_bad_argument():
    for name in ("inputs", "classes", "width", "layers"):
        with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got 0"):
            SequenceClassifier(**({"inputs": 3, "classes": 4, "width": 8, "layers": 1} | {name: 0}))
    with pytest.raises(ValueError, match=r"^init: expected one of .*'s4', got 'hippo'"):
        SequenceClassifier(3, 4, init="hippo")
    with pytest.raises(ValueError, match=r"^dataset: expected one of 'digits', 'japanese_vowels', 'digits784'"):
        sequence_classifier.run("mnist")
    model, (u, lengths) = make(), draw()
    with pytest.raises(ValueError, match=r"^u: expected shape \(B, L, 3\), got \(5, 11, 2\)"):
        model(u[..., :2], lengths)
    with pytest.raises(ValueError, match=r"^lengths: expected shape \(5,\), got \(4,\)"):
        model(u, lengths[:4])
    for wrong in (0, 12):
        with pytest.raises(ValueError, match=r"^lengths: expected between 1 and L = 11"):
            model(u, lengths.clone().fill_(wrong))
