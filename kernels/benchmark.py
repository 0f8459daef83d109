"""python -m minimamba.kernels.benchmark: time and memory of every scan that runs here, side by side, in one run.

Backward is the gradient of every argument, without the forward pass. Times are medians. On a GPU by
`triton.testing.do_bench`, which empties the L2 cache before each repetition; peak memory is what one pass adds to
its inputs. A contender that runs out of memory, or that is not built for a device, has null in its place.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from minimamba import selective_scan

CPU_SHAPES = [(1, 1024, 1536, 16), (8, 128, 256, 16)]
GPU_SHAPES = [
    (8, 2048, 2048, 16), (8, 2048, 1536, 16), (1, 2048, 2048, 16), (1, 16384, 2048, 16),
    (4, 4096, 5120, 16), (1, 65536, 1536, 16), (1, 128, 2048, 16), (64, 256, 2048, 16),
]  # fmt: skip
LENGTHS = [(1, 2**i, 1536, 16) for i in range(11, 21)]
STATES = [(8, 2048, 2048, 2**i) for i in range(0, 9, 2)]


# --- contenders: from the arguments of `selective_scan` to (a call without arguments, its leaves) ------------


def ours(method):
    def prepare(x):
        return lambda: selective_scan(**x, delta_softplus=True, method=method), list(x.values())

    return prepare


def official(x):
    """The CUDA kernel of state-spaces/mamba, fed in its own layout: channels before time, contiguous."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    swap = lambda y: y.detach().transpose(1, 2).contiguous().requires_grad_()
    x = {k: swap(y) if y.ndim == 3 else y for k, y in x.items()}
    return lambda: selective_scan_fn(**x, delta_softplus=True), list(x.values())


def attention(x):
    """PyTorch's fused causal attention of the same width, with heads of 64."""
    batch, length, channels = x["u"].shape
    heads = [torch.randn_like(x["u"]).view(batch, length, channels // 64, 64).transpose(1, 2) for _ in range(3)]
    heads = [y.detach().requires_grad_() for y in heads]
    return lambda: scaled_dot_product_attention(*heads, is_causal=True), heads


def contenders(device):
    """Return {name: prepare} of what is installed, the quick ones first."""
    methods = ["cpu", "chunked", "blelloch", "hillis_steele", "sequential"]
    found = {name: ours(name) for name in (["triton"] if device == "cuda" else []) + methods}
    if device == "cuda" and find_spec("mamba_ssm"):
        found["mamba_ssm"] = official
    return found | {"attention": attention}


# --- one measurement -------------------------------------------------------------------------------------


def draw(batch, length, channels, states, dtype, device):
    """Arguments of `selective_scan` as a fresh layer makes them: Δ log-uniform in [1e-3, 0.1], A = -1, ..., -N."""
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    step = torch.exp(torch.empty(channels, device=device).uniform_(-6.9, -2.3, generator=generator))
    x = {
        "u": normal(batch, length, channels).to(dtype),
        "delta": (0.5 * normal(batch, length, channels)).to(dtype),
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "B": normal(batch, length, states).to(dtype),
        "C": normal(batch, length, states).to(dtype),
        "D": torch.ones(channels, device=device),
        "z": normal(batch, length, channels).to(dtype),
        "delta_bias": step + torch.log(-torch.expm1(-step)),
    }
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def milliseconds(call, device):
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=100, return_mode="median")
    return 1e3 * Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=1).median


def peak_bytes(call, device):
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()  # alive until the peak is read
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def measure(prepare, shape, dtype, device):
    """Return {"forward_ms": ..., ...} for one contender on one shape (B, L, D, N)."""
    call, leaves = prepare(draw(*shape, dtype, device))
    with torch.no_grad():
        row = {"forward_ms": milliseconds(call, device), "forward_bytes": peak_bytes(call, device)}
    y = call()
    upstream = torch.randn_like(y)
    row["backward_ms"] = milliseconds(lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True), device)
    y = None  # frees the graph: memory is measured next
    row["training_bytes"] = peak_bytes(lambda: torch.autograd.grad(call(), leaves, upstream), device)
    return row


# --- the run ---------------------------------------------------------------------------------------------


def plan(device):
    """Yield (suite, contender, shape, dtype)."""
    names = list(contenders(device))
    if device == "cpu":
        yield from (("shapes", name, shape, torch.float32) for shape in CPU_SHAPES for name in names)
        return
    for i, shape in enumerate(GPU_SHAPES):
        # The chapters' methods launch many small kernels: two shapes tell what there is to tell.
        for name in names if i in (0, 2) else [n for n in names if n in ("triton", "mamba_ssm", "attention")]:
            yield "shapes", name, shape, torch.bfloat16
    yield from (("shapes", n, GPU_SHAPES[0], torch.float32) for n in names if n in ("triton", "mamba_ssm"))
    for shape in LENGTHS:
        quick = ["triton", "mamba_ssm"] + ["attention"] * (shape[1] <= 2**17) + ["cpu"] * (shape[1] <= 2**14)
        yield from (("length", n, shape, torch.bfloat16) for n in names if n in quick)
    yield from (("states", n, s, torch.bfloat16) for s in STATES for n in names if n in ("triton", "mamba_ssm"))


def about(device):
    gpu = device == "cuda"
    triton = sys.modules.get("triton")
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "mamba_ssm": sys.modules["mamba_ssm"].__version__ if "mamba_ssm" in sys.modules else None,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m minimamba.kernels.benchmark --device {device}",
    }


def save(path, results):
    """Write to a temporary name and rename, so that no reader meets half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(prog="python -m minimamba.kernels.benchmark", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON, after each row")
    options = parser.parse_args()
    rows, prepare = [], contenders(options.device)
    print(f"{'suite':8}{'method':14}{'B, L, D, N':>22}{'dtype':>10}{'forward ms':>12}{'backward ms':>13}{'GB':>8}")
    for suite, name, shape, dtype in (progress := tqdm(list(plan(options.device)), unit="row")):
        progress.set_description(f"{name} {shape}")
        row = {"suite": suite, "method": name, **dict(zip("BLDN", shape, strict=True)), "dtype": str(dtype)[6:]}
        try:
            row |= measure(prepare[name], shape, dtype, options.device)
        except torch.OutOfMemoryError:
            row |= dict.fromkeys(("forward_ms", "forward_bytes", "backward_ms", "training_bytes"))
        rows.append(row)
        number = lambda key, scale=1, row=row: "-" if row[key] is None else f"{row[key] / scale:.3f}"
        progress.write(
            f"{suite:8}{name:14}{shape!s:>22}{row['dtype']:>10}{number('forward_ms'):>12}"
            f"{number('backward_ms'):>13}{number('training_bytes', 1e9):>8}"
        )
        if options.save:
            save(options.save, about(options.device) | {"rows": rows})


if __name__ == "__main__":
    main()
