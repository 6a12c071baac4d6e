"""Teaches an LSTM to write: it blows up without a clip, and Graves' ranges are exact.

Graves (2013) predicts the next point of a pen from the points before it: an LSTM reads
the offsets from point to point, and its outputs are the parameters of a mixture of
Gaussians for the next offset. As the mixture learns to be sure of itself, its standard
deviations shrink, so the gradients grow while the loss falls, and one surprising point
throws the weights away. Five settings are compared over 100 time steps:

    no clip              SGD with momentum as it is
    global norm 2        all gradients together, before SGD
    values within 0.1    every element of the gradients, before SGD
    Graves' ranges       what comes back from the outputs within 100, what comes back to
                         the gates within 10 (at every time step, in the middle of the
                         backward pass), and a global norm of 2: the ranges alone do not
                         bound the sum over the time steps
    small learning rate  1e-5, the best one without a clip

Run:
    python benchmarks/studies/lstm_handwriting.py  # 16 seeds, half a minute
    python benchmarks/studies/lstm_handwriting.py --quick  # 2 seeds, 40 steps
    python benchmarks/studies/lstm_handwriting.py --strokes lineStrokes  # real pens

Expected (nats per time step on fresh pens, worst / median / best of 16 seeds; less is
better, and the distance between them is the luck of a seed):
    no clip              16 of 16 blown up, within 17 steps
    global norm 2        -0.2 / -1.8 / -2.3     (Keras 3: -1.4 / -1.8 / -2.0)
    values within 0.1    -1.4 / -2.2 / -2.8     (Keras 3: -0.8 / -2.3 / -2.9)
    Graves' ranges       -1.4 / -2.0 / -2.3
    learning rate 1e-5   -0.5 / -1.3 / -1.5: it falls slowly, and needs no clip
Three figures are written: the loss, the norm of the gradient before the clip, and
strokes of the trained models beside those of the data.

Written with Flax linen: the parameters of 80 runs are one tree of arrays to `vmap`
over, and `nn.LSTMCell` has a dense layer for every gate, which is where Graves clips.
"""

import argparse
import math
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optaxclip

TIME_STEPS = 100
BATCH_SIZE = 8
HIDDEN = 32
COMPONENTS = 2  # of the mixture; 5 outputs each: a weight, two means, two deviations
MOMENTUM = 0.9
STEPS_PER_CALL = 10  # of the optimizer, so that the bar moves
FRESH_PENS = 64  # to test on
WRITTEN = 100  # offsets that a model writes, after reading those of a fresh pen
BLOWN_UP = 1000.0  # nats per time step
WHERE_TO_GET_IT = (
    "IAM-OnDB is free for research: register with the Computer Vision and Artificial"
    " Intelligence group of the University of Bern, download lineStrokes-all.tar.gz,"
    " unpack it, and pass the folder lineStrokes. An .npz file needs one array of"
    " offsets, [points, 2], for each line of writing."
)


class Setting(NamedTuple):
    """One way to keep the training stable. A limit of inf never clips."""

    learning_rate: float
    max_norm: float = math.inf  # of all gradients together
    max_value: float = math.inf  # of each element of the gradients
    gates: float = math.inf  # of what comes back to a gate, per sequence
    outputs: float = math.inf  # of what comes back from the loss, per sequence


class History(NamedTuple):
    """What was recorded, arrays `[settings, seeds, ...]`."""

    loss: np.ndarray  # of each batch, nats per time step
    norm: np.ndarray  # of the whole gradient at each step, before the clip
    final: np.ndarray  # on fresh pens after training, nats per time step
    strokes: np.ndarray  # [settings, WRITTEN, 2], offsets that the first model wrote


def settings_to_compare(learning_rate: float) -> dict[str, Setting]:
    """Lists the settings by the name they have in table and figures."""
    return {
        "no clip": Setting(learning_rate),
        "global norm 2": Setting(learning_rate, max_norm=2.0),
        "values within 0.1": Setting(learning_rate, max_value=0.1),
        "Graves' ranges": Setting(learning_rate, max_norm=2.0, gates=10.0, outputs=100),
        f"learning rate {learning_rate / 1000:g}": Setting(learning_rate / 1000),
    }


# Worst / median / best in Keras 3 of 8 seeds, on the same pens.
KERAS = {
    "no clip": "7 of 8 NaN",
    "global norm 2": "-1.42 / -1.77 / -2.04",
    "values within 0.1": "-0.75 / -2.29 / -2.90",
}


# ---- Pens ----------------------------------------------------------------------------


def draw_pens(generator: np.random.Generator, count: int) -> np.ndarray:
    """Draws offsets `[count, TIME_STEPS + 1, 2]` of pens that make loops and jumps."""
    w1, w2 = generator.uniform(0.15, 0.45, (2, count, 1))
    a, b = generator.uniform(0, 2 * np.pi, (2, count, 1))
    t = np.arange(TIME_STEPS + 2)
    x = np.sin(w1 * t + a) + 0.5 * np.sign(np.sin(w2 * t + b))
    y = np.cos(w1 * t + a)
    offsets = np.diff(np.stack([x, y], axis=-1), axis=1)
    noise = 0.01 * generator.standard_normal(offsets.shape)
    return np.asarray(offsets + noise, np.float32)


def load_strokes(path: Path) -> list[np.ndarray]:
    """Reads handwriting as offsets `[points, 2]` per line, in standard deviations.

    Args:
      path: a folder with the XML files of IAM-OnDB, or an `.npz` file of arrays.

    Raises:
      ValueError: there is nothing, or nothing long enough, to be read.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.xml"))
        lines = [np.diff(points_of(file), axis=0) for file in files]
    elif path.suffix == ".npz" and path.is_file():
        with np.load(path) as arrays:
            lines = [np.asarray(arrays[name], np.float64) for name in arrays.files]
    else:
        raise ValueError(
            f"expected a folder of XML files or an .npz file, got {str(path)!r}."
            f" {WHERE_TO_GET_IT}"
        )
    wrong = [line.shape for line in lines if line.ndim != 2 or line.shape[-1] < 2]
    if wrong:
        raise ValueError(
            f"expected offsets of shape [points, 2] in {str(path)!r}, got {wrong[0]}."
        )
    long_enough = [line[:, :2] for line in lines if len(line) > TIME_STEPS]
    if not long_enough:
        raise ValueError(
            f"expected lines of more than {TIME_STEPS} offsets in {str(path)!r}, got"
            f" {len(lines)} lines, none as long. {WHERE_TO_GET_IT}"
        )
    scale = np.concatenate(long_enough).std()
    return [np.asarray(line / scale, np.float32) for line in long_enough]


def points_of(file: Path) -> np.ndarray:
    """Reads the points `[points, 2]` of one line; y grows upwards."""
    points = xml.etree.ElementTree.parse(file).iter("Point")
    pairs = [(float(point.attrib["x"]), -float(point.attrib["y"])) for point in points]
    return np.array(pairs).reshape(-1, 2)


def cut_windows(
    lines: Sequence[np.ndarray], generator: np.random.Generator, count: int
) -> np.ndarray:
    """Cuts `count` windows of a batch's length out of random lines."""
    chosen = [lines[i] for i in generator.integers(len(lines), size=count)]
    starts = [generator.integers(len(line) - TIME_STEPS) for line in chosen]
    pairs = zip(chosen, starts, strict=True)
    return np.stack([line[i : i + TIME_STEPS + 1] for line, i in pairs])


# ---- The network ---------------------------------------------------------------------


class Writer(nn.Module):
    """An LSTM that reads offsets and returns a mixture for the offset after each."""

    def setup(self):
        init = nn.initializers.glorot_uniform()
        self.cell = nn.LSTMCell(HIDDEN, kernel_init=init)
        self.rnn = nn.RNN(self.cell)
        self.head = nn.Dense(5 * COMPONENTS, kernel_init=init)

    def __call__(self, offsets):
        return self.head(self.rnn(offsets))

    def step(self, carry, offset):
        """One time step, to write with."""
        carry, state = self.cell(carry, offset)
        return carry, self.head(state)


def mixture(outputs):
    """Splits outputs into log-weights `[.., 2]`, means and deviations `[.., 2, 2]`."""
    logits, means, deviations = jnp.split(outputs, (COMPONENTS, 3 * COMPONENTS), -1)
    pairs = (*outputs.shape[:-1], COMPONENTS, 2)
    return nn.log_softmax(logits), means.reshape(pairs), deviations.reshape(pairs)


def negative_log_likelihood(outputs, offsets):
    """Returns the nats by which each offset surprised, `[batch, time]`."""
    log_weights, means, log_deviations = mixture(outputs)
    z = (offsets[..., None, :] - means) * jnp.exp(-log_deviations)
    each = -0.5 * z**2 - log_deviations - 0.5 * math.log(2 * math.pi)
    return -nn.logsumexp(log_weights + each.sum(-1), axis=-1)


def loss_of_batch(params, offsets):
    """Sums over the time steps of a sequence, and averages over the batch."""
    outputs = Writer().apply({"params": params}, offsets[:, :-1])
    return negative_log_likelihood(outputs, offsets[:, 1:]).sum(axis=1).mean()


def make_optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Puts the clips of the gradients before SGD.

    Your own optimizer needs one: `optax.chain(optaxclip.clip_by_global_norm(2.0),
    optax.sgd(0.01, momentum=0.9))`. Thresholds of inf switch them off, so that the
    settings differ in numbers alone and one compiled program trains them all.
    """
    return optax.chain(
        optaxclip.clip_by_global_norm(setting.max_norm),
        optaxclip.clip_by_value(setting.max_value),
        optax.sgd(setting.learning_rate, momentum=MOMENTUM),
    )


def graves_ranges(setting: Setting) -> dict[str, jax.Array]:
    """Names the layers whose outputs' cotangents are clipped.

    The eight dense layers of the cell are the pre-activations of its gates. Graves
    counts per sequence; the loss is a mean over the batch, and so are cotangents.
    """
    gates, outputs = setting.gates / BATCH_SIZE, setting.outputs / BATCH_SIZE
    return {"cell/*": gates, "head": outputs}


# ---- Training ------------------------------------------------------------------------


@jax.jit
def init_params(seed):
    """Draws the parameters of a run.

    Not under `vmap`: the QR decompositions of many orthogonal matrices at once can
    block each other for ever on two cores (jaxlib 0.10).
    """
    params = Writer().init(jax.random.key(seed), jnp.zeros((1, TIME_STEPS, 2)))[
        "params"
    ]
    params["cell"]["hf"]["bias"] += 1.0  # so that it remembers at first
    return params


@jax.jit
@partial(jax.vmap, in_axes=(0, None))  # over the settings
@partial(jax.vmap, in_axes=(None, 0))  # over the seeds
def init_run(setting: Setting, params):
    """Starts the optimizer of a run."""
    return params, make_optimizer(setting).init(params)


@partial(jax.jit, donate_argnums=1)
@partial(jax.vmap, in_axes=(0, 0, None))  # over the settings, which share the data
@partial(jax.vmap, in_axes=(None, 0, 0))  # over the seeds
def train_some_steps(setting: Setting, run, batches):
    """Makes one step per batch; returns the run, the losses, and the norms."""
    optimizer = make_optimizer(setting)
    loss = optaxclip.clip_layer_cotangents(loss_of_batch, graves_ranges(setting))

    def step(run, offsets):
        params, opt_state = run
        value, grads = jax.value_and_grad(loss)(params, offsets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        norm = optaxclip.summary(opt_state)["clip_0/norm"]
        run = optax.apply_updates(params, updates), opt_state
        return run, (value / TIME_STEPS, norm)

    return jax.lax.scan(step, run, batches)


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
@partial(jax.vmap, in_axes=(0, None))
def test_loss(params, offsets):
    """Measures a trained model on pens that nobody saw, nats per time step."""
    return loss_of_batch(params, offsets) / TIME_STEPS


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def write(params, read):
    """Lets a model read offsets and go on: draws each from its mixture for it."""

    def step(carry, offset):
        variables = {"params": params}
        return Writer().apply(variables, carry, offset, method=Writer.step)

    def draw_one(state, key):
        carry, outputs = state
        log_weights, means, log_deviations = mixture(outputs)
        which, how = jax.random.split(key)
        i = jax.random.categorical(which, log_weights)
        offset = means[i] + jnp.exp(log_deviations[i]) * jax.random.normal(how, (2,))
        return step(carry, offset), offset

    carry, outputs = jax.lax.scan(step, (jnp.zeros(HIDDEN), jnp.zeros(HIDDEN)), read)
    keys = jax.random.split(jax.random.key(0), WRITTEN)
    return jax.lax.scan(draw_one, (carry, outputs[-1]), keys)[1]


def train(
    settings: Sequence[Setting],
    seeds: int,
    steps: int,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    on_steps: Callable[[int], object] = lambda count: None,
) -> tuple[dict, np.ndarray, History]:
    """Trains every setting from every seed; returns parameters, fresh pens, history.

    A seed gives the same initial parameters and batches whatever the setting.
    """
    table = jax.tree.map(lambda *values: np.array(values, np.float32), *settings)
    drawn = jax.device_get([init_params(seed) for seed in range(seeds)])
    runs = init_run(table, jax.tree.map(lambda *leaves: np.stack(leaves), *drawn))
    generators = [np.random.default_rng(seed) for seed in range(seeds)]
    recorded = []
    for start in range(0, steps, STEPS_PER_CALL):
        count = min(STEPS_PER_CALL, steps - start)
        drawn = [draw(generator, count * BATCH_SIZE) for generator in generators]
        batches = np.stack(drawn).reshape(seeds, count, BATCH_SIZE, TIME_STEPS + 1, 2)
        runs, measured = train_some_steps(table, runs, batches)
        recorded.append(jax.device_get(measured))  # waits for the steps to end
        on_steps(count)
    loss, norm = (
        np.concatenate(parts, axis=-1) for parts in zip(*recorded, strict=True)
    )
    params = runs[0]
    fresh = draw(np.random.default_rng(seeds), FRESH_PENS)
    strokes = write(jax.tree.map(lambda x: x[:, 0], params), fresh[0])
    final = np.asarray(test_loss(params, fresh))
    return params, fresh, History(loss, norm, final, np.asarray(strokes))


@jax.jit
@partial(jax.grad, argnums=1)
def look_back(params, stats, offsets, setting: Setting):
    """Returns what the ranges saw in one backward pass: the "gradient" of `stats`."""
    clips = {
        layer: partial(optaxclip.clip_cotangent, limit=limit, stats=stats[layer])
        for layer, limit in graves_ranges(setting).items()
    }
    return optaxclip.clip_layer_cotangents(loss_of_batch, clips)(params, offsets)


# ---- What it shows -------------------------------------------------------------------


def worst_median_best(values) -> str:
    """Writes three numbers, where a NaN is the worst of all."""
    values = np.asarray(values, np.float64)
    ordered = np.sort(np.where(np.isfinite(values), values, 1e300))[::-1]
    return " / ".join(map(short, (ordered[0], np.median(ordered), ordered[-1])))


def short(value: float) -> str:
    """Writes a number in at most six characters."""
    if value > 1e100:
        return "NaN"
    return f"{value:.2f}" if abs(value) < BLOWN_UP else f"{value:.0e}"


def blown_up(values) -> np.ndarray:
    """Returns which runs are not finite, or as good as that."""
    return ~(np.asarray(values) < BLOWN_UP)


def print_table(names: Sequence[str], history: History, with_keras: bool) -> None:
    """Prints one aligned line per setting."""
    columns = "{:22} {:>9} {:>9}  {:>23}  {:>23}".format
    keras = "Keras 3, 8 seeds" if with_keras else ""
    print(columns("", "blown up", "at step", "nats per time step", keras))
    parts = "worst / median / best"
    print(columns("setting", "runs", "", parts, parts if with_keras else ""))
    for i, name in enumerate(names):
        up = blown_up(history.final[i])
        lost = blown_up(history.loss[i])
        steps = (lost.argmax(axis=-1) + 1)[lost.any(axis=-1)]
        cells = [name, f"{up.sum()} of {up.size}"]
        cells += [f"{steps.min()}-{steps.max()}" if steps.size else "-"]
        cells += [worst_median_best(history.final[i])]
        print(columns(*cells, KERAS.get(name, "-") if with_keras else ""))


def print_look_back(stats) -> None:
    """Prints what came back to the layers that the ranges name."""
    named = optaxclip.summary(stats)
    print("\nWhat Graves' ranges saw in one more backward pass of the first model:")
    columns = "{:22} {:>9} {:>11} {:>14} {:>11}".format
    print(columns("layers", "calls", "mean norm", "largest below", "clipped"))
    for layer in stats:
        calls, norm, largest, clipped = (
            float(named[f"cotangent/{key}/{layer}"])
            for key in ("calls", "norm", "largest_norm", "clipped_fraction")
        )
        cells = f"{calls:.0f}", f"{norm:.3g}", f"{largest:.3g}", f"{clipped:.2%}"
        print(columns(layer, *cells))


def new_figure(rows: int, columns: int, figsize, **options):
    """Opens a figure. matplotlib is imported here: it takes most of a second."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 120})
    rcParams.update({"legend.frameon": False, "legend.fontsize": "small"})
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def plot_runs(ax, values, loss, highest: float) -> None:
    """Draws the median of the runs and a band between their quartiles.

    Where runs blow up, it draws each of them, up to the last step before that.
    """
    steps = np.arange(1, values.shape[-1] + 1)
    lost = blown_up(loss).cumsum(axis=-1) > 0
    if not lost.any():
        low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
        ax.fill_between(steps, low, high, color="C0", alpha=0.3, linewidth=0)
        ax.plot(steps, middle, color="C0")
        return
    for run, length in zip(values, (~lost).sum(axis=-1), strict=True):
        ax.plot(steps[:length], run[:length], color="C3", alpha=0.5)
        if 0 < length < run.size:
            ax.plot(length, min(run[length - 1], highest), "x", color="black")


def plot_loss(names: Sequence[str], history: History, path: Path) -> None:
    """Shows the loss of each batch; without a clip run by run, up to the explosion."""
    figure, axes = new_figure(1, len(names), (15, 4), sharey=True)
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        plot_runs(ax, history.loss[i], history.loss[i], highest=5.5)
        ax.set(title=name, xlabel="step", ylim=(-3.5, 6))
    axes[0].set(ylabel="loss of the batch, nats per time step")
    figure.suptitle(
        "The loss: median and quartiles; where runs blow up, each of them up to the"
        " last step (x) with a loss below 1000"
    )
    figure.savefig(path)


def plot_norms(settings: dict[str, Setting], history: History, path: Path) -> None:
    """Shows the norm before the clip: it grows while the loss falls."""
    figure, axes = new_figure(1, len(settings), (15, 4), sharey=True)
    for i, (ax, name) in enumerate(zip(axes, settings, strict=True)):
        plot_runs(ax, history.norm[i], history.loss[i], highest=7e6)
        if math.isfinite(settings[name].max_norm):
            ax.axhline(settings[name].max_norm, color="black", linestyle="--")
        ax.set(title=name, xlabel="step", yscale="log", ylim=(1, 1e7))
    axes[0].set(ylabel="norm of the gradient")
    figure.suptitle(
        "The gradient before the clip (dashed: the threshold): median and quartiles;"
        " where runs blow up, each of them up to the last step (x) before it"
    )
    figure.savefig(path)


def plot_strokes(
    names: Sequence[str], history: History, offsets: np.ndarray, path: Path
) -> None:
    """Shows how the first model of each setting goes on from the data."""
    figure, axes = new_figure(2, 3, (12, 7))
    read = np.cumsum(offsets, axis=0)
    axes[0, 0].plot(*read.T, color="black")
    axes[0, 0].set(title="the data")
    for ax, name, strokes in zip(axes.flat[1:], names, history.strokes, strict=True):
        ax.plot(*read.T, color="black", alpha=0.2)
        written = read[-1] + np.cumsum(strokes, axis=0)
        if np.isfinite(written).all():
            ax.plot(*np.vstack([read[-1], written]).T, color="C0")
        else:
            ax.text(0.5, 0.5, "NaN", color="C3", transform=ax.transAxes, ha="center")
        ax.plot(*read[-1], "o", color="C2")
        ax.set(title=name)
    for ax in axes.flat:
        ax.set_aspect("equal", adjustable="datalim")
    figure.suptitle(
        f"{len(read)} offsets of a fresh pen (grey), and the {WRITTEN} that a model"
        " writes after reading them (from the dot on)"
    )
    figure.savefig(path)


# ---- Options -------------------------------------------------------------------------


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


def handwriting(text: str) -> list[np.ndarray]:
    """Reads an option that names a file or a folder with handwriting."""
    try:
        return load_strokes(Path(text))
    except (ValueError, OSError, KeyError, xml.etree.ElementTree.ParseError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options, and prepares the device and the folder they ask for."""
    parser = argparse.ArgumentParser(
        description="Teaches an LSTM to write, with and without clips."
    )
    add = parser.add_argument
    add("--seeds", type=whole_number, help="runs per setting (default 16)")
    add("--steps", type=whole_number, help="of the optimizer (default 200)")
    add("--learning-rate", type=positive_number, default=0.01, help="default 0.01")
    add("--strokes", type=handwriting, metavar="PATH", help="IAM-OnDB or an .npz file")
    add("--out", type=Path, default=Path("figures"), help="folder of the figures")
    add("--quick", action="store_true", help="2 seeds and 40 steps unless said")
    add("--cpu", action="store_true", help="leave an accelerator alone")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (2 if options.quick else 16)
    options.steps = options.steps or (40 if options.quick else 200)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    if options.cpu:
        jax.config.update("jax_platforms", "cpu")
    return options


def progress_bar(**options) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def main(arguments: Sequence[str] | None = None) -> History:
    """Trains all settings, prints the tables, and writes the figures."""
    cpu_start, start = time.process_time(), time.perf_counter()
    options = parse_options(arguments)
    draw = draw_pens
    if options.strokes:
        draw = partial(cut_windows, options.strokes)
    settings = settings_to_compare(options.learning_rate)
    with progress_bar(total=options.steps, unit="steps") as bar:
        params, fresh, history = train(
            list(settings.values()), options.seeds, options.steps, draw, bar.update
        )
    cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
    names = list(settings)
    print_table(names, history, with_keras=not options.strokes)
    print(
        f"{len(settings)} x {options.seeds} runs, compiled and trained together on"
        f" {jax.devices()[0].device_kind}: {seconds:.1f} s"
        f" (CPU seconds after imports: {cpu:.1f})."
    )
    graves = names.index("Graves' ranges")
    stats = {layer: optaxclip.cotangent_stats() for layer in ("cell/*", "head")}
    first = jax.tree.map(lambda x: x[graves, 0], params)
    seen = look_back(first, stats, fresh[:BATCH_SIZE], settings["Graves' ranges"])
    print_look_back(seen)
    paths = [options.out / f"handwriting_{x}.png" for x in ("loss", "norms", "strokes")]
    plot_loss(names, history, paths[0])
    plot_norms(settings, history, paths[1])
    plot_strokes(names, history, fresh[0], paths[2])
    print("Figures:", *paths, sep="\n  ")
    return history


if __name__ == "__main__":
    main()
