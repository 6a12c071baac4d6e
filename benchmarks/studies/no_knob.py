"""Is there a clip without a threshold to set that is as good as a tuned one?

Run:  python benchmarks/studies/no_knob.py          # all tasks and rules, 15 minutes
      python benchmarks/studies/no_knob.py --quick  # does it run? ten seconds
      python benchmarks/studies/no_knob.py --tasks characters --steps 3000 --seeds 4

Eighteen small tasks, 13 of them by SGD with momentum and 5 by Adam, are trained at four
learning rates, a decade in all, from 16 seeds. Each rule that has nothing to tune is
compared with the best of 13 thresholds of `clip_by_global_norm`, three to the decade
around the norm of the first gradients: the one whose median loss on held-out rows is
the lowest, chosen after the fact for every task and learning rate. Knowing the answer
beforehand is an advantage that no rule has, and the lowest of 13 noisy medians is lower
than it would be on other seeds; so a ratio a few percent above 1 is as good as it gets.

A rule would do without a knob if its median final loss were within 5 % of that
everywhere, and no run diverged. Printed are, for each rule,

  * within: the share of tasks and learning rates where it is;
  * median and worst: the ratio of the two medians;
  * diverged: runs that end above the loss they began with, or not finite. Those of the
    tuned clip are counted in its own line.

What is kept has the medians, so that these figures can be had again without a run. The
final loss is the mean over the last evaluations; that of the handwriting is the
perplexity, for a density has no zero to measure from.

What came out: a rule for each optimizer comes near, `by optimizer` in the table.

  * SGD: the best threshold times the learning rate is one number for a task, at nearly
    all rates, for the best clip acts at every step: it is a length of step. Rules that
    see gradients alone don't know the rate: they are near at the lowest one at best,
    and lose runs at the higher ones. `clip_by_relative_step` bounds the step itself.
  * Adam's steps are as long as its learning rate says, and such a bound is in its way.
    What hurts it are outliers: `streaming_quantile(0.5)` clips to the median norm.

Together they are within 5 % in 56 of 72 cases, with a median ratio of 1.00, and 13 of
1152 runs are lost, against 323 without a clip; no rule that goes by the gradients alone
is so near in more than 31 of the cases, or loses fewer than 37 runs. The 13 are all of
`tensor`, where the tuned clip loses 7: there the ratio is up to 4.9. Next comes
`zeros`, 1.3 to 2.0, whose weights start at zero, then `adding` at its lowest rate, 1.3.

In longer runs, 1500 steps of `regression`, `logistic`, `factorisation`, `wine` and
`counts` from 8 seeds, and 3000 of `characters`, `adding` and `rows_adam` from 4, it is
within 5 % in 19 of 32 cases, with a median of 1.02, a worst of 1.7, and no run lost.

The 3 % are a knob still, if one for all learning rates, and were chosen with the first
seven tasks in view (24 of their 28 cases, at worst 1.28, no run lost). With 4 % it is
48 cases and as many lost runs, with 6 % 37 and 30. A bound by the distance from the
start, as in DoG and D-Adaptation, by Polyak's step, or of the sum of the steps that
momentum makes, was worse in trials that are left out.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _no_knob_rules import CANDIDATES, QUICK, TUNED
from _no_knob_runs import LAST, LOST, SEGMENT, compare
from _small_tasks import TASKS
from _task_parts import momentum

from benchmarks import _results

Row = dict[str, Any]

SETTINGS = ("task", "candidate", "steps", "seeds")
NEAR = 1.05  # times the loss of the tuned clip
OPTIMIZERS = {"SGD with momentum": momentum, "Adam": optax.scale_by_adam}


class Verdict(NamedTuple):
    """How near a candidate comes to the tuned clip.

    Attributes:
      ratios: of the median final losses, `[tasks, rates]`.
      diverged: runs that did.
      runs: of all tasks, rates and seeds.
    """

    ratios: np.ndarray
    diverged: int
    runs: int

    @property
    def near(self) -> np.ndarray:
        return self.ratios <= NEAR


def judge(rows: list[Row], candidate: str) -> Verdict:
    """Joins the rows of one candidate."""
    own = [row for row in rows if row["candidate"] == candidate]
    ratios = [[LOST if x is None else x for x in row["ratios"]] for row in own]
    diverged = sum(sum(row["diverged"]) for row in own)
    runs = sum(len(row["diverged"]) * row["seeds"] for row in own)
    return Verdict(np.array(ratios), diverged, runs)


def print_task(rows: list[Row]) -> None:
    """Prints the ratios of a task, a line for each candidate."""
    print(f"\n{rows[0]['task']}")
    for row in rows:
        key = "medians" if row["candidate"] == TUNED else "ratios"
        cells = "".join(f"{short(x):>10}" for x in row[key])
        print(f"  {row['candidate']:30}{cells}{sum(row['diverged']):7}")


def short(value: float | None) -> str:
    """Writes a number in at most six characters."""
    return "inf" if value is None or value > 1e5 else f"{value:.3g}"


def print_verdict(rows: list[Row], title: str) -> None:
    """Prints how near each candidate comes to the tuned clip, the nearest first."""
    names = dict.fromkeys(row["candidate"] for row in rows)
    verdicts = {name: judge(rows, name) for name in names}
    heads = f"{'all':>6}{'1 x':>6}{'2.2 x':>6}{'4.6 x':>6}{'10 x':>6}"
    print(f"\n{'':32}within 5 %, by learning rate{'ratio':>15}")
    print(f"{title:30}{heads}{'median':>9}{'worst':>9}  diverged")

    def nearness(name: str) -> tuple[float, float]:
        return verdicts[name].near.mean(), -np.median(verdicts[name].ratios)

    for name in sorted(verdicts, key=nearness, reverse=True):
        ratios, lost, runs = verdicts[name]
        near = verdicts[name].near
        shares = "".join(f"{share:6.0%}" for share in [near.mean(), *near.mean(axis=0)])
        line = f"{shares}{short(np.median(ratios)):>9}{short(ratios.max()):>9}"
        print(f"  {name:28}{line}  {lost} of {runs}")


def parse_args() -> argparse.Namespace:
    parser = _results.make_parser(__doc__, "two tasks, three rules, 2 seeds")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS)
    add("--candidates", nargs="+", choices=CANDIDATES)
    add("--seeds", type=int, default=16)
    add("--steps", type=int, help="per run, instead of each task's own number")
    args = _results.parse(parser)
    if args.quick:
        args.seeds, args.steps = 2, 40
    args.tasks = args.tasks or (["regression", "logistic"] if args.quick else [*TASKS])
    if args.seeds < 1 or (args.steps is not None and args.steps < LAST * SEGMENT):
        parser.error(f"--seeds must be at least 1, --steps at least {LAST * SEGMENT}")
    chosen = args.candidates or (QUICK if args.quick else CANDIDATES)
    args.candidates = list(dict.fromkeys([TUNED, *chosen]))
    return args


def train(args: argparse.Namespace, compare: Callable[[str], list[Row]]) -> list[Row]:
    """Runs, keeps and prints what is compared on each task; returns all rows."""
    machine = _results.print_machine()
    print(f"{args.seeds} seeds; by learning rate the median final loss of the tuned")
    print("clip, then ratios to it, and how many runs diverged")
    began, rows = time.process_time(), []
    for task in args.tasks:
        own = compare(task)
        _results.store([machine | row for row in own], SETTINGS, args.out)
        print_task(own)
        rows += own
        jax.clear_caches()  # programs of all tasks are more than a process can map
    print(f"CPU seconds: {time.process_time() - began:.0f}")
    return rows


def main() -> None:
    args = parse_args()
    rows = train(args, lambda x: compare(x, args.candidates, args.seeds, args.steps))
    print_verdict(rows, "all tasks")
    for title, moments in OPTIMIZERS.items():
        own = [row for row in rows if TASKS[row["task"]]().moments is moments]
        if 0 < len(own) < len(rows):
            print_verdict(own, title)


if __name__ == "__main__":
    main()
