"""Checks of chapter 10: kernels in the interpreter. Two masks, a carry, the tail after a softplus, a padded head."""

import torch

from minimamba.checks._core import Exercise, Mistake
from minimamba.checks._guard import is_kernel
from minimamba.checks._help import helpers
from minimamba.checks._kernels import (
    OTHER,
    OUTSIDE,
    STRIDE,
    ReadsBefore,
    ReadsBehind,
    WritesBefore,
    block,
    blocks,
    in_memory,
    inputs,
    outside,
    unmasked,
)


def ending(right, number):
    """Right but for the last state where the last block is not full: number(last, places that are padded)."""

    def answer(*arguments):
        h, last = right(*arguments)
        return h, last if len(h) % block(h) == 0 else number(last, -len(h) % block(h))

    return answer


def overlapping(right):
    def answer(*arguments):
        h = right(*arguments)
        h[blocks(h) + block(h) - 1 :] = torch.nan
        return h

    return answer


def scan(a, b, weight=None, carried=None, start=None, swapped=False, n=None):
    """h_t = a_t h_{t−1} + b_t block by block -> (h, last state). weight(a_block) is what multiplies the carry,
    carried(local, h) the carry to the next block, start(p) the carry into block p."""
    carry, states = b.new_zeros(1), []
    pad = torch.nn.functional.pad
    length, n = len(b), n or block(b)
    a, b = pad(a, (0, -length % n), value=1.0), pad(b, (0, -length % n))
    for p, (decay, new) in enumerate(zip(a.split(n), b.split(n), strict=True)):
        local = [new[0]]
        for t in range(1, len(new)):
            local.append(local[-1] + decay[:t].prod() * new[t] if swapped else decay[t] * local[-1] + new[t])
        local = torch.stack(local)
        states.append(local + (weight or (lambda a: a.cumprod(0)))(decay) * (start(p) if start else carry))
        carry = (carried or (lambda local, h: h[-1:]))(local, states[-1])
    return torch.cat(states)[:length], carry.clone()


LOCAL = dict(carried=lambda local, h: local[-1:])
LOST = dict(weight=lambda a: 0 * a)
UNDECAYED = dict(weight=lambda a: a**0)
ONE_DECAY = dict(weight=lambda a: a)
FIRST_ONLY = dict(weight=lambda a: a * (torch.arange(len(a)) == 0))
HANDED_ON = "What enters the next block is the last h_t of this one, the carry of earlier blocks included."
IDENTITY = "A padded step has to hand the state on unchanged: h = 1 · h + 0, the pair (1, 0)."
THROUGH = "h_t = h_local + (a_s ⋯ a_t) · carry: the carry decays at every step, and the scan returns that product."


def carries(wrong):
    """Mistakes with the carry of a scan; wrong(**options) is the answer with those options of `scan`."""
    return (
        Mistake("a carry lost between blocks", wrong(**LOST), "Each block begins from zero here.", "10 §5"),
        Mistake("the carry of one block only", wrong(**LOCAL), HANDED_ON, "10 §5"),
        Mistake("a carry that does not decay", wrong(**UNDECAYED), THROUGH, "10 §5"),
        Mistake("a_t in place of the product a_s ⋯ a_t", wrong(**ONE_DECAY), THROUGH, "10 §5"),
        Mistake("a carry that reaches the first step of a block only", wrong(**FIRST_ONLY), THROUGH, "10 §5"),
    )


# 1. Two addresses, two masks


def first_difference(x):
    return torch.diff(x, prepend=x.new_zeros(1))


def _with(every, value):
    def answer(x):
        d, at = first_difference(x), slice(0, None, block(x) if every else len(x))
        d[at] = x[at] * value
        return d

    return answer


def _bare(x):
    raise ReadsBehind if len(x) < block(x) else ReadsBefore


difference = Exercise(
    name="difference",
    asks="a kernel (x, d, L, BLOCK) for d_t = x_t − x_{t−1}, one program a block",
    formula="Asked is d_t = x_t − x_{t−1} with x_0 = 0; in code x[0] is x_1.",
    see="10, exercise 1",
    reference=first_difference,
    inputs=inputs(["x"], lambda decay, x, *_: [x]),
    run=lambda kernel, x: in_memory(kernel, {"x": x}, {"d": x}, blocks(x))[0] if is_kernel(kernel) else kernel(x),
    kind="kernel",
    results=("d",),
    sizes={"L": ("x", 0)},
    mistakes=(
        Mistake("blocks that begin at p, not at p · BLOCK", overlapping(first_difference), STRIDE, "10 §2"),
        *unmasked(first_difference),
        Mistake("no mask at all", _bare, OUTSIDE, "10 §4"),
        Mistake("one mask for two addresses", outside(ReadsBefore, None, True), "x + t − 1 needs t > 0 too.", "10 §1"),
        Mistake("nothing in the place of x_0", _with(False, torch.nan), "Say other=0.0, and store d[0] too. " + OTHER),
        Mistake("x_0 = x_1", _with(False, 0.0)),
        Mistake("blocks that do not see the block before", _with(True, 1.0), "Only x_0 is missing."),
        Mistake("the difference to the next step", lambda x: torch.diff(x, append=x.new_zeros(1)), "Load x + t − 1."),
        Mistake("x_{t−1} − x_t", lambda x: -first_difference(x), "The later one comes first."),
    ),
    hints=(
        "A mask belongs to an address, not to a kernel. For which t does x + t − 1 lie inside the tensor?",
        "Program p owns t = p·BLOCK + tl.arange(0, BLOCK). Load from x + t and from x + t − 1, each with its own mask.",
        "before = tl.load(x + t - 1, mask=(t > 0) & (t < L), other=0.0); the other load and the store have mask=t < L.",
    ),
)

# 2. A carry over blocks, and the tail after a softplus


def discretised(x, u):
    delta = torch.nn.functional.softplus(x)
    return torch.exp(-delta), delta * u


def softplus_states(x, u):
    return scan(*discretised(x, u))


def _scan_with(**options):
    return lambda x, u: scan(*discretised(x, u), **options)


def _held(x, u):
    a, _ = discretised(x, u)
    return scan(a, (1 - a) * u)


def run_softplus(kernel, x, u):
    return in_memory(kernel, {"x": x, "u": u}, {"h": x, "last": x[:1]}) if is_kernel(kernel) else kernel(x, u)


softplus_scan = Exercise(
    name="softplus_scan",
    asks="a kernel (x, u, h, last, L, BLOCK), one program: h_t = e^{−Δ_t} h_{t−1} + Δ_t u_t with Δ = softplus(x)",
    formula="Asked is h_t = e^{−Δ_t} h_{t−1} + Δ_t u_t with Δ = log(1 + e^x) and h_0 = 0, and h_L once more at last.",
    see="10 §6",
    reference=softplus_states,
    inputs=inputs(["x", "u"], lambda decay, u, *_: [torch.log(torch.expm1(-decay.log())), u]),
    run=run_softplus,
    kind="kernel",
    results=("h", "last"),
    sizes={"L": ("x", 0)},
    mistakes=(
        Mistake(
            "a 0 put into the tail before the softplus",
            ending(softplus_states, lambda last, padded: last / 2**padded),
            "softplus(0) = log 2 is a real step: each padded one halves the state. Put Δ = 0 in after it.",
        ),
        Mistake("(0, 0) in the tail", ending(softplus_states, lambda last, padded: 0 * last), IDENTITY),
        Mistake("no other= in the tail", ending(softplus_states, lambda last, _: last * torch.nan), OTHER),
        *unmasked(softplus_states),
        *carries(_scan_with),
        Mistake("no softplus", lambda x, u: scan(torch.exp(-x), x * u), "x is not the step yet."),
        Mistake("Δ missing before u", lambda x, u: scan(discretised(x, u)[0], u)),
        Mistake("e^{+Δ}", lambda x, u: scan(1 / discretised(x, u)[0], discretised(x, u)[1]), "A is −1 here."),
        Mistake("(1 − e^{−Δ}) u in place of Δ u", _held, "That is the exact rule; Mamba takes Δ u.", "02 §6"),
        Mistake("the operator with its sides swapped", _scan_with(swapped=True), "Left is the earlier step.", "10 §3"),
        Mistake("no store at last", lambda x, u: (softplus_states(x, u)[0], x[:1] * torch.nan), "Store the carry."),
    ),
    hints=(
        "Scan a block from zero, add what the carry has become by then, and take the block's last state as new carry.",
        "Which step size makes a padded step the identity (1, 0)? It is not the softplus of what tl.load puts there.",
        "delta = tl.where(t < L, tl.log(1 + tl.exp(x_block)), 0.0); decay, local = tl.associative_scan((tl.exp(-delta)"
        ", delta * u_block), 0, combine); h_block = decay * carry + local; carry = its last, by a masked sum.",
    ),
)


# 3. A reversed scan with a padded head


def backwards(a, b, **options):
    h, first = scan(a.flip(0), b.flip(0), **options)
    return h.flip(0), first


def run_reversed(kernel, a, b):
    return in_memory(kernel, {"a": a, "b": b}, {"h": a, "first": a[:1]}) if is_kernel(kernel) else kernel(a, b)


def _local_order(a, b):
    """Blocks from the first to the last, each scanned backwards."""
    carry, states = b.new_zeros(1), []
    for decay, new in zip(a.split(block(a)), b.split(block(a)), strict=True):
        states.append(backwards(decay, new, n=len(new))[0] + decay.flip(0).cumprod(0).flip(0) * carry)
        carry = states[-1][:1]
    return torch.cat(states), carry.clone()


def _wrong_end(local, h):
    return h[:1]


HEAD = "Counted from the end, what does not fit lies before the first step. There t < L is always true: ask for t >= 0."
from_the_end = Exercise(
    name="from_the_end",
    asks="a kernel (a, b, h, first, L, BLOCK), one program, blocks counted from the end: h_t = a_t h_{t+1} + b_t",
    formula="Asked is h_t = a_t h_{t+1} + b_t from the last step to the first, h_{L+1} = 0; h_1 also at first.",
    see="10 §8",
    reference=backwards,
    inputs=inputs(["a", "b"], lambda decay, b, *_: [decay, b]),
    run=run_reversed,
    kind="kernel",
    results=("h", "first"),
    sizes={"L": ("a", 0)},
    mistakes=(
        *unmasked(backwards, "a padded head without its mask", (ReadsBefore, WritesBefore), "10, exercise 3", HEAD),
        *unmasked(backwards),
        Mistake("(0, 0) in the padding", ending(backwards, lambda last, padded: 0 * last), IDENTITY, "10 §6"),
        Mistake("no other= in the padding", ending(backwards, lambda last, _: last * torch.nan), OTHER, "10 §6"),
        Mistake("a forward scan", scan, "reverse=True, and the blocks from the last to the first."),
        Mistake("blocks visited from the first to the last", _local_order, "The last block has to come first."),
        Mistake("the carry from the wrong end of a block", lambda a, b: backwards(a, b, carried=_wrong_end), HANDED_ON),
        *carries(lambda **options: lambda a, b: backwards(a, b, **options)),
        Mistake("no store at first", lambda a, b: (backwards(a, b)[0], a[:1] * torch.nan), "Store the carry."),
    ),
    hints=(
        "L = 3, BLOCK = 2: write down t for both blocks. Which places do not exist, and would t < L leave them out?",
        "t = L − BLOCK − done + tl.arange(0, BLOCK), with the mask t >= 0. What has to stand in the padding?",
        "Load a with other=1.0 and b with other=0.0; tl.associative_scan(..., 0, combine, reverse=True); the new carry "
        "is place 0 of h_block, which the padding has handed through.",
    ),
)

# 4. A program for each block


def finished(a, b, ends, **options):
    return scan(a, b, start=lambda p: ends[p - 1] if p else 0 * ends[0], **options)[0]


def run_finish(kernel, a, b, ends):
    if not is_kernel(kernel):
        return kernel(a, b, ends)
    return in_memory(kernel, {"a": a, "b": b, "ends": ends}, {"h": a}, blocks(a))[0]


def _own_end(a, b, ends):
    return scan(a, b, start=lambda p: ends[p])[0]


def _no_stride(a, b, ends):
    h, n = torch.full_like(a, torch.nan), block(a)
    for p, end in enumerate([0 * ends[0], *ends[:-1]]):
        h[p : p + n] = scan(a[p : p + n], b[p : p + n], start=lambda _: end, n=n)[0]  # noqa: B023
    return h


finish = Exercise(
    name="finish",
    asks="a kernel (a, b, ends, h, L, BLOCK), a program for each block; ends[p] is the state at the end of block p",
    formula="Asked is, in block p, the scan from zero plus (a_s ⋯ a_t) · ends[p − 1]; block 0 begins from 0.",
    see="10, exercise 4",
    reference=finished,
    inputs=inputs(["a", "b", "ends"], lambda decay, b, more, _: [decay, b, more[: blocks(more)]]),
    run=run_finish,
    kind="kernel",
    results=("h",),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("the block's own end as its carry", _own_end, "What enters block p is ends[p − 1]."),
        Mistake("no mask for program 0", outside(ReadsBefore, None, True), "Nobody stands before it: p > 0."),
        Mistake("blocks that begin at p, not at p · BLOCK", _no_stride, STRIDE, "10 §2"),
        *unmasked(finished),
        *carries(lambda **options: lambda a, b, ends: finished(a, b, ends, **options)),
    ),
    hints=(
        "Which single number does program p need from the others? And program 0?",
        "carry = ends[p − 1], loaded with a mask p > 0 and other=0.0. The rest is one block's scan, as in exercise 2.",
        "decay, local = tl.associative_scan((a_block, b_block), 0, combine); tl.store(h + t, decay * carry + local, "
        "mask=t < L).",
    ),
)

hint, picture = helpers(difference, softplus_scan, from_the_end, finish)
