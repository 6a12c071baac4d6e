"""Norm x threshold x factor: what does every clip that multiplies do?

In reading order:
  clip_by: the engine.
  limits: the threshold of every scope, from what the user gave as one.
  multiply: factors of any size, exactly, and one rounding.
  state: what a clip saw, for people to read.
  at_once: one compiled call where no ``jit`` is around a clip.

May import `norms`, `thresholds`, `factors` and what is below them.
"""
