"""Trains a small network on unscaled targets: NaN without a clip, fine with one.

This is the textbooks' experiment. The targets of the regression reach from -400 to
400, so the first gradients are in the hundreds, and SGD with a learning rate of 0.01
and momentum 0.9 throws the network out of its range within a dozen steps. Compared are
no clip, six clips, and the two other remedies that textbooks name (a small learning
rate, a standardised target). One of the clips is a trap: a global norm of 600, about
that of the first gradients, keeps every number finite, but the steps are so long still
that the hidden units die, and the network predicts the mean. At 0.01 every clip that
works acts at almost every step. At a learning rate of 0.0015, which is too large as
well without a clip, one acts on the largest gradients alone, and rests from there on.

Run:
    python benchmarks/studies/mlp_regression.py  # 16 seeds, about 6 s on two cores
    python benchmarks/studies/mlp_regression.py --quick --out /path/to/figures

Expected (MSE, medians of 16 seeds; that of the mean of the targets is 20381 and 26269):
    no clip                  every run is NaN within the first dozen steps
    global norm 1            train about 2.9, test about 19
    global norm 600          train 20384,     test about 28000: dead, the gradient of
                             the hidden layer is exactly 0 in 98 % of the last steps
    norm 1 per leaf          train about 1,   test about 16
    values within 5          train about 50,  test about 60
    values within 0.5        train about 5,   test about 10
    relative step 0.03       train about 0.6, test about 5, with nothing tuned
    rate 0.0003              train about 0.2, test about 6: a learning rate that is
                             chosen well needs no clip
    standardised target      train about 50,  test about 120, in the original units
    rate 0.0015              every run is NaN before step 400
    rate 0.0015, norm 200    train about 0.2, test about 2.5; 7 % of the steps clipped,
                             none of the last epoch
Four figures are written: the target, the learning curves, the norms of the gradients,
and a run that trains beside one that is finite but dead.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import _figures
import _study
import numpy as np
from _figures import GUESS, LIMIT, STYLES
from _regression import BATCHES, CONVERGED, History, Setting, train
from _regression_data import TRAIN_ROWS, Data, regression_data
from matplotlib.figure import Figure

import optaxclip

FULL = {"seeds": 16, "epochs": 100}
QUICK = {"seeds": 2, "epochs": 30}
ALIVE, DEAD = "global norm 1", "global norm 600"  # of `finite_but_dead`


def textbook_settings(data: Data) -> dict[str, Setting]:
    """Lists the settings to compare, by the name they have in table and figures."""
    mean, std = data.y[:TRAIN_ROWS].mean(), data.y[:TRAIN_ROWS].std()
    return {
        "no clip": Setting(),
        "global norm 1": Setting(max_norm=1.0),
        "global norm 600": Setting(max_norm=600.0),
        "norm 1 per leaf": Setting(max_leaf_norm=1.0),
        "values within 5": Setting(max_value=5.0),
        "values within 0.5": Setting(max_value=0.5),
        "relative step 0.03": Setting(relative_step=0.03),
        "rate 0.0003": Setting(3e-4),  # the best one without a clip, on train
        "standardised target": Setting(target_mean=mean, target_std=std),
        "rate 0.0015": Setting(1.5e-3),
        "rate 0.0015, norm 200": Setting(1.5e-3, max_norm=200.0),
    }


def print_settings(settings: Mapping[str, Setting], history: History) -> None:
    """Prints one line per setting."""
    heads = ["setting", "not finite\nruns", "from\nstep", "clipped\nsteps"]
    heads += [f"{half} MSE\n{_study.QUARTILES}" for half in ("train", "test")]
    rows, shares = (
        [],
        zip(clipped_share(settings, history), dead_share(history), strict=True),
    )
    for i, (name, (clipped, dead)) in enumerate(zip(settings, shares, strict=True)):
        last = _study.last_finite(history.batch_loss[i])
        broken = last[last < history.batch_loss.shape[-1] - 1] + 2  # counted from 1
        row = [name, f"{broken.size} of {last.size}"]
        row += [f"{broken.min()}-{broken.max()}" if broken.size else "-"]
        row += [f"{clipped:.1%}", f"{dead:.0%}"]
        for mse in history.train_mse[i], history.test_mse[i]:
            row += [_study.three_quartiles(mse[:, -1])]
        rows.append(row)
    _study.print_table([*heads[:4], "dead\nsteps", *heads[4:]], rows)


def clipped_share(settings: Mapping[str, Setting], history: History) -> list[float]:
    """Gives the share of the steps in which the clip of a setting changes anything."""
    shares = []
    for i, setting in enumerate(settings.values()):
        clipped = history.norm[i] > setting.max_norm
        clipped |= history.largest[i] > setting.max_value
        clipped |= history.step_norm[i] > history.max_step[i]
        for norms in history.leaf_norms.values():
            clipped |= norms[i] > setting.max_leaf_norm
        shares.append(float(clipped.mean()))
    return shares


def dead_share(history: History) -> np.ndarray:
    """Gives the share of the last epoch's steps that leave the hidden layer as it is.

    Its gradient is exactly 0 there: no unit is above zero for any row of the batch.
    """
    last_epoch = history.leaf_norms["Dense_0/kernel"][..., -BATCHES:]
    return (last_epoch == 0).mean(axis=(1, 2))


def mse_of_the_mean(data: Data) -> tuple[float, float]:
    """Measures the mean of the train targets as a prediction, on both halves."""
    train, test = np.split(data.y - data.y[:TRAIN_ROWS].mean(), 2)
    return float((train**2).mean()), float((test**2).mean())


def plot_target(data: Data) -> Figure:
    """Shows why the gradients are large: the targets spread over hundreds."""
    figure, axes = _figures.new_figure(1, 1, (7, 4))
    ax, halves = axes[0, 0], {"train": data.y[:TRAIN_ROWS], "test": data.y[TRAIN_ROWS:]}
    bins = np.linspace(-500, 500, 26).tolist()
    for style, (name, y) in zip(STYLES, halves.items(), strict=False):
        ax.hist(y, bins, histtype="step", label=f"{name}, {len(y)} rows", **style)
    ax.set(xlabel="target y (no unit)", ylabel="number of rows", xlim=(-500, 500))
    ax.legend()
    figure.suptitle(
        f"Targets that spread over hundreds (standard deviation {data.y.std():.0f}):"
        "\nso do the errors, and the gradients with them"
    )
    return figure


def plot_first_epoch(ax, values, ylabel: str) -> None:
    """Draws every run without a clip, up to where it leaves the finite numbers."""
    style = {"color": "#D55E00", "linewidth": 0.8}
    _figures.plot_runs(ax, values[:, :BATCHES], style, "a run")
    ax.plot([], [], "x", color="black", label="last finite value")
    ax.set(title="no clip, the first epoch", xlabel="step", ylabel=ylabel)
    ax.set(yscale="log", xlim=(0.5, BATCHES + 0.5), xticks=range(1, BATCHES + 1, 3))
    ax.legend(loc="lower right")


def plot_learning_curves(names: list[str], history: History, data: Data) -> Figure:
    """Lays the MSE of all settings that stay finite over each other."""
    figure, axes = _figures.new_figure(1, 3, (16, 6.5), width_ratios=(1, 1.6, 1.6))
    first, *halves = axes[0]
    plot_first_epoch(first, history.batch_loss[0], "loss of the batch (MSE)")
    epochs = np.arange(1, history.train_mse.shape[-1] + 1)
    final = _study.median(history.test_mse[..., -1], axis=1)
    order = [i for i in np.argsort(final).tolist() if np.isfinite(final[i])]
    curves = {"train": history.train_mse, "test": history.test_mse}
    for ax, half, mean in zip(halves, curves, mse_of_the_mean(data), strict=True):
        for i, style in zip(order, STYLES, strict=True):
            _figures.plot_band(ax, epochs, curves[half][i], style, names[i])
        ax.axhline(CONVERGED, label=f"{CONVERGED:g}: below it, converged", **LIMIT)
        ax.axhline(mean, label="the mean of the targets", **GUESS)
        ax.set(title=f"{half}: median of the runs and quartiles", xlabel="epoch")
        ax.set(yscale="log", ylim=(0.05, 1e5), ylabel=f"MSE on the {half} half")
    _figures.legend_below(figure, halves, columns=6)
    lost = ", ".join(names[i] for i in np.flatnonzero(~np.isfinite(final)).tolist())
    figure.suptitle(
        f"With a clip the network learns; NaN, and not drawn over the epochs: {lost}."
        "\nThe names below are in the order of the last test MSE, the best one first."
    )
    return figure


PANELS = {
    "global norm 1": "below at every step",
    "global norm 600": "dead from step 300 on",
    "norm 1 per leaf": "four scopes",
    "values within 0.5": "below at every step",
    "relative step 0.03": "falls with the step",
    "rate 0.0003": "no clip needed",
    "rate 0.0015, norm 200": "acts, then rests",
}


def plot_gradient_norms(settings: Mapping[str, Setting], history: History) -> Figure:
    """Shows what each clip measured, before it clipped, beside its threshold."""
    figure, axes = _figures.new_figure(2, 4, (16, 8))
    first, *panels = axes.flat
    plot_first_epoch(first, history.norm[0], "norm of the gradient")
    steps = np.arange(1, history.norm.shape[-1] + 1)
    for ax, (name, message) in zip(panels, PANELS.items(), strict=True):
        i = list(settings).index(name)
        what, measured, threshold = measured_by(settings[name], history, i)
        for style, (label, values) in zip(STYLES, measured.items(), strict=False):
            _figures.plot_band(ax, steps, values, style, label)
        if np.isfinite(threshold).all():
            threshold = np.broadcast_to(threshold, steps.shape)
            ax.plot(steps, threshold, label="threshold", **LIMIT)
        ax.set(title=f"{name}: {message}", xlabel="step (log scale)", ylabel=what)
        ax.set(xscale="log", yscale="log", ylim=(3e-3, 1e6))
        ax.legend(loc="upper right", ncols=2)
    figure.suptitle(
        "What each clip saw before it clipped (median and quartiles of the runs):"
        "\nonly the last threshold is crossed, and the network learns"
    )
    return figure


def measured_by(setting: Setting, history: History, i: int) -> tuple[str, dict, Any]:
    """Says what the clip of a setting looks at, gives it, and its threshold."""
    if math.isfinite(setting.max_leaf_norm):
        leaves = {leaf: norms[i] for leaf, norms in history.leaf_norms.items()}
        return "norm of a leaf of the gradient", leaves, setting.max_leaf_norm
    if math.isfinite(setting.max_value):
        largest = {"largest element": history.largest[i]}
        return "largest |element| of the gradient", largest, setting.max_value
    if math.isfinite(setting.relative_step):
        step, bound = history.step_norm[i], np.median(history.max_step[i], axis=0)
        return "norm of learning rate x gradient", {"step": step}, bound
    measured = {"whole gradient": history.norm[i]}
    if setting.max_norm == 600:  # where it dies
        measured["hidden kernel, clipped"] = history.leaf_norms["Dense_0/kernel"][i]
    return "norm of the gradient", measured, setting.max_norm


def plot_finite_but_dead(settings: Mapping[str, Setting], history: History) -> Figure:
    """Shows a run that trains beside one that is finite, and dead."""
    figure, axes = _figures.new_figure(3, 2, (11, 8.5), height_ratios=(3, 3, 2))
    told = {ALIVE: "the run learns", DEAD: "finite, but dead"}
    for (*pair, grid), (name, message) in zip(axes.T, told.items(), strict=True):
        seen = as_history(history, list(settings).index(name), settings[name].max_norm)
        optaxclip.plot.run(seen, pair)
        optaxclip.plot.layers(seen, grid)
        pair[0].set_ylim(0.1, 1e5)
        pair[1].set_ylim(0.1, 1e5)
        clip = f"clip_by_global_norm({settings[name].max_norm:g})"
        pair[0].set_title(f"{clip}: {message}", loc="left")
    return figure


def as_history(history: History, setting: int, max_norm: float) -> dict[str, Any]:
    """Returns what the first seed of a setting did, as `optaxclip.history` has it."""
    norm, limit = history.norm[setting, 0], np.full(history.norm.shape[-1], max_norm)
    factor = np.divide(limit, norm, out=np.ones_like(norm), where=norm > limit)
    clip = {"clip/norm": norm, "clip/max_norm": limit, "clip/factor": factor}
    leaves = history.leaf_norms.items()  # after the clip by the global norm
    scopes = {f"norm/{path}": norms[setting, 0] / factor for path, norms in leaves}
    loss = history.batch_loss[setting, 0]
    return optaxclip.history({"loss": loss, **clip, **scopes})


def main(arguments: Sequence[str] | None = None) -> History:
    """Trains all settings, prints the table, and writes the figures."""
    start = time.perf_counter()
    text = "Trains a small network on unscaled targets, with and without clips."
    options = _study.parse_options(
        _study.option_parser(text, FULL, QUICK), arguments, QUICK
    )
    data = regression_data()
    settings = textbook_settings(data)
    with _study.progress_bar(total=options.epochs, unit="epochs") as bar:
        history = train(
            list(settings.values()), options.seeds, options.epochs, data, bar.update
        )
    time_taken = _study.took(start)
    print_settings(settings, history)
    train_mse, test_mse = map(_study.short, mse_of_the_mean(data))
    print("Dead steps: those of the last epoch whose hidden gradient is exactly 0.")
    print(f"The mean of the targets: MSE {train_mse} on train, {test_mse} on test.")
    print(f"{len(settings)} x {options.seeds} runs, trained together {time_taken}.")
    figures = {
        "target": partial(plot_target, data),
        "learning_curves": partial(plot_learning_curves, list(settings), history, data),
        "gradient_norms": partial(plot_gradient_norms, settings, history),
        "finite_but_dead": partial(plot_finite_but_dead, settings, history),
    }
    _figures.save_all(figures, options.out)
    return history


if __name__ == "__main__":
    main()
