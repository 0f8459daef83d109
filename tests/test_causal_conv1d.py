"""The short convolution: both methods against the equation, gradients, packed documents, the drop-ins, the device."""

import contextlib
import functools
import importlib
import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import lay_out, relative_error

import minimamba
from minimamba import causal_conv1d, conv_plan
from minimamba.triton_scan import compile_kernels

module = importlib.import_module("minimamba.causal_conv1d")  # the package's attribute of this name is the function
F64 = torch.float64
TENSORS = ("x", "weight", "bias", "initial_state")
LAYOUTS = ("contiguous", "transposed", "poisoned", "expanded")
METHODS = ("cpu", "triton")


def oracle(x, weight, bias, initial_state, cu_seqlens, activation):
    """The equation, one number at a time in float64. -> y, final_state"""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    batch, length, channels = x.shape
    width = weight.shape[1]
    if cu_seqlens is None:
        sequences = [(i, 0, length) for i in range(batch)]
    else:
        sequences = [(0, start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    y = np.zeros((batch, length, channels))
    final_state = np.zeros((len(sequences), channels, width - 1))
    for s, (i, start, stop) in enumerate(sequences):
        for d in range(channels):
            before = np.zeros(width - 1) if initial_state is None else np.asarray(initial_state[s, d], np.float64)
            seen = [*before, *x[i, start:stop, d]]
            final_state[s, d] = seen[len(seen) - (width - 1) :]
            for t in range(stop - start):
                pre = 0.0 if bias is None else float(bias[d])
                for k in range(width):
                    pre += weight[d, k] * seen[t + k]
                y[i, start + t, d] = pre if activation is None else pre / (1 + np.exp(-pre))
    return torch.from_numpy(y), torch.from_numpy(final_state)


def draw(
    batch=2, length=11, channels=5, width=4, bias=True, initial_state=True, documents=None, activation="silu",
    layout="contiguous", dtype=F64, filters=None, seed=0, device="cpu",
):  # fmt: skip
    """Draw the arguments of a call and cotangents of its results. `documents` packs that many in one row."""
    rng = np.random.default_rng(seed)
    batch = 1 if documents else batch

    def normal(*shape, to=dtype):
        return torch.from_numpy(rng.standard_normal(shape)).to(device, to)

    cu_seqlens = None
    if documents:
        inner = np.sort(rng.integers(0, length + 1, documents - 1))
        kind = [torch.int32, torch.int64][seed % 2]
        cu_seqlens = torch.tensor([0, *inner.tolist(), length], dtype=kind, device=device)
    sequences = documents or batch
    tensors = {
        "x": normal(batch, length, channels),
        "weight": normal(channels, width, to=filters or dtype),
        "bias": normal(channels, to=filters or dtype) if bias else None,
        "initial_state": normal(sequences, channels, width - 1) if initial_state else None,
    }
    tensors = {name: None if v is None else lay_out(v, layout) for name, v in tensors.items()}
    cotangents = normal(batch, length, channels), normal(sequences, channels, width - 1)
    return tensors, {"cu_seqlens": cu_seqlens, "activation": activation}, cotangents


def run(tensors, options, **more):
    given = dict(tensors)
    x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
    return causal_conv1d(x, weight, bias, **given, **options, return_final_state=True, **more)


def gradients(tensors, options, cotangents, call=run, **more):
    """{name: gradient} of a random linear function of y and the final state."""
    leaves = {name: v.detach().requires_grad_() for name, v in tensors.items() if v is not None}
    results = call({**tensors, **leaves}, options, **more)
    loss = sum((got * c).sum() for got, c in zip(results, cotangents, strict=True))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))


def as_float64(tensors):
    return {name: None if v is None else v.detach().cpu().double() for name, v in tensors.items()}


@st.composite
def problems(draw_, max_length=24, dtypes=(F64, torch.float32, torch.float16, torch.bfloat16)):
    flag = st.booleans()
    dtype = draw_(st.sampled_from(dtypes))
    return draw(
        batch=draw_(st.integers(1, 3)),
        length=draw_(st.one_of(st.integers(1, 4), st.integers(1, max_length))),
        channels=draw_(st.integers(1, 6)),
        width=draw_(st.integers(2, 4)),
        bias=draw_(flag),
        initial_state=draw_(flag),
        documents=draw_(st.sampled_from([None, None, 1, 3, 6])),
        activation=draw_(st.sampled_from([None, "silu"])),
        layout=draw_(st.sampled_from(LAYOUTS)),
        dtype=dtype,
        filters=draw_(st.sampled_from([dtype, F64 if dtype == F64 else torch.float32])),
        seed=draw_(st.integers(0, 2**16)),
    )


# By rule, and by hand where a test's few steps have to reach into several rounds, segments and programs.
TILES = [None, *(conv_plan.Tile(*sizes, 1) for sizes in ((2, 1, 1), (4, 2, 1), (2, 1, 2), (2, 2, 2)))]


def test_lines_of_time_are_as_long_as_was_fastest():
    """(channels, segments, rounds, warps) of a program, as measured on an H200 (kernels/NOTES.md)."""
    tile_for = functools.partial(conv_plan.tile_for, element_size=2, time_last=True)
    assert tile_for(2048, 8, 4096, backward=True) == (1, 64, 4, 2)
    assert tile_for(16384, 1, 4096, backward=True) == (1, 64, 8, 2)
    assert tile_for(16384, 1, 4096) == tile_for(4096, 4, 10240) == (1, 128, 4, 4)
    assert tile_for(256, 64, 4096, backward=True) == (2, 32, 1, 2)


@contextlib.contextmanager
def fixed(tile):
    """Every launch with this tile, None for the rule. Then even lengths count as aligned, odd ones do not."""
    plans = (conv_plan.plan_forward, conv_plan.plan_backward)
    with pytest.MonkeyPatch.context() as patch:
        if tile:
            patch.setattr(conv_plan, "tile_for", lambda *_, **__: tile)
            patch.setattr(conv_plan, "_aligned", lambda shape, _: shape[1] % 2 == 0)
            for plan in plans:
                plan.cache_clear()
        yield
    if tile:
        for plan in plans:
            plan.cache_clear()


@pytest.fixture
def tiles():
    """Return a function that fixes the tile of what follows."""
    with contextlib.ExitStack() as stack:
        yield lambda tile: stack.enter_context(fixed(tile))


TOLERANCE = {F64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_cpu_is_the_equation(problem):
    tensors, options, _ = problem
    got = run(tensors, options, method="cpu")
    for one, expected in zip(got, oracle(**as_float64(tensors), **options), strict=True):
        assert one.dtype == tensors["x"].dtype and one.shape == expected.shape
        assert relative_error(one, expected) <= TOLERANCE[one.dtype]


@settings(max_examples=20, deadline=None)
@given(problem=problems(), tile=st.sampled_from(TILES))
def test_triton_is_the_equation(problem, tile):
    tensors, options, _ = problem
    with fixed(tile):
        got = run(tensors, options, method="triton")
    for one, expected in zip(got, oracle(**as_float64(tensors), **options), strict=True):
        assert one.dtype == tensors["x"].dtype and one.shape == expected.shape
        assert relative_error(one, expected) <= TOLERANCE[one.dtype]


@settings(max_examples=8, deadline=None)
@given(problem=problems(max_length=20), tile=st.sampled_from(TILES))
def test_triton_gradients(problem, tile):
    tensors, options, cotangents = problem
    wide = gradients(as_float64(tensors), options, [c.double() for c in cotangents], method="cpu")
    with fixed(tile):
        got = gradients(tensors, options, cotangents, method="triton")
    for name, gradient in got.items():
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
        largest = wide[name].abs().max().clamp_min(1e-6 * wide["x"].abs().max())
        error = (gradient.double() - wide[name]).abs().max() / largest
        assert error <= 4 * TOLERANCE[gradient.dtype], name


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 32, 33, 50])
def test_lengths_around_rounds_segments_and_programs(length, layout, tiles):
    tiles(conv_plan.Tile(2, 2, 2 if length > 16 else 1, 1))
    problem = draw(batch=1, length=length, channels=3, layout=layout, seed=length)
    tensors, options, _ = problem
    for one, expected in zip(run(tensors, options, method="triton"), oracle(**tensors, **options), strict=True):
        assert relative_error(one, expected) < 1e-13
    expected = gradients(*problem, method="cpu")
    for name, gradient in gradients(*problem, method="triton").items():
        assert relative_error(gradient, expected[name]) < 1e-12, name


@pytest.mark.parametrize("documents", [None, 3])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_channels_first_inside_larger_memory(dtype, width, documents, tiles):
    """A (B, D, L) view at any offset with NaN around each row: a vector over its ends takes nothing from there."""
    tiles(conv_plan.Tile(2, 2, 2, 1))
    tensors, options, cotangents = draw(
        length=42, channels=3, width=width, documents=documents, dtype=dtype, seed=width
    )
    x = tensors["x"]
    around = x.new_full((x.shape[0], 3, 42 + 9), torch.nan)
    inside = tensors | {"x": around[..., 5:47].mT.copy_(x)}
    for one, expected in zip(run(inside, options, method="triton"), run(tensors, options, method="cpu"), strict=True):
        torch.testing.assert_close(one, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    expected = gradients(as_float64(tensors), options, [c.double() for c in cotangents], method="cpu")
    for name, gradient in gradients(inside, options, cotangents, method="triton").items():
        assert relative_error(gradient, expected[name]) <= 4 * TOLERANCE[gradient.dtype], name
    assert around[..., :5].isnan().all() and around[..., 47:].isnan().all()


@pytest.mark.parametrize("documents", [None, 3])
@pytest.mark.parametrize(("method", "activation"), [("cpu", None), ("cpu", "silu"), ("triton", "silu")])
def test_gradcheck(method, activation, documents):
    length = 2 if method == "triton" else 6
    tensors, options, _ = draw(length=length, channels=1, width=3, documents=documents, activation=activation)
    leaves = [tensors[name].requires_grad_() for name in TENSORS]
    call = lambda *leaves: run(dict(zip(TENSORS, leaves, strict=True)), options, method=method)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=method == "triton")


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_through_one_result_only(method):
    tensors, options, (cotangent, of_state) = draw(length=5)
    zero = torch.zeros_like
    for one, pair in (
        (lambda *r: r[0], (cotangent, zero(of_state))),
        (lambda *r: r[1], (zero(cotangent), of_state)),
    ):
        alone = [c for c in pair if c.any()]
        got = gradients(tensors, options, alone, call=lambda *a, one=one, **k: [one(*run(*a, **k))], method=method)
        expected = gradients(tensors, options, pair, method="cpu")
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 19), method=st.sampled_from(METHODS), width=st.integers(2, 4))
def test_a_sequence_split_anywhere_is_the_whole(seed, cut, method, width):
    tensors, options, _ = draw(batch=1, length=20, channels=2, width=width, seed=seed)
    y, final = run(tensors, options, method=method)
    first, state = run(tensors | {"x": tensors["x"][:, :cut]}, options, method=method)
    second, last = run(tensors | {"x": tensors["x"][:, cut:], "initial_state": state}, options, method=method)
    torch.testing.assert_close(torch.cat([first, second], dim=1), y, rtol=0, atol=1e-14)
    assert torch.equal(last, final)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_documents_do_not_leak(method, layout, tiles):
    """Of documents 0, 1, 2, 3, 5 and 19 steps long, one is NaN: every bit of the others stays."""
    tiles(conv_plan.Tile(4, 2, 1, 1))
    borders = [0, 0, 1, 3, 6, 11, 30]
    tensors, options, cotangents = draw(batch=1, length=30, channels=3, initial_state=False, layout=layout)
    tensors["initial_state"] = draw(batch=6, channels=3)[0]["initial_state"]
    cotangents = cotangents[0], draw(batch=6, channels=3)[2][1]
    options["cu_seqlens"] = torch.tensor(borders)
    y, state = run(tensors, options, method=method)
    names = ("x", "initial_state")
    clean = gradients(tensors, options, cotangents, method=method)
    for document, (start, stop) in enumerate(pairwise(borders)):
        dirty = {name: None if v is None else v.clone() for name, v in tensors.items()}
        dirty["x"][:, start:stop] = torch.nan
        dirty["initial_state"][document] = torch.nan
        got, got_state = run(dirty, options, method=method)
        others = torch.ones(30, dtype=torch.bool)
        others[start:stop] = False
        rest = torch.arange(6) != document
        assert torch.equal(got[:, others], y[:, others]) and got[:, ~others].isnan().all()
        assert torch.equal(got_state[rest], state[rest]) and got_state[~rest].isnan().all()
        if document == 3 or method == "cpu":
            dx, dstate = (gradients(dirty, options, cotangents, method=method)[name] for name in names)
            assert torch.equal(dx[:, others], clean["x"][:, others])
            assert torch.equal(dstate[rest], clean["initial_state"][rest])


@pytest.mark.parametrize("documents", [None, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_two_backward_passes_give_the_same_bits(documents, layout, tiles):
    tiles(conv_plan.Tile(4, 2, 1, 1))
    problem = draw(batch=2, length=20, documents=documents, layout=layout, dtype=torch.float32)
    one, other = (gradients(*problem, method="triton") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_results_follow_the_layout_of_x_and_are_no_views():
    for layout, dim in (("contiguous", 2), ("transposed", 1)):
        tensors, options, _ = draw(layout=layout)
        y, state = run(tensors, options, method="triton")
        assert y.stride(dim) == 1 and state.is_contiguous()
        x = tensors["x"].requires_grad_()
        assert torch.autograd.grad(run(tensors, options, method="triton")[0].sum(), x)[0].stride(dim) == 1


def test_offsets_beyond_two_to_the_31():
    """Two steps that lie 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 8
    x = torch.empty(apart + 4, dtype=torch.float16).as_strided((1, 2, 4), (4, apart, 1))
    x.copy_(torch.arange(8.0).view(1, 2, 4))
    weight = torch.ones(4, 2)
    y = causal_conv1d(x, weight, method="triton")
    assert torch.equal(y, causal_conv1d(x.contiguous(), weight, method="cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_infinite_and_nan_go_in_and_come_out(method):
    x = torch.ones(1, 9, 2)
    x[0, 3, 0] = torch.nan
    x[0, 3, 1] = torch.inf
    y = causal_conv1d(x, torch.ones(2, 3), activation="silu", method=method)
    assert y[0, 3:6, 0].isnan().all() and y[0, 3:6, 1].isinf().all() and y[0, [0, 1, 2, 6, 7, 8]].isfinite().all()
    extreme = torch.tensor([-3e38, -200.0, -90.0, 0.0, 90.0, 3e38]).view(1, 6, 1)
    with np.errstate(over="ignore"):  # exp2 may: then its limit is right
        y = causal_conv1d(extreme, torch.tensor([[0.0, 1.0]]), activation="silu", method=method)
    assert y.isfinite().all() and torch.allclose(y.flatten()[4:], extreme.flatten()[4:])


# --- under the compiler --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"documents": 2}, {"bias": False, "initial_state": False, "layout": "transposed"}],
    ids=["full", "packed", "bare"],
)
@pytest.mark.parametrize("return_final_state", [True, False])
def test_opcheck(options, return_final_state):
    tensors, others, _ = draw(length=4, **options)
    leaves = [None if tensors[n] is None else tensors[n].requires_grad_() for n in TENSORS]
    torch.library.opcheck(module._forward, (*leaves, others["cu_seqlens"], True, return_final_state))


def test_opcheck_of_the_step():
    x, state, weight = torch.randn(2, 5), torch.randn(2, 5, 4), torch.randn(5, 4)
    torch.library.opcheck(module.update, (x, state, weight, torch.randn(5), True))


@pytest.mark.parametrize("documents", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method, documents):
    torch._dynamo.reset()
    tensors, options, cotangents = draw(length=6, documents=documents)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = (f(tensors, options, method=method) for f in (compiled, run))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    expected = gradients(tensors, options, cotangents, method=method)
    for name, gradient in gradients(tensors, options, cotangents, call=compiled, method=method).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-13)


def test_the_step_compiles():
    torch._dynamo.reset()
    x, weight = torch.randn(2, 5), torch.randn(5, 4)
    states = torch.randn(2, 5, 4).expand(2, 2, 5, 4).clone()
    compiled = torch.compile(minimamba.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    expected = minimamba.causal_conv1d_update(x, states[0], weight, activation="silu")
    torch.testing.assert_close(compiled(x, states[1], weight, activation="silu"), expected)
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    tensors, options, _ = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = run(tensors, options, method=method)
    assert y.dtype == state.dtype == torch.bfloat16
    assert relative_error(y, run(tensors, options, method="cpu")[0].double()) < 2e-2


# --- the drop-ins --------------------------------------------------------------------------------------


def test_the_drop_ins_have_the_packages_signatures():
    names = lambda f: " ".join(inspect.signature(f).parameters)
    whole = "x weight bias seq_idx initial_states return_final_states final_states_out activation"
    assert names(minimamba.causal_conv1d_fn) == whole
    assert names(minimamba.causal_conv1d_update) == "x conv_state weight bias activation"


def test_the_drop_in_is_the_function_with_channels_before_time():
    tensors, options, _ = draw(dtype=torch.float32)
    x, weight, bias, initial_state = (tensors[name] for name in TENSORS)
    y, final = run(tensors, options)
    out, state = minimamba.causal_conv1d_fn(
        x.mT, weight, bias, initial_states=initial_state, return_final_states=True, activation="swish"
    )
    assert torch.equal(out.mT, y) and torch.equal(state, final)
    buffer = torch.zeros_like(final)
    _, state = minimamba.causal_conv1d_fn(x.mT, weight, bias, None, initial_state, True, buffer, "silu")
    assert state is buffer and torch.equal(buffer, final)
    alone = minimamba.causal_conv1d_fn(x.mT, weight, bias)
    assert torch.equal(alone.mT, causal_conv1d(x, weight, bias))


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(METHODS), dtype=st.sampled_from(list(TOLERANCE)), width=st.integers(2, 4),
    more=st.integers(0, 2), layout=st.sampled_from(["contiguous", "transposed", "poisoned"]),
    bias=st.booleans(), activation=st.sampled_from([None, "silu"]), channels=st.integers(1, 6),
)  # fmt: skip
def test_steps_are_the_sequence(method, dtype, width, more, layout, bias, activation, channels):
    tensors, options, _ = draw(
        length=5, channels=channels, width=width, bias=bias, activation=activation, layout=layout, dtype=dtype
    )
    x, weight, offset, initial_state = (tensors[name] for name in TENSORS)
    y, _ = run(tensors, options, method="cpu")
    old = torch.full((2, channels, more), 7.0, dtype=dtype)
    state = lay_out(torch.cat([old, initial_state], dim=-1), layout)
    everything = torch.cat([state, x.mT], dim=-1)
    for t in range(5):
        step = module.update_now(x[:, t], state, weight, offset, activation is not None, method)
        assert step.dtype == dtype
        assert relative_error(step, y[:, t].double()) <= TOLERANCE[dtype]
        assert torch.equal(state, everything[..., t + 1 : t + width + more])


def test_a_step_outside_and_inside_the_dispatcher():
    x, weight = torch.randn(2, 5), torch.randn(5, 4)
    states = torch.randn(2, 5, 4).expand(2, 2, 5, 4).clone()
    inside = minimamba.causal_conv1d_update(x, states[0], weight)
    before = states[1]._version
    with torch.no_grad():
        outside = minimamba.causal_conv1d_update(x, states[1], weight)
    assert torch.equal(inside, outside) and torch.equal(states[0], states[1]) and states[1]._version > before


# --- bad input -----------------------------------------------------------------------------------------


BAD = [  # draw() makes batch 2, length 11, channels 5, width 4
    ("x: expected a torch.Tensor, got list", TypeError, {"x": [1.0]}),
    ("x: expected a floating-point tensor", TypeError, {"x": torch.ones(2, 11, 5, dtype=torch.int64)}),
    (r"x: expected shape \(B, L, D\), got \(2, 11\)", ValueError, {"x": torch.ones(2, 11, dtype=F64)}),
    ("x: expected L >= 1", ValueError, {"x": torch.ones(2, 0, 5, dtype=F64)}),
    ("x: expected B >= 1", ValueError, {"x": torch.ones(0, 11, 5, dtype=F64)}),
    ("x: expected D >= 1", ValueError, {"x": torch.ones(2, 11, 0, dtype=F64)}),
    (r"weight: expected shape \(5, W\), got \(4, 4\)", ValueError, {"weight": torch.ones(4, 4, dtype=F64)}),
    ("weight: expected shape", ValueError, {"weight": torch.ones(5, 1, 4, dtype=F64)}),
    ("weight: expected a width W from 2 to 4, got 5", ValueError, {"weight": torch.ones(5, 5, dtype=F64)}),
    ("weight: expected a width W from 2 to 4, got 1", ValueError, {"weight": torch.ones(5, 1, dtype=F64)}),
    (r"weight: expected torch\.float64 \(beside x\)", TypeError, {"weight": torch.ones(5, 4)}),
    ("weight: expected device cpu", ValueError, {"weight": torch.ones(5, 4, dtype=F64, device="meta")}),
    (r"bias: expected shape \(5,\)", ValueError, {"bias": torch.ones(5, 1, dtype=F64)}),
    ("bias: expected torch.float64", TypeError, {"bias": torch.ones(5)}),
    (r"initial_state: expected shape \(2, 5, 3\)", ValueError, {"initial_state": torch.ones(2, 3, 5, dtype=F64)}),
    ("initial_state: expected torch.float64", TypeError, {"initial_state": torch.ones(2, 5, 3)}),
    ("cu_seqlens: expected an int32 or int64 tensor", TypeError, {"cu_seqlens": [0, 11]}),
    ("x: expected batch 1 beside cu_seqlens", ValueError, {"cu_seqlens": torch.tensor([0, 11])}),
    ("activation: expected one of None, 'silu'", ValueError, {"activation": "relu"}),
    ("method: expected one of 'auto', 'cpu', 'triton', got 'cuda'", ValueError, {"method": "cuda"}),
]


@pytest.mark.parametrize(("message", "error", "changes"), BAD, ids=[f"{i}-{m[0][:24]}" for i, m in enumerate(BAD)])
def test_bad_input_is_named(message, error, changes):
    tensors, options, _ = draw()
    with pytest.raises(error, match=f"^{message}"):
        run(
            tensors | {k: v for k, v in changes.items() if k in TENSORS},
            options | {k: v for k, v in changes.items() if k not in TENSORS},
        )


@pytest.mark.parametrize("borders", [[1, 11], [0, 10], [0, 5, 3, 11]])
@pytest.mark.parametrize("method", METHODS)
def test_wrong_borders_are_named(method, borders):
    tensors, options, _ = draw(batch=1, initial_state=False)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected borders rising"):
        run(tensors, options | {"cu_seqlens": torch.tensor(borders)}, method=method)


def test_the_drop_ins_name_their_own_arguments():
    x, weight = torch.ones(2, 5, 11), torch.ones(5, 4)
    fn = minimamba.causal_conv1d_fn
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, D, L\)"):
        fn(x[0], weight)
    with pytest.raises(ValueError, match=r"^weight: expected shape \(5, W\), got \(11, 4\)"):
        fn(x, torch.ones(11, 4))
    with pytest.raises(ValueError, match=r"^seq_idx: .*cu_seqlens"):
        fn(x, weight, seq_idx=torch.zeros(2, 11))
    with pytest.raises(ValueError, match=r"^initial_states: expected shape"):
        fn(x, weight, initial_states=torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"^final_states_out: expected shape"):
        fn(x, weight, return_final_states=True, final_states_out=torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"^activation: "):
        fn(x, weight, activation="gelu")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", torch.ones(2, 5, 1), ValueError),
        ("x", [1.0], TypeError),
        ("conv_state", torch.zeros(2, 5, 2), ValueError),
        ("conv_state", torch.zeros(5, 4), ValueError),
        ("conv_state", torch.zeros(2, 5, 4).double(), TypeError),
        ("weight", torch.ones(4, 5), ValueError),
        ("bias", torch.ones(4), ValueError),
        ("activation", "relu", ValueError),
    ],
)
def test_bad_steps_are_named_every_time_and_leave_the_state_alone(name, value, error):
    good = {"x": torch.ones(2, 5), "conv_state": torch.zeros(2, 5, 4), "weight": torch.ones(5, 4)}
    minimamba.causal_conv1d_update(**{k: v.clone() for k, v in good.items()})
    arguments = good | {name: value}
    for _ in range(2):
        with pytest.raises(error, match=f"^{name}: "):
            minimamba.causal_conv1d_update(**arguments)
    assert (torch.as_tensor(arguments["conv_state"]) == 0).all()


# --- without a GPU, every variant compiles -------------------------------------------------------------


def jobs_for(name, variants, capability):
    """Jobs of `compile_kernels`: `variants` are (half, wide, flags); a pointer's dtype follows from its name."""
    kernel = getattr(importlib.import_module("minimamba.kernels.causal_conv1d"), name)
    made = []
    for half, wide, flags in variants:
        constants = {n for n in kernel.arg_names if (n.isupper() and n != "L") or n in flags}
        filters = wide if flags.get("TIME_LAST") else half  # both dtypes of weight get their turn
        kinds = dict.fromkeys(("weight", "bias", "dweight", "dbias"), f"*{filters}") | {"partial": f"*{wide}"}
        kinds |= dict.fromkeys(("x", "y", "grad_y", "dx", "initial_state", "final_state"), f"*{half}")
        kinds |= dict.fromkeys(("grad_final_state", "dinitial_state", "conv_state"), f"*{half}")
        kinds["cu_seqlens"] = "*i32"
        values = {n: flags.get(n, True) for n in constants} | {"DTYPE": wide}
        values = {n: v for n, v in values.items() if n in constants}
        signature = {n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants}
        job = {"kernel": ("minimamba.kernels.causal_conv1d", name), "signature": signature, "constants": values}
        made.append(job | {"capability": capability, "num_warps": 4})
    return made


def test_kernels_compile_for_a_gpu():
    channels_last = {"TIME_LAST": False, "VECTORS": False, "SEGMENTS": 4, "BLOCK_D": 128, "BLOCKS": 2, "WIDTH": 4}
    time_last = {"TIME_LAST": True, "SEGMENTS": 32, "BLOCK_D": 8, "BLOCKS": 3, "WIDTH": 3, "PACKED": False}
    options = ("HAS_INITIAL_STATE", "WANT_FINAL_STATE", "HAS_GRAD_FINAL_STATE", "HAS_BIAS", "SILU", "PACKED")
    bare = channels_last | {name: False for name in options}
    whole = [("bf16", "fp32", bare), ("bf16", "fp32", time_last), ("fp16", "fp32", channels_last)]
    step, last = (
        ("bf16", "fp32", {"WIDTH": 4, "STATE": 4, "BLOCK_D": 256, "BLOCKS": 2}),
        {"WIDTH": 4, "BLOCK_R": 32, "BLOCK_D": 32},
    )
    # Triton makes a constant of every integer that is 1, so for sizes of 1 other code is compiled.
    sizes = ("L", "channels", "sequences", "chunks", "iterations", "x_t", "y_t", "dx_t", "grad_y_t", "x_d", "y_d")
    whole.append(("fp32", "fp32", bare | dict.fromkeys((*options, *sizes), 1)))
    whole.append(("fp32", "fp32", time_last | dict.fromkeys(sizes, 1) | {"VECTORS": False}))
    whole.append(("fp64", "fp64", time_last))
    jobs = []
    for capability, forward, backward in (
        (80, whole[:1], whole[2:3]),
        (90, [*whole, ("fp64", "fp64", channels_last | {"WIDTH": 2})], whole),
    ):
        jobs += jobs_for("causal_conv1d_forward_kernel", forward, capability)
        jobs += jobs_for("causal_conv1d_backward_kernel", backward, capability)
        jobs += jobs_for("causal_conv1d_update_kernel", [step], capability)
        jobs += jobs_for("sum_partial_kernel", [("bf16", "fp32", last)], capability)
    for made, asked in zip(compile_kernels(jobs), jobs, strict=True):
        assert f".target sm_{asked['capability']}" in made["ptx"]


# --- on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, 7], ids=["batch", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_device(dtype, layout, documents):
    for seed, (length, channels, width) in enumerate(
        [(1, 1, 4), (2, 300, 2), (131, 36, 3), (300, 64, 4), (1000, 256, 4)]
    ):
        seed += LAYOUTS.index(layout)
        tensors, options, cotangents = draw(
            length=length, channels=channels, width=width, documents=documents, layout=layout, dtype=dtype, seed=seed,
            bias=seed % 3 != 1, initial_state=seed % 4 != 2, activation=[None, "silu"][seed % 5 != 3], device="cuda",
            filters=torch.float32 if seed % 2 and dtype != F64 else dtype,
        )  # fmt: skip
        wide = as_float64(tensors)
        on_cpu = options | {"cu_seqlens": None if documents is None else options["cu_seqlens"].cpu()}
        for one, expected in zip(run(tensors, options), run(wide, on_cpu, method="cpu"), strict=True):
            assert relative_error(one.cpu(), expected) <= TOLERANCE[dtype]
        expected = gradients(wide, on_cpu, [c.cpu().double() for c in cotangents], method="cpu")
        one, other = (gradients(tensors, options, cotangents) for _ in range(2))
        for name, gradient in one.items():
            assert relative_error(gradient.cpu(), expected[name]) <= 8 * TOLERANCE[gradient.dtype], name
            assert torch.equal(gradient, other[name]), f"{name}: two runs differ"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_device_steps(dtype):
    for width in (2, 3, 4):
        for more in (0, 1):
            tensors, options, _ = draw(batch=3, length=6, channels=1000, width=width, dtype=dtype, device="cuda")
            y, final = run(tensors, options)
            old = torch.zeros(3, 1000, more, dtype=dtype, device="cuda")
            state = torch.cat([old, tensors["initial_state"]], dim=-1)
            for t in range(6):
                with torch.inference_mode(t % 2 == 1):
                    step = minimamba.causal_conv1d_update(
                        tensors["x"][:, t], state, tensors["weight"], tensors["bias"], "silu"
                    )
                assert relative_error(step, y[:, t].double()) <= TOLERANCE[dtype]
            assert torch.equal(state[..., more:], final)


@pytest.mark.gpu
def test_device_compiles_and_captures():
    for documents in (None, 4):
        tensors, options, cotangents = draw(
            length=200, channels=48, documents=documents, dtype=torch.float32, device="cuda"
        )
        expected = run(tensors, options)
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True)
        for one, other in zip(compiled(tensors, options), expected, strict=True):
            torch.testing.assert_close(one, other)
        of_eager = gradients(tensors, options, cotangents)
        for name, gradient in gradients(tensors, options, cotangents, call=compiled).items():
            torch.testing.assert_close(gradient, of_eager[name])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(tensors, options)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))

    x, weight = torch.randn(4, 96, device="cuda"), torch.randn(96, 4, device="cuda")
    state, other = torch.zeros(2, 4, 96, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    minimamba.causal_conv1d_update(x, torch.zeros_like(state), weight)  # compile outside the graph
    with torch.no_grad(), torch.cuda.graph(graph):
        step = minimamba.causal_conv1d_update(x, state, weight)
    for _ in range(3):
        graph.replay()
        assert torch.equal(step, minimamba.causal_conv1d_update(x, other, weight))
    assert torch.equal(state, other)


@pytest.mark.gpu
@pytest.mark.parametrize("time_last", [False, True])
def test_device_offsets_beyond_two_to_the_31(time_last):
    length, channels = 2**20 + 3, 2050  # 2.15e9 elements
    shape = (1, channels, length) if time_last else (1, length, channels)
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x = x.mT if time_last else x
    x[0, -5:] = torch.randn(5, channels, device="cuda")
    x.requires_grad_()
    weight = torch.randn(channels, 4, device="cuda")
    y = causal_conv1d(x, weight, activation="silu")
    tail = x[:, -8:].detach().clone().requires_grad_()
    expected = causal_conv1d(tail, weight, activation="silu")
    torch.testing.assert_close(y[:, -8:], expected)
    assert not y[:, :-8].any()
    cotangent = torch.zeros((), dtype=torch.bfloat16, device="cuda").expand(x.shape)
    (dx,) = torch.autograd.grad(y, x, cotangent + 1)
    (expected,) = torch.autograd.grad(expected, tail, torch.ones_like(tail))
    torch.testing.assert_close(dx[:, -5:], expected[:, -5:])
