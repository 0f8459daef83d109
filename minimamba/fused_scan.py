"""Chapter 11: the whole selective scan in one kernel. Launchers of kernels/selective_scan.py and their sizes."""

from typing import NamedTuple

import torch

from minimamba.triton_scan import require_triton


class Tile(NamedTuple):
    """Block sizes of a program: `steps` x `channels` x `states` numbers in registers, on `warps` warps."""

    steps: int
    channels: int
    states: int
    warps: int


def tile_for(states, group_size):
    """Choose the tile by rule, not by autotuning: no pause at the first call, and the same bits every time.

    About 2048 numbers a tile, 16 a thread; the backward pass holds half a dozen such tiles in registers.
    `steps` is also the distance between checkpoints, so it depends on nothing but the number of states.
    """
    block_n = _next_power_of_2(states)
    steps = 32 if block_n <= 64 else 16
    channels = min(_next_power_of_2(group_size), max(1, 2048 // (steps * block_n)))
    return Tile(steps, channels, block_n, warps=8 if steps * channels * block_n > 2048 else 4)


def checkpoint_shape(u, A, cu_seqlens):
    """Shape of the states kept for the backward pass: one before each tile of each sequence, (tiles, D, N).

    Sequence s starting at flat step p owns the rows from p // steps + s on: always enough, and known
    without reading where the documents of a packed row begin.
    """
    batch, length, channels = u.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    steps = tile_for(A.shape[1], channels).steps
    return (batch * length // steps + sequences, channels, A.shape[1])


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save):
    """Launch the forward kernel. Arguments as in `minimamba.selective_scan`, validated.

    Returns y (Batch, L, D), the final states (sequences, D, N) and the checkpoints that
    `backward` needs (empty unless `save`).
    """
    require_triton(u.device)
    from minimamba.kernels.selective_scan import selective_scan_forward_kernel

    sizes = _Sizes(u, A, B, C, cu_seqlens)
    A, D, delta_bias, initial_state = _contiguous(A, D, delta_bias, initial_state)
    y = u.new_empty(u.shape)
    final_state = A.new_empty(sizes.sequences, *A.shape)
    checkpoints = A.new_empty(checkpoint_shape(u, A, cu_seqlens) if save else 0)
    blocks_per_group = -(-sizes.group_size // sizes.tile.channels)
    with _device_of(u):
        selective_scan_forward_kernel[(sizes.sequences * sizes.groups * blocks_per_group,)](
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
            y, final_state, checkpoints,
            u.shape[1], u.shape[2], A.shape[1], sizes.group_size, blocks_per_group,
            *u.stride(), *delta.stride(), *_strides(z), *y.stride(), *_map_strides(B), *_map_strides(C),
            B_VARYING=B.ndim > 2, C_VARYING=C.ndim > 2, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            HAS_INITIAL_STATE=initial_state is not None, PACKED=cu_seqlens is not None,
            SAVE=save, **_constants(A, sizes.tile),
        )  # fmt: skip
    return y, final_state, checkpoints


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
    """Launch the backward kernel; `grad_final_state` may be None. The checkpoints hold `initial_state` too.

    Returns the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, in that order, each in the
    dtype of its argument; None for D, z, delta_bias where the argument is None.
    """
    require_triton(u.device)
    from minimamba.kernels.selective_scan import selective_scan_backward_kernel

    sizes = _Sizes(u, A, B, C, cu_seqlens)
    A, D, delta_bias, grad_final_state = _contiguous(A, D, delta_bias, grad_final_state)
    blocks_per_group = -(-sizes.group_size // sizes.tile.channels)
    programs = _programs_per_group(sizes, blocks_per_group, A.shape[1])
    du, ddelta, dz = (None if x is None else x.new_empty(x.shape) for x in (u, delta, z))
    dA, dinitial_state = (A.new_empty(sizes.sequences, *A.shape) for _ in range(2))
    dB, dC = (A.new_empty(_partial_shape(x, u, A, programs, sizes)) for x in (B, C))
    dD, ddelta_bias = (None if x is None else A.new_empty(sizes.sequences, u.shape[2]) for x in (D, delta_bias))
    with _device_of(u):
        selective_scan_backward_kernel[(sizes.sequences * sizes.groups * programs,)](
            u, delta, A, B, C, D, z, delta_bias, cu_seqlens, checkpoints, grad_y, grad_final_state,
            du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state,
            u.shape[1], u.shape[2], A.shape[1], sizes.group_size, blocks_per_group, programs, u.shape[0],
            *u.stride(), *delta.stride(), *_strides(z), *grad_y.stride(), *_map_strides(B), *_map_strides(C),
            *du.stride(), *ddelta.stride(), *_strides(dz),
            B_VARYING=B.ndim > 2, C_VARYING=C.ndim > 2, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            HAS_GRAD_FINAL_STATE=grad_final_state is not None, PACKED=cu_seqlens is not None,
            **_constants(A, sizes.tile),
        )  # fmt: skip
    dB, dC = (partial.sum(0).view(x.shape).to(x.dtype) for partial, x in ((dB, B), (dC, C)))
    dD, ddelta_bias = (None if x is None else x.sum(0) for x in (dD, ddelta_bias))
    return du, ddelta, dA.sum(0), dB, dC, dD, dz, ddelta_bias, dinitial_state


class _Sizes:
    """Counts that both launches share: sequences, groups of channels that share B and C, and the tile."""

    def __init__(self, u, A, B, C, cu_seqlens):
        self.sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.groups = max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))
        self.group_size = u.shape[2] // self.groups
        self.tile = tile_for(A.shape[1], self.group_size)


def _programs_per_group(sizes, blocks_per_group, states):
    """How many programs share the channels of a group in the backward pass.

    Each keeps dB and dC sums of its own, so more programs mean more memory: together at most as much as
    du in float32.
    """
    return max(1, min(blocks_per_group, sizes.group_size // (2 * states)))


def _partial_shape(x, u, A, programs, sizes):
    if x.ndim == 2:
        return (sizes.sequences, *A.shape)
    return (programs, u.shape[0], u.shape[1], sizes.groups, A.shape[1])


def _map_strides(x):
    """Strides of B or C over (batch, step, group, channel, state); a constant one moves with the channel only."""
    if x.ndim == 2:
        return (0, 0, 0, *x.stride())
    batch, step, *group, state = x.stride()
    return (batch, step, *(group or [0]), 0, state)


def _strides(x):
    return (0, 0, 0) if x is None else x.stride()


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def _constants(A, tile):
    import triton.language as tl

    return {
        "DTYPE": tl.float64 if A.dtype == torch.float64 else tl.float32,
        "BLOCK_T": tile.steps,
        "BLOCK_D": tile.channels,
        "BLOCK_N": tile.states,
        "num_warps": tile.warps,
    }


def _device_of(u):
    """Triton launches on the current device, so make it u's. A no-op for the interpreter's CPU tensors."""
    return torch.cuda.device_of(u)


def _next_power_of_2(n):
    return 1 << (n - 1).bit_length()
