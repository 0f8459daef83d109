"""The scan's `method="triton"`: the plan and the launchers of kernels/selective_scan_fast.py (chapter 11, section 10).

What these kernels do not serve goes to minimamba.fused_scan.
"""

import functools
import math
from typing import NamedTuple

import torch

from minimamba import fused_scan
from minimamba.fused_scan import contiguous
from minimamba.scan_plan import EVERY, plan
from minimamba.scan_tiles import first_backward_tile, forward_registers, tiles_at_once, time_first
from minimamba.triton_scan import Launch

SUM_BLOCK = 512  # numbers a program of the last kernel sums up


def serves(u, A, B, C):
    """Whether kernels/selective_scan_fast.py serves: on an NVIDIA GPU, in float32 or half, with varying B and C.

    Not in the interpreter, on other GPUs, in float64, for a constant B or C, for more than 256 states.
    """
    return (
        u.is_cuda
        and _has_gluon(u.device)
        and A.dtype == torch.float32
        and B.ndim > 2
        and C.ndim > 2
        and A.shape[1] <= 256
    )


def _has_gluon(device):
    """Whether Gluon has what these kernels need on this GPU."""
    return torch.version.hip is None and _capability(device) >= (8, 0)


def checkpoint_shape(u, A, B, C, cu_seqlens):
    """Shape of the states kept for the backward pass: one after every 64 steps of each sequence, (rows, N, D).

    None behind its last step. In a packed row the document that starts at step p owns the rows from p // 64 on.
    """
    if not serves(u, A, B, C):
        return fused_scan.checkpoint_shape(u, A, B, C, cu_seqlens)
    batch, length, channels = u.shape
    return (batch * ((length - 1) // EVERY), A.shape[1], channels)


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save):
    """Arguments as in `minimamba.selective_scan`, validated.

    Returns y (Batch, L, D), the final states (sequences, D, N) and the checkpoints that `backward` needs
    (empty unless `save`).
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    if not serves(u, A, B, C):
        return fused_scan.forward(*inputs, delta_softplus, save)
    A, D, delta_bias, initial_state = contiguous(A, D, delta_bias, initial_state)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    (y,) = _empty_like(u)
    with torch.cuda.device_of(u):
        cut, launches = _forward_launches(_kinds(*inputs), u.device, delta_softplus, save)
        final_state = A.new_empty((cut.sequences, *A.shape))
        checkpoints = A.new_empty(checkpoint_shape(u, A, B, C, cu_seqlens) if save else 0)
        piece_states, piece_steps = _parts(A, cut.rooms) if cut.split else (None, None)
        for launch in launches:
            launch(*inputs, y, final_state, checkpoints, piece_states, piece_steps)
    return y, final_state, checkpoints


@functools.lru_cache(maxsize=1024)
def _forward_launches(kinds, device, delta_softplus, save):
    from minimamba.kernels.selective_scan_fast import selective_scan_forward_kernel

    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens = _named(kinds)
    cut = _Cut(u, A, B, cu_seqlens, *_machine(device), backward=False, save=save)
    overlap = cut.split and _overlaps(device)
    # Where no axis is dense, a limit would move numbers to local memory; in narrow tiles also where only time is.
    dense = all(x is None or 1 in x.strides[1:] for x in (u, delta, z, B, C))
    limited = _capability(device) == (9, 0) and dense and (cut.tile.lanes == 4 or u.strides[2] == 1)
    numbers = (*cut.forward_numbers, *u.strides, *delta.strides, *_strides(z), *_map_strides(B), *_map_strides(C))
    launches = [
        Launch(
            selective_scan_forward_kernel, (cut.sending if local else cut.rows) * cut.blocks, numbers, cut.tile.warps,
            early=overlap and not local,
            registers=forward_registers(cut.tile, local, cut.split, save, time_first(u)) if limited else None,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            SOFTPLUS=delta_softplus, HAS_INITIAL_STATE=initial_state is not None, PACKED=cu_seqlens is not None,
            SPLIT=cut.split, LOCAL=local, SAVE=save and not local, EVERY=EVERY,
            OVERLAP=overlap and (cut.early or not local), **cut.tile.constants(u, B),
        )
        for local in ((True, False) if cut.split else (False,))
    ]  # fmt: skip
    return cut, launches


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
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, each in its argument's dtype.

    Those of D, z, delta_bias and initial_state are None where the argument is; `grad_final_state` may be None.
    """
    if not serves(u, A, B, C):
        return fused_scan.backward(
            grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints,
            delta_softplus,
        )  # fmt: skip
    A, D, delta_bias, initial_state, grad_final_state = contiguous(A, D, delta_bias, initial_state, grad_final_state)
    kinds = _kinds(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, grad_y, grad_final_state)
    with torch.cuda.device_of(u):
        split, alone, rooms, adjoint, chain, main, sums = _backward_launches(kinds, u.device, delta_softplus)
        if alone:  # what the only piece sums up by itself are the gradients
            part_dA, part_dD, part_dbias = dA, dD, dbias = _empty_like(A, D, delta_bias)
            part_dBC = A.new_empty(sum(rooms))
        else:
            # What each program, or each piece, sums up by itself. At first a piece's parts of dA and dD hold the
            # adjoint that enters it and the sum of its steps.
            part_dA, part_dD, part_dBC, part_dbias = _parts(A, rooms)
        if split:
            adjoint(delta, A, C, z, delta_bias, cu_seqlens, grad_y, part_dA, part_dD)
            chain(A, cu_seqlens, grad_final_state, part_dA, part_dD)
        du, ddelta, dz, dinitial_state = _empty_like(u, delta, z, initial_state)
        main(
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints, grad_y, grad_final_state,
            part_dA, du, ddelta, part_dA, part_dBC, part_dD, dz, part_dbias, dinitial_state,
        )  # fmt: skip
        # The sums of these; made only now, while the GPU is busy.
        dB, dC = _empty_like(B, C)
        if not alone:
            dA, dD, dbias = _empty_like(A, D, delta_bias)
        sums(part_dBC, part_dA, part_dD, part_dbias, dB, dC, dA, dD, dbias)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial_state


@functools.lru_cache(maxsize=1024)
def _backward_launches(kinds, device, delta_softplus):
    from minimamba.kernels import selective_scan_fast as kernels

    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, grad_y, grad_final_state = _named(kinds)
    machine = _machine(device)
    cut = _Cut(u, A, B, cu_seqlens, *machine, backward=True, save=True)
    packed, final, overlap = cu_seqlens is not None, grad_final_state is not None, _overlaps(device)
    options = {
        "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None, "SOFTPLUS": delta_softplus, "PACKED": packed,
    }  # fmt: skip
    tile, _ = first_backward_tile(A.shape[1], cut.group_size, cut.sending * cut.groups, machine[0])
    blocks = -(-cut.group_size // tile.block)
    length, channels, states, group_size, blocks_per_group, *pieces = cut.backward_numbers
    adjoint = Launch(
        kernels.selective_scan_adjoint_kernel, cut.sending * cut.groups * blocks,
        (length, channels, states, group_size, blocks, *pieces,
         *delta.strides, *_strides(z), *grad_y.strides, *_map_strides(C)),
        tile.warps, **options, OVERLAP=overlap, **tile.constants(u, C),
    )  # fmt: skip
    chain = Launch(
        kernels.chain_pieces_kernel, cut.sequences * -(-channels * states // SUM_BLOCK),
        cut.chain_numbers, 4, early=overlap, PACKED=packed, HAS_GRAD_FINAL_STATE=final,
        OVERLAP=overlap, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    programs = cut.programs_per_group
    main = Launch(
        kernels.selective_scan_backward_kernel, cut.rows * cut.groups * programs,
        (length, channels, states, group_size, blocks_per_group, programs, u.shape[0], *pieces,
         *u.strides, *delta.strides, *_strides(z), *grad_y.strides, *_map_strides(B), *_map_strides(C)),
        cut.tile.warps, early=overlap and cut.split, HAS_D=D is not None, **options,
        HAS_INITIAL_STATE=initial_state is not None, HAS_GRAD_FINAL_STATE=final, SPLIT=cut.split, EVERY=EVERY,
        OVERLAP=overlap, AT_ONCE=tiles_at_once(cut.tile, time_first(u), machine[1]), **cut.tile.constants(u, B),
    )  # fmt: skip
    alone = cut.rows == 1
    summed = (B, C, None, None, None) if alone else (B, C, A, D, delta_bias)
    columns = [0 if x is None else math.prod(x.shape) for x in summed]
    sums = Launch(
        kernels.sum_partials_kernel, sum(-(-n // SUM_BLOCK) for n in columns), (programs, cut.rows, *columns), 4,
        early=overlap, HAS_D=columns[3] > 0, HAS_BIAS=columns[4] > 0, OVERLAP=overlap, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    room_dBC = programs * (columns[0] + columns[1])
    rooms = [room_dBC] if alone else [*cut.rooms, *_aligned(room_dBC, cut.rows * columns[4])]
    return cut.split, alone, rooms, adjoint, chain, main, sums


def _parts(A, rooms):
    """Cut one new tensor into parts of so many numbers: a small scan takes less time than six allocations would."""
    return A.new_empty(sum(rooms)).split_with_sizes(rooms)


def _aligned(*rooms):
    """Round up, so that each of the parts begins at a multiple of 16 bytes."""
    return [-(-room // 4) * 4 for room in rooms]


def _empty_like(*tensors):
    """Room for a gradient of each tensor, contiguous; None for None."""
    dense = torch.contiguous_format
    return [None if x is None else torch.empty_like(x, memory_format=dense) for x in tensors]


class _Kind(NamedTuple):
    """All of a tensor that a launch depends on, but its address."""

    dtype: torch.dtype
    shape: tuple
    strides: tuple


def _kinds(*tensors):
    """A key of what a launch depends on; plain tuples, since it is made at every call."""
    return tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])


def _named(kinds):
    return [None if kind is None else _Kind(*kind) for kind in kinds]


class _Cut:
    """Into what the work is cut: groups of channels, blocks of channels, pieces of sequences."""

    def __init__(self, u, A, B, cu_seqlens, multiprocessors, shared_memory, backward, save):
        batch, length, channels = u.shape
        states = A.shape[1]
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.groups = B.shape[2] if len(B.shape) == 4 else 1
        self.group_size = channels // self.groups
        packed = cu_seqlens is not None
        cut = plan(
            batch, self.groups, length, self.group_size, states, backward, self.sequences if packed else 0, save,
            multiprocessors, shared_memory,
        )  # fmt: skip
        self.tile, self.programs_per_group = cut.tile, cut.programs
        self.split, self.early = cut.whole < batch, cut.early
        blocks_per_group = -(-self.group_size // self.tile.block)
        self.blocks = self.groups * blocks_per_group
        # Rows of what is kept for each piece, and how many of them send something on to another piece.
        if packed:  # differs from document to document: the kernels find out
            self.rows = length // cut.piece_length + self.sequences if self.split else self.sequences
            self.sending = self.rows
        else:
            self.sending = (batch - cut.whole) * (cut.pieces - 1)
            self.rows = batch + self.sending
        counts = (length, channels, states, self.group_size, blocks_per_group)
        # What finds a piece, forward and backward, and what is enough where only their number counts.
        self.forward_numbers = (*counts, self.sequences, cut.whole, cut.heads, cut.head, cut.piece_length)
        self.backward_numbers = (*counts, self.sequences, cut.whole, cut.head, cut.piece_length)
        self.chain_numbers = (channels, states, self.sequences, cut.whole, cut.pieces, cut.piece_length)
        # Room for a state and a sum of steps of each piece.
        self.rooms = _aligned(self.rows * channels * states, self.rows * channels)


@functools.cache
def _machine(device):
    """Multiprocessors of a GPU, and bytes of shared memory that a program can have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _overlaps(device):
    """Whether a kernel can start before the one before it has ended: from compute capability 9.0 on."""
    return _capability(device) >= (9, 0)


@functools.cache
def _capability(device):
    """The compute capability of a GPU. Of a CPU, where the interpreter runs, less than any."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _map_strides(x):
    """Strides of a varying B or C over (batch, step, group, state)."""
    batch, step, *group, state = x.strides
    return (batch, step, *(group or [0]), state)


def _strides(x):
    return (0, 0, 0) if x is None else x.strides
