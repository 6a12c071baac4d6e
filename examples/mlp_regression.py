"""Trains a small network on unscaled targets: NaN without a clip, fine with one.

This is the textbooks' experiment. The targets of the regression reach from -400 to
400, so the first gradients are in the hundreds, and SGD with a learning rate of 0.01
and momentum 0.9 throws the network out of its range within a dozen steps. Seven
settings are compared: no clip, four clips, and the two other remedies that textbooks
name (a small learning rate, a standardised target).

Run:
    python examples/mlp_regression.py               # 16 seeds, about 5 s on two cores
    python examples/mlp_regression.py --seeds 1     # mostly imports and compiling
    python examples/mlp_regression.py --quick --out /path/to/figures

Expected (medians of 16 seeds; the variance of the test targets is 26213):
    no clip                  every run is NaN within the first dozen steps
    global norm 1            train about 2.8, test about 18
    norm 1 per leaf          train about 0.8, test about 16
    values within 5          train about 45,  test about 50
    values within 0.5        train about 6.5, test about 11
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
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
CONVERGED = 100.0  # MSE below which a run counts as converged


class Setting(NamedTuple):
    """One way to keep the training stable. A threshold of inf never clips."""

    learning_rate: float
    max_norm: float = math.inf  # of all gradients together
    max_leaf_norm: float = math.inf  # of each kernel and each bias
    max_value: float = math.inf  # of each element
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
        "norm 1 per leaf": Setting(learning_rate, max_leaf_norm=1.0),
        "values within 5": Setting(learning_rate, max_value=5.0),
        "values within 0.5": Setting(learning_rate, max_value=0.5),
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

    Here are three, of which a threshold of inf switches two or all off: the settings
    then differ in numbers alone, and one compiled program trains them all.
    """
    return optax.chain(
        optaxclip.clip_by_global_norm(setting.max_norm),
        optaxclip.clip_by_leaf_norm(setting.max_leaf_norm),
        optaxclip.clip_by_value(setting.max_value),
        optax.sgd(setting.learning_rate, momentum=MOMENTUM),
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
        stats = optaxclip.summary(opt_state, params)  # what the clips measured
        leaf = "clip_1/norm/"
        measured = (
            loss * setting.target_std**2,
            stats["clip_0/norm"],
            {key.removeprefix(leaf): stats[key] for key in stats if leaf in key},
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


def print_table(names: Sequence[str], history: History) -> None:
    """Prints one aligned line per setting."""
    columns = "{:20} {:>10} {:>7}  {:>21}  {:>21} {:>10}".format
    print(columns("", "not finite", "at step", "train MSE", "test MSE", "loss < 100"))
    parts = "25 % / median / 75 %"
    print(columns("setting", "runs", "", parts, parts, "at epoch"))
    for i, name in enumerate(names):
        broken = first_true(~np.isfinite(history.batch_loss[i]))
        steps = broken[np.isfinite(broken)]
        cells = [name, f"{steps.size} of {broken.size}"]
        cells += [f"{steps.min():.0f}-{steps.max():.0f}" if steps.size else "-"]
        for mse in history.train_mse[i], history.test_mse[i]:
            cells += [" / ".join(map(short, quartiles(mse[:, -1])))]
        epoch = np.median(first_true(epoch_loss(history.batch_loss[i]) < CONVERGED))
        cells += [f"{epoch:.0f}" if np.isfinite(epoch) else "never"]
        print(columns(*cells))


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


def plot_learning_curves(names: Sequence[str], history: History, path: Path) -> None:
    """Shows MSE over epochs, and the loss over the first steps without a clip."""
    figure, axes = new_figure(2, 4, figsize=(15, 7.5))
    plot_first_steps(axes[0, 0], history.batch_loss[0], names[0])
    axes[0, 0].set(ylabel="loss of the batch")
    epochs = np.arange(1, history.train_mse.shape[-1] + 1)
    for i, ax in enumerate(axes.flat[1:7], start=1):
        plot_band(ax, epochs, history.train_mse[i], "C0", "train")
        plot_band(ax, epochs, history.test_mse[i], "C1", "test")
        ax.set(title=names[i], xlabel="epoch", ylabel="mean squared error")
        ax.set(yscale="log", ylim=(0.1, 1e5))
        ax.legend()
    explain(figure, axes[1, 3], "The loss while training", history)
    figure.savefig(path)


def plot_gradient_norms(settings, history: History, path: Path) -> None:
    """Shows what each clip measured, before it clipped, beside its threshold."""
    figure, axes = new_figure(2, 4, figsize=(15, 7.5))
    names = list(settings)
    plot_first_steps(axes[0, 0], history.norm[0], names[0])
    axes[0, 0].set(ylabel="norm of the gradient")
    steps = np.arange(1, history.norm.shape[-1] + 1)
    for i, ax in enumerate(axes.flat[1:7], start=1):
        setting = settings[names[i]]
        measured = {"norm of the gradient": history.norm[i]}
        threshold = setting.max_norm
        if math.isfinite(setting.max_leaf_norm):
            measured = {leaf: norms[i] for leaf, norms in history.leaf_norms.items()}
            threshold = setting.max_leaf_norm
        if math.isfinite(setting.max_value):
            measured = {"largest |element| of the gradient": history.largest[i]}
            threshold = setting.max_value
        for number, (label, values) in enumerate(measured.items()):
            plot_band(ax, steps, values, f"C{number}", label)
        if math.isfinite(threshold):
            ax.axhline(threshold, color="black", linestyle="--", label="threshold")
        ax.set(title=names[i], xlabel="step (log scale)", ylabel="before the clip")
        ax.set(xscale="log", yscale="log", ylim=(0.03, 3e5))
        ax.legend(loc="upper right", ncols=2 if len(measured) > 1 else 1)
    explain(figure, axes[1, 3], "The gradient before the clip", history)
    figure.savefig(path)


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
    with tqdm(total=options.epochs, desc="training", unit="epoch") as bar:
        history = train(
            list(settings.values()), options.seeds, options.epochs, data, bar.update
        )
    cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
    print_table(list(settings), history)
    print(
        f"{len(settings)} x {options.seeds} runs, compiled and trained together on"
        f" {jax.devices()[0].device_kind}: {seconds:.1f} s"
        f" (CPU seconds after imports: {cpu:.1f})."
    )
    plot_target(data, options.out / "target.png")
    plot_learning_curves(list(settings), history, options.out / "learning_curves.png")
    plot_gradient_norms(settings, history, options.out / "gradient_norms.png")
    plot_loss_to_nan(history, options.out / "loss_to_nan.png")
    print(f"Figures are in {options.out}.")
    return history


if __name__ == "__main__":
    main()
