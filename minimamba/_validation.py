"""Argument errors. Every message begins with the argument's name and says what was expected and what came."""

from itertools import pairwise

import torch


def check_tensor(name, value, *, dtypes=None, device=None, like=""):
    """Raise TypeError or ValueError unless `value` is a real floating tensor of one of `dtypes` on `device`.

    `like` ends the sentence about the expectation, for example " (u's dtype)".
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name}: expected a real tensor, got {value.dtype}")
    if not value.is_floating_point() or (dtypes and value.dtype not in dtypes):
        expected = " or ".join(str(d) for d in dtypes) if dtypes else "a floating-point tensor"
        raise TypeError(f"{name}: expected {expected}{like}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}{like}, got {value.device}")


def check_shape(name, value, expected):
    """Raise ValueError unless `value.shape` equals `expected`, a tuple in which a string stands for any size."""
    shape = tuple(value.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape {_show(expected)}, got {_show(shape)}")


def check_counts(**counts):
    """Raise TypeError or ValueError unless every argument is an int of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_positive_sizes(name, value, letters):
    """Raise ValueError if one of the sizes of `value`, called by `letters`, is zero."""
    for letter, size in zip(letters, value.shape, strict=True):
        if size == 0:
            raise ValueError(f"{name}: expected {letter} >= 1, got shape {_show(tuple(value.shape))}")


def check_numbers(**tensors):
    """Check for float or complex tensors of one precision on one device. Return them in one dtype."""
    first_name, first = next(iter(tensors.items()))
    dtype = None
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            raise TypeError(f"{name}: expected float32, float64, complex64 or complex128, got {value.dtype}")
        real = first.dtype.to_real()
        if value.dtype.to_real() != real:
            expected = f"{real} or {real.to_complex()} ({first_name}'s precision)"
            raise TypeError(f"{name}: expected {expected}, got {value.dtype}")
        if value.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} ({first_name}'s), got {value.device}")
        dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
    return [value.to(dtype) for value in tensors.values()]


def check_delta(delta, A):
    """Return the step as a real tensor of A's precision and device."""
    real = A.dtype.to_real()
    if not isinstance(delta, torch.Tensor):
        if not isinstance(delta, int | float):
            raise TypeError(f"delta: expected a number or a torch.Tensor, got {type(delta).__name__}")
        return torch.tensor(delta, dtype=real, device=A.device)
    if delta.dtype != real:
        raise TypeError(f"delta: expected {real} (A's precision), got {delta.dtype}")
    if delta.device != A.device:
        raise ValueError(f"delta: expected device {A.device} (A's), got {delta.device}")
    return delta


def check_option(name, value, options):
    """Raise ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def _show(shape):
    return "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"


def check_scan_arguments(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, cu_seqlens=None, time_last=False
):
    """Check everything `selective_scan` takes, or with `time_last` the (B, D, L) layout of the drop-in."""
    check_tensor("u", u)
    check_shape("u", u, ("B", "D", "L") if time_last else ("B", "L", "D"))
    check_positive_sizes("u", u, "BDL" if time_last else "BLD")
    sequence_dtypes, wide = _dtypes_beside(u.dtype)
    batch, channels = u.shape[0], u.shape[1 if time_last else 2]
    length = u.shape[2 if time_last else 1]

    check_tensor("delta", delta, dtypes=sequence_dtypes, device=u.device, like=" (beside u)")
    check_shape("delta", delta, tuple(u.shape))
    check_tensor("A", A, dtypes=(wide,), device=u.device, like=" (beside u)")
    check_shape("A", A, (channels, "N"))
    check_positive_sizes("A", A, "DN")
    states = A.shape[1]
    groups = None
    for name, x in (("B", B), ("C", C)):
        check_tensor(name, x, dtypes=sequence_dtypes, device=u.device, like=" (beside u)")
        if x.ndim == 2:
            check_shape(name, x, (channels, states))
            continue
        shape = [batch, states, length] if time_last else [batch, length, states]
        if x.ndim != 3:
            shape.insert(1 if time_last else 2, "G")
        check_shape(name, x, tuple(shape))
        own = 1 if x.ndim == 3 else x.shape[1 if time_last else 2]
        if own == 0 or channels % own:
            raise ValueError(f"{name}: expected a number of groups that divides the {channels} channels, got {own}")
        if groups not in (None, own):
            raise ValueError(f"{name}: expected the {groups} groups of B, got {own}")
        groups = own
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            check_tensor(name, x, dtypes=(wide,), device=u.device, like=" (beside u)")
            check_shape(name, x, (channels,))
    if z is not None:
        check_tensor("z", z, dtypes=sequence_dtypes, device=u.device, like=" (beside u)")
        check_shape("z", z, tuple(u.shape))
    sequences = batch
    if cu_seqlens is not None:
        sequences = _check_cu_seqlens(cu_seqlens, u)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, dtypes=(wide,), device=u.device, like=" (beside u)")
        check_shape("initial_state", initial_state, (sequences, channels, states))


def check_update_arguments(state, x, dt, A, B, C, D=None, z=None, dt_bias=None):
    """Check everything `selective_state_update` takes."""
    check_tensor("state", state, dtypes=(torch.float32, torch.float64), like=": never half, or it forgets")
    if state.ndim not in (3, 4):
        raise ValueError(f"state: expected shape (B, D, N) or (B, H, P, N), got {_show(tuple(state.shape))}")
    check_positive_sizes("state", state, "BDN" if state.ndim == 3 else "BHPN")
    batch, *channels, states = state.shape
    check_tensor("x", x, device=state.device, like=" (state's)")
    check_shape("x", x, (batch, *channels))
    sequence_dtypes, wide = _dtypes_beside(x.dtype)
    if state.dtype != wide:
        raise TypeError(f"state: expected {wide} (beside x), got {state.dtype}")
    for name, value, shape in (("dt", dt, x.shape), ("z", z, x.shape)):
        if value is not None or name == "dt":
            check_tensor(name, value, dtypes=sequence_dtypes, device=state.device, like=" (beside x)")
            check_shape(name, value, tuple(shape))
    for name, value, shape in (
        ("A", A, (*channels, states)),
        ("D", D, tuple(channels)),
        ("dt_bias", dt_bias, tuple(channels)),
    ):
        if value is not None or name == "A":
            check_tensor(name, value, dtypes=(wide,), device=state.device, like=" (beside x)")
            check_shape(name, value, shape)
    groups = None
    for name, value in (("B", B), ("C", C)):
        check_tensor(name, value, dtypes=sequence_dtypes, device=state.device, like=" (beside x)")
        check_shape(name, value, (batch, states) if value.ndim == 2 else (batch, "G", states))
        own = 1 if value.ndim == 2 else value.shape[1]
        if own == 0 or channels[0] % own:
            raise ValueError(f"{name}: expected a number of groups that divides {channels[0]}, got {own}")
        if groups not in (None, own):
            raise ValueError(f"{name}: expected the {groups} groups of B, got {own}")
        groups = own


def check_conv_arguments(
    x, weight, bias=None, initial_state=None, cu_seqlens=None, time_last=False, state_name="initial_state"
):
    """Check everything `causal_conv1d` takes, or with `time_last` the (B, D, L) layout of the drop-in."""
    check_tensor("x", x)
    check_shape("x", x, ("B", "D", "L") if time_last else ("B", "L", "D"))
    check_positive_sizes("x", x, "BDL" if time_last else "BLD")
    channels = x.shape[1 if time_last else 2]
    _check_filter(x, channels, weight, bias)
    sequences = x.shape[0] if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, x, "x")
    if initial_state is not None:
        check_tensor(state_name, initial_state, dtypes=(x.dtype,), device=x.device, like=" (x's)")
        check_shape(state_name, initial_state, (sequences, channels, weight.shape[1] - 1))


def check_conv_update_arguments(x, conv_state, weight, bias=None):
    """Check everything `causal_conv1d_update` takes."""
    check_tensor("x", x)
    check_shape("x", x, ("B", "D"))
    check_positive_sizes("x", x, "BD")
    _check_filter(x, x.shape[1], weight, bias)
    check_tensor("conv_state", conv_state, dtypes=(x.dtype,), device=x.device, like=" (x's)")
    check_shape("conv_state", conv_state, (*x.shape, "W"))
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state: expected at least W - 1 = {weight.shape[1] - 1} steps, got {_show(tuple(conv_state.shape))}"
        )


def _check_filter(x, channels, weight, bias):
    dtypes, _ = _dtypes_beside(x.dtype)
    check_tensor("weight", weight, dtypes=dtypes, device=x.device, like=" (beside x)")
    check_shape("weight", weight, (channels, "W"))
    if not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"weight: expected a width W from 2 to 4, got {weight.shape[1]}")
    if bias is not None:
        check_tensor("bias", bias, dtypes=dtypes, device=x.device, like=" (beside x)")
        check_shape("bias", bias, (channels,))


_passed = set()


def check_once(check, *tensors):
    """Run `check`, unless tensors of these shapes, dtypes and devices have passed it before.

    A decoding step is checked thousands of times a second, and the full check takes longer than the step.
    """
    key = None
    if not torch.compiler.is_compiling():
        try:
            key = (check, *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
            if key in _passed:
                return
        except (AttributeError, TypeError):  # not a tensor, which the check will say
            key = None
    check(*tensors)
    if key is not None:
        if len(_passed) >= 1000:
            _passed.clear()
        _passed.add(key)


def document_borders(cu_seqlens, length):
    """Return `cu_seqlens` as a list after checking its values: from 0 to `length`, never falling."""
    borders = cu_seqlens.tolist()
    rising = all(a <= b for a, b in pairwise(borders))
    if borders[0] != 0 or borders[-1] != length or not rising:
        raise ValueError(f"cu_seqlens: expected borders rising from 0 to L = {length}, got {_shorten(borders)}")
    return borders


def _check_cu_seqlens(cu_seqlens, u, name="u"):
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor, got {got}")
    if cu_seqlens.device != u.device:
        raise ValueError(f"cu_seqlens: expected device {u.device} ({name}'s), got {cu_seqlens.device}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape (documents + 1,), got {_show(tuple(cu_seqlens.shape))}")
    if u.shape[0] != 1:
        raise ValueError(f"{name}: expected batch 1 beside cu_seqlens (documents packed in one row), got {u.shape[0]}")
    return cu_seqlens.shape[0] - 1


def _dtypes_beside(dtype):
    """The dtypes that go with u's: of what varies along the sequence, and of A, D, biases and states."""
    if dtype == torch.float64:
        return (dtype,), dtype
    return tuple(dict.fromkeys((dtype, torch.float32))), torch.float32


def _shorten(values):
    return values if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
