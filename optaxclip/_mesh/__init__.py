"""Where are the pieces of a leaf, and what adds them up?

In reading order:
  collectives: sums over devices inside ``shard_map``, nothing anywhere else.
  splits: how each leaf is split, by its type or by what the user says (`over_axes`).
  side_by_side: numbers that differ from device to device, in one collective.
  spread: how whole leaves are spread, by their types or by what the user says.
  summed: raises where something is still to be summed over devices.

May import `_trees` and what is below it.
"""
