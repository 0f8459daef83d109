"""python -m minimamba.sequence_classifier: a stack of S4D layers that tells classes of real sequences apart.

    encoder      D inputs -> width                             at each step alone
    block        u + GLU(Linear(GELU(S4D(LayerNorm(u)))))      time only in S4D, channels only in Linear; `layers` times
    decoder      mean over the steps -> classes                over the real steps of each sequence

Trains one model for each initialisation and seed, and writes curves and final test accuracies as JSON. Nothing is
chosen by the test set: the accuracy that counts is the one after the last epoch.

Source: S4 (Gu, Goel and Ré, 2021), section 3.4 and appendix D, for the block; S4D (2022), appendix, for the training.
"""

import argparse
import datetime
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from minimamba import datasets
from minimamba._results import device_name, save
from minimamba._validation import check_counts, check_option, check_shape
from minimamba.s4 import INITS, S4, S4D, parameter_groups

# How to read each data set, the model's options, and what was found to train it well.
TASKS = {
    "digits": (datasets.digits, {}, {"epochs": 20}),
    "japanese_vowels": (datasets.japanese_vowels, {"bidirectional": True}, {"epochs": 20}),
    "digits784": (lambda: datasets.digits(side=28), {}, {"epochs": 60}),
}
LAYERS = (*INITS, "s4")


class SequenceClassifier(nn.Module):
    """Sequences u (B, L, inputs), with `lengths` (B,) where they vary -> logits (B, classes).

    init is one of S4D's initialisations, or "s4" for S4 layers in place of S4D's. What stands after the end of a
    sequence does not change its logits.
    """

    def __init__(
        self, inputs, classes, width=64, layers=4, state_size=64, *, init="lin", bidirectional=False, dropout=0.1
    ):
        super().__init__()
        check_counts(inputs=inputs, classes=classes, width=width, layers=layers)
        check_option("init", init, LAYERS)
        options = {} if init == "s4" else {"init": init}
        ssm = S4 if init == "s4" else S4D
        self.encoder = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            Block(width, ssm(width, state_size, bidirectional=bidirectional, **options), dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, classes)

    def forward(self, u, lengths=None):
        check_shape("u", u, ("B", "L", self.encoder.in_features))
        batch, length, _ = u.shape
        if lengths is None:
            lengths = torch.full((batch,), length, device=u.device)
        check_shape("lengths", lengths, (batch,))
        if lengths.min() < 1 or lengths.max() > length:
            raise ValueError(f"lengths: expected between 1 and L = {length}, got {lengths.tolist()}")
        real = (torch.arange(length, device=u.device) < lengths[:, None])[..., None]  # (B, L, 1)
        x = self.encoder(u)
        for block in self.blocks:
            x = block(x, real)
        return self.decoder(self.norm(x).where(real, 0).sum(1) / lengths[:, None])


class Block(nn.Module):
    """x (B, L, width) -> the same shape: what S4D makes of the past is mixed over the channels and added to x."""

    def __init__(self, width, ssm, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ssm = ssm
        self.mix = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, real):
        y = self.ssm(self.norm(x).where(real, 0))  # zeros after the end: a backward kernel starts from nothing
        return x + self.dropout(F.glu(self.mix(self.dropout(F.gelu(y)))))


def train(model, train_set, test_set, *, epochs, batch_size=32, lr=4e-3, weight_decay=0.01):
    """Train `model` on a `Split`. Return the history: per epoch its loss, the two accuracies and the seconds so far.

    AdamW with `parameter_groups`, a cosine from lr to 0, cross-entropy. The order comes from PyTorch's generator.
    """
    device = next(model.parameters()).device
    train_set, test_set = (_to(split, device) for split in (train_set, test_set))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, weight_decay))
    batches = -(-len(train_set.u) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    history, begin = [], time.perf_counter()
    for epoch in (progress := tqdm(range(epochs), unit="epoch")):
        model.train()
        loss_sum = correct = 0
        for rows in torch.randperm(len(train_set.u)).split(batch_size):
            batch = _take(train_set, rows.to(device))
            logits = model(batch.u, batch.lengths)
            loss = F.cross_entropy(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * len(rows)
            correct += (logits.argmax(-1) == batch.labels).sum()
        row = {
            "epoch": epoch + 1,
            "loss": float(loss_sum) / len(train_set.u),
            "train_accuracy": int(correct) / len(train_set.u),
            "test_accuracy": accuracy(model, test_set),
            "seconds": time.perf_counter() - begin,
        }
        history.append(row)
        progress.set_postfix(loss=f"{row['loss']:.3f}", test=f"{100 * row['test_accuracy']:.1f} %")
    return history


@torch.no_grad()
def accuracy(model, split, batch_size=256):
    """Return the share of a `Split`'s sequences that the model, in evaluation mode, gives their label."""
    model.eval()
    split = _to(split, next(model.parameters()).device)
    correct = 0
    for rows in torch.arange(len(split.u), device=split.u.device).split(batch_size):
        batch = _take(split, rows)
        correct += int((model(batch.u, batch.lengths).argmax(-1) == batch.labels).sum())
    return correct / len(split.u)


def run(dataset, init="lin", seed=0, device="cpu", epochs=None):
    """Train one model on one of `TASKS` from `seed`. Return its row of the results."""
    check_option("dataset", dataset, tuple(TASKS))
    load, options, settings = TASKS[dataset]
    settings = settings if epochs is None else settings | {"epochs": epochs}
    train_set, test_set = load()
    torch.manual_seed(seed)
    classes = int(train_set.labels.max()) + 1
    model = SequenceClassifier(train_set.u.shape[-1], classes, init=init, **options).to(device)
    history = train(model, train_set, test_set, **settings)
    return {
        "dataset": dataset, "init": init, "seed": seed, **options, **settings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "test_accuracy": history[-1]["test_accuracy"], "history": history,
    }  # fmt: skip


def _to(split, device):
    return datasets.Split(*(None if x is None else x.to(device) for x in split))


def _take(split, rows):
    return datasets.Split(*(None if x is None else x[rows] for x in split))


def main():
    parser = argparse.ArgumentParser(
        prog="python -m minimamba.sequence_classifier", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--dataset", choices=list(TASKS), required=True)
    parser.add_argument("--init", choices=LAYERS, nargs="+", default=["lin"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, help="default: what trains this data set well")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON, after each run")
    options = parser.parse_args()
    command = ["python -m minimamba.sequence_classifier --dataset", options.dataset, "--init", *options.init]
    command += ["--seed", *map(str, options.seed), "--device", options.device]
    about = {
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(command + ([] if options.epochs is None else ["--epochs", str(options.epochs)])),
    }
    runs = []
    for init in options.init:
        for seed in options.seed:
            runs.append(run(options.dataset, init, seed, options.device, options.epochs))
            seconds = runs[-1]["history"][-1]["seconds"]
            print(f"{init:7} seed {seed}: {100 * runs[-1]['test_accuracy']:.2f} % in {seconds:.0f} s", flush=True)
            if options.save:
                save(options.save, about | {"runs": runs})


if __name__ == "__main__":
    main()
