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
  counts: what follows from what clips and guards counted.
  runs: where a log begins anew, and what it wrote twice.
  meanings: what a column of a log is called here.
  logs: how a file is read, whoever wrote it.
  texts: how a table, mappings or pairs of names and numbers are.
  boards: how TensorBoard's event files are.
  cells: which number is meant by what is written.

May import every wing below it.
"""
