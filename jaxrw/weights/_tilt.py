"""Exponential tilts: w = exp(score / r) / Z, what all weightings of the softmax type share."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import check_positive

Nonfinite = Literal['propagate', 'mask']


def prepare(
  losses: jax.Array, base: jax.Array | None, weights: jax.Array | None, nonfinite: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Checks shapes, fills in defaults, stops gradients; returns (example losses, valid, base,
  weights)."""
  if losses.ndim not in (1, 2):
    raise ValueError(f'losses must be [B] or [B, T], got shape {losses.shape}')
  if nonfinite not in ('propagate', 'mask'):
    raise ValueError(f"nonfinite={nonfinite!r} must be 'propagate' or 'mask'")
  losses, base, weights = masked.fill_in(losses, base, weights)
  example_losses, example_base = masked.example_level(losses, base)
  valid = example_base > 0
  if nonfinite == 'mask':
    valid &= jnp.isfinite(example_losses)
  return example_losses, valid, base, weights


def tilt(
  score: jax.Array,
  temperature: float | jax.Array,
  valid: jax.Array,
  base: jax.Array,
  weights: jax.Array,
  shift: bool,
) -> jax.Array:
  """weights * exp(score / r) / Z, with Z such that sum(base * weights) stays.

  `shift` first makes the largest score 0, over the examples whose incoming weight is not 0: the
  others have no part in Z and could push all that have one below the smallest float.
  """
  check_positive(temperature=temperature)
  inverse = 1 / jnp.asarray(temperature, score.dtype)  # 0 for r = inf: uniform, without a branch
  inverse = jnp.minimum(inverse, jnp.finfo(score.dtype).max)  # r -> 0: 0 * inf would be NaN
  _, measure = masked.example_level(base, base * weights)
  if shift:
    score = jnp.minimum(score - masked.largest(score, valid & (measure != 0)), 0)
  score = jnp.where(valid, score, 0)  # before exp: padding may hold anything
  tilted = jnp.where(valid, jnp.exp(score * inverse), 0)
  mass, total = jnp.sum(jnp.stack([measure, measure * tilted]), axis=1)  # one collective for both
  return weights * masked.over_tokens(tilted * masked.divide(mass, total), weights)
