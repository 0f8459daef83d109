"""Answers to the exercises of chapter 08."""

import math

import numpy as np
import torch

from . import Answers

answers = Answers()


# join


@answers.right("join")
def by_matrices(M1, b1, M2, b2):
    return M2 @ M1, M2 @ b1 + b2


@answers.right("join")
def by_unit_vectors(M1, b1, M2, b2):
    def both(h):
        return torch.mv(M2, torch.mv(M1, h) + b1) + b2

    b = both(torch.zeros_like(b1))
    return torch.stack([both(e) - b for e in torch.eye(len(b1), dtype=b1.dtype)], dim=1), b


@answers.right("join")
def by_einsum(M1, b1, M2, b2):
    return torch.einsum("ij,jk->ik", M2, M1), torch.einsum("ij,j->i", M2, b1).add_(b2)


@answers.right("join")
def homogeneous(M1, b1, M2, b2):
    size = len(b1)
    one, two = (torch.eye(size + 1, dtype=torch.float64) for _ in range(2))
    one[:size, :size], one[:size, size], two[:size, :size], two[:size, size] = M1, b1, M2, b2
    result = (two @ one).to(b1.dtype)
    return [result[:size, :size], result[:size, size]]


@answers.wrong("join", "swapped operands")
def second_first(M1, b1, M2, b2):
    return by_matrices(M2, b2, M1, b1)


@answers.wrong("join", "M1 M2 in place of M2 M1")
def as_they_are_written(M1, b1, M2, b2):
    return M1 @ M2, b2 + M2 @ b1


@answers.wrong("join", "products entry by entry")
def stars(M1, b1, M2, b2):
    return M2 * M1, M2 @ b1 + b2


@answers.wrong("join", "b1 not multiplied")
def plain_sum(M1, b1, M2, b2):
    return M2 @ M1, b2 + b1


@answers.wrong("join", "b2 multiplied too")
def all_multiplied(M1, b1, M2, b2):
    return M2 @ M1, M2 @ b1 + M2 @ b2


@answers.wrong("join", "M2 transposed")
def vector_first(M1, b1, M2, b2):
    return M2 @ M1, b1 @ M2 + b2


@answers.wrong("join", "the two b swapped")
def other_offsets(M1, b1, M2, b2):
    return M2 @ M1, M1 @ b2 + b1


@answers.wrong("join", "changes its input")
def adds_into_b2(M1, b1, M2, b2):
    b2 += M2 @ b1
    return M2 @ M1, b2


@answers.wrong("join", "count")
def offset_only(M1, b1, M2, b2):
    return M2 @ b1 + b2


# joins

answers.right("joins")(9217)
answers.right("joins")(sum(1024 - 2**k for k in range(10)))
answers.right("joins")(np.int64(9217))
answers.right("joins")(torch.tensor(9217))
answers.wrong("joins", "every element joined in every round")(1024 * int(math.log2(1024)))
answers.wrong("joins", "the loop's joins")(1024 - 1)
answers.wrong("joins", "Blelloch's joins")(2 * 1024 - 2 - 10)
answers.wrong("joins", "the number of rounds")(10)
answers.wrong("joins", "1024 subtracted in place of 1023")(9216)
answers.wrong("joins", "not written")(...)


# hillis_steele


@answers.right("hillis_steele")
def two_buffers(a, b):
    rows = [b]
    for k in range(math.ceil(math.log2(len(a)))):
        reach = 2**k
        new_a, new_b = a.clone(), b.clone()
        new_a[reach:] = a[:-reach] * a[reach:]
        new_b[reach:] = a[reach:] * b[:-reach] + b[reach:]
        a, b = new_a, new_b
        rows.append(b)
    return torch.stack(rows)


@answers.right("hillis_steele")
def from_the_right_in_one_buffer(a, b):
    a, b, reach = a.clone(), b.clone(), 1
    rows = [b.clone()]
    while reach < len(a):
        for i in reversed(range(reach, len(a))):
            b[i] = a[i] * b[i - reach] + b[i]
            a[i] = a[i - reach] * a[i]
        rows.append(b.clone())
        reach *= 2
    return torch.stack(rows)


@answers.right("hillis_steele")
def with_the_identity_in_front(a, b):
    rows = [b]
    for k in range(math.ceil(math.log2(len(a)))):
        reach = 2**k
        before_a = torch.cat([torch.ones_like(a[:reach]), a])[: len(a)]
        before_b = torch.cat([torch.zeros_like(b[:reach]), b])[: len(b)]
        a, b = a * before_a, a * before_b + b
        rows.append(b)
    return torch.stack(rows)


@answers.right("hillis_steele")
def sums_over_windows(a, b):
    rows, reach, size = [b.double()], 1, len(a)
    while reach < size:
        reach *= 2
        row = torch.zeros(size, dtype=torch.float64)
        for t in range(size):
            for s in range(max(0, t - reach + 1), t + 1):
                row[t] += a[s + 1 : t + 1].double().prod() * b[s].double()
        rows.append(row)
    return torch.stack(rows).to(b.dtype)


@answers.wrong("hillis_steele", "swapped operands")
def late_before_early(a, b):
    rows, reach = [b], 1
    while reach < len(a):
        joined_a, joined_b = a[reach:] * a[:-reach], a[:-reach] * b[reach:] + b[:-reach]
        a, b = torch.cat([a[:reach], joined_a]), torch.cat([b[:reach], joined_b])
        rows.append(b)
        reach *= 2
    return torch.stack(rows)


@answers.wrong("hillis_steele", "overwriting in place")
def one_buffer_from_the_left(a, b):
    a, b, reach = a.clone(), b.clone(), 1
    rows = [b.clone()]
    while reach < len(a):
        for i in range(reach, len(a)):
            b[i] += a[i] * b[i - reach]
            a[i] *= a[i - reach]
        rows.append(b.clone())
        reach *= 2
    return torch.stack(rows)


@answers.wrong("hillis_steele", "the new a used for b")
def a_first(a, b):
    rows, reach = [b], 1
    while reach < len(a):
        a = torch.cat([a[:reach], a[reach:] * a[:-reach]])
        b = torch.cat([b[:reach], b[reach:] + a[reach:] * b[:-reach]])
        rows.append(b)
        reach *= 2
    return torch.stack(rows)


@answers.wrong("hillis_steele", "a never joined")
def only_b(a, b):
    rows, reach = [b], 1
    while reach < len(a):
        b = torch.cat([b[:reach], b[reach:] + a[reach:] * b[:-reach]])
        rows.append(b)
        reach *= 2
    return torch.stack(rows)


@answers.wrong("hillis_steele", "elements that join across the ends")
def rolled(a, b):
    rows, reach = [b], 1
    while reach < len(a):
        a, b = torch.roll(a, reach, 0) * a, a * torch.roll(b, reach, 0) + b
        rows.append(b)
        reach *= 2
    return torch.stack(rows)


@answers.wrong("hillis_steele", "the last round left out")
def floor_of_the_logarithm(a, b):
    rows = [b]
    for k in range(len(a).bit_length() - 1):
        r = 2**k
        a, b = torch.cat([a[:r], a[r:] * a[:-r]]), torch.cat([b[:r], b[r:] + a[r:] * b[:-r]])
        rows.append(b)
    return torch.stack(rows)


@answers.wrong("hillis_steele", "b added without decay")
def a_sum(a, b):
    return two_buffers(torch.ones_like(a), b)


@answers.wrong("hillis_steele", "shape")
def scan_only(a, b):
    return two_buffers(a, b)[-1]


@answers.wrong("hillis_steele", "shape")
def without_the_start(a, b):
    return two_buffers(a, b)[1:]


@answers.wrong("hillis_steele", "changes its input")
def no_copy(a, b):
    rows, reach = [b.clone()], 1
    while reach < len(a):
        for i in range(len(a) - 1, reach - 1, -1):
            b[i] += a[i] * b[i - reach]
            a[i] *= a[i - reach]
        rows.append(b.clone())
        reach *= 2
    return torch.stack(rows)


@answers.wrong("hillis_steele", "time")
def reach_never_grows(a, b):
    reach = 1
    while reach < len(a):
        new = torch.cat([b[:reach], b[reach:] + a[reach:] * b[:-reach]])
    return torch.stack([b, new])


@answers.wrong("hillis_steele", "raises")
def in_one_stroke(a, b):
    rows, reach = [b], 1
    while reach < len(a):
        a, b = a[reach:] * a[:-reach], b[reach:] + a[reach:] * b[:-reach]
        rows.append(b)
        reach *= 2
    return torch.stack(rows)


# chunked


@answers.right("chunked")
def running_product(a, b, size, h):
    states = []
    for part in torch.stack([a, b], dim=1).split(size):
        decay, alone = 1.0, 0.0
        for x, y in part:
            decay, alone = decay * x, x * alone + y
            states.append(decay * h + alone)
        h = states[-1]
    return torch.stack(states)


@answers.right("chunked")
def a_plain_loop(a, b, size, h):
    states = []
    for x, y in zip(a.double(), b.double(), strict=True):
        h = x * h + y
        states.append(h)
    return torch.stack(states).to(a.dtype)


@answers.right("chunked")
def carry_as_a_pair(a, b, size, h):
    carry_a, carry_b, out = 0.0, h, []
    for x, y in zip(a.split(size), b.split(size), strict=True):
        x, y, reach = x.double(), y.double(), 1
        while reach < len(x):
            y = torch.cat([y[:reach], x[reach:] * y[:-reach] + y[reach:]])
            x = torch.cat([x[:reach], x[:-reach] * x[reach:]])
            reach *= 2
        x, y = carry_a * x, x * carry_b + y
        carry_a, carry_b = x[-1], y[-1]
        out.append(y)
    return torch.cat(out).to(a.dtype)


@answers.right("chunked")
def first_input_holds_the_carry(a, b, size, h):
    b = b.clone()
    for start in range(0, len(a), size):
        b[start] += a[start] * h
        for t in range(start + 1, min(start + size, len(a))):
            b[t] += a[t] * b[t - 1]
        h = b[min(start + size, len(a)) - 1].clone()
    return b


def version(state_in, carry_out, first=lambda h: h):
    def answer(a, b, size, h):
        outputs, state = [], first(h)
        for x, y in zip(a.split(size), b.split(size), strict=True):
            alone = torch.stack([sum(x[s + 1 : t + 1].prod() * y[s] for s in range(t + 1)) for t in range(len(x))])
            states = state_in(x, alone, state)
            outputs.append(states)
            state = carry_out(states, alone, x, state)
        return torch.cat(outputs)

    return answer


def faded(x, alone, state):
    return x.cumprod(0) * state + alone


def last(states, alone, x, state):
    return states[-1]


answers.wrong("chunked", "the carry reset at each chunk")(version(faded, lambda *_: 0.0))
answers.wrong("chunked", "the carry reset at each chunk")(version(faded, lambda *_: 0.0, first=lambda h: 0.0))
answers.wrong("chunked", "an undecayed carry")(version(lambda x, alone, state: state + alone, last))
answers.wrong("chunked", "a carry from the previous chunk only")(version(faded, lambda states, alone, *_: alone[-1]))
answers.wrong("chunked", "a carry decayed by one step only")(version(lambda x, alone, h: x * h + alone, last))
answers.wrong("chunked", "a carry decayed by the whole chunk")(version(lambda x, alone, h: x.prod() * h + alone, last))
answers.wrong("chunked", "the initial state dropped")(version(faded, last, first=lambda h: 0.0))
answers.wrong("chunked", "the initial state as every carry")(version(faded, lambda s, alone, x, state: state))
answers.wrong("chunked", None)(version(faded, lambda states, *_: states[0]))


@answers.wrong("chunked", "shape")
def full_chunks_only(a, b, size, h):
    whole = len(a) // size * size
    return a_plain_loop(a, b, size, h)[:whole]


@answers.wrong("chunked", "shape")
def last_states(a, b, size, h):
    return running_product(a, b, size, h)[size - 1 :: size]


@answers.wrong("chunked", "a division by the product of decays")
def cumulative_sum(a, b, size, h):
    product = torch.cumprod(a, 0)
    return product * ((b / product).cumsum(0) + h)


@answers.wrong("chunked", "swapped operands")
def later_step_left(a, b, size, h):
    states = torch.empty_like(b)
    for start in range(0, len(a), size):
        decay, alone = 1.0, 0.0
        for t in range(start, min(start + size, len(a))):
            alone = decay * b[t] + alone
            decay = decay * a[t]
            states[t] = decay * h + alone
        h = states[t]
    return states


# blelloch


@answers.right("blelloch")
def as_he_wrote_it(a, b):
    n, levels = len(a), math.ceil(math.log2(len(a)))
    extra = 2**levels - n
    first_a = torch.cat([a, torch.ones(extra, dtype=a.dtype)])
    first_b = torch.cat([b, torch.zeros(extra, dtype=b.dtype)])
    a, b = first_a.clone(), first_b.clone()
    for k in range(levels):
        reach = 2**k
        l, r = slice(reach - 1, None, 2 * reach), slice(2 * reach - 1, None, 2 * reach)
        b[r] = a[r] * b[l] + b[r]
        a[r] = a[l] * a[r]
    total = torch.stack([a[-1], b[-1]])
    a[-1], b[-1] = 1, 0
    for k in reversed(range(levels)):
        reach = 2**k
        l, r = slice(reach - 1, None, 2 * reach), slice(2 * reach - 1, None, 2 * reach)
        left_a, left_b = a[l].clone(), b[l].clone()
        a[l], b[l] = a[r], b[r]
        b[r] = left_a * b[r] + left_b
        a[r] = a[r] * left_a
    a, b = a * first_a, first_a * b + first_b
    return a[:n], b[:n], total


@answers.right("blelloch")
def recursive_inclusive(a, b):
    def scan(a, b):
        if len(a) == 1:
            return a, b
        even = len(a) // 2 * 2
        l, r = slice(0, even, 2), slice(1, even, 2)
        up = scan(torch.cat([a[l] * a[r], a[even:]]), torch.cat([a[r] * b[l] + b[r], b[even:]]))
        out_a, out_b = torch.empty_like(a), torch.empty_like(b)
        out_a[0], out_b[0] = a[0], b[0]
        out_a[1::2], out_b[1::2] = up[0][: even // 2], up[1][: even // 2]
        rest = slice(2, None, 2)
        before_a, before_b = out_a[1:-1:2], out_b[1:-1:2]
        out_a[rest], out_b[rest] = (before_a * a[rest]), a[rest] * before_b + b[rest]
        return out_a, out_b

    products, states = scan(a, b)
    return products, states, torch.stack([products[-1], states[-1]])


@answers.right("blelloch")
def plain_loop(a, b):
    products, states, p, h = [], [], 1.0, 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        p, h = p * x, x * h + y
        products.append(p)
        states.append(h)
    return tuple(torch.tensor(x, dtype=a.dtype) for x in (products, states, (p, h)))


def on_lists(pad=(1.0, 0.0), inclusive=True, up=0, down=0, last=0, root=True, front=False):
    """Blelloch on a list of pairs; 1 for up, down and last swaps the operands there."""

    def then(x, y, swap):
        x, y = (y, x) if swap else (x, y)
        return x[0] * y[0], y[0] * x[1] + y[1]

    def answer(a, b):
        given = list(zip(a.tolist(), b.tolist(), strict=True))
        size = 1
        while size < len(given):
            size *= 2
        filler = [given[-1] if pad is None else pad] * (size - len(given))
        given = filler + given if front else given + filler
        x, d = list(given), 1
        while d < size:
            for i in range(0, size, 2 * d):
                x[i + 2 * d - 1] = then(x[i + d - 1], x[i + 2 * d - 1], up)
            d *= 2
        total = x[-1]
        if root:
            x[-1] = (1.0, 0.0)
        while d > 1:
            d //= 2
            for i in range(0, size, 2 * d):
                here, before = x[i + d - 1], x[i + 2 * d - 1]
                x[i + d - 1], x[i + 2 * d - 1] = before, then(before, here, down)
        if inclusive:
            x = [then(before, own, last) for before, own in zip(x, given, strict=True)]
        x = torch.tensor(x[: len(a)], dtype=a.dtype)
        return x[:, 0], x[:, 1], torch.tensor(total, dtype=a.dtype)

    return answer


answers.right("blelloch")(on_lists())
answers.wrong("blelloch", "the exclusive scan in place of the inclusive one")(on_lists(inclusive=False))
answers.wrong("blelloch", "padding with (0, 0)")(on_lists(pad=(0.0, 0.0)))
answers.wrong("blelloch", "padding with (1, 1)")(on_lists(pad=(1.0, 1.0)))
answers.wrong("blelloch", "padding with the last element again")(on_lists(pad=None))
answers.wrong("blelloch", "padding in front and a cut behind")(on_lists(front=True))
answers.wrong("blelloch", "swapped operands in the down-sweep")(on_lists(down=1))
answers.wrong("blelloch", "swapped operands in the up-sweep")(on_lists(up=1))
answers.wrong("blelloch", "swapped operands in the last join")(on_lists(last=1))
answers.wrong("blelloch", "swapped operands")(on_lists(up=1, down=1, last=1))
answers.wrong("blelloch", "the total left at the root")(on_lists(root=False))


@answers.wrong("blelloch", "padding with (0, 0)")
def zeros_appended(a, b):
    n = len(a)
    size = 2 ** math.ceil(math.log2(n))
    a, b = (torch.nn.functional.pad(x, (0, size - n)) for x in (a, b))
    products, states, total = plain_loop(a, b)
    return products[:n], states[:n], total


@answers.wrong("blelloch", "shape")
def not_cut(a, b):
    extra = (1 << math.ceil(math.log2(len(a)))) - len(a)
    a, b = torch.cat([a, a.new_ones(extra)]), torch.cat([b, b.new_zeros(extra)])
    return plain_loop(a, b)


@answers.wrong("blelloch", "count")
def no_total(a, b):
    return as_he_wrote_it(a, b)[:2]


@answers.wrong("blelloch", None)
def total_without_the_last_step(a, b):
    products, states, _ = plain_loop(a, b)
    before = torch.cat([torch.tensor([1.0, 0.0], dtype=a.dtype)[:, None], torch.stack([products, states])], 1)[:, -2]
    return products, states, before
