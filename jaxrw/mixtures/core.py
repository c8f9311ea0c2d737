"""A mixture decides which domains the next batches are drawn from, and what their loss stands for.

Two vectors over the G domains, both on the simplex, never confused:

  q, `proportions`   how often a domain is sampled;
  p, `objective`     how much it counts in the loss that is minimised.

An example of domain g gets the loss weight p_g / q_g (importance weighting), so a mixture can act
through sampling (q follows the method, p = q: weights 1), through the loss (p follows the method, q
stays), or through both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

Mode = Literal['sample', 'weigh']


class Mixture(NamedTuple):
  """A pair of pure functions and two views of their state, a pytree of arrays.

  Attributes:
    init: () -> state.
    update: (state, *, step, **signals) -> state; a signal it does not know is ignored, one it needs
      and does not get is an error that names it. Runs under jit.
    proportions: (state) -> float32[G], q, the sampling probabilities.
    objective: (state) -> float32[G], p, the shares in the loss.
  """

  init: Callable[[], Any]
  update: Callable[..., Any]
  proportions: Callable[[Any], jax.Array]
  objective: Callable[[Any], jax.Array]


def check_mode(mode: str) -> None:
  if mode not in get_args(Mode):
    raise ValueError(f'mode={mode!r} must be one of {get_args(Mode)}')
