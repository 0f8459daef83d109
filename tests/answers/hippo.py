"""Answers to the exercises of chapter 03."""

import math

import numpy as np
import torch

from . import Answers

answers = Answers()


# legs


@answers.right("legs")
def two_loops(N):
    A, B = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for n in range(N):
        for k in range(n):
            A[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
        A[n, n] = -(n + 1)
        B[n] = math.sqrt(2 * n + 1)
    return A, B


@answers.right("legs")
def outer_product(N):
    n = torch.arange(N).double()
    b = (2 * n + 1) ** 0.5
    return torch.diag(n) - torch.tril(b[:, None] * b[None, :]), b


@answers.right("legs")
def with_numpy(N):
    n = np.arange(N)
    root = np.sqrt(1.0 + 2 * n)
    A = np.where(n[:, None] > n, -np.outer(root, root), 0.0)
    np.fill_diagonal(A, -1.0 - n)
    return [torch.from_numpy(A), torch.from_numpy(root)]


def variant(N, start=0, diagonal=lambda n: -(n + 1), entry=lambda n, k: -(((2 * n + 1) * (2 * k + 1)) ** 0.5), B=None):
    count = range(start, start + N)
    rows = [[entry(n, k) if n > k else float(diagonal(n)) if n == k else 0.0 for k in count] for n in count]
    last = [B(n) if B else (2 * n + 1) ** 0.5 for n in count]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(last, dtype=torch.float64)


@answers.wrong("legs", "the sign of A turned round")
def plus(N):
    return variant(N, entry=lambda n, k: math.sqrt((2 * n + 1) * (2 * k + 1)), diagonal=lambda n: n + 1)


@answers.wrong("legs", "a plus below the diagonal")
def half_a_sign(N):
    return variant(N, entry=lambda n, k: math.sqrt((2 * n + 1) * (2 * k + 1)))


@answers.wrong("legs", "no √(2n+1) in A")
def ones_in_A(N):
    return variant(N, entry=lambda n, k: -1.0)


@answers.wrong("legs", "no √(2n+1) in B")
def B_not_scaled(N):
    return two_loops(N)[0], torch.ones(N, dtype=torch.float64)


@answers.wrong("legs", "no √(2n+1) in A and B")
def no_roots(N):
    return variant(N, entry=lambda n, k: -1.0, B=lambda n: 1.0)


@answers.wrong("legs", "2n+1 in B without the root")
def B_squared(N):
    return variant(N, B=lambda n: 2.0 * n + 1)


@answers.wrong("legs", "n and k counted from 1")
def from_one(N):
    return variant(N, start=1)


@answers.wrong("legs", "n counted from 1 in B")
def B_from_one(N):
    return two_loops(N)[0], torch.sqrt(2 * torch.arange(1, N + 1).double() + 1)


@answers.wrong("legs", "−n on the diagonal")
def singular(N):
    return variant(N, diagonal=lambda n: -n)


@answers.wrong("legs", "−(2n+1) on the diagonal")
def product_everywhere(N):
    b = two_loops(N)[1]
    return -torch.tril(torch.outer(b, b)), b


@answers.wrong("legs", "A transposed")
def upper_triangle(N):
    A, B = outer_product(N)
    return A.T, B


@answers.wrong("legs", "entries above the diagonal")
def full(N):
    A, B = outer_product(N)
    return A + torch.tril(A, -1).T, B


@answers.wrong("legs", "count")
def A_alone(N):
    return two_loops(N)[0]


@answers.wrong("legs", "dtype")
def default_dtype(N):
    return tuple(x.float() for x in two_loops(N))


@answers.wrong("legs", "shape")
def one_too_many(N):
    return two_loops(N + 1)


# redraw


@answers.right("redraw")
def by_recurrence(h, age, window):
    x = 1 - 2 * age / window
    P = [torch.ones_like(x), x]
    for n in range(1, len(h) - 1):
        P.append(((2 * n + 1) * x * P[n] - n * P[n - 1]) / (n + 1))
    total = torch.zeros_like(x)
    for n in range(len(h)):
        total = total + h[n] * math.sqrt(2 * n + 1) * P[n]
    return total


@answers.right("redraw")
def by_numpy(h, age, window):
    position = 1 - 2 * age.double().numpy() / window
    scaled = h.double().numpy() * np.sqrt(2 * np.arange(len(h)) + 1)
    return torch.from_numpy(np.polynomial.legendre.legval(position, scaled)).to(h.dtype)


@answers.right("redraw")
def by_binomials(h, age, window):
    # The shifted polynomials: P_n(1 − 2s) = Σ_k (−1)^k C(n, k) C(n + k, k) s^k.
    s = age.double() / window
    out = torch.zeros_like(s)
    for n, value in enumerate(h.tolist()):
        for k in range(n + 1):
            out += value * (2 * n + 1) ** 0.5 * (-1) ** k * math.comb(n, k) * math.comb(n + k, k) * s**k
    return out.to(h.dtype)


def drawing(h, age, position, scale=lambda n: math.sqrt(2 * n + 1)):
    coefficients = np.array([value * scale(n) for n, value in enumerate(h.double().tolist())])
    return torch.from_numpy(np.polynomial.legendre.legval(position(age.double()).numpy(), coefficients)).to(h.dtype)


@answers.wrong("redraw", "√(2n+1) missing")
def not_normalised(h, age, window):
    return drawing(h, age, lambda age: 1 - 2 * age / window, scale=lambda n: 1.0)


@answers.wrong("redraw", "2n+1 without the root")
def norm_squared(h, age, window):
    return drawing(h, age, lambda age: 1 - 2 * age / window, scale=lambda n: 2 * n + 1)


@answers.wrong("redraw", "time running backwards")
def from_the_past(h, age, window):
    return drawing(h, age, lambda age: 2 * age / window - 1)


@answers.wrong("redraw", "a position from 1 to 0")
def half_the_basis(h, age, window):
    return drawing(h, age, lambda age: 1 - age / window)


@answers.wrong("redraw", "the age not divided by the window")
def no_window(h, age, window):
    return drawing(h, age, lambda age: 1 - 2 * age)


@answers.wrong("redraw", "the basis of LegS without 1/t")
def warped(h, age, window):
    return drawing(h, age, lambda age: 2 * torch.exp(-age) - 1)


@answers.wrong("redraw", "P_{n+1} in place of P_n")
def order_off_by_one(h, age, window):
    x = 1 - 2 * age / window
    old, new, out = torch.ones_like(x), x, 0
    for n in range(len(h)):
        out = out + h[n] * math.sqrt(2 * n + 1) * new
        old, new = new, ((2 * n + 3) * x * new - (n + 1) * old) / (n + 2)
    return out


@answers.wrong("redraw", None)
def scaled_one_too_far(h, age, window):
    return drawing(h, age, lambda age: 1 - 2 * age / window, scale=lambda n: math.sqrt(2 * n + 3))


@answers.wrong("redraw", "NumPy")
def stays_in_numpy(h, age, window):
    return by_numpy(h, age, window).numpy()


@answers.wrong("redraw", "shape")
def terms_not_summed(h, age, window):
    terms = [drawing(h * (torch.arange(len(h)) == n), age, lambda age: 1 - 2 * age / window) for n in range(len(h))]
    return torch.stack(terms, dim=1)


@answers.wrong("redraw", "changes its input")
def position_in_place(h, age, window):
    age *= -2 / window
    age += 1
    return drawing(h, age, lambda x: x)


# remember


@answers.right("remember")
def step_by_step(u, A, B):
    N = len(A)
    identity, h = torch.eye(N, dtype=A.dtype), torch.zeros(N, dtype=A.dtype)
    h[0] = u[0]
    states = [h]
    for k in range(1, len(u)):
        A_bar = torch.matrix_exp(math.log((k + 1) / k) * A)
        h = A_bar @ h + torch.linalg.solve(A, (A_bar - identity) @ B * u[k])
        states.append(h)
    return torch.stack(states)


@answers.right("remember")
def towards_rest(u, A, B):
    # −A⁻¹B is the first unit vector: the state moves towards u_k times it.
    one = torch.eye(len(A), dtype=torch.float64)[0]
    states = torch.empty(len(u), len(A), dtype=torch.float64)
    states[0] = u[0].double() * one
    for k in range(1, len(u)):
        away = states[k - 1] - u[k].double() * one
        states[k] = u[k].double() * one + torch.matrix_exp(math.log1p(1 / k) * A.double()) @ away
    return states.to(u.dtype)


@answers.right("remember")
def projection_by_quadrature(u, A, B):
    # The definition: coefficients of a held signal in the orthonormal Legendre basis on [0, k + 1].
    N = len(A)
    nodes, weights = np.polynomial.legendre.leggauss(N + 1)
    scale = np.sqrt(2 * np.arange(N) + 1)
    rows = []
    for t in range(1, len(u) + 1):
        c = np.zeros(N)
        for s in range(t):
            position = 2 * (s + (1 + nodes) / 2) / t - 1
            basis = np.polynomial.legendre.legvander(position, N - 1) * scale
            c += u[s].item() * (weights / 2) @ basis / t
        rows.append(c)
    return torch.tensor(np.array(rows), dtype=u.dtype)


@answers.right("remember")
def with_one_more_state(u, A, B):
    size = len(A)
    system = torch.zeros(size + 1, size + 1, dtype=A.dtype)
    system[:size, :size], system[:size, size] = A, B
    h = torch.nn.functional.pad(u[:1], (0, size - 1))
    out = [h]
    for k, sample in enumerate(u[1:], start=1):
        out.append((torch.matrix_exp(math.log((k + 1) / k) * system) @ torch.cat([out[-1], sample[None]]))[:size])
    return torch.stack(out)


def steps(u, A, B, delta, start=None):
    h = torch.zeros_like(B)
    h[0] = u[0]
    h, states = h if start is None else start, []
    for k in range(len(u)):
        if k > 0:
            E = torch.matrix_exp(delta(k) * A)
            h = E @ h + torch.linalg.solve(A, E @ B - B) * u[k]
        states.append(h)
    return torch.stack(states)


@answers.wrong("remember", "the 1/t forgotten")
def time_invariant(u, A, B):
    return steps(u, A, B, lambda k: 1)


@answers.wrong("remember", "1/t held at the start of each step")
def one_over_k(u, A, B):
    return steps(u, A, B, lambda k: 1 / k)


@answers.wrong("remember", "1/t held at the end of each step")
def one_over_k_plus_one(u, A, B):
    return steps(u, A, B, lambda k: 1 / (k + 1))


@answers.wrong("remember", "a clock one step early")
def counts_from_one(u, A, B):
    return steps(u, A, B, lambda k: math.log(k + 2) - math.log(k + 1))


@answers.wrong("remember", "the first sample lost")
def starts_at_zero(u, A, B):
    return steps(u, A, B, lambda k: math.log((k + 1) / k), start=torch.zeros_like(B))


@answers.wrong("remember", "B u_0 as the first state")
def starts_with_B(u, A, B):
    return steps(u, A, B, lambda k: math.log((k + 1) / k), start=B * u[0])


@answers.wrong("remember", "the bilinear rule")
def tustin(u, A, B):
    one, h = torch.eye(len(A), dtype=A.dtype), torch.zeros_like(B)
    h[0] = u[0]
    states = [h]
    for k in range(1, len(u)):
        half = math.log((k + 1) / k) / 2 * A
        right = (one + half) @ states[-1] + math.log((k + 1) / k) * B * u[k]
        states.append(torch.linalg.solve(one - half, right))
    return torch.stack(states)


@answers.wrong("remember", "Euler's rule")
def slope_at_the_start(u, A, B):
    h = torch.zeros_like(B)
    h[0] = u[0]
    states = [h]
    for k in range(1, len(u)):
        states.append(states[-1] + math.log((k + 1) / k) * (A @ states[-1] + B * u[k]))
    return torch.stack(states)


@answers.wrong("remember", None)
def euler_on_the_plain_clock(u, A, B):
    h = torch.zeros_like(B)
    h[0] = u[0]
    states = [h]
    for k in range(1, len(u)):
        states.append(states[-1] + (A @ states[-1] + B * u[k]) / (k + 1))
    return torch.stack(states)


@answers.wrong("remember", "the sample before")
def late(u, A, B):
    return step_by_step(torch.cat([u[:1], u[:-1]]), A, B)


@answers.wrong("remember", "A transposed")
def other_triangle(u, A, B):
    return steps(u, A.T, B, lambda k: math.log((k + 1) / k))


@answers.wrong("remember", "the last state alone")
def last_one(u, A, B):
    return step_by_step(u, A, B)[-1]


@answers.wrong("remember", "the exponential entry by entry")
def entry_by_entry(u, A, B):
    h = torch.zeros_like(B)
    h[0] = u[0]
    states = [h]
    for k in range(1, len(u)):
        E = torch.exp(math.log((k + 1) / k) * A)
        states.append(E @ states[-1] + torch.linalg.solve(A, (E - torch.eye(len(A)).to(A)) @ B * u[k]))
    return torch.stack(states)


@answers.wrong("remember", "raises")
def divides_by_zero(u, A, B):
    return steps(u, A, B, lambda k: math.log(k / (k - 1)))


# legs_times


@answers.right("legs_times")
def running_sum(h):
    n = torch.arange(len(h), dtype=h.dtype)
    b = torch.sqrt(2 * n + 1)
    return n * h - b * torch.cumsum(b * h, dim=0)


@answers.right("legs_times")
def one_loop(h):
    total, out = 0.0, []
    for n, value in enumerate(h):
        root = math.sqrt(2 * n + 1)
        out.append(-root * total - (n + 1) * value)
        total = total + root * value
    return torch.stack(out)


@answers.right("legs_times")
def dense(h):
    return (outer_product(len(h))[0] @ h.double()).to(h.dtype)


@answers.right("legs_times")
def sum_of_those_before(h):
    n = torch.arange(len(h)).to(h.dtype)
    b = (2 * n + 1).sqrt()
    before = (b * h).cumsum(0).roll(1)
    before[0] = 0
    return -(n + 1) * h - b * before


@answers.wrong("legs_times", "−(2n+1) on the diagonal")
def diagonal_forgotten(h):
    b = (2 * torch.arange(len(h)).double() + 1).sqrt().to(h.dtype)
    return -b * torch.cumsum(b * h, 0)


@answers.wrong("legs_times", "−(3n+2) on the diagonal")
def diagonal_twice(h):
    n = torch.arange(len(h), dtype=h.dtype)
    b = torch.sqrt(2 * n + 1)
    return -(n + 1) * h - b * torch.cumsum(b * h, dim=0)


@answers.wrong("legs_times", "a sum without the entry itself")
def exclusive(h):
    n = torch.arange(len(h), dtype=h.dtype)
    b = torch.sqrt(2 * n + 1)
    return n * h - b * (torch.cumsum(b * h, dim=0) - b * h)


@answers.wrong("legs_times", "A transposed")
def from_the_end(h):
    n = torch.arange(len(h), dtype=h.dtype)
    b = torch.sqrt(2 * n + 1)
    return n * h - b * (b * h).flip(0).cumsum(0).flip(0)


@answers.wrong("legs_times", "n counted from 1")
def n_from_one(h):
    n = torch.arange(1, len(h) + 1, dtype=h.dtype)
    b = torch.sqrt(2 * n + 1)
    return n * h - b * torch.cumsum(b * h, dim=0)


@answers.wrong("legs_times", "the sum of all")
def full_sum(h):
    n = torch.arange(len(h), dtype=h.dtype)
    b = torch.sqrt(2 * n + 1)
    return n * h - b * torch.dot(b, h)


@answers.wrong("legs_times", "the sign of A turned round")
def minus_A(h):
    return -one_loop(h)


@answers.wrong("legs_times", "one of the two roots missing")
def one_root(h):
    n = torch.arange(len(h), dtype=h.dtype)
    return n * h - torch.cumsum(torch.sqrt(2 * n + 1) * h, dim=0)


@answers.wrong("legs_times", "dtype")
def always_double(h):
    return outer_product(len(h))[0] @ h.double()


# decoder


@answers.right("decoder")
def normal_equations(K, sigma):
    noise = (sigma * K.norm(dim=1)) ** 2
    return torch.linalg.solve(K @ K.T + torch.diag(noise), K).T


@answers.right("decoder")
def singular_values(K, sigma):
    scale = K.norm(dim=1)
    U, s, Vh = torch.linalg.svd(K / scale[:, None], full_matrices=False)
    return Vh.T * (s / (s**2 + sigma**2)) @ U.T / scale


@answers.right("decoder")
def least_squares(K, sigma):
    # Minimise |D K − I|² + |D diag(noise)|²: one least-squares problem with more columns.
    N, L = K.shape
    wide = torch.cat([K, sigma * torch.diag(K.square().sum(1).sqrt())], dim=1)  # (N, L + N)
    target = torch.cat([torch.eye(L), torch.zeros(L, N)], dim=1).to(K.dtype)
    return torch.linalg.lstsq(wide.T, target.T).solution.T


@answers.wrong("decoder", "a noise of σ for every state")
def plain_ridge(K, sigma):
    return K.T @ torch.inverse(K @ K.T + sigma**2 * torch.eye(len(K)).to(K))


@answers.wrong("decoder", "a noise of σ for every state")
def plain_ridge_of_columns(K, sigma):
    return torch.linalg.solve(K.T @ K + sigma**2 * torch.eye(K.shape[1]).to(K), K.T)


@answers.wrong("decoder", "σ in place of σ²")
def not_squared(K, sigma):
    return K.T @ torch.inverse(K @ K.T + sigma * torch.diag((K * K).sum(1)))


@answers.wrong("decoder", "the norm in place of its square")
def scale_not_squared(K, sigma):
    return K.T @ torch.inverse(K @ K.T + sigma**2 * torch.diag(K.norm(dim=1)))


@answers.wrong("decoder", "the noise left out")
def pseudo_inverse(K, sigma):
    return K.T @ torch.inverse(K @ K.T)


@answers.wrong("decoder", "rows scaled and not scaled back")
def for_another_state(K, sigma):
    scaled = K / K.norm(dim=1, keepdim=True)
    return scaled.T @ torch.inverse(scaled @ scaled.T + sigma**2 * torch.eye(len(K)).to(K))


@answers.wrong("decoder", "K transposed alone")
def transpose(K, sigma):
    return 1.0 * K.T


@answers.wrong("decoder", "D transposed")
def wrong_way_round(K, sigma):
    return singular_values(K, sigma).T


@answers.wrong("decoder", "the root mean square of a row")
def variance_of_a_row(K, sigma):
    noise = sigma**2 * K.square().mean(1)
    return torch.linalg.solve(K @ K.T + torch.diag(noise), K).T


@answers.wrong("decoder", None)
def noise_in_the_wrong_place(K, sigma):
    return torch.linalg.solve(K @ K.T + sigma**2 * K.norm() ** 2 * torch.eye(len(K)).to(K), K).T


for size in ("len(h) - 1 -> len(h) + 1", "len(h) - 1 -> len(h)", "1 -> 0, place 3"):
    answers.equivalent("redraw", size, "The recurrence runs further, to polynomials that nobody uses.")
answers.equivalent("legs_times", "0 -> -1", "A vector has one axis, which is the first and the last.")
