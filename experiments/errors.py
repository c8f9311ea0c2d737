"""The ways a program ends early that are not a bug: one line is printed, and it exits."""


class UserError(Exception):
  """Something the user can fix. The message names the field, its value and the fix, on one line."""

  exit_status = 2


class NonFiniteError(Exception):
  """A loss or gradient was not finite; `abort.json` in the run directory says where."""

  exit_status = 3


class HostLostError(Exception):
  """Another process of the run died, or did not come; all of them must be started again."""

  exit_status = 69  # EX_UNAVAILABLE of sysexits.h


class StoppedError(Exception):
  """The run was asked to stop, and saved; the same command goes on from there."""

  exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again
