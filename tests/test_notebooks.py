"""The rules every chapter keeps, read off the committed notebooks; nbval runs their cells."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def read(path):
    return json.loads(path.read_text())["cells"]


def text(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [cell for cell in read(path) if cell["cell_type"] == "code"]


def prose(path):
    return "\n".join(text(cell) for cell in read(path) if cell["cell_type"] == "markdown")


each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def test_every_chapter_is_there():
    assert {p.stem for p in CHAPTERS} >= {
        "00_attention", "01_continuous_ssm", "02_discretization", "03_hippo", "04_convolution", "05_s4",
        "06_selective_ssm", "07_sequential_scan", "08_parallel_scan", "09_scan_gradient", "10_triton_scan",
        "11_fused_scan", "12_mamba_block", "13_language_model", "15_training",
    }  # fmt: skip


@each_chapter
def test_a_chapter_begins_with_the_module_of_its_name(path):
    name = path.stem[3:]
    assert (ROOT / "minimamba" / f"{name}.py").is_file()
    assert text(code_cells(path)[0]).startswith(f"from minimamba import {name}\n")


@each_chapter
def test_every_cell_was_run_in_order_and_quietly(path):
    cells = code_cells(path)
    assert all(text(cell).strip() for cell in cells)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not re.search(r"/(?:home|Users|root|work|tmp)/\w+", json.dumps(outputs))
    assert path.stat().st_size < 1.5e6


@each_chapter
def test_cells_are_short_and_figures_are_shown(path):
    for cell in code_cells(path):
        assert len(text(cell).splitlines()) <= 30, text(cell)[:80]
        images = [o for o in cell["outputs"] if any(k.startswith("image/") for k in o.get("data", {}))]
        assert all("image/png" in o["data"] for o in images)
        assert not images or text(cell).rstrip().endswith("plt.show()"), text(cell)[-80:]


@each_chapter
def test_a_chapter_teaches_to_the_recipe(path):
    words = prose(path)
    first = text(read(path)[0])
    assert first.startswith(f"# {path.stem[:2]} ")
    for expected in ("minutes", "seconds", f"minimamba/{path.stem[3:]}.py"):
        assert expected in first, expected
    assert len(re.findall(r"\*\*Predict", words)) >= 3
    assert len(re.findall(r"<summary>[^<]*[Ss]olution", words)) >= 3, "folded solutions"
    assert words.count("<details>") == words.count("</details>")
    for heading in ("What you learned", "Next", "Sources"):
        assert re.search(rf"^#+ .*{heading}", words, re.MULTILINE) or f"**{heading}" in words, heading
    if path.stem[3:] in ("sequential_scan", "parallel_scan", "scan_gradient", "triton_scan", "fused_scan"):
        assert re.search("spot the bug", words, re.IGNORECASE)


@each_chapter
def test_links_between_chapters_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", prose(path)):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@each_chapter
def test_no_function_of_the_module_is_pasted(path):
    module = (ROOT / "minimamba" / f"{path.stem[3:]}.py").read_text()
    own = set(re.findall(r"^(?:def|class) (\w+)", module, re.MULTILINE))
    for cell in code_cells(path):
        assert not own & set(re.findall(r"^(?:def|class) (\w+)", text(cell), re.MULTILINE))
