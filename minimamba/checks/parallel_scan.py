"""Checks of chapter 08: the join, counting joins, Hillis and Steele's rounds, a carry over chunks, Blelloch's tree."""

import torch

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.parallel_scan import blelloch as tree_scan
from minimamba.parallel_scan import combine

double, single = torch.float64, torch.float32


def swapped(left, right):
    return combine(right, left)


def steps_of_matrices():
    """Two general steps; the first with numbers that can be followed by hand."""
    one = ([[2.0]], [3.0], [[0.5]], [1.0])
    two = ([[0.5, 2.0], [0.0, 1.0]], [1.0, 3.0], [[1.0, 0.0], [-1.0, 0.5]], [-2.0, 4.0])
    for note, numbers in (("one state", one), ("two states", two)):
        M1, b1, M2, b2 = (torch.tensor(x, dtype=double) for x in numbers)
        yield Case(note, M1=M1, b1=b1, M2=M2, b2=b2)
    for size, seed, dtype in ((3, 0, double), (4, 1, single), (5, 2, double)):
        random = torch.Generator().manual_seed(seed)
        M = torch.randn(2, size, size, generator=random, dtype=double).to(dtype)
        b = torch.randn(2, size, generator=random, dtype=double).to(dtype)
        yield Case(f"{size} states, random matrices", M1=M[0], b1=b[0], M2=M[1], b2=b[1])


LATER = "M2 is applied to what M1 made, so it stands on the left."
PUT = "Put the first step into the second: M2 (M1 h + b1) + b2."
join = Exercise(
    name="join",
    asks="join(M1, b1, M2, b2) -> (M, b): first h -> M1 h + b1, then h -> M2 h + b2, as one step h -> M h + b",
    formula="Asked is M = M2 M1 and b = M2 b1 + b2.",
    see="08 §1",
    reference=lambda M1, b1, M2, b2: (M2 @ M1, M2 @ b1 + b2),
    inputs=steps_of_matrices,
    results=("M", "b"),
    sizes={"N": ("b1", 0)},
    mistakes=(
        Mistake("swapped operands", lambda M1, b1, M2, b2: (M1 @ M2, M1 @ b2 + b1), LATER),
        Mistake("M1 M2 in place of M2 M1", lambda M1, b1, M2, b2: (M1 @ M2, M2 @ b1 + b2), LATER),
        Mistake("the two b swapped", lambda M1, b1, M2, b2: (M2 @ M1, M1 @ b2 + b1), PUT),
        Mistake("b1 multiplied by M1", lambda M1, b1, M2, b2: (M2 @ M1, M1 @ b1 + b2), PUT),
        Mistake("b2 multiplied too", lambda M1, b1, M2, b2: (M2 @ M1, M2 @ (b1 + b2)), "b2 is added last."),
        Mistake("b1 not multiplied", lambda M1, b1, M2, b2: (M2 @ M1, b1 + b2), "M2 acts on all that is there."),
        Mistake("b2 lost", lambda M1, b1, M2, b2: (M2 @ M1, M2 @ b1), PUT),
        Mistake("products entry by entry", lambda M1, b1, M2, b2: (M2 * M1, M2 @ b1 + b2), "Write @ for matrices."),
        Mistake("M2 transposed", lambda M1, b1, M2, b2: (M2 @ M1, b1 @ M2 + b2), "b1 @ M2 is M2ᵀ b1."),
        Mistake("a sum of matrices", lambda M1, b1, M2, b2: (M2 + M1, M2 @ b1 + b2), PUT),
    ),
    hints=(
        "Write the first step down, and put it in the place of h in the second.",
        "M2 (M1 h + b1) + b2. Now multiply out: what multiplies h, and what is left?",
        "return M2 @ M1, M2 @ b1 + b2",
    ),
)

joins = Exercise(
    name="joins",
    asks="the number of joins of single elements that Hillis and Steele's scan does for L = 1024",
    formula="Asked is the sum over all rounds of the elements that have a left neighbour at distance 1, 2, 4, ...",
    see="08 §4",
    reference=9217,
    inputs=None,
    kind="value",
    results=("joins",),
    mistakes=(
        Mistake("every element joined in every round", 10240, "The first ones have no neighbour that far to the left."),
        Mistake("the loop's joins", 1023, "A loop needs one join for every step after the first."),
        Mistake("Blelloch's joins", 2036, "His tree is another scan, with less work."),
        Mistake("the number of rounds", 10, "That is the depth. In each round many elements join."),
        Mistake("one element more left out of each round", 9207, "In the round of reach r exactly r elements rest."),
        Mistake("1024 subtracted in place of 1023", 9216, "1 + 2 + 4 + ... + 512 is 1023."),
        Mistake("one round too many", 9217 + 1024, "After the reach of 512 all is joined."),
        Mistake("the last round left out", 9217 - 512, "The reach of 512 is the last round."),
    ),
    hints=(
        "How many of 1024 elements have a left neighbour at distance 1? At distance 2? At distance 512?",
        "In the round of reach r, L − r elements join. The reaches are 1, 2, 4, ..., 512.",
        "joins = sum(1024 - 2**k for k in range(10))",
    ),
)


def some_lengths():
    """a slow, with a few near 0 and none equal, so that a lost or undecayed past shows; b with random signs."""
    for seed, length in enumerate((1, 2, 3, 4, 5, 8, 13)):
        random = torch.Generator().manual_seed(seed)
        a = 1 - torch.rand(length, generator=random, dtype=double) / 2
        a[5::7] /= 50
        b = torch.randn(length, generator=random, dtype=double)
        if length <= 4:  # to follow by hand
            a, b = a.mul(10).round() / 10, b.mul(2).round() + (seed % 2)
        yield a.to(single if length == 8 else double), b.to(single if length == 8 else double)


def pairs():
    for a, b in some_lengths():
        yield Case(f"L = {len(a)}", a=a, b=b)


def rounds(a, b, operator=combine, grow=lambda reach: 2 * reach, more=lambda reach, L: reach < L, keep_a=False):
    rows, reach, before = [b], 1, a
    while more(reach, len(a)):
        joined = operator((a[:-reach], b[:-reach]), (a[reach:], b[reach:]))
        a, b = (torch.cat([x[:reach], y]) for x, y in zip((a, b), joined, strict=True))
        a = before if keep_a else a
        rows.append(b)
        reach = grow(reach)
    return torch.stack(rows)


def hs(**options):
    return lambda a, b: rounds(a, b, **options)


def _in_place(a, b, b_first=True):
    a, b = a.clone(), b.clone()
    rows, reach = [b.clone()], 1
    while reach < len(a):
        for i in range(reach, len(a)):
            old = a[i].clone()
            a[i] = a[i - reach] * a[i]
            b[i] = (old if b_first else a[i]) * b[i - reach] + b[i]
        rows.append(b.clone())
        reach *= 2
    return torch.stack(rows)


def _new_a(left, right):
    a = left[0] * right[0]
    return a, a * left[1] + right[1]


def _around(a, b):
    rows, reach = [b], 1
    while reach < len(a):
        a, b = combine((a.roll(reach), b.roll(reach)), (a, b))
        rows.append(b)
        reach *= 2
    return torch.stack(rows)


OLD = "All elements of a round read what was there before it. Write each round into new tensors."
hillis_steele = Exercise(
    name="hillis_steele",
    asks="hillis_steele(a, b) -> (rounds + 1, L): b at the start and after each round; the last row is the scan",
    formula="Asked in the round of reach r, for all t ≥ r at once: b_t = a_t b_{t−r} + b_t and a_t = a_{t−r} a_t.",
    see="08 §2",
    reference=rounds,
    inputs=pairs,
    results=("b by rounds",),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("swapped operands", hs(operator=swapped), "a of the later step decays b.", "08 §9"),
        Mistake("overwriting in place", _in_place, OLD, "08, exercise 2"),
        Mistake("overwriting in place", lambda a, b: _in_place(a, b, b_first=False), OLD, "08, exercise 2"),
        Mistake("the new a used for b", hs(operator=_new_a), "b needs the a from before the round."),
        Mistake("a never joined", hs(keep_a=True), "At reach r each a is a product of r decays."),
        Mistake("elements that join across the ends", _around, "The first r elements have no neighbour: they rest."),
        Mistake("b added without decay", lambda a, b: rounds(a**0, b), "The left b is multiplied by the right a."),
        Mistake("a reach that grows by one", hs(grow=lambda r: r + 1), "It doubles: 1, 2, 4, ..."),
        Mistake("the last round left out", hs(more=lambda r, L: 2 * r <= L), "Go on while the reach is less than L."),
        Mistake("one round only", hs(more=lambda r, L: r < min(L, 2)), "Then each element knows of two steps."),
    ),
    hints=(
        "Round one: what does element t know after it has joined its left neighbour? Whom must it join next?",
        "joined_a = a[:-reach] * a[reach:] and joined_b = a[reach:] * b[:-reach] + b[reach:]. The first `reach` rest.",
        "rows = [b]; while reach < len(a): compute both; a = cat([a[:reach], joined_a]), b as well; rows.append(b); "
        "reach *= 2. At the end torch.stack(rows).",
    ),
)


def cut():
    """Three chunks or more in all but the first Cases, the last often shorter; the state before them is not zero."""
    sizes = (3, 1, 1, 2, 2, 3, 6)
    for (a, b), size, h in zip(some_lengths(), sizes, (2.0, 2.0, -3.0, 4.0, 1.5, -0.7, 2.2), strict=True):
        yield Case(f"L = {len(a)} in chunks of {size}", a=a, b=b, size=size, h=h)
    a, b = torch.linspace(0.1, 0.105, 90), torch.linspace(1, 2, 90)
    yield Case("90 fast decays, whose products are 0 in float32", a=a, b=b, size=45, h=1.0)


def in_chunks(a, b, size, h, operator=combine, join_in=None, keep=lambda states, alone, h: states[-1], start=1):
    parts, first, h = [], h, start * h
    for x, y in zip(a.split(size), b.split(size), strict=True):
        decay, alone = tree_scan(operator, (x, y))
        parts.append(join_in(decay, x, alone, h) if join_in else decay * h + alone)
        h = keep(parts[-1], alone, first)
    return torch.cat(parts)


def chunk(**options):
    return lambda a, b, size, h: in_chunks(a, b, size, h, **options)


def _divided(a, b, size, h):
    return a.cumprod(0) * (h + (b / a.cumprod(0)).cumsum(0))


DIVIDED = "The product underflows to 0: the quotient is infinite, then NaN. A scan only multiplies."
ALONE = "The next chunk starts from the state with the carry in it. Else all that is older than a chunk is lost."
SOFAR = "At step t the carry has seen all decays of the chunk up to t, no fewer and no more."
chunked = Exercise(
    name="chunked",
    asks="chunked(a, b, size, h) -> all states (L,), computed chunk after chunk, from the state h before them",
    formula="Asked is: (product of a since the chunk began) · (state before the chunk) + (scan of the chunk alone).",
    see="08 §6",
    reference=in_chunks,
    inputs=cut,
    results=("states",),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("the carry reset at each chunk", chunk(keep=lambda s, b, h: 0), "The past is more than one chunk."),
        Mistake("the carry reset at each chunk", chunk(keep=lambda s, b, h: 0, start=0), "The past is lost."),
        Mistake("an undecayed carry", chunk(join_in=lambda p, a, b, h: h + b), "The carry fades inside the chunk."),
        Mistake("a carry from the previous chunk only", chunk(keep=lambda s, b, h: b[-1]), ALONE, "08 §9"),
        Mistake("a carry decayed by one step only", chunk(join_in=lambda p, a, b, h: a * h + b), SOFAR),
        Mistake("a carry decayed by the whole chunk", chunk(join_in=lambda p, a, b, h: p[-1] * h + b), SOFAR),
        Mistake("the initial state dropped", chunk(start=0), "The first carry is h."),
        Mistake("the initial state as every carry", chunk(keep=lambda s, b, h: h), "The carry changes."),
        Mistake("a division by the product of decays", _divided, DIVIDED, "08 §7"),
        Mistake("swapped operands", chunk(operator=swapped), "In the chunk the earlier step stands left.", "08 §9"),
    ),
    hints=(
        "Scan a chunk as if nothing had been before it. What is missing from each of its states?",
        "Of the chunk alone take the products of a and the states: h_t = product_t · carry + state_t.",
        "for part in zip(a.split(size), b.split(size)): decay, alone = blelloch(combine, part); states = decay * h + "
        "alone; keep them; h = states[-1].",
    ),
)


def tree(a, b, pad=(1, 0), up=combine, down=combine, root=True, inclusive=True, end=combine, front=False):
    """Blelloch's scan as he wrote it, on one array; the options are what can go wrong."""
    x, L = torch.stack([a, b]), len(a)
    fill = (x[:, -1:] if pad is None else x.new_tensor(pad)[:, None]).expand(2, (1 << (L - 1).bit_length()) - L)
    given = torch.cat([fill, x] if front else [x, fill], 1)
    x, reaches = given.clone(), [2**k for k in range(given.shape[1].bit_length() - 1)]
    for reach in reaches:
        left, right = x[:, reach - 1 :: 2 * reach], x[:, 2 * reach - 1 :: 2 * reach]
        right[:] = torch.stack(up(left, right))
    total = x[:, -1].clone()
    if root:
        x[:, -1] = x.new_tensor([1, 0])
    for reach in reversed(reaches):
        left, right = x[:, reach - 1 :: 2 * reach], x[:, 2 * reach - 1 :: 2 * reach]
        before, here = right.clone(), left.clone()
        left[:], right[:] = before, torch.stack(down(before, here))
    x = torch.stack(end(x, given)) if inclusive else x
    return x[0, :L], x[1, :L], total


def leaf(**options):
    return lambda a, b: tree(a, b, **options)


PAD = "Only (1, 0) changes nothing. The first L results survive any padding behind them, the total does not."
blelloch = Exercise(
    name="blelloch",
    asks="blelloch(a, b) -> the inclusive scan, products (L,) and states (L,), and the total (2,) of the padded array",
    formula="Asked is the join of x_1 ... x_t at place t, x_t included, for any L; the total is the join of all.",
    see="08 §3",
    reference=tree,
    inputs=pairs,
    results=("products", "states", "total"),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("the exclusive scan in place of the inclusive one", leaf(inclusive=False), "x_t itself is missing."),
        Mistake("padding with (0, 0)", leaf(pad=(0, 0)), PAD, "08, exercise 5"),
        Mistake("padding with (1, 1)", leaf(pad=(1, 1)), PAD, "08, exercise 5"),
        Mistake("padding with (0, 1)", leaf(pad=(0, 1)), PAD, "08, exercise 5"),
        Mistake("padding with the last element again", leaf(pad=None), PAD, "08, exercise 5"),
        Mistake("padding in front and a cut behind", leaf(front=True), "Cut where you have padded."),
        Mistake("swapped operands in the down-sweep", leaf(down=swapped), "What came before stands on the left."),
        Mistake("swapped operands in the up-sweep", leaf(up=swapped), "The left place is the earlier one."),
        Mistake("swapped operands in the last join", leaf(end=swapped), "What came before stands on the left."),
        Mistake("swapped operands", leaf(up=swapped, down=swapped, end=swapped), "The earlier one stands left."),
        Mistake("swapped operands", leaf(up=swapped, down=swapped), "The earlier one stands left.", "08 §9"),
        Mistake("the total left at the root", leaf(root=False), "Before the way down the identity is written there."),
    ),
    hints=(
        "Pad with what changes nothing. On the way up the join of a pair overwrites its right element.",
        "Write (1, 0) over the total. On the way down the left place gets what the right one held, and the right one "
        "that joined with what the left one held. Last, join each x_t to what is before it.",
        "Up, reach 1, 2, 4, ...: x[r] = join(x[l], x[r]), l = slice(reach − 1, None, 2·reach), r = slice(2·reach − 1, "
        "None, 2·reach). Down, in reverse: x[l], x[r] = x[r], join(x[r], x[l]), all from copies.",
    ),
)

hint, picture = helpers(join, joins, hillis_steele, chunked, blelloch)
