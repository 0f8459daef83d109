"""Training: the step against AdamW by hand, evaluation, kills and resumes, damaged files, many processes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimamba import processes, text, training, training_files
from minimamba.baselines import Transformer
from minimamba.language_model import MambaConfig, MambaLM

TEXT = Path(text.__file__).read_bytes() + Path(training.__file__).read_bytes()
SMALL = [
    "--d-model", "16", "--n-layer", "2", "--d-state", "4", "--length", "24", "--batch", "4", "--steps", "7",
    "--log-every", "2", "--evaluate-every", "4", "--evaluate-bytes", "600", "--checkpoint-every", "3",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def options(tmp_path, data):
    """A function of a folder's name and further options -> what `train` takes."""
    return lambda out, *more: training.parse(["--out", str(tmp_path / out), "--data", str(data), *SMALL, *more])


def log_of(folder):
    """The rows of log.csv, without the only column that the clock decides."""
    rows = list(csv.DictReader((Path(folder) / "log.csv").read_text().splitlines()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the parts of a step ---


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 400), share=st.floats(0, 1), peak=st.floats(1e-6, 1))
def test_learning_rate(steps, share, peak):
    warmup = int(share * steps)
    rates = np.array([training.learning_rate(step, peak, warmup, steps) for step in range(1, steps + 1)])
    up = peak * np.arange(1, warmup + 1) / max(warmup, 1)
    angle = np.pi * np.arange(1, steps - warmup + 1) / (steps - warmup + 1)
    down = peak * np.cos(angle / 2) ** 2  # (1 + cos x) / 2 = cos²(x / 2)
    assert np.allclose(rates, np.concatenate([up, down]), rtol=1e-9)
    assert (rates > 0).all() and rates.max() <= peak * (1 + 1e-12)
    assert warmup == 0 or rates[warmup - 1] == pytest.approx(peak)


def test_what_decays():
    model = MambaLM(MambaConfig(d_model=8, n_layer=2, d_state=3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = training.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    per_layer = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    matrices = {f"backbone.layers.{i}.mixer.{name}.weight" for i in (0, 1) for name in per_layer}
    assert {names[id(p)] for p in decayed["params"]} == matrices | {"backbone.embedding.weight"}
    vectors = ("norm.weight", "mixer.A_log", "mixer.D", "mixer.conv1d.bias", "mixer.dt_proj.bias")
    assert {names[id(p)] for p in kept["params"]} == {
        f"backbone.layers.{i}.{name}" for i in (0, 1) for name in vectors
    } | {"backbone.norm_f.weight"}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)  # each once, the tied head too


def draw_model(dtype=torch.float64, **sizes):
    torch.manual_seed(3)
    model = MambaLM(MambaConfig(**({"d_model": 8, "n_layer": 2, "d_state": 3} | sizes)), dtype=dtype)
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)  # far from uniform predictions
    return model


def bits_by_hand(logits, targets):
    """Sum of -log2 p over NumPy logits (..., 256) and targets (...)."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1).sum() / np.log(2)


def test_the_loss_is_that_of_the_next_byte():
    model = draw_model()
    windows = torch.randint(256, (3, 12))
    logits = model(windows).detach().numpy()[:, :-1]  # the last has no target; none before it depends on it
    expected = bits_by_hand(logits, windows[:, 1:].numpy()) / 33 * np.log(2)
    assert training.next_byte_loss(model, windows).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_parts_make_the_gradient_of_the_whole(parts):
    windows = torch.randint(256, (6, 10))
    gradients, losses = [], []
    for n in (1, parts):
        model = draw_model()
        losses.append(training.accumulate_gradients(model, windows, n))
        assert not losses[-1].requires_grad
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(losses[0], losses[1], rtol=1e-12)
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-14) and gradients[0].norm() > 0.1


def test_steps_are_those_of_clipped_adamw(options):
    """Three steps of `train` against the equations of AdamW (Loshchilov and Hutter, algorithm 2), in float64."""
    chosen = options("run", "--steps", "3", "--lr", "0.01", "--warmup", "1", "--clip", "0.7", "--weight-decay", "0.3")
    model, result = training.train(chosen)
    torch.manual_seed(0)
    expected = MambaLM(MambaConfig(d_model=16, n_layer=2, d_state=4))
    texts = text.load(chosen.data)
    m, v, norms = {}, {}, []
    for t in (1, 2, 3):
        rate = [0.01, 0.01 * 0.75, 0.01 * 0.25][t - 1]  # half cosine at a third and two thirds of its way
        windows = text.draw_windows(texts.train, 4, 24, 0, t)
        expected.zero_grad()
        training.next_byte_loss(expected, windows).backward()
        gradients = {name: p.grad.double() for name, p in expected.named_parameters()}
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in gradients.values())))
        with torch.no_grad():
            for name, p in expected.named_parameters():
                g = gradients[name] * min(1, 0.7 / norms[-1])
                m[name] = 0.9 * m.get(name, 0) + 0.1 * g
                v[name] = 0.95 * v.get(name, 0) + 0.05 * g**2
                move = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
                decay = 0.3 if p.ndim > 1 and "A_log" not in name else 0
                p.copy_(p.double() * (1 - rate * decay) - rate * move)
    assert max(norms) > 0.7 > 0.1  # clipping took part
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        # A gradient near 0 has the sign of its rounding error in AdamW's first steps: the median is exact, few are off.
        error = (p - q).abs()
        assert error.median() < 1e-6 and error.mean() < 3e-5, name
    assert result["log"][-1]["gradient_norm"] == pytest.approx(norms[-1], rel=1e-3)


# --- dropout ---


def test_dropout_leaves_out_a_share_of_what_a_layer_adds_and_only_while_training():
    plain, model = draw_model(), draw_model()
    training.add_dropout(model, 0.25)
    assert same_weights(plain, model)
    tokens = torch.randint(256, (4, 40))
    inputs, added = [], []
    layer = model.backbone.layers[0]
    layer.register_forward_hook(lambda _, arguments, output: added.append(output - arguments[0]))
    layer.register_forward_hook(lambda _, arguments, output: inputs.append(arguments[0]))
    model(tokens)
    whole = plain.backbone.layers[0](inputs[0]) - inputs[0]
    kept = added[0] != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)  # 1280 draws: 2.5 standard deviations
    assert torch.allclose(added[0][kept], whole[kept] / 0.75)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), plain(tokens))
    data = torch.randint(256, (200,), dtype=torch.uint8)
    model.train()
    assert training.evaluate(model, data, 8) == training.evaluate(plain, data, 8)
    assert model.training  # as before


def test_a_run_with_dropout_resumes_to_the_same_losses(options, tmp_path):
    training.train(options("whole", "--dropout", "0.3"))
    training.train(options("plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_files, "save_checkpoint", stop_after(training_files.save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            training.train(options("stopped", "--dropout", "0.3"))
    torch.rand(5)  # what else draws numbers does not matter
    training.train(options("stopped", "--dropout", "0.3", "--resume"))
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole") != log_of(tmp_path / "plain")


# --- a Transformer, trained the same way ---


def test_a_transformer_of_equal_size_is_trained_by_the_same_program(options, tmp_path):
    from transformers import LlamaForCausalLM

    folder = tmp_path / "pretrained"
    chosen = options("run", "--model", "transformer", "--dropout", "0.2", "--save-pretrained", str(folder))
    model, result = training.train(chosen)
    assert isinstance(model, Transformer)
    assert result["held_out_bits"] == result["held_out_bits_without_carry"]
    decayed, kept = training.parameter_groups(model, 0.1)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in kept["params"])
    dropped = [name for name, module in model.named_modules() if module._forward_hooks]
    assert [name.rpartition(".")[2] for name in dropped] == ["o_proj", "mlp"] * len(model.backbone.layers)
    theirs = LlamaForCausalLM.from_pretrained(folder)
    tokens = torch.randint(256, (1, 9))
    model.eval()
    assert torch.allclose(theirs(tokens).logits, model(tokens))
    assert same_weights(model, training_files.load_model(tmp_path / "run" / "checkpoint.pt"))
    with pytest.raises(ValueError, match=r"^model: expected 'transformer', as in .*, got 'mamba'"):
        training.train(options("run", "--resume", "--dropout", "0.2"))


# --- evaluation ---


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40), size=st.integers(128, 900))
def test_evaluation_predicts_every_byte_but_the_first_of_each_row(length, size):
    model = draw_model(n_layer=1)
    data = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    rows = max(1, min(64, size // (length + 1)))
    table = data[: size // rows * rows].view(rows, -1).long()
    predicted = rows * (table.shape[1] - 1)
    with torch.no_grad():
        whole = model(table[:, :-1]).numpy()  # one pass over the whole row: what a carried state must equal
        expected = bits_by_hand(whole, table[:, 1:].numpy()) / predicted
        assert training.evaluate(model, data, length) == pytest.approx(expected, rel=1e-5)
        total = 0
        for i in range(0, table.shape[1] - 1, length):
            part = table[:, i : i + length + 1]
            total += bits_by_hand(model(part[:, :-1]).numpy(), part[:, 1:].numpy())
    assert training.evaluate(model, data, length, carry=False) == pytest.approx(total / predicted, rel=1e-5)


def test_evaluation_needs_bytes():
    with pytest.raises(ValueError, match=r"^data: expected at least 2 held-out bytes, got 1"):
        training.evaluate(draw_model(), torch.zeros(1, dtype=torch.uint8), 4)


# --- whole runs ---


def test_it_learns(tmp_path):
    """A text of period 26 takes 4.7 bits a byte if only counted; a model that has learned it needs almost none."""
    (tmp_path / "abc.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    _, result = training.train(training.parse([
        "--out", str(tmp_path / "run"), "--data", str(tmp_path / "abc.txt"), *SMALL, "--steps", "60", "--lr", "0.02",
    ]))  # fmt: skip
    assert 7.5 < result["log"][0]["train_bits"] < 8.5
    assert result["held_out_bits"] < 1


def test_log_result_and_model_files(options, tmp_path):
    model, result = training.train(options("run", "--save-pretrained", str(tmp_path / "pretrained")))
    rows = log_of(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 6, 7]  # the first; every 2; saved at 3, 6; the last
    assert [row["held_out_bits"] != "" for row in rows] == [False, False, False, True, False, True]
    assert all(int(row["bytes"]) == int(row["step"]) * 4 * 24 for row in rows)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["log"] == result["log"] and written["processes"] == 1
    assert written["parameters"] == sum(p.numel() for p in model.parameters())
    texts = text.load([tmp_path / "text.txt"])
    assert (written["train_bytes"], written["held_out_bytes"]) == (len(texts.train), len(texts.held_out))
    score = training.evaluate(model, texts.held_out[:600], 24)
    assert written["held_out_bits"] == score == result["log"][-1]["held_out_bits"]
    assert written["held_out_bits_without_carry"] == training.evaluate(model, texts.held_out[:600], 24, carry=False)
    assert same_weights(model, MambaLM.from_pretrained(tmp_path / "pretrained"))
    assert same_weights(model, training_files.load_model(tmp_path / "run" / "checkpoint.pt"))


def test_logged_losses_are_means_since_the_row_before(options, tmp_path):
    training.train(options("each", "--log-every", "1", "--checkpoint-every", "99", "--evaluate-every", "99"))
    training.train(options("some", "--log-every", "3", "--checkpoint-every", "99", "--evaluate-every", "99"))
    each = [float(row["train_bits"]) for row in log_of(tmp_path / "each")]
    some = [float(row["train_bits"]) for row in log_of(tmp_path / "some")]
    assert some == pytest.approx([each[0], sum(each[1:3]) / 2, sum(each[3:6]) / 3, each[6]], rel=1e-6)


@pytest.mark.parametrize("moment", ["step", "log", "save", "rename"])
def test_a_resumed_run_equals_one_that_was_not_stopped(options, tmp_path, monkeypatch, moment):
    """Stopped at step 6, in the middle of a step, a log row, a checkpoint or its renaming."""
    model, _ = training.train(options("whole"))

    class Killed(BaseException):
        pass

    def dying(function, call):
        calls = iter(range(1, 99))

        def wrapper(*args, **kwargs):
            if next(calls) == call:
                if moment in ("log", "save"):
                    half_of(function, *args)
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    def half_of(function, content, where):
        if moment == "save":
            where.write(b"PK\x03\x04 half of a checkpoint")
        else:  # append_row(path, row)
            with open(content, "a") as file:
                file.write("6,576,0.1")

    with monkeypatch.context() as patch:
        target, name, call = {
            "step": (training, "accumulate_gradients", 6),
            "log": (training_files, "append_row", 5),
            "save": (torch, "save", 2),
            "rename": (os, "replace", 3),  # of the new log, the first checkpoint, the second
        }[moment]
        patch.setattr(target, name, dying(getattr(target, name), call))
        with pytest.raises(Killed):
            training.train(options("killed"))
    resumed, result = training.train(options("killed", "--resume"))
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    assert same_weights(resumed, model)
    seconds = [row["seconds"] for row in result["log"]]
    assert seconds == sorted(seconds)


def test_a_run_killed_by_the_system_resumes_to_the_same_losses(options, data, tmp_path):
    more = ["--steps", "150", "--checkpoint-every", "7", "--log-every", "1"]
    model, _ = training.train(options("whole", *more))
    command = [sys.executable, "-m", "minimamba.training", "--out", str(tmp_path / "run"), "--data", str(data), *SMALL]
    run = subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL  # it had not finished
    resumed, _ = training.train(options("run", "--resume", *more))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert same_weights(resumed, model)


def test_a_line_of_the_log_that_was_cut_short_is_no_row(tmp_path):
    """What is left of step 10 may look like step 1."""
    rows = [dict.fromkeys(training_files.COLUMNS) | {"step": step, "lr": 0.1} for step in (8, 9)]
    training_files.write_log(tmp_path / "log.csv", rows)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1")
    assert training_files.read_log(tmp_path / "log.csv", 9) == rows
    assert training_files.read_log(tmp_path / "log.csv", 8) == rows[:1]
    assert training_files.read_log(tmp_path / "log.csv", 0) == []
    assert training_files.read_log(tmp_path / "none.csv", 9) == []


def test_resuming_where_nothing_was_saved_begins(options, tmp_path):
    training.train(options("run", "--resume"))
    training.train(options("other"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^out: expected --resume or a folder without a checkpoint, got .*run"):
        training.train(options("run"))


# --- damaged and foreign checkpoints ---


class Saved:
    """The bytes of a checkpoint, and `load`, which reads any bytes as one into a fresh model."""

    def __init__(self, folder):
        self.folder = folder
        model, optimizer = self.fresh()
        training.accumulate_gradients(model, torch.randint(256, (2, 9)), 1)
        optimizer.step()
        training_files.save_checkpoint(folder / "good.pt", model, optimizer, {"lr": 0.1}, 1, 2.5)
        self.content = (folder / "good.pt").read_bytes()

    def fresh(self):
        torch.manual_seed(5)
        model = MambaLM(MambaConfig(d_model=16, n_layer=1))
        return model, torch.optim.AdamW(training.parameter_groups(model, 0.1), lr=0.1)

    def load(self, content):
        (self.folder / "bad.pt").write_bytes(content)
        model, optimizer = self.fresh()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            return training_files.load_checkpoint(self.folder / "bad.pt", model, optimizer, {"lr": 0.1})
        except ValueError:
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
            assert not optimizer.state
            raise


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    saved = Saved(tmp_path_factory.mktemp("saved"))
    assert saved.load(saved.content) == (1, 2.5)
    return saved


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_checkpoint_is_refused(saved, share):
    content = saved.content
    with pytest.raises(ValueError, match=r"^checkpoint: expected a whole file, got .*bad\.pt, which is damaged"):
        saved.load(content[: int(share * len(content))])


@settings(max_examples=60, deadline=None)
@example(share=0.6653029050049009, bit=7)  # in a name that is no UTF-8 then
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(saved, share, bit):
    damaged = bytearray(saved.content)
    damaged[int(share * len(damaged))] ^= 1 << bit
    try:
        assert saved.load(damaged) == (1, 2.5)  # in the zip's padding or a field that nobody reads
    except ValueError as error:
        assert str(error).startswith("checkpoint: expected a whole file, got ")


def test_a_flipped_bit_of_a_weight_is_refused(saved, tmp_path):
    """torch.load alone does not see it."""
    weights = torch.load(saved.folder / "good.pt", weights_only=True)["model"]["backbone.embedding.weight"]
    damaged = bytearray(saved.content)
    damaged[damaged.index(weights.numpy().tobytes()) + 2] ^= 4
    (tmp_path / "bad.pt").write_bytes(damaged)
    assert torch.load(tmp_path / "bad.pt", weights_only=True).keys() == training_files.CONTENT
    with pytest.raises(ValueError, match=r"^checkpoint: .*bad\.pt, which is damaged \(.*data/"):
        saved.load(damaged)


def test_a_file_that_is_no_checkpoint_is_refused(saved, tmp_path):
    for foreign in ({"model": {}}, [1, 2], torch.zeros(3)):
        torch.save(foreign, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="which is no checkpoint of a training run; nothing was loaded"):
            saved.load((tmp_path / "x.pt").read_bytes())
    torch.save({"model": object()}, tmp_path / "x.pt")  # a pickle of anything: not opened
    with pytest.raises(ValueError, match=r"^checkpoint: expected a whole file"):
        saved.load((tmp_path / "x.pt").read_bytes())


@pytest.mark.parametrize(
    "more",
    [("--lr", "0.1"), ("--steps", "9"), ("--length", "23"), ("--seed", "1"), ("--d-state", "5"), ("--batch", "8"),
     ("--weight-decay", "0"), ("--dropout", "0.5"), ("--clip", "2"), ("--warmup", "3")],
)  # fmt: skip
def test_other_settings_are_refused(options, tmp_path, more, checkpoint_of_settings):
    name = {"--batch": "windows"}.get(more[0], more[0][2:].replace("-", "_"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(checkpoint_of_settings)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, as in .*checkpoint\.pt, got {more[1]}"):
        training.train(options("run", "--resume", *more))


@pytest.fixture(scope="module")
def checkpoint_of_settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    (folder / "text.txt").write_bytes(TEXT)
    arguments = ["--out", str(folder), "--data", str(folder / "text.txt"), *SMALL]
    training.train(training.parse(arguments))
    return (folder / "checkpoint.pt").read_bytes()


def test_another_text_is_refused_and_batches_may_be_split_otherwise(options, tmp_path, data, checkpoint_of_settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(checkpoint_of_settings)
    training.train(options("run", "--resume", "--batch", "2", "--accumulate", "2"))
    data.write_bytes(b"x" + TEXT)
    with pytest.raises(ValueError, match=r"^text_checksum: expected .* as in"):
        training.train(options("run", "--resume"))


# --- many processes ---


def test_two_processes_have_the_losses_of_one(options, data, tmp_path):
    """Data parallel, and with the weights in parts, which also goes on from the single process's checkpoint."""
    one, _ = training.train(options("one", "--log-every", "1"))
    program = tmp_path / "program.py"
    program.write_text(
        "import shutil\n"
        "from pathlib import Path\n"
        "from minimamba import processes, training\n"
        f"def train(out, *more): training.train(training.parse(['--out', {str(tmp_path)!r} + '/' + out, '--data',"
        f" {str(data)!r}, *{[*SMALL, '--log-every', '1', '--batch', '1', '--accumulate', '2']}, *more]))\n"
        "train('ddp')\n"
        "train('fsdp', '--fsdp')\n"
        "train('resumed', '--fsdp', '--resume')\n"
        "processes.leave()\n"
    )
    half = tmp_path / "resumed"
    half.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_files, "save_checkpoint", stop_after(training_files.save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            training.train(options("resumed", "--log-every", "1"))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)],
        timeout=120, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    expected = log_of(tmp_path / "one")
    for name in ("ddp", "fsdp", "resumed"):
        rows = log_of(tmp_path / name)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        for column in ("train_bits", "held_out_bits", "gradient_norm", "lr"):
            got, want = ([float(row[column] or 0) for row in table] for table in (rows, expected))
            assert got == pytest.approx(want, rel=1e-5), (name, column)
        assert json.loads((tmp_path / name / "result.json").read_text())["processes"] == 2
        model = training_files.load_model(tmp_path / name / "checkpoint.pt")
        for (key, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
            assert (p - q).abs().mean() < 1e-5, (name, key)


def stop_after(function):
    def wrapper(*args):
        function(*args)
        raise KeyboardInterrupt

    return wrapper


def test_one_process_needs_no_torchrun_unless_the_weights_are_cut_up(options):
    assert processes.rank_and_count() == (0, 1)
    with pytest.raises(ValueError, match=r"^fsdp: expected processes started by torchrun, got one without"):
        training.train(options("run", "--fsdp"))


# --- the command line ---


@pytest.mark.parametrize(
    "more, message",
    [
        (("--steps", "0"), "argument --steps: expected a finite number >= 1, got 0"),
        (("--steps", "many"), "argument --steps: invalid number value: 'many'"),
        (("--lr", "-1"), "argument --lr: expected a finite number >= 0.0, got -1"),
        (("--lr", "nan"), "argument --lr: expected a finite number >= 0.0, got nan"),
        (("--clip", "0"), "argument --clip: expected a finite number >= 1e-09, got 0"),
        (("--warmup", "8"), "argument --warmup: expected at most --steps = 7, got 8"),
        (("--dropout", "1"), "argument --dropout: expected a number below 1, got 1.0"),
        (("--model", "rnn"), "argument --model: invalid choice"),
        (("--device", "tpu"), "argument --device: invalid choice"),
    ],
)
def test_wrong_options_are_named(options, capsys, more, message):
    with pytest.raises(SystemExit, match="2"):
        options("run", *more)
    assert message in capsys.readouterr().err


def test_the_program_says_what_went_wrong_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"^error: data: no file or folder .*nowhere"):
        training.main()


def test_the_program_prints_its_score(monkeypatch, tmp_path, data, capsys):
    monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path / "run"), "--data", str(data), *SMALL])
    training.main()
    score = json.loads((tmp_path / "run" / "result.json").read_text())["held_out_bits"]
    assert capsys.readouterr().out == f"held-out text: {score:.4f} bits per byte\n"


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(options, tmp_path):
    with pytest.raises(FloatingPointError, match=r"^loss: expected a finite number, got nan at step"):
        training.train(options("run", "--lr", "1e30", "--warmup", "0"))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_defaults():
    chosen = training.parse(["--out", "x"])
    assert chosen.warmup == chosen.steps // 20 and chosen.data is None and chosen.weight_decay == 0.1


@pytest.mark.gpu
def test_on_a_gpu_it_learns_and_resumes(options, tmp_path):
    model, result = training.train(options("run", "--device", "cuda", "--steps", "40", "--lr", "0.01"))
    assert next(model.parameters()).is_cuda and result["held_out_bits"] < 6
    again, _ = training.train(options("run", "--device", "cuda", "--steps", "40", "--lr", "0.01", "--resume"))
    assert same_weights(model, again)
