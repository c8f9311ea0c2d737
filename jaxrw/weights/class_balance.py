"""Class weights: what a class counts, from how often it occurs.

  inverse frequency   w_c = n / (K n_c)
  effective number    w_c ∝ (1 - beta) / (1 - beta^n_c)     beta = 0: all alike; beta -> 1: 1 / n_c

for counts n_c of K classes that occur, with sum n. Inverse frequency has mean 1 over the data. The
effective number is scaled as its authors do, to a mean of 1 over the *classes*, so that a step on
long-tailed data is shorter than without weights: tune the learning rate, or add `unit_mean()`.

Deferred re-weighting (LDAM-DRW) is `after(start, effective_number(counts))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import Weighting, check_range, declare, stateless

Counts = jax.Array | np.ndarray | Sequence[float]

_BALANCED = "King and Zeng, 2001; scikit-learn's class_weight='balanced'"
_EFFECTIVE = 'Cui et al., Class-Balanced Loss, CVPR 2019 (arXiv 1901.05555)'


def inverse_frequency_weights(counts: Counts) -> jax.Array:
  """w_c = n / (K n_c) over the K classes that occur: mean 1 over the data.

  Args:
    counts: float[C], how often each class occurs; any measure of it will do.

  Returns:
    float32[C]. A class that does not occur gets 0, and has no part in K.

  Raises:
    ValueError: counts that are not [C], negative or not finite.

  Example:
    >>> import jaxrw
    >>> jaxrw.inverse_frequency_weights([6, 3, 1, 0])
    Array([0.5555556, 1.1111112, 3.3333333, 0.       ], dtype=float32)

  Source: textbook form; equals scikit-learn's `compute_class_weight('balanced')`.
  """
  counts = _checked(counts)
  present = counts > 0
  return masked.divide(jnp.sum(counts), jnp.sum(present) * counts)


def effective_number_weights(counts: Counts, beta: float = 0.9999) -> jax.Array:
  """w_c ∝ (1 - beta) / (1 - beta^n_c), with mean 1 over the classes that occur.

  (1 - beta^n) / (1 - beta) is the expected volume of n random draws from a class that holds
  1 / (1 - beta) different examples.

  Args:
    counts: float[C], numbers of examples.
    beta: in [0, 1). 0 gives 1 to every class; towards 1 the weights are those of 1 / n_c.

  Returns:
    float32[C]. A class that does not occur gets 0.

  Raises:
    ValueError: bad counts, a beta outside [0, 1).

  Example:
    >>> import jaxrw
    >>> w = jaxrw.effective_number_weights([5000, 500, 50])
    >>> [round(float(x), 4) for x in w]
    [0.0341, 0.2752, 2.6907]

  Source: official code of Cui et al.; 1 - beta^n is computed without cancellation.
  """
  counts = _checked(counts)
  if not 0 <= beta < 1:
    raise ValueError(f'beta={beta} must be in [0, 1); for 1 / n_c use inverse_frequency')
  present = counts > 0
  volume = -jnp.expm1(counts * np.log(beta)) if beta else jnp.where(present, 1.0, 0)
  raw = masked.divide(jnp.ones_like(counts), volume)
  return raw * masked.divide(jnp.sum(present), jnp.sum(raw))


def class_weights(labels: jax.Array, per_class: jax.Array | np.ndarray) -> jax.Array:
  """The weight of each label's class; 1 for the label -1.

  Args:
    labels: int[...], class indices, or -1 for an unknown class.
    per_class: float[C].

  Returns:
    float32 of the shape of the labels. A traced label out of range gives NaN.

  Raises:
    IndexError: a concrete label out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.weights.class_balance import class_weights
    >>> class_weights(jnp.array([1, 0, -1]), jnp.array([0.5, 2.0]))
    Array([2. , 0.5, 1. ], dtype=float32)
  """
  fine = check_range(labels, per_class.size, 'labels')
  # One-hot instead of an index, which an Explicit mesh refuses.
  member = labels[..., None] == jnp.arange(per_class.size)
  own = jnp.sum(jnp.where(member, per_class, 0), axis=-1)
  return jnp.where(labels == -1, 1, jnp.where(fine, own, jnp.nan))


@declare('absolute', 'entry', 'ours', _BALANCED)
def inverse_frequency(counts: Counts) -> Weighting:
  """Stage of `inverse_frequency_weights`; needs the signal `labels`: int[B], or int[B, T] for
  losses of tokens."""
  return _by_label(lambda: inverse_frequency_weights(counts))


@declare('absolute', 'entry', 'official_code', _EFFECTIVE)
def effective_number(counts: Counts, beta: float = 0.9999) -> Weighting:
  """Stage of `effective_number_weights`; needs the signal `labels`: int[B], or int[B, T] for losses
  of tokens."""
  return _by_label(lambda: effective_number_weights(counts, beta))


def _by_label(per_class: Callable[[], jax.Array]) -> Weighting:
  with jax.ensure_compile_time_eval():  # the counts are known, even where the stage is made in jit
    table = np.asarray(per_class())

  def update(weights, *, losses, labels, base=None, **_):
    losses, base, weights = masked.fill_in(losses, base, weights)
    if labels.shape not in (losses.shape, losses.shape[:1]):
      raise ValueError(f'labels have shape {labels.shape}, losses {losses.shape}')
    factor = class_weights(labels, table)
    factor = factor if factor.ndim == weights.ndim else masked.over_tokens(factor, weights)
    # A class of weight 0 must not hide a broken loss.
    factor = factor + 0 * jnp.where(base > 0, losses, 0)
    return jnp.where(base > 0, weights * factor, 0)

  return stateless(update)


def _checked(counts: Counts) -> jax.Array:
  counts = np.asarray(counts, np.float32)
  if counts.ndim != 1 or not np.all(np.isfinite(counts)) or np.any(counts < 0) or not counts.sum():
    raise ValueError(f'counts={counts} must be [C], finite, at least 0 and not all 0')
  return jnp.asarray(counts)
