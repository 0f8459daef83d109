"""The selective scan's `method="cpu"`: the launcher of kernels/selective_scan.c.

Elsewhere than on a CPU, and where there is no C compiler, minimamba.torch_scan runs instead.
"""

import ctypes
import threading

import torch

from minimamba import _compiler, torch_scan
from minimamba._validation import document_borders

STRIDE = 32  # steps from checkpoint to checkpoint, as in the C file
WIDTH = 32  # channels of a work item, likewise
_ITEMS = 256  # enough for any processor; more of them would only have more partial sums
_THREAD_PAYS_FROM = 2**15  # state updates a thread, some 10 microseconds of work

_SIZES = "sequences rows channels states groups softplus B_varying C_varying parts"
_ARRAYS = """borders u delta A B C D z delta_bias initial_state y final_state checkpoints grad_y grad_final_state
    du ddelta dz dinitial_state dA dD ddelta_bias dB dC"""


class _Scan(ctypes.Structure):
    """The struct `Scan` of the C file, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES.split()] + [(name, ctypes.c_void_p) for name in _ARRAYS.split()]
    )  # fmt: skip


def checkpoint_shape(u, A, B, C, cu_seqlens):
    """Shape of the states kept for the backward pass: one before every 32 steps of each sequence, (rows, N, D).

    Sequence s starting at flat step p owns the rows from p // 32 + s on: always enough, and known without
    reading where the documents of a packed row begin.
    """
    if _library(u.device, A.dtype) is None:
        return torch_scan.checkpoint_shape(u, A, B, C, cu_seqlens)
    batch, length, channels = u.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (batch * length // STRIDE + sequences, A.shape[1], channels)


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save):
    """Arguments as in `minimamba.selective_scan`, validated.

    Returns y (Batch, L, D), the final states (sequences, D, N) and the checkpoints that `backward` needs
    (empty unless `save`).
    """
    library = _library(u.device, A.dtype)
    if library is None:
        return torch_scan.forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save)
    borders = _borders(u, cu_seqlens)
    wide = A.dtype
    y = u.new_empty(u.shape, dtype=wide)
    final_state = A.new_empty(len(borders) - 1, *A.shape)
    checkpoints = A.new_empty(checkpoint_shape(u, A, B, C, cu_seqlens) if save else 0)
    _run(
        library, "scan_forward", u.shape, borders, delta_softplus,
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state,
        y=y, final_state=final_state, checkpoints=checkpoints if save else None,
    )  # fmt: skip
    return y.to(u.dtype), final_state, checkpoints


def backward(
    grad_y,
    grad_final_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    cu_seqlens,
    checkpoints,
    delta_softplus,
):
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, each in its argument's dtype.

    Those of D, z, delta_bias and initial_state are None where the argument is; `grad_final_state` may be None.
    """
    library = _library(u.device, A.dtype)
    if library is None:
        return torch_scan.backward(
            grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints,
            delta_softplus,
        )  # fmt: skip
    borders = _borders(u, cu_seqlens)
    wide, sequences, channels = A.dtype, len(borders) - 1, u.shape[2]
    du, ddelta, dz = (None if x is None else x.new_empty(x.shape, dtype=wide) for x in (u, delta, z))
    dinitial_state = A.new_empty(sequences, *A.shape)
    parts, blocks = _parts(sequences, channels, B, C), _blocks(channels, B, C)
    dA = A.new_empty(parts, *A.shape)
    dB, dC = (A.new_empty(parts, *A.shape) if x.ndim == 2 else A.new_empty(blocks, *x.shape) for x in (B, C))
    dD, ddelta_bias = (None if x is None else A.new_empty(parts, channels) for x in (D, delta_bias))
    _run(
        library, "scan_backward", u.shape, borders, delta_softplus,
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, checkpoints=checkpoints,
        grad_y=grad_y, grad_final_state=grad_final_state, du=du, ddelta=ddelta, dz=dz,
        dA=dA, dinitial_state=dinitial_state, dB=dB, dC=dC, dD=dD, ddelta_bias=ddelta_bias,
    )  # fmt: skip
    dA, dB, dC, dD, ddelta_bias = (_total(x) for x in (dA, dB, dC, dD, ddelta_bias))
    du, ddelta, dB, dC, dz = (_as(x, y) for x, y in ((du, u), (ddelta, delta), (dB, B), (dC, C), (dz, z)))
    return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, None if initial_state is None else dinitial_state


def _total(parts):
    """The sum over the first axis; no work for a single part."""
    return parts if parts is None else parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _as(x, like):
    return x if x is None or x.dtype == like.dtype else x.to(like.dtype)


def _library(device, dtype):
    """The compiled kernel, or None where PyTorch has to do."""
    if device.type != "cpu":
        return None
    return _compiler.load("selective_scan.c", "REAL=double" if dtype == torch.float64 else "REAL=float")


def _borders(u, cu_seqlens):
    """Where sequences begin and end in the (Batch · L) rows of u."""
    if cu_seqlens is not None:
        return document_borders(cu_seqlens, u.shape[1])
    return range(0, u.shape[0] * u.shape[1] + 1, u.shape[1])


def _groups(B, C):
    return max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))


def _blocks(channels, B, C):
    """Blocks of a group. Each has sums of its own, over its channels, for dB and dC."""
    return -(-channels // _groups(B, C) // WIDTH)


def _parts(sequences, channels, B, C):
    """How many parts the sequences are dealt to: a part has sums of its own, over its sequences, for dA and the like.

    Made from the shape alone, so that the sums do not depend on the number of threads.
    """
    return min(sequences, -(-_ITEMS // (_groups(B, C) * _blocks(channels, B, C))))


def _run(library, function, shape, borders, softplus, **tensors):
    """Call `function` of the library on as many threads as there is work for."""
    function = getattr(library, function)
    batch, length, channels = shape
    A, B, C = tensors["A"], tensors["B"], tensors["C"]
    sequences, groups = len(borders) - 1, _groups(B, C)
    parts = _parts(sequences, channels, B, C)
    borders = (ctypes.c_int64 * len(borders))(*borders)
    # The kernel reads plain arrays of one dtype. Tensors that are so already are not touched: at one step of a small
    # layer these few lines are what takes the time.
    tensors = {name: x for name, x in tensors.items() if x is not None}
    for name, x in tensors.items():
        if x.dtype != A.dtype or not x.is_contiguous():
            tensors[name] = x.to(A.dtype).contiguous()
    scan = _Scan(
        sequences=sequences, rows=batch * length, channels=channels, states=A.shape[1], groups=groups,
        softplus=softplus, B_varying=B.ndim > 2, C_varying=C.ndim > 2, parts=parts,
        borders=ctypes.addressof(borders),
        **{name: x.data_ptr() for name, x in tensors.items()},
    )  # fmt: skip
    items = parts * groups * _blocks(channels, B, C)
    updates = batch * length * channels * A.shape[1]
    threads = max(1, min(torch.get_num_threads(), items, updates // _THREAD_PAYS_FROM))
    taken, failed = ctypes.c_int64(0), []

    def work(threads=1):
        if function(ctypes.byref(scan), ctypes.byref(taken), threads):
            failed.append(True)

    if library.scan_has_threads():
        work(threads)
    else:
        helpers = [threading.Thread(target=work) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
    if failed:
        raise MemoryError(f"selective_scan: no memory for {A.shape[1]} states a channel")
