"""Draws what `no_knob.py` has stored: how near does each rule come to a tuned clip?

    python benchmarks/studies/no_knob_figure.py docs/figures/no_knob.png

Nothing is trained. A dot is a task at one learning rate, a bar the median of them, and
what is at the right edge is beyond it.
"""

import sys
from typing import Any

import _figures
import no_knob
import numpy as np
from _small_tasks import TASKS
from matplotlib.figure import Figure

from benchmarks import _results

RULES = {
    "relative step": "clip_by_relative_step",
    "streaming_quantile(0.5)": "streaming_quantile",
    "adagc": "adagc",
    "autoclip(10)": "autoclip",
    "zclip": "zclip",
    "global norm 1": "global norm of 1",
    "none": "no clip",
}
LOW, EDGE = 0.5, 30.0  # of the axis, as ratios
SEEDS = 16


def load() -> list[dict[str, Any]]:
    """Reads the rows of the whole study, without those of longer runs."""
    paths = sorted(_results.FOLDER.glob("*/no_knob.jsonl"))
    rows = [row for path in paths for row in _results.load(path)]
    return [row for row in rows if row["seeds"] == SEEDS]


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Draws a panel for each optimizer, a line for each rule."""
    figure, axes = _figures.new_figure(2, 1, (5.2, 6.4), sharex=True)
    rng = np.random.default_rng(0)
    for ax, (title, moments) in zip(
        axes[:, 0], no_knob.OPTIMIZERS.items(), strict=True
    ):
        own = [row for row in rows if TASKS[row["task"]]().moments is moments]
        for i, rule in enumerate(RULES):
            ratios = no_knob.judge(own, rule).ratios.ravel()
            x = np.clip(ratios, LOW, EDGE)
            y = -i + rng.uniform(-0.2, 0.2, len(x))
            ax.plot(x, y, ".", color="#0072B2", alpha=0.6, clip_on=False)
            ax.plot([np.median(x)] * 2, [-i - 0.35, -i + 0.35], "k", linewidth=3)
        ax.axvspan(LOW, no_knob.NEAR, color="0.9", zorder=0)
        ax.set_yticks(-np.arange(len(RULES)), RULES.values())
        ax.set(xscale="log", xlim=(LOW, EDGE), title=title)
        ax.set_xticks([0.5, 1, 2, 5, 10, EDGE], ["0.5", "1", "2", "5", "10", "> 30"])
        ax.minorticks_off()
    axes[-1, 0].set_xlabel("final loss over that of the best of 13 thresholds")
    return figure


if __name__ == "__main__":
    plot(load()).savefig(sys.argv[1], dpi=120)
