"""Stages that reshape the weights so far, whatever made them: a cap, and mean 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, check_positive, declare, stateless


def cap_weights(
  weights: jax.Array,
  limit: float | jax.Array,
  *,
  base: jax.Array | None = None,
  redistribute: bool = True,
) -> jax.Array:
  """No weight above `limit`; what is cut off goes to the others in proportion (water-filling).

  w' = min(c w, limit) with c >= 1 such that sum(base * w') = sum(base * w). Zeros stay zero. When
  even that cannot be reached (limit * base of the non-zero weights < sum(base * w)) all non-zero
  weights equal the limit.

  Args:
    weights: float[B] or float[B, T], non-negative. The cap acts on entries.
    limit: largest multiplier allowed, > 0. The paper's convergence theorem asks for 2.
    base: float, same shape: how much each entry counts, 0 for padding. Default: ones.
    redistribute: False clips instead, for absolute weights, whose sum carries no meaning.

  Returns:
    Same shape and dtype. Weights that need no cap come back bit for bit; a NaN or inf among them
    makes all of them NaN.

  Raises:
    ValueError: a limit <= 0, or shapes that do not match.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.cap_weights(jnp.array([3.0, 0.5, 0.5, 0.0]), 2.0)
    Array([2., 1., 1., 0.], dtype=float32)

  Provenance: ours (a cap of 2 is an assumption of the theorem in Sow et al.; how to impose it is
    not in the paper).
  """
  check_positive(limit=limit)
  if not redistribute:
    return jnp.minimum(weights, limit)
  base = jnp.ones_like(weights) if base is None else base
  if base.shape != weights.shape:
    raise ValueError(f'base has shape {base.shape}, weights {weights.shape}; they must agree')
  counted = (weights != 0) & (base > 0)  # a NaN counts: it must not vanish
  w = masked.replicate(jnp.where(counted, weights, 0)).ravel()
  b = masked.replicate(jnp.where(counted, base, 0)).ravel()
  order = jnp.argsort(-w)
  w, b = w[order], b[order]
  # For every k: the factor c when the k largest are capped and the rest fill up what is missing.
  capped = jnp.cumsum(b) - b
  rest = jnp.cumsum((w * b)[::-1])[::-1]
  factors = masked.divide(rest[0] - jnp.where(capped > 0, limit * capped, 0), rest)
  fits = (factors * w <= limit) & (w > 0)
  feasible = jnp.any(fits)
  factor = jnp.maximum(factors[jnp.argmax(fits)], 1)  # below 1 only by rounding
  filled = jnp.where(feasible, jnp.minimum(factor * weights, limit), limit)
  filled = jnp.where(jnp.isfinite(rest[0]), filled, jnp.nan)
  return jnp.where(counted, filled, 0).astype(weights.dtype)


@declare('normalized', 'entry', 'ours', 'water-filling under a cap')
def cap(limit: float, redistribute: bool = True) -> Weighting:
  """Stage of `cap_weights`; the limit may be a schedule, a function of the step."""
  check_positive(limit=limit)

  def update(weights, *, base=None, step=None, **_):
    return cap_weights(weights, at_step(limit, step, 'limit'), base=base, redistribute=redistribute)

  return stateless(update)


def unit_mean_weights(weights: jax.Array, *, base: jax.Array | None = None) -> jax.Array:
  """w * sum(base) / sum(base * w): base-mean 1, the convention of torch's weighted mean.

  Args:
    weights: float[B] or float[B, T] whose sum under `base` is not 0; if it is, the result is all
      zero.
    base: float, same shape. Default: ones.

  Returns:
    Same shape and dtype.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.unit_mean_weights(jnp.array([1.0, 3.0]))
    Array([0.5, 1.5], dtype=float32)

  Provenance: ours. It makes absolute weights (importance corrections) biased; that is the price of
    the convention.
  """
  base = jnp.ones_like(weights) if base is None else base
  kept = jnp.where(base > 0, base * weights, 0)
  axes = tuple(range(1, weights.ndim + 1))
  mass, weighted = jnp.sum(jnp.stack([base, kept]), axis=axes)
  return (weights * masked.divide(mass, weighted)).astype(weights.dtype)


@declare('normalized', 'entry', 'ours', 'torch weighted mean')
def unit_mean() -> Weighting:
  """Stage of `unit_mean_weights`."""
  return stateless(lambda weights, *, base=None, **_: unit_mean_weights(weights, base=base))
