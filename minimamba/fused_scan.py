"""Chapter 11: the whole selective scan in one kernel. Launchers of kernels/selective_scan.py and their sizes."""

from typing import NamedTuple

import torch

from minimamba.triton_scan import next_power_of_2, require_triton


class Tile(NamedTuple):
    """Block sizes of a program: `steps` x `channels` x `states` numbers in registers, on `warps` warps."""

    steps: int
    channels: int
    states: int
    warps: int


def tile_for(states, group_size):
    """Choose the simple kernels' tile by rule, not by autotuning: no pause at the first call, the same bits always.

    About 2048 numbers a tile, 16 a thread; the backward pass holds half a dozen such tiles in registers.
    `steps` is also the distance between checkpoints, so it depends on nothing but the number of states.
    """
    block_n = next_power_of_2(states)
    steps = 32 if block_n <= 64 else 16
    channels = min(next_power_of_2(group_size), max(1, 2048 // (steps * block_n)))
    return Tile(steps, channels, block_n, warps=8 if steps * channels * block_n > 2048 else 4)


def checkpoint_shape(u, A, B, C, cu_seqlens):
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
    A, D, delta_bias, initial_state = contiguous(A, D, delta_bias, initial_state)
    y = u.new_empty(u.shape)
    final_state = A.new_empty(sizes.sequences, *A.shape)
    checkpoints = A.new_empty(checkpoint_shape(u, A, B, C, cu_seqlens) if save else 0)
    blocks_per_group = -(-sizes.group_size // sizes.tile.channels)
    with torch.cuda.device_of(u):  # where Triton launches; does nothing for the interpreter's CPU tensors
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
    dtype of its argument; None for D, z, delta_bias, initial_state where the argument is None.
    """
    require_triton(u.device)
    from minimamba.kernels.selective_scan import selective_scan_backward_kernel

    sizes = _Sizes(u, A, B, C, cu_seqlens)
    A, D, delta_bias, grad_final_state = contiguous(A, D, delta_bias, grad_final_state)
    blocks_per_group = -(-sizes.group_size // sizes.tile.channels)
    programs = programs_per_group(sizes.group_size, blocks_per_group, A.shape[1])
    du, ddelta, dz = (None if x is None else x.new_empty(x.shape) for x in (u, delta, z))
    dA, dinitial_state = (A.new_empty(sizes.sequences, *A.shape) for _ in range(2))
    dB, dC = (A.new_empty(_partial_shape(x, u, A, programs, sizes)) for x in (B, C))
    dD, ddelta_bias = (None if x is None else A.new_empty(sizes.sequences, u.shape[2]) for x in (D, delta_bias))
    with torch.cuda.device_of(u):
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
    dinitial_state = None if initial_state is None else dinitial_state
    return du, ddelta, dA.sum(0), dB, dC, dD, dz, ddelta_bias, dinitial_state


def bytes_moved(
    batch, length, channels, states, *, backward=False, element_size=4, groups=1, every_access=True, save=True
):
    """Count the bytes that one launch of the kernel moves, by tensor, without running it. -> {name: bytes}

    For varying B and C, with D, z and delta_bias, no initial state and no gradient of the final state. u, delta,
    B, C, z and their like take `element_size` bytes a number (2, 4 or 8), the rest 4 (8 beside 8).
    `every_access=True` counts every load and store the programs issue, as if there were no cache; False counts
    each number once, as if a cache kept all that is read again. A device lies between the two.
    `save=False` leaves out the forward pass's checkpoints.
    """
    u, A, B = (
        torch.empty(shape, device="meta")
        for shape in ((batch, length, channels), (channels, states), (batch, length, groups, states))
    )
    sizes = _Sizes(u, A, B, B, None)
    tiles = -(-length // sizes.tile.steps)
    blocks = -(-sizes.group_size // sizes.tile.channels)
    wide = max(element_size, 4)
    step = batch * length * channels * element_size  # one tensor like u
    row = batch * length * groups * states  # numbers of B
    state = batch * channels * states * wide  # one state of every channel
    channel = channels * wide * (batch if every_access else 1)  # D, read by every sequence

    moved = {"u": step, "delta": step, "z": step, "A": states * channel, "D": channel, "delta_bias": channel}
    moved["B"] = moved["C"] = row * element_size * (blocks if every_access else 1)
    if not backward:
        moved |= {"y": step, "final_state": state}
        return moved | ({"checkpoints": tiles * state} if save else {})

    if every_access:  # Δ_{t+1} is loaded too, except behind the last step of a tile
        moved["delta"] += batch * (length - tiles) * channels * element_size
    moved |= {"checkpoints": tiles * state} | dict.fromkeys(("grad_y", "du", "ddelta", "dz"), step)
    moved |= {"dA": state, "dinitial_state": state, "dD": state // states, "ddelta_bias": state // states}
    programs = programs_per_group(sizes.group_size, blocks, states)
    # A program's first block of channels writes its sums, each further one reads and writes them.
    accesses = 2 * blocks - programs if every_access else programs
    moved["dB"] = moved["dC"] = row * wide * accesses
    return moved


def bytes_moved_materialised(batch, length, channels, states, *, backward=False, element_size=4, groups=1):
    """Count the same scan done by five kernels that hand (Batch, L, D, N) tensors to each other through memory.

    The best that such kernels can do: each reads its inputs once and writes its outputs once, and the backward
    pass finds Ā and h stored. Returns {kernel: (bytes read, bytes written)}, in the order of execution.
    """
    wide = max(element_size, 4)
    full = batch * length * channels * states * wide  # Ā, B̄u, h, and their gradients
    step = batch * length * channels * element_size
    row = batch * length * groups * states * element_size
    A, channel = channels * states * wide, channels * wide
    if not backward:
        return {
            "Ā = exp(ΔA)": (step + A, full),
            "B̄u = ΔuB": (2 * step + row, full),
            "h = scan(Ā, B̄u)": (2 * full, full),
            "y = Ch": (full + row, step),
            "y = (y + Du) silu(z)": (3 * step + channel, step),
        }
    return {
        "gate, skip": (4 * step + channel, 3 * step + channel),  # dy, y, u, z -> dy, du, dz, dD
        "y = Ch": (step + full + row, full + row),  # dy, h, C -> dh, dC
        "scan": (3 * full, 2 * full),  # dh, Ā, h -> g, dĀ
        "B̄u = ΔuB": (full + 3 * step + row, 2 * step + row),  # g, Δ, u, du, B -> du, dΔ, dB
        "Ā = exp(ΔA)": (2 * full + 2 * step + A, step + A),  # dĀ, Ā, Δ, dΔ, A -> dΔ, dA
    }


class _Sizes:
    """Counts that both launches share: sequences, groups of channels that share B and C, and the tile."""

    def __init__(self, u, A, B, C, cu_seqlens):
        self.sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.groups = max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))
        self.group_size = u.shape[2] // self.groups
        self.tile = tile_for(A.shape[1], self.group_size)


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


def contiguous(*tensors):
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


def programs_per_group(group_size, blocks_per_group, states):
    """How many programs share the channels of a group in the backward pass.

    Each keeps dB and dC sums of its own, so more programs mean more memory: together at most as much as
    du in float32.
    """
    return max(1, min(blocks_per_group, group_size // (2 * states)))
