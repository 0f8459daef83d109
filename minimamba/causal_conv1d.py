"""Chapter 12: the block's short convolution. In PyTorch, and the launchers of kernels/causal_conv1d.py as operators."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minimamba._operators import _capturing
from minimamba._validation import document_borders
from minimamba.triton_scan import TRITON_IS_INSTALLED, require_triton

STEPS = 8  # rows that a thread loads at once, as in the kernels


def convolve(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state, method):
    """Run by `method`, "cpu" or "triton", on validated arguments. -> y, final_state (empty unless asked for)"""
    if method == "triton":
        return _forward(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)
    return _in_torch(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)


class Tile(NamedTuple):
    """A program's `channels` x `segments` lines on `warps` warps, each walked in `iterations` rounds of 8 steps."""

    channels: int
    segments: int
    iterations: int
    warps: int


def tile_for(steps, sequences, channels, element_size, *, time_last=False, backward=False):
    """Choose the blocks by rule, for `sequences` of `steps` steps each (on average, where documents are packed).

    A multiprocessor hides the latency of memory with some 40 KB on its way. A thread asks for 8 steps of 4 channels
    at once, with time along the lanes for 2 channels of 8 steps: in half precision 64 and 32 bytes, so 20 to 40
    warps are enough, and registers allow them. The backward pass asks for twice as much and holds half the warps.
    Lines grow longer while there are five times the warps that an H100 holds: the longer a line, the fewer rows are
    read twice and the fewer sums written.
    """
    rounds = -(-steps // STEPS)
    lines = (2 if element_size == 8 else 4) // (2 if time_last else 1)
    if time_last:
        segments = min(32, _next_power_of_2(rounds))
        block = min(_next_power_of_2(channels), 128 * lines // segments)
    else:
        block = min(_next_power_of_2(channels), 32 * lines)
        segments = min(_next_power_of_2(rounds), 128 * lines // block)
    work = sequences * rounds * channels // (32 * lines)  # rounds of all warps together
    longest = _next_power_of_2(-(-rounds // segments))
    iterations = min(64, longest, _next_power_of_2(work // (8192 if backward else 16384)))
    return Tile(block, segments, iterations, warps=max(1, segments * block // (32 * lines)))


# --- in PyTorch ----------------------------------------------------------------------------------------


def _in_torch(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state):
    """The sum of W shifted sequences: differentiable by autograd, and it runs everywhere."""
    length, history = x.shape[1], weight.shape[1] - 1
    wide = _wide(x)
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], history, x.shape[2]) if initial_state is None else initial_state.mT
        rows, last = torch.cat([before, x], dim=1), None
    else:
        rows, steps, last = _with_room_between_documents(x, history, initial_state, cu_seqlens)
    inputs, taps = rows.to(wide), weight.to(wide).T
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
    if cu_seqlens is not None and not _capturing(x):
        document_borders(cu_seqlens, x.shape[1])  # a wrong border would read another document
    require_triton(x.device)
    from minimamba.kernels.causal_conv1d import causal_conv1d_forward_kernel

    launch = _Launch(x, weight, bias, initial_state, cu_seqlens)
    y = _empty_like(x)
    final_state = x.new_empty(launch.state_shape if return_final_state else 0)
    with torch.cuda.device_of(x):
        causal_conv1d_forward_kernel[launch.grid](
            x, weight, launch.bias, initial_state, cu_seqlens, y, final_state,
            *launch.sizes, *x.stride(), *y.stride(), *weight.stride(), *_strides(initial_state),
            SILU=silu, WANT_FINAL_STATE=return_final_state, **launch.options,
        )  # fmt: skip
    return y, final_state


@_forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, x.shape[2], weight.shape[1] - 1)
    return _empty_like(x), x.new_empty(state_shape if return_final_state else 0)


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
    from minimamba.kernels.causal_conv1d import causal_conv1d_backward_kernel, sum_partial_kernel

    launch = _Launch(x, weight, bias, initial_state, cu_seqlens, backward=True)
    width, channels, has_bias = weight.shape[1], x.shape[2], bias is not None
    wide = _wide(x)
    dx, dweight = _empty_like(x), weight.new_empty(weight.shape)
    dbias = bias.new_empty(bias.shape) if has_bias else None
    dinitial_state = None if initial_state is None else x.new_empty(launch.state_shape)
    partial = x.new_empty(launch.programs, width + has_bias, channels, dtype=wide)
    block = min(32, _next_power_of_2(channels))
    blocks = -(-channels // block)
    with torch.cuda.device_of(x):
        causal_conv1d_backward_kernel[launch.grid](
            x, weight, launch.bias, initial_state, cu_seqlens, grad_y, grad_final_state, dx, dinitial_state, partial,
            *launch.sizes, *x.stride(), *grad_y.stride(), *dx.stride(), *weight.stride(), *_strides(initial_state),
            *_strides(grad_final_state),
            SILU=silu, HAS_GRAD_FINAL_STATE=grad_final_state is not None, **launch.options,
        )  # fmt: skip
        sum_partial_kernel[(blocks * (width + has_bias),)](
            partial, dweight, dbias, launch.programs, channels, blocks,
            WIDTH=width, HAS_BIAS=has_bias, BLOCK_R=32, BLOCK_D=block,
        )  # fmt: skip
    return [g for g in (dx, dweight, dbias, dinitial_state) if g is not None]


@_backward.register_fake
def _(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu):
    given = (y for y in (weight, bias, initial_state) if y is not None)
    return [_empty_like(x)] + [y.new_empty(y.shape) for y in given]


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
    wide = _wide(x)
    y = (rows[..., -weight.shape[1] :].to(wide) * weight).sum(-1)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if silu else y).to(x.dtype)


def _update_by_kernel(x, conv_state, weight, bias, silu):
    require_triton(x.device)
    import triton.language as tl

    from minimamba.kernels.causal_conv1d import causal_conv1d_update_kernel

    batch, channels = x.shape
    block = min(256, _next_power_of_2(channels))
    blocks = -(-channels // block)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        causal_conv1d_update_kernel[(batch * blocks,)](
            x, conv_state, weight, bias if bias is None else bias.contiguous(), y,
            channels, blocks, *x.stride(), channels, *conv_state.stride(), *weight.stride(),
            WIDTH=weight.shape[1], STATE=conv_state.shape[2], SILU=silu, HAS_BIAS=bias is not None,
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32, BLOCK_D=block,
            num_warps=max(1, block // 64),
        )  # fmt: skip
    return y


class _Launch:
    """What the forward and the backward launch share: the grid, the sizes and the constants."""

    def __init__(self, x, weight, bias, initial_state, cu_seqlens, backward=False):
        import triton.language as tl

        batch, length, channels = x.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        time_last = _time_is_contiguous(x)
        tile = tile_for(
            -(-batch * length // sequences), sequences, channels, x.element_size(),
            time_last=time_last, backward=backward,
        )  # fmt: skip
        chunk = tile.segments * STEPS * tile.iterations
        # Document s, starting at step p, owns the programs from p // chunk + s on: enough, wherever they start.
        self.programs = batch * -(-length // chunk) if cu_seqlens is None else length // chunk + sequences
        blocks = -(-channels // tile.channels)
        self.grid = (self.programs * blocks,)
        self.sizes = (length, channels, sequences, blocks, tile.iterations)
        self.state_shape = (sequences, channels, weight.shape[1] - 1)
        self.bias = None if bias is None else bias.contiguous()
        self.options = {
            "WIDTH": weight.shape[1], "HAS_BIAS": bias is not None, "HAS_INITIAL_STATE": initial_state is not None,
            "PACKED": cu_seqlens is not None, "TIME_LAST": time_last,
            "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "SEGMENTS": tile.segments, "BLOCK_D": tile.channels, "num_warps": tile.warps,
        }  # fmt: skip


def _time_is_contiguous(x):
    """Whether time, not the channels, is to lie along the lanes of a warp: a (B, D, L) tensor seen as (B, L, D)."""
    return x.stride(1) == 1 and (x.stride(2) != 1 or x.shape[2] == 1)


def _empty_like(x):
    """An uninitialised tensor of x's shape, contiguous along the axis that x is."""
    batch, length, channels = x.shape
    if _time_is_contiguous(x):
        return x.new_empty(batch, channels, length).transpose(1, 2)
    return x.new_empty(x.shape)


def _wide(x):
    """The dtype of the computation."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _strides(state):
    return (0, 0, 0) if state is None else state.stride()


def _next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()
