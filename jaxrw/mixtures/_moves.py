"""What the mixtures that follow a run share: steps in logarithms, views of a state, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw.mixtures._simplex import Vector, check_domains, check_drawn, normalized
from jaxrw.mixtures.core import check_mode

Rate = float | jax.Array | Callable[[Any], Any]
State = TypeVar('State')


def log_step(log_alpha, score, rate, floor):
  """Logarithm of `exponentiated_step`, from the logarithm of alpha."""
  alive = log_alpha > -jnp.inf
  # Only differences count, and those of close floats are exact.
  score = score - jnp.max(jnp.where(alive, score, -jnp.inf))
  moved = jax.nn.log_softmax(jnp.where(alive, log_alpha + rate * score, -jnp.inf))
  return log_mix(moved, -np.log(log_alpha.size), floor)


def log_mix(log_a, log_b, share):
  """log((1 - share) a + share b); exactly log a at share 0 and log b at 1."""
  return jnp.logaddexp(jnp.log1p(-share) + log_a, jnp.log(share) + log_b)


def acting(mode, sampled, first, floor, alpha_of):
  """(proportions, objective) of a mixture whose state holds alpha, at first `first`."""
  check_mode(mode)
  if mode == 'sample':
    if sampled is not None:
      raise ValueError("sampled is what mode='weigh' draws with: set that mode or leave it out")
    return alpha_of, alpha_of
  q = starting(sampled, first.size, 'sampled')
  check_drawn(q, first + floor / first.size, 'sampled', 'start, with its floor,')
  return lambda state: jnp.asarray(q), alpha_of


def starting(
  shares: Vector | None, num_domains: int, name: str = 'start'
) -> np.ndarray | jax.Array:
  """Shares as float32[G], uniform for None."""
  check_domains(num_domains)
  array = normalized(np.ones(num_domains) if shares is None else shares, name)
  if array.size != num_domains:
    raise ValueError(f'{name} has {array.size} entries; expected one for each of {num_domains}')
  return array


def choose(condition: jax.Array, new: State, old: State) -> State:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def usable(score, log_alpha):
  """Whether the scores of all domains with a share are finite."""
  return jnp.all(jnp.isfinite(score) | (log_alpha == -jnp.inf))


def log_shares(shares) -> jax.Array:
  return jnp.log(jnp.asarray(shares, jnp.float32))


def signal(values, num_domains: int, name: str) -> jax.Array:
  values = jax.lax.stop_gradient(jnp.asarray(values, jnp.float32))
  if values.shape != (num_domains,):
    raise ValueError(f'{name} has shape {values.shape}; expected ({num_domains},), one per domain')
  return values


def check_rate(rate: Any, name: str = 'rate') -> None:
  if isinstance(rate, (int, float)) and not 0 <= rate < np.inf:
    raise ValueError(f'{name}={rate} must be finite and at least 0; for the opposite negate scores')


def check_share(share: Any, name: str) -> None:
  if isinstance(share, (int, float)) and not 0 <= share <= 1:
    raise ValueError(f'{name}={share} must be from 0 to 1')
