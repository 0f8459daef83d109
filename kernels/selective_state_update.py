"""One decoding step of the selective SSM as one launch: h <- exp(Δ A) h + Δ B x in place, y = (C h + D x) silu(z).

A tile is BLOCK_D channels x BLOCK_N states of one batch entry. It is bound by the state, which is read and written
once: 8 bytes for each of Batch x D x N numbers in float32. Channels that share B and C are a group, and a program
stays within one, so it reads one row of each. What a model keeps from step to step (its channels, groups and heads)
is constant to the compiler, so that a program begins without dividing whole numbers.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minimamba.kernels.selective_scan import sigmoid, softplus
from minimamba.triton_scan import Launch

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Block sizes of a program, `channels` x `states` numbers on `warps` warps."""

    channels: int
    states: int
    warps: int


def tile_for(batch, groups, group_size, states):
    """Choose the tile by rule: 512 numbers on one warp, halved until there are 264 programs.

    A thread then has 64 bytes of the state on their way, and 32 warps fit a multiprocessor. With up to 16 states there
    are at least as many channels as threads, so Triton computes what is per channel once and not for each state. A
    small batch is bound by the time that one program takes: two programs for each multiprocessor of an H100.
    """
    block_n = triton.next_power_of_2(states)
    channels = min(triton.next_power_of_2(group_size), max(1, 512 // block_n))
    while channels > 1 and channels * block_n > 128 and batch * groups * triton.cdiv(group_size, channels) < 264:
        channels //= 2
    return Tile(channels, block_n, warps=min(8, max(1, channels * block_n // 512)))


@functools.lru_cache(maxsize=1024)
def _launch_for(batch, heads, states, groups, flags, shared_A, wide, strides, dtypes_and_device):
    """The launch for such shapes, strides and dtypes; the last argument only tells one from another."""
    has_D, has_z, has_bias, dt_softplus = flags
    group_size = math.prod(heads) // groups
    tile = tile_for(batch, groups, group_size, states)
    return Launch(
        selective_state_update_kernel, batch * groups * -(-group_size // tile.channels), strides, tile.warps,
        GROUPS=groups, GROUP_SIZE=group_size, WIDTH=heads[-1], STATES=states, SHARED_A=shared_A, HAS_D=has_D,
        HAS_Z=has_z, HAS_BIAS=has_bias, SOFTPLUS=dt_softplus, DTYPE=tl.float64 if wide else tl.float32,
        BLOCK_D=tile.channels, BLOCK_N=tile.states,
    )  # fmt: skip


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """Launch the kernel. Arguments as in `minimamba.selective_state_update`, validated; any strides. -> y"""
    batch, *heads, states = state.shape
    flags = (D is not None, z is not None, dt_bias is not None, dt_softplus)
    strides = (
        *_strides(state, 4), *_strides(x, 3), *_strides(dt, 3), *_strides(z, 3), *_strides(A, 3, first=0),
        *_strides(B, 3), *_strides(C, 3), *_strides(D, 2, first=0), *_strides(dt_bias, 2, first=0),
    )  # fmt: skip
    dtypes = (x.dtype, dt.dtype, B.dtype, C.dtype, None if z is None else z.dtype, x.device)
    launch = _launch_for(
        batch, tuple(heads), states, B.shape[1] if B.ndim == 3 else 1, flags, A.stride(-1) == 0,
        state.dtype == torch.float64, strides, dtypes,
    )  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(state, x, dt, A, B, C, D, z, dt_bias, y)
    return y


def _strides(x, axes, first=1):
    """Strides of `x`, with a zero for the axis of heads (or groups) at position `first` where it has none."""
    if x is None:
        return (0,) * axes
    strides = x.stride()
    return strides if len(strides) == axes else (*strides[:first], 0, *strides[first:])


# Holds: one tile of the state. Reads and writes it once, and reads A (D x N, from a cache after the first entry of
# the batch), a row of B and of C, and x, Δ, z; writes y.
@triton.jit
def selective_state_update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y,
    state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, dt_p, z_b, z_h, z_p, A_h, A_p, A_n,
    B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_p, dt_bias_h, dt_bias_p,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, SHARED_A: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of one group, all states, of one batch entry."""
    BLOCKS: tl.constexpr = (GROUP_SIZE + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    batch = (program // (GROUPS * BLOCKS)).to(tl.int64)  # int64: offsets pass 2^31 in large tensors
    group = (program // BLOCKS % GROUPS).to(tl.int64)
    in_group = (program % BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_d = in_group < GROUP_SIZE
    if GROUP_SIZE % BLOCK_D == 0:
        mask_d = tl.full((BLOCK_D,), True, tl.int1)
    mask_n = n < STATES
    if STATES == BLOCK_N:
        mask_n = tl.full((BLOCK_N,), True, tl.int1)
    mask = mask_d[:, None] & mask_n[None, :]
    d = group * GROUP_SIZE + in_group
    h = d // WIDTH
    p = d % WIDTH
    if GROUPS * GROUP_SIZE == WIDTH:
        h = tl.zeros((BLOCK_D,), tl.int64)
        p = d

    # Every load before the first arithmetic: a step of a small batch takes as long as memory's latency, once. The rows
    # come last, because Triton then computes `out` as they lie, one channel a thread, and not once for each state.
    state += batch * state_b + (h * state_h + p * state_p)[:, None] + (n * state_n)[None, :]
    old = tl.load(state, mask=mask, other=0.0)
    A += (h * A_h + p * A_p)[:, None]
    if SHARED_A:  # one number a channel, as in Mamba-2
        A_tile = tl.load(A, mask=mask_d[:, None], other=0.0)
    else:
        A_tile = tl.load(A + (n * A_n)[None, :], mask=mask, other=0.0)
    B_row = tl.load(B + batch * B_b + group * B_g + n * B_n, mask=mask_n, other=0.0)
    C_row = tl.load(C + batch * C_b + group * C_g + n * C_n, mask=mask_n, other=0.0)
    step = tl.load(dt + batch * dt_b + h * dt_h + p * dt_p, mask=mask_d, other=0.0)
    if HAS_BIAS:
        bias = tl.load(dt_bias + h * dt_bias_h + p * dt_bias_p, mask=mask_d, other=0.0)
    x_row = tl.load(x + batch * x_b + h * x_h + p * x_p, mask=mask_d, other=0.0)
    if HAS_D:
        skip = tl.load(D + h * D_h + p * D_p, mask=mask_d, other=0.0)
    if HAS_Z:
        gate = tl.load(z + batch * z_b + h * z_h + p * z_p, mask=mask_d, other=0.0)
    step = step.to(DTYPE)
    x_row = x_row.to(DTYPE)
    B_row = B_row.to(DTYPE)
    C_row = C_row.to(DTYPE)
    if HAS_BIAS:
        step += bias
    if SOFTPLUS:
        step = softplus(step)
    if HAS_D:
        skip *= x_row
    if HAS_Z:
        gate = gate.to(DTYPE)
        gate *= sigmoid(gate)

    new = tl.exp2((step * LOG2_E)[:, None] * A_tile) * old + (step * x_row)[:, None] * B_row[None, :]
    # fma(x, y, 0) is a product that is not fused into the sum, so every copy of a sum has the same bits.
    out = tl.sum(tl.fma(new, tl.broadcast_to(C_row[None, :], new.shape), 0.0), axis=1)
    if HAS_D:
        out += skip
    if HAS_Z:
        out *= gate
    tl.store(state, new, mask=mask)  # behind every load, which the compiler would not move before a store
    tl.store(y + batch * (GROUPS * GROUP_SIZE) + d, out.to(y.dtype.element_ty), mask=mask_d)
