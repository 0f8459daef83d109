"""Chapter 08: associativity turns L dependent steps into about log2(L) levels. Three parallel scans.

An element is a tuple of tensors with time along dimension 0; an operator joins two elements of equal length,
the earlier one left. `hillis_steele`, `blelloch` and `chunked` work for any associative operator and return
the inclusive scan x_1, x_1∘x_2, x_1∘x_2∘x_3, ...
"""

import torch

from minimamba.sequential_scan import discretize_step, per_channel


def combine(left, right):
    """Join two steps h -> a h + b: first `left`, then `right`. (a₁, b₁)∘(a₂, b₂) = (a₁a₂, a₂b₁ + b₂).

    Associative, not commutative; the identity is (1, 0). Source: Blelloch (1990), section 1.4; Mamba
    (Gu and Dao, 2023), section 3.3.2.
    """
    a_left, b_left = left
    a_right, b_right = right
    return a_left * a_right, a_right * b_left + b_right


class Counted:
    """An operator that counts its work: `operations` joins of single elements, in `depth` dependent calls."""

    def __init__(self, operator):
        self.operator = operator
        self.operations = 0
        self.depth = 0

    def __call__(self, left, right):
        self.operations += len(left[0])
        self.depth += 1
        return self.operator(left, right)


def hillis_steele(operator, elements):
    """Scan in ceil(log2 L) levels: at reach r every element joins the one r steps before it; then r doubles.

    Depth ceil(log2 L), but about L log2 L joins. Source: Hillis and Steele (1986), figure 2.
    """
    length, reach = len(elements[0]), 1
    while reach < length:
        early, late = _cut(elements, 0, length - reach), _cut(elements, reach, length)
        elements = _concatenate(_cut(elements, 0, reach), operator(early, late))
        reach *= 2
    return elements


def blelloch(operator, elements):
    """Scan in about 2 log2 L levels with fewer than 2 L joins: a tree of partial results, up and then down.

    Up: join neighbours until one element is left. Down: the scan of the pairs is the scan at every right
    element; each left element joins what ended just before its pair. An element without a partner goes up as
    it is. Source: Blelloch (1990), section 1.2, in inclusive form.
    """
    length = len(elements[0])
    if length == 1:
        return elements
    even = length // 2 * 2
    left, right = _cut(elements, 0, even, 2), _cut(elements, 1, even, 2)
    pairs = operator(left, right)  # up-sweep
    if length > even:
        pairs = _concatenate(pairs, _cut(elements, even, length))
    ends = blelloch(operator, pairs)
    # Down-sweep. ends[i] is the scan at 2i + 1 already; at 2i it is ends[i - 1] joined with the element there.
    starts = _cut(left, 0, 1)
    if even > 2:
        starts = _concatenate(starts, operator(_cut(ends, 0, even // 2 - 1), _cut(left, 1, even // 2)))
    result = _interleave(starts, _cut(ends, 0, even // 2))
    return result if length == even else _concatenate(result, _cut(ends, even // 2, even // 2 + 1))


def chunked(operator, elements, carry, scan=hillis_steele):
    """Continue a scan: scan this chunk on its own, then join the `carry` (one element) into each of its steps.

    Returns the chunk's scan; its last element is the next chunk's carry.
    """
    local = scan(operator, elements)
    spread = tuple(x.expand_as(y) for x, y in zip(carry, local, strict=True))
    return operator(spread, local)


def selective_scan_parallel(u, delta, A, B, C, initial_state, algorithm):
    """The selective recurrence of chapter 07 by a parallel scan of (Ā_t, B̄_t u_t).

    Arguments and results as in `selective_scan_sequential`; `algorithm` is "hillis_steele", "blelloch" or
    "chunked". The first two hold (L, Batch, D, N) tensors; the third only those of `CHUNK` steps at a time.
    Nothing is ever divided by a product of decays, which may underflow to 0.
    """
    u, delta, B, C = (x.transpose(0, 1) for x in (u, delta, B, C))  # time first
    scan = {"hillis_steele": hillis_steele, "blelloch": blelloch}.get(algorithm)
    steps = CHUNK if scan is None else len(u)
    carry = (torch.ones_like(initial_state)[None], initial_state[None])  # the map h -> h_0
    outputs = []
    for start in range(0, len(u), steps):
        part = slice(start, start + steps)
        elements = discretize_step(u[part], delta[part], A, per_channel(B[part], u.shape[-1]))
        if scan is None:
            decay, h = chunked(combine, elements, carry)
        else:
            decay, h = scan(combine, elements)
            h = decay * initial_state + h
        carry = (decay[-1:], h[-1:])
        outputs.append((h * per_channel(C[part], u.shape[-1])).sum(-1))  # (steps, Batch, D)
    return torch.cat(outputs).transpose(0, 1), h[-1].clone()


CHUNK = 64  # steps: enough to fill the processor, few enough to stay in its cache


def _cut(elements, start, stop, step=1):
    return tuple(x[start:stop:step] for x in elements)


def _concatenate(*parts):
    return tuple(torch.cat(xs) for xs in zip(*parts, strict=True))


def _interleave(even, odd):
    return tuple(torch.stack(xs, dim=1).flatten(0, 1) for xs in zip(even, odd, strict=True))
