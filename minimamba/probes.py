"""Looking into a trained language model: where a word stands, which Δ, B and C it gets, which bytes are missed.

places     the positions of a word's last byte in one Python file, in its code or in its docstrings
selected   Δ, B and C of every layer, as a model computes them from a text
missed     Σ_{s = t+5 .. t+32} KL(p_s ‖ p_s without byte t): what the predictions lose if a byte is left out
"""

import io
import math
import re
import tokenize

import torch
from torch.nn import functional as F

DOCSTRING = re.compile(r"[rRbBuUfF]*(\"\"\"|''')")


def places(file, word, kind):
    """Return the positions of the last byte of `word` in a Python file (bytes), in the order of the file.

    kind: "code", where the word is a name of its own, or "docstring", where it stands in a triple-quoted string.
    """
    lines = file.decode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    found = []
    for token in tokenize.generate_tokens(io.StringIO("".join(lines), newline="").readline):
        row, column = token.start
        is_docstring = token.type == tokenize.STRING and DOCSTRING.match(token.string)
        if (kind == "docstring" and is_docstring) or (kind == "code" and token.type == tokenize.NAME):
            start = starts[row - 1] + len(lines[row - 1][:column].encode())
            found += [start + match.end() - 1 for match in re.finditer(rb"\b%s\b" % word, token.string.encode())]
    return found


@torch.no_grad()
def selected(model, tokens):
    """Return [(Δ, B, C), ...] of a `MambaLM`'s layers: (B, L, d_inner), and twice (B, L, d_state); tokens (B, L)."""
    seen, hooks = [], []
    for layer in model.backbone.layers:
        hooks.append(layer.mixer.x_proj.register_forward_hook(lambda _, args, out: seen.append(out)))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for layer, out in zip(model.backbone.layers, seen, strict=True):
        low, B, C = out.split([layer.mixer.dt_rank, layer.mixer.d_state, layer.mixer.d_state], dim=-1)
        result.append((F.softplus(layer.mixer.dt_proj(low)), B, C))
    return result


@torch.no_grad()
def missed(model, tokens, left_out, after=5, until=32):
    """Return how many bits the predictions after `tokens` (1, L) lose if one byte is left out: (len(left_out),).

    left_out: positions. Neither convolution nor state sees the byte (the model's mask). Counted is the Kullback-Leibler
    divergence, the bits lost by betting with the second prediction, at `after` to `until` bytes behind it.
    """
    whole = model(tokens).log_softmax(dim=-1)
    mask = torch.arange(tokens.shape[1]) != torch.as_tensor(left_out)[:, None]
    without = model(tokens.expand(len(left_out), -1), mask=mask).log_softmax(dim=-1)
    divergence = (whole.exp() * (whole - without)).sum(dim=-1) / math.log(2)  # (left_out, L)
    return torch.stack([row[t + after : t + until + 1].sum() for t, row in zip(left_out, divergence, strict=True)])
