"""Classifies images with a narrow, deep network: without a clip it ends up guessing.

This is the tutorials' experiment, which they do on Fashion-MNIST. Eight hidden layers
of eight relu units are trained by SGD with momentum 0.9 and a learning rate of 0.1.
Without a clip the first epochs throw the network to where it says the same of every
image, and it never comes back. Four settings are compared: no clip, a clip of the
values, of the global norm, and adaptive gradient clipping (AGC, by the norm of the
parameters); any other clip of the library by its name. The last line is the fair
baseline: no clip, and the best of four smaller learning rates.

Run:
    python benchmarks/studies/image_classifier.py  # 16 seeds, 20 s on two cores
    python benchmarks/studies/image_classifier.py --quick  # 2 seeds, 15 epochs
    python benchmarks/studies/image_classifier.py --clip clip_by_leaf_norm=0.1
    python benchmarks/studies/image_classifier.py --data-dir FOLDER  # Fashion-MNIST
    python benchmarks/studies/image_classifier.py --openml           # downloads it

Expected (accuracy on test images in %, medians of 16 seeds):
                          digits, epochs      digits, 32 units    Fashion-MNIST
                          10     40    120    40 epochs           5 epochs
    no clip               10     10     10    10, 6 runs NaN      10
    values within 0.01    63     79     81    90                  59
    global norm 0.3       41     73     83    92                  76
    AGC 0.01              46     77     86    90                  78
    no clip, tuned        41     77     86    92                  80
With a clip a learning rate works that is ten times too large, and where time is short
the clip of the values learns most. In the end a learning rate that is chosen as
carefully as the thresholds needs no clip: it is as good on digits, and better than all
clips where the network is wider (`--units 32`: the train loss is 0.003, that with clips
0.02 and more) and on Fashion-MNIST, for which the thresholds were not chosen. To be
wrong costs less with a clip: a threshold three times too large or small up to 21
points, a learning rate without a clip 20 and 30. Seeds differ: of 64 the medians after
40 epochs are 79, 77, 79 and 77.
One figure is written: loss and accuracy over the epochs.
"""

import argparse
import gzip
import hashlib
import inspect
import math
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import fetch_openml, load_digits
from tqdm import tqdm

import optaxclip

LAYERS = 8  # hidden ones
UNITS = 8  # of each, unless `--units` says otherwise
BATCH_SIZE = 32
MOMENTUM = 0.9
SMALLER = (0.3, 0.15, 0.1, 0.05)  # times the learning rate, to try without a clip
GUESSING = 2.2  # nats; who knows nothing of ten classes has a loss of log(10) = 2.303
TEST_DIGITS = 500  # of 1797, with 8 x 8 pixels

# MD5 of the files as they are unzipped. The checksums that are published are those of
# the .gz files, with the time of writing in them: packages of them differ.
CHECKSUMS = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
WHERE_TO_GET_THEM = (
    "The four files are in the folder data/fashion of the repository"
    " github.com/zalandoresearch/fashion-mnist; Debian's package dataset-fashion-mnist"
    " has them too."
)
# What builds a transformation out of no more than a number, and still is no clip.
NO_CLIPS = (
    "reset_momentum",
    "skip_if_nonfinite",
    "skip_if_spike",
    "stable_adamw",
    "u_clip",
    "unscale",
    "zero_nonfinite",
)

# What clips not gradients, but what is added to the parameters.
STEP_CLIPS = ("clip_by_relative_step", "clippy")

Clip = optax.GradientTransformationExtraArgs


class Named(NamedTuple):
    """A clip that was asked for by its name."""

    clip: Clip
    of_steps: bool


NO_CLIP = Named(optax.with_extra_args_support(optax.identity()), of_steps=False)


class Setting(NamedTuple):
    """One way to keep the training stable. A threshold of inf never clips."""

    learning_rate: float
    max_value: float = math.inf  # of each element of the gradients
    max_norm: float = math.inf  # of all gradients together
    max_ratio: float = math.inf  # of the norm of a unit to that of its parameters


class Data(NamedTuple):
    """Pixels between 0 and 1, and which of ten classes they show."""

    x: np.ndarray  # [rows, pixels]
    y: np.ndarray  # [rows]
    test_x: np.ndarray
    test_y: np.ndarray


class History(NamedTuple):
    """What was recorded of the runs from all seeds in one setting."""

    loss: np.ndarray  # [seeds, epochs], on all training rows, after each epoch
    accuracy: np.ndarray  # [seeds, epochs], on the test rows, after each epoch
    clipped: np.ndarray  # [seeds, epochs], share of the steps that the clip changed
    seconds: float  # with compiling, where this setting is the first to need it


# ---- Images --------------------------------------------------------------------------


def digits() -> Data:
    """Loads scikit-learn's digits and holds out the last ones."""
    x, y = load_digits(return_X_y=True)
    return split(np.asarray(x, np.float32) / 16, y, TEST_DIGITS)


def split(x, y, test_rows: int) -> Data:
    """Holds out the last rows."""
    y = np.asarray(y, np.int32)
    return Data(x[:-test_rows], y[:-test_rows], x[-test_rows:], y[-test_rows:])


def load_fashion(folder: Path) -> Data:
    """Reads the four files of Fashion-MNIST, zipped or not.

    Raises:
      ValueError: a file that is missing, is not of the IDX format, or is another one.
    """
    if not folder.is_dir():
        raise ValueError(
            f"expected a folder with the files of Fashion-MNIST, got {str(folder)!r}."
            f" {WHERE_TO_GET_THEM}"
        )
    names = list(CHECKSUMS)
    arrays = [read_idx(folder, name) for name in names]
    for i in 0, 2:
        if len(arrays[i]) != len(arrays[i + 1]):
            raise ValueError(
                f"expected a label for each image, got {len(arrays[i])} images in"
                f" {names[i]} and {len(arrays[i + 1])} labels in {names[i + 1]}."
            )
    for name, array in zip(names, arrays, strict=True):
        check_checksum(name, array)
    x, y, test_x, test_y = arrays
    return Data(pixels(x), y.astype(np.int32), pixels(test_x), test_y.astype(np.int32))


def fetch_fashion() -> Data:
    """Downloads Fashion-MNIST from OpenML, once, and takes minutes to read it."""
    x, y = fetch_openml(
        "Fashion-MNIST",
        version=1,
        return_X_y=True,
        as_frame=False,
        parser="liac-arff",  # the faster one needs pandas
    )
    return split(pixels(x), y, 10_000)


def pixels(images) -> np.ndarray:
    """Flattens images of bytes, and scales them to numbers between 0 and 1."""
    return np.asarray(images, np.float32).reshape(len(images), -1) / 255


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Reads images `[n, 28, 28]` or labels `[n]` of bytes.

    The format: a magic number (2051 or 2049, whose last byte is the rank), the sizes
    of the axes, all of them 32 bits with the high byte first, and the bytes.
    """
    path = folder / f"{name}.gz"
    if path.is_file():
        content = unzip(path)
    elif (folder / name).is_file():
        content = (folder / name).read_bytes()
    else:
        raise ValueError(
            f"expected {name}.gz or {name} in {str(folder)!r}, found neither."
            f" {WHERE_TO_GET_THEM}"
        )
    rank, kind = (3, "images") if "images" in name else (1, "labels")
    header = [int.from_bytes(content[i : i + 4]) for i in range(0, 4 + 4 * rank, 4)]
    magic, shape = header[0], tuple(header[1:])
    if magic != 0x800 + rank:
        raise ValueError(
            f"expected the magic number {0x800 + rank} of {kind} in {name}, got"
            f" {magic}: not an IDX file of bytes, or one under a wrong name."
        )
    start = 4 + 4 * rank
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"expected {start + math.prod(shape)} bytes in {name}, whose header says"
            f" shape {shape}, got {len(content)}: the file is cut off or damaged."
        )
    if shape[1:] not in ((), (28, 28)):
        raise ValueError(
            f"expected {kind} of shape (n, 28, 28) in {name}, got {shape}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def unzip(path: Path) -> bytes:
    """Reads a zipped file."""
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"expected {path.name} to be zipped: {error}. Is it whole?"
        ) from error


def check_checksum(name: str, array: np.ndarray) -> None:
    """Raises for a file of the right form that is not the one of Fashion-MNIST."""
    header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    got = hashlib.md5(header + array.tobytes(), usedforsecurity=False).hexdigest()
    if got != CHECKSUMS[name]:
        raise ValueError(
            f"expected the MD5 checksum {CHECKSUMS[name]} of {name} (unzipped), got"
            f" {got}: damaged, or another data set; that of handwritten digits has"
            f" files of the same names. {WHERE_TO_GET_THEM}"
        )


# ---- Clips ---------------------------------------------------------------------------


def settings_to_compare(learning_rate: float) -> dict[str, Setting]:
    """Lists the settings by the name they have in table and figure."""
    return {
        "no clip": Setting(learning_rate),
        "values within 0.01": Setting(learning_rate, max_value=0.01),
        "global norm 0.3": Setting(learning_rate, max_norm=0.3),
        "AGC 0.01": Setting(learning_rate, max_ratio=0.01),
    }


def make_clip(setting: Setting, named: Named) -> Clip:
    """Puts all clips one after the other.

    Your own optimizer needs one: `optax.chain(optaxclip.clip_by_value(0.01),
    optax.sgd(0.1, momentum=0.9))`. Thresholds of inf switch them off, so that the
    settings differ in numbers alone and one compiled program trains them all.
    """
    return optax.chain(
        optaxclip.clip_by_value(setting.max_value),
        optaxclip.clip_by_global_norm(setting.max_norm),
        # The last layer is left out, as in the paper.
        optaxclip.adaptive_grad_clip(setting.max_ratio, exclude=("head",)),
        named.clip,
    )


def named_clips() -> dict[str, Callable[..., Clip]]:
    """Finds the functions of the library that build a clip out of one number at most.

    Those are all that return a transformation, but for a few that do something else.
    """
    found = {}
    for name, function in vars(optaxclip).items():
        if inspect.isfunction(function) and name not in NO_CLIPS:
            returns = inspect.signature(function).return_annotation
            if "GradientTransformation" in str(returns) and len(needed(function)) < 2:
                found[name] = function
    return dict(sorted(found.items()))


def needed(function: Callable) -> list[str]:
    """Names the arguments that have no default."""
    arguments = inspect.signature(function).parameters.values()
    return [each.name for each in arguments if each.default is each.empty]


# ---- Training ------------------------------------------------------------------------


class Network(nn.Module):
    """Many narrow layers of relu units, and a score for each class."""

    layers: int
    units: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.glorot_uniform()
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.units, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init, name="head")(x)


def sgd(learning_rate) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=MOMENTUM)


@partial(jax.jit, static_argnums=(0, 1))
def init_params(network: Network, pixels: int, seed):
    """Draws the parameters of a run; under `vmap` it takes twice as long to compile."""
    return network.init(jax.random.key(seed), jnp.zeros((1, pixels)))["params"]


@partial(jax.jit, static_argnums=1)
@partial(jax.vmap, in_axes=(None, None, 0))
def init_run(setting: Setting, named: Named, params):
    """Starts the clips and the optimizer of a run."""
    clip_state = make_clip(setting, named).init(params)
    return params, clip_state, sgd(setting.learning_rate).init(params)


@partial(jax.jit, static_argnums=(0, 2), donate_argnums=3)
@partial(jax.vmap, in_axes=(None, None, None, 0, 0, None))  # over the seeds
def train_epoch(
    network: Network, setting: Setting, named: Named, run, batches, data: Data
):
    """Makes one step per batch of row numbers, then measures loss and accuracy."""
    clip = make_clip(setting, named)
    # Momentum is a sum of steps, which are gradients times this.
    scale = setting.learning_rate if named.of_steps else 1.0

    def loss_of_rows(params, x, y):
        scores = network.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    def step(run, rows):
        params, clip_state, sgd_state = run
        loss, grads = jax.value_and_grad(loss_of_rows)(
            params, data.x[rows], data.y[rows]
        )
        # One after the other, and no chain, to see in between what was clipped.
        scaled = optax.tree.scale(scale, grads)
        clipped, clip_state = clip.update(scaled, clip_state, params, value=loss)
        updates, sgd_state = sgd(setting.learning_rate / scale).update(
            clipped, sgd_state, params
        )
        run = optax.apply_updates(params, updates), clip_state, sgd_state
        return run, differ(scaled, clipped)

    run, changed = jax.lax.scan(step, run, batches)
    loss = loss_of_rows(run[0], data.x, data.y)
    scores = network.apply({"params": run[0]}, data.test_x)
    # A NaN would count as the highest score.
    right = (scores.argmax(axis=-1) == data.test_y) & jnp.isfinite(scores).all(axis=-1)
    return run, (loss, right.mean(), changed.mean())


def differ(grads, clipped) -> jax.Array:
    """Returns whether a clip changed anything; a NaN is no clipped gradient."""
    changes = jax.tree.map(
        lambda a, b: jnp.any((a != b) & jnp.isfinite(b)), grads, clipped
    )
    return jnp.array(jax.tree.leaves(changes)).any()


def shuffled_batches(generators, rows: int) -> np.ndarray:
    """Draws the row numbers of an epoch, `[seeds, batches, 32]`; leaves a rest out."""
    batches = rows // BATCH_SIZE
    drawn = [each.permutation(rows)[: batches * BATCH_SIZE] for each in generators]
    return np.array(drawn, np.int32).reshape(-1, batches, BATCH_SIZE)


def train(
    network: Network,
    setting: Setting,
    named: Named,
    seeds: int,
    epochs: int,
    data: Data,
    on_epoch: Callable[[], object] = lambda: None,
) -> History:
    """Trains in one setting from all seeds, side by side.

    A seed gives the same initial parameters and batches whatever the setting.
    """
    start = time.perf_counter()
    drawn = [init_params(network, data.x.shape[1], seed) for seed in range(seeds)]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    run = init_run(setting, named, params)
    generators = [np.random.default_rng(seed) for seed in range(seeds)]
    recorded = []
    for _ in range(epochs):
        batches = shuffled_batches(generators, len(data.x))
        run, measured = train_epoch(network, setting, named, run, batches, data)
        recorded.append(jax.device_get(measured))  # waits for the epoch to end
        on_epoch()
    curves = (np.stack(values, axis=1) for values in zip(*recorded, strict=True))
    return History(*curves, time.perf_counter() - start)


# ---- What it shows -------------------------------------------------------------------


def quartiles(values, axis=0) -> np.ndarray:
    """Takes quartiles in which a NaN counts as the largest value: nothing is worse."""
    worst = 1e300  # beyond float32
    values = np.asarray(values, np.float64)
    values = np.where(np.isfinite(values), values, worst)
    result = np.percentile(values, (25, 50, 75), axis=axis)
    return np.where(result < 1e100, result, np.nan)


def print_table(histories: dict[str, History]) -> None:
    """Prints one aligned line per setting."""
    width = max(map(len, histories))
    columns = f"{{:{width}}} {{:>7}} {{:>8}}  {{:>21}}  {{:>20}} {{:>7}} {{:>7}}".format
    print(columns("", "runs", "runs at", "train loss", "test accuracy, %", "steps", ""))
    parts = "25 % / median / 75 %"
    print(columns("setting", "NaN", "guessing", parts, parts, "clipped", "seconds"))
    for name, history in histories.items():
        loss, accuracy = history.loss[:, -1], 100 * history.accuracy[:, -1]
        finite = np.isfinite(loss)
        losses = (short(x) for x in quartiles(loss))
        print(
            columns(
                name,
                f"{(~finite).sum()}/{loss.size}",
                f"{(loss[finite] > GUESSING).sum()}/{loss.size}",
                " / ".join(losses),
                " / ".join(f"{x:.1f}" for x in quartiles(accuracy)),
                f"{history.clipped.mean():.0%}",
                f"{history.seconds:.1f}",
            )
        )


def short(value: float) -> str:
    """Writes a loss in at most five characters or so."""
    return f"{value:.3f}" if value < 10 else f"{value:.0e}"


def plot_curves(histories: dict[str, History], path: Path) -> None:
    """Draws a column for each setting: the loss and the accuracy over the epochs."""
    from matplotlib import rcParams  # imported here, for it takes most of a second
    from matplotlib.figure import Figure

    rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 120})
    count = len(histories)
    figure = Figure(figsize=(3 * count, 6), layout="constrained")
    axes = figure.subplots(2, count, sharex=True, sharey="row")
    curves = {
        name: (quartiles(history.loss), 100 * quartiles(history.accuracy))
        for name, history in histories.items()
    }
    epochs = np.arange(1, len(curves["no clip"][0][1]) + 1)
    marker = "o" if epochs.size == 1 else ""
    for number, name in enumerate(curves):
        for row, guess in enumerate((math.log(10), 10)):
            ax = axes[row, number]
            for others in curves.values():
                ax.plot(epochs, others[row][1], color="0.8", linewidth=0.8)
            low, middle, high = curves[name][row]
            ax.plot(epochs, middle, color=f"C{number}", marker=marker, linewidth=1.8)
            ax.fill_between(
                epochs, low, high, color=f"C{number}", alpha=0.25, linewidth=0
            )
            ax.axhline(guess, color="k", linestyle=":", linewidth=1)
        axes[0, number].set(title=name, ylim=(0, 2.6))
        axes[1, number].set(xlabel="epoch", ylim=(0, 100))
        axes[1, number].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("loss on the training images")
    axes[1, 0].set_ylabel("accuracy on the test images, %")
    seeds = len(histories["no clip"].loss)
    figure.suptitle(
        f"Median of {seeds} runs and a band between their quartiles (dotted: guessing;"
        " grey: the medians of the other panels)"
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


def fashion(text: str) -> Data:
    """Reads an option that names the folder of Fashion-MNIST."""
    try:
        return load_fashion(Path(text))
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def named_clip(text: str) -> tuple[str, Named]:
    """Reads an option that names a clip, and maybe its first argument."""
    name, equals, value = text.partition("=")
    clips = named_clips()
    if name not in clips:
        raise argparse.ArgumentTypeError(
            f"expected the name of a clip, got {name!r}. There are {', '.join(clips)}."
        )
    build = clips[name]
    if not equals and needed(build):
        raise argparse.ArgumentTypeError(
            f"expected {name}=NUMBER, for its {needed(build)[0]} has no default, got"
            f" {text!r}"
        )
    try:
        number = [int(value) if value.isdecimal() else float(value)] if equals else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number after {name}=, got {value!r}"
        ) from error
    try:
        return text, Named(build(*number), name in STEP_CLIPS)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options and the images, and makes the folder for the figure."""
    parser = argparse.ArgumentParser(
        description="Classifies images with a narrow, deep network, with and without"
        " clips."
    )
    add = parser.add_argument
    add("--seeds", type=whole_number, help="runs per setting (default 16)")
    add("--epochs", type=whole_number, help="default 40; 5 for Fashion-MNIST")
    add("--learning-rate", type=positive_number, default=0.1, help="default 0.1")
    add("--units", type=whole_number, default=UNITS, help=f"per layer, default {UNITS}")
    add(
        "--clip",
        type=named_clip,
        action="append",
        default=[],
        metavar="NAME[=NUMBER]",
        help="a clip to compare with the others, such as autoclip or"
        " clip_by_group_norm=1.0: any of the library, and any number of them",
    )
    source = parser.add_mutually_exclusive_group()
    folder = "a folder with the files of Fashion-MNIST, zipped or not"
    source.add_argument("--data-dir", type=fashion, metavar="PATH", help=folder)
    download = "download Fashion-MNIST (default: the digits of scikit-learn)"
    source.add_argument("--openml", action="store_true", help=download)
    add("--out", type=Path, default=Path("figures"), help="folder of the figure")
    quick = "2 seeds and 15 epochs (Fashion-MNIST: 1) unless said otherwise"
    add("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    options.data = options.data_dir
    if options.openml:
        try:
            options.data = fetch_fashion()
        except (ValueError, OSError) as error:
            parser.error(
                f"argument --openml: expected to reach OpenML: {error}. Pass the files"
                f" with --data-dir. {WHERE_TO_GET_THEM}"
            )
    few, many = (1, 5) if options.data else (15, 40)
    options.data = options.data or digits()
    options.seeds = options.seeds or (2 if options.quick else 16)
    options.epochs = options.epochs or (few if options.quick else many)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    return options


def progress_bar(**options) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def main(arguments: Sequence[str] | None = None) -> dict[str, History]:
    """Trains with all clips, prints the table, and writes the figure."""
    cpu_start, start = time.process_time(), time.perf_counter()
    options = parse_options(arguments)
    settings = settings_to_compare(options.learning_rate)
    rates = [share * options.learning_rate for share in SMALLER]
    total = (len(settings) + len(options.clip) + len(rates)) * options.epochs
    with progress_bar(total=total, unit="epochs") as bar:

        def run(setting: Setting, named: Named = NO_CLIP) -> History:
            network, size = (
                Network(LAYERS, options.units),
                (options.seeds, options.epochs),
            )
            return train(network, setting, named, *size, options.data, bar.update)

        histories = {name: run(setting) for name, setting in settings.items()}
        without = {rate: run(Setting(rate)) for rate in rates}
        for name, clip in options.clip:
            histories[name] = run(Setting(options.learning_rate), clip)
    losses = {
        rate: np.median(np.nan_to_num(history.loss[:, -1], nan=np.inf))
        for rate, history in without.items()
    }
    best = min(losses, key=losses.__getitem__)
    histories[f"no clip, rate {best:g}"] = without[best]
    cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
    print_table(histories)
    tried = ", ".join(f"{rate:g} ({short(loss)})" for rate, loss in losses.items())
    print(
        f"Learning rate {options.learning_rate:g}; for the last line the best one of"
        f" those tried without a clip, by the median train loss: {tried}."
    )
    print(
        f"{total // options.epochs} x {options.seeds} runs, {options.epochs} epochs of"
        f" {len(options.data.x)} images, trained on {jax.devices()[0].device_kind}:"
        f" {seconds:.1f} s (CPU seconds after imports: {cpu:.1f})."
    )
    path = options.out / "image_classifier.png"
    plot_curves(histories, path)
    print(f"Figure: {path}")
    return histories


if __name__ == "__main__":
    main()
