"""Checks of chapter 11: a count of bytes, and three kernels: the fused scan, the adjoint, a sum over channels."""

from functools import partial

import torch

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._guard import is_kernel
from minimamba.checks._help import helpers
from minimamba.checks._kernels import ReadsBehind, TwoPrograms, block, in_memory, inputs, outside, unmasked

BF16 = "Inputs may be bfloat16, the state may not: with 8 bits, small steps no longer change it, and it stalls."

# 1. The bill


def layers():
    """All sizes different, so that one that is left out or taken for another shows."""
    names = ("batch", "length", "channels", "states", "steps", "size")
    for sizes in [(1, 5, 3, 2, 4, 2), (2, 9, 3, 5, 4, 2), (3, 14, 11, 5, 7, 4), (8, 2050, 1536, 16, 32, 2)]:
        yield Case("a large layer" if sizes[0] == 8 else "a tiny layer", **dict(zip(names, sizes, strict=True)))


def count(batch, length, channels, states, steps, size, like_u=4, per_row=2, wide=6 * 4, kept=8, tiles=None):
    """Bytes of u, Δ, z, y, B, C; of Ā, B̄u, h; of one state before each tile."""
    needed = (like_u * channels + per_row * states) * batch * length * size
    number = tiles(length, steps) if tiles else -(-length // steps)
    return needed, wide * batch * length * channels * states, kept * batch * number * channels * states


_count = partial(partial, count)  # _count(wide=12) is count with this option


def _sized(**options):
    """The same, where an option depends on (channels, states, size)."""
    return lambda *sizes: count(*sizes, **{k: f(sizes[2], sizes[3], sizes[5]) for k, f in options.items()})


NARROW = _sized(wide=lambda D, N, size: 6 * size, kept=lambda D, N, size: 2 * size)
UP = "A tile that is begun has its checkpoint too: round up."
bytes_moved = Exercise(
    name="bytes_moved",
    asks="bytes_moved(batch, length, channels, states, steps, size) -> (needed, materialised, checkpoints)",
    formula="Asked are the bytes of u, Δ, z, y and B, C, each once; of Ā, B̄u, h in float32, each written and read; "
    "and of one float32 state before each tile of `steps` steps, written and read.",
    see="11 §1",
    reference=count,
    inputs=layers,
    results=("needed", "materialised", "checkpoints"),
    mistakes=(
        Mistake("one of u, Δ, z, y left out", _count(like_u=3), "Three are read and y is written, each (B, L, D)."),
        Mistake("two of u, Δ, z, y left out", _count(like_u=2), "Three are read and y is written, each (B, L, D)."),
        Mistake("B and C left out", _count(per_row=0), "They are small, (B, L, N) each, but they are read."),
        Mistake("B and C of every channel", _sized(per_row=lambda D, N, size: 2 * D), "All channels share B and C."),
        Mistake("needed in numbers, not bytes", lambda *x: (count(*x[:5], 1)[0], *count(*x)[1:]), "Times `size`."),
        Mistake("numbers in place of bytes", lambda *x: count(*x[:5], 1, wide=6, kept=2), "size is for the inputs."),
        Mistake("Ā, B̄u, h in the inputs' size", _sized(wide=lambda D, N, size: 6 * size), "They are float32: 4 bytes."),
        Mistake("states in the inputs' size", NARROW, BF16, "11 §6"),
        Mistake("Ā, B̄u, h moved only once", _count(wide=12), "One kernel writes each, and the next one reads it."),
        Mistake("no state axis in Ā, B̄u, h", _sized(wide=lambda D, N, size: 24 / N), "They are (B, L, D, N)."),
        Mistake("the last checkpoint left out", _count(tiles=lambda L, steps: L // steps), UP, "11 §5"),
        Mistake("a part of a checkpoint", _count(tiles=lambda L, steps: L / steps), UP, "11 §5"),
        Mistake("a checkpoint behind the last tile", _count(tiles=lambda L, s: -(-L // s) + 1), "It is not used."),
        Mistake("a state for each step", _count(tiles=lambda L, s: L), "Between checkpoints states are made again."),
        Mistake("checkpoints that are not read", _count(kept=4), "The backward pass reads them."),
    ),
    hints=(
        "Which six tensors have to move in any case, and what are their shapes? Which three have an axis N as well?",
        "u, Δ, z, y are (B, L, D), and B, C are (B, L, N). Ā, B̄u, h are (B, L, D, N). A checkpoint is (B, D, N).",
        "(B·L·(4D + 2N)·size, 3·2·4·B·L·D·N, 2·4·B·⌈L/steps⌉·D·N), and ⌈a/b⌉ is -(-a // b).",
    ),
)

# 2. The fused scan


def problems():
    """Δ log-uniform in [0.001, 1], different at each step; A distinct; random signs; N = 3 in a block of 4."""
    for length, channels, seed in [(1, 1, 22), (2, 1, 4), (3, 2, 2), (7, 1, 3)]:
        g = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if length == 7 else torch.float64
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: B023
        uniform = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: B023
        delta, A = 1000 ** (uniform(length, channels) - 1), -(0.1 * 50 ** uniform(channels, 3))
        tensors = dict(u=normal(length, channels), delta=delta, A=A, B=normal(length, 3), C=normal(length, 3))
        note = f"L = {length}, D = {channels}, N = 3, BLOCK = {block(delta)}, BLOCK_N = 4"
        yield Case(note, **{k: x.to(dtype) for k, x in tensors.items()}, h_0=normal(channels, 3).to(dtype))


def run_fused(kernel, u, delta, A, B, C, h_0):
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, h_0=h_0)
    return in_memory(kernel, arrays, {"y": u, "last": h_0}, u.shape[1], (*u.shape, A.shape[1]), BLOCK_N=4)


def same(h, *others):
    return h


def tiles(u, delta, A, B, C, h, kept=same, seen=same, carried=same, lost=False):
    """y and the last state. A step leaves kept(h), y sees seen(h, h_{t−1}), the next tile carried(h, before, h_0);
    `before` is what has become of the state that entered this one."""
    h_0, before, outputs, n = h, h, [], block(u)
    for t in range(len(u)):
        if lost and t % n == 0:
            h, before = 0 * h, 0 * h
        A_bar = torch.exp(delta[t, :, None] * A)
        old, before = h, A_bar * before
        h = kept(A_bar * h + (delta[t] * u[t])[:, None] * B[t])
        outputs.append((seen(h, old) * C[t]).sum(-1))
        if t % n == n - 1 or t == len(u) - 1:
            h = before = carried(h, before, h_0)
    return torch.stack(outputs), h.clone()


_tiles = partial(partial, tiles)


def half(h, cut):
    """To bfloat16: rounded, or with the digits that do not fit cut off, as Triton's interpreter does it."""
    narrow = (h.float().view(torch.int32) & -65536).view(torch.float32) if cut else h.bfloat16()
    return narrow.to(h.dtype)


def _as_rows(u, delta, *rest):
    y, h = tiles(*(x.reshape(x.shape[1], x.shape[0]).T for x in (u, delta)), *rest)
    return y.T.reshape(u.shape), h


def _forgotten_tail(*tensors):
    y, h = tiles(*tensors)
    return y, 0 * h if len(y) % block(y) else h


HALF = []  # every state, the carry, or the carry and what y sees
for low in (partial(half, cut=False), partial(half, cut=True)):
    to_carry = dict(carried=lambda h, before, h_0, low=low: low(h))
    HALF += [dict(kept=low), to_carry, to_carry | dict(seen=lambda h, old, low=low: low(h))]
LOCAL = "The next tile needs h_t itself, with what came into this tile, not the scan that began from zero."
fused = Exercise(
    name="fused",
    asks="a kernel (u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N), one program a channel",
    formula="Asked is h_t = e^{Δ_t A} h_{t−1} + Δ_t u_t B_t from h_0, y_t = Σ_n C_t h_t, and h_L at last.",
    see="11 §4",
    reference=tiles,
    inputs=problems,
    run=run_fused,
    kind="kernel",
    results=("y", "last"),
    sizes={"L": ("u", 0), "D": ("u", 1)},
    mistakes=(
        *(Mistake("a state in bfloat16", _tiles(**options), BF16, "11 §6") for options in HALF),
        Mistake("a carry lost between tiles", _tiles(lost=True), "Each tile begins from zero here."),
        Mistake("a carry that is never replaced", _tiles(carried=lambda h, before, h_0: h_0), "It stays h_0."),
        Mistake("the carry of one tile only", _tiles(carried=lambda h, before, h_0: h - before), LOCAL, "11 §8"),
        Mistake("h_0 left out", lambda *x: tiles(*x[:5], 0 * x[5]), "The first tile begins from h_0."),
        Mistake("(0, 0) in the tail", _forgotten_tail, "A padded step must hand the state on: Δ = 0.", "11 §6"),
        Mistake("the state before the step in y", _tiles(seen=lambda h, old: old), "y_t sees u_t."),
        Mistake("B and C swapped", lambda u, d, A, B, C, h: tiles(u, d, A, C, B, h)),
        Mistake("Δ missing before u", lambda u, d, A, B, C, h: tiles(u / d, d, A, B, C, h)),
        Mistake("the sign of A", lambda u, d, A, B, C, h: tiles(u, d, -A, B, C, h), "A is negative already."),
        Mistake("steps that lie one place apart", _as_rows, "Step t of channel d is at t · D + d.", "10 §7"),
        *unmasked(tiles),
        Mistake("states without a mask", outside(ReadsBehind, None, True), "Only n < N exist, of BLOCK_N.", "11 §5"),
        Mistake("no store at last", lambda *x: (tiles(*x)[0], x[5] * torch.nan), "Store h after the loop."),
    ),
    hints=(
        "The loop carries the state of one channel, BLOCK_N numbers. A tile is a block (BLOCK, BLOCK_N).",
        "Load Δ and u with mask=t < L, other=0.0: Δ = 0 makes Ā = 1, B̄u = 0. Load A, B, C, h_0 with n < N, other=0.0.",
        "A_bar = tl.exp(delta[:, None] * A_row[None, :]), B_bar_u = (delta * u)[:, None] * B_tile; decay, local from "
        "tl.associative_scan; h_tile = decay * state[None, :] + local; y is tl.sum(h_tile * C_tile, axis=1).",
    ),
)

# 3. The adjoint


def adjoint_of(a, dy, dh, factor=lambda a, t, following, border: following):
    """factor(a, t, a_{t+1}, border) multiplies g_{t+1}; border: step t is the last of a block, and not of all."""
    following, g, n = torch.cat([a[1:], torch.ones_like(dh)]), [dh], block(a)
    for t in reversed(range(len(a))):
        g.append(dy[t] + factor(a, t, following[t], t % n == n - 1 and t < len(a) - 1) * g[-1])
    g = torch.cat(g[:0:-1])
    return g, a[:1] * g[:1]


def _but(factor):
    return partial(adjoint_of, factor=factor)


def run_adjoint(kernel, a, dy, dh):
    return in_memory(kernel, {"a": a, "dy": dy, "dh": dh}, {"g": a, "dh_0": dh})


ALONE = _but(lambda a, t, following, border: 0.0 if border else following)
ONE = "Where there is no next step in the block the factor is 1: it hands the carry on, at first dh."
TWICE = "The carry that comes from the block behind holds a_{t+1} g_{t+1} already: its factor is 1."
adjoint = Exercise(
    name="adjoint",
    asks="a kernel (a, dy, dh, g, dh_0, L, BLOCK), one program, for g_t = dy_t + a_{t+1} g_{t+1}",
    formula="Asked is g_t = dy_t + a_{t+1} g_{t+1} backwards with g_L = dy_L + dh; dh_0 = a_1 g_1. a[0] is a_1.",
    see="11 §7",
    reference=adjoint_of,
    inputs=inputs(["a", "dy", "dh"], lambda a, dy, dh, _: [a, dy, dh[:1]]),
    run=run_adjoint,
    kind="kernel",
    results=("g", "dh_0"),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("a_{t+1} behind the end", outside(ReadsBehind, None, True), "Step L has no successor.", "11 §8"),
        Mistake("the gradient of the final state lost", lambda a, dy, dh: adjoint_of(a, dy, 0 * dh), ONE, "11 §7"),
        Mistake("a_t in place of a_{t+1}", _but(lambda a, t, *_: a[t]), "h_{t+1} has a_{t+1}."),
        Mistake("a_{t−1} in place of a_{t+1}", _but(lambda a, t, *_: a[t - 1] if t else 1.0), "Load a + t + 1."),
        Mistake("a decay applied twice between blocks", _but(lambda a, t, f, border: f * f if border else f), TWICE),
        Mistake("a decay missing between blocks", _but(lambda a, t, f, border: 1.0 if border else f), "", "11 §7"),
        Mistake("a carry lost between blocks", lambda a, dy, dh: ALONE(a, dy, 0 * dh), ONE, "11 §7"),
        Mistake("a carry lost between blocks", ALONE, ONE, "11 §7"),
        Mistake("dh_0 without its decay", lambda *x: (adjoint_of(*x)[0], adjoint_of(*x)[0][:1]), "dh_0 = a_1 g_1."),
        *unmasked(adjoint_of),
        Mistake("no store at dh_0", lambda *x: (adjoint_of(*x)[0], x[2] * torch.nan), "Store it after the loop."),
    ),
    hints=(
        "Visit the blocks from the last to the first. The pairs to scan in reverse are (a_{t+1}, dy_t).",
        "Let the carry be a · g of the first place of the block behind, and dh at first. Then a block's last place, "
        "like step L and the padding, needs the factor 1.",
        "has_next = (i < BLOCK - 1) & (t + 1 < L); a_next = tl.load(a + t + 1, mask=has_next, other=1.0); g = decay * "
        "carry + local; carry = place 0 of a_block * g, by a masked sum.",
    ),
)

# 4. A sum over channels


def weights():
    """Where there are several programs L is even: an unmasked tail would be the next program's slice."""
    for length, channels, programs, seed in [(1, 1, 1, 1), (3, 3, 1, 2), (2, 3, 2, 3), (4, 9, 3, 5)]:
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(length, channels, generator=g, dtype=torch.float32 if length == 2 else torch.float64)
        yield Case(
            f"L = {length}, D = {channels}, PROGRAMS = {programs}, BLOCK = 2, BLOCK_D = 2", w=w, programs=programs
        )


def run_slices(kernel, w, programs):
    if not is_kernel(kernel):
        return kernel(w, programs)
    numbers, result = (*w.shape, programs), {"slices": w.new_zeros(programs, len(w))}
    return in_memory(kernel, {"w": w}, result, programs, numbers, BLOCK_D=2, one_writer=True)[0].sum(0)


def chosen(pick):
    """The sum over blocks of channels, block b taken pick(b, blocks, programs) times."""

    def answer(w, programs):
        parts = [part.sum(1) for part in w.split(2, dim=1)]
        return sum(pick(b, len(parts), programs) * part for b, part in enumerate(parts))

    return answer


ALL, LAST = chosen(lambda b, blocks, P: 1), chosen(lambda b, blocks, P: b >= blocks - P)
RACE = "Who comes first changes from run to run, and so does the sum. Its place is not 0 at first, either."


def racy(alone):
    return Mistake("a racy sum in one place", outside(TwoPrograms, alone, where=lambda w, P: P > 1), RACE)


def _not_set(w, programs):
    return w[:, 0] * torch.nan


slices = Exercise(
    name="slices",
    asks="a kernel (w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D): sums of w (L, D) over channels",
    formula="Asked is that the slices (PROGRAMS, L), added up, are Σ_d w_{t,d}; program p owns slice p and the "
    "blocks of channels p, p + PROGRAMS, p + 2 PROGRAMS, ...",
    see="11 §7",
    reference=ALL,
    inputs=weights,
    run=run_slices,
    kind="kernel",
    results=("sum of the slices",),
    mistakes=(
        *map(racy, (ALL, LAST, _not_set)),
        Mistake("a block that overwrites the one before", LAST, "Add them up.", "11 §8"),
        Mistake("one block for each program", chosen(lambda b, blocks, P: b < P), "Some programs have more blocks."),
        Mistake("blocks that several programs count", chosen(lambda b, blocks, P: min(b + 1, P)), "After p, p + P."),
        Mistake("a sum added to what nobody has set", _not_set, "slices begins as NaN: begin at 0."),
        Mistake("channels without a mask", outside(ReadsBehind, None, where=lambda w, P: w.shape[1] % 2), "d < D too."),
        *unmasked(ALL),
    ),
    hints=(
        "Which places of slices may program p touch, if no two programs are to touch the same?",
        "For each BLOCK of steps: begin a sum at zero, add the program's blocks of channels, one by one, and store.",
        "for block in range(p, tl.cdiv(D, BLOCK_D), PROGRAMS): load w + t[:, None] * D + d[None, :] with both masks, "
        "other=0.0, and add tl.sum(..., axis=1); then tl.store(slices + p * L + t, total, mask=t < L).",
    ),
)

hint, picture = helpers(bytes_moved, fused, adjoint, slices)
