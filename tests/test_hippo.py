"""Chapter 03: HiPPO's systems and bases, against the integrals that define them, in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import laguerre as np_laguerre
from numpy.polynomial import legendre as np_legendre
from scipy.linalg import expm

from minimamba import hippo

sizes = st.integers(1, 24)
SYSTEMS = {"legs": hippo.legs, "legt": lambda N: hippo.legt(N, 3.0), "lagt": hippo.lagt}


# --- the oracle: coefficients as integrals, by quadrature ---


def polynomials(N, x):
    """sqrt(2n+1) P_n(x), (len(x), N)."""
    return np_legendre.legvander(x, N - 1) * np.sqrt(2 * np.arange(N) + 1)


def coefficients_legendre(f, start, end, N):
    """c_n = 1/(end - start) ∫ f(s) sqrt(2n+1) P_n(position of s in [start, end]) ds."""
    nodes, weights = np_legendre.leggauss(200)
    return polynomials(N, nodes).T @ (weights / 2 * f(start + (end - start) * (1 + nodes) / 2))


def coefficients_of_held(u, N):
    """The same for u held on steps of length 1 and the window [0, L], each step integrated on its own."""
    nodes, weights = np_legendre.leggauss(N)
    c = np.zeros(N)
    for k, value in enumerate(u):
        s = k + (1 + nodes) / 2
        c += value * polynomials(N, 2 * s / len(u) - 1).T @ (weights / 2) / len(u)
    return c


def coefficients_faded(f, t, N, basis):
    """c_n = ∫_0^∞ f(t - age) e^{-age} basis_n(age) d age, by Gauss's rule on pieces up to age 40."""
    nodes, weights = np_legendre.leggauss(60)
    c = np.zeros(N)
    for left in np.arange(0, 40, 0.5):
        age = left + (1 + nodes) / 4
        c += basis(N, age).T @ (weights / 4 * f(t - age) * np.exp(-age))
    return c


def warped(N, age):
    return polynomials(N, 2 * np.exp(-age) - 1)


def laguerre(N, age):
    return np_laguerre.lagvander(age, N - 1)


def f(s):
    return np.sin(1.3 * s) + 0.5 * np.cos(2.9 * s + 1) + 0.3


def slope(c, t, step=1e-4):
    """Four-point difference quotient."""
    return (8 * (c(t + step) - c(t - step)) - c(t + 2 * step) + c(t - 2 * step)) / (12 * step)


def random_walk(length, seed, dtype=torch.float64):
    return torch.tensor(np.random.default_rng(seed).normal(size=length).cumsum() + 2).to(dtype)


# --- the matrices ---


def test_legs_entry_by_entry():
    A, B = hippo.legs(3)
    root = math.sqrt
    expected = [[-1, 0, 0], [-root(3), -2, 0], [-root(5), -root(15), -3]]
    np.testing.assert_allclose(A, expected, rtol=1e-15)
    np.testing.assert_allclose(B, [1, root(3), root(5)], rtol=1e-15)


def test_legt_entry_by_entry():
    A, B = hippo.legt(3, window=2.0)
    root = math.sqrt
    expected = [[-1, root(3), -root(5)], [-root(3), -3, root(15)], [-root(5), -root(15), -5]]
    np.testing.assert_allclose(A, np.array(expected) / 2, rtol=1e-15)
    np.testing.assert_allclose(B, np.array([1, root(3), root(5)]) / 2, rtol=1e-15)
    assert all(torch.equal(x, 2 * y) for x, y in zip(hippo.legt(3), hippo.legt(3, 2), strict=True))


def test_lagt_entry_by_entry():
    A, B = hippo.lagt(3)
    assert A.tolist() == [[-1, 0, 0], [-1, -1, 0], [-1, -1, -1]]
    assert B.tolist() == [1, 1, 1]


@given(N=sizes)
@settings(deadline=None, max_examples=20)
def test_systems_are_float64_stable_and_of_their_size(N):
    for system in SYSTEMS.values():
        A, B = system(N)
        assert A.shape == (N, N) and B.shape == (N,)
        assert A.dtype == B.dtype == torch.float64
        assert (A.diagonal() < 0).all() and not torch.signbit(A[A == 0]).any()
    assert np.linalg.eigvals(hippo.legt(N, 3.0)[0].numpy()).real.max() < 0


@pytest.mark.parametrize("N", [1, 2, 5, 9])
@pytest.mark.parametrize("t", [0.3, 1.0, 6.0])
def test_coefficients_on_the_whole_past_obey_legs(N, t):
    A, B = (x.numpy() for x in hippo.legs(N))
    c = lambda t: coefficients_legendre(f, 0, t, N)
    np.testing.assert_allclose(slope(c, t), (A @ c(t) + B * f(t)) / t, atol=1e-8)


@pytest.mark.parametrize("N", [1, 2, 5, 9])
@pytest.mark.parametrize(("system", "basis"), [(hippo.legs, warped), (hippo.lagt, laguerre)])
def test_coefficients_under_a_fading_weight_obey_the_system(N, system, basis):
    A, B = (x.numpy() for x in system(N))
    c = lambda t: coefficients_faded(f, t, N, basis)
    np.testing.assert_allclose(slope(c, 2.0), A @ c(2.0) + B * f(2.0), atol=1e-8)


@pytest.mark.parametrize("N", [1, 2, 5, 9])
@pytest.mark.parametrize("window", [0.7, 3.0])
def test_legt_is_exact_for_polynomials_and_else_misses_only_what_leaves(N, window):
    A, B = (x.numpy() for x in hippo.legt(N, window))
    t = 2.5
    polynomial = np.polynomial.Polynomial(np.random.default_rng(N).normal(size=N))
    c = lambda t: coefficients_legendre(polynomial, t - window, t, N)
    np.testing.assert_allclose(slope(c, t), A @ c(t) + B * polynomial(t), rtol=1e-7, atol=1e-8)
    # For any signal the right side is off by the error of the redrawing at the old end, times the basis there.
    c = lambda t: coefficients_legendre(f, t - window, t, N)
    old_end = polynomials(N, np.array([-1.0]))[0]
    missed = old_end * (f(t - window) - old_end @ c(t)) / window
    np.testing.assert_allclose(slope(c, t) - (A @ c(t) + B * f(t)), -missed, atol=1e-8)


@given(N=sizes, value=st.floats(-5, 5))
@settings(deadline=None, max_examples=20)
def test_a_constant_is_its_own_first_coefficient(N, value):
    states = hippo.project_legs(torch.full((7,), value, dtype=torch.float64), N)
    expected = torch.zeros(7, N, dtype=torch.float64)
    expected[:, 0] = value
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)
    A, B = hippo.legs(N)
    assert torch.equal(A[:, 0], -B)


# --- projecting, step by step ---


@given(N=sizes, length=st.integers(1, 40), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_legs_online_equals_the_integral_over_the_whole_past(N, length, seed):
    u = random_walk(length, seed)
    states = hippo.project_legs(u, N)
    assert states.shape == (length, N)
    for k in {0, length // 2, length - 1}:
        expected = coefficients_of_held(u[: k + 1].numpy(), N)
        np.testing.assert_allclose(states[k], expected, atol=1e-10 * u.abs().max().item())


@given(N=sizes, stretch=st.integers(2, 5), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=15)
def test_legs_does_not_depend_on_the_unit_of_time(N, stretch, seed):
    u = random_walk(12, seed)
    slow = hippo.project_legs(u.repeat_interleave(stretch), N)[stretch - 1 :: stretch]
    torch.testing.assert_close(slow, hippo.project_legs(u, N), rtol=0, atol=1e-9)


def test_legs_of_128_states_over_a_long_signal():
    u = random_walk(300, 4)
    h = hippo.project_legs(u, 128)[-1]
    np.testing.assert_allclose(h, coefficients_of_held(u.numpy(), 128), atol=1e-9)
    assert hippo.project_legs(u.float(), 16).dtype == torch.float32
    torch.testing.assert_close(hippo.project_legs(u.float(), 16).double(), hippo.project_legs(u, 16), rtol=0, atol=1e-3)


@pytest.mark.parametrize("system", SYSTEMS)
@given(N=st.integers(1, 8), length=st.integers(1, 12), seed=st.integers(0, 999), varying=st.booleans())
@settings(deadline=None, max_examples=15)
def test_project_solves_each_step_exactly(system, N, length, seed, varying):
    rng = np.random.default_rng(seed)
    A, B = SYSTEMS[system](N)
    u, start = torch.tensor(rng.normal(size=length)), torch.tensor(rng.normal(size=N))
    delta = torch.tensor(rng.uniform(0.01, 1, length)) if varying else 0.37
    states = hippo.project(u, delta, A, B, start)
    h = start.numpy()
    for k in range(length):
        step = delta[k].item() if varying else delta
        A_bar = expm(step * A.numpy())
        B_bar = np.linalg.solve(A.numpy(), (A_bar - np.eye(N)) @ B.numpy())
        h = A_bar @ h + B_bar * u[k].item()
        np.testing.assert_allclose(states[k], h, atol=1e-9)
    if varying:
        assert torch.equal(hippo.project(u, delta, A, B), hippo.project(u, delta, A, B, torch.zeros_like(B)))


@pytest.mark.parametrize(("system", "basis"), [(hippo.legs, warped), (hippo.lagt, laguerre)])
def test_project_finds_the_coefficients_under_a_fading_weight(system, basis):
    # 4000 steps of 1/100; the signal is taken in the middle of each, an error of order step².
    times = (torch.arange(4000).double() + 0.5) / 100
    h = hippo.project(torch.tensor(f(times.numpy())), 0.01, *system(6))[-1]
    np.testing.assert_allclose(h, coefficients_faded(f, 40.0, 6, basis), atol=1e-3)


def test_legt_forgets_a_hit_after_its_window():
    u = torch.zeros(300, dtype=torch.float64)
    u[0] = 1
    drawn = hippo.project(u, 0.01, *hippo.legt(48, 1.0)) @ hippo.legendre(48, torch.zeros(1).double(), 1.0)[0]
    states = hippo.project(u, 0.01, *hippo.legt(48, 1.0))
    assert states[50].norm() > 0.05 and states[150:].norm(dim=1).max() < 0.01 * states[50].norm()
    assert drawn[250:].abs().max() < 0.01


@pytest.mark.parametrize("N", [8, 24])
def test_the_basis_redraws_a_smooth_past_and_a_foreign_basis_does_not(N):
    times = (torch.arange(3000).double() + 0.5) / 300
    u = (1 - torch.exp(-(times**2))) * torch.sin(1.2 * times)
    age = (torch.arange(900).double() + 0.5) / 300  # up to 3 of 10 units
    past = u.flip(0)[:900]
    error = lambda redrawn: (redrawn - past).square().mean().sqrt().item()
    scaled = hippo.project_legs(u, N)[-1]
    fading = hippo.project(u, 1 / 300, *hippo.legs(N))[-1]
    sliding = hippo.project(u, 1 / 300, *hippo.legt(N, 3.0))[-1]
    bound = 0.2 if N == 8 else 0.03
    assert error(hippo.legendre(N, age, 10.0) @ scaled) < bound
    assert error(hippo.warped_legendre(N, age) @ fading) < bound
    assert error(hippo.legendre(N, age, 3.0) @ sliding) < bound
    assert error(hippo.legendre(N, age, 10.0) @ fading) > 0.4
    assert error(hippo.warped_legendre(N, age) @ scaled) > 0.4


# --- the bases ---


@given(N=sizes, window=st.floats(0.1, 50))
@settings(deadline=None, max_examples=20)
def test_bases_equal_numpys_polynomials(N, window):
    age = torch.linspace(0, window, 11, dtype=torch.float64)
    scale = math.sqrt(2 * N)
    got = hippo.legendre(N, age, window)
    assert got.shape == (11, N)
    np.testing.assert_allclose(got, polynomials(N, 1 - 2 * age.numpy() / window), atol=1e-11 * scale)
    np.testing.assert_allclose(hippo.warped_legendre(N, age), warped(N, age.numpy()), atol=1e-11 * scale)
    expected = laguerre(N, age.numpy() / 10)
    np.testing.assert_allclose(hippo.laguerre(N, age / 10), expected, atol=1e-11 * np.abs(expected).max())


def test_bases_are_orthonormal_under_their_weight():
    nodes, weights = (torch.tensor(x) for x in np_legendre.leggauss(64))
    age = 3 * (1 + nodes) / 2
    g = hippo.legendre(20, age, 3.0)
    np.testing.assert_allclose(g.T @ (weights[:, None] / 2 * g), np.eye(20), atol=1e-12)
    g = hippo.warped_legendre(20, -torch.log((1 + nodes) / 2))  # in e^{-age} the weight is uniform
    np.testing.assert_allclose(g.T @ (weights[:, None] / 2 * g), np.eye(20), atol=1e-12)
    nodes, weights = (torch.tensor(x) for x in np_laguerre.laggauss(40))
    g = hippo.laguerre(20, nodes)
    np.testing.assert_allclose(g.T @ (weights[:, None] * g), np.eye(20), atol=1e-9)


def test_at_age_zero_every_basis_is_B():
    now = torch.zeros(1, dtype=torch.float64)
    for basis, (_, B) in (
        (hippo.legendre(7, now, 2.0), hippo.legs(7)),
        (hippo.warped_legendre(7, now), hippo.legs(7)),
        (hippo.laguerre(7, now), hippo.lagt(7)),
    ):
        torch.testing.assert_close(basis[0], B)
    assert hippo.legendre(5, now.float(), 1.0).dtype == torch.float32


# --- normal plus low rank ---


@given(N=st.integers(1, 80))
@settings(deadline=None, max_examples=25)
def test_nplr_is_legs_in_a_unitary_basis(N):
    eigenvalues, P, B, V = hippo.nplr(N)
    assert eigenvalues.shape == P.shape == B.shape == (N,) and V.shape == (N, N)
    assert {x.dtype for x in (eigenvalues, P, B, V)} == {torch.complex128}
    n = np.arange(N)
    roots = np.sqrt(2 * n + 1)
    A = np.where(n[:, None] > n, -np.outer(roots, roots), np.diag(-(n + 1.0)))
    eigenvalues, P, B, V = (x.numpy() for x in (eigenvalues, P, B, V))
    adjoint = V.conj().T
    np.testing.assert_allclose(adjoint @ V, np.eye(N), atol=1e-13)
    np.testing.assert_allclose(
        V @ (np.diag(eigenvalues) - np.outer(P, P.conj())) @ adjoint, A, atol=1e-13 * (N + 10) ** 1.5
    )
    np.testing.assert_allclose(P, adjoint @ np.sqrt(n + 0.5), atol=1e-12 * N)
    np.testing.assert_allclose(B, adjoint @ roots, atol=1e-12 * N)


@pytest.mark.parametrize("N", [1, 2, 7, 16, 65])
def test_nplr_comes_in_conjugate_pairs_with_positive_P(N):
    eigenvalues, P, B, V = hippo.nplr(N)
    assert (eigenvalues.real == -0.5).all()
    assert (eigenvalues.imag.diff() > 0).all()
    assert torch.equal(eigenvalues, eigenvalues.flip(0).conj())
    assert torch.equal(V, V.flip(1).conj())
    assert (eigenvalues.imag == 0).sum() == N % 2
    assert (P.real > 0).all() and P.imag.abs().max() < 1e-12 and B.imag.abs().max() < 1e-12
    torch.testing.assert_close(B, math.sqrt(2) * P, rtol=1e-10, atol=1e-12)


def test_nplr_of_one_and_of_two_states():
    eigenvalues, P, B, V = hippo.nplr(1)
    assert eigenvalues.tolist() == [-0.5] and V.tolist() == [[1]] and B.tolist() == [1]
    assert P.item() == pytest.approx(math.sqrt(0.5))
    eigenvalues, *_ = hippo.nplr(2)  # S = [[0, r], [-r, 0]] with r = sqrt(3) / 2
    np.testing.assert_allclose(eigenvalues, [-0.5 - math.sqrt(3) / 2 * 1j, -0.5 + math.sqrt(3) / 2 * 1j], rtol=1e-14)


def test_legs_is_not_normal_but_its_first_part_is():
    A, _ = hippo.legs(12)
    p = torch.sqrt(torch.arange(12, dtype=torch.float64) + 0.5)
    normal = A + torch.outer(p, p)
    assert (A @ A.T - A.T @ A).norm() > 0.1 * A.norm() ** 2
    assert (normal @ normal.T - normal.T @ normal).norm() < 1e-14 * normal.norm() ** 2


# --- gradients ---


@pytest.mark.parametrize("varying", [False, True])
def test_gradients_of_project(varying):
    A, B = hippo.legs(3)
    u, start = random_walk(4, 1), random_walk(3, 2)
    delta = torch.tensor([0.3, 0.1, 0.7, 0.2] if varying else 0.3, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (u, delta, A, B, start)]
    assert torch.autograd.gradcheck(hippo.project, inputs)


def test_gradients_of_project_legs_and_of_the_bases():
    assert torch.autograd.gradcheck(lambda u: hippo.project_legs(u, 4), random_walk(5, 3).requires_grad_())
    age = torch.tensor([0.1, 0.9, 1.7], dtype=torch.float64, requires_grad=True)
    for basis in (lambda age: hippo.legendre(5, age, 2.0), lambda age: hippo.warped_legendre(5, age)):
        assert torch.autograd.gradcheck(basis, age)
    assert torch.autograd.gradcheck(lambda age: hippo.laguerre(5, age), age)


# --- bad inputs ---


@pytest.mark.parametrize(
    "call",
    [
        hippo.legs,
        hippo.legt,
        hippo.lagt,
        hippo.nplr,
        lambda N: hippo.project_legs(torch.ones(3), N),
        lambda N: hippo.legendre(N, torch.ones(3), 2.0),
        lambda N: hippo.warped_legendre(N, torch.ones(3)),
        lambda N: hippo.laguerre(N, torch.ones(3)),
    ],
)
def test_a_bad_N_is_named(call):
    for N in (2.0, True, None):
        with pytest.raises(TypeError, match=r"^N: expected an int, got"):
            call(N)
    for N in (0, -1):
        with pytest.raises(ValueError, match=f"^N: expected at least 1, got {N}"):
            call(N)


def test_a_bad_window_or_age_is_named():
    for call in (lambda window: hippo.legt(3, window), lambda window: hippo.legendre(3, torch.ones(2), window)):
        for window in ("1", None, True):
            with pytest.raises(TypeError, match=r"^window: expected a number, got"):
                call(window)
        for window in (0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=r"^window: expected a finite number > 0, got"):
                call(window)
    for basis in (lambda age: hippo.legendre(3, age, 1.0), lambda age: hippo.warped_legendre(3, age)):
        with pytest.raises(TypeError, match=r"^age: expected a torch.Tensor, got list"):
            basis([0.5])
        with pytest.raises(TypeError, match=r"^age: expected torch.float32 or torch.float64, got torch.int64"):
            basis(torch.arange(3))
        with pytest.raises(ValueError, match=r"^age: expected shape \(T,\), got \(1, 1\)"):
            basis(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"^age: expected shape \(T,\), got \(\)"):
        hippo.laguerre(3, torch.tensor(1.0))


def test_projections_name_the_bad_argument():
    A, B = hippo.legs(3)
    u = torch.ones(4, dtype=torch.float64)
    for changes, error, message in (
        ({"u": u[:0]}, ValueError, r"^u: expected L >= 1, got shape \(0,\)"),
        ({"u": u[None]}, ValueError, r"^u: expected shape \(L,\), got \(1, 4\)"),
        ({"u": [1.0]}, TypeError, "^u: expected a torch.Tensor, got list"),
        ({"u": u.float()}, TypeError, "^A: expected torch.float32 or torch.complex64"),
        ({"A": A[:2]}, ValueError, r"^A: expected shape \(N, N\) with N >= 1, got \(2, 3\)"),
        ({"A": A[0]}, ValueError, r"^A: expected shape \(N, N\) with N >= 1, got \(3,\)"),
        ({"B": B[:2]}, ValueError, r"^B: expected shape \(3,\), got \(2,\)"),
        ({"initial_state": B[:2]}, ValueError, r"^initial_state: expected shape \(3,\), got \(2,\)"),
        ({"initial_state": B.float()}, TypeError, "^initial_state: expected torch.float64"),
        ({"delta": u[:3]}, ValueError, r"^delta: expected shape \(4,\), got \(3,\)"),
        ({"delta": u[None]}, ValueError, r"^delta: expected shape \(4,\), got \(1, 4\)"),
        ({"delta": "1"}, TypeError, "^delta: expected a number or a torch.Tensor, got str"),
    ):
        with pytest.raises(error, match=message):
            hippo.project(**({"u": u, "delta": 0.1, "A": A, "B": B} | changes))
    with pytest.raises(ValueError, match=r"^u: expected L >= 1, got shape \(0,\)"):
        hippo.project_legs(u[:0], 3)
    with pytest.raises(ValueError, match=r"^u: expected shape \(L,\), got \(2, 2\)"):
        hippo.project_legs(u.reshape(2, 2), 3)
    with pytest.raises(TypeError, match=r"^u: expected a real tensor, got torch.complex128"):
        hippo.project_legs(u.to(torch.complex128), 3)
    with pytest.raises(TypeError, match=r"^u: expected torch.float32 or torch.float64, got torch.int64"):
        hippo.project_legs(u.long(), 3)
