"""The counted bytes are those that the kernel really moves, and that five separate kernels really would."""

from collections import Counter

import numpy as np
import pytest
import torch
from problems import make

from minimamba import fused_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def moved_by_the_kernel(monkeypatch, pass_, tensors):
    """Run a launcher in the interpreter and count the bytes of every load and store that its mask lets through.

    Returns {name of the input, or "outputs": bytes}.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    address = {x.data_ptr(): (name, x.data_ptr() + x.numel() * x.element_size()) for name, x in tensors.items()}
    total = Counter()

    def count(pointers, mask):
        chosen = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        if chosen.size:
            first = int(chosen.min())
            inside = (name for start, (name, stop) in address.items() if start <= first < stop)
            total[next(inside, "outputs")] += chosen.size * size

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    pass_()
    monkeypatch.undo()
    return total


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "groups", "dtype"),
    [
        (2, 33, 3, 3, 1, torch.float32),
        (1, 5, 32, 8, 1, torch.float16),  # two programs share four blocks of channels in the backward pass
        (2, 3, 6, 5, 3, torch.float64),
        (1, 17, 2, 70, 1, torch.float32),
    ],
)
def test_every_access_of_the_kernel_is_counted(monkeypatch, batch, length, channels, states, groups, dtype):
    sizes = batch, length, channels, states
    kind = "grouped" if groups > 1 else "varying"
    problem = make(*sizes, groups=groups, B=kind, C=kind, initial_state=False).to(dtype)
    tensors = {name: problem.tensors[name] for name in NAMES}
    inputs = [tensors[name] for name in NAMES]
    options = {"element_size": dtype.itemsize, "groups": groups}

    forward = lambda save: fused_scan.forward(*inputs, None, None, True, save)
    for save in (False, True):
        counted = fused_scan.bytes_moved(*sizes, save=save, **options)
        moved = moved_by_the_kernel(monkeypatch, lambda save=save: forward(save), tensors)
        assert {name: moved[name] for name in NAMES} == {name: counted[name] for name in NAMES}
        assert moved.total() == sum(counted.values())

    tensors["grad_y"] = problem.cotangents["y"].to(dtype)
    tensors["checkpoints"] = forward(True)[2]
    backward = lambda: fused_scan.backward(
        tensors["grad_y"], None, *inputs, None, None, tensors["checkpoints"], delta_softplus=True
    )
    counted = fused_scan.bytes_moved(*sizes, backward=True, **options)
    moved = moved_by_the_kernel(monkeypatch, backward, tensors)
    assert {name: moved[name] for name in tensors} == {name: counted[name] for name in tensors}
    assert moved.total() == sum(counted.values())


@pytest.mark.parametrize("backward", [False, True])
def test_with_a_perfect_cache_every_number_moves_once(backward):
    sizes = batch, length, channels, states = 3, 100, 64, 16
    once = fused_scan.bytes_moved(*sizes, backward=backward, every_access=False)
    for name, x in make(*sizes, initial_state=False).to(torch.float32).tensors.items():
        assert x is None or once[name] == x.numel() * 4, name
    every = fused_scan.bytes_moved(*sizes, backward=backward)
    assert once.keys() == every.keys() and all(once[name] <= every[name] for name in once)
    assert once["checkpoints"] == 4 * (batch * channels * states * 4)  # before steps 0, 32, 64, 96
    if backward:
        # Two programs share the channels (64 // 32); each keeps sums of its own for dB and dC.
        assert once["dB"] == 2 * batch * length * states * 4


def test_materialised_counts_are_those_of_five_pytorch_kernels():
    """Inputs and outputs of the forward pass, written as five expressions, against the counts."""
    sizes = (2, 7, 5, 3)
    u, delta, A, B, C, D, z, *_ = make(*sizes).to(torch.float32).tensors.values()
    size = lambda *tensors: sum(x.numel() * 4 for x in tensors)
    A_bar = torch.exp(delta[..., None] * A)
    B_bar_u = (delta * u)[..., None] * B[:, :, None]
    h = torch.zeros_like(A_bar)
    y = torch.einsum("bldn,bln->bld", h, C)
    assert list(fused_scan.bytes_moved_materialised(*sizes).values()) == [
        (size(delta, A), size(A_bar)),
        (size(delta, u, B), size(B_bar_u)),
        (size(A_bar, B_bar_u), size(h)),
        (size(h, C), size(y)),
        (size(y, u, z, D), size(y)),
    ]
    assert list(fused_scan.bytes_moved_materialised(*sizes, backward=True).values()) == [
        (size(y, y, u, z, D), size(y, u, z, D)),
        (size(y, h, C), size(h, C)),
        (size(h, A_bar, h), size(h, A_bar)),
        (size(B_bar_u, delta, u, u, B), size(u, delta, B)),
        (size(A_bar, A_bar, delta, delta, A), size(delta, A)),
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_half_precision_halves_what_varies_in_time_but_not_the_state(backward):
    half = fused_scan.bytes_moved(2, 64, 8, 4, backward=backward, element_size=2)
    full = fused_scan.bytes_moved(2, 64, 8, 4, backward=backward, element_size=4)
    halved = {name for name in full if half[name] * 2 == full[name]}
    assert halved == {"u", "delta", "z", "B", "C"} | ({"grad_y", "du", "ddelta", "dz"} if backward else {"y"})
    assert all(half[name] == full[name] for name in full.keys() - halved)
