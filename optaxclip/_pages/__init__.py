"""How do people see it: on a page, in a terminal?

In reading order:

May import plot, _advice, _looking and every wing below them.
"""
