"""Checks of chapter 03: LegS's A and B, its drawing, running it, A h in O(N), and a decoder for any A."""

import math
from functools import partial

import torch
from torch.linalg import solve

from minimamba import hippo
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.discretization import bilinear, euler, zoh, zoh_euler

F64, F32 = torch.float64, torch.float32


def sizes():
    for N in (1, 2, 3, 6):
        yield Case("one state" if N == 1 else f"{N} states", N=N)


def orders(N, start=0):
    """n = start, start + 1, ... and the roots of 2n + 1."""
    n = torch.arange(start, N + start, dtype=F64)
    return n, torch.sqrt(2 * n + 1)


def built(N, start=0, a=None, b=None, diagonal=lambda n: -(n + 1), sign=-1, above=0.0):
    """LegS's A and B; the options are what can go wrong. a and b are the factors in A and in B."""
    n, root = orders(N, start)
    a = root if a is None else a(n)
    product = sign * torch.outer(a, a)
    A = torch.tril(product, -1) + above * torch.triu(product, 1) + torch.diag(diagonal(n))
    return A, root if b is None else b(n)


def lmu(N):
    n, _ = orders(N)
    sign = (-1) ** (n[:, None] - n)
    return -(2 * n + 1)[:, None] * torch.where(n[:, None] >= n, sign, 1.0), (2 * n + 1) * (-1) ** n


FIRST = "The first state is n = 0: A_00 = −1 and B_0 = 1."
STABLE = "With a plus the state explodes."
ROOT = "√((2n+1)(2k+1)) is the product of two roots, and B_n is one of them."
legs = Exercise(
    name="legs",
    asks="legs(N) -> A (N, N) and B (N,) of HiPPO-LegS, float64",
    formula="Asked is A_nk = −√((2n+1)(2k+1)) for n > k, −(n+1) for n = k, 0 for n < k, and B_n = √(2n+1), n from 0.",
    see="03 §3",
    reference=hippo.legs,
    inputs=sizes,
    results=("A", "B"),
    mistakes=(
        Mistake("the sign of A turned round", lambda N: (-built(N)[0], built(N)[1]), STABLE),
        Mistake("a plus below the diagonal", partial(built, sign=1)),
        Mistake("a plus on the diagonal", partial(built, diagonal=lambda n: n + 1), STABLE),
        Mistake("a minus in B", lambda N: (built(N)[0], -built(N)[1]), "The input comes in with a plus."),
        Mistake("no √(2n+1) in A", partial(built, a=torch.ones_like), ROOT),
        Mistake("no √(2n+1) in B", partial(built, b=torch.ones_like), ROOT),
        Mistake("no √(2n+1) in A and B", partial(built, a=torch.ones_like, b=torch.ones_like), ROOT),
        Mistake("2n+1 in B without the root", partial(built, b=lambda n: 2 * n + 1), ROOT),
        Mistake("(2n+1)(2k+1) in A without the root", partial(built, a=lambda n: 2 * n + 1), ROOT),
        Mistake("n and k counted from 1", partial(built, start=1), FIRST),
        Mistake("n and k counted from 1 in A", lambda N: (built(N, 1)[0], built(N)[1]), FIRST),
        Mistake("n counted from 1 in B", lambda N: (built(N)[0], built(N, 1)[1]), FIRST),
        Mistake("−n on the diagonal", partial(built, diagonal=lambda n: -n), "Then h_0 adds up for ever."),
        Mistake("−(2n+1) on the diagonal", partial(built, diagonal=lambda n: -2 * n - 1), "There it is −(n+1)."),
        Mistake("A transposed", lambda N: (built(N)[0].T, built(N)[1]), "n is the row: A has its entries below."),
        Mistake("entries above the diagonal", partial(built, above=1.0), "A state never listens to a later one."),
        Mistake("LegT's A", lambda N: (hippo.legt(N)[0], built(N)[1]), "That is the sliding window.", "03 §5"),
        Mistake("the scaling of the LMU", lmu, "That is the sliding window, not orthonormal.", "03 §5"),
        Mistake("B/√2, the vector p", lambda N: (built(N)[0], built(N)[1] / 2**0.5), "p is for A + ppᵀ.", "03 §8"),
    ),
    hints=(
        "Three cases, below, on and above the diagonal. Write them as two loops over n and k from 0 to N − 1.",
        "A test: the first column of A is −B, since a constant signal has the state (1, 0, 0, ...), which must stay.",
        "A[n, k] = −math.sqrt((2·n + 1)·(2·k + 1)) for k in range(n); A[n, n] = −(n + 1); B[n] = math.sqrt(2·n + 1); "
        "begin with torch.zeros(N, N, dtype=torch.float64).",
    ),
)


def drawings():
    for seed, (N, count, window, dtype) in enumerate(
        [(1, 1, 3.0, F64), (2, 3, 0.7, F64), (4, 6, 5.0, F32), (7, 5, 40.0, F64)]
    ):
        random = torch.Generator().manual_seed(seed)
        h = torch.randn(N, generator=random, dtype=F64).to(dtype)
        age = (window * torch.rand(count, generator=random, dtype=F64)).to(dtype)
        yield Case(f"{N} numbers" if N > 1 else "one number: the mean", h=h, age=age, window=window)


def polynomial(h, x, root=True, shift=0):
    """Sum of h_n √(2n+1) P_{n+shift}(x), x (T,)."""
    columns = [torch.ones_like(x), x]
    for n in range(1, len(h) + shift):
        columns.append(((2 * n + 1) * x * columns[n] - n * columns[n - 1]) / (n + 1))
    basis = torch.stack(columns[shift : len(h) + shift], dim=-1)
    n = torch.arange(len(h), dtype=F64)
    return basis @ (h * (2 * n + 1).sqrt().to(h) if root else h)


def seen(x=lambda age, window: 1 - 2 * age / window, **options):
    return lambda h, age, window: polynomial(h, x(age, window), **options)


AGE = "The position is 1 − 2·age/window: 1 now and −1 at the far end."
redraw = Exercise(
    name="redraw",
    asks="redraw(h, age, window) -> the drawing (T,) of the past at the ages (T,), from the N coefficients h",
    formula="Asked is the sum over n of h_n √(2n+1) P_n(1 − 2·age/window), P_n the Legendre polynomials.",
    see="03 §2",
    reference=lambda h, age, window: hippo.legendre(len(h), age, window) @ h,
    inputs=drawings,
    results=("drawing",),
    sizes={"N": ("h", 0), "T": ("age", 0)},
    mistakes=(
        Mistake("√(2n+1) missing", seen(root=False), "P_n alone has not the norm 1."),
        Mistake("2n+1 without the root", lambda h, age, w: seen()(h * orders(len(h))[1].to(h), age, w)),
        Mistake("time running backwards", seen(lambda age, w: 2 * age / w - 1), AGE),
        Mistake("a position from 1 to 0", seen(lambda age, w: 1 - age / w), AGE),
        Mistake("the age not divided by the window", seen(lambda age, w: 1 - 2 * age), AGE),
        Mistake("the basis of LegS without 1/t", seen(lambda age, w: 2 * torch.exp(-age) - 1), AGE, "03 §6"),
        Mistake("the basis of LegS without 1/t", seen(lambda age, w: 2 * torch.exp(-age / w) - 1), AGE, "03 §6"),
        Mistake("Laguerre polynomials", lambda h, age, w: hippo.laguerre(len(h), age) @ h, "LagT has them.", "03 §6"),
        Mistake("P_{n+1} in place of P_n", seen(shift=1), "P_0 = 1 goes first."),
        Mistake("h in reversed order", lambda h, age, w: seen()(h.flip(0), age, w), "h_0 is the mean."),
    ),
    hints=(
        "Two things: where in the basis is an age, and which polynomials have norm 1 there?",
        "x = 1 − 2·age/window. P_0 = 1, P_1 = x, and (n+1) P_{n+1} = (2n+1) x P_n − n P_{n−1}. Then the roots √(2n+1).",
        "P = [torch.ones_like(x), x]; for n in 1 ... N − 2: P.append(((2n+1)·x·P[n] − n·P[n−1]) / (n+1)); "
        "return the sum of h[n]·math.sqrt(2n+1)·P[n] for n in 0 ... N − 1.",
    ),
)


def signals():
    for seed, (N, steps, dtype) in enumerate([(1, 1, F64), (2, 2, F64), (3, 5, F64), (4, 7, F32), (5, 12, F64)]):
        u = torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=F64)
        A, B = (x.to(dtype) for x in hippo.legs(N))
        yield Case(f"{steps} samples, {N} states" if N > 1 else "one sample", u=u.to(dtype), A=A, B=B)


def run_legs(u, A, B, clock=lambda k: math.log((k + 1) / k), rule=zoh, start=None, late=0, keep=1):
    h = torch.cat([u[:1], 0 * B[1:]]) if start is None else start(u, A, B)
    states = [0 * h, h]
    for k in range(1, len(u)):
        A_bar, B_bar = rule(A, B, clock(k))
        states.append(A_bar @ states[-1] + B_bar * u[k - late])
    return torch.stack(states[keep : len(u) + keep])


def entries(A, B, delta):
    A_bar = torch.exp(delta * A)
    return A_bar, solve(A, (A_bar - torch.eye(len(A), dtype=A.dtype)) @ B)


run = partial(partial, run_legs)  # run(rule=euler) is run_legs with another rule
LARGE = "At the start ΔA is large: only the exact rule, with e^{ΔA}, is right there."
LOG = "From k to k + 1 the clock log t runs by log((k+1)/k)."
ONE = "One sample is a constant signal: its state is the sample, then zeros."
remember = Exercise(
    name="remember",
    asks="remember(u, A, B) -> the states (L, N) of LegS, h′ = (A h + B x)/t, after each of the samples u (L,)",
    formula="Asked is (u_0, 0, ..., 0) after u_0 and then, with Δ = log((k+1)/k), e^{ΔA} h + A⁻¹(e^{ΔA} − I) B u_k.",
    see="03 §4",
    reference=run_legs,
    inputs=signals,
    results=("states",),
    sizes={"N": ("A", 0), "L": ("u", 0)},
    mistakes=(
        Mistake("the 1/t forgotten", run(clock=lambda k: 1.0), "That is S4's system: it fades.", "03 §6"),
        Mistake("1/t held at the start of each step", run(clock=lambda k: 1 / k), LOG),
        Mistake("1/t held at the end of each step", run(clock=lambda k: 1 / (k + 1)), LOG),
        Mistake("a clock one step late", run(clock=lambda k: math.log(k / max(k - 1, 0.5))), LOG),
        Mistake("a clock one step early", run(clock=lambda k: math.log((k + 2) / (k + 1))), LOG),
        Mistake("a clock running backwards", run(clock=lambda k: math.log(k / (k + 1))), LOG),
        Mistake("log(k + 1) in place of log((k+1)/k)", run(clock=lambda k: math.log(k + 1)), LOG),
        Mistake("the first sample lost", run(start=lambda u, A, B: 0 * B), ONE),
        Mistake("B u_0 as the first state", run(start=lambda u, A, B: B * u[0]), ONE),
        Mistake("u_0 in every state", run(start=lambda u, A, B: u[0] + 0 * B), ONE),
        Mistake("Euler's rule", run(rule=euler), LARGE, "02 §3"),
        Mistake("the bilinear rule", run(rule=bilinear), LARGE),
        Mistake("B̄ = ΔB", run(rule=zoh_euler), LARGE, "02 §6"),
        Mistake("the exponential entry by entry", run(rule=entries), "torch.matrix_exp is meant.", "01 §2"),
        Mistake("A transposed", lambda u, A, B: run_legs(u, A.T, B), "Use A as it is."),
        Mistake("the sign of A turned round", run(rule=lambda A, B, d: zoh(-A, B, d)), "A is stable as given."),
        Mistake("the sample before", run(late=1), "Sample k is held from k to k + 1."),
        Mistake("the state before each sample", run(keep=0), "Row k is the state after u_k."),
        Mistake("the last state alone", lambda u, A, B: run_legs(u, A, B)[-1], "Keep the state of each step."),
    ),
    hints=(
        "On the clock log t the equation is h′ = A h + B x, with no 1/t. How long does sample k last on that clock?",
        "Δ = log((k+1)/k), then a zero-order hold. Sample 0 lasts for ever: start from (u_0, 0, ..., 0).",
        "h = zeros(N); h[0] = u[0]; for k in 1 ... L − 1: E = torch.matrix_exp(math.log((k+1)/k)·A); "
        "h = E @ h + torch.linalg.solve(A, (E − I) @ B·u[k]). Keep h after each sample, the first too.",
    ),
)


def vectors():
    for seed, (N, dtype) in enumerate([(1, F64), (2, F64), (3, F64), (5, F32), (9, F64)]):
        h = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=F64)
        yield Case("one state" if N == 1 else f"{N} states", h=h.to(dtype))


def times(h, start=0, own=lambda n: n, sign=-1, total=lambda x: x.cumsum(0), outer=None, inner=None):
    n, b = (x.to(h) for x in orders(len(h), start))
    left, right = outer(b) if outer else b, inner(b) if inner else b
    return own(n) * h + sign * left * total(right * h)


OWN = "A_nn is −(n+1), and b_n² is 2n+1: the sum up to n gives −(2n+1), so n is to be added."
legs_times = Exercise(
    name="legs_times",
    asks="legs_times(h) -> A h (N,) for LegS's A, in O(N) operations, with cumsum",
    formula="Asked is n h_n − b_n (b_0 h_0 + ... + b_n h_n) with b_n = √(2n+1), n from 0.",
    see="03, exercise 5",
    reference=times,
    inputs=vectors,
    results=("A h",),
    sizes={"N": ("h", 0)},
    mistakes=(
        Mistake("−(2n+1) on the diagonal", partial(times, own=torch.zeros_like), OWN),
        Mistake("−(3n+2) on the diagonal", partial(times, own=lambda n: -(n + 1)), OWN),
        Mistake("−n on the diagonal", partial(times, own=lambda n: n + 1), OWN),
        Mistake("a sum without the entry itself", partial(times, total=lambda x: x.cumsum(0) - x), OWN),
        Mistake("A transposed", partial(times, total=lambda x: x.flip(0).cumsum(0).flip(0)), "h_n hears k ≤ n."),
        Mistake("the sum of all", partial(times, total=lambda x: x.sum()), "A state never listens to a later one."),
        Mistake("a plus before the sum", partial(times, sign=1)),
        Mistake("the sign of A turned round", lambda h: -times(h), "A has −1, −2, ... on the diagonal."),
        Mistake("n counted from 1", partial(times, start=1), FIRST),
        Mistake("one of the two roots missing", partial(times, outer=torch.ones_like), ROOT),
        Mistake("one of the two roots missing", partial(times, inner=torch.ones_like), ROOT),
    ),
    hints=(
        "Look at A on and below the diagonal. Of which two vectors is it nearly the outer product?",
        "A = −tril(b bᵀ) + diag(n) with b_n = √(2n+1), for −(n+1) = −(2n+1) + n. What does tril(b bᵀ) do to h?",
        "n = torch.arange(N); b = torch.sqrt(2·n + 1), in h's dtype; return n·h − b·torch.cumsum(b·h, dim=0).",
    ),
)


def heard(A, B, delta, length):
    """(N, length): column l is what a held input of age l has left in the state."""
    return hippo.project(torch.eye(length, dtype=F64)[0], delta, A, B).T


def memories():
    K = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=F64)
    yield Case("one state, which hears one age", K=K[:1], sigma=0.5)
    yield Case("two states, which hear one age each", K=K, sigma=0.3)
    yield Case("LegS without 1/t", K=heard(*hippo.legs(3), 0.2, 5), sigma=0.05)
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 3, generator=random, dtype=F64) - 2.5 * torch.eye(3, dtype=F64), torch.ones(3, dtype=F64)
    yield Case("a random A", K=heard(A, B, 0.3, 7), sigma=0.1)
    yield Case("a random A", K=heard(A, 40 * B, 0.3, 4), sigma=0.02)


def ridge(K, sigma, noise=lambda sigma: sigma**2, power=2):
    return solve(K @ K.T + noise(sigma) * torch.diag(K.norm(dim=1) ** power), K).T


SCALED = "If the rows of K are divided by their norms, divide the columns of D by them too."
NOISE = "State n is known up to σ|K_n|, so the variance of its error is (σ|K_n|)²."
decoder = Exercise(
    name="decoder",
    asks="decoder(K, sigma) -> D (L, N): D (K x + noise) is the best guess of an uncorrelated past x",
    formula="Asked is D = Kᵀ (K Kᵀ + σ² diag(|K_0|², |K_1|², ...))⁻¹, with |K_n| the norm of row n.",
    see="03 §7",
    reference=ridge,
    inputs=memories,
    results=("D",),
    sizes={"N": ("K", 0), "L": ("K", 1)},
    tolerance=1e-6,
    mistakes=(
        Mistake("a noise of σ for every state", partial(ridge, power=0), NOISE),
        Mistake("σ in place of σ²", partial(ridge, noise=lambda sigma: sigma), NOISE),
        Mistake("the norm in place of its square", partial(ridge, power=1), NOISE),
        Mistake("the noise left out", lambda K, sigma: torch.linalg.pinv(K), NOISE),
        Mistake("the root mean square of a row", lambda K, sigma: ridge(K, sigma / K.shape[1] ** 0.5), NOISE),
        Mistake("rows scaled and not scaled back", lambda K, sigma: ridge(K, sigma) * K.norm(dim=1), SCALED),
        Mistake("rows scaled back twice", lambda K, sigma: ridge(K, sigma) / K.norm(dim=1), SCALED),
        Mistake("K transposed alone", lambda K, sigma: K.T.clone(), "States that are alike must be told apart."),
        Mistake("D transposed", lambda K, sigma: ridge(K, sigma).T, "D makes L numbers of N."),
        Mistake("the oldest age first", lambda K, sigma: ridge(K, sigma).flip(0)),
    ),
    hints=(
        "The best linear guess is E[x hᵀ] E[h hᵀ]⁻¹. With h = K x + noise and E[x xᵀ] = I, what are the two?",
        "E[x hᵀ] = Kᵀ and E[h hᵀ] = K Kᵀ + the noise's variances on the diagonal, (σ |K_n|)².",
        "noise = (sigma * K.norm(dim=1))**2; return torch.linalg.solve(K @ K.T + torch.diag(noise), K).T.",
    ),
)

hint, picture = helpers(legs, redraw, remember, legs_times, decoder)
