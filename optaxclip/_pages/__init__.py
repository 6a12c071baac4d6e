"""How do people see it: on a page, in a terminal?

In reading order:
  facts: a run in a few numbers, each with its name.
  leaves: what is to be said of each leaf, in a row of a table.
  figures: how a picture stands in the text of a page.
  style: what a page is set in.
  page: one page that tells what a run did.
  terminal: a run in a terminal.
  line: what the clips did, in one line.
  command: the command line.

May import plot, _plots, _advice, _looking and every wing below them.
"""
