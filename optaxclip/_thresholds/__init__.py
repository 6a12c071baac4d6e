"""How big is allowed, as rules on vectors of norms? See :mod:`optaxclip.thresholds`.

In reading order:
  moments: running means of what may be as large or as small as its dtype allows.
  averages: thresholds from a few running averages, as published rules have them.
  deviations: some standard deviations above the mean of the norms so far.
  z_score: that of ZClip, which falls as a norm rises.
  quantiles: of a window of the norms, or estimated.

May import `_measure` and what is below it.
"""
