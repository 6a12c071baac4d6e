"""Teaches an LSTM where a pen goes next: without a clip every run blows up.

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
    python benchmarks/studies/lstm_handwriting.py  # 16 seeds, under a minute
    python benchmarks/studies/lstm_handwriting.py --quick  # 2 seeds, 40 steps
    python benchmarks/studies/lstm_handwriting.py --strokes lineStrokes  # real pens

Expected (nats per time step on fresh pens: minus the log of the density that the model
gave to where the pen went, so it may be negative, and less is better; quartiles of 16
seeds, which are the luck of a seed):
    no clip              16 of 16 blown up, within 17 steps
    global norm 2        -2.14 / -1.95 / -1.82
    values within 0.1    -2.51 / -2.31 / -2.10
    Graves' ranges       -2.05 / -1.89 / -1.72
    learning rate 1e-5   -1.42 / -1.29 / -0.90: it falls slowly, and needs no clip
Keras 3 ended at -1.8 with the same global norm, and at -2.3 with the same range of
values (medians of 8 seeds on the same pens).
One figure is written: the loss, and the norm of the gradient before the clip.

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
from typing import Any, NamedTuple

import _figures
import _study
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _figures import LIMIT, STYLES
from matplotlib.figure import Figure

import optaxclip

FULL = {"seeds": 16, "steps": 200}
QUICK = {"seeds": 2, "steps": 40}
TIME_STEPS = 100
BATCH_SIZE = 8
HIDDEN = 32
COMPONENTS = 2  # of the mixture; 5 outputs each: a weight, two means, two deviations
LEARNING_RATE = 0.01
SMALL = 1e-5  # the best learning rate without a clip
MOMENTUM = 0.9
MAX_NORM = 2.0  # of all gradients together
STEPS_PER_CALL = 10  # of the optimizer, so that the bar moves
FRESH_PENS = 64  # to test on
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


SETTINGS = {  # by the name they have in table and figure
    "no clip": Setting(LEARNING_RATE),
    "global norm 2": Setting(LEARNING_RATE, max_norm=MAX_NORM),
    "values within 0.1": Setting(LEARNING_RATE, max_value=0.1),
    "Graves' ranges": Setting(LEARNING_RATE, MAX_NORM, gates=10.0, outputs=100),
    f"learning rate {SMALL:g}": Setting(SMALL),
}


def draw_pens(generator: np.random.Generator, count: int) -> np.ndarray:
    """Draws offsets `[count, TIME_STEPS + 1, 2]` of pens that make loops and jumps."""
    w1, w2 = generator.uniform(0.15, 0.45, (2, count, 1))
    a, b = generator.uniform(0, 2 * np.pi, (2, count, 1))
    t = np.arange(TIME_STEPS + 2)
    x = np.sin(w1 * t + a) + 0.5 * np.sign(np.sin(w2 * t + b))
    y = np.cos(w1 * t + a)
    offsets = np.diff(np.stack([x, y], axis=-1), axis=1)
    return np.asarray(generator.normal(offsets, 0.01), np.float32)


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


class Writer(nn.Module):
    """An LSTM that reads offsets and returns a mixture for the offset after each."""

    def setup(self):
        init = nn.initializers.glorot_uniform()
        self.cell = nn.LSTMCell(HIDDEN, kernel_init=init)
        self.rnn = nn.RNN(self.cell)
        self.head = nn.Dense(5 * COMPONENTS, kernel_init=init)

    def __call__(self, offsets):
        return self.head(self.rnn(offsets))


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


def graves_ranges(setting: Setting) -> dict[str, Any]:
    """Names the layers whose outputs' cotangents are clipped.

    The eight dense layers of the cell are the pre-activations of its gates. Graves
    counts per sequence; the loss is a mean over the batch, and so are cotangents.
    """
    gates, outputs = setting.gates / BATCH_SIZE, setting.outputs / BATCH_SIZE
    return {"cell/*": gates, "head": outputs}


@jax.jit
def init_params(seed):
    """Draws the parameters of a run.

    Not under `vmap`: the QR decompositions of many orthogonal matrices at once can
    block each other for ever on two cores (jaxlib 0.10).
    """
    variables: Any = Writer().init(jax.random.key(seed), jnp.zeros((1, TIME_STEPS, 2)))
    params = variables["params"]
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


def train(
    settings: Sequence[Setting],
    seeds: int,
    steps: int,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    on_steps: Callable[[int], object] = lambda count: None,
) -> History:
    """Trains every setting from every seed, side by side.

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
    parts = zip(*recorded, strict=True)
    loss, norm = (np.concatenate(part, axis=-1) for part in parts)
    fresh = draw(np.random.default_rng(seeds), FRESH_PENS)
    return History(loss, norm, np.asarray(test_loss(runs[0], fresh)))


def blown_up(values) -> np.ndarray:
    """Returns which runs are not finite, or as good as that."""
    return ~(np.asarray(values) < BLOWN_UP)


def until_lost(values, loss) -> np.ndarray:
    """Puts NaN from the first loss on that is blown up: some fall back from there."""
    lost = blown_up(loss).cumsum(axis=-1) > 0
    return np.where(lost, np.nan, values)


def print_settings(history: History) -> None:
    """Prints one line per setting."""
    heads = ["setting", "runs\nblown up", "at step"]
    rows = []
    for name, losses, final in zip(SETTINGS, history.loss, history.final, strict=True):
        lost = blown_up(losses)
        steps = (lost.argmax(axis=-1) + 1)[lost.any(axis=-1)]
        row = [name, f"{blown_up(final).sum()} of {final.size}"]
        row += [f"{steps.min()}-{steps.max()}" if steps.size else "-"]
        rows.append([*row, _study.three_quartiles(final)])
    _study.print_table([*heads, f"nats per time step\n{_study.QUARTILES}"], rows)


def plot_runs(history: History) -> Figure:
    """Lays the settings over each other: the loss, and the norm before the clip."""
    figure, axes = _figures.new_figure(1, 2, (13, 6))
    steps = np.arange(1, history.loss.shape[-1] + 1)
    for ax, recorded in zip(axes[0], (history.loss, history.norm), strict=True):
        for style, name, values, losses in zip(
            STYLES, SETTINGS, recorded, history.loss, strict=False
        ):
            values = until_lost(values, losses)
            if np.isfinite(values).all():
                _figures.plot_band(ax, steps, values, style, name)
            else:
                thin = {**style, "linewidth": 0.8}
                _figures.plot_runs(ax, values, thin, f"{name} (a line per seed)")
        ax.set(xscale="log", xlabel="step (log scale)", xlim=(1, len(steps)))
    loss, norm = axes[0]
    loss.set_yscale("symlog", linthresh=5, linscale=3)
    loss.set_ylim(-3, BLOWN_UP)
    loss.set_yticks([-3, -2, -1, 0, 1, 2, 3, 4, 5, 10, 100, 1000])
    loss.yaxis.set_major_formatter("{x:g}")
    loss.set_ylabel(
        "loss: minus the log of the density, nats per time step\n(logarithmic above 5)"
    )
    norm.axhline(MAX_NORM, label=f"the threshold {MAX_NORM:g} of norms", **LIMIT)
    norm.set(yscale="log", ylabel="norm of the gradient, before the clip")
    figure.suptitle(
        "Without a clip every run blows up; with one the loss falls while gradients"
        f" grow\n(median and quartiles; x: the last step with a loss below"
        f" {BLOWN_UP:g})"
    )
    _figures.legend_below(figure, axes[0], columns=3)
    return figure


def handwriting(text: str) -> list[np.ndarray]:
    """Reads an option that names a file or a folder with handwriting."""
    try:
        return load_strokes(Path(text))
    except (ValueError, OSError, KeyError, xml.etree.ElementTree.ParseError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> History:
    """Trains all settings, prints the table, and writes the figure."""
    start = time.perf_counter()
    parser = _study.option_parser("Teaches an LSTM where a pen goes.", FULL, QUICK)
    text = "IAM-OnDB or an .npz file"
    parser.add_argument("--strokes", type=handwriting, metavar="PATH", help=text)
    options = _study.parse_options(parser, arguments, QUICK)
    draw = partial(cut_windows, options.strokes) if options.strokes else draw_pens
    with _study.progress_bar(total=options.steps, unit="steps") as bar:
        history = train(
            list(SETTINGS.values()), options.seeds, options.steps, draw, bar.update
        )
    print_settings(history)
    runs = f"{len(SETTINGS)} x {options.seeds} runs, trained together"
    print(f"{runs} {_study.took(start)}.")
    _figures.save_all({"handwriting": partial(plot_runs, history)}, options.out)
    return history


if __name__ == "__main__":
    main()
