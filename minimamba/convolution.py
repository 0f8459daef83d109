"""Chapter 04: a time-invariant SSM is one long convolution. Its kernel, and three ways to run it.

    h_k = Ā h_{k-1} + B̄ u_k        y_k = C h_k + D u_k        recurrent: one step at a time
    y = K̄ ∗ u + D u                K̄_l = C Ā^l B̄             convolution: all steps at once

One system for each channel: Ā is dense (D, N, N) or diagonal (D, N), real or complex; B̄ and C are (D, N).
A dense real system has eigenvalues in conjugate pairs. Diagonalised, one of each pair is enough: keep N/2
complex states and take 2·Re of the kernel (or of y, for a real u), without the skip.

Source: Efficiently Modeling Long Sequences with Structured State Spaces (S4; Gu, Goel and Ré, 2021),
sections 2.3 and 2.4.
"""

import torch
import torch.nn.functional as F

from minimamba._validation import check_counts, check_numbers, check_positive_sizes, check_shape


def run_recurrent(u, A_bar, B_bar, C, D=None, initial_state=None):
    """Run h_k = Ā h_{k-1} + B̄ u_k and y_k = C h_k + D u_k, step by step.

    u              (Batch, L, D)           input
    A_bar          (D, N, N) or (D, N)     dense or diagonal
    B_bar, C       (D, N)
    D              (D,)                    skip, none by default
    initial_state  (Batch, D, N)           h before the first input, zero by default

    Returns y (Batch, L, D) and the final state (Batch, D, N). To stream, run any first part of the sequence,
    then the rest from the state it ended in. Source: S4, equation 3.
    """
    u, A_bar, B_bar, C = _check_run(u, A_bar, B_bar, C, D, initial_state)
    h = u.new_zeros(len(u), *B_bar.shape) if initial_state is None else initial_state.to(u.dtype)
    outputs = []
    for k in range(u.shape[1]):
        h = advance(A_bar, h) + B_bar * u[:, k, :, None]  # (Batch, D, N)
        outputs.append((C * h).sum(-1))  # (Batch, D)
    return _add_skip(torch.stack(outputs, dim=1), u, D), h


def kernel(A_bar, B_bar, C, length):
    """Return the kernel K̄_l = C Ā^l B̄ for l = 0 .. length - 1, by `length` steps of h ← Ā h from h = B̄.

    A_bar (..., N, N) or diagonal (..., N), B_bar and C (..., N); returns (..., length). C is not conjugated.
    Source: S4, equation 5.
    """
    A_bar, B_bar, C = _check_system(A_bar, B_bar, C, length)
    h = B_bar[None]  # (1, ..., N), the state one unit impulse leaves behind
    values = []
    for _ in range(length):
        values.append((C * h).sum(-1))  # (1, ...)
        h = advance(A_bar, h)
    return torch.cat(values).movedim(0, -1)


def kernel_doubling(A_bar, B_bar, C, length):
    """Return what `kernel` returns in about log2(length) steps: with Ā^n B̄ known for n < m, Ā^m gives m more.

    The first m states times Ā^m are the next m, and Ā^m squared is Ā^2m.
    """
    A_bar, B_bar, C = _check_system(A_bar, B_bar, C, length)
    states = B_bar[None]  # (m, ..., N): row n is Ā^n B̄
    power = A_bar  # Ā^m
    while (m := len(states)) < length:
        states = torch.cat([states, advance(power, states[: length - m])])
        power = power @ power if _is_dense(power, states) else power * power
    return (C * states).sum(-1).movedim(0, -1)


def advance(A_bar, h):
    """Return Ā h for states h (anything, ..., N): one leading axis (batch or time) before those of B̄."""
    return torch.einsum("...nm,...m->...n", A_bar, h) if _is_dense(A_bar, h) else A_bar * h


def convolve_direct(u, kernel, D=None):
    """Return y_k = Σ_{l ≤ k} K̄_l u_{k-l} + D u_k with L² products for each channel.

    u (Batch, L, D), kernel (D, L), D (D,); returns y (Batch, L, D). Source: S4, equation 4.
    """
    u, kernel = _check_convolution(u, kernel, D)
    channels, length = kernel.shape
    past = F.pad(u.mT, (length - 1, 0))  # zeros before the first input: y_k sees no later one
    weight = kernel.flip(-1)[:, None]  # conv1d slides without mirroring, so that K̄_0 must come last
    blocks = []
    for k in range(0, length, 256):  # 256 outputs at a time, as conv1d copies the window of each
        blocks.append(F.conv1d(past[..., k : k + length + 255], weight, groups=channels))
    return _add_skip(torch.cat(blocks, dim=-1).mT, u, D)


def convolve_fft(u, kernel, D=None):
    """Return what `convolve_direct` returns in O(L log L): a product of spectra is a convolution.

    u (Batch, L, D), kernel (D, L), D (D,); returns y (Batch, L, D). A discrete Fourier transform of n points
    convolves in a circle of n. The result has 2L - 1 values, so n ≥ 2L - 1 keeps its end off its beginning.
    """
    u, kernel = _check_convolution(u, kernel, D)
    length = u.shape[1]
    n = 1 << (2 * length - 2).bit_length()  # the first power of two ≥ 2L - 1
    fft, ifft = (torch.fft.fft, torch.fft.ifft) if u.is_complex() else (torch.fft.rfft, torch.fft.irfft)
    spectrum = fft(u, n, dim=1) * fft(kernel.mT, n, dim=0)
    return _add_skip(ifft(spectrum, n, dim=1)[:, :length], u, D)


def toeplitz(kernel):
    """Return the convolution's matrix T (..., L, L): T[k, s] = K̄_{k-s} for s ≤ k, zero above the diagonal.

    kernel (..., L). For one channel y = T u.
    """
    check_numbers(kernel=kernel)
    if kernel.ndim == 0 or kernel.shape[-1] == 0:
        raise ValueError(f"kernel: expected shape (..., L) with L >= 1, got {tuple(kernel.shape)}")
    step = torch.arange(kernel.shape[-1], device=kernel.device)
    lag = step[:, None] - step  # (L, L), k - s
    return torch.where(lag >= 0, kernel[..., lag.clamp(min=0)], 0)


def _is_dense(A_bar, h):
    """Dense Ā (..., N, N) has as many axes as h (anything, ..., N), diagonal Ā one fewer."""
    return A_bar.ndim == h.ndim


def _add_skip(y, u, D):
    return y if D is None else y + D * u


def _check_run(u, A_bar, B_bar, C, D, initial_state):
    optional = {"D": D, "initial_state": initial_state}
    given = {name: value for name, value in optional.items() if value is not None}
    u, A_bar, B_bar, C, *_ = check_numbers(u=u, A_bar=A_bar, B_bar=B_bar, C=C, **given)
    check_shape("u", u, ("Batch", "L", "D"))
    check_positive_sizes("u", u, ("Batch", "L", "D"))
    channels = u.shape[2]
    check_shape("B_bar", B_bar, (channels, "N"))
    _check_system(A_bar, B_bar, C)
    if D is not None:
        check_shape("D", D, (channels,))
    if initial_state is not None:
        check_shape("initial_state", initial_state, (u.shape[0], *B_bar.shape))
    return u, A_bar, B_bar, C


def _check_system(A_bar, B_bar, C, length=1):
    A_bar, B_bar, C = check_numbers(A_bar=A_bar, B_bar=B_bar, C=C)
    if B_bar.ndim == 0 or B_bar.shape[-1] == 0:
        raise ValueError(f"B_bar: expected shape (..., N) with N >= 1, got {tuple(B_bar.shape)}")
    diagonal = tuple(B_bar.shape)
    dense = (*diagonal, diagonal[-1])
    if tuple(A_bar.shape) not in (diagonal, dense):
        raise ValueError(f"A_bar: expected shape {dense} (dense) or {diagonal} (diagonal), got {tuple(A_bar.shape)}")
    check_shape("C", C, diagonal)
    check_counts(length=length)
    return A_bar, B_bar, C


def _check_convolution(u, kernel, D):
    skip = {} if D is None else {"D": D}
    u, kernel, *_ = check_numbers(u=u, kernel=kernel, **skip)
    check_shape("u", u, ("Batch", "L", "D"))
    check_positive_sizes("u", u, ("Batch", "L", "D"))
    check_shape("kernel", kernel, (u.shape[2], u.shape[1]))
    if D is not None:
        check_shape("D", D, (u.shape[2],))
    return u, kernel
