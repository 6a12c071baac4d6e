"""What is in a tree of updates, and what may be in one of state?

In reading order:
  paths: which leaf is meant, by readable paths and patterns.
  leaves: which leaves a clip works on, and in which dtype it computes.
  memories: what remembers every element, in the places of the params.
  infinity: what stands for infinity in a state.

May import `_arguments`.
"""
