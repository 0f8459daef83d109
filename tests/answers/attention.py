"""Answers to the exercises of chapter 00."""

import math

import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()


# causal_attention


@answers.right("causal_attention")
def scores_then_softmax(Q, K, V):
    L, d = Q.shape
    scores = Q @ K.T / math.sqrt(d)
    hidden = torch.ones(L, L).tril() == 0
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ V


@answers.right("causal_attention")
def row_by_row(Q, K, V):
    rows = []
    for t in range(len(Q)):
        scores = K[: t + 1].mv(Q[t]) * Q.shape[1] ** -0.5
        weights = torch.exp(scores - scores.max())
        rows.append((weights[:, None] * V[: t + 1]).sum(0) / weights.sum())
    return torch.stack(rows)


@answers.right("causal_attention")
def by_pytorch(Q, K, V):
    return F.scaled_dot_product_attention(Q[None], K[None], V[None], is_causal=True)[0]


@answers.right("causal_attention")
def additive_mask_in_place_on_a_copy(Q, K, V):
    scores = torch.einsum("td,sd->ts", Q.double() / Q.shape[-1] ** 0.5, K.double()).clone()
    scores += torch.full_like(scores, -1e30).triu(1)
    scores -= scores.amax(1, keepdim=True)
    scores.exp_()
    scores /= scores.sum(1, keepdim=True)
    return (scores @ V.double()).to(V.dtype)


def with_mask(Q, K, V, diagonal, value=-math.inf):
    scores = Q.matmul(K.T).div(math.sqrt(Q.size(1)))
    scores[torch.ones_like(scores).triu(diagonal) > 0] = value
    return torch.softmax(scores, dim=1).matmul(V)


@answers.wrong("causal_attention", "the mask off by one: a token does not see itself")
def diagonal_hidden(Q, K, V):
    return with_mask(Q, K, V, 0)


@answers.wrong("causal_attention", "the mask off by one: a token does not see itself")
def diagonal_hidden_by_a_large_number(Q, K, V):
    return with_mask(Q, K, V, 0, value=-1e9)


@answers.wrong("causal_attention", "the mask off by one: a token sees the next one")
def next_token_shown(Q, K, V):
    return with_mask(Q, K, V, 2)


@answers.wrong("causal_attention", "no mask")
def everything_seen(Q, K, V):
    return F.scaled_dot_product_attention(Q[None], K[None], V[None])[0]


@answers.wrong("causal_attention", "softmax over the wrong axis")
def columns_sum_to_one(Q, K, V):
    scores = Q @ K.T / Q.shape[1] ** 0.5
    return torch.softmax(scores + torch.full_like(scores, -math.inf).triu(1), dim=0) @ V


@answers.wrong("causal_attention", "1/√d missing")
def not_scaled(Q, K, V):
    return with_mask(Q * math.sqrt(Q.shape[1]), K, V, 1)


@answers.wrong("causal_attention", "1/d in place of 1/√d")
def root_forgotten(Q, K, V):
    return F.scaled_dot_product_attention(Q[None], K[None], V[None], is_causal=True, scale=1 / Q.shape[1])[0]


@answers.wrong("causal_attention", "√L in place of √d")
def size_of_the_wrong_axis(Q, K, V):
    scores = Q @ K.T / math.sqrt(len(Q))
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf).softmax(-1) @ V


@answers.wrong("causal_attention", "a mask after the softmax")
def masked_too_late(Q, K, V):
    return (Q @ K.T / Q.shape[1] ** 0.5).softmax(-1).tril() @ V


@answers.wrong("causal_attention", "0 in place of −∞")
def multiplied_before(Q, K, V):
    return (Q @ K.T / Q.shape[1] ** 0.5).tril().softmax(-1) @ V


@answers.wrong("causal_attention", "the mask transposed")
def future_only(Q, K, V):
    scores = Q @ K.T / Q.shape[1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu() == 0, -math.inf).softmax(-1) @ V


@answers.wrong("causal_attention", "Q and K swapped")
def keys_ask(Q, K, V):
    scores = K @ Q.T / Q.shape[1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).tril() == 0, -math.inf).softmax(-1) @ V


@answers.wrong("causal_attention", "exponentials without the largest score subtracted")
def overflows(Q, K, V):
    weights = torch.exp(Q @ K.T / Q.shape[1] ** 0.5).tril()
    return weights @ V / weights.sum(1, keepdim=True)


@answers.wrong("causal_attention", "no softmax")
def linear(Q, K, V):
    return (Q @ K.T / Q.shape[1] ** 0.5).tril() @ V


@answers.wrong("causal_attention", "shape")
def the_weights(Q, K, V):
    scores = Q @ K.T / Q.shape[1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).tril() == 0, -math.inf).softmax(-1)


@answers.wrong("causal_attention", "NumPy")
def in_numpy(Q, K, V):
    return by_pytorch(Q, K, V).numpy()


@answers.wrong("causal_attention", "changes its input")
def scales_Q(Q, K, V):
    Q /= math.sqrt(Q.shape[1])
    return with_mask(Q * math.sqrt(Q.shape[1]), K, V, 1)


answers.equivalent("causal_attention", "-1 -> 1", "The last of two axes is axis 1.")


# per_token

answers.right("per_token")(327680)
answers.right("per_token")(320.0 * 2**10)
answers.right("per_token")(torch.tensor(327680))
answers.wrong("per_token", "keys or values alone")(163840)
answers.wrong("per_token", "all 64 heads of the queries")(2560 * 1024)
answers.wrong("per_token", "one layer")(4096)
answers.wrong("per_token", "four bytes a number, or queries kept too")(640 * 1024)
answers.wrong("per_token", "one head")(40960)
answers.wrong("per_token", "the width of the model for each head")(2 * 80 * 8 * 8192 * 2)
answers.wrong("per_token", "KiB")(320)
answers.wrong("per_token", None)(12345)
answers.wrong("per_token", "type")(torch.tensor([1, 2]))


# cached_step


@answers.right("cached_step")
def append_then_attend(q, k, v, past):
    keys, values = k, v
    if past is not None:
        keys, values = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    n, S = q.shape[2], keys.shape[2]
    scores = q @ keys.mT / math.sqrt(q.shape[3])
    hidden = torch.ones(n, S).tril(S - n) == 0
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values, (keys, values)


@answers.right("cached_step")
def one_query_at_a_time(q, k, v, past):
    keys, values = (k[:, :, :0], v[:, :, :0]) if past is None else past
    outputs = []
    for i in range(q.shape[2]):
        keys, values = (torch.cat([old, x[:, :, i : i + 1]], 2) for old, x in ((keys, k), (values, v)))
        outputs.append(F.scaled_dot_product_attention(q[:, :, i : i + 1], keys, values))
    return torch.cat(outputs, 2), [keys, values]


@answers.right("cached_step")
def pytorch_with_a_mask(q, k, v, past):
    new = [k, v] if past is None else [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)]
    mask = torch.ones(new[0].size(2), new[0].size(2), dtype=torch.bool).tril()[-q.size(2) :]
    return F.scaled_dot_product_attention(q, *new, attn_mask=mask), tuple(new)


@answers.wrong("cached_step", "a mask that counts from the first key")
def is_causal(q, k, v, past):
    new = [k, v] if past is None else [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)]
    return F.scaled_dot_product_attention(q, *new, is_causal=True), tuple(new)


@answers.wrong("cached_step", "no mask")
def right_for_one_token(q, k, v, past):
    new = [k, v] if past is None else [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)]
    return (q @ new[0].mT / q.shape[-1] ** 0.5).softmax(-1) @ new[1], tuple(new)


@answers.wrong("cached_step", "the past forgotten")
def no_memory(q, k, v, past):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), (k, v)


@answers.wrong("cached_step", "attention before the append")
def attend_then_append(q, k, v, past):
    keys, values = past if past is not None else (k[:, :, :0], v[:, :, :0])
    y = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1) @ values
    return y, (torch.cat([keys, k], 2), torch.cat([values, v], 2))


@answers.wrong("cached_step", "a past that is not extended")
def past_stays_short(q, k, v, past):
    y, (keys, values) = append_then_attend(q, k, v, past)
    return y, (keys, values) if past is None else past


@answers.wrong("cached_step", "the newest tokens in front")
def in_front(q, k, v, past):
    keys, values = (k, v) if past is None else (torch.cat([k, past[0]], 2), torch.cat([v, past[1]], 2))
    return append_then_attend(q, keys, values, None)[0], (keys, values)


@answers.wrong("cached_step", "1/√d missing")
def unscaled(q, k, v, past):
    y, past = append_then_attend(q * q.shape[-1] ** 0.5, k, v, past)
    return y, past


@answers.wrong("cached_step", "the mask off by one: a token does not see itself")
def not_itself(q, k, v, past):
    keys, values = append_then_attend(q, k, v, past)[1]
    positions = torch.arange(keys.shape[2])
    hidden = positions >= positions[-q.shape[2] :, None]
    scores = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ values, (keys, values)


@answers.wrong("cached_step", "softmax over the wrong axis")
def over_queries(q, k, v, past):
    keys, values = append_then_attend(q, k, v, past)[1]
    hidden = torch.ones(q.shape[2], keys.shape[2]).tril(keys.shape[2] - q.shape[2]) == 0
    scores = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)
    return scores.softmax(2) @ values, (keys, values)


@answers.wrong("cached_step", "raises")
def y_alone(q, k, v, past):
    return append_then_attend(q, k, v, past)[0]


@answers.wrong("cached_step", "raises")
def wrong_axis_of_cat(q, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    return append_then_attend(q, k, v, None)


kept = []


@answers.wrong("cached_step", "remembers")
def in_a_global_list(q, k, v, past):
    kept.append((k, v))
    keys, values = (torch.cat([pair[i] for pair in kept if pair[0].shape[:2] == k.shape[:2]][-3:], 2) for i in (0, 1))
    return append_then_attend(q, keys[..., : k.shape[3]], values[..., : k.shape[3]], None)[0], (keys, values)


# absorb_block


@answers.right("absorb_block")
def running(m, total, y, scores, V):
    new = torch.maximum(m, scores.amax(-1, keepdim=True))
    shrink = torch.exp(m - new)
    weights = torch.exp(scores - new)
    return new, shrink * total + weights.sum(-1, keepdim=True), shrink * y + weights @ V


@answers.right("absorb_block")
def key_by_key(m, total, y, scores, V):
    for s in range(len(V)):
        x = scores[:, s : s + 1]
        new = torch.where(x > m, x, m)
        total = total * (m - new).exp() + (x - new).exp()
        y = y * (m - new).exp() + (x - new).exp() * V[s]
        m = new
    return [m, total, y]


@answers.right("absorb_block")
def logarithm_of_the_sum(m, total, y, scores, V):
    # m is the logarithm of the sum so far, so that total stays 1 and y is the mean.
    whole = torch.logaddexp(m, scores.logsumexp(-1, keepdim=True))
    return whole, torch.ones_like(total), torch.exp(m - whole) * y + torch.exp(scores - whole) @ V


@answers.right("absorb_block")
def as_one_more_column(m, total, y, scores, V):
    new = torch.cat([m, scores], dim=1).max(dim=1, keepdim=True).values
    rows = []
    for t in range(len(scores)):
        w = torch.exp(scores[t] - new[t])
        old = torch.exp(m[t] - new[t])
        rows.append((old * total[t] + w.sum(), old * y[t] + w @ V))
    return new, torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


@answers.wrong("absorb_block", "earlier sums that are not rescaled")
def never_rescaled(m, total, y, scores, V):
    new = torch.maximum(m, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores - new)
    return new, total + weights.sum(-1, keepdim=True), y + weights @ V


@answers.wrong("absorb_block", "total not rescaled")
def total_forgotten(m, total, y, scores, V):
    new, _, y = running(m, total, y, scores, V)
    return new, total + (scores - new).exp().sum(-1, keepdim=True), y


@answers.wrong("absorb_block", "y not rescaled")
def y_forgotten(m, total, y, scores, V):
    new, total, _ = running(m, total, y, scores, V)
    return new, total, y + (scores - new).exp() @ V


@answers.wrong("absorb_block", "the earlier blocks forgotten")
def m_not_handed_on(m, total, y, scores, V):
    _, total, y = running(m, total, y, scores, V)
    return m, total, y


@answers.wrong("absorb_block", "no largest score subtracted")
def plain_exponentials(m, total, y, scores, V):
    weights = torch.exp(scores)
    total = total + weights.sum(dim=1, keepdim=True)
    return torch.zeros_like(m), total, y + torch.einsum("ts,sd->td", weights, V)


@answers.wrong("absorb_block", "each block's own largest score")
def largest_of_each(m, total, y, scores, V):
    own = scores.max(dim=1, keepdim=True).values
    weights = (scores - own).exp()
    return torch.maximum(m, own), total + weights.sum(1, keepdim=True), y + weights @ V


@answers.wrong("absorb_block", "y divided by total in each block")
def divided_at_once(m, total, y, scores, V):
    m, total, y = key_by_key(m, total, y, scores, V)
    return m, total, y.div(total)


@answers.wrong("absorb_block", "the mean of the blocks")
def averaged(m, total, y, scores, V):
    return m, total + torch.ones_like(total), y + torch.softmax(scores, dim=1) @ V


@answers.wrong("absorb_block", "sums rescaled by e^{m′−m}")
def other_direction(m, total, y, scores, V):
    new = torch.maximum(m, scores.amax(-1, keepdim=True))
    grow, weights = torch.exp(new - m), torch.exp(scores - new)
    return new, grow * total + weights.sum(-1, keepdim=True), grow * y + weights @ V


@answers.wrong("absorb_block", "the block's largest score as m′")
def largest_of_the_block(m, total, y, scores, V):
    new = scores.amax(-1, keepdim=True)
    shrink, weights = (m - new).exp(), (scores - new).exp()
    return new, shrink * total + weights.sum(-1, keepdim=True), shrink * y + weights @ V


@answers.wrong("absorb_block", "raises")
def two_results(m, total, y, scores, V):
    return running(m, total, y, scores, V)[1:]


@answers.wrong("absorb_block", None)
def one_largest_for_all_queries(m, total, y, scores, V):
    new = torch.maximum(m, scores.max())
    shrink, weights = torch.exp(m - new), torch.exp(scores - new)
    return new, shrink * total + weights.sum(), shrink * y + weights @ V


answers.equivalent(
    "absorb_block",
    "torch.maximum(m, scores.amax(-1, keepdim=True)) -> torch.maximum(scores.amax(-1, keepdim=True), m)",
    "The larger of two has no order.",
)
answers.equivalent("absorb_block", "-1 -> 1", "The last of two axes is axis 1.")
answers.equivalent("absorb_block", "-1 -> 1, place 2", "The last of two axes is axis 1.")
