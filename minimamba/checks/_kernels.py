"""Launch a student's kernel in Triton's interpreter, and look at every address that it reads or writes.

Poison around a tensor shows a read that spoils the result. On a GPU a read whose result is thrown away may fail too,
so here each one outside the tensors raises.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch

from minimamba.checks._core import Case, Mistake
from minimamba.checks._guard import _root, clean, is_kernel, poisoned, unchanged, unwritten
from minimamba.triton_scan import require_triton


class Outside(IndexError):
    """A program reads or writes a place that no tensor has."""


class ReadsBefore(Outside): ...


class ReadsBehind(Outside): ...


class WritesBefore(Outside): ...


class WritesBehind(Outside): ...


class WritesInput(Exception):
    """The kernel writes where the caller's numbers are."""


class TwoPrograms(Exception):
    """Two programs use one place, and one of them writes it: the result depends on who comes first."""


def block(x):
    """Steps of a block: of short sequences 2, so that a message can show all numbers, of longer ones 4."""
    return 2 if len(x) < 7 else 4


def blocks(x):
    return -(-len(x) // block(x))


def inputs(names, draw):
    """A function that yields one step, full blocks, and blocks with a tail; one of them in float32.

    Decays are exp(-Δ) with Δ log-uniform in [0.001, 5], different at each step; the rest is normal.
    """

    def cases():
        for length, seed in [(1, 1), (3, 2), (4, 3), (9, 5)]:
            g = torch.Generator().manual_seed(seed)
            dtype = torch.float32 if length == 4 else torch.float64
            normal = torch.randn(3, length, generator=g, dtype=torch.float64)
            decay = torch.exp(-0.001 * 5000 ** torch.rand(length, generator=g, dtype=torch.float64))
            values = [x.to(dtype) for x in draw(decay, *normal)]
            yield Case(f"L = {length}, BLOCK = {block(decay)}", **dict(zip(names, values, strict=True)))

    return cases


def in_memory(kernel, arrays, results, programs=1, numbers=None, **options):
    """Launch with poisoned arrays and unwritten results, {name: tensor}, and numbers (by default L).

    The first of the arrays tells L, and with it BLOCK. Returns the results.
    """
    if not is_kernel(kernel):  # the reference and the known mistakes are functions of the arrays
        return kernel(*arrays.values())
    tensors = {k: poisoned(x) for k, x in arrays.items()} | {k: unwritten(x) for k, x in results.items()}
    x = next(iter(arrays.values()))
    launch(kernel, programs, tensors, *(numbers or [len(x)]), BLOCK=block(x), **options)
    for name, x in arrays.items():
        if not unchanged(x, tensors[name]):
            raise WritesInput(f"the kernel changes {name}, which is an input")
    return tuple(clean(tensors[name]) for name in results)


def launch(kernel, programs, tensors, *numbers, undefined=torch.nan, one_writer=False, **constants):
    """kernel[(programs,)](*tensors, *numbers, **constants), tensors being {name: tensor} with margins (see _guard).

    A masked place of a load without `other=`, undefined on a GPU and 0 in the interpreter, is `undefined` here.
    With `one_writer` TwoPrograms is raised where programs share a place that one of them writes.
    """
    require_triton("cpu")
    with _watched(tensors, undefined, one_writer), np.errstate(all="ignore"):
        try:
            kernel[(programs,)](*tensors.values(), *numbers, **constants)
        except Exception as error:
            raise _root(error) from None  # the student's own, which Triton wraps


@contextmanager
def _watched(tensors, undefined, one_writer):
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    add, users = InterpreterBuilder.create_atomic_rmw, {}
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes - 1) for x in tensors.values()]

    def look(builder, pointers, mask, writes):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        known = np.zeros(addresses.shape, dtype=bool)
        for first, last in spans:
            known |= (first <= addresses) & (addresses <= last)
        for address in addresses if one_writer or not known.all() else ():
            name, place = _find(tensors, int(address))
            _check(tensors[name], name, place, writes)
            mine = users.setdefault(address, {})
            _check_alone(mine, builder.grid_idx[0], writes, f"place {place} of {name}")
            mine[builder.grid_idx[0]] = writes or mine.get(builder.grid_idx[0], False)

    def watched_load(self, pointers, mask, other, *options):
        look(self, pointers, mask, writes=False)
        out = load(self, pointers, mask, other, *options)
        if other is None and out.data.dtype.kind == "f" and out.data.size > 1:  # of a scalar other=0.0 comes as None
            out.data = np.where(mask.data, out.data, np.asarray(undefined, dtype=out.data.dtype))
        return out

    def watched_store(self, pointers, value, mask, *options):
        look(self, pointers, mask, writes=True)
        return store(self, pointers, value, mask, *options)

    def watched_add(self, operation, pointers, value, mask, *options):
        look(self, pointers, mask, writes=True)
        return add(self, operation, pointers, value, mask, *options)

    with patch.multiple(
        InterpreterBuilder,
        create_masked_load=watched_load,
        create_masked_store=watched_store,
        create_atomic_rmw=watched_add,
    ):
        yield


def _find(tensors, address):
    """The name of the tensor at this address, or nearest to it, and the place as counted from its first number."""
    away = lambda x: max(x.data_ptr() - address, address - x.data_ptr() - x.nbytes + 1, 0)
    name = min(tensors, key=lambda name: away(tensors[name]))
    return name, (address - tensors[name].data_ptr()) // tensors[name].element_size()


def _check(x, name, place, writes):
    if not 0 <= place < x.numel():
        kinds = (WritesBefore, WritesBehind) if writes else (ReadsBefore, ReadsBehind)
        has = f"whose places are 0 to {x.numel() - 1}" if x.numel() > 1 else "which has place 0 only"
        raise kinds[place >= x.numel()](f"it {'writes' if writes else 'reads'} place {place} of {name}, {has}")


def _check_alone(users, program, writes, where):
    for other, wrote in users.items():
        if other != program and (wrote or writes):
            raise TwoPrograms(f"programs {other} and {program} both use {where}, and one of them writes it")


# Mistakes that several exercises share. `right` is the right answer in PyTorch; an answer may raise like a kernel.
OUTSIDE = "A program goes on outside the tensor, where another may lie. Each load and store needs a mask, t < L."
OTHER = "Where the mask is false the GPU puts anything. The check puts NaN or infinity there, to make it visible."
STRIDE = "Program p begins at p · BLOCK. Here the programs overlap and do not reach the end, so NaN stays there."


def outside(kind, right, always=False, where=lambda x, *_: len(x) % block(x)):
    """An answer that raises `kind` where the last block is not full, or always, or `where`; else it is right."""

    def answer(*arguments):
        if always or where(*arguments):
            raise kind
        return right(*arguments)

    return answer


def unmasked(right, name="an unmasked tail", kinds=(ReadsBehind, WritesBehind), see="10 §4", says=OUTSIDE):
    return tuple(Mistake(name, outside(kind, right), says, see) for kind in kinds)
