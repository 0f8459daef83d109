"""The public functions: every method against the oracle, against each other, and against bad input."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KINDS, make, problems, relative_error

import minimamba
from minimamba import cpu_scan, fused_scan, interface, parallel_scan, selective_scan, sequential_scan

METHODS = [m for m in interface.METHODS if m != "auto"]
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def examples(method, n):
    """Triton's interpreter is slow: fewer examples there."""
    return settings(deadline=None, max_examples=n // 3 if method == "triton" else n)


# --- right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_oracle_in_float64(method):
    @examples(method, 60)
    @given(problems())
    def check(problem):
        y, state = problem.run(selective_scan, method=method)
        expected_y, expected_state = problem.expected()
        assert relative_error(y, expected_y) < 1e-10
        assert relative_error(state, expected_state) < 1e-10

    check()


@pytest.mark.parametrize("method", METHODS[1:])
def test_gradients_equal_those_through_the_plain_loop(method):
    @examples(method, 30)
    @given(problems(max_length=35))
    def check(problem):
        expected = problem.gradients(selective_scan, method="sequential")
        got = problem.gradients(selective_scan, method=method)
        scale = max(x.abs().max().item() for x in expected.values())
        for name in expected:
            error = (got[name] - expected[name]).abs().max().item()
            assert got[name].shape == problem.tensors[name].shape
            assert error < 1e-10 * scale, f"{name}: {error} of {scale}"

    check()


@pytest.mark.parametrize("documents", [None, 2])
@pytest.mark.parametrize(("B", "C"), [("grouped", "grouped"), ("constant", "varying")])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_for_every_argument(method, B, C, documents):
    groups = 2 if B == "grouped" else 1
    problem = make(batch=2, length=3, channels=2, states=2, groups=groups, B=B, C=C, documents=documents, seed=5)
    leaves = {name: problem.tensors[name].requires_grad_() for name in TENSORS}

    def scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
        return selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, initial_state=initial_state,
            cu_seqlens=problem.cu_seqlens, return_final_state=True, method=method,
        )  # fmt: skip

    # The interpreter runs the kernel some hundred times for a full Jacobian; a random projection of it is enough.
    assert torch.autograd.gradcheck(scan, tuple(leaves.values()), fast_mode=method == "triton")


@pytest.mark.parametrize("method", METHODS)
def test_one_output_alone_has_a_gradient(method):
    problem = make()
    for output in (0, 1):
        A = problem.tensors["A"].clone().requires_grad_()
        problem.tensors["A"] = A
        (gradient,) = torch.autograd.grad(problem.run(selective_scan, method=method)[output].sum(), A)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_cut_anywhere_equals_the_whole(method):
    @examples(method, 9)
    @given(st.data())
    def check(data):
        problem = make(batch=1, length=9, groups=2, B="grouped", C="grouped", seed=data.draw(st.integers(0, 99)))
        cut = data.draw(st.integers(1, 8))
        x = {name: problem.tensors[name].clone().requires_grad_() for name in TENSORS}

        def scan(part, state):
            return selective_scan(
                x["u"][:, part], x["delta"][:, part], x["A"], x["B"][:, part], x["C"][:, part], x["D"],
                z=x["z"][:, part], delta_bias=x["delta_bias"], delta_softplus=True, initial_state=state,
                return_final_state=True, method=method,
            )  # fmt: skip

        whole, final = scan(slice(None), x["initial_state"])
        first, state = scan(slice(0, cut), x["initial_state"])
        second, carried = scan(slice(cut, None), state)
        pieces = torch.cat([first, second], dim=1)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(carried, final, rtol=0, atol=1e-10)
        gy, gh = problem.cotangents["y"], problem.cotangents["final_state"]
        leaves = list(x.values())
        together = torch.autograd.grad((whole * gy).sum() + (final * gh).sum(), leaves)
        apart = torch.autograd.grad((pieces * gy).sum() + (carried * gh).sum(), leaves)
        for name, one, other in zip(x, together, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")

    check()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_leaks_between_documents(method):
    problem = make(length=12, documents=3, seed=4)
    start, stop = problem.cu_seqlens[1:3].tolist()
    assert 0 < start < stop < 12
    inside, outside = (
        [t in range(start, stop) for t in range(12)],
        [t not in range(start, stop) for t in range(12)],
    )
    poisoned = {name: x.clone() for name, x in problem.tensors.items()}
    for name in ("u", "delta", "B", "C", "z"):
        poisoned[name][:, start:stop] = torch.nan
    poisoned["initial_state"][1] = torch.nan
    clean, _ = problem.run(selective_scan, method=method)
    got, states = type(problem)(poisoned, True, problem.cu_seqlens).run(selective_scan, method=method)
    assert got[:, inside].isnan().all()
    torch.testing.assert_close(got[:, outside], clean[:, outside], rtol=0, atol=0)
    assert states[1].isnan().all() and not states[[0, 2]].isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_document_keeps_its_initial_state(method):
    problem = make(length=5, documents=3)
    problem = type(problem)(problem.tensors, True, torch.tensor([0, 2, 2, 5]))
    _, states = problem.run(selective_scan, method=method)
    assert torch.equal(states[1], problem.tensors["initial_state"][1])


# --- precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_close_to_the_oracle(method):
    length = 96 if method == "triton" else 2048
    problem = make(batch=1, length=length, channels=3, states=4, delta_bias=False).to(torch.float32)
    y, state = problem.run(selective_scan, method=method)
    expected_y, expected_state = problem.expected()
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, expected_y) < 1e-5
    assert relative_error(state, expected_state) < 1e-5


@pytest.mark.parametrize("wide_too", [False, True], ids=["all half", "delta, B, C, z float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_rounds_the_inputs_and_y_only(method, dtype, wide_too):
    problem = make(batch=1, length=70, channels=4, states=3)
    problem = problem.to(dtype, half=("u",) if wide_too else ("u", "delta", "B", "C", "z"))
    y, state = problem.run(selective_scan, method=method)
    expected_y, expected_state = problem.expected()  # on the rounded inputs
    assert y.dtype == dtype and state.dtype == torch.float32
    assert relative_error(y, expected_y) < torch.finfo(dtype).eps
    assert relative_error(state, expected_state) < 1e-5  # a half-precision state could not do this
    gradients = problem.gradients(selective_scan, method=method)
    expected = problem.to(torch.float64).gradients(selective_scan, method="sequential")
    for name, gradient in gradients.items():
        assert gradient.dtype == problem.tensors[name].dtype
        tolerance = 2 * torch.finfo(dtype).eps if gradient.dtype == dtype else 1e-5
        assert relative_error(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("method", METHODS)
def test_extreme_steps_stay_finite_and_nan_comes_out(method):
    problem = make(batch=1, length=40, delta_bias=False, delta_softplus=False, seed=3).to(torch.float32)
    delta = problem.tensors["delta"]
    delta[0, ::2], delta[0, 1::2] = 1e-8, 1e3
    y, state = problem.run(selective_scan, method=method)
    expected_y, expected_state = problem.expected()
    assert relative_error(y, expected_y) < 1e-5 and relative_error(state, expected_state) < 1e-5
    assert all(x.isfinite().all() for x in problem.gradients(selective_scan, method=method).values())

    problem.tensors["u"][0, 7, 2] = torch.nan
    y, state = problem.run(selective_scan, method=method)
    assert y[0, 7:, 2].isnan().all() and state[0, 2].isnan().all()
    assert y[0, :7].isfinite().all() and y[0, :, :2].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_tiny_steps_survive_the_softplus(method):
    # softplus(-20) = 2.06e-9: log(1 + exp(x)) in float32 would give 0.
    problem = make(batch=1, length=3, delta_bias=False, initial_state=False).to(torch.float32)
    problem.tensors["delta"].fill_(-20.0)
    problem.tensors["D"].zero_()
    y, _ = problem.run(selective_scan, method=method)
    assert relative_error(y, problem.expected()[0]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bits(method):
    problem = make(length=33, groups=2, B="grouped", C="grouped").to(torch.float32)
    one, other = (problem.gradients(selective_scan, method=method) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in TENSORS)


# --- behaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "module", "name"),
    [
        ("sequential", sequential_scan, "selective_scan_sequential"),
        ("hillis_steele", parallel_scan, "hillis_steele"),
        ("blelloch", parallel_scan, "blelloch"),
        ("chunked", parallel_scan, "chunked"),
        ("cpu", cpu_scan, "forward"),
        ("auto", cpu_scan, "forward"),
        ("triton", fused_scan, "forward"),
    ],
)
def test_each_method_runs_its_own_algorithm(monkeypatch, method, module, name):
    calls = []
    original = getattr(module, name)
    spied = {
        (m, n): getattr(m, n)
        for m, n in [
            (sequential_scan, "selective_scan_sequential"),
            (cpu_scan, "forward"),
            (fused_scan, "forward"),
        ]
        + [(parallel_scan, n) for n in ("hillis_steele", "blelloch", "chunked")]
    }
    for (m, n), function in spied.items():
        monkeypatch.setattr(
            m, n, lambda *args, f=function, n=n, **kwargs: (calls.append((f, n)), f(*args, **kwargs))[1]
        )
    make(length=5).run(selective_scan, method=method)
    assert (original, name) in calls
    # "chunked" may use another parallel scan inside a chunk; otherwise no other algorithm runs.
    assert method == "chunked" or {f for f, _ in calls} == {original}


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_were_and_outputs_are_fresh(method):
    for documents in (None, 3):
        problem = make(length=6, documents=documents, delta_bias=False, delta_softplus=False, D=False, z=False)
        before = {name: None if x is None else x.clone() for name, x in problem.tensors.items()}
        outputs = problem.run(selective_scan, method=method)
        given = {x.untyped_storage().data_ptr() for x in problem.tensors.values() if x is not None}
        own = [x.untyped_storage().data_ptr() for x in outputs]
        assert len(given | set(own)) == len(given) + 2
        gradients = problem.gradients(selective_scan, method=method)
        assert not given & {x.untyped_storage().data_ptr() for x in gradients.values()}
        for name, x in before.items():
            assert x is None or torch.equal(x, problem.tensors[name])


def test_the_final_state_is_returned_only_when_asked_for():
    problem = make()
    y = selective_scan(*(problem.tensors[name] for name in ("u", "delta", "A", "B", "C")))
    assert isinstance(y, torch.Tensor) and y.shape == problem.tensors["u"].shape


@pytest.mark.parametrize("method", ["sequential", "cpu"])
def test_autocast_casts_what_varies_and_keeps_the_state_wide(method):
    problem = make(length=20).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = problem.run(selective_scan, method=method)
        double = make(length=20).run(selective_scan, method=method)[0]
    rounded = problem.to(torch.bfloat16, half=("u", "B", "C", "z")).to(torch.float64)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32 and double.dtype == torch.float64
    assert relative_error(y, rounded.expected()[0]) < torch.finfo(torch.bfloat16).eps


# --- drop-ins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "C"), KINDS)
def test_the_drop_in_equals_the_scan_transposed(B, C):
    problem = make(channels=4, groups=2, B=B, C=C, initial_state=False)
    x = problem.tensors
    last = lambda m: m if m.ndim == 2 else m.movedim(1, -1)
    in_order = x["D"], x["z"].mT, x["delta_bias"], True, True
    out, state = minimamba.selective_scan_fn(x["u"].mT, x["delta"].mT, x["A"], last(x["B"]), last(x["C"]), *in_order)
    y, expected = problem.run(selective_scan)
    torch.testing.assert_close(out, y.mT, rtol=0, atol=0)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    alone = minimamba.selective_scan_fn(x["u"].mT, x["delta"].mT, x["A"], last(x["B"]), last(x["C"]))
    assert isinstance(alone, torch.Tensor)


def test_the_drop_ins_have_the_official_signatures():
    names = lambda f: " ".join(inspect.signature(f).parameters)
    scan = "u delta A B C D z delta_bias delta_softplus return_last_state"
    assert names(minimamba.selective_scan_fn) == scan
    assert names(minimamba.selective_state_update) == "state x dt A B C D z dt_bias dt_softplus"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["varying", "grouped"])
def test_steps_equal_the_scan(kind, dtype):
    problem = make(length=9, channels=4, groups=2, B=kind, C=kind).to(dtype)
    x = problem.tensors
    y, final = problem.run(selective_scan, method="sequential")
    state = x["initial_state"].clone()
    for t in range(9):
        step = minimamba.selective_state_update(
            state, x["u"][:, t], x["delta"][:, t], x["A"], x["B"][:, t], x["C"][:, t], x["D"], x["z"][:, t],
            x["delta_bias"], dt_softplus=True,
        )  # fmt: skip
        assert step.dtype == dtype
        torch.testing.assert_close(step, y[:, t])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_step_with_heads_is_the_step_with_their_channels_side_by_side(groups):
    torch.manual_seed(groups)
    batch, heads, width, states = 2, 4, 3, 5
    state, x, dt, z = (torch.randn(batch, heads, width, *s) for s in ((states,), (), (), ()))
    A, D, bias = (
        -torch.rand(heads, 1, 1).expand(heads, width, states),
        torch.randn(heads, width),
        torch.randn(heads, width),
    )
    B, C = torch.randn(2, batch, groups, states)
    flat = state.flatten(1, 2).clone()
    expected = minimamba.selective_state_update(
        flat,
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, 1),
        B,
        C,
        D.flatten(),
        z.flatten(1),
        bias.flatten(),
        True,
    )
    got = minimamba.selective_state_update(state, x, dt, A, B, C, D, z, bias, True)
    torch.testing.assert_close(got.flatten(1), expected)
    torch.testing.assert_close(state.flatten(1, 2), flat)


# --- bad input -----------------------------------------------------------------------------------------


def replaced(**changes):
    problem = make()
    tensors = {**problem.tensors, **{k: v for k, v in changes.items() if k in TENSORS}}
    options = {k: v for k, v in changes.items() if k not in TENSORS}
    cu_seqlens = options.pop("cu_seqlens", None)
    return lambda: type(problem)(tensors, True, cu_seqlens).run(selective_scan, **options)


f64 = {"dtype": torch.float64}
BAD = [  # make() draws batch 2, length 7, channels 4, states 3
    ("u: expected shape", ValueError, {"u": torch.zeros(2, 7, **f64)}),
    ("u: expected L >= 1", ValueError, {"u": torch.zeros(2, 0, 4, **f64)}),
    ("u: expected B >= 1", ValueError, {"u": torch.zeros(0, 7, 4, **f64)}),
    ("u: expected D >= 1", ValueError, {"u": torch.zeros(2, 7, 0, **f64)}),
    ("u: expected a floating-point tensor", TypeError, {"u": torch.zeros(2, 7, 4, dtype=torch.int64)}),
    ("u: expected a real tensor", TypeError, {"u": torch.zeros(2, 7, 4, dtype=torch.complex64)}),
    ("u: expected a torch.Tensor, got list", TypeError, {"u": [1.0]}),
    (r"delta: expected shape \(2, 7, 4\), got \(2, 6, 4\)", ValueError, {"delta": torch.ones(2, 6, 4, **f64)}),
    ("delta: expected shape", ValueError, {"delta": torch.ones(2, 7, 1, **f64)}),
    ("delta: expected torch.float64", TypeError, {"delta": torch.ones(2, 7, 4)}),
    ("delta: expected device cpu", ValueError, {"delta": torch.ones(2, 7, 4, device="meta", **f64)}),
    ("A: expected shape", ValueError, {"A": torch.ones(3, 4, **f64)}),
    ("A: expected shape", ValueError, {"A": torch.ones(4, **f64)}),
    ("A: expected N >= 1", ValueError, {"A": torch.ones(4, 0, **f64)}),
    ("A: expected a real tensor", TypeError, {"A": torch.ones(4, 3, dtype=torch.complex128)}),
    ("A: expected torch.float64", TypeError, {"A": torch.ones(4, 3)}),
    ("B: expected shape", ValueError, {"B": torch.ones(2, 7, 4, **f64)}),
    ("B: expected shape", ValueError, {"B": torch.ones(2, 7, **f64)}),
    ("B: expected shape", ValueError, {"B": torch.ones(2, 6, 1, 3, **f64)}),
    ("B: expected a number of groups that divides the 4", ValueError, {"B": torch.ones(2, 7, 3, 3, **f64)}),
    ("B: expected a number of groups", ValueError, {"B": torch.ones(2, 7, 0, 3, **f64)}),
    ("C: expected the 1 groups of B, got 2", ValueError, {"C": torch.ones(2, 7, 2, 3, **f64)}),
    ("C: expected shape", ValueError, {"C": torch.ones(7, 3, **f64)}),
    ("C: expected torch.float64", TypeError, {"C": torch.ones(4, 3, dtype=torch.float16)}),
    ("D: expected shape", ValueError, {"D": torch.ones(3, **f64)}),
    ("delta_bias: expected shape", ValueError, {"delta_bias": torch.ones(4, 1, **f64)}),
    ("z: expected shape", ValueError, {"z": torch.ones(2, 7, **f64)}),
    ("initial_state: expected shape", ValueError, {"initial_state": torch.ones(1, 4, 3, **f64)}),
    ("initial_state: expected torch.float64", TypeError, {"initial_state": torch.ones(2, 4, 3)}),
    ("cu_seqlens: expected an int32 or int64 tensor", TypeError, {"cu_seqlens": [0, 7]}),
    ("cu_seqlens: expected an int32 or int64 tensor", TypeError, {"cu_seqlens": torch.tensor([0.0, 7.0])}),
    ("cu_seqlens: expected shape", ValueError, {"cu_seqlens": torch.tensor([[0, 7]])}),
    ("u: expected batch 1 beside cu_seqlens", ValueError, {"cu_seqlens": torch.tensor([0, 7])}),
    ("method: expected one of .*'triton', got 'cuda'", ValueError, {"method": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "error", "changes"), BAD, ids=[f"{i}-{m[0][:24]}" for i, m in enumerate(BAD)])
def test_bad_input_is_named(message, error, changes):
    with pytest.raises(error, match=f"^{message}"):
        replaced(**changes)()


@pytest.mark.parametrize("borders", [[1, 7], [0, 6], [0, 5, 3, 7]])
@pytest.mark.parametrize("method", METHODS)
def test_wrong_borders_are_named(method, borders):
    problem = make(batch=1, length=7, initial_state=False)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected borders rising"):
        type(problem)(problem.tensors, True, torch.tensor(borders)).run(selective_scan, method=method)


def test_float32_state_matrix_is_asked_for_beside_half():
    problem = make().to(torch.bfloat16)
    problem.tensors["A"] = problem.tensors["A"].bfloat16()
    with pytest.raises(TypeError, match=r"^A: expected torch\.float32"):
        problem.run(selective_scan)


def test_the_drop_in_names_its_own_layout():
    u = torch.ones(2, 4, 7)
    with pytest.raises(ValueError, match=r"^B: expected shape \(2, 3, 7\), got \(2, 7, 3\)"):
        minimamba.selective_scan_fn(u, u, -torch.ones(4, 3), torch.ones(2, 7, 3), torch.ones(2, 3, 7))


STEP = {
    "state": torch.zeros(2, 4, 3), "x": torch.ones(2, 4), "dt": torch.ones(2, 4), "A": -torch.ones(4, 3),
    "B": torch.ones(2, 3), "C": torch.ones(2, 3), "D": torch.ones(4), "z": torch.ones(2, 4), "dt_bias": torch.ones(4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("state", torch.zeros(2, 4, 3).half(), TypeError),
        ("state", torch.zeros(2, 4), ValueError),
        ("x", torch.ones(2, 3), ValueError),
        ("state", torch.zeros(2, 4, 3).double(), TypeError),
        ("dt", torch.ones(2, 4, 1), ValueError),
        ("A", -torch.ones(3, 4), ValueError),
        ("B", torch.ones(2, 4), ValueError),
        ("B", torch.ones(2, 3, 3), ValueError),
        ("C", torch.ones(2, 2, 3), ValueError),
        ("D", torch.ones(3), ValueError),
        ("z", torch.ones(2, 3), ValueError),
        ("dt_bias", torch.ones(4).double(), TypeError),
    ],
)
def test_bad_steps_are_named_and_leave_the_state_alone(name, value, error):
    arguments = {k: v.clone() for k, v in STEP.items()} | {name: value}
    with pytest.raises(error, match=f"^{name}: "):
        minimamba.selective_state_update(**arguments)
    assert (arguments["state"] == 0).all()
