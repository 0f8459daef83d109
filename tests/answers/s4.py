"""Answers to the exercises of chapter 05."""

import cmath
import math

import numpy as np
import torch

from . import Answers

answers = Answers()


# vandermonde


@answers.right("vandermonde")
def three_lines(eigenvalues, B, C, delta, length):
    powers = torch.exp(delta * eigenvalues[:, None] * torch.arange(length))
    B_bar = (torch.exp(delta * eigenvalues) - 1) / eigenvalues * B
    return 2 * ((C * B_bar) @ powers).real


@answers.right("vandermonde")
def recurrence(eigenvalues, B, C, delta, length):
    A_bar = torch.exp(delta * eigenvalues.to(torch.complex128))
    state, kernel = (A_bar - 1) / eigenvalues * B, []
    for _ in range(length):
        kernel.append(2 * torch.sum(C * state).real)
        state = A_bar * state
    return torch.stack(kernel).to(eigenvalues.real.dtype)


@answers.right("vandermonde")
def whole_pairs(eigenvalues, B, C, delta, length):
    z, B, C = (torch.cat([x, x.conj()]) for x in (eigenvalues, B, C))
    weights = C * B * (torch.exp(delta * z) - 1) / z
    return torch.einsum("n,nl->l", weights, torch.exp(delta * z).unsqueeze(1) ** torch.arange(length)).real


@answers.right("vandermonde")
def with_sine_and_cosine(eigenvalues, B, C, delta, length):
    out = torch.zeros(length, dtype=torch.float64)
    for z, b, c in zip(eigenvalues.tolist(), B.tolist(), C.tolist(), strict=True):
        weight = c * b * (cmath.exp(delta * z) - 1) / z
        for lag in range(length):
            size, angle = math.exp(delta * z.real * lag), delta * z.imag * lag
            out[lag] += 2 * size * (weight.real * math.cos(angle) - weight.imag * math.sin(angle))
    return out.to(eigenvalues.real.dtype)


def lagged(eigenvalues, B, C, delta, lags):
    A_bar = torch.exp(delta * eigenvalues)
    return (C * B * (A_bar - 1) / eigenvalues) @ A_bar[:, None] ** lags


@answers.wrong("vandermonde", "2·Re missing")
def complex_kernel(eigenvalues, B, C, delta, length):
    return lagged(eigenvalues, B, C, delta, torch.arange(length))


@answers.wrong("vandermonde", "the 2 of 2·Re missing")
def half_of_it(eigenvalues, B, C, delta, length):
    return lagged(eigenvalues, B, C, delta, torch.arange(length)).real


@answers.wrong("vandermonde", "the Re of 2·Re missing")
def twice_and_complex(eigenvalues, B, C, delta, length):
    return 2 * lagged(eigenvalues, B, C, delta, torch.arange(length))


@answers.wrong("vandermonde", "the modulus in place of the real part")
def modulus(eigenvalues, B, C, delta, length):
    return 2 * lagged(eigenvalues, B, C, delta, torch.arange(length)).abs()


@answers.wrong("vandermonde", "Re taken before the product")
def reals_multiplied(eigenvalues, B, C, delta, length):
    A_bar = torch.exp(delta * eigenvalues)
    weights = C * B * (A_bar - 1) / eigenvalues
    return (2 * weights.real[:, None] * (A_bar[:, None] ** torch.arange(length)).real).sum(0)


@answers.wrong("vandermonde", "Δ not applied to A")
def rates_as_powers(eigenvalues, B, C, delta, length):
    B_bar = (torch.exp(delta * eigenvalues) - 1) / eigenvalues * B
    return 2 * ((C * B_bar) @ torch.exp(eigenvalues[:, None] * torch.arange(length))).real


@answers.wrong("vandermonde", "λ^l as the powers")
def no_exponential(eigenvalues, B, C, delta, length):
    kernel, power = [], C * B * (torch.exp(delta * eigenvalues) - 1) / eigenvalues
    for _ in range(length):
        kernel.append(2 * power.sum().real)
        power = power * eigenvalues
    return torch.stack(kernel)


@answers.wrong("vandermonde", "Δ missing everywhere")
def step_of_one(eigenvalues, B, C, delta, length):
    return recurrence(eigenvalues, B, C, 1, length)


@answers.wrong("vandermonde", "C not conjugated like λ and B")
def inner_product(eigenvalues, B, C, delta, length):
    state = (torch.exp(delta * eigenvalues) - 1) / eigenvalues * B
    return torch.stack([2 * torch.vdot(C, state * torch.exp(delta * eigenvalues * n)).real for n in range(length)])


@answers.wrong("vandermonde", "C not conjugated like λ and B")
def C_not_conjugated(eigenvalues, B, C, delta, length):
    # The partners of each state, with the same C for both.
    z, B, C = torch.cat([eigenvalues, eigenvalues.conj()]), torch.cat([B, B.conj()]), torch.cat([C.conj(), C])
    return lagged(z, B, C, delta, torch.arange(length)).real


@answers.wrong("vandermonde", "B not conjugated like λ and C")
def B_conjugated(eigenvalues, B, C, delta, length):
    return three_lines(eigenvalues, B.conj(), C, delta, length)


@answers.wrong("vandermonde", "λ not conjugated like B and C")
def turns_backwards(eigenvalues, B, C, delta, length):
    return three_lines(eigenvalues.conj(), B, C, delta, length)


@answers.wrong("vandermonde", "B̄ = ΔB")
def mambas_rule(eigenvalues, B, C, delta, length):
    return 2 * ((C * delta * B) @ torch.exp(delta * eigenvalues[:, None] * torch.arange(length))).real


@answers.wrong("vandermonde", "the first value left out")
def starts_late(eigenvalues, B, C, delta, length):
    return 2 * lagged(eigenvalues, B, C, delta, torch.arange(1, length + 1)).real


@answers.wrong("vandermonde", "powers from 1 down")
def falling_powers(eigenvalues, B, C, delta, length):
    return 2 * lagged(eigenvalues, B, C, delta, torch.arange(length - 1, -1, -1)).real


@answers.wrong("vandermonde", "the bilinear rule")
def bilinear_rule(eigenvalues, B, C, delta, length):
    below = 1 - delta * eigenvalues / 2
    state, A_bar, out = delta * B / below, (1 + delta * eigenvalues / 2) / below, []
    for _ in range(length):
        out.append(2 * (C * state).sum().real)
        state = state * A_bar
    return torch.stack(out)


@answers.wrong("vandermonde", "shape")
def the_matrix(eigenvalues, B, C, delta, length):
    return torch.exp(delta * eigenvalues[:, None] * torch.arange(length)).real


# halves


@answers.right("halves")
def upper_half(A, B, C):
    eigenvalues, V = torch.linalg.eig(A)
    B, C = torch.linalg.solve(V, B.to(V.dtype)), C.to(V.dtype) @ V
    keep = eigenvalues.imag >= 0
    weight = torch.where(eigenvalues.imag > 0, 2.0, 1.0)
    return eigenvalues[keep], B[keep], (weight * C)[keep]


@answers.right("halves")
def lower_half(A, B, C):
    eigenvalues, V = torch.linalg.eig(A)
    inverse = torch.linalg.inv(V)
    kept = [n for n in range(len(A)) if eigenvalues[n].imag <= 0]
    weight = torch.tensor([1 if eigenvalues[n].imag == 0 else 2 for n in kept])
    return eigenvalues[kept], weight * (inverse @ B.to(V.dtype))[kept], (C.to(V.dtype) @ V)[kept]


@answers.right("halves")
def all_weight_in_C(A, B, C):
    eigenvalues, V = np.linalg.eig(A.double().numpy().astype(complex))
    # NumPy is given a complex matrix here, and then the real eigenvalues are real up to rounding only.
    real = np.abs(eigenvalues.imag) < 1e-6
    keep = real | (eigenvalues.imag > 0)
    B_new = np.linalg.solve(V, B.double().numpy().astype(complex))
    C_new = np.where(real, 1, 2) * (C.double().numpy() @ V) * B_new
    return [torch.from_numpy(x[keep]) for x in (eigenvalues, np.ones_like(B_new), C_new)]


def chosen(A, B, C, keep, weight=lambda z: torch.where(z.imag == 0, 1.0, 2.0)):
    z, V = torch.linalg.eig(A)
    B, C = torch.linalg.inv(V) @ B.to(V.dtype), V.T @ C.to(V.dtype)
    return z[keep(z)], B[keep(z)], (weight(z) * C)[keep(z)]


@answers.wrong("halves", "pairs without their factor 2")
def half_a_pair(A, B, C):
    return chosen(A, B, C, lambda z: z.imag >= 0, weight=lambda z: 1)


@answers.wrong("halves", "real states counted twice")
def two_for_all(A, B, C):
    return chosen(A, B, C, lambda z: z.imag >= 0, weight=lambda z: 2)


@answers.wrong("halves", "real states left out")
def only_pairs(A, B, C):
    return chosen(A, B, C, lambda z: z.imag > 0)


@answers.wrong("halves", "all states kept")
def everything(A, B, C):
    return chosen(A, B, C, lambda z: slice(None), weight=lambda z: 1)


@answers.wrong("halves", "Vᵀ B in place of V⁻¹ B")
def transposed(A, B, C):
    z, V = torch.linalg.eig(A)
    keep = z.imag >= 0
    return z[keep], (V.T @ B.to(V.dtype))[keep], (torch.where(z.imag > 0, 2, 1) * (C.to(V.dtype) @ V))[keep]


@answers.wrong("halves", "V* B in place of V⁻¹ B")
def taken_for_unitary(A, B, C):
    z, V = torch.linalg.eig(A)
    keep = z.imag >= 0
    return z[keep], (V.mH @ B.to(V.dtype))[keep], (torch.where(z.imag > 0, 2, 1) * (C.to(V.dtype) @ V))[keep]


@answers.wrong("halves", "C not conjugated like λ and B")
def partners_C(A, B, C):
    z, B, C = upper_half(A, B, C)
    return z, B, C.conj()


@answers.wrong("halves", "C not conjugated like λ and B")
def C_of_the_other_half(A, B, C):
    # Takes the lower half, turns λ and B to the upper one, and forgets C.
    z, B, C = lower_half(A, B, C)
    return z.conj(), B.conj(), C


@answers.wrong("halves", "C not taken to the new basis")
def old_C(A, B, C):
    z, V = torch.linalg.eig(A)
    keep, B = z.imag >= 0, torch.linalg.solve(V, B.to(V.dtype))
    return z[keep], B[keep], (C * torch.where(z.imag > 0, 2, 1))[keep].to(V.dtype)


@answers.wrong("halves", None)
def first_half(A, B, C):
    z, V = torch.linalg.eig(A)
    half = (len(A) + 1) // 2
    return z[:half], torch.linalg.solve(V, B.to(V.dtype))[:half], 2 * (C.to(V.dtype) @ V)[:half]


@answers.wrong("halves", "raises")
def dtypes_not_matched(A, B, C):
    z, V = torch.linalg.eig(A)
    return z, torch.linalg.solve(V, B), C @ V


@answers.wrong("halves", "raises")
def C_left_out(A, B, C):
    return upper_half(A, B, C)[:2]


# woodbury


@answers.right("woodbury")
def two_sums(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    PB, PP = (P.conj() * R * b).sum(), (P.conj() * R * P).sum()
    return R * b - R * P * PB / (1 + PP)


@answers.right("woodbury")
def dense(eigenvalues, P, s, b):
    A = torch.diag(eigenvalues) - P[:, None] * P.conj()[None, :]
    return torch.linalg.solve(s * torch.eye(len(b)).to(A) - A, b)


@answers.right("woodbury")
def for_the_overlap_first(eigenvalues, P, s, b):
    # With a = P* x: (s − λ) x = b − P a, so a = P* R b − P* R P a.
    R = torch.reciprocal(s - eigenvalues)
    overlap = torch.vdot(P, R * b) / (1 + torch.vdot(P, R * P))
    return R * (b - overlap * P)


@answers.wrong("woodbury", "PPᵀ in place of PP*")
def no_conjugate(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b - R * P * (P @ (R * b)) / (1 + P @ (R * P))


@answers.wrong("woodbury", "P not conjugated in P* R b")
def first_conjugate_lost(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b - R * P * torch.dot(P, R * b) / (1 + torch.vdot(P, R * P))


@answers.wrong("woodbury", "P not conjugated in P* R P")
def second_conjugate_lost(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b - R * P * torch.vdot(P, R * b) / (1 + (R * P**2).sum())


@answers.wrong("woodbury", "the conjugate of P on the wrong side")
def other_side(eigenvalues, P, s, b):
    A = torch.diag(eigenvalues) - torch.outer(P.conj(), P)
    return torch.linalg.solve(s * torch.eye(len(b)).to(A) - A, b)


@answers.wrong("woodbury", "P left out")
def diagonal(eigenvalues, P, s, b):
    return b / (s - eigenvalues)


@answers.wrong("woodbury", "a plus before the correction")
def corrects_the_wrong_way(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b + R * P * torch.vdot(P, R * b) / (1 + torch.vdot(P, R * P))


@answers.wrong("woodbury", "A = Λ + P P*")
def plus_low_rank(eigenvalues, P, s, b):
    A = torch.diag(eigenvalues) + torch.outer(P, P.conj())
    return torch.linalg.solve(s * torch.eye(len(b)).to(A) - A, b)


@answers.wrong("woodbury", "1 − P* R P in the denominator")
def minus_inside(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b - R * P * torch.vdot(P, R * b) / (1 - torch.vdot(P, R * P))


@answers.wrong("woodbury", "P* R P without the 1")
def one_forgotten(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b - R * P * torch.vdot(P, R * b) / torch.vdot(P, R * P)


@answers.wrong("woodbury", "s + λ in place of s − λ")
def other_sign_of_the_eigenvalues(eigenvalues, P, s, b):
    return two_sums(-eigenvalues, P, s, b)


@answers.wrong("woodbury", "products that are not summed")
def entry_by_entry(eigenvalues, P, s, b):
    R = 1 / (s - eigenvalues)
    return R * b - R * P * (P.conj() * R * b) / (1 + P.abs() ** 2 * R)


@answers.wrong("woodbury", "A − s I in place of s I − A")
def other_order(eigenvalues, P, s, b):
    A = torch.diag(eigenvalues) - torch.outer(P, P.conj())
    return torch.linalg.solve(A - s * torch.eye(len(b)).to(A), b)


@answers.wrong("woodbury", "changes its input")
def in_place(eigenvalues, P, s, b):
    x = two_sums(eigenvalues, P, s, b)
    b *= 0
    return x


# turned


@answers.right("turned")
def point_by_point(A_bar, B_bar, C, length, turn):
    A_bar, B_bar, C = (x.to(torch.complex128) for x in (A_bar, B_bar, C))
    identity, k = torch.eye(len(A_bar)), torch.arange(length)
    z = torch.exp(-2j * math.pi * (k + turn) / length)
    z_L = cmath.exp(-2j * math.pi * turn)
    row = C @ (identity - z_L * torch.linalg.matrix_power(A_bar, length))
    K_hat = torch.stack([row @ torch.linalg.solve(identity - point * A_bar, B_bar) for point in z])
    return (torch.fft.ifft(K_hat) * torch.exp(2j * math.pi * turn * k / length)).real


@answers.right("turned")
def by_definition(A_bar, B_bar, C, length, turn):
    return torch.stack([C @ torch.linalg.matrix_power(A_bar, lag) @ B_bar for lag in range(length)])


@answers.right("turned")
def sum_for_the_transform(A_bar, B_bar, C, length, turn):
    A, B, C, dtype = A_bar.double() + 0j, B_bar.double() + 0j, C.double() + 0j, A_bar.dtype
    angle = 2 * np.pi * (torch.arange(length).double() + turn) / length
    z = torch.polar(torch.ones_like(angle), -angle)
    inverse = torch.linalg.inv(torch.eye(len(A)) - z[:, None, None] * A)
    values = (inverse @ B) @ (C - z[0] ** length * C @ torch.linalg.matrix_power(A, length))
    lags = torch.arange(length).double()
    return (torch.exp(1j * torch.outer(lags, angle)) @ values / length).real.to(dtype)


@answers.right("turned")
def every_point_truncated(A_bar, B_bar, C, length, turn):
    kernel = by_definition(A_bar.double(), B_bar.double(), C.double(), length, turn)
    lags = torch.arange(length)
    z = torch.exp(-2j * torch.pi * (lags.double() + turn) / length)
    values = (kernel * z[:, None] ** lags).sum(1)
    return (torch.fft.ifft(values) * torch.exp(2j * torch.pi * turn * lags / length)).real.to(C.dtype)


def route(A_bar, B_bar, C, length, turn, z_L=None, back=1.0, finish=lambda K: K.real, sign=-1):
    A, B, C = (x.to(x.dtype.to_complex()) for x in (A_bar, B_bar, C))
    lags, one = torch.arange(length), torch.eye(len(A))
    z = torch.exp(sign * 2j * math.pi * (lags + turn) / length).to(A.dtype)
    last = cmath.exp(sign * 2j * math.pi * turn) if z_L is None else z_L
    row = C @ (one - last * torch.linalg.matrix_power(A, length)).to(A.dtype)
    values = torch.stack([row @ torch.linalg.inv((one - point * A).to(A.dtype)) @ B for point in z])
    return finish(torch.fft.ifft(values) * torch.exp(back * 2j * math.pi * turn * lags / length).to(A.dtype))


@answers.wrong("turned", "C in place of C̃")
def not_truncated(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, z_L=0)


@answers.wrong("turned", "z^L taken for 1")
def as_in_the_paper(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, z_L=1)


@answers.wrong("turned", "z^L taken for −1")
def as_in_the_module(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, z_L=-1)


@answers.wrong("turned", "z^L with the wrong sign in its exponent")
def other_z_L(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, z_L=cmath.exp(2j * math.pi * turn))


@answers.wrong("turned", "a kernel not turned back")
def left_turned(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, back=0)


@answers.wrong("turned", "a turn in the wrong direction")
def turned_further(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, back=-1)


@answers.wrong("turned", "the modulus in place of the real part")
def size_of_it(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, finish=torch.abs)


@answers.wrong("turned", "the real part not taken")
def still_complex(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, finish=lambda K: K)


@answers.wrong("turned", "points on the other side")
def counterclockwise(A_bar, B_bar, C, length, turn):
    return route(A_bar, B_bar, C, length, turn, sign=1, back=-1)


@answers.wrong("turned", "1/L twice")
def divided_again(A_bar, B_bar, C, length, turn):
    return by_definition(A_bar, B_bar, C, length, turn) / length


@answers.wrong("turned", "A transposed")
def other_way_round(A_bar, B_bar, C, length, turn):
    return by_definition(A_bar.T, B_bar, C, length, turn)


@answers.wrong("turned", "a kernel that begins at C Ā B̄")
def one_power_too_many(A_bar, B_bar, C, length, turn):
    return torch.stack([C @ torch.linalg.matrix_power(A_bar, lag + 1) @ B_bar for lag in range(length)])


@answers.wrong("turned", None)
def power_off_by_one(A_bar, B_bar, C, length, turn):
    z_L = cmath.exp(-2j * math.pi * turn)
    shorter = torch.linalg.matrix_power(A_bar.double(), length - 1)
    changed = C.double() + 0j - z_L * (C.double() @ shorter)
    values = [
        changed
        @ torch.linalg.inv(torch.eye(len(A_bar)) - cmath.exp(-2j * math.pi * (k + turn) / length) * A_bar.double())
        for k in range(length)
    ]
    K = torch.fft.ifft(torch.stack(values) @ (B_bar.double() + 0j))
    return (K * torch.exp(2j * math.pi * turn * torch.arange(length) / length)).real.to(C.dtype)


answers.equivalent(
    "turned",
    "row @ torch.linalg.solve(identity - point * A_bar, B_bar) -> "
    "torch.linalg.solve(identity - point * A_bar, B_bar) @ row",
    "The product of two vectors, without a conjugate, is the same both ways.",
)
