"""Answers to the exercises of chapter 10: Triton kernels, run by the interpreter."""

import triton
import triton.language as tl

from . import Answers

answers = Answers()


@triton.jit
def then(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


@triton.jit
def swapped(a1, b1, a2, b2):
    return a1 * a2, a1 * b2 + b1


# difference


@answers.right("difference")
@triton.jit
def two_masks(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    now = tl.load(x + t, mask=t < L)
    before = tl.load(x + t - 1, mask=(t > 0) & (t < L), other=0.0)
    tl.store(d + t, now - before, mask=t < L)


@answers.right("difference")
@triton.jit
def one_number_at_a_time(x, d, L, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    for t in range(start, tl.minimum(start + BLOCK, L)):
        now = tl.load(x + t)
        if t > 0:
            now -= tl.load(x + t - 1)
        tl.store(d + t, now)


@answers.right("difference")
@triton.jit
def clamped_address(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < L
    before = tl.load(x + tl.maximum(t - 1, 0), mask=inside)
    tl.store(d + t, tl.load(x + t, mask=inside) - tl.where(t == 0, 0.0, before), inside)


@answers.wrong("difference", "blocks that begin at p, not at p · BLOCK")
@triton.jit
def forgetful(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) + tl.arange(0, BLOCK)
    now = tl.load(x + t, mask=t < L)
    before = tl.load(x + t - 1, mask=(t > 0) & (t < L), other=0.0)
    tl.store(d + t, now - before, mask=t < L)


@answers.wrong("difference", "an unmasked tail")
@triton.jit
def store_without_mask(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    now = tl.load(x + t, mask=t < L)
    before = tl.load(x + t - 1, mask=(t > 0) & (t < L), other=0.0)
    tl.store(d + t, now - before)


@answers.wrong("difference", "an unmasked tail")
@triton.jit
def load_that_is_thrown_away(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    now = tl.load(x + t)
    before = tl.load(x + t - 1, mask=(t > 0) & (t < L), other=0.0)
    tl.store(d + t, now - before, mask=t < L)


@answers.wrong("difference", "an unmasked tail")
@triton.jit
def one_place_too_many(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t <= L
    tl.store(d + t, tl.load(x + t, inside) - tl.load(x + t - 1, inside & (t > 0), 0.0), inside)


@answers.wrong("difference", "no mask at all")
@triton.jit
def so_much_shorter(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(d + t, tl.load(x + t) - tl.load(x + t - 1))


@answers.wrong("difference", "one mask for two addresses")
@triton.jit
def same_mask(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < L
    tl.store(d + t, tl.load(x + t, mask=mask, other=0.0) - tl.load(x + t - 1, mask=mask, other=0.0), mask=mask)


@answers.wrong("difference", "nothing in the place of x_0")
@triton.jit
def without_other(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x + t - 1, mask=(t > 0) & (t < L))
    tl.store(d + t, tl.load(x + t, mask=t < L) - before, mask=t < L)


@answers.wrong("difference", "nothing in the place of x_0")
@triton.jit
def first_place_not_stored(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (t > 0) & (t < L)
    tl.store(d + t, tl.load(x + t, mask=mask) - tl.load(x + t - 1, mask=mask), mask=mask)


@answers.wrong("difference", "blocks that do not see the block before")
@triton.jit
def within_the_block(x, d, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    t = tl.program_id(0) * BLOCK + i
    before = tl.load(x + t - 1, mask=(i > 0) & (t < L), other=0.0)
    tl.store(d + t, tl.load(x + t, mask=t < L) - before, mask=t < L)


@answers.wrong("difference", "the difference to the next step")
@triton.jit
def looks_ahead(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after = tl.load(x + t + 1, mask=t + 1 < L, other=0.0)
    tl.store(d + t, after - tl.load(x + t, mask=t < L), mask=t < L)


@answers.wrong("difference", "x_{t−1} − x_t")
@triton.jit
def other_sign(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x + t - 1, mask=(t > 0) & (t < L), other=0.0)
    tl.store(d + t, before - tl.load(x + t, mask=t < L), mask=t < L)


@answers.wrong("difference", "x_0 = x_1")
@triton.jit
def held_at_the_start(x, d, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x + tl.maximum(t - 1, 0), mask=t < L)
    tl.store(d + t, tl.load(x + t, mask=t < L) - before, mask=t < L)


@answers.wrong("difference", "type")
def not_a_kernel(x, d, L, BLOCK):
    d[:] = x


answers.equivalent("difference", "t < L -> t <= L, place 3", "For t = L the address x + t − 1 still lies inside x.")


# softplus_scan


@answers.right("softplus_scan")
@triton.jit
def masked_after(x, u, h, last, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, u.dtype.element_ty)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        delta = tl.where(t < L, tl.log(1 + tl.exp(tl.load(x + t, mask=t < L))), 0.0)
        u_block = tl.load(u + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((tl.exp(-delta), delta * u_block), 0, then)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, h_block, 0.0))
        tl.store(h + t, h_block, mask=t < L)
    tl.store(last, carry)


@answers.right("softplus_scan")
@triton.jit
def minus_infinity_in_the_tail(x, u, h, last, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.load(u) * 0
    for block in range(tl.cdiv(L, BLOCK)):
        t = block * BLOCK + i
        x_block = tl.load(x + t, mask=t < L, other=float("-inf"))
        delta = tl.maximum(x_block, 0.0) + tl.log(1 + tl.exp(-tl.abs(x_block)))
        b = delta * tl.load(u + t, mask=t < L, other=0.0)
        b = tl.where(i == 0, b + tl.exp(-delta) * carry, b)  # the carry enters as part of the first step
        _, h_block = tl.associative_scan((tl.exp(-delta), b), 0, then)
        carry = tl.sum(h_block * (i == BLOCK - 1))
        tl.store(h + t, h_block, mask=t < L)
    tl.store(last, carry)


@answers.right("softplus_scan")
@triton.jit
def step_by_step(x, u, h, last, L, BLOCK: tl.constexpr):
    state = tl.full((), 0.0, u.dtype.element_ty)
    for t in range(0, L):
        delta = tl.log(1 + tl.exp(tl.load(x + t)))
        state = tl.exp(-delta) * state + delta * tl.load(u + t)
        tl.store(h + t, state)
    tl.store(last, state)


@answers.right("softplus_scan")
@triton.jit
def last_one_that_exists(x, u, h, last, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, u.dtype.element_ty)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        delta = tl.log(1 + tl.exp(tl.load(x + t, mask=t < L, other=0.0)))
        u_block = tl.load(u + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((tl.exp(-delta), delta * u_block), 0, then)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(t == tl.minimum(start + BLOCK, L) - 1, h_block, 0.0))
        tl.store(h + t, h_block, mask=t < L)
    tl.store(last, carry)


@triton.jit
def forward(x, u, h, last, L, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    """The scan with the one mistake that WRONG names."""
    i = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, u.dtype.element_ty)
    for start in range(0, L, BLOCK):
        t = start + i
        if WRONG == "no other":
            delta = tl.log(1 + tl.exp(tl.load(x + t, mask=t < L)))
        else:
            delta = tl.log(1 + tl.exp(tl.load(x + t, mask=t < L, other=0.0)))
        if WRONG != "before" and WRONG != "no other":
            delta = tl.where(t < L, delta, 0.0)
        a = tl.exp(-delta)
        if WRONG == "zero":
            a = tl.where(t < L, a, 0.0)
        if WRONG == "unmasked":
            u_block = tl.load(u + t)
        else:
            u_block = tl.load(u + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a, delta * u_block), 0, then)
        if WRONG == "lost":
            h_block = local
        elif WRONG == "undecayed":
            h_block = local + carry
        elif WRONG == "one decay":
            h_block = local + a * carry
        elif WRONG == "first":
            h_block = local + tl.where(i == 0, a * carry, 0.0)
        else:
            h_block = decay * carry + local
        if WRONG == "local":
            carry = tl.sum(tl.where(i == BLOCK - 1, local, 0.0))
        else:
            carry = tl.sum(tl.where(i == BLOCK - 1, h_block, 0.0))
        tl.store(h + t, h_block, mask=t < L)
    if WRONG != "not stored":
        tl.store(last, carry)


@answers.wrong("softplus_scan", "a 0 put into the tail before the softplus")
@triton.jit
def zero_before_softplus(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "before")


@answers.wrong("softplus_scan", "no other= in the tail")
@triton.jit
def x_without_other(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "no other")


@answers.wrong("softplus_scan", "(0, 0) in the tail")
@triton.jit
def everything_zero(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "zero")


@answers.wrong("softplus_scan", "an unmasked tail")
@triton.jit
def u_unmasked(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "unmasked")


@answers.wrong("softplus_scan", "a carry lost between blocks")
@triton.jit
def no_carry(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "lost")


@answers.wrong("softplus_scan", "the carry of one block only")
@triton.jit
def local_carry(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "local")


@answers.wrong("softplus_scan", "a carry that does not decay")
@triton.jit
def added_carry(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "undecayed")


@answers.wrong("softplus_scan", "a_t in place of the product a_s ⋯ a_t")
@triton.jit
def single_decay(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "one decay")


@answers.wrong("softplus_scan", "a carry that reaches the first step of a block only")
@triton.jit
def carry_in_the_first_place(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "first")


@answers.wrong("softplus_scan", "no store at last")
@triton.jit
def last_forgotten(x, u, h, last, L, BLOCK: tl.constexpr):
    forward(x, u, h, last, L, BLOCK, "not stored")


@answers.wrong("softplus_scan", "no softplus")
@triton.jit
def x_as_the_step(x, u, h, last, L, BLOCK: tl.constexpr):
    state = tl.full((), 0.0, u.dtype.element_ty)
    for t in range(0, L):
        delta = tl.load(x + t)
        state = tl.exp(-delta) * state + delta * tl.load(u + t)
        tl.store(h + t, state)
    tl.store(last, state)


@answers.wrong("softplus_scan", "Δ missing before u")
@triton.jit
def bare_input(x, u, h, last, L, BLOCK: tl.constexpr):
    state = tl.full((), 0.0, u.dtype.element_ty)
    for t in range(0, L):
        state = state / (1 + tl.exp(tl.load(x + t))) + tl.load(u + t)  # e^{-softplus(x)} = 1 / (1 + e^x)
        tl.store(h + t, state)
    tl.store(last, state)


@answers.wrong("softplus_scan", "the operator with its sides swapped")
@triton.jit
def later_first(x, u, h, last, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, u.dtype.element_ty)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        delta = tl.where(t < L, tl.log(1 + tl.exp(tl.load(x + t, mask=t < L))), 0.0)
        u_block = tl.load(u + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((tl.exp(-delta), delta * u_block), 0, swapped)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, h_block, 0.0))
        tl.store(h + t, h_block, mask=t < L)
    tl.store(last, carry)


for constant in ("0.0 -> 1.0, place 3", "0.0 -> -1.0, place 3"):
    answers.equivalent("softplus_scan", constant, "What stands in the tail of u is multiplied by Δ = 0.")


# from_the_end


@answers.right("from_the_end")
@triton.jit
def masked_head(a, b, h, first, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, b.dtype.element_ty)
    for done in range(0, L, BLOCK):
        t = L - BLOCK - done + tl.arange(0, BLOCK)
        a_block = tl.load(a + t, mask=t >= 0, other=1.0)
        b_block = tl.load(b + t, mask=t >= 0, other=0.0)
        decay, local = tl.associative_scan((a_block, b_block), 0, then, reverse=True)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, h_block, 0.0))
        tl.store(h + t, h_block, mask=t >= 0)
    tl.store(first, carry)


@answers.right("from_the_end")
@triton.jit
def padded_tail(a, b, h, first, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, b.dtype.element_ty)
    blocks = tl.cdiv(L, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        a_block = tl.load(a + t, mask=t < L, other=1.0)
        b_block = tl.load(b + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a_block, b_block), 0, then, reverse=True)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, h_block, 0.0))
        tl.store(h + t, h_block, mask=t < L)
    tl.store(first, carry)


@answers.right("from_the_end")
@triton.jit
def read_backwards(a, b, h, first, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, b.dtype.element_ty)
    for done in range(0, L, BLOCK):
        t = L - 1 - done - i  # the block lies in registers in reversed order, and the scan runs forward
        a_block = tl.load(a + t, mask=t >= 0, other=1.0)
        b_block = tl.load(b + t, mask=t >= 0, other=0.0)
        decay, local = tl.associative_scan((a_block, b_block), 0, then)
        h_block = decay * carry + local
        tl.store(h + t, h_block, mask=t >= 0)
        carry = tl.sum(tl.where(i == BLOCK - 1, h_block, 0.0))
    tl.store(first, carry)


@answers.right("from_the_end")
@triton.jit
def one_step_after_the_other(a, b, h, first, L, BLOCK: tl.constexpr):
    state = tl.full((), 0.0, b.dtype.element_ty)
    for i in range(0, L):
        t = L - 1 - i
        state = tl.load(a + t) * state + tl.load(b + t)
        tl.store(h + t, state)
    tl.store(first, state)


@triton.jit
def reverse_scan(a, b, h, first, L, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, b.dtype.element_ty)
    for done in range(0, L, BLOCK):
        t = L - BLOCK - done + i
        mask = t >= 0
        if WRONG == "tail's mask":
            mask = t < L
        if WRONG == "zero":
            a_block = tl.load(a + t, mask=mask, other=0.0)
        elif WRONG == "no other":
            a_block = tl.load(a + t, mask=mask)
        else:
            a_block = tl.load(a + t, mask=mask, other=1.0)
        b_block = tl.load(b + t, mask=mask, other=0.0)
        decay, local = tl.associative_scan((a_block, b_block), 0, then, reverse=True)
        if WRONG == "lost":
            carry = 0 * carry
        if WRONG == "undecayed":
            h_block = carry + local
        else:
            h_block = decay * carry + local
        if WRONG == "wrong end":
            carry = tl.sum(tl.where(i == BLOCK - 1, h_block, 0.0))
        elif WRONG == "local":
            carry = tl.sum(tl.where(i == 0, local, 0.0))
        else:
            carry = tl.sum(tl.where(i == 0, h_block, 0.0))
        if WRONG == "store":
            tl.store(h + t, h_block)
        else:
            tl.store(h + t, h_block, mask=mask)
    if WRONG != "not stored":
        tl.store(first, carry)


@answers.wrong("from_the_end", "a padded head without its mask")
@triton.jit
def mask_of_the_forward_kernel(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "tail's mask")


@answers.wrong("from_the_end", "a padded head without its mask")
@triton.jit
def head_stored(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "store")


@answers.wrong("from_the_end", "(0, 0) in the padding")
@triton.jit
def zeros_in_the_head(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "zero")


@answers.wrong("from_the_end", "no other= in the padding")
@triton.jit
def anything_in_the_head(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "no other")


@answers.wrong("from_the_end", "the carry from the wrong end of a block")
@triton.jit
def carry_of_the_forward_kernel(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "wrong end")


@answers.wrong("from_the_end", "a carry lost between blocks")
@triton.jit
def reverse_without_carry(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "lost")


@answers.wrong("from_the_end", "the carry of one block only")
@triton.jit
def reverse_local_carry(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "local")


@answers.wrong("from_the_end", "a carry that does not decay")
@triton.jit
def reverse_undecayed(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "undecayed")


@answers.wrong("from_the_end", "no store at first")
@triton.jit
def first_forgotten(a, b, h, first, L, BLOCK: tl.constexpr):
    reverse_scan(a, b, h, first, L, BLOCK, "not stored")


@answers.wrong("from_the_end", "a forward scan")
@triton.jit
def not_reversed(a, b, h, first, L, BLOCK: tl.constexpr):
    state = tl.full((), 0.0, b.dtype.element_ty)
    for t in range(0, L):
        state = tl.load(a + t) * state + tl.load(b + t)
        tl.store(h + t, state)
    tl.store(first, state)


@answers.wrong("from_the_end", "blocks visited from the first to the last")
@triton.jit
def order_of_the_forward_kernel(a, b, h, first, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, b.dtype.element_ty)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        a_block = tl.load(a + t, mask=t < L, other=1.0)
        b_block = tl.load(b + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a_block, b_block), 0, then, reverse=True)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, h_block, 0.0))
        tl.store(h + t, h_block, mask=t < L)
    tl.store(first, carry)


# finish


@answers.right("finish")
@triton.jit
def one_block_and_a_carry(a, b, ends, h, L, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    t = p * BLOCK + tl.arange(0, BLOCK)
    a_block = tl.load(a + t, mask=t < L)
    b_block = tl.load(b + t, mask=t < L)
    decay, local = tl.associative_scan((a_block, b_block), 0, then)
    carry = tl.load(ends + p - 1, mask=p > 0, other=0.0)
    tl.store(h + t, decay * carry + local, mask=t < L)


@answers.right("finish")
@triton.jit
def carry_into_b(a, b, ends, h, L, BLOCK: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, BLOCK)
    t = p * BLOCK + i
    a_block = tl.load(a + t, mask=t < L, other=1.0)
    b_block = tl.load(b + t, mask=t < L, other=0.0)
    before = tl.load(ends + p - 1 + 0 * i, mask=(i == 0) & (p > 0), other=0.0)
    _, h_block = tl.associative_scan((a_block, b_block + a_block * before), 0, then)
    tl.store(h + t, h_block, mask=t < L)


@answers.right("finish")
@triton.jit
def loop_in_the_block(a, b, ends, h, L, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    state = tl.load(b) * 0
    if start > 0:
        state = tl.load(ends + tl.program_id(0) - 1)
    for t in range(start, tl.minimum(start + BLOCK, L)):
        state = tl.load(a + t) * state + tl.load(b + t)
        tl.store(h + t, state)


@triton.jit
def finish_wrongly(a, b, ends, h, L, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    t = p * BLOCK + i
    if WRONG == "stride":
        t = p + i
    a_block = tl.load(a + t, mask=t < L, other=1.0)
    b_block = tl.load(b + t, mask=t < L, other=0.0)
    decay, local = tl.associative_scan((a_block, b_block), 0, then)
    if WRONG == "own":
        carry = tl.load(ends + p)
    elif WRONG == "no mask":
        carry = tl.load(ends + p - 1)
    else:
        carry = tl.load(ends + p - 1, mask=p > 0, other=0.0)
    if WRONG == "undecayed":
        decay = 1.0
    if WRONG == "one decay":
        decay = a_block
    if WRONG == "first":
        decay = tl.where(i == 0, decay, 0.0)
    if WRONG == "lost":
        decay = 0.0
    if WRONG == "store":
        tl.store(h + t, decay * carry + local)
    else:
        tl.store(h + t, decay * carry + local, mask=t < L)


@answers.wrong("finish", "the block's own end as its carry")
@triton.jit
def own_end(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "own")


@answers.wrong("finish", "no mask for program 0")
@triton.jit
def reads_ends_minus_one(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "no mask")


@answers.wrong("finish", "a carry that does not decay")
@triton.jit
def finish_undecayed(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "undecayed")


@answers.wrong("finish", "a_t in place of the product a_s ⋯ a_t")
@triton.jit
def finish_with_one_decay(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "one decay")


@answers.wrong("finish", "a carry that reaches the first step of a block only")
@triton.jit
def finish_first_step(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "first")


@answers.wrong("finish", "a carry lost between blocks")
@triton.jit
def finish_from_zero(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "lost")


@answers.wrong("finish", "an unmasked tail")
@triton.jit
def finish_unmasked_store(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "store")


@answers.wrong("finish", "blocks that begin at p, not at p · BLOCK")
@triton.jit
def finish_without_stride(a, b, ends, h, L, BLOCK: tl.constexpr):
    finish_wrongly(a, b, ends, h, L, BLOCK, "stride")
