"""Make executed notebooks reproducible and small: drop widget views, widget state and the interpreter's exact version,
and store figures with a palette.

Usage: python notebooks/clean.py NOTEBOOK...   (`make notebooks` calls it)
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(path):
    """Rewrite the notebook at `path` in place without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    # The interpreter's version would change with each machine that executes the book.
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if WIDGET not in o.get("data", {})])
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = with_palette(output.data["image/png"])
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


def with_palette(png):
    """Store a figure (PNG in base64) in 256 colours: a third of the size, and nobody sees the difference.

    Half of the palette are the most frequent colours, exactly: what is flat stays as it is. The other half is spread
    over all, for the edges of letters and lines.
    """
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    pixels = np.asarray(image.convert("RGB"))
    colors, where, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    palette = colors[np.argsort(-counts, kind="stable")[:256]]
    if len(colors) > 256:
        spread = image.convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette = np.concatenate([palette[:128], np.reshape(spread.getpalette(), (-1, 3))])
    nearest = np.array([np.square(palette - color.astype(int)).sum(axis=1).argmin() for color in colors], np.uint8)
    few = Image.fromarray(nearest[where.ravel()].reshape(pixels.shape[:2]), "P")
    few.putpalette(palette.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    few.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        clean(Path(name))
