"""Checks of chapter 04: the kernel, a causal convolution by FFT, a start that is not zero, the state after a prompt."""

import torch

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers

DOUBLE, SINGLE = torch.float64, torch.float32


def normal(*shape, seed, dtype=DOUBLE):
    """Standard normal numbers that are the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def system(size, seed, dtype=DOUBLE):
    """A general Ā (nothing symmetric) whose largest eigenvalue has size 0.9, and random B̄ and C."""
    A_bar = normal(size, size, seed=seed)
    A_bar = 0.9 * A_bar / torch.linalg.eigvals(A_bar).abs().max()
    return A_bar.to(dtype), normal(size, seed=seed + 100, dtype=dtype), normal(size, seed=seed + 200, dtype=dtype)


def column(*values):
    return torch.tensor(values, dtype=DOUBLE)


def kernel_of(A_bar, B_bar, C, length):
    """K̄_l = C Ā^l B̄, by definition."""
    values, h = [], B_bar
    for _ in range(length):
        values.append(C @ h)
        h = A_bar @ h
    return torch.stack(values)


def systems():
    yield Case("one state that halves", A_bar=column(0.5)[None], B_bar=column(2.0), C=column(3.0), length=3)
    A_bar = torch.stack([column(0.0, 0.5), column(-0.8, 0.9)])
    yield Case("a single value", A_bar=A_bar, B_bar=column(1.0, 2.0), C=column(-1.0, 3.0), length=1)
    yield Case("two states", A_bar=A_bar, B_bar=column(1.0, 2.0), C=column(-1.0, 3.0), length=4)
    for seed, (size, length, dtype) in enumerate([(2, 2, DOUBLE), (3, 7, SINGLE), (4, 9, DOUBLE), (5, 12, DOUBLE)]):
        A_bar, B_bar, C = system(size, seed, dtype)
        yield Case(f"{size} random states, {length} values", A_bar=A_bar, B_bar=B_bar, C=C, length=length)


def _powers_of_entries(A_bar, B_bar, C, length, zeroth=torch.ones_like):
    return torch.stack([C @ (A_bar**k if k else zeroth(A_bar)) @ B_bar for k in range(length)])


def _identity(A_bar):
    return torch.eye(len(A_bar), dtype=A_bar.dtype)


def _squared(A_bar, B_bar, C, length):
    values, power = [C @ B_bar], A_bar
    for _ in range(length - 1):
        values.append(C @ power @ B_bar)
        power = power @ power
    return torch.stack(values)


def _late(A_bar, B_bar, C, length):
    return torch.cat([B_bar.new_zeros(1), kernel_of(A_bar, B_bar, C, length)[:-1]])


FIRST = "Read first, then multiply: the input of this very step has not met Ā yet."
MATRIX = "A power of a matrix is made of matrix products, @."
kernel = Exercise(
    name="kernel",
    asks="kernel(A_bar, B_bar, C, length) -> K (length,), dense A_bar (N, N), B_bar and C (N,)",
    formula="Asked is K_l = C Ā^l B̄ for l = 0, 1, ..., length − 1.",
    see="04 §1",
    reference=kernel_of,
    inputs=systems,
    results=("K",),
    sizes={"N": ("A_bar", 0)},
    mistakes=(
        Mistake("a kernel that begins at C Ā B̄", lambda A, B, C, n: kernel_of(A, A @ B, C, n), FIRST),
        Mistake("a kernel that begins with a zero", _late, "An input counts in the step in which it comes."),
        Mistake("A transposed, or B̄ and C swapped", lambda A, B, C, n: kernel_of(A.T, B, C, n), "It is A_bar @ h."),
        Mistake("the kernel in reverse order", lambda A, B, C, n: kernel_of(A, B, C, n).flip(0)),
        Mistake("powers entry by entry", _powers_of_entries, MATRIX),
        Mistake("powers entry by entry", lambda *x: _powers_of_entries(*x, zeroth=_identity), MATRIX),
        Mistake("Ā squared again and again", _squared, "That gives Ā, Ā², Ā⁴, Ā⁸: each step has one Ā more only."),
        Mistake("Ā applied only once", lambda A, B, C, n: torch.stack([C @ B] + [C @ A @ B] * (n - 1))),
        Mistake("C left out", lambda A, B, C, n: kernel_of(A, B, C**0, n), "C weighs the states."),
        Mistake("B̄ left out", lambda A, B, C, n: kernel_of(A, B**0, C, n), "B̄ is the state after a hit."),
    ),
    hints=(
        "Hit the system by 1 once, from rest. What is its state in that step, and what is read from it?",
        "The state after the hit is B̄. Read it with C, then multiply it by Ā, and so on. How many reads are there?",
        "h = B_bar; for each of `length` values: keep C @ h, then h = A_bar @ h; return torch.stack(values).",
    ),
)


def convolve(u, K, D, n=None, keep=0):
    """y_k = Σ_{l ≤ k} K_l u_{k−l} + D u_k. n points on the circle, `keep` the first of the L values that are kept."""
    length = u.shape[1]
    n = 2 * length if n is None else n
    y = torch.fft.irfft(torch.fft.rfft(u, n, dim=1) * torch.fft.rfft(K.T, n, dim=0), n, dim=1)
    return y[:, keep : keep + length] + D * u


def signals():
    yield Case("two steps", u=column(1.0, 2.0)[None, :, None], K=column(3.0, 5.0)[None], D=column(10.0))
    u = normal(1, 1, 2, seed=1)
    yield Case("a single step", u=u, K=normal(2, 1, seed=2), D=normal(2, seed=3))
    for seed, (batch, length, channels, dtype) in enumerate(
        [(2, 3, 1, DOUBLE), (1, 4, 2, DOUBLE), (2, 5, 3, SINGLE), (3, 8, 2, DOUBLE), (2, 11, 4, DOUBLE)]
    ):
        u, K = normal(batch, length, channels, seed=seed, dtype=dtype), normal(channels, length, seed=50 + seed)
        yield Case(f"{length} steps, no zeros", u=u, K=K.to(dtype), D=normal(channels, seed=90 + seed, dtype=dtype))


def _irfft_without_n(u, K, D):
    length = u.shape[1]
    n = 2 * length - 1
    y = torch.fft.irfft(torch.fft.rfft(u, n, dim=1) * torch.fft.rfft(K.T, n, dim=0), dim=1)
    return y[:, :length] + D * u


def _delayed(u, K, D):
    y = convolve(u, K, 0 * D)
    return torch.cat([torch.zeros_like(u[:, :1]), y[:, :-1]], dim=1) + D * u


def _circle_of_the_future(u, K, D):
    length = u.shape[1]
    spectrum = torch.fft.rfft(u, dim=1) * torch.fft.rfft(K.T, dim=0).conj()
    return torch.fft.irfft(spectrum, length, dim=1) + D * u


CIRCLE = "The FFT convolves on a circle: what runs over the end comes back at the beginning. Append zeros."
CORRELATION = "K_0 belongs to the newest input and K_l to the one of l steps before."
PART = "y_0 is the first value of the full convolution."
fft_convolution = Exercise(
    name="fft_convolution",
    asks="fft_convolution(u, K, D) -> y (B, L, D) for u (B, L, D), kernel K (D, L), skip D (D,)",
    formula="Asked is y_k = Σ_{l ≤ k} K_l u_{k−l} + D u_k, each channel with its own K and D.",
    see="04 §5",
    reference=convolve,
    inputs=signals,
    results=("y",),
    sizes={"L": ("u", 1)},
    mistakes=(
        Mistake("a circular convolution", lambda u, K, D: convolve(u, K, D, n=u.shape[1]), CIRCLE),
        Mistake("one zero too few", lambda u, K, D: convolve(u, K, D, 2 * u.shape[1] - 2), "2L − 1 points are needed."),
        Mistake("irfft without its n", _irfft_without_n, "A spectrum does not tell whether n was odd: pass n again."),
        Mistake("the kernel flipped", lambda u, K, D: convolve(u, K.flip(1), D), CORRELATION, "04 §4"),
        Mistake("a sum over the future", lambda u, K, D: convolve(u.flip(1), K, D).flip(1), CORRELATION, "04 §4"),
        Mistake("a sum over the future, in a circle", _circle_of_the_future, "No spectrum is conjugated here."),
        Mistake("the skip D u lost", lambda u, K, D: convolve(u, K, 0 * D), "Add D u at the end.", "04 §4"),
        Mistake("D added without u", lambda u, K, D: convolve(u, K, 0 * D) + D, "The skip is D times u."),
        Mistake("D times the kernel's part", lambda u, K, D: D * convolve(u, K, 0 * D), "The skip is added."),
        Mistake("D u in place of the whole sum", lambda u, K, D: D * u),
        Mistake("an output one step late", _delayed, "K_0 weighs the input of the same step."),
        Mistake("the end of the full convolution", lambda u, K, D: convolve(u, K, D, keep=u.shape[1] - 1), PART),
        Mistake("the end of the full convolution", lambda u, K, D: convolve(u, K, D, keep=u.shape[1]), PART),
        Mistake("the middle of the convolution", lambda u, K, D: convolve(u, K, D, keep=(u.shape[1] - 1) // 2), PART),
        Mistake("a product step by step", lambda u, K, D: K.T * u + D * u, "Multiply the spectra, not the signals."),
        Mistake("the first channel's kernel for all", lambda u, K, D: convolve(u, K[:1].expand_as(K), D)),
    ),
    hints=(
        "Multiply two spectra, transform back, add the skip. Which axis is time in u, and which in K?",
        "The sum has 2L − 1 values; an FFT of fewer points lays its end over its beginning. rfft(x, n) appends zeros.",
        "n = 2L; U = rfft(u, n, dim=1); K_f = rfft(K.T, n, dim=0); y = irfft(U * K_f, n, dim=1)[:, :L] + D * u.",
    ),
)


def run_from(u, A_bar, B_bar, C, D, h):
    """y (L,) by the recurrence h_k = Ā h_{k−1} + B̄ u_k."""
    outputs = []
    for x in u:
        h = A_bar @ h + B_bar * x
        outputs.append(C @ h + D * x)
    return torch.stack(outputs)


def starts():
    one = column(1.0)
    yield Case("one state", u=column(1.0, 2.0), A_bar=0.5 * one[None], B_bar=2 * one, C=3 * one, D=10.0, h=4 * one)
    for seed, (length, size, dtype) in enumerate(
        [(1, 2, DOUBLE), (2, 3, DOUBLE), (5, 2, DOUBLE), (7, 3, SINGLE), (9, 4, DOUBLE)]
    ):
        A_bar, B_bar, C = system(size, 20 + seed, dtype)
        u, h = normal(length, seed=30 + seed, dtype=dtype), normal(size, seed=40 + seed, dtype=dtype)
        note = f"{length} steps, {size} states" if length > 1 else f"a single step, {size} states"
        yield Case(note, u=u, A_bar=A_bar, B_bar=B_bar, C=C, D=0.3 + seed, h=h)


def _plus_free(first):
    """The forced part, and a free response that starts from the state first(A_bar, h)."""
    return lambda u, A, B, C, D, h: run_from(u, A, B, C, D, 0 * h) + kernel_of(A, first(A, h), C, len(u))


def _reversed_kernel(u, A, B, C, D, h):
    K = kernel_of(A, B, C, len(u)).flip(0)
    forced = torch.stack([K[: k + 1] @ u[: k + 1].flip(0) for k in range(len(u))])
    return forced + D * u + kernel_of(A, A @ h, C, len(u))


def _circle(u, A, B, C, D, h):
    spectrum = torch.fft.rfft(kernel_of(A, B, C, len(u))) * torch.fft.rfft(u)
    return torch.fft.irfft(spectrum, len(u)) + D * u + kernel_of(A, A @ h, C, len(u))


def _first_only(u, A, B, C, D, h):
    y = run_from(u, A, B, C, D, 0 * h)
    return torch.cat([y[:1] + C @ A @ h, y[1:]])


def _read_before(u, A, B, C, D, h):
    ahead = run_from(u, A, B, C, 0, h)
    return torch.cat([(C @ h)[None], ahead[:-1]]) + D * u


convolve_from = Exercise(
    name="convolve_from",
    asks="convolve_from(u, A_bar, B_bar, C, D, h) -> y (L,) of one system that starts from the state h (N,)",
    formula="Asked is y_k = Σ_{l ≤ k} C Ā^l B̄ u_{k−l} + D u_k + C Ā^{k+1} h.",
    see="04, exercise 3",
    reference=run_from,
    inputs=starts,
    results=("y",),
    sizes={"L": ("u", 0), "N": ("A_bar", 0)},
    mistakes=(
        Mistake("the initial state dropped", lambda u, A, B, C, D, h: run_from(u, A, B, C, D, 0 * h)),
        Mistake("C Ā^k h, one Ā too few", _plus_free(lambda A, h: h), "h is the state before the first input."),
        Mistake("C Ā^{k+2} h, one Ā too many", _plus_free(lambda A, h: A @ A @ h), "y_0 reads Ā h."),
        Mistake("an initial state that fades in one step", _first_only, "What is left of it goes on: Ā^{k+1} h."),
        Mistake("A transposed", lambda u, A, B, C, D, h: run_from(u, A.T, B, C, D, h), "Use A_bar as it is."),
        Mistake("the skip D u lost", lambda u, A, B, C, D, h: run_from(u, A, B, C, 0, h), "Add D u at the end."),
        Mistake("a kernel that begins at C Ā B̄", lambda u, A, B, C, D, h: run_from(u, A, A @ B, C, D, h), FIRST),
        Mistake("outputs that read the state before the input", _read_before, "y_k reads h_k, with u_k in it."),
        Mistake("the kernel flipped", _reversed_kernel, "K_0 belongs to the newest input.", "04 §4"),
        Mistake("a circular convolution", _circle, CIRCLE, "04 §5"),
    ),
    hints=(
        "The system is linear: y is the answer to u from rest, plus the answer to silence from h.",
        "In silence h becomes Ā h, Ā² h, ... and C reads each. That is a kernel whose B̄ is Ā h.",
        "K = kernel(A_bar, B_bar, C, L); y = (causal convolution of u and K) + D * u + kernel(A_bar, A_bar @ h, C, L).",
    ),
)


def prompts():
    for case in starts():
        yield Case(case.note, **{name: case.arguments[name] for name in ("u", "A_bar", "B_bar", "h")})


def state_after(u, A_bar, B_bar, h):
    for x in u:
        h = A_bar @ h + B_bar * x
    return h


def _entries(u, A, B, h):
    return torch.stack([A**k @ B * x for k, x in enumerate(u.flip(0))]).sum(0) + A ** len(u) @ h


def _but_Ah(power):
    """The inputs' part, and Ā^(L + power) h."""
    return lambda u, A, B, h: state_after(u, A, B, 0 * h) + torch.linalg.matrix_power(A, len(u) + power) @ h


final_state = Exercise(
    name="final_state",
    asks="final_state(u, A_bar, B_bar, h) -> the state (N,) after the last of the inputs u (L,), from the state h (N,)",
    formula="Asked is Ā^L h + Σ_l Ā^l B̄ u_{L−1−l}: the newest input is not multiplied by Ā.",
    see="04, exercise 4",
    reference=state_after,
    inputs=prompts,
    results=("state",),
    sizes={"L": ("u", 0), "N": ("A_bar", 0)},
    mistakes=(
        Mistake("the inputs in reverse order", lambda u, A, B, h: state_after(u.flip(0), A, B, h), "Old ones fade."),
        Mistake("the initial state dropped", lambda u, A, B, h: state_after(u, A, B, 0 * h)),
        Mistake("Ā^{L−1} h, one Ā too few", _but_Ah(-1), "h lies before the first input: L steps, L times Ā."),
        Mistake("Ā^{L+1} h, one Ā too many", _but_Ah(1)),
        Mistake("an initial state that does not fade", lambda u, A, B, h: state_after(u, A, B, 0 * h) + h),
        Mistake("one Ā too many in every term", lambda u, A, B, h: A @ state_after(u, A, B, h)),
        Mistake("one Ā too many on the inputs", lambda u, A, B, h: state_after(u, A, A @ B, h)),
        Mistake("the last input left out", lambda u, A, B, h: state_after(u[:-1], A, B, h), "It was taken in too."),
        Mistake("the last input set to 0", lambda u, A, B, h: A @ state_after(u[:-1], A, B, h)),
        Mistake("the first input left out", lambda u, A, B, h: state_after(u[1:], A, B, A @ h)),
        Mistake("A transposed", lambda u, A, B, h: state_after(u, A.T, B, h), "Use A_bar as it is."),
        Mistake("powers entry by entry", _entries, MATRIX),
        Mistake("B̄ left out", lambda u, A, B, h: state_after(u, A, B**0, h), "B̄ u_k enters the state."),
    ),
    hints=(
        "Unroll two steps by hand: h_1 = Ā² h + Ā B̄ u_0 + B̄ u_1. Which input has met Ā most often?",
        "The states Ā^l B̄ are what the kernel reads through C. Sum them with the inputs from the newest to the oldest.",
        "S = torch.stack([Ā^l B̄ for l in range(L)]); state = u.flip(0) @ S + torch.linalg.matrix_power(A_bar, L) @ h.",
    ),
)

hint, picture = helpers(kernel, fft_convolution, convolve_from, final_state)
