"""How big, over what? The numbers behind :mod:`optaxclip.norms`.

In reading order:
  stacks: which arrays are layers in a stack (`over_layers`).
  units: the numbers of all scopes, and which of them is of which leaf.
  layouts: how leaves are laid out for the kernels that reduce them.
  totals: from reduced pieces to one number for each scope, over devices too.
  reduce: from arrays to the sums of powers behind every norm.
  along: the same along some dimensions of a leaf, by unit.
  names: what a scope is called, and how a state says so without a string.
  powers: by which power of two updates are multiplied to be measured.
  forms: a norm that neither over- nor underflows, as each platform likes it.
  scopes: such norms, one for each scope.
  formulas: the plain formulas of the norms, which `forms` makes exact.
  unit_norms: the same for units, such as the output neurons of a kernel.
  own_norms: which norm is of which scope, where a user's function measured.

May import `_mesh` and what is below it.
"""
