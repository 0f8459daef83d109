"""Chapter 09: the backward pass of a scan is a scan too. Recompute the states, don't store them.

`linear_scan` is h_t = a_t h_{t-1} + b_t with its gradient written by hand. `selective_scan_checkpointed` does the
same for Mamba's scan while it keeps one state in sqrt(L); it is also the library's fast path on a CPU.
"""

import math

import torch

from minimamba._validation import check_shape

LOG2_E = math.log2(math.e)


def linear_scan(a, b, initial_state):
    """Run h_t = a_t h_{t-1} + b_t elementwise over dimension 1 and return every state.

    a, b           (Batch, L, ...)
    initial_state  (Batch, ...)       h_0

    Returns h (Batch, L, ...). Differentiable in all three arguments, any number of times. Raises ValueError if
    the shapes do not fit: nothing is broadcast.
    """
    check_shape("b", b, tuple(a.shape))
    check_shape("initial_state", initial_state, (a.shape[0], *a.shape[2:]))
    return LinearScan.apply(a, b, initial_state)


class LinearScan(torch.autograd.Function):
    """The scan and its adjoint: g_t = ∂loss/∂h_t obeys g_t = (direct gradient)_t + a_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx, a, b, initial_state):
        h, states = initial_state, []
        for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
            h = a_t * h + b_t
            states.append(h)
        states = torch.stack(states, dim=1)
        ctx.save_for_backward(a, initial_state, states)
        return states

    @staticmethod
    def backward(ctx, grad_states):
        a, initial_state, states = ctx.saved_tensors
        # The same scan from the last step to the first. Step t multiplies by a_{t+1}; after the last step
        # nothing comes back, so any finite a_{L+1} will do.
        a_next = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
        g = linear_scan(a_next.flip(1), grad_states.flip(1), torch.zeros_like(initial_state)).flip(1)
        h_previous = torch.cat([initial_state.unsqueeze(1), states[:, :-1]], dim=1)
        return g * h_previous, g, a[:, 0] * g[:, 0]


def selective_scan_checkpointed(u, delta, A, B, C, initial_state):
    """Mamba's scan, differentiable, with one state in sqrt(L) kept for the backward pass.

    Shapes as in `forward_with_checkpoints`. Returns y (Batch, L, D) and the final state (Batch, D, N).
    """
    return SelectiveScan.apply(u, delta, A, B, C, initial_state)


class SelectiveScan(torch.autograd.Function):
    """`forward_with_checkpoints` and `backward_from_checkpoints`, introduced to autograd."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, initial_state):
        y, final_state, checkpoints = forward_with_checkpoints(u, delta, A, B, C, initial_state)
        ctx.save_for_backward(u, delta, A, B, C, checkpoints)
        return y, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_final_state):
        *gradients, _ = backward_from_checkpoints(grad_y, grad_final_state, *ctx.saved_tensors)
        return tuple(gradients)


@torch.no_grad()
def forward_with_checkpoints(u, delta, A, B, C, initial_state):
    """Run h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t h_t; keep the state before each chunk of steps.

    u, delta       (Batch, L, D)               input and step size (after softplus)
    A              (D, N)                      state matrix, diagonal, negative
    B, C           (Batch, L, G, N) or (D, N)  varying in G groups of channels, or constant
    initial_state  (Batch, D, N)               h_0

    All float32 or all float64. Returns y (Batch, L, D), the final state (Batch, D, N) and the checkpoints
    (chunks, Batch, N, D), chunks = ceil(L / chunk_length(L)). Source: Mamba (Gu and Dao, 2023), equation 2a with
    Algorithm 2; recomputation as in its section 3.3.2.
    """
    batch, length, channels = u.shape
    steps = chunk_length(length)
    y = u.new_empty(batch, length, channels)
    checkpoints = u.new_empty(-(-length // steps), batch, A.shape[1], channels)
    u, delta, y_by_time = (x.transpose(0, 1) for x in (u, delta, y))  # (L, Batch, D)
    A, B, C = A.mT.contiguous(), _by_time(B).contiguous(), _by_time(C).contiguous()
    buffers = u.new_empty(2, steps, *checkpoints.shape[1:])  # allocated once: fresh memory is slow memory
    states = u.new_empty(steps + 1, *checkpoints.shape[1:])

    h = initial_state.mT  # (Batch, N, D)
    for k, start in enumerate(range(0, length, steps)):
        t = slice(start, min(start + steps, length))
        T = t.stop - t.start
        a, product = buffers[:, :T]
        checkpoints[k] = h
        _chunk_states(checkpoints[k], u[t], delta[t], A, _at(B, t), a, states[: T + 1])
        _multiply(states[1 : T + 1], _at(C, t), out=product)
        torch.sum(product, 2, out=y_by_time[t])
        h = states[T]
    return y, _fresh(h.mT), checkpoints


@torch.no_grad()
def backward_from_checkpoints(grad_y, grad_final_state, u, delta, A, B, C, checkpoints):
    """Return (du, ddelta, dA, dB, dC, dinitial_state, y) from ∂loss/∂y, ∂loss/∂h_L and the saved checkpoints.

    Goes through the chunks from the last to the first: recompute the chunk's states from its checkpoint, run
    g_t = C_t ∂loss/∂y_t + Ā_{t+1} g_{t+1} backwards, and turn g into gradients before the next chunk overwrites
    it. Each gradient has its argument's shape; y is the forward's, again.
    """
    batch, length, channels = u.shape
    steps = chunk_length(length)
    y, du, ddelta = (u.new_empty(batch, length, channels) for _ in range(3))
    dA, dB, dC = (x.new_zeros(x.shape) for x in (A.mT, B, C))
    y_by_time, du_by_time, ddelta_by_time = (x.transpose(0, 1) for x in (y, du, ddelta))
    u, delta, grad_y = (x.transpose(0, 1) for x in (u, delta, grad_y))  # (L, Batch, D)
    A, B, C = A.mT.contiguous(), _by_time(B).contiguous(), _by_time(C).contiguous()
    dB_by_time, dC_by_time = _by_time(dB), _by_time(dC)
    buffers = u.new_empty(3, steps, *checkpoints.shape[1:])
    chunk_states = u.new_empty(steps + 1, *checkpoints.shape[1:])

    from_the_right = grad_final_state.mT  # what reaches h at the chunk's last step from later steps
    for k in reversed(range(len(checkpoints))):
        t = slice(k * steps, min((k + 1) * steps, length))
        T = t.stop - t.start
        a, g, product = buffers[:, :T]
        states = chunk_states[: T + 1]
        u_t, delta_t, grad_y_t, B_t, C_t = u[t], delta[t], grad_y[t], _at(B, t), _at(C, t)
        _chunk_states(checkpoints[k], u_t, delta_t, A, B_t, a, states)

        # y_t = C_t h_t
        _multiply(states[1:], C_t, out=product)
        torch.sum(product, 2, out=y_by_time[t])
        torch.mul(states[1:], grad_y_t.unsqueeze(2), out=product)
        _accumulate(_at(dC_by_time, t), product)

        # g_t = C_t ∂loss/∂y_t + Ā_{t+1} g_{t+1}
        _multiply(grad_y_t.unsqueeze(2), C_t, out=g)
        g[-1] += from_the_right
        _scan(reversed(a[1:].unbind(0)), reversed(g[:-1].unbind(0)), g[-1])
        from_the_right = a[0] * g[0]

        # B̄_t u_t = (Δ_t u_t) B_t, and ∂loss/∂(B̄_t u_t) = g_t
        _multiply(g, B_t, out=product)
        grad_delta_u = product.sum(2)  # (T, Batch, D)
        torch.mul(grad_delta_u, delta_t, out=du_by_time[t])
        torch.mul(g, (delta_t * u_t).unsqueeze(2), out=product)
        _accumulate(_at(dB_by_time, t), product)

        # Ā_t = exp(Δ_t A): ∂loss/∂Ā_t = g_t h_{t-1}, so ∂loss/∂(Δ_t A) = g_t h_{t-1} Ā_t
        grad_delta_A = g.mul_(states[:-1]).mul_(a)
        torch.mul(grad_delta_A, A, out=product)
        torch.addcmul(product.sum(2), grad_delta_u, u_t, out=ddelta_by_time[t])  # both terms of dΔ
        dA += torch.mul(grad_delta_A, delta_t.unsqueeze(2), out=product).sum((0, 1))
    return du, ddelta, _fresh(dA.mT), dB, dC, _fresh(from_the_right.mT), y


def chunk_length(length):
    """Steps from one checkpoint to the next: sqrt(L), so that both the checkpoints and a chunk's states are few.

    At least 16, or starting the operations takes longer than the operations; at most 128, or a chunk outgrows the
    cache, while one state in 128 already weighs less than the inputs.
    """
    return min(length, max(16, min(math.isqrt(length), 128)))


def _chunk_states(h, u, delta, A, B, a, states):
    """Fill a (T, Batch, N, D) with Ā_t and states (T + 1, Batch, N, D) with h and the T states after it."""
    torch.mul(delta.unsqueeze(2), A * LOG2_E, out=a).exp2_()  # = exp(ΔA): exp2 costs less than exp
    states[0] = h
    _multiply((delta * u).unsqueeze(2), B, out=states[1:])
    _scan(a.unbind(0), states[1:].unbind(0), h)


def _scan(a, b, h):
    """Overwrite each b_t with h_t = a_t h_{t-1} + b_t: one operation a step, on contiguous memory."""
    for a_t, b_t in zip(a, b, strict=True):
        h = b_t.addcmul_(a_t, h)


# Time comes first, so that a step is contiguous; channels come last, so that multiplying by A, B, C or Δ runs
# along the long axis. B and C become (L, Batch, N, G, 1), or (1, 1, N, D, 1) if constant (each channel a group).


def _by_time(B):
    B = B.permute(1, 0, 3, 2) if B.ndim == 4 else B.mT[None, None]
    return B.unsqueeze(-1)


def _at(B, t):
    """The steps `t` of B as `_by_time` made it; a constant one has no steps to choose from."""
    return B if len(B) == 1 else B[t]


def _multiply(x, B, out):
    """out = x * B with x (T, Batch, 1 or N, D) split into B's groups of channels."""
    groups = B.shape[3]
    torch.mul(x.unflatten(-1, (groups, -1)), B, out=out.unflatten(-1, (groups, -1)))


def _accumulate(gradient, product):
    """Add `product` (T, Batch, N, D) to a gradient of B's layout, summed over all that B was broadcast along."""
    gradient += product.unflatten(-1, (gradient.shape[3], -1)).sum_to_size(gradient.shape)


def _fresh(x):
    """A contiguous copy, even where `contiguous` would return a view because a size is 1."""
    return x.clone(memory_format=torch.contiguous_format)
