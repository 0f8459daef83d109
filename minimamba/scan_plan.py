"""The one place that chooses tiles and cuts for chapter 11's fast kernels: by rule, not by trial at the first call."""

import functools
import heapq
import math
from typing import NamedTuple

from minimamba.fused_scan import programs_per_group
from minimamba.scan_tiles import Tile, backward_tiles, first_backward_tile, fit, forward_tiles, wide

EVERY = 64  # steps between checkpoints
FORWARD_START, BACKWARD_START = 26, 20  # steps that would take as long as a program takes to start
MORE_KERNELS = 40  # steps that two more kernels cost, which take the host longer than the GPU
LATE = 24  # steps, some 1.3 µs, that a late start of the forward pass's second kernel costs
SHORT_LAST = 0.945  # of the time of equal pieces, where the last are short
MOST_PIECES = 64  # more would start more than they save
PACKED_PROGRAMS = 8  # on each multiprocessor, of a packed row


class Plan(NamedTuple):
    """A tile; programs that share the channels of a group; how sequences are cut.

    The first `whole` of them are not. The others have `pieces`: `heads` of `head` steps, then more of `piece_length`.
    Forward all are cut or none, and `early` says whether the second kernel may start where there is room while the
    first one goes on.
    """

    tile: Tile
    programs: int
    whole: int
    pieces: int
    heads: int
    head: int
    piece_length: int
    early: bool = True


@functools.lru_cache(maxsize=4096)
def plan(batch, groups, length, group_size, states, backward, documents, save, multiprocessors, shared_memory):
    """Choose the tile, how sequences are cut into pieces, and how many programs share a group's channels.

    A thread has 8 numbers to update at each step, so that they hide each other's latency, in the narrow tile and
    backward with up to 4 states fewer: as many states as fit one load. The time of a plan is that of the busiest
    multiprocessor, in steps, some more for each start, and where there are pieces a first kernel. Constants measured on
    an H100 and an H200 (kernels/NOTES.md). How long the `documents` of a packed row are is not known here; 0: it is
    none. Pieces begin at a checkpoint where states are kept, for which `save` stands, and backward.
    """
    if backward:
        return backward_plan(batch, groups, length, group_size, states, documents, multiprocessors, shared_memory)
    if documents * groups * group_size // wide(states, 16, 4).block >= PACKED_PROGRAMS * multiprocessors:
        # Enough without pieces: like sequences of the average length.
        cut = forward_plan(documents, groups, -(-length // documents), group_size, states, 0, save, multiprocessors)
        return cut._replace(whole=batch, pieces=1, head=length, piece_length=length)
    return forward_plan(batch, groups, length, group_size, states, documents, save, multiprocessors)


def forward_plan(batch, groups, length, group_size, states, documents, save, multiprocessors):
    """Weigh two tiles, and cuts into equal pieces and into long and short ones. Each block of channels is a program."""
    best_time, best = math.inf, None
    for tile, cost in forward_tiles(states).items():
        tile = fit(tile, group_size)
        blocks = -(-group_size // tile.block)
        each = batch * groups * blocks  # programs that start with the same piece
        every = EVERY if save else tile.steps
        counts = range(1, MOST_PIECES + 1)
        if documents:  # they end in the middle of pieces: many short ones are never very bad, whatever the documents
            counts = (1, min(MOST_PIECES, -(-PACKED_PROGRAMS * multiprocessors // each)))
        # Of three programs of 128 threads, which fit on a multiprocessor, the last to come is the slowest, and goes on
        # alone in the end. So it gets less to do, where the first two are long ones on nearly all. Those that start
        # while a first kernel goes on are not spread evenly: three long ones may meet, unless they are two for each.
        heads = 2 * multiprocessors // each
        uneven = cost == 1 and tile.warps == 4 and not documents and heads * each > 1.9 * multiprocessors
        early = heads * each == 2 * multiprocessors
        for pieces in counts:
            steps = round_up(length / pieces, every) if pieces > 1 else length
            pieces = -(-length // steps)
            cut = Plan(tile, blocks, batch if pieces == 1 else 0, pieces, 1, steps, steps)
            time = cost * forward_load(cost, pieces, each, multiprocessors) * (steps + FORWARD_START)
            three = uneven and 2 * multiprocessors < pieces * each < 3 * multiprocessors
            uneven_time = SHORT_LAST * time + (0 if early else LATE)
            if three and uneven_time < time and (lengths := long_and_short(length, pieces, heads, every)):
                cut, time = Plan(tile, blocks, 0, pieces, heads, *lengths, early), uneven_time
            if time < best_time:
                best_time, best = time, cut
    return best


def forward_load(cost, pieces, each, multiprocessors):
    """The load of the busiest multiprocessor, in programs. Each piece of all sequences makes `each` programs.

    A program alone counts for more than one, since nothing fills its waits, in the first kernel even two of them. In
    pieces, three of the narrow tile count as four, since some multiprocessors get four and others two.
    """
    alone, first_alone = (1.23, 2.2) if cost == 1 else (1.44, 3)
    load = max(alone, -(-pieces * each // multiprocessors))
    if pieces == 1:
        return load
    return load + (cost < 1 and load == 3) + 0.7 * max(first_alone, -(-(pieces - 1) * each // multiprocessors))


def long_and_short(length, pieces, heads, every):
    """Steps of the first `heads` pieces and of the others, about half as long; None where rounding forbids it."""
    shorts = pieces - heads
    half = length / (2 * heads + shorts)
    nearest = every * round(half / every)
    for short in sorted((nearest - every, nearest, nearest + every), key=lambda steps: abs(steps - half)):
        long = round_up((length - shorts * short) / heads, every)
        if 0 < short <= 0.75 * long and heads * long + (shorts - 1) * short < length:
            return long, short
    return None


def backward_plan(batch, groups, length, group_size, states, documents, multiprocessors, shared_memory):
    """Weigh cuts, equal ones and others, and for whole sequences half a tile.

    A program has as few blocks of channels as memory allows, or twice as many: its sums of dB and dC go through memory,
    and those of a group take together at most as much as du does in float32. So 8 warps, 4 or 2 where shared memory is
    small, sum over as many channels as possible. A plan must be 1 % better than those before.
    """
    warps = 8 if shared_memory >= 200_000 else 4 if shared_memory >= 120_000 or 4 < states <= 128 else 2
    best_time, best = math.inf, None
    for tile, cost in backward_tiles(states, warps).items():
        tile = fit(tile, group_size)
        blocks = -(-group_size // tile.block)
        most = programs_per_group(group_size, blocks, states)
        for programs in (most, -(-most // 2)):
            each = groups * programs  # of a sequence
            rounds = -(-blocks // programs)
            ways = cuts(batch, each, length, documents > 0, multiprocessors)
            if cost < 1:  # half a tile sums over half the channels: with pieces as well that is too much memory
                ways = [(batch, length, length)]
            for whole, head, steps in ways:
                pieces = 1 + -(-(length - head) // steps)
                cut = Plan(tile, programs, whole, pieces, 1, head, steps)
                tails = (batch - whole) * (pieces - 1)
                jobs = ((whole, length), (batch - whole, head), (tails, steps))
                jobs = [(n * each, cost * rounds * (t + BACKWARD_START)) for n, t in jobs]
                time = last_end(jobs, multiprocessors)
                if tails:
                    _, load = first_backward_tile(states, group_size, tails * groups, multiprocessors)
                    time += MORE_KERNELS + 0.1 * load * (steps + BACKWARD_START)
                # What makes more memory than the official kernel's counts like a tenth of the time.
                if memory(programs / group_size, 1 + tails / batch, length) > official_memory(length, states):
                    time *= 1.1
                if time < 0.99 * best_time:
                    best_time, best = time, cut
    return best


def memory(programs, pieces, length):
    """Bytes of a training step beside y and the gradients, for each number of u and state.

    For sums of dB and dC, of so many programs a channel; for what each piece sums up; for the states that are kept.
    """
    return 8 * programs + 4 * (pieces + (length - 1) // EVERY) / length


def official_memory(length, states):
    """The same of the official kernel in half precision: y before the gate, two numbers every 2048 steps, and some."""
    return 2 / states + 8 * -(-length // 2048) / length + 0.0075


def cuts(batch, programs, length, packed, multiprocessors):
    """Yield what is worth weighing as (whole, head, steps of a piece), `programs` being those of a sequence.

    No sequence is cut, or all, or those left after full rounds. First pieces may be longer where they are fewer than
    the multiprocessors, so that these have as much to do as those to which several of the other pieces go.
    """
    yield batch, length, length
    rounds = batch * programs // multiprocessors
    for whole in {0} if packed else {0, rounds * multiprocessors // programs}:
        firsts = (batch - whole) * programs
        most = max(3, min(MOST_PIECES, 4 * multiprocessors // max(firsts, 1))) if firsts else 0
        for tails in range(1, most + 1):
            longer = {1}
            if firsts < multiprocessors and not packed:
                longer.add(-(-firsts * tails // (multiprocessors - firsts)))
            for times in longer:
                steps = round_up(length / (times + tails), EVERY)
                if times * steps < length:
                    yield whole, times * steps, steps


def last_end(jobs, multiprocessors):
    """When the last of `jobs`, (count, time) in the order of their start, ends: each goes where it can start first."""
    free = [(0, multiprocessors)]  # (from when on, how many)
    for count, time in jobs:
        while count:
            if count >= multiprocessors and max(free)[0] - free[0][0] <= time:  # one for each, then the next round
                rounds = count // multiprocessors
                free = [(since + rounds * time, some) for since, some in free]
                count -= rounds * multiprocessors
                continue
            since, some = heapq.heappop(free)
            taken = min(some, count)
            if taken < some:
                heapq.heappush(free, (since, some - taken))
            heapq.heappush(free, (since + time, taken))
            count -= taken
    return max(free)[0]


def round_up(steps, every):
    return every * math.ceil(steps / every)
