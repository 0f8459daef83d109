"""Chapter 01: a linear differential equation is a memory.

    h'(t) = A h(t) + B x(t)                            the state h (N,) takes in the input x
    y(t)  = C h(t) + D x(t)                            and is read out
    h(t)  = e^{At} h_0 + ∫_0^t e^{A(t-s)} B x(s) ds    the exact solution: the free and the forced response

One system with one input and one output: A (N, N), B and C (N,), D a number. Real or complex, all of one precision.
Time may have any unit; A is a rate per that unit. Wrong arguments raise TypeError or ValueError, and the message
begins with the argument's name.

Source: Mamba (Gu and Dao, 2023), equation 1; S4 (Gu, Goel and Ré, 2021), equation 1, for D.
"""

import math

import torch

from minimamba._validation import check_delta, check_numbers, check_shape
from minimamba.discretization import matrix_exp, zoh


def simulate(u, delta, A, B, C, D=0.0, initial_state=None):
    """Solve the system exactly for an input held at u[k] while delta·k < t <= delta·(k+1).

    u (L,), delta the length of one step, initial_state (N,) or zeros; returns y (L,) and h (L, N) at the steps' ends.
    Within a step the input is constant, so one matrix exponential, made once, takes the state from end to end.
    """
    u, delta, A, B, C, h = _check_system(u, delta, A, B, C, D, initial_state)
    A_bar, B_bar = zoh(A, B, delta)  # e^{ΔA} and ∫_0^Δ e^{sA} B ds; chapter 02 takes it apart
    states = []
    for u_k in u:
        h = A_bar @ h + B_bar * u_k
        states.append(h)
    h = torch.stack(states)  # (L, N)
    return h @ C + D * u, h


def free_response(A, initial_state, times):
    """Return h(t) = e^{At} h_0 at `times` (T,), the state of a system left alone, as (T, N)."""
    A, initial_state = check_numbers(A=A, initial_state=initial_state)
    _check_sizes(A, initial_state=initial_state)
    return matrix_exp(_check_times(times, A)[:, None, None] * A) @ initial_state


def impulse_response(A, B, C, times):
    """Return C e^{At} B at `times` (T,) >= 0: the weight in y(t) of the input of time t ago, as (T,)."""
    A, B, C = check_numbers(A=A, B=B, C=C)
    _check_sizes(A, B=B, C=C)
    return free_response(A, B, times) @ C


def diagonalize(A, B, C):
    """Return (eigenvalues, B', C') of the same system in the basis of eigenvectors, all (N,) and complex.

    With A = V Λ V^-1 the coordinates V^-1 h do not mix any more: B' = V^-1 B, C' = C V, and the impulse response is
    the sum over n of C'_n B'_n e^{λ_n t}. Raises ValueError for an A without a basis of eigenvectors.
    """
    A, B, C = check_numbers(A=A, B=B, C=C)
    _check_sizes(A, B=B, C=C)
    eigenvalues, V = torch.linalg.eig(A)
    condition = torch.linalg.cond(V).item()
    if condition > torch.finfo(A.dtype).eps ** -0.5:
        raise ValueError(f"A: expected a basis of eigenvectors, got some that are nearly parallel ({condition:.1e})")
    return eigenvalues, torch.linalg.solve(V, B.to(V.dtype)), C.to(V.dtype) @ V


def is_stable(A):
    """Return whether every state of h' = A h fades to zero: whether each eigenvalue has a negative real part."""
    return _growth_rate(A) < 0


def half_life(A):
    """Return the time in which the slowest mode of h' = A h halves: ln 2 / -max Re λ; infinite if one never fades."""
    rate = _growth_rate(A)
    return math.log(2) / -rate if rate < 0 else math.inf


def mass_spring(mass, stiffness, friction):
    """Return A (2, 2), B (2,), C (2,) of m q'' = -k q - c q' + x. h = (position q, velocity q'), C reads q. float64.

    With m in kg, k in kg/s², c in kg/s and the force x in newton, t is in seconds and q in metres. Left alone, it
    swings with ω = sqrt(k/m) radian per second if c = 0, and no longer swings from c = 2 sqrt(k m) on.
    """
    for name, value in (("mass", mass), ("stiffness", stiffness), ("friction", friction)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 <= value < math.inf or (name == "mass" and value == 0):
            raise ValueError(f"{name}: expected a finite number {'> 0' if name == 'mass' else '>= 0'}, got {value}")
    A = torch.tensor([[0, 1], [-stiffness / mass, -friction / mass]], dtype=torch.float64)
    B = torch.tensor([0, 1 / mass], dtype=torch.float64)
    C = torch.tensor([1, 0], dtype=torch.float64)
    return A, B, C


def _growth_rate(A):
    """The largest real part of A's eigenvalues, or 0 if it is only rounding: late states grow as e^{rate t}."""
    check_numbers(A=A)
    _check_sizes(A)
    eigenvalues = torch.linalg.eigvals(A)
    rounding = len(A) * torch.finfo(A.dtype).eps * eigenvalues.abs().max()
    rate = eigenvalues.real.max()
    return rate.item() if rate.abs() > rounding else 0.0


def _check_system(u, delta, A, B, C, D, initial_state):
    """Check everything `simulate` takes. Return it in one dtype, the state as zeros if there is none."""
    optional = {} if initial_state is None else {"initial_state": initial_state}
    u, A, B, C, *state = check_numbers(u=u, A=A, B=B, C=C, **optional)
    check_shape("u", u, ("L",))
    if len(u) == 0:
        raise ValueError("u: expected L >= 1, got shape (0,)")
    h = state[0] if state else torch.zeros_like(B)
    _check_sizes(A, B=B, C=C, initial_state=h)
    delta = check_delta(delta, A)
    if delta.ndim > 0:
        raise ValueError(f"delta: expected one step for all, got shape {tuple(delta.shape)}")
    if not isinstance(D, int | float | complex) and not (isinstance(D, torch.Tensor) and D.ndim == 0):
        raise TypeError(f"D: expected a number, got {type(D).__name__}")
    return u, delta, A, B, C, h


def _check_sizes(A, **vectors):
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(A) == 0:
        raise ValueError(f"A: expected shape (N, N) with N >= 1, got {tuple(A.shape)}")
    for name, value in vectors.items():
        check_shape(name, value, (len(A),))


def _check_times(times, A):
    if not isinstance(times, torch.Tensor):
        raise TypeError(f"times: expected a torch.Tensor, got {type(times).__name__}")
    if times.dtype != A.dtype.to_real():
        raise TypeError(f"times: expected {A.dtype.to_real()} (A's precision), got {times.dtype}")
    check_shape("times", times, ("T",))
    return times
