"""Problem set 1: discretisation and convolution. 80 automatic points."""

from submissions import Submission

SUBMISSIONS = [
    Submission(
        "ΔB where exact ZOH is asked",
        {
            "rules": """
def zoh(A, B, delta):
    return torch.matrix_exp(delta * torch.stack([A, A]))[0], delta * B
"""
        },
        loses=("zoh-B", "zoh-singular"),
        points=70,
    ),
    Submission(
        "divides by A",
        {
            "rules": """
def zoh(A, B, delta):
    A_bar = torch.matrix_exp(delta * torch.stack([A, A]))[0]
    return A_bar, torch.linalg.solve(A, (A_bar - torch.eye(len(A), dtype=A.dtype)) @ B)
"""
        },
        loses=("zoh-singular",),
        points=76,
    ),
    Submission(
        "exponential entry by entry",
        {
            "rules": """
def zoh(A, B, delta):
    A_bar = torch.exp(delta * A)
    return A_bar, torch.linalg.pinv(A) @ (A_bar - torch.eye(len(A), dtype=A.dtype)) @ B
"""
        },
        loses=("zoh-A", "zoh-B", "zoh-singular"),
        points=66,
    ),
    Submission(
        "hands in the library's function",
        {"rules": "from minimamba.discretization import zoh"},
        loses=("zoh-A", "zoh-B", "zoh-singular"),
        points=66,
    ),
    Submission(
        "A transposed in the bilinear rule",
        {
            "rules": """
def bilinear(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    left = identity - delta / 2 * A.T
    return torch.linalg.solve(left, identity + delta / 2 * A.T), torch.linalg.solve(left, delta * B)
"""
        },
        loses=("bilinear-A", "bilinear-B"),
        points=72,
    ),
    Submission(
        "Δ missing in the bilinear B̄",
        {
            "rules": """
def bilinear(A, B, delta):
    identity = torch.eye(len(A), dtype=A.dtype)
    left = identity - delta / 2 * A
    return torch.linalg.solve(left, identity + delta / 2 * A), torch.linalg.solve(left, B)
"""
        },
        loses=("bilinear-B",),
        points=76,
    ),
    Submission(
        "divides by zero at A = 0",
        {"weight": "weight = lambda A, delta: torch.expm1(delta * A) / A"},
        loses=("weight-zero", "weight-gradient"),
        points=73,
    ),
    Submission(
        "one `where`, after the division",
        {"weight": "weight = lambda A, delta: torch.where(A == 0, delta, torch.expm1(delta * A) / A)"},
        loses=("weight-gradient",),
        points=76,
    ),
    Submission(
        "exp(z) - 1 loses digits",
        {"weight": "weight = lambda A, delta: torch.where(A == 0, delta, (torch.exp(delta * A) - 1) / A)"},
        loses=("weight-digits", "weight-gradient"),
        points=72,
    ),
    Submission(
        "kernel that begins at C Ā B̄",
        {
            "kernel": """
def kernel(A_bar, B_bar, C, length):
    powers = A_bar[..., None] ** torch.arange(1, length + 1)
    return (C[..., None] * B_bar[..., None] * powers).sum(1)
"""
        },
        loses=("kernel-start",),
        points=76,
    ),
    Submission(
        "kernel summed over the channels",
        {
            "kernel": """
def kernel(A_bar, B_bar, C, length):
    powers = A_bar[..., None] ** torch.arange(length)
    return torch.einsum("dn,en,enl->dl", C, B_bar, powers)
"""
        },
        loses=("kernel-channels",),
        points=76,
    ),
    Submission(
        "circular: no zeros",
        {
            "convolve": """
def convolve(u, kernel, skip):
    n = u.shape[1]
    return torch.fft.irfft(torch.fft.rfft(u, n, dim=1) * torch.fft.rfft(kernel.T, n, dim=0), n, dim=1) + skip * u
"""
        },
        loses=("convolve-circle",),
        points=75,
    ),
    Submission(
        "2L - 1 points, and irfft is not told",
        {
            "convolve": """
def convolve(u, kernel, skip):
    length = u.shape[1]
    spectrum = torch.fft.rfft(u, 2 * length - 1, dim=1) * torch.fft.rfft(kernel.T, 2 * length - 1, dim=0)
    return torch.fft.irfft(spectrum, dim=1)[:, :length] + skip * u
"""
        },
        loses=("convolve-values", "convolve-circle", "convolve-one"),
        points=68,
    ),
    Submission(
        "skip lost",
        {
            "convolve": """
with_skip = convolve
convolve = lambda u, kernel, skip: with_skip(u, kernel, 0 * skip)
"""
        },
        loses=("convolve-skip",),
        points=77,
    ),
    Submission(
        "the first output reads h₀ itself",
        {
            "free": """
def free_response(A_bar, C, h0, length):
    y, h = [], h0
    for _ in range(length):
        y.append(C @ h)
        h = A_bar @ h
    return torch.stack(y)
"""
        },
        loses=("free-scalar", "free-matrix"),
        points=70,
    ),
    Submission(
        "Ā transposed in the free response",
        {
            "free": """
transposed = free_response
free_response = lambda A_bar, C, h0, length: transposed(A_bar.T, C, h0, length)
"""
        },
        loses=("free-matrix",),
        points=75,
    ),
    Submission(
        "Euler's Ā without the identity",
        {"rules": "euler = lambda A, B, delta: (delta * A, delta * B)"},
        loses=("euler",),
        points=76,
    ),
    Submission(
        "the mean weight: without Δ in front",
        {
            "weight": """
with_delta = weight
weight = lambda A, delta: with_delta(A, delta) / delta
"""
        },
        loses=("weight-value", "weight-zero", "weight-digits", "weight-gradient"),
        points=66,
    ),
    Submission(
        "exp(lĀ) in place of Ā to the power of l",
        {
            "kernel": """
def kernel(A_bar, B_bar, C, length):
    powers = torch.exp(A_bar[..., None] * torch.arange(length))
    return (C[..., None] * B_bar[..., None] * powers).sum(1)
"""
        },
        loses=("kernel-decay",),
        points=74,
    ),
    Submission(
        "float64 whatever came",
        {
            "convolve": """
in_dtype = convolve
convolve = lambda u, kernel, skip: in_dtype(u.double(), kernel.double(), skip.double())
"""
        },
        loses=("convolve-dtype",),
        points=79,
    ),
]

# Right answers in another style; each must get all points.
RIGHT = {
    "rules": """
import numpy as np
from scipy.linalg import expm


def euler(A, B, delta):
    A_bar = delta * A
    for i in range(len(A)):
        A_bar[i, i] += 1
    return A_bar, B * delta


def bilinear(A, B, delta):
    inverse = torch.linalg.inv(2 * torch.eye(len(A), dtype=A.dtype) - delta * A)
    return inverse @ (2 * torch.eye(len(A), dtype=A.dtype) + delta * A), 2 * delta * inverse @ B


def zoh(A, B, delta):
    N = len(A)
    block = np.block([[A.numpy(), B.numpy()[:, None]], [np.zeros((1, N + 1))]])
    step = torch.from_numpy(expm(delta * block))
    return step[:N, :N], step[:N, N]
""",
    "weight": """
def weight(A, delta):
    # The mean of exp(sA) over the step: Gauss's rule with many points, step cut where A is large.
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(60))
    s = (nodes + 1) / 2
    small = torch.exp(delta[:, None] * A[:, None] * s) @ weights / 2 * delta
    return torch.where(delta * A > -30, small, -1 / torch.where(A == 0, 1.0, A))
""",
    "kernel": """
def kernel(A_bar, B_bar, C, length):
    state, values = B_bar.clone(), []
    for _ in range(length):
        values.append((C * state).sum(-1))
        state = state * A_bar
    return torch.stack(values, 1)
""",
    "convolve": """
def convolve(u, kernel, skip):
    L = u.size(1)
    n = 2 * L - 1
    product = torch.fft.fft(u.mT, n) * torch.fft.fft(kernel, n)
    return torch.fft.ifft(product).real[..., :L].mT + u * skip[None, None]
""",
    "free": """
def free_response(A_bar, C, h0, length):
    return torch.stack([torch.linalg.matrix_power(A_bar, k + 1) @ h0 @ C for k in range(length)])
""",
}
