"""Trains an LSTM to predict the next character, with and without clipping.

A text is read in 8 parallel streams, chunk after chunk (truncated backpropagation
through time): the state of the network goes along from chunk to chunk, the gradient
does not. Inside a chunk the gradient is multiplied by one Jacobian per character, so
it can explode, the further the longer the chunk. SGD with a learning rate of 20, far
too large, leads there; two clips and a smaller rate are the remedies compared.

Run:
    python benchmarks/studies/char_lstm.py          # 1 to 2 minutes
    python benchmarks/studies/char_lstm.py --quick  # 20 s, mostly compiling
    python benchmarks/studies/char_lstm.py --text book.txt --chunk 50 200

Expected (nats per character on held-out text, medians of 3 seeds, Python 3.13's sources
as the text; 200 updates for each length, so long chunks also see more of the text):
    chunks of             25     100    400 characters
    no clip              239     449    490   every run is lost (a guess costs 4.6)
    global norm 0.01    2.19    1.95   1.86
    values within 0.001 2.15    1.80   1.57
    learning rate 2     2.12    1.90   1.80   no clip: a well chosen rate needs none
Both clips act at every step, for the norm of a quiet gradient is 0.1 to 0.2: here the
threshold sets the size of the steps, together with the learning rate.

The typical gradient does not grow with the chunk, the rare large one does. Without a
clip it came as norms of up to 2e3, 1e2, 2e21 with these lengths and seeds, and of 1e3,
5e10 and infinity with `--seeds 24 --steps 15`. (Runs without such a spike are lost as
well: all their steps are too large.) Which run explodes how far hangs on rounding, so
another machine has other digits.
One figure is written: the norms of the gradients, and the learning curves.
"""

import math
import sysconfig
import time
from collections import Counter
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
from _figures import GUESS, LIMIT, STYLES
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import optaxclip

FULL = {"seeds": 3, "steps": 200}
QUICK = {"seeds": 2, "steps": 40, "chunk": [10, 50]}
DEFAULT_LENGTH = 200_000  # characters of the standard library's sources
HELD_OUT_LENGTH = 20_000  # characters at the end of the text; or a tenth, if less
VOCABULARY_SIZE = 256  # at most; all rarer characters become one
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEARNING_RATE = 20.0  # far too large
STREAMS = 8  # read in parallel: the batch size
UNITS = 48  # of the LSTM
MOMENTUM = 0.9
SMALL = 2.0  # a learning rate near the best one without a clip
MAX_NORM = 0.01  # of the whole gradient, whose norm is about 0.2 in a quiet step
MAX_VALUE = 0.001  # of each element of the gradient
BROKEN = 10.0  # nats per character; guessing among 95 characters costs 4.6
STEPS_PER_CALL = 20  # at most, between two moves of the progress bar
TOP = 6.0  # nats per character, of the axis of the loss


class Setting(NamedTuple):
    """One way to train. A threshold of inf never clips."""

    learning_rate: float
    max_norm: float = math.inf  # of all gradients together
    max_value: float = math.inf  # of each element


class Text(NamedTuple):
    """Characters as numbers: their places in the vocabulary."""

    train: np.ndarray
    held_out: np.ndarray
    vocabulary: str


class History(NamedTuple):
    """What was recorded; losses in nats per character."""

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


SETTINGS = {  # by the name they have in table and figure
    "no clip": Setting(LEARNING_RATE),
    f"global norm {MAX_NORM:g}": Setting(LEARNING_RATE, max_norm=MAX_NORM),
    f"values within {MAX_VALUE:g}": Setting(LEARNING_RATE, max_value=MAX_VALUE),
    f"learning rate {SMALL:g}": Setting(SMALL),
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


def nats_per_character(params, network: Network, state, characters):
    """Measures the mean cross-entropy of all but the first character of a stream."""
    result: Any = network.apply({"params": params}, state, characters[:, :-1])
    state, scores = result
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, characters[:, 1:])
    return losses.mean(), state


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
        (loss, state), grads = jax.value_and_grad(nats_per_character, has_aux=True)(
            params, network, state, chunk
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
    return nats_per_character(params, network, None, characters)[0]


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
) -> History:
    """Trains every setting from every seed, side by side, on chunks of one length."""
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
    return History(*(x.reshape(shape + x.shape[1:]) for x in recorded))


def print_table(names: Sequence[str], histories: dict[int, History]) -> None:
    """Prints one line per length of the chunks and setting."""
    heads = ["chunk, setting", f"held out, nats/char\n{_study.QUARTILES}"]
    heads += [f"runs > {BROKEN:g}\nor NaN", "norm\nmedian", "norm\nlargest"]
    rows = []
    for chunk, history in histories.items():
        for i, name in enumerate(names):
            lost = ~(history.held_out[i] <= BROKEN)
            row = [f"{chunk:5}, {name}", _study.three_quartiles(history.held_out[i])]
            row += [f"{lost.mean():.0%}", f"{np.median(history.norm[i]):.2g}"]
            row += [f"{history.norm[i].max():.2g}", f"{history.clipped[i].mean():.0%}"]
            rows.append(row)
    _study.print_table([*heads, "steps\nclipped"], rows)


def plot_runs(
    names: Sequence[str], histories: dict[int, History], characters: int
) -> Figure:
    """Draws norms and losses, a column of panels for each length of the chunks."""
    columns = len(histories)
    size = (max(1 + 4.2 * columns, 9.0), 8.0)
    figure, axes = _figures.new_figure(2, columns, size, sharex="col", sharey="row")
    for (top, bottom), (chunk, history) in zip(axes.T, histories.items(), strict=True):
        steps = np.arange(1, history.loss.shape[-1] + 1)
        for style, name, norms, losses in zip(
            STYLES, names, history.norm, history.loss, strict=False
        ):
            thin = {**style, "linewidth": 1.2}
            _figures.plot_runs(top, norms, thin, name)
            _figures.plot_band(bottom, steps, losses, thin)
        last = _study.short(_study.median(history.loss[0])[-1])
        bottom.set_title(f"{names[0]}: above the axis, {last} nats in the end")
        top.axhline(MAX_NORM, label=f"the threshold {MAX_NORM:g}", **LIMIT)
        top.set(yscale="log", title=f"chunks of {chunk} characters")
        bottom.axhline(math.log(characters), label="guessing", **GUESS)
        bottom.set(xscale="log", xlabel="step (log scale)", ylim=(1.4, TOP))
    axes[0, 0].set_ylabel("norm of the gradient, before the clip\n(a line per seed)")
    axes[1, 0].set_ylabel(
        "loss of the chunk, nats per character\n(median and quartiles)"
    )
    figure.suptitle(
        "Without a clip every run is lost, and with long chunks its gradient explodes;"
        " with each of the remedies it learns"
    )
    _figures.legend_below(figure, list(axes[:, 0]), columns=3)
    return figure


def read_text(parser, options) -> Text:
    """Reads the text that the options name, and says where it is too short."""
    text = ""
    try:
        if options.text:
            text = options.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        parser.error(f"argument --text: expected a file to read: {error}")
    text = text if options.text else standard_library()
    needed = max(1000, 2 * STREAMS * max(options.chunk))
    if len(text) < needed:
        parser.error(
            f"argument --text: expected at least {needed} characters for {STREAMS}"
            f" streams of chunks of {max(options.chunk)}, got {len(text)}: give a"
            " longer text or a smaller --chunk"
        )
    return encode(text)


def parse_options(arguments: Sequence[str] | None):
    """Reads the options and the text."""
    parser = _study.option_parser("Trains a character LSTM.", FULL, QUICK)
    add = parser.add_argument
    lengths = "characters per chunk, one or more lengths (default 25 100 400)"
    default = [25, 100, 400]
    add("--chunk", type=_study.whole_number, nargs="+", default=default, help=lengths)
    add("--text", type=Path, help="file to learn (default: Python's standard library)")
    options = _study.parse_options(parser, arguments, QUICK)
    return options, read_text(parser, options)


def main(arguments: Sequence[str] | None = None) -> dict[int, History]:
    """Trains on all lengths of chunks, prints the table, and writes the figure."""
    start = time.perf_counter()
    options, text = parse_options(arguments)
    names, histories = list(SETTINGS), {}
    total = sum(options.chunk) * options.steps
    with _study.progress_bar(total=total, unit="characters", unit_scale=True) as bar:
        for chunk in options.chunk:
            histories[chunk] = train(
                list(SETTINGS.values()),
                options.seeds,
                options.steps,
                chunk,
                text,
                lambda steps, chunk=chunk: bar.update(steps * chunk),
            )
    print_table(names, histories)
    runs = f"{len(names)} x {options.seeds} runs per length of the chunks"
    print(f"{runs} {_study.took(start)}.")
    draw = partial(plot_runs, names, histories, len(text.vocabulary))
    _figures.save_all({"characters": draw}, options.out)
    return histories


if __name__ == "__main__":
    main()
