"""Checks of chapter 01: half-lives, what is left of yesterday, stability, the exact solution, e^A by hand."""

import math
from functools import partial

import torch
from torch.linalg import det, eig, eigvals, eigvalsh, matrix_power, solve

from minimamba import continuous_ssm
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.continuous_ssm import mass_spring
from minimamba.discretization import matrix_exp

F64, F32, LN2 = torch.float64, torch.float32, math.log(2)


def matrix(*rows, dtype=F64):
    return torch.tensor(rows, dtype=dtype)


def drawn(size, seed, rate=-0.3, dtype=F64):
    """A general matrix whose slowest mode has the real part `rate`, and two vectors."""
    random = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=random, dtype=F64)
    A = A - (eigvals(A).real.max() - rate) * torch.eye(size, dtype=F64)
    vectors = torch.randn(2, size, generator=random, dtype=F64)
    return A.to(dtype), *vectors.to(dtype)


def systems():
    """Fading, growing, swinging; eigenvalues that the diagonal does not show."""
    yield Case("one state that fades", A=matrix([-0.25]))
    yield Case("one state that grows", A=matrix([0.5]))
    yield Case("one state that stays", A=matrix([0.0]))
    yield Case("a fast and a slow state", A=matrix([-0.5, 0.0], [0.0, -3.0]))
    for fade, grow in ((-2.0, 0.5), (-0.5, 2.0)):
        yield Case("one state fades, one grows", A=matrix([fade, 0.0], [0.0, grow]))
    for rate, note in ((-0.3, "that fades"), (0.3, "that grows"), (0.0, "for ever")):
        yield Case(f"a swing {note}", A=matrix([rate, 1.5], [-1.5, rate]))
    yield Case("a mass on a spring", A=mass_spring(1, 1, 0.4)[0])
    yield Case("stable, but it grows before it fades", A=matrix([-0.5, 9.0], [0.0, -0.8]))
    yield Case("a positive entry on the diagonal, and stable", A=matrix([0.5, 2.0], [-3.0, -2.0]))
    for size, seed, rate, dtype in ((3, 1, -0.4, F64), (3, 2, 0.2, F64), (4, 3, -0.05, F32), (5, 4, -1.5, F64)):
        yield Case(f"{size} states, a random matrix", A=drawn(size, seed, rate, dtype)[0])


def rates(A):
    return eigvals(A).real


def over(rate):
    return float(LN2 / rate)


def halves_in(rate):
    return LN2 / -float(rate) if rate < 0 else math.inf


RHYTHM = "Re λ says how fast a mode fades, Im λ is its rhythm."
half_life = Exercise(
    name="half_life",
    asks="half_life(A) -> the time in which the slowest mode of h′ = A h halves, a number; math.inf if one never fades",
    formula="Asked is ln 2 / −σ with σ the largest real part of A's eigenvalues, and infinity for σ ≥ 0.",
    see="01 §3",
    reference=continuous_ssm.half_life,
    inputs=systems,
    results=("half-life",),
    sizes={"N": ("A", 0)},
    tolerance=1e-5,
    mistakes=(
        Mistake("a finite time for a state that never fades", lambda A: over(rates(A).max().abs())),
        Mistake("a finite time for a state that never fades", lambda A: LN2 / -rates(A).max().item()),
        Mistake("a finite time for a state that never fades", lambda A: over(-rates(A).max())),
        Mistake("the sign turned round", lambda A: over(rates(A).max()), "Rates are negative, times are not."),
        Mistake("the sign turned round", lambda A: -halves_in(rates(A).max()), "Rates are negative, times are not."),
        Mistake("the fastest mode", lambda A: halves_in(rates(A).min()), "In the end the slowest one remains."),
        Mistake("the fastest mode", lambda A: over(rates(A).abs().max()), "In the end the slowest one remains."),
        Mistake("ln 2 forgotten", lambda A: halves_in(rates(A).max()) / LN2, "After 1/−σ a state has fallen to 1/e."),
        Mistake("2 in place of ln 2", lambda A: halves_in(rates(A).max()) * 2 / LN2),
        Mistake("|λ| in place of the real part", lambda A: over(eigvals(A).abs().min()), RHYTHM),
        Mistake("|λ| in place of the real part", lambda A: over(eigvals(A).abs().max()), RHYTHM),
        Mistake("the diagonal in place of the eigenvalues", lambda A: halves_in(A.diagonal().max())),
        Mistake("a time for each mode", lambda A: LN2 / -rates(A), "Only the slowest is asked for."),
        Mistake("the first eigenvalue", lambda A: halves_in(rates(A)[0]), "They come in no order: take the largest."),
    ),
    hints=(
        "Every mode has the size e^{σt}, with σ the real part of its eigenvalue. Which one is left in the end?",
        "The largest σ belongs to the slowest mode. Solve e^{σt} = 1/2, and ask what holds for σ ≥ 0.",
        "s = torch.linalg.eigvals(A).real.max().item(); return math.log(2) / -s if s < 0 else math.inf.",
    ),
)


FADED = 2 ** (-24 / 10)
cups = Exercise(
    name="cups",
    asks="the level in mg just after a cup, in the long run: 90 mg every 24 hours, half-life 10 hours",
    formula="Asked is 90 (1 + r + r² + ...) = 90 / (1 − r) with r = 2^(−24/10), what is left of a cup after a day.",
    see="01 §1",
    reference=90 / (1 - FADED),
    inputs=None,
    kind="value",
    results=("level",),
    tolerance=1e-3,
    mistakes=(
        Mistake("yesterday forgotten", 90.0, "Each day begins with what is left: h₀ is not zero."),
        Mistake("the newest cup left out", 90 * FADED / (1 - FADED), "That is the level just before it."),
        Mistake("one day before today only", 90 * (1 + FADED), "The day before yesterday left something too."),
        Mistake("e in place of 2", 90 / (1 - math.exp(-2.4)), "The rate is a = −ln 2 / 10 per hour."),
        Mistake("the ratio upside down", 90 / (1 - 2 ** (-10 / 24)), "24 hours are 2.4 half-lives."),
    ),
    hints=(
        "Just after a cup there is this cup, and what is left of yesterday's, and of that of the day before, ...",
        "After 24 hours a cup has been halved 2.4 times. Call what is left r: the sum is 90 (1 + r + r² + ...).",
        "r = 2 ** (-24 / 10); level = 90 / (1 - r).",
    ),
)


def four_times(answer, A):
    """Yes or no says little: two mistakes often agree. So the answer is asked about A's neighbours too."""
    shift = 0.45 * torch.eye(len(A), dtype=A.dtype)
    return tuple(answer(X) for X in (A, A + shift, A - shift, -A))


stable = Exercise(
    name="stable",
    asks="stable(A) -> True if every state of h′ = A h fades to zero, else False",
    formula="Asked is whether every eigenvalue has a negative real part.",
    see="01 §3",
    reference=continuous_ssm.is_stable,
    inputs=systems,
    run=four_times,
    results=("stable(A)", "stable(A + 0.45 I)", "stable(A − 0.45 I)", "stable(−A)"),
    sizes={"N": ("A", 0)},
    mistakes=(
        Mistake("one negative real part taken for enough", lambda A: bool((rates(A) < 0).any()), "All count."),
        Mistake("0 counted as negative", lambda A: bool((rates(A) <= 0).all()), "At 0 nothing fades."),
        Mistake("the sign turned round", lambda A: bool((rates(A) > 0).all()), "e^{σt} fades for σ < 0."),
        Mistake("yes and no swapped", lambda A: bool((rates(A) >= 0).any())),
        Mistake("|λ| < 1", lambda A: bool((eigvals(A).abs() < 1).all()), "That is for steps, h_k = Ā h_{k−1}."),
        Mistake("the diagonal in place of the eigenvalues", lambda A: bool((A.diagonal() < 0).all())),
        Mistake("the trace alone", lambda A: bool(A.trace() < 0), "One of the eigenvalues it adds up may be positive."),
        Mistake("the trace and the determinant", lambda A: bool(A.trace() < 0 < det(A)), "That holds for 2 × 2 only."),
        Mistake("the eigenvalues of A + Aᵀ", lambda A: bool((eigvalsh(A + A.T) < 0).all()), "It may grow at first."),
        Mistake("torch.linalg.eigvalsh", lambda A: bool((eigvalsh(A) < 0).all()), "That is for a symmetric A."),
        Mistake("every matrix called stable", lambda A: True),
        Mistake("an answer for each mode", lambda A: rates(A) < 0, "Return one for all of them: .all()."),
        Mistake("no swinging allowed", lambda A: bool(rates(A).max() < 0) and not eigvals(A).imag.any(), RHYTHM),
        Mistake("the first eigenvalue", lambda A: bool(rates(A)[0] < 0), "All of them count."),
    ),
    hints=(
        "Along an eigenvector the state is e^{λt}. When does that fade, and which part of λ decides?",
        "torch.linalg.eigvals(A) is complex. Look at .real, of all of them. What about a real part of exactly 0?",
        "return bool((torch.linalg.eigvals(A).real < 0).all()).",
    ),
)


def held():
    """An input held at the number x until t; h₀ is never zero, t never 1."""
    B, h = torch.tensor([[2.0], [-1.0]], dtype=F64)
    yield Case("one state", A=matrix([-0.5]), B=B, x=3.0, t=1.6, h=h)
    A, h = mass_spring(1, 1, 0.4)[0], torch.tensor([1.0, -0.5], dtype=F64)
    for t, note in ((1.5, "a mass on a spring"), (0.0, "a mass on a spring at t = 0")):
        yield Case(note, A=A, B=torch.tensor([0.0, 1.0], dtype=F64), x=2.0, t=t, h=h)
    for seed, (size, x, t, dtype) in enumerate([(2, -0.7, 0.3, F64), (3, 1.4, 2.5, F64), (3, 0.6, 0.8, F32)], 5):
        A, B, h = drawn(size, seed, -0.3, dtype)
        yield Case(f"{size} states, a random matrix", A=A, B=B, x=x, t=t, h=h)
    A, B, h = drawn(5, 8)
    yield Case("5 states, after a long time", A=A, B=B, x=-2.0, t=40.0, h=h)


def eye(A):
    return torch.eye(len(A), dtype=A.dtype)


def solution(A, B, x, t, h, exp=matrix_exp, one=eye, free=1, sign=1):
    E = exp(t * A)
    return free * (E @ h) + sign * solve(A, (E - one(A)) @ B * x)


def faded(A, t, h):
    return matrix_exp(t * A) @ h


def driven(A, B, x, t):
    return solution(A, B, x, t, 0 * B)


FADES = "What was there at the start fades by e^{At}. It neither vanishes nor stays."
ENTRIES = "torch.matrix_exp is meant: I + At + (At)²/2 + ... with matrix products."
INTEGRAL = "The integral of e^{As} over s is A⁻¹(e^{At} − I)."
SIGN = "A stable A has negative rates already: the exponent is At."
PUSH = "The input flows in from 0 to t, and its early part has faded more than its late part."
state = Exercise(
    name="state",
    asks="state(A, B, x, t, h) -> h(t) (N,) of h′ = A h + B x from h(0) = h, the input held at the number x",
    formula="Asked is h(t) = e^{At} h₀ + A⁻¹(e^{At} − I) B x.",
    see="01 §4",
    reference=solution,
    inputs=held,
    results=("h(t)",),
    sizes={"N": ("A", 0)},
    mistakes=(
        Mistake("the exponential entry by entry", partial(solution, exp=torch.exp), ENTRIES, "01 §2"),
        Mistake("the sign of A turned round", partial(solution, exp=lambda tA: matrix_exp(-tA)), SIGN),
        Mistake("the sign of A turned round", lambda A, B, x, t, h: solution(-A, B, x, t, h), SIGN),
        Mistake("the sign of A turned round", lambda A, B, x, t, h: faded(-A, t, h) + driven(A, B, x, t), SIGN),
        Mistake("the sign of A turned round", lambda A, B, x, t, h: faded(A, t, h) + driven(-A, B, x, t), SIGN),
        Mistake("h₀ dropped", partial(solution, free=0), FADES),
        Mistake("h₀ not faded", lambda A, B, x, t, h: h + driven(A, B, x, t), FADES),
        Mistake("the input dropped", lambda A, B, x, t, h: faded(A, t, h)),
        Mistake("the minus I forgotten", partial(solution, one=lambda A: 0 * A), "At t = 0 no input has come in yet."),
        Mistake("1 in place of I", partial(solution, one=lambda A: 1), "I is torch.eye(N)."),
        Mistake("I − e^{At} in place of e^{At} − I", partial(solution, sign=-1)),
        Mistake("A⁻¹ missing", lambda A, B, x, t, h: faded(A, t, h) + A @ driven(A, B, x, t), INTEGRAL),
        Mistake("an input that does not fade", lambda A, B, x, t, h: faded(A, t, h) + t * B * x, PUSH),
        Mistake("the whole input at the start", lambda A, B, x, t, h: faded(A, t, h + B * x), PUSH),
        Mistake("the whole input at the start", lambda A, B, x, t, h: faded(A, t, h + t * B * x), PUSH),
        Mistake("the whole input at the end", lambda A, B, x, t, h: faded(A, t, h) + B * x, PUSH),
        Mistake("the state in the long run", lambda A, B, x, t, h: -solve(A, B * x), "At t it is still on the way."),
        Mistake("A transposed", lambda A, B, x, t, h: solution(A.T, B, x, t, h), "Use A as it is."),
        Mistake("A transposed", lambda A, B, x, t, h: faded(A.T, t, h) + driven(A, B, x, t)),
        Mistake("t missing", lambda A, B, x, t, h: solution(A, B, x, 1.0, h), "A is a rate: At is what counts."),
    ),
    hints=(
        "Two parts: what was there at the start, faded, and what came in since. Write e^{At} once, as E.",
        "With x constant the integral of e^{A(t−s)} over s is A⁻¹(e^{At} − I). torch.linalg.solve(A, v) is A⁻¹v.",
        "E = torch.matrix_exp(t·A); return E @ h + torch.linalg.solve(A, (E − torch.eye(N, dtype=A.dtype)) @ B·x).",
    ),
)


def exponents():
    """From 0, where a logarithm of the norm fails, to norms where the series alone drowns in rounding."""
    yield Case("A = 0", A=matrix([0.0]))
    yield Case("one number", A=matrix([-0.7]))
    yield Case("a nilpotent matrix", A=matrix([0.0, 0.5], [0.0, 0.0]))
    yield Case("a mass on a spring", A=mass_spring(1, 1, 3)[0])
    for size, seed, norm, dtype in ((2, 9, 0.3, F64), (3, 10, 2.5, F32), (3, 11, 2.5, F64), (4, 12, 6.0, F64)):
        A = drawn(size, seed)[0]
        yield Case(f"a random matrix of norm {norm:g}", A=(A * norm / torch.linalg.matrix_norm(A, 1)).to(dtype))
    yield Case("a mass on a spring, times 40: the norm is 160", A=40 * mass_spring(1, 1, 3)[0])


def series(A, terms=30, divide=True, product=torch.matmul, one=eye, power=None):
    term, total = eye(A), one(A)
    for n in range(1, terms + 1):
        term = product(term, A) / (n if divide else 1)
        total = total + (power(n) / float(math.factorial(n)) if power else term)
    return total


def squared(A, undo=lambda X, s: matrix_power(X, 2**s), **options):
    norm = torch.linalg.matrix_norm(A, 1).item()
    halvings = max(0, math.ceil(math.log2(norm))) if norm > 0 else 0
    return undo(series(A / 2**halvings, **options), halvings)


ALONE = "For a large A the terms grow to enormous size before they shrink. Halve A until its norm is below 1."
MANY = (9, 10, 14, 15, 19, 20, 24, 25, 29, 30, 31, 39, 40, 49, 50, 59, 60, 99, 100)  # terms that students choose
PRODUCTS = "A² is a matrix product, A @ A and not A * A."
UNDO = "e^A = (e^{A/2^s})^{2^s}: square s times, as matrices."
SHORT = "At a norm of 1 some 18 terms are needed for 16 digits."
exponential = Exercise(
    name="exponential",
    asks="exponential(A) -> e^A (N, N) without torch.matrix_exp, by the power series, for a large A too",
    formula="Asked is I + A + A²/2! + A³/3! + ..., with A halved s times first and the result squared s times.",
    see="01, exercise 2",
    reference=matrix_exp,
    inputs=exponents,
    results=("e^A",),
    sizes={"N": ("A", 0)},
    mistakes=(
        Mistake("the exponential entry by entry", torch.exp, PRODUCTS, "01 §2"),
        Mistake("powers entry by entry", lambda A: series(A, product=torch.mul), PRODUCTS),
        Mistake("powers entry by entry", lambda A: series(A, power=lambda n: A**n), PRODUCTS),
        Mistake("eigenvectors", lambda A: (lambda e, V: (V * e.exp() @ V.inverse()).real)(*eig(A)), "A may lack some."),
        Mistake("the identity left out", partial(squared, one=torch.zeros_like), "The series begins with I."),
        Mistake("1 in place of I", partial(squared, one=torch.ones_like), "I is torch.eye(N)."),
        Mistake("the factorials left out", partial(squared, divide=False), "The n-th term is divided by n!."),
        *(Mistake("a series cut off too early", partial(squared, terms=n), SHORT) for n in range(1, 13)),
        Mistake("the squaring left out", lambda A: squared(A, undo=lambda X, s: X), UNDO),
        Mistake("2^s times the result", lambda A: squared(A, undo=lambda X, s: X * 2**s), UNDO),
        Mistake("a power entry by entry", lambda A: squared(A, undo=lambda X, s: X ** (2**s)), UNDO),
        *(Mistake("the power series alone", partial(series, terms=n), ALONE) for n in MANY),
        Mistake("A transposed", lambda A: matrix_exp(A.T), "Use A as it is."),
        Mistake("the sign of A turned round", lambda A: matrix_exp(-A), "All terms have a plus."),
    ),
    hints=(
        "The series is exact, but not in floating point: at norm 160 a term reaches 10⁶⁸. For which A is it harmless?",
        "Halve A s times, until its norm is below 1. Sum the series, each term from the last. Then square s times.",
        "X = A, s = 0; while norm(X) > 1: X = X / 2, s += 1. total = term = I; for n = 1 ... 20: term = term @ X / n, "
        "total = total + term. Then s times: total = total @ total.",
    ),
)

hint, picture = helpers(half_life, cups, stable, state, exponential)
