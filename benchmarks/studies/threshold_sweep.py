"""Sweeps the thresholds of the textbooks' experiment: which of them train, which best?

Trains the network of `mlp_regression.py` (read that one first) with 13
norms per leaf, 13 global norms and 13 ranges of values from 0.1 to 100, and with each
of the 13 x 13 pairs of a global norm and a range. A threshold is an ordinary argument
of the compiled program, so one program trains them all, about a hundred runs at a time.

Run:
    python benchmarks/studies/threshold_sweep.py          # 16 seeds, under two minutes
    python benchmarks/studies/threshold_sweep.py --quick  # 5 thresholds, a few seconds

Expected (median over 16 seeds of the MSE on the test half):
    norm per leaf    best about 15, at 0.6 to 1;  all converge from 0.2 to 5
    global norm      best about 7.5, at 3 to 6;   all converge from 1 to 18
    values           best about 7.5, at 0.2;      all converge from 0.1 to 2
    both             best about 7, with values within 0.2 and a global norm of 10 to 60
    neither          NaN
The best is picked on the test half here, to compare; for a real model use a third half.
One figure is written: the three sweeps, and a heat map of the pairs.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import _figures
import _study
import numpy as np
from _figures import LIMIT, STYLES
from _regression import CONVERGED, Setting, train
from _regression_data import regression_data
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

FULL = {"seeds": 16, "epochs": 100}
QUICK = {"seeds": 2, "epochs": 30}
CHUNK = 8  # settings trained together: with 16 seeds more in one program are slower


class Sweep(NamedTuple):
    """Final mean squared errors; the last row and column of `pairs` do not clip."""

    leaf_norms: np.ndarray  # [train and test, thresholds, seeds]
    pairs: np.ndarray  # [train and test, global norms + 1, ranges + 1, seeds]

    def by_name(self) -> dict[str, np.ndarray]:
        """Gives the sweeps of one threshold, each `[2, thresholds, seeds]`."""
        return {
            "norm per leaf": self.leaf_norms,
            "global norm": self.pairs[:, :-1, -1],
            "values within": self.pairs[:, -1, :-1],
        }


def sweep(thresholds, seeds: int, epochs: int) -> Sweep:
    """Trains all settings, chunk after chunk, and keeps their final errors."""
    ends = [*thresholds, math.inf]
    settings = [Setting(max_leaf_norm=norm) for norm in thresholds]
    settings += [
        Setting(max_norm=norm, max_value=value) for norm in ends for value in ends
    ]
    # Fill the last chunk up: chunks of one size need one compiled program.
    filled = settings + settings[-1:] * (-len(settings) % CHUNK)
    data, errors = regression_data(), []
    with _study.progress_bar(total=len(filled) // CHUNK * epochs, unit="epochs") as bar:
        for start in range(0, len(filled), CHUNK):
            chunk = filled[start : start + CHUNK]
            history = train(chunk, seeds, epochs, data, bar.update)
            errors.append([history.train_mse[..., -1], history.test_mse[..., -1]])
    final = np.concatenate(errors, axis=1)[:, : len(settings)]
    leaf_norms, pairs = np.split(final, [len(thresholds)], axis=1)
    return Sweep(leaf_norms, pairs.reshape(2, len(ends), len(ends), seeds))


def converged(errors) -> np.ndarray:
    """Tells where every seed ends below 100 on the training half."""
    return (errors[0] < CONVERGED).all(axis=-1)


def median_on_test(errors) -> np.ndarray:
    """Takes the median over the seeds on the test half; a NaN is infinite."""
    return _study.median(errors[1], axis=-1)


def print_sweep(thresholds, result: Sweep) -> None:
    """Prints one line per threshold, then the best of each sweep."""
    sweeps, rows = result.by_name(), []
    for i, threshold in enumerate(thresholds):
        row = [f"{threshold:.3g}"]
        for errors in sweeps.values():
            mark = " *"[int(converged(errors)[i])]
            row.append(_study.short(median_on_test(errors)[i]) + mark)
        rows.append(row)
    print("Median of the test MSE; * all seeds below 100 on the training half")
    _study.print_table(["threshold", *sweeps], rows)
    for name, errors in sweeps.items():
        middle = median_on_test(errors)
        best = middle.argmin()
        print(f"{name}: best {_study.short(middle[best])} at {thresholds[best]:.3g}")
    print(best_pair(thresholds, result)[1])


def best_pair(thresholds, result: Sweep) -> tuple[tuple[int, int], str]:
    """Finds the best pair of global norm and range, and names it."""
    middle = median_on_test(result.pairs)[:-1, :-1]
    row, column = (int(i) for i in np.unravel_index(middle.argmin(), middle.shape))
    text = (
        f"both: best {_study.short(middle[row, column])} at global norm"
        f" {thresholds[row]:.3g} and values within {thresholds[column]:.3g}"
    )
    return (row, column), text


def plot_sweep(thresholds, result: Sweep) -> Figure:
    """Draws the sweeps of one threshold, and the heat map of both together."""
    figure, axes = _figures.new_figure(1, 2, (15, 6.5))
    left, right = axes[0]
    for style, (name, errors) in zip(STYLES, result.by_name().items(), strict=False):
        _figures.plot_band(left, thresholds, errors[1].T, style, name)
        good, middle = converged(errors), median_on_test(errors)
        left.plot(thresholds[good], middle[good], "o", color=style["color"])
    left.plot([], [], "o", color="grey", label="every seed below 100 on train")
    left.axhline(CONVERGED, label=f"{CONVERGED:g}", **LIMIT)
    left.set(xscale="log", xlabel="threshold")
    left.set(yscale="log", ylim=(3, 1e5), ylabel="MSE on the test half")
    left.set_title("One clip: median of the seeds and quartiles")
    left.legend(loc="upper left")
    plot_heat_map(figure, right, thresholds, result)
    figure.suptitle(
        "The threshold matters: too small learns too slowly, too large steps too far,"
        "\nand a range of about one to two decades in between converges"
    )
    return figure


def plot_heat_map(figure: Figure, ax, thresholds, result: Sweep) -> None:
    """Colours each pair by its error, and outlines those that always converge."""
    names = [*(f"{threshold:.3g}" for threshold in thresholds), "none"]
    row, column = best_pair(thresholds, result)[0]
    middle = median_on_test(result.pairs)
    ax.grid(False)
    # A network that predicts the mean has an MSE of 26269; bright is bad.
    image = ax.imshow(middle, norm=LogNorm(5, 3e4), cmap="viridis", origin="lower")
    label = "median MSE on the test half, less is better (cross: NaN)"
    figure.colorbar(image, ax=ax, label=label)
    for y, x in np.argwhere(np.isinf(middle)):
        ax.plot(x, y, "x", color="black", markersize=12)
    outline(ax, converged(result.pairs))
    ax.plot(column, row, "*", color="white", markersize=14, markeredgecolor="black")
    ax.set_xticks(range(len(names)), names, rotation=60)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="values within", ylabel="global norm")
    ax.set_title("Two clips: star: the best; outline: every seed below 100 on train")


def outline(ax, region) -> None:
    """Draws a line between the cells of a region and all others."""
    inside, style = np.pad(region, 1), {"color": "#D55E00", "linewidth": 2.5}
    for row, column in np.argwhere(inside[1:] != inside[:-1]):
        ax.plot([column - 1.5, column - 0.5], [row - 0.5] * 2, **style)
    for row, column in np.argwhere(inside[:, 1:] != inside[:, :-1]):
        ax.plot([column - 0.5] * 2, [row - 1.5, row - 0.5], **style)


def main(arguments: Sequence[str] | None = None) -> Sweep:
    """Runs the sweep, prints the table, and writes the figure."""
    start = time.perf_counter()
    text = "Sweeps the thresholds of the experiment in mlp_regression.py."
    parser = _study.option_parser(text, FULL, QUICK)
    options = _study.parse_options(parser, arguments, QUICK)
    thresholds = np.logspace(-1, 2, 5 if options.quick else 13)
    result = sweep(thresholds, options.seeds, options.epochs)
    time_taken = _study.took(start)
    print_sweep(thresholds, result)
    runs = result.leaf_norms[0].size + result.pairs[0].size
    print(f"{runs} runs {time_taken}.")
    figures = {"threshold_sweep": partial(plot_sweep, thresholds, result)}
    _figures.save_all(figures, options.out)
    return result


if __name__ == "__main__":
    main()
