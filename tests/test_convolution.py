"""Chapter 04: the kernel, and three ways to run a time-invariant SSM, against loops in NumPy float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimamba import convolution

KERNELS = [convolution.kernel, convolution.kernel_doubling]
CONVOLUTIONS = [convolution.convolve_direct, convolution.convolve_fft]
FORMS = ["dense", "diagonal", "complex dense", "complex diagonal"]


# --- the oracle: the paper's equations, one index at a time ---


def oracle_run(u, A_bar, B_bar, C, D=None, initial_state=None):
    """y (Batch, L, D) and the final state (Batch, D, N) of h_k = Ā h_{k-1} + B̄ u_k, y_k = C h_k + D u_k."""
    batch, length, channels = u.shape
    N = B_bar.shape[1]
    y = np.zeros((batch, length, channels), complex)
    final_state = np.zeros((batch, channels, N), complex)
    for i in range(batch):
        for d in range(channels):
            A = A_bar[d] if A_bar.ndim == 3 else np.diag(A_bar[d])
            h = np.zeros(N, complex) if initial_state is None else initial_state[i, d].astype(complex)
            for k in range(length):
                h = np.array([sum(A[n, m] * h[m] for m in range(N)) + B_bar[d, n] * u[i, k, d] for n in range(N)])
                y[i, k, d] = sum(C[d, n] * h[n] for n in range(N))
                if D is not None:
                    y[i, k, d] += D[d] * u[i, k, d]
            final_state[i, d] = h
    return y, final_state


def oracle_kernel(A_bar, B_bar, C, length):
    """K̄_l = C Ā^l B̄ (channels, length), each power on its own."""
    values = np.zeros((B_bar.shape[0], length), complex)
    for d in range(B_bar.shape[0]):
        A = A_bar[d] if A_bar.ndim == 3 else np.diag(A_bar[d])
        for lag in range(length):
            values[d, lag] = C[d] @ np.linalg.matrix_power(A, lag) @ B_bar[d]
    return values


# --- inputs ---


def draw_system(form, channels, states, seed, dtype=torch.float64):
    """Stable A_bar, B_bar, C: eigenvalues near 0 and near the unit circle, dense A_bar not normal."""
    rng = np.random.default_rng(seed)
    modulus = 1 - 10 ** rng.uniform(-3, -0.02, (channels, states))
    modulus[:, 0] = 0.999
    is_complex = "complex" in form
    phase = np.exp(1j * rng.uniform(0, np.pi, modulus.shape))
    values = modulus * (phase if is_complex else np.sign(phase.real))

    def normal(*shape):
        return rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)

    A_bar = values
    if "dense" in form:
        basis = np.eye(states) + 0.4 * np.triu(normal(channels, states, states), 1)
        A_bar = basis @ (values[..., None] * np.linalg.inv(basis))
    kind = dtype.to_complex() if is_complex else dtype
    return [torch.tensor(x).to(kind) for x in (A_bar, normal(channels, states), normal(channels, states))]


def draw_signal(batch, length, channels, seed, dtype=torch.float64):
    rng = np.random.default_rng(seed + 1)
    return torch.tensor(rng.normal(size=(batch, length, channels))).to(dtype)


def assert_near(got, expected, tolerance=1e-12):
    """Equal within `tolerance` times the largest expected value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.iscomplexobj(got) or np.abs(np.imag(expected)).max() == 0
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


systems = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "channels": st.integers(1, 4),
        "states": st.integers(1, 6),
        "seed": st.integers(0, 2**31),
    }
)


# --- the kernel ---


@pytest.mark.parametrize("make_kernel", KERNELS)
@given(system=systems, length=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_kernel_is_C_times_powers_of_A_times_B(make_kernel, system, length):
    A_bar, B_bar, C = draw_system(**system)
    K = make_kernel(A_bar, B_bar, C, length)
    assert K.dtype == A_bar.dtype
    assert_near(K, oracle_kernel(A_bar.numpy(), B_bar.numpy(), C.numpy(), length))


@pytest.mark.parametrize("make_kernel", KERNELS)
def test_kernel_of_one_system_and_of_a_grid_of_systems(make_kernel):
    A_bar, B_bar, C = draw_system("dense", 6, 3, seed=0)
    K = make_kernel(A_bar, B_bar, C, 11)
    assert_near(make_kernel(A_bar[4], B_bar[4], C[4], 11), K[4])
    grid = [x.reshape(2, 3, *x.shape[1:]) for x in (A_bar, B_bar, C)]
    assert_near(make_kernel(*grid, 11), K.reshape(2, 3, 11))


@pytest.mark.parametrize("make_kernel", KERNELS)
def test_kernel_of_a_delay_line_is_C_then_zeros(make_kernel):
    # h_k holds the last four inputs, so every filter of four taps is an SSM of four states.
    A_bar = torch.diag(torch.ones(3, dtype=torch.float64), -1)
    B_bar = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    C = torch.tensor([3.0, -1, 4, 1.5], dtype=torch.float64)
    assert torch.equal(make_kernel(A_bar, B_bar, C, 6), torch.cat([C, torch.zeros(2, dtype=torch.float64)]))


@pytest.mark.parametrize("form", FORMS)
def test_doubling_equals_the_definition_over_a_long_kernel(form):
    A_bar, B_bar, C = draw_system(form, 3, 5, seed=7)
    for length in (1000, 1024, 1025):
        K = convolution.kernel(A_bar, B_bar, C, length)
        assert_near(convolution.kernel_doubling(A_bar, B_bar, C, length), K)


def test_doubling_takes_a_logarithmic_number_of_steps(monkeypatch):
    steps = []
    advance = convolution.advance
    monkeypatch.setattr(convolution, "advance", lambda A_bar, h: steps.append(len(h)) or advance(A_bar, h))
    convolution.kernel_doubling(*draw_system("dense", 2, 3, seed=1), 1000)
    assert steps == [1, 2, 4, 8, 16, 32, 64, 128, 256, 488]


def test_kernel_does_not_conjugate_C():
    C = torch.tensor([2 + 3j], dtype=torch.complex128)
    one = torch.ones(1, dtype=torch.complex128)
    for make_kernel in KERNELS:
        assert make_kernel(0.5 * one, one, C, 2).tolist() == [2 + 3j, 1 + 1.5j]


def test_half_of_the_conjugate_pairs_gives_twice_the_real_part():
    half = draw_system("complex diagonal", 3, 4, seed=5)
    whole = [torch.cat([x, x.conj()], dim=-1) for x in half]
    u, D = draw_signal(2, 21, 3, seed=5), torch.tensor([1.0, -2, 0.5], dtype=torch.float64)
    for make_kernel in KERNELS:
        K = 2 * make_kernel(*half, 21).real
        assert_near(K, make_kernel(*whole, 21).real)
        expected = oracle_run(u.numpy(), *(x.numpy() for x in whole), D.numpy())[0].real
        assert_near(convolution.convolve_fft(u, K, D), expected)
    assert_near(2 * convolution.run_recurrent(u, *half)[0].real + D * u, expected)


# --- the three modes ---


@given(system=systems, batch=st.integers(1, 3), length=st.integers(1, 33), skip=st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_three_modes_equal_the_oracle(system, batch, length, skip):
    A_bar, B_bar, C = draw_system(**system)
    u = draw_signal(batch, length, system["channels"], system["seed"])
    D = draw_signal(1, 1, system["channels"], system["seed"] + 1)[0, 0] if skip else None
    y, _ = convolution.run_recurrent(u, A_bar, B_bar, C, D)
    arrays = [x.numpy() for x in (u, A_bar, B_bar, C)]
    expected, _ = oracle_run(*arrays, None if D is None else D.numpy())
    assert y.dtype == A_bar.dtype
    assert_near(y, expected)
    for make_kernel in KERNELS:
        for convolve in CONVOLUTIONS:
            assert_near(convolve(u, make_kernel(A_bar, B_bar, C, length), D), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 3, 64, 127, 128, 129, 997])
def test_the_three_modes_agree_at_every_length(form, length):
    A_bar, B_bar, C = draw_system(form, 2, 3, seed=length)
    u, D = draw_signal(2, length, 2, seed=length), torch.tensor([0.7, -1.3], dtype=torch.float64)
    y, _ = convolution.run_recurrent(u, A_bar, B_bar, C, D)
    K = convolution.kernel_doubling(A_bar, B_bar, C, length)
    for convolve in CONVOLUTIONS:
        assert_near(convolve(u, K, D), y)


@pytest.mark.parametrize("convolve", CONVOLUTIONS)
@given(length=st.integers(1, 50), complex_u=st.booleans(), complex_kernel=st.booleans(), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_convolutions_equal_np_convolve(convolve, length, complex_u, complex_kernel, seed):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(2, length, 3)) + (1j * rng.normal(size=(2, length, 3)) if complex_u else 0)
    K = rng.normal(size=(3, length)) + (1j * rng.normal(size=(3, length)) if complex_kernel else 0)
    y = convolve(torch.tensor(u), torch.tensor(K)).numpy()
    assert np.iscomplexobj(y) == (complex_u or complex_kernel)
    for i in range(2):
        for d in range(3):
            assert_near(y[i, :, d], np.convolve(u[i, :, d], K[d])[:length])


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64])
def test_nothing_wraps_around(length):
    # Only the last input and the last kernel value: on a circle of L their product would land early.
    u = torch.zeros(1, length, 1, dtype=torch.float64)
    K = torch.zeros(1, length, dtype=torch.float64)
    u[0, -1, 0] = K[0, -1] = 1
    y = convolution.convolve_fft(u, K)
    expected = torch.zeros_like(y)
    expected[0, -1, 0] = float(length == 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


def test_direct_convolution_reads_no_later_input():
    u, K = draw_signal(1, 9, 1, seed=3), draw_signal(1, 9, 1, seed=4)[..., 0]
    later = u.clone()
    later[:, 5:] = torch.nan
    y, y_later = convolution.convolve_direct(u, K), convolution.convolve_direct(later, K)
    assert_near(y_later[:, :5], y[:, :5])
    assert y_later[:, 5:].isnan().all()


def test_toeplitz_times_the_input_is_the_convolution():
    K, u = draw_signal(1, 12, 3, seed=8)[0].T, draw_signal(2, 12, 3, seed=9)
    T = convolution.toeplitz(K)
    assert T.shape == (3, 12, 12)
    for d in range(3):
        for k in range(12):
            for s in range(12):
                assert T[d, k, s] == (K[d, k - s] if s <= k else 0)
    assert_near(torch.einsum("dks,bsd->bkd", T, u), convolution.convolve_direct(u, K))
    assert convolution.toeplitz(K[0].to(torch.complex64)).dtype == torch.complex64


def test_float32_stays_float32():
    A_bar, B_bar, C = draw_system("dense", 2, 3, seed=2, dtype=torch.float32)
    u = draw_signal(2, 65, 2, seed=2, dtype=torch.float32)
    expected, _ = oracle_run(*(x.numpy().astype(float) for x in (u, A_bar, B_bar, C)))
    y, state = convolution.run_recurrent(u, A_bar, B_bar, C)
    assert y.dtype == state.dtype == torch.float32
    assert_near(y, expected, 1e-5)
    for convolve in CONVOLUTIONS:
        y = convolve(u, convolution.kernel(A_bar, B_bar, C, 65))
        assert y.dtype == torch.float32
        assert_near(y, expected, 1e-5)


def test_views_are_as_good_as_contiguous_inputs():
    A_bar, B_bar, C = draw_system("dense", 3, 2, seed=6)
    u = draw_signal(3, 1, 10, seed=6).mT.mT.permute(1, 2, 0).expand(4, 10, 3)  # (4, 10, 3)
    y, _ = convolution.run_recurrent(u, A_bar.mT.contiguous().mT, B_bar, C)
    expected, _ = oracle_run(*(x.numpy() for x in (u, A_bar, B_bar, C)))
    assert_near(y, expected)
    for convolve in CONVOLUTIONS:
        assert_near(convolve(u, convolution.kernel(A_bar, B_bar, C, 10)), y)


# --- streaming ---


@given(system=systems, length=st.integers(2, 25), data=st.data())
@settings(deadline=None, max_examples=40)
def test_streaming_may_cut_the_sequence_anywhere(system, length, data):
    A_bar, B_bar, C = draw_system(**system)
    u = draw_signal(2, length, system["channels"], system["seed"])
    start = draw_signal(2, system["channels"], system["states"], system["seed"] + 2)
    D = torch.linspace(-1, 2, system["channels"], dtype=torch.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    expected, final = oracle_run(*(x.numpy() for x in (u, A_bar, B_bar, C, D, start)))
    state, outputs = start, []
    for part in torch.tensor_split(u, cuts, dim=1):
        y, state = convolution.run_recurrent(part, A_bar, B_bar, C, D, state)
        outputs.append(y)
    assert_near(torch.cat(outputs, dim=1), expected)
    assert_near(state, final)


def test_an_initial_state_adds_a_kernel_of_its_own():
    A_bar, B_bar, C = draw_system("dense", 3, 4, seed=11)
    u, start = draw_signal(1, 17, 3, seed=11), draw_signal(1, 3, 4, seed=12)
    y, _ = convolution.run_recurrent(u, A_bar, B_bar, C, initial_state=start)
    free = convolution.kernel(A_bar, convolution.advance(A_bar, start)[0], C, 17)  # C Ā^(k+1) h_0
    assert_near(convolution.convolve_fft(u, convolution.kernel(A_bar, B_bar, C, 17)) + free.T, y)


# --- gradients ---


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_recurrence(form):
    A_bar, B_bar, C = draw_system(form, 2, 3, seed=13)
    u, start = draw_signal(2, 5, 2, seed=13), draw_signal(2, 2, 3, seed=14)
    D = torch.tensor([0.3, -1.1], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (u, A_bar, B_bar, C, D, start)]
    assert torch.autograd.gradcheck(convolution.run_recurrent, inputs)


@pytest.mark.parametrize("make_kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_kernel(form, make_kernel):
    inputs = [x.requires_grad_() for x in draw_system(form, 2, 3, seed=15)]
    assert torch.autograd.gradcheck(lambda *system: make_kernel(*system, 7), inputs)


@pytest.mark.parametrize("convolve", CONVOLUTIONS)
@pytest.mark.parametrize("kinds", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gradients_of_the_convolutions(convolve, kinds):
    u, K = draw_signal(2, 6, 3, seed=16), draw_signal(1, 6, 3, seed=17)[0].T
    u, K = (x * (1 + 0.5j) if is_complex else x for x, is_complex in zip((u, K), kinds, strict=True))
    D = torch.tensor([0.3, -1.1, 2], dtype=torch.float64)
    assert torch.autograd.gradcheck(convolve, [x.detach().requires_grad_() for x in (u, K, D)])


def test_the_modes_agree_in_their_gradients():
    A_bar, B_bar, C = draw_system("dense", 3, 4, seed=18)
    u, D = draw_signal(2, 19, 3, seed=18), torch.tensor([0.3, -1.1, 2], dtype=torch.float64)
    cotangent = draw_signal(2, 19, 3, seed=19)
    inputs = [x.requires_grad_() for x in (u, A_bar, B_bar, C, D)]
    y, _ = convolution.run_recurrent(*inputs)
    expected = torch.autograd.grad(y, inputs, cotangent)
    for make_kernel in KERNELS:
        for convolve in CONVOLUTIONS:
            y = convolve(u, make_kernel(A_bar, B_bar, C, 19), D)
            for got, want in zip(torch.autograd.grad(y, inputs, cotangent), expected, strict=True):
                assert_near(got, want)


def test_doubling_of_an_unstable_system_has_finite_gradients():
    A_bar, B_bar, C = (x.requires_grad_() for x in torch.tensor([[1e20], [1.0], [1.0]], dtype=torch.float64))
    K = convolution.kernel_doubling(A_bar, B_bar, C, 12)  # 1e220 fits, the next power of two would not
    assert K.isfinite().all()
    (gradient,) = torch.autograd.grad(K[:3].sum(), A_bar)
    torch.testing.assert_close(gradient, torch.tensor([1 + 2e20], dtype=torch.float64))


# --- bad inputs ---


def good(**changes):
    A_bar, B_bar, C = draw_system("dense", 3, 2, seed=20)
    arguments = {"u": draw_signal(2, 5, 3, seed=20), "A_bar": A_bar, "B_bar": B_bar, "C": C}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": torch.zeros(5, 3).double()}, ValueError, r"^u: expected shape \(Batch, L, D\), got \(5, 3\)"),
        ({"u": torch.zeros(2, 0, 3).double()}, ValueError, "^u: expected L >= 1"),
        ({"u": torch.zeros(2, 5, 3)}, TypeError, "^A_bar: expected torch.float32 or torch.complex64"),
        ({"u": torch.zeros(2, 5, 3).long()}, TypeError, "^u: expected float32, .*, got torch.int64"),
        ({"u": [1.0]}, TypeError, "^u: expected a torch.Tensor, got list"),
        ({"A_bar": torch.zeros(2, 2).double()}, ValueError, r"^A_bar: expected shape \(3, 2, 2\) .dense. or"),
        ({"A_bar": torch.zeros(3, 2, 3).double()}, ValueError, "^A_bar: expected shape"),
        ({"A_bar": torch.zeros(3, 2, 2)}, TypeError, "^A_bar: expected torch.float64 or torch.complex128"),
        ({"B_bar": torch.zeros(4, 2).double()}, ValueError, r"^B_bar: expected shape \(3, N\), got \(4, 2\)"),
        ({"B_bar": torch.zeros(3, 0).double()}, ValueError, "^B_bar: expected shape .* with N >= 1"),
        ({"C": torch.zeros(3, 1).double()}, ValueError, r"^C: expected shape \(3, 2\), got \(3, 1\)"),
        ({"D": torch.zeros(1).double()}, ValueError, r"^D: expected shape \(3,\), got \(1,\)"),
        ({"D": 1.0}, TypeError, "^D: expected a torch.Tensor, got float"),
        (
            {"initial_state": torch.zeros(3, 2).double()},
            ValueError,
            r"^initial_state: expected shape \(2, 3, 2\)",
        ),
        ({"C": torch.zeros(3, 2, device="meta").double()}, ValueError, "^C: expected device cpu"),
    ],
)
def test_recurrence_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match=message):
        convolution.run_recurrent(**good(**changes))


@pytest.mark.parametrize("make_kernel", KERNELS)
def test_kernel_names_the_bad_argument(make_kernel):
    A_bar, B_bar, C = draw_system("diagonal", 3, 2, seed=21)
    for length in (0, -4):
        with pytest.raises(ValueError, match=f"^length: expected at least 1, got {length}"):
            make_kernel(A_bar, B_bar, C, length)
    for length in (2.0, True, None):
        with pytest.raises(TypeError, match=r"^length: expected an int"):
            make_kernel(A_bar, B_bar, C, length)
    with pytest.raises(ValueError, match=r"^A_bar: expected shape \(3, 2, 2\) .dense. or \(3, 2\)"):
        make_kernel(A_bar[:, :1], B_bar, C, 4)
    with pytest.raises(ValueError, match=r"^C: expected shape \(3, 2\), got \(2,\)"):
        make_kernel(A_bar, B_bar, C[0], 4)
    with pytest.raises(ValueError, match=r"^B_bar: expected shape"):
        make_kernel(A_bar, B_bar[0, 0], C, 4)


@pytest.mark.parametrize("convolve", CONVOLUTIONS)
def test_convolutions_name_the_bad_argument(convolve):
    u, K = draw_signal(2, 5, 3, seed=22), draw_signal(1, 3, 5, seed=22)[0]
    with pytest.raises(ValueError, match=r"^kernel: expected shape \(3, 5\), got \(3, 4\)"):
        convolve(u, K[:, :4])
    with pytest.raises(ValueError, match=r"^kernel: expected shape \(3, 5\), got \(5, 3\)"):
        convolve(u, K.T)
    with pytest.raises(TypeError, match=r"^kernel: expected torch.float64 or torch.complex128 .u's"):
        convolve(u, K.float())
    with pytest.raises(ValueError, match=r"^u: expected shape"):
        convolve(u[0], K)
    with pytest.raises(ValueError, match=r"^u: expected Batch >= 1"):
        convolve(u[:0], K)
    with pytest.raises(ValueError, match=r"^D: expected shape \(3,\), got \(3, 1\)"):
        convolve(u, K, torch.zeros(3, 1).double())


def test_toeplitz_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"^kernel: expected shape"):
        convolution.toeplitz(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^kernel: expected a torch.Tensor, got list"):
        convolution.toeplitz([1.0, 2.0])
