"""Figures: one style, one colour per symbol through the whole book, and a way to show a module's source."""

import inspect
from pathlib import Path

# Okabe and Ito's palette. A symbol keeps its colour in every chapter.
COLORS = {
    "u": "#0072B2",  # input: blue
    "y": "#D55E00",  # output: vermillion
    "h": "#009E73",  # state: green
    "delta": "#CC79A7",  # step size: purple
    "A": "#000000",  # state matrix: black
    "B": "#56B4E9",  # input map: sky blue
    "C": "#E69F00",  # output map: orange
    "kernel": "#000000",
    "z": "#777777",  # gate, and whatever stays in the background: grey
}


def use_style():
    """Give every figure of this process the look of the book (`book.mplstyle`)."""
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).with_name("book.mplstyle"))


def show_source(*objects):
    """Show the source of functions, classes or modules, highlighted, as they stand in the installed package.

    Chapters show code this way instead of pasting it, so that prose and module cannot drift apart.
    """
    from IPython.display import Code, display

    for obj in objects:
        display(Code(inspect.getsource(inspect.unwrap(obj)).rstrip(), language="python"))
