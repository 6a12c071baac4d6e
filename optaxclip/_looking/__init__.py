"""What did my run do?

In reading order:
  summary: what every clip, guard and cotangent saw, under names for a logger.
  by_name: how it is read by name, at no cost to the step that made it.
  history: one form for what a run did, whatever it was seen by.
  columns: how the rows of any log become one.
  runs: where a log begins anew, and what it wrote twice.
  logs: how a file is read, whoever wrote it.

May import every wing below it.
"""
