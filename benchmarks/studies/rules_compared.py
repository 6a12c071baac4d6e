"""Compares the published clipping rules on tasks where clipping matters.

Three tasks (digits, handwriting, the textbooks' regression on unscaled targets), each
trained by SGD with momentum and by Adam, meet the same corrupted batches: targets that
belong to other rows, inputs or targets multiplied by 1000, and NaN. Every rule sits in
the same optimizer, within `optaxclip.skip_if_nonfinite`, so that no NaN decides.

Rules with a threshold are tuned first: the best of a small grid for each task and
optimizer, on seeds of their own. Rules without one are taken as published.

Run:
    python benchmarks/studies/rules_compared.py          # some 5 minutes on two cores
    python benchmarks/studies/rules_compared.py --tasks digits --rules zclip autoclip
    python benchmarks/studies/rules_compared.py --quick  # four rules, 2 seeds

Expected (8 seeds):
    a threshold tuned   hardly any difference: the global norm, that of groups or units,
                        or a soft clip, ahead on one task and behind on another
    none, with Adam     a quantile of the norms so far is as good as the tuned clip or
                        better, but for a few percent on digits
    none, with SGD      a bound of each step by the norm of the parameters is as good
                        as the tuned clip or better. Rules that go by the history of
                        the norms alone lose all runs of the regression, and are thrown
                        about on handwriting: there the first gradients are too large
                        already, and history calls that normal; a cap of 1 saves the
                        runs, far from the best loss
    no clip             half of the runs are lost
So tune the global norm; where you cannot, take `clip_by_relative_step` with SGD, and
`streaming_quantile(0.5)` with Adam. Limits: three small tasks; the learning rates are
those that suit the tuned global clip; and 300 steps, where the papers have a hundred
times as many.

For each task and optimizer it prints a table, at the end the mean ranks, where each
rule loses to the tuned global clip, and what follows for the choice of one. A figure
for each task shows the loss around a corrupted batch, and below it the norm of the
gradient before and after the rule.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits, make_regression
from tqdm import tqdm

import optaxclip
from optaxclip import factors, norms, thresholds

OPTIMIZERS = ("momentum", "Adam")
MOMENTUM = 0.9
TUNED = "clip_by_global_norm"  # the rule that all others are compared with
TUNING_SEEDS = (1001, 1002)  # apart from those that the tables are about
MARGIN = 1.05  # times the tuned clip's loss: more is worse
RECOVERED = 1.1  # times the loss before a fault
BEFORE = 10  # steps before a fault, whose median it is
LAST = 20  # steps, whose median is the final loss
SHORTEST = 120  # steps, so that every fault has its place
STEPS_PER_CALL = 50  # at most, between two moves of the progress bar
UPDATES_TIMED = 200  # in one call
# Compiling takes most of the time: this saves a quarter of it, and steps are as fast.
COMPILE_LESS = {"xla_backend_optimization_level": 1}

GOOD, SHUFFLED, SCALED, NAN = range(4)  # what a batch is like
FAULTS = ("good", "wrong targets", "x 1000", "NaN")
PLACES = {0.35: SHUFFLED, 0.45: SCALED, 0.55: NAN, 0.65: SCALED, 0.75: SHUFFLED}
BURST = (0.85, 3)  # the share of the steps after which so many batches are NaN


# ---- Tasks ---------------------------------------------------------------------------


class Data(NamedTuple):
    """Rows to train on, and rows that are never corrupted to measure the loss on."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Task(NamedTuple):
    """What is learnt, from what, and how fast."""

    data: Data
    batch_size: int
    learning_rates: dict[str, float]  # that suit a clipped gradient, by optimizer
    init: Callable[[jax.Array], Any]  # key -> params
    loss: Callable[..., jax.Array]  # params, x, y -> loss of the batch
    score: Callable[..., jax.Array]  # params, x, y -> the loss to report, above zero
    scale: tuple[float, float]  # by which a scaled batch multiplies x and y
    norm: float  # of a usual gradient, around which thresholds are tried


class Network(nn.Module):
    """One hidden layer of relu units."""

    units: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.he_uniform()
        hidden = nn.relu(nn.Dense(self.units, kernel_init=init)(x))
        return nn.Dense(self.outputs, kernel_init=init)(hidden)


@cache
def digits() -> Task:
    """Ten digits of 8 x 8 pixels; cross-entropy."""
    x, y = load_digits(return_X_y=True)
    x, y = np.asarray(x / 16, np.float32), np.asarray(y, np.int32)
    network = Network(32, 10)

    def loss(params, x, y):
        scores = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    return Task(
        data=Data(x[:-300], y[:-300], x[-300:], y[-300:]),
        batch_size=32,
        learning_rates={"momentum": 0.1, "Adam": 0.01},
        init=lambda key: network.init(key, jnp.zeros((1, 64))),
        loss=loss,
        score=loss,
        scale=(1000.0, 1.0),
        norm=1.0,
    )


@cache
def regression() -> Task:
    """The textbooks' targets between -400 and 400, as they are; squared error."""
    x, y = make_regression(1000, 20, noise=0.1, random_state=1)[:2]
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    network = Network(25, 1)

    def loss(params, x, y):
        return jnp.mean((network.apply(params, x)[:, 0] - y) ** 2)

    return Task(
        data=Data(x[:500], y[:500], x[500:], y[500:]),
        batch_size=32,
        learning_rates={"momentum": 0.01, "Adam": 0.1},
        init=lambda key: network.init(key, jnp.zeros((1, 20))),
        loss=loss,
        score=loss,
        scale=(1.0, 1000.0),
        norm=100.0,
    )


@cache
def handwriting(steps: int = 40, hidden: int = 24) -> Task:
    """Graves' task: the next offset of a pen, by an LSTM and two Gaussians.

    The loss is summed over time; the score is the perplexity per time step.
    """
    generator = np.random.default_rng(0)
    w1, w2 = generator.uniform(0.15, 0.45, (2, 520, 1))
    a, b = generator.uniform(0, 2 * np.pi, (2, 520, 1))
    t = np.arange(steps + 2)
    x = np.sin(w1 * t + a) + 0.5 * np.sign(np.sin(w2 * t + b))
    offsets = np.diff(np.stack([x, np.cos(w1 * t + a)], axis=-1), axis=1)
    offsets += 0.01 * generator.standard_normal(offsets.shape)
    x, y = np.float32(offsets[:, :-1]), np.float32(offsets[:, 1:])

    def init(key):  # four leaves: Flax's LSTM has fourteen, which take long to compile
        draw, keys = nn.initializers.glorot_uniform(), jax.random.split(key)
        gates = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)  # remembers
        cell = {"kernel": draw(keys[0], (2 + hidden, 4 * hidden)), "bias": gates}
        head = {"kernel": draw(keys[1], (hidden, 10)), "bias": jnp.zeros(10)}
        return {"cell": cell, "head": head}

    def read(params, x):
        def step(carry, offset):
            h, c = carry
            z = jnp.concatenate([offset, h], axis=-1) @ params["cell"]["kernel"]
            i, f, g, o = jnp.split(z + params["cell"]["bias"], 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((len(x), hidden))
        states = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))[1]
        return states.swapaxes(0, 1) @ params["head"]["kernel"] + params["head"]["bias"]

    def loss(params, x, y):
        logits, means, widths = jnp.split(read(params, x), (2, 6), axis=-1)
        pairs = (*y.shape[:-1], 2, 2)
        means, widths = means.reshape(pairs), widths.reshape(pairs)
        z = (y[..., None, :] - means) * jnp.exp(-widths)
        each = -0.5 * z**2 - widths - 0.5 * math.log(2 * math.pi)
        likelihoods = nn.logsumexp(nn.log_softmax(logits) + each.sum(-1), axis=-1)
        return -likelihoods.sum(axis=1).mean()

    return Task(
        data=Data(x[:-8], y[:-8], x[-8:], y[-8:]),
        batch_size=8,
        learning_rates={"momentum": 1e-3, "Adam": 0.01},
        init=init,
        loss=loss,
        score=lambda *arguments: jnp.exp(loss(*arguments) / steps),
        scale=(1000.0, 1000.0),
        norm=300.0,
    )


QUICK_TASKS = ("regression",)
TASKS = {"digits": digits, "handwriting": handwriting, "regression": regression}


# ---- Rules ---------------------------------------------------------------------------


class Rule(NamedTuple):
    """A rule and its place in the optimizer."""

    build: Callable[..., optax.GradientTransformation]  # takes a threshold, if it has
    place: Callable[..., optax.GradientTransformation]
    grid: Callable[[float], np.ndarray] | None = None  # thresholds to choose from
    optimizers: tuple[str, ...] = OPTIMIZERS


class Moments(NamedTuple):
    """The optimizer without its learning rate; only one of them does anything."""

    adam: optax.GradientTransformation
    momentum: optax.GradientTransformation


def before(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips gradients, before the optimizer's moments see them: the usual place."""
    return optax.chain(watched(rule), *moments, optax.scale(-learning_rate))


def after(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips what the moments made of the gradients, before the learning rate."""
    return optax.chain(*moments, watched(rule), optax.scale(-learning_rate))


def last(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips what is added to the parameters."""
    scale, rule = optax.scale(-learning_rate), watched(rule, learning_rate)
    return optax.chain(*moments, scale, rule)


def each_step(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips what each gradient adds, before momentum makes a sum of such steps."""
    scale, rule = optax.scale(-learning_rate), watched(rule, learning_rate)
    return optax.chain(moments.adam, scale, rule, moments.momentum)


def instead(make, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Is the whole optimizer, made from the learning rate."""
    del moments
    return optax.chain(watched(make(1.0)), optax.scale(learning_rate))


def try_norms(norm: float) -> np.ndarray:
    """Lists thresholds to try where the norm of a usual gradient is known."""
    return norm * np.logspace(-2.5, 1, 8)


def try_values(norm: float) -> np.ndarray:
    return try_norms(norm) / 40  # about the root of the number of elements


def try_ratios(norm: float) -> np.ndarray:
    del norm
    return np.logspace(-2.5, 1, 8)


# To add a rule, add a line: how to build it, and its place. The first ones have a
# threshold, which is tuned; the others are as published.
RULES: dict[str, Rule] = {
    "none": Rule(optax.identity, before),
    TUNED: Rule(optaxclip.clip_by_global_norm, before, try_norms),
    "clip_by_leaf_norm": Rule(optaxclip.clip_by_leaf_norm, before, try_norms),
    "clip_by_group_norm": Rule(optaxclip.clip_by_group_norm, before, try_norms),
    "clip_by_value": Rule(optaxclip.clip_by_value, before, try_values),
    "normalize_by_update_norm": Rule(
        optaxclip.normalize_by_update_norm, before, try_norms
    ),
    "soften": Rule(
        lambda limit: optaxclip.clip_by(norms.global_norm, limit, factors.soften),
        before,
        try_norms,
    ),
    "adaptive_grad_clip": Rule(optaxclip.adaptive_grad_clip, before, try_ratios),
    "global norm 1": Rule(lambda: optaxclip.clip_by_global_norm(1.0), before),
    "clip_by_block_rms": Rule(lambda: optaxclip.clip_by_block_rms(1.0), after),
    "window_percentile(50)": Rule(
        lambda: by_rule(thresholds.window_percentile(50.0, window=128)), before
    ),
    "streaming_quantile(0.5)": Rule(
        lambda: by_rule(thresholds.streaming_quantile(0.5)), before
    ),
    "autoclip": Rule(optaxclip.autoclip, before),
    "zclip": Rule(optaxclip.zclip, before),
    "zclip, no cap": Rule(lambda: optaxclip.zclip(max_norm=jnp.inf), before),
    "adagc": Rule(optaxclip.adagc, before),
    "adagc, no cap": Rule(lambda: optaxclip.adagc(max_norm=jnp.inf), before),
    "k_sigma_clip": Rule(optaxclip.k_sigma_clip, before),
    "aggc": Rule(optaxclip.aggc, before),
    "stable_spam_clip": Rule(optaxclip.stable_spam_clip, before),
    "spam_clip": Rule(optaxclip.spam_clip, before),
    "u_clip": Rule(
        lambda limit: optaxclip.u_clip(optaxclip.clip_by_global_norm(limit)),
        before,
        try_norms,
    ),
    "acclip": Rule(lambda: acclip, instead, optimizers=("momentum",)),
    "stable_adamw": Rule(lambda: optaxclip.stable_adamw, instead, optimizers=("Adam",)),
    "clippy": Rule(optaxclip.clippy, last),
    "clip_by_relative_step": Rule(optaxclip.clip_by_relative_step, each_step),
    "clip_by_trust_ratio": Rule(optaxclip.clip_by_trust_ratio, after),
    "clip_singular_values": Rule(optaxclip.clip_singular_values, before, try_norms),
    "clip_by_spectral_norm": Rule(optaxclip.clip_by_spectral_norm, before, try_norms),
}
QUICK_RULES = ("autoclip", "adaptive_grad_clip")


def acclip(learning_rate) -> optax.GradientTransformation:
    """Steps as far as SGD: its momentum is a mean, ten times smaller than a sum."""
    return optax.chain(
        optaxclip.acclip(b1=MOMENTUM), optax.scale(-learning_rate / (1 - MOMENTUM))
    )


def by_rule(rule) -> optax.GradientTransformation:
    return optaxclip.clip_by_global_norm(rule)


class WatchedState(NamedTuple):
    """What a rule did to its last updates."""

    rule_state: Any
    norm_before: jax.Array
    norm_after: jax.Array
    changed: jax.Array  # whether any element did


def watched(
    rule: optax.GradientTransformation, unit=1.0
) -> optax.GradientTransformation:
    """Remembers the norm before and after a rule, in the same way for all rules.

    The norms of steps are in units of the learning rate, as those of gradients are.
    """
    rule = optax.with_extra_args_support(rule)

    def init_fn(params):
        zero = jnp.zeros(())
        return WatchedState(rule.init(params), zero, zero, jnp.zeros((), bool))

    def update_fn(updates, state, params=None):
        clipped, rule_state = rule.update(updates, state.rule_state, params)
        differ = jax.tree.map(lambda x, y: jnp.any(x != y), updates, clipped)
        changed = jnp.stack(jax.tree.leaves(differ)).any()
        sizes = (optax.tree.norm(x) / unit for x in (updates, clipped))
        return clipped, WatchedState(rule_state, *sizes, changed)

    return optax.GradientTransformation(init_fn, update_fn)


def only_if(
    condition, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Does nothing unless the traced condition holds."""

    def update_fn(updates, state, params=None):
        changed, state = inner.update(updates, state, params)
        return jax.tree.map(partial(jnp.where, condition), changed, updates), state

    return optax.GradientTransformation(inner.init, update_fn)


def adam_or_momentum(is_adam) -> Moments:
    """Chooses by a traced number, so that one compiled program trains with both."""
    return Moments(
        only_if(is_adam, optax.scale_by_adam()),
        only_if(jnp.logical_not(is_adam), optax.trace(MOMENTUM)),
    )


class Lane(NamedTuple):
    """One of the runs that one program trains side by side."""

    is_adam: Any
    threshold: Any  # of no meaning for rules without one
    seed: Any


def make_optimizer(task_name: str, rule_name: str, lane: Lane):
    """Puts a rule into its place, and the guard around all of it."""
    rule, rates = RULES[rule_name], TASKS[task_name]().learning_rates
    built = rule.build(lane.threshold) if rule.grid else rule.build()
    rate = jnp.where(lane.is_adam, rates["Adam"], rates["momentum"])
    optimizer = rule.place(built, adam_or_momentum(lane.is_adam), rate)
    return optaxclip.skip_if_nonfinite(optimizer)


# ---- Training ------------------------------------------------------------------------


class History(NamedTuple):
    """What was recorded, arrays `[runs, steps]`."""

    score: np.ndarray  # on rows that are never corrupted, after each step
    norm_before: np.ndarray  # the rule
    norm_after: np.ndarray
    changed: np.ndarray  # whether the rule changed anything


class Result(NamedTuple):
    """The runs of one rule from all seeds, with one task and one optimizer."""

    start: np.ndarray  # [seeds], the score of the untrained network
    history: History  # [seeds, steps]
    threshold: float  # that was tuned, NaN for a rule without


Results = dict[tuple[str, str], dict[str, Result]]  # by task and optimizer, by rule


def make_faults(steps: int) -> np.ndarray:
    """Says what the batch of each step is like: the same for all runs."""
    faults = np.full(steps, GOOD)
    for share, fault in PLACES.items():
        faults[int(share * steps)] = fault
    share, length = BURST
    faults[int(share * steps) : int(share * steps) + length] = NAN
    return faults


def spoil(fault, x, y, scale: tuple[float, float]):
    """Corrupts a batch in one of the ways."""
    y = jnp.where(fault == SHUFFLED, jnp.roll(y, 1, axis=0), y)
    x = jnp.where(fault == SCALED, scale[0] * x, x)
    y = jnp.where(fault == SCALED, (scale[1] * y).astype(y.dtype), y)
    return jnp.where(fault == NAN, jnp.nan, x), y


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None))
def init_params(task_name: str, seed, data: Data):
    """Draws the parameters of a run, and measures them."""
    task = TASKS[task_name]()
    params = task.init(jax.random.key(seed))
    return params, task.score(params, data.test_x, data.test_y)


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.vmap, in_axes=(None, None, 0, 0))
def init_optimizer(task_name: str, rule_name: str, lane: Lane, params):
    return make_optimizer(task_name, rule_name, lane).init(params)


@partial(
    jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=COMPILE_LESS
)
@partial(jax.vmap, in_axes=(None, None, 0, 0, 0, None, None))
def train_steps(task_name, rule_name, lane: Lane, run, rows, faults, data: Data):
    """Makes one step per batch of row numbers, `[steps, rows]`."""
    task = TASKS[task_name]()
    optimizer = make_optimizer(task_name, rule_name, lane)

    def step(run, batch):
        params, opt_state = run
        rows, fault = batch
        x, y = spoil(fault, data.x[rows], data.y[rows], task.scale)
        grads = jax.grad(task.loss)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen = [optax.tree.get(opt_state, name) for name in History._fields[1:]]
        score = task.score(params, data.test_x, data.test_y)
        return (params, opt_state), History(score, *seen)

    return jax.lax.scan(step, run, (rows, faults))


def train(
    task_name: str,
    rule_name: str,
    lanes: Lane,
    faults: np.ndarray,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> tuple[np.ndarray, History]:
    """Trains all lanes; returns the scores before and the history.

    A seed gives the same initial parameters and batches whatever the rule.
    """
    task = TASKS[task_name]()
    params, start = init_params(task_name, lanes.seed, task.data)
    run = params, init_optimizer(task_name, rule_name, lanes, params)
    size = (faults.size, task.batch_size)
    rows = np.stack(
        [
            np.random.default_rng(seed).integers(len(task.data.x), size=size)
            for seed in lanes.seed
        ]
    )
    count = math.gcd(faults.size, STEPS_PER_CALL)  # every call alike: compiled once
    parts = []
    for first in range(0, faults.size, count):
        now = slice(first, first + count)
        run, part = train_steps(
            task_name, rule_name, lanes, run, rows[:, now], faults[now], task.data
        )
        parts.append(jax.device_get(part))  # waits for the steps to end
        on_steps(count)
    return np.asarray(start), jax.tree.map(lambda *x: np.hstack(x), *parts)


def make_lanes(*choices: Sequence) -> Lane:
    """Combines optimizers, thresholds and seeds, in this order."""
    names, limits, seeds = zip(*product(*choices), strict=True)
    is_adam = np.array([name == "Adam" for name in names])
    return Lane(is_adam, np.float32(limits), np.array(seeds))


def tune(task_name, rule_name, size: int, faults, on_steps) -> dict[str, float]:
    """Finds the best threshold of the grid for each optimizer, on a few other seeds.

    Lanes go through the program of the comparison, `size` of them at a time.
    """
    rule = RULES[rule_name]
    if rule.grid is None:
        return dict.fromkeys(rule.optimizers, math.nan)
    grid = rule.grid(TASKS[task_name]().norm)
    lanes = make_lanes(rule.optimizers, grid, TUNING_SEEDS)
    calls = tuning_calls(rule, size)
    padded = jax.tree.map(lambda x: np.resize(x, (calls, size)), lanes)
    finals = []
    for call in range(calls):
        some = jax.tree.map(lambda x, call=call: x[call], padded)
        history = train(task_name, rule_name, some, faults, on_steps)[1]
        finals.append(final_score(history))
    shape = (len(rule.optimizers), len(grid), len(TUNING_SEEDS))
    medians = np.median(np.hstack(finals)[: lanes.seed.size].reshape(shape), axis=-1)
    best = grid[medians.argmin(axis=-1)].tolist()
    return dict(zip(rule.optimizers, best, strict=True))


def tuning_calls(rule: Rule, size: int) -> int:
    """Counts how often `size` lanes are trained to tune a rule."""
    if rule.grid is None:
        return 0
    lanes = len(rule.optimizers) * len(rule.grid(1.0)) * len(TUNING_SEEDS)
    return math.ceil(lanes / size)


def compare_one(job, seeds: int, faults: np.ndarray, on_steps) -> dict[str, Result]:
    """Tunes one rule on one task, then trains it from all seeds; by optimizer."""
    task_name, rule_name = job
    optimizers = RULES[rule_name].optimizers
    tuned = tune(task_name, rule_name, len(optimizers) * seeds, faults, on_steps)
    lanes = make_lanes(optimizers, [math.nan], range(seeds))
    lanes = lanes._replace(threshold=np.repeat(np.float32(list(tuned.values())), seeds))
    start, history = train(task_name, rule_name, lanes, faults, on_steps)
    results = {}
    for i, name in enumerate(optimizers):
        own = slice(i * seeds, (i + 1) * seeds)
        part = jax.tree.map(lambda x, own=own: x[own], history)
        results[name] = Result(start[own], part, tuned[name])
    return results


def compare(tasks, rules, seeds: int, faults: np.ndarray) -> Results:
    """Trains all rules on all tasks, on as many threads as there are cores.

    Most of the time goes into compiling, which uses one core each.
    """
    jobs = list(product(tasks, rules))
    sizes = [(RULES[rule], len(RULES[rule].optimizers) * seeds) for _, rule in jobs]
    total = faults.size * sum(1 + tuning_calls(*size) for size in sizes)
    results: Results = {cell: {} for cell in product(tasks, OPTIMIZERS)}
    with (
        progress_bar(total=total, unit="steps") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        work = partial(compare_one, seeds=seeds, faults=faults, on_steps=bar.update)
        for (task, rule), found in zip(jobs, pool.map(work, jobs), strict=True):
            for optimizer, result in found.items():
                results[task, optimizer][rule] = result
    return results


def in_both(rules: Sequence[str]) -> list[str]:
    """Leaves out the rules that are optimizers of their own."""
    return [rule for rule in rules if RULES[rule].optimizers == OPTIMIZERS]


def time_updates(task_name: str, rules, rounds: int = 15) -> dict[str, float]:
    """Measures the seconds per update of one run with momentum, gradients at hand.

    The contenders take turns, and the medians are of differences within a turn.
    """
    data = TASKS[task_name]().data
    lane = Lane(np.array(False), np.float32(1.0), np.array(0))
    seeds = np.zeros(1, int)
    params = jax.tree.map(lambda x: x[0], init_params(task_name, seeds, data)[0])
    sizes = np.random.default_rng(0).uniform(0.5, 2.0, UPDATES_TIMED)

    def updates_in_a_row(rule_name, params, sizes):
        optimizer = make_optimizer(task_name, rule_name, lane)

        def step(carry, size):
            params, opt_state = carry
            grads = jax.tree.map(lambda x: size * (x + 0.01), params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), sizes)[0]

    run = jax.jit(updates_in_a_row, static_argnums=0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # to compile
        list(pool.map(lambda rule: jax.device_get(run(rule, params, sizes)), rules))
    seconds = np.empty((rounds, len(rules)))
    for turn in range(rounds):
        for i in np.roll(np.arange(len(rules)), turn):
            start = time.perf_counter()
            jax.block_until_ready(run(rules[i], params, sizes))
            seconds[turn, i] = (time.perf_counter() - start) / UPDATES_TIMED
    added = np.median(seconds - seconds[:, [rules.index("none")]], axis=0)
    return dict(zip(rules, added.tolist(), strict=True))


# ---- What it shows -------------------------------------------------------------------


def final_score(history: History) -> np.ndarray:
    """Takes the median score of the last steps; infinite if one is not finite."""
    last = history.score[:, -LAST:].astype(np.float64)
    return np.median(np.where(np.isfinite(last), last, np.inf), axis=1)


def is_lost(result: Result) -> np.ndarray:
    """Says which runs end no better than they began, or not finite."""
    return ~(final_score(result.history) < result.start)


def spikes(result: Result, faults: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measures the harm of the finite faults, arrays `[seeds, faults]`.

    Returns:
      The largest score before the next fault, over that before this one; and the steps
      until the score is back at 1.1 times that, infinite if the next fault came first.
    """
    places = np.append(np.flatnonzero(faults), faults.size)
    heights, waits = [], []
    for place, following in pairwise(places):
        if faults[place] == NAN:
            continue
        score = result.history.score[:, place - BEFORE : following].astype(np.float64)
        score = np.where(np.isfinite(score), score, np.inf)
        old, score = np.median(score[:, :BEFORE], axis=1), score[:, BEFORE:]
        top = np.where(np.isfinite(old), score.max(axis=1), np.inf)
        heights.append(np.where(np.isfinite(top), top / np.fmin(old, 1e300), np.inf))
        steps = np.arange(score.shape[1])
        back = (score <= RECOVERED * old[:, None]) & np.isfinite(old[:, None])
        back &= steps >= score.argmax(axis=1)[:, None]
        wait = np.where(back.any(axis=1), back.argmax(axis=1), np.inf)
        waits.append(np.where(heights[-1] <= RECOVERED, 0, wait))
    return np.stack(heights, axis=1), np.stack(waits, axis=1)


def short(value: float) -> str:
    """Writes a number in at most seven characters."""
    if not np.isfinite(value):
        return "inf"
    if value >= 1e5:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def quartiles(values) -> np.ndarray:
    """Takes quartiles of numbers of which some may be infinite."""
    values = np.minimum(np.asarray(values, np.float64), 1e300)
    result = np.percentile(values, (25, 50, 75))
    return np.where(result < 1e100, result, np.inf)


def print_table(cell, results: dict[str, Result], faults: np.ndarray) -> None:
    """Prints one aligned line per rule, for one task and one optimizer."""
    columns = "{:25} {:>9}  {:>23} {:>7} {:>8} {:>8} {:>8} {:>6}".format
    print("\n{}, {}".format(*cell))
    print(columns("", "", "final loss", "against", "worst", "steps to", "clipped", ""))
    parts = "25 % / median / 75 %"
    heads = ("rule", "threshold", parts, "tuned", "spike", "recover", "%", "lost")
    print(columns(*heads))
    for name, result in results.items():
        heights, waits = spikes(result, faults)
        wait = quartiles(waits)[1]
        clipped = 100 * result.history.changed[:, faults == GOOD].mean()
        cells = [name, "-" if np.isnan(result.threshold) else short(result.threshold)]
        cells += [" / ".join(map(short, quartiles(final_score(result.history))))]
        cells += [short(against_tuned(results, name))]
        cells += [short(quartiles(heights.max(axis=1))[1])]
        cells += ["never" if np.isinf(wait) else f"{wait:g}"]
        cells += [f"{clipped:.0f}", f"{is_lost(result).sum()}/{len(result.start)}"]
        print(columns(*cells))


def judged(result: Result) -> np.ndarray:
    """Takes the final score of each run; infinite if it is lost."""
    return np.where(is_lost(result), np.inf, final_score(result.history))


def against_tuned(results: dict[str, Result], name: str) -> float:
    """Divides the median final score by that of the tuned global clip."""
    own, tuned = (quartiles(judged(results[rule]))[1] for rule in (name, TUNED))
    return own / tuned if np.isfinite(own) else math.inf


def loses(results: dict[str, Result], name: str) -> bool:
    """Says whether a rule is worse: by a margin, and from most of the seeds."""
    own, tuned = judged(results[name]), judged(results[TUNED])
    return against_tuned(results, name) > MARGIN and np.mean(own > tuned) >= 0.75


def losses(results: Results, rule: str) -> str:
    """Names where a rule loses to the tuned global clip."""
    where = [
        f"{task}/{optimizer}"
        for (task, optimizer), found in results.items()
        if rule in found and loses(found, rule)
    ]
    return ", ".join(where) or "nowhere"


def lost_runs(results: Results, rule: str) -> int:
    found = [cell[rule] for cell in results.values() if rule in cell]
    return sum(is_lost(result).sum() for result in found)


def mean_ranks(results: Results) -> dict[str, float]:
    """Averages the ranks by median final score; equals share their ranks."""
    ranks: dict[str, list[float]] = {}
    for found in results.values():
        ratios = {rule: against_tuned(found, rule) for rule in found}
        values = np.array(list(ratios.values()))
        for rule, own in ratios.items():
            better, equal = (values < own).sum(), (values == own).sum()
            ranks.setdefault(rule, []).append(better + (equal + 1) / 2)
    return {rule: float(np.mean(own)) for rule, own in ranks.items()}


def print_ranks(results: Results, added: dict[str, float], task: str) -> None:
    """Prints how the rules do over all tasks and optimizers."""
    columns = "{:25} {:>9} {:>11} {:>6} {:>9}  {}".format
    print("\nAll tasks and optimizers")
    print(columns("", "mean", "against", "runs", "added,", "loses to the tuned"))
    heads = ("rule", "rank", "tuned, max", "lost", "us/step", "clip_by_global_norm in")
    print(columns(*heads))
    ranks = mean_ranks(results)
    for rule in sorted(ranks, key=lambda rule: ranks[rule]):
        found = [cell for cell in results.values() if rule in cell]
        worst = short(max(against_tuned(cell, rule) for cell in found))
        cells = [rule, f"{ranks[rule]:.1f}", worst, lost_runs(results, rule)]
        cells += [f"{1e6 * added[rule]:+.1f}" if rule in added else "-"]
        cells += [losses(results, rule)]
        print(columns(*cells))
    print(f"(us/step: added to an update of one run on {task}, beside `none`.)")


def print_verdict(results: Results) -> None:
    """Prints the rules of the best mean ranks among those that lose no run."""
    print("\nWhich one do I use? The best mean ranks of those that lost no run")
    for optimizer in OPTIMIZERS:
        cells = {cell: found for cell, found in results.items() if optimizer in cell}
        ranks = mean_ranks(cells)
        safe = [rule for rule in ranks if not lost_runs(cells, rule)]
        safe.sort(key=lambda rule: ranks[rule])
        chosen = {
            "a threshold tuned": [rule for rule in safe if RULES[rule].grid],
            "none to tune": [rule for rule in safe if not RULES[rule].grid],
        }
        for how, rules in chosen.items():
            best = [f"{rule} ({ranks[rule]:.1f})" for rule in rules[:3]]
            print(f"  {optimizer}, {how}: {', '.join(best) or 'nothing'}")
            if rules and rules[0] != TUNED:
                where = losses(cells, rules[0])
                print(f"    loses to the tuned {TUNED}: {where}")


def plot_spike(task: str, results: Results, faults: np.ndarray, path: Path) -> None:
    """Draws for each rule the loss around a scaled batch, and the norms below it."""
    from matplotlib import rcParams  # imported here, for it takes most of a second
    from matplotlib.figure import Figure

    rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 100})
    rcParams.update({"font.size": 8, "axes.titlesize": 9})
    found = [results[task, optimizer] for optimizer in OPTIMIZERS]
    names = [name for name in RULES if any(name in part for part in found)]
    across = min(len(names), 8)
    rows = math.ceil(len(names) / across)
    figure = Figure(figsize=(2.3 * across + 0.8, 3.3 * rows + 1), layout="constrained")
    axes = figure.subplots(2 * rows, across, squeeze=False, sharex=True)
    place = np.flatnonzero(faults == SCALED)[0]
    steps = np.arange(place - BEFORE, min(place + 30, faults.size))
    shown = [result for part in found for result in part.values()]
    lowest = min(np.nanmin(result.history.score[:, steps]) for result in shown)
    usual = TASKS[task]().norm
    ranges = (
        (lowest / 1.5, 3 * np.median(shown[0].start)),
        (1e-4 * usual, 1e5 * usual),
    )
    for ax in axes.flat:
        ax.set_visible(False)
    for i, name in enumerate(names):
        pair = axes[2 * (i // across) : 2 * (i // across) + 2, i % across]
        for j, optimizer in enumerate(OPTIMIZERS):
            if name in found[j]:
                seen = jax.tree.map(lambda x: x[:, steps], found[j][name].history)
                plot_band(pair[0], steps - place, seen.score, f"C{j}", optimizer)
                plot_band(pair[1], steps - place, seen.norm_after, f"C{j}", "", "-")
                plot_band(pair[1], steps - place, seen.norm_before, f"C{j}", "", ":")
        for ax, limits in zip(pair, ranges, strict=True):
            ax.set(yscale="log", ylim=limits, visible=True)
            ax.tick_params(labelleft=i % across == 0)
        pair[1].tick_params(labelbottom=i + across >= len(names))  # none below it
        pair[0].set_title(name)
        if i % across == 0:
            pair[0].set_ylabel("test loss")
            pair[1].set_ylabel("norm")
    figure.suptitle(
        f"{task}: a batch multiplied by 1000 at step 0, medians and quartiles of the"
        " seeds. Below, the norm before the rule (dotted) and after it (full);\nthat of"
        " steps is divided by the learning rate. Along x, the steps before and after."
        " Where a curve is missing, most runs were lost."
    )
    lines = axes[0, -1 if len(names) >= across else 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def plot_band(ax, steps, values, color: str, label: str, style: str = "-") -> None:
    """Draws a median and a band between the quartiles."""
    values = np.where(np.isnan(values), np.inf, values)
    low, middle, high = np.apply_along_axis(quartiles, 0, values)
    ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot(steps, middle, style, color=color, label=label)


# ---- Options -------------------------------------------------------------------------


def whole_number(text: str) -> int:
    """Reads an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options, and makes the folder for the figures."""
    parser = argparse.ArgumentParser(description="Compares the clipping rules.")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="some of the tasks")
    add("--rules", nargs="+", choices=RULES, metavar="RULE", help="some of the rules")
    add("--seeds", type=whole_number, help="runs per rule (default 8)")
    add("--steps", type=whole_number, help="steps per run (default 300)")
    add("--out", type=Path, default=Path("figures"), help="folder of the figures")
    quick = "one task, four rules, 2 seeds and 120 steps unless said otherwise"
    add("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (2 if options.quick else 8)
    options.steps = options.steps or (SHORTEST if options.quick else 300)
    if options.steps < SHORTEST:
        parser.error(
            f"argument --steps: expected at least {SHORTEST}, for all the faults to"
            f" have their place, got {options.steps}"
        )
    options.tasks = options.tasks or list(QUICK_TASKS if options.quick else TASKS)
    options.rules = options.rules or list(QUICK_RULES if options.quick else RULES)
    # What all are compared with.
    options.rules = list(dict.fromkeys(["none", TUNED, *options.rules]))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    return options


def progress_bar(**options) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def main(arguments: Sequence[str] | None = None) -> Results:
    """Compares the rules, prints the tables, and writes the figures."""
    cpu_start, start = time.process_time(), time.perf_counter()
    options = parse_options(arguments)
    faults = make_faults(options.steps)
    results = compare(options.tasks, options.rules, options.seeds, faults)
    added = time_updates(options.tasks[0], in_both(options.rules))
    cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
    for cell, found in results.items():
        print_table(cell, found, faults)
    print_ranks(results, added, options.tasks[0])
    print_verdict(results)
    figures = {task: options.out / f"rules_{task}.png" for task in options.tasks}
    for task, path in figures.items():
        plot_spike(task, results, faults, path)
    print(
        f"{len(options.rules)} rules from {options.seeds} seeds on"
        f" {jax.devices()[0].device_kind}: {seconds:.1f} s (CPU seconds after imports:"
        f" {cpu:.1f})."
    )
    print("Figures:", *figures.values(), sep="\n  ")
    return results


if __name__ == "__main__":
    main()
