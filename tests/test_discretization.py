"""Chapter 02: the four rules, against SciPy's matrix exponential and quadrature, and against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad_vec
from scipy.linalg import expm
from scipy.optimize import brentq

from minimamba import discretization
from minimamba.discretization import DIAGONAL_RULES, RULES, exprel

NAMES = list(RULES)
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
each_rule = pytest.mark.parametrize("name", NAMES)


# --- the oracle: one system at a time, from the definitions ---


def oracle(name, A, B, delta):
    """Ā (N, N) and B̄ (N,) in float64 or complex128."""
    A, B, identity = np.asarray(A), np.asarray(B), np.eye(len(B))
    if name == "euler":
        return identity + delta * A, delta * B
    if name == "bilinear":
        inverse = np.linalg.inv(identity - delta / 2 * A)
        return inverse @ (identity + delta / 2 * A), inverse @ B * delta
    if name == "zoh-euler":
        return expm(delta * A), delta * B
    return expm(delta * A), quad_vec(lambda s: expm(s * A) @ B, 0, delta, epsabs=1e-13, epsrel=1e-13)[0]


def draw(seed, *shape, is_complex=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return torch.from_numpy(x + 1j * rng.normal(size=shape) if is_complex else x)


def draw_diagonal(seed, *shape, is_complex=False):
    """Decay rates from 1e-2 to 1e2, with rotation if complex."""
    rate = -torch.from_numpy(np.exp(np.random.default_rng(seed).uniform(-4.6, 4.6, shape)))
    return torch.complex(rate, 5 * draw(seed + 1, *shape)) if is_complex else rate


def assert_near(got, want, tolerance=1e-12):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale = max(np.abs(want).max(), 1e-300)
    assert np.abs(got - want).max() <= tolerance * scale


def recur(A_bar, B_bar, inputs, h):
    """The last state of h_k = Ā h_{k-1} + B̄ x_k."""
    for x in inputs:
        h = A_bar @ h + B_bar * x
    return h


# --- values ---


@each_rule
@given(
    N=st.integers(1, 5),
    systems=st.integers(1, 3),
    is_complex=st.booleans(),
    delta=st.floats(1e-3, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=15)
def test_dense_rules_equal_their_definitions(name, N, systems, is_complex, delta, seed):
    A, B = draw(seed, systems, N, N, is_complex=is_complex), draw(seed + 1, systems, N, is_complex=is_complex)
    A = A - 3 * torch.eye(N)  # 2/Δ is no eigenvalue
    A_bar, B_bar = RULES[name](A, B, delta)
    for i in range(systems):
        want_A, want_B = oracle(name, A[i], B[i], delta)
        assert_near(A_bar[i], want_A, 1e-10)
        assert_near(B_bar[i], want_B, 1e-10)


@each_rule
@given(N=st.integers(1, 5), is_complex=st.booleans(), delta=st.floats(1e-4, 10), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_diagonal_rules_are_the_dense_ones_on_a_diagonal_matrix(name, N, is_complex, delta, seed):
    A, B = draw_diagonal(seed, N, is_complex=is_complex), draw(seed + 2, N, is_complex=is_complex)
    A_bar, B_bar = DIAGONAL_RULES[name](A, B, delta)
    dense_A, dense_B = RULES[name](torch.diag(A), B, delta)
    assert_near(torch.diag(A_bar), dense_A, 1e-10)
    assert_near(B_bar, dense_B, 1e-10)


@each_rule
def test_a_conjugate_pair_is_a_real_rotation(name):
    sigma, omega, delta = -0.4, 3.0, 0.3
    A = torch.tensor([[sigma, -omega], [omega, sigma]], dtype=torch.float64)
    B = torch.tensor([1.5, -0.5], dtype=torch.float64)
    b = torch.view_as_complex(B)[None]
    A_bar, B_bar = RULES[name](A, B, delta)
    a_bar, b_bar = DIAGONAL_RULES[name](torch.tensor([sigma + 1j * omega], dtype=torch.complex128), b, delta)
    assert_near(A_bar @ B, torch.view_as_real(a_bar * b)[0])
    assert_near(B_bar, torch.view_as_real(b_bar)[0])


@each_rule
@given(data=st.data(), N=st.integers(1, 3), dense=st.booleans())
@settings(deadline=None, max_examples=25)
def test_any_axes_that_broadcast(name, data, N, dense):
    full = data.draw(st.lists(st.integers(1, 3), max_size=3))

    def thin():
        axes = [size if data.draw(st.booleans()) else 1 for size in full]
        return axes[data.draw(st.integers(0, len(axes))) :] if all(a == 1 for a in axes) else axes

    A_axes, B_axes, delta_axes = thin(), thin(), thin()
    A = draw(1, *A_axes, N, N) if dense else draw_diagonal(1, *A_axes, N)
    B, delta = draw(2, *B_axes, N), draw(3, *delta_axes).abs() / 9
    rule = (RULES if dense else DIAGONAL_RULES)[name]
    A_bar, B_bar = rule(A, B, delta)
    axes = np.broadcast_shapes(A_axes, B_axes, delta_axes)
    own = (N, N) if dense else (N,)
    assert A_bar.shape == axes + own and B_bar.shape == axes + (N,)
    A, B, delta = A.expand(axes + own), B.expand(axes + (N,)), delta.expand(axes)
    for i in np.ndindex(axes):
        one_A, one_B = rule(A[i], B[i], delta[i].item())
        assert_near(A_bar[i], one_A)
        assert_near(B_bar[i], one_B)


@pytest.mark.parametrize(("dtype", "other"), [(a, b) for a in DTYPES for b in DTYPES if a.to_real() == b.to_real()])
@pytest.mark.parametrize("rules", [RULES, DIAGONAL_RULES])
def test_dtypes(rules, dtype, other):
    A = -torch.eye(2, dtype=dtype) if rules is RULES else -torch.ones(2, dtype=dtype)
    for rule in rules.values():
        for delta in (1, 0.5, torch.tensor(0.5, dtype=dtype.to_real())):
            A_bar, B_bar = rule(A, torch.ones(2, dtype=other), delta)
            assert A_bar.dtype == B_bar.dtype == torch.promote_types(dtype, other)


@pytest.mark.parametrize("rules", [RULES, DIAGONAL_RULES])
def test_float32_against_float64(rules):
    for delta in (1e-3, 0.03, 1.0):
        A = draw(5, 4, 4) - 2 * torch.eye(4) if rules is RULES else draw_diagonal(5, 4)
        B = draw(6, 4)
        for rule in rules.values():
            for got, want in zip(rule(A.float(), B.float(), delta), rule(A, B, delta), strict=True):
                assert_near(got, want, 2e-6)


def test_a_lone_matrix_exponential_has_all_its_digits():
    for norm in np.geomspace(1e-6, 2, 40):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            A = norm * torch.tensor([[0.2, 1.0], [-1.0, 0.1]], dtype=dtype)
            assert_near(discretization.matrix_exp(A), expm(A.double().numpy()), tolerance)
            assert_near(discretization.matrix_exp(A[None])[0], expm(A.double().numpy()), tolerance)


# --- singular, stiff, tiny ---


def test_zoh_of_a_singular_matrix():
    # A free mass: from rest under a constant force, velocity Δ and position Δ²/2.
    A = torch.tensor([[0, 1], [0, 0]], dtype=torch.float64)
    B = torch.tensor([0, 1], dtype=torch.float64)
    for delta in (1e-6, 0.5, 40.0):
        A_bar, B_bar = discretization.zoh(A, B, delta)
        assert_near(A_bar, [[1, delta], [0, 1]])
        np.testing.assert_allclose(B_bar, [delta**2 / 2, delta], rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_zero_every_rule_adds_delta_b(dtype):
    B = draw(1, 3, is_complex=dtype.is_complex).to(dtype)
    for name in NAMES:
        A_bar, B_bar = DIAGONAL_RULES[name](torch.zeros(3, dtype=dtype), B, 0.25)
        assert (A_bar == 1).all() and (B_bar == 0.25 * B).all()
        A_bar, B_bar = RULES[name](torch.zeros(3, 3, dtype=dtype), B, 0.25)
        assert (A_bar == torch.eye(3)).all()
        assert_near(B_bar, 0.25 * B, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stiff_and_tiny_steps(dtype):
    eps = torch.finfo(dtype).eps
    A = -torch.logspace(-12, 4, 33, dtype=dtype)
    for delta in (1e-8, 1e-3, 1.0, 1e3):
        A_bar, B_bar = discretization.zoh_diagonal(A, torch.ones_like(A), delta)
        z = A.double().numpy() * delta
        # exp turns the rounding of z into an error of |z| eps, and below exp(-80) float32 is not normal any more.
        np.testing.assert_allclose(A_bar.numpy(), np.exp(z), rtol=100 * eps, atol=1e-34)
        np.testing.assert_allclose(B_bar.numpy(), np.expm1(z) / z * delta, rtol=20 * eps)
    system, B = torch.tensor([[-1e4, 3e3], [0, -1e-3]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    A_bar, B_bar = discretization.zoh(system, B, 2.0)
    want = np.linalg.solve(system, (expm(2 * system.numpy()) - np.eye(2)) @ B.numpy())
    assert_near(B_bar, want, 1e-8)
    assert_near(A_bar, expm(2 * system.numpy()), 1e-8)


def test_limits_of_a_long_step():
    A, B = torch.tensor([-1.0, -50.0]).double(), torch.tensor([2.0, 3.0]).double()
    A_bar, B_bar = discretization.zoh_diagonal(A, B, 1e6)
    assert (A_bar == 0).all()
    assert_near(B_bar, -B / A)
    A_bar, B_bar = discretization.bilinear_diagonal(A, B, 1e6)
    assert_near(A_bar, -np.ones(2), 1e-5)
    assert_near(B_bar, -2 * B / A, 1e-5)


# --- exprel ---


def exprel_and_derivative(z):
    """Σ z^n / (n+1)! and its derivative, summed in extended precision; |z| below about 5."""
    z = np.asarray(z).astype(np.clongdouble)
    term, value, slope = np.ones_like(z), np.zeros_like(z), np.zeros_like(z)
    for n in range(60):  # term = z^n / (n+1)!
        value += term
        slope += (n + 1) * term / (n + 2)
        term = term * z / (n + 2)
    return value.astype(complex), slope.astype(complex)


@pytest.mark.parametrize("is_complex", [False, True])
def test_exprel_and_its_gradient_keep_their_digits_near_zero(is_complex):
    size = np.geomspace(1e-300, 3, 400)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False) if is_complex else [0, np.pi]
    z = np.concatenate([[0], *(size * np.exp(1j * angle) for angle in angles)])
    z = torch.from_numpy(z if is_complex else z.real.copy()).requires_grad_()
    value = exprel(z)
    want, slope = exprel_and_derivative(z.detach())
    np.testing.assert_allclose(value.detach(), want, rtol=1e-14)
    (gradient,) = torch.autograd.grad(value.sum() if not is_complex else value.real.sum(), z)
    np.testing.assert_allclose(gradient, slope.conj(), rtol=2e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exprel_in_each_precision(dtype):
    z = torch.linspace(-2, 2, 4001).to(dtype) * (0.6 + 0.8j if dtype.is_complex else 1)
    want, slope = exprel_and_derivative(z)
    eps = torch.finfo(dtype).eps
    z.requires_grad_()
    value = exprel(z)
    assert value.dtype == dtype
    assert np.abs(value.detach().numpy() - want).max() < 8 * eps
    (gradient,) = torch.autograd.grad(value.real.sum(), z)
    assert np.abs(gradient.numpy() - slope.conj()).max() < 16 * eps


def test_exprel_passes_nan_on_and_nothing_else_makes_one():
    z = torch.tensor([torch.nan, -torch.inf, -1e30, -1e-30, 80.0], requires_grad=True)
    value = exprel(z)
    value.sum().backward()
    assert value.isnan().tolist() == [True, False, False, False, False]
    assert value[1] == 0 and z.grad[1:].isfinite().all()


def test_delta_b_is_twice_the_exact_weight_at_minus_1_59():
    z = brentq(lambda z: np.expm1(z) / z - 0.5, -3, -0.1)
    assert round(z, 2) == -1.59
    one = torch.ones(1, dtype=torch.float64)
    _, exact = discretization.zoh_diagonal(z * one, one, 1.0)
    _, mamba = discretization.zoh_euler_diagonal(z * one, one, 1.0)
    assert_near(mamba, 2 * exact)


# --- what makes a rule right: the differential equation ---


@given(seed=st.integers(0, 99), first=st.floats(0.01, 2), second=st.floats(0.01, 2))
@settings(deadline=None, max_examples=25)
def test_two_zoh_steps_of_a_held_input_are_one(seed, first, second):
    A, B = draw(seed, 3, 3), draw(seed + 1, 3)
    (A_1, B_1), (A_2, B_2) = discretization.zoh(A, B, first), discretization.zoh(A, B, second)
    A_both, B_both = discretization.zoh(A, B, first + second)
    assert_near(A_2 @ A_1, A_both, 1e-10)
    assert_near(A_2 @ B_1 + B_2, B_both, 1e-10)


def orders(name, feed, steps=(256, 512, 1024)):
    """How fast the error at t = 4 falls as Δ is halved, for the input `feed(x, times)` of a smooth x."""
    A = torch.tensor([[-0.6, 2.0], [-2.5, -0.4]], dtype=torch.float64)
    B = torch.tensor([1.0, -0.5], dtype=torch.float64)
    x = lambda t: np.sin(1.7 * t)
    start = torch.tensor([1.0, 0.5], dtype=torch.float64)
    exact = expm(4 * A.numpy()) @ start.numpy()
    exact = exact + quad_vec(lambda s: expm((4 - s) * A.numpy()) @ B.numpy() * x(s), 0, 4, epsabs=1e-13)[0]
    errors = []
    for n in steps:
        h = recur(*RULES[name](A, B, 4 / n), feed(x, np.linspace(0, 4, n + 1)), start)
        errors.append(np.abs(h.numpy() - exact).max())
    return np.log2(np.array(errors[:-1]) / errors[1:])


@each_rule
def test_all_rules_are_of_order_one_for_samples_of_a_smooth_input(name):
    np.testing.assert_allclose(orders(name, lambda x, t: x(t[1:])), 1, atol=0.05)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("bilinear", 2), ("zoh", 2), ("zoh-euler", 1)])
def test_the_mean_of_both_samples_gives_order_two_where_the_rule_allows(name, order):
    np.testing.assert_allclose(orders(name, lambda x, t: (x(t[1:]) + x(t[:-1])) / 2), order, atol=0.05)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("bilinear", 2), ("zoh", None), ("zoh-euler", 1)])
def test_for_a_held_input_zoh_is_exact(name, order):
    A, B = draw(7, 3, 3) - 2 * torch.eye(3), draw(8, 3)
    levels, start = draw(9, 4).numpy(), draw(10, 3)
    exact = start.numpy()
    for level in levels:
        exact = expm(A.numpy()) @ exact + quad_vec(lambda s: expm(s * A.numpy()) @ B.numpy(), 0, 1)[0] * level
    error = {}
    for n in (64, 128):
        h = recur(*RULES[name](A, B, 1 / n), np.repeat(levels, n), start)
        error[n] = np.abs(h.numpy() - exact).max()
    if order is None:
        assert max(error.values()) < 1e-12
    else:
        assert abs(np.log2(error[64] / error[128]) - order) < 0.1


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("bilinear", 2), ("zoh", None), ("zoh-euler", None)])
def test_the_free_response(name, order):
    A, B, start = draw(7, 3, 3) - 2 * torch.eye(3), draw(8, 3), draw(10, 3)
    exact = expm(A.numpy()) @ start.numpy()
    error = [np.abs(recur(*RULES[name](A, B, 1 / n), np.zeros(n), start).numpy() - exact).max() for n in (64, 128)]
    if order is None:
        assert max(error) < 1e-13
    else:
        assert abs(np.log2(error[0] / error[1]) - order) < 0.1


def test_stability_of_each_rule():
    z = torch.complex(*torch.meshgrid(torch.linspace(-3, 3, 60), torch.linspace(-3, 3, 60), indexing="ij"))
    z = z.to(torch.complex128).reshape(-1)
    stable = {name: rule(z, torch.ones_like(z), 1)[0].abs() < 1 for name, rule in DIAGONAL_RULES.items()}
    assert (stable["euler"] == ((z + 1).abs() < 1)).all()
    for name in ("bilinear", "zoh", "zoh-euler"):
        assert (stable[name] == (z.real < 0)).all()


@each_rule
def test_the_steady_state_of_a_constant_input_is_exact_but_not_for_zoh_euler(name):
    A, B = draw(7, 3, 3) - 3 * torch.eye(3), draw(8, 3)
    A_bar, B_bar = (x.numpy() for x in RULES[name](A, B, 0.3))
    steady = np.linalg.solve(np.eye(3) - A_bar, B_bar)
    error = np.abs(steady + np.linalg.solve(A.numpy(), B.numpy())).max()
    assert error > 0.05 if name == "zoh-euler" else error < 1e-12


# --- gradients ---


@each_rule
@pytest.mark.parametrize("is_complex", [False, True])
def test_gradients_of_the_dense_rules(name, is_complex):
    A = draw(11, 2, 3, 3, is_complex=is_complex).requires_grad_()
    B = draw(12, 2, 3, is_complex=is_complex).requires_grad_()
    delta = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RULES[name], (A, B, delta))
    one = (A[0].detach().requires_grad_(), B[0].detach().requires_grad_(), delta[0].detach().requires_grad_())
    assert torch.autograd.gradcheck(RULES[name], one)


@each_rule
@pytest.mark.parametrize("is_complex", [False, True])
def test_gradients_of_the_diagonal_rules_down_to_zero(name, is_complex):
    A = torch.tensor([0.0, -1e-9, -1e-4, -0.3, -1.0, -20.0], dtype=torch.float64)
    A = (A * (1 + 0.7j) if is_complex else A).requires_grad_()
    B = draw(12, 6, is_complex=is_complex).requires_grad_()
    delta = torch.tensor([[0.3], [2.5]], dtype=torch.float64)[..., 0].requires_grad_()
    assert torch.autograd.gradcheck(DIAGONAL_RULES[name], (A, B, delta), eps=1e-7, atol=1e-6)


def test_gradients_of_zoh_at_a_equal_to_zero():
    # B̄ = ΔB (1 + ΔA/2 + ...): the slope in A at zero is Δ²B/2, which a branch "B̄ = ΔB if A == 0" would lose.
    A = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    B = torch.tensor([1.0, -3.0], dtype=torch.float64)
    _, B_bar = discretization.zoh_diagonal(A, B, 0.4)
    (gradient,) = torch.autograd.grad(B_bar.sum(), A)
    assert_near(gradient, 0.4**2 / 2 * B)
    _, B_bar = discretization.zoh(torch.diag(A), B, 0.4)
    (gradient,) = torch.autograd.grad(B_bar.sum(), A)
    assert_near(gradient, 0.4**2 / 2 * B)


# --- bad inputs ---


@each_rule
@pytest.mark.parametrize("dense", [True, False])
def test_rules_name_the_bad_argument(name, dense):
    rule = (RULES if dense else DIAGONAL_RULES)[name]
    A = -torch.eye(3, dtype=torch.float64) if dense else -torch.ones(3, dtype=torch.float64)
    B = torch.ones(3, dtype=torch.float64)
    batch = A.expand(2, *A.shape)
    cases = [
        (A.tolist(), B, 1.0, TypeError, "A: expected a torch.Tensor, got list"),
        (A.long(), B, 1.0, TypeError, "A: expected float32, .*, got torch.int64"),
        (A.half(), B, 1.0, TypeError, "A: expected float32, .*, got torch.float16"),
        (A, B.float(), 1.0, TypeError, r"B: expected torch.float64 or torch.complex128 \(A's precision\)"),
        (A, B, torch.tensor(1.0), TypeError, r"delta: expected torch.float64 \(A's precision\), got torch.float32"),
        (A, B, torch.tensor(1j).to(torch.complex128), TypeError, "delta: expected torch.float64"),
        (A, B, "1", TypeError, "delta: expected a number or a torch.Tensor, got str"),
        (A, B, None, TypeError, "delta: expected a number or a torch.Tensor, got NoneType"),
        (A[..., :0], B[:0], 1.0, ValueError, r"A: expected shape \(\.\.\., .*N\) with N >= 1, got"),
        (A.sum(), B, 1.0, ValueError, r"A: expected shape \(\.\.\., .*N\) with N >= 1, got \(\)"),
        (A, B[:2], 1.0, ValueError, r"B: expected shape \(..., 3\), N as in A, got \(2,\)"),
        (A, B.sum(), 1.0, ValueError, r"B: expected shape \(..., 3\), N as in A, got \(\)"),
        (batch, B.expand(4, 3), 1.0, ValueError, r"B: expected axes that .* \(2,\) before N, got \(4,\)"),
        (batch, B, torch.ones(3).double(), ValueError, r"delta: expected axes that .* \(2,\), got \(3,\)"),
        (A, B.to("meta"), 1.0, ValueError, r"B: expected device cpu \(A's\), got meta"),
        (A, B, torch.ones((), device="meta").double(), ValueError, r"delta: expected device cpu \(A's\), got meta"),
    ]  # fmt: skip
    for bad_A, bad_B, bad_delta, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            rule(bad_A, bad_B, bad_delta)
    if dense:
        with pytest.raises(ValueError, match=r"^A: expected shape \(..., N, N\) with N >= 1, got \(3, 2\)"):
            rule(A[:, :2], B, 1.0)


def test_exprel_names_the_bad_argument():
    with pytest.raises(TypeError, match=r"^z: expected a torch.Tensor, got float"):
        exprel(1.0)
    with pytest.raises(TypeError, match=r"^z: expected float32, .*, got torch.int64"):
        exprel(torch.ones(2).long())
