"""What did my run do?

In reading order:
  summary: what every clip, guard and cotangent saw, under names for a logger.
  by_name: how it is read by name, at no cost to the step that made it.

May import every other wing.
"""
