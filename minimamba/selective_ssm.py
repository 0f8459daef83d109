"""Chapter 06: the selective state space layer. Δ, B and C come from the input."""

import contextlib
import math

import torch
from torch import nn
from torch.nn.functional import softplus

from minimamba._autocast import autocast_dtype, widen
from minimamba._validation import check_option, check_shape, check_tensor
from minimamba.interface import METHODS, selective_scan, selective_state_update


class SelectiveSSM(nn.Module):
    """A selective SSM over d_model channels: Δ = softplus(W_Δ x + b), B = W_B x, C = W_C x, then the scan.

    u (B, L, d_model) -> y (B, L, d_model). Parameters have the official names and initial values: A = -exp(A_log)
    starts at -1, ..., -N in every channel, softplus of `dt_proj.bias` is log-uniform in [dt_min, dt_max].
    `A_log` and `D` are made in float32 whatever the dtype (float64 in float64); the scan always reads them so.
    Source: Mamba (Gu and Dao, 2023), Algorithm 2 and section 3.6.
    """

    def __init__(
        self,
        d_model,
        d_state=16,
        *,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        method="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("dt_rank", dt_rank)):
            if not (type(size) is int and size >= 1) and not (name == "dt_rank" and size == "auto"):
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for name, value in (("dt_min", dt_min), ("dt_max", dt_max), ("dt_init_floor", dt_init_floor)):
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min: expected 0 < dt_min <= dt_max = {dt_max}, got {dt_min}")
        check_option("method", method, METHODS)
        self.d_model, self.d_state, self.dt_rank, self.method = d_model, d_state, dt_rank, method
        factory = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        self.x_proj = nn.Linear(d_model, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, d_model, bias=True, **factory)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1, **wide)).repeat(d_model, 1))
        self.D = nn.Parameter(torch.ones(d_model, **wide))
        # Marks that optimisers and initialisers of the official package look for.
        self.A_log._no_weight_decay = self.D._no_weight_decay = self.dt_proj.bias._no_reinit = True
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = torch.exp(torch.empty(d_model, **wide).uniform_(math.log(dt_min), math.log(dt_max)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(step.clamp(min=dt_init_floor)))

    def forward(self, u, initial_state=None, return_final_state=False, cu_seqlens=None):
        """Run whole sequences u (B, L, d_model); states (B, d_model, d_state) as in `selective_scan`."""
        dt, B, C = self._project(u)
        return selective_scan(
            u, dt, self.A, B, C, widen(self.D), delta_softplus=True, initial_state=initial_state,
            return_final_state=return_final_state, cu_seqlens=cu_seqlens, method=self.method,
        )  # fmt: skip

    def project(self, u):
        """Return Δ (..., d_model), B and C (..., d_state), made from u (..., d_model)."""
        dt, B, C = self._project(u)
        return softplus(dt), B, C

    def _project(self, u):
        """The same with Δ before its softplus, which the scan takes in full precision."""
        narrow = (torch.float32, torch.bfloat16, torch.float16)
        dtypes = (torch.float64,) if self.A_log.dtype == torch.float64 else narrow
        check_tensor("u", u, dtypes=dtypes, device=self.A_log.device, like=" (the layer's)")
        check_shape("u", u, ("...",) * (u.ndim - 1) + (self.d_model,))
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return apply_dt_proj(self.dt_proj, dt), B, C

    @property
    def A(self):
        """The state matrix -exp(A_log) (d_model, d_state): negative whatever A_log learns."""
        return -torch.exp(widen(self.A_log))

    def allocate_state(self, batch):
        """Return a zero state (batch, d_model, d_state) for `step`."""
        return torch.zeros_like(self.A).repeat(batch, 1, 1)

    @torch.no_grad()
    def step(self, u, state):
        """Take in one step u (B, d_model), overwrite `state`, and return y (B, d_model). Has no gradient."""
        check_tensor("u", u)
        check_shape("u", u, ("B", self.d_model))
        check_tensor("state", state)
        check_shape("state", state, (u.shape[0], self.d_model, self.d_state))
        dt, B, C = self._project(u)
        u = u.to(B.dtype)  # what autocast does to the input of a scan
        return selective_state_update(state, u, dt, self.A, B, C, widen(self.D), dt_softplus=True)


def apply_dt_proj(dt_proj, dt):
    """Return dt_proj(dt), Δ before its softplus, in the precision of dt_proj's own parameters.

    Outside autocast: where Δ is 0.001 its bias is -7, which bfloat16 rounds to a multiple of 1/32, and Δ would be wrong
    by up to 1.6 %, always to the same side. The official code adds the bias in the scan, in float32; here `dt_proj` may
    be any module, so it is called.
    """
    low = autocast_dtype(dt)
    with contextlib.nullcontext() if low is None else torch.autocast(dt.device.type, enabled=False):
        delta = dt_proj(dt.to(dtype_of(dt_proj, dt.dtype)))
    return delta if low is None else widen(delta)


def dtype_of(module, default):
    """The floating-point dtype of a module's parameters, `default` if it has none."""
    return next((x.dtype for x in module.parameters() if x.is_floating_point()), default)


def inverse_softplus(y):
    """Return x with softplus(x) = y > 0: log(exp(y) - 1), written so that large y does not overflow."""
    return y + torch.log(-torch.expm1(-y))
