"""Steps that must not happen: wrappers that leave everything as it was.

A zeroed gradient is no remedy for a bad one: the moments of Adam would still move, and
so would what has momentum. A guard skips the whole step, by selection: 0 times NaN is
NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks, mistakes
from optaxclip._engine import limits as _limits
from optaxclip._engine.limits import Threshold
from optaxclip._guards import skips, watched
from optaxclip._guards.skips import GuardState, Verdict, guard
from optaxclip._measure import formulas, scopes as _scopes, units as _units
from optaxclip._trees import leaves as _leaves

# A rule has no state of its own: one serves all guards.
_SIX_SIGMA = thresholds.mean_plus_std(6.0, window=128, warmup_steps=64)


def skip_if_nonfinite(
    inner: optax.GradientTransformation, max_consecutive: int | float = 10
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose updates have a NaN or an infinity, for ever.

    A skipped step leaves no trace: the parameters and the state of ``inner``, with all
    of its moments, counts and histories, keep their bits. Wrap the whole optimizer, and
    the clip with it:

    .. code-block:: python

      optimizer = optaxclip.skip_if_nonfinite(
          optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adamw(1e-3))
      )

    What comes out of ``inner`` is looked at as well: a schedule may return NaN, ``eps``
    may be 0 in float16, a step may take a parameter to infinity. If an update is not
    finite, or makes of a finite parameter one that is not, the step is skipped in the
    same way. Of a leaf with more than 1024 elements up to so many, evenly spread,
    decide on this. Any other that breaks is held by itself, at a parameter that keeps
    its bits, uncounted, while the rest of the step is taken: for all to decide, the
    optimizer would take half as long again. Where leaves may be spread over devices,
    all decide.

    If nothing finite comes any more, nothing is learnt any more either: then there is
    an alarm, on which the training loop decides. A NaN is never let through, as
    ``optax.apply_if_finite`` does in the end.

    .. code-block:: python

      if optaxclip.summary(opt_state)["guard/alarm"]:
          params, opt_state = restore_last_checkpoint()  # and lower the rate, or stop

    Guarantees:
      * Updates of a skipped step are -0.0, which added to a parameter changes no bit.
      * No update is NaN or infinite, nor does one make a parameter so that was finite.
        One that was not finite before is nobody's fault: the step is taken.
      * What is finite passes, also where squares overflow. The check is the norm of
        each leaf, most of which a clip inside computes anyway.
      * The derivative through a skipped step is that of nothing: finite, as far as what
        the updates were made of does not multiply its zeros by infinity. Outside of
        ``jit`` it is so in any case.
      * All devices of a mesh decide alike.

    Args:
      inner: optimizer, or a part of one. Around ``optax.MultiSteps`` a bad micro-batch
        does not get into the accumulator; inside of it, it is there already, and stays,
        for Optax multiplies it by 0: from then on every step is skipped.
      max_consecutive: steps skipped in a row that raise the alarm; ``jnp.inf`` for
        none.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`GuardState`.
      If a loss is passed, ``update(..., value=loss)``, it has to be finite as well.

    Raises:
      TypeError: ``inner`` is not a transformation; the loss comes by another name.
      ValueError: ``max_consecutive`` is below 1; and what ``inner`` raises.

    Examples:
      >>> tx = optaxclip.skip_if_nonfinite(optax.adam(0.1))
      >>> params = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
      >>> state = tx.init(params)
      >>> grads = {"a": jnp.array([0.5]), "b": jnp.array([jnp.nan])}
      >>> updates, state = tx.update(grads, state, params)
      >>> print(optax.apply_updates(params, updates)["a"])
      [1.]
      >>> for name, value in optaxclip.summary(state, params).items():
      ...     print(f"{name:23} {value}")
      guard/skipped_count     1
      guard/skipped_fraction  1.0
      guard/consecutive_count 1
      guard/alarm             False
      guard/last_skipped_step 0
      guard/culprit           1
      guard/culprit/b         0
    """

    def judge(
        leaves: _leaves.Leaves, state: GuardState, params: Any, extra_args: Any
    ) -> Verdict:
        del params
        measured = _scopes.measure(formulas.leaf_norms, leaves)
        finite = jnp.isfinite(measured.norms)
        is_finite = jnp.all(finite)
        if extra_args.get("value") is not None:
            is_finite &= watched.is_finite_everywhere(extra_args["value"])
        past, scopes = state.rule_state, measured.scopes
        return Verdict(~finite, ~is_finite, is_finite, past, scopes)

    def init_rule(leaves: _leaves.Leaves) -> tuple[jax.Array, Any, Any]:
        zeros = _scopes.zeros(formulas.leaf_norms, leaves)
        names = _scopes.names(formulas.leaf_norms, leaves)
        return zeros.norms, optax.EmptyState(), names

    patience = skips.patience(max_consecutive, jnp.inf)
    return guard(inner, patience, init_rule, judge)


def skip_if_spike(
    inner: optax.GradientTransformation,
    norm: _scopes.Norm | None = norms.global_norm,
    threshold: Threshold = _SIX_SIGMA,
    max_consecutive: int | float = 10,
    accept_after: int | float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose norm is above a threshold, or not finite.

    Or those whose loss is, with ``norm=None``; then the norm is not looked at. For the
    spikes that clipping is not enough for. The default is OLMo's: 6 standard
    deviations above the mean of the last 128 steps that were taken, from step 64 on;
    there it watches norm and loss, by one guard around the other. To the inner one, a
    step that the outer one skips has not happened: it doesn't count it.

    Guarantees:
      * A skipped step leaves no trace, as in :func:`skip_if_nonfinite`; it does not
        enter the history of the threshold either. What enters are norms of steps that
        were taken, as they came.
      * A spike does not raise its own threshold: a rule is asked before it sees the
        norm of this step, and the first step always passes.
      * What a rule takes for a spike, and has come to stay, is accepted: after
        ``accept_after`` skips of finite steps in a row such steps are taken, and enter
        the history, until one is below the threshold. A number and a schedule are never
        given up by themselves. What is not finite is never accepted, and doesn't count.
      * What comes out of ``inner`` has to be finite as well, as it has there.

    Args:
      inner: optimizer, or a part of one.
      norm: how to measure; a step is skipped if any scope is above its threshold. None
        watches the loss instead, passed as ``update(..., value=loss)``.
      threshold: largest norm that is taken: a number, a schedule, a rule or a mapping,
        as in :func:`clip_by`. Rules are asked by way of :func:`thresholds.lagged`:
        give them as they are, for one that is lagged would go by the step before the
        last. Schedules count the skipped steps, too.
      max_consecutive: steps skipped in a row that raise the alarm; ``jnp.inf`` for
        none.
      accept_after: finite steps skipped in a row before one is accepted; ``jnp.inf`` to
        accept none ever. None is 10 for a rule, and never for numbers and schedules.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`GuardState`.

    Raises:
      TypeError: ``inner`` is not a transformation, or another argument of a wrong type;
        the loss comes by another name.
      ValueError: a number of steps below 1, or what :func:`clip_by` raises; when
        tracing, no loss where it is watched, or one that differs between devices.

    Examples:
      >>> rule = optaxclip.thresholds.mean_plus_std(6.0, window=128, warmup_steps=3)
      >>> tx = optaxclip.skip_if_spike(optax.sgd(1.0), threshold=rule)
      >>> params = jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for grad in 1.0, 2.0, 1.0, 1000.0, 1.0:
      ...     updates, state = tx.update(jnp.array([grad]), state, params)
      ...     print(updates)
      [-1.]
      [-2.]
      [-1.]
      [-0.]
      [-1.]

    References:
      OLMo Team, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2025
    """
    lowest = 0.0 if norm is not None else -jnp.inf  # losses may be negative
    checks.threshold(threshold, "threshold", lowest)
    if norm is not None:
        mistakes.norm(checks.function(norm, "norm"))
    formula = None if norm is None else norms.formula(norm)
    limit = watched.by_the_past(threshold)

    def measure(leaves: _leaves.Leaves, extra_args: Any) -> _scopes.Measured:
        if formula is not None:
            return _scopes.measure(formula, leaves)
        return _scopes.single(watched.loss(extra_args), leaves.dtype)

    def judge(
        leaves: _leaves.Leaves, state: GuardState, params: Any, extra_args: Any
    ) -> Verdict:
        measured = _whole(measure(leaves, extra_args))
        count, past = state.step_count, state.rule_state
        limits, rule_state = _limits.update(
            limit, measured, count, past, leaves, params, extra_args
        )
        finite = jnp.isfinite(measured.norms)
        bad = ~(finite & (measured.sizes() <= limits))
        is_bad, is_finite = jnp.any(bad), jnp.all(finite)
        if formula is None:
            return Verdict(jnp.zeros_like(bad), is_bad, is_finite, rule_state, ())
        return Verdict(bad, is_bad, is_finite, rule_state, measured.scopes)

    def init_rule(leaves: _leaves.Leaves) -> tuple[jax.Array, Any, Any]:
        if formula is None:
            zeros, names = _scopes.single(jnp.zeros(()), leaves.dtype), None
        else:
            zeros = _whole(_scopes.zeros(formula, leaves))
            names = _scopes.names(formula, leaves)
        return zeros.norms, _limits.init(limit, zeros, leaves), names

    if accept_after is None:
        accept_after = 10 if watched.is_learnt(threshold) else jnp.inf
    patience = skips.patience(max_consecutive, accept_after)
    return guard(inner, patience, init_rule, judge)


def _whole(measured: _scopes.Measured) -> _scopes.Measured:
    if isinstance(measured.norms, _units.Units):
        raise ValueError(
            "Expected a norm of all leaves, of each leaf or of groups, got one of"
            " units. Use `norms.leaf_norms`."
        )
    return measured
