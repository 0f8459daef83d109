"""Problem set 4: fused kernels. 84 automatic points."""

from submissions import Submission

DISCRETISE = """
@triton.jit
def discretise_kernel(delta, a, a_bar, L, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < L
    step = tl.load(delta + t, mask=mask, other=0.0)
    tl.store(a_bar + t, tl.exp(step * a), mask=mask)
"""

CARRY = """
@triton.jit
def scan_kernel(a, b, start, h, last, L, BLOCK: tl.constexpr):
    carry = tl.load(start)
    for first in range(0, L, BLOCK):
        t = first + tl.arange(0, BLOCK)
        mask = t < L
        a_block = tl.load(a + t, mask=mask, other=1.0)
        b_block = tl.load(b + t, mask=mask, other=0.0)
        decay, local = tl.associative_scan((a_block, b_block), 0, combine)
        h_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, h_block, 0.0))
        tl.store(h + t, h_block, mask=mask)
    tl.store(last, carry)
"""

FUSED = """
@triton.jit
def selective_kernel(u, delta, A, B, C, D, y, L, channels, N, BLOCK_N: tl.constexpr):
    d = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    mask = n < N
    A_row = tl.load(A + d * N + n, mask=mask, other=0.0)
    skip = tl.load(D + d)
    h = tl.zeros((BLOCK_N,), tl.float32)
    for t in range(L):
        u_t = tl.load(u + t * channels + d)
        delta_t = tl.load(delta + t * channels + d)
        B_t = tl.load(B + t * N + n, mask=mask, other=0.0)
        C_t = tl.load(C + t * N + n, mask=mask, other=0.0)
        h = tl.exp(delta_t * A_row) * h + delta_t * u_t * B_t
        tl.store(y + t * channels + d, tl.sum(C_t * h) + skip * u_t)
"""

ADJOINT = """
@triton.jit
def adjoint_kernel(a, w, g, L, BLOCK: tl.constexpr):
    carry = tl.full((), 0.0, tl.float32)
    blocks = tl.cdiv(L, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        mask = t < L
        a_next = tl.load(a + t + 1, mask=t + 1 < L, other=1.0)
        w_block = tl.load(w + t, mask=mask, other=0.0)
        decay, local = tl.associative_scan((a_next, w_block), 0, combine, reverse=True)
        g_block = decay * carry + local
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, g_block, 0.0))
        tl.store(g + t, g_block, mask=mask)
"""


def changed(source, *pairs):
    """`source` with each `old`, which must occur once, replaced by its `new`."""
    for old, new in pairs:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


SUBMISSIONS = [
    Submission(
        "the states are not read again",
        {
            "bill": """
def bytes_moved(batch, length, channels, states, element_size):
    narrow, maps = batch * length * channels * element_size, batch * length * states * element_size
    return 3 * narrow + 2 * maps + 5 * narrow * states, 3 * narrow + 2 * maps
"""
        },
        loses=("bill-stored",),
        points=80,
    ),
    Submission(
        "numbers for bytes",
        {
            "bill": """
in_bytes = bytes_moved
bytes_moved = lambda *sizes: in_bytes(*sizes[:4], 1)
"""
        },
        loses=("bill-size",),
        points=82,
    ),
    Submission(
        "every program has the first block",
        {"discretise": changed(DISCRETISE, ("tl.program_id(0) * BLOCK + ", ""))},
        loses=("discretise-many",),
        points=80,
    ),
    Submission(
        "no mask at the tail",
        {"discretise": changed(DISCRETISE, ("tl.exp(step * a), mask=mask", "tl.exp(step * a)"))},
        loses=("discretise-tail",),
        points=79,
    ),
    Submission(
        "the carry is reset",
        {"carry": changed(CARRY, ("decay * carry + local", "decay * tl.load(start) + local"))},
        loses=("carry-carry",),
        points=79,
    ),
    Submission(
        "the carry does not decay inside a block",
        {"carry": changed(CARRY, ("decay * carry + local", "carry + local"))},
        loses=("carry-start", "carry-carry"),
        points=75,
    ),
    Submission(
        "the initial state is ignored",
        {"carry": changed(CARRY, ("carry = tl.load(start)", "carry = tl.full((), 0.0, tl.float32)"))},
        loses=("carry-start",),
        points=80,
    ),
    Submission(
        "padded with zeros",
        {"carry": changed(CARRY, ("other=1.0", "other=0.0"))},
        loses=("carry-last",),
        points=80,
    ),
    Submission(
        "reads beyond the end",
        {"carry": changed(CARRY, ("a + t, mask=mask, other=1.0", "a + t"), ("b + t, mask=mask, other=0.0", "b + t"))},
        loses=("carry-last",),
        points=80,
    ),
    Submission(
        "states written beyond the end",
        {"carry": changed(CARRY, ("h_block, mask=mask", "h_block"))},
        loses=("carry-tail",),
        points=80,
    ),
    Submission(
        "skip lost",
        {"fused": changed(FUSED, (" + skip * u_t", ""))},
        loses=("fused-skip",),
        points=81,
    ),
    Submission(
        "no Δ at the input",
        {"fused": changed(FUSED, ("delta_t * u_t * B_t", "u_t * B_t"))},
        loses=("fused-step",),
        points=79,
    ),
    Submission(
        "the state is forgotten",
        {"fused": changed(FUSED, ("tl.exp(delta_t * A_row) * h + ", ""))},
        loses=("fused-decay",),
        points=79,
    ),
    Submission(
        "states that do not exist",
        {
            "fused": changed(
                FUSED,
                ("A + d * N + n, mask=mask, other=0.0", "A + d * N + n"),
                ("B + t * N + n, mask=mask, other=0.0", "B + t * N + n"),
                ("C + t * N + n, mask=mask, other=0.0", "C + t * N + n"),
            )
        },
        loses=("fused-padding",),
        points=79,
    ),
    Submission(
        "one row of A for all channels",
        {"fused": changed(FUSED, ("A + d * N + n", "A + n"))},
        loses=("fused-channels",),
        points=80,
    ),
    Submission(
        "the last step is not stored",
        {"fused": changed(FUSED, ("tl.sum(C_t * h) + skip * u_t)", "tl.sum(C_t * h) + skip * u_t, mask=t < L - 1)"))},
        loses=("fused-step", "fused-decay", "fused-skip", "fused-bounds"),
        points=68,
    ),
    Submission(
        "a_t in place of the next one",
        {"adjoint": changed(ADJOINT, ("a + t + 1, mask=t + 1 < L", "a + t, mask=t < L"))},
        loses=("adjoint-block",),
        points=80,
    ),
    Submission(
        "reads the coefficient after the last",
        {"adjoint": changed(ADJOINT, ("mask=t + 1 < L", "mask=t < L"))},
        loses=("adjoint-end",),
        points=81,
    ),
    Submission(
        "the carry from the wrong end of a block",
        {"adjoint": changed(ADJOINT, ("tl.arange(0, BLOCK) == 0", "tl.arange(0, BLOCK) == BLOCK - 1"))},
        loses=("adjoint-carry",),
        points=80,
    ),
    Submission(
        "gradients written beyond the end",
        {"adjoint": changed(ADJOINT, ("g_block, mask=mask", "g_block"))},
        loses=("adjoint-tail",),
        points=81,
    ),
    Submission(
        "y is not written",
        {
            "bill": """
def bytes_moved(batch, length, channels, states, element_size):
    steps = batch * length * element_size
    return steps * (6 * channels * states + 3 * channels + 2 * states), steps * (2 * channels + 2 * states)
"""
        },
        loses=("bill-fused",),
        points=80,
    ),
    Submission(
        "the wrong sign of a",
        {"discretise": changed(DISCRETISE, ("tl.exp(step * a)", "tl.exp(-step * a)"))},
        loses=("discretise-one", "discretise-many"),
        points=76,
    ),
    Submission(
        "running sums: a is not used",
        {"carry": changed(CARRY, ("a_block = tl.load(a + t, mask=mask, other=1.0)", "a_block = 1.0 + 0.0 * t"))},
        loses=("carry-block", "carry-start", "carry-carry"),
        points=70,
    ),
]

# Right answers in another style; each must get all points.
RIGHT = {
    "bill": """
def bytes_moved(batch, length, channels, states, element_size):
    steps = batch * length * element_size
    return steps * (6 * channels * states + 3 * channels + 2 * states), steps * (3 * channels + 2 * states)
""",
    "discretise": """
@triton.jit
def discretise_kernel(delta, a, a_bar, L, BLOCK: tl.constexpr):
    first = tl.program_id(axis=0) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    x = tl.load(delta + offsets, mask=offsets < L)
    tl.store(a_bar + offsets, tl.exp2(x * a * 1.4426950408889634), mask=offsets < L)
""",
    "carry": """
@triton.jit
def scan_kernel(a, b, start, h, last, L, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    state = tl.load(start)
    for block in range(tl.cdiv(L, BLOCK)):
        t = block * BLOCK + offsets
        a_block = tl.load(a + t, mask=t < L, other=0.0)
        b_block = tl.load(b + t, mask=t < L, other=0.0)
        b_block += tl.where(offsets == 0, a_block * state, 0.0)  # the state enters with the first step
        _, states = tl.associative_scan((a_block, b_block), 0, combine)
        tl.store(h + t, states, mask=t < L)
        final = min(L - block * BLOCK, BLOCK) - 1
        state = tl.sum(tl.where(offsets == final, states, 0.0))
    tl.store(last, state)
""",
    "fused": """
@triton.jit
def selective_kernel(u, delta, A, B, C, D, y, L, channels, N, BLOCK_N: tl.constexpr):
    channel = tl.program_id(0)
    states = tl.arange(0, BLOCK_N)
    exists = states < N
    a = tl.load(A + channel * N + states, mask=exists, other=float("-inf"))
    h = tl.full((BLOCK_N,), 0.0, tl.float32)
    at, maps = channel, 0
    for _ in range(L):
        step, x = tl.load(delta + at), tl.load(u + at)
        h = h * tl.exp(a * step)
        h += step * x * tl.load(B + maps + states, mask=exists, other=0.0)
        out = tl.sum(tl.where(exists, h * tl.load(C + maps + states, mask=exists, other=0.0), 0.0), axis=0)
        tl.store(y + at, out + tl.load(D + channel) * x)
        at += channels
        maps += N
""",
    "adjoint": """
@triton.jit
def adjoint_kernel(a, w, g, L, BLOCK: tl.constexpr):
    after = 0.0
    for i in range(tl.cdiv(L, BLOCK)):
        t = (tl.cdiv(L, BLOCK) - i) * BLOCK - 1 - tl.arange(0, BLOCK)  # downwards, so that no reverse is needed
        coefficient = tl.load(a + t + 1, mask=t < L - 1, other=0.0)
        direct = tl.load(w + t, mask=t < L, other=0.0)
        direct += tl.where(tl.arange(0, BLOCK) == 0, coefficient * after, 0.0)
        _, total = tl.associative_scan((coefficient, direct), 0, combine)
        tl.store(g + t, total, mask=t < L)
        after = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, total, 0.0))
""",
}
