"""The way around Triton's own launch, without a GPU: kernels replaced by what writes down how it is called."""

import importlib

import pytest
import torch

import minimamba
from minimamba import conv_plan, triton_scan

STREAM = 7


class Recorder:
    """Stands for a kernel, and for what it was compiled to."""

    def __init__(self, kernel):
        self.names, self.calls = kernel.arg_names, []

    def __getitem__(self, grid):
        def call(*arguments, num_warps, **constants):  # Triton's launch, which takes constants by name
            assert [*self.names[len(arguments) :]] == [*constants]
            self.calls.append((grid[0], num_warps, (*arguments, *constants.values())))
            return self

        return call

    function, packed_metadata = "function", "metadata"

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        assert (y, z, stream, function, metadata) == (1, 1, STREAM, "function", "metadata")
        assert launch_metadata is enter_hook is exit_hook is None
        self.calls.append((x, None, arguments))


@pytest.fixture
def recorded(monkeypatch):
    """Return a function that replaces a module's kernels, and with it forget all plans before and after."""
    caches = [conv_plan.plan_forward, conv_plan.plan_backward, conv_plan.plan_update]

    def replace(module, *names):
        module = importlib.import_module(f"minimamba.kernels.{module}")
        caches.extend(f for f in vars(module).values() if hasattr(f, "cache_clear"))
        for cache in caches:
            cache.cache_clear()
        recorders = [Recorder(getattr(module, name)) for name in names]
        for name, recorder in zip(names, recorders, strict=True):
            monkeypatch.setattr(module, name, recorder)
        monkeypatch.setattr(triton_scan, "_current_stream", lambda device: STREAM)
        return recorders

    yield replace
    for cache in caches:
        cache.cache_clear()


def check(recorder):
    """Of three launches the first compiles; the third, of an address not divisible by 16, compiles anew."""
    (grid, warps, _), *_ = recorder.calls
    assert [call[:2] for call in recorder.calls] == [(grid, warps), (grid, None), (grid, warps)]
    first, again, anew = (call[2] for call in recorder.calls)
    for other, kind in ((again, int), (anew, torch.Tensor)):  # what is compiled is given addresses
        assert len(other) == len(first) == len(recorder.names)
        for name, one, two in zip(recorder.names, first, other, strict=True):
            if isinstance(one, torch.Tensor):
                assert type(two) is kind, name
            elif one is None:
                assert two is (0 if kind is int else None), name
            else:
                assert type(one) is type(two) and one == two, name


def shifted(x):
    """The same numbers at an address that 16 does not divide."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("whole", [True, False])
def test_a_convolution_launches_what_is_compiled(recorded, whole):
    forward, backward, total = recorded(
        "causal_conv1d", "causal_conv1d_forward_kernel", "causal_conv1d_backward_kernel", "sum_partial_kernel"
    )
    x, weight = torch.randn(2, 9, 64), torch.randn(64, 4, requires_grad=True)
    options = {"bias": torch.randn(64), "initial_state": torch.randn(2, 64, 3), "return_final_state": True}
    for given in (x, x.clone(), shifted(x)):
        results = minimamba.causal_conv1d(given, weight, **(options if whole else {}), method="triton")
        sum(y.sum() for y in (results if whole else [results])).backward()
    check(forward)
    check(backward)
    assert [warps for _, warps, _ in total.calls] == [4, None, None]  # its tensors are its own, and so aligned


def test_steps_launch_what_is_compiled(recorded):
    (step,) = recorded("selective_state_update", "selective_state_update_kernel")
    from minimamba.kernels.selective_state_update import selective_state_update

    state, x, A, B = torch.randn(2, 64, 16), torch.randn(2, 64), -torch.rand(64, 16), torch.randn(2, 16)
    for given in (x, x.clone(), shifted(x)):
        selective_state_update(state, given, x, A, B, B, None, None, None, True)
    check(step)

    (step,) = recorded("causal_conv1d", "causal_conv1d_update_kernel")
    update_now = importlib.import_module("minimamba.causal_conv1d").update_now
    for given in (x, x.clone(), shifted(x)):
        update_now(given, torch.randn(2, 64, 4), torch.randn(64, 4), None, True, "triton")
    check(step)


def test_a_plan_is_made_once_for_each_kind(recorded):
    recorded("causal_conv1d", "causal_conv1d_forward_kernel")
    x, weight = torch.randn(2, 9, 64), torch.randn(64, 4)
    kinds = (x, x.clone(), x.mT.contiguous().mT, x.double(), x[:, :8], x[:1], x)
    for given in kinds:
        minimamba.causal_conv1d(given, weight.to(given.dtype), method="triton")
    assert conv_plan.plan_forward.cache_info().misses == 5
