"""Chapter 12: the Mamba block. A short convolution in front of the selective scan, and a gate behind it.

    x, z = W_in h            each token becomes two vectors of d_inner = expand · d_model channels
    u    = silu(conv(x))     each channel mixed with its own last d_conv - 1 inputs
    y    = SSM(u)            Δ, B, C from u, then the scan (chapters 06 to 11)
    out  = W_out (y · silu(z))

One step at a time the block keeps the last inputs of the convolution and the state of the scan: `MambaCache`, whose
size does not depend on how much has been read. Whole sequences, pieces of them and single steps give the same.

Source: Mamba (Gu and Dao, 2023), figure 3 and section 3.4; names and initial values as in the package mamba_ssm.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

from minimamba._autocast import autocast_dtype, widen
from minimamba._validation import check_option, check_positive_sizes, check_shape, check_tensor, document_borders
from minimamba.interface import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from minimamba.selective_ssm import SelectiveSSM, apply_dt_proj, dtype_of


class MambaCache(NamedTuple):
    """What a block remembers of the B sequences it has read; a pair in the official order.

    Of the size (B, d_inner, d_conv + d_state), however long they are. Source: state-spaces/mamba, `Mamba`'s cache.
    """

    conv_state: torch.Tensor  # (B, d_inner, d_conv), the last inputs of the convolution, the newest at the end
    ssm_state: torch.Tensor  # (B, d_inner, d_state), the state of the scan; float32, or float64 in float64


class Mamba(nn.Module):
    """The Mamba block, hidden_states (B, L, d_model) -> (B, L, d_model), each step from itself and earlier ones.

    Arguments, their order and defaults, parameter names and initial values are those of `mamba_ssm.Mamba`, so
    that configurations and weights can be exchanged. dt_rank: "auto" is d_model / 16, rounded up. dt_init: "random"
    or "constant", how `dt_proj.weight` starts. `use_fast_path` is accepted for the sake of the signature: there is one
    path, the fastest of the device. `layer_idx` is only kept. `A_log` and `D` are float32 whatever the dtype (float64
    in float64), and so is the state.

    A linear layer may be replaced by any module that maps the same sizes (LoRA, quantised): it is called, its weight is
    not looked at. So may `conv1d`; a plain `nn.Conv1d` is not called, its weight goes to the fused `causal_conv1d`.
    Source: Mamba (Gu and Dao, 2023), figure 3 and section 3.4.
    """

    def __init__(
        self,
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            if not (type(size) is int and size >= 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        if not isinstance(expand, int | float) or not 1 <= expand * d_model < math.inf:
            raise ValueError(f"expand: expected a number with expand · d_model >= 1, got {expand!r}")
        if not isinstance(dt_scale, int | float) or not 0 <= dt_scale < math.inf:
            raise ValueError(f"dt_scale: expected a finite number, got {dt_scale!r}")
        check_option("dt_init", dt_init, ("random", "constant"))
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.layer_idx = layer_idx
        factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        # Chapter 06's layer with its initial values; its parameters are held here, under the official names.
        ssm = SelectiveSSM(
            self.d_inner, d_state, dt_rank=self.dt_rank, dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor,
            **factory,
        )  # fmt: skip
        self.x_proj, self.dt_proj, self.A_log, self.D = ssm.x_proj, ssm.dt_proj, ssm.A_log, ssm.D
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(self.dt_rank**-0.5)
            self.dt_proj.weight.mul_(dt_scale)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.register_load_state_dict_post_hook(_mark)

    def forward(self, hidden_states, cache=None, *, mask=None, cu_seqlens=None):
        """Run L >= 1 steps. With `cache`, continue from what it holds and leave in it what comes after them.

        mask : (B, L) bool, False for padding, which counts as not there wherever it stands: it changes no other
            output and no cache, and its own output is zero.
        cu_seqlens : (documents + 1,) int32 or int64, borders of the documents packed in one row: 0, ..., L. The batch
            is then 1, and each document is read as if it were alone. Not together with `cache` or `mask`.

        Gradients reach `hidden_states` and the parameters, and stop at the cache.
        """
        self._check(hidden_states, cache, mask, cu_seqlens)
        if cache is not None and mask is None and hidden_states.shape[1] == 1 and not torch.is_grad_enabled():
            return self.step(hidden_states, *cache)[0]
        if mask is not None:  # move the padding to the end of each row, where nothing comes after it
            order = (~mask).byte().argsort(dim=1, stable=True)[..., None]
            real = mask.gather(1, order[..., 0])[..., None]  # (B, L, 1)
            hidden_states = hidden_states.take_along_dim(order, 1).where(real, 0)

        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, d_inner) each
        u = self._convolve(x, None if cache is None else cache[0][..., 1:], cu_seqlens)
        delta, B, C = self._project(u)
        if mask is not None:
            delta = delta.where(real, -1e4)  # softplus makes it 0, and a step of 0 leaves the state alone
        y, ssm_state = selective_scan(
            u, delta, self.A, B, C, widen(self.D), z=z, delta_softplus=True,
            initial_state=None if cache is None else cache[1].clone(),  # autograd keeps it, and the cache goes on
            return_final_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        out = self.out_proj(y)

        if cache is not None:
            self._remember(cache, x, ssm_state, None if mask is None else mask.sum(1))
        if mask is not None:
            out = torch.zeros_like(out).scatter(1, order.expand_as(out), out.where(real, 0))
        return out

    @torch.no_grad()
    def step(self, hidden_states, conv_state, ssm_state):
        """Take in one step (B, 1, d_model), overwrite the states, return (output, conv_state, ssm_state).

        The states are a `MambaCache`'s: (B, d_inner, d_conv) and (B, d_inner, d_state). Has no gradient.
        """
        self._check(hidden_states, (conv_state, ssm_state))
        check_shape("hidden_states", hidden_states, ("B", 1, self.d_model))
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (B, d_inner) each
        u = self._convolve_step(x, conv_state)
        delta, B, C = self._project(u)
        y = selective_state_update(ssm_state, u, delta, self.A, B, C, widen(self.D), z=z, dt_softplus=True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen=None, dtype=None):
        """Return a MambaCache of zeros: nothing has been read yet.

        `max_seqlen` is accepted for the sake of the official signature: the cache has one size for any length. `dtype`
        is that of conv_state, the convolution's own by default.
        """
        if not (type(batch_size) is int and batch_size >= 1):
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        conv_state = self.A_log.new_zeros(
            batch_size, self.d_inner, self.d_conv, dtype=dtype or dtype_of(self.conv1d, self.A_log.dtype)
        )
        return MambaCache(conv_state, torch.zeros_like(self.A).repeat(batch_size, 1, 1))

    def __setstate__(self, state):
        """Finish a copy (copy.deepcopy, unpickling): its parameters are new, and the marks of the old are lost."""
        super().__setstate__(state)
        _mark(self)

    @property
    def A(self):
        """The state matrix -exp(A_log) (d_inner, d_state): negative whatever A_log learns."""
        return -torch.exp(widen(self.A_log))

    # --- the two halves of the way through the block ---

    def _convolve(self, x, before=None, cu_seqlens=None):
        """silu of the causal convolution of x (B, L, d_inner), after the d_conv - 1 inputs `before`."""
        if self._conv1d_is_plain():
            before = None if before is None else before.to(x.dtype, copy=True)  # the cache it is a view of goes on
            return causal_conv1d(
                x, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu", initial_state=before,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
        if cu_seqlens is not None:
            borders = document_borders(cu_seqlens, x.shape[1])
            return torch.cat([self._convolve(x[:, a:b]) for a, b in pairwise(borders) if a < b], dim=1)
        history = self.d_conv - 1
        before = x.new_zeros(x.shape[0], x.shape[2], history) if before is None else before.to(x.dtype)
        y = self.conv1d(torch.cat([before, x.mT], dim=-1))  # padded on both sides, hence cut on both
        return silu(y[..., history : history + x.shape[1]].mT)

    def _convolve_step(self, x, conv_state):
        """The same for one step x (B, d_inner), which moves into conv_state."""
        if self._conv1d_is_plain():
            weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
            wide = torch.promote_types(weight.dtype, conv_state.dtype)
            bias = None if bias is None else bias.to(wide)
            u = causal_conv1d_update(x.to(conv_state.dtype), conv_state, weight.to(wide), bias, activation="silu")
            return u.to(x.dtype)
        u = self._convolve(x[:, None], conv_state[..., 1:])[:, 0]
        conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], dim=-1))
        return u

    def _conv1d_is_plain(self):
        """Whether `conv1d` is what it was made as, and of a width that the fused convolution has."""
        return type(self.conv1d) is nn.Conv1d and 2 <= self.d_conv <= 4

    def _project(self, u):
        """Return Δ before its softplus (..., d_inner), B and C (..., d_state), made from u (..., d_inner)."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return apply_dt_proj(self.dt_proj, dt), B, C

    @torch.no_grad()
    def _remember(self, cache, x, ssm_state, lengths=None):
        """Overwrite cache by the last inputs of x (B, L, d_inner), whose first `lengths` count, and the state."""
        conv_state, width = cache[0], self.d_conv
        if lengths is None:
            seen = torch.cat([conv_state, x[:, -width:].mT], dim=-1)
            last = seen[..., -width:]
        else:
            seen = torch.cat([conv_state, x.mT], dim=-1)  # (B, d_inner, d_conv + L)
            last = seen.take_along_dim((lengths[:, None] + torch.arange(width, device=x.device))[:, None], -1)
        conv_state.copy_(last)
        cache[1].copy_(ssm_state)

    def _check(self, hidden_states, cache=None, mask=None, cu_seqlens=None):
        device = self.A_log.device
        check_tensor("hidden_states", hidden_states, device=device, like=" (the block's)")
        if type(self.in_proj) is nn.Linear and autocast_dtype(hidden_states) is None:
            own = self.in_proj.weight.dtype
            check_tensor("hidden_states", hidden_states, dtypes=(own,), like=" (the block's)")
        check_shape("hidden_states", hidden_states, ("B", "L", self.d_model))
        check_positive_sizes("hidden_states", hidden_states, "BLD")
        if cu_seqlens is not None:
            for name, other in (("cache", cache), ("mask", mask)):
                if other is not None:
                    raise ValueError(f"{name}: expected None beside cu_seqlens, got {type(other).__name__}")
        if cache is not None:
            if not isinstance(cache, tuple) or len(cache) != 2:
                raise TypeError(f"cache: expected a MambaCache, got {type(cache).__name__}")
            batch, wide = hidden_states.shape[0], torch.promote_types(self.A_log.dtype, torch.float32)
            for name, dtypes, size in (("conv_state", None, self.d_conv), ("ssm_state", (wide,), self.d_state)):
                state = cache[name == "ssm_state"]
                check_tensor(name, state, dtypes=dtypes, device=device, like=" (the block's)")
                check_shape(name, state, (batch, self.d_inner, size))
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(f"mask: expected a bool tensor, True for a real step, got {got}")
            check_shape("mask", mask, tuple(hidden_states.shape[:2]))
            if mask.device != device:
                raise ValueError(f"mask: expected device {device} (the block's), got {mask.device}")


def _mark(block, *_):
    """Set the marks that optimisers of the official package look for: no weight decay for these two parameters."""
    block.A_log._no_weight_decay = block.D._no_weight_decay = True
