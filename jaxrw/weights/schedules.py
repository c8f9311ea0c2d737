"""Schedules of the temperature, interpolated in 1 / r.

The weights depend on 1 / r, so a ramp in r from 100 to 0.4 would spend almost all its steps at
uniform. In 1 / r the ramp is even, and uniform weights (r = inf) are its ordinary start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrw.core import check_positive


def temperature_schedule(
  init: float,
  end: float,
  *,
  begin: int = 0,
  steps: int = 0,
  shape: Literal['linear', 'cosine'] = 'linear',
) -> Callable[[jax.Array], jax.Array]:
  """1 / r(step) goes from 1 / init to 1 / end over `steps` steps from step `begin`, then stays.

  Args:
    init: temperature up to `begin`; inf means uniform weights.
    end: temperature from `begin + steps` on. `steps=0` is a jump at `begin`.
    begin: optimizer step at which the ramp starts.
    steps: its length in optimizer steps.
    shape: 'linear', or 'cosine' (flat at both ends).

  Returns:
    step -> float32[], the temperature.

  Raises:
    ValueError: a temperature <= 0, a negative step count, an unknown shape.

  Example:
    >>> import jaxrw
    >>> r = jaxrw.temperature_schedule(float('inf'), 0.5, begin=10, steps=10)
    >>> [float(r(step)) for step in (0, 10, 15, 20, 99)]
    [inf, inf, 1.0, 0.5, 0.5]

  Provenance: ours (the paper calls the temperature a curriculum knob; the annealing it used is not
    in its code).
  """
  check_positive(init=init, end=end)
  if begin < 0 or steps < 0:
    raise ValueError(f'begin={begin} and steps={steps} must be at least 0')
  if shape not in ('linear', 'cosine'):
    raise ValueError(f"shape={shape!r} must be 'linear' or 'cosine'")

  def temperature(step):
    if steps:
      done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / steps, 0, 1)
    else:
      done = jnp.asarray(step >= begin, jnp.float32)
    if shape == 'cosine':
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    return 1 / ((1 - done) / init + done / end)

  return temperature
