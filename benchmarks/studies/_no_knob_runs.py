"""How does a small task end, by rule and learning rate, as a median over seeds?"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _no_knob_rules import CANDIDATES, TUNED
from _small_tasks import TASKS

import optaxclip

Row = dict[str, Any]

RATES = np.logspace(0, 1, 4)  # times the lowest learning rate of the task
MULTIPLES = np.logspace(-3, 1, 13)  # of the norm of the first gradients
SEGMENT = 5  # steps between two evaluations
LAST = 4  # evaluations, whose mean is the final loss
LOST = 1e100  # the loss of a run that diverged


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0))
def init_params(task_name: str, seed):
    return TASKS[task_name]().init(jax.random.key(seed))


@partial(jax.jit, static_argnums=(0, 1))
def train(task_name, candidate, threshold, rates, params, rows, data):
    """Trains all rates from all seeds; returns the held-out loss, `[.., segments]`."""
    task = TASKS[task_name]()
    x, y, test_x, test_y = data

    @partial(jax.vmap, in_axes=(0, None, None))
    @partial(jax.vmap, in_axes=(None, 0, 0))
    def run(rate, params, rows):
        optimizer = CANDIDATES[candidate](task.moments, rate, threshold)

        def step(carry, rows):
            params, opt_state = carry
            grads = jax.grad(task.loss)(params, x[rows], y[rows])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        def segment(carry, rows):
            carry = jax.lax.scan(step, carry, rows)[0]
            return carry, task.loss(carry[0], test_x, test_y)

        return jax.lax.scan(segment, (params, optimizer.init(params)), rows)[1]

    return run(rates, params, rows)


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, 0, None))
def look_first(task_name: str, params, rows, data):
    """Measures the norm of the first gradient, and the loss before the first step."""
    task = TASKS[task_name]()
    x, y, test_x, test_y = data
    grads = jax.grad(task.loss)(params, x[rows], y[rows])
    return optaxclip.global_norm(grads), task.loss(params, test_x, test_y)


class Start(NamedTuple):
    """What all candidates have in common on one task.

    Attributes:
      rates: learning rates.
      params: where the seeds begin.
      rows: that each step of each seed sees, `[seeds, segments, steps, batch]`.
      norm: of the first gradients, the median over seeds.
      loss: of the seeds before the first step.
    """

    rates: np.ndarray
    params: Any
    rows: np.ndarray
    norm: Any
    loss: np.ndarray


class Final(NamedTuple):
    """How one candidate ends: `[rates]`, of runs `[rates, seeds]`."""

    thresholds: np.ndarray
    medians: np.ndarray
    diverged: np.ndarray


def begin(task_name: str, seeds: int, steps: int | None) -> Start:
    task = TASKS[task_name]()
    params, data = init_params(task_name, np.arange(seeds)), task.data
    size = ((steps or task.steps) // SEGMENT, SEGMENT, task.batch_size)
    rows = np.stack(
        [
            np.random.default_rng(seed).integers(len(data.x), size=size)
            for seed in range(seeds)
        ]
    )
    norm, loss = look_first(task_name, params, rows[:, 0, 0], data)
    rates = np.asarray(task.rate * RATES, np.float32)
    return Start(rates, params, rows, np.median(norm), np.asarray(loss))


def finish(task_name: str, start: Start, candidate: str) -> Final:
    """Trains with one candidate; the best threshold counts, where several are tried."""
    task = TASKS[task_name]()
    limits = np.asarray([math.inf])
    if candidate == TUNED:
        limits = start.norm * MULTIPLES
    limits = np.asarray(limits, np.float32)
    args = start.rates, start.params, start.rows, task.data
    losses = np.stack([train(task_name, candidate, x, *args) for x in limits])
    final = losses[..., -LAST:].astype(np.float64).mean(axis=-1)
    diverged = ~(final < start.loss)
    score = np.where(diverged, LOST, task.score(final))
    medians = np.median(np.minimum(score, LOST), axis=-1)  # [limits, rates]
    best, lanes = medians.argmin(axis=0), np.arange(len(start.rates))
    return Final(limits[best], medians.min(axis=0), diverged[best, lanes])


def compare(
    task_name: str, candidates: list[str], seeds: int, steps: int | None
) -> list[Row]:
    """Trains one task with all candidates; returns a row for each."""
    start = begin(task_name, seeds, steps)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        finals = list(pool.map(partial(finish, task_name, start), candidates))
    tuned = finals[candidates.index(TUNED)].medians
    return [
        {
            "question": "no_knob",
            "task": task_name,
            "candidate": candidate,
            "steps": start.rows.shape[1] * SEGMENT,
            "seeds": seeds,
            "learning_rates": rounded(start.rates, 4),
            "thresholds": rounded(final.thresholds, 4) if candidate == TUNED else None,
            "medians": rounded(final.medians, 5),
            "ratios": rounded(final.medians / tuned, 5),
            "diverged": final.diverged.sum(axis=-1).tolist(),
        }
        for candidate, final in zip(candidates, finals, strict=True)
    ]


def rounded(values: np.ndarray, digits: int) -> list[float | None]:
    """Keeps a few digits; None where half of the runs diverged."""
    return [float(f"{x:.{digits}g}") if x < LOST else None for x in values.tolist()]
