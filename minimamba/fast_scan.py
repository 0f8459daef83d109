"""Chapter 11's fast kernels: the calls they serve, their plan, the launchers of kernels/selective_scan_fast.py."""

import functools
import math
from typing import NamedTuple

import torch

from minimamba.triton_scan import Launch


class Tile(NamedTuple):
    """A thread holds `states` x `channels`, `lanes` threads hold all states of a channel."""

    steps: int
    lanes: int
    states: int
    channels: int
    warps: int

    @property
    def block(self):
        """Channels of a program."""
        return self.channels * (32 // self.lanes) * self.warps

    def constants(self, u):
        steps, lanes, states, channels, warps = self
        time_first = u.strides[1] == 1 and u.strides[2] != 1
        return {"TIME_FIRST": time_first, "T": steps, "G": lanes, "K": states, "c": channels, "W": warps}


def serves(u, A, B, C):
    """Whether kernels/selective_scan_fast.py serves: on an NVIDIA GPU, in float32 or half, with varying B and C.

    For the rest (the interpreter, other GPUs, float64, constant B or C, more than 256 states) there is
    kernels/selective_scan.py. Times of both: kernels/NOTES.md.
    """
    return (
        u.is_cuda
        and _has_gluon(u.device)
        and A.dtype == torch.float32
        and B.ndim > 2
        and C.ndim > 2
        and A.shape[1] <= 256
    )


@functools.cache
def _has_gluon(device):
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


EVERY = 64  # steps between checkpoints
SUM_BLOCK = 512  # numbers a program of the last kernel sums up


@functools.lru_cache(maxsize=4096)
def plan(sequences, length, group_size, states, backward, multiprocessors, shared_memory):
    """Choose the tile, and into pieces of how many steps a sequence is cut (None: it stays whole).

    `sequences` counts a group of channels of a sequence as one. A thread has 8 numbers to update at each step, so that
    they hide each other's latency: as many states as fit one load, in several channels. Forward, two tiles are weighed,
    the second half as wide. Backward, 8 warps (4 where shared memory is small) sum dB and dC over as many channels as
    possible, since each program's sums go through memory.

    The time of a plan: programs go over the machine in rounds, a round takes as long as the steps of a program, a few
    more for its start, and where there are pieces a first kernel. Constants measured on an H100: kernels/NOTES.md.
    """
    if backward:
        tiles = {_wide(states, 4, 8 if shared_memory >= 200_000 else 4): 1.0}
        alone, first_kernel = 1.0, 0.2
    else:
        wide = _wide(states, 16, 4)
        tiles = {wide: 1.0}
        if wide.states == 4 and wide.lanes <= 16:
            tiles[wide._replace(lanes=2 * wide.lanes, states=2)] = 0.56
        alone, first_kernel = 1.15, 0.7  # a program alone on a multiprocessor leaves it idle now and then

    best_time, best = math.inf, None
    for tile, cost in tiles.items():
        tile = _fit(tile, group_size)
        programs = sequences * -(-group_size // tile.block)
        for pieces in range(1, 65):
            steps = length if pieces == 1 else -(-length // pieces // EVERY) * EVERY
            if pieces > 1 and steps >= length:
                break
            rounds = -(-programs * -(-length // steps) // multiprocessors)
            time = max(rounds, alone) * (steps + 32) * cost * (1.0 if pieces == 1 else 1.0 + first_kernel)
            if time < best_time:
                best_time, best = time, (tile, None if pieces == 1 else steps)
    return best


def _wide(states, steps, warps):
    """The tile whose threads have 8 numbers each: as many states as one load brings, of several channels."""
    padded = next_power_of_2(states)
    per_thread = min(4, padded) if padded <= 128 else 8
    return Tile(steps, padded // per_thread, per_thread, 8 // per_thread, warps)


def _fit(tile, group_size):
    """Take warps away that would have no channels, or more than shared memory has room for."""
    while tile.warps > 1 and (tile.block >= 2 * group_size or tile.block > 512):
        tile = tile._replace(warps=tile.warps // 2)
    return tile


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save, y, final_state, checkpoints
):
    """Fill y, final_state and, with `save`, checkpoints."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    cut, launches = _forward_launches(_kinds(*inputs), u.device, delta_softplus, save)
    piece_states, piece_steps = cut.buffers(A)
    for launch in launches:
        launch(*inputs, y, final_state, checkpoints, piece_states, piece_steps)


@functools.lru_cache(maxsize=1024)
def _forward_launches(kinds, device, delta_softplus, save):
    from minimamba.kernels.selective_scan_fast import selective_scan_forward_kernel

    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens = kinds
    cut = _Cut(u, A, B, cu_seqlens, *_machine(device), backward=False)
    numbers = (*cut.numbers, *u.strides, *delta.strides, *_strides(z), *u.dense, *_map_strides(B), *_map_strides(C))
    launches = [
        Launch(
            selective_scan_forward_kernel, cut.pieces * cut.blocks, numbers, cut.tile.warps,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            HAS_INITIAL_STATE=initial_state is not None, PACKED=cu_seqlens is not None, SPLIT=cut.split,
            LOCAL=local, SAVE=save and not local, EVERY=EVERY, **cut.tile.constants(u),
        )
        for local in ((True, False) if cut.split else (False,))
    ]  # fmt: skip
    return cut, launches


def backward(
    u, delta, A, B, C, D, z, delta_bias, cu_seqlens, checkpoints, grad_y, grad_final_state, delta_softplus,
    du, ddelta, dz,
):  # fmt: skip
    """Fill du, ddelta and dz. Returns the gradients of A, B, C, D, delta_bias and the initial state."""
    kinds = _kinds(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, grad_y, grad_final_state)
    cut, programs, adjoint, main, sums = _backward_launches(kinds, u.device, delta_softplus)
    # What each program, or each piece, sums up by itself; and the sums of these.
    part_dBC = A.new_empty(2, programs, *u.shape[:2], cut.groups, A.shape[1])
    part_dA, part_dD, part_dbias = (
        None if x is None else A.new_empty(cut.pieces, *x.shape) for x in (A, D, delta_bias)
    )
    dA, dB, dC, dD, dbias = (None if x is None else x.new_empty(x.shape) for x in (A, B, C, D, delta_bias))
    dinitial_state = A.new_empty(cut.sequences, *A.shape)
    piece_adjoints, piece_steps = cut.buffers(A)
    if cut.split:
        adjoint(delta, A, C, z, delta_bias, cu_seqlens, grad_y, piece_adjoints, piece_steps)
    main(
        u, delta, A, B, C, D, z, delta_bias, cu_seqlens, checkpoints, grad_y, grad_final_state,
        piece_adjoints, piece_steps, du, ddelta, part_dA, part_dBC, part_dD, dz, part_dbias, dinitial_state,
    )  # fmt: skip
    sums(part_dBC, part_dA, part_dD, part_dbias, dB, dC, dA, dD, dbias)
    return dA, dB, dC, dD, dbias, dinitial_state


@functools.lru_cache(maxsize=1024)
def _backward_launches(kinds, device, delta_softplus):
    from minimamba.kernels import selective_scan_fast as kernels

    u, delta, A, B, C, D, z, delta_bias, cu_seqlens, grad_y, grad_final_state = kinds
    cut = _Cut(u, A, B, cu_seqlens, *_machine(device), backward=True)
    options = {
        "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None, "SOFTPLUS": delta_softplus,
        "PACKED": cu_seqlens is not None,
    }  # fmt: skip
    # The first kernel keeps no states, so it does better with the forward pass's tile.
    tile = _fit(_wide(A.shape[1], 16, 4), cut.group_size)
    blocks = -(-cut.group_size // tile.block)
    lengths, channels, states, group_size, blocks_per_group, *pieces = cut.numbers
    adjoint = Launch(
        kernels.selective_scan_adjoint_kernel, cut.pieces * cut.groups * blocks,
        (lengths, channels, states, group_size, blocks, *pieces,
         *delta.strides, *_strides(z), *grad_y.strides, *_map_strides(C)),
        tile.warps, **options, **tile.constants(u),
    )  # fmt: skip
    programs = programs_per_group(cut.group_size, blocks_per_group, states)
    main = Launch(
        kernels.selective_scan_backward_kernel, cut.pieces * cut.groups * programs,
        (lengths, channels, states, group_size, blocks_per_group, programs, u.shape[0], *pieces,
         *u.strides, *delta.strides, *_strides(z), *grad_y.strides, *_map_strides(B), *_map_strides(C),
         *u.dense, *u.dense, *u.dense),
        cut.tile.warps, HAS_D=D is not None, **options, HAS_GRAD_FINAL_STATE=grad_final_state is not None,
        SPLIT=cut.split, EVERY=EVERY, **cut.tile.constants(u),
    )  # fmt: skip
    columns = [0 if x is None else math.prod(x.shape) for x in (B, C, A, D, delta_bias)]
    sums = Launch(
        kernels.sum_partials_kernel, sum(-(-n // SUM_BLOCK) for n in columns), (programs, cut.pieces, *columns), 4,
        HAS_D=D is not None, HAS_BIAS=delta_bias is not None, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    return cut, programs, adjoint, main, sums


class _Kind(NamedTuple):
    """All of a tensor that a launch depends on, but its address."""

    dtype: torch.dtype
    shape: tuple
    strides: tuple

    @property
    def dense(self):
        """Strides of a contiguous tensor of this shape, such as a gradient of it."""
        return (self.shape[1] * self.shape[2], self.shape[2], 1)


def _kinds(*tensors):
    return tuple([None if x is None else _Kind(x.dtype, x.shape, x.stride()) for x in tensors])


class _Cut:
    """Into what the work is cut: groups of channels, blocks of channels, pieces of sequences."""

    def __init__(self, u, A, B, cu_seqlens, multiprocessors, shared_memory, backward):
        batch, length, channels = u.shape
        states = A.shape[1]
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.groups = B.shape[2] if len(B.shape) == 4 else 1
        self.group_size = channels // self.groups
        # How long the documents of a packed row are is not known here: it is cut as one sequence would be.
        self.tile, piece_length = plan(
            batch * self.groups, length, self.group_size, states, backward, multiprocessors, shared_memory
        )
        blocks_per_group = -(-self.group_size // self.tile.block)
        self.blocks = self.groups * blocks_per_group
        self.split = piece_length is not None
        if not self.split:
            pieces, self.pieces = 1, self.sequences
        elif cu_seqlens is None:
            pieces = -(-length // piece_length)
            self.pieces = batch * pieces
        else:
            pieces = 0  # differs from document to document: the kernels find out
            self.pieces = length // piece_length + self.sequences
        counts = (length, channels, states, self.group_size, blocks_per_group)
        self.numbers = (*counts, self.sequences, piece_length or length, pieces)

    def buffers(self, A):
        """Room for what the first kernel leaves for the second: a state and a sum of steps for each piece."""
        if not self.split:
            return None, None
        return A.new_empty(self.pieces, A.shape[1], A.shape[0]), A.new_empty(self.pieces, A.shape[0])


@functools.cache
def _machine(device):
    """Multiprocessors of a GPU, and bytes of shared memory that a program can have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def programs_per_group(group_size, blocks_per_group, states):
    """How many programs share the channels of a group in the backward pass.

    Each keeps dB and dC sums of its own, so more programs mean more memory: together at most as much as
    du in float32.
    """
    return max(1, min(blocks_per_group, group_size // (2 * states)))


def _map_strides(x):
    """Strides of a varying B or C over (batch, step, group, state)."""
    batch, step, *group, state = x.strides
    return (batch, step, *(group or [0]), state)


def _strides(x):
    return (0, 0, 0) if x is None else x.strides


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()
