"""What every program that measures writes into its JSON, and how."""

import json
import os
import platform
from pathlib import Path

import torch


def device_name(device):
    """The name of the GPU for "cuda", else of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(path, results):
    """Write JSON to a temporary name and rename, so that no reader meets half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)
