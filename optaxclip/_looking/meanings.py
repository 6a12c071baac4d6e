"""What is a column of a log called here?

Trainers use names of their own. Those count that are known to mean one thing: a name
with one word more, as of an evaluation, of a part of the loss, of the norm after the
clip, of the params or the updates, is another thing.
"""

import collections
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from optaxclip._looking import cells as _cells
from optaxclip._looking.cells import Row

EVALUATIONS = {"eval", "evaluation", "val", "valid", "validation", "test", "testing"}
EVALUATIONS |= {"dev", "holdout", "heldout"}

_OTHERS = {*EVALUATIONS, "param", "params", "update", "updates", "clipped"}
_PLACES = {"train", "training", "trainer", "metrics", "learning", "optim", "inner"}
_AVERAGES = {"mean", "avg", "average", "running", "epoch", "smoothed", "smooth"}
_MEANINGS = {  # the better ones first
    "step": "global step|step|steps|iteration|iterations|iter|iters|num updates"
    "|num steps|updates|update",
    "loss": "loss|total loss|loss step|batch loss|current loss|lm loss|nll loss|nll"
    "|ce loss|cross entropy loss|cross entropy|objective|cost",
    "norm": "raw grad norm|grad norm raw|unclipped grad norm|grad norm unclipped"
    "|grad norm preclip|preclip grad norm|grad norm pre clip|pre clip grad norm"
    "|grad norm before clip|grad norm before clipping|norm|grad norm|gradient norm"
    "|grads norm|gradients norm|gnorm|grdn|gradnorm|global norm|total norm"
    "|global grad norm|global gradient norm|grad global norm|total grad norm"
    "|total gradient norm|grad norm total|gradient norm total|grad norm global"
    "|grad norm step|l2 grad norm|grad l2 norm|grad norm l2|l2 norm grad"
    "|l2 norm grads|grad 2 0 norm total|gradients norm total",
    "learning_rate": "lr|current lr|lr 0|lr group 0|lr pg1|lr adam|lr adamw|lr sgd",
}
_RANKS = {
    phrase: (column, rank)
    for column, phrases in _MEANINGS.items()
    for rank, phrase in enumerate(phrases.split("|"))
}
_SCOPES = re.compile(
    r"(|.*/)(?:grad_norm|grad/norm|grads/norm|l2_norm/grad|grad_2\.0_norm"
    r"|gradients/norm|gradient_norm)/(.+)"
)
_NO_SCOPE = {"max", "min", "std", "var", "median", "sum", "count", "total", "global"}
_NO_SCOPE |= {"before", "after", "pre", "post", "clip", "clipping", "raw", "unclipped"}
_NO_SCOPE |= _OTHERS | _AVERAGES
_EXPORTED = re.compile(r"(.+) - (.+?)(__MIN|__MAX)?")  # by Weights & Biases
_OURS = re.compile(
    r"(clip|guard|cotangent)(_\d+)?(?:/(.+?))?/(norm|max_norm|factor|clipped_fraction"
    r"|update_count|largest|skipped_count|skipped_fraction|consecutive_count|alarm"
    r"|last_skipped_step|culprit|largest_norm|nonfinite_fraction|calls)(?:/(.+))?"
)

# What may say in a row that it is an evaluation's.
_TAGS = {"mode", "split", "phase", "stage", "subset", "set", "dataset", "event", "type"}


class Statistic(NamedTuple):
    """A name of a summary, in parts; those that it lacks are empty."""

    kind: str
    number: str
    label: str
    what: str
    scope: str


def statistic(name: str) -> Statistic | None:
    """Returns the parts of a name that `summary` gives, None of any other name."""
    found = _OURS.fullmatch(name)
    return found and Statistic(*(part or "" for part in found.groups()))


@functools.lru_cache(maxsize=4096)
def meaning(name: str) -> str:
    """Returns what a column of a log is called here: its own name, where none fits."""
    return _read(name)[0]


@functools.lru_cache(maxsize=4096)
def is_of_training(name: str) -> bool:
    """Whether a column is one that evaluations don't have: the loss, or a norm."""
    if name in ("loss", "norm") or name.startswith("norm/"):
        return True
    ours = statistic(name)
    return ours is not None and ours.kind == "clip" and ours.what in ("norm", "largest")


def is_of_evaluation(name: str) -> bool:
    """Whether a column is one that only evaluations have."""
    return bool(EVALUATIONS & {*_words(name)}) and not is_of_training(meaning(name))


def training(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns the numbers of rows, but of those that say they are an evaluation's."""
    kept = [row for row in rows if not any(_says_so(*item) for item in row.items())]
    return [found for row in kept if (found := _cells.numbers(row))]


def _says_so(key: str, value: Any) -> bool:
    is_word = isinstance(value, str) and value.strip().casefold() in EVALUATIONS
    return is_word and str(key).casefold() in _TAGS


def is_history(names: Iterable[str]) -> bool:
    """Whether these are the columns of a history that was made here."""
    return {"step", "width", "nonfinite"} <= {*names}


def chosen(rows: Sequence[Row]) -> dict[str, str]:
    """Returns which columns count, and what they are called here.

    Of those with one meaning it is the most frequent one, else no average, else the
    better name. Names of our own that stand for a count are taken from histories only.
    """
    counts = collections.Counter(name for row in rows for name in row if name)
    if is_history(counts):
        return {name: name for name in counts}
    for name in [x for x in counts if meaning(x) == "step"]:
        if any(abs(x - round(x)) > 1e-6 for x in _finite(rows, name)):
            del counts[name]  # a share of an epoch
    for name in ("width", "run", "nonfinite", "clipped", "skipped"):
        del counts[name]
    _refuse_several_runs(counts)

    best: dict[str, str] = {}
    for name in sorted(counts, key=lambda x: (-counts[x], *_read(x)[1:], len(x))):
        best.setdefault(meaning(name), name)
    return {name: column for column, name in best.items()}


def _finite(rows: Sequence[Row], name: str) -> list[float]:
    return [x for row in rows if abs(x := row.get(name, 0.0)) < float("inf")]


def _refuse_several_runs(names: Iterable[str]) -> None:
    found = collections.defaultdict(list)
    for name in names:
        if (
            (part := _EXPORTED.fullmatch(name))
            and not part[3]
            and meaning(name) != name
        ):
            found[part[2]].append(name)
    for same in found.values():
        if len(same) > 1:
            raise ValueError(
                f"Expected one run, got a column of each: {', '.join(same)}. Keep the"
                " columns of one."
            )


@functools.lru_cache(maxsize=4096)
def _read(name: str) -> tuple[str, Any, Any]:
    """Returns what a name means, whether it is poor for that, and how poor."""
    if name.startswith(("norm/", "peak/")) or statistic(name):
        return name, False, 0
    if exported := _EXPORTED.fullmatch(name):
        return _read(exported[2]) if not exported[3] else (name, False, 0)
    found = _SCOPES.fullmatch(name)
    if found and not _OTHERS & {*_words(found[1])}:
        if not {*_words(found[2])} <= _NO_SCOPE:
            return f"norm/{found[2]}", False, 0
        if _AVERAGES & {*_words(found[2])}:  # of the scopes
            return name, False, 0
    words = _words(name)
    phrase = " ".join(x for x in words if x not in _PLACES | _AVERAGES)
    if _OTHERS - {"update", "updates"} & {*words} or phrase not in _RANKS:
        return name, False, 0
    column, rank = _RANKS[phrase]
    # `_step` counts what was logged.
    return column, bool(_AVERAGES & {*words}) or name == "_step", rank


def _words(name: str) -> list[str]:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    name = re.sub(r"learning[ _-]?rate", "lr", name)
    return re.findall(r"[a-z0-9]+", name)
