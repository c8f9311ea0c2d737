"""Class weights for each output of a dense or multi-label binary task (VCB, HACO, NeurIPS 2025).

Every output v has its own share of positives in the data. Counts are put on a scale of 1000 (so
that they do not depend on the size of the data), blended with those of all outputs together, kept
away from 0, and turned into effective numbers:

  m_v = blend * n_v + (1 - blend) * n_all, at least `floor`, again of sum 1000
  w_v = u_v / (u_v0 + u_v1),    u = (1 - beta) / (1 - beta^m)        so w_v0 + w_v1 = 1

With the defaults that is close to w_v1 = share of negatives. It raises recall on rare outputs and
lowers precision; where the model is well specified F1 at a threshold of 0.5 does not rise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import Weighting, declare, stateless

_PAPER = 'HACO, NeurIPS 2025 (arXiv 2505.11152)'
_TOTAL = 1000.0


def vertex_class_balance_weights(
  shares: np.ndarray | jax.Array,
  blend: float = 0.3,
  *,
  floor: float = 20.0,
  beta: float = 0.9999,
) -> jax.Array:
  """(w_v0, w_v1) of each output v, from its share of positives in the data.

  Args:
    shares: float[V], in [0, 1].
    blend: in [0, 1]. 0 gives all outputs the weights of their average; the official schedule grows
      it from 0 to 0.3 over the epochs.
    floor: smallest pseudo-count of 1000, > 0 and at most 500.
    beta: of the effective number, in [0, 1). 0 gives 1/2 everywhere.

  Returns:
    float32[V, 2] of row sums 1.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jaxrw
    >>> w = jaxrw.vertex_class_balance_weights([0.05, 0.5], blend=1.0)
    >>> [[round(float(x), 4) for x in row] for row in w]
    [[0.0522, 0.9478], [0.5, 0.5]]

  Source: official code of HACO.
  """
  shares = np.asarray(shares, np.float64)
  if shares.ndim != 1 or not np.all((shares >= 0) & (shares <= 1)):
    raise ValueError(f'shares={shares} must be [V], each in [0, 1]')
  for name, value, low, high in (('blend', blend, 0, 1), ('floor', floor, 1e-6, _TOTAL / 2)):
    if not low <= value <= high:
      raise ValueError(f'{name}={value} must be in [{low:g}, {high:g}]')
  if not 0 <= beta < 1:
    raise ValueError(f'beta={beta} must be in [0, 1)')
  counts = _TOTAL * np.stack([1 - shares, shares], axis=1)
  counts = np.maximum(blend * counts + (1 - blend) * counts.mean(axis=0), floor)
  counts *= _TOTAL / counts.sum(axis=1, keepdims=True)
  unscaled = -1 / np.expm1(counts * np.log(beta)) if beta else np.ones_like(counts)
  return jnp.asarray(unscaled / unscaled.sum(axis=1, keepdims=True), jnp.float32)


@declare('absolute', 'token', 'official_code', _PAPER)
def vertex_class_balance(
  shares: np.ndarray | jax.Array,
  blend: float = 0.3,
  floor: float = 20.0,
  beta: float = 0.9999,
) -> Weighting:
  """Multiplies the loss of output v by w_v0 or w_v1; losses [B, V], signal `labels` int[B, V], 0, 1
  or -1 (unknown: weight 1). See `vertex_class_balance_weights`. Stateless.

  Raises:
    ValueError: an argument out of its range; on tracing, losses or labels that are not [B, V].
  """
  table = np.asarray(vertex_class_balance_weights(shares, blend, floor=floor, beta=beta))

  def update(weights, *, losses, labels, base=None, **_):
    if losses.ndim != 2 or losses.shape[1] != len(table) or labels.shape != losses.shape:
      raise ValueError(
        f'losses {losses.shape} and labels {labels.shape} must be [B, {len(table)}], one column '
        'for each output'
      )
    losses, base, weights = masked.fill_in(losses, base, weights)
    own = jnp.where(labels == 1, table[:, 1], jnp.where(labels == 0, table[:, 0], jnp.nan))
    return jnp.where(base > 0, weights * jnp.where(labels == -1, 1, own), 0)

  return stateless(update)
