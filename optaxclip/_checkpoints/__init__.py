"""How does a run go on with other clips, guards and records than it began with?

In reading order:
  pieces: what an optimizer's state is made of, and which of it only clips keep.
  carry: the state of one optimizer for another that differs in clips.

May import `_looking` and what is below it.
"""
