"""Random selective scans that expose mistakes: steps that vary in time, decays near 0 and near 1, odd shapes."""

from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Problem:
    """The arguments of one call of `selective_scan`, by name."""

    tensors: dict
    delta_softplus: bool = False
    cu_seqlens: torch.Tensor | None = None
    cotangents: dict = field(default_factory=dict)

    def run(self, scan, **options):
        """Return (y, final_state)."""
        positional = [self.tensors[name] for name in ("u", "delta", "A", "B", "C", "D")]
        keywords = {name: self.tensors[name] for name in ("z", "delta_bias", "initial_state")}
        return scan(
            *positional,
            **keywords,
            delta_softplus=self.delta_softplus,
            cu_seqlens=self.cu_seqlens,
            return_final_state=True,
            **options,
        )

    def gradients(self, scan, **options):
        """Return {name: gradient} of a random linear function of y and the final state."""
        leaves = {k: x.detach().requires_grad_() for k, x in self.tensors.items() if x is not None}
        y, state = replace(self, tensors={**self.tensors, **leaves}).run(scan, **options)
        loss = (y * self.cotangents["y"]).sum() + (state * self.cotangents["final_state"]).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def expected(self):
        """Return (y, final_state) by the oracle, as float64 tensors."""
        arrays = {k: None if x is None else x.detach().cpu().double().numpy() for k, x in self.tensors.items()}
        options = {"delta_softplus": self.delta_softplus}
        if self.cu_seqlens is None:
            y, state = oracle.selective_scan(**arrays, **options)
        else:
            y, state = oracle.packed(**arrays, cu_seqlens=self.cu_seqlens.tolist(), **options)
        return torch.from_numpy(y), torch.from_numpy(state)

    def to(self, dtype=None, device="cpu", half=("u", "delta", "B", "C", "z")):
        """Convert: what varies along the sequence to `dtype`, the rest to float32 if that is half."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            k: None if x is None else x.to(device, dtype if k in half else wide) for k, x in self.tensors.items()
        }
        cotangents = {k: x.to(device, wide) for k, x in self.cotangents.items()}
        if "y" in cotangents:  # autograd rounds it to y's dtype, which is u's
            cotangents["y"] = cotangents["y"].to(tensors["u"].dtype).to(wide)
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return replace(self, tensors=tensors, cotangents=cotangents, cu_seqlens=cu_seqlens)


def make(
    batch=2, length=7, channels=4, states=3, groups=1, B="varying", C="varying",
    D=True, z=True, delta_bias=True, delta_softplus=True, initial_state=True, documents=None,
    layout="contiguous", seed=0,
):  # fmt: skip
    """Draw a Problem in float64. `documents` packs that many in one row; B and C "varying", "grouped", "constant"."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape))
    log_uniform = lambda low, high, *shape: torch.from_numpy(10 ** rng.uniform(low, high, shape))
    batch = 1 if documents else batch
    maps = {
        "varying": (batch, length, states),
        "grouped": (batch, length, groups, states),
        "constant": (channels, states),
    }
    delta = log_uniform(-3, 0, batch, length, channels)
    cu_seqlens, sequences = None, batch
    if documents:
        inner = np.sort(rng.integers(0, length + 1, documents - 1))
        cu_seqlens = torch.tensor([0, *inner.tolist(), length], dtype=[torch.int32, torch.int64][seed % 2])
        sequences = documents
    tensors = {
        "u": normal(batch, length, channels),
        # Before the softplus any real number will do; without it, Δ is positive.
        "delta": torch.log(torch.expm1(delta)) if delta_softplus else delta,
        "A": -log_uniform(-1, 1.5, channels, states),
        "B": normal(*maps[B]),
        "C": normal(*maps[C]),
        "D": normal(channels) if D else None,
        "z": normal(batch, length, channels) if z else None,
        "delta_bias": (normal(channels) if delta_softplus else log_uniform(-3, -1, channels)) if delta_bias else None,
        "initial_state": normal(sequences, channels, states) if initial_state else None,
    }
    tensors = {name: None if x is None else lay_out(x, layout) for name, x in tensors.items()}
    cotangents = {"y": normal(batch, length, channels), "final_state": normal(sequences, channels, states)}
    return Problem(tensors, delta_softplus, cu_seqlens, cotangents)


def lay_out(x, layout):
    """Return `x` with other strides: its values unchanged, except that "expanded" repeats the first row."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.ndim > 1 else x
    if layout == "poisoned":  # every second element of a larger tensor of NaN: a read outside shows
        large = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
        inside = large[tuple(slice(1, None, 2) for _ in x.shape)]
        return inside.copy_(x)
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


# What B and C may be together: both varying (in the same groups), both constant, or one of each.
KINDS = [
    ("varying", "varying"),
    ("grouped", "grouped"),
    ("constant", "constant"),
    ("varying", "constant"),
    ("constant", "grouped"),
]


@st.composite
def problems(draw, max_length=40):
    """Any shape from 1, every combination of options, packed or not, in any layout."""
    groups = draw(st.integers(1, 3))
    flag = st.booleans()
    return make(
        batch=draw(st.integers(1, 3)),
        length=draw(st.one_of(st.integers(1, 5), st.integers(1, max_length))),
        channels=groups * draw(st.integers(1, 4)),
        states=draw(st.integers(1, 5)),
        groups=groups,
        **dict(zip("BC", draw(st.sampled_from(KINDS)), strict=True)),
        D=draw(flag),
        z=draw(flag),
        delta_bias=draw(flag),
        delta_softplus=draw(flag),
        initial_state=draw(flag),
        documents=draw(st.sampled_from([None, None, 1, 3])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "poisoned", "expanded"])),
        seed=draw(st.integers(0, 2**16)),
    )


def relative_error(got, expected):
    """max |got - expected| over max |expected|, NaN if there is one."""
    expected = expected.to(got.device, torch.float64)
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
