"""Make the students' notebooks from the masters: python notebooks/exercises/generate.py

Between `### BEGIN SOLUTION` and `### END SOLUTION` (nbgrader's marks) the solution gives way to a stub. Cells that
check or draw an answer get the tag raises-exception: while nothing is written, they fail, and "Run All" goes on.
The same master gives the same bytes.
"""

import re
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION", re.MULTILINE | re.DOTALL)


def student(master):
    """Return the student's notebook of a master notebook, as text."""
    notebook = nbformat.reads(nbformat.writes(master), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(stub, cell.source)
            cell.outputs, cell.execution_count = [], None
            if re.search(r"^check\.(?!hint)", cell.source, re.MULTILINE):
                cell.metadata["tags"] = ["raises-exception"]
    return nbformat.writes(notebook) + "\n"


def stub(match):
    """In a function the stub raises; at the top level a line above the marks, `z = ...`, is the stub."""
    return f"{match[1]}raise NotImplementedError  # your code here" if match[1] else "# your code here"


if __name__ == "__main__":
    for path in sorted((HERE / "masters").glob("*.ipynb")):
        (HERE / path.name).write_text(student(nbformat.read(path, as_version=4)), encoding="utf-8")
        print(path.name)
