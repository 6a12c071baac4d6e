"""A step that is undone where somebody objects to it, and how that is counted."""

import collections
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._guards import outcomes, selection, slices, watched
from optaxclip._measure import names as _names, stacks as _stacks, units as _units
from optaxclip._mesh import summed
from optaxclip._trees import leaves as _leaves

NEVER = int(np.iinfo(np.int32).max)  # no count of steps is larger

_COUNTS = ("_count", "_step")

# What has this attribute keeps a record of every step, of the skipped ones too.
RECORDS = "records_every_step"


class GuardState(NamedTuple):
    """State of a guard; read it with :func:`optaxclip.summary`.

    Attributes:
      guarded_state: state of the guarded transformation.
      step_count: steps seen, int32.
      skipped_count: steps skipped, int32.
      consecutive_count: steps in a row, up to now, that the guard objected to, for what
        came in or for what came out, int32.
      finite_count: those of them of which both were finite, int32.
      last_skipped_step: the last step skipped, counted from 0, int32; -1 if none.
      culprits: which norms the guard objected to then, or of which leaves the outcome
        was not finite, booleans, one entry per scope as in :class:`ClipState`; none of
        them where it was the loss.
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
    """What a guard says of a step before it is taken."""

    culprits: jax.Array  # of the norms, those objected to
    is_bad: jax.Array  # whether there are any, or the loss is one
    is_finite: jax.Array
    rule_state: Any
    scopes: tuple[_units.Scope, ...]  # of the norms, none if it is the loss


class Patience(NamedTuple):
    """After how many steps in a row the alarm is raised, and a finite one accepted.

    Numbers that can't be counted to stand for never.
    """

    max_consecutive: int
    accept_after: int


def patience(max_consecutive: Any, accept_after: Any) -> Patience:
    """Returns both numbers, and raises where one is none."""
    return Patience(
        _steps_in_a_row(max_consecutive, "max_consecutive"),
        _steps_in_a_row(accept_after, "accept_after"),
    )


def _steps_in_a_row(value: Any, what: str) -> int:
    """Returns a number of steps, at least 1, infinity as one that is never reached."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    is_infinite = isinstance(value, float | np.floating) and value == np.inf
    if not (is_whole or is_infinite) or value < 1:
        raise ValueError(
            f"Expected {what} >= 1, an int, got {value!r}. For never, use `jnp.inf`."
        )
    return NEVER if is_infinite else min(int(value), NEVER)


def guard(inner: Any, patience: Patience, init_rule: Any, judge: Any) -> Any:
    """Wraps ``inner``, which is undone where the judge objects to a step."""
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "Expected a guard to wrap a transformation, such as"
            f" `optax.chain(clip, optax.sgd(0.1))`, got {inner!r}."
        )
    _check_not_recorded([inner.init])
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> GuardState:
        inner_state = inner.init(params)
        _check_not_recorded(jax.tree.leaves(inner_state, is_leaf=_is_record))
        like, rule_state, names = init_rule(_leaves.flatten(params, abstract=True))
        # No two of them the same array, which could not be donated.
        return GuardState(
            guarded_state=inner_state,
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
        checks.needed_state(state, GuardState)
        watched.check_name_of_loss(extra_args)
        state = _as_made(state)
        leaves = _leaves.flatten(watched.detached(updates))
        fast = outcomes.like_updates(params)
        summed.check_summed(leaves, fast)
        verdict = judge(leaves, state, fast, watched.with_detached_loss(extra_args))
        row = state.finite_count + verdict.is_finite.astype(jnp.int32)
        is_patient = patience.accept_after < NEVER
        is_accepted = verdict.is_finite & (row > patience.accept_after) & is_patient
        taken = selection.take(
            lambda: inner.update(updates, state.guarded_state, params, **extra_args),
            state.guarded_state,
            params,
            verdict.is_bad & ~is_accepted,
            functools.partial(_look, leaves, state.guarded_state),
        )
        alarm_after = patience.max_consecutive
        new = _counted(state, verdict, is_accepted, taken, alarm_after, leaves)
        return outcomes.held(taken.updates, params), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_record(x: Any) -> bool:
    return getattr(x, RECORDS, False)


def _check_not_recorded(inside: Any) -> None:
    """Raises where a guard is around a record, of which it would undo a part."""
    if any(map(_is_record, inside)):
        raise ValueError(
            "Expected nothing inside of a guard that records steps, got `record`: of a"
            " step that is skipped nothing would be recorded. Put it outside:"
            " `record(skip_if_nonfinite(...))`."
        )


def _look(
    leaves: _leaves.Leaves, before: Any, updates: Any, params: Any, take: slices.Take
) -> jax.Array:
    found = outcomes.broken(updates, params, leaves, take)
    # A guard has looked at what comes out of it by itself.
    return jnp.zeros_like(found) if isinstance(before, GuardState) else found


def _counted(
    state: GuardState,
    verdict: Verdict,
    is_accepted: jax.Array,
    taken: selection.Taken,
    max_consecutive: int,
    leaves: _leaves.Leaves,
) -> GuardState:
    refused = verdict.is_bad & ~is_accepted
    broken = taken.broken & ~refused  # what was not to be taken can't break
    broke = jnp.any(broken)
    is_bad = verdict.is_bad | broke
    skip = refused | broke
    row = jnp.where(is_bad, optax.safe_increment(state.consecutive_count), 0)
    finite = verdict.is_bad & verdict.is_finite & ~broke
    finite_row = jnp.where(is_bad, state.finite_count + finite.astype(jnp.int32), 0)
    culprits = (verdict.culprits & refused) | _blamed(broken, verdict, leaves)

    def kept(old: Any, new: Any) -> Any:
        return jax.tree.map(
            lambda a, b: jnp.where(skip, jnp.asarray(a, jnp.result_type(b)), b),
            old,
            new,
        )

    return GuardState(
        guarded_state=taken.state,
        step_count=jnp.asarray(optax.safe_increment(state.step_count)),
        skipped_count=kept(
            optax.safe_increment(state.skipped_count), state.skipped_count
        ),
        consecutive_count=row,
        finite_count=finite_row,
        last_skipped_step=kept(state.step_count, state.last_skipped_step),
        culprits=kept(culprits, state.culprits),
        alarm=(row >= max_consecutive) & (max_consecutive < NEVER),
        rule_state=kept(state.rule_state, verdict.rule_state),
        scope_ids=state.scope_ids,
    )


def _blamed(broken: jax.Array, verdict: Verdict, leaves: _leaves.Leaves) -> jax.Array:
    """Returns which norms were of leaves that broke."""
    if _units.EVERYTHING in verdict.scopes:
        return jnp.reshape(jnp.any(broken), verdict.culprits.shape)
    starts, seen = outcomes.entries(leaves), collections.Counter[Any]()
    stacks, found = _stacks.of_leaves(leaves), []
    for scope in verdict.scopes:
        layer = seen[scope]  # a stack has the same leaves for each of its layers
        seen[scope] += 1
        own = [starts[i] + (layer if stacks[i] else 0) for i in scope]
        found.append(jnp.any(broken[np.array(own, int)]))
    if not found:
        return jnp.zeros_like(verdict.culprits)
    return jnp.reshape(jnp.stack(found), verdict.culprits.shape)


def _as_made(state: GuardState) -> GuardState:
    """Undoes what becomes of the types where a state is blended by arithmetic."""
    made = {name: jnp.int32 for name in GuardState._fields if name.endswith(_COUNTS)}
    made |= {"culprits": jnp.bool, "alarm": jnp.bool, "scope_ids": jnp.int32}
    return state._replace(
        **{name: jnp.asarray(getattr(state, name), kind) for name, kind in made.items()}
    )
