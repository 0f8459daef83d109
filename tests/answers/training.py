"""Answers to the exercises of chapter 15."""

import hashlib
import math
import random

import numpy as np
import torch

from . import Answers

answers = Answers()


# rate


@answers.right("rate")
def up_and_down(step, peak, warmup, steps):
    if step <= warmup:
        return peak * step / warmup
    share = (step - warmup) / (steps + 1 - warmup)
    return peak * (1 + math.cos(math.pi * share)) / 2


@answers.right("rate")
def squared(step, peak, warmup, steps):
    if step < warmup:
        return peak * (step / warmup)
    return peak * math.cos(math.pi / 2 * (step - warmup) / (1 + steps - warmup)) ** 2


@answers.right("rate")
def from_a_table(step, peak, warmup, steps):
    up = torch.arange(1, warmup + 1, dtype=torch.float64) / max(warmup, 1)
    down = 0.5 + 0.5 * torch.cos(torch.linspace(0, math.pi, steps + 2 - warmup, dtype=torch.float64))[1:-1]
    return peak * torch.cat([up, down])[step - 1]


@answers.right("rate")
def with_numpy(step, peak, warmup, steps):
    xs = np.linspace(0, np.pi, steps - warmup + 2)
    return float(
        np.where(step <= warmup, peak * step / max(warmup, 1), peak * (1 + np.cos(xs[max(0, step - warmup)])) / 2)
    )


for turned in ("step - warmup -> warmup - step", "steps + 1 - warmup -> warmup - (steps + 1)"):
    answers.equivalent("rate", turned, "The cosine is the same for x and -x.")
answers.equivalent("rate", "step <= warmup -> step < warmup", "At step warmup both pieces give peak.")


@answers.wrong("rate", "steps counted from 0")
def first_rate_zero(step, peak, warmup, steps):
    step = step - 1
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup)))


@answers.wrong("rate", "a cosine that is 0 at the last step")
def last_rate_zero(step, peak, warmup, steps):
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@answers.wrong("rate", "a cosine over all steps")
def not_after_the_warmup(step, peak, warmup, steps):
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))


@answers.wrong("rate", "a cosine over all steps times the warm-up")
def both_factors(step, peak, warmup, steps):
    factor = step / warmup if step < warmup else 1
    return factor * peak * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))


@answers.wrong("rate", "the division by 2 forgotten")
def twice_the_peak(step, peak, warmup, steps):
    return up_and_down(step, peak, warmup, steps) * (1 if step <= warmup else 2)


@answers.wrong("rate", "a cosine from 1 to −1")
def negative(step, peak, warmup, steps):
    if step <= warmup:
        return peak * step / warmup
    return peak * math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))


@answers.wrong("rate", "a quarter of a cosine")
def quarter(step, peak, warmup, steps):
    if step <= warmup:
        return peak * step / warmup
    return peak * math.cos(math.pi * (step - warmup) / (steps + 1 - warmup) / 2)


@answers.wrong("rate", "a line down")
def triangle(step, peak, warmup, steps):
    if step <= warmup:
        return peak * step / warmup
    return peak * (steps + 1 - step) / (steps + 1 - warmup)


@answers.wrong("rate", "the warm-up left out")
def no_warmup(step, peak, warmup, steps):
    x = max(0, step - warmup) / (steps + 1 - warmup)
    return peak * (1 + math.cos(math.pi * x)) / 2


@answers.wrong("rate", "a rate that does not fall")
def constant(step, peak, warmup, steps):
    return peak * min(1, step / max(warmup, 1))


@answers.wrong("rate", "raises")
def division_by_warmup(step, peak, warmup, steps):
    if step / warmup <= 1:
        return peak * step / warmup
    return up_and_down(step, peak, warmup, steps)


@answers.wrong("rate", "type")
def no_return(step, peak, warmup, steps):
    up_and_down(step, peak, warmup, steps)


@answers.wrong("rate", "factor")
def peak_in_thousandths(step, peak, warmup, steps):
    return 1000 * up_and_down(step, peak, warmup, steps)


@answers.wrong("rate", None)
def square_root(step, peak, warmup, steps):
    return peak * math.sqrt(step / warmup) if step <= warmup else up_and_down(step, peak, warmup, steps)


# decays


@answers.right("decays")
def by_axes_and_name(name, parameter):
    return parameter.ndim >= 2 and name.split(".")[-1] != "A_log"


@answers.right("decays")
def by_names(name, parameter):
    kinds = ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "embedding", "lm_head", "0")
    return name.endswith(".weight") and name.split(".")[-2] in kinds


@answers.right("decays")
def one_after_the_other(name, parameter):
    if name.endswith("A_log") or name.endswith("bias"):
        return False
    return len(parameter.shape) > 1


@answers.wrong("decays", "A_log decayed")
def rule_of_thumb(name, parameter):
    return parameter.dim() > 1


@answers.wrong("decays", "A_log decayed")
def by_marks(name, parameter):
    return parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)


@answers.wrong("decays", "A_log decayed")
def name_with_a_dot_first(name, parameter):
    return parameter.ndim >= 2 and name != "A_log"


@answers.wrong("decays", "A_log and D decayed")
def weights_and_the_scan(name, parameter):
    return (
        not name.endswith("bias") and not name.endswith("norm_f.weight") and "norm" not in name and name != "1.weight"
    )


@answers.wrong("decays", "A_log, D and the norms decayed")
def all_but_biases(name, parameter):
    return "bias" not in name


@answers.wrong("decays", "D decayed")
def forgot_D(name, parameter):
    return not (name.endswith("A_log") or "bias" in name or "norm" in name or name == "1.weight")


@answers.wrong("decays", "everything decayed")
def as_by_default(name, parameter):
    return True


@answers.wrong("decays", "norms and biases decayed")
def only_the_two(name, parameter):
    return not (name.endswith("A_log") or name.endswith("D"))


@answers.wrong("decays", "the filters left out")
def matrices_only(name, parameter):
    return len(parameter.shape) == 2 and "A_log" not in name


@answers.wrong("decays", "the embedding left out")
def not_the_embedding(name, parameter):
    return parameter.ndim > 1 and not ("A_log" in name or "embedding" in name)


@answers.wrong("decays", "yes and no swapped")
def spared_in_place_of_drawn(name, parameter):
    return name.endswith("A_log") or parameter.ndim < 2


@answers.wrong("decays", "nothing decayed")
def no_return_at_all(name, parameter):
    by_axes_and_name(name, parameter)


# accumulate


@answers.right("accumulate")
def means_of_means(windows, count, parts, gradient, average):
    gradients = []
    for rank in range(count):
        total = 0
        for part in windows[rank::count].chunk(parts):
            total = total + gradient(part) / parts
        gradients.append(total)
    return average(gradients)


@answers.right("accumulate")
def weighted_at_the_end(windows, count, parts, gradient, average):
    own = [sum(gradient(p) for p in mine.chunk(parts)) for mine in windows.chunk(count)]
    return average(own) / parts


@answers.right("accumulate")
def average_of_all_parts(windows, count, parts, gradient, average):
    return average([gradient(part) for part in windows.chunk(count * parts)])


@answers.right("accumulate")
def in_a_buffer(windows, count, parts, gradient, average):
    buffer = torch.zeros(count, windows.shape[1], dtype=windows.dtype)
    size = len(windows) // (count * parts)
    for rank in range(count):
        for part in windows[rank::count].split(size):
            buffer[rank] += gradient(part)
    return average(list(buffer.div_(parts)))


@answers.wrong("accumulate", "gradients averaged twice")
def loss_divided_by_the_processes(windows, count, parts, gradient, average):
    own = []
    for rank in range(count):
        own.append(sum(gradient(part) / parts / count for part in windows[rank::count].chunk(parts)))
    return average(own)


@answers.wrong("accumulate", "gradients averaged twice")
def average_divided_again(windows, count, parts, gradient, average):
    return means_of_means(windows, count, parts, gradient, average) / count


@answers.wrong("accumulate", "gradients summed over the processes")
def not_averaged(windows, count, parts, gradient, average):
    own = [sum(gradient(p) for p in windows[rank::count].chunk(parts)) / parts for rank in range(count)]
    return torch.stack(own).sum(0)


@answers.wrong("accumulate", "the parts summed up")
def accumulated_without_division(windows, count, parts, gradient, average):
    return average([sum(map(gradient, windows[rank::count].chunk(parts))) for rank in range(count)])


@answers.wrong("accumulate", "the parts averaged twice")
def both_divided(windows, count, parts, gradient, average):
    own = [sum(gradient(p) / parts for p in windows[rank::count].chunk(parts)) / parts for rank in range(count)]
    return average(own)


@answers.wrong("accumulate", "only the last part")
def overwritten(windows, count, parts, gradient, average):
    own = []
    for rank in range(count):
        for part in windows[rank::count].chunk(parts):
            g = gradient(part) / parts
        own.append(g)
    return average(own)


@answers.wrong("accumulate", "all windows in each process")
def not_shared_out(windows, count, parts, gradient, average):
    return average([sum(gradient(p) / parts for p in windows.chunk(parts)) for _ in range(count)])


@answers.wrong("accumulate", "the same windows in each process")
def always_rank_zero(windows, count, parts, gradient, average):
    mine = windows[::count]
    return average([sum(gradient(p) / parts for p in mine.chunk(parts)) for rank in range(count)])


@answers.wrong("accumulate", "a sum over processes and parts")
def total(windows, count, parts, gradient, average):
    return sum(gradient(p) for rank in range(count) for p in windows[rank::count].chunk(parts))


@answers.wrong("accumulate", None)
def divided_by_the_windows(windows, count, parts, gradient, average):
    return means_of_means(windows, count, parts, gradient, average) / len(windows)


# windows


@answers.right("windows")
def numpy_of_the_pair(data, size, length, seed, step):
    generator = np.random.default_rng((seed, step))
    starts = torch.from_numpy(generator.integers(0, len(data) - length, size))
    return data[starts[:, None] + torch.arange(length + 1)].long()


@answers.right("windows")
def torch_of_a_hash(data, size, length, seed, step):
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    starts = torch.randint(len(data) - length, (size,), generator=generator)
    return torch.stack([data[s : s + length + 1] for s in starts]).to(torch.int64)


@answers.right("windows")
def python_of_a_string(data, size, length, seed, step):
    draw = random.Random(f"{seed}/{step}")
    rows = [draw.randrange(len(data) - length) for _ in range(size)]
    return torch.tensor([[int(x) for x in data[row : row + length + 1]] for row in rows])


@answers.right("windows")
def unfolded(data, size, length, seed, step):
    every = data.unfold(0, length + 1, 1)
    generator = np.random.default_rng([step, seed, 7])
    return every[torch.from_numpy(generator.integers(len(every), size=size))].long()


def picked(data, starts, length):
    return torch.stack([data[int(s) : int(s) + length + 1] for s in starts]).long()


@answers.wrong("windows", "a generator with a state of its own")
def global_generator(data, size, length, seed, step):
    starts = torch.randint(len(data) - length, (size,))
    return data[starts[:, None] + torch.arange(length + 1)].long()


shared = np.random.default_rng(0)


@answers.wrong("windows", "a generator with a state of its own")
def made_outside(data, size, length, seed, step):
    return picked(data, shared.integers(0, len(data) - length, size), length)


@answers.wrong("windows", "the step left out")
def seed_alone(data, size, length, seed, step):
    return picked(data, np.random.default_rng(seed).integers(0, len(data) - length, size), length)


@answers.wrong("windows", "the seed left out")
def step_alone(data, size, length, seed, step):
    return picked(data, np.random.default_rng(step).integers(0, len(data) - length, size), length)


@answers.wrong("windows", "one number for several pairs")
def sum_of_both(data, size, length, seed, step):
    return picked(data, np.random.default_rng(seed + step).integers(0, len(data) - length, size), length)


@answers.wrong("windows", "one number for several pairs")
def thousand_steps_a_seed(data, size, length, seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return picked(data, torch.randint(len(data) - length, (size,), generator=generator), length)


@answers.wrong("windows", "the last window never drawn")
def one_place_too_few(data, size, length, seed, step):
    return picked(data, np.random.default_rng((seed, step)).integers(0, len(data) - length - 1, size), length)


@answers.wrong("windows", "the first window never drawn")
def from_one(data, size, length, seed, step):
    return picked(data, np.random.default_rng((seed, step)).integers(1, len(data) - length, size), length)


@answers.wrong("windows", "one byte too few")
def inputs_only(data, size, length, seed, step):
    return numpy_of_the_pair(data, size, length, seed, step)[:, :length]


@answers.wrong("windows", "one start for all rows")
def one_draw(data, size, length, seed, step):
    start = int(np.random.default_rng((seed, step)).integers(0, len(data) - length))
    return data[start : start + length + 1].long().repeat(size, 1)


@answers.wrong("windows", None)
def any_bytes(data, size, length, seed, step):
    places = np.random.default_rng((seed, step)).integers(0, len(data), (size, length + 1))
    return data[torch.from_numpy(places)].long()


@answers.wrong("decays", "a norm that goes unseen")
def _(name, parameter):
    return not any(word in name for word in ("A_log", "norm", "bias")) and name.split(".")[-1] != "D"


@answers.wrong("accumulate", "all windows read at once")
def _(windows, count, parts, gradient, average):
    return gradient(windows)


@answers.wrong("accumulate", "a process that reads its windows at once")
def _(windows, count, parts, gradient, average):
    return average([gradient(own) for own in windows.chunk(count)])


@answers.right("accumulate")
def _(windows, count, parts, gradient, average):
    total = 0
    for part in windows.reshape(count, parts, -1, windows.shape[1]).unbind(1):
        total = total + average([gradient(own) for own in part])
    return total / parts


@answers.wrong("windows", "one draw for all rows")
def _(data, size, length, seed, step):
    first = int(np.random.default_rng([seed, step]).integers(0, len(data) - length))
    places = (first + torch.arange(size)[:, None]) % (len(data) - length)
    return data[places + torch.arange(length + 1)].long()


@answers.wrong("windows", "the seed left out")
def _(data, size, length, seed, step):
    random = torch.Generator().manual_seed(seed * 2**32 + step)  # on the CPU the upper bits are thrown away
    places = torch.randint(0, len(data) - length, (size, 1), generator=random)
    return data[places + torch.arange(length + 1)].long()
