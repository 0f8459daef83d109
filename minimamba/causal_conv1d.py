"""Chapter 12: the block's short convolution. In PyTorch, and the launchers of kernels/causal_conv1d.py as operators."""

import torch
from torch import Tensor
from torch.nn import functional as F

from minimamba._operators import _capturing, refuse_forward_mode, traced
from minimamba._validation import document_borders
from minimamba.conv_plan import kind, plan_backward, plan_forward, plan_update, strides_like, wide
from minimamba.triton_scan import TRITON_IS_INSTALLED


def convolve(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state, method):
    """Run by `method`, "cpu" or "triton", on validated arguments. -> y, final_state (empty or None unless asked for)"""
    if method == "cpu":
        run = _in_torch
    elif traced(x, weight, bias, initial_state, cu_seqlens):
        refuse_forward_mode(method, x, weight, bias, initial_state)
        run = _forward
    else:  # the call of an operator takes longer than a small convolution
        tensors = (x, weight, bias, initial_state)
        save = torch.is_grad_enabled() and any([y is not None and y.requires_grad for y in tensors])
        run = _Convolution.apply if save else _forward_now
    return run(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)


# --- in PyTorch ----------------------------------------------------------------------------------------


def _in_torch(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state):
    """The sum of W shifted sequences: differentiable by autograd, and it runs everywhere."""
    length, history = x.shape[1], weight.shape[1] - 1
    precise = wide(x.dtype)
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], history, x.shape[2]) if initial_state is None else initial_state.mT
        rows, last = torch.cat([before, x], dim=1), None
    else:
        rows, steps, last = _with_room_between_documents(x, history, initial_state, cu_seqlens)
    inputs, taps = rows.to(precise), weight.to(precise).T
    y = inputs[:, history:] * taps[history]
    for k in range(history):
        y = torch.addcmul(y, inputs[:, k : k - history], taps[k])
    if cu_seqlens is not None:
        y = y.index_select(1, steps)  # first of all: a NaN beside 0 would come back from what is thrown away
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    final_state = x.new_empty(0)
    if return_final_state:
        final_state = (rows[:, length:] if last is None else rows[0, last]).mT.contiguous()
    return y.to(x.dtype), final_state


def _with_room_between_documents(x, history, initial_state, cu_seqlens):
    """Copy a packed row so that each document stands behind `history` rows, its initial state or zeros.

    Returns the rows (1, L + documents * history, D), the place of each step's first tap in them (L,), and the places
    of each document's last `history` rows (documents, history). No loop over documents, so it can be compiled.
    """
    length, documents = x.shape[1], cu_seqlens.shape[0] - 1
    if not torch.compiler.is_compiling():
        document_borders(cu_seqlens, length)
    cu_seqlens = cu_seqlens.long()
    room = torch.arange(documents * history, device=x.device).view(documents, history)
    t = torch.arange(length, device=x.device)
    steps = t + torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True) * history
    rows = x.new_zeros(1, length + documents * history, x.shape[2]).index_copy(1, steps + history, x)
    if initial_state is not None:
        before = (cu_seqlens[:-1, None] + room).flatten()
        rows = rows.index_copy(1, before, initial_state.mT.reshape(1, documents * history, -1))
    return rows, steps, cu_seqlens[1:, None] + room


# --- by the kernels ------------------------------------------------------------------------------------


@torch.library.custom_op("minimamba::causal_conv1d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    y, final_state = _forward_now(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)
    return y, x.new_empty(0) if final_state is None else final_state


def _forward_now(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state):
    if cu_seqlens is not None and not _capturing(x):
        document_borders(cu_seqlens, x.shape[1])  # a wrong border would read another document
    kinds = kind(x), kind(weight), kind(bias), kind(initial_state), kind(cu_seqlens)
    plan = plan_forward(*kinds, silu, return_final_state)
    y = x.new_empty_strided(x.shape, plan.strides)
    final_state = x.new_empty(plan.state_shape) if return_final_state else None
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        plan.launch(x, weight, bias, initial_state, cu_seqlens, y, final_state)
    return y, final_state


@_forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, x.shape[2], weight.shape[1] - 1)
    return x.new_empty_strided(x.shape, strides_like(x)), x.new_empty(state_shape if return_final_state else 0)


@torch.library.custom_op("minimamba::causal_conv1d_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    arguments = (grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu)
    return [g for g in _backward_now(*arguments) if g is not None]


def _backward_now(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu):
    if grad_y is None:
        grad_y = x.new_zeros(1, 1, 1).expand(x.shape)
    kinds = kind(x), kind(weight), kind(bias), kind(initial_state), kind(cu_seqlens)
    plan = plan_backward(*kinds, silu, kind(grad_y), kind(grad_final_state))
    dx = x.new_empty_strided(x.shape, plan.strides)
    dense = torch.contiguous_format
    dweight, dbias, dinitial_state = (
        None if y is None else torch.empty_like(y, memory_format=dense) for y in (weight, bias, initial_state)
    )
    partial = x.new_empty(plan.partial_shape, dtype=wide(x.dtype))
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        plan.launch(
            x, weight, bias, initial_state, cu_seqlens, grad_y, grad_final_state, dx, dinitial_state, partial
        )  # fmt: skip
        plan.launch_sum(partial, dweight, dbias)
    return dx, dweight, dbias, dinitial_state


@_backward.register_fake
def _(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu):
    given = (y for y in (weight, bias, initial_state) if y is not None)
    return [x.new_empty_strided(x.shape, strides_like(x))] + [y.new_empty(y.shape) for y in given]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu, ctx.return_final_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_y, grad_final_state):
    x, *others = ctx.saved_tensors
    if grad_y is None:
        grad_y = x.new_zeros(1, 1, 1).expand(x.shape)
    if not ctx.return_final_state:  # that of an empty tensor
        grad_final_state = None
    gradients = iter(_backward(grad_y, grad_final_state, x, *others, ctx.silu))
    arguments = (x, *others[:-1])
    return (*(None if y is None else next(gradients) for y in arguments), None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Convolution(torch.autograd.Function):
    """The same outside torch.library."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return _forward_now(*inputs)

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        if torch.is_grad_enabled() or traced(grad_y, grad_final_state):
            return _autograd(ctx, grad_y, grad_final_state)
        gradients = _backward_now(grad_y, grad_final_state, *ctx.saved_tensors, ctx.silu)
        return (*gradients, None, None, None)


@torch.library.custom_op("minimamba::causal_conv1d_update", mutates_args=("conv_state",))
def update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One step, `conv_state` moved up by one in place; arguments as in `minimamba.causal_conv1d_update`."""
    return update_now(x, conv_state, weight, bias, silu)


@update.register_fake
def _(x, conv_state, weight, bias, silu):
    return x.new_empty(x.shape)


def update_now(x, conv_state, weight, bias, silu, method="auto"):
    """The same outside torch.library, whose call takes longer than the step."""
    if method == "triton" or (method == "auto" and x.is_cuda and TRITON_IS_INSTALLED):
        return _update_by_kernel(x, conv_state, weight, bias, silu)
    rows = torch.cat([conv_state, x[..., None]], dim=-1)
    conv_state.copy_(rows[..., 1:])
    y = (rows[..., -weight.shape[1] :].to(wide(x.dtype)) * weight).sum(-1)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if silu else y).to(x.dtype)


def _update_by_kernel(x, conv_state, weight, bias, silu):
    y = x.new_empty(x.shape)
    launch = plan_update(kind(x), kind(conv_state), kind(weight), kind(bias), silu)
    with torch.cuda.device_of(x):
        launch(x, conv_state, weight, bias if bias is None else bias.contiguous(), y)
    return y
