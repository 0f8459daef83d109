"""Chapter 05: S4 and S4D. A long kernel from a structured state matrix, and the two layers made of it.

    A = Λ - P P*                                      diagonal plus low rank (DPLR): HiPPO's A in the right basis
    K̂(z) = Σ_{l<L} K̄_l z^l = C̃ (I - Ā z)^-1 B̄        C̃ = C (I - z^L Ā^L): the same for all z of one z^L
    K̄ = inverse FFT of K̂                              L points z on the unit circle, K̂ from Cauchy sums (Woodbury)
    K̄_l = Σ_n C_n B̄_n Ā_n^l                          S4D: without P the kernel is a Vandermonde product

Λ (`eigenvalues`), P, B and C are (..., N), Δ is a number or (...), and the axes "..." broadcast. C is not conjugated.
A real system has complex states in conjugate pairs: one of each is enough, with 2·Re of a diagonal kernel. The layers
keep such halves. Re Λ < 0 is taken for granted; A is then stable, since -P P* only adds damping.

Sources: Efficiently Modeling Long Sequences with Structured State Spaces (S4; Gu, Goel and Ré, 2021), algorithm 1;
On the Parameterization and Initialization of Diagonal State Space Models (S4D; Gu, Gupta, Goel and Ré, 2022).
"""

import math

import torch
from torch import nn

from minimamba import hippo
from minimamba._validation import check_counts, check_delta, check_numbers, check_option, check_shape, check_tensor
from minimamba.convolution import convolve_fft
from minimamba.discretization import bilinear, zoh_diagonal

INITS = ("lin", "inv", "legs", "real", "random")


# --- the kernels ---


def kernel_dplr(eigenvalues, P, B, C, delta, length):
    """Return the kernel K̄ (..., length) of A = diag(eigenvalues) - P P* under the bilinear rule; .real, if it is.

    O(N L), after N³ log L for the power Ā^L, which S4's own code saves by learning C̃ in place of C. The paper takes
    z^L = 1, where C̃ = C (I - Ā^L) cancels for a small ΔL. We turn its points by half a step: z^L = -1 adds instead.
    Source: S4, algorithm 1; the paper's second low-rank vector Q is P here.
    """
    eigenvalues, P, B, C, delta = _check_system(delta, eigenvalues=eigenvalues, P=P, B=B, C=C)
    check_counts(length=length)
    A_bar, _ = bilinear(dense(eigenvalues, P), torch.zeros_like(P), delta)
    C_truncated = C + torch.einsum("...n,...nm->...m", C, torch.linalg.matrix_power(A_bar, length))  # C̃
    half_turn = math.pi / length * torch.arange(length, dtype=torch.float64, device=delta.device)
    angles = 2 * half_turn + math.pi / length
    angles = torch.where(angles > math.pi, angles - 2 * math.pi, angles)  # float32 is finest near 0, and not near 2π
    angles = angles.to(delta.dtype)
    turned = torch.fft.ifft(generating_function(eigenvalues, P, B, C_truncated, delta, angles))  # K̄_l e^{-iπl/L}
    return turned * torch.exp(1j * half_turn).to(turned.dtype)


def generating_function(eigenvalues, P, B, C, delta, angles):
    """Return Σ_{l≥0} C Ā^l B̄ z^l = C (I - Ā z)^-1 B̄ (..., T) for `kernel_dplr`'s A; z = e^{-i·angle}, angles (T,) real.

    The bilinear rule gives (I - Ā z)^-1 B̄ = [(1 - z) I - Δ/2 (1 + z) A]^-1 ΔB. On the circle 1 - z is 2i sin(angle/2)
    and 1 + z is 2 cos(angle/2), both times e^{-i·angle/2}: written so, nothing is divided by the 1 + z that vanishes
    at z = -1, and nothing cancels near z = 1, if the angles there are near 0: near 2π a float32 angle has lost the
    digits that its sine needs. Keep them in (-π, π]. Woodbury's identity inverts diagonal plus rank one.
    """
    eigenvalues, P, B, C, delta = _check_system(delta, eigenvalues=eigenvalues, P=P, B=B, C=C)
    check_tensor("angles", angles, dtypes=(delta.dtype,), device=delta.device, like=" (delta's)")
    check_shape("angles", angles, ("T",))
    sin, cos = torch.sin(angles / 2), torch.cos(angles / 2)  # (T,)
    step = delta[..., None] / 2 * cos  # (..., T), Δ/2 (1 + z) without the phase
    cauchy = 1 / (1j * sin[:, None] - step[..., None] * eigenvalues[..., None, :])  # (..., T, N)
    numerators = torch.stack(torch.broadcast_tensors(C * B, C * P, P.conj() * B, P.conj() * P), dim=-1)  # (..., N, 4)
    CB, CP, PB, PP = (cauchy @ numerators).unbind(-1)  # (..., T) each: four Cauchy sums over n
    phase = torch.polar(torch.ones_like(angles), angles / 2)
    return delta[..., None] / 2 * phase * (CB - step * CP * PB / (1 + step * PP))


def kernel_diagonal(eigenvalues, B, C, delta, length):
    """Return Σ_n C_n B̄_n Ā_n^l (..., length) for l < length under ZOH: a row times a Vandermonde matrix. O(N L).

    eigenvalues, B, C (..., N), delta a number or (...). Of each conjugate pair give one and take 2·Re. The powers
    are exp(l Δλ): rounding Ā first and then raising it to the l would multiply its error by l. Source: S4D, section 3.
    """
    eigenvalues, B, C, delta = _check_system(delta, eigenvalues=eigenvalues, B=B, C=C)
    check_counts(length=length)
    _, B_bar = zoh_diagonal(eigenvalues, B, delta)
    steps = torch.arange(length, device=delta.device, dtype=delta.dtype)
    powers = torch.exp((delta[..., None] * eigenvalues)[..., None] * steps)  # (..., N, L), row n is 1, Ā_n, Ā_n², ...
    return ((C * B_bar)[..., None, :] @ powers)[..., 0, :]


def dense(eigenvalues, P):
    """Return A = diag(eigenvalues) - P P* (..., N, N) from vectors (..., N)."""
    return torch.diag_embed(eigenvalues) - P[..., :, None] * P.conj()[..., None, :]


def initial_modes(init, N):
    """Return the modes that a real system of N states keeps: eigenvalues (H,) complex128, multiplicity (H,) float64.

    "lin": -1/2 + iπn. "inv": -1/2 + i N/π (N/(2n+1) - 1). "legs": HiPPO-LegS without its rank one. "real": -(n+1).
    "random": -e^ξ/2 + i|η|, ξ and η normal, from PyTorch's generator. Frequencies rise. A pair counts 2 and has one
    mode, a real state counts 1: the first if N is odd, and all of "real". Source: S4D, section 4 (random: ours).
    """
    check_option("init", init, INITS)
    check_counts(N=N)
    half = (N + 1) // 2
    n = torch.arange(half, dtype=torch.float64)
    if init == "real":
        eigenvalues = -1.0 - torch.arange(N, dtype=torch.float64)
        return eigenvalues.to(torch.complex128), torch.ones(N, dtype=torch.float64)
    decay = torch.full_like(n, 0.5)
    if init == "lin":
        frequency = math.pi * n
    elif init == "inv":
        frequency = N / math.pi * (N / (2 * n.flip(0) + 1) - 1)
    elif init == "legs":
        frequency = hippo.nplr(N)[0].imag[N // 2 :].clone()
    else:
        decay, frequency = torch.randn_like(n).exp() / 2, torch.randn_like(n).abs().sort().values
    multiplicity = torch.full_like(n, 2)
    if N % 2:
        frequency[0], multiplicity[0] = 0, 1
    return torch.complex(-decay, frequency), multiplicity


# --- the layers ---


class Layer(nn.Module):
    """What `S4` and `S4D` share: Δ, Λ, C and the skip D for each of D channels, and the two modes of running them.

    Call it with u (B, L, D) to get y of that shape. `step` does one u_t (B, D) from a `state`.
    """

    slow = ("log_delta", "log_decay", "frequency")  # trained with a small learning rate, see `parameter_groups`

    def __init__(self, channels, modes, bidirectional, delta_min, delta_max):
        super().__init__()
        check_counts(channels=channels)
        if not 0 < delta_min <= delta_max < math.inf:
            raise ValueError(f"delta_min: expected 0 < delta_min <= delta_max, got {delta_min} and {delta_max}")
        eigenvalues, multiplicity = modes
        shape = (channels, len(eigenvalues))
        low, high = math.log(delta_min), math.log(delta_max)
        real = torch.get_default_dtype()
        self.log_delta = nn.Parameter(low + (high - low) * torch.rand(channels))
        self.log_decay = nn.Parameter((-eigenvalues.real).log().to(real).repeat(channels, 1))  # Re λ < 0, always
        self.frequency = nn.Parameter(eigenvalues.imag.to(real).repeat(channels, 1))
        self.C = nn.Parameter(torch.randn(2 if bidirectional else 1, *shape, 2) * 0.5**0.5)  # complex, variance 1
        self.D = nn.Parameter(torch.randn(channels))
        self.register_buffer("multiplicity", multiplicity.to(real))  # (H,)
        self.bidirectional = bidirectional
        self.states = len(eigenvalues)  # in `step`: one of each pair

    def forward(self, u):
        """Convolution mode: u (B, L, D) -> y (B, L, D)."""
        self.check_input(u, ("B", "L", len(self.D)))
        forward, *backward = self.kernel(u.shape[1])
        y = convolve_fft(u, forward, self.D)
        for kernel in backward:  # the same system, with its own C, from the end to the beginning
            y = y + convolve_fft(u.flip(1), kernel).flip(1)
        return y

    def step(self, u, state):
        """Recurrent mode: u (B, D) and the state before it -> y (B, D) and the state after it."""
        if self.bidirectional:
            raise ValueError("bidirectional: expected False for streaming, as the future is not known yet, got True")
        self.check_input(u, ("B", len(self.D)))
        check_shape("state", state, (len(u), len(self.D), self.states))
        state = self.advance(u, state)
        return (self.readout() * state).sum(-1).real + self.D * u, state

    def initial_state(self, batch):
        """Zeros (batch, D, states), complex."""
        dtype, device = self.D.dtype.to_complex(), self.D.device
        return torch.zeros(batch, len(self.D), self.states, dtype=dtype, device=device)

    def check_input(self, u, shape):
        check_tensor("u", u, dtypes=(self.D.dtype,), device=self.D.device, like=" (the layer's)")
        check_shape("u", u, shape)

    def complex(self, x):
        """A parameter (..., H, 2) as complex (..., H), real where the state has no partner."""
        return torch.complex(x[..., 0], x[..., 1] * (self.multiplicity - 1))

    def eigenvalues(self):
        return self.complex(torch.stack([-self.log_decay.exp(), self.frequency], dim=-1))  # (D, H)


class S4D(Layer):
    """The diagonal layer. Only the products C_n B_n matter, so that B is fixed at 1. ZOH. Source: S4D, section 3.

    channels D, state_size N real numbers of state for each, init one of `INITS`; Δ starts log-uniform between
    delta_min and delta_max, in the time unit of the rates A. A bidirectional layer cannot `step`.
    """

    def __init__(self, channels, state_size=64, *, init="lin", bidirectional=False, delta_min=1e-3, delta_max=1e-1):
        super().__init__(channels, initial_modes(init, state_size), bidirectional, delta_min, delta_max)

    def kernel(self, length):
        """Return the real kernels (1 or 2 directions, D, length)."""
        eigenvalues = self.eigenvalues()
        C = self.readout(directions=slice(None))
        return kernel_diagonal(eigenvalues, torch.ones_like(eigenvalues), C, self.log_delta.exp(), length).real

    def advance(self, u, state):
        eigenvalues = self.eigenvalues()
        A_bar, B_bar = zoh_diagonal(eigenvalues, torch.ones_like(eigenvalues), self.log_delta.exp())
        return A_bar * state + B_bar * u[..., None]

    def readout(self, directions=0):
        return self.multiplicity * self.complex(self.C[directions])  # 2·Re for a pair


class S4(Layer):
    """The layer with HiPPO's full matrix, A = Λ - P P* learned from HiPPO-LegS on. Bilinear. Source: S4, section 3.

    Arguments as for `S4D`, whose initialisations it does not have. One of each conjugate pair is kept and trained.
    """

    slow = (*Layer.slow, "P", "B")

    def __init__(self, channels, state_size=64, *, bidirectional=False, delta_min=1e-3, delta_max=1e-1):
        super().__init__(channels, initial_modes("legs", state_size), bidirectional, delta_min, delta_max)
        _, P, B, _ = hippo.nplr(state_size)
        P, B = P[state_size // 2 :], B[state_size // 2 :]  # eigenvalues ascend: these have frequency >= 0
        real = torch.get_default_dtype()
        self.P, self.B = (nn.Parameter(torch.view_as_real(x).to(real).repeat(channels, 1, 1)) for x in (P, B))
        self.states = state_size  # in `step`: all, see `whole`

    def kernel(self, length):
        """Return the real kernels (1 or 2 directions, D, length)."""
        eigenvalues, P, B = self.system()
        return kernel_dplr(eigenvalues, P, B, self.readout(slice(None)), self.log_delta.exp(), length).real

    def system(self):
        return self.whole(self.eigenvalues()), self.whole(self.complex(self.P)), self.whole(self.complex(self.B))

    def whole(self, half):
        """From one of each pair (..., H) to all N: P P* mixes a state with the partners of the others."""
        return torch.cat([half, half[..., self.states % 2 :].conj()], dim=-1)

    def advance(self, u, state):
        """(I - Δ/2 A) h_k = (I + Δ/2 A) h_{k-1} + ΔB u_k in O(N), by Woodbury as in `generating_function`."""
        eigenvalues, P, B = self.system()
        delta = self.log_delta.exp()[:, None]  # (D, 1)
        half_slope = delta / 2 * (eigenvalues * state - P * (P.conj() * state).sum(-1, keepdim=True))
        right = state + half_slope + delta * B * u[..., None]
        inverse = 1 / (1 - delta / 2 * eigenvalues)
        PR, PP = ((P.conj() * inverse * x).sum(-1, keepdim=True) for x in (right, P))
        return inverse * (right - delta / 2 * P * PR / (1 + delta / 2 * PP))

    def readout(self, directions=0):
        return self.whole(self.complex(self.C[directions]))


def parameter_groups(model, lr, weight_decay, slow_lr=1e-3):
    """Return AdamW's parameter groups: what shapes Ā and B̄ gets min(lr, slow_lr) and no decay, the rest as given.

    Source: the appendices of S4 and S4D.
    """
    slow = [
        parameter
        for module in model.modules()
        if isinstance(module, Layer)
        for name, parameter in module.named_parameters(recurse=False)
        if name in module.slow
    ]
    known = set(map(id, slow))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": slow, "lr": min(lr, slow_lr), "weight_decay": 0.0},
    ]


# --- arguments ---


def _check_system(delta, **vectors):
    """Check vectors (..., N) and delta (...), and that their axes broadcast. Return the vectors, complex, and delta."""
    values = check_numbers(**vectors)
    (first, eigenvalues), *_ = zip(vectors, values, strict=True)
    if eigenvalues.ndim == 0 or eigenvalues.shape[-1] == 0:
        raise ValueError(f"{first}: expected shape (..., N) with N >= 1, got {tuple(eigenvalues.shape)}")
    N = eigenvalues.shape[-1]
    delta = check_delta(delta, eigenvalues)
    axes = ()
    for name, value in (*zip(vectors, values, strict=True), ("delta", delta[..., None])):
        if name != "delta" and (value.ndim == 0 or value.shape[-1] != N):
            raise ValueError(f"{name}: expected shape (..., {N}), N as in {first}, got {tuple(value.shape)}")
        try:
            axes = torch.broadcast_shapes(axes, value.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"{name}: expected axes that broadcast against {tuple(axes)}, got {tuple(value.shape[:-1])}"
            ) from None
    return [*(x.to(x.dtype.to_complex()) for x in values), delta]
