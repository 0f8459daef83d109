"""Make executed notebooks reproducible: drop widget views, widget state and the interpreter's exact version.

Usage: python notebooks/clean.py NOTEBOOK...   (`make notebooks` calls it)
"""

import os
import sys
from pathlib import Path

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(path):
    """Rewrite the notebook at `path` in place without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    # The interpreter's version would change with each machine that executes the book.
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if WIDGET not in o.get("data", {})])
    temporary = path.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def joined(outputs):
    """Join neighbouring pieces of one stream: where a print is split depends on when the kernel flushed."""
    result = []
    for output in outputs:
        last = result[-1] if result else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            result.append(output)
    return result


if __name__ == "__main__":
    for name in sys.argv[1:]:
        clean(Path(name))
