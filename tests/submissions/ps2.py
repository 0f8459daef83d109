"""Problem set 2: selection and the sequential scan. 76 automatic points."""

from submissions import Submission

SCAN = """
def scan(u, delta, A, B, C, D, h0):
    y, h = [], h0
    for t in range(u.shape[1]):
        u_t, delta_t, B_t, C_t = (x[:, t].to(A.dtype) for x in (u, delta, B, C))
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
        y.append(((h * C_t[:, None]).sum(-1) + D * u_t).to(u.dtype))
    return torch.stack(y, dim=1), h
"""

MATRIX = """
def hidden_matrix(delta, A, B, C):
    time = torch.cumsum(delta, dim=0)
    between = (time[:, None] - time).clamp(min=0)
    return torch.einsum("tn,tsn,sn,s->ts", C, torch.exp(between[..., None] * A), B, delta).tril()
"""


def changed(source, old, new):
    """`source` with `old`, which must occur once, replaced by `new`."""
    assert source.count(old) == 1, old
    return source.replace(old, new)


SUBMISSIONS = [
    Submission(
        "no softplus",
        {"select": "select = lambda u, W_delta, b, W_B, W_C: (u @ W_delta.T + b, u @ W_B.T, u @ W_C.T)"},
        loses=("select-delta",),
        points=70,
    ),
    Submission(
        "bias outside the softplus",
        {
            "select": """
def select(u, W_delta, b, W_B, W_C):
    return torch.nn.functional.softplus(u @ W_delta.T) + b, u @ W_B.T, u @ W_C.T
"""
        },
        loses=("select-delta",),
        points=70,
    ),
    Submission(
        "softplus on B and C as well",
        {
            "select": """
def select(u, W_delta, b, W_B, W_C):
    return [torch.nn.functional.softplus(x) for x in (u @ W_delta.T + b, u @ W_B.T, u @ W_C.T)]
"""
        },
        loses=("select-BC",),
        points=72,
    ),
    Submission(
        "inverse softplus that overflows",
        {"bias": "bias_for = lambda delta: torch.log(torch.expm1(delta))"},
        loses=("bias-extreme",),
        points=72,
    ),
    Submission(
        "A with the wrong sign",
        {"scan": changed(SCAN, "torch.exp(delta_t", "torch.exp(-delta_t")},
        loses=("scan-decay", "scan-all"),
        points=69,
    ),
    Submission(
        "exact hold in place of ΔB",
        {
            "scan": changed(
                SCAN,
                "(delta_t * u_t)[..., None] * B_t",
                "torch.where(A == 0, delta_t[..., None], torch.expm1(delta_t[..., None] * A) / A) "
                "* u_t[..., None] * B_t",
            )
        },
        loses=("scan-input", "scan-all"),
        points=69,
    ),
    Submission(
        "y from the state before the step",
        {
            "scan": """
def scan(u, delta, A, B, C, D, h0):
    y, h = [], h0
    for t in range(u.shape[1]):
        u_t, delta_t, B_t, C_t = (x[:, t].to(A.dtype) for x in (u, delta, B, C))
        y.append(((h * C_t[:, None]).sum(-1) + D * u_t).to(u.dtype))
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
    return torch.stack(y, dim=1), h
"""
        },
        loses=("scan-output", "scan-all"),
        points=69,
    ),
    Submission(
        "skip lost",
        {"scan": changed(SCAN, " + D * u_t", "")},
        loses=("scan-skip", "scan-all"),
        points=71,
    ),
    Submission(
        "state in half precision",
        {
            "scan": changed(SCAN, "y, h = [], h0", "y, h = [], h0.to(u.dtype)").replace(
                "B_t[:, None]\n", "B_t[:, None]\n        h = h.to(u.dtype)\n"
            )
        },
        loses=("scan-precision",),
        points=73,
    ),
    Submission(
        "B of the step before",
        {
            "scan": changed(
                SCAN,
                "y, h = [], h0",
                "y, h = [], h0\n    B = torch.cat([torch.zeros_like(B[:, :1]), B[:, :-1]], dim=1)",
            )
        },
        loses=("scan-input", "scan-time", "scan-all"),
        points=64,
    ),
    Submission(
        "one Δ for all channels",
        {"scan": changed(SCAN, "y, h = [], h0", "y, h, delta = [], h0, delta[..., :1].expand_as(delta)")},
        loses=("scan-decay", "scan-input", "scan-all"),
        points=64,
    ),
    Submission(
        "overwrites h₀",
        {
            "scan": changed(
                SCAN,
                "        h = torch.exp(delta_t[..., None] * A) * h + ",
                "        h *= torch.exp(delta_t[..., None] * A)\n        h += ",
            )
        },
        loses=("scan-all",),
        points=74,
    ),
    Submission(
        "calls the library's scan",
        {
            "scan": """
from minimamba import selective_scan


def scan(u, delta, A, B, C, D, h0):
    return selective_scan(u, delta, A, B, C, D, initial_state=h0, return_final_state=True)
"""
        },
        loses=("scan-decay", "scan-input", "scan-output", "scan-skip", "scan-time", "scan-precision", "scan-all"),
        points=48,
    ),
    Submission(
        "each document goes on from the one before",
        {
            "packed": """
def scan_packed(scan, u, delta, A, B, C, D, borders):
    y, states, h = [], [], torch.zeros(1, *A.shape, dtype=A.dtype)
    for start, stop in zip(borders, borders[1:]):
        if start < stop:
            part = slice(start, stop)
            piece, h = scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], D, h)
            y.append(piece)
        states.append(h)
    return torch.cat(y, dim=1), torch.cat(states)
"""
        },
        loses=("packed-y", "packed-states", "packed-empty"),
        points=64,
    ),
    Submission(
        "no state for an empty document",
        {
            "packed": """
with_all = scan_packed


def scan_packed(scan, u, delta, A, B, C, D, borders):
    return with_all(scan, u, delta, A, B, C, D, sorted(set(borders)))
"""
        },
        loses=("packed-empty",),
        points=73,
    ),
    Submission(
        "later inputs reach earlier outputs",
        {"matrix": changed(MATRIX, ".tril()", "")},
        loses=("matrix-future",),
        points=73,
    ),
    Submission(
        "Δ of the output's step weighs the input",
        {"matrix": changed(MATRIX, "sn,s->ts", "sn,t->ts")},
        loses=("matrix-decay",),
        points=71,
    ),
    Submission(
        "the new input has decayed already",
        {"matrix": changed(MATRIX, ".clamp(min=0)", ".clamp(min=0) + delta")},
        loses=("matrix-diagonal",),
        points=71,
    ),
    Submission(
        "exp(x) / exp(y)",
        {
            "matrix": """
def hidden_matrix(delta, A, B, C):
    decay = torch.exp(torch.cumsum(delta, dim=0)[:, None] * A)
    return torch.einsum("tn,sn,s->ts", C * decay, B / decay, delta).tril()
"""
        },
        loses=("matrix-strong",),
        points=71,
    ),
    Submission(
        "ln Δ for the inverse of softplus",
        {"bias": "bias_for = torch.log"},
        loses=("bias-value", "bias-extreme"),
        points=68,
    ),
]

# Right answers in another style; each must get all points.
RIGHT = {
    "select": """
def select(u, W_delta, b, W_B, W_C):
    linear = torch.nn.functional.linear
    return torch.logaddexp(linear(u, W_delta, b), torch.zeros(())), linear(u, W_B), linear(u, W_C)
""",
    "bias": """
def bias_for(delta):
    wide = delta.double()
    return torch.where(wide > 30, wide, torch.log(torch.expm1(wide.clamp(max=30)))).to(delta.dtype)
""",
    "scan": """
def scan(u, delta, A, B, C, D, h0):
    A_bar = torch.exp(torch.einsum("bld,dn->bldn", delta.to(A.dtype), A))
    input = torch.einsum("bld,bld,bln->bldn", delta.to(A.dtype), u.to(A.dtype), B.to(A.dtype))
    states, h = torch.empty_like(input), h0.clone()
    for t in range(u.shape[1]):
        h = h * A_bar[:, t] + input[:, t]
        states[:, t] = h
    y = torch.einsum("bldn,bln->bld", states, C.to(A.dtype)) + D * u.to(A.dtype)
    return y.type_as(u), h
""",
    "packed": """
def scan_packed(scan, u, delta, A, B, C, D, borders):
    y = torch.zeros_like(u)
    states = torch.zeros(len(borders) - 1, *A.shape, dtype=A.dtype)
    for i in range(len(states)):
        a, z = borders[i], borders[i + 1]
        if z > a:
            zero = torch.zeros(1, *A.shape, dtype=A.dtype)
            y[:, a:z], states[i : i + 1] = scan(u[:, a:z], delta[:, a:z], A, B[:, a:z], C[:, a:z], D, zero)
    return y, states
""",
    "matrix": """
def hidden_matrix(delta, A, B, C):
    L = len(delta)
    M = torch.zeros(L, L, dtype=delta.dtype)
    for s in range(L):
        h = delta[s] * B[s]
        for t in range(s, L):
            h = h if t == s else torch.exp(delta[t] * A) * h
            M[t, s] = C[t] @ h
    return M
""",
}
