"""Answers to the exercises of chapter 01."""

import math

import numpy as np
import torch

from . import Answers

answers = Answers()


# half_life


@answers.right("half_life")
def from_the_largest_real_part(A):
    rate = torch.linalg.eigvals(A).real.max().item()
    return math.log(2) / -rate if rate < 0 else math.inf


@answers.right("half_life")
def mode_by_mode(A):
    longest = 0.0
    for value in np.linalg.eigvals(A.numpy()):
        if value.real >= 0:
            return float("inf")
        longest = max(longest, math.log(0.5) / value.real)
    return longest


@answers.right("half_life")
def as_a_tensor(A):
    rates = -torch.linalg.eig(A.double())[0].real
    return torch.where(rates > 0, math.log(2) / rates, math.inf).max()


@answers.wrong("half_life", "a finite time for a state that never fades")
def no_question_asked(A):
    return math.log(2) / -max(torch.linalg.eigvals(A).real).item()


@answers.wrong("half_life", "a finite time for a state that never fades")
def absolute_value(A):
    rate = torch.linalg.eigvals(A).real.max()
    return np.log(2) / rate.abs()


@answers.wrong("half_life", "the sign turned round")
def minus_forgotten(A):
    rate = torch.linalg.eigvals(A).real.max().item()
    return math.log(2) / rate if rate < 0 else math.inf


@answers.wrong("half_life", "the fastest mode")
def quickest(A):
    rate = torch.linalg.eigvals(A).real.min().item()
    return math.log(2) / -rate if rate < 0 else math.inf


@answers.wrong("half_life", "ln 2 forgotten")
def time_constant(A):
    rate = torch.linalg.eigvals(A).real.max().item()
    return -1 / rate if rate < 0 else math.inf


@answers.wrong("half_life", "2 in place of ln 2")
def two_over_rate(A):
    rate = torch.linalg.eigvals(A).real.max().item()
    return 2 / -rate if rate < 0 else math.inf


@answers.wrong("half_life", "|λ| in place of the real part")
def modulus(A):
    return math.log(2) / torch.linalg.eigvals(A).abs().min().item() if A.norm() > 0 else math.inf


@answers.wrong("half_life", "the diagonal in place of the eigenvalues")
def from_the_diagonal(A):
    rate = A.diagonal().max().item()
    return math.log(2) / -rate if rate < 0 else math.inf


@answers.wrong("half_life", "the first eigenvalue")
def whichever_comes_first(A):
    rate = torch.linalg.eigvals(A)[0].real.item()
    return math.log(2) / -rate if rate < 0 else math.inf


@answers.wrong("half_life", "a time for each mode")
def a_time_for_each_mode(A):
    return math.log(2) / -torch.linalg.eigvals(A).real


@answers.wrong("half_life", "raises")
def compares_complex_numbers(A):
    return math.log(2) / -max(torch.linalg.eigvals(A).tolist(), key=lambda value: value < 0)


# cups

answers.right("cups")(90 / (1 - 0.5**2.4))
answers.right("cups")(111.04)
answers.right("cups")(sum(90 * 2 ** (-24 * day / 10) for day in range(100)))
answers.right("cups")(torch.tensor(111.0))
answers.wrong("cups", "yesterday forgotten")(90)
answers.wrong("cups", "the newest cup left out")(21.04)
answers.wrong("cups", "one day before today only")(107.05)
answers.wrong("cups", "e in place of 2")(98.98)
answers.wrong("cups", "the ratio upside down")(90 / (1 - 0.5 ** (10 / 24)))
answers.wrong("cups", None)(180.0)
answers.wrong("cups", "not written")(...)
answers.wrong("cups", "type")("111 mg")


# stable


@answers.right("stable")
def all_negative(A):
    return bool((torch.linalg.eigvals(A).real < 0).all())


@answers.right("stable")
def largest_negative(A):
    return np.linalg.eigvals(A.numpy()).real.max() < 0


@answers.right("stable")
def one_by_one(A):
    for value in torch.linalg.eigvals(A).tolist():  # noqa: SIM110
        if value.real >= 0:
            return False
    return True


@answers.right("stable")
def with_a_long_time(A):
    # Lyapunov: A is stable exactly if Aᵀ P + P A = −I has a positive definite solution.
    size, one = len(A), torch.eye(len(A), dtype=torch.float64)
    left = torch.kron(A.double().T.contiguous(), one) + torch.kron(one, A.double().T.contiguous())
    P, singular = torch.linalg.solve_ex(left, -one.flatten())
    return bool(singular == 0 and torch.linalg.eigvalsh(P.reshape(size, size)).min() > 0)


@answers.wrong("stable", "one negative real part taken for enough")
def any_of_them(A):
    return bool(torch.linalg.eigvals(A).real.min() < 0)


@answers.wrong("stable", None)
def a_border_at_one(A):
    return bool((torch.linalg.eigvals(A).real < 1).all())


@answers.wrong("stable", "0 counted as negative")
def not_growing(A):
    return not bool((torch.linalg.eigvals(A).real > 0).any())


@answers.wrong("stable", "the sign turned round")
def all_positive(A):
    return bool(torch.linalg.eigvals(A).real.min() > 0)


@answers.wrong("stable", "yes and no swapped")
def unstable(A):
    return not all_negative(A)


@answers.wrong("stable", "|λ| < 1")
def inside_the_circle(A):
    return bool(torch.linalg.eigvals(A).abs().max() < 1)


@answers.wrong("stable", "the diagonal in place of the eigenvalues")
def diagonal(A):
    return all(A[n, n].item() < 0 for n in range(len(A)))


@answers.wrong("stable", "the trace and the determinant")
def two_by_two(A):
    return bool(torch.trace(A) < 0 and torch.linalg.det(A) > 0)


@answers.wrong("stable", "the trace alone")
def sum_of_eigenvalues(A):
    return bool(torch.linalg.eigvals(A).sum().real < 0)


@answers.wrong("stable", "the eigenvalues of A + Aᵀ")
def shrinks_at_once(A):
    return bool(torch.linalg.eigvalsh((A + A.T) / 2)[-1] < 0)


@answers.wrong("stable", "every matrix called stable")
def optimist(A):
    return True


@answers.wrong("stable", "an answer for each mode")
def one_for_each(A):
    return torch.linalg.eigvals(A).real < 0


@answers.wrong("stable", "type")
def forgets_to_return(A):
    all_negative(A)


# state


@answers.right("state")
def two_parts(A, B, x, t, h):
    E = torch.matrix_exp(t * A)
    return E @ h + torch.linalg.solve(A, (E - torch.eye(len(A), dtype=A.dtype)) @ B * x)


@answers.right("state")
def input_as_a_state(A, B, x, t, h):
    size = len(A)
    system = torch.zeros(size + 1, size + 1, dtype=A.dtype)
    system[:size, :size], system[:size, size] = A, B
    return (torch.matrix_exp(t * system) @ torch.cat([h, torch.tensor([x], dtype=A.dtype)]))[:size]


@answers.right("state")
def distance_to_rest(A, B, x, t, h):
    rest = -torch.inverse(A) @ (B * x)
    away = h.clone()
    away -= rest
    return rest + torch.matrix_exp(A * t) @ away


@answers.right("state")
def mode_after_mode(A, B, x, t, h):
    values, V = torch.linalg.eig(A.double())
    start, push = (torch.linalg.solve(V, v.double().to(V.dtype)) for v in (h, B))
    modes = [torch.exp(z * t) * a + (torch.exp(z * t) - 1) / z * b * x for z, a, b in zip(values, start, push)]  # noqa: B905
    return (V @ torch.stack(modes)).real.to(A.dtype)


@answers.wrong("state", "the exponential entry by entry")
def elementwise(A, B, x, t, h):
    E = (t * A).exp()
    return E @ h + torch.inverse(A) @ (E - torch.eye(len(A)).to(A)) @ B * x


@answers.wrong("state", "the sign of A turned round")
def lost_sign(A, B, x, t, h):
    E = torch.matrix_exp(-t * A)
    return E @ h + torch.linalg.solve(A, (E - torch.eye(len(A)).to(A)) @ B * x)


@answers.wrong("state", "the sign of A turned round")
def lost_sign_in_both(A, B, x, t, h):
    return input_as_a_state(-A, B, x, t, h)


@answers.wrong("state", "h₀ dropped")
def from_rest(A, B, x, t, h):
    return input_as_a_state(A, B, x, t, torch.zeros_like(h))


@answers.wrong("state", "h₀ not faded")
def start_added(A, B, x, t, h):
    return h + from_rest(A, B, x, t, h)


@answers.wrong("state", "the minus I forgotten")
def no_identity(A, B, x, t, h):
    E = torch.matrix_exp(t * A)
    return E @ h + torch.linalg.solve(A, E @ B * x)


@answers.wrong("state", "1 in place of I")
def minus_one(A, B, x, t, h):
    E = torch.matrix_exp(t * A)
    return E @ h + torch.linalg.solve(A, (E - 1) @ B * x)


@answers.wrong("state", "A⁻¹ missing")
def not_integrated(A, B, x, t, h):
    E = torch.matrix_exp(t * A)
    return E @ h + E @ B * x - B * x


@answers.wrong("state", "an input that does not fade")
def rectangle(A, B, x, t, h):
    return torch.matrix_exp(t * A) @ h + B * x * t


@answers.wrong("state", "the whole input at the start")
def one_push(A, B, x, t, h):
    return torch.matrix_exp(t * A) @ (h + B * x)


@answers.wrong("state", "A transposed")
def from_the_left(A, B, x, t, h):
    E = torch.matrix_exp(t * A)
    return h @ E + torch.linalg.solve(A, (E - torch.eye(len(A)).to(A)) @ B * x)


@answers.wrong("state", "t missing")
def after_one_second(A, B, x, t, h):
    return input_as_a_state(A, B, x, 1, h)


@answers.wrong("state", "the state in the long run")
def at_rest(A, B, x, t, h):
    return torch.linalg.solve(-A, B) * x


@answers.wrong("state", None)
def coarse_steps(A, B, x, t, h):
    for _ in range(100):
        h = h + t / 100 * (A @ h + B * x)
    return h


@answers.wrong("state", "changes its input")
def in_place(A, B, x, t, h):
    rest = -torch.inverse(A) @ (B * x)
    h -= rest
    return rest + torch.matrix_exp(A * t) @ h


@answers.wrong("state", "shape")
def a_column(A, B, x, t, h):
    return two_parts(A, B, x, t, h)[:, None]


# exponential


@answers.right("exponential")
def halve_and_square(A):
    halvings = 8
    X = A / 2**halvings
    total = term = torch.eye(len(A), dtype=A.dtype)
    for n in range(1, 20):
        term = term @ X / n
        total = total + term
    for _ in range(halvings):
        total = total @ total
    return total


@answers.right("exponential")
def as_often_as_needed(A):
    X, squarings = A.clone(), 0
    while torch.linalg.matrix_norm(X, 1) > 1:
        X /= 2
        squarings += 1
    total = term = torch.eye(len(A), dtype=A.dtype)
    n = 1
    while term.abs().max() > 1e-18:
        term = term @ X / n
        total, n = total + term, n + 1
    return torch.linalg.matrix_power(total, 2**squarings)


@answers.right("exponential")
def with_a_logarithm(A):
    squarings = max(0, math.ceil(math.log2(max(A.abs().sum().item(), 1e-300))))
    X, one = A.double() / 2**squarings, torch.eye(len(A), dtype=torch.float64)
    total = one
    for n in range(25, 0, -1):  # Horner: I + X/1 (I + X/2 (I + ...))
        total = one + X @ total / n
    return torch.linalg.matrix_power(total, 2**squarings).to(A.dtype)


@answers.right("exponential")
def as_a_fraction(A):
    squarings = 12
    X = A.double() / 2**squarings
    one = torch.eye(len(A)).double()
    even, odd = one + X @ X / 10, X / 2 + X @ X @ X / 120
    total = torch.linalg.solve(even - odd, even + odd)
    for _ in range(squarings):
        total = total @ total
    return total.to(A.dtype)


@answers.right("exponential")
def with_numpy_inside(A):
    X, total = A.double().numpy() / 1024, np.eye(len(A))
    for n in range(18, 0, -1):
        total = np.eye(len(A)) + X @ total / n
    return torch.from_numpy(np.linalg.matrix_power(total, 1024)).to(A.dtype)


@answers.wrong("exponential", "the power series alone")
def thirty_terms(A):
    total = term = torch.eye(len(A), dtype=A.dtype)
    for n in range(1, 31):
        term = term @ A / n
        total = total + term
    return total


@answers.wrong("exponential", "the power series alone")
def fifty_powers(A):
    return sum(torch.linalg.matrix_power(A, n) / float(math.factorial(n)) for n in range(50))


@answers.wrong("exponential", "the exponential entry by entry")
def of_each_entry(A):
    return math.e**A


@answers.wrong("exponential", "powers entry by entry")
def entries_to_the_power(A):
    return torch.eye(len(A), dtype=A.dtype) + sum(A**n / float(math.factorial(n)) for n in range(1, 31))


@answers.wrong("exponential", "the identity left out")
def starts_with_A(A):
    return series_squared(A, first=1)


@answers.wrong("exponential", "the squaring left out")
def never_squared(A):
    return series_squared(A, square=False)


@answers.wrong("exponential", "the factorials left out")
def geometric(A):
    return series_squared(A, factorial=lambda n: 1)


@answers.wrong("exponential", "2^s times the result")
def multiplied_back(A):
    squarings = max(0, math.ceil(math.log2(torch.linalg.matrix_norm(A, 1)))) if A.any() else 0
    return series_squared(A, square=False) * 2**squarings


@answers.wrong("exponential", "a series cut off too early")
def third_order(A):
    return series_squared(A, last=3)


@answers.wrong("exponential", "raises")
def logarithm_of_zero(A):
    squarings = max(0, math.ceil(math.log2(torch.linalg.matrix_norm(A, 1).item())))
    return torch.linalg.matrix_power(fifty_powers(A / 2**squarings), 2**squarings)


@answers.wrong("exponential", "time")
def halves_for_ever(A):
    while A.abs().max() >= 0:
        A = A / 2
    return A


@answers.wrong("exponential", "A transposed")
def the_other_way(A):
    return halve_and_square(A.T)


@answers.wrong("exponential", "dtype")
def default_dtype(A):
    return halve_and_square(A.float())


def series_squared(A, first=0, last=30, square=True, factorial=math.factorial):
    norm = torch.linalg.matrix_norm(A, ord=1).item()
    squarings = max(0, math.ceil(math.log2(norm))) if norm > 0 else 0
    X = A / 2**squarings
    total = sum(torch.linalg.matrix_power(X, n) / float(factorial(n)) for n in range(first, last + 1))
    return torch.linalg.matrix_power(total, 2**squarings) if square else total


for constant in ("8 -> 9", "8 -> 7"):
    answers.equivalent("exponential", constant, "Halved 7 or 9 times the norm is small enough as well.")
for constant in ("20 -> 21", "20 -> 19"):
    answers.equivalent("exponential", constant, "The last term is far below the rounding error.")
answers.equivalent("exponential", "term @ X -> X @ term", "Powers of one matrix commute.")


@answers.wrong("exponential", "eigenvectors")
def _(A):
    values, vectors = torch.linalg.eig(A)
    return (vectors @ torch.diag(values.exp()) @ torch.linalg.inv(vectors)).real


@answers.right("exponential")
def exponential_by_recursion(A):
    if A.norm() > 0.5:
        half = exponential_by_recursion(A / 2)
        return half @ half
    one = torch.eye(len(A), dtype=A.dtype)
    result = one
    for n in range(16, 0, -1):
        result = one + A @ result / n
    return result
