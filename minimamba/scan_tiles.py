"""What a program of chapter 11's fast kernels holds: its tile, and what follows from that. By rule, like scan_plan."""

import functools
from typing import NamedTuple

from minimamba.triton_scan import next_power_of_2


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

    def constants(self, u, maps):
        """The kernels' own names for these, and along what axis u and a varying B or C are read."""
        steps, lanes, states, channels, warps = self
        axes = {"TIME_FIRST": time_first(u), "MAPS_TIME_FIRST": time_first(maps)}
        return axes | {"T": steps, "G": lanes, "K": states, "c": channels, "W": warps}


def forward_tiles(states):
    """The forward pass's tiles and what they cost beside each other: one, and one half as wide."""
    tile = wide(states, 16, 4 if states <= 128 else 8)  # more warps where a channel takes two, for as many channels
    return {tile: 1.0} | half(tile, 0.56)


def backward_tiles(states, warps):
    """The same of the backward pass.

    With up to four states a thread holds all of a channel, and what it does once for each step and channel counts. So a
    thread has one or two channels, and only three states are padded, to four.
    """
    tile = wide(states, 4, warps)
    if states <= 4:
        padded = next_power_of_2(states)
        return {tile._replace(states=padded, channels=2 if padded <= 2 else 1): 1.0}
    return {tile: 1.0} | (half(tile, 0.67) if states <= 32 else {})  # measured with 8 and 16 states


def first_backward_tile(states, group_size, pieces, multiprocessors):
    """The tile of the backward pass's first kernel, and with it the load of the busiest multiprocessor: the least."""
    loads = [
        (tile, cost * max(2.2, -(-pieces * blocks // multiprocessors)))
        for tile, cost, blocks in first_backward_tiles(states, group_size)
    ]
    return min(loads, key=lambda load: load[1])


@functools.lru_cache(maxsize=1024)
def first_backward_tiles(states, group_size):
    """What there is to choose from, as (tile, cost, blocks of channels): like forward, since no states are kept."""
    tiles = forward_tiles(states)
    if states <= 4:  # half as wide, since many channels a program leave too few programs
        tile = next(iter(tiles))
        tiles = {tile._replace(states=next_power_of_2(states), channels=1): 1.0}
    fitted = [(fit(tile, group_size), cost) for tile, cost in tiles.items()]
    return [(tile, cost, -(-group_size // tile.block)) for tile, cost in fitted]


def wide(states, steps, warps):
    """The tile whose threads have 8 numbers each: as many states as one load brings, of several channels.

    Up to three states are padded to four. The lanes of a channel may belong to several warps.
    """
    return Tile(steps, max(4, next_power_of_2(states)) // 4, 4, 2, warps)


def half(tile, cost):
    """As many threads for half as many channels, at a cost of `cost`. Not where a channel takes a warp already."""
    return {tile._replace(lanes=2 * tile.lanes, states=2): cost} if tile.lanes <= 16 else {}


def fit(tile, group_size):
    """Take warps away that would have no channels."""
    while 32 * tile.warps > max(32, tile.lanes) and tile.block >= 2 * group_size:
        tile = tile._replace(warps=tile.warps // 2)
    return tile


def forward_registers(tile, local, split, save, time_first):
    """The most registers a thread of a forward kernel may have on compute capability 9.0; None: as many as it likes.

    An exponential keeps its unit busy for eight clocks, in which others could be issued. The compiler either spreads
    the exponentials among other instructions, or has some in a row and waits for them, which takes a tenth longer:
    trifles decide. With these it spreads them in Triton 3.6 and 3.7, for a layer's usual arguments (kernels/NOTES.md).
    """
    if tile[1:4] not in ((4, 4, 2), (8, 2, 2)):
        return None
    if local:
        return 88
    if tile.lanes == 8:
        return 128
    if time_first:
        return 150 if split and save else 162
    return (154 if save else 150) if split else (160 if save else 154)


def tiles_at_once(tile, time_first, shared_memory):
    """How many tiles of u, delta and z the backward kernel fetches at once.

    Where time is contiguous four, if they find room: 32 bytes in half precision, which is what memory sends. With up to
    eight states a program has so many channels that they would take too much.
    """
    return 4 if time_first and tile.lanes >= 4 and shared_memory >= 120_000 else 1


def time_first(x):
    """Whether neighbours in time, and no others, lie side by side in memory: (B, D, L) seen as (B, L, D)."""
    return x.strides[1] == 1 and x.strides[-1] != 1
