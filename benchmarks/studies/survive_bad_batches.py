"""Feeds broken batches to a small classifier, and shows who survives them.

A pixel that is NaN, one that is infinite, a batch of pixels or of labels multiplied by
1000 by mistake, and a burst: eight batches of NaN in a row. One optimizer, a clip and
SGD with momentum, meets them all, within one guard after the other.

Run:
    python benchmarks/studies/survive_bad_batches.py          # 20 to 30 s on two cores
    python benchmarks/studies/survive_bad_batches.py --seeds 64 --steps 1000
    python benchmarks/studies/survive_bad_batches.py --quick  # 20 s, mostly compiling

Expected (16 seeds; accuracy on held-out digits after 600 steps, medians):
    neither clip nor guard   dead at step 300, by one pixel that is NaN; the pixels x
                             1000 at step 80 had thrown most runs far back before
    clip                     dead at step 300: a clip bounds what is large, and that
                             has no size
    apply_if_finite(5)       dead at step 425, the sixth batch of the burst: after five
                             in a row Optax lets a NaN through
    zero_nonfinite           93 %
    skip_if_nonfinite        93 %, 11 steps skipped
    both guards              93 %, 12 to 13 steps skipped, none of them good; the second
                             one is skip_if_spike
Here the clip has made the batches out of scale harmless, so the guard against spikes
adds nothing to the accuracy; nor does it see all of them: where all digits are right
already, larger pixels only make the network surer. Pixels that are NaN leave nothing of
a gradient, so to zero it is to skip the step, but for the momentum; a guard also skips
the wrong labels, of which the gradient is finite and only the loss is NaN.

`optaxclip.summary` names what was not finite first, in the order of the tree: it is
Dense_0/kernel, the weights that the broken pixels are multiplied by.
One figure is written: the loss on good digits around the broken batches.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import _figures
import _study
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _figures import GUESS, STYLES
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optaxclip

FULL = {"seeds": 16, "steps": 600}
QUICK = {"seeds": 2, "steps": 200}
TEST_ROWS = 500  # of 1797 digits of 8 x 8 pixels
BATCH_SIZE = 64
UNITS = 32  # of the hidden layer
LEARNING_RATE = 0.1
MOMENTUM = 0.9
MAX_NORM = 1.0  # that of a good gradient is 2 at first, then 0.1 to 1
PATIENCE = 5  # steps in a row, after which `optax.apply_if_finite` lets a NaN through
BURST = 8  # batches in a row
GUESSING = math.log(10)  # the loss of who knows nothing of ten digits
FIRST_FAULT = 80  # a step: `skip_if_spike` looks at 64 before it acts
SHORTEST = 200  # steps, so that all faults come one after the other
STEPS_PER_CALL = 20  # at most, between two moves of the progress bar

GOOD, NAN, INF, PIXELS, LABELS, ALL_NAN = range(6)  # what a batch is like
FAULTS = ("good", "NaN pixel", "inf pixel", "pixels x 1000", "labels x 1000", "burst")
BOTH = "both guards"
PANELS = {  # of the figure: what each says, and the settings in it
    "Without a guard one NaN pixel ends every run, with a clip or without": (
        "neither clip nor guard",
        "clip",
    ),
    "Optax's guard gives way in the burst": (f"apply_if_finite({PATIENCE})",),
    "These three survive all of it": ("zero_nonfinite", "skip_if_nonfinite", BOTH),
}


class Data(NamedTuple):
    """Pixels between 0 and 1, and which digit they show."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class History(NamedTuple):
    """What was recorded of the runs from all seeds within one guard."""

    test_loss: np.ndarray  # [seeds, steps], after each step
    skipped: np.ndarray  # [seeds, steps], whether all updates were zero
    accuracy: np.ndarray  # [seeds], on the test rows, after the last step
    summary: dict[str, float]  # what the guards of the first run say in the end


def load_data() -> Data:
    """Loads scikit-learn's digits and holds out the last ones."""
    x, y = load_digits(return_X_y=True)
    x, y = np.asarray(x / 16, np.float32), np.asarray(y, np.int32)
    return Data(x[:-TEST_ROWS], y[:-TEST_ROWS], x[-TEST_ROWS:], y[-TEST_ROWS:])


def make_faults(steps: int) -> np.ndarray:
    """Says what the batch of each step is like: the same for all runs."""
    faults = np.full(steps, GOOD)
    faults[FIRST_FAULT] = PIXELS
    places = {0.5: NAN, 0.55: INF, 0.6: LABELS, 0.85: PIXELS}
    for share, fault in places.items():
        faults[int(share * steps)] = fault
    start = int(0.7 * steps)
    faults[start : start + BURST] = ALL_NAN
    return faults


class Network(nn.Module):
    """One hidden layer of relu units, and a score for each digit."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.he_uniform()
        hidden = nn.relu(nn.Dense(UNITS, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init)(hidden)


def sgd() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def clipped_sgd() -> optax.GradientTransformation:
    """Is what all guards are put around: the same optimizer."""
    return optax.chain(optaxclip.clip_by_global_norm(MAX_NORM), sgd())


def both_guards() -> optax.GradientTransformation:
    """Skips what is not finite, and what is 6 standard deviations above the mean.

    One guard around the other: each counts what it objects to.
    """
    return optaxclip.skip_if_nonfinite(optaxclip.skip_if_spike(clipped_sgd()))


SETTINGS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "neither clip nor guard": sgd,
    "clip": clipped_sgd,
    f"apply_if_finite({PATIENCE})": lambda: optax.apply_if_finite(
        clipped_sgd(), PATIENCE
    ),
    "zero_nonfinite": lambda: optax.chain(optaxclip.zero_nonfinite(), clipped_sgd()),
    "skip_if_nonfinite": lambda: optaxclip.skip_if_nonfinite(clipped_sgd()),
    BOTH: both_guards,
}


def spoil(fault, x, y):
    """Breaks a batch in one of the ways."""
    first = jnp.zeros_like(x).at[0, 20].set(1)  # a pixel of the first image
    x = jnp.where((fault == NAN) & (first == 1), jnp.nan, x)
    x = jnp.where((fault == INF) & (first == 1), jnp.inf, x)
    x = jnp.where(fault == ALL_NAN, jnp.nan, x)
    x = jnp.where(fault == PIXELS, 1000 * x, x)
    return x, jnp.where(fault == LABELS, 1000 * y, y)


def mean_loss(params, x, y):
    """Measures the mean cross-entropy; labels that do not exist make it NaN."""
    scores: Any = Network().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


@jax.jit
@jax.vmap
def init_params(seed):
    """Draws the parameters of a run."""
    return Network().init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]


def make_optimizer(setting: str) -> optax.GradientTransformationExtraArgs:
    """Lets the loss be passed to all of them: Optax's own leave it alone."""
    return optax.with_extra_args_support(SETTINGS[setting]())


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0))
def init_optimizer(setting: str, params):
    return make_optimizer(setting).init(params)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
@partial(jax.vmap, in_axes=(None, 0, 0, None, None))  # over the seeds
def train_steps(setting: str, run, rows, faults, data: Data):
    """Makes one step per batch of row numbers, `[steps, rows]`."""
    optimizer = make_optimizer(setting)

    def step(run, batch):
        params, opt_state = run
        rows, fault = batch
        x, y = spoil(fault, data.x[rows], data.y[rows])
        loss, grads = jax.value_and_grad(mean_loss)(params, x, y)
        # The loss, too, for labels that do not exist leave the gradient finite.
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        stood_still = jnp.all(ravel_pytree(updates)[0] == 0)
        test_loss = mean_loss(params, data.test_x, data.test_y)
        return (params, opt_state), (test_loss, stood_still)

    return jax.lax.scan(step, run, (rows, faults))


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def evaluate(params, data: Data):
    """Measures the share of the test digits that get the highest score."""
    scores: Any = Network().apply({"params": params}, data.test_x)
    # A NaN would count as the highest score.
    right = (scores.argmax(axis=-1) == data.test_y) & jnp.isfinite(scores).all(axis=-1)
    return right.mean()


def guards_of_first_run(run) -> dict[str, float]:
    """Reads what guards counted and whom they blamed last; empty without a guard.

    Outside of `jit`, so that `summary` can name a leaf by its path.
    """
    params, opt_state = jax.tree.map(lambda leaf: leaf[0], run)
    try:
        stats = optaxclip.summary(opt_state, params)
    except ValueError:  # there is nothing of ours in this optimizer
        return {}
    return {name: float(x) for name, x in stats.items() if name.startswith("guard")}


def train(
    setting: str,
    seeds: int,
    faults: np.ndarray,
    data: Data,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> History:
    """Trains within one guard from all seeds, side by side.

    A seed gives the same initial parameters and batches whatever the setting.
    """
    params = init_params(np.arange(seeds))
    run = (params, init_optimizer(setting, params))
    size = (faults.size, BATCH_SIZE)
    rows = np.stack(
        [
            np.random.default_rng(seed).integers(len(data.x), size=size)
            for seed in range(seeds)
        ]
    )
    count = math.gcd(faults.size, STEPS_PER_CALL)  # every call alike: compiled once
    parts = []
    for first in range(0, faults.size, count):
        now = slice(first, first + count)
        run, part = train_steps(setting, run, rows[:, now], faults[now], data)
        parts.append(jax.device_get(part))  # waits for the steps to end
        on_steps(count)
    test_loss, skipped = map(np.hstack, zip(*parts, strict=True))
    accuracy = np.asarray(evaluate(run[0], data))
    return History(test_loss, skipped, accuracy, guards_of_first_run(run))


def deaths(history: History) -> np.ndarray:
    """Finds the step of each run after which it never was better than a guess.

    Counted from 0; the number of steps for a run that lives to the end.
    """
    alive = history.test_loss < GUESSING  # false for a NaN
    return alive.shape[1] - alive[:, ::-1].argmax(axis=1)


def print_table(histories: dict[str, History], faults: np.ndarray) -> None:
    """Prints one line per setting."""
    heads = ["setting", "runs\ndead", "at\nstep", "by", "steps\nskipped"]
    heads += ["good\nones", "blamed\nat last", f"test accuracy, %\n{_study.QUARTILES}"]
    rows = []
    for name, history in histories.items():
        died = deaths(history)
        dead = died[died < faults.size]
        kinds, counts = np.unique(faults[dead], return_counts=True)
        good = history.skipped & (faults == GOOD)
        blamed = [
            key.split("culprit/")[1] for key in history.summary if "culprit/" in key
        ]
        row = [name, f"{dead.size}/{died.size}"]
        row += [f"{np.median(dead):.0f}" if dead.size else "-"]
        row += [FAULTS[kinds[counts.argmax()]] if dead.size else "-"]
        row += [f"{np.median(x.sum(axis=1)):g}" for x in (history.skipped, good)]
        row += [blamed[0] if blamed else "-"]
        rows.append([*row, _study.three_quartiles(100 * history.accuracy)])
    _study.print_table(heads, rows)


def name_faults(axes, faults: np.ndarray) -> None:
    """Draws a line for each broken batch, and its name above the first panel."""
    for step in np.flatnonzero(faults):
        for ax in axes:
            ax.axvline(step, color="0.8", linewidth=1, zorder=0)
        if faults[step] != faults[step - 1]:
            name, place = FAULTS[faults[step]], axes[0].get_xaxis_transform()
            options = {"rotation": 40, "transform": place, "fontsize": 9}
            axes[0].text(step, 1.02, name, **options)


def plot_losses(histories: dict[str, History], faults: np.ndarray) -> Figure:
    """Draws the loss from shortly before the first fault on."""
    figure, axes = _figures.new_figure(3, 1, (9, 9.5), sharex=True, sharey=True)
    steps = np.arange(faults.size)  # counted from 0, as in the table
    for ax, (title, names) in zip(axes[:, 0], PANELS.items(), strict=True):
        for style, name in zip(STYLES, names, strict=False):
            losses = histories[name].test_loss
            ends = _study.last_finite(losses)
            dead = ends[ends < faults.size - 1]
            label = f"{name}: {dead.size} of {ends.size} runs end in NaN"
            _figures.plot_band(ax, steps, losses, style, label)
            if dead.size:  # where half of them have gone, the median ends
                last = int(np.median(dead))
                middle = _study.median(losses)[last]
                ax.plot(last, middle, "X", color="black", markersize=9)
        ax.axhline(GUESSING, label="guessing", **GUESS)
        ax.set(yscale="log", ylabel="loss on good digits\n(nats)")
        ax.set_title(title, loc="left", pad=60 if ax is axes[0, 0] else 6)
        ax.legend(loc="upper right", fontsize=9)
    name_faults(axes[:, 0], faults)
    first = np.flatnonzero(faults)[0]
    axes[-1, 0].set(xlabel="step", xlim=(first - 0.03 * faults.size, faults.size))
    figure.suptitle(
        "Broken batches: a clip does not stop a NaN, a guard does\n"
        "(median and quartiles of the seeds; X: NaN from the next step on)"
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, History]:
    """Trains within all guards, prints the table, and writes the figure."""
    start = time.perf_counter()
    parser = _study.option_parser("Trains on batches that are broken.", FULL, QUICK)
    options = _study.parse_options(parser, arguments, QUICK)
    if options.steps < SHORTEST:
        parser.error(
            f"argument --steps: expected at least {SHORTEST}, for all the faults to"
            f" have their place, got {options.steps}"
        )
    data, faults = load_data(), make_faults(options.steps)
    histories = {}
    total = len(SETTINGS) * options.steps
    with _study.progress_bar(total=total, unit="steps") as bar:
        for name in SETTINGS:
            histories[name] = train(name, options.seeds, faults, data, bar.update)
    print_table(histories, faults)
    print(f"{len(SETTINGS)} x {options.seeds} runs {_study.took(start)}.")
    figures = {"bad_batches": partial(plot_losses, histories, faults)}
    _figures.save_all(figures, options.out)
    return histories


if __name__ == "__main__":
    main()
