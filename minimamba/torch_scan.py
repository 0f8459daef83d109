"""The selective scan in plain PyTorch: chapter 09's recomputing scan with the parts around it, by hand.

Runs on every device and never holds a (Batch, L, D, N) tensor; `method="cpu"` falls back on it.
"""

import torch
from torch.nn.functional import softplus

from minimamba import scan_gradient
from minimamba._validation import document_borders


def checkpoint_shape(u, A, B, C, cu_seqlens):
    """Shape of the states kept for the backward pass: (chunks, Batch, N, D).

    None for a packed row: how many chunks its documents make depends on where they begin, so `backward`
    runs each document's forward pass again instead.
    """
    if cu_seqlens is not None:
        return (0,)
    batch, length, channels = u.shape
    return (-(-length // scan_gradient.chunk_length(length)), batch, A.shape[1], channels)


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save):
    """Arguments as in `minimamba.selective_scan`, validated.

    Returns y (Batch, L, D), the final states (sequences, D, N) and the checkpoints that `backward` needs
    (empty unless `save`).
    """
    wide = A.dtype
    step = _step_size(delta, delta_bias, delta_softplus, wide)
    y = torch.empty(u.shape, dtype=wide, device=u.device)
    final_states = []
    for part, state in _sequences(u, A, initial_state, cu_seqlens):
        if part.start < part.stop:
            y[:, part], state, checkpoints = scan_gradient.forward_with_checkpoints(
                u[:, part].to(wide), step[:, part], A, _part(B, part, wide), _part(C, part, wide), state
            )
        final_states.append(state)
    if D is not None:
        y += D * u
    if z is not None:
        y *= torch.nn.functional.silu(z.to(wide))
    if not save or cu_seqlens is not None:
        checkpoints = A.new_empty(0)
    return y.to(u.dtype), torch.cat(final_states), checkpoints


def backward(
    grad_y,
    grad_final_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    cu_seqlens,
    checkpoints,
    delta_softplus,
):
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, each in its argument's dtype.

    Those of D, z, delta_bias and initial_state are None where the argument is; `grad_final_state` may be None.
    """
    wide = A.dtype
    step = _step_size(delta, delta_bias, delta_softplus, wide)
    # Through the gate y = out · silu(z): `dout` reaches the scan and the skip.
    dout = grad_y.to(wide)
    if z is not None:
        gate = torch.sigmoid(z.to(wide))
        dout = dout * (z * gate)

    out, du, ddelta = (torch.empty(u.shape, dtype=wide, device=u.device) for _ in range(3))
    dA = torch.zeros_like(A)
    dB, dC = (torch.zeros(x.shape, dtype=wide, device=u.device) for x in (B, C))
    dinitial_states = []
    if grad_final_state is None:
        grad_final_state = A.new_zeros(u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape)
    sequences = _sequences(u, A, initial_state, cu_seqlens)
    for (part, state), dstate in zip(sequences, grad_final_state.split(u.shape[0]), strict=True):
        if part.start < part.stop:
            inputs = (u[:, part].to(wide), step[:, part], A, _part(B, part, wide), _part(C, part, wide))
            if cu_seqlens is not None:
                checkpoints = scan_gradient.forward_with_checkpoints(*inputs, state)[2]
            du[:, part], ddelta[:, part], dA_part, dB_part, dC_part, dstate, out[:, part] = (
                scan_gradient.backward_from_checkpoints(dout[:, part], dstate, *inputs, checkpoints)
            )
            dA += dA_part
            for total, own in ((dB, dB_part), (dC, dC_part)):
                total_part = total if total.ndim == 2 else total[:, part]
                total_part += own.view(total_part.shape)
        dinitial_states.append(dstate)

    dD = dz = ddelta_bias = None
    if D is not None:
        out += D * u
        du += D * dout
        dD = (dout * u).sum((0, 1))
    if z is not None:
        dz = (grad_y * out * gate * (1 + z * (1 - gate))).to(z.dtype)
    if delta_softplus:
        ddelta *= -torch.expm1(-step)  # softplus' is the sigmoid, and sigmoid(x) = 1 - exp(-softplus(x))
    if delta_bias is not None:
        ddelta_bias = ddelta.sum((0, 1))
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA,
        dB.to(B.dtype),
        dC.to(C.dtype),
        dD,
        dz,
        ddelta_bias,
        None if initial_state is None else torch.cat(dinitial_states),
    )


def _step_size(delta, delta_bias, delta_softplus, wide):
    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias
    return softplus(step) if delta_softplus else step


def _sequences(u, A, initial_state, cu_seqlens):
    """Yield (slice of steps, initial state): the whole batch at once, or one document of a packed row after another."""
    borders = [0, u.shape[1]] if cu_seqlens is None else document_borders(cu_seqlens, u.shape[1])
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0] * (len(borders) - 1), *A.shape)
    for start, stop, state in zip(borders[:-1], borders[1:], initial_state.split(u.shape[0]), strict=True):
        yield slice(start, stop), state


def _part(B, part, wide):
    """The steps `part` of B or C as (Batch, steps, G, N); a constant one stays (D, N)."""
    if B.ndim == 3:
        B = B[:, :, None]
    return (B if B.ndim == 2 else B[:, part]).to(wide)
