"""Every exercise: wrong answers are rejected, and by name; right ones pass; the notebooks belong together."""

import contextlib
import importlib.util
import io
import linecache
import re
from pathlib import Path

import nbformat
import pytest
from answers.table import HEAD, MODULES, TABLE, load, measure, outcomes, read_rows

from minimamba.checks import CheckFailed

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks" / "exercises"
MASTERS = sorted((NOTEBOOKS / "masters").glob("*.ipynb"))
# All tests of a module go to one process (--dist loadgroup), which runs its answers once.
IN_ONE = {module: pytest.mark.xdist_group(module) for module in MODULES}
EXERCISES = [pytest.param(module, name, marks=IN_ONE[module]) for module in MODULES for name in load(module)[0]]

each_exercise = pytest.mark.parametrize("module, name", EXERCISES, ids=lambda part: part)
each_module = pytest.mark.parametrize("module", [pytest.param(module, marks=IN_ONE[module]) for module in MODULES])
each_master = pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)


def run(notebook):
    """Run the code cells in one namespace. Return the CheckFailed of each cell that checks, or None."""
    names, results = {"__name__": "__main__"}, []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            failed = None
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    execute(cell.source, names, f"<cell {index}>")
            except CheckFailed as error:
                failed = error
            if cell.source.startswith("check."):
                results.append(failed)
            else:
                assert failed is None, cell.source
    return results


def execute(source, names, where):
    """Like a notebook's kernel: the source of the cell stays known, and Triton needs it."""
    linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
    exec(compile(source, where, "exec"), names)


def generator():
    spec = importlib.util.spec_from_file_location("generate", NOTEBOOKS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each_exercise
def test_wrong_answers_are_rejected_and_the_message_can_be_read(module, name):
    wrong, _ = outcomes(module)[name]
    assert len(wrong) >= 4
    for index, (failed, known) in enumerate(wrong):
        assert failed, (index, known)
        lines = str(failed).splitlines()
        assert len(lines) <= 17, failed
        assert lines[0].startswith(f"{name}: ") and f"check.hint({name!r})" in lines[-1]


@each_exercise
def test_right_answers_pass(module, name):
    _, right = outcomes(module)[name]
    assert len(right) >= 3 and right == [None] * len(right)


@each_module
def test_the_table_is_true_and_nine_of_ten_wrong_answers_are_named(module):
    rows, reasons = measure(module)
    assert read_rows()[module] == (rows, reasons), "python -m tests.answers"
    assert "no reason given" not in "".join(reasons)
    counts = [list(map(int, row.split(" | ")[2:5])) for row in (row.rstrip(" |") for row in rows)]
    wrong, rejected, named = map(sum, zip(*counts, strict=True))
    assert rejected == wrong and named >= 0.9 * wrong


def test_the_table_has_all_modules():
    assert sorted(read_rows()) == MODULES and TABLE.read_text().startswith(HEAD)


def test_the_readme_has_the_sums_of_the_table():
    rows = [row.rstrip(" |").split(" | ") for rows, _ in read_rows().values() for row in rows]
    wrong, rejected, named, right, accepted, mutants, caught, equivalent = map(
        sum, zip(*(map(int, row[2:]) for row in rows), strict=True)
    )
    assert rejected == wrong and accepted == right and caught + equivalent == mutants
    told = (
        f"The {len(rows)} exercises are tested on answers: of {wrong} wrong ones all are rejected and {named} named, "
        f"of {right} right ones none is rejected, and of {mutants} one-place changes to a right answer {caught} are "
        f"rejected; the other {equivalent} are"
    )
    assert told in (ROOT / "README.md").read_text()


@each_exercise
def test_three_hints_and_no_two_mistakes_without_a_place_to_read(module, name):
    exercise = load(module)[0][name]
    assert len(exercise.hints) == 3 and all(exercise.hints)
    assert exercise.name == name and exercise.see
    assert all(known.name for known in exercise.mistakes)


@each_exercise
def test_the_sections_that_messages_point_to_exist(module, name):
    exercise = load(module)[0][name]
    for place in {exercise.see, *(mistake.see for mistake in exercise.mistakes if mistake.see)}:
        chapter, kind, number = re.fullmatch(r"(\d\d)(?:, (exercise)| §) ?(\d+)", place).groups()
        (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
        text = "\n".join(
            cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
        )
        heading = rf"^(### |\*\*){number}\. " if kind else rf"^## {number}\. "
        assert re.search(heading, text, re.MULTILINE), place


@each_module
def test_a_module_is_short(module):
    assert len((ROOT / "minimamba" / "checks" / f"{module}.py").read_text().splitlines()) <= 300


@each_master
def test_a_master_passes_and_its_stubs_fail(path):
    master = nbformat.read(path, as_version=4)
    solved = run(master)
    assert len(solved) >= 3 and not any(solved)
    unsolved = run(nbformat.reads(generator().student(master), as_version=4))
    assert len(unsolved) == len(solved)
    assert all(failed is not None and failed.mistake == "not written" for failed in unsolved)


@each_master
def test_the_students_notebook_is_made_of_the_master(path):
    expected = generator().student(nbformat.read(path, as_version=4))
    assert (NOTEBOOKS / path.name).read_text() == expected, "python notebooks/exercises/generate.py"
    assert "SOLUTION" not in expected


@each_master
def test_every_exercise_tells_its_difficulty_its_minutes_and_what_it_teaches(path):
    notebook = nbformat.read(path, as_version=4)
    heads = [cell.source for cell in notebook.cells if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    assert 3 <= len(heads) <= 6
    for head in heads:
        first, second = head.splitlines()[:2]
        assert any(mark in first for mark in ("●○○", "●●○", "●●●")) and "minutes" in first
        assert second.startswith("*Teaches ")
    assert all(cell.get("id") for cell in notebook.cells)
    assert not any(cell.get("outputs") for cell in notebook.cells)
