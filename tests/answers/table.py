"""The table of minimamba/checks/TABLE.md: what the checks reject, name and accept."""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
from pathlib import Path

import torch

from minimamba.checks import CheckFailed

from .mutants import mutants

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "minimamba" / "checks" / "TABLE.md"
MODULES = sorted(
    path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "__main__", "mutants", "table")
)
HEAD = """# What the checks catch

`python -m tests.answers` writes this table, and a test compares it with what the checks do. Wrong and right answers are
in `tests/answers/` and share no code with the bank of known mistakes. Named: the message tells what the author of the
wrong answer did, be it a mistake of the bank or something general (wrong shape, changes its input, never returns).
Mutants are made by changing one thing in a right answer: an operator, a constant, an index, the order of operands, a
term left out; the bank does not know them.

| module | exercise | wrong | rejected | named | right | accepted | mutants | rejected | equivalent |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def load(name):
    """The exercises of a module by name, and its answers."""
    check = importlib.import_module(f"minimamba.checks.{name}")
    answers = importlib.import_module(f".{name}", __package__).answers
    exercises = {key: value for key, value in vars(check).items() if type(value).__name__ == "Exercise"}
    return exercises, answers


def outcome(exercise, answer, seconds=None):
    """None if the check accepts the answer, else its CheckFailed."""
    if seconds:
        exercise = dataclasses.replace(exercise, seconds=seconds, mistakes=())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exercise(answer)
    except CheckFailed as failed:
        return failed
    return None


@functools.cache
def outcomes(module):
    """{exercise: (outcomes of the wrong answers with the expected names, outcomes of the right ones)}"""
    exercises, answers = load(module)
    result = {}
    for name, exercise in exercises.items():
        wrong = [
            (outcome(exercise, answer, seconds=1 if known == "time" else None), known)
            for answer, known in answers.wrongs[name]
        ]
        result[name] = wrong, [outcome(exercise, answer) for answer in answers.rights[name]]
    return result


def survivors(exercise, answers):
    """(number of mutants, descriptions of those accepted); nothing for an exercise whose answer is a value."""
    first = answers.rights[exercise.name][0]
    if exercise.kind == "value":
        return 0, []
    made = list(mutants(first))
    return len(made), [text for text, mutant in made if outcome(exercise, mutant, seconds=2) is None]


def measure(name):
    """The rows of one module: lines of the table, then of the list of equivalent mutants."""
    torch.set_num_threads(1)
    exercises, answers = load(name)
    rows, reasons = [], []
    for exercise in exercises.values():
        wrong, rights = outcomes(name)[exercise.name]
        rejected = [failed for failed, _ in wrong if failed]
        named = [failed for failed, known in wrong if failed and known and failed.mistake == known]
        accepted = [failed for failed in rights if failed is None]
        made, alive = survivors(exercise, answers)
        counts = (
            len(wrong),
            len(rejected),
            len(named),
            len(rights),
            len(accepted),
            made,
            made - len(alive),
            len(alive),
        )
        rows.append(f"| {name} | {exercise.name} | " + " | ".join(map(str, counts)) + " |")
        for text in alive:
            reason = answers.equivalents[exercise.name].get(text, "**no reason given**")
            reasons.append(f"- {name}, {exercise.name}: `{text}`. {reason}")
    return rows, reasons


def read_rows():
    """The rows of the committed table, by module."""
    rows = {}
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        found = re.match(r"\| (\w+) \| \w+ \| \d|- (\w+), ", line)
        if found:
            kept = rows.setdefault(found[1] or found[2], ([], []))
            kept[0 if found[1] else 1].append(line)
    return rows


def write(rows):
    """Write the table with the rows of all modules that have answers."""
    rows = {name: rows[name] for name in MODULES if name in rows}
    lines = [line for own, _ in rows.values() for line in own]
    reasons = [line for _, own in rows.values() for line in own]
    text = HEAD + "\n".join(lines) + "\n\n## Mutants that are no mistakes\n\n" + "\n".join(reasons or ["None."]) + "\n"
    temporary = TABLE.with_suffix(f".{os.getpid()}.tmp")  # several may write at once
    temporary.write_text(text)
    os.replace(temporary, TABLE)
