"""What the clips did, in one line."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from optaxclip._looking.summary import summary
from optaxclip._plots import canvas as _canvas, columns as _columns

FIELDS = "/(?:norm|max_norm|factor|largest|clipped_fraction|update_count)"


def status(seen: Any, **numbers: Any) -> str:
    """Returns one line of what the clips did at the last step, for a progress bar.

    ``loss 0.53  norm 2.1  clip 1  x0.48  clipped 31 %  skipped 2``: your numbers;
    then of the first clip the norm before it, the threshold, the factor, and the share
    of the steps so far that were clipped; and how many steps the guards have skipped.
    Of a clip with several scopes it is the largest norm, the smallest threshold and
    factor, and the mean share. What is not known is left out.

    With tqdm: ``bar.set_postfix_str(optaxclip.status(opt_state, loss=loss))``.

    Args:
      seen: state of an optimizer, what :func:`summary` made of it, or a history.
      **numbers: to be put before, by name.

    Returns:
      The line.

    Raises:
      ValueError: there is no clip in the state.

    Examples:
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, opt_state = tx.update(grads, tx.init(grads))
      >>> optaxclip.status(opt_state, loss=0.53)
      'loss 0.53  norm 5  clip 1  x0.2  clipped 100 %'
    """
    row = seen if isinstance(seen, Mapping) and _is_row(seen) else summary(seen)
    if "width" in row:
        row = _of_history(row)
        numbers = {
            name: row[name] for name in ("step", "loss") if name in row
        } | numbers
    parts = [f"{name} {_text(value)}" for name, value in numbers.items()]
    return "  ".join([*parts, *_of_clip(row)])


def _is_row(seen: Mapping[Any, Any]) -> bool:
    """Tells a summary or a history from a mapping that holds states."""
    return any(re.match(r"(clip|guard)(_\d+)?/|(norm|loss)$", str(x)) for x in seen)


def _of_history(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the last row of a history, with what all rows tell of clip and guard."""
    columns = _columns.runs(seen)[-1]
    row: dict[str, Any] = {name: x[-1] for name, x in columns.items()}
    row |= {"step": int(columns["step"][-1])}
    if (share := _columns.clipped_share(columns)) is not None:
        row["clipped"] = share
    if "skipped" in columns:
        row["skipped"] = columns["skipped"].sum()
    return row


def _of_clip(row: Mapping[str, Any]) -> list[str]:
    """Returns what the first clip did, and how often a guard skipped."""
    names = [x for x in row if re.match(r"clip(_\d+)?/", x)]
    first = next((re.split(FIELDS, x)[0] for x in names), "clip")

    def values(whole: str, field: str) -> np.ndarray:
        scopes = [row[x] for x in names if f"{x}/".startswith(f"{first}/{field}/")]
        return np.array([row[whole]] if whole in row else scopes, float)

    norms, shares = values("norm", "norm"), values("clipped", "clipped_fraction")
    max_norms, factors = values("", "max_norm"), values("", "factor")
    parts = [f"norm {_canvas.number(norms.max())}"] if norms.size else []
    if max_norms.size and np.isfinite(max_norms.min()):
        parts.append(f"clip {_canvas.number(max_norms.min())}")
        parts.append(f"x{_canvas.number(factors.min())}")
    if shares.size:
        parts.append(f"clipped {_canvas.share(float(shares.mean()))}")
    skips = [row[x] for x in row if x == "skipped" or x.endswith("/skipped_count")]
    return [*parts, f"skipped {np.max(skips):.0f}"] if skips else parts


def _text(value: Any) -> str:
    return str(value) if isinstance(value, int) else _canvas.number(float(value))
