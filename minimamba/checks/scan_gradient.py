"""Checks of chapter 09: the adjoint, the gradients of a scan, a carry from the right, all gradients of Mamba's scan."""

import torch

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.checks.sequential_scan import problem
from minimamba.scan_gradient import linear_scan
from minimamba.sequential_scan import selective_scan_sequential

double, single = torch.float64, torch.float32


def numbers(length, seed, *shape):
    """Random numbers (*shape, length): a between 0.02 and 1 with any sign, none equal, and b, w with random signs."""
    random = torch.Generator().manual_seed(seed)
    a, b, w = torch.randn(3, *shape, length, generator=random, dtype=double)
    a = 0.98 * torch.rand(*shape, length, generator=random, dtype=double).add(0.02) * a.sign()
    return a, b, w


def single_sequences():
    by_hand = torch.tensor([[0.5, 3.0, -1.0], [1.0, 0.0, 2.0]], dtype=double)
    yield Case("L = 1", a=by_hand[0, 1:2], w=by_hand[1, 2:])
    yield Case("L = 2", a=by_hand[0, 1:], w=by_hand[1, :2] + 1)
    yield Case("L = 3", a=by_hand[0], w=by_hand[1])
    for length in (5, 8, 13):
        a, _, w = numbers(length, length)
        yield Case(
            f"L = {length}", a=a.to(single if length == 8 else double), w=w.to(single if length == 8 else double)
        )


def adjoint_of(a, w, shift=1, last=0, direct=True, through=None):
    """g from the last step to the first. shift=0: a of the same step; through: what takes the place of g_{t+1}."""
    g = [w[-1]]
    for t in reversed(range(len(w) - 1)):
        later = g[-1] if through is None else through[t + 1]
        g.append((w[t] if direct else 0) + a[t + shift] * later)
    return torch.stack(g[::-1])


def _forward(a, w):
    return linear_scan(a[None], w[None], w.new_zeros(1))[0]


SHIFT = "The arrow from h_t to h_{t+1} carries a_{t+1}, on the way back too."
BACK = "Gradients come from later steps: begin with the last."
ALL = "What arrives at h_{t+1} is g_{t+1}, which has all later steps in it."
adjoint = Exercise(
    name="adjoint",
    asks="adjoint(a, w) -> g (L,), the gradient of loss by each state; w is its direct part",
    formula="Asked is g_t = w_t + a_{t+1} g_{t+1} with g_L = w_L.",
    see="09 §2",
    reference=adjoint_of,
    inputs=single_sequences,
    results=("g",),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("unshifted a", lambda a, w: adjoint_of(a, w, shift=0), SHIFT, "09 §5"),
        Mistake("a shifted the wrong way", lambda a, w: adjoint_of(a.roll(1), w, shift=0), SHIFT),
        Mistake("the forward scan of w", _forward, BACK),
        Mistake("w_{t+1} in place of g_{t+1}", lambda a, w: adjoint_of(a, w, through=w), ALL),
        Mistake("sums without a", lambda a, w: w.flip(0).cumsum(0).flip(0), SHIFT),
        Mistake("w only at the last step", lambda a, w: adjoint_of(a, w, direct=False), "Each h_t meets the loss too."),
        Mistake("w itself", lambda a, w: w.clone(), "Each h_t also reaches the loss through h_{t+1}."),
    ),
    hints=(
        "In how many ways does h_t reach the loss? Directly, with w_t, and through one other state.",
        "Begin at the end: g_L = w_L. Then h_{t+1} = a_{t+1} h_t + b_{t+1} tells by what g_{t+1} is multiplied.",
        "g = w.clone(); for t in reversed(range(len(w) - 1)): g[t] += a[t + 1] * g[t + 1]",
    ),
)


def rows():
    for batch, length, seed in ((1, 1, 0), (1, 2, 1), (2, 3, 2), (3, 5, 3), (2, 9, 4)):
        dtype = single if length == 5 else double
        a, b, w = (x.to(dtype) for x in numbers(length, seed, batch))
        h = torch.linspace(-1.3, 2.1, batch + 1)[1:].to(dtype)
        yield Case(f"B = {batch}, L = {length}", a=a, b=b, h_0=h, w=w)


def by_autograd(a, b, h_0, w):
    leaves = [x.clone().requires_grad_() for x in (a, b, h_0)]
    h, states = leaves[2], []
    for t in range(a.shape[1]):
        h = leaves[0][:, t] * h + leaves[1][:, t]
        states.append(h)
    return torch.autograd.grad(torch.stack(states, 1), leaves, w)


def local(adjoint=adjoint_of, before=None, first=None):
    """(da, db, dh_0) from g; before and first: what takes the place of h_{t−1} in da and of a_1 in dh_0."""

    def answer(a, b, h_0, w):
        h = linear_scan(a, b, h_0)
        g = torch.stack([adjoint(x, y) for x, y in zip(a, w, strict=True)])
        previous = torch.cat([h_0[:, None], h[:, :-1]], 1) if before is None else before(h, h_0)
        return g * previous, g, (a[:, 0] if first is None else first) * g[:, 0]

    return answer


def _from_zero(h, h_0):
    return torch.cat([0 * h_0[:, None], h[:, :-1]], 1)


PREVIOUS = "In h_t = a_t h_{t−1} + b_t the partner of a_t is the state before."
scan_backward = Exercise(
    name="scan_backward",
    asks="scan_backward(a, b, h_0, w) -> (da, db, dh_0) of loss = (w * h).sum() with h_t = a_t h_{t−1} + b_t",
    formula="Asked is g_t = w_t + a_{t+1} g_{t+1}, and then da_t = g_t h_{t−1}, db_t = g_t, dh_0 = a_1 g_1.",
    see="09 §2",
    reference=by_autograd,
    inputs=rows,
    results=("da", "db", "dh_0"),
    sizes={"L": ("a", 1)},
    mistakes=(
        Mistake("unshifted a", local(lambda a, w: adjoint_of(a, w, shift=0)), SHIFT, "09 §5"),
        Mistake("h_t in place of h_{t−1} in da", local(before=lambda h, h_0: h), PREVIOUS),
        Mistake("h_0 left out of da", local(before=_from_zero), "The state before the first step is h_0."),
        Mistake("h_0 taken for zero", lambda a, b, h_0, w: local()(a, b, 0 * h_0, w), "All states begin from h_0."),
        Mistake("dh_0 = g_1, without a_1", local(first=1), "Between h_0 and h_1 is the arrow that carries a_1."),
        Mistake("dh_0 = 0", local(first=0), "h_0 reaches the loss through h_1."),
        Mistake("w in place of g", local(lambda a, w: w), "Each h_t also reaches the loss through h_{t+1}."),
        Mistake("the forward scan of w", local(_forward), BACK),
        Mistake("da and db swapped", lambda *x: tuple(local()(*x)[i] for i in (1, 0, 2)), "a multiplies, b is added."),
        Mistake("w_{t+1} in place of g_{t+1}", local(lambda a, w: adjoint_of(a, w, through=w)), ALL),
    ),
    hints=(
        "Two passes: forward for the states, backward for g. Then every gradient is a product at one step.",
        "a_t and b_t stand in one equation only: h_t = a_t h_{t−1} + b_t. What is its derivative by a_t, by b_t?",
        "g as in exercise 1 along axis 1; previous = torch.cat([h_0[:, None], h[:, :-1]], 1); "
        "return g * previous, g, a[:, 0] * g[:, 0]",
    ),
)


def cut():
    for length, size, right in ((1, 2, 0.5), (2, 1, -2.0), (4, 2, 0.5), (7, 3, 1.5), (8, 3, -0.7), (12, 5, 2.0)):
        dtype = single if length == 8 else double
        a, _, w = (x.to(dtype) for x in numbers(length, 20 + length))
        if length <= 2:
            a, w = a.mul(4).round().add(0.5).div(4), w.mul(2).round() + 1
        yield Case(f"L = {length} in chunks of {size}", a=a, w=w, size=size, from_the_right=right)


def in_chunks(a, w, size, right, *, carry=lambda a, g, alone, s, e: a[s] * g[s], start=1, spread=False, order=reversed):
    """g chunk after chunk; carry(a, g, g of the chunk alone, its first step, the step after its last)."""
    g, alone, right = torch.zeros_like(w), torch.zeros_like(w), start * right
    for s in order(range(0, len(w), size)):
        e = min(s + size, len(w))
        alone[s:e] = adjoint_of(a[s:e], w[s:e])
        decay = torch.cat([a[s + 1 : e].flip(0).cumprod(0).flip(0), a.new_ones(1)])
        g[s:e] = alone[s:e] + (1 if spread else decay) * right
        right = carry(a, g, alone, s, e)
    return g, right


def chunks(**options):
    return lambda a, w, size, right: in_chunks(a, w, size, right, **options)


OVER = "From the chunk on the right comes a_{t+1} g_{t+1}, where t + 1 is its first step."
adjoint_chunked = Exercise(
    name="adjoint_chunked",
    asks="adjoint_chunked(a, w, size, from_the_right) -> g (L,) and what arrives at h_0; chunks from last to first",
    formula="Asked is g_L = w_L + from_the_right, g_t = w_t + a_{t+1} g_{t+1} over the borders too, and a_1 g_1.",
    see="09 §8",
    reference=in_chunks,
    inputs=cut,
    results=("g", "gradient of h_0"),
    sizes={"L": ("a", 0)},
    mistakes=(
        Mistake("the reverse carry lost", chunks(carry=lambda a, g, one, s, e: (a[s] * g[s]) if s == 0 else 0), OVER),
        Mistake("the gradient from the right lost", chunks(start=0), "Later pieces of the sequence send it to h_L."),
        Mistake("a forgotten at the borders", chunks(carry=lambda a, g, one, s, e: g[s]), OVER),
        Mistake("a forgotten at the borders", chunks(carry=lambda a, g, one, s, e: g[s] if s else a[0] * g[0]), OVER),
        Mistake("unshifted a at the borders", chunks(carry=lambda a, g, one, s, e: a[s - 1 if s else 0] * g[s]), SHIFT),
        Mistake("a carry from the next chunk only", chunks(carry=lambda a, g, one, s, e: a[s] * one[s]), ALL),
        Mistake("an undecayed carry", chunks(spread=True), "Inside the chunk it is multiplied by a at every step."),
        Mistake("chunks from the first to the last", chunks(order=iter), BACK),
        Mistake("from_the_right decayed once more", lambda a, w, n, r: in_chunks(a, w, n, a[-1] * r), "It is at h_L."),
        Mistake("unshifted a", lambda a, w, size, r: _unshifted(a, w, r), SHIFT, "09 §5"),
    ),
    hints=(
        "What must a chunk know of all that lies to its right? It is one number.",
        "Add it to g of the chunk's last step, then run back through the chunk. Which product leaves at the left?",
        "for s in reversed(range(0, L, size)): e = min(s + size, L); g[e−1] += carry; for t from e−2 down to s: "
        "g[t] += a[t+1]·g[t+1]; carry = a[s]·g[s]. Begin with g = w.clone() and carry = from_the_right.",
    ),
)


def _unshifted(a, w, right):
    g = adjoint_of(a, torch.cat([w[:-1], w[-1:] + right]), shift=0)
    return g, a[0] * g[0]


def mamba():
    sizes = [(1, 1, 1, 1), (1, 2, 1, 1), (1, 3, 2, 1), (2, 5, 4, 3), (2, 6, 3, 5), (3, 7, 2, 4)]
    for batch, length, channels, states in sizes:
        dtype = single if length == 6 else double
        random = torch.Generator().manual_seed(length)
        y, h, last = (
            torch.randn(batch, *size, generator=random, dtype=double).to(dtype)
            for size in ((length, channels), (channels, states), (channels, states))
        )
        drawn = problem(batch, length, channels, states, 50 + length, dtype)
        note = f"B = {batch}, L = {length}, D = {channels}, N = {states}"
        if channels * states == 1:  # the message has no room for all eight arguments: the note tells the rest
            y, h, last = (torch.tensor(x, dtype=double).reshape(1, -1, 1) for x in ([3.0, -2.0][:length], 2.0, -1.0))
            note = f"h_0 = 2, grad_y = {y.flatten().tolist()}, grad_last = −1"
        yield Case(note, **drawn, h_0=h, grad_y=y, grad_last=last)


def mamba_autograd(u, delta, A, B, C, h_0, grad_y, grad_last):
    leaves = [x.clone().requires_grad_() for x in (u, delta, A, B, C, h_0)]
    u, delta, A, B, C, h_0 = leaves
    results = selective_scan_sequential(u, delta, A, B[:, :, None], C[:, :, None], h_0)
    return torch.autograd.grad(results, leaves, (grad_y, grad_last))


def by_hand(shift=1, carry=True, last=True, previous=True, bar=True, halves=(1, 1), **instead):
    """All six gradients by the formulas of 09 §6, with one of them changed, or replaced (dB=f of what is known)."""

    def answer(u, delta, A, B, C, h_0, grad_y, grad_last):
        A_bar, B, C = torch.exp(delta[..., None] * A), B[:, :, None], C[:, :, None]
        h = linear_scan(A_bar, (delta * u)[..., None] * B, h_0)
        g = grad_y[..., None] * C
        g[:, -1] += grad_last if last else 0
        for t in reversed(range(u.shape[1] - 1)):
            g[:, t] += A_bar[:, t + shift] * g[:, t + 1] if carry else 0
        before = torch.cat([h_0[:, None], h[:, :-1]], 1)
        dz, dx = g * (before if previous else h) * (A_bar if bar else 1), (B * g).sum(-1)
        results = {
            "du": delta * dx,
            "ddelta": halves[0] * (A * dz).sum(-1) + halves[1] * u * dx,
            "dA": (delta[..., None] * dz).sum((0, 1)),
            "dB": ((delta * u)[..., None] * g).sum(2),
            "dC": (grad_y[..., None] * h).sum(2),
            "dh_0": A_bar[:, 0] * g[:, 0],
        }
        known = {"u": u, "dt": delta, "g": g, "dz": dz, "dx": dx, "before": before, "h": h, "y": grad_y}
        return tuple((results | {name: f(**known) for name, f in instead.items()}).values())

    return answer


TWICE = "Δ_t is in Ā_t = e^{Δ_t A} and in Δ_t u_t B_t, so dΔ has two terms."
BROADCAST = "What serves many on the way forward is summed over them on the way back."
selective_backward = Exercise(
    name="selective_backward",
    asks="selective_backward(u, delta, A, B, C, h_0, grad_y, grad_last) -> (du, ddelta, dA, dB, dC, dh_0)",
    formula="Asked are the six lines of the table in 09 §6, from g_t = C_t grad_y_t + Ā_{t+1} g_{t+1}.",
    see="09 §6",
    reference=mamba_autograd,
    inputs=mamba,
    results=("du", "ddelta", "dA", "dB", "dC", "dh_0"),
    sizes={"N": ("A", 1), "L": ("u", 1)},
    mistakes=(
        Mistake("unshifted Ā", by_hand(shift=0), "The arrow from h_t to h_{t+1} carries Ā_{t+1}.", "09 §5"),
        Mistake("the reverse carry lost", by_hand(carry=False), "h_t also reaches the loss through h_{t+1}."),
        Mistake("the gradient of the last state lost", by_hand(last=False), "It is added to g_L."),
        Mistake("h_t in place of h_{t−1} in dĀ", by_hand(previous=False), PREVIOUS),
        Mistake("half of dΔ missing", by_hand(halves=(1, 0)), f"{TWICE} The one through u_t B_t is missing."),
        Mistake("half of dΔ missing", by_hand(halves=(0, 1)), f"{TWICE} The one through Ā_t is missing."),
        Mistake("Ā missing in the derivative of e^{ΔA}", by_hand(bar=False), "The derivative of e^z is e^z."),
        Mistake("dB not summed over channels", by_hand(dB=lambda dt, u, g, **_: (dt * u)[..., None] * g), BROADCAST),
        Mistake("dC not summed over channels", by_hand(dC=lambda h, y, **_: y[..., None] * h), BROADCAST),
        Mistake("dA not summed over the batch", by_hand(dA=lambda dt, dz, **_: (dt[..., None] * dz).sum(1)), BROADCAST),
        Mistake("dC from h_{t−1}", by_hand(dC=lambda y, before, **_: (y[..., None] * before).sum(2)), "y_t = C_t h_t."),
        Mistake("Δ missing in dA", by_hand(dA=lambda dz, **_: dz.sum((0, 1))), "The exponent is Δ_t A."),
        Mistake("Δ missing in du", by_hand(du=lambda dx, **_: dx), "The input enters as Δ_t u_t B_t."),
        Mistake(
            "Δ missing in dB", by_hand(dB=lambda u, g, **_: (u[..., None] * g).sum(2)), "It enters as Δ_t u_t B_t."
        ),
        Mistake("dh_0 = g_1, without Ā_1", by_hand(dh_0=lambda g, **_: g[:, 0]), "h_1 = Ā_1 h_0 + ..."),
    ),
    hints=(
        "First g, as in exercise 1, with Ā_t (B, L, D, N) for a_t and C_t grad_y_t for w_t; grad_last belongs to g_L.",
        "Two products hold the rest: dz = Ā_t g_t h_{t−1}, the gradient of Δ_t A, and dx = the sum over N of B_t g_t, "
        "the gradient of Δ_t u_t. Sum each result over the axes that its argument does not have.",
        "du = Δ dx; dΔ = (A dz).sum(N) + u dx; dA = (Δ dz).sum(B, L); dB = (Δ u g).sum(D); dC = (grad_y h).sum(D); "
        "dh_0 = Ā_1 g_1.",
    ),
)

hint, picture = helpers(adjoint, scan_backward, adjoint_chunked, selective_backward)
