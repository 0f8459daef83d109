"""python -m minimamba.training: train a Mamba on the bytes of texts, on a CPU, a GPU or, under torchrun, on many.

    loss     mean of -log2 p(x_{t+1} | x_<=t), in bits per byte: 8 = log2(256) for a model that knows nothing
    step     the loss's gradient on batch · accumulate windows in each process, averaged, clipped, then AdamW
    rate     up to lr in `warmup` steps, then down to 0 along half a cosine
    decay    θ ← (1 - rate · weight_decay) θ for the matrices, but not for A_log: see `decays`
    dropout  while training, a share of what each layer adds to the residual stream is zero: see `add_dropout`

The folder --out gets log.csv, checkpoint.pt and, at the end, result.json. After a kill the same command with --resume
goes on from the last checkpoint, and has the losses of a run that was never stopped. For several devices:

    torchrun --nproc-per-node 2 -m minimamba.training ...

--model transformer trains a Transformer of equal size instead, to compare with.

Source: Mamba (Gu and Dao, 2023), appendix E.2; AdamW: Loshchilov and Hutter, 2019; dropout: Srivastava and
others, 2014.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from minimamba import processes, text
from minimamba import training_files as files
from minimamba.language_model import MambaConfig, MambaLM
from minimamba.mamba_block import MambaCache

EVALUATION_ROWS = 64


def train(options):
    """Train as `options`, from `parse`, say. Return the model and the result: log, scores and sizes."""
    device = processes.join(options.device)
    rank, count = processes.rank_and_count()
    texts, out = text.load(options.data), Path(options.out)
    windows = options.batch * options.accumulate * count  # in one step, all processes together
    config = MambaConfig(d_model=options.d_model, n_layer=options.n_layer, d_state=options.d_state)
    settings = dataclasses.asdict(config) | {"windows": windows, "text_checksum": zlib.crc32(texts.train.numpy())}
    for name in ("model", "length", "steps", "lr", "warmup", "weight_decay", "dropout", "clip", "seed"):
        settings[name] = getattr(options, name)

    torch.manual_seed(options.seed)  # the same first weights in every process
    model = files.make_model(settings, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    add_dropout(model, options.dropout)
    spread = processes.spread(model, options.fsdp)
    groups = parameter_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    data, held_out = texts.train.to(device), texts.held_out.to(device)

    out.mkdir(parents=True, exist_ok=True)
    checkpoint, done, seconds = out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        if not options.resume:
            raise ValueError(f"out: expected --resume or a folder without a checkpoint, got {out}")
        done, seconds = files.load_checkpoint(checkpoint, model, optimizer, settings)
    log = files.read_log(out / "log.csv", done)
    if rank == 0:
        files.write_log(out / "log.csv", log)  # without the rows that come again

    step_bytes, losses, begin = windows * options.length, [], time.perf_counter()
    progress = tqdm(
        total=options.steps * step_bytes, initial=done * step_bytes, unit="B", unit_scale=True, disable=rank > 0
    )
    for step in range(done + 1, options.steps + 1):
        rate = learning_rate(step, options.lr, options.warmup, options.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = text.draw_windows(data, windows, options.length, options.seed, step)
        torch.manual_seed(_mix(options.seed, step, rank))  # dropout depends on nothing else either
        losses.append(accumulate_gradients(spread, batch[rank::count], options.accumulate))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(step_bytes)

        evaluating = step % options.evaluate_every == 0 or step == options.steps
        saving = step % options.checkpoint_every == 0 or step == options.steps
        if not (evaluating or saving or step % options.log_every == 0 or step == 1):
            continue  # nothing up to here has made the computer wait for the GPU
        row = dict.fromkeys(files.COLUMNS) | {"step": step, "bytes": step * step_bytes, "lr": rate}
        row["train_bits"] = processes.mean(torch.stack(losses).mean()) / math.log(2)
        row["gradient_norm"] = float(processes.whole(norm))
        losses = []
        pause = time.perf_counter()
        row["seconds"] = seconds + pause - begin  # of training alone
        if not math.isfinite(row["train_bits"]):
            raise FloatingPointError(f"loss: expected a finite number, got {row['train_bits']} at step {step}")
        if evaluating:
            row["held_out_bits"] = evaluate(model, held_out[: options.evaluate_bytes], options.length)
            progress.set_postfix(train=f"{row['train_bits']:.3f}", held_out=f"{row['held_out_bits']:.3f}")
        log.append(row)
        if rank == 0:
            files.append_row(out / "log.csv", row)
        if saving:
            files.save_checkpoint(checkpoint, model, optimizer, settings, step, row["seconds"])
        begin += time.perf_counter() - pause
    progress.close()

    result = {"parameters": parameters, "train_bytes": len(data), "held_out_bytes": len(held_out), "log": log}
    for name, carry in (("held_out_bits", True), ("held_out_bits_without_carry", False)):
        result[name] = evaluate(model, held_out[: options.evaluate_bytes], options.length, carry)
    if rank == 0:
        files.write_result(out / "result.json", result, device)
        if options.save_pretrained:
            files.load_model(checkpoint).save_pretrained(options.save_pretrained)
    return model, result


def learning_rate(step, peak, warmup, steps):
    """Return the rate of step 1 .. steps: a line that reaches `peak` at `warmup`, then a cosine to 0 at steps + 1."""
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))) / 2


def parameter_groups(model, weight_decay):
    """Return AdamW's groups: the parameters that `decays` names, with `weight_decay`, and the others without."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def decays(name, parameter):
    """Whether a parameter is drawn towards 0: matrices and filters are; A_log, D, biases and norms' weights are not.

    For these 0 is no neutral value: A_log = 0 means that all states of a channel forget alike, a bias of 0 before
    softplus that Δ is 0.69. A_log has two axes, so the usual rule "decay what has two axes" would take it.
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "A_log"


def add_dropout(model, share):
    """While `model` trains, set a drawn `share` of what each layer adds to the residual stream to 0; the rest grows.

    It grows by 1 / (1 - share), so that the mean stays. A text that is read many times is learned by heart; what must
    show through in any subset of the channels is harder to learn so. The layers themselves know nothing of it, nor do
    files: it hangs on them as a hook.
    """
    for name, module in model.named_modules():
        if share and name.rpartition(".")[2] in ("mixer", "o_proj", "mlp"):  # of Mamba; of a Transformer
            module.register_forward_hook(lambda module, _, y: F.dropout(y, share, module.training))


def next_byte_loss(model, windows):
    """Return the mean of -log p(x_{t+1} | x_<=t), in nats, over windows (B, L + 1): the last byte is only a target."""
    with autocast(windows.device):
        logits = model(windows[:, :-1])  # (B, L, 256)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def accumulate_gradients(model, windows, parts):
    """Add the gradient of the mean loss of windows (B, L + 1), taken in `parts` equal parts. Return the loss, in nats.

    Under DistributedDataParallel the processes average their gradients once, in the last part's backward pass. Nothing
    is left to divide by their number: that would average twice. FSDP averages in each part, with the same result.
    """
    total = 0.0
    for i, part in enumerate(windows.chunk(parts)):
        waits = isinstance(model, DistributedDataParallel) and i < parts - 1
        with model.no_sync() if waits else contextlib.nullcontext():
            loss = next_byte_loss(model, part) / parts
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model, data, length, carry=True):
    """Return the bits per byte of data (bytes,) uint8: every byte but the first of each of 64 rows is predicted.

    The rows are read side by side in windows of `length` bytes. carry: whether a window begins in the state that the
    one before it ended in; only a Mamba has one. Each process takes some rows; all return the same number.
    """
    rank, count = processes.rank_and_count()
    rows = max(count, min(EVALUATION_ROWS, len(data) // (length + 1)))
    data = data[: len(data) // rows * rows].view(rows, -1)[rank::count].long()  # all rows have one length
    if data.shape[1] < 2:
        raise ValueError(f"data: expected at least {2 * rows} held-out bytes, got {data.shape[1] * rows}")
    carried = ()
    if carry and isinstance(model, MambaLM):
        carried = ([MambaCache(*map(processes.whole, state)) for state in model.allocate_cache(len(data))],)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=data.device)
    for window in (data[:, i : i + length + 1] for i in range(0, data.shape[1] - 1, length)):
        with autocast(data.device):
            logits = model(window[:, :-1], *carried)
        total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
    model.train(was_training)
    return processes.mean(total) * count / (rows * (data.shape[1] - 1)) / math.log(2)


def _mix(*numbers):
    """A seed that depends on all of these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def autocast(device):
    """bfloat16 for the matrix products on a GPU, with float32 parameters; all float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


# --- the command line ---


def parse(arguments=None):
    """Return the options of a command line, a list of strings; by default this program's own."""
    parser = argparse.ArgumentParser(
        prog="python -m minimamba.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="FOLDER", help="where log, checkpoint and result go")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--data", nargs="+", metavar="PATH", help="text files and folders; default: Python's standard library")
    add("--model", choices=files.MODELS, default="mamba", help="a transformer needs the package transformers")
    add("--d-model", type=_at_least(1), default=256)
    add("--n-layer", type=_at_least(1), default=4)
    add("--d-state", type=_at_least(1), default=16)
    add("--length", type=_at_least(1), default=512, help="bytes in a window")
    add("--batch", type=_at_least(1), default=16, help="windows that a process takes at a time")
    add("--accumulate", type=_at_least(1), default=1, help="batches whose gradients make one step")
    add("--steps", type=_at_least(1), default=2000)
    add("--lr", type=_at_least(0.0), default=3e-3, help="the highest learning rate")
    add("--warmup", type=_at_least(0), help="steps up to it; default: a twentieth of all")
    add("--weight-decay", type=_at_least(0.0), default=0.1)
    add("--dropout", type=_at_least(0.0), default=0.0, help="share of each layer's output that is left out")
    add("--clip", type=_at_least(1e-9), default=1.0, help="the longest gradient; a longer one is shortened to it")
    add("--seed", type=_at_least(0), default=0)
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--fsdp", action="store_true", help="spread the weights over the processes, for a model too large for one")
    add("--log-every", type=_at_least(1), default=10, metavar="STEPS")
    add("--evaluate-every", type=_at_least(1), default=200, metavar="STEPS")
    add("--evaluate-bytes", type=_at_least(2), metavar="BYTES", help="of the held-out text; default: all")
    add("--checkpoint-every", type=_at_least(1), default=500, metavar="STEPS")
    add("--save-pretrained", metavar="FOLDER", help="at the end, write the model for MambaLM.from_pretrained")
    options = parser.parse_args(arguments)
    if options.warmup is None:
        options.warmup = options.steps // 20
    if options.dropout >= 1:
        parser.error(f"argument --dropout: expected a number below 1, got {options.dropout}")
    if options.warmup > options.steps:
        parser.error(f"argument --warmup: expected at most --steps = {options.steps}, got {options.warmup}")
    return options


def _at_least(lowest):
    """A type for argparse: a finite number of lowest's type that is not below it."""

    def number(string):
        value = type(lowest)(string)
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number >= {lowest}, got {string}")
        return value

    return number


def main():
    options = parse()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    try:
        _, result = train(options)
        if processes.rank_and_count()[0] == 0:
            print(f"held-out text: {result['held_out_bits']:.4f} bits per byte")
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    finally:
        processes.leave()


if __name__ == "__main__":
    main()
