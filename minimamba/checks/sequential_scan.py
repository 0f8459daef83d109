"""Checks of chapter 07: the loop for one state and for all, a stream of pieces, an input in bfloat16."""

import torch

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.sequential_scan import selective_scan_sequential

double, single, half = torch.float64, torch.float32, torch.bfloat16


def problem(batch, length, channels, states, seed, dtype=double):
    """u, Δ, A, B, C: Δ differs at every step, from 0.001 to 1 (never 1), and no two entries of A are equal."""
    random = torch.Generator().manual_seed(seed)
    u, B, C = (torch.randn(batch, length, k, generator=random, dtype=double) for k in (channels, states, states))
    delta = 10 ** (-3 * torch.rand(batch, length, channels, generator=random, dtype=double))
    A = -torch.arange(1.0, states + 1, dtype=double) * (0.2 + torch.rand(channels, 1, generator=random, dtype=double))
    names = ("u", "delta", "A", "B", "C")
    return dict(zip(names, (x.to(dtype) for x in (u, delta, A, B, C)), strict=True))


def steps(u, delta, A, B, C, h=None, decay=torch.exp, weight=None, decay_delta=None, early=False):
    """The loop with what can go wrong: another decay or input weight, another Δ in the decay, y read too early."""
    h, ys = u.new_zeros(u.shape[0], *A.shape) if h is None else h, []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        z = step * A if decay_delta is None else decay_delta[:, t, :, None] * A
        before, into = h, (step if weight is None else weight(step, A)) * B[:, t, None]
        h = decay(z) * h + into * u[:, t, :, None]
        ys.append(((before if early else h) * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1), h


def late(x, wrap=True):  # with `wrap` the first step reads x[:, -1], the last one, as Python does
    return x.roll(1, 1) if wrap else torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def on_the_way_in(f):
    """What `f` makes of u, Δ, A, B, C goes into the right loop."""
    return lambda *x, h=None: steps(*f(*x), h=h)


def but(**options):
    return lambda *x, h=None: steps(*x, h=h, **options)


LATE = "All of step t has the index t. At t = 0 Python takes index −1, the last step, and does not complain."


def shared(form):
    """The Mistakes of the loop; `form` turns one into an answer to the exercise."""
    previous = lambda u, d, A, B, C, h=None: steps(u, d, A, B, C, h, decay_delta=late(d))
    decayed = but(weight=lambda delta, A: delta * torch.exp(delta * A))
    exact = but(weight=lambda delta, A: torch.expm1(delta * A) / A)
    return (
        Mistake("y from h_{t−1}", form(but(early=True)), "First the new state, then y: y_t sees its own input."),
        Mistake("exact ZOH in place of ΔB", form(exact), "The weight (e^{ΔA} − 1)/A · B is not Mamba's.", "02 §6"),
        Mistake("Δ missing in the input's weight", form(but(weight=lambda delta, A: 1 + 0 * delta)), "It is Δ_t B_t."),
        Mistake("one Δ too many in the input's weight", form(but(weight=lambda delta, A: delta**2)), "It is Δ_t B_t."),
        Mistake("the wrong sign of A", form(but(decay=lambda z: torch.exp(-z))), "A is negative already."),
        Mistake("1 + ΔA in place of e^{ΔA}", form(but(decay=lambda z: 1 + z)), "That is Euler's rule.", "02 §1"),
        Mistake("the decay forgotten", form(but(decay=torch.ones_like)), "The old state is multiplied by e^{ΔA}."),
        Mistake("the new input decayed with the old state", form(decayed), "It comes in after."),
        Mistake("Δ of the step before in the decay", form(previous), LATE, "07 §8"),
        *(
            Mistake(f"{name} one step late", form(on_the_way_in(f)), LATE, "07 §8")
            for name, f in [
                ("B", lambda u, d, A, B, C: (u, d, A, late(B), C)),
                ("B", lambda u, d, A, B, C: (u, d, A, late(B, False), C)),
                ("u", lambda u, d, A, B, C: (late(u), d, A, B, C)),
                ("u", lambda u, d, A, B, C: (late(u, False), d, A, B, C)),
                ("C", lambda u, d, A, B, C: (u, d, A, B, late(C))),
            ]
        ),
        Mistake("B and C swapped", form(on_the_way_in(lambda u, d, A, B, C: (u, d, A, C, B))), "C reads the state."),
    )


def one(loop, start=1.0):
    """`loop` for one channel and one state."""

    def answer(u, delta, A, B, C, h):
        u, delta, B, C = (x[None, :, None] for x in (u, delta, B, C))
        A, h = (torch.tensor(x, dtype=u.dtype).reshape(1, 1) for x in (A, start * h))
        return loop(u, delta, A, B, C, h=h[None])[0][0, :, 0]

    return answer


def single_states():
    two = ("two steps", [1.0, 2.0], [0.5, 0.1], -1.5, [1.0, -1.0], [2.0, 1.0], 3.0)
    for note, u, delta, A, B, C, h in (("one step", [2.0], [0.5], -1.5, [3.0], [0.5], 4.0), two):
        u, delta, B, C = (torch.tensor(x, dtype=double) for x in (u, delta, B, C))
        yield Case(note, u=u, delta=delta, A=A, B=B, C=C, h=h)
    for length, dtype in ((7, double), (13, single), (20, double)):
        u, delta, A, B, C = (x[0].squeeze(-1) for x in problem(1, length, 1, 1, length, dtype).values())
        yield Case(f"{length} steps, Δ different at each", u=u, delta=delta, A=A.item(), B=B, C=C, h=1.7 - length)


scan_one = Exercise(
    name="scan_one",
    asks="scan_one(u, delta, A, B, C, h) -> y (L,), one channel with one state that starts at h",
    formula="Asked is h_t = e^{Δ_t A} h_{t−1} + Δ_t B_t u_t and then y_t = C_t h_t.",
    see="07 §1",
    reference=one(steps),
    inputs=single_states,
    results=("y",),
    sizes={"L": ("u", 0)},
    mistakes=(
        *shared(one),
        Mistake("the initial state dropped", one(steps, start=0.0), "The state starts at h, not at zero."),
        Mistake("C forgotten", one(on_the_way_in(lambda u, d, A, B, C: (u, d, A, B, C**0))), "C_t reads the state."),
    ),
    hints=(
        "At each step two things happen, in this order: the state changes, then it is read out.",
        "The new state is a part e^{Δ_t A} of the old one, plus Δ_t B_t u_t.",
        "for t in range(len(u)): h = torch.exp(delta[t] * A) * h + delta[t] * B[t] * u[t]; y.append(C[t] * h).",
    ),
)


def with_skip():
    """D = N in one Case, so that a transposed A has values; elsewhere all sizes differ."""
    sizes = [(1, 1, 1, 1), (1, 2, 1, 1), (1, 4, 3, 3), (2, 5, 4, 3), (2, 7, 3, 5), (3, 9, 2, 4)]
    for batch, length, channels, states in sizes:
        dtype = single if length == 7 else double
        drawn = problem(batch, length, channels, states, 10 + length, dtype)
        D = torch.linspace(-1.2, 2.1, channels + 1, dtype=double)[1:].to(dtype)
        yield Case(f"B = {batch}, L = {length}, D = {channels}, N = {states}", **drawn, D=D)


def whole(loop, skip=lambda u, delta, A, D: D * u):
    def answer(u, delta, A, B, C, D):
        y, h = loop(u, delta, A, B, C)
        return y + skip(u, delta, A, D), h

    return answer


def library(u, delta, A, B, C):
    return selective_scan_sequential(u, delta, A, B[:, :, None], C[:, :, None], u.new_zeros(u.shape[0], *A.shape))


ONCE = "D u_t is added once, after the sum over N."
scan = Exercise(
    name="scan",
    asks="scan(u, delta, A, B, C, D) -> y (B, L, D) and the final state (B, D, N), from a state of zeros",
    formula="Asked is h_t = e^{Δ_t A} h_{t−1} + Δ_t u_t B_t, and y_t = D u_t plus the sum of C_t h_t over N.",
    see="07 §2",
    reference=whole(library),
    inputs=with_skip,
    results=("y", "final state"),
    sizes={"N": ("A", 1), "L": ("u", 1)},
    mistakes=(
        *shared(whole),
        Mistake(
            "A transposed",
            whole(on_the_way_in(lambda u, d, A, B, C: (u, d, A.T, B, C))),
            "A is (D, N), a row a channel.",
        ),
        Mistake("the skip D u_t lost", whole(steps, lambda u, d, A, D: 0), "The input also goes past the state to y."),
        Mistake("the skip D without u_t", whole(steps, lambda u, d, A, D: D), "D weighs the input."),
        Mistake("Δ in the skip", whole(steps, lambda u, d, A, D: D * d * u), "The skip is no part of the dynamics."),
        Mistake("the skip summed over N", whole(steps, lambda u, d, A, D: A.shape[1] * D * u), ONCE),
    ),
    hints=(
        "Only time is a loop. At one step Δ and u are (B, D), B and C are (B, N), the state is (B, D, N).",
        'The input enters by "bd,bn->bdn" and the state is read out by "bdn,bn->bd", which sums over N.',
        'A_bar = torch.exp(einsum("bd,dn->bdn", delta[:, t], A)); h = A_bar * h + einsum("bd,bn->bdn", delta[:, t] * '
        'u[:, t], B[:, t]); y_t = einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t].',
    ),
)


def cut_sequences():
    for batch, channels, states, pieces in ((1, 1, 1, (1, 1)), (1, 2, 3, (2, 1, 3)), (2, 3, 4, (1, 5, 2, 3))):
        drawn = problem(batch, sum(pieces), channels, states, 20 + sum(pieces))
        yield Case(f"{len(pieces)} pieces", **drawn, pieces=pieces)


def in_pieces(answer, u, delta, A, B, C, pieces):
    """What the generator yields, and how many pieces it had taken by then."""
    taken, ys, seen = [], [], []

    def arriving():
        for piece in zip(*(x.split(list(pieces), 1) for x in (u, delta, B, C)), strict=True):
            taken.append(piece)
            yield piece

    given = answer(arriving(), A)
    for y in given if hasattr(given, "__iter__") and not isinstance(given, torch.Tensor) else ():
        ys.append(y)
        seen.append(len(taken))
    tensors = ys and all(isinstance(y, torch.Tensor) for y in ys)
    return torch.cat(ys, 1) if tensors else ys[0] if ys else given, torch.tensor(seen)


def streaming(keep, first=iter):
    """A stream whose next piece starts from keep(the states after the pieces so far)."""

    def answer(pieces, A):
        before, after = None, []
        for u, delta, B, C in first(pieces):
            y, h = steps(u, delta, A, B, C, before)
            after.append(h)
            before = keep(after)
            yield y

    return answer


EAGER = "A stream may never end: yield y before you ask for the next piece."
stream = Exercise(
    name="stream",
    asks="stream(pieces, A), a generator: y of each piece (u, delta, B, C), as soon as the piece is there",
    formula="Asked is: start each piece from the state after the piece before it, and the first from zeros.",
    see="07 §5",
    reference=streaming(lambda after: after[-1]),
    inputs=cut_sequences,
    run=in_pieces,
    results=("y (all pieces together)", "pieces taken before each output"),
    mistakes=(
        Mistake("the state lost between pieces", streaming(lambda after: None), "The state is the whole past."),
        Mistake("the first piece's state used for all later ones", streaming(lambda after: after[0])),
        Mistake("a state that is one piece old", streaming(lambda after: after[-2] if len(after) > 1 else None)),
        Mistake("states added up", streaming(sum), "The last state has the earlier ones in it."),
        Mistake("all pieces taken before the first output", streaming(lambda after: after[-1], list), EAGER),
        Mistake("a function without yield", lambda pieces, A: None, "for ...: yield y makes it a generator."),
    ),
    hints=(
        "What is all that a piece must know of the pieces before it?",
        "selective_scan(..., initial_state=state, return_final_state=True) returns y and the state after the piece.",
        "state = None; for u, delta, B, C in pieces: y, state = selective_scan(u, delta, A, B, C, initial_state=state, "
        "return_final_state=True); yield y.",
    ),
)


def low_precision():
    """A in float32, the rest in bfloat16. The last sequences have many small steps: a bfloat16 state stalls there."""
    for length, states, size in ((1, 1, 1), (3, 2, 1), (4, 3, 1), (400, 1, 0.003), (350, 1, 0.0025)):
        drawn = problem(1, length, 1 + (length == 4), states, 30 + length)
        if length > 4:
            drawn |= {"u": 1 + drawn["u"] / 8, "B": torch.ones_like(drawn["B"]), "delta": size + size * drawn["delta"]}
        drawn = {name: x.to(single if name == "A" else half) for name, x in drawn.items()}
        yield Case(f"{length} small steps that add up" if length > 4 else f"length {length}", **drawn)


def state_first(answer, **arguments):
    """The final state before y: of a long sequence only the first entries are printed, and they tell nothing."""
    given = answer(*arguments.values())
    return tuple(given[::-1]) if isinstance(given, tuple | list) and len(given) == 2 else given


def rounded(state=single, decay=single, product=single, y=half, h=single):
    """The loop with its state and Ā rounded to these dtypes at every step, and y and h at the end."""

    def answer(u, delta, A, B, C):
        memory, ys = torch.zeros(u.shape[0], *A.shape), []
        for t in range(u.shape[1]):
            u_t, delta_t, B_t, C_t = (x[:, t].float() for x in (u, delta, B, C))
            A_bar = torch.exp((delta_t[..., None] * A).to(decay)).float()
            memory = (A_bar * memory).to(product) + (delta_t * u_t)[..., None] * B_t[:, None]
            memory = memory.to(state).float()
            ys.append((memory * C_t[:, None]).sum(-1))
        return torch.stack(ys, 1).to(y), memory.to(h)

    return answer


STALL = "Near 0.5 bfloat16 numbers are 0.004 apart: an increment of 0.001 is rounded away, and the state stalls."
scan_bfloat16 = Exercise(
    name="scan_bfloat16",
    asks="scan_bfloat16(u, delta, A, B, C) -> y in the dtype of u (bfloat16), the final state in float32",
    formula="Asked is: y in bfloat16, but the state h and the decay Ā in float32 at every step.",
    see="07 §7",
    reference=rounded(),
    inputs=low_precision,
    run=state_first,
    results=("final state", "y"),
    sizes={"L": ("u", 1)},
    tolerance=0.02,
    mistakes=(
        *(
            Mistake("the state in half precision", wrong, STALL)
            for h in (half, single)
            for wrong in (rounded(half, h=h), rounded(half, half, half, h=h), rounded(half, single, half, h=h))
        ),
        Mistake("the decay in half precision", rounded(decay=half), "Rounded to 8 bits, 0.999 is 1: nothing fades."),
        Mistake("y left in float32", rounded(y=single), "What leaves the layer has the dtype of its input."),
    ),
    hints=(
        "Which of the tensors is read and written again at every step, so that its rounding errors pile up?",
        "A float32 tensor times a bfloat16 tensor is float32. But h *= ... keeps the dtype that h has.",
        "u, delta, B, C = (x.float() for x in (u, delta, B, C)), then the loop as before, and y.to(torch.bfloat16).",
    ),
)

hint, picture = helpers(scan_one, scan, stream, scan_bfloat16)
