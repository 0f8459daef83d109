"""The scan as operators of torch.library, so that torch.compile, export and CUDA graphs see one opaque call.

A backend is a module with `forward`, `backward` and `checkpoint_shape`, all with the same arguments; it gets
validated tensors and never sees autograd. A faster scan is a new backend here, and nothing else changes.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minimamba import cpu_scan, fast_scan
from minimamba._validation import document_borders
from minimamba.triton_scan import TRITON_IS_INSTALLED

BACKENDS = {"cpu": cpu_scan, "triton": fast_scan}
_PLAIN = (Tensor, torch.nn.Parameter)  # of other kinds nobody knows what their memory holds


def selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, method):
    """Run the scan by the backend `method`. -> y, final_state; differentiable."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if traced(*tensors, cu_seqlens):
        refuse_forward_mode(method, *tensors)
        run = _forward
    else:  # the call of an operator takes longer than a small scan
        run = _Scan.apply if save else _forward_now
    y, final_state, _ = run(*tensors, cu_seqlens, delta_softplus, method, save)
    return y, final_state


@torch.library.custom_op("minimamba::selective_scan", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    method: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_now(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, method, save)


def _forward_now(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, method, save):
    if cu_seqlens is not None and not _capturing(u):
        document_borders(cu_seqlens, u.shape[1])  # a wrong border would read another document
    backend = BACKENDS[method]
    return backend.forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save)


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, method, save):
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checkpoint_shape = BACKENDS[method].checkpoint_shape(u, A, B, C, cu_seqlens) if save else (0,)
    return u.new_empty(u.shape), A.new_empty(sequences, *A.shape), A.new_empty(checkpoint_shape)


@torch.library.custom_op("minimamba::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    method: str,
) -> list[Tensor]:
    gradients = BACKENDS[method].backward(
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
    )
    return [g for g in gradients if g is not None]


@_backward.register_fake
def _(
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
    method,
):
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.method, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_y, grad_final_state, _):
    *tensors, checkpoints = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = iter(_backward(grad_y, grad_final_state, *tensors, checkpoints, ctx.delta_softplus, ctx.method))
    arguments = tensors[:-1]  # all but cu_seqlens
    return (*[None if x is None else next(gradients) for x in arguments], None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Scan(torch.autograd.Function):
    """The same outside torch.library."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward_now(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_y, grad_final_state, _):
        if torch.is_grad_enabled() or traced(grad_y, grad_final_state):
            return _autograd(ctx, grad_y, grad_final_state, _)
        *tensors, checkpoints = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(tensors[0])
        backend = BACKENDS[ctx.method]
        gradients = backend.backward(grad_y, grad_final_state, *tensors, checkpoints, ctx.delta_softplus)
        return (*gradients, None, None, None, None)


@torch.library.custom_op("minimamba::selective_state_update", mutates_args=("state",))
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One decoding step, `state` (B, ..., N) overwritten; arguments as in `minimamba.selective_state_update`."""
    return update_now(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def update_now(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """The same outside torch.library, whose call takes longer than the step."""
    if state.is_cuda and TRITON_IS_INSTALLED:
        from minimamba.kernels.selective_state_update import selective_state_update as launch

        return launch(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    wide = state.dtype
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    B, C = (_per_channel(y, x.shape).to(wide) for y in (B, C))  # (B, ..., N)
    state.mul_(torch.exp(step[..., None] * A)).add_((step * x)[..., None] * B)
    y = (state * C).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    return y.to(x.dtype)


@selective_state_update.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return x.new_empty(x.shape)


def _per_channel(B, shape):
    """(B, N) or (B, G, N) to what multiplies a state of channels or heads: G neighbouring ones share a row."""
    if B.ndim == 2:
        B = B[:, None]
    B = B.repeat_interleave(shape[1] // B.shape[1], dim=1)  # (B, channels or heads, N)
    return B if len(shape) == 2 else B[:, :, None]


def traced(*tensors):
    """Whether a call with `tensors` (or None) must make an operator, since something looks at the operators it makes.

    That is torch.compile, a tracer, a mode, torch.func, forward AD, a subclass of Tensor or a meta tensor.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any([x is not None and (type(x) not in _PLAIN or x.is_meta or x.is_neg()) for x in tensors])
    )


def refuse_forward_mode(method, *tensors):
    """Raise NotImplementedError if one of `tensors` has a tangent, which an operator would drop without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"method: {method!r} has no forward-mode derivative (jvp)")


def nothing_listens(*tensors):
    """Whether an operator may be bypassed: nothing traces, differentiates or wraps a call with `tensors`."""
    return not torch.is_grad_enabled() and not traced(*tensors)


def _capturing(u):
    """Whether a CUDA graph is being recorded: then nothing can be read back to be checked."""
    return u.is_cuda and torch.cuda.is_current_stream_capturing()
