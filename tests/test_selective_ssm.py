"""Chapter 06: the selective layer against NumPy, against itself cut, packed or stepped, and against bad input."""

import copy
import io
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error
from torch.func import functional_call
from torch.nn.functional import linear

from minimamba import selective_ssm
from minimamba.interface import METHODS
from minimamba.selective_ssm import SelectiveSSM, inverse_softplus

f64 = torch.float64


def make(d_model=6, d_state=3, dt_rank=2, dtype=f64, seed=0, **options):
    """A layer whose parameters are all random: fresh ones are too regular (A alike in all channels, D one)."""
    torch.manual_seed(seed)
    layer = SelectiveSSM(d_model, d_state, dt_rank=dt_rank, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.dt_proj.bias.sub_(1)
    return layer


def draw(*shape, dtype=f64, seed=1):
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_numpy(layer, u, initial_state=None):
    """Return Δ, B, C, y and the final state in float64, from the weights and the oracle alone."""
    W, W_dt, b, A_log, D = (
        x.detach().double().numpy()
        for x in (layer.x_proj.weight, layer.dt_proj.weight, layer.dt_proj.bias, layer.A_log, layer.D)
    )
    rank, states = W_dt.shape[1], A_log.shape[1]
    assert W.shape[0] == rank + 2 * states
    u = u.detach().double().numpy()
    delta = np.logaddexp(0, u @ W[:rank].T @ W_dt.T + b)
    B, C = u @ W[rank : rank + states].T, u @ W[rank + states :].T
    h = None if initial_state is None else initial_state.detach().double().numpy()
    y, state = oracle.selective_scan(u, delta, -np.exp(A_log), B, C, D, initial_state=h)
    return tuple(torch.from_numpy(x) for x in (delta, B, C, y, state))


def gradients(layer, u, *outputs):
    """Return {name: gradient} of a random linear function of `outputs`, for every parameter and u."""
    loss = sum((x * draw(*x.shape, dtype=x.dtype, seed=i)).sum() for i, x in enumerate(outputs))
    leaves = {"u": u, **dict(layer.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(got, expected):
    """Compare two tensors or two dictionaries of tensors in float64."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- initial values ------------------------------------------------------------------------------------


def test_fresh_parameters_have_the_official_names_shapes_and_values():
    layer = SelectiveSSM(40, 5)
    shapes = {name: tuple(x.shape) for name, x in layer.named_parameters()}
    assert shapes == {  # the rank of Δ is d_model / 16, rounded up
        "A_log": (40, 5),
        "D": (40,),
        "x_proj.weight": (3 + 5 + 5, 40),
        "dt_proj.weight": (40, 3),
        "dt_proj.bias": (40,),
    }
    assert not list(layer.buffers())
    torch.testing.assert_close(layer.A, -torch.arange(1.0, 6.0).expand(40, 5))
    assert torch.equal(layer.D, torch.ones(40))
    assert SelectiveSSM(40).d_state == 16
    assert SelectiveSSM(40, dt_rank=7).dt_proj.weight.shape == (40, 7)


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.1), (0.01, 3.0)])
def test_first_steps_are_log_uniform(low, high):
    torch.manual_seed(0)
    n = 4000
    bias = SelectiveSSM(n, 1, dt_rank=1, dt_min=low, dt_max=high, dtype=f64).dt_proj.bias.detach()
    step = np.logaddexp(0, bias.numpy())
    assert low * (1 - 1e-9) <= step.min() and step.max() <= high * (1 + 1e-9)
    rank = np.sort(np.log(step / low) / np.log(high / low))  # uniform in [0, 1]
    distance = np.abs(rank - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov and Smirnov at 1 %


def test_the_bounds_of_the_first_steps_have_defaults_and_a_floor():
    torch.manual_seed(0)
    step = np.logaddexp(0, SelectiveSSM(2000, 1, dtype=f64).dt_proj.bias.detach().numpy())
    assert 0.001 <= step.min() * (1 + 1e-9) < 0.0011 and 0.09 < step.max() <= 0.1 * (1 + 1e-9)
    step = np.logaddexp(0, SelectiveSSM(2000, 1, dt_min=1e-6, dtype=f64).dt_proj.bias.detach().numpy())
    assert step.min() == pytest.approx(1e-4) and (step < 1.0001e-4).mean() == pytest.approx(0.4, abs=0.05)
    step = np.logaddexp(0, SelectiveSSM(200, 1, dt_init_floor=0.05, dtype=f64).dt_proj.bias.detach().numpy())
    assert step.min() == pytest.approx(0.05)


@pytest.mark.parametrize("rank", [1, 9])
def test_the_step_projection_starts_uniform_within_its_rank(rank):
    torch.manual_seed(0)
    weight = SelectiveSSM(2000, 1, dt_rank=rank).dt_proj.weight
    bound = rank**-0.5
    assert 0.98 * bound < weight.max() <= bound and -bound <= weight.min() < -0.98 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_marks_say_what_not_to_decay_and_what_not_to_initialise_again():
    layer = SelectiveSSM(8)
    marked = lambda mark: {name for name, x in layer.named_parameters() if getattr(x, mark, False)}
    assert marked("_no_weight_decay") == {"A_log", "D"}
    assert marked("_no_reinit") == {"dt_proj.bias"}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, f64], ids=str)
def test_what_makes_the_state_is_never_half(dtype):
    layer = SelectiveSSM(8, 3, dtype=dtype)
    wide = f64 if dtype == f64 else torch.float32
    given = {name: wide if name in ("A_log", "D") else dtype or torch.float32 for name, _ in layer.named_parameters()}
    assert {name: x.dtype for name, x in layer.named_parameters()} == given
    assert layer.A.dtype == layer.allocate_state(2).dtype == wide
    if dtype is not None:  # moved as a whole, A and the state still stay wide
        assert layer.to(dtype).A.dtype == layer.allocate_state(2).dtype == wide


def test_a_layer_can_be_made_without_memory():
    assert all(x.is_meta for x in SelectiveSSM(8, 3, device="meta").parameters())


def test_the_state_matrix_stays_negative_whatever_is_learned():
    layer = make(d_model=50, d_state=20)
    with torch.no_grad():
        layer.A_log.mul_(5)
    assert (layer.A_log < 0).any() and (layer.A_log > 0).any() and (layer.A < 0).all()


def test_inverse_softplus_is_exact_over_all_magnitudes():
    for dtype, exponents, tolerance in (
        (f64, np.linspace(-300, 300, 2001), 1e-12),
        (torch.float32, np.linspace(-37, 38, 2001), 1e-5),
    ):
        y = torch.from_numpy(10**exponents).to(dtype)
        back = np.logaddexp(0, inverse_softplus(y).double().numpy())
        np.testing.assert_allclose(back, y.double().numpy(), rtol=tolerance)
    zero = inverse_softplus(torch.tensor(math.log(2), dtype=f64))
    assert abs(zero.item()) < 1e-15


# --- right ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 12), *[st.integers(1, 5)] * 3, st.booleans(), st.integers(0, 2**16))
def test_equals_numpy_from_the_weights(batch, length, d_model, d_state, dt_rank, carried, seed):
    layer = make(d_model, d_state, dt_rank, seed=seed)
    u = draw(batch, length, d_model, seed=seed)
    start = draw(batch, d_model, d_state, seed=seed + 1) if carried else None
    *projected, expected_y, expected_state = by_numpy(layer, u, start)
    y, state = layer(u, start, return_final_state=True)
    assert relative_error(y, expected_y) < 1e-10
    assert relative_error(state, expected_state) < 1e-10
    for got, expected in zip(layer.project(u), projected, strict=True):
        assert got.shape == expected.shape and relative_error(got, expected) < 1e-10


def test_fresh_layers_equal_numpy_in_float32():
    torch.manual_seed(0)
    layer, u = SelectiveSSM(20, 4), draw(2, 100, 20, dtype=torch.float32)
    y, state = layer(u, return_final_state=True)
    *_, expected_y, expected_state = by_numpy(layer, u)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, expected_y) < 1e-5
    assert relative_error(state, expected_state) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_output(method, monkeypatch):
    layer, plain = make(method=method), make(method="sequential")
    u, start = draw(2, 11, 6), draw(2, 6, 3)
    asked = []
    scan = selective_ssm.selective_scan
    monkeypatch.setattr(selective_ssm, "selective_scan", lambda *a, **k: (asked.append(k["method"]), scan(*a, **k))[1])
    for got, expected in zip(layer(u, start, True), plain(u, start, True), strict=True):
        assert_close(got, expected)
    assert asked == [method, "sequential"]


def test_project_takes_one_step_or_any_number_of_them():
    layer, u = make(), draw(2, 4, 5, 6)
    parts = layer.project(u)
    assert [tuple(x.shape) for x in parts] == [(2, 4, 5, 6), (2, 4, 5, 3), (2, 4, 5, 3)]
    for whole, one in zip(parts, layer.project(u[1, 2, 3]), strict=True):
        assert_close(one, whole[1, 2, 3])


def test_only_the_output_comes_back_unless_the_state_is_asked_for():
    layer, u = make(), draw(2, 5, 6)
    y = layer(u)
    assert isinstance(y, torch.Tensor) and y.shape == u.shape
    y_too, state = layer(u, return_final_state=True)
    assert torch.equal(y, y_too) and state.shape == (2, 6, 3)


def test_inputs_of_any_strides_give_the_same():
    layer, u = make(), draw(2, 5, 6)
    for strided in (u.mT.contiguous().mT, u.repeat_interleave(2, dim=2)[..., ::2]):
        assert not strided.is_contiguous()
        assert_close(layer(strided), layer(u))
    assert_close(layer(u[:1].expand(3, -1, -1)), layer(u[:1].repeat(3, 1, 1)))


# --- cut, packed, stepped ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(0, 99))
def test_a_sequence_cut_anywhere_equals_the_whole(cut, seed):
    layer = make(seed=seed)
    u, start = draw(2, 9, 6).requires_grad_(), draw(2, 6, 3).requires_grad_()
    whole, final = layer(u, start, return_final_state=True)
    first, state = layer(u[:, :cut], start, return_final_state=True)
    second, carried = layer(u[:, cut:], state, return_final_state=True)
    pieces = torch.cat([first, second], dim=1)
    assert_close(pieces, whole)
    assert_close(carried, final)
    one, other = gradients(layer, u, whole, final, start), gradients(layer, u, pieces, carried, start)
    assert one.keys() == {"u", "A_log", "D", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    assert_close(other, one)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(any), st.booleans(), st.integers(0, 99))
def test_packed_documents_equal_separate_runs(lengths, carried, seed):
    layer, borders = make(seed=seed), np.cumsum([0, *lengths]).tolist()
    u = draw(1, borders[-1], 6).requires_grad_()
    start = draw(len(lengths), 6, 3, seed=seed) if carried else torch.zeros(len(lengths), 6, 3, dtype=f64)
    y, state = layer(u, start if carried else None, return_final_state=True, cu_seqlens=torch.tensor(borders))
    assert state.shape == start.shape
    outputs, states = [], []
    for i, part in enumerate(u.split(lengths, dim=1)):
        alone = (part, start[i : i + 1])  # an empty document hands its state on
        if lengths[i]:
            alone = layer(part, start[i : i + 1] if carried else None, return_final_state=True)
        outputs.append(alone[0])
        states.append(alone[1])
    apart, ends = torch.cat(outputs, dim=1), torch.cat(states)
    assert_close(y, apart)
    assert_close(state, ends)
    assert_close(gradients(layer, u, y, state), gradients(layer, u, apart, ends))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_the_whole_sequence(dtype, autocast):
    layer, u = make(dtype=dtype), draw(2, 9, 6, dtype=dtype)
    half = dtype == torch.bfloat16 or (autocast and dtype == torch.float32)  # autocast leaves float64 alone
    # PyTorch's product of one row rounds half precision otherwise than that of many.
    tolerance = 2 * torch.finfo(torch.bfloat16).eps if half else 100 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, final = layer(u, return_final_state=True)
        for prompt in (0, 4):  # the first steps read at once, the others one by one
            state = layer(u[:, :prompt], return_final_state=True)[1].detach() if prompt else layer.allocate_state(2)
            address = state.data_ptr()
            outputs = [layer.step(u[:, t], state) for t in range(prompt, 9)]
            assert state.data_ptr() == address
            assert all(out.dtype == y.dtype and not out.requires_grad for out in outputs)
            assert relative_error(torch.stack(outputs, dim=1), y[:, prompt:]) < tolerance
            assert relative_error(state, final) < tolerance


def test_a_fresh_state_is_zero_and_of_its_own():
    layer = make()
    state = layer.allocate_state(3)
    assert state.shape == (3, 6, 3) and not state.any() and not state.requires_grad
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    layer.step(draw(3, 6), state)
    assert state.all() and all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())
    assert len({row.data_ptr() for row in state}) == 3


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_for_every_parameter_and_input(packed):
    layer = make(d_model=3, d_state=2, dt_rank=2)
    names = [name for name, _ in layer.named_parameters()]
    assert len(names) == 5
    cu_seqlens = torch.tensor([0, 1, 4]) if packed else None

    def run(u, start, *parameters):
        arguments = {"return_final_state": True, "cu_seqlens": cu_seqlens}
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (u, start), arguments)

    inputs = draw(1 if packed else 2, 4, 3), draw(2, 3, 2), *(x.detach() for x in layer.parameters())
    assert torch.autograd.gradcheck(run, tuple(x.clone().requires_grad_() for x in inputs))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_fresh_layer_reach_every_element(dtype, autocast):
    torch.manual_seed(0)
    layer = SelectiveSSM(20, 4, dtype=dtype)
    u = draw(2, 300, 20, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = layer(u, return_final_state=True)
    found = gradients(layer, u, y, state)
    assert len(found) == 6
    for name, parameter in {"u": u, **dict(layer.named_parameters())}.items():
        gradient = found[name]
        assert gradient.dtype == parameter.dtype and gradient.shape == parameter.shape
        assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.99, name


# --- half precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["made half", "moved to half", "autocast"])
def test_half_precision_rounds_the_projections_and_y_only(how):
    low = torch.bfloat16
    layer, u = make(dtype=low if how == "made half" else torch.float32), draw(2, 50, 6, dtype=torch.float32)
    if how == "autocast":
        with torch.autocast("cpu", low):
            y, state = layer(u, return_final_state=True)
    else:
        layer = layer.to(low) if how == "moved to half" else layer
        y, state = layer(u.to(low), return_final_state=True)
    assert y.dtype == low and state.dtype == torch.float32

    u = u.to(low)
    dt, B, C = linear(u, layer.x_proj.weight.to(low)).split([2, 3, 3], dim=-1)
    own = torch.float32 if how == "autocast" else low  # autocast leaves Δ's projection alone
    dt = linear(dt.to(own), layer.dt_proj.weight.to(own), layer.dt_proj.bias.to(own))
    rounded = [x.detach().double().numpy() for x in (u, dt, layer.A_log, B, C, layer.D)]
    rounded[2] = -np.exp(rounded[2])
    expected_y, expected_state = map(torch.from_numpy, oracle.selective_scan(*rounded, delta_softplus=True))
    assert relative_error(y, expected_y) < torch.finfo(low).eps
    assert relative_error(state, expected_state) < 1e-5  # a half softplus, exponential or state could not do this


# --- kept, copied, compiled ----------------------------------------------------------------------------


def test_saved_weights_give_the_same_layer():
    layer, other, u = make(seed=0), make(seed=1), draw(2, 5, 6)
    assert not torch.allclose(layer(u), other(u))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(u), other(u))


def test_a_copy_is_the_same_layer_with_its_own_weights():
    layer, u = make(method="blelloch"), draw(2, 5, 6)
    other = copy.deepcopy(layer)
    expected = layer(u)
    assert torch.equal(other(u), expected) and other.method == "blelloch"
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(layer(u), expected) and not torch.allclose(other(u), expected)


def test_compiled_in_one_graph_equals_eager_at_any_length():
    torch.compiler.reset()
    layer = make(d_model=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for length in (5, 6):
        u = draw(2, length, 4).requires_grad_()
        eager, got = layer(u, return_final_state=True), compiled(u, return_final_state=True)
        for one, other in zip(eager, got, strict=True):
            assert_close(other, one)
        assert_close(gradients(layer, u, *got), gradients(layer, u, *eager))


def test_a_layer_follows_the_default_dtype():
    default = torch.get_default_dtype()
    torch.set_default_dtype(f64)
    try:
        layer = SelectiveSSM(6, 3)
    finally:
        torch.set_default_dtype(default)
    assert {x.dtype for x in layer.parameters()} == {f64} and layer(draw(2, 5, 6)).dtype == f64


# --- bad input -----------------------------------------------------------------------------------------

BAD_INPUT = [  # the layer has d_model 6, d_state 3
    (r"u: expected shape \(B, L, D\), got \(2, 6\)", ValueError, {"u": torch.zeros(2, 6, dtype=f64)}),
    (r"u: expected shape \(B, L, D\), got \(6,\)", ValueError, {"u": torch.zeros(6, dtype=f64)}),
    (r"u: expected shape \(6,\), got \(\)", ValueError, {"u": torch.zeros((), dtype=f64)}),
    (r"u: expected shape .*, got \(1, 2, 5, 6\)", ValueError, {"u": torch.zeros(1, 2, 5, 6, dtype=f64)}),
    (r"u: expected shape .*6\), got \(2, 5, 4\)", ValueError, {"u": torch.zeros(2, 5, 4, dtype=f64)}),
    (r"u: expected shape .*6\), got \(2, 6, 1\)", ValueError, {"u": torch.zeros(2, 6, 1, dtype=f64)}),
    ("u: expected L >= 1", ValueError, {"u": torch.zeros(2, 0, 6, dtype=f64)}),
    ("u: expected B >= 1", ValueError, {"u": torch.zeros(0, 5, 6, dtype=f64)}),
    ("u: expected torch.float64 .*, got torch.int64", TypeError, {"u": torch.zeros(2, 5, 6).long()}),
    ("u: expected torch.float64", TypeError, {"u": torch.zeros(2, 5, 6)}),
    (r"u: expected device cpu \(the layer's\), got meta", ValueError, {"u": draw(2, 5, 6).to("meta")}),
    ("u: expected a real tensor", TypeError, {"u": torch.zeros(2, 5, 6, dtype=torch.complex128)}),
    ("u: expected a torch.Tensor, got ndarray", TypeError, {"u": np.zeros((2, 5, 6))}),
    (r"initial_state: expected shape \(2, 6, 3\)", ValueError, {"initial_state": torch.zeros(1, 6, 3, dtype=f64)}),
    ("initial_state: expected torch.float64", TypeError, {"initial_state": torch.zeros(2, 6, 3)}),
    ("cu_seqlens: expected an int32 or int64", TypeError, {"cu_seqlens": [0, 5]}),
    ("u: expected batch 1 beside cu_seqlens", ValueError, {"cu_seqlens": torch.tensor([0, 5])}),
    ("cu_seqlens: expected borders", ValueError, {"u": draw(1, 5, 6), "cu_seqlens": torch.tensor([0, 4])}),
]


@pytest.mark.parametrize(("message", "error", "changes"), BAD_INPUT, ids=range(len(BAD_INPUT)))
def test_bad_input_is_named(message, error, changes):
    with pytest.raises(error, match=f"^{message}"):
        make()(**{"u": draw(2, 5, 6), **changes})


@pytest.mark.parametrize(
    ("message", "error", "u", "state"),
    [
        (r"u: expected shape \(B, 6\), got \(2, 1, 6\)", ValueError, draw(2, 1, 6), draw(2, 6, 3)),
        (r"u: expected shape \(B, 6\), got \(2, 5\)", ValueError, draw(2, 5), draw(2, 6, 3)),
        ("u: expected a floating-point tensor", TypeError, torch.zeros(2, 6).int(), draw(2, 6, 3)),
        (r"state: expected shape \(3, 6, 3\)", ValueError, draw(3, 6), draw(2, 6, 3)),
        (r"state: expected shape \(2, 6, 3\)", ValueError, draw(2, 6), draw(2, 5, 3)),
        (r"state: expected shape \(2, 6, 3\)", ValueError, draw(2, 6), draw(2, 6, 4)),
        ("u: expected a torch.Tensor", TypeError, None, draw(2, 6, 3)),
        ("state: expected torch.float64", TypeError, draw(2, 6), draw(2, 6, 3, dtype=torch.float32)),
        ("state: expected torch.float32 or torch.float64", TypeError, draw(2, 6), draw(2, 6, 3, dtype=torch.half)),
        ("state: expected shape", ValueError, draw(2, 6), draw(2, 6)),
        ("state: expected a torch.Tensor, got NoneType", TypeError, draw(2, 6), None),
    ],
)
def test_bad_steps_are_named_and_leave_the_state_alone(message, error, u, state):
    before = None if state is None else state.clone()
    with pytest.raises(error, match=f"^{message}"):
        make().step(u, state)
    assert state is None or torch.equal(state, before)


@pytest.mark.parametrize("u", [draw(4), draw(2, 3, 4), draw(2, 6).int(), [1.0]], ids=["4", "2, 3, 4", "int", "list"])
def test_bad_projections_are_named(u):
    with pytest.raises((TypeError, ValueError), match=r"^u: expected"):
        make().project(u)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("d_model", {"d_model": 0}),
        ("d_model", {"d_model": -8}),
        ("d_model", {"d_model": 8.0}),
        ("d_model", {"d_model": "8"}),
        ("d_model", {"d_model": None}),
        ("d_model", {"d_model": True}),
        ("d_state", {"d_state": 0}),
        ("d_state", {"d_state": 2.5}),
        ("d_state", {"d_state": None}),
        ("dt_rank", {"dt_rank": 0}),
        ("dt_rank", {"dt_rank": "full"}),
        ("dt_min", {"dt_min": 0.0}),
        ("dt_min", {"dt_min": -0.1}),
        ("dt_min", {"dt_min": 0.2}),  # above dt_max
        ("dt_min", {"dt_min": float("nan")}),
        ("dt_min", {"dt_min": "a"}),
        ("dt_max", {"dt_max": math.inf}),
        ("dt_init_floor", {"dt_init_floor": math.nan}),
        ("method", {"method": "cuda"}),
        ("method", {"method": None}),
    ],
    ids=str,
)
def test_bad_options_are_named(name, options):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        SelectiveSSM(**{"d_model": 8, **options})
