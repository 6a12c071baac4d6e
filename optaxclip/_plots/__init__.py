"""How are the pictures drawn?

In reading order:
  columns: what is in a history, for those who draw it.
  canvas: axes, colours, numbers and marks, the same in every picture.
  crash: where a run ends, and how it came to that.
  panels: the two panels of a run, its loss and its norm.
  run: loss and norm, and what the clip took away.
  grid: which leaf had which norm when, and which stay at exactly 0.
  layers: the norm of every leaf at every step.
  thresholds: how many steps each threshold would clip.
  sweep: the loss at the end, for many thresholds.

May import _advice, _looking and every wing below them.
"""
