"""The fused selective scan again, for speed: every number placed by hand, in Gluon (chapter 11, section 10).

1. Time runs in sequence inside a thread, which owns K states of c channels; G threads hold the N = K * G of a channel.
2. What many threads need (Δ, Δu, B, C) is made once a tile of T steps and read by all from shared memory. While one
   tile is computed, the next is on its way from global memory.
3. The sum over the G threads of a channel waits for the end of a tile: one exchange for T steps.
4. Where channels are few, a sequence is cut into pieces. A first kernel finds what each does to the state entering it.

A layout says which thread holds what, by dimension: BlockedLayout([registers], [lanes], [warps], order). A program has
DL groups of c channels. Barriers around shared memory are the compiler's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7


# --- layouts ---------------------------------------------------------------------------------------------


@gluon.constexpr_function
def state_layout(G, K, c, W):
    """(G, K, DL, c): a thread's K states and c channels in its registers, G lanes to a channel, of G / 32 warps."""
    lanes = min(G, 32)
    return gl.BlockedLayout([1, K, 1, c], [lanes, 1, 32 // lanes, 1], [G // lanes, 1, W * lanes // G, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def start_layout(G, K, c, W):
    """(K, G, channels): the same numbers of each thread, in the order in which shared memory keeps them."""
    lanes = min(G, 32)
    return gl.BlockedLayout([K, 1, c], [1, lanes, 32 // lanes], [1, G // lanes, W * lanes // G], [2, 1, 0])


@gluon.constexpr_function
def tile_layout(T, G, channels, W, TIME_FIRST):
    """(T, G, channels): G in registers, for the sum over it. Vectors along the axis that is contiguous in memory.

    With many lanes to a channel a tile has fewer numbers than the program has threads: lanes to spare share the sum.
    """
    each = max(1, T * channels // (32 * W))
    spare = 32 * W // (T * channels)
    if G >= 32 and spare > 1:
        first = min(32, T if TIME_FIRST else channels)
        sharing = min(spare, 32 // first)
        rest = 32 // first // sharing
        if TIME_FIRST:
            return gl.BlockedLayout([1, 1, 1], [first, sharing, rest], [1, 1, W], [0, 1, 2])
        warps = min(W, max(1, T // rest))
        return gl.BlockedLayout([1, 1, 1], [rest, sharing, first], [warps, 1, W // warps], [2, 1, 0])
    if TIME_FIRST:
        vector = min(each, 8, T)
        lanes = min(32, T // vector)
        return gl.BlockedLayout([vector, G, 1], [lanes, 1, 32 // lanes], [1, 1, W], [0, 1, 2])
    vector = min(each, 8, channels)
    lanes = min(32, channels // vector)
    warps = min(W, max(1, T * lanes // 32))
    return gl.BlockedLayout([1, G, vector], [32 // lanes, 1, lanes], [warps, 1, W // warps], [2, 1, 0])


@gluon.constexpr_function
def map_layout(T, N, W, TIME_FIRST):
    """(T, N) of B and C. Vectors along the axis that is contiguous in memory."""
    if TIME_FIRST:
        vector = min(max(1, T * N // (32 * W)), 8, T)
        lanes = min(32, T // vector)
        return gl.BlockedLayout([vector, 1], [lanes, 32 // lanes], [1, W], [0, 1])
    vector = min(max(1, T * N // (32 * W)), 8, N)
    lanes = min(32, N // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [W, 1], [1, 0])


@gluon.constexpr_function
def sum_layout(T, N, DL, W):
    """(2, T, DL, N) of what is summed over DL to dB and dC: vectors along the states, the rest of a warp along DL."""
    vector = min(4, N)
    lanes = min(32, N // vector)
    return gl.BlockedLayout(
        [1, 1, 1, vector], [1, 1, 32 // lanes, lanes], [min(2, W), max(1, W // 2), 1, 1], [3, 2, 1, 0]
    )  # fmt: skip


# --- small parts -------------------------------------------------------------------------------------------


@gluon.jit
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|). log(1 + e) / e is a minimax polynomial, good to 1.7e-7 for e <= 1."""
    e = gl.exp2(-gl.abs(x) * LOG2_E)
    p = 0.005232688484910491
    p = p * e - 0.029505216534071198
    p = p * e + 0.07822591741210913
    p = p * e - 0.13663243054635388
    p = p * e + 0.19106005585703814
    p = p * e - 0.24842981955212257
    p = p * e + 0.3331909678386033
    p = p * e - 0.49999493140271883
    p = p * e + 0.9999999698798988
    return gl.where(x > 0, x, 0.0) + p * e


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) as the square of a reciprocal root: two instructions, where a division takes nine."""
    root = gl.rsqrt(1.0 + gl.exp2(-x * LOG2_E))
    return root * root


@gluon.jit
def over_states(x):
    """(DL, c), a number for each channel, ready to meet the state (G, K, DL, c)."""
    return x[None, :, :][:, None, :, :]


@gluon.jit
def over_channels(x):
    """(G, K), a number for each state, ready to meet the state (G, K, DL, c)."""
    return x[:, :, None][:, :, :, None]


@gluon.jit
def stack(parts, T: gl.constexpr):
    """T tensors, T a power of two from 2 on, as one with a last axis of T: a renaming of registers, no instruction."""
    if T == 2:
        return gl.join(parts[0], parts[1])
    else:
        pairs = ()
        for i in gl.static_range(T // 2):
            pairs = pairs + (gl.join(parts[i], parts[i + T // 2]),)
        return stack(pairs, T // 2)


@gluon.jit
def by_lane(parts, T: gl.constexpr, G: gl.constexpr, CHANNELS: gl.constexpr):
    """T tensors (G, DL, c) as one (T, G, channels)."""
    return stack(parts, T).reshape([G, CHANNELS, T]).permute([2, 0, 1])


@gluon.jit
def sum_over_lanes(parts, T: gl.constexpr, G: gl.constexpr, CHANNELS: gl.constexpr, layout: gl.constexpr):
    """T tensors (G, DL, c), summed over G -> (T, channels)."""
    return gl.sum(gl.convert_layout(by_lane(parts, T, G, CHANNELS), layout), axis=1)


@gluon.jit
def let_next_kernel_start():
    """Once all programs got here, the next kernel's start where there is room, while these go on."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_kernel_before():
    """Until it has ended and what it wrote can be read. Returns at once if this one did not start early."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def piece_of(
    row, cu_seqlens, L, sequences, whole, heads, head, piece_length, PACKED: gl.constexpr, SPLIT: gl.constexpr
):
    """Where a piece lies: its sequence, batch entry, that sequence's first step and the step after its last, the
    piece's own, and its number in the sequence, from zero. What is kept of a piece lies in row `row`.

    The first `whole` sequences are not cut. The others have `heads` pieces of `head` steps (None: one) and then more of
    piece_length. All first pieces come first, then all second ones: so the long ones start before the short.

    Documents have different lengths: the one that starts at step s of the packed row owns the rows from
    s // piece_length + its index on, all pieces alike. That is always enough, and some stay empty.
    """
    if PACKED:
        if SPLIT:
            sequence = -1
            for block in range(0, sequences, 256):
                i = block + gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
                border = gl.load(cu_seqlens + i, mask=i < sequences, other=0)
                mine = (border // piece_length + i <= row) & (i < sequences)  # documents that begin here or before
                sequence += gl.sum(mine.to(gl.int32), axis=0)
            start = gl.load(cu_seqlens + sequence).to(gl.int64)
            number = row - sequence - (start // piece_length).to(gl.int32)
        else:
            sequence = row
            start = gl.load(cu_seqlens + sequence).to(gl.int64)
            number = row * 0
        stop = gl.load(cu_seqlens + sequence + 1).to(gl.int64)
        sequence = gl.to_tensor(sequence).to(gl.int64)
        batch = sequence * 0
    else:
        if SPLIT:
            number = gl.where(row < whole, 0, (row - whole) // (sequences - whole))
        else:
            number = row * 0
        sequence = (row - number * (sequences - whole)).to(gl.int64)
        batch = sequence
        start = batch * 0
        stop = start + L
    if heads is None or not SPLIT:  # the same in other instructions: with those below backward takes 2 % longer
        begin = start + gl.where(number > 0, head + (number - 1).to(gl.int64) * piece_length, 0)
        length = gl.where(number > 0, piece_length, gl.where(row < whole, L, head))
    else:
        longer = gl.minimum(number, heads)  # pieces before this one
        begin = start + longer.to(gl.int64) * head + (number - longer).to(gl.int64) * piece_length
        length = gl.where(number >= heads, piece_length, gl.where(row < whole, L, head))
    return sequence, batch, start, stop, begin, gl.minimum(begin + length, stop), number


@gluon.jit
def row_of(first_row, number, sequences, whole, PACKED: gl.constexpr):
    """The row of a sequence's piece, given that of its first, number 0."""
    if PACKED:
        return first_row + number
    else:
        return first_row + number * (sequences - whole)


@gluon.jit
def checkpoint_before(begin, sequence, start, L, EVERY: gl.constexpr, PACKED: gl.constexpr):
    """The row of the checkpoint before step `begin` of a sequence that starts at `start`.

    There is one before the sequence's step EVERY, 2 * EVERY and so on; none before its first, since that is the initial
    state. Pieces begin at one, since their lengths are multiples of EVERY.
    """
    if PACKED:
        first = start // EVERY
    else:
        first = sequence * ((L - 1) // EVERY)
    return first + (begin - start) // EVERY - 1


# --- forward -----------------------------------------------------------------------------------------------


# Holds: K states of c channels a thread, T steps of c * 32 * W / G channels a program.
# Reads: u, delta, z once; B and C once per program of a sequence. Writes: y, the final state, and for the backward
# pass the state before every EVERY steps. With LOCAL it is the first kernel for pieces: it starts each but the last of
# a sequence from zero, and writes the state at its end and the sum of its steps.
@gluon.jit
def selective_scan_forward_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
    y, final_state, checkpoints, piece_states, piece_steps,
    L, channels, states, group_size, blocks_per_group, sequences, whole, heads, head, piece_length,
    u_b, u_t, u_d, delta_b, delta_t, delta_d, z_b, z_t, z_d,
    B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr, PACKED: gl.constexpr, SPLIT: gl.constexpr, LOCAL: gl.constexpr,
    SAVE: gl.constexpr, EVERY: gl.constexpr, OVERLAP: gl.constexpr,
    TIME_FIRST: gl.constexpr, MAPS_TIME_FIRST: gl.constexpr,
    T: gl.constexpr, G: gl.constexpr, K: gl.constexpr, c: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """One program: c * 32 * W / G channels of one group, for one piece of a sequence."""
    N: gl.constexpr = G * K
    DL: gl.constexpr = 32 * W // G
    CHANNELS: gl.constexpr = DL * c
    STATE: gl.constexpr = state_layout(G, K, c, W)
    CHANNEL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, STATE))  # (DL, c)
    MAP: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, STATE))  # (G, K)
    LANES: gl.constexpr = tile_layout(T, G, CHANNELS, W, TIME_FIRST)
    TILE: gl.constexpr = gl.SliceLayout(1, LANES)  # (T, channels)
    MAPS: gl.constexpr = map_layout(T, N, W, MAPS_TIME_FIRST)  # (T, N)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    if LOCAL and OVERLAP:
        let_next_kernel_start()
    blocks = blocks_per_group * (channels // group_size)
    row = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    group = (block // blocks_per_group).to(gl.int64)
    first_channel = (block % blocks_per_group) * CHANNELS
    sequence, batch, start, stop, begin, end, number = piece_of(
        row, cu_seqlens, L, sequences, whole, heads, head, piece_length, PACKED, SPLIT
    )
    last = end >= stop
    if LOCAL:
        end = gl.where(last, begin, end)  # nobody asks for the state behind the last piece

    # Where this thread's states and channels lie.
    g = gl.arange(0, G, layout=gl.SliceLayout(1, MAP))
    k = gl.arange(0, K, layout=gl.SliceLayout(0, MAP))
    n = over_channels(g[:, None] * K + k[None, :])
    dl = gl.arange(0, DL, layout=gl.SliceLayout(1, CHANNEL))
    i = gl.arange(0, c, layout=gl.SliceLayout(0, CHANNEL))
    d_row = first_channel + dl[:, None] * c + i[None, :]
    mask_row = d_row < group_size
    d_row = d_row + group * group_size
    d = over_states(d_row)
    mask_state = (n < states) & over_states(mask_row)
    by_channel = d * states + n  # in (D, N), of A and the states that a user sees
    by_state = n.to(gl.int64) * channels + d  # in (N, D), of what is kept between kernels: neighbours lie side by side
    A_tile = gl.load(A + by_channel, mask=mask_state, other=0.0) * LOG2_E
    h = gl.zeros([G, K, DL, c], gl.float32, STATE)
    if HAS_INITIAL_STATE and not LOCAL:
        h = gl.load(initial_state + sequence * channels * states + by_channel, mask=mask_state, other=0.0)

    # Where the numbers of a tile lie.
    t = gl.arange(0, T, layout=gl.SliceLayout(1, TILE))
    d = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, TILE))
    mask_d = d < group_size
    d = d + group * group_size
    t_map = gl.arange(0, T, layout=gl.SliceLayout(1, MAPS))
    n_map = gl.arange(0, N, layout=gl.SliceLayout(0, MAPS))
    mask_n = n_map < states
    u_at = t[:, None].to(gl.int64) * u_t + d[None, :] * u_d
    delta_at = t[:, None].to(gl.int64) * delta_t + d[None, :] * delta_d
    B_at = t_map[:, None].to(gl.int64) * B_t + n_map[None, :] * B_n
    u += batch * u_b + begin * u_t
    delta += batch * delta_b + begin * delta_t
    B += batch * B_b + group * B_g + begin * B_t
    if HAS_BIAS:
        bias = gl.load(delta_bias + d, mask=mask_d, other=0.0)
    if not LOCAL:
        y_at = t[:, None].to(gl.int64) * channels + d[None, :]
        C_at = t_map[:, None].to(gl.int64) * C_t + n_map[None, :] * C_n
        y += (batch * L + begin) * channels
        C += batch * C_b + group * C_g + begin * C_t
        if HAS_D:
            D_row = gl.load(D + d, mask=mask_d, other=0.0)
        if HAS_Z:
            z_at = t[:, None].to(gl.int64) * z_t + d[None, :] * z_d
            z += batch * z_b + begin * z_t

    step_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    x_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    B_shared = gl.allocate_shared_memory(gl.float32, [T, N], PLAIN)
    step_rows = step_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    x_rows = x_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    B_rows = B_shared._reinterpret(gl.float32, [T, G, K], PLAIN)
    if LOCAL:
        steps = gl.zeros([T, CHANNELS], gl.float32, TILE)
    else:
        C_shared = gl.allocate_shared_memory(gl.float32, [T, N], PLAIN)
        C_rows = C_shared._reinterpret(gl.float32, [T, G, K], PLAIN)

    # The first tile.
    length = gl.maximum(end - begin, 0).to(gl.int32)
    mask = (t < length)[:, None] & mask_d[None, :]
    mask_map = (t_map < length)[:, None] & mask_n[None, :]
    u_next = gl.load(u + u_at, mask=mask, other=0.0)
    delta_next = gl.load(delta + delta_at, mask=mask, other=0.0)
    B_next = gl.load(B + B_at, mask=mask_map, other=0.0)
    if not LOCAL:
        C_next = gl.load(C + C_at, mask=mask_map, other=0.0)
        if HAS_Z:
            z_next = gl.load(z + z_at, mask=mask, other=0.0)
    checkpoint = checkpoint_before(begin, sequence, start, L, EVERY, PACKED)

    # What the pieces before make of the state.
    if SPLIT and not LOCAL:
        if OVERLAP:
            wait_for_kernel_before()
        first_row = row_of(row, -number, sequences, whole, PACKED)
        for earlier in range(0, number, 6):  # six at a time on their way
            steps, locals = (), ()
            for ahead in gl.static_range(6):
                where = row_of(first_row, earlier + ahead, sequences, whole, PACKED).to(gl.int64) * channels
                there = earlier + ahead < number
                steps = steps + (gl.load(piece_steps + where + d_row, mask=mask_row & there, other=0.0),)
                state = gl.load(piece_states + where * states + by_state, mask=mask_state & there, other=0.0)
                locals = locals + (state,)
            for ahead in gl.static_range(6):  # a step of zero changes nothing
                h = gl.exp2(over_states(steps[ahead]) * A_tile) * h + locals[ahead]

    tile_steps = gl.to_tensor(T).to(gl.int64)  # a stride in time can be as long as a batch
    for tile in range(gl.cdiv(length, T)):
        if SAVE:
            keep = mask_state & (tile % (EVERY // T) == 0) & (begin + tile > start)
            where = (checkpoint + tile // (EVERY // T)) * channels * states
            gl.store(checkpoints + where + by_state, h, mask=keep)

        # Discretise, each number once, for all the threads that need it.
        u_tile = u_next.to(gl.float32)
        step = delta_next.to(gl.float32)
        if HAS_BIAS:
            step += bias[None, :]
        if SOFTPLUS:
            step = softplus(step)
        step = gl.where(mask, step, 0.0)  # a step of zero changes nothing: so the tail is masked
        step_shared.store(step)
        x_shared.store(step * u_tile)
        B_shared.store(B_next.to(gl.float32))
        if LOCAL:
            steps += step
        else:
            C_shared.store(C_next.to(gl.float32))
            if HAS_Z:
                z_tile = z_next.to(gl.float32)
        mask_now = mask

        # The next tile sets off.
        u += tile_steps * u_t
        delta += tile_steps * delta_t
        B += tile_steps * B_t
        left = length - (tile + 1) * T
        mask = (t < left)[:, None] & mask_d[None, :]
        mask_map = (t_map < left)[:, None] & mask_n[None, :]
        u_next = gl.load(u + u_at, mask=mask, other=0.0)
        delta_next = gl.load(delta + delta_at, mask=mask, other=0.0)
        B_next = gl.load(B + B_at, mask=mask_map, other=0.0)
        if not LOCAL:
            C += tile_steps * C_t
            C_next = gl.load(C + C_at, mask=mask_map, other=0.0)
            if HAS_Z:
                z += tile_steps * z_t
                z_next = gl.load(z + z_at, mask=mask, other=0.0)

        # Scan: h = Ā h + B̄ u, and this thread's part of C h.
        out_parts = ()
        for s in gl.static_range(T):
            step_s = over_states(step_rows.index(s).load(CHANNEL))
            x_s = over_states(x_rows.index(s).load(CHANNEL))
            B_s = over_channels(B_rows.index(s).load(MAP))
            h = gl.exp2(step_s * A_tile) * h + x_s * B_s
            if not LOCAL:
                C_s = over_channels(C_rows.index(s).load(MAP))
                out_parts = out_parts + (gl.sum(h * C_s, axis=1),)

        # Project, skip, gate.
        if not LOCAL:
            out = sum_over_lanes(out_parts, T, G, CHANNELS, LANES)
            if HAS_D:
                out += D_row[None, :] * u_tile
            if HAS_Z:
                out *= z_tile * sigmoid(z_tile)
            gl.store(y + y_at, out.to(y.dtype.element_ty), mask=mask_now)
            y += tile_steps * channels

    if LOCAL:
        piece_at = row.to(gl.int64) * channels
        gl.store(piece_states + piece_at * states + by_state, h, mask=mask_state)
        gl.store(piece_steps + piece_at + d, gl.sum(steps, axis=0), mask=mask_d)
    else:
        owner = last & ((begin < stop) | (number == 0))  # a spare piece owns nothing
        gl.store(final_state + sequence * channels * states + by_channel, h, mask=mask_state & owner)


# --- backward ----------------------------------------------------------------------------------------------


# The first kernel for pieces, backwards: what the gradients of a piece's own outputs send to the state before it.
# Writes p = A_bar_t g_t at the piece's first step, as if nothing came from behind, and the sum of its steps.
@gluon.jit
def selective_scan_adjoint_kernel(
    delta, A, C, z, delta_bias, cu_seqlens, grad_y, piece_adjoints, piece_steps,
    L, channels, states, group_size, blocks_per_group, sequences, whole, head, piece_length,
    delta_b, delta_t, delta_d, z_b, z_t, z_d, grad_y_b, grad_y_t, grad_y_d, C_b, C_t, C_g, C_n,
    HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr, PACKED: gl.constexpr,
    OVERLAP: gl.constexpr, TIME_FIRST: gl.constexpr, MAPS_TIME_FIRST: gl.constexpr,
    T: gl.constexpr, G: gl.constexpr, K: gl.constexpr, c: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """One program: c * 32 * W / G channels of one group, for one piece of a sequence."""
    N: gl.constexpr = G * K
    DL: gl.constexpr = 32 * W // G
    CHANNELS: gl.constexpr = DL * c
    STATE: gl.constexpr = state_layout(G, K, c, W)
    CHANNEL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, STATE))
    MAP: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, STATE))
    TILE: gl.constexpr = gl.SliceLayout(1, tile_layout(T, G, CHANNELS, W, TIME_FIRST))
    MAPS: gl.constexpr = map_layout(T, N, W, MAPS_TIME_FIRST)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    if OVERLAP:
        let_next_kernel_start()
    blocks = blocks_per_group * (channels // group_size)
    row = gl.program_id(0) // blocks
    if not PACKED:
        row += sequences  # nobody asks what the first pieces send back
    block = gl.program_id(0) % blocks
    group = (block // blocks_per_group).to(gl.int64)
    first_channel = (block % blocks_per_group) * CHANNELS
    _sequence, batch, _start, _stop, begin, end, number = piece_of(
        row, cu_seqlens, L, sequences, whole, None, head, piece_length, PACKED, True
    )
    if PACKED:
        end = gl.where(number == 0, begin, end)

    g = gl.arange(0, G, layout=gl.SliceLayout(1, MAP))
    k = gl.arange(0, K, layout=gl.SliceLayout(0, MAP))
    n = over_channels(g[:, None] * K + k[None, :])
    dl = gl.arange(0, DL, layout=gl.SliceLayout(1, CHANNEL))
    i = gl.arange(0, c, layout=gl.SliceLayout(0, CHANNEL))
    d = over_states(first_channel + dl[:, None] * c + i[None, :])
    mask_state = (n < states) & (d < group_size)
    d = d + group * group_size
    by_channel = d * states + n
    A_tile = gl.load(A + by_channel, mask=mask_state, other=0.0) * LOG2_E

    t = gl.arange(0, T, layout=gl.SliceLayout(1, TILE))
    d = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, TILE))
    mask_d = d < group_size
    d = d + group * group_size
    t_map = gl.arange(0, T, layout=gl.SliceLayout(1, MAPS))
    n_map = gl.arange(0, N, layout=gl.SliceLayout(0, MAPS))
    mask_n = n_map < states
    length = gl.maximum(end - begin, 0).to(gl.int32)
    tiles = gl.cdiv(length, T)
    first_step = begin + (tiles - 1) * T  # of the last tile
    delta_at = t[:, None].to(gl.int64) * delta_t + d[None, :] * delta_d
    grad_y_at = t[:, None].to(gl.int64) * grad_y_t + d[None, :] * grad_y_d
    C_at = t_map[:, None].to(gl.int64) * C_t + n_map[None, :] * C_n
    delta += batch * delta_b + first_step * delta_t
    grad_y += batch * grad_y_b + first_step * grad_y_t
    C += batch * C_b + group * C_g + first_step * C_t
    if HAS_BIAS:
        bias = gl.load(delta_bias + d, mask=mask_d, other=0.0)
    if HAS_Z:
        z_at = t[:, None].to(gl.int64) * z_t + d[None, :] * z_d
        z += batch * z_b + first_step * z_t

    step_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    dy_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    C_shared = gl.allocate_shared_memory(gl.float32, [T, N], PLAIN)
    step_rows = step_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    dy_rows = dy_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    C_rows = C_shared._reinterpret(gl.float32, [T, G, K], PLAIN)

    left = length - (tiles - 1) * T  # steps of the tile at hand: all T but for the last tile
    mask = (t < left)[:, None] & mask_d[None, :] & (tiles > 0)
    mask_map = (t_map < left)[:, None] & mask_n[None, :] & (tiles > 0)
    delta_next = gl.load(delta + delta_at, mask=mask, other=0.0)
    dy_next = gl.load(grad_y + grad_y_at, mask=mask, other=0.0)
    C_next = gl.load(C + C_at, mask=mask_map, other=0.0)
    if HAS_Z:
        z_next = gl.load(z + z_at, mask=mask, other=0.0)
    steps = gl.zeros([T, CHANNELS], gl.float32, TILE)
    p = gl.zeros([G, K, DL, c], gl.float32, STATE)
    tile_steps = gl.to_tensor(T).to(gl.int64)
    for tile in range(tiles):
        step = delta_next.to(gl.float32)
        if HAS_BIAS:
            step += bias[None, :]
        if SOFTPLUS:
            step = softplus(step)
        step = gl.where(mask, step, 0.0)
        dy = dy_next.to(gl.float32)
        if HAS_Z:
            z_tile = z_next.to(gl.float32)
            dy *= z_tile * sigmoid(z_tile)
        steps += step
        step_shared.store(step)
        dy_shared.store(dy)
        C_shared.store(C_next.to(gl.float32))

        more = tile + 1 < tiles
        delta -= tile_steps * delta_t
        grad_y -= tile_steps * grad_y_t
        C -= tile_steps * C_t
        mask = (t < T)[:, None] & mask_d[None, :] & more
        mask_map = (t_map < T)[:, None] & mask_n[None, :] & more
        delta_next = gl.load(delta + delta_at, mask=mask, other=0.0)
        dy_next = gl.load(grad_y + grad_y_at, mask=mask, other=0.0)
        C_next = gl.load(C + C_at, mask=mask_map, other=0.0)
        if HAS_Z:
            z -= tile_steps * z_t
            z_next = gl.load(z + z_at, mask=mask, other=0.0)

        for back in gl.static_range(T):
            step_s = over_states(step_rows.index(T - 1 - back).load(CHANNEL))
            dy_s = over_states(dy_rows.index(T - 1 - back).load(CHANNEL))
            C_s = over_channels(C_rows.index(T - 1 - back).load(MAP))
            p = gl.exp2(step_s * A_tile) * (dy_s * C_s + p)

    piece_at = row.to(gl.int64) * channels
    gl.store(piece_adjoints + piece_at * states + by_channel, p, mask=mask_state)
    gl.store(piece_steps + piece_at + d, gl.sum(steps, axis=0), mask=mask_d)


# Holds: BLOCK numbers of p. Reads and writes piece_adjoints once: what each piece sends to the piece before it becomes
# what enters it from behind.
@gluon.jit
def chain_pieces_kernel(
    A, cu_seqlens, grad_final_state, piece_adjoints, piece_steps,
    channels, states, sequences, whole, pieces, piece_length,
    PACKED: gl.constexpr, HAS_GRAD_FINAL_STATE: gl.constexpr, OVERLAP: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK of the channels * states numbers of one sequence, through its pieces from last to first."""
    if OVERLAP:
        let_next_kernel_start()
    size = channels * states
    blocks = gl.cdiv(size, BLOCK)
    sequence = gl.program_id(0) // blocks
    i = gl.program_id(0) % blocks * BLOCK + gl.arange(0, BLOCK, layout=gl.BlockedLayout([4], [32], [4], [0]))
    mask = i < size
    if PACKED:
        start = gl.load(cu_seqlens + sequence).to(gl.int64)
        length = gl.load(cu_seqlens + sequence + 1).to(gl.int64) - start
        first_row = (start // piece_length).to(gl.int32) + sequence
        count = gl.maximum(gl.cdiv(length, piece_length), 1).to(gl.int32)
    else:
        first_row = sequence
        count = gl.where(sequence < whole, 1, pieces)
    A_row = gl.load(A + i, mask=mask, other=0.0) * LOG2_E
    p = gl.zeros([BLOCK], gl.float32, gl.BlockedLayout([4], [32], [4], [0]))
    if HAS_GRAD_FINAL_STATE:
        p = gl.load(grad_final_state + gl.to_tensor(sequence).to(gl.int64) * size + i, mask=mask, other=0.0)
    if OVERLAP:
        wait_for_kernel_before()
    for later in range(0, count, 4):  # four at a time on their way
        steps, sent = (), ()
        for ahead in gl.static_range(4):
            number = count - 1 - later - ahead
            row = row_of(first_row, number, sequences, whole, PACKED).to(gl.int64)
            there = mask & (number > 0)  # the first piece sends to none
            steps = steps + (gl.load(piece_steps + row * channels + i // states, mask=there, other=0.0),)
            sent = sent + (gl.load(piece_adjoints + row * size + i, mask=there, other=0.0),)
        for ahead in gl.static_range(4):
            number = count - 1 - later - ahead
            row = row_of(first_row, number, sequences, whole, PACKED).to(gl.int64)
            gl.store(piece_adjoints + row * size + i, p, mask=mask & (number >= 0))
            p = gl.exp2(steps[ahead] * A_row) * p + sent[ahead]


@gluon.jit
def from_behind(adjoint, mask, OVERLAP: gl.constexpr):
    """The adjoint that enters a piece, once the kernels before have found it."""
    if OVERLAP:
        wait_for_kernel_before()
    return gl.load(adjoint, mask=mask, other=0.0)


@gluon.jit
def fetched(x, mask, before, AT_ONCE: gl.constexpr):
    """The tiles before. Where several come at once it is not yet time at most tiles, and `before` stays."""
    if AT_ONCE > 1:  # in a branch the load would have to end with it
        return gl.load(x, mask=mask, other=before)
    else:
        return gl.load(x, mask=mask, other=0.0)


# Holds: the states of one tile of T steps and its decays in registers, the state before every tile of EVERY steps in
# shared memory. Per EVERY steps: forth from the checkpoint, two tiles at a time, keeping the state before each; then
# the tiles from last to first, each forth once more, keeping all T states, and back through them.
# Reads: u, delta, B twice, z, C, dy once, the checkpoints. Writes: du, ddelta, dz; dB and dC once per program, which
# adds up its channels first: no atomics, the same bits each run.
@gluon.jit
def selective_scan_backward_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints, grad_y, grad_final_state,
    piece_adjoints, du, ddelta, dA, dBC, dD, dz, ddelta_bias, dinitial_state,
    L, channels, states, group_size, blocks_per_group, programs_per_group, batch_size,
    sequences, whole, head, piece_length,
    u_b, u_t, u_d, delta_b, delta_t, delta_d, z_b, z_t, z_d, grad_y_b, grad_y_t, grad_y_d,
    B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr, PACKED: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr, HAS_GRAD_FINAL_STATE: gl.constexpr, SPLIT: gl.constexpr,
    EVERY: gl.constexpr, OVERLAP: gl.constexpr, TIME_FIRST: gl.constexpr, MAPS_TIME_FIRST: gl.constexpr,
    AT_ONCE: gl.constexpr,
    T: gl.constexpr, G: gl.constexpr, K: gl.constexpr, c: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """One program: every programs_per_group-th block of channels of one group, for one piece of a sequence.

    dBC is (2, programs_per_group, Batch, L, groups, N), dB and dC, and every program fills its slice; dA is
    (pieces, D, N), dD and ddelta_bias (pieces, D). `sum_partials_kernel` adds up what comes from several programs.
    dA may lie where piece_adjoints does: what a program reads there first, it alone reads.
    """
    N: gl.constexpr = G * K
    DL: gl.constexpr = 32 * W // G
    CHANNELS: gl.constexpr = DL * c
    TILES: gl.constexpr = EVERY // T
    STATE: gl.constexpr = state_layout(G, K, c, W)
    CHANNEL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, STATE))
    MAP: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, STATE))
    LANES: gl.constexpr = tile_layout(T, G, CHANNELS, W, TIME_FIRST and AT_ONCE == 1)
    TILE: gl.constexpr = gl.SliceLayout(1, LANES)
    # On the way back u, delta and z come AT_ONCE tiles at a time. Where time is contiguous that is several, or 4 steps
    # would use 8 bytes of each 32 that memory sends; shared memory turns them around.
    FETCH: gl.constexpr = AT_ONCE * T
    FETCHED: gl.constexpr = gl.SliceLayout(1, tile_layout(FETCH, 1, CHANNELS, W, TIME_FIRST)) if AT_ONCE > 1 else TILE
    MAPS: gl.constexpr = map_layout(T, N, W, MAPS_TIME_FIRST)
    PAIR: gl.constexpr = 2 * T  # steps on the way forth between two waits of all warps for each other
    PAIR_TILE: gl.constexpr = gl.SliceLayout(1, tile_layout(PAIR, 1, CHANNELS, W, TIME_FIRST))
    PAIR_MAPS: gl.constexpr = map_layout(PAIR, N, W, MAPS_TIME_FIRST)
    SUMS: gl.constexpr = sum_layout(T, N, DL, W)
    SUM: gl.constexpr = gl.SliceLayout(2, SUMS)  # (2, T, N)
    SUMS_EARLY: gl.constexpr = G >= 32  # many blocks of channels a program: their sums come from far
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # Swizzled, so that what a warp writes at once goes to different banks of shared memory.
    FEW: gl.constexpr = max(1, 32 // G) * c  # channels of a warp
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(FEW, max(1, 32 // CHANNELS), min(G, CHANNELS // FEW), [2, 1, 0])
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(min(4, N), max(1, 32 // N), max(1, min(8, N // 4)), [3, 2, 1, 0])
    START: gl.constexpr = start_layout(G, K, c, W)

    if OVERLAP:
        let_next_kernel_start()
    groups = channels // group_size
    programs = programs_per_group * groups
    row = gl.program_id(0) // programs
    group = (gl.program_id(0) % programs // programs_per_group).to(gl.int64)
    program = gl.program_id(0) % programs_per_group
    sequence, batch, start, _stop, begin, end, number = piece_of(
        row, cu_seqlens, L, sequences, whole, None, head, piece_length, PACKED, SPLIT
    )
    length = gl.maximum(end - begin, 0).to(gl.int32)
    checkpoint = checkpoint_before(begin, sequence, start, L, EVERY, PACKED)
    tiles = gl.cdiv(length, T)
    chunks = gl.cdiv(length, EVERY)

    g = gl.arange(0, G, layout=gl.SliceLayout(1, MAP))
    k = gl.arange(0, K, layout=gl.SliceLayout(0, MAP))
    n = over_channels(g[:, None] * K + k[None, :])
    dl = gl.arange(0, DL, layout=gl.SliceLayout(1, CHANNEL))
    i = gl.arange(0, c, layout=gl.SliceLayout(0, CHANNEL))
    t = gl.arange(0, T, layout=gl.SliceLayout(1, TILE))
    t_fetched = gl.arange(0, FETCH, layout=gl.SliceLayout(1, FETCHED))
    t_map = gl.arange(0, T, layout=gl.SliceLayout(1, MAPS))
    n_map = gl.arange(0, N, layout=gl.SliceLayout(0, MAPS))
    mask_n = n_map < states
    t_pair = gl.arange(0, PAIR, layout=gl.SliceLayout(1, PAIR_TILE))
    t_pair_map = gl.arange(0, PAIR, layout=gl.SliceLayout(1, PAIR_MAPS))
    n_pair = gl.arange(0, N, layout=gl.SliceLayout(0, PAIR_MAPS))
    mask_n_pair = n_pair < states
    which = gl.arange(0, 2, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUM)))[:, None][:, :, None]
    t_sum = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUM)))[None, :][:, :, None]
    n_sum = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, SUM)))[None, :][:, None, :]

    u += batch * u_b + begin * u_t
    delta += batch * delta_b + begin * delta_t
    grad_y += batch * grad_y_b + begin * grad_y_t
    B += batch * B_b + group * B_g + begin * B_t
    C += batch * C_b + group * C_g + begin * C_t
    begin_of_gradients = (batch * L + begin) * channels  # those of u, delta and z are contiguous
    du += begin_of_gradients
    ddelta += begin_of_gradients
    if HAS_Z:
        z += batch * z_b + begin * z_t
        dz += begin_of_gradients
    step_stride = (groups * states).to(gl.int64)
    slice_size = step_stride * batch_size * L  # in this order: Batch * L alone may pass 2^31
    dBC += program * slice_size + (batch * L + begin) * step_stride + group * states
    B_pair_at = t_pair_map[:, None].to(gl.int64) * B_t + n_pair[None, :] * B_n
    B_at = t_map[:, None].to(gl.int64) * B_t + n_map[None, :] * B_n
    C_at = t_map[:, None].to(gl.int64) * C_t + n_map[None, :] * C_n
    sum_at = which * (programs_per_group * slice_size) + t_sum * step_stride + n_sum

    step_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    x_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    dy_shared = gl.allocate_shared_memory(gl.float32, [T, CHANNELS], PLAIN)
    B_shared = gl.allocate_shared_memory(gl.float32, [T, N], PLAIN)
    C_shared = gl.allocate_shared_memory(gl.float32, [T, N], PLAIN)
    starts = gl.allocate_shared_memory(gl.float32, [TILES, K, G, CHANNELS], CUBE)
    step_rows = step_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    x_rows = x_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    dy_rows = dy_shared._reinterpret(gl.float32, [T, DL, c], PLAIN)
    B_rows = B_shared._reinterpret(gl.float32, [T, G, K], PLAIN)
    C_rows = C_shared._reinterpret(gl.float32, [T, G, K], PLAIN)
    if AT_ONCE > 1:
        u_fetched = gl.allocate_shared_memory(u.dtype.element_ty, [FETCH, CHANNELS], PLAIN)
        delta_fetched = gl.allocate_shared_memory(delta.dtype.element_ty, [FETCH, CHANNELS], PLAIN)
        u_tiles = u_fetched._reinterpret(u.dtype.element_ty, [AT_ONCE, T, CHANNELS], PLAIN)
        delta_tiles = delta_fetched._reinterpret(delta.dtype.element_ty, [AT_ONCE, T, CHANNELS], PLAIN)
        if HAS_Z:
            z_fetched = gl.allocate_shared_memory(z.dtype.element_ty, [FETCH, CHANNELS], PLAIN)
            z_tiles = z_fetched._reinterpret(z.dtype.element_ty, [AT_ONCE, T, CHANNELS], PLAIN)

    for block in range(program, blocks_per_group, programs_per_group):
        # Where this thread's states and channels lie.
        first_channel = block * CHANNELS
        d = over_states(first_channel + dl[:, None] * c + i[None, :])
        mask_state = (n < states) & (d < group_size)
        d = d + group * group_size
        by_channel = d * states + n
        by_state = n.to(gl.int64) * channels + d
        A_tile = gl.load(A + by_channel, mask=mask_state, other=0.0) * LOG2_E

        # The adjoint that enters from behind: p = A_bar_{t+1} g_{t+1}.
        p = gl.zeros([G, K, DL, c], gl.float32, STATE)
        piece_at = row.to(gl.int64) * channels
        if SPLIT:
            if chunks == 0:
                p = from_behind(piece_adjoints + piece_at * states + by_channel, mask_state, OVERLAP)
        elif HAS_GRAD_FINAL_STATE:
            p = gl.load(grad_final_state + piece_at * states + by_channel, mask=mask_state, other=0.0)

        # Where the numbers of a tile lie, those that are fetched at once, and those of a pair of tiles.
        d = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, TILE))
        mask_d = d < group_size
        d = d + group * group_size
        d_fetched = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, FETCHED))
        mask_d_fetched = d_fetched < group_size
        d_fetched = d_fetched + group * group_size
        d_pair = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, PAIR_TILE))
        mask_d_pair = d_pair < group_size
        d_pair = d_pair + group * group_size
        u_pair_at = t_pair[:, None].to(gl.int64) * u_t + d_pair[None, :] * u_d
        delta_pair_at = t_pair[:, None].to(gl.int64) * delta_t + d_pair[None, :] * delta_d
        u_at = t_fetched[:, None].to(gl.int64) * u_t + d_fetched[None, :] * u_d
        delta_at = t_fetched[:, None].to(gl.int64) * delta_t + d_fetched[None, :] * delta_d
        grad_y_at = t[:, None].to(gl.int64) * grad_y_t + d[None, :] * grad_y_d
        gradient_at = t[:, None].to(gl.int64) * channels + d[None, :]
        if HAS_Z:
            z_at = t_fetched[:, None].to(gl.int64) * z_t + d_fetched[None, :] * z_d
        if HAS_D:
            D_row = gl.load(D + d, mask=mask_d, other=0.0)
            dD_sum = gl.zeros([T, CHANNELS], gl.float32, TILE)
        if HAS_BIAS:
            bias = gl.load(delta_bias + d, mask=mask_d, other=0.0)
            bias_pair = gl.load(delta_bias + d_pair, mask=mask_d_pair, other=0.0)
            dbias_sum = gl.zeros([T, CHANNELS], gl.float32, TILE)
        dA_sum = gl.zeros([G, K, DL, c], gl.float32, STATE)

        for j in range(chunks):
            chunk = chunks - 1 - j
            first = chunk * TILES
            count = gl.minimum(tiles - first, TILES)  # tiles of this chunk
            final = first + count - 1
            where = (checkpoint + chunk) * channels * states
            kept = mask_state & ((number > 0) | (chunk > 0))
            h = gl.load(checkpoints + where + by_state, mask=kept, other=0.0)
            if HAS_INITIAL_STATE:
                given = mask_state & (number == 0) & (chunk == 0)
                where = sequence * channels * states
                h += gl.load(initial_state + where + by_channel, mask=given, other=0.0)

            # What the way forth needs of the chunk's first pair of tiles, and the way back of its last tile.
            at = first.to(gl.int64) * T
            left = length - first * T
            mask_pair = (t_pair < left)[:, None] & mask_d_pair[None, :]
            mask_map_pair = (t_pair_map < left)[:, None] & mask_n_pair[None, :]
            u_forth = gl.load(u + at * u_t + u_pair_at, mask=mask_pair, other=0.0)
            delta_forth = gl.load(delta + at * delta_t + delta_pair_at, mask=mask_pair, other=0.0)
            B_forth = gl.load(B + at * B_t + B_pair_at, mask=mask_map_pair, other=0.0)
            at = final.to(gl.int64) * T
            left = length - final * T
            mask = (t < left)[:, None] & mask_d[None, :]
            mask_map = (t_map < left)[:, None] & mask_n[None, :]
            fetch = final // AT_ONCE
            at_fetch = fetch.to(gl.int64) * FETCH
            mask_fetch = (t_fetched < length - fetch * FETCH)[:, None] & mask_d_fetched[None, :]
            u_next = gl.load(u + at_fetch * u_t + u_at, mask=mask_fetch, other=0.0)
            delta_next = gl.load(delta + at_fetch * delta_t + delta_at, mask=mask_fetch, other=0.0)
            dy_next = gl.load(grad_y + at * grad_y_t + grad_y_at, mask=mask, other=0.0)
            B_next = gl.load(B + at * B_t + B_at, mask=mask_map, other=0.0)
            C_next = gl.load(C + at * C_t + C_at, mask=mask_map, other=0.0)
            if HAS_Z:
                z_next = gl.load(z + at_fetch * z_t + z_at, mask=mask_fetch, other=0.0)

            # Forth, keeping the state before each tile. What is allocated here and what the way back allocates for its
            # sums are never needed at once, and share their memory.
            step_pair = gl.allocate_shared_memory(gl.float32, [PAIR, CHANNELS], PLAIN)
            x_pair = gl.allocate_shared_memory(gl.float32, [PAIR, CHANNELS], PLAIN)
            B_pair = gl.allocate_shared_memory(gl.float32, [PAIR, N], PLAIN)
            step_pair_rows = step_pair._reinterpret(gl.float32, [PAIR, DL, c], PLAIN)
            x_pair_rows = x_pair._reinterpret(gl.float32, [PAIR, DL, c], PLAIN)
            B_pair_rows = B_pair._reinterpret(gl.float32, [PAIR, G, K], PLAIN)
            for pair in range(gl.cdiv(count, 2)):
                step = delta_forth.to(gl.float32)
                if HAS_BIAS:
                    step += bias_pair[None, :]
                if SOFTPLUS:
                    step = softplus(step)
                step = gl.where(mask_pair, step, 0.0)
                step_pair.store(step)
                x_pair.store(step * u_forth.to(gl.float32))
                B_pair.store(B_forth.to(gl.float32))

                next_tile = first + 2 * (pair + 1)
                at = next_tile.to(gl.int64) * T
                left = gl.minimum(length, (final + 1) * T) - next_tile * T
                mask_pair = (t_pair < left)[:, None] & mask_d_pair[None, :]
                mask_map_pair = (t_pair_map < left)[:, None] & mask_n_pair[None, :]
                u_forth = gl.load(u + at * u_t + u_pair_at, mask=mask_pair, other=0.0)
                delta_forth = gl.load(delta + at * delta_t + delta_pair_at, mask=mask_pair, other=0.0)
                B_forth = gl.load(B + at * B_t + B_pair_at, mask=mask_map_pair, other=0.0)

                for s in gl.static_range(PAIR):
                    if s % T == 0:
                        # (states, lanes, channels): what a thread writes at once are its neighbouring channels.
                        before = h.permute([1, 0, 2, 3]).reshape([K, G, CHANNELS])
                        starts.index(2 * pair + s // T).store(before)
                    step_s = over_states(step_pair_rows.index(s).load(CHANNEL))
                    x_s = over_states(x_pair_rows.index(s).load(CHANNEL))
                    B_s = over_channels(B_pair_rows.index(s).load(MAP))
                    h = gl.exp2(step_s * A_tile) * h + x_s * B_s

            if SPLIT:
                if j == 0:  # not before, since the way forth can start early
                    p = from_behind(piece_adjoints + piece_at * states + by_channel, mask_state, OVERLAP)

            for m in range(count):
                tile = final - m
                at = tile.to(gl.int64) * T
                mask_now = mask
                mask_sum = (t_sum < length - tile * T) & (n_sum < states)

                if AT_ONCE > 1:
                    turn = (m == 0) | (tile % AT_ONCE == AT_ONCE - 1)  # the first of those that came at once
                    if turn:
                        u_fetched.store(u_next)
                        delta_fetched.store(delta_next)
                        if HAS_Z:
                            z_fetched.store(z_next)
                    u_now = u_tiles.index(tile % AT_ONCE).load(TILE)
                    delta_now = delta_tiles.index(tile % AT_ONCE).load(TILE)
                    if HAS_Z:
                        z_now = z_tiles.index(tile % AT_ONCE).load(TILE)
                else:
                    u_now = u_next
                    delta_now = delta_next
                    if HAS_Z:
                        z_now = z_next

                # Discretise; the gate's own gradient needs y before the gate, and waits for it.
                u_tile = u_now.to(gl.float32)
                raw = delta_now.to(gl.float32)
                if HAS_BIAS:
                    raw += bias[None, :]
                step = raw
                if SOFTPLUS:
                    step = softplus(raw)
                step = gl.where(mask_now, step, 0.0)
                dy = dy_next.to(gl.float32)
                if HAS_Z:
                    z_tile = z_now.to(gl.float32)
                    gate = sigmoid(z_tile)
                    dgate = dy * gate * (1.0 + z_tile * (1.0 - gate))
                    dy *= z_tile * gate
                step_shared.store(step)
                x_shared.store(step * u_tile)
                dy_shared.store(dy)
                B_shared.store(B_next.to(gl.float32))
                C_shared.store(C_next.to(gl.float32))

                # The tile before sets off.
                more = m + 1 < count
                mask = (t < T)[:, None] & mask_d[None, :] & more
                mask_map = (t_map < T)[:, None] & mask_n[None, :] & more
                before = at - T
                if AT_ONCE > 1:
                    fetch = tile // AT_ONCE - 1
                    at_fetch = fetch.to(gl.int64) * FETCH
                    mask_fetch = (t_fetched < FETCH)[:, None] & mask_d_fetched[None, :]
                    mask_fetch &= turn & (fetch * AT_ONCE >= first)
                else:
                    at_fetch = before
                    mask_fetch = mask
                u_next = fetched(u + at_fetch * u_t + u_at, mask_fetch, u_next, AT_ONCE)
                delta_next = fetched(delta + at_fetch * delta_t + delta_at, mask_fetch, delta_next, AT_ONCE)
                dy_next = gl.load(grad_y + before * grad_y_t + grad_y_at, mask=mask, other=0.0)
                B_next = gl.load(B + before * B_t + B_at, mask=mask_map, other=0.0)
                C_next = gl.load(C + before * C_t + C_at, mask=mask_map, other=0.0)
                if HAS_Z:
                    z_next = fetched(z + at_fetch * z_t + z_at, mask_fetch, z_next, AT_ONCE)
                if SUMS_EARLY:
                    earlier = gl.load(
                        dBC + at * step_stride + sum_at, mask=mask_sum & (block != program), other=0.0
                    )  # fmt: skip

                # Forward through the tile, keeping every state and decay.
                h = starts.index(tile - first).load(START).reshape([K, G, DL, c]).permute([1, 0, 2, 3])
                h = gl.convert_layout(h, STATE)
                decays = ()
                hs = (h,)
                out_parts = ()
                for s in gl.static_range(T):
                    step_s = over_states(step_rows.index(s).load(CHANNEL))
                    x_s = over_states(x_rows.index(s).load(CHANNEL))
                    B_s = over_channels(B_rows.index(s).load(MAP))
                    A_bar = gl.exp2(step_s * A_tile)
                    h = A_bar * h + x_s * B_s
                    decays = decays + (A_bar,)
                    hs = hs + (h,)
                    if HAS_Z:
                        C_s = over_channels(C_rows.index(s).load(MAP))
                        out_parts = out_parts + (gl.sum(h * C_s, axis=1),)

                # Backward: g_t = C_t dy_t + p, p = A_bar_t g_t (chapter 09). p h_{t-1} feeds dΔ and dA.
                A_parts, B_parts, dB_parts, dC_parts = (), (), (), ()  # tuples: registers have no index
                for back in gl.static_range(T):
                    step_s = over_states(step_rows.index(T - 1 - back).load(CHANNEL))
                    x_s = over_states(x_rows.index(T - 1 - back).load(CHANNEL))
                    dy_s = over_states(dy_rows.index(T - 1 - back).load(CHANNEL))
                    B_s = over_channels(B_rows.index(T - 1 - back).load(MAP))
                    C_s = over_channels(C_rows.index(T - 1 - back).load(MAP))
                    g_s = dy_s * C_s + p
                    p = decays[T - 1 - back] * g_s
                    p_h = p * hs[T - 1 - back]
                    dA_sum += p_h * step_s
                    A_parts = (gl.sum(p_h * A_tile, axis=1),) + A_parts
                    B_parts = (gl.sum(g_s * B_s, axis=1),) + B_parts
                    dB_parts = (gl.sum(g_s * x_s, axis=3),) + dB_parts
                    dC_parts = (gl.sum(hs[T - back] * dy_s, axis=3),) + dC_parts

                # Sums over the G threads of a channel, and over this program's channels for dB and dC.
                through_A_lanes = gl.allocate_shared_memory(gl.float32, [T, G, CHANNELS], CUBE)
                through_B_lanes = gl.allocate_shared_memory(gl.float32, [T, G, CHANNELS], CUBE)
                out_lanes = gl.allocate_shared_memory(gl.float32, [T, G, CHANNELS], CUBE)
                dBC_channels = gl.allocate_shared_memory(gl.float32, [2, T, DL, N], ROWS)
                through_A_lanes.store(by_lane(A_parts, T, G, CHANNELS))
                through_B_lanes.store(by_lane(B_parts, T, G, CHANNELS))
                if HAS_Z:
                    out_lanes.store(by_lane(out_parts, T, G, CHANNELS))
                maps = gl.join(stack(dB_parts, T), stack(dC_parts, T)).reshape([N, DL, T, 2])
                dBC_channels.store(maps.permute([3, 2, 1, 0]))
                through_A = gl.sum(through_A_lanes.load(LANES), axis=1)
                through_B = gl.sum(through_B_lanes.load(LANES), axis=1)
                if HAS_Z:
                    out = gl.sum(out_lanes.load(LANES), axis=1)
                    if HAS_D:
                        out += D_row[None, :] * u_tile
                    gl.store(dz + at * channels + gradient_at, (dgate * out).to(dz.dtype.element_ty), mask=mask_now)
                du_tile = through_B * step
                ddelta_tile = through_A * LN_2 + through_B * u_tile  # A_tile is A log2(e)
                if HAS_D:
                    du_tile += D_row[None, :] * dy
                    dD_sum += dy * u_tile
                if SOFTPLUS:
                    ddelta_tile *= sigmoid(raw)
                if HAS_BIAS:
                    dbias_sum += gl.where(mask_now, ddelta_tile, 0.0)
                gl.store(du + at * channels + gradient_at, du_tile.to(du.dtype.element_ty), mask=mask_now)
                gl.store(
                    ddelta + at * channels + gradient_at, ddelta_tile.to(ddelta.dtype.element_ty), mask=mask_now
                )  # fmt: skip

                sums = gl.sum(dBC_channels.load(SUMS), axis=2)
                at_sum = dBC + at * step_stride + sum_at
                # This program's first block of channels writes, the others add.
                if not SUMS_EARLY:
                    earlier = gl.load(at_sum, mask=mask_sum & (block != program), other=0.0)
                gl.store(at_sum, sums + earlier, mask=mask_sum)

        gl.store(dA + piece_at * states + by_channel, dA_sum, mask=mask_state)
        if HAS_D:
            gl.store(dD + piece_at + d, gl.sum(dD_sum, axis=0), mask=mask_d)
        if HAS_BIAS:
            gl.store(ddelta_bias + piece_at + d, gl.sum(dbias_sum, axis=0), mask=mask_d)
        if HAS_INITIAL_STATE:
            where = sequence * channels * states
            gl.store(dinitial_state + where + by_channel, p, mask=mask_state & (number == 0))
        barrier()  # the next block reads sums that other threads of this program wrote


# Holds: BLOCK sums. Reads the partial sums once, writes the sums: dB, dC of the programs that shared the channels, dA,
# dD and ddelta_bias of the pieces.
@gluon.jit
def sum_partials_kernel(
    part_dBC, part_dA, part_dD, part_dbias, dB, dC, dA, dD, dbias,
    programs, pieces, B_size, C_size, A_size, D_size, bias_size,
    HAS_D: gl.constexpr, HAS_BIAS: gl.constexpr, OVERLAP: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK numbers of one of the five gradients, always added in the same order."""
    if OVERLAP:
        wait_for_kernel_before()
    block = gl.program_id(0).to(gl.int64)
    B_blocks = gl.cdiv(B_size, BLOCK)
    C_blocks = gl.cdiv(C_size, BLOCK)
    A_blocks = gl.cdiv(A_size, BLOCK)
    D_blocks = gl.cdiv(D_size, BLOCK)
    if block < B_blocks:
        sum_rows(part_dBC, dB, programs, block, B_size, BLOCK)
    elif block < B_blocks + C_blocks:
        sum_rows(part_dBC + gl.to_tensor(programs).to(gl.int64) * B_size, dC, programs, block - B_blocks, C_size, BLOCK)
    elif block < B_blocks + C_blocks + A_blocks:
        sum_rows(part_dA, dA, pieces, block - B_blocks - C_blocks, A_size, BLOCK)
    else:
        block -= B_blocks + C_blocks + A_blocks
        if HAS_D:
            if block < D_blocks:
                sum_rows(part_dD, dD, pieces, block, D_size, BLOCK)
        if HAS_BIAS:
            if block >= D_blocks:
                sum_rows(part_dbias, dbias, pieces, block - D_blocks, bias_size, BLOCK)


@gluon.jit
def sum_rows(part, out, rows, block, size, BLOCK: gl.constexpr):
    i = block * BLOCK + gl.arange(0, BLOCK, layout=gl.BlockedLayout([4], [32], [4], [0]))
    total = gl.zeros([BLOCK], gl.float32, gl.BlockedLayout([4], [32], [4], [0]))
    for row in range(0, rows, 4):  # four at a time on their way
        numbers = ()
        for ahead in gl.static_range(4):
            where = gl.to_tensor(row + ahead).to(gl.int64) * size + i
            numbers = numbers + (gl.load(part + where, mask=(i < size) & (row + ahead < rows), other=0.0),)
        for ahead in gl.static_range(4):
            total += numbers[ahead]
    gl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)
