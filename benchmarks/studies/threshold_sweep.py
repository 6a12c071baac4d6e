"""Sweeps the thresholds of the textbooks' experiment: which of them train, which best?

Trains the network of `mlp_regression.py` (same folder; read that one first) with 13
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
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from mlp_regression import (
    CONVERGED,
    Setting,
    new_figure,
    option_parser,
    parse_options,
    plot_band,
    progress_bar,
    quartiles,
    regression_data,
    short,
    train,
)

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


def sweep(thresholds, learning_rate: float, seeds: int, epochs: int) -> Sweep:
    """Trains all settings, chunk after chunk, and keeps their final errors."""
    ends = [*thresholds, math.inf]
    settings = [Setting(learning_rate, max_leaf_norm=norm) for norm in thresholds]
    settings += [
        Setting(learning_rate, max_norm=norm, max_value=value)
        for norm in ends
        for value in ends
    ]
    # Fill the last chunk up: chunks of one size need one compiled program.
    filled = settings + settings[-1:] * (-len(settings) % CHUNK)
    data, errors = regression_data(), []
    with progress_bar(total=len(filled) // CHUNK * epochs, unit="epochs") as bar:
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
    """Takes the median over the seeds on the test half; NaN is the worst value."""
    return quartiles(errors[1], axis=-1)[1]


def print_table(thresholds, result: Sweep) -> None:
    """Prints one line per threshold, then the best of each sweep."""
    sweeps = result.by_name()
    columns = "{:>9}" + " {:>15}" * len(sweeps)
    print("Median of the test MSE; * all seeds below 100 on the training half")
    print(columns.format("threshold", *sweeps))
    for i, threshold in enumerate(thresholds):
        cells = [
            short(median_on_test(errors)[i]) + " *"[int(converged(errors)[i])]
            for errors in sweeps.values()
        ]
        print(columns.format(f"{threshold:.3g}", *cells))
    for name, errors in sweeps.items():
        median = median_on_test(errors)
        best = np.argmin(np.nan_to_num(median, nan=np.inf))
        print(f"{name}: best {short(median[best])} at {thresholds[best]:.3g}")
    print(best_pair(thresholds, result)[1])


def best_pair(thresholds, result: Sweep) -> tuple[tuple[int, int], str]:
    """Finds the best pair of global norm and range, and names it."""
    median = median_on_test(result.pairs)[:-1, :-1]
    best = np.argmin(np.nan_to_num(median, nan=np.inf))
    row, column = np.unravel_index(best, median.shape)
    text = (
        f"both: best {short(median[row, column])} at global norm {thresholds[row]:.3g}"
        f" and values within {thresholds[column]:.3g}"
    )
    return (int(row), int(column)), text


def plot_sweep(thresholds, result: Sweep, path: Path) -> None:
    """Draws the sweeps of one threshold, and the heat map of both together."""
    figure, (left, right) = new_figure(1, 2, figsize=(14, 6))
    left.set(xscale="log", xlabel="threshold")
    left.set(yscale="log", ylim=(3, 1e5), ylabel="MSE on test")
    for color, (name, errors) in enumerate(result.by_name().items()):
        plot_band(left, thresholds, errors[1].T, f"C{color}", name)
        good = converged(errors)
        left.plot(
            thresholds[good], median_on_test(errors)[good], "o", color=f"C{color}"
        )
    left.set_title("One clip (median, quartiles; dot: every seed below 100 on train)")
    left.legend()
    plot_heat_map(figure, right, thresholds, result)
    figure.savefig(path)


def plot_heat_map(figure, ax, thresholds, result: Sweep) -> None:
    """Colours each pair by its error, and outlines those that always converge."""
    from matplotlib.colors import LogNorm

    names = [*(f"{threshold:.3g}" for threshold in thresholds), "none"]
    (row, column), best = best_pair(thresholds, result)
    ax.set_facecolor("lightgrey")  # seen where the median is NaN
    ax.grid(False)
    image = ax.imshow(
        median_on_test(result.pairs),
        norm=LogNorm(5, 3e4),  # a network that predicts the mean has an MSE of 26269
        cmap="viridis_r",
        origin="lower",
    )
    figure.colorbar(image, ax=ax, label="median MSE on test (grey: NaN)")
    outline(ax, converged(result.pairs))
    ax.plot(column, row, "*", color="white", markersize=14, markeredgecolor="black")
    ax.set_xticks(range(len(names)), names, rotation=60)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="values within", ylabel="global norm")
    ax.set_title(f"{best} (star)\nred outline: every seed below 100 on train")


def outline(ax, region) -> None:
    """Draws a line between the cells of a region and all others."""
    inside = np.pad(region, 1)
    for row, column in np.argwhere(inside[1:] != inside[:-1]):
        ax.plot([column - 1.5, column - 0.5], [row - 0.5] * 2, color="C3", linewidth=2)
    for row, column in np.argwhere(inside[:, 1:] != inside[:, :-1]):
        ax.plot([column - 0.5] * 2, [row - 1.5, row - 0.5], color="C3", linewidth=2)


def main(arguments: Sequence[str] | None = None) -> Sweep:
    """Runs the sweep, prints the table, and writes the figure."""
    start = time.perf_counter()
    parser = option_parser(
        "Sweeps the thresholds of the experiment in mlp_regression.py.",
        quick="5 thresholds; 2 seeds and 30 epochs unless said otherwise",
    )
    options = parse_options(parser, arguments)
    thresholds = np.logspace(-1, 2, 5 if options.quick else 13)
    result = sweep(thresholds, options.learning_rate, options.seeds, options.epochs)
    seconds = time.perf_counter() - start
    print_table(thresholds, result)
    runs = result.leaf_norms[0].size + result.pairs[0].size
    print(f"{runs} runs on {jax.devices()[0].device_kind}: {seconds:.1f} s.")
    path = options.out / "threshold_sweep.png"
    plot_sweep(thresholds, result, path)
    print(f"Figure: {path}")
    return result


if __name__ == "__main__":
    main()
