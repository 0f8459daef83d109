"""Checks of chapter 15: the learning rate, who decays, one gradient from many, windows drawn without a memory."""

import math

import torch

from minimamba import text, training
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers
from minimamba.checks.mamba_block import DOUBLE, SINGLE, normal
from minimamba.language_model import MambaConfig, MambaLM
from minimamba.mamba_block import Mamba


def runs():
    for peak, warmup, steps in ((0.5, 2, 4), (0.1, 3, 5), (0.2, 0, 4), (2.0, 6, 6), (0.003, 10, 41)):
        yield Case(f"{warmup} steps of warm-up, {steps} in all", peak=peak, warmup=warmup, steps=steps)


def every_step(answer, peak, warmup, steps):
    """The rates of all steps in one row."""
    rates = [answer(step, peak, warmup, steps) for step in range(1, steps + 1)]
    numbers = [x for x in rates if isinstance(x, int | float | torch.Tensor)]
    return torch.tensor(rates, dtype=DOUBLE) if len(numbers) == steps else rates[0]


def down(shape, start=0, end=1):
    """A rate that falls as shape(x) from x = 0 at warmup + start to x = 1 at steps + end."""

    def rate(step, peak, warmup, steps):
        if step <= warmup:
            return peak * step / warmup
        return peak * shape((step - warmup - start) / (steps + end - warmup - start))

    return rate


def cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


def _from_zero(step, peak, warmup, steps):
    return training.learning_rate(step - 1, peak, warmup, steps) if step > 1 or warmup else peak


def _product(step, peak, warmup, steps):
    return peak * min(1, step / max(1, warmup)) * cosine(step / (steps + 1))


LATE = "Its zero is at step steps + 1, after the end: else the last batch is wasted."
AFTER = "It starts at its top when the warm-up ends."
rate = Exercise(
    name="rate",
    asks="rate(step, peak, warmup, steps): the learning rate of step = 1 ... steps",
    formula="Asked is a line that reaches peak at step warmup, then half a cosine down to 0 at step steps + 1.",
    see="15 §4",
    reference=training.learning_rate,
    inputs=runs,
    run=every_step,
    results=("the rates of all steps",),
    mistakes=(
        Mistake("steps counted from 0", _from_zero, "The first rate is then 0, and the first batch wasted."),
        Mistake("a cosine that is 0 at the last step", down(cosine, end=0), LATE),
        Mistake("a cosine over all steps", lambda s, p, w, n: p * (s / w if s <= w else cosine(s / (n + 1))), AFTER),
        Mistake("a cosine over all steps times the warm-up", _product, AFTER),
        Mistake("a cosine that starts a step late", down(cosine, start=1), "At warmup it is at its top."),
        Mistake("the division by 2 forgotten", down(lambda x: 2 * cosine(x)), "1 + cos goes from 2 to 0."),
        Mistake("a cosine from 1 to −1", down(lambda x: math.cos(math.pi * x)), "A rate is positive: (1 + cos) / 2."),
        Mistake("a quarter of a cosine", down(lambda x: math.cos(math.pi / 2 * x)), "(1 + cos(π x)) / 2 is asked."),
        Mistake("a whole period of the cosine", down(lambda x: cosine(2 * x)), "Half a period: π, not 2 π."),
        Mistake("π forgotten", down(lambda x: (1 + math.cos(x)) / 2), "Half a period is π."),
        Mistake("1 − cos", down(lambda x: 1 - cosine(x)), "It has to fall: 1 + cos."),
        Mistake("a line down", down(lambda x: 1 - x)),
        Mistake("a rate that does not fall", down(lambda x: 1)),
        Mistake("the warm-up left out", lambda s, p, w, n: training.learning_rate(max(s, w), p, w, n), "It is a line."),
    ),
    hints=(
        "Two pieces. Where does the second begin, and which share of it is over at a step?",
        "x = (step − warmup) / (steps + 1 − warmup) goes from 0 to 1, and (1 + cos(π x)) / 2 from 1 to 0.",
        "Up to warmup: peak·step/warmup (never reached if warmup = 0); after it: peak·(1 + math.cos(math.pi·x))/2.",
    ),
)


class Parameters(dict):
    """Tensors by name; in a message only their number."""

    def __repr__(self):
        return f"{len(self)} tensors: {', '.join(list(self)[:3])}, ..."


def models():
    linear = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    for note, model in (
        ("a Mamba block", Mamba(4, device="meta")),
        ("two layers and a norm", linear),
        ("a language model", MambaLM(MambaConfig(5, 4, 2), device="meta")),
    ):
        yield Case(note, parameters=Parameters((name, torch.ones(x.shape)) for name, x in model.named_parameters()))


def both_ways(answer, parameters):
    """The names that decay and must not, and those that do not and should."""
    said = {name: bool(answer(name, x)) for name, x in parameters.items()}
    right = {name: training.decays(name, x) for name, x in parameters.items()}
    wrong = [sorted({n.split("mixer.")[-1] for n in said if (said[n], right[n]) == pair}) for pair in ((1, 0), (0, 1))]
    return tuple(", ".join(names) or "none" for names in wrong)


def no_picture(exercise, answer):
    raise ValueError(f"name: {exercise.name!r} has no picture")


def last(name):
    return name.rpartition(".")[2]


ALIKE = "With A_log = 0 all states forget alike. Marks on a tensor are lost in a copy: go by its name."
ZERO = "0 is no neutral value for them."
KEPT = ("A_log", "D", "bias")
decays = Exercise(
    name="decays",
    asks="decays(name, parameter): whether weight decay draws a parameter of a model towards 0",
    formula="Asked are all that have two axes or more, but not A_log.",
    see="15 §5",
    reference=training.decays,
    inputs=models,
    run=both_ways,
    results=("what decays and must not:", "what does not and should:"),
    draw=no_picture,
    mistakes=(
        Mistake("A_log decayed", lambda n, p: p.ndim >= 2, ALIKE),
        Mistake("D decayed", lambda n, p: (p.ndim >= 2 and last(n) != "A_log") or last(n) == "D", "D = 0 is no skip."),
        Mistake("A_log and D decayed", lambda n, p: p.ndim >= 2 or last(n) == "D", ALIKE),
        Mistake("A_log, D and the norms decayed", lambda n, p: last(n) != "bias", ZERO),
        Mistake("everything decayed", lambda n, p: True, ZERO),
        Mistake("norms and biases decayed", lambda n, p: last(n) not in ("A_log", "D"), ZERO),
        Mistake("norms decayed", lambda n, p: last(n) not in KEPT, "0 would silence a channel."),
        Mistake("a norm that goes unseen", lambda n, p: "norm" not in n and last(n) not in KEPT, "It has one axis."),
        Mistake("biases decayed", lambda n, p: last(n) == "bias" or training.decays(n, p), ZERO),
        Mistake("the filters left out", lambda n, p: p.ndim == 2 and last(n) != "A_log", "conv1d.weight has 3 axes."),
        Mistake("the embedding left out", lambda n, p: training.decays(n, p) and "embedding" not in n),
        Mistake("yes and no swapped", lambda n, p: not training.decays(n, p)),
        Mistake("nothing decayed", lambda n, p: False),
    ),
    hints=(
        "For which parameters would 0 be a harmless value? Print the names and shapes of a model.",
        "Matrices and filters decay, whatever has one axis does not. One parameter with two axes is no matrix.",
        'parameter.ndim >= 2 and name.rpartition(".")[2] != "A_log".',
    ),
)


class Gradient:
    """Stands for backward(): the gradient of the mean loss of some windows. Counts them."""

    read = most = 0

    def __call__(self, windows):
        self.read, self.most = self.read + len(windows), max(self.most, len(windows))
        return (windows.sin() * windows.sum(1, keepdim=True)).mean(0)

    def __repr__(self):
        return "a function, windows (n, L) -> the gradient of their mean loss (L,)"


class Average:
    """Stands for what DistributedDataParallel does."""

    def __call__(self, gradients):
        return torch.stack(list(gradients)).mean(0)

    def __repr__(self):
        return "a function, a list of gradients -> their mean"


def batches():
    for seed, (count, parts, each) in enumerate(((2, 1, 1), (1, 2, 1), (2, 2, 3), (3, 4, 2), (4, 3, 1))):
        windows = normal(seed)(count * parts * each, 3, dtype=SINGLE if seed == 3 else DOUBLE)
        note = f"processes: {count}, parts: {parts}"
        yield Case(note, windows=windows, count=count, parts=parts, gradient=Gradient(), average=Average())


def counted(answer, windows, count, parts, gradient, average):
    gradient_of_all = answer(windows, count, parts, gradient, average)
    return gradient_of_all, gradient.read, max(0, gradient.most - len(windows) // (count * parts))


def accumulated(w, count, parts, gradient, average, factor=1, share=None, keep=None):
    """Options: a wrong factor, the windows that a process takes, the parts that count."""
    share = share or (lambda rank: w[rank::count])
    pieces = [[gradient(part) / parts for part in share(rank).chunk(parts)][keep:] for rank in range(count)]
    return average([sum(piece) for piece in pieces]) * factor


def _times(factor):
    return lambda w, count, parts, *rest: accumulated(w, count, parts, *rest, factor=factor(count, parts))


def _sharing(share):
    return lambda w, n, *rest: accumulated(w, n, *rest, share=lambda rank: share(w, n))


FIT = "They do not fit: take parts of them one after the other."
TWICE = "average divides by the number of processes already."
accumulate = Exercise(
    name="accumulate",
    asks="accumulate(windows, count, parts, gradient, average): the gradient of the mean loss of all windows",
    formula="Asked is the mean over the processes, each with its own windows, of the mean over its parts.",
    see="15 §9",
    reference=accumulated,
    inputs=batches,
    run=counted,
    results=("the gradient", "windows read", "windows too many at once"),
    mistakes=(
        Mistake("gradients averaged twice", _times(lambda n, k: 1 / n), TWICE),
        Mistake("gradients summed over the processes", _times(lambda n, k: n), "The mean of their means is asked."),
        Mistake("the parts summed up", _times(lambda n, k: k), "Divide each part's loss by the number of parts."),
        Mistake("the parts averaged twice", _times(lambda n, k: 1 / k), "Their number is in the loss already."),
        Mistake("a sum over processes and parts", _times(lambda n, k: n * k), "Means are asked, twice."),
        Mistake("only the last part", lambda *a: accumulated(*a, keep=-1), "backward() adds to what is there."),
        Mistake("only the last part", lambda w, n, k, *a: k * accumulated(w, n, k, *a, keep=-1), "backward() adds."),
        Mistake("all windows in each process", _sharing(lambda w, n: w), "Then more processes save no time."),
        Mistake("all windows read at once", lambda w, n, k, gradient, average: gradient(w), "They do not fit."),
        Mistake("a process that reads its windows at once", lambda w, n, k, *a: accumulated(w, n, 1, *a), FIT),
        Mistake("the same windows in each process", _sharing(lambda w, n: w[: len(w) // n]), "windows[rank::count]."),
        Mistake("the same windows in each process", _sharing(lambda w, n: w[::n]), "windows[rank::count]."),
    ),
    hints=(
        "There are means over the windows of a part, over parts, over processes. Which are left to you?",
        "gradient and average take two of them. The mean over the parts is yours.",
        "for rank in range(count): own = sum(gradient(part) / parts for part in windows[rank::count].chunk(parts)); "
        "at the end average of these.",
    ),
)


def draws():
    for size, length, seed, step, count in ((4, 2, 0, 1, 30), (6, 5, 3, 7, 60), (5, 9, 12, 400, 200)):
        data = torch.arange(count, dtype=torch.uint8)  # each byte tells its place
        yield Case(f"{count} bytes", data=data, size=size, length=length, seed=seed, step=step)


def draws_alone(use, data, size, length, seed, step):
    """What must hold of windows that are drawn without a memory."""
    windows = use()
    if not isinstance(windows, torch.Tensor) or windows.dtype != torch.int64:
        return f"Expected a tensor of int64, got {getattr(windows, 'dtype', type(windows).__name__)}."
    if windows.shape == (size, length):
        return Mistake("one byte too few", None, "The last byte of a window is only a target.")
    if windows.shape != (size, length + 1):
        return f"Expected the shape {(size, length + 1)}, got {tuple(windows.shape)}."
    if not torch.equal(windows, windows[:, :1] + torch.arange(length + 1)):
        return f"The bytes of a window have to be neighbours in data. The first one is {windows[0].tolist()}."
    where = windows[:, 0].tolist()
    if not torch.equal(windows, again := use()):
        says = f"For one seed and step the windows start at {where}, and in a second call at {again[:, 0].tolist()}."
        return Mistake("a generator with a state of its own", None, says)
    if len(set(where)) == 1:
        return Mistake("one start for all rows", None, f"All {size} start at {where[0]}.")
    if all(len(set(use(step=step + more)[:, 0].diff().tolist())) == 1 for more in range(4)):
        return Mistake("one draw for all rows", None, f"The starts {where} are equally far apart. Draw each.")
    if all(torch.equal(windows, use(step=step + more)) for more in (1, 2, 3)):
        return Mistake("the step left out", None, f"They start at {where} in step {step} and in step {step + 1}.")
    if all(torch.equal(windows, use(seed=seed + more)) for more in (1, 2, 3)):
        says = f"They start at {where} with seed {seed} and {seed + 1}. (A torch.Generator reads 32 bits of a seed.)"
        return Mistake("the seed left out", None, says)
    for more in (1, 10, 100, 1000, 10000, 10**6):
        if torch.equal(use(seed=seed + 1), use(step=step + more)):
            says = f"Seed {seed + 1}, step {step} and seed {seed}, step {step + more} give the same windows."
            return Mistake("one number for several pairs", None, says)
    starts = use(data=data[: length + 8], size=800)[:, 0].bincount(minlength=8).tolist()
    if not starts[-1] or not starts[0]:
        place = "last" if starts[0] else "first"
        says = f"In {length + 8} bytes it may start at 0 ... 7, which 800 draws hit {starts} times."
        return Mistake(f"the {place} window never drawn", None, says)
    if min(starts) < 40 or max(starts) > 180:  # about 100 each
        return f"In {length + 8} bytes it may start at 0 ... 7, all alike; 800 draws hit them {starts} times."


windows = Exercise(
    name="windows",
    asks="windows(data, size, length, seed, step) (size, length + 1) int64: drawn anew, the same in every run",
    formula="Asked are starts from a generator that is made in the call, from the pair (seed, step).",
    see="15 §8",
    reference=text.draw_windows,
    inputs=draws,
    verify=draws_alone,
    mistakes=(),
    hints=(
        "What must a run that is resumed at step 500 know to see the windows of an uninterrupted one?",
        "Make a generator in the call. np.random.default_rng takes a pair of numbers as its seed.",
        "starts = torch.from_numpy(np.random.default_rng((seed, step)).integers(0, len(data) − length, size)); "
        "data[starts[:, None] + torch.arange(length + 1)].long().",
    ),
)

hint, picture = helpers(rate, decays, accumulate, windows)
