"""Which clips have a name? One idea a file, most of them a few lines on the engine.

In reading order, those of norms:
  by_norm: of all leaves together, of each, of each group.
  known_norm: one that somebody measured already.
  by_params: relative to the norm of the weights that they change.
  learnt_global: a threshold for the global norm, from its history.
  learnt_per_leaf: one for each leaf, or each group.
Of elements:
  by_value: within a range.
  elements: how much such a clip took away.
  spam, stable_spam: spikes above an element's own second moment, or the largest one.
  acclip: a momentum that clips itself.
  clippy: by the largest change relative to the weight.
Of matrices:
  spectra: which leaves are matrices, and their size as a norm.
  singular_values: shortens every direction that is too long.
  spectral_norm: scales each matrix down as a whole.
Others:
  qk_clip: of the weights that make the logits of attention.
  wrappers: what a clip took away comes back, momentum begins anew.
  stable_adamw: AdamW with the update clipping of Adafactor.

May import `_engine` and what is below it.
"""
