"""How are TensorBoard's event files read?"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns a row for each step, with every scalar that was logged at it.

    Where several folders hold scalars, those of each are named after it.
    """
    found = sorted({x.parent for x in path.rglob("*.tfevents.*")}) or [path]
    sources = found if path.is_dir() else [path]
    logs = {source: list(_scalars(source)) for source in sources}
    logs = {source: scalars for source, scalars in logs.items() if scalars}
    steps: dict[int, dict[str, Any]] = {}
    for source, scalars in logs.items():
        folder = source.relative_to(path).as_posix() if len(logs) > 1 else "."
        for tag, step, value in scalars:
            name = tag if folder == "." else f"{folder}/{tag}"
            steps.setdefault(step, {"step": step})[name] = value
    return [steps[step] for step in sorted(steps)]


def _scalars(source: Path) -> Iterator[tuple[str, int, float]]:
    try:
        events: Any = importlib.import_module(
            "tensorboard.backend.event_processing.event_accumulator"
        )
        tensors: Any = importlib.import_module("tensorboard.util.tensor_util")
    except ImportError:
        raise ValueError(
            f"Expected the package `tensorboard`, to read {source}: `pip install"
            " tensorboard`, or write a CSV file."
        ) from None
    everything = {events.SCALARS: 0, events.TENSORS: 0}  # by default, a sample
    log = events.EventAccumulator(str(source), size_guidance=everything).Reload()
    for tag in log.Tags()["scalars"]:
        yield from ((tag, x.step, x.value) for x in log.Scalars(tag))
    for tag in log.Tags()["tensors"]:
        for event in log.Tensors(tag):
            value = tensors.make_ndarray(event.tensor_proto)
            if np.ndim(value) == 0 and value.dtype.kind in "iuf":
                yield tag, event.step, float(value)
