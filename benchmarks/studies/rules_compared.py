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
    python benchmarks/studies/rules_compared.py --quick  # three rules, 2 seeds

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

For each task and optimizer it prints a table, at the end the mean ranks, and where each
rule loses to the tuned global clip. A figure for each task shows the loss around a
batch that is multiplied by 1000.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import _figures
import _study
import jax
import numpy as np
import optax
from _corrupted_tasks import SCALED, TASKS, make_faults, spoil
from _rules import OPTIMIZERS, RULES, TUNED, Lane, Rule, make_optimizer
from _task_parts import Data
from matplotlib.figure import Figure

FULL = {"seeds": 8, "steps": 300}
QUICK = {"seeds": 2, "steps": 120, "tasks": ["regression"], "rules": ["autoclip"]}
TUNING_SEEDS = (1001, 1002)  # apart from those that the tables are about
MARGIN = 1.05  # times the tuned clip's loss: more is worse
HELD = 2.0  # times the loss before a fault: more is a spike
BEFORE, AFTER = 10, 30  # steps around a fault that are drawn
LAST = 20  # steps, whose median is the final loss
SHORTEST = 120  # steps, so that every fault has its place
STEPS_PER_CALL = 50  # at most, between two moves of the progress bar
# Compiling takes most of the time: this saves a quarter of it, and steps are as fast.
COMPILE_LESS = {"xla_backend_optimization_level": 1}


# ---- Training ------------------------------------------------------------------------


class Result(NamedTuple):
    """The runs of one rule from all seeds, with one task and one optimizer."""

    start: np.ndarray  # [seeds], the score of the untrained network
    score: np.ndarray  # [seeds, steps], after each step, on rows never corrupted
    threshold: float  # that was tuned, NaN for a rule without


Results = dict[tuple[str, str], dict[str, Result]]  # by task and optimizer, by rule


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
        return (params, opt_state), task.score(params, data.test_x, data.test_y)

    return jax.lax.scan(step, run, (rows, faults))


def train(
    task_name: str,
    rule_name: str,
    lanes: Lane,
    faults: np.ndarray,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains all lanes; returns the scores before and after each step.

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
    return np.asarray(start), np.hstack(parts)


def make_lanes(*choices: Iterable) -> Lane:
    """Combines optimizers, thresholds and seeds, in this order."""
    names, limits, seeds = zip(*product(*choices), strict=True)
    is_adam = np.array([name == "Adam" for name in names])
    return Lane(is_adam, np.array(limits, np.float32), np.array(seeds))


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
        finals.append(
            final_score(train(task_name, rule_name, some, faults, on_steps)[1])
        )
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
    lanes = lanes._replace(
        threshold=np.repeat([*map(np.float32, tuned.values())], seeds)
    )
    start, score = train(task_name, rule_name, lanes, faults, on_steps)
    results = {}
    for i, name in enumerate(optimizers):
        own = slice(i * seeds, (i + 1) * seeds)
        results[name] = Result(start[own], score[own], tuned[name])
    return results


def compare(tasks, rules, seeds: int, faults: np.ndarray) -> Results:
    """Trains all rules on all tasks, on as many threads as there are cores.

    Most of the time goes into compiling, which uses one core each.
    """
    jobs = list(product(tasks, rules))
    sizes = [(RULES[rule], len(RULES[rule].optimizers) * seeds) for _, rule in jobs]
    total = faults.size * sum(1 + tuning_calls(*size) for size in sizes)
    results: Results = {(x, y): {} for x, y in product(tasks, OPTIMIZERS)}
    with (
        _study.progress_bar(total=total, unit="steps") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        work = partial(compare_one, seeds=seeds, faults=faults, on_steps=bar.update)
        for (task, rule), found in zip(jobs, pool.map(work, jobs), strict=True):
            for optimizer, result in found.items():
                results[task, optimizer][rule] = result
    return results


# ---- What it shows -------------------------------------------------------------------


def final_score(score: np.ndarray) -> np.ndarray:
    """Takes the median score of the last steps; what is not finite is infinite."""
    return _study.median(score[:, -LAST:], axis=1)


def is_lost(result: Result) -> np.ndarray:
    """Says which runs end no better than they began, or not finite."""
    return ~(final_score(result.score) < result.start)


def judged(result: Result) -> np.ndarray:
    """Takes the final score of each run; infinite if it is lost."""
    return np.where(is_lost(result), np.inf, final_score(result.score))


def against_tuned(results: dict[str, Result], name: str) -> float:
    """Divides the median final score by that of the tuned global clip."""
    own, tuned = (_study.median(judged(results[rule])) for rule in (name, TUNED))
    return float(own / tuned) if np.isfinite(own) else math.inf


def loses(results: dict[str, Result], name: str) -> bool:
    """Says whether a rule is worse: by a margin, and from most of the seeds."""
    own, tuned = judged(results[name]), judged(results[TUNED])
    return against_tuned(results, name) > MARGIN and bool((own > tuned).mean() >= 0.75)


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
    return sum(int(is_lost(result).sum()) for result in found)


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


def print_cell(cell: tuple[str, str], results: dict[str, Result]) -> None:
    """Prints one line per rule, for one task and one optimizer."""
    print("\n{}, {}".format(*cell))
    rows = []
    for name, result in results.items():
        tuned = result.threshold
        row = [name, "-" if np.isnan(tuned) else _study.short(tuned)]
        row += [_study.three_quartiles(final_score(result.score))]
        row += [_study.short(against_tuned(results, name))]
        row += [f"{is_lost(result).sum()}/{len(result.start)}"]
        rows.append(row)
    final = f"final loss\n{_study.QUARTILES}"
    _study.print_table(["rule", "threshold", final, "against\ntuned", "lost"], rows)


def print_ranks(results: Results) -> None:
    """Prints how the rules do over all tasks and optimizers."""
    print("\nAll tasks and optimizers")
    ranks, rows = mean_ranks(results), []
    for rule in sorted(ranks, key=lambda rule: ranks[rule]):
        found = [cell for cell in results.values() if rule in cell]
        worst = _study.short(max(against_tuned(cell, rule) for cell in found))
        row = [rule, f"{ranks[rule]:.1f}", worst, lost_runs(results, rule)]
        rows.append([*row, losses(results, rule)])
    heads = ["rule", "mean\nrank", "against\ntuned, max", "runs\nlost"]
    _study.print_table([*heads, f"loses to the tuned\n{TUNED} in"], rows)


def plot_spike(task: str, results: Results, faults: np.ndarray) -> Figure:
    """Draws for each rule the loss around a batch that is multiplied by 1000."""
    found = {optimizer: results[task, optimizer] for optimizer in OPTIMIZERS}
    names = [rule for rule in RULES if any(rule in part for part in found.values())]
    columns = min(len(names), 8)
    rows = math.ceil(len(names) / columns)
    size = (max(2.2 * columns + 1, 10), 2.2 * rows + 2)
    figure, axes = _figures.new_figure(rows, columns, size, sharex=True, sharey=True)
    place = np.flatnonzero(faults == SCALED)[0]
    steps = np.arange(place - BEFORE, min(place + AFTER, faults.size))
    start = np.median(found[OPTIMIZERS[0]][TUNED].start)
    top = 3 * start
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    held, lowest = dict.fromkeys(OPTIMIZERS, 0), top
    for ax, name in zip(axes.flat, names, strict=False):
        ax.axvline(0, **_figures.GUESS)
        ax.set_title(name, fontsize="small")
        styles = dict(zip(OPTIMIZERS, _figures.STYLES, strict=False))
        for number, optimizer in enumerate(x for x in OPTIMIZERS if name in found[x]):
            style, score = styles[optimizer], found[optimizer][name].score[:, steps]
            _figures.plot_band(ax, steps - place, score, style, optimizer)
            middle = _study.median(score)
            lowest = min(lowest, middle.min())
            held[optimizer] += spike(middle) <= HELD and middle[-1] < start
            above = np.isfinite(middle) & (middle > top)
            _figures.mark_above(ax, steps[above] - place, style, "above the axis")
            if not np.isfinite(middle[-1]):
                text = f"{optimizer}: not finite"
                place_y = 0.8 - 0.15 * number
                note = {"color": style["color"], "fontsize": "x-small", "clip_on": True}
                ax.text(0.05, place_y, text, transform=ax.transAxes, **note)
    axes[0, 0].set(yscale="log", ylim=(lowest / 1.5, top))
    figure.supylabel(f"test loss, {TASKS[task]().unit}", fontsize="medium")
    for ax in axes.flat[max(0, len(names) - columns) : len(names)]:  # none below it
        ax.set_xlabel("step after the fault")
        ax.tick_params(labelbottom=True)
    _figures.legend_below(figure, list(axes.flat[: len(names)]))
    counts = [f"{held[x]} of {len(found[x])} with {x}" for x in OPTIMIZERS]
    figure.suptitle(
        f"{task}: a batch multiplied by 1000 at step 0, median and quartiles of the"
        " seeds\nRules that keep the loss below its start and within twice that before:"
        f" {', '.join(counts)}"
    )
    return figure


def spike(middle: np.ndarray) -> float:
    """Divides the largest loss from a fault on by the usual one before it."""
    before, after = np.median(middle[:BEFORE]), middle[BEFORE:].max()
    return float(after / before) if np.isfinite(before) else math.inf


def main(arguments: Sequence[str] | None = None) -> Results:
    """Compares the rules, prints the tables, and writes the figures."""
    start = time.perf_counter()
    parser = _study.option_parser("Compares the clipping rules.", FULL, QUICK)
    for name, choices in ("tasks", TASKS), ("rules", RULES):
        how: dict[str, Any] = {"nargs": "+", "choices": choices, "metavar": "X"}
        how |= {"default": list(choices), "help": f"some of the {name}"}
        parser.add_argument(f"--{name}", **how)
    options = _study.parse_options(parser, arguments, QUICK)
    if options.steps < SHORTEST:
        parser.error(
            f"argument --steps: expected at least {SHORTEST}, for all the faults to"
            f" have their place, got {options.steps}"
        )
    # What all are compared with comes first.
    rules = list(dict.fromkeys(["none", TUNED, *options.rules]))
    faults = make_faults(options.steps)
    results = compare(options.tasks, rules, options.seeds, faults)
    time_taken = _study.took(start)
    for cell, found in results.items():
        print_cell(cell, found)
    print_ranks(results)
    print(f"{len(rules)} rules from {options.seeds} seeds {time_taken}.")
    figures = {
        f"rules_{task}": partial(plot_spike, task, results, faults)
        for task in options.tasks
    }
    _figures.save_all(figures, options.out)
    return results


if __name__ == "__main__":
    main()
