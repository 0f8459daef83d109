"""Chapter 02: from a differential equation to a recurrence. Four rules, for dense and for diagonal A.

    h'(t) = A h(t) + B x(t)    becomes    h_k = Ā h_{k-1} + B̄ x_k        x_k is the input on (t_{k-1}, t_k]

    rule         Ā                             B̄
    euler        I + ΔA                        ΔB
    bilinear     (I - ΔA/2)^-1 (I + ΔA/2)      (I - ΔA/2)^-1 ΔB
    zoh          exp(ΔA)                       A^-1 (exp(ΔA) - I) B     exact while x is held at x_k
    zoh-euler    exp(ΔA)                       ΔB                       what Mamba runs

Every rule is a function (A, B, delta) -> (A_bar, B_bar), differentiable in each tensor:

    dense       A (..., N, N)    B (..., N)    A_bar (..., N, N)    B_bar (..., N)
    diagonal    A (..., N)       B (..., N)    A_bar (..., N)       B_bar (..., N)     (names end in _diagonal)

`delta` is the step size, in the unit of time in which A is a rate. It is a number, or a real tensor (...) with one
step for each system: it has no N axis. The axes "..." of A, B and delta broadcast against each other. A and B are
float32, float64, complex64 or complex128, both of one precision. Anything else raises TypeError or ValueError, and
the message begins with the argument's name.
"""

import torch
import torch.nn.functional as F

from minimamba._validation import check_delta, check_numbers


def euler(A, B, delta):
    """Return I + ΔA and ΔB: follow the slope at the start of the step. Source: a first-order Taylor series."""
    A, B, delta = _check_system(A, B, delta, dense=True)
    return _identity(A) + delta[..., None, None] * A, delta[..., None] * B


def bilinear(A, B, delta):
    """Return (I - ΔA/2)^-1 (I + ΔA/2) and (I - ΔA/2)^-1 ΔB: the mean of the slopes at both ends of the step.

    Raises torch.linalg.LinAlgError if 2/Δ is an eigenvalue of A, which no stable A has.
    Source: S4 (Gu, Goel and Ré, 2021), equation 3; Tustin's method in control.
    """
    A, B, delta = _check_system(A, B, delta, dense=True)
    identity, half_step = _identity(A), delta[..., None, None] * A / 2
    right_side = torch.cat([identity + half_step, (delta[..., None] * B)[..., None]], dim=-1)  # (..., N, N + 1)
    solved = torch.linalg.solve(identity - half_step, right_side)
    return solved[..., :-1], solved[..., -1]


def zoh(A, B, delta):
    """Return exp(ΔA) and ∫_0^Δ exp(sA) ds B, exact for an input held in the step. A may be singular.

    For invertible A the integral is A^-1 (exp(ΔA) - I). We never invert: a held input is one more state with x' = 0,
    and the exponential of the larger system [[A, B], [0, 0]] has Ā and B̄ in its first N rows.
    Source: Mamba (Gu and Dao, 2023), equation 4; Van Loan (1978), theorem 1.
    """
    A, B, delta = _check_system(A, B, delta, dense=True)
    system = F.pad(torch.cat([A, B[..., None]], dim=-1), (0, 0, 0, 1))  # (..., N + 1, N + 1), last row zero
    step = matrix_exp(delta[..., None, None] * system)
    return step[..., :-1, :-1], step[..., :-1, -1]


def zoh_euler(A, B, delta):
    """Return exp(ΔA) and ΔB: exact for the state, Euler for the input. Source: selective_scan_ref in Mamba's code."""
    A, B, delta = _check_system(A, B, delta, dense=True)
    return matrix_exp(delta[..., None, None] * A), delta[..., None] * B


def matrix_exp(A):
    """Return the matrix exponential of A (..., N, N): torch.matrix_exp, with its full precision.

    Given one lone matrix, PyTorch up to 2.14 picks a polynomial with a wrong coefficient at some norms, and is off in
    the fifth digit (float64: the eleventh); given several it is not. So a lone matrix brings a copy of itself along.
    Source: PyTorch issue 196592.
    """
    alone = A.numel() == A.shape[-1] ** 2
    return torch.matrix_exp(torch.stack([A, A]))[0] if alone else torch.matrix_exp(A)


def euler_diagonal(A, B, delta):
    """Return 1 + ΔA and ΔB, elementwise."""
    A, B, delta = _check_system(A, B, delta, dense=False)
    return 1 + delta[..., None] * A, delta[..., None] * B


def bilinear_diagonal(A, B, delta):
    """Return (1 + ΔA/2) / (1 - ΔA/2) and ΔB / (1 - ΔA/2), elementwise; infinite where ΔA = 2."""
    A, B, delta = _check_system(A, B, delta, dense=False)
    half_step = delta[..., None] * A / 2
    return (1 + half_step) / (1 - half_step), delta[..., None] * B / (1 - half_step)


def zoh_diagonal(A, B, delta):
    """Return exp(ΔA) and ΔB exprel(ΔA), elementwise: (exp(ΔA) - 1) / A · B without the division by A.

    Accurate for every ΔA, gradients included, down to A = 0, where B̄ is ΔB.
    """
    A, B, delta = _check_system(A, B, delta, dense=False)
    z = delta[..., None] * A
    return torch.exp(z), delta[..., None] * B * exprel(z)


def zoh_euler_diagonal(A, B, delta):
    """Return exp(ΔA) and ΔB, elementwise. The fused kernels compute this one."""
    A, B, delta = _check_system(A, B, delta, dense=False)
    return torch.exp(delta[..., None] * A), delta[..., None] * B


def exprel(z):
    """Return (exp(z) - 1) / z elementwise, 1 at z = 0: what exact ZOH has over ΔB, with z = ΔA. Real or complex.

    Near zero the quotient is 0/0. expm1 saves its value but not its gradient, (exp(z) - exprel(z)) / z, where
    nearly equal numbers are subtracted. So |z| < 1/2 takes the Taylor series 1 + z/2 (1 + z/3 (1 + z/4 (...))).
    """
    (z,) = check_numbers(z=z)
    near_zero = z.abs() < 0.5
    # `where` multiplies the gradient of the branch not taken by zero, and 0 times infinity is NaN. So each branch
    # gets an input that it can bear; replacing only the result would leave NaN in the gradient at z = 0.
    small = torch.where(near_zero, z, 0)
    large = torch.where(near_zero, 1, z)
    series = torch.ones_like(z)
    for n in range(16, 1, -1):  # |z|^16 / 17! < 1e-19
        series = 1 + small / n * series
    return torch.where(near_zero, series, torch.expm1(large) / large)


RULES = {"euler": euler, "bilinear": bilinear, "zoh": zoh, "zoh-euler": zoh_euler}
DIAGONAL_RULES = {
    "euler": euler_diagonal,
    "bilinear": bilinear_diagonal,
    "zoh": zoh_diagonal,
    "zoh-euler": zoh_euler_diagonal,
}


def _identity(A):
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _check_system(A, B, delta, dense):
    """Check the arguments of a rule. Return A and B in one dtype and delta, their axes "..." expanded to one shape."""
    A, B = check_numbers(A=A, B=B)
    own = 2 if dense else 1  # A's axes that belong to one system
    shape = tuple(A.shape)
    if A.ndim < own or 0 in shape[-own:] or (dense and shape[-1] != shape[-2]):
        raise ValueError(f"A: expected shape {'(..., N, N)' if dense else '(..., N)'} with N >= 1, got {shape}")
    N = shape[-1]
    if B.ndim == 0 or B.shape[-1] != N:
        raise ValueError(f"B: expected shape (..., {N}), N as in A, got {tuple(B.shape)}")
    delta = check_delta(delta, A)
    axes = A.shape[:-own]
    for name, other in (("B", B.shape[:-1]), ("delta", delta.shape)):
        try:
            axes = torch.broadcast_shapes(axes, other)
        except RuntimeError:
            wanted = f"axes that broadcast against {tuple(axes)}" + (" before N" if name == "B" else "")
            raise ValueError(f"{name}: expected {wanted}, got {tuple(other)}") from None
    return A.expand(axes + shape[-own:]), B.expand(*axes, N), delta.expand(axes)
