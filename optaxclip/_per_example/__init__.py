"""How do I bound what one example contributes?

In reading order:
  grad: the gradient of a batch, each example clipped.
  examples: many gradients measured, clipped, added up and rounded.
  optax_names: drop-ins for Optax's clips of gradients with a batch axis.
  adapt: a threshold that moves to a quantile of the norms.
  centered: a mean in which a bad worker has a bounded share.

May import `_engine` and what is below it.
"""
