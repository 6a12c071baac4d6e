"""How do I clip inside the backward pass?

In reading order:
  cotangents: identities whose derivative is clipped.
  stats: what they saw, as the gradient of a dummy parameter.
  flax_layers: the same between the layers of a Flax model, from outside.

May import `_clips` and what is below it.
"""
