"""Which steps must not happen?

In reading order:
  guards: `skip_if_nonfinite` and `skip_if_spike`.
  skips: a step that is undone where somebody objects, and how that is counted.
  watched: the loss, and thresholds that go by the past.
  outcomes: whether what comes out of an optimizer is finite.
  slices: how a slice is computed without all the rest of the array.
  selection: how a step is undone without a copy of the state it began with.
  running_statistics: what a skipped step must not change beside the params.
  inputs: what updates go through before a clip: unscaled, made finite.

May import `_engine` and what is below it.
"""
