"""What became of the weights?"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._advice.run import Run, few, short

LARGE = 1e3  # root mean square of a weight


def broken(run: Run) -> str | None:
    """Says that weights are NaN or infinite."""
    bad = [name for name, x in _weights(run) if not np.isfinite(x).all()]
    if not bad:
        return None
    return (
        f"NOT FINITE WEIGHTS, in {few(bad)}. No step brings them back: go on from a"
        " checkpoint. `skip_if_nonfinite(optimizer)` keeps such steps out."
    )


def large(run: Run) -> str | None:
    """Says that weights are larger than layers need them to be."""
    sizes = {name: _rms(x) for name, x in _weights(run) if np.isfinite(x).all()}
    name = max(sizes, key=sizes.__getitem__, default=None)
    if name is None or sizes[name] < LARGE:
        return None
    return (
        f"GROWING WEIGHTS: those of {name} have a root mean square of"
        f" {short(sizes[name])}. If they did not begin there, the steps were too large:"
        " begin anew with a lower learning rate or a clip."
    )


def _weights(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights of which there is more than a shape."""
    for name, x in run.weights.items():
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        if not is_shape and jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            yield name, np.asarray(x)


def _rms(x: np.ndarray) -> float:
    size = np.abs(x).astype(float)
    largest = size.max(initial=0.0)  # whose square may overflow
    if not largest > 0:
        return 0.0
    return float(largest * np.sqrt(np.mean((size / largest) ** 2)))
