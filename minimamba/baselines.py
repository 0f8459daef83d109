"""What a language model of bytes is compared with: a table of counts, and a Transformer of equal size.

    p_{-1}(x)      = 1/256
    p_n(x | c)     = (count(cx) + T(c) · p_{n-1}(x | c without its first byte)) / (count(c) + T(c))

The first is the n-gram model: c are the n bytes before x, count(c) says how often something followed them, T(c) by how
many different bytes they were followed. Where c has never been seen, the shorter context decides alone.

The second is transformers' Llama, which Mamba's paper calls Transformer++: rotary positions, RMSNorm, a gated MLP.

Source: Witten and Bell, 1991, method C, interpolated; Llama: Touvron and others, 2023.
"""

import numpy as np
import torch
from torch import nn

ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: multiplying by it spreads bits upwards


class NGram:
    """Counts in a text (bytes,) uint8 of every row of up to order + 1 bytes, and the probabilities they stand for.

    A row is kept as a 64-bit hash. Among ten million rows two of one hash are to be expected in 3 of a million texts.
    """

    def __init__(self, text, order):
        if type(order) is not int or order < 0:
            raise ValueError(f"order: expected an integer >= 0, got {order!r}")
        if len(text) <= order:
            raise ValueError(f"text: expected more than order = {order} bytes, got {len(text)}")
        self.levels = []
        symbols = np.asarray(text, np.uint64)
        for n, contexts in enumerate(_contexts(symbols, order)):
            rows, firsts, counts = np.unique(
                _extend(contexts, symbols[n:]), return_index=True, return_counts=True
            )  # with where each is seen first, which tells its context
            known, places, followers = np.unique(contexts[firsts], return_inverse=True, return_counts=True)
            totals = np.bincount(places, counts, len(known))
            self.levels.append((rows, counts, known, totals, followers))

    def bits(self, text):
        """Return, for each order from 0 on, the mean of -log2 p of a text (bytes,) uint8, in bits per byte."""
        symbols, p, found = np.asarray(text, np.uint64), np.full(len(text), 1 / 256), []
        for n, contexts in enumerate(_contexts(symbols, len(self.levels) - 1)):
            p[n:] = self._refine(n, p[n:], contexts, symbols[n:])
            found.append(-np.log2(p).mean())
        return found

    def probabilities(self, texts):
        """Return p (B, 256) of the byte after each of texts (B, L) uint8, at least as long as the order."""
        symbols, order = np.asarray(texts, np.uint64), len(self.levels) - 1
        if symbols.shape[1] < order:
            raise ValueError(f"texts: expected at least order = {order} bytes in each, got {symbols.shape[1]}")
        p = np.full((len(symbols), 256), 1 / 256)
        for n in range(len(self.levels)):
            context = np.zeros((len(symbols), 1), np.uint64)
            for column in range(symbols.shape[1] - n, symbols.shape[1]):
                context = _extend(context, symbols[:, column, None])
            p = self._refine(n, p, context, np.arange(256, dtype=np.uint64))
        return p

    def generate(self, prompts, max_new_tokens, temperature=1.0, seed=0):
        """Return what follows prompts (B, L) uint8, each as long as the order or longer: (B, max_new_tokens) uint8.

        temperature 0 stands for the most probable byte.
        """
        generator = np.random.default_rng(seed)
        texts = np.asarray(prompts, np.uint8)
        length = texts.shape[1]
        for _ in range(max_new_tokens):
            p = self.probabilities(texts[:, -len(self.levels) :])
            if temperature == 0:
                drawn = p.argmax(axis=1)
            else:
                sums = (p ** (1 / temperature)).cumsum(axis=1)
                drawn = (sums > sums[:, -1:] * generator.random((len(texts), 1))).argmax(axis=1)
            texts = np.concatenate([texts, drawn[:, None].astype(np.uint8)], axis=1)
        return texts[:, length:]

    def _refine(self, n, p, contexts, symbols):
        """p_n from p_{n-1}. `contexts` and `symbols` broadcast to p's shape."""
        rows, counts, known, totals, followers = self.levels[n]
        count = _look_up(rows, counts, _extend(contexts, symbols))
        total, kinds = _look_up(known, totals, contexts), _look_up(known, followers, contexts)
        return (count + np.maximum(kinds, total == 0) * p) / np.maximum(total + kinds, 1)


class Transformer(nn.Module):
    """transformers' Llama with as many parameters as the `MambaLM` of a `MambaConfig`, and half as many layers.

    A layer of it has two parts, attention and MLP, where Mamba's has one: so the MLP's width is what is left over for
    it, rounded to a multiple of 16, which suits a GPU. Token ids (B, L) -> logits (B, L, vocab_size). Needs the package
    transformers. Source: Mamba (Gu and Dao, 2023), section 3.4.
    """

    def __init__(self, config, parameters, device=None, dtype=None):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config = config
        layers, width = max(1, config.n_layer // 2), config.d_model
        others = config.vocab_size * width + width + layers * (4 * width**2 + 2 * width)  # all but the MLPs
        mlp_width = 16 * max(1, round((parameters - others) / (3 * width * layers) / 16))
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp_width}
        sizes |= {"num_attention_heads": max(1, width // 64), "tie_word_embeddings": True}
        sizes |= {"vocab_size": config.vocab_size, "max_position_embeddings": 2**20}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # a byte is a byte
        self.llama = LlamaForCausalLM(LlamaConfig(**sizes, **tokens)).to(device, dtype)

    @property
    def backbone(self):
        """Its layers, where `MambaLM` has them."""
        return self.llama.model

    def forward(self, input_ids):
        return self.llama(input_ids, use_cache=False).logits

    def generate(self, prompts, max_new_tokens, temperature=1.0, seed=0):
        """Return what follows prompts (B, L): (B, max_new_tokens). With a KV cache, drawn from the whole softmax.

        temperature 0 stands for the most probable token.
        """
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            texts = self.llama.generate(
                prompts, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens,
                attention_mask=torch.ones_like(prompts), **drawing,
            )  # fmt: skip
        return texts[:, prompts.shape[1] :]

    def save_pretrained(self, directory):
        """Write what transformers' LlamaForCausalLM.from_pretrained reads."""
        self.llama.save_pretrained(directory)


def _contexts(symbols, order):
    """Yield, for n = 0 .. order, the hashes of the n symbols before position n, n + 1, ..., the last."""
    contexts = np.zeros(len(symbols), np.uint64)
    for n in range(order + 1):
        yield contexts
        contexts = _extend(contexts[:-1], symbols[n:-1])


def _extend(contexts, symbols):
    """The hashes of rows that are longer by one symbol."""
    mixed = (contexts ^ (symbols + np.uint64(1))) * ODD
    return mixed ^ (mixed >> np.uint64(29))


def _look_up(keys, values, wanted):
    """The value of each wanted key, 0 where `keys`, which are sorted, have it not."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
