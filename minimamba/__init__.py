"""minimamba: Mamba step by step, from a differential equation to a fused GPU scan. One module per chapter."""

import os
import sys
from pathlib import Path

import torch

# Triton decides at its first import whether kernels are compiled or interpreted. Without a GPU they can
# only be interpreted, so say so before anything imports it.
if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# kernels/ is a symbolic link in this folder. Where git checked it out as a text file (Windows' default),
# find the folder beside this package instead.
_root = Path(__file__).resolve().parents[1]
if not (Path(__file__).parent / "kernels").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

from minimamba.interface import (  # noqa: E402
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
    selective_scan,
    selective_scan_fn,
    selective_state_update,
)
from minimamba.language_model import MambaConfig, MambaLM  # noqa: E402
from minimamba.mamba_block import Mamba, MambaCache  # noqa: E402
from minimamba.selective_ssm import SelectiveSSM  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Mamba",
    "MambaCache",
    "MambaConfig",
    "MambaLM",
    "SelectiveSSM",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
]
