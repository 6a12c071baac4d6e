"""What did my run do?

In reading order:
  summary: what every clip, guard and cotangent saw, under names for a logger.
  by_name: how it is read by name, at no cost to the step that made it.
  record: a flight recorder: the run in the optimizer's state.
  row: what of a step makes a row.
  seen: what the clips and guards inside saw of it.
  stretches: how a run of any length fits into fixed memory.
  history: one form for what a run did, whatever it was seen by.
  columns: how the rows of any log become one.
  runs: where a log begins anew, and what it wrote twice.
  logs: how a file is read, whoever wrote it.

May import every wing below it.
"""
