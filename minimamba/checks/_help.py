"""Hints, one after the other, and the picture of the target beside the answer."""

import torch

from minimamba.checks._guard import as_tuple


def helpers(*exercises):
    """Return the functions hint(name) and picture(name, answer) of a chapter's module."""
    known, given = {exercise.name: exercise for exercise in exercises}, {}

    def find(name):
        if name not in known:
            raise ValueError(f"name: expected one of {', '.join(map(repr, known))}, got {name!r}")
        return known[name]

    def hint(name):
        """Print the next hint of an exercise; after the last one, the last again."""
        hints = find(name).hints
        count = given[name] = min(given.get(name, 0) + 1, len(hints))
        print(f"Hint {count} of {len(hints)}: {hints[count - 1]}")

    def picture(name, answer):
        """Return a figure of what is asked beside what the answer gives, on the last input where they differ."""
        exercise = find(name)
        return (exercise.draw or target_and_yours)(exercise, answer)

    return hint, picture


def target_and_yours(exercise, answer):
    """One row for each result: the target, yours, and their difference; matrices as heat maps, vectors as lines."""
    import matplotlib.pyplot as plt

    if exercise.inputs is None or exercise.verify:
        raise ValueError(f"name: {exercise.name!r} has no picture")
    for case in reversed(exercise.cases()):
        want, have = exercise.use(exercise.reference, case), exercise.use(answer, case)
        if not exercise.same(want, have):
            break
    if have.error is not None:
        raise have.error
    names = exercise.results
    figure, axes = plt.subplots(len(names), 3, figsize=(9, 2.8 * len(names)), squeeze=False, layout="constrained")
    for row, name, target, yours in zip(axes, names, as_tuple(want.value), as_tuple(have.value), strict=True):
        _row(row, name, torch.as_tensor(target), torch.as_tensor(yours))
    figure.suptitle(f"{exercise.name}: {case.note}")
    return figure


def _row(axes, name, target, yours):
    target, yours = (x.int() if x.dtype == torch.bool else x for x in (target, yours))
    panels = {"target": target, f"yours {tuple(yours.shape)}": yours}
    panels["yours − target"] = yours - target if yours.shape == target.shape else torch.zeros(0)
    height = max(target.abs().max().item(), 1e-30)
    if target.ndim < 2 and yours.ndim < 2:
        axes[1].sharey(axes[0])
    for axis, (title, x) in zip(axes, panels.items(), strict=True):
        x = (x.real if x.is_complex() else x.float()).cpu()  # NumPy has no bfloat16
        while x.ndim > 2:
            x = x[0]
        if x.ndim == 2:
            axis.imshow(x.numpy(), vmin=-height, vmax=height, cmap="RdBu", aspect="auto")
            axis.yaxis.get_major_locator().set_params(integer=True)
        else:
            axis.plot(x.reshape(-1).numpy(), marker="o", ms=4)
        axis.set_title(f"{name}: {title}")
        axis.xaxis.get_major_locator().set_params(integer=True)
