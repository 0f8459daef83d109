"""Chapter 01: the exact solution, against SciPy's ODE solver, quadrature, and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm

from minimamba import continuous_ssm


def draw_system(seed, N, is_complex=False):
    """A (N, N) with eigenvalues on both sides of -1, B, C (N,), in float64 or complex128."""
    rng = np.random.default_rng(seed)
    A, B, C = (rng.normal(size=shape) for shape in ((N, N), (N,), (N,)))
    if is_complex:
        A, B, C = (x + 1j * rng.normal(size=x.shape) for x in (A, B, C))
    return [torch.from_numpy(x) for x in (A - np.eye(N), B, C)]


def draw(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def oracle_states(u, delta, A, B, start):
    """The states at the ends of the steps, by an ODE solver that knows nothing of matrix exponentials."""
    h, states = np.asarray(start), []
    for u_k in np.asarray(u):
        slope = lambda t, h, u_k=u_k: np.asarray(A) @ h + np.asarray(B) * u_k
        h = solve_ivp(slope, (0, delta), h, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        states.append(h)
    return np.array(states)


def assert_near(got, want, tolerance=1e-12):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-300)


# --- simulate ---


@given(
    N=st.integers(1, 4),
    length=st.integers(1, 9),
    delta=st.floats(1e-2, 2),
    is_complex=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_simulate_solves_the_differential_equation(N, length, delta, is_complex, seed):
    A, B, C = draw_system(seed, N, is_complex)
    u, start = draw(seed + 1, length), draw(seed + 2, N).to(A.dtype)
    states = oracle_states(u, delta, A, B, start)
    y, h = continuous_ssm.simulate(u, delta, A, B, C, 0.7, start)
    assert_near(h, states, 1e-8)
    assert_near(y, states @ C.numpy() + 0.7 * u.numpy(), 1e-8)


def test_without_an_initial_state_the_system_starts_at_rest():
    A, B, C = draw_system(3, 3)
    u = draw(4, 7)
    y, h = continuous_ssm.simulate(u, 0.3, A, B, C)
    y_rest, h_rest = continuous_ssm.simulate(u, 0.3, A, B, C, 0, torch.zeros(3).double())
    assert (y == y_rest).all() and (h == h_rest).all()


def test_the_response_is_the_free_response_plus_the_impulse_responses():
    # h(t) = e^{At} h_0 + ∫ e^{A(t-s)} B x(s) ds, the integral by quadrature over each held input.
    A, B, C = draw_system(5, 3)
    u, start, delta = draw(6, 6), draw(7, 3), 0.4
    y, _ = continuous_ssm.simulate(u, delta, A, B, C, initial_state=start)
    times = delta * torch.arange(1, 7).double()
    free = continuous_ssm.free_response(A, start, times)
    weight = lambda s, t: C.numpy() @ expm((t - s) * A.numpy()) @ B.numpy()
    for k, t in enumerate(times.tolist()):
        integrals = [quad(weight, delta * j, delta * (j + 1), args=(t,))[0] for j in range(k + 1)]
        forced = np.dot(integrals, u[: k + 1].numpy())
        assert_near(y[k], free[k] @ C + forced, 1e-10)
    assert_near(continuous_ssm.simulate(torch.zeros_like(u), delta, A, B, C, initial_state=start)[1], free)


@given(cut=st.integers(1, 10), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_the_state_is_all_there_is_to_know_of_the_past(cut, seed):
    A, B, C = draw_system(seed, 3)
    u = draw(seed, 11)
    y, h = continuous_ssm.simulate(u, 0.2, A, B, C, 0.5)
    y_1, h_1 = continuous_ssm.simulate(u[:cut], 0.2, A, B, C, 0.5)
    y_2, h_2 = continuous_ssm.simulate(u[cut:], 0.2, A, B, C, 0.5, h_1[-1])
    assert_near(torch.cat([y_1, y_2]), y)
    assert_near(torch.cat([h_1, h_2]), h)


def test_a_finer_grid_changes_nothing_and_time_scales_with_the_system():
    A, B, C = draw_system(8, 4)
    u, start = draw(9, 5), draw(10, 4)
    y, h = continuous_ssm.simulate(u, 0.6, A, B, C, 0.3, start)
    y_fine, h_fine = continuous_ssm.simulate(u.repeat_interleave(3), 0.2, A, B, C, 0.3, start)
    assert_near(h_fine[2::3], h)
    assert_near(y_fine[2::3], y)
    y_unit, _ = continuous_ssm.simulate(u, 1, 0.6 * A, 0.6 * B, C, 0.3, start)
    assert_near(y_unit, y)


def test_a_singular_system_integrates():
    A, B, C = continuous_ssm.mass_spring(2.0, 0.0, 0.0)  # a free mass of 2 kg, pushed with 6 N: q = 3 t²/2
    y, h = continuous_ssm.simulate(torch.full((5,), 6.0).double(), 0.5, A, B, C)
    t = 0.5 * torch.arange(1, 6).double()
    assert_near(y, 1.5 * t**2)
    assert_near(h[:, 1], 3 * t)


def test_float32_and_mixed_real_and_complex():
    A, B, C = draw_system(11, 3)
    u = draw(12, 50)
    y, _ = continuous_ssm.simulate(u, 0.1, A, B, C)
    y_32, h_32 = continuous_ssm.simulate(u.float(), 0.1, A.float(), B.float(), C.float())
    assert y_32.dtype == h_32.dtype == torch.float32
    assert_near(y_32, y, 1e-5)
    y_complex, h_complex = continuous_ssm.simulate(u, 0.1, A.to(torch.complex128), B, C)
    assert y_complex.dtype == h_complex.dtype == torch.complex128
    assert_near(y_complex, y.to(torch.complex128))


# --- free and impulse response ---


@given(N=st.integers(1, 5), points=st.integers(1, 6), is_complex=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_responses_equal_scipys_matrix_exponential(N, points, is_complex, seed):
    A, B, C = draw_system(seed, N, is_complex)
    times = draw(seed, points).abs()
    free = continuous_ssm.free_response(A, B, times)
    impulse = continuous_ssm.impulse_response(A, B, C, times)
    want = np.array([expm(t * A.numpy()) @ B.numpy() for t in times.tolist()])
    assert_near(free, want, 1e-11)
    assert_near(impulse, want @ C.numpy(), 1e-11)


def test_the_impulse_response_is_the_answer_to_a_short_push_of_size_one():
    A, B, C = draw_system(13, 3)
    delta = 1e-4
    u = torch.zeros(4000).double()
    u[0] = 1 / delta
    y, _ = continuous_ssm.simulate(u, delta, A, B, C)
    times = delta * torch.arange(1, 4001).double()
    assert_near(y, continuous_ssm.impulse_response(A, B, C, times), 1e-3)


def test_the_exponential_is_of_the_matrix_not_of_its_elements():
    A = torch.tensor([[0, 1], [-1, 0]], dtype=torch.float64)
    start = torch.tensor([1, 0], dtype=torch.float64)
    t = torch.linspace(0, 7, 15, dtype=torch.float64)
    assert_near(continuous_ssm.free_response(A, start, t), torch.stack([t.cos(), -t.sin()], dim=1), 1e-13)


# --- eigenvalues ---


@pytest.mark.parametrize("is_complex", [False, True])
def test_the_diagonal_system_is_the_same_system(is_complex):
    A, B, C = draw_system(14, 4, is_complex)
    eigenvalues, B_modes, C_modes = continuous_ssm.diagonalize(A, B, C)
    times = torch.linspace(0, 3, 9, dtype=torch.float64)
    modes = (C_modes * B_modes * torch.exp(times[:, None] * eigenvalues)).sum(-1)
    want = continuous_ssm.impulse_response(A, B, C, times)
    assert_near(modes, want.to(torch.complex128), 1e-11)
    u = draw(15, 6)
    y, _ = continuous_ssm.simulate(u, 0.3, torch.diag(eigenvalues), B_modes, C_modes)
    assert_near(y, continuous_ssm.simulate(u, 0.3, A, B, C)[0].to(torch.complex128), 1e-11)


def test_a_system_without_a_basis_of_eigenvectors_is_refused():
    for friction in (2.0, 2.0 + 1e-15):
        with pytest.raises(ValueError, match=r"^A: expected a basis of eigenvectors"):
            continuous_ssm.diagonalize(*continuous_ssm.mass_spring(1.0, 1.0, friction))
    continuous_ssm.diagonalize(*continuous_ssm.mass_spring(1.0, 1.0, 2.01))


@pytest.mark.parametrize(
    ("eigenvalues", "stable", "half_life"),
    [
        ([-2.0, -0.5], True, math.log(2) / 0.5),
        ([-0.1 + 3j, -0.1 - 3j], True, math.log(2) / 0.1),
        ([-1.0, 0.0], False, math.inf),
        ([2j, -2j], False, math.inf),
        ([-5.0, 0.2], False, math.inf),
        ([-1e-6], True, math.log(2) * 1e6),
    ],
)
def test_stability_and_half_life(eigenvalues, stable, half_life):
    for seed in range(5):
        V = torch.from_numpy(np.linalg.qr(draw(seed, *[len(eigenvalues)] * 2).numpy())[0]).to(torch.complex128)
        A = V @ torch.diag(torch.tensor(eigenvalues, dtype=torch.complex128)) @ V.mH
        assert continuous_ssm.is_stable(A) is stable
        assert math.isclose(continuous_ssm.half_life(A), half_life, rel_tol=1e-9)


def test_what_only_turns_does_not_fade():
    for seed in range(5):
        A = draw(seed, 6, 6)
        assert not continuous_ssm.is_stable(A - A.T)
        assert continuous_ssm.half_life(A - A.T) == math.inf


def test_half_life_is_the_time_in_which_a_late_state_halves():
    A, start, _ = draw_system(16, 3)
    A = A - A.T - 0.3 * torch.eye(3)  # turns, and fades at one rate in all directions
    T = continuous_ssm.half_life(A)
    size = continuous_ssm.free_response(A, start, torch.tensor([1, 1 + T], dtype=torch.float64)).norm(dim=1)
    assert_near(size[1] / size[0], 0.5, 1e-8)


# --- the mass on a spring ---


@pytest.mark.parametrize("friction", [0.0, 0.4, 3.0, 20.0])
def test_mass_on_a_spring_obeys_newton(friction):
    mass, stiffness = 0.7, 3.0
    A, B, C = continuous_ssm.mass_spring(mass, stiffness, friction)
    newton = lambda t, h: [h[1], (-stiffness * h[0] - friction * h[1] + 2.5) / mass]
    want = solve_ivp(newton, (0, 1.3), [0.2, -1.0], rtol=1e-11, atol=1e-12).y[:, -1]
    start = torch.tensor([0.2, -1.0], dtype=torch.float64)
    y, h = continuous_ssm.simulate(torch.full((4,), 2.5).double(), 1.3 / 4, A, B, C, initial_state=start)
    assert_near(h[-1], want, 1e-8)
    assert_near(y[-1], want[0], 1e-8)
    swings = friction < 2 * math.sqrt(stiffness * mass)
    assert (torch.linalg.eigvals(A).imag.abs().max() > 0) == swings
    assert continuous_ssm.is_stable(A) == (friction > 0)


# --- gradients ---


@pytest.mark.parametrize("is_complex", [False, True])
def test_gradients(is_complex):
    A, B, C = draw_system(17, 3, is_complex)
    u, start = draw(18, 4), draw(19, 3).to(A.dtype)
    delta, times = torch.tensor(0.3, dtype=torch.float64), draw(20, 3).abs()
    for x in (A, B, C, u, start, delta, times):
        x.requires_grad_()
    run = lambda u, delta, A, B, C, start: continuous_ssm.simulate(u, delta, A, B, C, 0.2, start)
    assert torch.autograd.gradcheck(run, (u, delta, A, B, C, start))
    assert torch.autograd.gradcheck(continuous_ssm.impulse_response, (A, B, C, times))
    assert torch.autograd.gradcheck(continuous_ssm.free_response, (A, start, times))


# --- bad inputs ---


def good(**changes):
    A, B, C = draw_system(21, 3)
    arguments = {"u": draw(22, 5), "delta": 0.1, "A": A, "B": B, "C": C}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": [1.0]}, TypeError, "u: expected a torch.Tensor, got list"),
        ({"u": torch.zeros(5).long()}, TypeError, "u: expected float32, .*, got torch.int64"),
        ({"u": torch.zeros(5, 1).double()}, ValueError, r"u: expected shape \(L,\), got \(5, 1\)"),
        ({"u": torch.zeros(0).double()}, ValueError, "u: expected L >= 1"),
        ({"u": torch.zeros(5)}, TypeError, "A: expected torch.float32 or torch.complex64"),
        ({"A": torch.zeros(3, 2).double()}, ValueError, r"A: expected shape \(N, N\) with N >= 1, got \(3, 2\)"),
        ({"A": torch.zeros(3).double()}, ValueError, r"A: expected shape \(N, N\)"),
        ({"A": torch.zeros(0, 0).double()}, ValueError, r"A: expected shape \(N, N\) with N >= 1"),
        ({"B": torch.zeros(2).double()}, ValueError, r"B: expected shape \(3,\), got \(2,\)"),
        ({"B": torch.zeros(3, 1).double()}, ValueError, r"B: expected shape \(3,\), got \(3, 1\)"),
        ({"C": torch.zeros(1, 3).double()}, ValueError, r"C: expected shape \(3,\), got \(1, 3\)"),
        ({"C": torch.zeros(3)}, TypeError, r"C: expected torch.float64 or torch.complex128"),
        ({"C": torch.zeros(3, device="meta").double()}, ValueError, r"C: expected device cpu"),
        ({"initial_state": torch.zeros(5, 3).double()}, ValueError, r"initial_state: expected shape \(3,\)"),
        ({"initial_state": 0}, TypeError, "initial_state: expected a torch.Tensor, got int"),
        ({"delta": "week"}, TypeError, "delta: expected a number or a torch.Tensor, got str"),
        ({"delta": torch.tensor(0.1)}, TypeError, "delta: expected torch.float64"),
        ({"delta": torch.ones(5).double()}, ValueError, r"delta: expected one step for all, got shape \(5,\)"),
        ({"D": "skip"}, TypeError, "D: expected a number, got str"),
        ({"D": torch.ones(5).double()}, TypeError, "D: expected a number, got Tensor"),
    ],
)
def test_simulate_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        continuous_ssm.simulate(**good(**changes))


def test_the_other_functions_name_the_bad_argument():
    A, B, C = draw_system(23, 3)
    times = torch.ones(2).double()
    with pytest.raises(TypeError, match=r"^times: expected a torch.Tensor, got float"):
        continuous_ssm.free_response(A, B, 1.0)
    with pytest.raises(TypeError, match=r"^times: expected torch.float64 .A's precision., got torch.float32"):
        continuous_ssm.impulse_response(A, B, C, times.float())
    with pytest.raises(ValueError, match=r"^times: expected shape \(T,\), got \(\)"):
        continuous_ssm.free_response(A, B, times[0])
    with pytest.raises(ValueError, match=r"^initial_state: expected shape \(3,\), got \(2,\)"):
        continuous_ssm.free_response(A, B[:2], times)
    with pytest.raises(ValueError, match=r"^B: expected shape \(3,\), got \(2,\)"):
        continuous_ssm.impulse_response(A, B[:2], C, times)
    with pytest.raises(ValueError, match=r"^C: expected shape \(3,\), got \(2,\)"):
        continuous_ssm.impulse_response(A, B, C[:2], times)
    with pytest.raises(ValueError, match=r"^B: expected shape \(3,\), got \(2,\)"):
        continuous_ssm.diagonalize(A, B[:2], C)
    for function in (continuous_ssm.is_stable, continuous_ssm.half_life):
        with pytest.raises(ValueError, match=r"^A: expected shape \(N, N\)"):
            function(A[:2])
        with pytest.raises(TypeError, match=r"^A: expected a torch.Tensor"):
            function(A.tolist())
    for name, arguments in (
        ("mass", (0, 1, 1)),
        ("stiffness", (1, -1, 1)),
        ("stiffness", (1, math.inf, 1)),
        ("friction", (1, 1, math.nan)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number >"):
            continuous_ssm.mass_spring(*arguments)
    with pytest.raises(TypeError, match=r"^friction: expected a number, got str"):
        continuous_ssm.mass_spring(1, 1, "light")
