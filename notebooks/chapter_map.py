"""Draw the README's picture, one panel for each part of the book: python notebooks/chapter_map.py

Every curve is computed: impulse responses, a selective state, the values in a tree of partial scans.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from minimamba import plotting, selective_scan

COLORS = plotting.COLORS


def impulse_responses(ax):
    """Part I: what a linear system remembers of one impulse, by eigenvalue."""
    t = np.linspace(0, 12, 400)
    for eigenvalue, color in ((-0.25, COLORS["h"]), (-1.5, COLORS["B"]), (-0.3 + 2j, COLORS["y"])):
        ax.plot(t, np.exp(eigenvalue * t).real, color=color, label=f"λ = {eigenvalue:g}".replace("j", "i"))
    ax.set(title="I  A state remembers", xlabel="time since the impulse", ylabel="state")
    ax.legend()


def selective_state(ax):
    """Part II: one selective state keeps the marked inputs and lets the noise between them pass."""
    rng = np.random.default_rng(3)
    length, marked = 48, [6, 22, 37]
    u = 0.35 * rng.standard_normal(length)
    u[marked] = [1.0, -0.8, 0.6]
    delta = np.full(length, 0.005)
    delta[marked] = 3.0
    step, x = (torch.from_numpy(v)[None, :, None] for v in (delta, u / np.maximum(delta, 1)))
    one = torch.ones(1, length, 1, dtype=torch.float64)
    h = selective_scan(x, step, torch.tensor([[-1.0]], dtype=torch.float64), one, one)[0, :, 0]
    ax.vlines(range(length), 0, u, color=COLORS["z"], linewidth=1.5)
    ax.vlines(marked, 0, u[marked], color=COLORS["delta"], linewidth=4, label="large Δ: take it in")
    ax.plot(h, color=COLORS["h"], drawstyle="steps-post", label="state")
    ax.set(title="II  Selection decides what", xlabel="step", ylabel="input and state")
    ax.legend(loc="upper right")


def partial_scans(ax):
    """Part III: Hillis and Steele's scan of eight steps in three levels."""
    values = np.arange(1, 9)
    for level in range(4):
        for i, value in enumerate(values):
            ax.text(i, -level, str(value), ha="center", va="center", fontsize=12, zorder=3,
                    bbox={"boxstyle": "circle,pad=0.3", "facecolor": "white", "edgecolor": COLORS["h"]})  # fmt: skip
            if level < 3:
                ax.plot([i, i], [-level, -level - 1], color=COLORS["z"], linewidth=1)
                if i >= 2**level:
                    ax.plot([i - 2**level, i], [-level, -level - 1], color=COLORS["u"], linewidth=1.5)
        reach = 2**level
        values = np.concatenate([values[:reach], values[reach:] + values[:-reach]])
    ax.set(
        title="III  For parallel hardware: eight steps in three levels",
        xlabel="step",
        ylabel="level",
        xlim=(-0.6, 7.6),
        ylim=(-3.5, 0.5),
    )
    ax.set_yticks([0, -1, -2, -3], ["0", "1", "2", "3"])
    ax.grid(False)


if __name__ == "__main__":
    plotting.use_style()
    figure, axes = plt.subplots(1, 3, figsize=(14.5, 3.8))
    for ax, draw in zip(axes, (impulse_responses, selective_state, partial_scans), strict=True):
        draw(ax)
    figure.savefig(Path(__file__).with_name("chapters.png"), dpi=110, metadata={"Software": None})
