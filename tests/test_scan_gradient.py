"""Chapter 09: the hand-written gradients of the scans, and what they keep in memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimamba.scan_gradient import (
    backward_from_checkpoints,
    chunk_length,
    forward_with_checkpoints,
    linear_scan,
    selective_scan_checkpointed,
)
from minimamba.sequential_scan import selective_scan_sequential

NAMES = ("u", "delta", "A", "B", "C", "initial_state")


def draw(batch, length, channels, states, groups=1, constant="", seed=0, dtype=torch.float64):
    """Six arguments that expose mistakes: Δ varies in time, decays near 0 and near 1, signs at random.

    `constant` names those of B and C that do not vary; `groups` divides `channels`.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=dtype)
    log_uniform = lambda low, high, *shape: torch.tensor(10 ** rng.uniform(low, high, shape), dtype=dtype)
    maps = [(channels, states) if name in constant else (batch, length, groups, states) for name in "BC"]
    return (
        normal(batch, length, channels),
        log_uniform(-3, 0, batch, length, channels),
        -log_uniform(-1, 1.5, channels, states),
        normal(*maps[0]),
        normal(*maps[1]),
        normal(batch, channels, states),
    )


def sequential(u, delta, A, B, C, initial_state):
    """The reference loop, which wants a constant B or C expanded over batch and time."""
    B, C = (x.expand(*u.shape[:2], *x.shape) if x.ndim == 2 else x for x in (B, C))
    return selective_scan_sequential(u, delta, A, B, C, initial_state)


def cotangents(inputs, seed=1):
    """Random gradients of y and the final state."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, dtype=x.dtype, generator=rng) for x in (inputs[0], inputs[5]))


def outputs_and_gradients(scan, inputs, grads=None):
    """y, the final state and the six gradients, by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = scan(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, cotangents(inputs) if grads is None else grads)
    return dict(zip(("y", "final_state", *NAMES), [x.detach() for x in (*outputs, *gradients)], strict=True))


def assert_close(got, expected, tolerance=1e-10):
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        error = (got[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.one_of(st.integers(1, 5), st.integers(1, 70)),  # up to five chunks of 16
        "channels": st.integers(1, 4),
        "states": st.integers(1, 5),
        "groups": st.integers(1, 3),
        "constant": st.sampled_from(["", "B", "C", "BC"]),
        "seed": st.integers(0, 2**16),
    }
).map(lambda x: {**x, "channels": x["channels"] * x["groups"]})


# linear_scan


def scan_matrices(a):
    """Return M (L, L) with M_ts = a_{s+1} ... a_t for s <= t, and the weights (L,) of h_0, for a (L,)."""
    length = len(a)
    M = np.array([[np.prod(a[s + 1 : t + 1]) if s <= t else 0.0 for s in range(length)] for t in range(length)])
    return M, np.cumprod(a)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_linear_scan_and_its_gradients_equal_the_matrix_form(length):
    rng = np.random.default_rng(length)
    a, b, cotangent = rng.uniform(-1.2, 1.2, length), rng.standard_normal(length), rng.standard_normal(length)
    h_0 = rng.standard_normal(())
    M, weights = scan_matrices(a)
    states = M @ b + weights * h_0
    g = M.T @ cotangent

    leaves = [torch.from_numpy(np.asarray(x)[None]).requires_grad_() for x in (a, b, h_0)]
    h = linear_scan(*leaves)
    da, db, dh_0 = torch.autograd.grad(h, leaves, torch.tensor(cotangent)[None])
    np.testing.assert_allclose(h[0].detach(), states, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(db[0], g, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(da[0], g * np.append(h_0, states[:-1]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dh_0[0], weights @ cotangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("length", [1, 5])
def test_linear_scan_gradcheck_first_and_second_order(trailing, length):
    torch.manual_seed(length)
    shapes = (2, length, *trailing), (2, length, *trailing), (2, *trailing)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert gradcheck(linear_scan, inputs)
    assert gradgradcheck(linear_scan, inputs)


def test_linear_scan_takes_zero_decay():
    a = torch.tensor([[0.5, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    b, h_0 = torch.ones(1, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    h = linear_scan(a, b, h_0)
    assert h.tolist() == [[1.5, 1.0, 3.0]]
    h.sum().backward()
    assert a.grad.tolist() == [[1.0, 4.5, 1.0]]


def test_linear_scan_names_the_argument_that_does_not_fit():
    a = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"^b: expected shape \(2, 5, 3\)"):
        linear_scan(a, torch.zeros(2, 4, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^initial_state: expected shape \(2, 3\)"):
        linear_scan(a, a, torch.zeros(1, 3))


# The selective scan: values and gradients


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_selective_scan_equals_autograd_through_the_loop(shape):
    inputs = draw(**shape)
    assert_close(outputs_and_gradients(selective_scan_checkpointed, inputs), outputs_and_gradients(sequential, inputs))


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("length, groups", [(1, 1), (5, 2), (19, 2)])
def test_selective_scan_gradcheck(constant, length, groups):
    inputs = [x.requires_grad_() for x in draw(2, length, 4, 1 if length > 5 else 3, groups, constant, seed=length)]
    assert gradcheck(selective_scan_checkpointed, inputs)


@settings(deadline=None, max_examples=25)
@given(shapes)
def test_plain_functions_agree_with_the_loop(shape):
    inputs = draw(**shape)
    expected = outputs_and_gradients(sequential, inputs)
    y, final_state, checkpoints = forward_with_checkpoints(*inputs)
    *gradients, y_again = backward_from_checkpoints(*cotangents(inputs), *inputs[:5], checkpoints)
    got = dict(zip(("y", "final_state", *NAMES), (y, final_state, *gradients), strict=True))
    assert_close(got, expected)
    assert torch.equal(y, y_again)
    assert all(x.is_contiguous() for x in (*got.values(), checkpoints))


def test_checkpoints_are_the_states_before_each_chunk():
    u, delta, A, B, C, initial_state = draw(2, 45, 4, 3, 2)
    checkpoints = forward_with_checkpoints(u, delta, A, B, C, initial_state)[2]
    assert checkpoints.shape == (3, 2, 3, 4)
    assert torch.equal(checkpoints[0], initial_state.mT)
    for k in (1, 2):
        part = slice(0, 16 * k)
        _, h = sequential(u[:, part], delta[:, part], A, B[:, part], C[:, part], initial_state)
        torch.testing.assert_close(checkpoints[k].mT, h)


@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(wanted):
    inputs = list(draw(2, 21, 4, 3, 2))
    expected = outputs_and_gradients(sequential, inputs)
    inputs[wanted].requires_grad_()
    y, final_state = selective_scan_checkpointed(*inputs)
    (gradient,) = torch.autograd.grad((y, final_state), inputs[wanted], cotangents(inputs))
    assert_close({"gradient": gradient}, {"gradient": expected[NAMES[wanted]]})


@pytest.mark.parametrize("output", ["y", "final_state"])
def test_one_output_alone(output):
    inputs = draw(2, 21, 4, 3)
    grads = tuple(x * (name == output) for name, x in zip(("y", "final_state"), cotangents(inputs), strict=True))
    leaves = [x.requires_grad_() for x in inputs]
    y, final_state = selective_scan_checkpointed(*leaves)
    loss = (y * grads[0]).sum() if output == "y" else (final_state * grads[1]).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected = outputs_and_gradients(sequential, inputs, grads)
    for name, gradient in zip(NAMES, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("constant", ["", "BC"])
def test_any_strides(constant):
    inputs = draw(2, 37, 4, 3, 2, constant)
    expected = outputs_and_gradients(sequential, inputs)
    transposed = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    every_second = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in inputs]
    for layout in (transposed, every_second):
        assert_close(outputs_and_gradients(selective_scan_checkpointed, layout), expected)


def test_expanded_inputs_and_cotangents():
    inputs = draw(2, 37, 4, 3)
    inputs = [x[:1].expand_as(x) for x in inputs]
    grads = tuple(x[:1].expand_as(x) for x in cotangents(inputs))
    expected = outputs_and_gradients(sequential, inputs, grads)
    assert_close(outputs_and_gradients(selective_scan_checkpointed, inputs, grads), expected)


@settings(deadline=None, max_examples=15)
@given(shape=shapes, split=st.floats(0, 1))
def test_the_state_carries_a_sequence_over_a_split(shape, split):
    u, delta, A, B, C, initial_state = draw(**{**shape, "length": shape["length"] + 1, "constant": ""})
    length = u.shape[1]
    at = min(max(1, round(split * length)), length - 1)

    def in_two_parts(u, delta, A, B, C, state):
        ys = []
        for part in (slice(0, at), slice(at, None)):
            y, state = selective_scan_checkpointed(u[:, part], delta[:, part], A, B[:, part], C[:, part], state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    inputs = (u, delta, A, B, C, initial_state)
    assert_close(outputs_and_gradients(in_two_parts, inputs), outputs_and_gradients(sequential, inputs))


# Precision, extremes, determinism


@pytest.mark.parametrize("length", [1, 301, 1000])
def test_float32_is_as_precise_as_the_loop(length):
    inputs = draw(2, length, 3, 4, dtype=torch.float32, seed=length)
    # Start from the float32 values, so that rounding the inputs is no part of the error.
    exact = outputs_and_gradients(
        sequential, [x.double() for x in inputs], tuple(x.double() for x in cotangents(inputs))
    )
    got = outputs_and_gradients(selective_scan_checkpointed, inputs)
    loop = outputs_and_gradients(sequential, inputs)
    for name, value in exact.items():
        scale = value.abs().max().clamp_min(1e-30)
        error, error_of_loop = ((x[name].double() - value).abs().max() / scale for x in (got, loop))
        assert error < max(4 * error_of_loop, 1e-6), f"{name}: {error:.1e}, the loop's is {error_of_loop:.1e}"
        assert got[name].dtype == torch.float32


@pytest.mark.parametrize("step", [0.0, 1e-8, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_steps_stay_finite(step, dtype):
    inputs = list(draw(1, 37, 3, 4, dtype=dtype))
    inputs[1] = torch.full_like(inputs[1], step)
    inputs[1][:, ::5] = 0.1  # in between steps of an ordinary size
    got = outputs_and_gradients(selective_scan_checkpointed, inputs)
    assert all(torch.isfinite(x).all() for x in got.values())
    assert_close(got, outputs_and_gradients(sequential, inputs), 1e-4 if dtype == torch.float32 else 1e-10)


def test_nan_is_not_hidden():
    inputs = draw(1, 40, 2, 3)
    inputs[0][0, 20, 1] = torch.nan
    y, final_state, _ = forward_with_checkpoints(*inputs)
    assert torch.isnan(y[0, 20:, 1]).all() and torch.isnan(final_state[0, 1]).all()
    assert torch.isfinite(y[0, :20]).all() and torch.isfinite(y[..., 0]).all()


def test_two_runs_give_the_same_bits():
    inputs = draw(2, 50, 6, 4, 2, dtype=torch.float32)
    first, second = (outputs_and_gradients(selective_scan_checkpointed, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Memory


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(2, 37, 4, 3), (1, 37, 1, 1), (1, 1, 1, 1), (1, 1, 3, 1), (1, 16, 1, 4)])
@pytest.mark.parametrize("constant", ["", "BC"])
def test_nothing_returned_shares_storage(shape, constant):
    inputs = draw(*shape, constant=constant)
    kept = [x.clone() for x in inputs]
    y, final_state, checkpoints = forward_with_checkpoints(*inputs)
    grads = cotangents(inputs)
    gradients = backward_from_checkpoints(*grads, *inputs[:5], checkpoints)
    tensors = [*inputs, *grads, y, final_state, checkpoints, *gradients]
    assert len({storage(x) for x in tensors}) == len(tensors)
    for x in (y, final_state, checkpoints, *gradients):
        assert x.untyped_storage().nbytes() == x.nbytes, "a view would keep the whole buffer alive"
    assert all(torch.equal(x, before) for x, before in zip(inputs, kept, strict=True)), "an input was overwritten"


@pytest.mark.parametrize("length", [1, 2, 16, 17, 100, 1024, 4096, 16384, 100_000])
def test_chunk_length_follows_the_square_root(length):
    steps = chunk_length(length)
    assert 1 <= steps <= length
    if 256 <= length <= 16384:
        assert steps == math.isqrt(length)


def saved_bytes(scan, inputs):
    """Bytes that autograd keeps for the backward pass, besides the inputs themselves."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    own, kept = {storage(x) for x in leaves}, {}

    def pack(x):
        if storage(x) not in own:
            kept[storage(x)] = (x.untyped_storage().nbytes(), x)  # holding x keeps its address from being reused
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        outputs = scan(*leaves)
    del outputs
    return sum(size for size, _ in kept.values())


def test_saved_bytes_grow_with_the_square_root_of_length():
    batch, channels, states = 1, 2, 3
    saved = [
        saved_bytes(selective_scan_checkpointed, draw(batch, length, channels, states, dtype=torch.float32))
        for length in (256, 1024, 4096)
    ]
    assert saved == [4 * batch * channels * states * math.isqrt(length) for length in (256, 1024, 4096)]


def test_the_loop_keeps_every_state():
    """The other side of the comparison, so that the meter is known to measure."""
    batch, channels, states = 1, 2, 3
    saved = [saved_bytes(sequential, draw(batch, n, channels, states, dtype=torch.float32)) for n in (64, 256)]
    assert saved[0] >= 2 * 4 * batch * channels * states * 64
    assert 3.9 < saved[1] / saved[0] < 4.1


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation's result occupies."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, size, x.numel())
        return result


@pytest.mark.parametrize("constant", ["", "BC"])
def test_nothing_of_size_length_times_channels_times_states_is_made(constant):
    batch, length, channels, states = 2, 1024, 5, 16
    inputs = draw(batch, length, channels, states, constant=constant, dtype=torch.float32)
    grads = cotangents(inputs)
    with LargestTensor() as forward:
        _, _, checkpoints = forward_with_checkpoints(*inputs)
    with LargestTensor() as backward:
        backward_from_checkpoints(*grads, *inputs[:5], checkpoints)
    everything = batch * length * channels * states
    assert forward.elements <= 2 * everything // chunk_length(length) * 1.01 + batch * length * states
    assert backward.elements <= 3 * everything // chunk_length(length) * 1.01 + batch * length * states
    assert max(forward.elements, backward.elements) < everything / 4

    with LargestTensor() as simple:
        linear_states(*inputs)
    assert simple.elements >= everything


def linear_states(u, delta, A, B, C, initial_state):
    """The simple version of the selective scan: every state at once, by `linear_scan`."""
    A_bar = torch.exp(delta[..., None] * A)
    B, C = (x if x.ndim == 2 else x.repeat_interleave(u.shape[-1] // x.shape[2], dim=2) for x in (B, C))
    h = linear_scan(A_bar, (delta * u)[..., None] * B, initial_state)
    return (h * C).sum(-1), h[:, -1]


@settings(deadline=None, max_examples=10)
@given(shapes)
def test_linear_scan_makes_the_selective_scan(shape):
    inputs = draw(**shape)
    assert_close(outputs_and_gradients(linear_states, inputs), outputs_and_gradients(sequential, inputs))
