"""Trains a small network on unscaled targets: NaN without a clip, fine with one.

This is the textbooks' experiment. The targets of the regression reach from -400 to
400, so the first gradients are in the hundreds, and SGD with a learning rate of 0.01
and momentum 0.9 throws the network out of its range within a dozen steps. Nine settings
are compared: no clip, six clips, and the two other remedies that textbooks name (a
small learning rate, a standardised target). One of the clips is a trap: a global norm
of 600, about that of the first gradients, keeps every number finite, but the steps are
so long still that the hidden units die, and the network predicts the mean.

Run:
    python benchmarks/studies/mlp_regression.py  # 16 seeds, about 6 s on two cores
    python benchmarks/studies/mlp_regression.py --seeds 1  # mostly compiling
    python benchmarks/studies/mlp_regression.py --quick --out /path/to/figures

Expected (MSE, medians of 16 seeds; that of the mean of the targets is 20381 and 26269):
    no clip                  every run is NaN within the first dozen steps
    global norm 1            train about 2.8, test about 18
    global norm 600          train 20384,     test about 28000: dead, the gradient of
                             the hidden layer is exactly 0 in 98 % of the last steps
    norm 1 per leaf          train about 1,   test about 16
    values within 5          train about 45,  test about 50
    values within 0.5        train about 5.5, test about 10
    relative step 0.03       train about 0.6, test about 5, with nothing tuned
    small learning rate      train about 0.2, test about 6: a learning rate that is
                             chosen well (3e-4; 2e-3 is NaN) needs no clip
    standardised target      train about 50,  test about 140, in the original units
Four figures are written: the target, the learning curves, the norms of the gradients,
and the loss that turns into NaN beside the one that does not.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree
from sklearn.datasets import make_regression
from tqdm import tqdm

import optaxclip

TRAIN_ROWS = 500  # and as many for testing
FEATURES = 20
BATCH_SIZE = 32
BATCHES = math.ceil(TRAIN_ROWS / BATCH_SIZE)  # steps per epoch; the last is smaller
MOMENTUM = 0.9
SMALL = 0.03  # times the learning rate: the best one without a clip is 3e-4
TOO_HIGH = 600.0  # a threshold that keeps the numbers finite, and kills the network
CONVERGED = 100.0  # MSE below which a run counts as converged


class Setting(NamedTuple):
    """One way to keep the training stable. A threshold of inf never clips."""

    learning_rate: float
    max_norm: float = math.inf  # of all gradients together
    max_leaf_norm: float = math.inf  # of each kernel and each bias
    max_value: float = math.inf  # of each element
    relative_step: float = math.inf  # of the first step, to the norm of the parameters
    target_mean: float = 0.0  # the network learns (y - mean) / std
    target_std: float = 1.0


class Data(NamedTuple):
    """The rows for training, then as many for testing."""

    x: np.ndarray  # [1000, 20]
    y: np.ndarray  # [1000], the targets


class History(NamedTuple):
    """What was recorded, in the units of the targets: arrays `[settings, seeds, n]`."""

    train_mse: np.ndarray  # after each epoch
    test_mse: np.ndarray  # after each epoch
    batch_loss: np.ndarray  # at each step, before its update
    norm: np.ndarray  # of the whole gradient at each step, before the clip
    leaf_norms: dict[str, np.ndarray]  # of each leaf, as it reaches the clip per leaf
    step_norm: np.ndarray  # of learning rate x gradient, before the clip by its norm
    max_step: np.ndarray  # what that clip allowed
    largest: np.ndarray  # absolute value of an element at each step, before the clip


def regression_data() -> Data:
    """Makes the textbooks' data set."""
    x, y = make_regression(2 * TRAIN_ROWS, FEATURES, noise=0.1, random_state=1)[:2]
    return Data(np.asarray(x, np.float32), np.asarray(y, np.float32))


def textbook_settings(data: Data, learning_rate: float) -> dict[str, Setting]:
    """Lists the settings to compare, by the name they have in table and figures."""
    mean, std = data.y[:TRAIN_ROWS].mean(), data.y[:TRAIN_ROWS].std()
    return {
        "no clip": Setting(learning_rate),
        "global norm 1": Setting(learning_rate, max_norm=1.0),
        f"global norm {TOO_HIGH:g}": Setting(learning_rate, max_norm=TOO_HIGH),
        "norm 1 per leaf": Setting(learning_rate, max_leaf_norm=1.0),
        "values within 5": Setting(learning_rate, max_value=5.0),
        "values within 0.5": Setting(learning_rate, max_value=0.5),
        "relative step 0.03": Setting(learning_rate, relative_step=0.03),
        f"learning rate {SMALL * learning_rate:g}": Setting(SMALL * learning_rate),
        "standardised target": Setting(learning_rate, target_mean=mean, target_std=std),
    }


class Network(nn.Module):
    """One hidden layer of 25 relu units and a linear output."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(25, kernel_init=nn.initializers.he_uniform())(x)
        output = nn.Dense(1, kernel_init=nn.initializers.glorot_uniform())
        return output(nn.relu(hidden))[:, 0]


def make_optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Puts the clips before SGD, so that its momentum sees clipped gradients only.

    Your own optimizer needs one clip:

        optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.01, momentum=0.9))

    Here are four, of which a threshold of inf switches three or all off: the settings
    then differ in numbers alone, and one compiled program trains them all. The last one
    bounds the step, so SGD is written as its parts, and the clip goes between them.
    """
    return optax.chain(
        optaxclip.clip_by_global_norm(setting.max_norm),
        optaxclip.clip_by_leaf_norm(setting.max_leaf_norm),
        optaxclip.clip_by_value(setting.max_value),
        optax.scale(-setting.learning_rate),
        optaxclip.clip_by_relative_step(setting.relative_step),
        optax.trace(MOMENTUM),
    )


def seen_by_the_clips(opt_state, params):
    """Gives the norms of gradient, leaves and step before their clips, and max_step."""
    stats = optaxclip.summary(opt_state, params)
    paths = flatten_dict(params, sep="/")
    return (
        stats["clip_0/norm"],
        {path: stats[f"clip_1/norm/{path}"] for path in paths},
        stats["clip_3/norm"],
        stats["clip_3/max_norm"],
    )


def squared_errors(setting: Setting, params, x, y):
    """Compares predictions and targets, in the units that the network learns."""
    target = (y - setting.target_mean) / setting.target_std
    return (Network().apply({"params": params}, x) - target) ** 2


@jax.jit  # one program for all runs: flax is slow to initialise outside of jit
@jax.vmap
def init_run(setting: Setting, seed):
    """Draws the parameters of a run and starts its optimizer."""
    variables = Network().init(jax.random.key(seed), jnp.zeros((1, FEATURES)))
    params = variables["params"]
    return params, make_optimizer(setting).init(params)


@partial(jax.jit, donate_argnums=1)
@partial(jax.vmap, in_axes=(0, 0, 0, None))  # over the runs; they share the data
def train_epoch(setting: Setting, run, batches, data: Data):
    """Makes one step per batch of row numbers, then measures both halves."""
    optimizer = make_optimizer(setting)

    def loss_of_batch(params, rows):
        errors = squared_errors(setting, params, data.x[rows], data.y[rows])
        return jnp.mean(errors, where=rows >= 0)

    def step(run, rows):
        params, opt_state = run
        loss, grads = jax.value_and_grad(loss_of_batch)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        measured = (
            loss * setting.target_std**2,
            *seen_by_the_clips(opt_state, params),
            jnp.abs(ravel_pytree(grads)[0]).max(),
        )
        return (optax.apply_updates(params, updates), opt_state), measured

    run, measured = jax.lax.scan(step, run, batches)
    errors = squared_errors(setting, run[0], data.x, data.y) * setting.target_std**2
    train_mse, test_mse = errors.reshape(2, TRAIN_ROWS).mean(axis=1)
    return run, History(train_mse[None], test_mse[None], *measured)


def shuffled_batches(generators) -> np.ndarray:
    """Draws the row numbers of an epoch, `[seeds, batches, 32]`; -1 fills the last.

    NumPy shuffles: the sort is no faster in JAX, and takes a second to compile.
    """
    rows = np.full((len(generators), BATCHES * BATCH_SIZE), -1, np.int32)
    for row, generator in zip(rows, generators, strict=True):
        row[:TRAIN_ROWS] = generator.permutation(TRAIN_ROWS)
    return rows.reshape(-1, BATCHES, BATCH_SIZE)


def train(
    settings: Sequence[Setting],
    seeds: int,
    epochs: int,
    data: Data,
    on_epoch: Callable[[], object] = lambda: None,
) -> History:
    """Trains every setting from every seed, all of them side by side.

    A seed gives the same initial parameters and batches whatever the setting.
    """
    runs_settings = jax.tree.map(
        lambda *values: np.repeat(np.array(values, np.float32), seeds), *settings
    )
    runs = init_run(runs_settings, np.tile(np.arange(seeds), len(settings)))
    generators = [np.random.default_rng(seed) for seed in range(seeds)]
    epoch_histories = []
    for _ in range(epochs):
        batches = np.tile(shuffled_batches(generators), (len(settings), 1, 1))
        runs, history = train_epoch(runs_settings, runs, batches, data)
        epoch_histories.append(jax.device_get(history))  # waits for the epoch to end
        on_epoch()
    return jax.tree.map(
        lambda *parts: np.hstack(parts).reshape(len(settings), seeds, -1),
        *epoch_histories,
    )


def quartiles(values, axis=0) -> np.ndarray:
    """Takes quartiles in which a NaN counts as the largest value: nothing is worse."""
    worst = 1e300  # beyond float32
    values = np.asarray(values, np.float64)
    values = np.where(np.isfinite(values), values, worst)
    result = np.percentile(values, (25, 50, 75), axis=axis)
    return np.where(result < 1e100, result, np.nan)


def first_true(conditions) -> np.ndarray:
    """Counts from 1 to the first true entry of each row; inf where there is none."""
    first = conditions.argmax(axis=-1) + 1.0
    return np.where(conditions.any(axis=-1), first, np.inf)


def print_table(names: Sequence[str], data: Data, history: History) -> None:
    """Prints one aligned line per setting."""
    columns = "{:20} {:>10} {:>7} {:>6}  {:>21}  {:>21} {:>10}".format
    heads = "not finite", "at step", "dead", "train MSE", "test MSE", "loss < 100"
    print(columns("", *heads))
    parts = "25 % / median / 75 %"
    print(columns("setting", "runs", "", "steps", parts, parts, "at epoch"))
    dead = dead_share(history)
    for i, name in enumerate(names):
        broken = first_true(~np.isfinite(history.batch_loss[i]))
        steps = broken[np.isfinite(broken)]
        cells = [name, f"{steps.size} of {broken.size}"]
        cells += [f"{steps.min():.0f}-{steps.max():.0f}" if steps.size else "-"]
        cells += [f"{dead[i]:.0%}"]
        for mse in history.train_mse[i], history.test_mse[i]:
            cells += [" / ".join(map(short, quartiles(mse[:, -1])))]
        epoch = np.median(first_true(epoch_loss(history.batch_loss[i]) < CONVERGED))
        cells += [f"{epoch:.0f}" if np.isfinite(epoch) else "never"]
        print(columns(*cells))
    train, test = map(short, mse_of_the_mean(data))
    print("Dead steps: those of the last epoch whose hidden gradient is exactly 0.")
    print(f"The mean of the targets has an MSE of {train} on train, {test} on test.")


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


def short(value: float) -> str:
    """Writes a number in at most five characters or so."""
    if value < 100:
        return f"{value:.3g}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def epoch_loss(batch_loss) -> np.ndarray:
    """Averages the loss over the rows of each epoch, as Keras prints it."""
    sizes = np.full(BATCHES, BATCH_SIZE)
    sizes[-1] = TRAIN_ROWS - sizes[:-1].sum()
    return np.average(
        batch_loss.reshape(len(batch_loss), -1, BATCHES), weights=sizes, axis=-1
    )


def plot_all(settings, data: Data, history: History, folder: Path) -> list[Path]:
    """Writes the figures, and gives their paths."""
    names, mean = list(settings), mse_of_the_mean(data)[0]
    figures = {
        "target": partial(plot_target, data),
        "learning_curves": partial(plot_learning_curves, names, history, mean),
        "gradient_norms": partial(plot_gradient_norms, settings, history),
        "loss_to_nan": partial(plot_loss_to_nan, history),
    }
    for name, plot in figures.items():
        plot(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def plot_target(data: Data, path: Path) -> None:
    """Shows why the gradients are large: the targets spread over hundreds."""
    figure, (left, right) = new_figure(1, 2, figsize=(10, 4))
    halves = {"train": data.y[:TRAIN_ROWS], "test": data.y[TRAIN_ROWS:]}
    left.hist(list(halves.values()), bins=25, label=list(halves))
    left.set(xlabel="target", ylabel="number of rows", title="Histogram")
    left.legend()
    right.boxplot(list(halves.values()))
    right.set_xticks([1, 2], list(halves))
    right.set(ylabel="target", title="Median, quartiles, and outliers (circles)")
    figure.suptitle("The targets of the regression, as they are")
    figure.savefig(path)


def plot_learning_curves(
    names: Sequence[str], history: History, mean: float, path: Path
) -> None:
    """Shows MSE over epochs, and the loss over the first steps without a clip."""
    figure, axes = new_figure(2, 5, figsize=(18, 7.5))
    plot_first_steps(axes[0, 0], history.batch_loss[0], names[0])
    axes[0, 0].set(ylabel="loss of the batch")
    epochs = np.arange(1, history.train_mse.shape[-1] + 1)
    for i, ax in enumerate(axes.flat[1:-1], start=1):
        plot_band(ax, epochs, history.train_mse[i], "C0", "train")
        plot_band(ax, epochs, history.test_mse[i], "C1", "test")
        ax.axhline(mean, color="black", linestyle=":", label="the mean of the targets")
        ax.set(title=names[i], xlabel="epoch", ylabel="mean squared error")
        ax.set(yscale="log", ylim=(0.01, 1e5))
        ax.legend(loc="lower left")
    explain(figure, axes.flat[-1], "The loss while training", history)
    figure.savefig(path)


def plot_gradient_norms(settings, history: History, path: Path) -> None:
    """Shows what each clip measured, before it clipped, beside its threshold."""
    figure, axes = new_figure(2, 5, figsize=(18, 7.5))
    names = list(settings)
    plot_first_steps(axes[0, 0], history.norm[0], names[0])
    axes[0, 0].set(ylabel="norm of the gradient")
    steps = np.arange(1, history.norm.shape[-1] + 1)
    for i, ax in enumerate(axes.flat[1:-1], start=1):
        measured, threshold = measured_by(settings[names[i]], history, i)
        for number, (label, values) in enumerate(measured.items()):
            plot_band(ax, steps, values, f"C{number}", label)
        if np.isfinite(threshold).all():
            threshold = np.broadcast_to(threshold, steps.shape)
            ax.plot(steps, threshold, color="black", linestyle="--", label="threshold")
        ax.set(title=names[i], xlabel="step (log scale)", ylabel="before the clip")
        ax.set(xscale="log", yscale="log", ylim=(3e-3, 3e6))
        ax.legend(loc="upper right", ncols=2 if len(measured) > 2 else 1)
    explain(figure, axes.flat[-1], "The gradient before the clip", history)
    figure.savefig(path)


def measured_by(setting: Setting, history: History, i: int) -> tuple[dict, Any]:
    """Names the sizes that the clip of a setting looks at, and gives its threshold."""
    if math.isfinite(setting.max_leaf_norm):
        leaves = {leaf: norms[i] for leaf, norms in history.leaf_norms.items()}
        return leaves, setting.max_leaf_norm
    if math.isfinite(setting.max_value):
        largest = {"largest |element| of the gradient": history.largest[i]}
        return largest, setting.max_value
    if math.isfinite(setting.relative_step):
        step = {"norm of learning rate x gradient": history.step_norm[i]}
        return step, np.median(history.max_step[i], axis=0)
    measured = {"norm of the gradient": history.norm[i]}
    if math.isfinite(setting.max_norm):
        hidden = history.leaf_norms["Dense_0/kernel"][i]
        measured["hidden kernel, after the clip"] = hidden
    return measured, setting.max_norm


def plot_loss_to_nan(history: History, path: Path) -> None:
    """Shows one run without a clip and the same run with one: loss and norm."""
    figure, (top, bottom) = new_figure(2, 1, figsize=(8, 6.5), sharex=True)
    steps = np.arange(1, history.norm.shape[-1] + 1)
    for i, color, label in (0, "C3", "no clip"), (1, "C0", "clip_by_global_norm(1.0)"):
        loss, norm = history.batch_loss[i, 0], history.norm[i, 0]
        top.plot(steps, finite(loss), color=color, label=label)
        bottom.plot(steps, finite(norm), color=color)
        step = first_true(np.isnan(loss))
        if np.isfinite(step):
            top.axvline(step, color=color, linestyle=":")
            bottom.axvline(step, color=color, linestyle=":")
            top.text(1.05 * step, 1e8, f"NaN from step {step:.0f} on", color=color)
    bottom.axhline(1.0, color="black", linestyle="--", label="max_norm = 1.0")
    top.set(xscale="log", yscale="log", ylim=(0.3, 1e10), ylabel="loss of the batch")
    bottom.set(yscale="log", ylim=(0.3, 1e7), ylabel="gradient norm before the clip")
    bottom.set(xlabel="step (log scale)")
    top.legend(loc="upper right")
    bottom.legend(loc="upper right")
    figure.suptitle("The same training run without and with a clip")
    figure.savefig(path)


def new_figure(rows: int, columns: int, figsize, sharex=False):
    """Opens a figure. matplotlib is imported here: it takes most of a second."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 120})
    rcParams.update({"legend.frameon": False, "legend.fontsize": "small"})
    rcParams.update({"lines.linewidth": 1.2})
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex)


def plot_first_steps(ax, values, name: str) -> None:
    """Draws the first epoch of every run, up to where it leaves the finite numbers."""
    for run in values[:, :BATCHES]:
        steps = np.arange(1, run.size + 1)
        ax.plot(steps, finite(run), color="C3", alpha=0.5)
        last = np.isfinite(run).sum() - 1
        if 0 <= last < run.size - 1:
            ax.plot(steps[last], run[last], "x", color="black")
    ax.set(title=f"{name}: the first {BATCHES} steps", xlabel="step", yscale="log")
    ax.set(xlim=(0.5, BATCHES + 0.5), xticks=range(1, BATCHES + 1, 3))


def plot_band(ax, x, values, color: str, label: str) -> None:
    """Draws the median of the runs, and a band between their quartiles."""
    low, middle, high = quartiles(values)
    ax.plot(x, middle, color=color, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)


def explain(figure, ax, title: str, history: History) -> None:
    """Uses the last panel to say how to read the others."""
    figure.suptitle(title)
    seeds = history.norm.shape[1]
    lines = (
        f"{seeds} runs in each panel",
        "line: their median",
        "band: between their quartiles",
        "x: last finite value of a run,",
        "    inf or NaN from there on",
    )
    ax.axis("off")
    ax.text(0, 0.5, "\n".join(lines), fontsize="large", linespacing=1.8, va="center")


def finite(values) -> np.ndarray:
    """Leaves out what a logarithmic axis cannot show."""
    return np.where(np.isfinite(values), values, np.nan)


def progress_bar(**options) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def whole_number(text: str) -> int:
    """Reads an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Reads an option that must be a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def option_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """Lists the options that the two experiments on this data set share."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--seeds", type=whole_number, help="runs per setting (default 16)")
    add("--epochs", type=whole_number, help="passes over the data (default 100)")
    add("--learning-rate", type=positive_number, default=0.01, help="default 0.01")
    add("--out", type=Path, default=Path("figures"), help="folder of the figures")
    add("--quick", action="store_true", help=quick)
    add("--cpu", action="store_true", help="leave an accelerator alone")
    return parser


def parse_options(parser: argparse.ArgumentParser, arguments) -> argparse.Namespace:
    """Reads the options, and prepares the device and the folder they ask for."""
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (2 if options.quick else 16)
    options.epochs = options.epochs or (30 if options.quick else 100)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    if options.cpu:
        jax.config.update("jax_platforms", "cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> History:
    """Trains all settings, prints the table, and writes the figures."""
    cpu_start, start = time.process_time(), time.perf_counter()
    parser = option_parser(
        "Trains a small network on unscaled targets, with and without clips.",
        quick="2 seeds and 30 epochs unless said otherwise",
    )
    options = parse_options(parser, arguments)
    data = regression_data()
    settings = textbook_settings(data, options.learning_rate)
    with progress_bar(total=options.epochs, unit="epochs") as bar:
        history = train(
            list(settings.values()), options.seeds, options.epochs, data, bar.update
        )
    cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
    print_table(list(settings), data, history)
    print(
        f"{len(settings)} x {options.seeds} runs, compiled and trained together on"
        f" {jax.devices()[0].device_kind}: {seconds:.1f} s"
        f" (CPU seconds after imports: {cpu:.1f})."
    )
    print("Figures:", *plot_all(settings, data, history, options.out), sep="\n  ")
    return history


if __name__ == "__main__":
    main()
