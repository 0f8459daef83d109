"""The selective scan in NumPy float64, written index by index from the Mamba paper's equations.

It shares no code with the package, and it is slow on purpose: every sum is a loop that can be read.
"""

from itertools import pairwise

import numpy as np


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """Return y (Batch, L, D) and the final state (Batch, D, N); arguments as in minimamba.selective_scan."""
    u, delta, A, B, C = (np.asarray(x, dtype=np.float64) for x in (u, delta, A, B, C))
    batch, length, channels = u.shape
    states = A.shape[1]
    y = np.zeros((batch, length, channels))
    final_state = np.zeros((batch, channels, states))
    for i in range(batch):
        for d in range(channels):
            h = np.zeros(states) if initial_state is None else np.array(initial_state[i, d], dtype=np.float64)
            for t in range(length):
                step = delta[i, t, d]
                if delta_bias is not None:
                    step = step + float(delta_bias[d])
                if delta_softplus:
                    step = np.logaddexp(0.0, step)
                h = np.exp(step * A[d]) * h + step * u[i, t, d] * _row(B, i, t, d, channels)
                out = float(np.dot(_row(C, i, t, d, channels), h))
                if D is not None:
                    out += float(D[d]) * u[i, t, d]
                if z is not None:
                    gate = float(z[i, t, d])
                    out *= gate * _sigmoid(gate)
                y[i, t, d] = out
            final_state[i, d] = h
    return y, final_state


def packed(u, delta, A, B, C, cu_seqlens, z=None, initial_state=None, **options):
    """The same for a packed row: every document on its own. Returns y (1, L, D) and states (documents, D, N)."""
    outputs, states = [], []
    for i, (start, stop) in enumerate(pairwise(cu_seqlens)):
        part = slice(int(start), int(stop))
        cut = [x if np.ndim(x) == 2 else x[:, part] for x in (B, C)]
        h0 = None if initial_state is None else initial_state[i : i + 1]
        gate = None if z is None else z[:, part]
        y, h = selective_scan(u[:, part], delta[:, part], A, *cut, z=gate, initial_state=h0, **options)
        outputs.append(y)
        states.append(h)
    return np.concatenate(outputs, axis=1), np.concatenate(states, axis=0)


def _row(B, i, t, d, channels):
    if B.ndim == 2:  # constant: (D, N)
        return B[d]
    if B.ndim == 3:  # one group: (Batch, L, N)
        return B[i, t]
    return B[i, t, d // (channels // B.shape[2])]  # groups: (Batch, L, G, N)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x)) if x >= 0 else np.exp(x) / (1 + np.exp(x))
