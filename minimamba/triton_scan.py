"""Chapter 10: scans in Triton. Launchers of kernels/linear_scan.py, and what any kernel needs to run or compile."""

import functools
import importlib.util
import itertools
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minimamba._validation import check_positive_sizes, check_shape, check_tensor


def linear_scan_triton(a, b, initial_state=None, *, reverse=False):
    """Run h_t = a_t h_{t-1} + b_t elementwise over dimension 1, one Triton program a sequence.

    a, b           (Batch, L, ...)   float16, bfloat16, float32 or float64; any strides, copied only where the
                                     axes after L cannot be seen as one
    initial_state  (Batch, ...)      h_0, or h_{L+1} if `reverse`; zero if None

    `reverse` runs h_t = a_t h_{t+1} + b_t from the last step to the first. Returns h (Batch, L, ...) in b's
    dtype; half precision is computed in float32. Has no gradient: chapter 09 builds one from two such scans.
    Raises TypeError or ValueError that names the argument, RuntimeError where Triton cannot run.
    """
    _check_scan(a, b, initial_state)
    require_triton(b.device)
    from minimamba.kernels.linear_scan import scan_rows_kernel

    batch, length = b.shape[:2]
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    # (Batch, L, ...) as (Batch, L, rest): a view wherever the trailing strides allow it.
    a, b, out = (x.reshape(batch, length, -1) for x in (a, b, h))
    rest = b.shape[2]
    start = b.new_zeros(batch, rest) if initial_state is None else initial_state.reshape(batch, rest)
    with torch.cuda.device_of(b):
        scan_rows_kernel[(batch * rest,)](
            a, b, start, out, length, rest, *a.stride(), *b.stride(), *start.stride(), *out.stride(),
            REVERSE=reverse, DTYPE=_compute_dtype(b), BLOCK=block_size(length),
        )  # fmt: skip
    return h


def scan_one_block(a, b):
    """Run h_t = a_t h_{t-1} + b_t from h_0 = 0 in one program that holds all L steps. a, b (L,) -> h (L,)"""
    _check_scan(a[None], b[None], None)
    require_triton(b.device)
    from minimamba.kernels.linear_scan import scan_one_block_kernel

    a, b = a.contiguous(), b.contiguous()
    h = torch.empty_like(b)
    scan_one_block_kernel[(1,)](a, b, h, len(b), BLOCK=max(16, next_power_of_2(len(b))))
    return h


def scan_blocks_with_carry(a, b, block=64):
    """The same in blocks of `block` steps, a power of two; the last state of each is carried into the next."""
    _check_scan(a[None], b[None], None)
    if block < 1 or block & (block - 1):
        raise ValueError(f"block: expected a power of two, got {block}")
    require_triton(b.device)
    from minimamba.kernels.linear_scan import scan_blocks_with_carry_kernel

    a, b = a.contiguous(), b.contiguous()
    h = torch.empty_like(b)
    scan_blocks_with_carry_kernel[(1,)](a, b, h, len(b), BLOCK=block)
    return h


def block_size(length):
    """Steps a program holds at once: all of a short sequence, at most 1024 of a long one."""
    return min(1024, max(16, next_power_of_2(length)))


# --- can a kernel run here? ----------------------------------------------------------------------------


# Found without importing it, and once: torch.compile cannot trace the search.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def require_triton(device):
    """Raise RuntimeError, saying what to do, unless kernels can run on tensors of `device`."""
    if not TRITON_IS_INSTALLED:
        raise RuntimeError(
            "triton: not installed, and pip has builds for Linux only. There: pip install triton. "
            'Elsewhere choose another method=, such as "cpu", which runs everywhere'
        )
    import triton
    import triton.language as tl

    # Triton chose between compiling and interpreting at its first import; its own library shows which.
    compiled = isinstance(tl.sum, triton.runtime.jit.JITFunction)
    if compiled and torch.device(device).type != "cuda":
        raise RuntimeError(
            f"triton: compiles for a GPU in this process, but the tensors are on {device}. To run kernels on a CPU, "
            "set the environment variable TRITON_INTERPRET=1 before anything imports triton (where there is no "
            'GPU, importing minimamba first does it), or choose another method=, such as "cpu"'
        )


class Launch:
    """A launch whose arguments are all settled but the tensors, to be made again and again on a GPU.

    Calling it with tensors is kernel[(programs,)](*tensors, *numbers, **constants, num_warps=warps). Triton looks at
    every argument at every call for what it compiles differently. With sixty arguments that takes longer than a small
    kernel does; here only the addresses can differ, by being divisible by 16 or not. What is compiled is launched
    without asking for Triton's launch hooks, which takes as long again: a profiler that uses them sees the first call.

    With `early` the kernel may start before the one launched before it has ended, and has to wait for that itself.
    `registers` is the most that a thread may have, by default what the compiler likes.
    """

    def __init__(self, kernel, programs, numbers, warps, *, early=False, registers=None, **constants):
        self.kernel, self.programs, self.numbers, self.constants = kernel, programs, numbers, constants
        self.options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
        self.options |= {"maxnreg": registers} if registers else {}
        self.rest = (*numbers, *constants.values())  # in the order of the kernel's arguments
        self.runs = {}  # of what is compiled, by alignment

    def __call__(self, *tensors):
        # Of a tensor Triton asks the driver where it lies; an address it takes as it is.
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        aligned = not functools.reduce(operator.or_, addresses) % 16  # nearly always; tuples take longer
        if not aligned:
            aligned = tuple([x % 16 == 0 for x in addresses])
        compiled = self.runs.get(aligned)
        if compiled is None:
            compiled = self.kernel[(self.programs,)](*tensors, *self.numbers, **self.constants, **self.options)
            if compiled is not None:  # the interpreter compiles nothing
                self.runs[aligned] = (compiled.run, compiled.function, compiled.packed_metadata)
        else:
            run, function, metadata = compiled
            stream = _current_stream(tensors[0].get_device())
            run(self.programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *self.rest)


def _current_stream(device):
    return torch._C._cuda_getCurrentRawStream(device)  # a number, in a tenth of a microsecond


def load_ipython_extension(ipython):
    """Define the cell magic %%triton (by `%load_ext minimamba.triton_scan`) for cells that run kernels.

    Where Triton has no build the cell says so and is left alone, and the notebook goes on.
    """

    def triton_cell(line, cell):
        if TRITON_IS_INSTALLED:
            ipython.run_cell(cell).raise_error()
        else:
            print("Triton has no build for this system: the outputs of the committed notebook are from one that has.")

    ipython.register_magic_function(triton_cell, "cell", "triton")


# --- what does a kernel compile to? --------------------------------------------------------------------


def compile_kernel(kernel, signature, constants, *, capability=90, num_warps=4, registers=None):
    """Compile a kernel for an NVIDIA GPU of compute capability 8.0 (80) or 9.0 (90), with or without one here.

    kernel     ("module", "name"), for example ("minimamba.kernels.linear_scan", "scan_rows_kernel")
    signature  {argument: Triton's type}, such as "*fp32", "i32", for all arguments that are not constexpr; "*fp32:16"
               for an address, "i32:16" for a number that is a multiple of 16
    constants  {argument: value} of the constexpr ones; a dtype by its name, such as "fp32"
    registers  the most that a thread may have; None leaves it to the compiler

    Returns a dict: "ptx" and "sass" (its machine code, as text), "shared" (bytes of shared memory), "registers" and
    "stack" (bytes) a thread.
    """
    job = {"kernel": kernel, "signature": signature, "constants": constants, "registers": registers}
    return compile_kernels([job | {"capability": capability, "num_warps": num_warps}])[0]


def compile_kernels(jobs):
    """Compile several kernels in one go; each job is a dict of `compile_kernel`'s arguments. -> list of dicts

    Runs in another process: Triton compiles nothing in one that interprets.
    """
    run = subprocess.run(
        [sys.executable, "-c", "from minimamba.triton_scan import _compile_here; _compile_here()"],
        input=json.dumps(jobs),
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"triton: compilation failed\n{run.stderr[-2000:]}")
    return json.loads(run.stdout)


def _compile_here():
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    results = []
    for job in json.load(sys.stdin):
        module, name = job["kernel"]
        kernel = getattr(importlib.import_module(module), name)
        dtypes = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
        constants = {k: dtypes.get(v, v) if isinstance(v, str) else v for k, v in job["constants"].items()}
        signature = job["signature"] | dict.fromkeys(constants, "constexpr")
        types = {k: signature[k].removesuffix(":16") for k in kernel.arg_names}
        multiples = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(types) if signature[k].endswith(":16")}
        limit = {"maxnreg": job["registers"]} if job.get("registers") else {}
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        compiled = compile(
            source(kernel, types, constants, multiples),
            target=GPUTarget("cuda", job["capability"], 32),
            options={"num_warps": job["num_warps"]} | limit,
        )
        made = {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}
        results.append(made | _read_machine_code(compiled.asm["cubin"]))
    json.dump(results, sys.stdout)


def _read_machine_code(cubin):
    """Its text, and registers and stack bytes a thread, read by the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        sass = run([tools / "nvdisasm", "--print-code", path]).stdout
        usage = run([tools / "cuobjdump", "--dump-resource-usage", path]).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"sass": sass, "registers": int(registers), "stack": int(stack)}


def longest_loop(sass):
    """The instructions of the longest loop in machine code as `compile_kernel` returns it, as a list of texts."""
    labels, instructions, loops = {}, [], [[]]
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                loops.append(instructions[labels[jump[1]] :])
    return max(loops, key=len)


def row_length(instructions, operation):
    """How many of an operation, such as "MUFU", stand side by side among instructions, for the average one of them."""
    groups = itertools.groupby(operation in instruction for instruction in instructions)
    rows = [len(list(group)) for found, group in groups if found]
    return sum(n * n for n in rows) / sum(rows)


def _check_scan(a, b, initial_state):
    check_tensor("b", b)
    if b.ndim < 2:
        raise ValueError(f"b: expected shape (Batch, L, ...), got {tuple(b.shape)}")
    check_positive_sizes("b", b, ["Batch", "L", *["every size"] * (b.ndim - 2)])
    check_tensor("a", a, device=b.device, like=" (b's)")
    check_shape("a", a, tuple(b.shape))
    if initial_state is not None:
        check_tensor("initial_state", initial_state, device=b.device, like=" (b's)")
        check_shape("initial_state", initial_state, (b.shape[0], *b.shape[2:]))


def _compute_dtype(x):
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()
