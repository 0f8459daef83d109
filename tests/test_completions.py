"""Which part of a completion is the function, and whether it parses; the model that ships."""

import json
import re
import sys

import pytest
import torch

from minimamba import MambaLM, completions, text, training
from minimamba.checkpoints import SHIPPED

HEADER = b"    def area(self, other):\n"


@pytest.mark.parametrize(
    "completion, body",
    [
        (b"        return 1\n\n    def next", b"        return 1\n\n"),  # cut at a line that is not whole
        (b"        return 1\n    x = 2\n        y\n", b"        return 1\n"),  # of the class, not of the function
        (b"        if x:\n\n            y = 1\nclass A:\n    pass\n", b"        if x:\n\n            y = 1\n"),
        (b"        return 1", b""),
        (b"", b""),
    ],
)
def test_what_belongs_to_the_function(completion, body):
    assert completions.function(b"x = 3\n" + HEADER, completion) == HEADER + body


@pytest.mark.parametrize(
    "body, good",
    [
        (b"        return self.a * other\n", True),
        (b"        return (self.a\n", False),
        (b"        '''What it does\n", False),
        (b"        return \xff\n", False),
        (b"        return '\0'\n", False),
        (b"", False),
        (b"        # nothing but a comment\n", False),
        (b"        if x:\n            y = 1\n          z = 2\n", False),
    ],
)
def test_what_parses(body, good):
    assert completions.parses(HEADER + body) is good
    assert completions.score([b"x\n" + HEADER], [body + b"    end"]) == good


def test_prompts_end_with_a_header_and_lie_in_one_file():
    one = b"\0" + b"# first\n" * 80 + b"def f(a, b):\n" + b"    return a\n" * 30
    two = b"\0" + b"# second\n" * 80 + b"class A:\n" + HEADER + b"        return 2\n" * 30
    short = b"\0def g(x):\n    return x\n"
    (first, after), (second, _) = completions.find_prompts(one + short + two, 9, 50)
    assert len(first) == len(second) == 512 and len(after) == 50
    assert first.endswith(b"def f(a, b):\n") and b"second" not in first and after.startswith(b"    return a\n")
    assert second.endswith(HEADER) and b"first" not in second
    assert [pair[0] for pair in completions.find_prompts(one + two, 1, 50)] == [first]


def test_prompts_of_the_held_out_text():
    prompts = completions.find_prompts(completions.held_out().numpy().tobytes(), 300, 500)
    assert len(prompts) == 300
    assert len({prompt for prompt, _ in prompts}) > 290  # a few functions begin alike in files that are alike
    assert all(re.search(rb"^ *def \w+\(.*\):\n\Z", prompt, re.MULTILINE) for prompt, _ in prompts)


def test_what_repeats():
    row = b"abcdefgXabcdefgYabcdefZ_"
    kinds = completions.repeats(torch.tensor([list(row), list(row[::-1])]))
    assert "".join(map(str, kinds[0].tolist())) == "000000000000002100000010"
    short = completions.repeats(torch.tensor([list(b"ababac")]), length=1)
    assert short.tolist() == [[0, 0, 0, 2, 2, 1]]


def test_bits_by_kind(shipped):
    windows = completions.held_out()[:400].view(2, 200).long()
    kinds = completions.repeats(windows)[:, 1:]
    rows = completions.bits_by_kind({"x": shipped}, windows)
    assert sum(row["bytes"] for row in rows) == pytest.approx(1)
    with torch.no_grad():
        p = shipped(windows[:, :-1]).softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    for kind, row in enumerate(rows):
        assert row["x"] == pytest.approx(-p[kinds == kind].log2().mean().item(), rel=1e-4)


def test_the_program(monkeypatch, tmp_path, capsys):
    small = text.Text(torch.frombuffer(bytearray(b"def f(x):\n    return x\n" * 40), dtype=torch.uint8), None)
    monkeypatch.setattr(text, "load", lambda: small)
    monkeypatch.setattr(
        sys, "argv", ["completions", "--count", "3", "--bytes", "20", "--save", str(tmp_path / "x.json")]
    )
    completions.main()
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["functions"] == 3 and result["bytes"] == 20
    assert list(result["models"]) == ["the file's own text", "n-gram", "mamba"]
    assert all(0 <= row["parse"] <= 3 for row in result["models"].values())


# --- the model that ships ---


@pytest.fixture(scope="module")
def shipped():
    return MambaLM.from_pretrained()


def test_the_shipped_model_is_small_and_has_its_card():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8_000_000
    card = (SHIPPED / "README.md").read_text()
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["dtype"] == "float16"
    result = json.loads((SHIPPED / "training.json").read_text())
    for told in (f"{result['held_out_bits']:.3f}", f"{result['parameters'] / 1e6:.2f} million", result["command"]):
        assert told in card
    assert result["parameters"] == sum(p.numel() for p in MambaLM.from_pretrained().parameters())


def test_the_shipped_model_has_the_bits_per_byte_of_its_card(shipped):
    """On a part that takes two seconds; the number is the model's own on a CPU, with the state carried on."""
    part = completions.held_out()[:16384]
    assert training.evaluate(shipped, part, 1024) == pytest.approx(0.9817, abs=0.002)


def test_the_shipped_model_writes_python(shipped):
    """Far more often than the n-gram model, of whose completions one in thirty parses."""
    pairs = completions.find_prompts(completions.held_out().numpy().tobytes(), 16, 500)
    prompts = [prompt for prompt, _ in pairs]
    rows = shipped.generate(prompts, 160, temperature=0.5, seed=0)
    assert completions.score(prompts, [bytes(row.tolist()) for row in rows]) >= 4


def test_the_held_out_text_is_no_text_it_was_trained_on():
    """Of a file that both have: what the shipped sample holds is not in the training part of this Python's library."""
    train = text.load().train.numpy().tobytes()
    files = completions.held_out().numpy().tobytes().split(text.SEPARATOR)[1:]
    assert len(files) > 10
    assert not [file[:80] for file in files if len(file) > 2000 and file in train]
