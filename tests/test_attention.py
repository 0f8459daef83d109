"""Chapter 00: causal attention and its cache against loops in NumPy float64, and the bytes they take."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimamba import attention
from minimamba.attention import KVCache, attention_step, attention_weights, causal_attention

# --- the oracle: equation 1 of the paper, one query at a time ---


def oracle(q, k, v):
    """Weights (Batch, Heads, L, S) and y (Batch, Heads, L, d) for the last L of S positions."""
    batch, heads, length, d = q.shape
    positions = k.shape[2]
    P = np.zeros((batch, heads, length, positions))
    y = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                t = positions - length + i  # the position of this query
                scores = [sum(q[b, h, i, j] * k[b, h, s, j] for j in range(d)) / math.sqrt(d) for s in range(t + 1)]
                weights = np.exp(np.array(scores) - max(scores))
                P[b, h, i, : t + 1] = weights / weights.sum()
                y[b, h, i] = sum(P[b, h, i, s] * v[b, h, s] for s in range(t + 1))
    return P, y


def draw(batch, heads, length, d, seed, positions=None, dtype=torch.float64):
    """q, k, v with scores of several units, so that no weight is near the mean."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, d) for n in (length, positions or length, positions or length)]
    return [1.7 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_near(got, expected, tolerance=1e-11):
    got, expected = (torch.as_tensor(x).double() for x in (got, expected))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(expected.abs().max().item(), 1e-30)


shapes = {
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "length": st.integers(1, 9),
    "d": st.integers(1, 6),
    "seed": st.integers(0, 999),
}


# --- attention ---


@given(**shapes, earlier=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_attention_equals_the_oracle(batch, heads, length, d, seed, earlier):
    q, k, v = draw(batch, heads, length, d, seed, positions=length + earlier)
    P, y = oracle(q.numpy(), k.numpy(), v.numpy())
    assert_near(attention_weights(q, k), P)
    assert_near(causal_attention(q, k, v), y)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_attention_equals_pytorchs(length):
    q, k, v = draw(2, 3, length, 7, seed=length)
    assert_near(causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@given(**shapes)
@settings(deadline=None, max_examples=30)
def test_weights_are_a_causal_distribution(batch, heads, length, d, seed):
    P = attention_weights(*draw(batch, heads, length, d, seed)[:2])
    assert_near(P.sum(-1), torch.ones(batch, heads, length))
    assert (P >= 0).all()
    assert (P.triu(1) == 0).all()
    assert (P.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_no_output_depends_on_a_later_token():
    q, k, v = draw(1, 2, 12, 4, seed=1)
    y = causal_attention(q, k, v)
    for cut in range(1, 12):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, cut:] = -3 * x[:, :, cut:] + 1
        changed = causal_attention(*later)
        assert torch.equal(changed[:, :, :cut], y[:, :, :cut])
        assert (changed[:, :, cut] != y[:, :, cut]).any()


def test_the_mask_counts_from_the_last_position():
    assert attention.causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert attention.causal_mask(3, 3).tolist() == torch.ones(3, 3).tril().bool().tolist()


def test_the_first_token_sees_only_itself_and_equal_scores_give_the_mean():
    q, k, v = draw(2, 2, 6, 3, seed=2)
    assert_near(causal_attention(q, k, v)[:, :, 0], v[:, :, 0])
    mean = v.cumsum(2) / torch.arange(1, 7)[:, None]
    assert_near(causal_attention(torch.zeros_like(q), k, v), mean)


def test_scores_are_divided_by_the_root_of_the_head_dimension():
    # Two tokens, d = 16: scores 0 and s / 4, so the newer one weighs 1 / (1 + e^(-s / 4)).
    q, k = torch.zeros(2, 1, 1, 2, 16, dtype=torch.float64)
    q[..., 1, 0], k[..., 1, 0] = 1, 3
    assert attention_weights(q, k)[0, 0, 1, 1].item() == pytest.approx(1 / (1 + math.exp(-3 / 4)), rel=1e-12)


def test_large_scores_do_not_overflow():
    q, k, v = draw(1, 1, 8, 4, seed=3)
    y = causal_attention(1e200 * q, k, v)
    assert y.isfinite().all()
    scores = (q @ k.mT).masked_fill(torch.ones(8, 8).triu(1) > 0, -math.inf)
    assert_near(y, v[0, 0, scores.argmax(-1)[0, 0]][None, None])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_every_dtype_stays_what_it_is(dtype, tolerance):
    q, k, v = draw(2, 2, 33, 8, seed=4, dtype=dtype)
    _, expected = oracle(*(x.double().numpy() for x in (q, k, v)))
    y = causal_attention(q, k, v)
    assert y.dtype == dtype
    assert_near(y, expected, tolerance)
    cache = KVCache(2, 2, 33, 8, dtype=dtype)
    assert_near(attention_step(q, k, v, cache), expected, tolerance)


def test_views_are_as_good_as_contiguous_inputs():
    q, k, v = draw(2, 3, 5, 4, seed=5)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_near(causal_attention(*strided), causal_attention(q, k, v))
    shared = causal_attention(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v))
    assert_near(shared[:, 2:], causal_attention(q[:, 2:], k[:, :1], v[:, :1]))


# --- gradients ---


@pytest.mark.parametrize("earlier", [0, 3])
def test_gradients(earlier):
    inputs = [x.requires_grad_() for x in draw(2, 2, 4, 3, seed=6, positions=4 + earlier)]
    assert torch.autograd.gradcheck(causal_attention, inputs)
    assert torch.autograd.gradcheck(attention_weights, inputs[:2])


def test_gradients_equal_pytorchs():
    inputs = [x.requires_grad_() for x in draw(2, 3, 40, 8, seed=7)]
    cotangent = draw(2, 3, 40, 8, seed=8)[0]
    got = torch.autograd.grad(causal_attention(*inputs), inputs, cotangent)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, cotangent)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b)


# --- the cache ---


@given(**shapes, spare=st.integers(0, 3), data=st.data())
@settings(deadline=None, max_examples=50)
def test_pieces_with_a_cache_equal_the_whole(batch, heads, length, d, seed, spare, data):
    q, k, v = draw(batch, heads, length, d, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
    cache = KVCache(batch, heads, length + spare, d, dtype=torch.float64)
    pieces = zip(*(x.tensor_split(cuts, dim=2) for x in (q, k, v)), strict=True)
    outputs = [attention_step(*piece, cache) for piece in pieces]
    assert_near(torch.cat(outputs, dim=2), oracle(q.numpy(), k.numpy(), v.numpy())[1])
    assert cache.length == length
    assert torch.equal(cache.keys, k)
    assert torch.equal(cache.values, v)


def test_one_token_at_a_time():
    q, k, v = draw(2, 2, 7, 3, seed=9)
    cache = KVCache(2, 2, 7, 3, dtype=torch.float64)
    expected = oracle(q.numpy(), k.numpy(), v.numpy())[1]
    for t in range(7):
        now = slice(t, t + 1)
        assert_near(attention_step(q[:, :, now], k[:, :, now], v[:, :, now], cache), expected[:, :, now])


def test_a_prompt_may_be_appended_without_being_asked():
    q, k, v = draw(1, 2, 6, 3, seed=10)
    cache = KVCache(1, 2, 6, 3, dtype=torch.float64)
    cache.append(k[:, :, :5], v[:, :, :5])
    y = attention_step(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], cache)
    assert_near(y, causal_attention(q, k, v)[:, :, 5:])


def test_the_cache_keeps_copies_and_no_graph():
    q, k, v = (x.requires_grad_() for x in draw(1, 1, 2, 3, seed=11))
    cache = KVCache(1, 1, 4, 3, dtype=torch.float64)
    y = attention_step(q, k, v, cache)
    assert not y.requires_grad
    assert not cache.keys.requires_grad
    kept = cache.keys.clone()
    with torch.no_grad():
        k += 1
    assert torch.equal(cache.keys, kept)


def test_a_refused_step_leaves_the_cache_as_it_was():
    q, k, v = draw(1, 2, 3, 4, seed=12)
    cache = KVCache(1, 2, 4, 4, dtype=torch.float64)
    attention_step(q, k, v, cache)
    for bad in ((q, k, v), (q[:, :, :1], k[:, :, :1], v[:, :, :2]), (q[:, :, :1, :2], k[:, :, :1], v[:, :, :1])):
        with pytest.raises(ValueError):
            attention_step(*bad, cache)
        assert cache.length == 3
    assert torch.equal(cache.keys, k)


# --- bytes ---


def test_cache_bytes_are_those_of_the_tensors():
    layers = [KVCache(1, 3, 50, 8, dtype=torch.float16) for _ in range(4)]
    for layer in layers:
        layer.append(*torch.zeros(2, 1, 3, 50, 8, dtype=torch.float16))
    held = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    assert attention.cache_bytes(context=50, layers=4, kv_heads=3, head_dim=8) == held == 19200
    assert attention.cache_bytes(50, 4, 3, 8, bytes_per_number=4) == 2 * held


def test_cache_bytes_of_published_shapes():
    assert attention.cache_bytes(1, 32, 32, 128) == 512 * 2**10
    assert attention.cache_bytes(1, 32, 8, 128) == 128 * 2**10
    assert attention.cache_bytes(1000, 12, 12, 64) == 1000 * 36 * 2**10


def test_state_bytes_are_those_of_the_tensors():
    state, inputs = torch.zeros(5, 6, 16), torch.zeros(5, 6, 3)  # three inputs back: a convolution of width 4
    held = sum(x.numel() * x.element_size() for x in (state, inputs))
    assert attention.state_bytes(layers=5, channels=6, states=16, conv_width=4) == held
    assert attention.state_bytes(64, 5120, 16, 4) == 64 * 5120 * 19 * 4
    assert attention.state_bytes(1, 1, 1, 1, bytes_per_number=2) == 2


def test_peak_bytes_counts_what_is_held_at_once():
    def two_then_one():
        a = torch.ones(1000)
        b = a + 1  # 8000 bytes
        del a
        return b * 2  # and again

    def within_an_operator():
        return torch.ones(2000, dtype=torch.float32).sort().values  # the indices are made, and dropped

    assert attention.peak_bytes(two_then_one) == pytest.approx(8000, abs=100)
    assert attention.peak_bytes(within_an_operator) >= 2000 * (4 + 4 + 8)
    assert attention.peak_bytes(lambda: None) == 0


def test_memory_of_attention_is_nine_bytes_a_pair():
    q, k, v = draw(1, 1, 512, 4, seed=13, dtype=torch.float32)
    assert attention.peak_bytes(lambda: causal_attention(q, k, v)) == pytest.approx(9 * 512**2, rel=0.02)


def test_peak_bytes_gives_standard_error_back(capfd):
    import os

    attention.peak_bytes(lambda: torch.ones(10))
    with pytest.raises(ZeroDivisionError):
        attention.peak_bytes(lambda: 1 / 0)
    capfd.readouterr()
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


# --- bad inputs ---


def good(**changes):
    q, k, v = draw(2, 3, 4, 5, seed=14)
    return {"q": q, "k": k, "v": v} | changes


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


BAD = [
    ({"q": [1.0]}, TypeError, r"^q: expected a torch\.Tensor, got list"),
    ({"q": zeros(3, 4, 5)}, ValueError, r"^q: expected shape \(Batch, Heads, L, d\), got \(3, 4, 5\)"),
    ({"q": zeros(2, 3, 0, 5)}, ValueError, "^q: expected L >= 1"),
    ({"q": zeros(2, 3, 4, 5).long()}, TypeError, "^q: expected a floating-point tensor, got torch.int64"),
    ({"q": zeros(2, 3, 4, 5).to(torch.complex128)}, TypeError, "^q: expected a real tensor"),
    ({"k": None}, TypeError, r"^k: expected a torch\.Tensor, got NoneType"),
    ({"k": zeros(2, 3, 4, 6)}, ValueError, r"^k: expected shape \(2, 3, S, 5\), got \(2, 3, 4, 6\)"),
    ({"k": zeros(2, 1, 4, 5)}, ValueError, r"^k: expected shape \(2, 3, S, 5\), got \(2, 1, 4, 5\)"),
    ({"k": zeros(2, 3, 3, 5)}, ValueError, "^k: expected at least the 4 positions of q, got 3"),
    ({"k": zeros(2, 3, 4, 5).float()}, TypeError, "^k: expected torch.float64 .q's., got torch.float32"),
    ({"k": zeros(2, 3, 4, 5).to("meta")}, ValueError, "^k: expected device cpu"),
    ({"v": zeros(2, 3, 5, 5)}, ValueError, r"^v: expected shape \(2, 3, 4, 5\), got \(2, 3, 5, 5\)"),
    ({"v": zeros(2, 3, 4, 5).half()}, TypeError, "^v: expected torch.float64 .k's., got torch.float16"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_the_bad_argument_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        causal_attention(**good(**changes))
    with pytest.raises(error, match=message):
        attention_step(**good(**changes), cache=KVCache(2, 3, 9, 5, dtype=torch.float64))
    if "v" not in changes:
        arguments = good(**changes)
        with pytest.raises(error, match=message):
            attention_weights(arguments["q"], arguments["k"])


def test_the_step_names_the_bad_argument():
    with pytest.raises(TypeError, match=r"^cache: expected a KVCache, got tuple"):
        attention_step(**good(), cache=())
    cache = KVCache(2, 3, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^q: expected shape \(2, 3, 4, 5\), got \(2, 3, 2, 5\)"):
        attention_step(**good(q=zeros(2, 3, 2, 5)), cache=cache)
    attention_step(**good(), cache=cache)
    with pytest.raises(ValueError, match=r"^k: expected at most 1 more positions, got 4"):
        attention_step(**good(), cache=cache)
    with pytest.raises(ValueError, match=r"^k: expected shape \(1, 3, L, 5\), got \(2, 3, 4, 5\)"):
        attention_step(**good(), cache=KVCache(1, 3, 9, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^k: expected torch.float32 .the cache's., got torch.float64"):
        attention_step(**good(), cache=KVCache(2, 3, 9, 5))
    with pytest.raises(ValueError, match=r"^v: expected shape \(2, 3, 1, 5\)"):
        cache.append(zeros(2, 3, 1, 5), zeros(2, 3, 2, 5))


def test_there_are_no_more_queries_than_positions():
    with pytest.raises(ValueError, match=r"^positions: expected at least length = 3, got 2"):
        attention.causal_mask(3, 2)


COUNTS = [
    (KVCache, {"batch": 1, "heads": 2, "capacity": 3, "head_dim": 4}),
    (attention.cache_bytes, {"context": 1, "layers": 2, "kv_heads": 3, "head_dim": 4, "bytes_per_number": 2}),
    (attention.state_bytes, {"layers": 1, "channels": 2, "states": 3, "conv_width": 4, "bytes_per_number": 4}),
    (attention.causal_mask, {"length": 1, "positions": 3}),
]


@pytest.mark.parametrize(("function", "arguments"), COUNTS)
def test_counts_are_positive_ints(function, arguments):
    for name in arguments:
        for bad in (0, -1):
            with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got {bad}"):
                function(**arguments | {name: bad})
        for bad in (2.0, True, None, "3"):
            with pytest.raises(TypeError, match=f"^{name}: expected an int, got {type(bad).__name__}"):
                function(**arguments | {name: bad})
