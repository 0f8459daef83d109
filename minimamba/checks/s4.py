"""Checks of chapter 05: the Vandermonde kernel, conjugate halves, Woodbury, the turned generating function."""

import cmath
import math
from functools import partial

import torch
from torch.linalg import matrix_power, solve

from minimamba import s4
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers

F64, F32, C128, C64 = torch.float64, torch.float32, torch.complex128, torch.complex64


def normal(*shape, seed, dtype=C128):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=C128).to(dtype)


def modes(N, seed, dtype=C128):
    """Eigenvalues left of zero with different rates and rhythms, one of each pair."""
    z = normal(N, seed=seed)
    return torch.complex(-0.1 - z.real.abs(), 0.5 + 3 * z.imag.abs()).to(dtype)


def pairs():
    """Complex B and C, since real ones hide a conjugation; Δ never 1."""
    for seed, (N, length, delta, dtype) in enumerate(
        [
            (1, 1, 0.5, C128),
            (1, 2, 0.4, C128),
            (2, 5, 0.3, C128),
            (3, 4, 1.6, C64),
            (3, 9, 0.05, C128),
            (4, 7, 2.5, C128),
        ]
    ):
        system = {"eigenvalues": modes(N, seed, dtype), "B": normal(N, seed=seed + 10, dtype=dtype)}
        system["C"] = normal(N, seed=seed + 20, dtype=dtype)
        yield Case(f"{N} pair{'s' if N > 1 else ''}, length {length}", **system, delta=delta, length=length)


def held(z, B, delta):
    return (torch.exp(delta * z) - 1) / z * B


def summed(z, B, C, delta, length, rule=held, rate=None, first=0, basis=None, finish=lambda K: 2 * K.real):
    """2 Re Σ C_n B̄_n Ā_n^l; the options are what can go wrong."""
    steps = torch.arange(first, first + length)
    A_bar_l = torch.exp((delta if rate is None else rate) * z[:, None] * steps)
    C_B = C * rule(z, B, delta)
    return finish(C_B @ (basis(z, steps) if basis else A_bar_l))


def conjugated(*which):
    def wrong(z, B, C, delta, length):
        z, B, C = (x.conj() if name in which else x for name, x in zip("zBC", (z, B, C), strict=True))
        return summed(z, B, C, delta, length)

    return wrong


def too_early(z, B, C, delta, length):
    A_bar_l = torch.exp(delta * z[:, None] * torch.arange(length))
    return 2 * (C * held(z, B, delta)).real @ A_bar_l.real


but = partial(partial, summed)  # but(first=1) is `summed` with another option
CONJUGATE = "Use λ, B and C as they are, or conjugate all three."
RATE = "λ is a rate: the power is e^{lΔλ}. Δ = 1 hides it."
vandermonde = Exercise(
    name="vandermonde",
    asks="vandermonde(eigenvalues, B, C, delta, length) -> S4D's real kernel (L,) from one of each pair",
    formula="Asked is K̄_l = 2 Re Σ_n C_n B̄_n Ā_n^l, l from 0, with Ā_n = e^{Δλ_n} and B̄_n = (Ā_n − 1)/λ_n · B_n.",
    see="05 §7",
    reference=lambda *system: 2 * s4.kernel_diagonal(*system).real,
    inputs=pairs,
    results=("kernel",),
    sizes={"N": ("B", 0)},
    mistakes=(
        Mistake("2·Re missing", but(finish=lambda K: K), "The partners, left out, are the conjugates.", "05 §8"),
        Mistake("the 2 of 2·Re missing", but(finish=lambda K: K.real), "Each state stands for a pair.", "05 §8"),
        Mistake("the Re of 2·Re missing", but(finish=lambda K: 2 * K), "A state and its partner sum up to 2·Re."),
        Mistake("the modulus in place of the real part", but(finish=lambda K: 2 * K.abs())),
        Mistake("Re taken before the product", too_early, "Multiply complex numbers first, then take Re."),
        Mistake("Δ not applied to A", but(rate=1.0), RATE, "05 §8"),
        Mistake("Δ missing everywhere", lambda z, B, C, d, n: summed(z, B, C, 1.0, n), RATE, "05 §8"),
        Mistake("λ^l as the powers", but(basis=lambda z, l: z[:, None] ** l), RATE),
        Mistake("C not conjugated like λ and B", conjugated("C"), CONJUGATE, "05 §8"),
        Mistake("B not conjugated like λ and C", conjugated("B"), CONJUGATE, "05 §8"),
        Mistake("λ not conjugated like B and C", conjugated("z"), CONJUGATE, "05 §8"),
        Mistake("B̄ = ΔB", but(rule=lambda z, B, d: d * B), "That is Mamba's rule.", "02 §6"),
        Mistake("B in place of B̄", but(rule=lambda z, B, d: B), "B has to be discretised too."),
        Mistake("1/λ missing in B̄", but(rule=lambda z, B, d: held(z, B, d) * z)),
        Mistake("one Δ too many in B̄", but(rule=lambda z, B, d: d * held(z, B, d)), "The integral has one already."),
        Mistake("1/Δ too much in B̄", but(rule=lambda z, B, d: held(z, B, d) / d), "1/λ and not 1/(Δλ)."),
        Mistake("the first value left out", but(first=1), "K̄_0 = C B̄: the power of Ā is 0 there."),
        Mistake("powers from 1 down", lambda *system: summed(*system).flip(0), "l rises from 0."),
        Mistake("the bilinear rule", lambda z, *s: 2 * s4.kernel_dplr(z, 0 * z, *s).real, "Here ZOH is asked."),
    ),
    hints=(
        "One row for each state: its powers 1, Ā_n, Ā_n², ... And one number for each state, the weight of that row.",
        "The rows are exp(Δ λ_n l), an outer product inside one exp. The weights are C_n B̄_n. Then 2·Re of the sum.",
        "powers = torch.exp(delta · eigenvalues[:, None] · torch.arange(length)); "
        "B_bar = (torch.exp(delta · eigenvalues) − 1) / eigenvalues · B; return 2 · ((C · B_bar) @ powers).real.",
    ),
)


def dense_systems():
    """Real systems with pairs, with real states, and with both."""
    swing = torch.tensor([[-0.3, 2.0], [-1.0, -0.6]], dtype=F64)
    yield Case("one real state", A=torch.tensor([[-0.5]], dtype=F64), **vectors(1, 0))
    yield Case("one pair", A=swing, **vectors(2, 1))
    yield Case("two real states", A=torch.tensor([[-1.0, 0.4], [0.9, -2.0]], dtype=F64), **vectors(2, 2))
    for N, seed, dtype in ((3, 3, F64), (4, 4, F32), (5, 5, F64), (7, 6, F64)):
        A = normal(N, N, seed=seed).real
        A = A - (torch.linalg.eigvals(A).real.max() + 0.2) * torch.eye(N, dtype=F64)
        yield Case(f"{N} states", A=A.to(dtype), **vectors(N, seed, dtype))


def vectors(N, seed, dtype=F64):
    z = normal(N, seed=seed + 30)
    return {"B": z.real.to(dtype), "C": z.imag.to(dtype)}


def kernel_of(answer, A, B, C):
    """The kernel of the diagonal system that the answer returns, and how many states it keeps."""
    kept = answer(A, B, C)
    if not isinstance(kept, tuple | list) or len(kept) != 3 or not all(isinstance(x, torch.Tensor) for x in kept):
        raise TypeError("expected three tensors from your function, the eigenvalues, B' and C'")
    if any(x.shape != kept[0].shape or x.ndim != 1 for x in kept):
        raise TypeError(f"expected three tensors of one shape (H,), got {', '.join(str(tuple(x.shape)) for x in kept)}")
    return summed(*(x.to(A.dtype.to_complex()) for x in kept), 0.3, 12, finish=lambda K: K.real), len(kept[0])


def kept(A, B, C, keep=lambda z: z.imag >= 0, pair=2.0, alone=1.0, B_new=solve, C_new=torch.matmul):
    z, V = torch.linalg.eig(A)
    B, C = B_new(V, B.to(V.dtype)), C_new(C.to(V.dtype), V)
    some = keep(z) if callable(keep) else slice(keep)
    return z[some], B[some], (torch.where(z.imag != 0, pair, alone).to(V.real.dtype) * C)[some]


INVERSE = "h = V h′, so B′ = V⁻¹ B and C′ = C V. V is not unitary here."
ALONE = "A real eigenvalue has no partner: it counts once, with weight 1."
halves = Exercise(
    name="halves",
    asks="halves(A, B, C) -> eigenvalues, B′, C′ (H,), one of each conjugate pair and each real state once",
    formula="Asked is λ, B′ = V⁻¹B and C′ = C V, with 2 C′ for a pair, so that Re Σ C′_n B̄′_n Ā_n^l is the kernel.",
    see="05 §7",
    reference=kept,
    inputs=dense_systems,
    run=kernel_of,
    results=("kernel", "states kept"),
    sizes={"N": ("A", 0)},
    tolerance=1e-4,
    mistakes=(
        Mistake("pairs without their factor 2", partial(kept, pair=1.0), "Each kept state of a pair counts for two."),
        Mistake("real states counted twice", partial(kept, alone=2.0), ALONE),
        Mistake("real states left out", partial(kept, keep=lambda z: z.imag > 0), ALONE),
        Mistake("all states kept", partial(kept, keep=lambda z: z.imag < math.inf, pair=1.0), "Half suffices."),
        Mistake("all states kept, and the factor 2", partial(kept, keep=lambda z: z.imag < math.inf)),
        Mistake("Vᵀ B in place of V⁻¹ B", partial(kept, B_new=lambda V, B: V.T @ B), INVERSE),
        Mistake("V* B in place of V⁻¹ B", partial(kept, B_new=lambda V, B: V.mH @ B), INVERSE),
        Mistake("V B in place of V⁻¹ B", partial(kept, B_new=lambda V, B: V @ B), INVERSE),
        Mistake("B not taken to the new basis", partial(kept, B_new=lambda V, B: B), INVERSE),
        Mistake("C not taken to the new basis", partial(kept, C_new=lambda C, V: C), INVERSE),
        Mistake("C not conjugated like λ and B", partial(kept, C_new=lambda C, V: C @ V.conj()), CONJUGATE, "05 §8"),
        Mistake("V⁻¹ C in place of C V", partial(kept, C_new=lambda C, V: solve(V, C)), INVERSE),
        Mistake("A transposed", lambda A, B, C: kept(A.T, B, C), "torch.linalg.eig(A), of A as it is."),
    ),
    hints=(
        "torch.linalg.eig(A) gives A V = V Λ. In the new basis h = V h′. What are B′ and C′?",
        "Keep where eigenvalues.imag >= 0: one of each pair, and the real ones. The factor 2 of a pair goes into C′.",
        "z, V = torch.linalg.eig(A); B = torch.linalg.solve(V, B.to(V.dtype)); C = C.to(V.dtype) @ V; "
        "keep = z.imag >= 0; weight = torch.where(z.imag > 0, 2.0, 1.0); return z[keep], B[keep], (weight · C)[keep].",
    ),
)


def low_rank():
    for seed, (N, dtype) in enumerate([(2, C128), (2, C128), (3, C64), (3, C128), (6, C128)]):
        s = complex(normal(1, seed=seed + 60).item())
        P, b = (normal(N, seed=seed + k, dtype=dtype) for k in (40, 50))
        yield Case(f"{N} states", eigenvalues=modes(N, seed, dtype), P=P, s=s, b=b)


def by_woodbury(z, P, s, b, sign=-1, one=1, inner=1, left=torch.conj, right=torch.conj, total=torch.sum):
    Q = 1 / (s - z)
    return Q * b + sign * Q * P * total(left(P) * Q * b) / (one + inner * total(right(P) * Q * P))


def same(x):
    return x


STAR = "P* is the conjugate transpose: with a real P nothing shows."
WOODBURY = "Woodbury: with R the inverse of the diagonal D, (D + P P*)⁻¹ = R − R P P* R / (1 + P* R P)."
woodbury = Exercise(
    name="woodbury",
    asks="woodbury(eigenvalues, P, s, b) -> x (N,) with (s I − A) x = b for A = Λ − P P*, in O(N) operations",
    formula="Asked is x = R b − R P (P* R b) / (1 + P* R P) with the diagonal R = 1/(s − λ).",
    see="05 §4",
    reference=by_woodbury,
    inputs=low_rank,
    results=("x",),
    sizes={"N": ("b", 0)},
    mistakes=(
        Mistake("PPᵀ in place of PP*", partial(by_woodbury, left=same, right=same), STAR, "05 §8"),
        Mistake("P not conjugated in P* R b", partial(by_woodbury, left=same), STAR, "05 §8"),
        Mistake("P not conjugated in P* R P", partial(by_woodbury, right=same), STAR, "05 §8"),
        Mistake("the conjugate of P on the wrong side", lambda z, P, s, b: by_woodbury(z, P.conj(), s, b), STAR),
        Mistake("P left out", lambda z, P, s, b: b / (s - z), "That is S4D's system, without the low rank.", "05 §7"),
        Mistake("a plus before the correction", partial(by_woodbury, sign=1), WOODBURY),
        Mistake("1 − P* R P in the denominator", partial(by_woodbury, inner=-1), WOODBURY),
        Mistake("P* R P without the 1", partial(by_woodbury, one=0), WOODBURY),
        Mistake("A = Λ + P P*", partial(by_woodbury, sign=1, inner=-1), "A has a minus there, s I − A a plus."),
        Mistake("s + λ in place of s − λ", lambda z, P, s, b: by_woodbury(-z, P, s, b), "The matrix is s I − A."),
        Mistake("A − s I in place of s I − A", lambda z, P, s, b: -by_woodbury(z, P, s, b)),
        Mistake("products that are not summed", partial(by_woodbury, total=same), "P* R b is one number: sum over n."),
        Mistake("A x", lambda z, P, s, b: s * b - z * b + P * (P.conj() @ b), "Solve, do not multiply."),
    ),
    hints=(
        "s I − A is diagonal plus one of rank one, P P*. Which identity inverts such a sum?",
        "With R = 1/(s − λ) all you need are two numbers, P* R b and P* R P, each a sum of conj(P)·R·(...).",
        "R = 1 / (s − eigenvalues); PB = (P.conj()·R·b).sum(); PP = (P.conj()·R·P).sum(); "
        "return R·b − R·P·PB / (1 + PP).",
    ),
)


def identity(A):
    return torch.eye(len(A), dtype=A.dtype)


def turned_systems():
    for seed, (N, length, turn) in enumerate(
        [(1, 1, 0.0), (1, 2, 0.5), (2, 3, 0.0), (3, 5, 0.3), (3, 4, 0.5), (2, 7, 0.8)]
    ):
        A = normal(N, N, seed=seed + 90).real
        A_bar = 0.9 / torch.linalg.eigvals(A).abs().max() * A
        B_bar, C = vectors(N, seed + 60).values()
        yield Case(f"length {length}, a turn of {turn:g}", A_bar=A_bar, B_bar=B_bar, C=C, length=length, turn=turn)


def by_powers(A_bar, B_bar, C, length, turn):
    return torch.stack([C @ matrix_power(A_bar, lag) @ B_bar for lag in range(length)])


def at_points(A_bar, B_bar, C, length, turn, cut=1, at=None, back=1, around=-1, finish=torch.real):
    A, B, C = (x.to(C128) for x in (A_bar, B_bar, C))
    k = torch.arange(length, dtype=F64)
    z = torch.exp(around * 2j * math.pi * (k + turn) / length)
    z_L = cmath.exp(around * 2j * math.pi * (turn if at is None else at))
    row = C @ (identity(A) - cut * z_L * matrix_power(A, length))
    values = torch.linalg.inv(identity(A) - z[:, None, None] * A) @ B @ row
    return finish(torch.fft.ifft(values) * torch.exp(back * 2j * math.pi * turn * k / length))


POINTS = "All z_k have the same z^L = e^{−2πi·turn}, which is 1 only without a turn."
TURN = "The inverse FFT gives K̄_l e^{−2πi·turn·l/L}: take the turn back."
turned = Exercise(
    name="turned",
    asks="turned(A_bar, B_bar, C, length, turn) -> the kernel (L,), real, from L points z_k = e^{−2πi(k + turn)/L}",
    formula="Asked is the inverse FFT of C (I − z^L Ā^L)(I − z_k Ā)⁻¹ B̄ over k, times e^{2πi·turn·l/L}; its real part.",
    see="05 §3",
    reference=by_powers,
    inputs=turned_systems,
    results=("kernel",),
    sizes={"N": ("C", 0)},
    tolerance=1e-5,
    mistakes=(
        Mistake("C in place of C̃", partial(at_points, cut=0), "Without I − z^L Ā^L all later values wrap around."),
        Mistake("z^L taken for 1", partial(at_points, at=0.0), POINTS, "05 §5"),
        Mistake("z^L taken for −1", partial(at_points, at=0.5), POINTS, "05 §5"),
        Mistake("z^L with the wrong sign in its exponent", lambda *s: at_points(*s, at=-s[-1]), POINTS, "05 §5"),
        Mistake("a plus in the truncation", partial(at_points, cut=-1), POINTS),
        Mistake("a kernel not turned back", partial(at_points, back=0), TURN, "05 §5"),
        Mistake("a turn in the wrong direction", partial(at_points, back=-1), TURN, "05 §5"),
        Mistake("the modulus in place of the real part", partial(at_points, finish=torch.abs), "It may be negative."),
        Mistake("the real part not taken", partial(at_points, finish=same), "The kernel of a real system is real."),
        Mistake("no 1/L", lambda *s: by_powers(*s) * s[-2], "torch.fft.ifft divides by L already."),
        Mistake("1/L twice", lambda *s: by_powers(*s) / s[-2], "torch.fft.ifft divides by L already."),
        Mistake("points on the other side", lambda *s: at_points(*s, around=1, back=-1), "z_k = e^{−2πi(k + turn)/L}."),
        Mistake("A transposed", lambda A, *s: by_powers(A.T, *s), "Use A as it is."),
        Mistake("a kernel that begins at C Ā B̄", lambda A, B, *s: by_powers(A, A @ B, *s), "K̄_0 = C B̄."),
    ),
    hints=(
        "All z_k have the same z_k^L. Which number is it? With it C̃ = C (I − z^L Ā^L) is one row for all points.",
        "Solve (I − z_k Ā) x = B̄ for each k and read C̃ x. torch.fft.ifft over k gives K̄_l e^{−2πi·turn·l/L}.",
        "Make all complex; row = C @ (I − e^{−2πi·turn}·matrix_power(A_bar, L)); values = torch.linalg.solve(I − "
        "z[:, None, None]·A_bar, B_bar.expand(L, −1)) @ row; return (ifft(values)·e^{2πi·turn·l/L}).real.",
    ),
)

hint, picture = helpers(vandermonde, halves, woodbury, turned)
