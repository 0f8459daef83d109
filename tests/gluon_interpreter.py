"""Runs a Gluon kernel file in Triton's interpreter, which knows Triton only, by giving it another `gl`.

Checked so: indices, masks, order of reads and writes, arithmetic. Not checked: layouts, and barriers between threads.
Shared memory begins as NaN, so a read of what nobody wrote shows.
"""

import types
from pathlib import Path

import numpy as np
import triton
import triton.language as tl


class SharedMemory:
    """Stands for Gluon's shared_memory_descriptor."""

    def __init__(self, dtype, array):
        self.dtype, self.array = dtype, array

    def index(self, i):
        i = int(np.asarray(i.handle.data).item()) if isinstance(i, tl.tensor) else int(i)
        return SharedMemory(self.dtype, self.array[i])

    def store(self, value):
        assert value.handle.data.shape == self.array.shape
        self.array[...] = value.handle.data

    def load(self, layout):
        zeros = tl.zeros(self.array.shape, self.dtype)
        zeros.handle.data = self.array.copy()
        return zeros

    def _reinterpret(self, dtype, shape, layout):
        assert dtype == self.dtype
        return SharedMemory(dtype, self.array.reshape([int(size) for size in shape]))


class Language:
    """Stands for `gl`: Triton's own functions, without layouts, and shared memory."""

    BlockedLayout = SliceLayout = SwizzledSharedLayout = staticmethod(lambda *arguments: None)
    barrier = staticmethod(lambda: None)
    num_warps = staticmethod(lambda: 1)
    arange = staticmethod(lambda start, end, layout: tl.arange(start, end))
    zeros = staticmethod(lambda shape, dtype, layout: tl.zeros(shape, dtype))
    convert_layout = staticmethod(lambda value, layout: value)

    def allocate_shared_memory(self, dtype, shape, layout):
        nothing = tl.full([int(size) for size in shape], float("nan"), dtype)
        return SharedMemory(dtype, nothing.handle.data.copy())

    def __getattr__(self, name):  # at the time of the call: the interpreter replaces them while a kernel runs
        return getattr(tl, name)


def load(path, folder):
    """Return the file at `path` as a module whose kernels run in the interpreter.

    The interpreter reads functions from their source file, so the changed text is written to `folder`.
    """
    text = Path(path).read_text().replace("gl.constexpr", "tl.constexpr")  # it looks for this spelling
    for line in (
        "from triton.experimental import gluon\n",
        "from triton.experimental.gluon import language as gl\n",
    ):
        assert line in text
        text = text.replace(line, "")
    changed = Path(folder) / Path(path).name
    changed.write_text(text)
    module = types.ModuleType(changed.stem)
    gluon = types.SimpleNamespace(jit=triton.jit, constexpr_function=lambda function: function)
    module.__dict__.update(gluon=gluon, gl=Language(), tl=tl, __file__=str(changed))
    exec(compile(text, str(changed), "exec"), module.__dict__)
    return module
