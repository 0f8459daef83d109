"""Checks of chapter 00: causal attention, bytes of a cache, a step with a cache, a running softmax."""

import torch

from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers

DOUBLE, SINGLE = torch.float64, torch.float32


def normal(*shape, seed, dtype=DOUBLE):
    """Standard normal numbers that are the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def softmax(scores, visible, axis=-1):
    return scores.masked_fill(~visible, -torch.inf).softmax(axis)


def attend(q, k, v, scale=lambda d, L: d**0.5, shift=0, first=False, weights=softmax):
    """softmax(Q Kᵀ / √d) V for the last L of S positions. The options are what can go wrong."""
    L, S, d = q.shape[-2], k.shape[-2], q.shape[-1]
    visible = torch.ones(L, S, dtype=torch.bool).tril(shift + (0 if first else S - L))
    return weights(q @ k.mT / scale(d, L), visible) @ v


def but(**options):
    return lambda q, k, v: attend(q, k, v, **options)


def matrices():
    Q = torch.tensor([[1, 0, 2, 0], [0, 2, 0, 2]], dtype=DOUBLE)
    K = torch.tensor([[0, 1, 1, 0], [2, 0, 0, 2]], dtype=DOUBLE)
    yield Case("two tokens", Q=Q, K=K, V=torch.tensor([[1, 2, 3, 4], [5, 7, 9, 11]], dtype=DOUBLE))
    Q, K, V = (torch.tensor(x).view(2, 1) for x in ([30.0, 20.0], [10.0, 9.9], [1.0, 5.0]))
    yield Case("large scores", Q=Q, K=K, V=V)
    yield Case("one token", **{name: normal(1, 3, seed=i) for i, name in enumerate("QKV")})
    for seed, (length, d, dtype) in enumerate([(3, 5, DOUBLE), (4, 2, SINGLE), (5, 8, DOUBLE), (7, 3, DOUBLE)]):
        Q, K, V = (normal(length, d, seed=9 * seed + i, dtype=dtype) for i in range(3))
        yield Case(f"{length} tokens", Q=Q, K=K, V=V)


def _masked_later(scores, visible):
    return scores.softmax(-1) * visible


def _filled(value):
    return lambda scores, visible: scores.masked_fill(~visible, value).softmax(-1)


def _divided(scores, visible):
    weights = scores.exp() * visible
    return weights / weights.sum(-1, keepdim=True)


BEFORE = "Hidden scores become −∞ before the softmax, so that a row's weights sum to 1 without them."
ROWS = "Each query, a row, shares out a weight of 1: softmax(dim=-1)."
ITSELF = "A token sees itself and what came before: torch.ones(L, L).tril() marks that."
SCALE = "Without it the scores grow with d, and softmax is too sure."
BIG = "The exponential of a large score overflows. torch.softmax subtracts the largest score first."
COMMON = (
    Mistake("the mask off by one: a token does not see itself", but(shift=-1), ITSELF),
    Mistake("the mask off by one: a token sees the next one", but(shift=1), ITSELF),
    Mistake("no mask", but(shift=10**6), "The future must be hidden: the model is to predict it."),
    Mistake("softmax over the wrong axis", but(weights=lambda s, see: softmax(s, see, -2)), ROWS),
    Mistake("1/√d missing", but(scale=lambda d, L: 1), SCALE),
    Mistake("1/d in place of 1/√d", but(scale=lambda d, L: d), "q·k has the typical size √d."),
)
causal_attention = Exercise(
    name="causal_attention",
    asks="causal_attention(Q, K, V) -> Y (L, d), from single matrices (L, d)",
    formula="Asked is softmax(Q Kᵀ / √d) V along each row, where token t sees the tokens 0 ... t.",
    see="00 §2",
    reference=attend,
    inputs=matrices,
    results=("Y",),
    sizes={"L": ("Q", 0), "d": ("Q", 1)},
    mistakes=(
        *COMMON,
        Mistake(COMMON[0].name, but(shift=-1, weights=_filled(-1e9)), ITSELF),
        Mistake("the mask transposed", but(weights=lambda s, see: softmax(s, see.mT)), "Hide s > t in row t."),
        Mistake("softmax over the wrong axis", but(weights=lambda s, see: softmax(s, see | True, -2) * see), ROWS),
        Mistake("a mask after the softmax", but(weights=_masked_later), BEFORE),
        Mistake("0 in place of −∞", but(weights=_filled(0)), "e^0 = 1: a hidden token would still have weight."),
        Mistake("√L in place of √d", but(scale=lambda d, L: L**0.5), "d numbers are summed in q·k."),
        Mistake("Q and K swapped", lambda Q, K, V: attend(K, Q, V), "Rows belong to queries: Q @ K.T."),
        Mistake("weights that are not divided by their sum", but(weights=lambda s, see: s.exp() * see), ROWS),
        Mistake("no softmax", but(weights=lambda s, see: s * see), "That is linear attention."),
        Mistake("the weights transposed", but(weights=lambda s, see: softmax(s, see).mT)),
        Mistake("exponentials without the largest score subtracted", but(weights=_divided), BIG),
    ),
    hints=(
        "First the scores (L, L), one row for each query. Which entries of row t lie in the future?",
        "Put −∞ where s > t, then take the softmax of each row: e^−∞ is 0, and the rest still sums to 1.",
        "S = Q @ K.T / √d; S = S.masked_fill(torch.ones(L, L).tril() == 0, -torch.inf); return S.softmax(-1) @ V.",
    ),
)


TOKEN = 2 * 80 * 8 * (8192 // 64) * 2
per_token = Exercise(
    name="per_token",
    asks="the bytes that one token takes in the KV cache of the model above",
    formula="Asked is key and value, times layers, times heads that have them, times numbers a head, times bytes.",
    see="00 §6",
    reference=TOKEN,
    inputs=None,
    kind="value",
    results=("per_token",),
    mistakes=(
        Mistake("keys or values alone", TOKEN // 2, "Both are kept. (Or half precision was taken for one byte.)"),
        Mistake("all 64 heads of the queries", TOKEN * 8, "8 queries share a key and a value, and are not kept."),
        Mistake("one layer", TOKEN // 80, "Each layer has a cache of its own."),
        Mistake("four bytes a number, or queries kept too", TOKEN * 2, "Half precision has two bytes."),
        Mistake("one head", TOKEN // 8, "8 heads have keys and values."),
        Mistake("the width of the model for each head", TOKEN * 64, "All 64 query heads together are 8192 wide."),
        Mistake("KiB", TOKEN // 1024, "Bytes are asked."),
    ),
    hints=(
        "What is kept for a token: which vectors, in how many heads of how many layers?",
        "A head has 8192 / 64 = 128 numbers, and 8 heads have keys and values.",
        "2 (key and value) · 80 layers · 8 heads · 128 numbers · 2 bytes.",
    ),
)


def step(q, k, v, past, attend=attend, order=1):
    """Append k and v to the past, and attend to all."""
    pairs = [] if past is None else zip(past, (k, v), strict=True)
    keys, values = (torch.cat(pair[::order], 2) for pair in pairs) if past else (k, v)
    return attend(q, keys, values), (keys, values)


def in_pieces(answer, q, k, v, pieces):
    """Feed the sequence in pieces of these lengths: all outputs, and the keys and values at the end."""
    past, outputs = None, []
    for part in zip(*(x.split(pieces, 2) for x in (q, k, v)), strict=True):
        result = answer(*part, past)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError("expected two results, y and (keys, values)")
        y, past = result
        outputs.append(y)
    if not isinstance(past, tuple | list) or len(past) != 2:
        raise TypeError("expected the past to be (keys, values)")
    return torch.cat(outputs, 2), *past


def streams():
    q, k, v = (torch.tensor(x, dtype=DOUBLE).view(1, 1, 2, 1) for x in ([1, 2], [3, 1], [10, 20]))
    yield Case("two tokens, one by one", q=q, k=k, v=v, pieces=[1, 1])
    yield Case("two tokens in one piece", q=q, k=k, v=v, pieces=[2])
    options = (
        (1, 2, 5, [1] * 4, DOUBLE),
        (2, 1, 3, [3, 1], DOUBLE),
        (2, 3, 4, [1, 3, 2], SINGLE),
        (1, 2, 3, [4, 2], DOUBLE),
    )
    for seed, (batch, heads, d, pieces, dtype) in enumerate(options):
        shape = batch, heads, sum(pieces), d
        q, k, v = (normal(*shape, seed=100 + 9 * seed + i, dtype=dtype) for i in range(3))
        yield Case(f"pieces of {', '.join(map(str, pieces))} tokens", q=q, k=k, v=v, pieces=pieces)


def _steps(**options):
    return lambda q, k, v, past: step(q, k, v, past, attend=but(**options))


def _attend_first(q, k, v, past):
    old = (k[:, :, :0], v[:, :, :0]) if past is None else past
    return attend(q, *old, shift=q.shape[2]), step(q, k, v, past)[1]


cached_step = Exercise(
    name="cached_step",
    asks="cached_step(q, k, v, past) -> y, (keys, values), for the next n tokens (B, H, n, d), past None at first",
    formula="Asked is to append k and v to the past, and then attend: each new token sees all before it, and itself.",
    see="00 §3",
    reference=step,
    inputs=streams,
    run=in_pieces,
    results=("y", "keys", "values"),
    mistakes=(
        Mistake("a mask that counts from the first key", _steps(first=True), "The queries belong to the last keys."),
        Mistake("no mask", _steps(shift=10**6), "Of several new tokens none may see the next."),
        Mistake("attention before the append", _attend_first, "A token sees itself too."),
        Mistake("the mask off by one: a token does not see itself", _steps(shift=-1), ITSELF),
        Mistake("the past forgotten", lambda q, k, v, past: step(q, k, v, None), "Old keys stay needed."),
        Mistake("a past that is not extended", lambda q, k, v, past: (step(q, k, v, past)[0], past or (k, v))),
        Mistake("the newest tokens in front", lambda *x: step(*x, order=-1), "Old ones come first."),
        Mistake("1/√d missing", _steps(scale=lambda d, L: 1), SCALE),
        Mistake("softmax over the wrong axis", _steps(weights=lambda s, see: softmax(s, see, -2)), ROWS),
        Mistake("keys and values exchanged in the past", lambda *x: (step(*x)[0], step(*x)[1][::-1])),
    ),
    hints=(
        "Two things in this order: make the cache longer, then attend to all of it.",
        "keys = torch.cat([old keys, k], dim=2), values too. New token i may see the first S − n + i + 1 of S keys.",
        "After the append: scores = q @ keys.mT / √d; hidden = torch.ones(n, S).tril(S - n) == 0; softmax as before.",
    ),
)


def absorb(m, total, y, scores, V, rescale=lambda old: (old, old), largest=torch.maximum):
    """Take in a block of scores (L, n) and values (n, d). The options are what can go wrong."""
    larger = largest(m, scores.amax(-1, keepdim=True))
    (of_total, of_y), new = rescale(torch.exp(m - larger)), torch.exp(scores - larger)
    return larger, of_total * total + new.sum(-1, keepdim=True), of_y * y + new @ V


def in_blocks(answer, scores, V, block):
    """Give the answer one block after the other, and divide at the end."""
    total, y = scores.new_zeros(len(scores), 1), scores.new_zeros(len(scores), V.shape[1])
    m = total - torch.inf
    for part in zip(scores.split(block, 1), V.split(block), strict=True):
        result = answer(m, total, y, *part)
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise TypeError("expected three results: m, total, y")
        m, total, y = result
    return y / total


def score_rows():
    scores, V = torch.tensor([[1.0, 3.0]], dtype=DOUBLE), torch.tensor([[10.0], [20.0]], dtype=DOUBLE)
    yield Case("one query, two blocks of one key", scores=scores, V=V, block=1)
    yield Case("large scores", scores=torch.tensor([[100.0, 101.0]]), V=V.to(SINGLE), block=1)
    hidden = torch.tensor([[1, -torch.inf], [2, 3]], dtype=DOUBLE)
    yield Case("two queries: the second key is hidden from the first", scores=hidden, V=V, block=1)
    options = (1, 3, 2, 2, DOUBLE), (3, 7, 2, 3, DOUBLE), (2, 6, 4, 4, SINGLE), (4, 8, 3, 2, DOUBLE)
    for seed, (queries, keys, d, block, dtype) in enumerate(options):
        scores, V = normal(queries, keys, seed=seed + 300, dtype=dtype), normal(keys, d, seed=seed + 400, dtype=dtype)
        yield Case(f"{queries} queries, {keys} keys", scores=scores, V=V, block=block)
    future = torch.full((7, 7), -torch.inf, dtype=DOUBLE).triu(1)
    yield Case("causal: whole blocks are hidden", scores=normal(7, 7, seed=310) + future, V=V[:7], block=2)


def _absorb(**options):
    return lambda *x: absorb(*x, **options)


def _plain(m, total, y, scores, V):
    weights = scores.exp()
    return m, total + weights.sum(-1, keepdim=True), y + weights @ V


def _own_largest(m, total, y, scores, V):
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return m, total + weights.sum(-1, keepdim=True), y + weights @ V


def _divided_each_time(m, total, y, scores, V):
    m, total, y = absorb(m, total, y, scores, V)
    return m, total, y / total


def _mean_of_blocks(m, total, y, scores, V):
    return m, total + 1, y + scores.softmax(-1) @ V


REFERENCE = "All sums refer to one m. When m grows to m′, the earlier ones shrink by e^{m−m′}."
absorb_block = Exercise(
    name="absorb_block",
    asks="absorb_block(m, total, y, scores, V) -> new m (L, 1), total (L, 1), y (L, d) after one more block of keys",
    formula="Asked is m′ = max(m, largest x), total′ = e^{m−m′} total + Σ e^{x−m′}, y′ = e^{m−m′} y + Σ e^{x−m′} v.",
    see="00, exercise 5",
    reference=absorb,
    inputs=score_rows,
    run=in_blocks,
    results=("y / total after the last block",),
    mistakes=(
        Mistake("earlier sums that are not rescaled", _absorb(rescale=lambda old: (1, 1)), REFERENCE),
        Mistake("total not rescaled", _absorb(rescale=lambda old: (1, old)), REFERENCE),
        Mistake("y not rescaled", _absorb(rescale=lambda old: (old, 1)), REFERENCE),
        Mistake("sums rescaled by e^{m′−m}", _absorb(rescale=lambda old: (1 / old, 1 / old)), REFERENCE),
        Mistake("the earlier blocks forgotten", _absorb(rescale=lambda old: (0, 0)), "Hand on m′, too."),
        Mistake("each block's own largest score", _own_largest, REFERENCE),
        Mistake("the block's largest score as m′", _absorb(largest=lambda m, x: x), "It is −∞ where all is hidden."),
        Mistake("no largest score subtracted", _plain, BIG),
        Mistake("y divided by total in each block", _divided_each_time, "Divide once, at the end: the check does it."),
        Mistake("the mean of the blocks", _mean_of_blocks, "A block with larger scores has more weight."),
        Mistake("the smallest score as m′", _absorb(largest=lambda m, x: torch.minimum(m, x))),
    ),
    hints=(
        "Say m is the largest score so far, and total = Σ e^{x−m}. What is that sum if a larger m′ takes m's place?",
        "e^{x−m′} = e^{x−m} e^{m−m′}: one factor for all earlier terms. At the start m = −∞, and that factor is 0.",
        "new = torch.maximum(m, scores.amax(-1, keepdim=True)); f = exp(m − new); w = exp(scores − new); return "
        "new, f·total + w.sum(-1, keepdim=True), f·y + w @ V.",
    ),
)

hint, picture = helpers(causal_attention, per_token, cached_step, absorb_block)
