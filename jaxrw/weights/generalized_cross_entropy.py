"""Generalized cross entropy (Zhang and Sabuncu, NeurIPS 2018) as weights on cross entropy.

The loss L_q = (1 - p^q) / q of the label's probability p lies between cross entropy (q -> 0) and
mean absolute error (q = 1). Its gradient is that of cross entropy times

  w = p^q = exp(-q l)                      l = -log p, the cross entropy

so labels that the model finds improbable, mislabeled ones among them, lose their pull. The
truncated form leaves out what is at or below a probability k: w = 0 where p <= k.

The *value* of a weighted loss is not L_q, only its gradient is; for the value see
`jaxrw.losses`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, declare, stateless

_PAPER = 'Zhang and Sabuncu, Generalized Cross Entropy Loss, NeurIPS 2018 (arXiv 1805.07836)'
Power = float | jax.Array | Callable[[jax.Array], jax.Array]


def generalized_cross_entropy_weights(
  losses: jax.Array,
  q: float | jax.Array = 0.7,
  truncation: float = 0.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """w = exp(-q l) where exp(-l) > truncation, else 0; entry by entry, no normalization.

  Args:
    losses: float[B] or float[B, T], cross entropies of one label each, in nats, >= 0.
    q: >= 0. 0 passes the incoming weights unchanged; 1 has the gradient of the absolute error.
    truncation: k in [0, 1): entries of probability at most k get weight 0. The paper decides this
      with its best model so far, refreshed every ten epochs; here it is the present one.
    base: float, same shape, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in. Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses, at most the incoming weights; 0 for
    padding, NaN for a loss that is NaN or inf.

  Raises:
    ValueError: shapes that do not match, a negative q, a truncation outside [0, 1).

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> p = jnp.array([0.81, 0.25])
    >>> w = jaxrw.weights.generalized_cross_entropy_weights(-jnp.log(p), q=0.5)
    >>> [round(float(x), 3) for x in w]
    [0.9, 0.5]

  Provenance: reconstructed (formula from a third party's code; the identity of the gradients is
    exact and tested).
  """
  _check(q, truncation)
  losses, base, weights = masked.fill_in(losses, base, weights)
  loss = jnp.where(base > 0, losses, 0)
  w = jnp.where(jnp.exp(-loss) > truncation, jnp.exp(-q * loss), 0) + 0 * loss
  return jnp.where(base > 0, weights * w, 0)


@declare('absolute', 'entry', 'reconstructed', _PAPER)
def generalized_cross_entropy(q: Power = 0.7, truncation: float = 0.0) -> Weighting:
  """Stage of `generalized_cross_entropy_weights`; q may be a schedule, a function of the step."""
  _check(q, truncation)

  def update(weights, *, losses, base=None, step=None, **_):
    now = at_step(q, step, 'q')
    return generalized_cross_entropy_weights(losses, now, truncation, base=base, weights=weights)

  return stateless(update)


def _check(q: Power, truncation: float) -> None:
  if isinstance(q, (int, float)) and not 0 <= q < jnp.inf:
    raise ValueError(f'q={q} must be at least 0 and finite')
  if not 0 <= truncation < 1:
    raise ValueError(f'truncation={truncation} must be in [0, 1)')
