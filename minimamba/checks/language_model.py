"""Checks of chapter 13: the loss, the distribution of a token, the residual stream, several continuations."""

import math

import torch
import torch.nn.functional as F

from minimamba import generation
from minimamba._autocast import widen
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.checks.mamba_block import DOUBLE, SINGLE, normal
from minimamba.language_model import MambaConfig, MambaLM

HALF, LN2 = torch.bfloat16, math.log(2)


def _but(function, **options):
    return lambda *arguments: function(*arguments, **options)


def texts():
    for seed, (batch, length, size) in enumerate(((1, 3, 2), (1, 2, 5), (2, 6, 4), (3, 9, 7), (4, 5, 3))):
        dtype, random = SINGLE if seed in (2, 4) else DOUBLE, torch.Generator().manual_seed(seed)
        tokens = torch.randint(size, (batch, length), generator=random)
        yield Case(f"{length} tokens", logits=3 * normal(seed)(batch, length, size, dtype=dtype), tokens=tokens)


def bits(logits, tokens, early=slice(None, -1), late=slice(1, None), axis=-1, unit=LN2, total=torch.mean):
    log_p = logits.log_softmax(axis)[:, early].gather(-1, tokens[:, late, None])
    return -total(log_p) / unit


def _reshaped(logits, tokens):
    batch, length, size = logits.shape
    return F.cross_entropy(logits[:, :-1].reshape(batch, size, length - 1), tokens[:, 1:]) / LN2


READ = "A model that sees x_t has no work in predicting x_t."
SAME, FIRST, LAST = (slice(None), slice(None, -1), slice(1, None))
JOINED = "The last logits of a text say nothing of the next text."
loss = Exercise(
    name="loss",
    asks="loss(logits, tokens): the mean of −log2 p(x_{t+1} | x_1 ... x_t) over a text; (B, L, V) and (B, L) -> ()",
    formula="Asked is the logits at t against the token at t + 1, in bits, the mean over B (L − 1) of them.",
    see="13 §1",
    reference=bits,
    inputs=texts,
    results=("the loss",),
    sizes={"L": ("tokens", 1)},
    mistakes=(
        Mistake("a target off by one: the token just read", _but(bits, early=SAME, late=SAME), READ),
        Mistake("a target off by one: the token just read", _but(bits, late=FIRST), READ),
        Mistake("a target off by one: the token just read", _but(bits, early=LAST), READ),
        Mistake("the logits and not the tokens shifted", _but(bits, early=LAST, late=FIRST), "That predicts the past."),
        Mistake("the first token as the target of the last", lambda x, t: bits(x, t.roll(-1, 1), SAME, SAME)),
        Mistake("nats in place of bits", _but(bits, unit=1), "log2(p) = ln(p) / ln(2)."),
        Mistake("nats multiplied by ln 2", _but(bits, unit=1 / LN2), "log2(p) = ln(p) / ln(2)."),
        Mistake("the sum in place of the mean", _but(bits, total=torch.sum)),
        Mistake("a softmax over time", _but(bits, axis=1), "The last axis holds the vocabulary."),
        Mistake("the texts joined end to end", lambda x, t: bits(x.flatten(0, 1)[None], t.flatten()[None]), JOINED),
        Mistake("a division by B L", lambda x, t: bits(x, t) * (1 - 1 / t.shape[1]), "L − 1 can be judged."),
        Mistake("two softmax", lambda x, t: bits(x.softmax(-1), t), "cross_entropy and log_softmax take the logits."),
        Mistake("axes reshaped, not moved", _reshaped, "cross_entropy takes (B L, V), or (B, V, L): use .mT."),
    ),
    hints=(
        "How many predictions can be judged in a text of L tokens?",
        "The last logits have no target, and the first token was never predicted: cut one off each.",
        "F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2).",
    ),
)


def rows():
    sizes = (
        (3, 1.0, 3, 0.85),
        (4, 2.0, 4, 1.0),
        (5, 0.5, 2, 1.0),
        (5, 1.5, 3, 0.5),
        (6, 0.7, 9, 0.8),
        (8, 1.3, 1, 0.9),
    )
    for seed, (size, T, k, p) in enumerate((*sizes, (30, 0.8, 20, 0.1), (30, 1.2, 20, 0.9), (30, 3.0, 12, 0.5))):
        logits = 2 * normal(seed + 60)(size, dtype=SINGLE if seed in (1, 5, 7) else DOUBLE)
        yield Case(f"{size} tokens, top-k {k}, top-p {p}", logits=logits, temperature=T, k=k, p=p)


def distribution_of(logits, temperature, k, p):
    return generation.keep_top_p(generation.keep_top_k(logits / temperature, k), p).softmax(dim=-1)


def _drawn(logits, T, k, p, keep=lambda s, own, p: s - own < p, between=True, end=True, last=False, back=0):
    """The same on probabilities; keep(sums up to the token, its own, p)."""
    chosen, places = (logits / T).softmax(-1).sort(descending=not last)
    chosen[k:] = 0
    chosen = chosen / chosen.sum() if between else chosen
    if p < 1:
        chosen = chosen * keep(chosen.cumsum(0), chosen, p)
    chosen = chosen / chosen.sum() if end else chosen
    return (torch.zeros_like(chosen).scatter(0, places, chosen), chosen, chosen[places])[back]


def _other(change):
    return lambda *arguments: distribution_of(*change(*arguments))


REACHES = "The most probable stay, up to and including the one with which their sum reaches p."
OUT = "the token that reaches p left out"
distribution = Exercise(
    name="distribution",
    asks="distribution(logits, temperature, k, p) (V,): the probabilities after temperature, top-k and top-p",
    formula="Asked is softmax(logits / T), then the k greatest, then those whose predecessors sum to less than p.",
    see="13 §7",
    reference=distribution_of,
    inputs=rows,
    results=("the probabilities",),
    sizes={"V": ("logits", 0)},
    mistakes=(
        Mistake(OUT, _but(_drawn, keep=lambda s, own, p: s <= p), REACHES),
        Mistake(OUT, _but(_drawn, keep=lambda s, own, p: (s <= p) | (s == own)), REACHES),
        Mistake("one token too many in top-p", _but(_drawn, keep=lambda s, own, p: F.pad(s, (2, -2)) < p), REACHES),
        Mistake("top-p of the sums before top-k", _but(_drawn, between=False), "Normalise after top-k."),
        Mistake("no normalisation at the end", _but(_drawn, end=False), "What is left has to sum to 1."),
        Mistake("the temperature at the end", lambda x, T, k, p: (distribution_of(x, 1, k, p).log() / T).softmax(-1)),
        Mistake("logits times T", _other(lambda x, T, k, p: (x, 1 / T, k, p)), "A high T makes all tokens alike."),
        Mistake("the temperature left out", _other(lambda x, T, k, p: (x, 1, k, p))),
        Mistake("top-k left out", _other(lambda x, T, k, p: (x, T, len(x), p))),
        Mistake("top-p left out", _other(lambda x, T, k, p: (x, T, k, 1))),
        Mistake("one token too many in top-k", _other(lambda x, T, k, p: (x, T, k + 1, p))),
        Mistake("the least probable kept", _but(_drawn, last=True), "Sort in descending order."),
        Mistake("probabilities in sorted order", _but(_drawn, back=1), "Put each back in its place: scatter."),
        Mistake("`places` used as its own inverse", _but(_drawn, back=2), "Put each back by scatter."),
    ),
    hints=(
        "Sort once. Then top-k is an index, and top-p a running sum.",
        "A token stays if the sum of those before it is less than p. Normalise after top-k and at the end.",
        "before = s.cumsum(0) − s; s = torch.where(before < p, s, 0) if p < 1; zeros.scatter(0, places, s / s.sum()).",
    ),
)


class Layers(list):
    """Functions (B, L, d) -> (B, L, d); in a message only their number and dtype."""

    def __repr__(self):
        return f"{len(self)} layers in {str(self[0].matrix.dtype).removeprefix('torch.')}"


class Layer:
    """Stands for Mamba(RMSNorm(x)): reads any dtype, returns its own."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, x):
        return F.rms_norm(widen(x), x.shape[-1:]).to(self.matrix.dtype) @ self.matrix


def streams():
    """Many small layers that push the same way: bfloat16 loses each push, since it is less than half a last digit."""
    sizes = ((1, 2, 40), (1, 2, 1), (2, 3, 30), (5, 4, 90), (3, 5, 2), (4, 3, 3))
    dtypes = (HALF, SINGLE, HALF, torch.float16, SINGLE, DOUBLE)
    for seed, ((length, width, count), dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        draw, step = normal(seed + 80), {HALF: 2e-3, torch.float16: 3e-4}.get(dtype)
        push = step * torch.eye(width) if step else 0.4 * draw(count, width, width)
        layers = Layers(Layer(matrix.to(dtype)) for matrix in push.expand(count, width, width))
        yield Case(repr(layers), x=(1.5 + 0.2 * draw(1, length, width)).to(dtype), layers=layers)


def summed(x, layers, start=widen, back=lambda y: y, skip=1, first=1):
    h = start(x)
    for i, layer in enumerate(layers):
        h = back((skip if i else first) * h + layer(h))
    return h


def _rounded(x, layers):
    return summed(x, layers, back=lambda h: h.to(x.dtype))


def _parallel(x, layers):
    return sum((layer(x) for layer in layers), widen(x))


WIDE = "An update below the last digit of the sum is lost, and bfloat16 has eight bits. Only the sum needs more."
LOW = "the residual stream in half precision"
stream = Exercise(
    name="stream",
    asks="stream(x, layers) (B, L, d): the residual stream after all layers",
    formula="Asked is h ← h + layer(h), with h in float32, or float64 if x is, whatever the layers return.",
    see="13 §3",
    reference=summed,
    inputs=streams,
    results=("the stream",),
    mistakes=(
        Mistake(LOW, _rounded, WIDE),
        Mistake(LOW, lambda x, layers: widen(_rounded(x, layers)), WIDE),
        Mistake("half precision at the end", lambda x, layers: summed(x, layers).to(x.dtype), WIDE),
        Mistake("float64 made float32", _but(summed, start=torch.Tensor.float), "What is wide already stays."),
        Mistake("float64 for all", _but(summed, start=torch.Tensor.double), "Here float32 is wide enough."),
        Mistake("the layers without the sum", _but(summed, skip=0, first=0), "The stream goes past each layer."),
        Mistake("x left out of the sum", lambda x, layers: summed(x, layers) - x, "The stream begins with x."),
        Mistake("the last layer left out", lambda x, layers: summed(x, layers[:-1])),
        Mistake("each layer reading x", _parallel, "A layer reads what the ones before it have made."),
    ),
    hints=(
        "Which numbers have to keep many digits: what a layer reads, what it returns, or the sum?",
        "Widen x once, before the loop. After that PyTorch helps: float32 + bfloat16 is float32.",
        "h = x.double() if x is float64 else x.float(); then for each layer h = h + layer(h).",
    ),
)


class Model(MambaLM):
    """A small model that notes how many tokens it reads at a time."""

    def __init__(self, seed, vocab_size):
        super().__init__(MambaConfig(vocab_size, 6, 1, d_state=3, pad_vocab_size_multiple=1), dtype=DOUBLE)
        draw, self.read = normal(seed), []
        for name, x in self.named_parameters():
            x.data = (0.5 if "A_log" in name else 1.2) * draw(*x.shape)

    def __repr__(self):
        return f"a MambaLM with {self.config.vocab_size} tokens"

    def forward(self, input_ids, cache=None, **options):
        self.read.append(input_ids.numel())
        return super().forward(input_ids, cache, **options)


def prompts():
    for seed, (length, firsts, count, piece) in enumerate(((3, [1], 2, 5), (4, [2, 0], 3, 2), (11, [4, 1], 4, 4))):
        prompt = torch.randint(9, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        note = f"a prompt of {length}, {len(firsts)} continuation{'s' if len(firsts) > 1 else ''}"
        yield Case(note, model=Model(seed, 9), prompt=prompt, firsts=firsts, count=count, piece=piece)


def watched(answer, model, prompt, firsts, count, piece):
    """The tokens, and by how much the model was given too long a piece or too many tokens in all."""
    new = answer(model, prompt, firsts, count, piece)
    needed = len(prompt) + len(firsts) * (count + 1)  # it does no harm to read the last new token too
    return new, max(0, max(model.read, default=0) - piece), max(0, sum(model.read) - needed)


@torch.no_grad()
def read_once(model, prompt, firsts, count, piece, copy=True, twice=0, keep=True, whole=False, again=0, start=0):
    cache, new = None, []
    for first in firsts:
        if again or not cache:
            cache = model.allocate_cache(1)
            for part in torch.tensor([prompt]).split(len(prompt) if whole else piece, dim=1):
                model(part, cache)
        own = [type(layer)(*(state.clone() for state in layer)) for layer in cache] if copy else cache
        if twice:
            model(torch.tensor([prompt[-1:]]), own)
        tokens = [first]
        while len(tokens) <= count:
            tokens.append(model(torch.tensor([tokens[-1:]]), own if keep else None)[0, -1].argmax().item())
        new.append(tokens[1 - start : count + 1 - start])
    return torch.tensor(new)


@torch.no_grad()
def _whole_text(model, prompt, firsts, count, piece):
    texts = [[*prompt, first] for first in firsts]
    for text in texts * count:
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return torch.tensor([text[len(prompt) + 1 :] for text in texts])


continuations = Exercise(
    name="continuations",
    asks="continuations(model, prompt, firsts, count, piece): after prompt and each of firsts, the next count tokens",
    formula="Asked is one reading of the prompt, a copy of its state for each first token, then one token a step.",
    see="13 §6",
    reference=read_once,
    inputs=prompts,
    run=watched,
    results=("the array of new tokens", "tokens too many at once", "tokens read too often"),
    mistakes=(
        Mistake(
            "one state for all continuations", _but(read_once, copy=False), "The model changes it in place: clone it."
        ),
        Mistake("the whole text read again for each token", _whole_text, "The state holds all that was read."),
        Mistake("the prompt read again for each continuation", _but(read_once, again=True), "Its state can be copied."),
        Mistake("the prompt read in one go", _but(read_once, whole=True), "In pieces memory stays small."),
        Mistake("the last token of the prompt read twice", _but(read_once, twice=True), "It is in the state already."),
        Mistake("no state while writing", _but(read_once, keep=False), "Each step needs what the last one left."),
        Mistake("the first token among the new ones", _but(read_once, start=1), "It is given: return what follows it."),
    ),
    hints=(
        "The model changes the cache in place. What is left of the prompt's state after the first continuation?",
        "Copy the cache for each first token: [type(layer)(*(state.clone() for state in layer)) for layer in cache].",
        "Read prompt pieces into one cache; for each first: own = copy, token = first; count times: token = "
        "model([[token]], own)[0, -1].argmax(), keep it.",
    ),
)

hint, picture = helpers(loss, distribution, stream, continuations)
