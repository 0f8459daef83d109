"""The one place that chooses tiles and cuts for chapter 11's fast kernels: by rule, not by trial at the first call."""

import functools
import math
from typing import NamedTuple

from minimamba.fused_scan import programs_per_group
from minimamba.triton_scan import next_power_of_2

EVERY = 64  # steps between checkpoints


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
        return self.channels * 32 * self.warps // self.lanes

    def constants(self, u):
        steps, lanes, states, channels, warps = self
        time_first = u.strides[1] == 1 and u.strides[2] != 1
        return {"TIME_FIRST": time_first, "T": steps, "G": lanes, "K": states, "c": channels, "W": warps}


class Plan(NamedTuple):
    """A tile; steps of a piece, None if sequences stay whole; programs that share the channels of a group."""

    tile: Tile
    piece_length: int | None
    programs: int


@functools.lru_cache(maxsize=4096)
def plan(sequences, length, group_size, states, backward, multiprocessors, shared_memory):
    """Choose the tile, into pieces of how many steps a sequence is cut, and how many programs share a group's channels.

    `sequences` counts a group of channels of a sequence as one. A thread has 8 numbers to update at each step, so
    that they hide each other's latency, backward with up to 4 states fewer: as many states as fit one load. Forward,
    two tiles are weighed, the second half as wide, and every block of channels is a program. Backward, 8 warps (4 or
    2 where shared memory is small) sum dB and dC over as many channels as possible, since each program's sums go
    through memory: those of a group take together at most as much as du does in float32.

    The time of a plan goes with the programs of the busiest multiprocessor times their steps, a few more for each
    start, and where there are pieces a first kernel. Constants measured on an H100: kernels/NOTES.md.
    """
    if backward:
        warps = 8 if shared_memory >= 200_000 else 4 if shared_memory >= 120_000 or 4 < states <= 128 else 2
        tiles = {backward_tile(states, warps): 1.0}
        alone, first_kernel = 1.0, 0.2
    else:
        tile = forward_tile(states)
        tiles = {tile: 1.0}
        if tile.lanes <= 16:
            tiles[tile._replace(lanes=2 * tile.lanes, states=2)] = 0.56
        alone, first_kernel = 1.15, 0.7  # a program alone on a multiprocessor leaves it idle now and then

    best_time, best = math.inf, None
    for tile, cost in tiles.items():
        tile = fit(tile, group_size)
        blocks = -(-group_size // tile.block)
        for pieces in range(1, 65):  # more than 64 would start more than they save
            steps = length if pieces == 1 else -(-length // pieces // EVERY) * EVERY
            if pieces > 1 and steps >= length:
                break
            programs = programs_per_group(group_size, blocks, states) if backward else blocks
            # What the busiest multiprocessor has to do, in blocks of channels of a piece.
            busiest = -(-sequences * programs * -(-length // steps) // multiprocessors) * -(-blocks // programs)
            time = max(busiest, alone) * (steps + 32) * cost * (1.0 if pieces == 1 else 1.0 + first_kernel)
            if time < best_time:
                best_time, best = time, Plan(tile, None if pieces == 1 else steps, programs)
    return best


def first_backward_tile(states, group_size):
    """The tile of the backward pass's first kernel, which keeps no states: the forward pass's.

    Except for few states, where its channels are too few to keep the memory busy: half as wide.
    """
    tile = forward_tile(states)
    if states <= 4:
        tile = tile._replace(states=next_power_of_2(states), channels=1)
    return fit(tile, group_size)


def forward_tile(states):
    """Twice as many warps where a channel takes two of them, for as many channels."""
    return wide(states, 16, 4 if states <= 128 else 8)


def backward_tile(states, warps):
    """With up to four states a thread holds all of a channel, and what it does once for each step and channel counts.

    So there are no more of them than registers hold, and no state is padded.
    """
    tile = wide(states, 4, warps)
    if states <= 4:
        padded = next_power_of_2(states)
        tile = tile._replace(states=padded, channels=2 if padded <= 2 else 1)
    return tile


def wide(states, steps, warps):
    """The tile whose threads have 8 numbers each: as many states as one load brings, of several channels.

    One or two states are padded to four. The lanes of a channel may belong to several warps.
    """
    return Tile(steps, max(4, next_power_of_2(states)) // 4, 4, 2, warps)


def fit(tile, group_size):
    """Take warps away that would have no channels."""
    while 32 * tile.warps > max(32, tile.lanes) and tile.block >= 2 * group_size:
        tile = tile._replace(warps=tile.warps // 2)
    return tile
