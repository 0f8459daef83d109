"""One decoding step of the selective SSM as one launch: h <- exp(Δ A) h + Δ B x in place, y = (C h + D x) silu(z).

A tile is BLOCK_D channels x BLOCK_N states of one batch entry. It is bound by the state, which is read and written
once: 8 bytes for each of Batch x D x N numbers in float32. Channels that share B and C are a group, and a program
stays within one, so it reads one row of each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Block sizes of a program, `channels` x `states` numbers on `warps` warps."""

    channels: int
    states: int
    warps: int


def tile_for(batch, groups, group_size, states):
    """Choose the tile by rule: 1024 numbers, 8 a thread in two 16-byte loads, halved until there are 264 programs.

    That is two for each multiprocessor of an H100: a small batch is bound by the time one program takes.
    """
    block_n = triton.next_power_of_2(states)
    channels = min(triton.next_power_of_2(group_size), max(1, 1024 // block_n))
    while channels > 1 and channels * block_n > 128 and batch * groups * triton.cdiv(group_size, channels) < 264:
        channels //= 2
    return Tile(channels, block_n, warps=min(8, max(1, channels * block_n // 256)))


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """Launch the kernel. Arguments as in `minimamba.selective_state_update`, validated; any strides. -> y"""
    batch, *heads, states = state.shape
    channels = x[0].numel()
    groups = B.shape[1] if B.ndim == 3 else 1
    group_size = channels // groups
    tile = tile_for(batch, groups, group_size, states)
    blocks = -(-group_size // tile.channels)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        selective_state_update_kernel[(batch * groups * blocks,)](
            state, x, dt, A, B, C, D, z, dt_bias, y,
            channels, heads[-1], group_size, blocks,
            *_strides(state, 4), *_strides(x, 3), *_strides(dt, 3), *_strides(z, 3), *_strides(A, 3, first=0),
            *_strides(B, 3), *_strides(C, 3), *_strides(D, 2, first=0), *_strides(dt_bias, 2, first=0),
            STATES=states, HEADS=len(heads) > 1, SHARED_A=A.stride(-1) == 0, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
            DTYPE=tl.float64 if state.dtype == torch.float64 else tl.float32,
            BLOCK_D=tile.channels, BLOCK_N=tile.states, num_warps=tile.warps,
        )  # fmt: skip
    return y


def _strides(x, axes, first=1):
    """Strides of `x`, with a zero for the axis of heads (or groups) at position `first` where it has none."""
    if x is None:
        return (0,) * axes
    strides = x.stride()
    return strides if len(strides) == axes else (*strides[:first], 0, *strides[first:])


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to full precision also where exp(x) is far below 1.

    log1p(e) = log(w) e / (w - 1) with w = 1 + e as rounded: its rounding error cancels (Kahan).
    """
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow at either end."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


# Holds: one tile of the state. Reads and writes it once, and reads A (D x N, from a cache after the first entry of
# the batch), a row of B and of C, and x, Δ, z; writes y.
@triton.jit
def selective_state_update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y,
    channels, width, group_size, blocks,
    state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, dt_p, z_b, z_h, z_p, A_h, A_p, A_n,
    B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_p, dt_bias_h, dt_bias_p,
    STATES: tl.constexpr, HEADS: tl.constexpr, SHARED_A: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of one group, all states, of one batch entry."""
    program = tl.program_id(0)
    groups = channels // group_size
    batch = (program // (groups * blocks)).to(tl.int64)  # int64: offsets pass 2^31 in large tensors
    group = program // blocks % groups
    in_group = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_size + in_group
    if HEADS:
        h = (d // width).to(tl.int64)
        p = (d % width).to(tl.int64)
    else:
        h = tl.zeros((BLOCK_D,), tl.int64)
        p = d.to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_d = in_group < group_size
    mask_n = n < STATES
    mask = mask_d[:, None] & mask_n[None, :]

    # The state first: everything else arrives while it is on its way.
    state += batch * state_b + (h * state_h + p * state_p)[:, None] + (n * state_n)[None, :]
    old = tl.load(state, mask=mask, other=0.0)
    A += (h * A_h + p * A_p)[:, None]
    if SHARED_A:  # one number a channel, as in Mamba-2
        A_tile = tl.load(A, mask=mask_d[:, None], other=0.0)
    else:
        A_tile = tl.load(A + (n * A_n)[None, :], mask=mask, other=0.0)
    B_row = tl.load(B + batch * B_b + group.to(tl.int64) * B_g + n * B_n, mask=mask_n, other=0.0).to(DTYPE)
    C_row = tl.load(C + batch * C_b + group.to(tl.int64) * C_g + n * C_n, mask=mask_n, other=0.0).to(DTYPE)
    x_row = tl.load(x + batch * x_b + h * x_h + p * x_p, mask=mask_d, other=0.0).to(DTYPE)
    step = tl.load(dt + batch * dt_b + h * dt_h + p * dt_p, mask=mask_d, other=0.0).to(DTYPE)
    if HAS_BIAS:
        step += tl.load(dt_bias + h * dt_bias_h + p * dt_bias_p, mask=mask_d, other=0.0)
    if SOFTPLUS:
        step = softplus(step)

    new = tl.exp2((step * LOG2_E)[:, None] * A_tile) * old + (step * x_row)[:, None] * B_row[None, :]
    tl.store(state, new, mask=mask)
    # fma(x, y, 0) is a product that is not fused into the sum, so every copy of a sum has the same bits.
    out = tl.sum(tl.fma(new, tl.broadcast_to(C_row[None, :], new.shape), 0.0), axis=1)
    if HAS_D:
        out += tl.load(D + h * D_h + p * D_p, mask=mask_d, other=0.0) * x_row
    if HAS_Z:
        gate = tl.load(z + batch * z_b + h * z_h + p * z_p, mask=mask_d, other=0.0).to(DTYPE)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * channels + d, out.to(y.dtype.element_ty), mask=mask_d)
