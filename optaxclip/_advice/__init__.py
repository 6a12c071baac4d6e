"""What is wrong with a run, and which number do I type?

In reading order:

May import _looking and every wing below it.
"""
