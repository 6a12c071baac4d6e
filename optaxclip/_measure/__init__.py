"""How big, over what? The numbers behind :mod:`optaxclip.norms`.

In reading order:
  stacks: which arrays are layers in a stack (`over_layers`).
  units: the numbers of all scopes, and which of them is of which leaf.
  reduce: from arrays to the sums of powers behind every norm.
  names: what a scope is called, and how a state says so without a string.
  scopes: norms that neither overflow nor underflow, one for each scope.
  formulas: the plain formulas of the norms, which `scopes` rescues.
  unit_norms: the same for units, such as the output neurons of a kernel.
  own_norms: which norm is of which scope, where a user's function measured.

May import `_mesh` and what is below it.
"""
