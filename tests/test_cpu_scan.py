"""The compiled scan beside its fallback in PyTorch, and the compiler's errands. Oracle tests: test_interface.py."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from problems import make

from minimamba import _compiler, cpu_scan, torch_scan

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache of libraries, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _compiler.load.cache_clear()
    yield tmp_path / "minimamba"
    _compiler.load.cache_clear()


def both(x, save=True):
    """Outputs and gradients of the compiled scan and of the one in PyTorch."""
    found = []
    for backend in (cpu_scan, torch_scan):
        y, state, checkpoints = backend.forward(*x, None, True, save)
        found.append([y, state, *backend.backward(y.sin(), state.cos(), *x, None, checkpoints, True)])
    return found


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("length", [1, 32, 33, 70])
def test_borders_of_blocks_and_chunks(channels, length):
    x = [make(batch=2, length=length, channels=channels, states=3).tensors[name] for name in ARGUMENTS]
    for got, expected in zip(*both(x), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("items", [1, 3, 8])
@pytest.mark.parametrize("B", ["varying", "constant"])
def test_sequences_that_share_sums(monkeypatch, items, B):
    """A few hundred work items are made, so of many sequences several go into one."""
    monkeypatch.setattr(cpu_scan, "_ITEMS", items)
    x = [make(batch=7, length=34, channels=40, states=3, B=B, C=B).tensors[name] for name in ARGUMENTS]
    for got, expected in zip(*both(x), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * max(1, expected.abs().max().item()))


def test_the_same_bits_whatever_the_number_of_threads():
    x = [make(batch=3, length=200, channels=96, states=8).tensors[name].float() for name in ARGUMENTS]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5, 2):
            torch.set_num_threads(n)
            results.append(both(x)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_extreme_steps_and_nan():
    x = make(batch=1, length=40, channels=5, states=3).to(torch.float32).tensors
    for delta in (1e-8, 1e3):
        step = torch.full_like(x["delta"], delta)
        y, state, _ = cpu_scan.forward(x["u"], step, x["A"], x["B"], x["C"], None, None, None, None, None, False, False)
        assert y.isfinite().all() and state.isfinite().all()
    x["u"][0, 7, 2] = torch.nan
    y, state, _ = cpu_scan.forward(*(x[name] for name in ARGUMENTS), None, True, False)
    assert y[0, 7:, 2].isnan().all() and state[0, 2].isnan().all()
    assert y[0, :7].isfinite().all() and y[..., [0, 1, 3, 4]].isfinite().all()
    x["delta"][0, 3, 1] = torch.nan
    assert cpu_scan.forward(*(x[name] for name in ARGUMENTS), None, True, False)[0][0, 3:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_over_and_under_the_range(dtype):
    """Decays from e^-2000 to e^+2000: 0 and infinity, as exp has them, and nothing that has run over."""
    exponents = torch.cat([torch.linspace(-2000, 2000, 4001), torch.linspace(-1e-6, 1e-6, 11)]).to(dtype)
    channels = len(exponents)
    u, B = (torch.zeros(1, 1, size, dtype=dtype) for size in (channels, 1))
    A, state = exponents[:, None].clone(), torch.ones(1, channels, 1, dtype=dtype)
    _, final, _ = cpu_scan.forward(u, torch.ones_like(u), A, B, B, None, None, None, state, None, False, False)
    expected, got = exponents.exp(), final.flatten()
    normal = (expected > torch.finfo(dtype).tiny) & expected.isfinite()
    # |x| rounds by half a unit before the exponential sees it.
    tolerance = (3 + exponents.abs()) * torch.finfo(dtype).eps
    assert ((got / expected - 1).abs() < tolerance)[normal].all()
    assert (got[expected == 0] == 0).all() and got[expected.isinf()].isinf().all()
    assert got.isnan().sum() == 0 and got[exponents == 0].eq(1).all()


def test_a_step_that_is_masked_out_keeps_the_state():
    x = make(batch=2, length=5, channels=3, states=2, D=False, z=False).to(torch.float32).tensors
    x["delta"][:, 2] = -torch.inf  # softplus makes it zero
    y, state, _ = cpu_scan.forward(*(x[name] for name in ARGUMENTS), None, True, False)
    left = [0, 1, 3, 4]
    short = {name: x[name][:, left] if name in ("u", "delta", "B", "C") else x[name] for name in ARGUMENTS}
    expected, expected_state, _ = cpu_scan.forward(*short.values(), None, True, False)
    assert torch.equal(y[:, left], expected) and torch.equal(state, expected_state)


def test_a_library_is_built_once_and_found_again(fresh):
    first = _compiler.load("selective_scan.c", "REAL=float")
    [built] = fresh.iterdir()
    stamp = built.stat().st_mtime_ns
    _compiler.load.cache_clear()
    assert _compiler.load("selective_scan.c", "REAL=float")._name == first._name == str(built)
    assert built.stat().st_mtime_ns == stamp
    _compiler.load("selective_scan.c", "REAL=double")
    assert len(list(fresh.iterdir())) == 2


def test_builders_at_once_do_not_disturb_each_other(fresh):
    code = "from minimamba import _compiler as c; print(c.load('selective_scan.c', 'REAL=float').scan_forward is None)"
    answers = []

    def build():
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
        answers.append((run.stdout.strip(), run.stderr))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [("False", "")] * 2
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def test_a_compiler_without_openmp_gives_the_same_bits(fresh, monkeypatch):
    x = [make(batch=3, length=200, channels=96, states=8).tensors[name].float() for name in ARGUMENTS]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = both(x)[0]
        _compiler.load.cache_clear()
        monkeypatch.setattr(_compiler, "THREADS", "-fno-such-flag")
        assert not _compiler.load("selective_scan.c", "REAL=float").scan_has_threads()
        without = both(x)[0]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(without, expected, strict=True))


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_one_warning_and_pytorch(fresh, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    x = [make(batch=2, length=40, channels=5, states=3).tensors[name] for name in ARGUMENTS]
    with pytest.warns(UserWarning, match="Install a C compiler"):
        y, state, checkpoints = cpu_scan.forward(*x, None, True, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cpu_scan.forward(*x, None, True, True)
    expected = torch_scan.forward(*x, None, True, True)
    for first, second, plain in zip((y, state, checkpoints), again, expected, strict=True):
        assert torch.equal(first, second) and torch.equal(first, plain)
    assert checkpoints.shape == cpu_scan.checkpoint_shape(x[0], x[2], x[3], x[4], None)
