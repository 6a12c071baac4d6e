"""What did the user say, and can it be meant?

In reading order:
  checks: errors about arguments, in one phrasing.
  mistakes: what was meant instead, of mistakes that else end in silence.
  contexts: functions that run while JAX knows what the user has said of the updates.

Imports nothing of this library.
"""
