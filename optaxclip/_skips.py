"""A step that is undone where somebody objects to it, and how that is counted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks, _leaves, _names, _selection, _sums


class GuardState(NamedTuple):
    """State of a guard; read it with :func:`optaxclip.summary`.

    Attributes:
      guarded_state: state of the guarded transformation.
      step_count: steps seen, int32.
      skipped_count: steps skipped, int32.
      consecutive_count: steps in a row, up to now, that the guard objected to, int32.
      finite_count: those of them that were finite, int32.
      last_skipped_step: the last step skipped, counted from 0, int32; -1 if none.
      culprits: which norms the guard objected to then, booleans, one entry per scope as
        in :class:`ClipState`; none of them where it was the loss.
      alarm: whether the guard has objected to as many steps in a row as it was told.
      rule_state: state of the threshold, ``optax.EmptyState()`` if it has none.
      scope_ids: which the scopes are, as in :class:`ClipState`.
    """

    guarded_state: Any
    step_count: jax.Array
    skipped_count: jax.Array
    consecutive_count: jax.Array
    finite_count: jax.Array
    last_skipped_step: jax.Array
    culprits: jax.Array
    alarm: jax.Array
    rule_state: Any
    scope_ids: jax.Array


class Verdict(NamedTuple):
    """What a guard says of a step."""

    culprits: jax.Array  # of the norms, those objected to
    is_bad: jax.Array  # whether there are any, or the loss is one
    is_finite: jax.Array
    rule_state: Any


def guard(inner: Any, max_consecutive: int, init_rule: Any, judge: Any) -> Any:
    """Wraps ``inner``, which is undone where the judge objects to a step."""
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "Expected a guard to wrap a transformation, such as"
            f" `optax.chain(clip, optax.sgd(0.1))`, got {inner!r}."
        )
    if not isinstance(max_consecutive, int) or max_consecutive < 1:
        raise ValueError(
            f"Expected max_consecutive >= 1, an int, got {max_consecutive!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> GuardState:
        like, rule_state, names = init_rule(_leaves.flatten(params, abstract=True))
        # No two of them the same array, which could not be donated.
        return GuardState(
            guarded_state=inner.init(params),
            step_count=jnp.zeros((), jnp.int32),
            skipped_count=jnp.zeros((), jnp.int32),
            consecutive_count=jnp.zeros((), jnp.int32),
            finite_count=jnp.zeros((), jnp.int32),
            last_skipped_step=jnp.full((), -1, jnp.int32),
            culprits=jnp.zeros_like(like, bool),
            alarm=jnp.zeros((), bool),
            rule_state=rule_state,
            scope_ids=_names.encoded(names),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, GuardState]:
        _checks.needed_state(state, GuardState)
        leaves = _leaves.flatten(updates)
        _sums.check_summed(leaves, params)
        verdict = judge(leaves, state, params, extra_args)
        row = jnp.where(
            verdict.is_bad, optax.safe_increment(state.consecutive_count), 0
        )
        finite_row = jnp.where(
            verdict.is_bad, state.finite_count + verdict.is_finite.astype(jnp.int32), 0
        )
        is_accepted = verdict.is_finite & (finite_row > max_consecutive)
        skip = verdict.is_bad & ~is_accepted
        new_updates, guarded_state = _selection.take(
            lambda: inner.update(updates, state.guarded_state, params, **extra_args),
            state.guarded_state,
            skip,
        )

        def kept(old: Any, new: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(skip, a, b), old, new)

        return kept(jax.tree.map(_nothing, new_updates), new_updates), GuardState(
            guarded_state=guarded_state,
            step_count=jnp.asarray(optax.safe_increment(state.step_count)),
            skipped_count=kept(
                optax.safe_increment(state.skipped_count), state.skipped_count
            ),
            consecutive_count=row,
            finite_count=finite_row,
            last_skipped_step=kept(state.step_count, state.last_skipped_step),
            culprits=kept(verdict.culprits, state.culprits),
            alarm=row >= max_consecutive,
            rule_state=kept(state.rule_state, verdict.rule_state),
            scope_ids=state.scope_ids,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _nothing(update: Any) -> jax.Array:
    """Returns what added to a parameter leaves its bits as they are: 0.0 does not."""
    update = jnp.asarray(update)
    negative = jnp.issubdtype(update.dtype, jnp.inexact)
    return jnp.full_like(update, -0.0) if negative else jnp.zeros_like(update)
