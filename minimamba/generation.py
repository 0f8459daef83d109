"""Text from a language model: one token at a time, with a memory that does not grow.

    logits_t  = model(x_t, state)                one step; the state takes the place of everything read so far
    p         = softmax(filters(logits_t))
    x_{t+1}   ~ p                                or the most probable token

The filters, in transformers' order, each with its effect on the probabilities p:

    repetition_penalty r    a logit of a token seen before becomes logit / r if positive, logit · r if negative
    temperature T           p^(1/T), normalised anew; T = 0 stands for the most probable token
    top_k k                 the k most probable remain
    top_p q                 the most probable remain, up to and including the one with which their sum reaches q
    min_p m                 those with at least m times the greatest probability remain

`generate` and `stream` are methods of `MambaLM` as well. Wrong arguments raise TypeError or ValueError, and the message
begins with the argument's name.

Source: top-p: Holtzman and others, 2019, section 3.1; min-p: Nguyen and others, 2024; repetition penalty: CTRL (Keskar
and others, 2019), section 4.1.
"""

import math

import torch

from minimamba._validation import check_counts

PIECE = 2048  # A longer prompt is read in pieces of so many tokens, so that it needs no more memory than one of them.
NO_TOKEN = -1


def generate(model, prompts, max_new_tokens, **options):
    """Return the tokens that follow each prompt: a list of int64 tensors, at most max_new_tokens long.

    prompts: token ids (B, L), or a list of B sequences of any lengths >= 1 (of ints, or `bytes` for a model of bytes).
    A sequence that met one of `stop` ends with it. The other options are those of `stream`.
    """
    steps = list(stream(model, prompts, max_new_tokens, **options))
    return [row[row != NO_TOKEN] for row in torch.stack(steps, dim=1)]


def stream(
    model, prompts, max_new_tokens, *, temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
    stop=(), seed=None,
):  # fmt: skip
    """Return an iterator over steps: each gives the next token of every prompt, (B,) int64, -1 for those that ended.

    temperature, top_k, top_p, min_p, repetition_penalty: see the module; the penalty counts prompt and new tokens.
    stop: token sequences, or single tokens, after which a text ends. seed: the same seed, prompts and device give the
    same tokens; None draws from PyTorch's generator. On a GPU a step runs as a CUDA graph: one launch, whatever the
    number of layers.
    """
    rows, mask = _pad_left(prompts, model.config.vocab_size)
    check_counts(max_new_tokens=max_new_tokens)
    _check_number("temperature", temperature, 0, math.inf)
    _check_number("repetition_penalty", repetition_penalty, 0, math.inf, open_below=True)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            _check_number(name, value, 0, 1, open_below=name == "top_p", closed_above=True)
    if top_k is not None:
        check_counts(top_k=top_k)
    if seed is not None and type(seed) is not int:
        raise TypeError(f"seed: expected an int or None, got {type(seed).__name__}")
    stop = _stop_sequences(stop)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return _steps(model, rows, mask, max_new_tokens, filters, repetition_penalty, stop, seed)


@torch.no_grad()
def _steps(model, rows, mask, max_new_tokens, filters, repetition_penalty, stop, seed):
    device = model.lm_head.weight.device
    padded = not mask.all()
    rows, mask = rows.to(device), mask.to(device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    batch = rows.shape[0]
    cache = model.allocate_cache(batch)
    step = (_GraphedStep if device.type == "cuda" else _Step)(model, cache)
    for start in range(0, rows.shape[1], PIECE):
        part = slice(start, start + PIECE)
        logits = model(rows[:, part], cache, mask=mask[:, part] if padded else None, last_only=True)[:, 0]

    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[mask.nonzero(as_tuple=True)[0], rows[mask]] = True
    stop = [torch.tensor(sequence, device=device) for sequence in stop]
    recent = rows.new_full((batch, max(map(len, stop), default=1)), NO_TOKEN)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    for remaining in reversed(range(max_new_tokens)):
        if seen is not None:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        tokens = choose(logits, **filters, generator=generator)  # (B,)
        yield tokens.masked_fill(ended, NO_TOKEN)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if stop:
            recent = torch.cat([recent[:, 1:], tokens[:, None]], dim=1)
            for sequence in stop:
                ended = ended | (recent[:, -len(sequence) :] == sequence).all(dim=1)
            if ended.all():
                return
        if remaining:
            logits = step(tokens)


class _Step:
    """tokens (B,) -> logits (B, vocab_size) of the next; the cache goes on by one step."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache

    def __call__(self, tokens):
        return self.model(tokens[:, None], self.cache)[:, 0]


class _GraphedStep(_Step):
    """The same, recorded once as a CUDA graph: a replay launches every kernel of the step at once.

    A graph reads and writes fixed addresses. So the tokens are copied to where it reads them, the cache stays in place,
    and the logits are valid until the next step. To be made before the cache has read anything.
    """

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.tokens = torch.zeros(len(cache[0][0]), dtype=torch.int64, device=cache[0][0].device)
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # A copy of a weight that autocast keeps for later would be freed with it, and the graph would go on reading it.
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled and libraries set up before the recording
                    super().__call__(self.tokens)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.logits = super().__call__(self.tokens)
        for state in (state for layer in cache for state in layer):
            state.zero_()

    def __call__(self, tokens):
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


# --- choosing a token --------------------------------------------------------------------------------------------


def choose(logits, *, temperature=0.0, top_k=None, top_p=None, min_p=None, generator=None):
    """Return a token (B,) for each row of logits (B, vocab_size): the most probable, or drawn if temperature > 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def keep_top_k(logits, k):
    """Set all but the k greatest logits (..., vocab_size) to -inf. Equals of the k-th remain too."""
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits, p):
    """Keep the most probable tokens until their sum reaches p, the one that reaches it included; the rest is -inf."""
    if p >= 1:
        return logits
    ordered, places = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the more probable tokens have together
    dropped = torch.empty_like(logits, dtype=torch.bool).scatter_(-1, places, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def keep_min_p(logits, p):
    """Set what has less than p times the greatest probability to -inf."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def penalize_repetition(logits, seen, penalty):
    """Turn the logits whose tokens are marked in `seen`, bool of their shape, into logit / penalty, · if negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


# --- arguments ---------------------------------------------------------------------------------------------------


def _pad_left(prompts, vocab_size):
    """Return tokens (B, longest) int64, the last of each prompt in the last column, and a mask: True for a token."""
    if isinstance(prompts, torch.Tensor) and prompts.ndim != 2:
        raise ValueError(f"prompts: expected shape (B, L) or a list of sequences, got {tuple(prompts.shape)}")
    try:
        rows = [torch.as_tensor(list(row) if isinstance(row, bytes) else row) for row in prompts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompts: expected sequences of token ids: {error}") from error
    if not rows:
        raise ValueError("prompts: expected at least one, got none")
    for i, row in enumerate(rows):
        if row.ndim != 1:
            raise TypeError(f"prompts: expected sequences of token ids, got shape {tuple(row.shape)} at {i}")
        if len(row) == 0:
            raise ValueError(f"prompts: expected at least one token in each, got none at {i}")
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"prompts: expected integers, got {row.dtype} at {i}")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(f"prompts: expected tokens from 0 to {vocab_size - 1}, got others at {i}")
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


def _stop_sequences(stop):
    try:
        sequences = [[x] if type(x) is int else [int(token) for token in x] for x in stop]
    except TypeError as error:
        raise TypeError(f"stop: expected tokens or sequences of tokens: {error}") from error
    if not all(sequences):
        raise ValueError("stop: expected at least one token in each sequence, got an empty one")
    return sequences


def _check_number(name, value, low, high, *, open_below=False, closed_above=False):
    if type(value) not in (int, float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not ((low < value if open_below else low <= value) and (value <= high if closed_above else value < high)):
        left, right = "(" if open_below else "[", "]" if closed_above else ")"
        raise ValueError(f"{name}: expected a number in {left}{low}, {high}{right}, got {value}")
