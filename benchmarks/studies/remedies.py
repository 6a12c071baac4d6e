"""Which of the textbooks' remedies keeps a network from exploding, and at what price?

Three questions, each answered by runs from several seeds:

  * What does one factor per layer, or per time step, make of a gradient? Deep networks
    of relu layers, plain recurrent networks and LSTMs, whose first weights are
    multiplied by a gain, before any training.
  * The textbooks' regression (`mlp_regression.py`), which is NaN within ten steps: a
    smaller learning rate, scaled targets, other losses, batches, depths, first weights,
    activations, penalties, no momentum, Adam, each without a clip, and with the clip
    that `suggest_max_norm` names for it. And clips by norm, by leaf, by value, and in
    the wrong place.
  * A pen to be predicted over 100 time steps (`lstm_handwriting.py`), at three learning
    rates, by a plain recurrent network and by an LSTM: truncated backpropagation,
    Graves' ranges inside the backward pass, and a clip by norm, whose threshold is
    divided by the rate.

Run:
    python benchmarks/studies/remedies.py          # 8 seeds, some three minutes
    python benchmarks/studies/remedies.py --quick  # does it run? a minute

Expected (medians of 8 seeds; MSE on held-out rows, nats per move on fresh pens):
    derivative after 49 layers      3e8 at a gain of 1.5, 0.6 at 1, 1e-5 at 0.8
    after 99 steps, plain network   7e6 at a gain of 2, 5e-5 at 1
    after 99 steps, LSTM            0.01 at a gain of 2, 3e-8 at 1

                          alone     with the clip that is suggested
    none                  NaN       9
    rate 0.003            NaN       9: a clip that always acts is a part of the rate
    rate 0.001            4         8
    targets / 10          3         9
    / 150, rate 0.1       0.4       33
    Huber loss            10        62
    batches of 8, 125     NaN       9, 14
    no hidden layer       0.01      11700: a clip that is not needed costs
    3 hidden layers       NaN       16
    first weights / 10    NaN       704
    tanh                  2472      1374
    L1, L2 penalty        NaN       4, 97
    a norm of 2 ends at 10, behind the momentum at 205, one of 20 there at 12;
    a norm of 600 leaves 7 of 8 runs dead.

    pens, runs lost of 8:     plain, at 0.01, 0.001, 0.0001    LSTM
    none                             8     8      6            8     2      0
    truncated to 10 steps            8     8      1            8     4      0
    Graves' ranges                   8     8      2            8     3      0
    norm 2, 20, 200                  0     0      0            0     0      0
    So truncation and ranges help where the product over time is the cause, and not
    where all steps are too long. The clip by norm ends at -2.1 to -1.5.
Three figures are written: the factors, one run that explodes, and the remedies.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import _figures
import _remedies_recurrent as recurrent
import _remedies_regression as regression
import _study
import jax.numpy as jnp
import numpy as np
import optax
from _figures import GUESS, STYLES
from _regression_data import TRAIN_ROWS, regression_data
from _remedies_regression import Ends, Numbers, Setting, Way
from matplotlib.figure import Figure

import optaxclip

FULL = {"seeds": 8, "epochs": 100, "steps": 150}
QUICK = {"seeds": 2, "epochs": 20, "steps": 30}
BLOWN_UP = 1000.0  # nats per move


def absolute_error(predicted, target):
    return jnp.abs(predicted - target)


REMEDIES = {  # of the textbooks, by their names in table and figure
    "none": Setting(),
    "rate 0.003": Setting(numbers=Numbers(rate=0.003)),
    "rate 0.001": Setting(numbers=Numbers(rate=0.001)),
    "rate 0.0003": Setting(numbers=Numbers(rate=0.0003)),
    "targets / 10": Setting(numbers=Numbers(target=10.0)),
    "targets / 150": Setting(numbers=Numbers(target=150.0)),
    "targets / 150, rate 0.1": Setting(numbers=Numbers(rate=0.1, target=150.0)),
    "Huber loss": Setting(Way(error=optax.huber_loss)),
    "absolute error": Setting(Way(error=absolute_error)),
    "batches of 8": Setting(Way(batch_size=8)),
    "batches of 125": Setting(Way(batch_size=125)),
    "no hidden layer": Setting(Way(hidden=())),
    "3 hidden layers": Setting(Way(hidden=(25, 25, 25))),
    "first weights / 2": Setting(numbers=Numbers(init=0.5)),
    "first weights / 10": Setting(numbers=Numbers(init=0.1)),
    "tanh": Setting(Way(activation=jnp.tanh)),
    "L1 penalty": Setting(numbers=Numbers(l1=1.0)),
    "L2 penalty": Setting(numbers=Numbers(l2=1.0)),
    "no momentum": Setting(Way(optimizer=regression.sgd_alone)),
}
AFTER_MOMENTUM = Way(optimizer=regression.clip_after_momentum)
OTHER = Way(optimizer=regression.other_clips)
ADAM = Way(optimizer=regression.adam)
CLIPS = {
    "norm 1": Setting(numbers=Numbers(max_norm=1.0)),
    "norm 2": Setting(numbers=Numbers(max_norm=2.0)),
    "norm 600": Setting(numbers=Numbers(max_norm=600.0)),
    "norm 1 per leaf": Setting(OTHER, Numbers(max_leaf_norm=1.0)),
    "values within 5": Setting(OTHER, Numbers(max_value=5.0)),
    "values within 0.5": Setting(OTHER, Numbers(max_value=0.5)),
    "norm 2 after momentum": Setting(AFTER_MOMENTUM, Numbers(max_norm=2.0)),
    "norm 20 after momentum": Setting(AFTER_MOMENTUM, Numbers(max_norm=20.0)),
    "Adam": Setting(ADAM),
    "Adam, norm 2": Setting(ADAM, Numbers(max_norm=2.0)),
}
GAINS = {"plain": np.array([1.0, 1.5, 2.0]), "LSTM": np.array([1.0, 2.0])}
CELLS = {"plain": recurrent.plain_cell, "LSTM": recurrent.lstm_cell}


def pen_settings() -> dict[str, recurrent.Numbers]:
    """Lists what is tried on pens, at three rates."""
    settings = {}
    for rate in (0.01, 0.001, 0.0001):
        of_rate = recurrent.Numbers(rate)
        clipped = of_rate._replace(max_norm=0.02 / rate)
        ranges = {"gates": 10.0, "outputs": 100.0}
        settings |= {
            f"rate {rate:g}": of_rate,
            f"rate {rate:g}, truncated to 10": of_rate._replace(truncation=10),
            f"rate {rate:g}, Graves' ranges": of_rate._replace(**ranges),
            f"rate {rate:g}, norm {0.02 / rate:g}": clipped,
        }
    clipped = recurrent.Numbers(max_norm=2.0)
    settings["rate 0.01, norm 2, truncated to 10"] = clipped._replace(truncation=10)
    settings["rate 0.01, norm 2, Graves' ranges"] = clipped._replace(**ranges)
    settings["rate 0.01, values within 0.1"] = recurrent.Numbers(max_value=0.1)
    return settings


class Pens(NamedTuple):
    """What runs on pens did, `[settings, seeds]`."""

    lost: np.ndarray
    nats: np.ndarray  # per move, on fresh pens


class Result(NamedTuple):
    """What was found, by the names of the settings."""

    layers: dict[float, np.ndarray]  # gain to norms `[seeds, layers]`
    times: dict[tuple[str, float], np.ndarray]  # cell, gain to `[seeds, moves]`
    alone: dict[str, Ends]
    clipped: dict[str, Ends]  # the remedies with the clip that is suggested
    clips: dict[str, Ends]
    pens: dict[str, Pens]  # by cell


# ---- Runs ----------------------------------------------------------------------------


def factors(seeds: int) -> tuple[dict, dict]:
    """Takes norms of derivatives by layers and by states, the last ones first."""
    gains, numbers = np.array([0.8, 1.0, 1.2, 1.5]), np.arange(seeds)
    norms = recurrent.back_through_layers(gains, numbers)
    layers = dict(zip(gains.tolist(), np.asarray(norms)[..., ::-1], strict=True))
    times = {}
    for name, gains in GAINS.items():
        norms = np.asarray(recurrent.back_through_time(CELLS[name], gains, numbers))
        for gain, own in zip(gains.tolist(), norms[..., ::-1], strict=True):
            times[name, gain] = own
    return layers, times


def regressions(seeds: int, epochs: int) -> tuple[dict, dict, dict]:
    """Trains all remedies, without a clip and with one, and the clips."""
    settings = [*REMEDIES.values(), *map(regression.with_clip, REMEDIES.values())]
    settings += CLIPS.values()
    found, parts = regression.train_all(settings, seeds, epochs), []
    for names in (REMEDIES, REMEDIES, CLIPS):
        parts.append(dict(zip(names, found, strict=False)))
        found = found[len(names) :]
    return parts[0], parts[1], parts[2]


def pens(cell: recurrent.Cell, seeds: int, steps: int) -> Pens:
    """Trains on pens; lost is what left the range of losses that mean something."""
    settings = list(pen_settings().values())
    losses, _, last = recurrent.train_all(cell, settings, seeds, steps)
    return Pens(~(np.abs(losses) < BLOWN_UP).all(-1) | ~(last < BLOWN_UP), last)


# ---- Tables --------------------------------------------------------------------------


def lost(ends: Ends) -> np.ndarray:
    """Says which runs are not finite, or dead."""
    return ~np.isfinite(ends.mse) | ends.dead


def how_it_ended(ends: Ends) -> list[str]:
    """Writes runs lost, steps to that, and errors."""
    last = _study.last_finite(ends.loss)
    broken = last[last < ends.loss.shape[-1] - 1] + 2  # counted from 1
    steps = f"{broken.min()}-{broken.max()}" if broken.size else "-"
    dead = int((ends.dead & np.isfinite(ends.mse)).sum())
    nan = int((~np.isfinite(ends.mse)).sum())
    return [str(nan), str(dead), steps, _study.three_quartiles(ends.mse)]


def print_tables(result: Result) -> None:
    """Prints a table for each question."""
    norms = [(f"layers, gain {gain:g}", x) for gain, x in result.layers.items()]
    norms += [(f"{name}, gain {g:g}", x) for (name, g), x in result.times.items()]
    places = 10, 49, 99
    rows = []
    for name, x in norms:
        share = _study.median(x / x[:, :1])
        cells = [_study.short(share[i]) if i < len(share) else "-" for i in places]
        rows.append([name, *cells])
    _study.print_table(["derivative by", *(f"{i} back" for i in places)], rows)
    print()
    heads = "NaN", "dead", "at\nsteps", f"test MSE\n{_study.QUARTILES}"
    alone, clipped = result.alone, result.clipped
    rows = [
        [name, *how_it_ended(alone[name]), *how_it_ended(clipped[name])[::3]]
        for name in REMEDIES
    ]
    both = [*heads, "with clip\nNaN", f"test MSE\n{_study.QUARTILES}"]
    _study.print_table(["remedy", *both], rows)
    print()
    rows = [[name, *how_it_ended(ends)] for name, ends in result.clips.items()]
    _study.print_table(["clip", *heads], rows)
    print()
    rows = []
    for i, name in enumerate(pen_settings()):
        cells = [(p.lost[i].sum(), p.nats[i]) for p in result.pens.values()]
        rows.append(
            [name, *(x for n, own in cells for x in (n, _study.three_quartiles(own)))]
        )
    heads = [
        x for cell in CELLS for x in (f"{cell}\nlost", f"nats\n{_study.QUARTILES}")
    ]
    _study.print_table(["pens", *heads], rows)


# ---- Figures -------------------------------------------------------------------------


def plot_factors(result: Result) -> Figure:
    """Shows one factor per layer, and per time step."""
    figure, axes = _figures.new_figure(2, 1, (5.5, 6.4))
    drawn = [(f"{g:g}", x, 0, i) for i, (g, x) in enumerate(result.layers.items())]
    drawn += [
        (f"{name}, {gain:g}", norms, 1, i)
        for i, ((name, gain), norms) in enumerate(result.times.items())
    ]
    for label, norms, panel, i in drawn:
        ax, back = axes[panel, 0], np.arange(norms.shape[-1])
        _figures.plot_band(ax, back, norms / norms[:, :1], STYLES[i], label)
        end = _study.median(norms / norms[:, :1])[-1]
        style = {"color": STYLES[i]["color"], "va": "center", "fontsize": 9}
        ax.annotate(f" {label}", (back[-1], end), annotation_clip=False, **style)
    axes[0, 0].set(title="relu layers, weights = gain x He", xlabel="layers back")
    axes[1, 0].set(title="recurrent weights = gain x orthogonal")
    axes[1, 0].set(xlabel="time steps back")
    for ax in axes.flat:
        ax.set(yscale="log", ylabel="gradient, relative to the last")
        ax.margins(x=0)
    figure.suptitle("One factor per layer or time step, multiplied")
    return figure


def plot_explosion(result: Result) -> Figure:
    """Shows the first run without a clip, up to its end."""
    ends = result.alone["none"]
    last = int(_study.last_finite(ends.loss)[0])
    seen = {"loss": ends.loss[0, : last + 3], "norm": ends.norm[0, : last + 3]}
    figure, axes = _figures.new_figure(2, 1, (5.5, 5), sharex=True)
    optaxclip.plot.run(optaxclip.history(seen), list(axes[:, 0]))
    return figure


def plot_remedies(result: Result, mean: float) -> Figure:
    """Shows how each remedy ended, alone and with a clip."""
    figure, axes = _figures.new_figure(1, 1, (5.5, 6.4))
    ax, edge = axes[0, 0], 3e5
    drawn = {"alone": result.alone, "with clip_by_global_norm": result.clipped}
    marks = {"marker": "s", "color": "#D55E00"}, {"marker": "o", "color": "#0072B2"}
    for (label, ends), mark, shift in zip(
        drawn.items(), marks, (-0.17, 0.17), strict=True
    ):
        for row, name in enumerate(REMEDIES):
            low, middle, high = _study.quartiles(ends[name].mse)
            place, color = row + shift, mark["color"]
            if not np.isfinite(middle):
                ax.plot(edge, place, "x", color=color, markersize=7, clip_on=False)
                continue
            ax.plot([low, min(high, edge)], [place, place], color=color)
            ax.plot(middle, place, label=label, linestyle="", markersize=5, **mark)
            label = None
    ax.axvline(mean, **GUESS)
    ax.text(mean, -1.0, "the mean", ha="right", fontsize=9)
    ax.text(edge, -1.0, "NaN", ha="center", fontsize=9)
    ax.set(xscale="log", xlim=(None, edge), xlabel="squared error on held-out rows")
    ax.set_yticks(range(len(REMEDIES)), REMEDIES)
    ax.set_ylim(len(REMEDIES) - 0.5, -1.6)
    ax.grid(axis="y", alpha=0.15)
    _figures.legend_below(figure, [ax], columns=2)
    figure.suptitle("A clip mends all that explode; some remedies need none")
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains all of it, prints the tables, and writes the figures."""
    start = time.perf_counter()
    text = "Compares the textbooks' remedies against exploding gradients."
    parser = _study.option_parser(text, FULL, QUICK)
    options = _study.parse_options(parser, arguments, QUICK)
    layers, times = factors(options.seeds)
    runs = regressions(options.seeds, options.epochs)
    on_pens = {
        name: pens(cell, options.seeds, options.steps) for name, cell in CELLS.items()
    }
    result = Result(layers, times, *runs, on_pens)
    print_tables(result)
    print(f"{options.seeds} seeds, {_study.took(start)}.")
    y = regression_data().y
    mean = float(((y[TRAIN_ROWS:] - y[:TRAIN_ROWS].mean()) ** 2).mean())
    figures = {
        "factors": partial(plot_factors, result),
        "explosion": partial(plot_explosion, result),
        "remedies": partial(plot_remedies, result, mean),
    }
    _figures.save_all(figures, options.out)
    return result


if __name__ == "__main__":
    main()
