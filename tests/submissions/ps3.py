"""Problem set 3: the parallel scan and its gradient. 85 automatic points."""

from submissions import Submission

CHUNKS = """
def scan_in_chunks(scan_pairs, a, b, h0, size):
    states = []
    for start in range(0, len(a), size):
        products, local = scan_pairs(a[start : start + size], b[start : start + size])
        states.append(products * h0 + local)
        h0 = states[-1][-1]
    return torch.cat(states)
"""

SELECTIVE = """
def selective_backward(g, before, u, delta, A, B):
    through_exponent = g * before * torch.exp(delta[..., None] * A)
    through_product = (g * B[:, None]).sum(-1)
    ddelta = (through_exponent * A).sum(-1) + through_product * u
    dA = (through_exponent * delta[..., None]).sum(0)
    dB = (g * (delta * u)[..., None]).sum(1)
    return through_product * delta, ddelta, dA, dB
"""


def changed(source, old, new):
    """`source` with `old`, which must occur once, replaced by `new`."""
    assert source.count(old) == 1, old
    return source.replace(old, new)


SUBMISSIONS = [
    Submission(
        "first right, then left",
        {
            "join": """
right_order = join
join = lambda left, right: right_order(right, left)
"""
        },
        loses=("join-M", "join-b"),
        points=75,
    ),
    Submission(
        "the left's vector is not mapped on",
        {"join": "join = lambda left, right: (right[0] @ left[0], left[1] + right[1])"},
        loses=("join-b",),
        points=80,
    ),
    Submission(
        "zeros for the identity",
        {"join": "identity = lambda N: (torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64))"},
        loses=("join-identity",),
        points=83,
    ),
    Submission(
        "operands swapped in the scan",
        {
            "rounds": """
in_order = scan
scan = lambda operator, elements: in_order(lambda left, right: operator(right, left), elements)
"""
        },
        loses=("scan-order",),
        points=80,
    ),
    Submission(
        "a loop",
        {
            "rounds": """
def scan(operator, elements):
    done = [tuple(x[:1] for x in elements)]
    for t in range(1, len(elements[0])):
        done.append(operator(done[-1], tuple(x[t : t + 1] for x in elements)))
    return tuple(torch.cat(xs) for xs in zip(*done))
"""
        },
        loses=("scan-rounds",),
        points=80,
    ),
    Submission(
        "overwrites the elements",
        {
            "rounds": """
def scan(operator, elements):
    reach = 1
    while reach < len(elements[0]):
        joined = operator(tuple(x[:-reach] for x in elements), tuple(x[reach:] for x in elements))
        for x, y in zip(elements, joined):
            x[reach:] = y
        reach *= 2
    return elements
"""
        },
        loses=("scan-intact",),
        points=83,
    ),
    Submission(
        "the number of rounds rounded down",
        {
            "rounds": """
def scan(operator, elements):
    for k in range(len(elements[0]).bit_length() - 1):
        r = 2**k
        joined = operator(tuple(x[:-r] for x in elements), tuple(x[r:] for x in elements))
        elements = tuple(torch.cat([x[:r], y]) for x, y in zip(elements, joined))
    return elements
"""
        },
        loses=("scan-lengths", "scan-rounds"),
        points=76,
    ),
    Submission(
        "exclusive for inclusive",
        {
            "rounds": """
inclusive_scan = scan


def scan(operator, elements):
    return tuple(torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in inclusive_scan(operator, elements))
"""
        },
        loses=("scan-sums", "scan-lengths", "scan-order"),
        points=71,
    ),
    Submission(
        "hands in the library's scan",
        {"rounds": "from minimamba.parallel_scan import hillis_steele as scan"},
        loses=("scan-sums", "scan-lengths", "scan-order", "scan-rounds", "scan-intact"),
        points=64,
    ),
    Submission(
        "the carry is reset",
        {"chunks": changed(CHUNKS, "        h0 = states[-1][-1]\n", "")},
        loses=("chunk-second", "chunk-many"),
        points=76,
    ),
    Submission(
        "the carry does not decay inside a chunk",
        {"chunks": changed(CHUNKS, "products * h0", "h0")},
        loses=("chunk-start", "chunk-second", "chunk-many"),
        points=72,
    ),
    Submission(
        "the carry knows the previous chunk only",
        {"chunks": changed(CHUNKS, "states[-1][-1]", "local[-1]")},
        loses=("chunk-many",),
        points=81,
    ),
    Submission(
        "the rest that fills no chunk is dropped",
        {"chunks": changed(CHUNKS, "range(0, len(a), size)", "range(0, len(a) - size + 1, size)")},
        loses=("chunk-ragged",),
        points=82,
    ),
    Submission(
        "a_t in place of the next one",
        {
            "adjoint": """
def adjoint(a, w):
    g = [w[-1]]
    for t in range(len(a) - 2, -1, -1):
        g.append(w[t] + a[t] * g[-1])
    return torch.stack(g[::-1])
"""
        },
        loses=("adjoint-shift",),
        points=79,
    ),
    Submission(
        "h_t in place of the state before",
        {"adjoint": "gradients = lambda a, h, h0, g: (g * h, g, a[0] * g[0])"},
        loses=("gradient-a",),
        points=80,
    ),
    Submission(
        "the gradient by h₀ is g₁",
        {"adjoint": "gradients = lambda a, h, h0, g: (g * torch.cat([h0[None], h[:-1]]), g, g[0])"},
        loses=("gradient-h0",),
        points=81,
    ),
    Submission(
        "half of dΔ is missing",
        {"selective": changed(SELECTIVE, "(through_exponent * A).sum(-1) + through_product", "through_product")},
        loses=("selective-delta-decay",),
        points=82,
    ),
    Submission(
        "the other half of dΔ is missing",
        {"selective": changed(SELECTIVE, " + through_product * u", "")},
        loses=("selective-delta-input",),
        points=82,
    ),
    Submission(
        "the derivative of exp is lost",
        {"selective": changed(SELECTIVE, " * torch.exp(delta[..., None] * A)", "")},
        loses=("selective-delta-decay", "selective-A"),
        points=78,
    ),
    Submission(
        "dB is not summed over the channels",
        {"selective": changed(SELECTIVE, "(delta * u)[..., None]).sum(1)", "(delta * u)[..., None])")},
        loses=("selective-B",),
        points=82,
    ),
    Submission(
        "nothing at the last step",
        {
            "adjoint": """
def adjoint(a, w):
    g = torch.zeros_like(w)
    for t in range(len(a) - 2, -1, -1):
        g[t] = w[t] + a[t + 1] * g[t + 1]
    return g
"""
        },
        loses=("adjoint-last", "adjoint-shift"),
        points=76,
    ),
    Submission(
        "a in the gradient by b",
        {"adjoint": "gradients = lambda a, h, h0, g: (g * torch.cat([h0[None], h[:-1]]), a * g, a[0] * g[0])"},
        loses=("gradient-b",),
        points=83,
    ),
    Submission(
        "no Δ in the gradient by u",
        {"selective": changed(SELECTIVE, "through_product * delta", "through_product")},
        loses=("selective-u",),
        points=82,
    ),
]

# Right answers in another style; each must get all points.
RIGHT = {
    "join": """
def join(left, right):
    (M1, b1), (M2, b2) = left, right
    return torch.matmul(M2, M1), torch.einsum("...ij,...j->...i", M2, b1) + b2


def identity(N, dtype=torch.float64):
    return torch.diag(torch.ones(N, dtype=dtype)), torch.zeros(N).to(dtype)
""",
    "rounds": """
def scan(operator, elements):
    result = [x.clone() for x in elements]
    r = 1
    while r < len(result[0]):
        late = operator(tuple(x[:-r].clone() for x in result), tuple(x[r:].clone() for x in result))
        for x, y in zip(result, late):
            x[r:] = y
        r = r << 1
    return tuple(result)
""",
    "chunks": """
def scan_in_chunks(scan_pairs, a, b, h0, size):
    out = torch.empty_like(b)
    t, h = 0, h0
    while t < len(a):
        P, Q = scan_pairs(a[t : t + size], b[t : t + size])
        out[t : t + size] = P * h + Q
        t = min(t + size, len(a))
        h = out[t - 1]
    return out
""",
    "adjoint": """
def adjoint(a, w):
    g = w.clone()
    for t in reversed(range(len(a) - 1)):
        g[t] += a[t + 1] * g[t + 1]
    return g


def gradients(a, h, h0, g):
    da = g.clone()
    da[0] *= h0
    da[1:] *= h[:-1]
    return da, g.clone(), g[0] * a[0]
""",
    "selective": """
def selective_backward(g, before, u, delta, A, B):
    decay = torch.exp(torch.einsum("ld,dn->ldn", delta, A))
    ddelta = torch.einsum("ldn,ldn,ldn,dn->ld", g, before, decay, A) + torch.einsum("ldn,ln->ld", g, B) * u
    du = torch.einsum("ldn,ln,ld->ld", g, B, delta)
    dA = torch.einsum("ldn,ldn,ldn,ld->dn", g, before, decay, delta)
    return du, ddelta, dA, torch.einsum("ldn,ld,ld->ln", g, delta, u)
""",
}
