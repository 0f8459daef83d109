"""Checks of chapter 06: the projections, the bias of Δ, the hidden matrix, and why no fixed system selects."""

import math
from itertools import pairwise

import torch
from torch.nn.functional import relu, softplus

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers

DOUBLE, SINGLE = torch.float64, torch.float32


def normal(*shape, seed, dtype=DOUBLE):
    """Standard normal numbers that are the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def column(*values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype)


def project(u, W_x, W_dt, b, N, step=lambda v, b: softplus(v + b), middle=lambda low: low):
    R = W_dt.shape[1]
    low, B, C = (u @ W_x.T).split([R, N, N], dim=-1)
    return step(middle(low) @ W_dt.T, b), B, C


def tokens():
    one = column(1.0)[None]
    yield Case("one token", u=2 * one[None], W_x=column(-0.5, 3.0, 4.0)[:, None], W_dt=one, b=column(0.5), N=1)
    two, W_x = column(1.0, 2.0), column(1.0, 0.0, 0.0, 1.0, 1.0, 1.0).view(3, 2)
    yield Case("two channels", u=two[None, None], W_x=W_x, W_dt=column(1.0, -1.0)[:, None], b=two - 0.5, N=1)
    one, large = one.to(SINGLE), column(10.0, 1.0, 2.0, dtype=SINGLE)[:, None]
    yield Case("a large Δ", u=10 * one[None], W_x=large, W_dt=one, b=one[0], N=1)
    for seed, (batch, length, channels, rank, states, dtype) in enumerate(
        [(1, 3, 2, 1, 3, DOUBLE), (2, 5, 4, 2, 3, SINGLE), (3, 4, 5, 3, 2, DOUBLE), (2, 7, 6, 1, 4, DOUBLE)]
    ):
        shapes = (batch, length, channels), (rank + 2 * states, channels), (channels, rank), (channels,)
        u, W_x, W_dt, b = (normal(*shape, seed=seed + 10 * i, dtype=dtype) for i, shape in enumerate(shapes))
        yield Case(f"{length} tokens, {channels} channels", u=u, W_x=W_x, W_dt=W_dt, b=b, N=states)


def _step(step):
    return lambda *arguments: project(*arguments, step=step)


SHARED = "Each channel has a Δ of its own, and so a clock of its own."
INSIDE = "b is far below zero: only softplus is meant to see it."
POSITIVE = "A step must be positive, or the state grows."
OVERFLOW = "e^100 has no place in float32. torch.nn.functional.softplus takes care of it."
projections = Exercise(
    name="projections",
    asks="projections(u, W_x, W_dt, b, N) -> Δ (B, L, D), B and C (B, L, N), from u (B, L, D)",
    formula="Asked is Δ = softplus(W_dt low + b), where W_x u is cut into low (R), B (N) and C (N), in this order.",
    see="06 §2",
    reference=project,
    inputs=tokens,
    results=("delta", "B", "C"),
    sizes={"D": ("u", 2), "L": ("u", 1)},
    mistakes=(
        Mistake("no softplus", _step(lambda v, b: v + b), POSITIVE, "06 §8"),
        Mistake("softplus applied twice", _step(lambda v, b: softplus(softplus(v + b))), "Δ ≥ 0.69: it forgets."),
        Mistake("the bias dropped", _step(lambda v, b: softplus(v)), "b sets the memory at the start.", "06 §4"),
        Mistake("the bias outside softplus", _step(lambda v, b: softplus(v) + b), INSIDE, "06 §8"),
        Mistake("the bias subtracted", _step(lambda v, b: softplus(v - b))),
        Mistake("one Δ for all channels", _step(lambda v, b: softplus(v + b).mean(-1, keepdim=True) + 0 * v), SHARED),
        Mistake("one Δ for all channels", _step(lambda v, b: softplus((v + b).mean(-1, keepdim=True)) + 0 * v), SHARED),
        Mistake("one Δ for all channels", _step(lambda v, b: softplus(v + b)[..., :1] + 0 * v), SHARED),
        Mistake("log(1 + e^v), which overflows", _step(lambda v, b: torch.log(1 + torch.exp(v + b))), OVERFLOW),
        Mistake("log(1 + e^v), which overflows", _step(lambda v, b: torch.log1p(torch.exp(v + b))), OVERFLOW),
        Mistake("exp in place of softplus", _step(lambda v, b: torch.exp(v + b))),
        Mistake("the sigmoid in place of softplus", _step(lambda v, b: torch.sigmoid(v + b)), "That is §3's gate."),
        Mistake("relu in place of softplus", _step(lambda v, b: relu(v + b)), "It has no gradient where it is 0."),
        Mistake("softplus before W_dt too", lambda *arguments: project(*arguments, middle=softplus)),
        Mistake("softplus on B and C too", lambda *x: (project(*x)[0], *map(softplus, project(*x)[1:]))),
        Mistake("B and C swapped", lambda *x: tuple(project(*x)[i] for i in (0, 2, 1)), "B stands before C in W_x."),
        Mistake("the rows of Δ taken last", lambda u, W, W_dt, *x: project(u, W.roll(W_dt.shape[1], 0), W_dt, *x)),
    ),
    hints=(
        "One product gives all three: u @ W_x.T. How many numbers of its last axis belong to each?",
        ".split([R, N, N], dim=-1) takes it apart; R is W_dt.shape[1]. The bias comes before the softplus.",
        "low, B, C = (u @ W_x.T).split([R, N, N], dim=-1); return softplus(low @ W_dt.T + b), B, C.",
    ),
)


def draw_bias(channels, dt_min, dt_max):
    low, high = math.log(dt_min), math.log(dt_max)
    return softplus_inverse(torch.exp(low + (high - low) * torch.rand(channels)))


def softplus_inverse(step):
    return step + torch.log(-torch.expm1(-step))


def ranges():
    yield Case("the range of a fresh Mamba layer", channels=2000, dt_min=0.001, dt_max=0.1)
    yield Case("large steps", channels=2000, dt_min=0.01, dt_max=5.0)


def between(x, low, high):
    return low * (1 - 1e-3) <= x.min().item() and x.max().item() <= high * (1 + 1e-3)


def share_off(x):
    """How far the shares of x in (0, 1) below 1/4, 1/2 and 3/4 are from 1/4, 1/2 and 3/4."""
    return max(abs((x < part).double().mean().item() - part) for part in (0.25, 0.5, 0.75))


def verify_bias(use, channels, dt_min, dt_max):
    b = use()
    if not isinstance(b, torch.Tensor) or tuple(b.shape) != (channels,) or not b.is_floating_point():
        return f"Expected a tensor of {channels} real numbers, one bias for each channel."
    if len(b.unique()) < channels / 2:
        return Mistake("one draw for many channels", None, "Draw one number for each channel.")
    if torch.equal(b, use()):
        return Mistake("the same numbers in every call", None, "Each layer wants a draw of its own: no fixed seed.")
    b, step, bound = b.double(), softplus(b.double()), 6 * 0.5 / math.sqrt(channels)  # six standard deviations
    for name, seen, says in (
        ("Δ itself as the bias", b, "softplus comes after the bias, and softplus(Δ) is 0.69 and more."),
        ("softplus in place of its inverse", b.expm1().log(), "The layer applies softplus itself: undo it."),
        ("log Δ as the bias", b.exp(), "softplus(log Δ) = log(1 + Δ), which is less than Δ."),
        ("the wrong sign of the bias", softplus(-b), "A small Δ needs a bias far below zero."),
    ):
        if between(seen, dt_min, dt_max) and share_off((seen / dt_min).log() / math.log(dt_max / dt_min)) < bound:
            return Mistake(name, None, says)
    if not between(step, dt_min, dt_max):
        return f"softplus of your bias goes from {step.min():.3g} to {step.max():.3g}: asked is {dt_min} to {dt_max}."
    if share_off((step / dt_min).log() / math.log(dt_max / dt_min)) < bound:
        return None
    ends = softplus_inverse(torch.tensor([dt_min, dt_max], dtype=DOUBLE))
    if share_off((step - dt_min) / (dt_max - dt_min)) < bound:
        return Mistake("a uniform draw of Δ", None, "Draw log Δ uniformly: each tenfold gets as many channels.")
    if share_off((b - ends[0]) / (ends[1] - ends[0])) < bound:
        return Mistake("a uniform draw of the bias", None, "Draw log Δ uniformly, and make the bias of it.")
    ends = [dt_min * (dt_max / dt_min) ** (part / 4) for part in range(5)]
    have = [f"{((low <= step) & (step < high)).double().mean():.0%}" for low, high in pairwise(ends)]
    return f"Between {', '.join(f'{x:.3g}' for x in ends)} lie {', '.join(have)} of your steps: asked is 25% each."


dt_bias = Exercise(
    name="dt_bias",
    asks="dt_bias(channels, dt_min, dt_max) -> a random bias b (channels,) whose softplus is log-uniform in the range",
    formula="Asked is b = log(e^Δ − 1) with log Δ uniform between log dt_min and log dt_max.",
    see="06 §4",
    reference=draw_bias,
    inputs=ranges,
    verify=verify_bias,
    results=("b",),
    mistakes=(),
    hints=(
        "Two steps: draw the Δ that you want, then find the b that softplus turns into it.",
        "log Δ = log dt_min + (log dt_max − log dt_min)·torch.rand(channels). Solve log(1 + e^b) = Δ for b.",
        "Δ = torch.exp(log Δ as above); b = Δ + torch.log(-torch.expm1(-Δ)), which is log(e^Δ − 1) without overflow.",
    ),
)


def attention(delta, A_log, B, C, A=lambda A_log: -torch.exp(A_log), elapsed=None, weight=None, hide=torch.tril):
    """M[t, j] = Σ_n C[t, n] exp(A_n (Δ_{j+1} + ... + Δ_t)) Δ_j B[j, n]. The options are what can go wrong."""
    clock = delta.cumsum(0)
    passed = (clock[:, None] - clock if elapsed is None else elapsed(clock, delta))[..., None]
    fading = hide(torch.exp(A(A_log) * passed).movedim(-1, 0))  # (N, L, L)
    weight = delta[:, None] * B if weight is None else weight(delta, A(A_log), B)
    return torch.einsum("tn,ntj,jn->tj", C, fading, weight)


def sequences():
    B, C = column(1.0, 3.0)[:, None], column(2.0, 5.0)[:, None]
    yield Case("two tokens, one state", delta=column(0.5, 2.0), A_log=column(0.0), B=B, C=C)
    B, C = normal(6, 2, seed=50), normal(6, 2, seed=51)
    yield Case("states that forget at once", delta=column(40, 0.3, 90, 70, 0.2, 50), A_log=column(0.5, 2.5), B=B, C=C)
    for seed, (length, states, dtype) in enumerate([(3, 2, DOUBLE), (5, 3, DOUBLE), (6, 2, SINGLE), (9, 4, DOUBLE)]):
        delta = 10 ** (3 * torch.rand(length, generator=torch.Generator().manual_seed(seed)).to(dtype) - 2.7)
        B, C = normal(length, states, seed=seed + 10, dtype=dtype), normal(length, states, seed=seed + 20, dtype=dtype)
        A_log = column(*range(states)).to(dtype) / 3
        yield Case(f"{length} tokens, {states} states", delta=delta, A_log=A_log, B=B, C=C)


def _but(**options):
    return lambda *arguments: attention(*arguments, **options)


def _quotient(delta, A_log, B, C):
    decay = torch.exp(-torch.exp(A_log) * delta.cumsum(0)[:, None])  # (L, N)
    return torch.einsum("tn,jn->tj", C * decay, delta[:, None] * B / decay).tril()


def _counted(clock, delta):
    return torch.arange(len(delta))[:, None] - torch.arange(len(delta)).to(delta)


SMALL = "Products of small numbers become 0, and 0/0 is NaN: subtract the sums of Δ before the exponential."
MASK = "Above the diagonal the exponential overflows, and 0 times infinity is NaN: use tril, or set Δ's sum to 0 there."
hidden_attention = Exercise(
    name="hidden_attention",
    asks="hidden_attention(delta, A_log, B, C) -> M (L, L) with y = M u for one channel; delta (L,), B and C (L, N)",
    formula="Asked is M_tj = Σ_n C_tn e^{A_n (Δ_{j+1} + ... + Δ_t)} Δ_j B_jn for j ≤ t, else 0, with A = −e^{A_log}.",
    see="06 §7",
    reference=attention,
    inputs=sequences,
    results=("M",),
    sizes={"L": ("delta", 0), "N": ("A_log", 0)},
    mistakes=(
        Mistake("A = +exp(A_log)", _but(A=torch.exp), "A is negative, or the state grows.", "06 §8"),
        Mistake("A = A_log", _but(A=lambda A_log: A_log), "A_log is the logarithm of −A."),
        Mistake("A = −A_log", _but(A=lambda A_log: -A_log), "A_log is the logarithm of −A."),
        Mistake("Δ_j in the decay too", _but(elapsed=lambda clock, d: clock[:, None] - clock + d), "u_j fades later."),
        Mistake("Δ_j for Δ_t in the decay", _but(elapsed=lambda clock, d: clock[:, None] - clock + d - d[:, None])),
        Mistake("steps counted, not Δ summed", _but(elapsed=_counted), "That is a fixed system's clock."),
        Mistake("Δ_t for each step", _but(elapsed=lambda c, d: _counted(c, d) * d[:, None]), "Each has its own Δ."),
        Mistake("Δ_t in place of Δ_j at B", lambda d, *x: attention(d, *x) / d * d[:, None], "u_j came in at j."),
        Mistake("Δ_j missing at B", _but(weight=lambda d, A, B: B), "Mamba's input weight is ΔB."),
        Mistake("the exact hold's weight", _but(weight=lambda d, A, B: (torch.exp(d[:, None] * A) - 1) / A * B)),
        Mistake("B and C swapped", lambda delta, A_log, B, C: attention(delta, A_log, C, B), "C reads, at t."),
        Mistake("M transposed", lambda *arguments: attention(*arguments).T, "Row t is what output t listens to."),
        Mistake("the future not hidden", _but(hide=lambda x: x), "M_tj = 0 for j > t."),
        Mistake("the diagonal left out", _but(hide=lambda x: x.tril(-1)), "A token reaches its own output, undecayed."),
        Mistake("a quotient of decays", _quotient, SMALL),
        Mistake("a mask by multiplication", _but(hide=lambda x: x * torch.ones_like(x).tril()), MASK),
    ),
    hints=(
        "Follow one input: u_j enters as Δ_j B_j u_j, fades in each later step, and C_t reads what is left.",
        "The decays multiply, so the exponents add: clock = delta.cumsum(0) makes Δ_{j+1} + ... + Δ_t one difference.",
        "elapsed = (clock[:, None] − clock).tril(); decay = torch.exp(elapsed[..., None]·A); M = "
        'torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None]·B).tril().',
    ),
)


def kernels():
    yield Case("a leak, noise of 0", K=column(1.0, 0.5, 0.25), noise=0.0)
    yield Case("a plain sum, noise of 0", K=column(2.0, 2.0), noise=0.0)
    yield Case("a plain sum, noise of 3", K=column(1.0, 1.0, 1.0), noise=3.0)
    yield Case("a delay of two steps", K=column(0.0, 0.0, 1.0, 0.0), noise=2.0)
    yield Case("a sum that begins a step late", K=column(0.0, 1.0, 1.0, 1.0), noise=1.5)
    yield Case("a sum over three steps", K=column(1.0, 1.0, 1.0, 0.0), noise=0.0)
    yield Case("a system that never answers", K=column(0.0, 0.0, 0.0), noise=1.0)
    yield Case("a random kernel", K=normal(5, seed=60), noise=0.7)


def fooled(K, noise):
    for k in range(len(K)):
        line = torch.eye(len(K), dtype=K.dtype)[0, :k]  # 1, 0, 0, ...: k tokens
        if abs(K[k] * (k > 0) + K[0] * noise - (K[k - 1] if k else 0)) > 1e-6:
            return line, torch.cat([line, column(noise)])
    return column(1.0, 2.0), column(2.0, 1.0)


def verify_fooled(use, K, noise):
    pair = use()
    try:
        a, b = (torch.as_tensor(line, dtype=DOUBLE) for line in pair)
    except (TypeError, ValueError, RuntimeError):
        return "Expected two lines of numbers, a and b."
    if a.ndim != 1 or b.ndim != 1 or max(len(a), len(b)) > len(K):
        return f"Expected two lines of at most {len(K)} tokens, which is as far as the kernel reaches."
    lines = f"a = {[round(x, 3) for x in a.tolist()]}, b = {[round(x, 3) for x in b.tolist()]}."
    y_a, y_b = ((K[: len(line)].flip(0) * line).sum().item() for line in (a, b))
    told = f"Yours: {lines} The last outputs are {y_a:.4g} and {y_b:.4g}."
    same = abs(y_a - y_b) <= 1e-6 * max(1, a.abs().sum().item())
    if longer_by_noise(a, b, noise):
        return Mistake("a noise token that this system does not feel", None, told) if same else None
    if longer_by_noise(b, a, noise):
        return Mistake("the two lines swapped", None, f"{lines} The second is to have one token more.")
    if len(a) == len(b) and torch.equal(a, b):
        return Mistake("the same line twice", None, lines)
    if len(a) == len(b) and torch.equal(a.sort().values, b.sort().values):
        return None if same else Mistake("two orders that this system tells apart", None, told)
    return f"{lines} b is neither a with one noise token more nor a in another order."


def longer_by_noise(a, b, noise):
    """True if b is a with one noise token put in somewhere."""
    longer = (torch.cat([a[:i], column(noise), a[i:]]) for i in range(len(a) + 1))
    return len(b) == len(a) + 1 and any(torch.allclose(line, b, rtol=1e-6, atol=1e-9) for line in longer)


fool = Exercise(
    name="fool",
    asks="fool(K, noise) -> two lines a, b on which the fixed system with kernel K (L,) fails",
    formula="Asked is b = a with one noise token more and another last output, or b = a reordered with the same one.",
    see="06 §1",
    reference=fooled,
    inputs=kernels,
    verify=verify_fooled,
    results=("a", "b"),
    mistakes=(),
    hints=(
        "The last output is K_0 x_k + K_1 x_{k−1} + ... First try the empty line, whose output is 0, against [noise].",
        "If K_0·noise is 0, a noise token at the end only moves the others one step back. When does that not show?",
        "Find the first k ≥ 1 with K_k ≠ K_{k−1}: a = [1, 0, ..., 0] of k tokens, b = a and noise. If there is none, K "
        "is constant, y is a plain sum, and [1, 2] and [2, 1] end in the same.",
    ),
)

hint, picture = helpers(projections, dt_bias, hidden_attention, fool)
