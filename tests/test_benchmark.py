"""`python -m minimamba.kernels.benchmark` measures every contender and keeps what it measured; times are not tested.

Other packages are compared with ours where they are installed: none of them is needed, and CI has none.
"""

import itertools
import json
import os
import sys

import pytest
import torch

from minimamba.kernels import benchmark

METHODS = {"cpu", "chunked", "blelloch", "hillis_steele", "sequential"}
SIZE = (2, 9, 64, 3)


@pytest.fixture
def fast(monkeypatch):
    """One repetition, without a clock's patience."""
    monkeypatch.setattr(benchmark, "REPETITIONS", 1)
    monkeypatch.setattr(benchmark, "SECONDS", 0)


def run(monkeypatch, tmp_path, *options):
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--save", str(file)])
    benchmark.main()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    return json.loads(file.read_text())


def test_every_contender_is_measured_and_saved(fast, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "CPU_SHAPES", [SIZE])
    results = run(monkeypatch, tmp_path, "--device", "cpu")
    rows = results.pop("rows")
    assert results["torch"] == torch.__version__ and results["threads"] == torch.get_num_threads()
    assert results["command"] == "python -m minimamba.kernels.benchmark --device cpu --suite shapes"
    assert {"device", "driver", "compiler", "python", "date"} <= results.keys()
    assert METHODS | {"attention"} <= {row["method"] for row in rows}
    for row in rows:
        assert row.keys() == {"suite", "method", *"BLDN", "dtype", *benchmark.KEYS}
        assert [row["suite"], *(row[k] for k in "BLDN"), row["dtype"]] == ["shapes", *SIZE, "float32"]
        assert row["forward_ms"] > 0 and 0 < row["backward_ms"] < row["training_ms"]
        assert row["training_bytes"] is row["forward_graph_ms"] is None
    assert "hillis_steele" in capsys.readouterr().out


def test_every_suite_of_a_gpu(monkeypatch, tmp_path):
    """The kernels' part is played by the CPU, the clock's by a constant."""
    calls = []

    def once(call, *backward):
        calls.append(call() if not backward else backward[0](call()))
        return 1.5

    for name in ("milliseconds", "graph_milliseconds", "peak_bytes"):
        monkeypatch.setattr(benchmark, name, once)
    small = {
        "GPU_SHAPES": [SIZE] * 3, "LENGTHS": [SIZE], "STATES": [SIZE], "EXTRAS": [(1, 16, 64, 3)],
        "CONVOLUTIONS": [(2, 9, 8, 4)], "STEPS": [(2, 8, 3)],
    }  # fmt: skip
    for name, sizes in small.items():
        monkeypatch.setattr(benchmark, name, sizes)
    without = {"mamba_ssm", "accelerated_scan", "causal_conv1d", "causal_conv1d_channels_last"}
    for suite, (letters, draw, contenders) in list(benchmark.SUITES.items()):
        on_cpu = lambda *args, draw=draw: draw(*args[:-1], "cpu")
        ours = lambda _, f=contenders: {k: v for k, v in f("cuda").items() if k not in without}
        monkeypatch.setitem(benchmark.SUITES, suite, (letters, on_cpu, ours))
    real = benchmark.minimamba.selective_scan
    scan = lambda *args, method, **options: real(*args, method="cpu" if method == "triton" else method, **options)
    monkeypatch.setattr(benchmark.minimamba, "selective_scan", scan)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")

    cores = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, chosen: cores.append(chosen), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)

    rows = run(monkeypatch, tmp_path, "--device", "cuda")["rows"]
    assert cores == [{1}]
    by_suite = {k: list(v) for k, v in itertools.groupby(rows, key=lambda row: row["suite"])}
    assert list(by_suite) == list(benchmark.SUITES)
    shapes = {(row["method"], row["dtype"]) for row in by_suite["shapes"]}
    assert {(name, "bfloat16") for name in METHODS} | {("triton", "float32")} <= shapes
    assert {row["method"] for row in by_suite["length"]} == {"triton", "cpu", "attention"}
    assert [row["method"] for row in by_suite["extras"]] == ["plain", "initial_state", "documents", "channels_first"]
    assert all(row["W"] == 4 and row["backward_graph_ms"] == 1.5 for row in by_suite["conv"])
    [step] = by_suite["step"]
    assert [step[k] for k in "BDN"] == [2, 8, 3] and step["forward_ms"] == 1.5 and step["backward_ms"] is None
    for row in rows:
        assert row["forward_ms"] == row["forward_graph_ms"] == row["forward_bytes"] == 1.5
    # The gradients taken last for a row of "conv": of x, weight and bias.
    assert [y.shape for y in calls[-4]] == [(2, 8, 9), (8, 4), (8,)]

    only = run(monkeypatch, tmp_path, "--device", "cuda", "--suite", "step", "states", "--method", "triton")
    assert {(row["suite"], row["method"]) for row in only["rows"]} == {("step", "triton"), ("states", "triton")}
    assert only["command"].endswith("--device cuda --suite step states --method triton")


def test_on_a_cpu_there_is_one_suite(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--suite", "conv"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "on a CPU there is only shapes" in capsys.readouterr().err


def test_an_unknown_method_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--method", "sequential", "fastest"])
    with pytest.raises(SystemExit):
        benchmark.main()
    error = capsys.readouterr().err
    assert "--method: expected some of" in error and "sequential" in error and error.strip().endswith("got fastest")


def test_what_does_not_fit_is_null(fast, monkeypatch, tmp_path):
    def full(x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark, "CPU_SHAPES", [SIZE])
    monkeypatch.setitem(benchmark.SUITES, "shapes", ("BLDN", benchmark.draw_scan, lambda device: {"full": full}))
    [row] = run(monkeypatch, tmp_path, "--device", "cpu")["rows"]
    assert row["method"] == "full" and all(row[key] is None for key in benchmark.KEYS)


def test_seconds_repeats_and_loses_patience(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark, "SECONDS", 0)
    first, second, both = benchmark.seconds(lambda: calls.append(1) or 2, lambda x: calls.append(x))
    assert calls == [1, 2] * (1 + benchmark.REPETITIONS) and 0 < first + second < 2 * both
    monkeypatch.setattr(benchmark, "PATIENCE", -1)
    calls.clear()
    benchmark.seconds(lambda: calls.append(1))
    assert calls == [1]


def test_a_short_call_is_timed_three_times(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    medians = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(testing, "do_bench", lambda *arguments, **options: next(medians))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(benchmark, "SHORT", 1)
    assert benchmark.milliseconds(lambda: None) == 1.0
    monkeypatch.setattr(benchmark, "SHORT", 0)
    assert benchmark.milliseconds(lambda: None) == 4.0


def outputs_and_gradients(prepare, x, upstream):
    """y and the gradients by argument, in the layout of `selective_scan` (of the convolution for a convolution)."""
    call, leaves = prepare(x)
    y = call()
    y = y if y.shape == upstream.shape else y.mT
    found = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
    return [y] + [g if g.shape == x[k].shape else g.mT for k, g in zip(x, found, strict=True)]


def assert_agree(prepare, reference, x, upstream):
    for got, expected in zip(
        outputs_and_gradients(prepare, x, upstream), outputs_and_gradients(reference, x, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("name", ["chunked", "blelloch", "hillis_steele", "sequential", "cpu"])
def test_our_methods_compute_the_same(name):
    x = benchmark.draw_scan(*SIZE, torch.float32, "cpu")
    assert all(tensor.requires_grad for tensor in x.values())
    assert_agree(benchmark.scans("cpu")[name], benchmark.ours("sequential"), x, torch.randn(x["u"].shape))


@pytest.mark.parametrize("package", ["mambapy", "transformers"])
@pytest.mark.parametrize("length", [1, 9, 32])
def test_other_packages_compute_the_same(package, length):
    pytest.importorskip(package, reason=f"{package} is not installed: it is optional, to compare with")
    x = benchmark.draw_scan(2, length, 64, 3, torch.float32, "cpu")
    assert_agree(getattr(benchmark, package), benchmark.ours("cpu"), x, torch.randn(x["u"].shape))


def test_accelerated_scan_computes_the_same(monkeypatch):
    """Its Triton kernels need a GPU; its reference in PyTorch has the same arguments."""
    reference = pytest.importorskip("accelerated_scan.ref", reason="accelerated_scan is not installed: it is optional")
    scalar = pytest.importorskip("accelerated_scan.scalar")
    monkeypatch.setattr(scalar, "scan", reference.scan)
    x = benchmark.draw_scan(2, 9, 64, 3, torch.float32, "cpu")
    assert_agree(benchmark.accelerated_scan, benchmark.ours("cpu"), x, torch.randn(x["u"].shape))


def test_convolutions_compute_the_same():
    x = benchmark.draw_conv(2, 9, 8, 4, torch.float32, "cpu")
    upstream = torch.randn(x["x"].shape)
    for prepare in (benchmark.our_conv, benchmark.our_conv_channels_first):
        assert_agree(prepare, benchmark.torch_conv, x, upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["shapes", "conv"])
def test_what_runs_on_a_gpu_computes_the_same(suite):
    _, draw, contenders = benchmark.SUITES[suite]
    size = (2, 32, 64, 4)  # all different: layouts are told apart by them
    x = draw(*size, torch.float32, "cuda")
    prepared = {name: prepare for name, prepare in contenders("cuda").items() if name != "attention"}
    upstream = torch.randn_like(next(iter(x.values())))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # or PyTorch's convolution has ten bits
        for prepare in prepared.values():
            assert_agree(prepare, prepared["triton"], x, upstream)


@pytest.mark.gpu
def test_a_replay_is_timed():
    call, leaves = benchmark.ours("triton")(benchmark.draw_scan(1, 64, 64, 16, torch.bfloat16, "cuda"))
    row = benchmark.measure(call, leaves, "cuda")
    assert all(value is not None and value > 0 for value in row.values())
