"""Answers to the exercises of chapter 13."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()


# loss


@answers.right("loss")
def by_log_softmax(logits, tokens):
    log_p = torch.log_softmax(logits, dim=-1)[:, :-1]
    target = tokens[:, 1:]
    chosen = log_p.gather(-1, target[..., None])
    return -chosen.mean() / math.log(2)


@answers.right("loss")
def by_cross_entropy(logits, tokens):
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:]) / math.log(2)


@answers.right("loss")
def one_by_one(logits, tokens):
    batch, length, _ = logits.shape
    total = 0
    for b in range(batch):
        for t in range(length - 1):
            p = logits[b, t].exp() / logits[b, t].exp().sum()
            total = total - torch.log2(p[tokens[b, t + 1]])
    return total / (batch * (length - 1))


@answers.right("loss")
def with_one_hot(logits, tokens):
    p = (F.one_hot(tokens, logits.shape[-1])[:, 1:] * logits.double().softmax(-1)[:, :-1]).sum(-1)
    return -torch.log2(p).mean().to(logits.dtype)


def entropy(logits, tokens, **options):
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), **options) / math.log(2)


@answers.wrong("loss", "a target off by one: the token just read")
def no_shift(logits, tokens):
    return entropy(logits, tokens)


@answers.wrong("loss", "a target off by one: the token just read")
def both_cut_at_the_end(logits, tokens):
    return entropy(logits[:, :-1], tokens[:, :-1])


@answers.wrong("loss", "the logits and not the tokens shifted")
def other_way(logits, tokens):
    return entropy(logits[:, 1:], tokens[:, :-1])


@answers.wrong("loss", "the first token as the target of the last")
def rolled(logits, tokens):
    return entropy(logits, torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1))


@answers.wrong("loss", "nats in place of bits")
def nats(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@answers.wrong("loss", "the sum in place of the mean")
def summed_up(logits, tokens):
    return entropy(logits[:, :-1], tokens[:, 1:], reduction="sum")


@answers.wrong("loss", "two softmax")
def softmax_before(logits, tokens):
    return entropy(logits.softmax(dim=-1)[:, :-1], tokens[:, 1:])


@answers.wrong("loss", "axes reshaped, not moved")
def viewed(logits, tokens):
    batch, length, size = logits.shape
    return F.cross_entropy(logits[:, :-1].reshape(batch, size, length - 1), tokens[:, 1:]) / math.log(2)


@answers.wrong("loss", "a softmax over time")
def wrong_axis(logits, tokens):
    return -(logits.log_softmax(dim=1)[:, :-1].gather(2, tokens[:, 1:, None])).mean() / math.log(2)


@answers.wrong("loss", "sign")
def probable_is_bad(logits, tokens):
    return -by_cross_entropy(logits, tokens)


@answers.wrong("loss", "shape")
def for_each_token(logits, tokens):
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none") / math.log(2)


@answers.wrong("loss", None)
def perplexity(logits, tokens):
    return nats(logits, tokens).exp()


# distribution


@answers.right("distribution")
def on_probabilities(logits, temperature, k, p):
    probabilities, places = (logits / temperature).softmax(dim=-1).sort(descending=True)
    probabilities[k:] = 0
    probabilities = probabilities / probabilities.sum()
    before = probabilities.cumsum(0) - probabilities
    if p < 1:
        probabilities = torch.where(before < p, probabilities, 0)
    return torch.zeros_like(probabilities).scatter(0, places, probabilities / probabilities.sum())


@answers.right("distribution")
def with_python(logits, temperature, k, p):
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits.double().tolist())}
    kept = dict(sorted(weights.items(), key=lambda pair: -pair[1])[:k])
    share, result, total = 0.0, torch.zeros_like(logits), sum(kept.values())
    for i, weight in kept.items():
        if share >= p:
            break
        result[i] = weight / total
        share += weight / total
    return result / result.sum()


@answers.right("distribution")
def on_logits(logits, temperature, k, p):
    x = logits / temperature
    if k < len(x):
        x = torch.where(x < x.topk(k).values[-1], -math.inf, x)
    order = x.argsort(descending=True)
    sums = x[order].softmax(0).cumsum(0)
    remove = (sums > p) & (torch.arange(len(x)) > 0)
    remove = torch.cat([torch.tensor([False]), sums[:-1] > p])
    return x.masked_fill(remove[order.argsort()], -math.inf).softmax(0)


@answers.right("distribution")
def pairs_compared(logits, temperature, k, p):
    q = (logits / temperature).softmax(0)
    q = torch.where((q[:, None] < q).sum(1) < k, q, 0)
    q = q / q.sum()
    before = torch.where(q[:, None] < q, q, 0).sum(1)
    q = torch.where(before < p, q, 0)
    return q / q.sum()


def drawn(logits, T, k, p, keep):
    q, places = (logits / T).softmax(-1).sort(descending=True)
    q[k:] = 0
    q = q / q.sum()
    q = torch.where(keep(q.cumsum(0), p), q, 0)
    result = torch.empty_like(q)
    result[places] = q / q.sum()
    return result


for place in ("p < 1 -> p <= 1", "1 -> 2"):
    answers.equivalent("distribution", place, "With p = 1 the rule keeps every token anyway.")
for place in ("0 -> -1, place 2", "0 -> -1, place 3", "1 -> 0, place 2"):
    answers.equivalent("distribution", place, "A vector has one axis, the first and the last.")
reason = "They differ only where a sum equals p in its last digit."
answers.equivalent("distribution", "before < p -> before <= p", reason)


@answers.wrong("distribution", "the token that reaches p left out")
def sums_up_to_p(logits, T, k, p):
    return drawn(logits, T, k, p, lambda sums, p: sums <= p + 1e-9 if p == 1 else sums <= p)


@answers.wrong("distribution", "the token that reaches p left out")
def but_at_least_one(logits, T, k, p):
    first = torch.arange(len(logits)) == 0
    return drawn(logits, T, k, p, lambda sums, p: (sums < p) | first | (p == 1))


@answers.wrong("distribution", "one token too many in top-p")
def shifted_twice(logits, T, k, p):
    return drawn(logits, T, k, p, lambda sums, p: F.pad(sums[:-2], (2, 0)) < p)


@answers.wrong("distribution", "top-p of the sums before top-k")
def normalised_once(logits, T, k, p):
    q, places = (logits / T).softmax(-1).sort(descending=True)
    q[k:] = 0
    q = torch.where((q.cumsum(0) - q < p) | (p == 1), q, 0)
    return torch.zeros_like(q).scatter(0, places, q / q.sum())


@answers.wrong("distribution", "no normalisation at the end")
def does_not_sum_to_one(logits, T, k, p):
    q, places = (logits / T).softmax(-1).sort(descending=True)
    q[k:] = 0
    q = q / q.sum()
    q = torch.where((q.cumsum(0) - q < p) | (p == 1), q, 0)
    return torch.zeros_like(q).scatter(0, places, q)


@answers.wrong("distribution", "top-p of the sums before top-k")
def other_order(logits, T, k, p):
    q = on_probabilities(logits, T, len(logits), p)
    q = torch.where(q >= q.topk(min(k, len(q))).values[-1], q, 0)
    return q / q.sum()


@answers.wrong("distribution", "logits times T")
def multiplied(logits, T, k, p):
    return with_python(logits * T * T, T, k, p)


@answers.wrong("distribution", "the temperature left out")
def divides_probabilities(logits, T, k, p):
    q = logits.softmax(0) / T
    return on_probabilities(q.log(), 1, k, p)


@answers.wrong("distribution", "the temperature at the end")
def temperature_last(logits, T, k, p):
    q = on_probabilities(logits, 1.0, k, p) ** (1 / T)
    return q / q.sum()


@answers.wrong("distribution", "probabilities in sorted order")
def not_put_back(logits, T, k, p):
    return on_probabilities(logits, T, k, p).sort(descending=True).values


@answers.wrong("distribution", "`places` used as its own inverse")
def indexed(logits, T, k, p):
    q, places = on_probabilities(logits, T, k, p).sort(descending=True)
    return q[(logits).argsort(descending=True)] if len(places) else q


@answers.wrong("distribution", "one token too many in top-k")
def k_plus_one(logits, T, k, p):
    x = logits / T
    least = x.sort(descending=True).values[min(k, len(x) - 1)]
    return on_probabilities(torch.where(x >= least, x, -math.inf), 1, len(x), p)


@answers.wrong("distribution", "raises")
def topk_of_a_small_vocabulary(logits, T, k, p):
    least = logits.topk(k).values[-1]
    return on_probabilities(logits.masked_fill(logits < least, -math.inf), T, k, p)


@answers.wrong("distribution", "NumPy")
def with_numpy(logits, T, k, p):
    return np.asarray(on_probabilities(logits, T, k, p))


# stream


@answers.right("stream")
def widened(x, layers):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    for layer in layers:
        h = h + layer(h)
    return h


@answers.right("stream")
def kept_apart(x, layers):
    h = x.double()
    for layer in layers:
        h = h + layer(h.to(torch.promote_types(x.dtype, torch.float32))).double()
    return h if x.dtype == torch.float64 else h.float()


@answers.right("stream")
def in_place_on_a_copy(x, layers):
    h = x.clone() if x.dtype == torch.float64 else x.float().clone()
    for layer in layers:
        h += layer(h)
    return h


reason = "The wider of two dtypes does not depend on their order."
swapped = "torch.promote_types(x.dtype, torch.float32) -> torch.promote_types(torch.float32, x.dtype)"
answers.equivalent("stream", swapped, reason)


@answers.wrong("stream", "the residual stream in half precision")
def as_it_comes(x, layers):
    for layer in layers:
        x = x + layer(x)
    return x


@answers.wrong("stream", "the residual stream in half precision")
def widened_too_late(x, layers):
    for layer in layers:
        x = x + layer(x)
    return x if x.dtype == torch.float64 else x.float()


@answers.wrong("stream", "half precision at the end")
def cast_back(x, layers):
    return widened(x, layers).to(x.dtype)


@answers.wrong("stream", "float64 made float32")
def always_float(x, layers):
    h = x.float()
    for layer in layers:
        h = layer(h) + h
    return h


@answers.wrong("stream", "float64 for all")
def always_double(x, layers):
    h = x.double()
    for layer in layers:
        h = h + layer(h)
    return h


@answers.wrong("stream", "the layers without the sum")
def chained(x, layers):
    h = widened(x, [])
    for layer in layers:
        h = layer(h).to(h.dtype)
    return h


@answers.wrong("stream", "each layer reading x")
def in_parallel(x, layers):
    h = widened(x, [])
    for layer in layers:
        h = h + layer(x)
    return h


@answers.wrong("stream", "the last layer left out")
def one_too_few(x, layers):
    h = widened(x, [])
    for i in range(len(layers) - 1):
        h = h + layers[i](h)
    return h


@answers.wrong("stream", "count")
def all_states(x, layers):
    h = [widened(x, [])]
    for layer in layers:
        h.append(h[-1] + layer(h[-1]))
    return h


# continuations


@answers.right("continuations")
def in_pieces(model, prompt, firsts, count, piece):
    cache = model.allocate_cache(1)
    for start in range(0, len(prompt), piece):
        model(torch.tensor([prompt[start : start + piece]]), cache)
    rows = []
    for token in firsts:
        own, row = copy.deepcopy(cache), []
        while len(row) < count:
            logits = model(torch.tensor([[token]]), own)
            token = logits.argmax().item()
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@answers.right("continuations")
def side_by_side(model, prompt, firsts, count, piece):
    cache = model.allocate_cache(1)
    for part in torch.tensor([prompt]).split(piece, dim=1):
        model(part, cache)
    caches = [[type(c)(*(s.clone() for s in c)) for c in cache] for _ in firsts]
    tokens, columns = torch.tensor(firsts), []
    for _ in range(count):
        logits = [model(token.view(1, 1), own) for token, own in zip(tokens, caches, strict=True)]
        tokens = torch.stack([x[0, -1].argmax() for x in logits])
        columns.append(tokens)
    return torch.stack(columns, dim=1)


@answers.right("continuations")
def token_by_token_and_one_more(model, prompt, firsts, count, piece):
    memory = model.allocate_cache(1)
    for token in prompt:
        model(torch.tensor([[token]]), memory)
    saved, rows = [[x.clone() for x in layer] for layer in memory], []
    for first in firsts:
        for layer, kept in zip(memory, saved, strict=True):
            for x, y in zip(layer, kept, strict=True):
                x.copy_(y)
        logits, row = model(torch.tensor([[first]]), memory, last_only=True), []
        for _ in range(count):
            row.append(int(logits.argmax()))
            logits = model(torch.tensor([row[-1:]]), memory)
        rows.append(row)
    return torch.tensor(rows)


@answers.wrong("continuations", "one state for all continuations")
def not_copied(model, prompt, firsts, count, piece):
    cache, rows = model.allocate_cache(1), []
    for part in torch.tensor([prompt]).split(piece, dim=1):
        model(part, cache)
    for token in firsts:
        row = []
        for _ in range(count):
            token = model(torch.tensor([[token]]), cache).argmax().item()
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@answers.wrong("continuations", "one state for all continuations")
def list_copied_but_not_the_tensors(model, prompt, firsts, count, piece):
    cache, rows = model.allocate_cache(1), []
    for part in torch.tensor([prompt]).split(piece, dim=1):
        model(part, cache)
    for token in firsts:
        own, row = list(cache), []
        for _ in range(count):
            token = model(torch.tensor([[token]]), own).argmax().item()
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@answers.wrong("continuations", "the whole text read again for each token")
def like_a_transformer_without_cache(model, prompt, firsts, count, piece):
    rows = []
    for first in firsts:
        text = prompt + [first]
        for _ in range(count):
            text = text + [int(model(torch.tensor([text]))[0, -1].argmax())]
        rows.append(text[-count:])
    return torch.tensor(rows)


@answers.wrong("continuations", "the prompt read again for each continuation")
def read_afresh(model, prompt, firsts, count, piece):
    return torch.cat([in_pieces(model, prompt, [first], count, piece) for first in firsts])


@answers.wrong("continuations", "the prompt read in one go")
def whole_prompt(model, prompt, firsts, count, piece):
    return in_pieces(model, prompt, firsts, count, len(prompt))


@answers.wrong("continuations", "the last token of the prompt read twice")
def last_again(model, prompt, firsts, count, piece):
    cache, rows = model.allocate_cache(1), []
    for part in torch.tensor([prompt]).split(piece, dim=1):
        model(part, cache)
    for token in firsts:
        own, row = copy.deepcopy(cache), []
        model(torch.tensor([prompt[-1:]]), own)
        for _ in range(count):
            token = model(torch.tensor([[token]]), own).argmax().item()
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@answers.wrong("continuations", "no state while writing")
def forgets(model, prompt, firsts, count, piece):
    cache, rows = model.allocate_cache(1), []
    for part in torch.tensor([prompt]).split(piece, dim=1):
        model(part, cache)
    for token in firsts:
        row = []
        for _ in range(count):
            token = model(torch.tensor([[token]])).argmax().item()
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@answers.wrong("continuations", "the first token among the new ones")
def given_token_counted(model, prompt, firsts, count, piece):
    rows = in_pieces(model, prompt, firsts, count, piece)
    return torch.cat([torch.tensor(firsts)[:, None], rows[:, :-1]], dim=1)


@answers.wrong("continuations", "shape")
def one_long_row(model, prompt, firsts, count, piece):
    return in_pieces(model, prompt, firsts, count, piece).flatten()


@answers.wrong("continuations", "type")
def a_list(model, prompt, firsts, count, piece):
    tokens = in_pieces(model, prompt, firsts, count, piece)
    return str(tokens.tolist())


@answers.wrong("loss", "the texts joined end to end")
def _(logits, tokens):
    return F.cross_entropy(logits.flatten(0, 1)[:-1], tokens.flatten()[1:]) / math.log(2)


@answers.wrong("loss", "a division by B L")
def _(logits, tokens):
    total = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="sum")
    return total / math.log(2) / tokens.numel()
