"""Weights over models for quantile regression (DQA, JMLR 2023): fitted, not given.

P base models predict T quantiles each, Q[p, t]; an aggregate mixes them with weights w >= 0 that
are a softmax of parameters, fitted on out-of-fold predictions by the pinball loss:

  | kind   | parameters | aggregate, level t                                  |
  |--------|------------|-----------------------------------------------------|
  | coarse | [P]        | sum_p w_p Q[p, t]                                   |
  | medium | [P, T]     | sum_p w_pt Q[p, t]                                  |
  | fine   | [P, T, T]  | sum_{p, s} w_pst Q[p, s], normalized over (p, s)    |

Parameters may have leading axes, the output of a network of the inputs (local weights). What comes
out can cross; `crossing_penalty` discourages that in training, `isotonize` removes it afterwards,
which never makes the summed pinball loss worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal['coarse', 'medium', 'fine']


def pinball(y: jax.Array, quantiles: jax.Array, levels: Sequence[float] | jax.Array) -> jax.Array:
  """max(level (y - q), (level - 1) (y - q)), for each level.

  Summed over symmetric levels it is the weighted interval score, up to a factor.

  Args:
    y: float[...].
    quantiles: float[..., T].
    levels: float[T], in (0, 1).

  Returns:
    float[..., T], one loss per example and level, never reduced.

  Raises:
    ValueError: levels outside (0, 1), shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import quantiles
    >>> quantiles.pinball(jnp.array(2.0), jnp.array([1.0, 3.0]), [0.1, 0.9])
    Array([0.1, 0.1], dtype=float32)

  Source: Koenker and Bassett, 1978.
  """
  values = np.asarray(levels, np.float64)
  if values.ndim != 1 or not np.all((values > 0) & (values < 1)):
    raise ValueError(f'levels={levels} must be [T], each in (0, 1)')
  if quantiles.shape != (*y.shape, len(values)):
    raise ValueError(f'quantiles have shape {quantiles.shape}; expected {(*y.shape, len(values))}')
  error = y[..., None] - quantiles
  return jnp.maximum(values * error, (values - 1) * error)


def init_aggregation(kind: Kind, models: int, levels: int, own_level: float = 5.0) -> jax.Array:
  """Parameters to start from: an even mean of the models, level by level.

  Args:
    kind: 'coarse', 'medium' or 'fine'.
    models: P.
    levels: T.
    own_level: of the kind 'fine', how much a model's quantile of the same level is preferred. With
      0, as in the official code, every level starts as the mean of all quantiles, all alike.

  Returns:
    float32, shape by the module's table.

  Raises:
    ValueError: an unknown kind.

  Example:
    >>> from jaxrw import quantiles
    >>> quantiles.init_aggregation('coarse', 3, 9).shape
    (3,)

  Source: official code of DQA; the start of 'fine' is ours.
  """
  _check(kind)
  if kind == 'fine':
    own = own_level * jnp.eye(levels, dtype=jnp.float32)
    return jnp.broadcast_to(own, (models, levels, levels))
  return jnp.zeros((models,) if kind == 'coarse' else (models, levels), jnp.float32)


def aggregate(predictions: jax.Array, params: jax.Array, kind: Kind) -> jax.Array:
  """The mixture of the models' quantiles.

  Args:
    predictions: float[..., P, T].
    params: by the module's table; further leading axes go with those of the predictions.
    kind: 'coarse', 'medium' or 'fine'.

  Returns:
    float[..., T].

  Raises:
    ValueError: an unknown kind, parameters that do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import quantiles
    >>> predictions = jnp.array([[0.0, 1.0], [2.0, 5.0]])
    >>> quantiles.aggregate(predictions, quantiles.init_aggregation('coarse', 2, 2), 'coarse')
    Array([1., 3.], dtype=float32)

  Source: official code of DQA.
  """
  _check(kind)
  models, levels = predictions.shape[-2:]
  shape = {'coarse': (models,), 'medium': (models, levels), 'fine': (models, levels, levels)}[kind]
  if params.shape[params.ndim - len(shape) :] != shape:
    raise ValueError(f'params have shape {params.shape}; {kind} needs [..., {shape}]')
  if kind == 'coarse':
    return jnp.sum(jax.nn.softmax(params, axis=-1)[..., None] * predictions, axis=-2)
  if kind == 'medium':
    return jnp.sum(jax.nn.softmax(params, axis=-2) * predictions, axis=-2)
  weights = jax.nn.softmax(params, axis=(-3, -2))
  return jnp.sum(weights * predictions[..., None], axis=(-3, -2))


def crossing_penalty(quantiles: jax.Array, margin: float = 0.0) -> jax.Array:
  """Mean over the pairs j < k of relu(q_j - q_k + margin).

  Args:
    quantiles: float[..., T], T >= 2, by rising level.
    margin: distance wanted, in the unit of y.

  Returns:
    float[...]; 0 where nothing crosses by the margin.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import quantiles
    >>> round(float(quantiles.crossing_penalty(jnp.array([1.0, 3.0, 2.0]))), 4)
    0.3333

  Source: official code of DQA.
  """
  first, second = np.triu_indices(quantiles.shape[-1], 1)
  return jnp.mean(jax.nn.relu(quantiles[..., first] - quantiles[..., second] + margin), axis=-1)


def isotonize(quantiles: jax.Array, how: Literal['sort', 'pava'] = 'sort') -> jax.Array:
  """Quantiles that rise with the level: sorted, or the nearest in squares (isotonic regression).

  Neither makes the summed pinball loss worse, whatever y is. (Running minima and maxima, the third
  way of the official code, can.)

  Args:
    quantiles: float[..., T].
    how: 'sort', or 'pava': max over i <= t of min over j >= t of mean(q_i .. q_j).

  Returns:
    float[..., T].

  Raises:
    ValueError: an unknown `how`.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import quantiles
    >>> quantiles.isotonize(jnp.array([1.0, 4.0, 2.0]), 'pava')
    Array([1., 3., 3.], dtype=float32)

  Source: official code of DQA; the max-min form of isotonic regression is textbook.
  """
  if how == 'sort':
    return jnp.sort(quantiles, axis=-1)
  if how != 'pava':
    raise ValueError(f"how={how!r} must be 'sort' or 'pava'")
  count = quantiles.shape[-1]
  # Differences of cumulative sums lose the digits of a level far from 0.
  level = jnp.mean(quantiles, axis=-1, keepdims=True)
  quantiles = quantiles - level
  sums = jnp.cumsum(quantiles, axis=-1)
  before = sums - quantiles
  i, j = jnp.arange(count)[:, None], jnp.arange(count)
  means = (sums[..., None, :] - before[..., :, None]) / jnp.where(j >= i, j - i + 1, 1)
  # [.., i, t]: the least mean of q_i .. q_j over j >= t.
  least = jax.lax.cummin(jnp.where(j >= i, means, jnp.inf), axis=means.ndim - 1, reverse=True)
  return level + jnp.max(jnp.where(j >= i, least, -jnp.inf), axis=-2)


def _check(kind: str) -> None:
  if kind not in ('coarse', 'medium', 'fine'):
    raise ValueError(f"kind={kind!r} must be 'coarse', 'medium' or 'fine'")
