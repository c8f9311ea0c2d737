"""From the step to the planner: q of finished steps, some steps later, without a wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.data import pipeline


class Live:
  """Hands q of finished steps to the planner, `lag` steps later; see `mixtures.mixing`.

  The train loop publishes arrays that may still be computed; whoever plans, in a thread of its own,
  waits for the one of `lag` steps ago. So the loop never waits, and a plan never depends on how
  far ahead batches are read.
  """

  def __init__(self, lag: int):
    self._lag = lag
    self._known: dict[int, Any] = {}  # batch -> q
    self._changed = threading.Condition()
    self._closed = False

  def start(self, step: int, queue: Any) -> None:
    """Takes over what `step` finished steps have left in the queue of the mixture's stage."""
    rows = np.asarray(queue)
    with self._changed:
      self._known = {step + i: row for i, row in enumerate(rows)}
      self._changed.notify_all()

  def publish(self, step: int, proportions: jax.Array) -> None:
    """Takes q after step `step`, counted from 0."""
    proportions.copy_to_host_async()
    with self._changed:
      self._known[step + self._lag] = proportions
      self._changed.notify_all()

  def __call__(self, batch: int) -> np.ndarray:
    """q for a batch, counted from 0; waits until it is known.

    Raises:
      pipeline.Closed: the run is over.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._closed or batch in self._known)
      if self._closed:
        raise pipeline.Closed
      proportions = self._known.pop(batch)
    return np.asarray(proportions)

  def close(self) -> None:
    with self._changed:
      self._closed = True
      self._changed.notify_all()


@contextlib.contextmanager
def live_feed(config: Any) -> Iterator[Live | None]:
  """The feed of a run whose sampling its mixture decides; None for others."""
  if not config.mixture.fn:
    yield None
    return
  feed = Live(config.mixture.lag)
  try:
    yield feed
  finally:
    feed.close()
