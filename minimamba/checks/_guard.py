"""Run a stranger's code: it may raise, never return, change its arguments, or write outside its buffers."""

import _thread
import copy
import signal
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


class TimeUp(BaseException):
    """The time limit. No Exception, or an `except Exception` in the student's loop would swallow it."""


class WroteOutside(Exception):
    """A kernel wrote outside the tensor that it was given."""


@dataclass
class Outcome:
    """What one call gave: its value, or the exception and the line of the student's code that raised it."""

    value: object = None
    error: BaseException | None = None
    line: str = ""
    changed: tuple = ()  # names of the arguments that were changed
    shared: tuple = ()  # names of the arguments whose memory the value shares


def call(run, answer, arguments, seed=0):
    """Return the Outcome of run(answer, **arguments) on copies of the arguments, with PyTorch's seed set."""
    mine = copied(arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            value = run(answer, **mine)
        except (Exception, SystemExit) as error:
            return Outcome(error=error, line=_line_of(error))
    changed = tuple(name for name in mine if not unchanged(arguments[name], mine[name]))
    value = _without_strange(value)
    shared = tuple(name for name, x in mine.items() if any(_share(x, y) for y in as_tuple(value)))
    return Outcome(value=_detached(value), changed=changed, shared=shared)


@contextmanager
def time_limit(seconds):
    """Raise TimeUp in the block after `seconds`. Only in the main thread; elsewhere the block runs without a limit.

    A thread sends the signal of Ctrl-C, on every system and in Jupyter. While Python waits for one long call into
    compiled code, it cannot be interrupted. A Ctrl-C of the user stays a KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    finished, expired = threading.Event(), threading.Event()

    def handler(signum, frame):
        if not expired.is_set():
            raise KeyboardInterrupt
        if not finished.is_set():  # else the signal came too late, and the block is over
            raise TimeUp

    def interrupt():
        expired.set()
        while not finished.is_set():  # again and again: a bare `except:` may have swallowed the first
            if hasattr(signal, "pthread_kill"):  # wakes a sleep too
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            else:
                _thread.interrupt_main()
            finished.wait(1)

    before = signal.signal(signal.SIGINT, handler)
    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    try:
        try:
            timer.start()
            yield
        finally:
            finished.set()
            timer.cancel()
            timer.join()  # a signal that was sent has now arrived, before the old handler is back
    finally:
        signal.signal(signal.SIGINT, before)


def poisoned(x, margin=256):
    """Return a contiguous copy of x, an input, with `margin` elements of poison before and after it in memory.

    Poison is NaN, or the smallest integer: a kernel that reads too far gets it into its result.
    """
    return _between(x.detach(), margin, _poison(x.dtype))


def unwritten(x, margin=256):
    """Return a buffer like x for a result: poison inside, so that what is left out shows, a plain number around it.

    Not poison around it too: a kernel that copies poison from beyond its input to beyond its output would go unseen.
    """
    return _between(torch.full_like(x, _poison(x.dtype)), margin, 77)


def clean(x):
    """Return a copy of x, from `poisoned` or `unwritten`, or raise WroteOutside if its margins have changed."""
    margin = x.storage_offset()
    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    margins = torch.cat([whole[:margin], whole[margin + x.numel() :]])
    if not unchanged(torch.full_like(margins, x.around), margins):
        raise WroteOutside("Your kernel wrote outside its tensor. Look at the mask of tl.store")
    return x.clone()


def _between(x, margin, around):
    buffer = torch.full((x.numel() + 2 * margin,), around, dtype=x.dtype, device=x.device)
    buffer[margin : margin + x.numel()] = x.reshape(-1)
    inner = buffer[margin : margin + x.numel()].view(x.shape)
    inner.around = around
    return inner


def gradients(value, inputs):
    """Gradients of value, a number, by each of the inputs; zero where value does not depend on one."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def is_kernel(answer):
    """True for a function under @triton.jit, interpreted or compiled: what kernel[grid](...) launches."""
    return not isinstance(answer, type) and hasattr(answer, "__getitem__") and hasattr(answer, "arg_names")


def raised(outcome):
    """What to say about an exception: a line, and where it is in the student's code."""
    error = _root(outcome.error)
    if isinstance(error, WroteOutside):
        return [f"{error}."]
    text = str(error).strip().splitlines()
    lines = [f"Your code raised {type(error).__name__}: {text[0] if text else ''}"]
    return [*lines, f"  {outcome.line}"] if outcome.line else lines


def _root(error):
    """The first exception of a chain: Triton wraps what a kernel raises."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def causes(error):
    """Names of the exception's class and of those that caused it: Triton wraps what a kernel raises."""
    names = set()
    while error is not None:
        names.add(type(error).__name__)
        error = error.__cause__
    return names


def as_tuple(value):
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def torch_only(value):
    """The value with its NumPy arrays as tensors."""
    if isinstance(value, tuple | list):
        return type(value)(map(torch_only, value)) if type(value) in (tuple, list) else value
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    return torch.as_tensor(value) if numbers else value


def copied(x):
    if isinstance(x, torch.Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if isinstance(x, dict):
        return {name: copied(value) for name, value in x.items()}
    return copy.deepcopy(x)


def unchanged(before, after):
    """True if both are equal, NaN equal to NaN. Objects that cannot be compared count as unchanged."""
    if isinstance(before, torch.Tensor):
        if not isinstance(after, torch.Tensor):
            return False
        if before.shape != after.shape or before.dtype != after.dtype:
            return False
        if before.is_floating_point() or before.is_complex():
            return torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
        return torch.equal(before, after)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(before[key], after[key]) for key in before)
    return before == after if isinstance(before, int | float | str) else True


def _poison(dtype):
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _share(x, y):
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return tensors and x.numel() > 0 and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class Strange:
    """Stands for a tensor that cannot be compared: a sparse one, or one without numbers."""

    def __init__(self, x):
        self.what = "a tensor without numbers" if x.is_meta else "a sparse tensor"

    def __repr__(self):
        return self.what


def _without_strange(value):
    if isinstance(value, tuple | list):
        return [*map(_without_strange, value)] if isinstance(value, list) else tuple(map(_without_strange, value))
    strange = isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided)
    return Strange(value) if strange else value


def _detached(value):
    """The value, its tensors and arrays copied: what a later call writes into them must not change it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return tuple(map(_detached, value)) if isinstance(value, tuple | list) else value


def _line_of(error):
    """The last line outside this package and PyTorch, as the student sees it: 'line 3: return a + b'."""
    own = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(_root(error).__traceback__)):
        path = Path(frame.filename)
        if path.parent != own and "site-packages" not in path.parts and frame.line:
            return f"line {frame.lineno}: {frame.line}"
    return ""
