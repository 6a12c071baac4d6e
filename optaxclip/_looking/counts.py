"""What follows from what clips and guards have seen and counted?

What a clip saw at a step that was skipped is of the step before.
"""

import numpy as np

from optaxclip._looking import meanings as _meanings

History = dict[str, np.ndarray]


def of(what: str, columns: History) -> list[str]:
    """Returns the names of a statistic, of all clips and guards."""
    every = {key: _meanings.statistic(key) for key in columns}
    return [key for key, found in every.items() if found and found.what == what]


def is_new(columns: History, name: str) -> np.ndarray | bool:
    """Whether a clip saw something at each step; at one that was skipped it did not."""
    count = columns.get(_beside(name, "update_count"))
    return True if count is None else np.diff(_held(count), prepend=0) != 0


def with_norms(columns: History) -> History:
    """Returns the columns and the norms that the first clip saw, where there are none.

    Of norms of scopes alone, the total is the root of the sum of their squares.
    """
    history = dict(columns)
    has_scopes = any(key.startswith("norm/") for key in columns)
    for key in of("norm", columns):
        _, number, label, _, scope = _meanings.statistic(key) or [""] * 5
        is_first = key.startswith("clip") and number in ("", "_0") and not label
        if is_first and not (scope and has_scopes):
            seen = np.where(is_new(columns, key), columns[key], np.nan)
            history.setdefault(f"norm/{scope}".removesuffix("/"), seen)
    norms = {key: x for key, x in history.items() if key.startswith("norm/")}
    is_nested = any(x.startswith(f"{y}/") for x in norms for y in norms)
    if norms and "norm" not in history and not is_nested:
        every = np.abs([*norms.values()])
        largest = np.max(every, axis=0)  # whose square may overflow
        scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1)
        history["norm"] = scale * np.sqrt(np.sum((every / scale) ** 2, axis=0))
    return history


def steps(columns: History, length: int) -> np.ndarray:
    """Returns the number of each step, by what clips and guards counted if they can.

    A guard around a clip keeps it from counting what is skipped; the guard's own count
    is in its share.
    """
    for key in of("update_count", columns)[:1]:
        count = _held(columns[key])
        for name in of("skipped_count", columns):
            skips = _held(columns[name])
            share = _held(columns.get(_beside(name, "skipped_fraction"), 0 * skips))
            total = skips / np.where(share > 0, share, 1)
            count = np.maximum(count, np.round(total))
        if length == 1 or (np.diff(count) > 0).all():
            return np.maximum(count - 1, 0)
    return np.arange(length)


def skipped(history: History) -> np.ndarray:
    """Returns how many steps of each row guards skipped.

    Of those before the first row only the last is known to be in it.
    """
    every = np.zeros(len(history["step"]))
    begins = history["step"][0] < history["width"][0]
    for key in of("skipped_count", history):
        counts = _held(history[key])
        last = history.get(_beside(key, "consecutive_count"), counts)[0]
        first = (
            counts[0]
            if begins
            else np.fmin(np.fmin(counts[0], last), history["width"][0])
        )
        change = np.diff(counts, prepend=counts[0] - first)
        every = every + np.where(change < 0, counts, change)
    return every


def clipped(history: History) -> np.ndarray:
    """Returns at how many steps of each row a clip clipped, of several the one most.

    By what each has counted; at a row's last step by the factor, unless it was skipped.
    """
    every = np.zeros(len(history["step"]))
    nothing = np.full(len(every), np.nan)
    for key in of("factor", history):
        is_now = (history[key] < 1) & is_new(history, key)
        share = history.get(_beside(key, "clipped_fraction"), nothing)
        total = history.get(_beside(key, "update_count"), nothing)
        counts = _held(np.round(share * total))
        begins = history["step"][0] < history["width"][0]
        change = np.diff(counts, prepend=0 if begins else counts[0] - is_now[0])
        change = np.where(change < 0, is_now, change)
        every = np.fmax(every, np.fmax(change, is_now))
    return np.minimum(every, history["width"] - history.get("skipped", 0))


def _held(counts: np.ndarray) -> np.ndarray:
    """Returns counts, where one is missing the one before."""
    last = np.maximum.accumulate(np.where(np.isnan(counts), 0, np.arange(len(counts))))
    return np.nan_to_num(counts[last])


def _beside(name: str, what: str) -> str:
    """Returns what the same clip or guard calls another of its statistics."""
    found = _meanings.statistic(name)
    if found is None:
        return ""
    label = f"/{found.label}" if found.label else ""
    scope = f"/{found.scope}" if found.scope and what == "clipped_fraction" else ""
    return f"{found.kind}{found.number}{label}/{what}{scope}"
