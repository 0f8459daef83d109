"""Depthwise causal convolution: pre_t = bias + Σ_k w_k x_{t-W+1+k}, y = silu(pre) or pre. Forward, backward, one step.

A program owns BLOCK_D channels of one chunk of a sequence, in SEGMENTS runs of STEPS rows or more. A thread loads
STEPS rows of its run at a time: independent loads, so their latency is paid once. The W - 1 rows before them come
from a cache, since the neighbouring run loads them at the same time, or are still in registers.
Everything is bound by memory; arithmetic hides behind it. A sequence is an entry of the batch, or a document of a
packed row. Its state is the W - 1 rows before it.

Which axis lies along the lanes of a warp is the caller's choice, TIME_LAST: channels, (SEGMENTS, BLOCK_D) tiles
whose rows are loaded one by one; or time, (BLOCK_D, SEGMENTS) tiles whose STEPS rows are one vector a thread. There
the W - 1 rows beside them come as VECTORS too, of FEW (each alone would cost as much as the STEPS), if memory is
aligned so that there are vectors at all.
"""

import triton
import triton.language as tl

STEPS = tl.constexpr(8)  # 16 bytes of half precision, the widest load there is
FEW = tl.constexpr(4)  # the W - 1 rows beside these, and what fills up their vector
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). Where exp overflows, rsqrt(inf) = 0 is the limit; rsqrt squared costs less than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def locate(program, cu_seqlens, sequences, L, chunk, chunks, PACKED: tl.constexpr):
    """Return a program's batch entry, sequence, chunk of the sequence, and where the sequence starts and stops.

    Packed, document s owns the programs from start_s // chunk + s on. That is enough for its steps, at least one
    even if it has none, and found by bisection, so the caller never reads where documents begin.
    """
    if PACKED:
        low = program * 0
        high = low + sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            reached = tl.load(cu_seqlens + middle).to(tl.int64) // chunk + middle <= program
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        start = tl.load(cu_seqlens + low).to(tl.int64)
        stop = tl.load(cu_seqlens + low + 1).to(tl.int64)
        return program * 0, low, program - (start // chunk + low), start, stop
    else:
        sequence = program // chunks
        return sequence, sequence, program - sequence * chunks, 0, L


@triton.jit
def rounds_of(steps, iterations, each, PACKED: tl.constexpr):
    """How many rounds of `each` steps a program has to do: fewer than `iterations` where a short document ends."""
    if PACKED:
        return tl.minimum(tl.cdiv(tl.maximum(steps, 0), each), iterations)
    else:
        return iterations


@triton.jit
def axes(block, BLOCK_D: tl.constexpr, SEGMENTS: tl.constexpr, TIME_LAST: tl.constexpr):
    """Channel and segment of each element of a tile, shaped to broadcast."""
    d = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.arange(0, SEGMENTS).to(tl.int64)
    if TIME_LAST:
        return d[:, None], segment[None, :]
    else:
        return d[None, :], segment[:, None]


@triton.jit
def load_weight(
    weight, bias, d, mask_d, weight_d, weight_w,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The W taps as a tuple, and the bias (zero if there is none)."""
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + d * weight_d + k * weight_w, mask=mask_d, other=0.0).to(DTYPE),)
    offset = tl.zeros(d.shape, DTYPE)
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=mask_d, other=0.0).to(DTYPE)
    return taps, offset


@triton.jit
def steps_until(stop, t):
    """stop - t, between 0 and STEPS: masks are cheaper in int32, and the difference may not fit."""
    return tl.maximum(tl.minimum(stop - t, STEPS), 0).to(tl.int32)


@triton.jit
def load_rows(
    x, t, start, stop, d, mask_d, x_t, x_d, COUNT: tl.constexpr, MAY_PRECEDE: tl.constexpr, TIME_LAST: tl.constexpr
):
    """Rows t, ..., t + COUNT - 1 as they lie in memory: a tuple of tiles, one a row or one for each 16 bytes.

    Zero from `stop` on, and before `start` where they MAY_PRECEDE it.
    """
    before, left = steps_until(start, t), steps_until(stop, t)
    x += t * x_t + d * x_d
    if TIME_LAST:
        wide: tl.constexpr = min(COUNT, 128 // x.dtype.element_ty.primitive_bitwidth)
        vectors = ()
        for i in tl.static_range(COUNT // wide):
            j = i * wide + tl.arange(0, wide)[None, None, :]
            mask = (j < left[:, :, None]) & mask_d[:, :, None]
            if MAY_PRECEDE:
                mask &= j >= before[:, :, None]
            vectors = vectors + (tl.load(x[:, :, None] + j.to(tl.int64) * x_t, mask=mask, other=0.0),)
        return vectors
    else:
        rows = ()
        for j in tl.static_range(COUNT):
            mask = (j < left) & mask_d
            if MAY_PRECEDE:
                mask &= j >= before
            rows = rows + (tl.load(x, mask=mask, other=0.0),)
            x += x_t
        return rows


@triton.jit
def as_rows(loaded, TIME_LAST: tl.constexpr, DTYPE: tl.constexpr):
    """What `load_rows` loaded, as a tuple of tiles to compute with, one a row."""
    rows = ()
    for i in tl.static_range(len(loaded)):
        tile = loaded[i].to(DTYPE)
        rows = rows + (unpack(tile) if TIME_LAST else (tile,))
    return rows


@triton.jit
def store_rows(y, rows, t, first, stop, d, mask_d, y_t, y_d, MAY_PRECEDE: tl.constexpr, TIME_LAST: tl.constexpr):
    """Store what of rows t, ..., t + STEPS - 1 lies before `stop`, and not before `first` where they MAY_PRECEDE it."""
    left = steps_until(stop, t)
    y += t * y_t + d * y_d
    if TIME_LAST:
        j = tl.arange(0, STEPS)[None, None, :]
        mask = (j < left[:, :, None]) & mask_d[:, :, None]
        tl.store(y[:, :, None] + j.to(tl.int64) * y_t, pack(rows).to(y.dtype.element_ty), mask=mask)
    else:
        for j in tl.static_range(STEPS):
            mask = (j < left) & mask_d
            if MAY_PRECEDE:
                mask &= t + j >= first
            tl.store(y, rows[j].to(y.dtype.element_ty), mask=mask)
            y += y_t


@triton.jit
def store_row(y, row, t, first, stop, d, mask_d, y_t, y_d):
    mask = (t >= first) & (t < stop) & mask_d
    tl.store(y + t * y_t + d * y_d, row.to(y.dtype.element_ty), mask=mask)


@triton.jit
def unpack(tile):
    """(M, N, K) -> a tuple of K (M, N); K is 2, 4 or 8. A thread holds all K, so nothing moves."""
    if tile.shape[2] == 2:
        return tl.split(tile)
    else:  # Triton 3.6 compiles what follows a return
        low, high = halves(tile)
        if tile.shape[2] == 4:
            return tl.split(low) + tl.split(high)
        else:
            a, b = halves(low)
            c, d = halves(high)
            return tl.split(a) + tl.split(b) + tl.split(c) + tl.split(d)


@triton.jit
def halves(tile):
    shape: tl.constexpr = (tile.shape[0], tile.shape[1], 2, tile.shape[2] // 2)
    return tl.split(tl.permute(tl.reshape(tile, shape), (0, 1, 3, 2)))


@triton.jit
def pack(rows):
    """The inverse of `unpack`, of eight."""
    low = joined(tl.join(rows[0], rows[1]), tl.join(rows[2], rows[3]))
    high = joined(tl.join(rows[4], rows[5]), tl.join(rows[6], rows[7]))
    return joined(low, high)


@triton.jit
def joined(low, high):
    shape: tl.constexpr = (low.shape[0], low.shape[1], 2 * low.shape[2])
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), shape)


@triton.jit
def load_before(
    x, state, t, start, stop, d, mask_d, x_t, x_d, state_d, state_w,
    WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, VECTORS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The W - 1 rows before step t >= start as a tuple; before the start those of the initial state, or zero."""
    count: tl.constexpr = FEW if VECTORS else WIDTH - 1
    loaded = load_rows(x, t - count, start, stop, d, mask_d, x_t, x_d, count, True, VECTORS)
    rows = as_rows(loaded, VECTORS, DTYPE)[count - WIDTH + 1 :]
    if HAS_STATE:
        from_state = ()
        for j in tl.static_range(WIDTH - 1):
            slot = t - start + j
            mask = (slot < WIDTH - 1) & mask_d
            row = tl.load(state + slot * state_w + d * state_d, mask=mask, other=0.0)
            from_state = from_state + (rows[j] + row.to(DTYPE),)
        rows = from_state
    return rows


@triton.jit
def load_after(x, t, stop, d, mask_d, x_t, x_d, WIDTH: tl.constexpr, VECTORS: tl.constexpr, DTYPE: tl.constexpr):
    """Rows t, ..., t + W - 2 as a tuple; zero from `stop` on."""
    count: tl.constexpr = FEW if VECTORS else WIDTH - 1
    loaded = load_rows(x, t, t, stop, d, mask_d, x_t, x_d, count, False, VECTORS)
    return as_rows(loaded, VECTORS, DTYPE)[: WIDTH - 1]


@triton.jit
def convolve(rows, j: tl.constexpr, taps, offset, WIDTH: tl.constexpr):
    """offset + Σ_k w_k rows[j + k]"""
    total = offset
    for k in tl.static_range(WIDTH):
        total += taps[k] * rows[j + k]
    return total


# Holds: STEPS + W - 1 rows of x. Reads x once (and the W - 1 rows before a segment again, from a cache), writes y:
# 2 numbers in x's dtype, 4 bytes in half precision, for each of x.
@triton.jit
def causal_conv1d_forward_kernel(
    x, weight, bias, initial_state, cu_seqlens, y, final_state,
    L, channels, sequences, chunks, iterations,
    x_b, x_t, x_d, y_b, y_t, y_d, weight_d, weight_w, state_b, state_d, state_w,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr,
    WANT_FINAL_STATE: tl.constexpr, PACKED: tl.constexpr, TIME_LAST: tl.constexpr, VECTORS: tl.constexpr,
    DTYPE: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels, SEGMENTS * STEPS * iterations steps of one sequence."""
    program = (tl.program_id(0) // BLOCKS).to(tl.int64)  # int64: offsets pass 2^31 in large tensors
    chunk = SEGMENTS * STEPS * iterations
    batch, sequence, index, start, stop = locate(program, cu_seqlens, sequences, L, chunk, chunks, PACKED)
    d, segment = axes(tl.program_id(0) % BLOCKS, BLOCK_D, SEGMENTS, TIME_LAST)
    mask_d = d < channels
    begin = start + index * chunk
    x += batch * x_b
    y += batch * y_b
    if HAS_INITIAL_STATE:
        initial_state += sequence * state_b
    # The first round's rows are asked for before the taps are used, so that all travel together, and after them:
    # Triton computes in the layout of what is loaded last. In a round the segments are neighbours: the rows that two
    # of them read are read at the same time, and leave memory once.
    taps, offset = load_weight(weight, bias, d, mask_d, weight_d, weight_w, WIDTH, HAS_BIAS, DTYPE)
    first = begin + segment * STEPS
    stride = STEPS * SEGMENTS
    window = load_before(
        x, initial_state, first, start, stop, d, mask_d, x_t, x_d, state_d, state_w,
        WIDTH, HAS_INITIAL_STATE, VECTORS, DTYPE,
    )  # fmt: skip
    ahead = load_rows(x, first, start, stop, d, mask_d, x_t, x_d, STEPS, False, TIME_LAST)
    rounds = rounds_of(stop - begin, iterations, STEPS * SEGMENTS, PACKED)
    for i in range(rounds):
        t = first + i * stride
        rows = window + as_rows(ahead, TIME_LAST, DTYPE)
        outputs = ()
        for j in tl.static_range(STEPS):
            out = convolve(rows, j, taps, offset, WIDTH)
            if SILU:
                out *= sigmoid(out)
            outputs = outputs + (out,)
        store_rows(y, outputs, t, start, stop, d, mask_d, y_t, y_d, False, TIME_LAST)
        limit = tl.where(i + 1 < rounds, stop, 0)
        ahead = load_rows(x, t + stride, start, limit, d, mask_d, x_t, x_d, STEPS, False, TIME_LAST)
        window = load_before(
            x, initial_state, t + stride, start, limit, d, mask_d, x_t, x_d, state_d, state_w,
            WIDTH, False, VECTORS, DTYPE,
        )  # fmt: skip

    if WANT_FINAL_STATE:  # noqa: SIM102 (decided when the kernel is compiled)
        if begin + chunk >= stop and (begin < stop or index == 0):  # the sequence's last program
            last = stop + tl.zeros(d.shape, tl.int64)
            rows = load_before(
                x, initial_state, last, start, stop, d, mask_d, x_t, x_d, state_d, state_w,
                WIDTH, HAS_INITIAL_STATE, VECTORS, DTYPE,
            )  # fmt: skip
            for j in tl.static_range(WIDTH - 1):
                pointers = final_state + (sequence * channels + d) * (WIDTH - 1) + j
                tl.store(pointers, rows[j].to(final_state.dtype.element_ty), mask=mask_d)


@triton.jit
def through_silu(rows, j: tl.constexpr, dy, taps, offset, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """The gradient of pre, from that of y: zero outside the sequence, as dy is there."""
    if SILU:
        pre = convolve(rows, j, taps, offset, WIDTH)
        s = sigmoid(pre)
        dy = dy * s * (1.0 + pre * (1.0 - s))
    return dy


@triton.jit
def gradients_after(
    x, grad_y, window, t, stop, d, mask_d, x_t, x_d, grad_y_t, grad_y_d, taps, offset,
    WIDTH: tl.constexpr, SILU: tl.constexpr, VECTORS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of pre at steps t, ..., t + W - 2, behind the rows in `window`."""
    rows = window + load_after(x, t, stop, d, mask_d, x_t, x_d, WIDTH, VECTORS, DTYPE)
    dy_rows = load_after(grad_y, t, stop, d, mask_d, grad_y_t, grad_y_d, WIDTH, VECTORS, DTYPE)
    gradients = ()
    for j in tl.static_range(WIDTH - 1):
        gradients = gradients + (through_silu(rows, j, dy_rows[j], taps, offset, WIDTH, SILU),)
    return gradients


@triton.jit
def convolve_back(gradients, j: tl.constexpr, taps, WIDTH: tl.constexpr):
    """Σ_k w_k gradients[j + W - 1 - k]: what a row receives from the W steps that saw it."""
    total = taps[WIDTH - 1] * gradients[j]
    for k in tl.static_range(1, WIDTH):
        total += taps[WIDTH - 1 - k] * gradients[j + k]
    return total


@triton.jit
def add_gradient_of_state(
    row, gradient, t, stop, d, mask_d, gradient_d, gradient_w, WIDTH: tl.constexpr, HAS_GRADIENT: tl.constexpr
):
    """Add that of the final state: it holds the last W - 1 rows, which may begin before the sequence does."""
    if HAS_GRADIENT:
        slot = t - stop + (WIDTH - 1)
        mask = (slot >= 0) & (t < stop) & mask_d
        row += tl.load(gradient + slot * gradient_w + d * gradient_d, mask=mask, other=0.0).to(row.dtype)
    return row


# Holds: STEPS + W - 1 rows of x and of the gradient of pre, and the sums for dweight and dbias.
# Reads x and dy once (and W - 1 rows before and after a segment again, from a cache), writes dx: 6 bytes in half
# precision for each number of x. The sums are W + 1 numbers a channel and program, in `partial`: no atomics.
@triton.jit
def causal_conv1d_backward_kernel(
    x, weight, bias, initial_state, cu_seqlens, grad_y, grad_final_state, dx, dinitial_state, partial,
    L, channels, sequences, chunks, iterations,
    x_b, x_t, x_d, grad_y_b, grad_y_t, grad_y_d, dx_b, dx_t, dx_d, weight_d, weight_w, state_b, state_d, state_w,
    grad_state_b, grad_state_d, grad_state_w,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr,
    HAS_GRAD_FINAL_STATE: tl.constexpr, PACKED: tl.constexpr, TIME_LAST: tl.constexpr, VECTORS: tl.constexpr,
    DTYPE: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels, SEGMENTS * STEPS * iterations steps of one sequence.

    A row's gradient needs the gradient of pre W - 1 steps later. With channels along the lanes dx follows that
    many rows behind; with time along the lanes those few steps are computed twice.
    """
    program = (tl.program_id(0) // BLOCKS).to(tl.int64)
    chunk = SEGMENTS * STEPS * iterations
    batch, sequence, index, start, stop = locate(program, cu_seqlens, sequences, L, chunk, chunks, PACKED)
    d, segment = axes(tl.program_id(0) % BLOCKS, BLOCK_D, SEGMENTS, TIME_LAST)
    mask_d = d < channels
    begin = start + index * chunk
    x += batch * x_b
    grad_y += batch * grad_y_b
    dx += batch * dx_b
    if HAS_INITIAL_STATE:
        initial_state += sequence * state_b
    if HAS_GRAD_FINAL_STATE:
        grad_final_state += sequence * grad_state_b
    taps, offset = load_weight(weight, bias, d, mask_d, weight_d, weight_w, WIDTH, HAS_BIAS, DTYPE)

    nothing = tl.zeros((BLOCK_D, SEGMENTS) if TIME_LAST else (SEGMENTS, BLOCK_D), DTYPE)
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (nothing,)
    gradients = ()
    for _ in tl.static_range(0 if TIME_LAST else WIDTH - 1):
        gradients = gradients + (nothing,)
    first = begin + segment * (STEPS * iterations)
    if not TIME_LAST:
        window = load_before(
            x, initial_state, first, start, stop, d, mask_d, x_t, x_d, state_d, state_w,
            WIDTH, HAS_INITIAL_STATE, VECTORS, DTYPE,
        )  # fmt: skip
    rounds = rounds_of(stop - begin, iterations, STEPS * (SEGMENTS if TIME_LAST else 1), PACKED)
    for i in range(rounds):
        if TIME_LAST:  # back in time: the rows after the last segment were there the round before, and are in a cache
            t = begin + ((rounds - 1 - i) * SEGMENTS + segment) * STEPS
            window = load_before(
                x, initial_state, t, start, stop, d, mask_d, x_t, x_d, state_d, state_w,
                WIDTH, HAS_INITIAL_STATE, VECTORS, DTYPE,
            )  # fmt: skip
        else:
            t = first + i * STEPS
        loaded = load_rows(x, t, start, stop, d, mask_d, x_t, x_d, STEPS, False, TIME_LAST)
        rows = window + as_rows(loaded, TIME_LAST, DTYPE)
        loaded = load_rows(grad_y, t, start, stop, d, mask_d, grad_y_t, grad_y_d, STEPS, False, TIME_LAST)
        dy_rows = as_rows(loaded, TIME_LAST, DTYPE)
        if TIME_LAST:
            t_after = t + STEPS
            rows = rows + load_after(x, t_after, stop, d, mask_d, x_t, x_d, WIDTH, VECTORS, DTYPE)
            dy_rows = dy_rows + load_after(
                grad_y, t_after, stop, d, mask_d, grad_y_t, grad_y_d, WIDTH, VECTORS, DTYPE
            )  # fmt: skip
        for j in tl.static_range(len(dy_rows)):
            gradient = through_silu(rows, j, dy_rows[j], taps, offset, WIDTH, SILU)
            gradients = gradients + (gradient,)
            if j < STEPS:
                added = ()
                for k in tl.static_range(WIDTH):
                    added = added + (sums[k] + gradient * rows[j + k],)
                sums = added + (sums[WIDTH] + gradient,)
        at = t if TIME_LAST else t - (WIDTH - 1)
        dx_rows = ()
        for j in tl.static_range(STEPS):
            row = convolve_back(gradients, j, taps, WIDTH)
            dx_rows = dx_rows + (add_gradient_of_state(
                row, grad_final_state, at + j, stop, d, mask_d, grad_state_d, grad_state_w, WIDTH, HAS_GRAD_FINAL_STATE
            ),)  # fmt: skip
        store_rows(dx, dx_rows, at, first, stop, d, mask_d, dx_t, dx_d, True, TIME_LAST)
        gradients = gradients[len(dy_rows) :]
        if not TIME_LAST:
            window = rows[STEPS:]

    if not TIME_LAST:  # the last W - 1 rows
        t = first + rounds * STEPS
        gradients = gradients + gradients_after(
            x, grad_y, window, t, stop, d, mask_d, x_t, x_d, grad_y_t, grad_y_d, taps, offset,
            WIDTH, SILU, VECTORS, DTYPE,
        )  # fmt: skip
        for j in tl.static_range(WIDTH - 1):
            at = t - (WIDTH - 1) + j
            row = add_gradient_of_state(
                convolve_back(gradients, j, taps, WIDTH), grad_final_state, at, stop, d, mask_d,
                grad_state_d, grad_state_w, WIDTH, HAS_GRAD_FINAL_STATE,
            )  # fmt: skip
            store_row(dx, row, at, first, stop, d, mask_d, dx_t, dx_d)

    for k in tl.static_range(WIDTH + HAS_BIAS):
        total = tl.sum(sums[k], axis=1 if TIME_LAST else 0, keep_dims=True)
        tl.store(partial + (program * (WIDTH + HAS_BIAS) + k) * channels + d, total, mask=mask_d)

    if HAS_INITIAL_STATE:  # noqa: SIM102
        if index == 0:  # the W - 1 rows before the sequence: the steps before its start send them nothing
            at_start = start + tl.zeros(d.shape, tl.int64)
            before = load_before(
                x, initial_state, at_start, start, stop, d, mask_d, x_t, x_d, state_d, state_w,
                WIDTH, True, VECTORS, DTYPE,
            )  # fmt: skip
            after_start = gradients_after(
                x, grad_y, before, at_start, stop, d, mask_d, x_t, x_d, grad_y_t, grad_y_d, taps, offset,
                WIDTH, SILU, VECTORS, DTYPE,
            )  # fmt: skip
            received = ()
            for _ in tl.static_range(WIDTH - 1):
                received = received + (tl.zeros(d.shape, DTYPE),)
            received = received + after_start
            for k in tl.static_range(WIDTH - 1):
                into_state = add_gradient_of_state(
                    convolve_back(received, k, taps, WIDTH), grad_final_state, start - (WIDTH - 1) + k, stop,
                    d, mask_d, grad_state_d, grad_state_w, WIDTH, HAS_GRAD_FINAL_STATE,
                )  # fmt: skip
                pointers = dinitial_state + (sequence * channels + d) * (WIDTH - 1) + k
                tl.store(pointers, into_state.to(dinitial_state.dtype.element_ty), mask=mask_d)


# Holds: a (BLOCK_R, BLOCK_D) tile. Reads `partial` (programs, W + 1, D) once, writes dweight (D, W) and dbias (D,).
@triton.jit
def sum_partial_kernel(
    partial, dweight, dbias, rows, channels, blocks,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of one tap, or of the bias, over all rows in a fixed order."""
    k = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < channels
    total = tl.zeros((BLOCK_R, BLOCK_D), partial.dtype.element_ty)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        pointers = partial + (r[:, None] * (WIDTH + HAS_BIAS) + k) * channels + d[None, :]
        total += tl.load(pointers, mask=(r < rows)[:, None] & mask_d[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    if k < WIDTH:
        tl.store(dweight + d.to(tl.int64) * WIDTH + k, total.to(dweight.dtype.element_ty), mask=mask_d)
    if HAS_BIAS:  # noqa: SIM102
        if k == WIDTH:
            tl.store(dbias + d, total.to(dbias.dtype.element_ty), mask=mask_d)


# Holds: the state of BLOCK_D channels, a row for each of its STATE columns. Reads and writes it once: in half
# precision 4 STATE + 4 bytes a channel, and the weight.
@triton.jit
def causal_conv1d_update_kernel(
    x, conv_state, weight, bias, y,
    channels,
    x_b, x_d, y_b, state_b, state_d, state_w, weight_d, weight_w,
    WIDTH: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: one step of BLOCK_D channels of one batch entry. The state moves up by one, x comes last."""
    batch = (tl.program_id(0) // BLOCKS).to(tl.int64)
    d = (tl.program_id(0) % BLOCKS).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < channels
    conv_state += batch * state_b
    new = tl.load(x + batch * x_b + d * x_d, mask=mask_d, other=0.0)
    columns = ()
    for j in tl.static_range(STATE):
        columns = columns + (tl.load(conv_state + d * state_d + j * state_w, mask=mask_d, other=0.0),)
    columns = columns + (new,)
    taps, offset = load_weight(weight, bias, d, mask_d, weight_d, weight_w, WIDTH, HAS_BIAS, DTYPE)
    for k in tl.static_range(WIDTH):
        offset += taps[k] * columns[STATE + 1 - WIDTH + k].to(DTYPE)
    if SILU:
        offset *= sigmoid(offset)
    tl.store(y + batch * y_b + d, offset.to(y.dtype.element_ty), mask=mask_d)
    tl.debug_barrier()  # the column that one thread overwrites may be another's to read
    for j in tl.static_range(STATE):
        tl.store(conv_state + d * state_d + j * state_w, columns[j + 1], mask=mask_d)
