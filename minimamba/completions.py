"""python -m minimamba.completions: how often a function that a model completes parses as Python.

    prompt        512 bytes of a held-out file, up to and with the line `def name(...):` of one of its functions
    completion    what the model goes on with, up to the first line that does not belong to the function's body,
                  or else up to the last whole line of `--bytes`
    parses        Python's own parser accepts the `def` line with the completion, and the body is not empty

Beside the model that ships: an n-gram model of the same text, a Transformer of equal size trained by the same command
if its folder is given, and the file's own text, cut like the others. That is no ceiling: it has functions longer than
`--bytes`, and a model may write shorter ones. A line of a string or bracket that is still open ends the body as well if
it is indented too little.

With a Transformer also where the two differ: the bits of each on bytes that repeat something of their window of 1024
bytes, and on the others (see `repeats`).
"""

import argparse
import ast
import datetime
import math
import platform
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from minimamba import text
from minimamba._results import device_name, save
from minimamba.baselines import NGram, Transformer
from minimamba.checkpoints import SHIPPED
from minimamba.language_model import MambaLM

PROMPT = 512
HEADER = re.compile(rb"^( *)def \w+\([^\n]*\):\n", re.MULTILINE)
ORDER = 5  # the n-gram model's, with the fewest bits per byte on the held-out text


def held_out():
    """Return the held-out text on which the shipped model was judged: (300000,) uint8, files begin with a byte 0."""
    return torch.frombuffer(bytearray((SHIPPED / "held_out.bin").read_bytes()), dtype=torch.uint8)


def find_prompts(content, count, length):
    """Return up to `count` pairs (prompt, what follows), spread evenly over content (bytes).

    A prompt is 512 bytes of one file that end with a function's header, what follows it `length` bytes of the same.
    """
    found = []
    for file in content.split(text.SEPARATOR):
        for header in HEADER.finditer(file):
            if PROMPT <= header.end() <= len(file) - length:
                found.append((file[header.end() - PROMPT : header.end()], file[header.end() :][:length]))
    return [found[i * len(found) // count] for i in range(count)] if len(found) > count else found


def function(prompt, completion):
    """Return the function that a completion (bytes) makes of the header that ends its prompt, as bytes."""
    header = prompt[prompt[:-1].rfind(b"\n") + 1 :]
    indent = len(header) - len(header.lstrip(b" "))
    *lines, _ = completion.split(b"\n")  # the last one is not whole
    body = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip(b" ")) <= indent:
            break
        body.append(line)
    return header + b"\n".join([*body, b""])


def parses(function):
    """Whether Python's parser accepts a function (bytes)."""
    try:
        ast.parse(textwrap.dedent(function.decode()))
    except (SyntaxError, ValueError):  # ValueError: no UTF-8, or a zero byte
        return False
    return True


def score(prompts, completions):
    """Return how many of the completions, a list of bytes, parse."""
    return sum(parses(function(*pair)) for pair in zip(prompts, completions, strict=True))


def repeats(windows, length=6):
    """Tell for each byte of windows (B, L) whether it repeats something of its window: (B, L) int64.

    2: the `length` bytes before it stand earlier in the window, and the last time the same byte followed. 1: another
    byte did. 0: they are new.
    """
    kinds = torch.zeros(windows.shape, dtype=torch.int64)
    for row, kind in zip(windows.tolist(), kinds, strict=True):
        followed = {}
        for t in range(length, len(row)):
            context = bytes(row[t - length : t])
            if context in followed:
                kind[t] = 2 if followed[context] == row[t] else 1
            followed[context] = row[t]
    return kinds


@torch.no_grad()
def bits_by_kind(models, windows):
    """Return [{"bytes": share, name: bits per byte}, ...] of models {name: model}, for kinds 0, 1, 2 of `repeats`."""
    kinds = repeats(windows)[:, 1:]
    rows = [{"bytes": (kinds == kind).double().mean().item()} for kind in range(3)]
    for name, model in models.items():
        log_p = torch.cat([model(part[:, :-1]).log_softmax(-1) for part in windows.split(8)])
        bits = -log_p.gather(2, windows[:, 1:, None])[..., 0] / math.log(2)
        for kind, row in enumerate(rows):
            row[name] = bits[kinds == kind].mean().item()
    return rows


def load_transformer(folder):
    """Return the `Transformer` that a run of minimamba.training with --model transformer saved in a folder."""
    from transformers import LlamaForCausalLM

    model = MambaLM.from_pretrained()
    parameters = sum(x.numel() for x in model.parameters())
    transformer = Transformer(model.config, parameters)
    transformer.llama.load_state_dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    return transformer.eval()


def main():
    parser = argparse.ArgumentParser(
        prog="python -m minimamba.completions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=300, help="functions to complete")
    parser.add_argument("--bytes", type=int, default=500, help="the longest completion")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transformer", metavar="FOLDER", help="where a Transformer was saved with --save-pretrained")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    drawing = {"temperature": options.temperature, "seed": options.seed}
    pairs = find_prompts(held_out().numpy().tobytes(), options.count, options.bytes)
    prompts = [prompt for prompt, _ in pairs]
    tokens = torch.tensor([list(prompt) for prompt in prompts])

    mamba, ngram = MambaLM.from_pretrained(), NGram(text.load().train.numpy(), ORDER)
    models = {"the file's own text": lambda: [list(following) for _, following in pairs]}
    models["n-gram"] = lambda: ngram.generate(tokens.numpy(), options.bytes, **drawing)
    if options.transformer:
        transformer = load_transformer(options.transformer)
        models["transformer"] = lambda: transformer.generate(tokens, options.bytes, **drawing)
    models["mamba"] = lambda: mamba.generate(tokens, options.bytes, **drawing)
    about = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m minimamba.completions " + " ".join(sys.argv[1:]),
        "functions": len(prompts),
        "bytes": options.bytes,
        "temperature": options.temperature,
        "ngram_order": ORDER,
        "ngram_held_out_bits": ngram.bits(held_out().numpy())[-1],
    }
    if options.transformer:
        windows = held_out()[: len(held_out()) // 4096 * 4096].view(-1, 4, 1024)[:, 0].long()  # every fourth
        about["repeats"] = bits_by_kind({"mamba": mamba, "transformer": transformer}, windows)
    rows = {}
    for name, complete in (progress := tqdm(models.items(), unit="model")):
        begin = time.perf_counter()
        completions = [bytes(np.asarray(row, np.uint8).tolist()) for row in complete()]
        rows[name] = {"parse": score(prompts, completions), "seconds": time.perf_counter() - begin}
        progress.write(f"{name:20} {rows[name]['parse']} of {len(prompts)} parse")
        if options.save:
            save(options.save, about | {"models": rows})


if __name__ == "__main__":
    main()
