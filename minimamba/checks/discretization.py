"""Checks of chapter 02: two rules, the limit A -> 0, where ΔB is twice too large, order 2."""

import math

import torch

from minimamba import discretization
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._guard import gradients
from minimamba.checks._help import helpers
from minimamba.discretization import bilinear as tustin
from minimamba.discretization import exprel, matrix_exp


def stable(size, seed, dtype=torch.float64):
    """A general matrix (nothing symmetric) with eigenvalues left of zero, and a vector B with random signs."""
    random = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=random, dtype=torch.float64)
    A = A - (torch.linalg.eigvals(A).real.max() + 0.3) * torch.eye(size, dtype=torch.float64)
    return A.to(dtype), torch.randn(size, generator=random, dtype=torch.float64).to(dtype)


def systems():
    """Dense systems: small and large steps, none of them 1, since Δ = 1 hides a missing Δ."""
    yield Case("one state", A=torch.tensor([[-0.5]]).double(), B=torch.tensor([2.0]).double(), delta=3.0)
    A = torch.tensor([[-0.5, 2.0], [-1.0, -0.8]], dtype=torch.float64)
    yield Case("a large step", A=A, B=torch.tensor([1.0, -0.3], dtype=torch.float64), delta=1.7)
    double, single = torch.float64, torch.float32
    for seed, (size, delta, dtype) in enumerate(
        [(2, 0.003, double), (3, 0.4, double), (3, 0.7, single), (4, 0.02, single), (5, 2.5, double)]
    ):
        A, B = stable(size, seed, dtype)
        yield Case(f"{size} states, a random matrix", A=A, B=B, delta=delta)


def systems_and_singular_ones():
    yield from systems()
    force = torch.tensor([0.0, 1.0], dtype=torch.float64)
    free = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    yield Case("a mass that floats freely: A is singular", A=free, B=force, delta=2.0)
    pair = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    yield Case("two tanks that exchange water: A is singular", A=pair, B=force, delta=0.8)


def _eye(A):
    return torch.eye(len(A), dtype=A.dtype)


def _slash(A, B, delta):
    return (_eye(A) + delta / 2 * A) / (_eye(A) - delta / 2 * A), tustin(A, B, delta)[1]


def _inverted(A, B, delta, exp=matrix_exp, one=_eye):
    A_bar = exp(delta * A)
    return A_bar, torch.linalg.solve(A, (A_bar - one(A)) @ B)


def _entries(A, B, delta):
    return torch.exp(delta * A), discretization.zoh(A, B, delta)[1]


def _early(A, B, delta):
    return matrix_exp(delta * A), delta * matrix_exp(delta * A) @ B


bilinear = Exercise(
    name="bilinear",
    asks="bilinear(A, B, delta) -> (A_bar, B_bar), dense A (N, N), B (N,)",
    formula="Asked is Ā = (I − ΔA/2)⁻¹(I + ΔA/2) and B̄ = (I − ΔA/2)⁻¹ΔB.",
    see="02 §1",
    reference=discretization.bilinear,
    inputs=systems,
    results=("A_bar", "B_bar"),
    sizes={"N": ("A", 0)},
    mistakes=(
        Mistake("A transposed", lambda A, B, d: tustin(A.T, B, d), "Use A as it is."),
        Mistake("ΔA in place of ΔA/2", lambda A, B, d: tustin(2 * A, B, d)),
        Mistake("B̄ = ΔB, without the inverse", lambda A, B, d: (tustin(A, B, d)[0], d * B)),
        Mistake("Δ missing in B̄", lambda A, B, d: tustin(A, B / d, d), "The input acts for a time Δ."),
        Mistake("one Δ too many in B̄", lambda A, B, d: tustin(A, d * B, d)),
        Mistake("B̄ half as large", lambda A, B, d: tustin(A, B / 2, d), "x_k stands at both ends: two halves are one."),
        Mistake("Δ missing in Ā and B̄", lambda A, B, d: tustin(A, B, 1.0), "A is a rate: ΔA is one step."),
        Mistake("the two sides swapped", lambda A, B, d: tustin(-A, B, d), "What multiplies h_k has the minus."),
        Mistake("Euler's rule", discretization.euler, "Euler takes the slope at the start only."),
        Mistake("backward Euler", lambda A, B, d: tuple((_eye(A) - d * A).inverse() @ x for x in (_eye(A), d * B))),
        Mistake("zero-order hold", discretization.zoh),
        Mistake("a division entry by entry", _slash, "An inverse matrix is meant: torch.linalg.solve."),
    ),
    hints=(
        "Write h_k = h_{k−1} + Δ/2 · (A h_{k−1} + A h_k) + Δ B x_k and bring all h_k to the left.",
        "(I − ΔA/2) h_k = (I + ΔA/2) h_{k−1} + ΔB x_k. One matrix on the left serves both results.",
        "left = I − Δ/2·A; A_bar = torch.linalg.solve(left, I + Δ/2·A); B_bar = torch.linalg.solve(left, Δ·B).",
    ),
)


SINGULAR = "The integral exists for every A, A⁻¹ does not: take one exponential of [[A, B], [0, 0]]."
ENTRIES = "torch.matrix_exp is meant: I + ΔA + (ΔA)²/2 + ... with matrix products."
zoh = Exercise(
    name="zoh",
    asks="exact zero-order hold, zoh(A, B, delta) -> (A_bar, B_bar), for any dense A (N, N), singular ones too",
    formula="Exact ZOH is asked: Ā = e^{ΔA} and B̄ = ∫₀^Δ e^{sA} ds B, which is A⁻¹(e^{ΔA} − I)B where A⁻¹ exists.",
    see="02 §1",
    reference=discretization.zoh,
    inputs=systems_and_singular_ones,
    results=("A_bar", "B_bar"),
    sizes={"N": ("A", 0)},
    mistakes=(
        Mistake("B̄ = ΔB", discretization.zoh_euler, "That is Mamba's rule, ZOH-Euler.", "02 §6"),
        Mistake("a division by A, which may be singular", _inverted, SINGULAR, "02 §2"),
        Mistake("the exponential entry by entry", lambda A, B, d: _inverted(A, B, d, exp=torch.exp), ENTRIES, "01 §4"),
        Mistake("the exponential entry by entry", _entries, ENTRIES, "01 §4"),
        Mistake("1 in place of I", lambda A, B, d: _inverted(A, B, d, one=lambda A: 1), "I is torch.eye(N)."),
        Mistake("the minus I forgotten", lambda A, B, d: _inverted(A, B, d, one=lambda A: 0)),
        Mistake("A transposed", lambda A, B, d: discretization.zoh(A.T, B, d), "Use A as it is."),
        Mistake("Δ missing", lambda A, B, d: discretization.zoh(A, B, 1.0), "A is a rate: ΔA is one step."),
        Mistake(
            "one Δ too many in B̄", lambda A, B, d: discretization.zoh(A, d * B, d), "The integral has one already."
        ),
        Mistake("Δ divided out of B̄", lambda A, B, d: discretization.zoh(A, B / d, d), "(ΔA)⁻¹ goes with ΔB."),
        Mistake("I − e^{ΔA} in place of e^{ΔA} − I", lambda A, B, d: discretization.zoh(A, -B, d)),
        Mistake("B̄ = Δ e^{ΔA} B", _early, "There the whole input enters at the start."),
        Mistake("the bilinear rule", discretization.bilinear),
        Mistake("Euler's rule", discretization.euler),
        Mistake("the sign of A", lambda A, B, d: discretization.zoh(-A, B, d), "A stable A needs no further minus."),
    ),
    hints=(
        "A held input is one more state, whose derivative is zero.",
        "The larger system is [[A, B], [0, 0]], of size N + 1. What are the first N rows of its matrix exponential?",
        "M = zeros(N+1, N+1); M[:N, :N] = A; M[:N, N] = B; E = torch.matrix_exp(Δ·M); return E[:N, :N], E[:N, N].",
    ),
)


def diagonals():
    """A = 0 first; then from so near to zero that a quotient loses its digits to states that forget at once."""
    f64 = torch.float64
    yield Case("A = 0", A=torch.zeros(1, dtype=f64), B=torch.tensor([3.0], dtype=f64), delta=0.5)
    yield Case("A = 0", A=torch.zeros(1), B=torch.tensor([-2.0]), delta=0.25)
    yield Case("one fast state", A=torch.tensor([-4.0], dtype=f64), B=torch.tensor([1.5], dtype=f64), delta=0.5)
    for A in (-1e-8, -1e-5, -1e-3, -1e-2, -0.1):
        yield Case(f"a slow state, A = {A:g}", A=torch.tensor([A], dtype=f64), B=torch.ones(1, dtype=f64), delta=0.5)
    A, B = torch.tensor([-0.3, 0.0, -2.0, -16.0]), torch.tensor([1.0, -1.5, 2.0, 0.5])
    yield Case("four states, one of them at A = 0", A=A, B=B, delta=0.4)
    yield Case("four states, one of them at A = 0", A=A.double(), B=B.double(), delta=2.5)


def with_gradient(answer, A, B, delta):
    """B̄ and the gradient of its sum by A."""
    B_bar = answer(A.requires_grad_(), B, delta)
    if not isinstance(B_bar, torch.Tensor):
        return B_bar, None
    return B_bar, *gradients(B_bar.sum(), [A])


def _patched(A, B, delta, safe=lambda z: z):
    z = delta * A
    return delta * B * torch.where(z == 0, 1.0, torch.expm1(safe(z)) / safe(z))


def _flat(A, B, delta):
    return _patched(A, B, delta, safe=lambda z: torch.where(z == 0, 1.0, z))


DIVISION = "0/0 is NaN, with expm1 too, though the limit is ΔB."
zoh_limit = Exercise(
    name="zoh_limit",
    asks="the input's weight B̄ under exact ZOH for diagonal A (N,), down to A = 0, and its gradient",
    formula="Asked is ΔB·φ(ΔA) with φ(z) = (e^z − 1)/z, whose value at 0 is 1 and whose slope there is 1/2.",
    see="02 §5",
    reference=lambda A, B, delta: discretization.zoh_diagonal(A, B, delta)[1],
    inputs=diagonals,
    run=with_gradient,
    results=("B_bar", "gradient of B_bar.sum() by A"),
    sizes={"N": ("A", 0)},
    tolerance=1e-5,
    mistakes=(
        Mistake("a division by zero at A = 0", lambda A, B, d: (torch.exp(d * A) - 1) / A * B, DIVISION),
        Mistake("a division by zero at A = 0", lambda A, B, d: d * B * (torch.exp(d * A) - 1) / (d * A), DIVISION),
        Mistake("a division by zero at A = 0", lambda A, B, d: torch.expm1(d * A) / A * B, DIVISION),
        Mistake("a division by zero at A = 0", lambda A, B, d: d * B * torch.expm1(d * A) / (d * A), DIVISION),
        Mistake(
            "one `where` after the division", _patched, "The gradient is 0 times infinity, from the branch not taken."
        ),
        Mistake(
            "a constant in place of φ at A = 0", _flat, "The value is right, but a constant has no slope: 1 + z/2."
        ),
        Mistake("B̄ = ΔB", lambda A, B, d: d * B, "That is Mamba's rule, φ = 1.", "02 §6"),
        Mistake("Δ missing", lambda A, B, d: exprel(A) * B, "A is a rate: ΔA is one step."),
        Mistake("a factor Δ missing", lambda A, B, d: exprel(d * A) * B, "The input acts for a time Δ."),
        Mistake("one Δ too many", lambda A, B, d: d * d * exprel(d * A) * B),
        Mistake("the wrong sign of A", lambda A, B, d: d * exprel(-d * A) * B),
        Mistake("the series cut off after z/2", lambda A, B, d: d * B * (1 + d * A / 2), "It holds near zero only."),
    ),
    hints=(
        "What is φ(z) = (e^z − 1)/z near zero? Write down the first terms of its series.",
        "`where` sends a gradient of 0 into the branch not taken, and 0 times infinity is NaN. So put 1 in place of z "
        "*before* the division wherever z is small, and choose the result afterwards.",
        "near = z.abs() < 1e-3; safe = torch.where(near, 1.0, z); φ = torch.where(near, 1 + z/2 + z²/6 + z³/24, "
        "torch.expm1(safe) / safe).",
    ),
)


Z_TWICE = -1.5936242600400401
twice = Exercise(
    name="twice",
    asks="the z = ΔA < 0 where Mamba's ΔB is twice the exact B̄, to three decimals",
    formula="Asked is the z < 0 with (e^z − 1)/z = 1/2.",
    see="02 §6",
    reference=Z_TWICE,
    inputs=None,
    kind="value",
    results=("z",),
    tolerance=4e-4,
    mistakes=(
        Mistake("the sign of z lost", -Z_TWICE, "A state that fades has A < 0."),
        Mistake("e^z = 1/2", -math.log(2), "There the state halves in a step, which is another question."),
        Mistake("φ(z) = 2", 1.2564312086, "There ΔB is half of the exact B̄, not twice."),
        Mistake("the series cut off after z/2", -1.0, "1 + z/2 = 1/2 holds at −1, but φ is no straight line."),
        Mistake("the half-life in steps", math.log(2) / -Z_TWICE, "ln 2 / |z| comes after z itself."),
    ),
    hints=(
        "Exact ZOH is ΔB times φ(ΔA). So for which z is φ(z) = (e^z − 1)/z one half?",
        "There is no formula. φ rises from 0 at −∞ to 1 at 0: halve an interval again and again.",
        "low, high = -50, 0; sixty times: middle = (low + high)/2; low = middle if φ < 1/2, else high = middle.",
    ),
)


def sampled():
    double, single = torch.float64, torch.float32
    for size, steps, delta, dtype in [
        (1, 1, 0.6, double),
        (2, 2, 1.3, double),
        (2, 5, 0.05, double),
        (3, 9, 0.4, single),
        (4, 12, 0.8, double),
    ]:
        A, B = stable(size, 10 + steps, dtype)
        random = torch.Generator().manual_seed(steps)
        x, h = torch.randn(steps + 1, generator=random).to(dtype), torch.randn(size, generator=random).to(dtype)
        yield Case(f"{steps + 1} samples", A=A, B=B, delta=delta, x=x, h=h)


def trapezoid_states(A, B, delta, x, h, old=1.0, new=1.0, exp=matrix_exp, decay_old=True, decay_new=False):
    """h_k = Ā h_{k−1} + Δ/2 (old Ā B x_{k−1} + new B x_k). The options are what can go wrong."""
    A_bar, states = exp(delta * A), []
    weight_old = delta / 2 * old * (A_bar @ B if decay_old else B)
    weight_new = delta / 2 * new * (A_bar @ B if decay_new else B)
    for k in range(1, len(x)):
        h = A_bar @ h + weight_old * x[k - 1] + weight_new * x[k]
        states.append(h)
    return torch.stack(states)


def _undo_delta(A, B, delta, x, h):
    return trapezoid_states(A, B / delta, delta, x, h)


def _too_early(A, B, delta, x, h):
    return torch.cat([h[None], trapezoid_states(A, B, delta, x, h)[:-1]])


def _but(**options):
    return lambda A, B, d, x, h: trapezoid_states(A, B, d, x, h, **options)


trapezoid = Exercise(
    name="trapezoid",
    asks="trapezoid(A, B, delta, x, h) -> the states h_1 ... h_L (L, N) from the samples x_0 ... x_L",
    formula="Asked is h_k = e^{ΔA} h_{k−1} + Δ/2 (e^{ΔA} B x_{k−1} + B x_k).",
    see="02, exercise 6",
    reference=trapezoid_states,
    inputs=sampled,
    results=("states",),
    sizes={"N": ("A", 0)},
    mistakes=(
        Mistake("the old sample not decayed", _but(decay_old=False), "It came a step ago and has faded by e^{ΔA}."),
        Mistake("the new sample decayed in place of the old one", _but(decay_old=False, decay_new=True)),
        Mistake("both samples decayed", _but(decay_new=True), "x_k comes at the end of the step: it has not faded."),
        Mistake("the half missing", _but(old=2.0, new=2.0), "Two samples share one step."),
        Mistake("Δ missing in the input's weights", _undo_delta, "A sample acts for half a step."),
        Mistake("Δ missing", lambda A, B, d, x, h: trapezoid_states(A, B, 1.0, x, h), "A is a rate: ΔA is one step."),
        Mistake("the new sample alone", _but(old=0.0, new=2.0), "That is ZOH-Euler, of order 1.", "02 §4"),
        Mistake("the old sample alone", _but(old=2.0, new=0.0), "That has order 1."),
        Mistake("the exponential entry by entry", _but(exp=torch.exp), "torch.matrix_exp is meant.", "01 §4"),
        Mistake("the initial state dropped", lambda A, B, d, x, h: trapezoid_states(A, B, d, x, 0 * h)),
        Mistake("A transposed", lambda A, B, d, x, h: trapezoid_states(A.T, B, d, x, h), "Use A as it is."),
        Mistake("the state before each step", _too_early, "The first row is h_1, after x_0 and x_1."),
    ),
    hints=(
        "A step needs two neighbouring samples, so L + 1 samples make L steps.",
        "The old sample came at the start of the step. What happens to whatever is in the state during the step?",
        "A_bar = torch.matrix_exp(Δ·A); for each k: h = A_bar @ h + Δ/2·(A_bar @ B·x[k−1] + B·x[k]); keep each h.",
    ),
)

hint, picture = helpers(bilinear, zoh, zoh_limit, twice, trapezoid)
