"""Chapter 03: HiPPO. Which A remembers the past well: N numbers, updated as the signal comes, that redraw it.

    memory             equation                  weight of the past        redraw: past(age) = basis @ h
    LegS               h' = (A h + B x) / t      all of [0, t] alike       legendre(N, age, window=t)
    LegS without 1/t   h' = A h + B x            e^{-age}                  warped_legendre(N, age)
    LegT               h' = A h + B x            the last `window` alike   legendre(N, age, window)
    LagT               h' = A h + B x            e^{-age}                  laguerre(N, age)

h_n(t) is the inner product of the past with the n-th function of the basis under that weight (total weight 1). Every
basis is orthonormal, so the sum of h_n times function n is the best redrawing of its kind: polynomials of degree < N
in the age, or for LegS without 1/t, which S4 runs, in e^{-age}. `age` is the time since: 0 is now. All this is exact,
but for LegT, which has to replace the value that leaves its window by its own redrawing of it.

Source: HiPPO (Gu, Dao, Ermon, Rudra and Ré, 2020), theorems 1 and 2; S4 (Gu, Goel and Ré, 2021), theorem 1, for the
normal-plus-low-rank form. All systems are float64. Wrong arguments raise TypeError or ValueError, and the message
begins with the argument's name.
"""

import math
from itertools import repeat

import torch

from minimamba._validation import check_counts, check_delta, check_numbers, check_shape, check_tensor
from minimamba.discretization import zoh


def legs(N):
    """Return A (N, N) and B (N,) of HiPPO-LegS: scaled Legendre, the whole past [0, t] with equal weight.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k, and B_n = sqrt(2n+1), with n, k = 0 .. N - 1.
    The same A and B serve h' = (A h + B x) / t and, without the 1/t, S4. Source: HiPPO, theorem 2; S4, equation 2.
    """
    n, root = _orders(N)
    A = torch.tril(-torch.outer(root, root), -1) - torch.diag(n + 1)
    return A, root


def legt(N, window=1.0):
    """Return A (N, N) and B (N,) of HiPPO-LegT: translated Legendre, the last `window` units of time, equal weight.

    A_nk = -sqrt((2n+1)(2k+1)) / window · (1 for n >= k, (-1)^(n-k) for n < k), and B_n = sqrt(2n+1) / window: the
    orthonormal scaling. The Legendre memory unit (LMU) has h_n (-1)^n sqrt(2n+1) as its state instead.
    Source: HiPPO, theorem 1, which prints the LMU's scaling.
    """
    _check_window(window)
    n, root = _orders(N)
    sign = torch.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n))
    return -torch.outer(root, root) * sign / window, root / window


def lagt(N):
    """Return A (N, N) and B (N,) of HiPPO-LagT: translated Laguerre, weight e^{-age} on the whole past.

    A_nk = -1 for n >= k, 0 for n < k, and B_n = 1. One unit of time is the age at which the weight is 1/e.
    Source: HiPPO, theorem 1.
    """
    n, _ = _orders(N)
    return torch.tril(-n.new_ones(N, N)), torch.ones_like(n)


def nplr(N):
    """Return (eigenvalues, P, B, V), complex128: LegS as a normal matrix minus one of rank one.

    A = V (diag(eigenvalues) - P P*) V* with V (N, N) unitary, and P, B (N,) in the basis V: P = V* p, B = V* b with
    p_n = sqrt(n + 1/2) and b of `legs`. A + p pᵀ is -I/2 plus a skew-symmetric matrix, so the real parts are exactly
    -1/2. The imaginary parts ascend: entries n and N - 1 - n are conjugates, and for an odd N the middle one is real.
    Eigenvectors are turned such that P > 0. Then B = sqrt(2) P > 0, and columns of conjugate eigenvalues are conjugate.
    Source: S4, theorem 1; S4D (Gu, Gupta, Goel and Ré, 2022) for S4D-LegS, the eigenvalues without P.
    """
    A, b = legs(N)
    p = b / math.sqrt(2)
    skew = A + torch.outer(p, p) + torch.eye(N, dtype=A.dtype) / 2
    # -iS is Hermitian where S is skew: eigh is accurate and returns a unitary V, which eig does not promise.
    frequency, V = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -(skew - skew.T) / 2))
    V = V * torch.sgn(V.mH @ p.to(V.dtype))
    V = (V + V.flip(1).conj()) / 2  # only rounding changes: the pairs become exact
    frequency = (frequency - frequency.flip(0)) / 2
    eigenvalues = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return eigenvalues, V.mH @ p.to(V.dtype), V.mH @ b.to(V.dtype), V


def project(u, delta, A, B, initial_state=None):
    """Run h' = A h + B x on held samples: return the state after each of them, (L, N). Exact for a held input.

    u (L,), A (N, N), B (N,), initial_state (N,) or zeros. delta, the length of a step, is a number, or (L,): one for
    each step.
    """
    start = {} if initial_state is None else {"initial_state": initial_state}
    u, A, B, *start = check_numbers(u=u, A=A, B=B, **start)
    _check_signal(u)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(A) == 0:
        raise ValueError(f"A: expected shape (N, N) with N >= 1, got {tuple(A.shape)}")
    check_shape("B", B, (len(A),))
    h = start[0] if start else torch.zeros_like(B)
    check_shape("initial_state", h, (len(A),))
    delta = check_delta(delta, A)
    if delta.ndim > 0:
        check_shape("delta", delta, (len(u),))
    steps = (zoh(A, B, step) for step in delta) if delta.ndim > 0 else repeat(zoh(A, B, delta))
    states = []
    for u_k, (A_bar, B_bar) in zip(u, steps, strict=False):
        h = A_bar @ h + B_bar * u_k
        states.append(h)
    return torch.stack(states)


def project_legs(u, N):
    """Run LegS, h' = (A h + B x) / t, from t = 0 on u (L,), real: return the state after each sample, (L, N).

    There is no step size, since LegS does not depend on the unit of time: let sample k = 0 .. L - 1 be held on
    (k, k+1]. In the variable log t the equation is h' = A h + B x, whose step then lasts log((k+1)/k). Source: HiPPO,
    theorem 2, with an exact step for a held input in place of the paper's rules.
    """
    check_tensor("u", u, dtypes=(torch.float32, torch.float64))
    _check_signal(u)
    A, B = (x.to(u) for x in legs(N))
    # Sample 0 lasts for ever in log t, so it leads to its fixed point -A^-1 B u_0 = (u_0, 0, ..., 0). We start there.
    delta = torch.zeros_like(u)
    delta[1:] = torch.log1p(1 / torch.arange(1, len(u), dtype=u.dtype, device=u.device))
    return project(u, delta, A, B, initial_state=torch.cat([u[:1], torch.zeros_like(B[1:])]))


def legendre(N, age, window):
    """Return sqrt(2n+1) P_n(1 - 2 age/window), (T, N): the basis of LegT, and with window = t that of LegS.

    age (T,), from 0 to `window`. Beyond, the polynomials explode.
    """
    _check_window(window)
    return _legendre(N, age, lambda age: 1 - 2 * age / window)


def warped_legendre(N, age):
    """Return sqrt(2n+1) P_n(2 e^{-age} - 1), (T, N): the basis of LegS without 1/t, for age (T,) >= 0."""
    return _legendre(N, age, lambda age: 2 * torch.exp(-age) - 1)


def laguerre(N, age):
    """Return the Laguerre polynomials L_n(age), (T, N): the basis of LagT, for age (T,) >= 0. They grow as age^n."""
    _check_age(age)
    _orders(N)
    columns = [torch.ones_like(age), 1 - age]
    for n in range(1, N - 1):
        columns.append(((2 * n + 1 - age) * columns[n] - n * columns[n - 1]) / (n + 1))
    return torch.stack(columns[:N], dim=-1)


def _legendre(N, age, position):
    _check_age(age)
    _, root = _orders(N)
    x = position(age)
    columns = [torch.ones_like(x), x]
    for n in range(1, N - 1):
        columns.append(((2 * n + 1) * x * columns[n] - n * columns[n - 1]) / (n + 1))
    return torch.stack(columns[:N], dim=-1) * root.to(x)


def _orders(N):
    """n = 0 .. N - 1 and sqrt(2n + 1), float64."""
    check_counts(N=N)
    n = torch.arange(N, dtype=torch.float64)
    return n, torch.sqrt(2 * n + 1)


def _check_signal(u):
    check_shape("u", u, ("L",))
    if len(u) == 0:
        raise ValueError("u: expected L >= 1, got shape (0,)")


def _check_window(window):
    if not isinstance(window, int | float) or isinstance(window, bool):
        raise TypeError(f"window: expected a number, got {type(window).__name__}")
    if not 0 < window < math.inf:
        raise ValueError(f"window: expected a finite number > 0, got {window}")


def _check_age(age):
    check_tensor("age", age, dtypes=(torch.float32, torch.float64))
    check_shape("age", age, ("T",))
