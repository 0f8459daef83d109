"""Compare what was expected with what came, and say in plain words how they differ."""

import math

import numpy as np
import torch

from minimamba.checks._guard import as_tuple, torch_only, unchanged

TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}


def distance(expected, got):
    """Largest difference, relative to the largest expected entry (absolute if that is 0); inf where one is NaN."""
    expected, got = _tensor(expected), _tensor(got)
    if expected.numel() == 0:
        return 0.0
    if expected.dtype == torch.bool or not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, got.to(expected.dtype)) and not _has_fraction(got) else math.inf
    expected, got = _wide(expected), _wide(got)
    same = (expected == got) | (expected.isnan() & got.isnan())  # covers infinities
    error = torch.where(same, 0.0, (expected - got).abs())
    finite = expected.abs()[expected.isfinite()]
    scale = finite.max().item() if finite.numel() else 0.0
    worst = torch.nan_to_num(error, nan=math.inf).max().item()
    return worst / scale if scale > 0 else worst


def complaint(expected, got, names, tolerance):
    """Return None if the results agree, else (kind, sentence, index of the result at fault).

    `kind` is "NumPy", "count", "type", "shape", "dtype" or "value".
    """
    if len(as_tuple(got)) != len(as_tuple(expected)) or isinstance(got, tuple | list) != isinstance(expected, tuple):
        wanted = (
            f"{len(as_tuple(expected))} results, {', '.join(names)}" if isinstance(expected, tuple) else "one result"
        )
        rows = len(got) > 0 and isinstance(expected, torch.Tensor) if isinstance(got, tuple | list) else False
        advice = " torch.stack makes one tensor of many." if rows and isinstance(got[0], torch.Tensor) else ""
        return "count", f"Expected {wanted}, got {describe(got)}.{advice}", 0
    for index, (want, have) in enumerate(zip(as_tuple(expected), as_tuple(got), strict=True)):
        name = names[index] if index < len(names) else f"result {index + 1}"
        if isinstance(have, np.ndarray | np.generic) and isinstance(want, torch.Tensor):
            return "NumPy", f"{name} is a NumPy array. Expected a torch.Tensor: NumPy loses the gradient.", index
        if isinstance(want, torch.Tensor) and not isinstance(have, torch.Tensor):
            return "type", f"{name}: expected {describe(want)}, got {describe(have)}.", index
        if not isinstance(want, torch.Tensor):
            if not isinstance(want, int | float | complex):
                if type(have) is not type(want) or not unchanged(want, have):
                    return "value", f"{name} is not what was expected.", index
                continue
            single = isinstance(have, torch.Tensor | np.ndarray) and math.prod(have.shape) == 1
            if not single and not isinstance(have, int | float | complex | np.generic):
                return "type", f"{name}: expected a number, got {describe(have)}.", index
            have = have.item() if single else have
        elif have.device != want.device:
            return "type", f"{name} is on {have.device}. The check works on {want.device}: make tensors there.", index
        elif have.shape != want.shape:
            return "shape", f"{name} has the wrong shape: expected {shape(want)}, got {shape(have)}.", index
        elif have.dtype != want.dtype:
            return "dtype", f"{name} has the wrong dtype: expected {want.dtype}, got {have.dtype}.", index
        if distance(want, have) > limit(want, tolerance):
            few = getattr(want, "ndim", 0) == 0
            return "value", f"{name}: wrong value." if few else f"{name}: the right shape, and wrong values.", index
    return None


def limit(expected, tolerance):
    return tolerance or TOLERANCE.get(getattr(expected, "dtype", torch.float64), 1e-9)


def pattern(pairs, tolerance):
    """Return (kind, sentence) that holds for every (expected, got) of one result, or None. Shapes are equal."""
    pairs = [pair for pair in pairs if isinstance(pair[0], torch.Tensor) and pair[0].numel() > 0]
    if not pairs:
        return None
    pairs = [(_wide(want), _wide(have), limit(want, tolerance)) for want, have in pairs]
    bad = _not_finite(*pairs[0])
    if bad:
        return "not_finite", bad
    for test in (_sign, _transposed, _reversed, _shifted, _factor, _places):
        found = [test(*pair) for pair in pairs]
        told = {sentence for sentence in found if sentence not in (None, "")}
        # None is a veto; "" is an input too small to tell.
        if None not in found and len(told) == 1:
            return test.__name__[1:], told.pop()
    return None


def _not_finite(want, have, tol):
    if want.isfinite().all() and not have.isfinite().all():
        return "It is NaN or infinite somewhere: a division by zero, an overflow, or memory that nobody set."


def _sign(want, have, tol):
    return "It has the opposite sign." if distance(-want, have) <= tol else None


def _factor(want, have, tol):
    if want.numel() == 1:
        return ""  # one number is always a factor off
    at = want.abs().argmax()
    factor = (have.flatten()[at] / want.flatten()[at]).item()
    if factor != 0 and distance(want * factor, have) <= tol:
        return f"It is {number(factor)} times what it should be, everywhere."


def _transposed(want, have, tol):
    if want.ndim < 2 or want.shape[-1] != want.shape[-2]:
        return None
    if want.shape[-1] == 1:
        return ""
    return "It is the transpose of what it should be." if distance(want.mT, have) <= tol else None


def _reversed(want, have, tol):
    for axis in range(want.ndim):
        if want.shape[axis] > 1 and distance(want.flip(axis), have) <= tol:
            return f"It is in reversed order along axis {axis}."
    return "" if want.numel() == 1 else None


def _shifted(want, have, tol):
    if max(want.shape, default=1) < 3:
        return ""
    for axis, size in enumerate(want.shape):
        early, late = (lambda x: x.narrow(axis, 0, size - 1)), (lambda x: x.narrow(axis, 1, size - 1))  # noqa: B023
        if size >= 3 and distance(early(want), late(have)) <= tol:
            return f"It is one step late along axis {axis}."
        if size >= 3 and distance(late(want), early(have)) <= tol:
            return f"It is one step early along axis {axis}."


def _places(want, have, tol):
    scale = want.abs().max().item() or 1.0
    wrong = ~((want - have).abs() <= tol * scale)
    if wrong.all():
        return "" if 1 in wrong.shape or wrong.ndim == 0 else None  # one entry is the first and the last
    if wrong.ndim >= 2 and wrong.shape[-1] == wrong.shape[-2] > 1:
        diagonal = torch.eye(wrong.shape[-1], dtype=torch.bool).expand(wrong.shape)
        if not (wrong & ~diagonal).any():
            return "Only the diagonal is wrong."
        if not (wrong & diagonal).any():
            return "Only what is beside the diagonal is wrong."
    for axis in range(wrong.ndim):
        lines = wrong.movedim(axis, 0).flatten(1).any(1) if wrong.ndim > 1 else wrong
        bad = lines.nonzero().flatten().tolist()
        for index, word in ((0, "first"), (len(lines) - 1, "last")):
            if len(lines) > 1 and bad == [index]:
                return f"Only the {word} entry along axis {axis} is wrong."
        if len(lines) > 2 and bad == list(range(1, len(lines))):
            return f"The first entry along axis {axis} is right, all later ones are wrong."
    return None


def facts(arguments, sizes):
    """What may tell inputs apart: their sizes by letter, and the dtype of the first tensor."""
    known = {letter: arguments[name].shape[axis] for letter, (name, axis) in (sizes or {}).items()}
    dtypes = [str(x.dtype).removeprefix("torch.") for x in arguments.values() if isinstance(x, torch.Tensor)]
    return known | ({"dtype": dtypes[0]} if dtypes else {})


def which_inputs(failed, passed):
    """Say which inputs fail, where one property separates them from those that pass. Each is a dict of facts."""
    if not passed:
        return ""
    for name in failed[0]:
        values, others = ({facts.get(name) for facts in group} for group in (failed, passed))
        if values & others:
            continue
        sizes = all(isinstance(value, int) for value in values | others)
        if sizes and min(values) > max(others):
            return f"only where {name} > {max(others)}"
        if len(values) == 1:
            return f"only where {name} = {values.pop()}"
        if sizes and {v % 2 for v in values} == {1} and {v % 2 for v in others} == {0}:
            return f"only where {name} is odd"
        if sizes and {v % 2 for v in values} == {0} and {v % 2 for v in others} == {1}:
            return f"only where {name} is even"
    return ""


def arguments(named):
    """One line for each argument of a call."""
    lines = [f"  {name} = {show(x)}{_kind(x)}" for name, x in named.items()]
    return lines if len(lines) <= 6 else [*lines[:5], "  ..."]


def results(want, have, index, names):
    """Two lines for the result at fault, expected and got."""
    if len(as_tuple(want)) != len(as_tuple(have)):
        return []
    want, have = as_tuple(want)[index], as_tuple(have)[index]
    digits = 4 if show(want) != show(have) else 12  # more where four digits show no difference
    return [
        f"{names[index]} {word} {show(x, digits)}{_kind(x)}" for word, x in (("expected", want), ("got     ", have))
    ]


def show(x, digits=4, rows=4):
    """A value in one short line: four digits, cut to a small size."""
    x = torch_only(x) if isinstance(x, np.ndarray) else x
    if not isinstance(x, torch.Tensor):
        return number(x, digits) if isinstance(x, int | float | complex) and not isinstance(x, bool) else repr(x)[:100]
    x = x.detach()
    cut = tuple(slice(0, 1) for _ in range(max(0, x.ndim - 2))) + tuple(slice(0, rows) for _ in range(min(2, x.ndim)))
    text = _nested(x[cut] if x.ndim else x, digits)
    return text + (" (its first entries)" if x.numel() > x[cut].numel() else "")


def shape(x):
    return "(" + ", ".join(map(str, x.shape)) + ("," if x.ndim == 1 else "") + ")"


def describe(x):
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {shape(x)}"
    if isinstance(x, np.ndarray):
        return f"a NumPy array of shape {shape(x)}"
    if isinstance(x, tuple | list):
        return f"{len(x)} values in a tuple or list"
    return "None (is there a return?)" if x is None else f"{show(x)} ({type(x).__name__})"


def number(x, digits=4):
    if isinstance(x, complex):
        return f"{x.real:.{digits}g}{x.imag:+.{digits}g}j" if x.imag else number(x.real, digits)
    return f"{x:.{digits}g}" if isinstance(x, float) else str(x)


def _kind(x):
    return f"  {shape(x)} {str(x.dtype).removeprefix('torch.')}" if isinstance(x, torch.Tensor) else ""


def _nested(x, digits):
    return number(x.item(), digits) if x.ndim == 0 else "[" + ", ".join(_nested(y, digits) for y in x) + "]"


def _tensor(x):
    if isinstance(x, int) and abs(x) >= 2**63:
        x = math.inf if x > 0 else -math.inf
    return torch.as_tensor(x)


def _wide(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _has_fraction(x):
    return x.is_floating_point() and not torch.equal(x, x.round())
