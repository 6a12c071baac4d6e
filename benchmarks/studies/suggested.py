"""How good is the threshold that `suggest_max_norm` computes?

Run:  python benchmarks/studies/suggested.py          # all tasks, half an hour
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

The tasks by SGD are in three parts: every other one of `no_knob.py`, on which a share
was to be chosen, the rest of these, and those of `_fresh_tasks.py`, which were written
when the formula was there.

What came out, for the two parts that no share was chosen on, 12 tasks, 48 cases, and
768 runs, of which the tuned clip loses 7, all of `tensor`:

  * suggested, 3 %: 1.06 in the median, but 1900 in `far`, whose weights are 25 times
    their start, and up to 4.9 in `tensor`; 10 runs are lost, all of `tensor`.
  * asked again, 3 %: 1.04 in the median, at worst 2.8 in `tensor` and 2.1 in `units`,
    up to 1.2 elsewhere; 13 runs are lost, all of `tensor`.
  * No clip loses 279 runs, the 90th percentile 239, a threshold of 1 loses 89, and what
    needs no threshold 13; that is 1.01 in the median and at worst 4.9.

On the part to choose on it is 1.10 and up to 10.8 at first, 1.05 and up to 2.0 asked
again, in `zeros`, and no run is lost. The lowest geometric mean of the ratios is that
of 10 % at first, of 4 % asked again: on the other half these lose 36 and 18 runs,
`factorisation` among them, which 3 % does not. So the 3 % stayed, which are those of
`clip_by_relative_step` and were a guess with the tasks of `no_knob.py` in view.

Of Adam's five tasks the 10th percentile is 1.01 in the median, up to 1.5, asked again
up to 1.4; the median is up to 2.9. It was chosen on these very tasks, and does not
differ from a threshold of 1, which ends up to 1.4 and loses a run.
"""

import argparse
from typing import Any

import numpy as np
from _fresh_tasks import TASKS as FRESH
from _no_knob_rules import TUNED
from _no_knob_runs import LAST, SEGMENT
from _suggested_runs import SHARES, TASKS, compare
from _task_parts import momentum
from no_knob import judge, print_verdict, train

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
    """Returns the share with the lowest geometric mean of those that lose no run.

    None is lost that the tuned clip keeps, if such a share is there.
    """

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
    report(train(args, lambda task: compare(task, args.seeds, args.steps)))


if __name__ == "__main__":
    main()
