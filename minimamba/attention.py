"""Chapter 00: causal attention, the cache it decodes with, and what both cost.

    P = softmax(Q Kᵀ / √d + mask)    (L, L)    how much position t takes from each position s <= t; rows sum to 1
    Y = P V                          (L, d)    the mean of the values, with these weights

All positions at once need L² weights for each head. One position at a time, earlier keys and values are not computed
again but kept, 2·L·d numbers for each head: the KV cache. A state space model keeps a state instead, whose size does
not depend on L.

q, k and v have the shape (Batch, Heads, L, d) and one dtype: float16, bfloat16, float32 or float64. Anything else
raises TypeError or ValueError, and the message begins with the argument's name.

Source: Attention Is All You Need (Vaswani and others, 2017), equation 1 and section 3.2.3 for the mask.
"""

import contextlib
import math
import os
from itertools import accumulate

import torch
from torch.autograd import profiler

from minimamba._validation import check_counts, check_positive_sizes, check_shape, check_tensor

# --- attention ---


def causal_attention(q, k, v):
    """Return softmax(Q Kᵀ / √d) V, where each position sees itself and what came before.

    q (Batch, Heads, L, d), k and v (Batch, Heads, S, d); returns (Batch, Heads, L, d). The L queries belong to the
    last L of the S positions; usually L = S. Differentiable. Source: Vaswani and others (2017), equation 1.
    """
    _check_attention(q, k, v)
    return attention_weights(q, k) @ v


def attention_weights(q, k):
    """Return P = softmax(Q Kᵀ / √d) (Batch, Heads, L, S): row t says how much of each position query t takes.

    q (Batch, Heads, L, d) are the queries of the last L of the S positions of k (Batch, Heads, S, d).
    """
    _check_attention(q, k)
    hidden = ~causal_mask(q.shape[-2], k.shape[-2], device=q.device)
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # (Batch, Heads, L, S)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1)  # e^-inf is 0


def causal_mask(length, positions, device=None):
    """Return the mask (length, positions), bool: True where one of the last `length` positions may look."""
    check_counts(length=length, positions=positions)
    if positions < length:
        raise ValueError(f"positions: expected at least length = {length}, got {positions}")
    return torch.ones(length, positions, dtype=torch.bool, device=device).tril(positions - length)


# --- one step at a time ---


class KVCache:
    """The keys and values of the positions so far, for one layer, with room for `capacity` positions.

    `keys` and `values` are (Batch, Heads, length, d). The room is reserved at once, as inference engines do:
    enlarging a tensor by one position would copy all of it each time.
    """

    def __init__(self, batch, heads, capacity, head_dim, dtype=torch.float32, device=None):
        check_counts(batch=batch, heads=heads, capacity=capacity, head_dim=head_dim)
        self.capacity = capacity
        self.length = 0
        self._keys, self._values = torch.zeros(2, batch, heads, capacity, head_dim, dtype=dtype, device=device)

    @property
    def keys(self):
        return self._keys[:, :, : self.length]

    @property
    def values(self):
        return self._values[:, :, : self.length]

    @torch.no_grad()
    def append(self, k, v):
        """Add k and v (Batch, Heads, any number of positions, d) after those that are there. Has no gradient."""
        check_tensor("k", k, dtypes=(self._keys.dtype,), device=self._keys.device, like=" (the cache's)")
        batch, heads, _, head_dim = self._keys.shape
        check_shape("k", k, (batch, heads, "L", head_dim))
        _check_beside(k, v=v)
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"k: expected at most {self.capacity - self.length} more positions, got {k.shape[2]}")
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length = end


@torch.no_grad()
def attention_step(q, k, v, cache):
    """Append k and v to the cache and return the attention of q to everything in it, (Batch, Heads, L, d).

    q, k, v (Batch, Heads, L, d) belong to the next L positions: 1 in decoding, more for a prompt or a piece of it.
    Cut a sequence anywhere, and the pieces give what `causal_attention` gives for the whole. Has no gradient.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    _check_attention(q, k, v)
    check_shape("q", q, tuple(k.shape))
    cache.append(k, v)
    return causal_attention(q, cache.keys, cache.values)


# --- costs ---


def cache_bytes(context, layers, kv_heads, head_dim, bytes_per_number=2):
    """Return the bytes of a model's KV cache for one sequence of `context` tokens: a key and a value for each.

    `kv_heads` counts the heads that keys and values have: fewer than the query's where groups share them
    (grouped-query attention; Ainslie and others, 2023). bytes_per_number: 2 for half precision.
    """
    check_counts(
        context=context, layers=layers, kv_heads=kv_heads, head_dim=head_dim, bytes_per_number=bytes_per_number
    )
    return 2 * context * layers * kv_heads * head_dim * bytes_per_number


def state_bytes(layers, channels, states, conv_width, bytes_per_number=4):
    """Return the bytes that a Mamba model keeps for one sequence of any length.

    Each of the `channels` (expand · d_model) of a layer keeps `states` (d_state) numbers, and the last conv_width - 1
    inputs of its short convolution (the official code stores conv_width of them). bytes_per_number: 4 for float32.
    """
    check_counts(
        layers=layers, channels=channels, states=states, conv_width=conv_width, bytes_per_number=bytes_per_number
    )
    return layers * channels * (states + conv_width - 1) * bytes_per_number


def peak_bytes(run):
    """Call run() and return how many bytes it held at once on the CPU, its result included, what it was given not.

    PyTorch's profiler records what each operator allocates and frees. Memory that an operator takes only for
    itself counts too; what is not allocated by PyTorch does not.
    """
    with _quiet_stderr(), profiler.profile(use_kineto=False, profile_memory=True) as record:
        run()
    events = sorted(record.function_events, key=lambda event: event.time_range.end)
    return max(accumulate((event.self_cpu_memory_usage for event in events), initial=0))


@contextlib.contextmanager
def _quiet_stderr():
    """Close the standard error of the process, on which PyTorch 2.13's profiler announces its start and stop."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# --- arguments ---


def _check_attention(q, k, v=None):
    check_tensor("q", q)
    check_shape("q", q, ("Batch", "Heads", "L", "d"))
    check_positive_sizes("q", q, ("Batch", "Heads", "L", "d"))
    check_tensor("k", k, dtypes=(q.dtype,), device=q.device, like=" (q's)")
    batch, heads, length, head_dim = q.shape
    check_shape("k", k, (batch, heads, "S", head_dim))
    if k.shape[2] < length:
        raise ValueError(f"k: expected at least the {length} positions of q, got {k.shape[2]}")
    if v is not None:
        _check_beside(k, v=v)


def _check_beside(k, v):
    check_tensor("v", v, dtypes=(k.dtype,), device=k.device, like=" (k's)")
    check_shape("v", v, tuple(k.shape))
