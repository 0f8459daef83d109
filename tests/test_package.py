"""The package as others meet it: its wheel, a machine without Triton, the README's example, the rules of the tree."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.stem for path in (ROOT / "minimamba").glob("[a-z]*.py"))


def python(code, cwd, **environment):
    """Run `code` in a fresh interpreter without our environment's TRITON_INTERPRET. -> stdout"""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:minimamba", "-c", code],
        cwd=cwd, env=inherited | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that pip builds from this tree, copied first so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        source, target = ROOT / name, folder / "tree" / name
        if source.is_file() and name.split("/")[0] not in ("notebooks", "tests"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        elif source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        folder / "tree",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_imports_from_a_folder_that_is_not_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels").glob("*.c")]:
        assert (tmp_path / "site" / "minimamba" / "kernels" / path.name).is_file()
    assert (tmp_path / "site" / "minimamba" / "book.mplstyle").is_file()
    assert (tmp_path / "site" / "minimamba" / "data" / "JapaneseVowels_TRAIN.ts").is_file()
    imports = "; ".join(
        [f"import minimamba.{name}" for name in MODULES if not name.startswith("__")]
        + [f"import minimamba.kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("*.py"))]
    )
    imports += "; " + "; ".join(
        f"import minimamba.checks.{path.stem}" for path in sorted((ROOT / "minimamba" / "checks").glob("*.py"))
    )
    use = "import minimamba; minimamba.MambaLM.from_pretrained(); print(minimamba.__file__)"
    where = python(f"{imports}; {use}", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert (tmp_path / "site" / "minimamba" / "pretrained" / "README.md").is_file()
    assert Path(where).is_relative_to(tmp_path / "site")


def test_kernels_are_found_where_git_wrote_the_link_as_text(tmp_path):
    (tmp_path / "minimamba").mkdir()
    (tmp_path / "kernels").mkdir()
    for folder in ("minimamba", "kernels"):
        for path in (ROOT / folder).glob("*.py"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "minimamba" / "kernels").write_text("../kernels")
    where = python(
        "import minimamba.kernels.selective_scan as k; print(k.__file__)", tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert Path(where) == tmp_path / "kernels" / "selective_scan.py"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, minimamba
u = torch.ones(1, 5, 2)
arguments = u, u, -torch.ones(2, 3), torch.ones(1, 5, 3), torch.ones(1, 5, 3)
print(minimamba.selective_scan(*arguments).shape)
try:
    minimamba.selective_scan(*arguments, method="triton")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_works_without_triton(tmp_path):
    shape, error = python(WITHOUT_TRITON, tmp_path).splitlines()
    assert shape == "torch.Size([1, 5, 2])"
    assert "method=" in error and "triton" in error.lower()


TRITON_FIRST = """
import triton, torch, minimamba
u = torch.ones(1, 5, 2)
arguments = u, u, -torch.ones(2, 3), torch.ones(1, 5, 3), torch.ones(1, 5, 3)
print(minimamba.selective_scan(*arguments).shape)
try:
    print(minimamba.selective_scan(*arguments, method="triton").shape)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_works_where_triton_was_imported_first(tmp_path):
    lines = python(TRITON_FIRST, tmp_path, CUDA_VISIBLE_DEVICES="").splitlines()
    assert lines[0] == "torch.Size([1, 5, 2])"
    assert "TRITON_INTERPRET" in lines[1] and "active drivers" not in lines[1]
    lines = python(TRITON_FIRST, tmp_path, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1").splitlines()
    assert lines == ["torch.Size([1, 5, 2])"] * 2


def test_importing_does_not_import_triton_or_matplotlib(tmp_path):
    code = "import sys, minimamba; print([m for m in ('triton', 'matplotlib', 'scipy', 'sklearn') if m in sys.modules])"
    assert python(code, tmp_path) == "[]"


def test_the_readme_example_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        python(block, tmp_path)


def test_public_functions_document_shapes_and_source():
    import minimamba

    for name in minimamba.__all__:
        text = getattr(minimamba, name).__doc__
        assert text and "Source:" in text and re.search(r"\(.*[BLDN].*\)", text), name


def test_modules_are_short():
    for path in [*(ROOT / "minimamba").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path.name


def test_no_absolute_paths_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    pattern = re.compile(r"/(?:home|Users|root|work)/\w+")
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".ipynb", "") and path.is_file() and name != "LICENSE":
            assert not pattern.search(path.read_text()), name
