"""Answers to the exercises of chapter 11: a count of bytes, and Triton kernels, run by the interpreter."""

import math

import triton
import triton.language as tl

from . import Answers

answers = Answers()


@triton.jit
def then(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


# bytes_moved


@answers.right("bytes_moved")
def formulas(batch, length, channels, states, steps, size):
    needed = 4 * batch * length * channels * size + 2 * batch * length * states * size
    materialised = 3 * 2 * 4 * batch * length * channels * states
    tiles = (length + steps - 1) // steps
    return needed, materialised, 2 * 4 * batch * tiles * channels * states


@answers.right("bytes_moved")
def tensor_by_tensor(batch, length, channels, states, steps, size):
    shapes = {name: (batch, length, channels) for name in ("u", "delta", "z", "y")}
    shapes |= {"B": (batch, length, states), "C": (batch, length, states)}
    needed = sum(math.prod(shape) for shape in shapes.values()) * size
    state = math.prod((batch, channels, states)) * 4
    return needed, 6 * length * state, 2 * math.ceil(length / steps) * state


@answers.right("bytes_moved")
def counted_by_walking(batch, length, channels, states, steps, size):
    kept = sum(8 * batch * channels * states for _ in range(0, length, steps))
    return [batch * length * size * (4 * channels + 2 * states), 24 * batch * length * channels * states, kept]


def total(u=4, rows=2, needed_size=None, wide=24, states_in_wide=True, kept=8, tiles=lambda L, s: -(-L // s)):
    def answer(batch, length, channels, states, steps, size):
        needed = batch * length * (u * channels + rows * states) * (needed_size or size)
        full = batch * length * channels * (states if states_in_wide else 1)
        return needed, wide * full, kept * batch * channels * states * tiles(length, steps)

    return answer


answers.wrong("bytes_moved", "one of u, Δ, z, y left out")(total(u=3))
answers.wrong("bytes_moved", "two of u, Δ, z, y left out")(total(u=2))
answers.wrong("bytes_moved", "B and C left out")(total(rows=0))
answers.wrong("bytes_moved", "needed in numbers, not bytes")(total(needed_size=1))
answers.wrong("bytes_moved", "Ā, B̄u, h moved only once")(total(wide=12))
answers.wrong("bytes_moved", "no state axis in Ā, B̄u, h")(total(states_in_wide=False))
answers.wrong("bytes_moved", "the last checkpoint left out")(total(tiles=lambda L, s: L // s))
answers.wrong("bytes_moved", "a part of a checkpoint")(total(tiles=lambda L, s: L / s))
answers.wrong("bytes_moved", "a checkpoint behind the last tile")(total(tiles=lambda L, s: -(-L // s) + 1))
answers.wrong("bytes_moved", "a state for each step")(total(tiles=lambda L, s: L))
answers.wrong("bytes_moved", "checkpoints that are not read")(total(kept=4))
answers.wrong("bytes_moved", None)(total(tiles=lambda L, s: L // s + 1, rows=1))


@answers.wrong("bytes_moved", "B and C of every channel")
def expanded_rows(batch, length, channels, states, steps, size):
    _, materialised, checkpoints = formulas(batch, length, channels, states, steps, size)
    return (4 * channels + 2 * channels * states) * batch * length * size, materialised, checkpoints


@answers.wrong("bytes_moved", "states in the inputs' size")
def all_of_one_size(batch, length, channels, states, steps, size):
    needed, materialised, checkpoints = formulas(batch, length, channels, states, steps, size)
    return needed, materialised // 4 * size, checkpoints // 4 * size


@answers.wrong("bytes_moved", "Ā, B̄u, h in the inputs' size")
def narrow_states(batch, length, channels, states, steps, size):
    needed, materialised, checkpoints = formulas(batch, length, channels, states, steps, size)
    return needed, materialised // 4 * size, checkpoints


@answers.wrong("bytes_moved", "count")
def without_checkpoints(batch, length, channels, states, steps, size):
    return formulas(batch, length, channels, states, steps, size)[:2]


# fused


@answers.right("fused")
@triton.jit
def in_tiles(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    d = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    exists = n < N
    A_row = tl.load(A + d * N + n, mask=exists, other=0.0)
    state = tl.load(h_0 + d * N + n, mask=exists, other=0.0)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < L
        here = t * D + d
        step = tl.load(delta + here, mask=inside, other=0.0)
        u_tile = tl.load(u + here, mask=inside, other=0.0)
        both = inside[:, None] & exists[None, :]
        there = t[:, None] * N + n[None, :]
        B_tile = tl.load(B + there, mask=both, other=0.0)
        C_tile = tl.load(C + there, mask=both, other=0.0)
        A_bar = tl.exp(step[:, None] * A_row[None, :])
        decay, local = tl.associative_scan((A_bar, (step * u_tile)[:, None] * B_tile), 0, then)
        h_tile = decay * state[None, :] + local
        tl.store(y + here, tl.sum(h_tile * C_tile, axis=1), mask=inside)
        state = tl.sum(tl.where(tl.arange(0, BLOCK)[:, None] == BLOCK - 1, h_tile, 0.0), axis=0)
    tl.store(last + d * N + n, state, mask=exists)


@answers.right("fused")
@triton.jit
def step_after_step(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    d = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    exists = n < N
    A_row = tl.load(A + d * N + n, exists, 0.0)
    h = tl.load(h_0 + d * N + n, exists, 0.0)
    for t in range(L):
        step = tl.load(delta + t * D + d)
        h = tl.exp2(step * A_row * 1.4426950408889634) * h
        h += step * tl.load(u + t * D + d) * tl.load(B + t * N + n, exists, 0.0)
        tl.store(y + t * D + d, tl.sum(h * tl.load(C + t * N + n, exists, 0.0), axis=0))
    tl.store(last + d * N + n, h, exists)


@answers.right("fused")
@triton.jit
def state_after_state(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    d = tl.program_id(0)
    for n in range(N):
        A_n = tl.load(A + d * N + n)
        carry = tl.load(h_0 + d * N + n)
        for start in range(0, L, BLOCK):
            t = start + tl.arange(0, BLOCK)
            inside = t < L
            step = tl.load(delta + t * D + d, inside, 0.0)
            b = step * tl.load(u + t * D + d, inside, 0.0) * tl.load(B + t * N + n, inside, 0.0)
            decay, local = tl.associative_scan((tl.exp(step * A_n), b), 0, then)
            h_tile = decay * carry + local
            out = h_tile * tl.load(C + t * N + n, inside, 0.0)
            if n > 0:
                out += tl.load(y + t * D + d, inside, 0.0)
            tl.store(y + t * D + d, out, inside)
            carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, h_tile, 0.0))
        tl.store(last + d * N + n, carry)


@triton.jit
def fused_but(
    u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, WRONG: tl.constexpr
):
    """The fused scan with the one mistake that WRONG names."""
    d = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK)
    dtype = u.dtype.element_ty
    if WRONG == "states":
        A_row = tl.load(A + d * N + n)
    else:
        A_row = tl.load(A + d * N + n, mask=n < N, other=0.0)
    state = tl.load(h_0 + d * N + n, mask=n < N, other=0.0)
    if WRONG == "zero":
        state = 0 * state
    for start in range(0, L, BLOCK):
        t = start + i
        place = t * D + d
        if WRONG == "rows":
            place = d * L + t
        if WRONG == "unmasked":
            step = tl.load(delta + place)
        else:
            step = tl.load(delta + place, mask=t < L, other=0.0)
        u_tile = tl.load(u + place, mask=t < L, other=0.0)
        mask = (t[:, None] < L) & (n[None, :] < N)
        B_tile = tl.load(B + t[:, None] * N + n[None, :], mask=mask, other=0.0)
        C_tile = tl.load(C + t[:, None] * N + n[None, :], mask=mask, other=0.0)
        if WRONG == "swapped":
            B_tile, C_tile = C_tile, B_tile
        A_bar = tl.exp(step[:, None] * A_row[None, :])
        if WRONG == "sign":
            A_bar = 1 / A_bar
        if WRONG == "tail":
            A_bar = tl.where(mask, A_bar, 0.0)
        if WRONG == "no step":
            b = u_tile[:, None] * B_tile
        else:
            b = (step * u_tile)[:, None] * B_tile
        decay, local = tl.associative_scan((A_bar, b), 0, then)
        if WRONG == "lost":
            h_tile = local
        else:
            h_tile = decay * state[None, :] + local
        if WRONG == "bf16 tile":
            h_tile = h_tile.to(tl.float32).to(tl.bfloat16).to(tl.float32).to(dtype)
        tl.store(y + place, tl.sum(h_tile * C_tile, axis=1), mask=t < L)
        if WRONG == "local":
            state = tl.sum(tl.where(i[:, None] == BLOCK - 1, local, 0.0), axis=0)
        elif WRONG != "never":
            state = tl.sum(tl.where(i[:, None] == BLOCK - 1, h_tile, 0.0), axis=0)
        if WRONG == "bf16":
            state = state.to(tl.float32).to(tl.bfloat16).to(tl.float32).to(dtype)
    if WRONG != "not stored":
        tl.store(last + d * N + n, state, mask=n < N)


@answers.wrong("fused", "a state in bfloat16")
@triton.jit
def carry_in_bf16(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "bf16")


@answers.wrong("fused", "a state in bfloat16")
@triton.jit
def every_state_in_bf16(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    d, n = tl.program_id(0), tl.arange(0, BLOCK_N)
    A_row = tl.load(A + d * N + n, n < N, 0.0)
    h = tl.load(h_0 + d * N + n, n < N, 0.0)
    for t in range(L):
        step = tl.load(delta + t * D + d)
        h = tl.exp(step * A_row) * h + step * tl.load(u + t * D + d) * tl.load(B + t * N + n, n < N, 0.0)
        h = h.to(tl.float32).to(tl.bfloat16).to(tl.float32).to(u.dtype.element_ty)
        tl.store(y + t * D + d, tl.sum(h * tl.load(C + t * N + n, n < N, 0.0), axis=0))
    tl.store(last + d * N + n, h, n < N)


@answers.wrong("fused", "a carry lost between tiles")
@triton.jit
def without_carry(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "lost")


@answers.wrong("fused", "the carry of one tile only")
@triton.jit
def carry_of_the_local_scan(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "local")


@answers.wrong("fused", "a carry that is never replaced")
@triton.jit
def carry_stays(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "never")


@answers.wrong("fused", "h_0 left out")
@triton.jit
def from_zero(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "zero")


@answers.wrong("fused", "(0, 0) in the tail")
@triton.jit
def forgets_in_the_tail(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "tail")


@answers.wrong("fused", "B and C swapped")
@triton.jit
def C_in_B_out(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "swapped")


@answers.wrong("fused", "Δ missing before u")
@triton.jit
def bare_input(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "no step")


@answers.wrong("fused", "the sign of A")
@triton.jit
def growing(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "sign")


@answers.wrong("fused", "steps that lie one place apart")
@triton.jit
def no_stride(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "rows")


@answers.wrong("fused", "an unmasked tail")
@triton.jit
def step_unmasked(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "unmasked")


@answers.wrong("fused", "states without a mask")
@triton.jit
def four_states(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "states")


@answers.wrong("fused", "no store at last")
@triton.jit
def last_forgotten(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "not stored")


@answers.wrong("fused", "a state in bfloat16")
@triton.jit
def bf16_inside_the_tile(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    fused_but(u, delta, A, B, C, h_0, y, last, L, D, N, BLOCK, BLOCK_N, "bf16 tile")


for place, reason in {
    "": "A of a state beyond the last multiplies a state that is 0.",
    ", place 2": "C is 0 for a state beyond the last, and it is not stored.",
    ", place 4": "What stands in the tail of u is multiplied by Δ = 0.",
    ", place 5": "B in the tail is multiplied by Δ = 0; beyond the last state C is 0, and nothing is stored.",
    ", place 6": "In the tail y is not stored; beyond the last state h is 0.",
}.items():
    answers.equivalent("fused", f"0.0 -> 1.0{place}", reason)
    answers.equivalent("fused", f"0.0 -> -1.0{place}", reason)


# adjoint


@answers.right("adjoint")
@triton.jit
def carry_with_its_factor(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.load(dh)
    blocks = tl.cdiv(L, BLOCK)
    for k in range(blocks):
        t = (blocks - 1 - k) * BLOCK + i
        has_next = (i < BLOCK - 1) & (t + 1 < L)
        a_next = tl.load(a + t + 1, mask=has_next, other=1.0)
        dy_block = tl.load(dy + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a_next, dy_block), 0, then, reverse=True)
        g_block = decay * carry + local
        tl.store(g + t, g_block, mask=t < L)
        a_block = tl.load(a + t, mask=t < L, other=1.0)
        carry = tl.sum(tl.where(i == 0, a_block * g_block, 0.0))
    tl.store(dh_0, carry)


@answers.right("adjoint")
@triton.jit
def factor_across_the_border(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.load(dh)
    blocks = tl.cdiv(L, BLOCK)
    for k in range(blocks):
        t = (blocks - 1 - k) * BLOCK + i
        a_next = tl.load(a + t + 1, mask=t + 1 < L, other=1.0)
        dy_block = tl.load(dy + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a_next, dy_block), 0, then, reverse=True)
        g_block = decay * carry + local
        tl.store(g + t, g_block, mask=t < L)
        carry = tl.sum(tl.where(i == 0, g_block, 0.0))
    tl.store(dh_0, tl.load(a) * carry)


@answers.right("adjoint")
@triton.jit
def one_by_one(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    flow = tl.load(dh)
    for k in range(L):
        t = L - 1 - k
        flow += tl.load(dy + t)
        tl.store(g + t, flow)
        flow = flow * tl.load(a + t)
    tl.store(dh_0, flow)


@answers.right("adjoint")
@triton.jit
def blocks_from_the_end(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.load(dh)
    for done in range(0, L, BLOCK):
        t = L - 1 - done - i
        a_next = tl.load(a + t + 1, mask=(i > 0) & (t >= 0), other=1.0)
        decay, local = tl.associative_scan((a_next, tl.load(dy + t, mask=t >= 0, other=0.0)), 0, then)
        g_block = decay * carry + local
        tl.store(g + t, g_block, mask=t >= 0)
        a_block = tl.load(a + t, mask=t >= 0, other=1.0)
        first = i == tl.minimum(BLOCK, L - done) - 1
        carry = tl.sum(tl.where(first, a_block * g_block, 0.0))
    tl.store(dh_0, carry)


@triton.jit
def adjoint_but(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.load(dh)
    if WRONG == "no dh":
        carry = 0 * carry
    blocks = tl.cdiv(L, BLOCK)
    for k in range(blocks):
        t = (blocks - 1 - k) * BLOCK + i
        has_next = (i < BLOCK - 1) & (t + 1 < L)
        if WRONG == "twice":
            has_next = t + 1 < L
        if WRONG == "behind":
            has_next = t < L
        if WRONG == "zero":
            a_next = tl.load(a + t + 1, mask=has_next, other=0.0)
        elif WRONG == "same":
            a_next = tl.load(a + t, mask=t < L, other=1.0)
        else:
            a_next = tl.load(a + t + 1, mask=has_next, other=1.0)
        if WRONG == "unmasked":
            dy_block = tl.load(dy + t)
        else:
            dy_block = tl.load(dy + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a_next, dy_block), 0, then, reverse=True)
        if WRONG == "lost":
            g_block = local
        else:
            g_block = decay * carry + local
        tl.store(g + t, g_block, mask=t < L)
        a_block = tl.load(a + t, mask=t < L, other=1.0)
        if WRONG == "missing" or WRONG == "same":
            carry = tl.sum(tl.where(i == 0, g_block, 0.0))
        else:
            carry = tl.sum(tl.where(i == 0, a_block * g_block, 0.0))
    if WRONG == "missing" or WRONG == "same":
        carry = tl.load(a) * carry
    if WRONG == "g_1":
        carry = carry / tl.load(a)
    if WRONG != "not stored":
        tl.store(dh_0, carry)


@answers.wrong("adjoint", "a_{t+1} behind the end")
@triton.jit
def reads_behind(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "behind")


@answers.wrong("adjoint", "the gradient of the final state lost")
@triton.jit
def no_dh(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "no dh")


@answers.wrong("adjoint", "the gradient of the final state lost")
@triton.jit
def zero_behind_the_end(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    carry = tl.load(dh)
    blocks = tl.cdiv(L, BLOCK)
    for k in range(blocks):
        t = (blocks - 1 - k) * BLOCK + i
        a_next = tl.load(a + t + 1, mask=t + 1 < L, other=0.0)
        dy_block = tl.load(dy + t, mask=t < L, other=0.0)
        decay, local = tl.associative_scan((a_next, dy_block), 0, then, reverse=True)
        g_block = decay * carry + local
        tl.store(g + t, g_block, mask=t < L)
        carry = tl.sum(tl.where(i == 0, g_block, 0.0))
    tl.store(dh_0, tl.load(a) * carry)


@answers.wrong("adjoint", "a carry lost between blocks")
@triton.jit
def zero_where_nothing_follows(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "zero")


@answers.wrong("adjoint", "a carry lost between blocks")
@triton.jit
def local_adjoint(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "lost")


@answers.wrong("adjoint", "a decay applied twice between blocks")
@triton.jit
def twice_at_borders(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "twice")


@answers.wrong("adjoint", "a decay missing between blocks")
@triton.jit
def missing_at_borders(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "missing")


@answers.wrong("adjoint", "a_t in place of a_{t+1}")
@triton.jit
def not_shifted(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "same")


@answers.wrong("adjoint", "an unmasked tail")
@triton.jit
def dy_unmasked(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "unmasked")


@answers.wrong("adjoint", "dh_0 without its decay")
@triton.jit
def g_1_at_dh_0(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "g_1")


@answers.wrong("adjoint", "no store at dh_0")
@triton.jit
def dh_0_forgotten(a, dy, dh, g, dh_0, L, BLOCK: tl.constexpr):
    adjoint_but(a, dy, dh, g, dh_0, L, BLOCK, "not stored")


for constant in ("1.0 -> 2.0, place 2", "1.0 -> 0.0, place 2"):
    answers.equivalent("adjoint", constant, "Only the block's first place is used, and it always exists.")


# slices


@answers.right("slices")
@triton.jit
def sum_in_registers(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    p = tl.program_id(0)
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), w.dtype.element_ty)
        for block in range(p, tl.cdiv(D, BLOCK_D), PROGRAMS):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (t[:, None] < L) & (d[None, :] < D)
            total += tl.sum(tl.load(w + t[:, None] * D + d[None, :], mask=mask, other=0.0), axis=1)
        tl.store(slices + p * L + t, total, mask=t < L)


@answers.right("slices")
@triton.jit
def first_writes_others_add(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    p = tl.program_id(0)
    for block in range(p, tl.cdiv(D, BLOCK_D), PROGRAMS):
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        for start in range(0, L, BLOCK):
            t = start + tl.arange(0, BLOCK)
            mask = (t[:, None] < L) & (d[None, :] < D)
            part = tl.sum(tl.load(w + t[:, None] * D + d[None, :], mask=mask, other=0.0), axis=1)
            before = tl.load(slices + p * L + t, mask=(t < L) & (block != p), other=0.0)
            tl.store(slices + p * L + t, before + part, mask=t < L)


@answers.right("slices")
@triton.jit
def channel_by_channel(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    p = tl.program_id(0)
    for t in range(L):
        total = tl.load(w) * 0
        for d in range(D):
            if (d // BLOCK_D) % PROGRAMS == p:
                total += tl.load(w + t * D + d)
        tl.store(slices + p * L + t, total)


@triton.jit
def slices_but(
    w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WRONG: tl.constexpr
):
    p = tl.program_id(0)
    row = slices + p * L
    if WRONG == "shared" or WRONG == "atomic" or WRONG == "add":
        row = slices
    step = PROGRAMS
    if WRONG == "all":
        step = 1
    for start in range(0, L, BLOCK):
        t = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), w.dtype.element_ty)
        for block in range(p, tl.cdiv(D, BLOCK_D), step):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (t[:, None] < L) & (d[None, :] < D)
            if WRONG == "channels":
                mask = (t[:, None] < L) & (d[None, :] >= 0)
            part = tl.sum(tl.load(w + t[:, None] * D + d[None, :], mask=mask, other=0.0), axis=1)
            if WRONG == "overwrite":
                total = part
            elif WRONG == "first":
                if block == p:
                    total = part
            elif WRONG == "unset":
                tl.store(row + t, tl.load(row + t, mask=t < L) + part, mask=t < L)
            else:
                total += part
        if WRONG == "atomic":
            tl.atomic_add(row + t, total, mask=t < L)
        elif WRONG == "add":
            tl.store(row + t, tl.load(row + t, mask=t < L) + total, mask=t < L)
        elif WRONG == "store":
            tl.store(row + t, total)
        elif WRONG != "unset":
            tl.store(row + t, total, mask=t < L)


@answers.wrong("slices", "a racy sum in one place")
@triton.jit
def one_slice_for_all(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "shared")


@answers.wrong("slices", "a racy sum in one place")
@triton.jit
def atomic(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "atomic")


@answers.wrong("slices", "a racy sum in one place")
@triton.jit
def read_add_write(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "add")


@answers.wrong("slices", "a block that overwrites the one before")
@triton.jit
def overwrites(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "overwrite")


@answers.wrong("slices", "one block for each program")
@triton.jit
def first_block_only(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "first")


@answers.wrong("slices", "blocks that several programs count")
@triton.jit
def all_later_blocks(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "all")


@answers.wrong("slices", "a sum added to what nobody has set")
@triton.jit
def adds_to_NaN(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "unset")


@answers.wrong("slices", "channels without a mask")
@triton.jit
def next_row(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "channels")


@answers.wrong("slices", "an unmasked tail")
@triton.jit
def tail_stored(w, slices, L, D, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    slices_but(w, slices, L, D, PROGRAMS, BLOCK, BLOCK_D, "store")
