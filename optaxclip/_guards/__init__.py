"""Which steps must not happen?

In reading order:
  guards: `skip_if_nonfinite` and `skip_if_spike`.
  skips: a step that is undone where somebody objects, and how that is counted.
  past: a spike must not raise its own threshold.
  losses: the loss that a guard watches, and what it is called.
  outcomes: whether what comes out of an optimizer is finite.
  selection: how a step is undone without a copy of the state it began with.
  kept: running statistics that a skipped step must not change.
  inputs: what updates go through before a clip: unscaled, made finite.

May import `_engine` and what is below it.
"""
