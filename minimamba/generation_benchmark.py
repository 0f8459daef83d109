"""python -m minimamba.generation_benchmark: what the next token costs after a context of so many tokens.

    minimamba            this package's MambaLM
    transformers_mamba   transformers' MambaForCausalLM with the same weights
    transformer          transformers' LlamaForCausalLM of equal parameter count: half as many layers, since each of
                         them has a second half, the MLP (Mamba, section 3.4). Its KV cache has its room reserved
                         (StaticCache): to enlarge it at each step would copy all of it each time

For each context: the seconds to read it, the median seconds of one step after it, and the bytes of all that is kept
between two steps. Times are the best of three rounds, since other programs only ever add to them. Batch 1, random
tokens, random weights: neither time nor memory depends on their values. On a GPU the step of the first and of the last
is one launch of a CUDA graph.

Before that the model that ships reads a million bytes in pieces: the seconds, and the peak of memory, by then.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from tqdm.auto import tqdm

from minimamba import generation, text
from minimamba._results import device_name, save
from minimamba.baselines import Transformer
from minimamba.language_model import MambaConfig, MambaLM

# device: (the model, its dtype, the contexts)
SIZES = {
    "cpu": ({"d_model": 256, "n_layer": 8, "vocab_size": 256}, torch.float32, [2**i for i in range(8, 15)]),
    "cuda": (
        {"d_model": 1024, "n_layer": 48, "vocab_size": 50280}, torch.bfloat16, [2**i for i in range(8, 18)],
    ),
}  # fmt: skip
LOOP = {"cpu": 2**13, "cuda": 2**11}  # transformers reads with a loop in Python: longer ones would tell the same
MILESTONES = (10**4, 10**5, 10**6)
STEPS = 30
ROUNDS = 3


class Minimamba:
    def __init__(self, model):
        self.model = model
        self.cache = model.allocate_cache(1)
        on_gpu = model.lm_head.weight.is_cuda
        self.step = (generation._GraphedStep if on_gpu else generation._Step)(model, self.cache)

    def read(self, tokens):
        for piece in tokens.split(generation.PIECE, dim=1):
            self.model(piece, self.cache, last_only=True)

    def kept(self):
        return [state for layer in self.cache for state in layer]


class Transformers:
    """A model of transformers with its cache."""

    def __init__(self, model):
        self.model = model

    def read(self, tokens):
        from transformers import DynamicCache, StaticCache

        config, cache = self.model.config, DynamicCache(config=self.model.config)
        name = "cache_params" if config.model_type == "mamba" else "past_key_values"
        self.model(tokens, use_cache=True, logits_to_keep=1, **{name: cache})
        if name == "past_key_values":  # read without reserved room, which would hinder PyTorch's fused attention
            read, cache = cache, StaticCache(config=config, max_cache_len=tokens.shape[1] + STEPS + 2)
            for i, layer in enumerate(read.layers):
                cache.update(layer.keys, layer.values, i)
        self.cache, self.replay = {name: cache}, None

    def step(self, tokens):
        if not tokens.is_cuda or "cache_params" in self.cache:
            return self.model(tokens[:, None], use_cache=True, **self.cache).logits
        if self.replay is None:
            self.replay = _record(lambda: self.model(tokens[:, None], use_cache=True, **self.cache).logits)
        self.replay()

    def kept(self):
        """The tensors in its cache: keys and values, or convolution and recurrent states."""
        states = []
        for layer in next(iter(self.cache.values())).layers:
            for value in vars(layer).values():
                values = value.values() if isinstance(value, dict) else [value]
                states += [x for x in values if isinstance(x, torch.Tensor)]
        return states


def models(config, dtype, device):
    """Return {name: (runner's class, model)}, with weights drawn anew."""
    import transformers

    transformers.logging.set_verbosity_error()  # it says at length that it has no kernels of its own
    torch.manual_seed(0)
    ours = MambaLM(config, device, dtype)
    names = {"hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "vocab_size": config.vocab_size}
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**names)).to(device, dtype)
    weights = {name.replace("embedding.", "embeddings."): x for name, x in ours.state_dict().items()}
    padded = ("backbone.embeddings.weight", "lm_head.weight")
    theirs.load_state_dict({name: x[: config.vocab_size] if name in padded else x for name, x in weights.items()})

    parameters = sum(x.numel() for x in ours.parameters())
    transformer = Transformer(config, parameters, device, dtype).llama
    found = {
        "minimamba": (Minimamba, ours),
        "transformers_mamba": (Transformers, theirs),
        "transformer": (Transformers, transformer),
    }
    return {name: (runner, model.eval()) for name, (runner, model) in found.items()}


@torch.no_grad()
def measure(runner, model, context, device):
    """Return {"read_seconds", "step_seconds", "kept_bytes"} after `context` tokens."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=generator, device=device)
    one = runner(model)
    one.read(tokens[:, :8])  # to warm up
    one = runner(model)
    read_seconds = _seconds(lambda: one.read(tokens), device)
    kept_bytes = sum(x.nbytes for x in one.kept())
    times = [_seconds(lambda: one.step(tokens[:, 0]), device) for _ in range(STEPS)]
    return {"read_seconds": read_seconds, "step_seconds": statistics.median(times), "kept_bytes": kept_bytes}


@torch.no_grad()
def read_a_million(device):
    """Return [{"bytes", "seconds", "peak_bytes"}, ...]: the shipped model reads Python's library, in pieces of 2048.

    peak_bytes: on a GPU all that PyTorch had at a time; on a CPU the whole process's memory.
    """
    model, data, rows, begin = MambaLM.from_pretrained(device=device), text.load().train, [], time.perf_counter()
    data, cache = data[: MILESTONES[-1]].to(device), model.allocate_cache(1)
    for start in tqdm(range(0, len(data), generation.PIECE), unit="piece"):
        piece = data[start : start + generation.PIECE]
        model(piece[None].long(), cache, last_only=True)
        done = start + len(piece)
        if len(rows) < len(MILESTONES) and done >= MILESTONES[len(rows)]:
            if device == "cuda":
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
            else:
                import resource  # not on Windows

                peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rows.append({"bytes": done, "seconds": time.perf_counter() - begin, "peak_bytes": peak})
    return rows


def _record(call):
    """Return a function that replays, as a CUDA graph, the kernels that call() launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _seconds(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(
        prog="python -m minimamba.generation_benchmark", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=list(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", help="default: powers of two that suit the device")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON, after each row")
    options = parser.parse_args()
    device = options.device
    million = read_a_million(device)  # first: the peak of memory is that of the whole process
    sizes, dtype, contexts = SIZES[device]
    contestants = models(MambaConfig(**sizes), dtype, device)
    about = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m minimamba.generation_benchmark " + " ".join(sys.argv[1:]),
        "dtype": str(dtype).removeprefix("torch."),
        "model": sizes,
        "million": million,
        "parameters": {name: sum(x.numel() for x in model.parameters()) for name, (_, model) in contestants.items()},
    }
    plan = [(name, context) for context in options.contexts or contexts for name in contestants]
    plan = [(name, context) for name, context in plan if name != "transformers_mamba" or context <= LOOP[device]]
    rows = {}
    for name, context in (progress := tqdm(ROUNDS * plan, unit="row")):
        row = measure(*contestants[name], context, device)
        best = rows.setdefault((name, context), {"model": name, "context": context} | row)
        best |= {key: min(value, best[key]) for key, value in row.items()}
        progress.write(
            f"{name:20}{context:>8} tokens  read {best['read_seconds']:8.3f} s"
            f"   step {1e3 * best['step_seconds']:8.3f} ms   kept {best['kept_bytes'] / 2**20:9.3f} MiB"
        )
        if options.save:
            save(options.save, about | {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
