"""python -m minimamba.kernels.benchmark: time and memory of all that runs here, ours and others', in one run.

Suites: "shapes", "length" and "states" are the selective scan over shapes, lengths and state sizes; "extras" is ours
with an initial state, packed documents and the other layout beside the plain call; "conv" is the short causal
convolution, "step" the decoding step. On a CPU there is only "shapes". Others are measured where they are installed:
mamba_ssm, causal_conv1d, mambapy, transformers, accelerated_scan.

Backward is the gradient of every argument, without the forward pass; training is both, in one go. Times are medians,
in milliseconds. On a GPU by `triton.testing.do_bench`, which empties the L2 cache before each repetition. Where
launching kernels may cost more than running them, also from a CUDA graph that does the same ten times, less the time of
emptying the cache: that leaves the launching out. Bytes are the peak that one pass adds to its inputs.

On a GPU the process stays on one core (on Linux): autograd has a thread of its own, and a call that moves from core to
core takes up to twice as long, differently in every run. A short call waits for the host, and the host for whatever
else it does: of three medians the least. null: did not fit into memory, or does not exist.
"""

import argparse
import datetime
import functools
import inspect
import os
import platform
import statistics
import subprocess
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from time import perf_counter, sleep

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import minimamba
from minimamba._results import device_name, save

CPU_SHAPES = [(1, 1024, 1536, 16), (8, 128, 256, 16)]
GPU_SHAPES = [
    (8, 2048, 2048, 16), (8, 2048, 1536, 16), (1, 2048, 2048, 16), (1, 16384, 2048, 16),
    (4, 4096, 5120, 16), (1, 65536, 1536, 16), (1, 128, 2048, 16), (64, 256, 2048, 16),
]  # fmt: skip
LENGTHS = [(1, 2**i, 1536, 16) for i in range(11, 21)]
STATES = [(8, 2048, 2048, 2**i) for i in range(0, 9, 2)]
EXTRAS = [(1, 16384, 2048, 16)]
CONVOLUTIONS = [  # B, L, D, W
    (8, 2048, 4096, 4), (1, 2048, 4096, 4), (1, 16384, 4096, 4), (4, 4096, 10240, 4), (64, 256, 4096, 4),
    (1, 128, 4096, 4), (8, 2048, 4096, 2),
]  # fmt: skip
STEPS = [(1, 4096, 16), (64, 4096, 16), (256, 4096, 16)]  # B, D, N
KEYS = (
    "forward_ms", "forward_graph_ms", "forward_bytes", "backward_ms", "backward_graph_ms", "training_ms",
    "training_bytes",
)  # fmt: skip
PEERS = ("mamba_ssm", "causal_conv1d", "mambapy", "transformers", "accelerated_scan")

REPETITIONS, SECONDS = 5, 1.0  # on a CPU: at least so many and so long
PATIENCE = 1.0  # a call that takes longer is not repeated (seconds)
SHORT = 0.001  # a call that takes less is timed three times (seconds)
CALLS = 10  # of a short call in a graph
GRAPH_BELOW = 5.0  # milliseconds; above, launching is no matter


# --- the selective scan: from the arguments of `selective_scan` to (a call without arguments, its leaves) ----


def draw_scan(batch, length, channels, states, dtype, device):
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


def ours(method, **options):
    def prepare(x):
        call = lambda: minimamba.selective_scan(**x, delta_softplus=True, method=method, **options)
        return call, list(x.values())

    return prepare


def channels_first(x):
    """The same arguments in the layout (B, D, L), contiguous, that most other packages take."""
    swap = lambda y: y.detach().mT.contiguous().requires_grad_()
    return {name: swap(y) if y.ndim == 3 else y for name, y in x.items()}


def official(x):
    """The CUDA kernel of state-spaces/mamba, fed in its own layout."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x = channels_first(x)
    return lambda: selective_scan_fn(**x, delta_softplus=True), list(x.values())


def mambapy(x):
    """mamba.py's parallel scan with what its block does around it: discretise, project, skip, gate.

    That is its method `selective_scan`, which uses nothing of the block. In float32, which its scan needs.
    """
    from mambapy.mamba import MambaBlock

    def call():
        u, delta, B, C, z = (x[name].float() for name in ("u", "delta", "B", "C", "z"))
        delta = F.softplus(delta + x["delta_bias"])
        return MambaBlock.selective_scan(None, u, delta, x["A"], B, C, x["D"]) * F.silu(z)

    return call, list(x.values())


def transformers(x):
    """Hugging Face's slow path, fed in its own layout: what MambaMixer runs between its projections.

    Since transformers 5 that is a function. It is a wrapper that would run mamba_ssm's kernel where that is
    installed, so what it wraps is taken.
    """
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    scan, x = inspect.unwrap(mamba_selective_scan), channels_first(x)
    arguments = {("hidden_states" if name == "u" else "dt" if name == "delta" else name): y for name, y in x.items()}
    return lambda: scan(**arguments, delta_softplus=True), list(x.values())


def accelerated_scan(x):
    """The Triton scan of accelerated-scan, which is h_t = a_t h_{t-1} + b_t alone: what is around it in PyTorch."""
    from accelerated_scan.scalar import scan

    x = channels_first(x)

    def call():
        u, delta, B, C, z = (x[name].float() for name in ("u", "delta", "B", "C", "z"))
        delta = F.softplus(delta + x["delta_bias"][:, None])
        gates = torch.exp(delta[:, :, None] * x["A"][:, :, None])  # (B, D, N, L)
        tokens = (delta * u)[:, :, None] * B[:, None]
        h = scan(gates.flatten(1, 2), tokens.flatten(1, 2)).view(gates.shape)
        y = (h * C[:, None]).sum(2)
        return (y + x["D"][:, None] * u) * F.silu(z)

    return call, list(x.values())


def attention(x):
    """PyTorch's fused causal attention of the same width, with heads of 64; flash attention in half precision."""
    batch, length, channels = x["u"].shape
    heads = [torch.randn_like(x["u"]).view(batch, length, channels // 64, 64).transpose(1, 2) for _ in range(3)]
    heads = [y.detach().requires_grad_() for y in heads]
    return lambda: F.scaled_dot_product_attention(*heads, is_causal=True), heads


def scans(device):
    """Return {name: prepare} of what is installed, the quick ones first."""
    gpu = device == "cuda"
    found = {name: ours(name) for name in (["triton"] if gpu else []) + ["cpu", "chunked"]}
    found |= {name: ours(name) for name in ("blelloch", "hillis_steele", "sequential")}
    peers = {"mambapy": mambapy, "transformers": transformers}
    if gpu:
        peers |= {"mamba_ssm": official, "accelerated_scan": accelerated_scan}
    return found | {name: prepare for name, prepare in peers.items() if find_spec(name)} | {"attention": attention}


# --- our scan's extras ---------------------------------------------------------------------------------------


def with_initial_state(x):
    state = torch.randn(x["u"].shape[0], *x["A"].shape, device=x["A"].device, requires_grad=True)
    return ours("triton")(x | {"initial_state": state})


def with_documents(x):
    """Eight documents of equal length in the row."""
    length = x["u"].shape[1]
    borders = torch.arange(0, length + 1, length // 8, dtype=torch.int32, device=x["u"].device)
    return ours("triton", cu_seqlens=borders)(x)


def with_channels_first(x):
    """The layout (B, D, L) in memory, seen as (B, L, D)."""
    leaves = channels_first(x)
    view = lambda: {name: y.mT if y.ndim == 3 else y for name, y in leaves.items()}
    return lambda: minimamba.selective_scan(**view(), delta_softplus=True, method="triton"), list(leaves.values())


def extras(device):
    return {
        "plain": ours("triton"), "initial_state": with_initial_state, "documents": with_documents,
        "channels_first": with_channels_first,
    }  # fmt: skip


# --- the short convolution and the decoding step --------------------------------------------------------------


def draw_conv(batch, length, channels, width, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (batch, length, channels), "weight": (channels, width), "bias": (channels,)}
    normal = lambda shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)
    return {name: normal(shape).requires_grad_() for name, shape in shapes.items()}


def our_conv(x):
    return lambda: minimamba.causal_conv1d(**x, activation="silu"), list(x.values())


def our_conv_channels_first(x):
    x = channels_first(x)
    call = lambda: minimamba.causal_conv1d(x["x"].mT, x["weight"], x["bias"], activation="silu")
    return call, list(x.values())


def official_conv(x):
    """Fed in its first layout, (B, D, L) contiguous."""
    from causal_conv1d import causal_conv1d_fn

    x = channels_first(x)
    return lambda: causal_conv1d_fn(x["x"], x["weight"], x["bias"], activation="silu"), list(x.values())


def official_conv_channels_last(x):
    """Fed in its second layout, which is ours: (B, D, L) whose channels are neighbours in memory."""
    from causal_conv1d import causal_conv1d_fn

    return lambda: causal_conv1d_fn(x["x"].mT, x["weight"], x["bias"], activation="silu"), list(x.values())


def torch_conv(x):
    x = channels_first(x)

    def call():
        (channels, width), length = x["weight"].shape, x["x"].shape[2]
        y = F.conv1d(x["x"], x["weight"][:, None], x["bias"], padding=width - 1, groups=channels)
        return F.silu(y[..., :length])

    return call, list(x.values())


def convolutions(device):
    found = {"triton": our_conv, "triton_channels_first": our_conv_channels_first, "torch": torch_conv}
    if find_spec("causal_conv1d"):
        found |= {"causal_conv1d": official_conv, "causal_conv1d_channels_last": official_conv_channels_last}
    return found


def draw_step(batch, channels, states, dtype, device):
    """Arguments of `selective_state_update`: those of a scan of one step, and a state."""
    x = draw_scan(batch, 1, channels, states, dtype, device)
    x = {name: y.detach().squeeze(1) if y.ndim == 3 else y.detach() for name, y in x.items()}
    names = {"u": "x", "delta": "dt", "delta_bias": "dt_bias"}
    state = torch.randn(batch, channels, states, device=device)
    return {"state": state} | {names.get(name, name): y for name, y in x.items()}


def our_step(x):
    return lambda: minimamba.selective_state_update(**x, dt_softplus=True), []


def official_step(x):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return lambda: selective_state_update(**x, dt_softplus=True), []


def steps(device):
    return {"triton": our_step} | ({"mamba_ssm": official_step} if find_spec("mamba_ssm") else {})


# --- one measurement -----------------------------------------------------------------------------------------


def seconds(*parts):
    """Run functions one after another, each on what the one before returned, again and again.

    Returns the median seconds of each, and of all together.
    """

    def run():
        stamps, result = [perf_counter()], ()
        for part in parts:
            result = (part(*result),)
            stamps.append(perf_counter())
        return [b - a for a, b in pairwise(stamps)] + [stamps[-1] - stamps[0]]

    first = run()  # to warm up
    if first[-1] > PATIENCE:
        return first
    runs, end = [], perf_counter() + SECONDS
    while len(runs) < REPETITIONS or perf_counter() < end:
        runs.append(run())
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def milliseconds(call):
    """On a GPU, after one call that compiles what is to be compiled."""
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    begin = perf_counter()
    call()
    torch.cuda.synchronize()
    once = perf_counter() - begin
    if once > PATIENCE:
        return 1e3 * once
    return min(do_bench(call, warmup=25, rep=100, return_mode="median") for _ in range(3 if once < SHORT else 1))


def graph_milliseconds(forward, backward=None):
    """The time of `forward()`, or of `backward(y)` alone, without launching it; None if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):  # autograd goes back on the stream of the way there
            part = forward
            if backward is not None:
                y = forward()
                part = lambda: backward(y)
            for _ in range(2):
                part()
            torch.cuda.synchronize()
            begin = perf_counter()
            part()
            torch.cuda.synchronize()
            calls = CALLS if perf_counter() - begin < SHORT else 1
        return (milliseconds(capture(part, calls, stream).replay) - emptying_milliseconds(calls)) / calls
    except RuntimeError:
        torch.cuda.synchronize()
        return None


@functools.cache
def emptying_milliseconds(calls):
    """What of a graph's time is not its calls': emptying the cache, and starting the graph."""
    return milliseconds(capture(lambda: None, calls, torch.cuda.Stream()).replay)


def capture(part, calls, stream):
    """A CUDA graph that empties the L2 cache and runs `part`, `calls` times."""
    from triton.runtime import driver

    graph, cache = torch.cuda.CUDAGraph(), room_of_the_cache()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            driver.active.clear_cache(cache)
            part()
    return graph


@functools.cache
def room_of_the_cache():
    """Memory that pushes everything else out of the L2 cache when it is written to."""
    from triton.runtime import driver

    return driver.active.get_empty_cache_for_benchmark()


def peak_bytes(call):
    torch.cuda.synchronize()
    sleep(0.1)  # autograd's own thread may still hold gradients of the call before
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()  # alive until the peak is read
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def measure(call, leaves, device):
    """Return {"forward_ms": ..., ...}, by the names of KEYS."""
    row = dict.fromkeys(KEYS)
    if device == "cpu":
        # Until a block of this size has been freed, glibc gives memory back to the system at once, and every call pays
        # for fresh pages. In a process that trains that is long past, so it is for all that are measured here.
        torch.empty(2**25 - 2**12, dtype=torch.uint8)
        with torch.no_grad():
            row["forward_ms"] = 1e3 * seconds(call)[0]
            upstream = torch.randn_like(call())
        _, back, both = seconds(call, lambda y: torch.autograd.grad(y, leaves, upstream))
        return row | {"backward_ms": 1e3 * back, "training_ms": 1e3 * both}

    with torch.no_grad():
        row |= {"forward_ms": milliseconds(call), "forward_bytes": peak_bytes(call)}
        if row["forward_ms"] < GRAPH_BELOW:
            row["forward_graph_ms"] = graph_milliseconds(call)
    if not leaves:
        return row
    y = call()
    upstream = torch.randn_like(y)
    backward = lambda y: torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    row["backward_ms"] = milliseconds(functools.partial(backward, y))
    y = None  # frees the graph: memory is measured next
    train = lambda: torch.autograd.grad(call(), leaves, upstream)
    row |= {"training_ms": milliseconds(train), "training_bytes": peak_bytes(train)}
    if row["forward_ms"] < GRAPH_BELOW:
        row["backward_graph_ms"] = graph_milliseconds(call, backward)
    return row


def stay_on_one_core():
    """For times that can be compared: see above."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# --- the run -------------------------------------------------------------------------------------------------

# suite: (the sizes' names, how to draw the arguments, who takes part)
SCAN = ("BLDN", draw_scan, scans)
SUITES = {
    "shapes": SCAN, "length": SCAN, "states": SCAN, "extras": ("BLDN", draw_scan, extras),
    "conv": ("BLDW", draw_conv, convolutions), "step": ("BDN", draw_step, steps),
}  # fmt: skip


def plan(device, suites, methods=None):
    """Yield (suite, method, size, dtype), of `methods` only if given."""
    for suite in suites:
        names = list(SUITES[suite][2](device))
        chosen = lambda *wanted, names=names: [name for name in names if name in wanted]
        if device == "cpu":
            rows = [(name, size, torch.float32) for size in CPU_SHAPES for name in names]
        elif suite == "shapes":
            # The scans in PyTorch launch many small kernels: two shapes tell what there is to tell. The gradient of
            # transformers' loop takes time quadratic in the length, so it gets the smaller one of them.
            rows = []
            for i, size in enumerate(GPU_SHAPES):
                some = names if i == 2 else [n for n in names if n != "transformers"] if i == 0 else None
                some = some or chosen("triton", "mamba_ssm", "attention")
                rows += [(name, size, torch.bfloat16) for name in some]
            rows += [(name, GPU_SHAPES[0], torch.float32) for name in chosen("triton", "mamba_ssm")]
        elif suite == "length":
            rows = []
            for size in LENGTHS:
                some = ["attention"] * (size[1] <= 2**17) + ["cpu"] * (size[1] <= 2**14)
                rows += [(name, size, torch.bfloat16) for name in chosen("triton", "mamba_ssm", *some)]
        elif suite == "states":
            rows = [(name, size, torch.bfloat16) for size in STATES for name in chosen("triton", "mamba_ssm")]
        else:
            sizes = {"extras": EXTRAS, "conv": CONVOLUTIONS, "step": STEPS}[suite]
            rows = [(name, size, torch.bfloat16) for size in sizes for name in names]
        yield from ((suite, *row) for row in rows if not methods or row[0] in methods)


def about(device, suites, methods=None):
    """What the results depend on. Of the other packages those that are installed."""
    gpu = device == "cuda"
    versions = {name: _version(name) for name in ("torch", "triton", *PEERS)}
    return {
        "device": device_name(device),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "compiler": None if gpu else _first_line(os.environ.get("CC") or "cc", "--version"),
        "threads": torch.get_num_threads(),
        **{name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            ["python -m minimamba.kernels.benchmark --device", device, "--suite", *suites]
            + (["--method", *methods] if methods else [])
        ),
    }


def _version(name):
    if name == "torch":
        return torch.__version__
    try:
        return metadata.version(name.replace("_", "-")) if find_spec(name) else None
    except metadata.PackageNotFoundError:  # found, but not installed by pip
        return "unknown"


def _first_line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main():
    parser = argparse.ArgumentParser(
        prog="python -m minimamba.kernels.benchmark", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--suite", choices=list(SUITES), nargs="+", help="only these (default: all of the device)")
    parser.add_argument("--method", nargs="+", metavar="NAME", help="only these, such as triton (default: all)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON, after each row")
    options = parser.parse_args()
    device, suites = options.device, options.suite or (["shapes"] if options.device == "cpu" else list(SUITES))
    if device == "cpu" and suites != ["shapes"]:
        parser.error("--suite: on a CPU there is only shapes")

    known = {name for _, name, *_ in plan(device, suites)}
    if unknown := set(options.method or ()) - known:
        parser.error(f"--method: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")

    if device == "cuda":
        stay_on_one_core()
    where = about(device, suites, options.method)
    rows, columns = [], ("forward_ms", "backward_ms", "training_ms", "forward_graph_ms", "backward_graph_ms")
    print(f"{'suite':8}{'method':28}{'size':>26}{'dtype':>10}", *(f"{c[:-3]:>15}" for c in columns), f"{'GB':>8}")
    for suite, name, size, dtype in (progress := tqdm(list(plan(device, suites, options.method)), unit="row")):
        progress.set_description(f"{suite} {name} {size}")
        letters, draw, contenders = SUITES[suite]
        row = {"suite": suite, "method": name, **dict(zip(letters, size, strict=True)), "dtype": str(dtype)[6:]}
        try:
            row |= measure(*contenders(device)[name](draw(*size, dtype, device)), device)
        except torch.OutOfMemoryError:
            row |= dict.fromkeys(KEYS)
        rows.append(row)
        number = lambda key, scale=1, row=row: "-" if row[key] is None else f"{row[key] / scale:.3f}"
        progress.write(
            f"{suite:8}{name:28}{', '.join(f'{k} {v}' for k, v in zip(letters, size, strict=True)):>26}"
            f"{row['dtype']:>10} {' '.join(f'{number(c):>15}' for c in columns)} {number('training_bytes', 1e9):>8}"
        )
        if options.save:
            save(options.save, where | {"rows": rows})


if __name__ == "__main__":
    main()
