"""Precision: what autocast, where it is on, does to arguments, and what is never half."""

import torch

DEVICES = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]  # Dynamo cannot ask


def scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Cast as autocast does for a matrix product, but keep what the state is made of in float32."""
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    low = autocast_dtype(u)
    if low is None:
        return arguments
    # delta stays as it came: it may be float32 by choice, and float32 costs the scan nothing.
    dtypes = (low, None, torch.float32, low, low, torch.float32, low, torch.float32, torch.float32)
    return tuple(x if dtype is None else _cast(x, dtype) for x, dtype in zip(arguments, dtypes, strict=True))


def conv_arguments(x, weight, bias, initial_state):
    """Cast x and the state as autocast does; a filter stays as it came if it is float32, which costs nothing."""
    low = autocast_dtype(x)
    if low is None:
        return x, weight, bias, initial_state
    filters = (w if w is None or w.dtype == torch.float32 else _cast(w, low) for w in (weight, bias))
    return _cast(x, low), *filters, _cast(initial_state, low)


def autocast_dtype(x):
    """Return the dtype of autocast where it is on for x's device, else None."""
    device = x.device.type if isinstance(x, torch.Tensor) else "cpu"
    return torch.get_autocast_dtype(device) if device in DEVICES and torch.is_autocast_enabled(device) else None


def _cast(x, dtype):
    castable = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if castable else x


def widen(x):
    """Half precision to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
