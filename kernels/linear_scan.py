"""Chapter 10's kernels for h_t = a_t h_{t-1} + b_t, from the simplest to one that takes any shape."""

import triton
import triton.language as tl


@triton.jit
def combine(a_left, b_left, a_right, b_right):
    """The scan's operator: the step h -> a h + b of the left, then that of the right (chapter 08)."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def scan_one_block_kernel(a, b, h, L, BLOCK: tl.constexpr):
    """h_0 = 0, and all L <= BLOCK steps in one program.

    Holds BLOCK pairs (a, b). Reads 2 L numbers, writes L.
    """
    t = tl.arange(0, BLOCK)
    mask = t < L
    a_block = tl.load(a + t, mask=mask, other=1.0)  # (1, 0) is the identity: the padding changes nothing
    b_block = tl.load(b + t, mask=mask, other=0.0)
    _, h_block = tl.associative_scan((a_block, b_block), 0, combine)
    tl.store(h + t, h_block, mask=mask)


@triton.jit
def scan_blocks_with_carry_kernel(a, b, h, L, BLOCK: tl.constexpr):
    """h_0 = 0, and any L: one program goes from block to block and carries the state.

    Holds BLOCK pairs and one state. Reads 2 L numbers, writes L, whatever BLOCK is.
    """
    carry = tl.full((), 0.0, b.dtype.element_ty)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = t < L
        a_block = tl.load(a + t, mask=mask, other=1.0)
        b_block = tl.load(b + t, mask=mask, other=0.0)
        decay, h_local = tl.associative_scan((a_block, b_block), 0, combine)
        h_block = decay * carry + h_local
        # The block's last state. A register block has no h_block[-1]: keep one element, sum.
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, h_block, 0.0))
        tl.store(h + t, h_block, mask=mask)


@triton.jit
def scan_rows_kernel(
    a, b, initial_state, h, L, rest,
    a_batch, a_t, a_rest, b_batch, b_t, b_rest, start_batch, start_rest, h_batch, h_t, h_rest,
    REVERSE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: sequence `program // rest` of the batch, position `program % rest` of what follows time.

    Holds BLOCK pairs and one state, in DTYPE whatever the inputs are. Reads 2 L + 1 numbers, writes L.
    In reverse the blocks are visited from the last; the padding then comes first, and its identity (1, 0)
    lets the initial state through.
    """
    batch = (tl.program_id(0) // rest).to(tl.int64)  # int64: offsets pass 2^31 in large tensors
    position = (tl.program_id(0) % rest).to(tl.int64)
    a += batch * a_batch + position * a_rest
    b += batch * b_batch + position * b_rest
    h += batch * h_batch + position * h_rest
    carry = tl.load(initial_state + batch * start_batch + position * start_rest).to(DTYPE)
    blocks = tl.cdiv(L, BLOCK)
    for i in range(blocks):
        block = blocks - 1 - i if REVERSE else i
        t = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = t < L
        a_block = tl.load(a + t * a_t, mask=mask, other=1.0).to(DTYPE)
        b_block = tl.load(b + t * b_t, mask=mask, other=0.0).to(DTYPE)
        decay, h_local = tl.associative_scan((a_block, b_block), 0, combine, reverse=REVERSE)
        h_block = decay * carry + h_local
        last = 0 if REVERSE else BLOCK - 1
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == last, h_block, 0.0))
        tl.store(h + t * h_t, h_block.to(h.dtype.element_ty), mask=mask)
