"""What of a launch of kernels/causal_conv1d.py is settled before the tensors are there: planned once for each kind."""

import functools
from typing import NamedTuple

import torch

from minimamba.triton_scan import Launch, next_power_of_2, require_triton

STEPS = 8  # rows that a thread loads at once, as in the kernels


class Tile(NamedTuple):
    """A program's `channels` x `segments` lines on `warps` warps, each walked in `iterations` rounds of 8 steps."""

    channels: int
    segments: int
    iterations: int
    warps: int


def tile_for(steps, sequences, channels, element_size, *, time_last=False, backward=False):
    """Choose the blocks by rule, for `sequences` of `steps` steps each (on average, where documents are packed).

    A multiprocessor hides the latency of memory with some 40 KB on its way. A thread asks for 8 steps of 4 channels
    at once, with time along the lanes of one: in half precision 64 and 16 bytes, so 20 and 64 warps are enough, and
    registers allow them. The backward pass asks for twice as much and holds fewer warps. With time along the lanes
    all 128 threads of a program, 64 backward, go along one channel, if it is long enough: so they read memory in its
    order. The longer a line, the more rarely are the taps loaded, the fewer rows read twice and the fewer sums written.
    So lines grow while there are five times the warps that an H100 holds, backward, where a line costs more, as many;
    with time along the lanes only to 4 rounds, 8 backward. Measured on an H200: kernels/NOTES.md.
    """
    rounds = -(-steps // STEPS)
    lines = 1 if time_last else 2 if element_size == 8 else 4
    if time_last:
        threads, most = (64, 8) if backward else (128, 4)
        segments = min(threads, next_power_of_2(rounds))
        block = min(next_power_of_2(channels), threads // segments)
    else:
        block = min(next_power_of_2(channels), 32 * lines)
        segments = min(next_power_of_2(rounds), 128 * lines // block)
        most = 32
    work = sequences * rounds * channels // (32 * lines)  # rounds of all warps together
    longest = next_power_of_2(-(-rounds // segments))
    iterations = min(most, longest, next_power_of_2(max(1, work // (2048 if backward else 16384))))
    return Tile(block, segments, iterations, warps=max(1, segments * block // (32 * lines)))


def kind(x):
    """What a launch depends on, but for addresses."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


class Plan(NamedTuple):
    """Of a forward or a backward pass: its launches, and the layout of what they write."""

    launch: Launch
    strides: tuple  # of y or dx
    state_shape: tuple
    partial_shape: tuple | None = None
    launch_sum: Launch | None = None


@functools.lru_cache(maxsize=1024)
def plan_forward(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state):
    from minimamba.kernels.causal_conv1d import causal_conv1d_forward_kernel as kernel

    strides, state_shape, programs, sizes, constants, warps = _plan(x, weight, cu_seqlens)
    flags = {"WIDTH": weight[0][1], "SILU": silu, "HAS_BIAS": bias is not None}
    flags |= {"HAS_INITIAL_STATE": initial_state is not None, "WANT_FINAL_STATE": return_final_state}
    numbers = (*sizes, *x[1], *strides, *weight[1], *_strides(initial_state))
    launch = Launch(kernel, programs * constants["BLOCKS"], numbers, warps, **flags, **constants)
    return Plan(launch, strides, state_shape)


@functools.lru_cache(maxsize=1024)
def plan_backward(x, weight, bias, initial_state, cu_seqlens, silu, grad_y, grad_final_state):
    from minimamba.kernels.causal_conv1d import causal_conv1d_backward_kernel as kernel
    from minimamba.kernels.causal_conv1d import sum_partial_kernel

    strides, state_shape, programs, sizes, constants, warps = _plan(x, weight, cu_seqlens, True)
    (channels, width), has_bias = weight[0], bias is not None
    flags = {"WIDTH": width, "SILU": silu, "HAS_BIAS": has_bias, "HAS_INITIAL_STATE": initial_state is not None}
    flags |= {"HAS_GRAD_FINAL_STATE": grad_final_state is not None}
    numbers = (*sizes, *x[1], *grad_y[1], *strides, *weight[1], *_strides(initial_state), *_strides(grad_final_state))
    launch = Launch(kernel, programs * constants["BLOCKS"], numbers, warps, **flags, **constants)
    block = min(32, next_power_of_2(channels))
    blocks = -(-channels // block)
    launch_sum = Launch(
        sum_partial_kernel, blocks * (width + has_bias), (programs, channels, blocks), 4,
        WIDTH=width, HAS_BIAS=has_bias, BLOCK_R=32, BLOCK_D=block,
    )  # fmt: skip
    return Plan(launch, strides, state_shape, (programs, width + has_bias, channels), launch_sum)


def _plan(x, weight, cu_seqlens, backward=False):
    """What both share: strides of y or dx, shape of the states, programs a block, sizes, constants, warps."""
    require_triton(x[3])
    import triton.language as tl

    (batch, length, channels), strides, dtype, _ = x
    sequences = batch if cu_seqlens is None else cu_seqlens[0][0] - 1
    time_last = _time_is_contiguous(x[0], strides)
    steps = -(-batch * length // sequences)
    tile = tile_for(steps, sequences, channels, dtype.itemsize, time_last=time_last, backward=backward)
    chunk = tile.segments * STEPS * tile.iterations
    chunks = -(-length // chunk)
    # Document s, starting at step p, owns the programs from p // chunk + s on: enough, wherever they start.
    programs = batch * chunks if cu_seqlens is None else length // chunk + sequences
    constants = {
        "PACKED": cu_seqlens is not None, "TIME_LAST": time_last,
        "VECTORS": time_last and cu_seqlens is None and _aligned(x[0], strides),
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "SEGMENTS": tile.segments, "BLOCK_D": tile.channels, "BLOCKS": -(-channels // tile.channels),
    }  # fmt: skip
    sizes = (length, channels, sequences, chunks, tile.iterations)
    dense = (length * channels, 1, length) if time_last else (length * channels, channels, 1)
    return dense, (sequences, channels, weight[0][1] - 1), programs, sizes, constants, tile.warps


@functools.lru_cache(maxsize=1024)
def plan_update(x, conv_state, weight, bias, silu):
    require_triton(x[3])
    import triton.language as tl

    from minimamba.kernels.causal_conv1d import causal_conv1d_update_kernel as kernel

    batch, channels = x[0]
    block = min(256, next_power_of_2(channels))
    blocks = -(-channels // block)
    return Launch(
        kernel, batch * blocks, (channels, *x[1], channels, *conv_state[1], *weight[1]), max(1, block // 64),
        WIDTH=weight[0][1], STATE=conv_state[0][2], SILU=silu, HAS_BIAS=bias is not None,
        DTYPE=tl.float64 if x[2] == torch.float64 else tl.float32, BLOCK_D=block, BLOCKS=blocks,
    )  # fmt: skip


def _time_is_contiguous(shape, strides):
    """Whether time, not the channels, is to lie along the lanes of a warp: a (B, D, L) tensor seen as (B, L, D)."""
    return strides[1] == 1 and (strides[2] != 1 or shape[2] == 1)


def _aligned(shape, strides):
    """Whether Triton knows that rows begin and end at multiples of a vector: it looks for 16."""
    return all(n % 16 == 0 for n in (shape[1], strides[0], strides[2]))


def strides_like(x):
    """Strides of a dense tensor of x's shape, contiguous along the axis that x is."""
    _, length, channels = x.shape
    if _time_is_contiguous(x.shape, x.stride()):
        return (length * channels, 1, length)
    return (length * channels, channels, 1)


def wide(dtype):
    """The dtype of the computation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _strides(kind):
    return (0, 0, 0) if kind is None else kind[1]
