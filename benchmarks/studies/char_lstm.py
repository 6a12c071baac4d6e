"""Trains an LSTM to predict the next character, with and without clipping.

A text is read in 8 parallel streams, chunk after chunk (truncated backpropagation
through time): the state of the network goes along from chunk to chunk, the gradient
does not. Inside a chunk the gradient is multiplied by one Jacobian per character, so
it can explode, the further the longer the chunk. SGD with a learning rate of 20, far
too large, leads there; two clips and a smaller rate are the remedies compared.

Run:
    python benchmarks/studies/char_lstm.py          # 60 to 80 s on two cores
    python benchmarks/studies/char_lstm.py --quick  # 10 s, mostly compiling
    python benchmarks/studies/char_lstm.py --text book.txt --chunk 50 200 --l2 1e-5

Expected (nats per character on held-out text, medians of 3 seeds, Python 3.11's sources
as the text; 200 updates for each length, so long chunks also see more of the text):
    chunks of             25     100    400 characters
    no clip              370     362    544   every run is lost (a guess costs 4.6)
    global norm 0.01    2.11    1.86   1.77
    values within 0.001 2.09    1.64   1.52
    learning rate 2     2.06    1.78   1.71   no clip: a well chosen rate needs none
Without a clip a rate of 4 is better still (2.06, 1.71, 1.64, of two seeds), and 8 is
too large. Both clips act at every step, for the norm of a quiet gradient is 0.1 to 0.2:
here the threshold sets the size of the steps, together with the learning rate.

The typical gradient does not grow with the chunk, the rare large one does. Without a
clip it comes within about ten steps: norms of up to 1e5, 4e7, 6e8 with these lengths
and seeds, and of 2e7, 3e12, 2e30 with `--seeds 24 --steps 15`. (Runs without such a
spike are lost as well: all their steps are too large.) Which run explodes how far hangs
on rounding, so another machine has other digits.
Two figures are written: the norms of the gradients, and the learning curves.
"""

import argparse
import math
import sysconfig
import time
from collections import Counter
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
from tqdm import tqdm

import optaxclip

DEFAULT_LENGTH = 200_000  # characters of the standard library's sources
HELD_OUT_LENGTH = 20_000  # characters at the end of the text; or a tenth, if less
VOCABULARY_SIZE = 256  # at most; all rarer characters become one
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
STREAMS = 8  # read in parallel: the batch size
UNITS = 48  # of the LSTM
MOMENTUM = 0.9
SMALL = 0.1  # times the learning rate: near the best one without a clip
MAX_NORM = 0.01  # of the whole gradient, whose norm is about 0.2 in a quiet step
MAX_VALUE = 0.001  # of each element of the gradient
BROKEN = 10.0  # nats per character; guessing among 95 characters costs 4.6
STEPS_PER_CALL = 20  # at most, between two moves of the progress bar
PRIME_LENGTH = 80  # characters read before the network writes
SAMPLE_LENGTH = 200  # characters that it writes
COLORS = ("C3", "C0", "C2", "C1")  # of the settings


class Setting(NamedTuple):
    """One way to train. A threshold of inf never clips, a coefficient of 0 is off."""

    learning_rate: float
    max_norm: float = math.inf  # of all gradients together
    max_value: float = math.inf  # of each element
    l1: float = 0.0  # times the sum of |w| over the kernels, added to the loss
    l2: float = 0.0  # times the sum of w**2 over the kernels, added to the loss


class Text(NamedTuple):
    """Characters as numbers: their places in the vocabulary."""

    train: np.ndarray
    held_out: np.ndarray
    vocabulary: str


class History(NamedTuple):
    """What was recorded; losses in nats per character, without the penalties."""

    loss: np.ndarray  # [settings, seeds, steps], of the chunk before its update
    norm: np.ndarray  # [settings, seeds, steps], of the gradient before the clip
    clipped: np.ndarray  # [settings, seeds, steps], whether the clip changed it
    held_out: np.ndarray  # [settings, seeds], after the last step


def standard_library() -> str:
    """Joins sources that every Python has."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < DEFAULT_LENGTH:
            text += path.read_text(encoding="utf-8", errors="replace")
    return text[:DEFAULT_LENGTH]


def encode(text: str) -> Text:
    """Numbers the characters, and holds out the end of the text."""
    characters = [character for character, _ in Counter(text).most_common()]
    if len(characters) > VOCABULARY_SIZE:
        characters = [*characters[: VOCABULARY_SIZE - 1], REPLACEMENT]
    vocabulary = "".join(sorted(set(characters)))
    numbers = {character: number for number, character in enumerate(vocabulary)}
    rare = numbers.get(REPLACEMENT, 0)
    codes = np.array([numbers.get(character, rare) for character in text], np.int32)
    held_out = min(HELD_OUT_LENGTH, len(text) // 10)
    return Text(codes[:-held_out], codes[-held_out:], vocabulary)


def make_settings(learning_rate: float, l1: float, l2: float) -> dict[str, Setting]:
    """Lists the settings to compare, by the name they have in table and figures."""
    setting, small = Setting(learning_rate, l1=l1, l2=l2), SMALL * learning_rate
    return {
        "no clip": setting,
        f"global norm {MAX_NORM:g}": setting._replace(max_norm=MAX_NORM),
        f"values within {MAX_VALUE:g}": setting._replace(max_value=MAX_VALUE),
        f"learning rate {small:g}": setting._replace(learning_rate=small),
    }


class Network(nn.Module):
    """One layer of LSTM units, and a linear layer that scores the next character.

    Of linen, not nnx: its parameters are a plain tree from the start, which `vmap` over
    the runs and `scan` over the steps take as it is.
    """

    vocabulary_size: int

    @nn.compact
    def __call__(self, state, characters):
        # Not the usual orthogonal matrices: drawn for several runs at once, their QR
        # decompositions can block each other for ever on two cores (jaxlib 0.10).
        kernel_init = nn.initializers.lecun_normal()
        cell = nn.OptimizedLSTMCell(UNITS, recurrent_kernel_init=kernel_init)
        one_hot = jax.nn.one_hot(characters, self.vocabulary_size)
        state, hidden = nn.RNN(cell, return_carry=True)(one_hot, initial_carry=state)
        return state, nn.Dense(self.vocabulary_size)(hidden)


def make_optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Puts the clips before SGD, so that its momentum sees clipped gradients only.

    Your own optimizer needs one clip. Here a threshold of inf switches one or both off:
    the settings differ in numbers alone, and one compiled program trains them all.
    """
    return optax.chain(
        optaxclip.clip_by_global_norm(setting.max_norm),
        optaxclip.clip_by_value(setting.max_value),
        optax.sgd(setting.learning_rate, momentum=MOMENTUM),
    )


def read(network: Network, params, state, characters):
    """Returns the next state, and scores of what comes after each character."""
    result: Any = network.apply({"params": params}, state, characters)
    return result


def nats_per_character(network: Network, params, state, characters):
    """Measures the mean cross-entropy of all but the first character of a stream."""
    state, scores = read(network, params, state, characters[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, characters[:, 1:])
    return losses.mean(), state


def penalized_loss(params, network: Network, setting: Setting, state, characters):
    """Adds penalties on the weights, not the biases; loss and state come along."""
    loss, state = nats_per_character(network, params, state, characters)
    leaves = flatten_dict(params).items()
    weights, _ = ravel_pytree([leaf for path, leaf in leaves if path[-1] == "kernel"])
    penalty = setting.l1 * jnp.abs(weights).sum() + setting.l2 * (weights**2).sum()
    return loss + penalty, (loss, state)


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, 0))  # over the runs
def init_run(network: Network, setting: Setting, seed):
    """Draws the parameters of a run and starts its optimizer."""
    state = (jnp.zeros((STREAMS, UNITS)), jnp.zeros((STREAMS, UNITS)))
    variables = network.init(jax.random.key(seed), state, jnp.zeros((STREAMS, 1), int))
    params = variables["params"]
    return params, make_optimizer(setting).init(params), state


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@partial(jax.vmap, in_axes=(None, 0, 0, None))  # over the runs; they share the text
def train_steps(network: Network, setting: Setting, run, chunks):
    """Makes one step per chunk; `chunks` is `[steps, streams, length + 1]`."""
    optimizer = make_optimizer(setting)

    def step(run, chunk):
        params, opt_state, state = run
        # The state is no variable of this derivative: here backpropagation ends.
        grads, (loss, state) = jax.grad(penalized_loss, has_aux=True)(
            params, network, setting, state, chunk
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        stats = optaxclip.summary(opt_state)  # what the clip of the norm measured
        largest = jnp.abs(ravel_pytree(grads)[0]).max()
        clipped = (stats["clip_0/factor"] < 1) | (largest > setting.max_value)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, state), (loss, stats["clip_0/norm"], clipped)

    return jax.lax.scan(step, run, chunks)


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None))
def evaluate(network: Network, params, characters):
    """Measures the loss on streams, the state carried from their first characters."""
    return nats_per_character(network, params, None, characters)[0]


def take_chunks(codes: np.ndarray, chunk: int, steps: range) -> np.ndarray:
    """Cuts `[steps, streams, chunk + 1]` characters out of the text, a closed circle.

    Each stream starts at an eighth of its own, and goes on where its last chunk ended.
    """
    starts = np.arange(STREAMS) * (codes.size // STREAMS)
    first = np.array(steps)[:, None] * chunk + starts
    return codes[(first[..., None] + np.arange(chunk + 1)) % codes.size]


def train(
    settings: Sequence[Setting],
    seeds: int,
    steps: int,
    chunk: int,
    text: Text,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> tuple[History, Any]:
    """Trains every setting from every seed, side by side, on chunks of one length.

    Returns what was recorded, and all parameters: arrays `[settings * seeds, ...]`.
    """
    network = Network(len(text.vocabulary))
    runs_settings = jax.tree.map(
        lambda *values: np.repeat(np.array(values, np.float32), seeds), *settings
    )
    runs = init_run(network, runs_settings, np.tile(np.arange(seeds), len(settings)))
    count = math.gcd(steps, STEPS_PER_CALL)  # every call alike: compiled once
    parts = []
    for first in range(0, steps, count):
        chunks = take_chunks(text.train, chunk, range(first, first + count))
        runs, part = train_steps(network, runs_settings, runs, chunks)
        parts.append(jax.device_get(part))  # waits for the steps to end
        on_steps(count)
    length = text.held_out.size // STREAMS
    streams = text.held_out[: STREAMS * length].reshape(STREAMS, length)
    held_out = np.asarray(evaluate(network, runs[0], streams))
    recorded = [*map(np.hstack, zip(*parts, strict=True)), held_out]
    shape = (len(settings), seeds)
    return History(*(x.reshape(shape + x.shape[1:]) for x in recorded)), runs[0]


@partial(jax.jit, static_argnums=0)
def sample(network: Network, params, prime, key):
    """Lets the network read some characters, then write some of its own."""

    def write(carry, key):
        state, scores = carry
        character = jax.random.categorical(key, scores[:, -1:])
        return read(network, params, state, character), character[0, 0]

    state, scores = read(network, params, None, prime[None])
    keys = jax.random.split(key, SAMPLE_LENGTH)
    return jax.lax.scan(write, (state, scores[:, -1:]), keys)[1]


def print_sample(names: Sequence[str], results, text: Text) -> None:
    """Prints what the best of the clipped networks writes."""
    losses = np.array([history.held_out[1:3] for history, _ in results.values()])
    best = np.nan_to_num(losses, nan=np.inf).argmin()
    place, i, seed = map(int, np.unravel_index(best, losses.shape))
    chunk, (_, params) = list(results.items())[place]
    run = (1 + i) * losses.shape[-1] + seed  # the first setting has no clip
    params = jax.tree.map(lambda leaf: leaf[run], params)
    prime, network = text.held_out[:PRIME_LENGTH], Network(len(text.vocabulary))
    written = np.asarray(sample(network, params, prime, jax.random.key(0)))
    print(f"The best clipped run ({names[1 + i]}, chunks of {chunk}) reads")
    print("".join(text.vocabulary[code] for code in prime), "\n--- and writes")
    print("".join(text.vocabulary[code] for code in written), "\n---")


def print_table(names: Sequence[str], histories: dict[int, History]) -> None:
    """Prints one aligned line per length of the chunks and setting."""
    columns = "{:>5}  {:19} {:>21}  {:>10} {:>7} {:>8} {:>8}".format
    print(columns("", "", "held out, nats/char", "runs > 10", "norm", "norm", "steps"))
    parts = "best / median / worst"
    print(columns("chunk", "setting", parts, "or NaN", "median", "largest", "clipped"))
    for chunk, history in histories.items():
        for i, name in enumerate(names):
            final = np.nan_to_num(history.held_out[i], nan=np.inf)
            parts = final.min(), np.median(final), final.max()
            cells = [" / ".join(f"{part:.3g}" for part in parts)]
            cells += [f"{np.mean(final > BROKEN):.0%}"]
            cells += [f"{np.median(history.norm[i]):.2g}"]
            cells += [f"{history.norm[i].max():.2g}"]
            print(columns(chunk, name, *cells, f"{history.clipped[i].mean():.0%}"))


def plot_runs(
    runs_of_chunks, names: Sequence[str], title: str, path: Path, max_norm=math.nan
) -> None:
    """Draws a panel for each length of the chunks, and in it a line for each run."""
    from matplotlib import rcParams  # imported here, for it takes most of a second
    from matplotlib.figure import Figure

    rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 120})
    figure = Figure(figsize=(1 + 4.5 * len(runs_of_chunks), 5), layout="constrained")
    axes = figure.subplots(1, len(runs_of_chunks), sharey=True, squeeze=False)[0]
    for ax, (chunk, settings) in zip(axes, runs_of_chunks.items(), strict=True):
        for i, runs in enumerate(settings):
            finite = np.where(np.isfinite(runs), runs, np.nan).T
            steps = np.arange(1, len(finite) + 1)
            lines = ax.plot(steps, finite, color=COLORS[i], linewidth=1, alpha=0.8)
            lines[0].set_label(names[i])
        if math.isfinite(max_norm):
            ax.axhline(max_norm, color="k", linestyle="--", label="threshold of norm")
        ax.set(xscale="log", yscale="log", xlabel="step (log scale)")
        ax.set_title(f"chunks of {chunk} characters")
    axes[0].set_ylabel(title)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def whole_number(text: str) -> int:
    """Reads an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def positive_number(text: str, or_zero: bool = False) -> float:
    """Reads an option that must be a finite number above zero, or zero itself."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf or (or_zero and value == 0):
        return value
    bound = ">= 0" if or_zero else "> 0"
    raise argparse.ArgumentTypeError(f"expected a number {bound}, got {text!r}")


def parse_options(arguments) -> tuple[argparse.Namespace, Text]:
    """Reads the options and the text, and makes the folder for the figures."""
    parser = argparse.ArgumentParser(description="Trains a character LSTM with clips.")
    add, coefficient = parser.add_argument, partial(positive_number, or_zero=True)
    add("--seeds", type=whole_number, help="runs per setting (default 3)")
    add("--steps", type=whole_number, help="updates per run (default 200)")
    add("--learning-rate", type=positive_number, default=20.0, help="default 20")
    lengths = "characters per chunk, one or more lengths (default 25 100 400)"
    add("--chunk", type=whole_number, nargs="+", help=lengths)
    add("--text", type=Path, help="file to learn (default: Python's standard library)")
    add("--l1", type=coefficient, default=0.0, help="penalty on |w| of the kernels")
    add("--l2", type=coefficient, default=0.0, help="penalty on w**2 of the kernels")
    add("--out", type=Path, default=Path("figures"), help="folder of the figures")
    quick = "2 seeds, 40 steps, chunks of 10 and 50 unless said otherwise"
    add("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (2 if options.quick else 3)
    options.steps = options.steps or (40 if options.quick else 200)
    options.chunk = options.chunk or ([10, 50] if options.quick else [25, 100, 400])
    try:
        text = standard_library()
        if options.text:
            text = options.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        parser.error(f"argument --text: expected a file to read: {error}")
    needed = max(1000, 2 * STREAMS * max(options.chunk))
    if len(text) < needed:
        parser.error(
            f"argument --text: expected at least {needed} characters for {STREAMS}"
            f" streams of chunks of {max(options.chunk)}, got {len(text)}: give a"
            " longer text or a smaller --chunk"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    return options, encode(text)


def plot_all(names, histories: dict[int, History], folder: Path) -> list[Path]:
    """Writes the figures, and gives their paths."""
    paths = [folder / "characters_norms.png", folder / "characters_loss.png"]
    norms = {chunk: history.norm for chunk, history in histories.items()}
    title = "norm of the gradient before the clip"
    plot_runs(norms, names, title, paths[0], MAX_NORM)
    losses = {chunk: history.loss for chunk, history in histories.items()}
    title = "loss of the chunk (nats per character)"
    plot_runs(losses, names, title, paths[1])
    return paths


def progress_bar(**options) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def main(arguments: Sequence[str] | None = None) -> dict[int, History]:
    """Trains on all lengths of chunks, prints the table, and writes the figures."""
    cpu_start, start = time.process_time(), time.perf_counter()
    options, text = parse_options(arguments)
    settings = make_settings(options.learning_rate, options.l1, options.l2)
    names, results = list(settings), {}
    total = sum(options.chunk) * options.steps
    with progress_bar(total=total, unit="characters", unit_scale=True) as bar:
        for chunk in options.chunk:
            results[chunk] = train(
                list(settings.values()),
                options.seeds,
                options.steps,
                chunk,
                text,
                lambda steps, chunk=chunk: bar.update(steps * chunk),
            )
    cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
    histories = {chunk: history for chunk, (history, _) in results.items()}
    print_table(names, histories)
    print(
        f"{len(names)} x {options.seeds} runs per length of the chunks, trained on"
        f" {jax.devices()[0].device_kind}: {seconds:.1f} s (CPU seconds after imports:"
        f" {cpu:.1f})."
    )
    print_sample(names, results, text)
    print("Figures:", *plot_all(names, histories, options.out), sep="\n  ")
    return histories


if __name__ == "__main__":
    main()
