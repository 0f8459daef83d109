"""The problem sets: full and empty submissions through nbgrader, wrong ones cell by cell, and no hidden test leaks."""

import contextlib
import importlib
import io
import linecache
import os
import re
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import output_from_msg
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.utils import determine_grade, is_grade, is_locked, is_solution
from traitlets.config import PyFileConfigLoader

COURSE = Path(__file__).parents[1] / "notebooks" / "assignments"
SETS = sorted(path.name for path in (COURSE / "source").iterdir())
MODULES = {name: importlib.import_module(f"submissions.{name}") for name in SETS}
SUBMISSIONS = {name: module.SUBMISSIONS for name, module in MODULES.items()}

each_set = pytest.mark.parametrize("name", SETS)
each_submission = pytest.mark.parametrize(
    "name, submission",
    [pytest.param(name, s, id=f"{name}: {s.mistake}") for name in SETS for s in SUBMISSIONS[name]],
)


def read(kind, name):
    return nbformat.read(COURSE / kind / name / f"{name}.ipynb", as_version=4)


def graded_tests(notebook):
    """{id: points} of the cells that are graded by running them."""
    return {
        cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points
        for cell in notebook.cells
        if is_grade(cell) and not is_solution(cell)
    }


def grade(notebook, where):
    """Run all cells in this process, as autograding does in a kernel. Return {test: points} and {test: its error}."""
    names, points, errors = {"__name__": "__main__"}, {}, {}
    with warnings.catch_warnings():
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                cell.outputs = outputs_of(cell.source, names, f"<{where}, cell {index}>")
                if is_grade(cell):
                    test = cell.metadata.nbgrader.grade_id
                    points[test], _ = determine_grade(cell)
                    errors[test] = "\n".join(f"{x.ename}: {x.evalue}" for x in cell.outputs if x.output_type == "error")
    return points, errors


def outputs_of(source, names, where):
    linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)  # Triton reads the source
    stderr, messages = io.StringIO(), []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        try:
            exec(compile(source, where, "exec"), names)
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            content = {"ename": type(error).__name__, "evalue": str(error), "traceback": lines}
            messages.append({"msg_type": "error", "content": content})
    if stderr.getvalue():
        messages.append({"msg_type": "stream", "content": {"name": "stderr", "text": stderr.getvalue()}})
    return [output_from_msg({"header": {"msg_type": m["msg_type"]}, **m}) for m in messages]


def needs_interpreter(name):
    if name == "ps4" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process; the set interprets them")


def with_answers(name, answers):
    """The full solution with `answers` at the end of the cells of these ids."""
    notebook = read("source", name)
    cells = {c.metadata.nbgrader.grade_id: c for c in notebook.cells if "nbgrader" in c.metadata}
    for cell_id, source in answers.items():
        assert is_solution(cells[cell_id])
        cells[cell_id].source += "\n\n\n" + source.strip("\n")
    return notebook


# --- nbgrader itself: half a minute, so one test, and the first, while another worker runs the rest -----


def test_nbgrader_releases_and_grades_every_set(tmp_path, monkeypatch):
    needs_interpreter("ps4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # nbgrader calls alembic
    shutil.copytree(COURSE / "source", tmp_path / "source")
    config = PyFileConfigLoader("nbgrader_config.py", path=str(COURSE)).load_config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.db_url = database = f"sqlite:///{tmp_path}/gradebook.db"
    api = NbGraderAPI(config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SETS:
            succeed(api.generate_assignment(name))
            check_release(tmp_path, name)
            submit(tmp_path, "full", name, read("source", name))
            submit(tmp_path, "tamperer", name, tampered(read("release", name)))
            for student in ("full", "tamperer"):
                succeed(api.autograde(name, student))
        with Gradebook(database) as gradebook:
            for name in SETS:
                check_full(gradebook, name)
                check_tamperer(gradebook, name)
    for name in SETS:
        check_restored(tmp_path, name)


def succeed(answer):
    assert answer["success"], answer["log"]


def submit(root, student, name, notebook):
    path = root / "submitted" / student / name / f"{name}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)


def tampered(notebook):
    """Nothing solved; every test but the first replaced by one that passes, one worth more, and the last deleted."""
    tests = [cell for cell in notebook.cells if is_grade(cell) and not is_solution(cell)]
    for cell in tests[1:]:
        cell.source = "pass"
    tests[2].metadata.nbgrader.points = 1000
    notebook.cells.remove(tests[-1])
    return notebook


def check_release(root, name):
    made, committed = (folder / "release" / name / f"{name}.ipynb" for folder in (root, COURSE))
    assert made.read_text() == committed.read_text(), f"nbgrader generate_assignment {name} --force"


def check_full(gradebook, name):
    submission = gradebook.find_submission(name, "full")
    by_hand = [grade for notebook in submission.notebooks for grade in notebook.grades if grade.needs_manual_grade]
    assert by_hand and submission.max_score == 100
    assert submission.score == 100 - sum(grade.max_score for grade in by_hand)
    for grade in by_hand:  # as the instructor does
        grade.manual_score = grade.max_score
    gradebook.db.commit()
    assert gradebook.find_submission(name, "full").score == 100


def check_tamperer(gradebook, name):
    submission = gradebook.find_submission(name, "tamperer")
    assert (submission.score, submission.max_score) == (0, 100)
    assert not submission.needs_manual_grade  # an answer that was not touched has no points


def check_restored(root, name):
    source = read("source", name)
    sources = {cell.metadata.nbgrader.grade_id: cell.source for cell in source.cells if "nbgrader" in cell.metadata}
    graded = nbformat.read(root / "autograded" / "tamperer" / name / f"{name}.ipynb", as_version=4)
    assert graded_tests(graded) == graded_tests(source)
    for cell in graded.cells:
        if is_grade(cell) and not is_solution(cell):
            assert cell.source.endswith(sources[cell.metadata.nbgrader.grade_id])


# --- cell by cell, in this process ---------------------------------------------------------------------


@each_set
def test_the_full_solution_gets_all_points(name):
    needs_interpreter(name)
    notebook = read("source", name)
    points, errors = grade(notebook, name)
    assert points == graded_tests(notebook), "".join(errors.values())


@each_set
def test_the_empty_notebook_gets_none(name):
    needs_interpreter(name)
    points, errors = grade(read("release", name), f"{name}, empty")
    assert sum(points.values()) == 0
    assert not any(points.values()) and all(errors[test] for test in points if test != "references")


@each_set
def test_a_student_can_solve_what_was_released(name):
    """The released tests need nothing that is hidden: a solved release passes them all."""
    needs_interpreter(name)
    solved = {cell["id"]: cell.source for cell in read("source", name).cells if is_solution(cell)}
    notebook = read("release", name)
    for cell in notebook.cells:
        cell.source = solved.get(cell["id"], cell.source)
    points, errors = grade(notebook, f"{name}, released")
    assert points == graded_tests(notebook), errors


@each_submission
def test_a_wrong_submission_gets_the_points_it_deserves(name, submission):
    needs_interpreter(name)
    notebook = with_answers(name, submission.answers)
    points, errors = grade(notebook, f"{name}, {submission.mistake}")
    full = graded_tests(notebook)
    assert {test for test in full if points[test] < full[test]} == set(submission.loses), errors
    assert sum(points.values()) == submission.points
    assert all(errors[test] for test in submission.loses)


@each_set
def test_right_answers_in_another_style_and_with_warnings_lose_nothing(name):
    needs_interpreter(name)
    answers = MODULES[name].RIGHT
    solutions = [c.metadata.nbgrader.grade_id for c in read("source", name).cells if is_solution(c) and not is_grade(c)]
    assert sorted(answers) == sorted(solutions)
    answers = answers | {solutions[0]: "import warnings\nwarnings.warn('mind the gap')\n" + answers[solutions[0]]}
    notebook = with_answers(name, answers)
    points, errors = grade(notebook, f"{name}, another style")
    assert points == graded_tests(notebook), errors


@each_set
def test_at_least_ten_wrong_submissions_and_every_test_fails_one(name):
    assert len(SUBMISSIONS[name]) >= 10
    failed = {test for submission in SUBMISSIONS[name] for test in submission.loses}
    assert failed == graded_tests(read("source", name)).keys() - {"references"}


def test_a_failure_of_a_hidden_test_says_what_was_expected_and_what_came():
    answers = {"weight": "weight = lambda A, delta: torch.expm1(delta * A) / A * (A > -4)"}  # right in what is shown
    _, errors = grade(with_answers("ps1", answers), "ps1, hidden")
    for word in ("weight at A = ", "expected [", "got      [", "largest difference"):
        assert word in errors["weight-value"], errors


# --- the notebooks as such -----------------------------------------------------------------------------


@each_set
def test_a_set_has_a_hundred_points_told_in_its_headings(name):
    notebook = read("source", name)
    per_task, told, title = [], [], notebook.cells[0].source
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (
            head := re.match(r"## \d\. .* (●..) · (\d+) points · \d+ minutes", cell.source)
        ):
            told.append(int(head[2]))
            per_task.append(0)
        elif is_grade(cell) and per_task:
            per_task[-1] += cell.metadata.nbgrader.points
    assert told == per_task and sum(told) == 100 and 5 <= len(told) <= 6
    assert [int(x) for x in re.findall(r"^\| \d .* \| (\d+) \|", title, re.MULTILINE)] == told
    for word in ("100 points", "Rules", "To submit", "teaches"):
        assert word in title


@each_set
def test_cells_have_ids_the_third_schema_and_no_outputs(name):
    notebook = read("source", name)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(x.startswith(f"{name}-") for x in ids)
    for cell in notebook.cells:
        if "nbgrader" in cell.metadata:
            assert cell.metadata.nbgrader.schema_version == 3
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        if is_grade(cell) and cell.cell_type == "code":
            assert is_locked(cell) and cell.source.count("### BEGIN HIDDEN TESTS") == 1
            if (points := cell.metadata.nbgrader.points) > 0:
                assert cell.source.startswith(f"# {points} point")
    manual = [cell for cell in notebook.cells if is_grade(cell) and is_solution(cell)]
    assert manual
    for cell in manual:  # the rubric's points add up
        assert cell.source.startswith("### BEGIN SOLUTION") and cell.source.endswith("### END SOLUTION")
        parts = [int(x) for x in re.findall(r"^- \*\*(\d+) points?", cell.source, re.MULTILINE)]
        assert sum(parts) == cell.metadata.nbgrader.points


@each_set
def test_the_release_shows_neither_solutions_nor_hidden_tests(name):
    text = (COURSE / "release" / name / f"{name}.ipynb").read_text()
    source, release = read("source", name), read("release", name)
    for word in ("HIDDEN", "SOLUTION", "Forbidden", "closed()", "hidden_", "reference", "rubric"):
        assert word not in text.replace("hidden_matrix", "").replace(f"{name}-references", "").replace(
            '"references"', ""
        )
    assert [cell["id"] for cell in source.cells] == [cell["id"] for cell in release.cells]
    for ours, theirs in zip(source.cells, release.cells, strict=True):
        for mark in ("HIDDEN TESTS", "SOLUTION"):
            region = re.compile(rf"### BEGIN {mark}\n(.*?)### END {mark}", re.DOTALL)
            own = lambda text: {line.strip() for line in text.splitlines() if len(line.strip()) > 25}
            hidden = own("\n".join(region.findall(ours.source))) - own(region.sub("", ours.source))
            assert not hidden & own(theirs.source)


@each_set
def test_a_released_set_is_a_plain_notebook(name):
    imports = re.findall(
        r"^(?:import|from) (\w+)", "\n".join(c.source for c in read("release", name).cells), re.MULTILINE
    )
    assert set(imports) <= {"torch", "numpy", "minimamba", "triton", "os"}


def test_the_hidden_head_is_the_same_in_every_set():
    heads = set()
    for name in SETS:
        (cell,) = [c for c in read("source", name).cells if c["id"] == f"{name}-references"]
        heads.add(cell.source.partition("def log_uniform")[0])
    assert len(heads) == 1


@each_set
def test_the_readme_tells_the_points(name):
    cells = [cell for cell in read("source", name).cells if is_grade(cell)]
    run = [cell.metadata.nbgrader.points for cell in cells if not is_solution(cell) and cell.metadata.nbgrader.points]
    words = [cell.metadata.nbgrader.points for cell in cells if is_solution(cell)]
    row = f"| {sum(run)} points, {len(run)} tests | {sum(words)} points, {len(words)} questions |"
    (line,) = [line for line in (COURSE / "README.md").read_text().splitlines() if line.startswith(f"| [{name}]")]
    assert line.endswith(row), row
