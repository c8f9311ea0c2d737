"""What the benchmarks share: the run of an arm, and calls that are timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def build(config: Any, arm: str, devices: Any, **changes: Any) -> Any:
  """The run of one arm, with further changes of the config."""
  from configs import common
  from experiments import train

  config = config.copy_and_resolve_references()
  if 'loss' in config.w and 'start' in config.w.loss:
    config.w.loss.start = 0  # burn-in is for training; here the weighting acts at once
  common.set_arm(config, arm)
  config.update_from_flattened_dict(changes)
  return train.build(config, devices)


def timed_step(train_step: Callable, state: Any, batch: Any, signals: Any) -> Callable[[], None]:
  """A function of nothing that runs one step to its end and keeps the state."""
  import jax

  def step() -> None:
    nonlocal state
    state, record = train_step(state, batch, signals)
    jax.block_until_ready((state, record))

  return step


def interleaved(calls: Sequence[Callable[[], None]], rounds: int) -> np.ndarray:
  """Seconds of each call, float64[rounds, N]; every round makes each once, in random order.

  A machine that slows down then slows them alike.
  """
  for call in calls:  # let clocks and caches settle
    call()
    call()
  rng = np.random.default_rng(0)
  seconds = np.zeros((rounds, len(calls)))
  for row in seconds:
    for i in rng.permutation(len(calls)):
      started = time.perf_counter()
      calls[i]()
      row[i] = time.perf_counter() - started
  return seconds
