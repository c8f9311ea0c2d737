"""A run that is asked to stop saves first. SIGTERM is how clusters take machines back."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Whether this run was asked to stop by SIGTERM, and at which step all its processes do.

  A process of its own is told by its handler. Among several, one may be told and others not, or
  later: jax then agrees on a step that none of them has passed. Use it as a context; handlers can
  only be set in the main thread, so elsewhere it never stops.

  Args:
    children: hand the signal on to the processes that this one has started.
  """

  def __init__(self, *, children: bool = False):
    self.requested = False
    self._children = children
    self._previous = None

  def __enter__(self) -> StopRequest:
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._told)
    return self

  def __exit__(self, *_) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _told(self, number: int, frame: FrameType | None) -> None:
    self.requested = True
    if self._children:
      for child in multiprocessing.active_children():
        child.terminate()  # which is SIGTERM, too

  def at(self, step: int) -> bool:
    """Whether to stop after this step or, where that does not suit, soon after it.

    Every process must call it after every step.
    """
    if multihost_utils.reached_preemption_sync_point(step):  # never, in a process of its own
      self.requested = True
    return self.requested
