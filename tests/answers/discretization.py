"""Answers to the exercises of chapter 02."""

import math

import numpy as np
import torch

from . import Answers

answers = Answers()


# bilinear


@answers.right("bilinear")
def by_solving(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    left = identity - delta / 2 * A
    return torch.linalg.solve(left, identity + delta / 2 * A), torch.linalg.solve(left, delta * B)


@answers.right("bilinear")
def by_inverse(A, B, delta):
    identity = torch.eye(A.shape[0], dtype=A.dtype)
    inverse = torch.inverse(identity - A * delta * 0.5)
    return inverse @ (identity + A * delta * 0.5), inverse @ B * delta


@answers.right("bilinear")
def column_by_column(A, B, delta):
    a, size = A.double(), len(A)
    left = torch.eye(size).double() - delta * a / 2
    columns = [torch.linalg.solve(left, torch.eye(size).double()[i] + delta * a[:, i] / 2) for i in range(size)]
    return torch.stack(columns, dim=1).to(A.dtype), torch.linalg.solve(left, delta * B.double()).to(A.dtype)


@answers.right("bilinear")
def in_place_on_a_copy(A, B, delta):
    half = A.clone()
    half *= delta / 2
    left, right = -half, half.clone()
    left.diagonal().add_(1)
    right.diagonal().add_(1)
    return [torch.linalg.solve(left, right), torch.linalg.solve(left, B.clone().mul_(delta))]


@answers.wrong("bilinear", "A transposed")
def transposed(A, B, delta):
    return by_solving(A.T, B, delta)


@answers.wrong("bilinear", "ΔA in place of ΔA/2")
def whole_step(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    inverse = torch.inverse(identity - delta * A)
    return inverse @ (identity + delta * A), inverse @ (delta * B)


@answers.wrong("bilinear", "B̄ = ΔB, without the inverse")
def input_not_solved(A, B, delta):
    return by_solving(A, B, delta)[0], B * delta


@answers.wrong("bilinear", "Δ missing in B̄")
def no_delta(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    left = identity - A * delta / 2
    return torch.linalg.solve(left, identity + A * delta / 2), torch.linalg.solve(left, B)


@answers.wrong("bilinear", "one Δ too many in B̄")
def two_deltas(A, B, delta):
    A_bar, B_bar = by_solving(A, B, delta)
    return A_bar, delta * B_bar


@answers.wrong("bilinear", "the two sides swapped")
def swapped(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    return tuple(torch.linalg.solve(identity + delta / 2 * A, x) for x in (identity - delta / 2 * A, delta * B))


@answers.wrong("bilinear", "Euler's rule")
def first_slope(A, B, delta):
    return torch.eye(len(A), dtype=A.dtype) + delta * A, delta * B


@answers.wrong("bilinear", "NumPy")
def in_numpy(A, B, delta):
    return tuple(x.numpy() for x in by_solving(A, B, delta))


@answers.wrong("bilinear", "changes its input")
def spoils_A(A, B, delta):
    A *= delta / 2
    identity = torch.eye(len(A), dtype=A.dtype)
    return torch.linalg.solve(identity - A, identity + A), torch.linalg.solve(identity - A, delta * B)


@answers.wrong("bilinear", "time")
def never_returns(A, B, delta):
    while True:
        pass


@answers.wrong("bilinear", "count")
def state_only(A, B, delta):
    return by_solving(A, B, delta)[0]


@answers.wrong("bilinear", "a division entry by entry")
def slash(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    return (identity + delta / 2 * A) / (identity - delta / 2 * A), by_solving(A, B, delta)[1]


# zoh


@answers.right("zoh")
def block_matrix(A, B, delta):
    size = len(A)
    system = torch.zeros(size + 1, size + 1, dtype=A.dtype)
    system[:size, :size] = A
    system[:size, size] = B
    step = torch.matrix_exp(delta * system)
    return step[:size, :size], step[:size, size]


@answers.right("zoh")
def by_series(A, B, delta):
    a = A.double() * delta / 2**10
    power, total = torch.eye(len(A)).double(), torch.zeros_like(a)
    for k in range(1, 12):
        total += power / math.factorial(k)  # (exp(a) - 1) / a
        power = power @ a
    A_bar = torch.eye(len(A)).double() + a @ total
    for _ in range(10):  # φ of twice the step: φ (exp + 1) / 2
        total = total @ (A_bar + torch.eye(len(A)).double()) / 2
        A_bar = A_bar @ A_bar
    return A_bar.to(A.dtype), (delta * total @ B.double()).to(A.dtype)


@answers.right("zoh")
def by_quadrature(A, B, delta):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s = torch.tensor((nodes + 1) / 2 * delta)
    exponentials = torch.matrix_exp(s[:, None, None] * A.double())
    B_bar = (torch.tensor(weights)[:, None] * (exponentials @ B.double())).sum(0) * delta / 2
    return torch.matrix_exp(A.double() * delta).to(A.dtype), B_bar.to(A.dtype)


@answers.wrong("zoh", "B̄ = ΔB")
def mamba(A, B, delta):
    return block_matrix(A, B, delta)[0], delta * B


@answers.wrong("zoh", "a division by A, which may be singular")
def with_the_inverse(A, B, delta):
    A_bar = torch.matrix_exp(delta * A)
    return A_bar, torch.inverse(A) @ (A_bar - torch.eye(len(A), dtype=A.dtype)) @ B


@answers.wrong("zoh", "the exponential entry by entry")
def entrywise(A, B, delta):
    A_bar = (A * delta).exp()
    return A_bar, torch.linalg.solve(A, (A_bar - torch.eye(len(A), dtype=A.dtype)) @ B)


@answers.wrong("zoh", "1 in place of I")
def one_for_identity(A, B, delta):
    A_bar = torch.matrix_exp(delta * A)
    return A_bar, torch.inverse(A) @ (A_bar - 1) @ B


@answers.wrong("zoh", "A transposed")
def zoh_transposed(A, B, delta):
    return block_matrix(A.T, B, delta)


@answers.wrong("zoh", "Δ missing")
def zoh_without_delta(A, B, delta):
    return block_matrix(A, B, 1)


@answers.wrong("zoh", "one Δ too many in B̄")
def zoh_two_deltas(A, B, delta):
    A_bar, B_bar = block_matrix(A, B, delta)
    return A_bar, B_bar * delta


@answers.wrong("zoh", "Δ divided out of B̄")
def mean_instead_of_integral(A, B, delta):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s = torch.tensor((nodes + 1) / 2 * delta)
    mean = (torch.tensor(weights / 2)[:, None, None] * torch.matrix_exp(s[:, None, None] * A.double())).sum(0)
    return block_matrix(A, B, delta)[0], (mean @ B.double()).to(B.dtype)


@answers.wrong("zoh", "Euler's rule")
def zoh_by_euler(A, B, delta):
    return first_slope(A, B, delta)


@answers.wrong("zoh", "the bilinear rule")
def zoh_by_tustin(A, B, delta):
    return by_inverse(A, B, delta)


@answers.wrong("zoh", "I − e^{ΔA} in place of e^{ΔA} − I")
def negative(A, B, delta):
    A_bar, B_bar = block_matrix(A, B, delta)
    return A_bar, -B_bar


@answers.wrong("zoh", "shape")
def B_as_column(A, B, delta):
    A_bar, B_bar = block_matrix(A, B, delta)
    return A_bar, B_bar[:, None]


@answers.wrong("zoh", "dtype")
def always_double(A, B, delta):
    return block_matrix(A.double(), B.double(), delta)


calls = []


@answers.wrong("zoh", "remembers")
def grows_with_each_call(A, B, delta):
    calls.append(delta)
    A_bar, B_bar = block_matrix(A, B, delta)
    return A_bar, B_bar * len(calls)


# zoh_limit


@answers.right("zoh_limit")
def double_where(A, B, delta):
    z = delta * A
    near = z.abs() < 1e-3
    safe = torch.where(near, 1.0, z)
    series = 1 + z / 2 + z**2 / 6
    return delta * B * torch.where(near, series, torch.expm1(safe) / safe)


@answers.right("zoh_limit")
def with_sinh(A, B, delta):
    z = delta * A / 2
    safe = torch.where(z == 0, torch.ones_like(z), z)
    ratio = torch.where(z.abs() < 1e-2, 1 + z**2 / 6 + z**4 / 120, torch.sinh(safe) / safe)
    return B * delta * torch.exp(z) * ratio


@answers.right("zoh_limit")
def mean_of_exponentials(A, B, delta):
    nodes, weights = np.polynomial.legendre.leggauss(30)
    s = torch.tensor((nodes + 1) / 2, dtype=A.dtype)[:, None] * delta
    return delta * B * (torch.tensor(weights / 2, dtype=A.dtype)[:, None] * torch.exp(s * A)).sum(0)


@answers.right("zoh_limit")
def one_state_at_a_time(A, B, delta):
    weights = []
    for a, b in zip(A, B, strict=True):
        z = delta * a
        if abs(z.item()) < 0.01:
            weights.append(b * delta * (1 + z / 2 * (1 + z / 3 * (1 + z / 4))))
        else:
            weights.append(b * torch.expm1(z) / a)
    return torch.stack(weights)


@answers.wrong("zoh_limit", "a division by zero at A = 0")
def quotient(A, B, delta):
    return B * (torch.exp(A * delta) - 1) / A


@answers.wrong("zoh_limit", "a division by zero at A = 0")
def quotient_with_expm1(A, B, delta):
    return B * torch.expm1(A * delta) / A


@answers.wrong("zoh_limit", "one `where` after the division")
def single_where(A, B, delta):
    return torch.where(A == 0, delta * B, torch.expm1(delta * A) / A * B)


@answers.wrong("zoh_limit", "a constant in place of φ at A = 0")
def flat_at_zero(A, B, delta):
    safe = torch.where(A == 0, torch.ones_like(A), A)
    return torch.where(A == 0, delta * B, B * torch.expm1(delta * safe) / safe)


@answers.wrong("zoh_limit", "B̄ = ΔB")
def limit_everywhere(A, B, delta):
    return B * delta


@answers.wrong("zoh_limit", "Δ missing")
def phi_of_A(A, B, delta):
    return double_where(A, B, 1.0)


@answers.wrong("zoh_limit", "a factor Δ missing")
def phi_alone(A, B, delta):
    return double_where(A, B, delta) / delta


@answers.wrong("zoh_limit", "the wrong sign of A")
def minus_A(A, B, delta):
    return double_where(-A, B, delta)


@answers.wrong("zoh_limit", "the series cut off after z/2")
def straight_line(A, B, delta):
    return delta * B + delta**2 * A * B / 2


@answers.wrong("zoh_limit", None)
def tiny_number_added(A, B, delta):
    return B * (torch.exp(delta * (A + 1e-12)) - 1) / (A + 1e-12)


for constant in ("1.0 -> 2.0", "1.0 -> 0.0"):
    reason = "It is the harmless input of the branch that is not taken."
    answers.equivalent("zoh_limit", constant, reason)
answers.equivalent(
    "zoh_limit",
    "z.abs() < 0.001 -> z.abs() <= 0.001",
    "At the border both branches are right.",
)


# twice

answers.right("twice")(-1.594)
answers.right("twice")(-1.5936242600400401)
answers.right("twice")(torch.tensor(-1.59362))
answers.right("twice")(np.float64(-1.5936))
answers.wrong("twice", "the sign of z lost")(1.594)
answers.wrong("twice", "e^z = 1/2")(math.log(0.5))
answers.wrong("twice", "φ(z) = 2")(1.25643)
answers.wrong("twice", "the series cut off after z/2")(-1)
answers.wrong("twice", "the half-life in steps")(0.43495)
answers.wrong("twice", "not written")(...)


# trapezoid


@answers.right("trapezoid")
def loop(A, B, delta, x, h):
    A_bar = torch.matrix_exp(delta * A)
    states = []
    for k in range(1, len(x)):
        h = A_bar @ h + delta / 2 * (A_bar @ B * x[k - 1] + B * x[k])
        states.append(h)
    return torch.stack(states)


@answers.right("trapezoid")
def half_before_half_after(A, B, delta, x, h):
    A_bar, out = torch.matrix_exp(delta * A.double()), []
    h = h.double()
    for before, after in zip(x[:-1].double(), x[1:].double(), strict=True):
        h = A_bar @ (h + delta * B.double() * before / 2) + delta * B.double() * after / 2
        out.append(h)
    return torch.stack(out).to(A.dtype)


@answers.right("trapezoid")
def sum_over_the_past(A, B, delta, x, h):
    size, steps = len(A), len(x) - 1
    A_bar = torch.matrix_exp(delta * A)
    states = torch.zeros(steps, size, dtype=A.dtype)
    for k in range(1, steps + 1):
        states[k - 1] = torch.matrix_power(A_bar, k) @ h
        for j in range(k + 1):
            weight = delta / 2 if j in (0, k) else delta
            states[k - 1] += weight * torch.matrix_power(A_bar, k - j) @ B * x[j]
    return states


@answers.wrong("trapezoid", "the old sample not decayed")
def mean_of_samples(A, B, delta, x, h):
    A_bar, states = torch.matrix_exp(delta * A), []
    for k in range(1, len(x)):
        h = A_bar @ h + delta * B * (x[k - 1] + x[k]) / 2
        states.append(h)
    return torch.stack(states)


@answers.wrong("trapezoid", "both samples decayed")
def decay_all(A, B, delta, x, h):
    A_bar, states = torch.matrix_exp(delta * A), []
    for k in range(1, len(x)):
        h = A_bar @ (h + delta * B * (x[k - 1] + x[k]) / 2)
        states.append(h)
    return torch.stack(states)


@answers.wrong("trapezoid", "the half missing")
def both_whole(A, B, delta, x, h):
    return loop(A, 2 * B, delta, x, h)


@answers.wrong("trapezoid", "the new sample decayed in place of the old one")
def on_the_wrong_term(A, B, delta, x, h):
    A_bar, states = torch.matrix_exp(delta * A), []
    for k in range(1, len(x)):
        h = A_bar @ h + delta / 2 * (B * x[k - 1] + A_bar @ B * x[k])
        states.append(h)
    return torch.stack(states)


@answers.wrong("trapezoid", "the new sample alone")
def zoh_euler(A, B, delta, x, h):
    A_bar, states = torch.matrix_exp(delta * A), []
    for sample in x[1:]:
        h = A_bar @ h + delta * B * sample
        states.append(h)
    return torch.stack(states)


@answers.wrong("trapezoid", "Δ missing in the input's weights")
def no_step_in_the_input(A, B, delta, x, h):
    return loop(A, B / delta, delta, x, h)


@answers.wrong("trapezoid", "the initial state dropped")
def from_zero(A, B, delta, x, h):
    return loop(A, B, delta, x, torch.zeros_like(h))


@answers.wrong("trapezoid", "the exponential entry by entry")
def entry_by_entry(A, B, delta, x, h):
    A_bar, states = torch.exp(delta * A), []
    for k in range(1, len(x)):
        h = A_bar @ h + delta / 2 * (A_bar @ B * x[k - 1] + B * x[k])
        states.append(h)
    return torch.stack(states)


@answers.wrong("trapezoid", "A transposed")
def other_way_round(A, B, delta, x, h):
    return loop(A.T, B, delta, x, h)


@answers.wrong("trapezoid", "the state before each step")
def kept_too_early(A, B, delta, x, h):
    A_bar, states = torch.matrix_exp(delta * A), []
    for k in range(1, len(x)):
        states.append(h)
        h = A_bar @ h + delta / 2 * (A_bar @ B * x[k - 1] + B * x[k])
    return torch.stack(states)


@answers.wrong("trapezoid", "shape")
def last_state_only(A, B, delta, x, h):
    return loop(A, B, delta, x, h)[-1]


@answers.wrong("trapezoid", "shape")
def with_the_start(A, B, delta, x, h):
    return torch.cat([h[None], loop(A, B, delta, x, h)])


@answers.wrong("bilinear", "backward Euler")
def _(A, B, delta):
    left = torch.eye(len(A), dtype=A.dtype) - delta * A
    return torch.linalg.inv(left), torch.linalg.solve(left, delta * B)
