"""How good is the threshold that `suggest_max_norm` computes?

Run:  python benchmarks/studies/suggested.py          # all tasks, 15 minutes
      python benchmarks/studies/suggested.py --quick  # does it run? half a minute

Tasks, learning rates and seeds are those of `no_knob.py`, and so is what the figures
mean: final losses over that of the best of 13 thresholds of `clip_by_global_norm`,
chosen after the fact for each task and learning rate. Compared are, for SGD,

  * suggested: what is answered before the first step, for several shares;
  * asked again: what is answered for the params that such a run ends with;

for Adam, which needs a history,

  * suggested: a percentile of the norms in a run without a clip;
  * asked again: that of the norms in such a run;

and beside them a threshold of 1, the 90th percentile of the norms in a run without a
clip, no clip at all, and what `no_knob.py` found to be the best without a threshold.

The tasks by SGD are in three parts. The share is chosen on every other one of
`no_knob.py`: of those that lose no run which the tuned clip keeps, if there are such,
the one whose ratios have the lowest geometric mean. The rest of them, and the tasks of
`_fresh_tasks.py`, which were written when the formula was there, tell what it is worth.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np
from _fresh_tasks import TASKS as FRESH
from _no_knob_rules import TUNED
from _no_knob_runs import LAST, SEGMENT
from _suggested_runs import SHARES, TASKS, compare
from _task_parts import momentum
from no_knob import SETTINGS, judge, print_task, print_verdict

from benchmarks import _results

Row = dict[str, Any]

SGD = [name for name, task in TASKS.items() if task().moments is momentum]
OLD = [name for name in SGD if name not in FRESH]
PARTS = {
    "SGD, chosen on": OLD[::2],
    "SGD, the other half": OLD[1::2],
    "SGD, fresh tasks": [*FRESH],
    "Adam": [name for name in TASKS if name not in SGD],
}


def choose(rows: list[Row], kind: str) -> float:
    """Chooses the share of a kind of candidate, by rows of the tasks for that."""

    def worth(share: float) -> tuple[bool, float]:
        verdict = judge(rows, f"{kind}, {share:.0%}")
        allowed = judge(rows, TUNED).diverged
        return verdict.diverged > allowed, np.log(verdict.ratios).mean()

    return min(SHARES, key=worth)


def report(rows: list[Row]) -> None:
    """Prints how near the candidates come, with the shares that were chosen."""
    seen = [row for row in rows if row["task"] in PARTS["SGD, chosen on"]]
    if seen:
        for kind in ("suggested", "asked again"):
            print(f"\nshare chosen for {kind}: {choose(seen, kind):.0%}", end="")
        print()
    for title, tasks in PARTS.items():
        own = [row for row in rows if row["task"] in tasks]
        if own:
            print_verdict(own, title)


def parse_args() -> argparse.Namespace:
    parser = _results.make_parser(__doc__, "two tasks, 2 seeds")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS)
    add("--seeds", type=int, default=16)
    add("--steps", type=int, help="per run, instead of each task's own number")
    args = _results.parse(parser)
    if args.quick:
        args.seeds, args.steps = 2, 40
    args.tasks = args.tasks or (["regression", "friedman"] if args.quick else [*TASKS])
    if args.seeds < 1 or (args.steps is not None and args.steps < LAST * SEGMENT):
        parser.error(f"--seeds must be at least 1, --steps at least {LAST * SEGMENT}")
    return args


def main() -> None:
    args = parse_args()
    machine = _results.print_machine()
    print(f"{args.seeds} seeds; by learning rate the median final loss of the tuned")
    print("clip, then ratios to it, and how many runs diverged")
    began, rows = time.process_time(), []
    for task in args.tasks:
        own = compare(task, args.seeds, args.steps)
        _results.store([machine | row for row in own], SETTINGS, args.out)
        print_task(own)
        rows += own
        jax.clear_caches()  # programs of all tasks are more than a process can map
    report(rows)
    print(f"CPU seconds: {time.process_time() - began:.0f}")


if __name__ == "__main__":
    main()
