"""The fused selective scan: discretise, scan, project, skip and gate in one kernel, forward and backward.

One tile is BLOCK_T steps x BLOCK_D channels x BLOCK_N states, held in registers; a program walks over the
tiles of its channels in time and carries the state between them. Nothing of size (Batch, L, D, N) is ever
written. A sequence is an entry of the batch, or a document of a packed row.

A step with Δ = 0 changes nothing: exp(0·A) = 1 and 0·B·u = 0. So the tail of the last tile and the channels
beyond the last are masked by Δ = 0, set after the softplus. States beyond the last are zeros in A, B and C.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(a_left, b_left, a_right, b_right):
    """The scan's operator: the map h -> a h + b of the left, then that of the right (chapter 08)."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to full precision also where exp(x) is far below 1.

    log1p(e) = log(w) e / (w - 1) with w = 1 + e as rounded: its rounding error cancels (Kahan).
    """
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow at either end."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def load_steps(ptr, t, d, mask, stride_t, stride_d, DTYPE: tl.constexpr):
    """A (BLOCK_T, BLOCK_D) tile of u, delta, z or a gradient, widened to the dtype of the computation."""
    return tl.load(ptr + t[:, None] * stride_t + d[None, :] * stride_d, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_map(
    ptr,
    t,
    d,
    n,
    mask_t,
    mask_d,
    mask_n,
    stride_t,
    stride_d,
    stride_n,
    VARYING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """B or C, ready to multiply a (BLOCK_T, BLOCK_D, BLOCK_N) tile: (T, 1, N) if varying, (1, D, N) if constant."""
    if VARYING:
        pointers = ptr + t[:, None] * stride_t + n[None, :] * stride_n
        tile = tl.load(pointers, mask=mask_t[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
        return tile[:, None, :]
    else:
        pointers = ptr + d[:, None] * stride_d + n[None, :] * stride_n
        tile = tl.load(pointers, mask=mask_d[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
        return tile[None, :, :]


@triton.jit
def sum_of_products(x, y, axis: tl.constexpr):
    """Sum x y over `axis`; the shapes broadcast. Every thread that holds a copy of a sum gets the same bits.

    Left to itself the compiler fuses each thread's last product into the first addition across threads. Then
    copies of one sum round differently, and which of them survives a change of layout is for the hardware to say.
    fma(x, y, 0) is a product that cannot be fused.
    """
    return tl.sum(tl.fma(x, y, 0.0), axis=axis)


@triton.jit
def row_of(tile, row, BLOCK_T: tl.constexpr):
    """Row `row` of a (BLOCK_T, BLOCK_D, BLOCK_N) tile. Triton cannot index registers, so: mask and sum."""
    keep = tl.arange(0, BLOCK_T)[:, None, None] == row
    return tl.sum(tl.where(keep, tile, 0.0), axis=0)


@triton.jit
def bounds_of(sequence, cu_seqlens, L, PACKED: tl.constexpr):
    """Where a sequence lies: its batch entry, its first step and the step after its last, all int64."""
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        return sequence * 0, start, stop
    else:
        return sequence, sequence * 0, sequence * 0 + L


# Holds: one tile, and the state (BLOCK_D, BLOCK_N) of its channels.
# Reads: u, delta, z once; B and C once per BLOCK_D channels. Writes: y, the final state, and the state before
# each tile for the backward pass (N / BLOCK_T numbers a step and channel).
@triton.jit
def selective_scan_forward_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
    y, final_state, checkpoints,
    L, channels, states, group_size, blocks_per_group,
    u_b, u_t, u_d, delta_b, delta_t, delta_d, z_b, z_t, z_d, y_b, y_t, y_d,
    B_b, B_t, B_g, B_d, B_n, C_b, C_t, C_g, C_d, C_n,
    B_VARYING: tl.constexpr, C_VARYING: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, PACKED: tl.constexpr,
    SAVE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of one group, for one sequence."""
    blocks = blocks_per_group * (channels // group_size)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    group = (block // blocks_per_group).to(tl.int64)
    in_group = (block % blocks_per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_size + in_group
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_d = in_group < group_size
    mask_n = n < states
    mask_dn = mask_d[:, None] & mask_n[None, :]
    offsets_dn = d[:, None] * states + n[None, :]

    batch, start, stop = bounds_of(sequence, cu_seqlens, L, PACKED)
    first_checkpoint = (batch * L + start) // BLOCK_T + sequence
    u += batch * u_b
    delta += batch * delta_b
    if HAS_Z:
        z += batch * z_b
    y += batch * y_b
    B += batch * B_b + group * B_g
    C += batch * C_b + group * C_g

    A_tile = tl.load(A + offsets_dn, mask=mask_dn, other=0.0) * LOG2_E
    if HAS_D:
        D_row = tl.load(D + d, mask=mask_d, other=0.0)
    if HAS_BIAS:
        bias = tl.load(delta_bias + d, mask=mask_d, other=0.0)
    h = tl.zeros((BLOCK_D, BLOCK_N), DTYPE)
    if HAS_INITIAL_STATE:
        h = tl.load(initial_state + sequence * channels * states + offsets_dn, mask=mask_dn, other=0.0)

    for tile in range(tl.cdiv(stop - start, BLOCK_T)):
        t = start + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = t < stop
        mask = mask_t[:, None] & mask_d[None, :]
        if SAVE:
            where = (first_checkpoint + tile) * channels * states
            tl.store(checkpoints + where + offsets_dn, h, mask=mask_dn)

        # Discretise.
        u_tile = load_steps(u, t, d, mask, u_t, u_d, DTYPE)
        step = load_steps(delta, t, d, mask, delta_t, delta_d, DTYPE)
        if HAS_BIAS:
            step += bias[None, :]
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where(mask, step, 0.0)
        B_tile = load_map(B, t, d, n, mask_t, mask_d, mask_n, B_t, B_d, B_n, B_VARYING, DTYPE)
        A_bar = tl.exp2(step[:, :, None] * A_tile[None, :, :])
        B_bar_u = (step * u_tile)[:, :, None] * B_tile

        # Scan, and carry.
        decay, h_local = tl.associative_scan((A_bar, B_bar_u), 0, combine)
        h_tile = decay * h[None, :, :] + h_local
        h = row_of(h_tile, BLOCK_T - 1, BLOCK_T)

        # Project, skip, gate.
        C_tile = load_map(C, t, d, n, mask_t, mask_d, mask_n, C_t, C_d, C_n, C_VARYING, DTYPE)
        out = sum_of_products(h_tile, C_tile, axis=2)
        if HAS_D:
            out += D_row[None, :] * u_tile
        if HAS_Z:
            z_tile = load_steps(z, t, d, mask, z_t, z_d, DTYPE)
            out *= z_tile * sigmoid(z_tile)
        tl.store(y + t[:, None] * y_t + d[None, :] * y_d, out.to(y.dtype.element_ty), mask=mask)

    tl.store(final_state + sequence * channels * states + offsets_dn, h, mask=mask_dn)


# Holds: one tile of the forward pass, recomputed from its checkpoint, and the same tile of the adjoint
# g_t = C_t dy_t + A_bar_{t+1} g_{t+1}, scanned from the last step to the first (chapter 09).
# Reads: the forward's inputs, dy, the checkpoints. Writes: du, ddelta, dz once; dB and dC once per program,
# which walks over its blocks of channels in turn and adds to its own slice: no atomics, the same bits each run.
@triton.jit
def selective_scan_backward_kernel(
    u, delta, A, B, C, D, z, delta_bias, cu_seqlens, checkpoints, grad_y, grad_final_state,
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state,
    L, channels, states, group_size, blocks_per_group, programs_per_group, batch_size,
    u_b, u_t, u_d, delta_b, delta_t, delta_d, z_b, z_t, z_d, grad_y_b, grad_y_t, grad_y_d,
    B_b, B_t, B_g, B_d, B_n, C_b, C_t, C_g, C_d, C_n,
    du_b, du_t, du_d, ddelta_b, ddelta_t, ddelta_d, dz_b, dz_t, dz_d,
    B_VARYING: tl.constexpr, C_VARYING: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_GRAD_FINAL_STATE: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: every programs_per_group-th block of channels of one group, for one sequence.

    dB and dC, where varying, are (programs_per_group, Batch, L, G, N), and every program fills its slice;
    where constant they are, like dA, (sequences, D, N). The caller sums over the first axis.
    """
    groups = channels // group_size
    programs = programs_per_group * groups
    sequence = (tl.program_id(0) // programs).to(tl.int64)
    group = ((tl.program_id(0) % programs) // programs_per_group).to(tl.int64)
    program = tl.program_id(0) % programs_per_group
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = n < states

    batch, start, stop = bounds_of(sequence, cu_seqlens, L, PACKED)
    first_checkpoint = (batch * L + start) // BLOCK_T + sequence
    tiles = tl.cdiv(stop - start, BLOCK_T)
    u += batch * u_b
    delta += batch * delta_b
    if HAS_Z:
        z += batch * z_b
    grad_y += batch * grad_y_b
    B += batch * B_b + group * B_g
    C += batch * C_b + group * C_g
    du += batch * du_b
    ddelta += batch * ddelta_b
    if HAS_Z:
        dz += batch * dz_b
    slice_tn = (
        (program.to(tl.int64) * batch_size + batch) * L * groups + group
    ) * states  # of this program in dB and dC
    slice_dn = sequence * channels * states  # of this sequence in (sequences, D, N)

    for block in range(program, blocks_per_group, programs_per_group):
        in_group = block * BLOCK_D + tl.arange(0, BLOCK_D)
        d = group * group_size + in_group
        mask_d = in_group < group_size
        mask_dn = mask_d[:, None] & mask_n[None, :]
        offsets_dn = d[:, None] * states + n[None, :]
        A_tile = tl.load(A + offsets_dn, mask=mask_dn, other=0.0)
        if HAS_D:
            D_row = tl.load(D + d, mask=mask_d, other=0.0)
        if HAS_BIAS:
            bias = tl.load(delta_bias + d, mask=mask_d, other=0.0)

        dA_sum = tl.zeros((BLOCK_D, BLOCK_N), DTYPE)
        dB_sum = tl.zeros((BLOCK_D, BLOCK_N), DTYPE)
        dC_sum = tl.zeros((BLOCK_D, BLOCK_N), DTYPE)
        dD_sum = tl.zeros((BLOCK_D,), DTYPE)
        dbias_sum = tl.zeros((BLOCK_D,), DTYPE)
        carry = tl.zeros((BLOCK_D, BLOCK_N), DTYPE)  # A_bar_{t+1} g_{t+1} of the tile that follows in time
        if HAS_GRAD_FINAL_STATE:
            carry = tl.load(grad_final_state + slice_dn + offsets_dn, mask=mask_dn, other=0.0)

        for i in range(tiles):
            tile = tiles - 1 - i
            t = start + tile * BLOCK_T + tl.arange(0, BLOCK_T)
            mask_t = t < stop
            mask = mask_t[:, None] & mask_d[None, :]

            # The forward tile again, from its checkpoint.
            u_tile = load_steps(u, t, d, mask, u_t, u_d, DTYPE)
            step_in = load_steps(delta, t, d, mask, delta_t, delta_d, DTYPE)
            # A_bar_{t+1}: Δ one step later; 0, and so the identity, after the tile's last step (the carry holds it).
            has_next = ((tl.arange(0, BLOCK_T) < BLOCK_T - 1) & (t + 1 < stop))[:, None] & mask_d[None, :]
            step_next = load_steps(delta, t + 1, d, has_next, delta_t, delta_d, DTYPE)
            if HAS_BIAS:
                step_in += bias[None, :]
                step_next += bias[None, :]
            step = step_in
            if SOFTPLUS:
                step = softplus(step)
                step_next = softplus(step_next)
            step = tl.where(mask, step, 0.0)
            step_next = tl.where(has_next, step_next, 0.0)
            B_tile = load_map(B, t, d, n, mask_t, mask_d, mask_n, B_t, B_d, B_n, B_VARYING, DTYPE)
            C_tile = load_map(C, t, d, n, mask_t, mask_d, mask_n, C_t, C_d, C_n, C_VARYING, DTYPE)
            A_bar = tl.exp2(step[:, :, None] * (A_tile * LOG2_E)[None, :, :])
            B_bar_u = (step * u_tile)[:, :, None] * B_tile
            where = (first_checkpoint + tile) * channels * states
            h = tl.load(checkpoints + where + offsets_dn, mask=mask_dn, other=0.0)
            decay, h_local = tl.associative_scan((A_bar, B_bar_u), 0, combine)
            h_tile = decay * h[None, :, :] + h_local

            # The gate and the skip.
            dy = load_steps(grad_y, t, d, mask, grad_y_t, grad_y_d, DTYPE)
            if HAS_Z:
                z_tile = load_steps(z, t, d, mask, z_t, z_d, DTYPE)
                s = sigmoid(z_tile)
                out = sum_of_products(h_tile, C_tile, axis=2)
                if HAS_D:
                    out += D_row[None, :] * u_tile
                dz_tile = dy * out * s * (1.0 + z_tile * (1.0 - s))
                tl.store(dz + t[:, None] * dz_t + d[None, :] * dz_d, dz_tile.to(dz.dtype.element_ty), mask=mask)
                dy *= z_tile * s

            # The adjoint, backwards in time.
            A_bar_next = tl.exp2(step_next[:, :, None] * (A_tile * LOG2_E)[None, :, :])
            decay_back, g_local = tl.associative_scan((A_bar_next, dy[:, :, None] * C_tile), 0, combine, reverse=True)
            g = decay_back * carry[None, :, :] + g_local
            carry = row_of(A_bar * g, 0, BLOCK_T)

            # g_t A_bar_t h_{t-1}, which feeds dΔ and dA. A_bar_t h_{t-1} = h_t - B_bar_t u_t needs no shifted state.
            through_A = g * (h_tile - B_bar_u)
            through_B = sum_of_products(g, B_tile, axis=2)
            ddelta_tile = sum_of_products(through_A, A_tile[None, :, :], axis=2) + through_B * u_tile
            du_tile = through_B * step
            if HAS_D:
                du_tile += D_row[None, :] * dy
                dD_sum += sum_of_products(dy, u_tile, axis=0)
            if SOFTPLUS:
                ddelta_tile *= sigmoid(step_in)
            if HAS_BIAS:
                dbias_sum += tl.sum(tl.where(mask, ddelta_tile, 0.0), axis=0)
            tl.store(du + t[:, None] * du_t + d[None, :] * du_d, du_tile.to(du.dtype.element_ty), mask=mask)
            tl.store(
                ddelta + t[:, None] * ddelta_t + d[None, :] * ddelta_d,
                ddelta_tile.to(ddelta.dtype.element_ty),
                mask=mask,
            )
            dA_sum += sum_of_products(through_A, step[:, :, None], axis=0)

            through_u = (step * u_tile)[:, :, None]
            offsets_tn = slice_tn + t[:, None] * groups * states + n[None, :]
            mask_tn = mask_t[:, None] & mask_n[None, :]
            again = mask_tn & (block != program)  # this program's first block writes, the others add
            if B_VARYING:
                before = tl.load(dB + offsets_tn, mask=again, other=0.0)
                tl.store(dB + offsets_tn, before + sum_of_products(g, through_u, axis=1), mask=mask_tn)
            else:
                dB_sum += sum_of_products(g, through_u, axis=0)
            if C_VARYING:
                before = tl.load(dC + offsets_tn, mask=again, other=0.0)
                tl.store(dC + offsets_tn, before + sum_of_products(h_tile, dy[:, :, None], axis=1), mask=mask_tn)
            else:
                dC_sum += sum_of_products(h_tile, dy[:, :, None], axis=0)

        tl.store(dA + slice_dn + offsets_dn, dA_sum, mask=mask_dn)
        tl.store(dinitial_state + slice_dn + offsets_dn, carry, mask=mask_dn)
        if not B_VARYING:
            tl.store(dB + slice_dn + offsets_dn, dB_sum, mask=mask_dn)
        if not C_VARYING:
            tl.store(dC + slice_dn + offsets_dn, dC_sum, mask=mask_dn)
        if HAS_D:
            tl.store(dD + sequence * channels + d, dD_sum, mask=mask_d)
        if HAS_BIAS:
            tl.store(ddelta_bias + sequence * channels + d, dbias_sum, mask=mask_d)
        # The next block reads sums that other threads of this program wrote.
        tl.debug_barrier()
