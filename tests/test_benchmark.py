"""`python -m minimamba.kernels.benchmark` measures every contender and keeps what it measured; times are not tested."""

import json
import sys

import torch

from minimamba.kernels import benchmark


def test_every_contender_is_measured_and_saved(monkeypatch, tmp_path, capsys):
    calls = []

    def once(call, device):
        calls.append(call())
        return 1.5

    monkeypatch.setattr(benchmark, "CPU_SHAPES", [(1, 9, 64, 3)])
    monkeypatch.setattr(benchmark, "milliseconds", once)
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--save", str(file)])
    benchmark.main()

    results = json.loads(file.read_text())
    assert results["torch"] == torch.__version__ and results["threads"] == torch.get_num_threads()
    names = {"cpu", "chunked", "blelloch", "hillis_steele", "sequential", "attention"}
    assert {row["method"] for row in results["rows"]} == names
    for row in results["rows"]:
        assert [row[k] for k in "BLDN"] == [1, 9, 64, 3] and row["dtype"] == "float32"
        assert row["forward_ms"] == row["backward_ms"] == 1.5 and row["training_bytes"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "hillis_steele" in capsys.readouterr().out
    # Forward, then backward of every leaf: the scans have eight, attention its q, k and v.
    assert [len(gradients) for gradients in calls[1::2]] == [8] * 5 + [3]


def test_contenders_compute_the_same():
    x = benchmark.draw(2, 9, 64, 3, torch.float32, "cpu")
    scans = {k: v for k, v in benchmark.contenders("cpu").items() if k != "attention"}
    outputs = {name: prepare(x)[0]() for name, prepare in scans.items()}
    for name, y in outputs.items():
        assert torch.allclose(y, outputs["sequential"], rtol=0, atol=1e-5), name
    assert all(x[name].requires_grad for name in x)
