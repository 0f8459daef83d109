"""Chapter 07: the selective recurrence, one step at a time. The reference for every faster scan."""

import torch


def selective_scan_sequential(u, delta, A, B, C, initial_state):
    """Run h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t h_t, step by step.

    u, delta       (Batch, L, D)     input and step size (after softplus)
    A              (D, N)            state matrix, diagonal, negative
    B, C           (Batch, L, G, N)  input and output maps; channel d uses group d // (D / G)
    initial_state  (Batch, D, N)     h_0

    Returns y (Batch, L, D) and the final state (Batch, D, N). Keeps one state at a time; under autograd
    PyTorch keeps every one. Source: Mamba (Gu and Dao, 2023), equation 2a with Algorithm 2.
    """
    channels = u.shape[-1]
    h = initial_state  # (Batch, D, N)
    outputs = []
    for t in range(u.shape[1]):
        A_bar, B_bar_u = discretize_step(u[:, t], delta[:, t], A, per_channel(B[:, t], channels))
        h = A_bar * h + B_bar_u  # (Batch, D, N)
        outputs.append((h * per_channel(C[:, t], channels)).sum(-1))  # (Batch, D)
    return torch.stack(outputs, dim=1), h


def discretize_step(u, delta, A, B):
    """Return Ā = exp(ΔA) and B̄u = ΔBu, both (..., D, N), from u, delta (..., D), A (D, N), B (..., D or 1, N).

    This is Mamba's rule "zoh-euler": zero-order hold for A, Euler for B (chapter 02).
    """
    A_bar = torch.exp(delta[..., None] * A)
    B_bar_u = (delta * u)[..., None] * B
    return A_bar, B_bar_u


def per_channel(B, channels):
    """Give each of `channels` the B (or C) of its group: (..., G, N) -> (..., D, N), or (..., 1, N) to broadcast."""
    groups = B.shape[-2]
    return B if groups == 1 else B.repeat_interleave(channels // groups, dim=-2)
