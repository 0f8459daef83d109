"""The decoding step's kernel against the equation, in the interpreter and on a device; what surrounds the launch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import lay_out, relative_error

import minimamba
from minimamba import _operators, _validation
from minimamba.triton_scan import compile_kernels, require_triton

F64 = torch.float64
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
LAYOUTS = ("contiguous", "transposed", "poisoned")


def kernel(*arguments):
    """The launcher, imported on first use as elsewhere."""
    require_triton(arguments[0].device)
    from minimamba.kernels.selective_state_update import selective_state_update

    return selective_state_update(*arguments)


def oracle(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """The equation for each channel in float64. -> y, the new state, the largest sum of absolute values in a y"""
    state, x, dt, A, B, C, D, z, dt_bias = (
        None if v is None else np.asarray(v.cpu().double()) for v in (state, x, dt, A, B, C, D, z, dt_bias)
    )
    y, new, size = np.zeros(x.shape), np.zeros(state.shape), 0.0
    for index in np.ndindex(x.shape):
        b, d = index[0], index[1:]
        step = dt[index] + (0.0 if dt_bias is None else dt_bias[d])
        if dt_softplus:
            step = np.logaddexp(0.0, step)
        B_row, C_row = (v[b] if v.ndim == 2 else v[b, d[0] // (x.shape[1] // v.shape[1])] for v in (B, C))
        new[index] = np.exp(step * A[d]) * state[index] + step * B_row * x[index]
        skip = 0.0 if D is None else D[d] * x[index]
        gate = 1.0 if z is None else z[index] / (1 + np.exp(-z[index]))
        y[index] = (new[index] @ C_row + skip) * gate
        size = max(size, (abs(new[index]) @ abs(C_row) + abs(skip)) * abs(gate))
    return torch.from_numpy(y), torch.from_numpy(new), size


def draw(
    batch=2, channels=(6,), states=5, groups=1, D=True, z=True, dt_bias=True, dt_softplus=True, dtype=F64,
    shared_A=False, layout="contiguous", seed=0, device="cpu",
):  # fmt: skip
    """Draw a step's arguments; `channels` is (D,), or (heads, width)."""
    rng = np.random.default_rng(seed)
    wide = F64 if dtype == F64 else torch.float32

    def put(values, to):
        return lay_out(torch.from_numpy(values).to(device, to), layout)

    normal, uniform = rng.standard_normal, rng.uniform
    maps = (batch, states) if groups == 1 and seed % 2 else (batch, groups, states)
    dt = 10 ** uniform(-3, 0, (batch, *channels))
    A = put(-(10 ** uniform(-1, 1, (*channels, states))), wide)
    if shared_A:
        A = A[..., :1].expand(A.shape)
    return (
        put(normal((batch, *channels, states)), wide),
        put(normal((batch, *channels)), dtype),
        put(np.log(np.expm1(dt)) if dt_softplus else dt, dtype),
        A,
        put(normal(maps), dtype),
        put(normal(maps), wide if seed % 3 else dtype),
        put(normal(channels), wide) if D else None,
        put(normal((batch, *channels)), dtype) if z else None,
        put(normal(channels) if dt_softplus else uniform(0, 0.1, channels), wide) if dt_bias else None,  # Δ > 0
        dt_softplus,
    )


def check(arguments, step):
    expected_y, expected_state, size = oracle(*arguments)
    state, x = arguments[:2]
    y = step(*arguments)
    wide = 1e-13 if state.dtype == F64 else 2e-6
    assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous()
    assert relative_error(state.cpu(), expected_state) < wide
    assert (y.cpu().double() - expected_y).abs().max() < max(wide, torch.finfo(x.dtype).eps) * size


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3), group=st.integers(1, 5), groups=st.integers(1, 3), width=st.sampled_from([None, 1, 3]),
    states=st.one_of(st.integers(1, 9), st.sampled_from([16, 100, 256])), D=st.booleans(), z=st.booleans(),
    dt_bias=st.booleans(), dt_softplus=st.booleans(), shared_A=st.booleans(), layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([F64, torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 2**16),
    plain=st.booleans(),
)  # fmt: skip
def test_a_step_is_the_equation(group, width, groups, plain, **options):
    channels = (group * groups,) if width is None else (group * groups, width)
    check(draw(channels=channels, groups=groups, **options), _operators.update_now if plain else kernel)


@pytest.mark.parametrize(("channels", "groups", "states"), [((150,), 1, 16), ((2, 70), 2, 3), ((3,), 3, 130)])
def test_channels_around_a_tile(channels, groups, states):
    check(draw(1, channels, states, groups, layout="poisoned"), kernel)


def test_the_rule_fills_a_machine_and_keeps_a_thread_busy():
    from minimamba.kernels.selective_state_update import tile_for

    assert tile_for(64, 1, 4096, 16) == (32, 16, 1)  # 8192 programs of 512 numbers
    assert tile_for(1, 1, 4096, 16) == (8, 16, 1)  # 512 programs: at least 264, and never below 128 numbers
    assert tile_for(1, 1, 4096, 256) == (2, 256, 1)
    for states in (1, 3, 16, 64, 128, 200, 256, 1000):
        for group_size in (1, 2, 7, 64, 4096):
            tile = tile_for(4, 2, group_size, states)
            # Fewer numbers than threads would let one warp read what another has written.
            assert tile.warps == 1 or tile.channels * tile.states >= 64 * tile.warps


def test_offsets_beyond_two_to_the_31():
    """Two batch entries whose states lie 2^31 numbers apart; the memory between them is never touched."""
    arguments = list(draw(channels=(3,), states=4, dtype=torch.float32))
    state = torch.empty(2**31 + 20, dtype=torch.float32).as_strided((2, 3, 4), (2**31 + 8, 4, 1))
    arguments[0] = state.copy_(arguments[0])
    check(arguments, kernel)


def test_nan_goes_in_and_comes_out_and_extreme_steps_are_finite():
    arguments = list(draw(channels=(4,), dtype=torch.float32, D=False))
    arguments[1][0, 1] = torch.nan
    y = kernel(*arguments)
    assert y[0, 1].isnan() and arguments[0][0, 1].isnan().all() and y.isnan().sum() == 1
    arguments = list(draw(channels=(4,), dtype=torch.float32, dt_softplus=True))
    arguments[2].copy_(torch.tensor([-80.0, -15.0, 80.0, 1000.0]))
    with np.errstate(over="ignore", under="ignore"):
        check(arguments, kernel)


def test_two_runs_give_the_same_bits():
    one, other = (draw(channels=(40,), states=16, dtype=torch.float32) for _ in range(2))
    assert torch.equal(kernel(*one), kernel(*other)) and torch.equal(one[0], other[0])


# --- around the launch ---------------------------------------------------------------------------------


def test_outside_and_inside_the_dispatcher():
    one, other = draw(), draw()
    inside = minimamba.selective_state_update(*one)
    before = other[0]._version
    with torch.no_grad():
        outside = minimamba.selective_state_update(*other)
    assert torch.equal(inside, outside) and torch.equal(one[0], other[0]) and other[0]._version > before
    with torch.inference_mode():
        minimamba.selective_state_update(*draw())


def test_the_dispatcher_is_bypassed_only_where_nothing_listens(monkeypatch):
    called = []
    monkeypatch.setattr(_operators, "update_now", lambda *arguments: called.append(1) or arguments[1])
    with torch.no_grad():
        minimamba.selective_state_update(*draw())
        assert called
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in draw()]
            called.clear()
            assert minimamba.selective_state_update(*fake).shape == (2, 6)
    assert not called
    arguments = list(draw())
    arguments[1].requires_grad_()
    monkeypatch.undo()
    with pytest.raises(Exception, match=r"autograd|differentiat"):
        minimamba.selective_state_update(*arguments).sum().backward()


def test_a_check_is_done_once_for_each_kind_of_arguments(monkeypatch):
    monkeypatch.setattr(_validation, "_passed", set())
    calls = []

    def checked(*tensors):
        calls.append(1)
        if tensors[0].shape[0] == 3:
            raise ValueError("wrong")

    good, bad = torch.ones(2, 4), torch.ones(3, 4)
    for x in (good, good.clone(), good.double(), good.double(), good[:, :1]):
        _validation.check_once(checked, x, None)
    assert len(calls) == 3
    for _ in range(2):  # what failed is checked again
        with pytest.raises(ValueError, match="wrong"):
            _validation.check_once(checked, bad, None)
    assert len(calls) == 5


@pytest.mark.parametrize("bad", [[1.0], 1.0, "x", np.ones((2, 6))])
def test_what_is_no_tensor_is_named(bad):
    arguments = list(draw())
    minimamba.selective_state_update(*arguments)
    for i, name in enumerate(NAMES[:6]):
        with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor"):
            minimamba.selective_state_update(*arguments[:i], bad, *arguments[i + 1 :])


def test_kernel_compiles_for_a_gpu():
    import minimamba.kernels.selective_state_update as module

    names = module.selective_state_update_kernel.arg_names
    flags = ("SHARED_A", "HAS_D", "HAS_Z", "HAS_BIAS", "SOFTPLUS")
    jobs = []
    for half, wide, capability, on in (
        ("bf16", "fp32", 80, True), ("bf16", "fp32", 90, True), ("fp16", "fp32", 90, False), ("fp64", "fp64", 90, True),
    ):  # fmt: skip
        constants = dict.fromkeys(flags, on) | {"STATES": 16, "BLOCK_N": 16, "BLOCK_D": 32, "DTYPE": wide}
        constants |= (
            {"GROUPS": 2, "GROUP_SIZE": 96, "WIDTH": 48} if on else {"GROUPS": 1, "GROUP_SIZE": 96, "WIDTH": 96}
        )
        kinds = dict.fromkeys(("x", "dt", "B", "C", "z", "y"), f"*{half}")
        kinds |= dict.fromkeys(("state", "A", "D", "dt_bias"), f"*{wide}")
        signature = {n: kinds.get(n, "i32") for n in names if n not in constants}
        job = {"kernel": (module.__name__, "selective_state_update_kernel"), "signature": signature}
        jobs.append(job | {"constants": constants, "capability": capability, "num_warps": 1})
    for made, asked in zip(compile_kernels(jobs), jobs, strict=True):
        assert f".target sm_{asked['capability']}" in made["ptx"]
        assert made["stack"] == 0


# --- on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_device(dtype, layout):
    sizes = [((1,), 1, 1), ((300,), 1, 16), ((64,), 4, 100), ((8, 64), 2, 128), ((3, 5), 3, 256)]
    for seed, (channels, groups, states) in enumerate(sizes):
        flags = {name: seed != i for i, name in enumerate(("D", "z", "dt_bias", "dt_softplus"))}
        options = {"shared_A": seed == 3, "dtype": dtype, "layout": layout, "device": "cuda", "seed": seed} | flags
        for batch in (1, 5):
            check(draw(batch, channels, states, groups, **options), minimamba.selective_state_update)
            with torch.no_grad():
                check(draw(batch, channels, states, groups, **options), minimamba.selective_state_update)


@pytest.mark.gpu
def test_device_compiles_captures_and_repeats():
    step = minimamba.selective_state_update
    expected_of = lambda: draw(4, (256,), 16, dtype=torch.bfloat16, device="cuda")
    arguments = expected_of()
    expected = step(*arguments)
    torch._dynamo.reset()
    compiled = expected_of()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*compiled), expected)
    torch.testing.assert_close(compiled[0], arguments[0], rtol=0, atol=0)
    captured = expected_of()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = step(*captured)
    graph.replay()
    assert torch.equal(y, expected) and torch.equal(captured[0], arguments[0])
    expected = step(*arguments)
    graph.replay()
    assert torch.equal(y, expected) and torch.equal(captured[0], arguments[0])


@pytest.mark.gpu
def test_device_offsets_beyond_two_to_the_31():
    batch, channels, states = 3, 2**22 + 3, 256  # 3.2e9 numbers of state, in 12.9 GB
    normal = lambda *shape: torch.randn(shape, device="cuda")
    state = torch.zeros(batch, channels, states, device="cuda")
    x, dt, B = normal(batch, channels), torch.rand(batch, channels, device="cuda"), normal(batch, states)
    A = -torch.rand(channels, 1, device="cuda").expand(channels, states)
    y = minimamba.selective_state_update(state, x, dt, A, B, B)
    tail = slice(channels - 5, None)
    last = torch.zeros(batch, 5, states, device="cuda")
    expected = minimamba.selective_state_update(last, x[:, tail], dt[:, tail], A[tail], B, B)
    torch.testing.assert_close(y[:, tail], expected)
    torch.testing.assert_close(state[:, tail], last)
