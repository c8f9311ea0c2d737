"""The two ways a program ends that are not a bug: one line is printed, and it exits."""


class UserError(Exception):
  """Something the user can fix. The message names the field, its value and the fix, on one line."""

  exit_status = 2


class NonFiniteError(Exception):
  """A loss or gradient was not finite; `abort.json` in the run directory says where."""

  exit_status = 3
