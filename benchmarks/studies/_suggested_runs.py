"""How does a small task end with the threshold that is suggested, and with others?"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import _fresh_tasks as fresh
import _no_knob_runs as runs
import jax
import numpy as np
import optax
from _no_knob_rules import CANDIDATES, TUNED
from _small_tasks import TASKS
from _task_parts import momentum

import optaxclip

Row = dict[str, Any]

TASKS |= fresh.TASKS
SHARES = 0.01, 0.02, 0.03, 0.04, 0.05, 0.1  # of the norm of the params, for SGD
PERCENTS = 10, 25, 50  # of the norms that were seen, for Adam
OURS = "by optimizer, 3 %"  # the rules that need no threshold


class Run(NamedTuple):
    """What was seen of the runs, `[rates, seeds]`.

    Attributes:
      limits: thresholds.
      losses: on held-out rows, `[.., segments]`.
      norms: of the gradients before the clip, `[.., steps]`.
      size: norm of the params at the end.
    """

    limits: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    size: np.ndarray


@partial(jax.jit, static_argnums=0)
def train(task_name, limits, rates, params, rows, data):
    """Trains with thresholds `[rates, seeds]`; returns what a `Run` has beside them."""
    task = TASKS[task_name]()
    x, y, test_x, test_y = data

    @partial(jax.vmap, in_axes=(0, 0, None, None))
    @partial(jax.vmap, in_axes=(0, None, 0, 0))
    def run(limit, rate, params, rows):
        optimizer = CANDIDATES[TUNED](task.moments, rate, limit)

        def step(carry, rows):
            params, opt_state = carry
            grads = jax.grad(task.loss)(params, x[rows], y[rows])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            norm = optaxclip.global_norm(grads)
            return (optax.apply_updates(params, updates), opt_state), norm

        def segment(carry, rows):
            carry, norms = jax.lax.scan(step, carry, rows)
            return carry, (task.loss(carry[0], test_x, test_y), norms)

        start = params, optimizer.init(params)
        (params, _), (losses, norms) = jax.lax.scan(segment, start, rows)
        return losses, norms.reshape(-1), optaxclip.global_norm(params)

    return run(limits, rates, params, rows)


def suggestion(task_name: str, start: runs.Start, share: float) -> np.ndarray:
    """Asks for a threshold at each rate, for params of norm 1."""
    moments, asked = TASKS[task_name]().moments, []
    params = jax.tree.map(lambda x: np.ones_like(x[0]), start.params)
    params = jax.tree.map(lambda x: x / optaxclip.global_norm(params), params)
    for rate in start.rates.tolist():
        optimizer = optax.chain(moments(), optax.scale(-rate))
        asked.append(optaxclip.suggest_max_norm(optimizer, params, share=share))
    return np.asarray(asked)[:, None]


def middle(norms: np.ndarray, percent: float = 50.0) -> np.ndarray:
    """Returns the median, or another percentile, of the finite norms of each run."""
    found = np.nanpercentile(np.where(np.isfinite(norms), norms, np.nan), percent, -1)
    return np.where(np.isfinite(found), found, 1.0)


def train_all(task_name: str, start: runs.Start) -> dict[str, list[Run]]:
    """Trains with all thresholds; more than one for the candidate that is tuned."""
    args = start.rates, start.params, start.rows, TASKS[task_name]().data
    shape = len(start.rates), len(start.loss)

    def run(limits: Any) -> Run:
        limits = np.broadcast_to(np.asarray(limits, np.float32), shape)
        found = jax.device_get(train(task_name, limits, *args))
        return Run(limits, *found)

    none = run(math.inf)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = {TUNED: list(pool.map(run, start.norm * runs.MULTIPLES))}
        others = pool.map(run, [1.0, middle(none.norms, 90.0)])
        done |= {"none": [none], "global norm 1": [next(others)]}
        done["90th percentile"] = [next(others)]
        if TASKS[task_name]().moments is momentum:
            size = np.asarray(jax.vmap(optaxclip.global_norm)(start.params))
            found = pool.map(partial(ask_twice, task_name, start, run, size), SHARES)
            names = [f"{share:.0%}" for share in SHARES]
        else:
            found = pool.map(partial(look_twice, run, none.norms), PERCENTS)
            names = [f"{percent}th percentile" for percent in PERCENTS]
        for name, (first, again) in zip(names, found, strict=True):
            done[f"suggested, {name}"] = [first]
            done[f"asked again, {name}"] = [again]
    return done


def ask_twice(
    task_name: str, start: runs.Start, run: Any, size: np.ndarray, share: float
) -> tuple[Run, Run]:
    """Asks SGD for params at the start, and for those that the run ended with."""
    unit = suggestion(task_name, start, share)
    first = run(unit * np.maximum(size, 1))
    return first, run(unit * np.maximum(first.size, 1))


def look_twice(run: Any, norms: np.ndarray, percent: float) -> tuple[Run, Run]:
    """Takes a percentile of the norms of Adam without a clip, and then with it."""
    first = run(middle(norms, percent))
    return first, run(middle(first.norms, percent))


def compare(task_name: str, seeds: int, steps: int | None) -> list[Row]:
    """Trains one task with all candidates; returns a row for each."""
    start = runs.begin(task_name, seeds, steps)
    done = train_all(task_name, start)
    ends = {name: best(task_name, start, found) for name, found in done.items()}
    ends["no threshold"] = runs.finish(task_name, start, OURS)
    tuned = ends[TUNED].medians
    return [
        {
            "question": "suggested",
            "task": task_name,
            "candidate": candidate,
            "steps": start.rows.shape[1] * runs.SEGMENT,
            "seeds": seeds,
            "learning_rates": runs.rounded(start.rates, 4),
            "thresholds": [x if x < 1e30 else None for x in end.thresholds.tolist()],
            "medians": runs.rounded(end.medians, 5),
            "ratios": runs.rounded(end.medians / tuned, 5),
            "diverged": end.diverged.sum(axis=-1).tolist(),
        }
        for candidate, end in ends.items()
    ]


def best(task_name: str, start: runs.Start, found: list[Run]) -> runs.Final:
    """Judges runs by their median loss; the best threshold counts, where several."""
    losses = np.stack([run.losses for run in found])
    final = losses[..., -runs.LAST :].astype(np.float64).mean(axis=-1)
    diverged = ~(final < start.loss)
    score = np.where(diverged, runs.LOST, TASKS[task_name]().score(final))
    medians = np.median(np.minimum(score, runs.LOST), axis=-1)  # [limits, rates]
    first, lanes = medians.argmin(axis=0), np.arange(len(start.rates))
    limits = np.stack([np.median(run.limits, axis=-1) for run in found])
    limits = np.asarray([float(f"{x:.4g}") for x in limits[first, lanes]])
    return runs.Final(limits, medians.min(axis=0), diverged[first, lanes])
