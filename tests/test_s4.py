"""Chapter 05: the kernels of S4 and S4D and their layers, against the papers' equations in NumPy float64."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimamba import convolution, discretization, hippo, s4

# --- the oracle: dense matrices, one power after the other ---


def oracle_bilinear(A, B, delta):
    """S4, equation 3."""
    left = np.linalg.inv(np.eye(len(A)) - delta / 2 * A)
    return left @ (np.eye(len(A)) + delta / 2 * A), left @ (delta * B)


def oracle_zoh(A, B, delta):
    """exp(ΔA) and A^-1 (exp(ΔA) - 1) B of a diagonal A, elementwise; no eigenvalue may be 0."""
    return np.exp(delta * A), (np.exp(delta * A) - 1) / A * B


def oracle_kernel(A_bar, B_bar, C, length):
    h, values = B_bar, []
    for _ in range(length):
        values.append(C @ h)
        h = A_bar @ h
    return np.array(values)


def oracle_dplr(eigenvalues, P, B, C, delta, length):
    A = np.diag(eigenvalues) - np.outer(P, P.conj())
    return oracle_kernel(*oracle_bilinear(A, B, delta), C, length)


def oracle_diagonal(eigenvalues, B, C, delta, length):
    A_bar, B_bar = oracle_zoh(eigenvalues, B, delta)
    return oracle_kernel(np.diag(A_bar), B_bar, C, length)


# --- inputs ---


def draw_dplr(N, seed, dtype=torch.complex128):
    """Eigenvalues fast and slow, damped much and little; P, B and C neither real nor in conjugate pairs."""
    rng = np.random.default_rng(seed)
    normal = lambda: rng.normal(size=N) + 1j * rng.normal(size=N)
    eigenvalues = -(10 ** rng.uniform(-2, 1, N)) + 1j * rng.uniform(-30, 30, N)
    return [torch.tensor(x).to(dtype) for x in (eigenvalues, normal(), normal(), normal())]


def arrays(*tensors):
    return [x.detach().numpy() for x in tensors]


def error(got, expected):
    """The largest error over the largest expected size."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.abs(expected).max()


# --- the kernels ---


@given(
    N=st.integers(1, 9),
    length=st.integers(1, 40),
    delta=st.floats(-3, 0.5).map(lambda x: 10**x),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_kernels_equal_the_naive_kernel(N, length, delta, seed):
    eigenvalues, P, B, C = draw_dplr(N, seed)
    K = s4.kernel_dplr(eigenvalues, P, B, C, delta, length)
    assert K.dtype == torch.complex128
    assert error(K, oracle_dplr(*arrays(eigenvalues, P, B, C), delta, length)) < 1e-10
    K = s4.kernel_diagonal(eigenvalues, B, C, delta, length)
    assert error(K, oracle_diagonal(*arrays(eigenvalues, B, C), delta, length)) < 1e-11


@pytest.mark.parametrize("N", [1, 2, 5, 64])
@pytest.mark.parametrize("delta", [1e-3, 1e-1])
@pytest.mark.parametrize("length", [1, 2, 1000, 2**14])
def test_every_route_equals_the_naive_kernel_of_hippo(N, delta, length):
    A, b = hippo.legs(N)
    eigenvalues, P, B, V = hippo.nplr(N)
    c = torch.tensor(np.random.default_rng(N).normal(size=N))
    C = c.to(V.dtype) @ V
    A_bar, B_bar = oracle_bilinear(A.numpy(), b.numpy(), delta)
    expected = oracle_kernel(A_bar, B_bar, c.numpy(), length)
    assert error(s4.kernel_dplr(eigenvalues, P, B, C, delta, length).real, expected) < 1e-10
    assert error(convolution.kernel_doubling(*map(torch.tensor, (A_bar, B_bar)), c, length), expected) < 1e-10
    A_bar, B_bar = (np.diag(x) if i == 0 else x for i, x in enumerate(oracle_zoh(*arrays(eigenvalues, B), delta)))
    expected = convolution.kernel(torch.tensor(np.diag(A_bar)), torch.tensor(B_bar), C, length)
    assert error(s4.kernel_diagonal(eigenvalues, B, C, delta, length), expected) < 1e-10


@pytest.mark.parametrize("kernel", ["dplr", "diagonal"])
def test_kernels_at_the_longest_length(kernel):
    eigenvalues, P, B, C = draw_dplr(3, seed=1)
    length, at = 2**16, [0, 1, 2, 1000, 32768, 65535]
    if kernel == "dplr":
        K = s4.kernel_dplr(eigenvalues, P, B, C, 1e-3, length)
        A_bar, B_bar = oracle_bilinear(s4.dense(eigenvalues, P).numpy(), B.numpy(), 1e-3)
    else:
        K = s4.kernel_diagonal(eigenvalues, B, C, 1e-3, length)
        A_bar, B_bar = oracle_zoh(*arrays(eigenvalues, B), 1e-3)
        A_bar = np.diag(A_bar)
    expected = np.array([C.numpy() @ np.linalg.matrix_power(A_bar, lag) @ B_bar for lag in at])
    assert np.abs(K[at].numpy() - expected).max() < 1e-10 * K.abs().max()


@pytest.mark.parametrize("delta", [1e-8, 1e-5, 10.0, 1e3])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_kernels_at_extreme_steps(delta, length):
    eigenvalues, P, B, C = draw_dplr(4, seed=2)
    K = s4.kernel_dplr(eigenvalues, P, B, C, delta, length)
    assert error(K, oracle_dplr(*arrays(eigenvalues, P, B, C), delta, length)) < 1e-10
    K = s4.kernel_diagonal(eigenvalues, B, C, delta, length)
    A_bar, _ = oracle_zoh(*arrays(eigenvalues, B), delta)
    B_bar = np.expm1(delta * eigenvalues.numpy()) / eigenvalues.numpy() * B.numpy()
    assert error(K, oracle_kernel(np.diag(A_bar), B_bar, C.numpy(), length)) < 1e-11


def test_repeated_eigenvalues():
    eigenvalues, P, B, C = draw_dplr(5, seed=3)
    eigenvalues[1:4] = eigenvalues[0]
    for delta in (1e-2, 0.3):
        expected = oracle_dplr(*arrays(eigenvalues, P, B, C), delta, 60)
        assert error(s4.kernel_dplr(eigenvalues, P, B, C, delta, 60), expected) < 1e-10
        expected = oracle_diagonal(*arrays(eigenvalues, B, C), delta, 60)
        assert error(s4.kernel_diagonal(eigenvalues, B, C, delta, 60), expected) < 1e-11


def test_eigenvalues_whose_bilinear_factor_is_zero():
    # Δλ = -2 gives Ā = 0: the state forgets all within one step.
    eigenvalues, zero = torch.tensor([-20.0 + 0j, -1.0 + 2j], dtype=torch.complex128), torch.zeros(2).to(torch.cdouble)
    B, C = torch.tensor([[1.0, 2.0], [0.3, -1j]], dtype=torch.complex128)
    expected = oracle_dplr(*arrays(eigenvalues, zero, B, C), 0.1, 9)
    assert error(s4.kernel_dplr(eigenvalues, zero, B, C, 0.1, 9), expected) < 1e-12


def test_neither_kernel_conjugates_C():
    minus_one, one, C = (torch.tensor([x], dtype=torch.complex128) for x in (-1, 1, 2 + 3j))
    K = s4.kernel_diagonal(minus_one, one, C, math.log(2), 2)  # Ā = 1/2, B̄ = 1/2
    assert error(K, [1 + 1.5j, 0.5 + 0.75j]) < 1e-15
    K = s4.kernel_dplr(minus_one, 0 * one, one, C, 2 / 3, 2)  # Ā = 1/2, B̄ = 1/2
    assert error(K, [1 + 1.5j, 0.5 + 0.75j]) < 1e-15


@given(
    N=st.integers(1, 6), angles=st.lists(st.floats(0, 2 * math.pi), min_size=1, max_size=5), seed=st.integers(0, 999)
)
@settings(deadline=None, max_examples=40)
def test_the_generating_function_is_the_resolvent(N, angles, seed):
    eigenvalues, P, B, C = draw_dplr(N, seed)
    A_bar, B_bar = oracle_bilinear(s4.dense(eigenvalues, P).numpy(), B.numpy(), 0.05)
    z = np.exp(-1j * np.array(angles))
    expected = [C.numpy() @ np.linalg.solve(np.eye(N) - A_bar * x, B_bar) for x in z]
    got = s4.generating_function(eigenvalues, P, B, C, 0.05, torch.tensor(angles, dtype=torch.float64))
    assert error(got, np.array(expected)) < 1e-9


def test_the_generating_function_at_minus_one_and_at_one():
    eigenvalues, P, B, C = draw_dplr(4, seed=4)
    angles = torch.tensor([math.pi, 0.0], dtype=torch.float64)
    at_minus_one, at_one = s4.generating_function(eigenvalues, P, B, C, 0.1, angles)
    # z = -1: I + Ā = 2 (I - ΔA/2)^-1, so that (I + Ā)^-1 B̄ = ΔB/2. z = 1: (I - Ā)^-1 B̄ = -A^-1 B.
    assert abs(at_minus_one - 0.05 * (C @ B)) < 1e-13 * abs(at_minus_one)
    A = s4.dense(eigenvalues, P)
    assert abs(at_one + C @ torch.linalg.solve(A, B)) < 1e-12 * abs(at_one)


def test_axes_broadcast():
    systems = [draw_dplr(3, seed) for seed in (5, 6)]
    eigenvalues, P, B, _ = (torch.stack(x) for x in zip(*systems, strict=True))  # (2, N)
    C = torch.stack([draw_dplr(3, seed)[3] for seed in (7, 8, 9)])[:, None]  # (3, 1, N)
    delta = torch.tensor([0.01, 0.2], dtype=torch.float64)
    K, K_diagonal = s4.kernel_dplr(eigenvalues, P, B, C, delta, 11), s4.kernel_diagonal(eigenvalues, B, C, delta, 11)
    assert K.shape == K_diagonal.shape == (3, 2, 11)
    for i in range(3):
        for j in range(2):
            system = arrays(eigenvalues[j], P[j], B[j], C[i, 0])
            assert error(K[i, j], oracle_dplr(*system, delta[j].item(), 11)) < 1e-11
            del system[1]
            assert error(K_diagonal[i, j], oracle_diagonal(*system, delta[j].item(), 11)) < 1e-12
    assert s4.kernel_dplr(eigenvalues[0], P[0], B[0], C[0, 0], delta, 4).shape == (2, 4)


def test_real_systems_come_as_halves():
    half = draw_dplr(3, seed=10)
    whole = [torch.cat([x, x.conj()]) for x in half]
    K = s4.kernel_diagonal(whole[0], *whole[2:], 0.1, 30)
    assert K.imag.abs().max() < 1e-14
    assert error(2 * s4.kernel_diagonal(half[0], *half[2:], 0.1, 30).real, K.real) < 1e-13
    assert s4.kernel_dplr(*whole, 0.1, 30).imag.abs().max() < 1e-12


@pytest.mark.parametrize("delta", [1e-3, 1e-1])
@pytest.mark.parametrize("length", [1, 16, 1024, 2**14])
def test_float32_keeps_its_digits(delta, length):
    eigenvalues, P, B, V = hippo.nplr(64)
    C = torch.eye(64, dtype=torch.complex128)[0] @ V
    low = [x.to(torch.complex64) for x in (eigenvalues, P, B, C)]
    K = s4.kernel_dplr(*low, delta, length)
    assert K.dtype == torch.complex64
    assert error(K, s4.kernel_dplr(eigenvalues, P, B, C, delta, length)) < 1e-4
    lin, _ = s4.initial_modes("lin", 64)
    B, C = torch.ones(2, 32, dtype=torch.complex128)
    low = [x.to(torch.complex64) for x in (lin, B, C)]
    assert error(s4.kernel_diagonal(*low, delta, length), s4.kernel_diagonal(lin, B, C, delta, length)) < 1e-5


def test_float32_knows_the_points_on_both_sides_of_one():
    # Just below 2π a float32 angle has an error of 1e-7, beside a sine of 1e-4: it cost 2e-5 of the kernel.
    length = 2**14
    eigenvalues, P, B, V = hippo.nplr(64)
    C = torch.eye(64, dtype=torch.complex128)[0] @ V
    low = [x.to(torch.complex64) for x in (eigenvalues, P, B, C)]
    expected = s4.kernel_dplr(eigenvalues, P, B, C, 1e-3, length)
    assert error(s4.kernel_dplr(*low, 1e-3, length).real, expected.real) < 4e-6


def test_gradients_of_the_kernels():
    eigenvalues, P, B, C = (x.requires_grad_() for x in draw_dplr(3, seed=11))
    delta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    angles = torch.tensor([0.0, 1.0, math.pi], dtype=torch.float64, requires_grad=True)
    system = (eigenvalues, P, B, C, delta)
    for length in (1, 6):
        assert torch.autograd.gradcheck(lambda *x, n=length: s4.kernel_dplr(*x, n), system)
        assert torch.autograd.gradcheck(lambda *x, n=length: s4.kernel_diagonal(*x, n), (eigenvalues, B, C, delta))
    assert torch.autograd.gradcheck(s4.generating_function, (*system, angles))


# --- the initialisations ---


@pytest.mark.parametrize("N", [1, 2, 3, 8, 9, 64])
def test_initialisations_are_the_papers(N):
    pairs = range((N + 1) // 2)
    modes = {init: s4.initial_modes(init, N)[0].numpy() for init in s4.INITS}
    if N % 2 == 0:
        assert np.allclose(modes["lin"], [-0.5 + 1j * np.pi * n for n in pairs])
        assert np.allclose(modes["inv"], [-0.5 + 1j * N / np.pi * (N / (2 * n + 1) - 1) for n in reversed(pairs)])
    assert np.array_equal(modes["real"], [-(n + 1.0) for n in range(N)])
    A, b = (x.numpy() for x in hippo.legs(N))
    spectrum = np.linalg.eigvals(A + np.outer(b, b) / 2)  # p = b / sqrt(2)
    keep = np.sort(spectrum.imag)[N // 2 :]
    assert np.allclose(modes["legs"].imag, keep, rtol=1e-9, atol=1e-9)
    assert np.allclose(modes["legs"].real, -0.5)
    for init, values in modes.items():
        multiplicity = s4.initial_modes(init, N)[1].numpy()
        assert multiplicity.sum() == N and len(multiplicity) == len(values)
        assert (values.real < 0).all() and (np.diff(values.imag) >= 0).all()
        assert (values.imag[multiplicity == 1] == 0).all()


def test_the_random_initialisation_is_drawn_anew():
    torch.manual_seed(0)
    first, second = s4.initial_modes("random", 8)[0], s4.initial_modes("random", 8)[0]
    torch.manual_seed(0)
    assert torch.equal(s4.initial_modes("random", 8)[0], first)
    assert not torch.equal(first, second)


# --- the layers ---

LAYERS = [(s4.S4, {})] + [(s4.S4D, {"init": init}) for init in s4.INITS]
each_layer = pytest.mark.parametrize(("layer", "options"), LAYERS, ids=lambda x: getattr(x, "__name__", str(x)))


def make(layer, channels, N, seed=0, **options):
    """A layer in float64 whose parameters have all moved away from where they began."""
    torch.manual_seed(seed)
    model = layer(channels, N, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def oracle_layer(model, N):
    """Ā, B̄, C of each channel from the layer's raw parameters, as dense complex matrices of all N states."""
    raw = {name: value.detach().numpy() for name, value in model.named_parameters()}
    pairs = model.multiplicity.numpy() == 2
    whole = lambda half: np.concatenate([half[~pairs].real, half[pairs], half[pairs].conj()])
    as_complex = lambda x: x[..., 0] + 1j * x[..., 1]
    for d in range(len(raw["D"])):
        eigenvalues = whole(-np.exp(raw["log_decay"][d]) + 1j * raw["frequency"][d])
        delta = np.exp(raw["log_delta"][d])
        C = [whole(as_complex(C[d])) for C in raw["C"]]
        assert len(eigenvalues) == N
        if "P" in raw:
            P, B = (whole(as_complex(raw[name][d])) for name in "PB")
            yield *oracle_bilinear(np.diag(eigenvalues) - np.outer(P, P.conj()), B, delta), C
        else:
            A_bar, B_bar = oracle_zoh(eigenvalues, np.ones(N), delta)
            yield np.diag(A_bar), B_bar, C


@each_layer
@pytest.mark.parametrize("N", [1, 2, 5, 8])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_layer_is_a_real_system_for_each_channel(layer, options, N, bidirectional):
    model = make(layer, 3, N, bidirectional=bidirectional, **options)
    u = torch.randn(2, 21, 3, dtype=torch.float64)
    expected = np.zeros((2, 21, 3), complex)
    for d, (A_bar, B_bar, C) in enumerate(oracle_layer(model, N)):
        K = [oracle_kernel(A_bar, B_bar, c, 21) for c in C]
        for i in range(2):
            signal = u[i, :, d].numpy()
            expected[i, :, d] = np.convolve(signal, K[0])[:21] + model.D[d].item() * signal
            if bidirectional:
                expected[i, :, d] += np.convolve(signal[::-1], K[1])[:21][::-1]
    assert np.abs(expected.imag).max() < 1e-12
    y = model(u)
    assert y.dtype == torch.float64
    assert error(y.detach(), expected.real) < 1e-11


@each_layer
@given(N=st.integers(1, 9), length=st.integers(1, 30), batch=st.integers(1, 3), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=12)
def test_step_equals_forward(layer, options, N, length, batch, seed):
    model = make(layer, 2, N, seed, **options)
    u = torch.randn(batch, length, 2, dtype=torch.float64)
    state, outputs = model.initial_state(batch), []
    for u_t in u.unbind(1):
        y, state = model.step(u_t, state)
        outputs.append(y)
    assert error(torch.stack(outputs, 1).detach(), model(u).detach()) < 1e-11


@each_layer
def test_step_equals_forward_in_float32(layer, options):
    torch.manual_seed(1)
    model = layer(4, 64, **options)
    u = torch.randn(2, 200, 4)
    with torch.no_grad():
        state, outputs = model.initial_state(2), []
        for u_t in u.unbind(1):
            y, state = model.step(u_t, state)
            outputs.append(y)
        assert y.dtype == torch.float32 and state.dtype == torch.complex64
        assert error(torch.stack(outputs, 1), model(u)) < 1e-4


@pytest.mark.parametrize("layer", [s4.S4, s4.S4D])
@pytest.mark.parametrize("N", [3, 4])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_the_layers(layer, N, bidirectional):
    model = make(layer, 2, N, bidirectional=bidirectional)
    names, values = zip(*model.named_parameters(), strict=True)
    u = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)

    def call(u, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (u,))

    assert torch.autograd.gradcheck(call, (u, *(x.detach().requires_grad_() for x in values)))


@pytest.mark.parametrize("layer", [s4.S4, s4.S4D])
def test_gradients_of_a_step(layer):
    model = make(layer, 2, 5)
    state = torch.randn(3, 2, model.states, dtype=torch.complex128, requires_grad=True)
    u = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.step, (u, state))


@each_layer
def test_a_layer_is_causal_unless_bidirectional(layer, options):
    u = torch.randn(1, 12, 2, dtype=torch.float64)
    later = u.clone()
    later[:, 7:] += 1
    for bidirectional in (False, True):
        model = make(layer, 2, 4, bidirectional=bidirectional, **options)
        same = torch.allclose(model(u)[:, :7], model(later)[:, :7], rtol=0, atol=1e-12)
        assert same != bidirectional


@each_layer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_layer_is_saved_and_loaded(layer, options, bidirectional, tmp_path):
    model = make(layer, 2, 5, seed=1, bidirectional=bidirectional, **options)
    other = make(layer, 2, 5, seed=2, bidirectional=bidirectional, **options)
    u = torch.randn(1, 9, 2, dtype=torch.float64)
    assert not torch.allclose(model(u), other(u))
    torch.save(model.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(model(u), other(u))
    assert torch.equal(copy.deepcopy(model)(u), model(u))


@pytest.mark.parametrize("layer", [s4.S4, s4.S4D])
def test_parameters_start_as_the_papers_say(layer):
    torch.manual_seed(0)
    model = layer(2000, 8)
    delta = model.log_delta.exp()
    assert delta.min() >= 1e-3 * 0.999 and delta.max() <= 1e-1 * 1.001
    assert abs(model.log_delta.mean() - math.log(1e-2)) < 0.1  # uniform in the logarithm
    assert abs(torch.view_as_complex(model.C).abs().square().mean() - 1) < 0.05
    if layer is s4.S4:
        eigenvalues, P, B = (x[3] for x in model.system())
        A = s4.dense(eigenvalues, P).to(torch.complex128)
        legs, b = hippo.legs(8)
        assert np.allclose(np.sort(np.linalg.eigvals(A.detach()).real), np.sort(np.linalg.eigvals(legs)), rtol=1e-3)
        # What does not depend on the basis: bᵀ A^k b.
        b_A_b = [(B.conj() @ torch.linalg.matrix_power(A, k).to(B.dtype) @ B).detach().real.item() for k in range(3)]
        assert np.allclose(b_A_b, [(b @ torch.linalg.matrix_power(legs, k) @ b).item() for k in range(3)], rtol=1e-4)


@pytest.mark.parametrize(("layer", "slow"), [(s4.S4, 5), (s4.S4D, 3)])
def test_parameter_groups(layer, slow):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), layer(3, 4), torch.nn.Sequential(layer(3, 5)))
    rest, careful = s4.parameter_groups(model, lr=4e-3, weight_decay=0.05)
    assert (rest["lr"], rest["weight_decay"]) == (4e-3, 0.05)
    assert (careful["lr"], careful["weight_decay"]) == (1e-3, 0.0)
    names = {id(parameter): name.split(".")[-1] for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in careful["params"]} == {"log_delta", "log_decay", "frequency", "P", "B"} & set(
        names.values()
    )
    assert len(careful["params"]) == 2 * slow
    assert len(rest["params"]) + len(careful["params"]) == len(list(model.parameters()))
    assert s4.parameter_groups(model, lr=1e-4, weight_decay=0)[1]["lr"] == 1e-4


def test_a_step_of_training_keeps_the_layer_stable():
    model = s4.S4D(2, 4, init="real")
    with torch.no_grad():
        model.log_decay += 5
        model.log_decay[0] -= 30
    assert (model.eigenvalues().real < 0).all() and (model.eigenvalues().imag == 0).all()


# --- bad inputs ---


def good(**changes):
    eigenvalues, P, B, C = draw_dplr(3, seed=20)
    return {"eigenvalues": eigenvalues, "P": P, "B": B, "C": C, "delta": 0.1, "length": 5} | changes


zeros = lambda *shape: torch.zeros(shape, dtype=torch.complex128)


@pytest.mark.parametrize("kernel", [s4.kernel_dplr, s4.kernel_diagonal])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eigenvalues": [1.0]}, TypeError, "^eigenvalues: expected a torch.Tensor, got list"),
        ({"eigenvalues": zeros()}, ValueError, r"^eigenvalues: expected shape \(\.\.\., N\) with N >= 1, got \(\)"),
        ({"eigenvalues": zeros(0)}, ValueError, "^eigenvalues: expected shape .* with N >= 1"),
        ({"B": zeros(4)}, ValueError, r"^B: expected shape \(\.\.\., 3\), N as in eigenvalues, got \(4,\)"),
        ({"C": zeros(3).to(torch.complex64)}, TypeError, "^C: expected torch.float64 or torch.complex128"),
        ({"C": zeros()}, ValueError, r"^C: expected shape \(\.\.\., 3\)"),
        ({"B": zeros(2, 3), "C": zeros(4, 3)}, ValueError, r"^C: expected axes .* against \(2,\), got \(4,\)"),
        ({"B": zeros(2, 3), "delta": torch.ones(4).double()}, ValueError, "^delta: expected axes that broadcast"),
        ({"delta": torch.ones(2)}, TypeError, "^delta: expected torch.float64 .A's precision., got torch.float32"),
        ({"delta": "1"}, TypeError, "^delta: expected a number or a torch.Tensor, got str"),
        ({"length": 0}, ValueError, "^length: expected at least 1, got 0"),
        ({"length": 2.0}, TypeError, "^length: expected an int, got float"),
        ({"length": True}, TypeError, "^length: expected an int, got bool"),
    ],
)  # fmt: skip
def test_kernels_name_the_bad_argument(kernel, changes, error, message):
    arguments = good(**changes)
    if kernel is s4.kernel_diagonal:
        del arguments["P"]
    with pytest.raises(error, match=message):
        kernel(**arguments)


def test_the_generating_function_names_the_bad_argument():
    arguments = good(angles=torch.zeros(2).double())
    del arguments["length"]
    with pytest.raises(ValueError, match=r"^P: expected shape \(\.\.\., 3\)"):
        s4.generating_function(**arguments | {"P": zeros(2)})
    with pytest.raises(ValueError, match=r"^angles: expected shape \(T,\), got \(1, 1\)"):
        s4.generating_function(**arguments | {"angles": torch.zeros(1, 1).double()})
    with pytest.raises(TypeError, match=r"^angles: expected torch.float64"):
        s4.generating_function(**arguments | {"angles": torch.zeros(1)})


def test_initialisations_name_the_bad_argument():
    with pytest.raises(ValueError, match=r"^init: expected one of 'lin', 'inv', 'legs', 'real', 'random', got 'hippo'"):
        s4.initial_modes("hippo", 4)
    with pytest.raises(ValueError, match=r"^N: expected at least 1, got 0"):
        s4.initial_modes("lin", 0)
    with pytest.raises(TypeError, match=r"^N: expected an int, got float"):
        s4.initial_modes("lin", 4.0)


@pytest.mark.parametrize("layer", [s4.S4, s4.S4D])
def test_layers_name_the_bad_argument(layer):
    model = layer(3, 4)
    with pytest.raises(ValueError, match=r"^u: expected shape \(B, L, 3\), got \(2, 5, 4\)"):
        model(torch.zeros(2, 5, 4))
    with pytest.raises(TypeError, match=r"^u: expected torch.float32 \(the layer's\), got torch.float64"):
        model(torch.zeros(2, 5, 3).double())
    with pytest.raises(ValueError, match=r"^u: expected shape \(B, 3\), got \(2, 1, 3\)"):
        model.step(torch.zeros(2, 1, 3), model.initial_state(2))
    with pytest.raises(ValueError, match=r"^state: expected shape \(2, 3, \d\), got \(1, 3, \d\)"):
        model.step(torch.zeros(2, 3), model.initial_state(1))
    with pytest.raises(ValueError, match=r"^bidirectional: expected False for streaming"):
        layer(3, 4, bidirectional=True).step(torch.zeros(2, 3), model.initial_state(2))
    with pytest.raises(ValueError, match=r"^channels: expected at least 1, got 0"):
        layer(0, 4)
    with pytest.raises(ValueError, match=r"^N: expected at least 1, got 0"):
        layer(3, 0)
    for low, high in ((0.0, 1.0), (0.2, 0.1), (1e-3, math.inf)):
        with pytest.raises(ValueError, match=r"^delta_min: expected 0 < delta_min <= delta_max"):
            layer(3, 4, delta_min=low, delta_max=high)


def test_nan_is_not_hidden():
    model = s4.S4D(2, 4)
    u = torch.zeros(1, 5, 2)
    u[0, 3, 1] = torch.nan
    y = model(u)
    assert y[..., 1].isnan().any() and y[..., 0].isfinite().all()


def test_discretisation_rules_agree_for_small_steps():
    # What separates S4's bilinear rule from S4D's ZOH is of second order in Δλ.
    eigenvalues, _, B, C = draw_dplr(4, seed=21)
    for delta in (1e-3, 1e-4):
        zoh = s4.kernel_diagonal(eigenvalues, B, C, delta, 50)
        A_bar, B_bar = discretization.bilinear_diagonal(eigenvalues, B, delta)
        bilinear = convolution.kernel(A_bar, B_bar, C, 50)
        assert error(s4.kernel_dplr(eigenvalues, 0 * B, B, C, delta, 50), bilinear) < 1e-10
        assert error(zoh, bilinear) < 40 * delta
