"""Class weights from errors, and tiers of severity (Toxicity of the Commons, 2024).

After each validation pass, from its confusion matrix:

  w_c ∝ log(1 + FN_c + FP_c)         `error_log_class_weights`, as published
  w_c ∝ FN_c / n_c                   `by='rate'`, for contrast

with mean 1 over the classes. A warning about the published rule: it counts errors and not their
rate, so that a class with few examples makes few errors and gets the *smallest* weight of all; on
its own it hardly moves balanced accuracy. The balance of the published classifier comes from its
sampling. The classes' weights go into training by `class_weights(labels, w)`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked

_MILD, _TOXIC = 4, 7  # lowest totals of the two tiers


def confusion_matrix(
  labels: jax.Array, predictions: jax.Array, num_classes: int, base: jax.Array | None = None
) -> jax.Array:
  """How often (or how much) each class was taken for each other.

  Args:
    labels: int[B, ...], the truth; -1 or anything out of range is left out.
    predictions: int, same shape.
    num_classes: C.
    base: float, same shape: what each entry counts, 0 for padding. Default: ones.

  Returns:
    float32[C, C], row = truth, column = prediction. Fractions of `base` stay fractions.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.weights import error_log
    >>> error_log.confusion_matrix(jnp.array([0, 1, 1, -1]), jnp.array([0, 1, 0, 0]), 2)
    Array([[1., 0.],
           [1., 1.]], dtype=float32)

  Provenance: ours.
  """
  if labels.shape != predictions.shape:
    raise ValueError(f'labels have shape {labels.shape}, predictions {predictions.shape}')
  base = jnp.ones(labels.shape, jnp.float32) if base is None else base
  classes = jnp.arange(num_classes)
  truth = (labels[..., None] == classes)[..., :, None]
  guess = (predictions[..., None] == classes)[..., None, :]
  counted = jnp.where(truth & guess, base[..., None, None], 0)
  return jnp.sum(counted, axis=tuple(range(labels.ndim)))


def error_log_class_weights(
  confusion: jax.Array, previous: jax.Array, by: Literal['count', 'rate'] = 'count'
) -> jax.Array:
  """Weights of mean 1 by the logarithm of each class's errors; the previous ones without errors.

  Args:
    confusion: float[..., C, C], row = truth. Leading axes are heads, each with weights of its own
      (the published code lets the last head's weights act on all).
    previous: float[..., C], kept by a head that made no error.
    by: 'count', log(1 + FN + FP) as published; 'rate', the share of the class that was missed.

  Returns:
    float32[..., C].

  Raises:
    ValueError: shapes that do not match, an unknown `by`.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.weights import error_log
    >>> confusion = jnp.array([[95.0, 5.0], [4.0, 1.0]])  # the rare class is missed 4 times of 5
    >>> for by in ('count', 'rate'):
    ...   print([round(float(x), 2) for x in error_log.error_log_class_weights(
    ...     confusion, jnp.ones(2), by)])
    [1.0, 1.0]
    [0.12, 1.88]

  Source: official code of Toxicity of the Commons (arXiv 2410.22587); 'rate' is ours.
  """
  if confusion.shape != (*previous.shape, previous.shape[-1]):
    raise ValueError(
      f'confusion has shape {confusion.shape}, previous {previous.shape}; expected [..., C, C] and '
      '[..., C]'
    )
  if by not in ('count', 'rate'):
    raise ValueError(f"by={by!r} must be 'count' or 'rate'")
  right = jnp.diagonal(confusion, axis1=-2, axis2=-1)
  missed = jnp.sum(confusion, axis=-1) - right
  if by == 'count':
    raw = jnp.log1p(missed + jnp.sum(confusion, axis=-2) - right)
  else:
    raw = masked.divide(missed, missed + right)
  total = jnp.sum(raw, axis=-1, keepdims=True)
  return jnp.where(total > 0, masked.divide(raw * raw.shape[-1], total), previous)


def severity_tiers(scores: np.ndarray | jax.Array) -> np.ndarray:
  """0 (none), 1 (mild) or 2 (toxic) from scores of 0 to 3 on several axes.

  Toxic is a total of 7 or more; mild one of 4 to 6, or of 3 on a single axis; the rest is none.

  Args:
    scores: int[..., A], each 0 to 3.

  Returns:
    int64[...]. As weights: `np.array([1.0, 0.0, 0.0])[tiers]` keeps what is not toxic at all, as
    the authors pretrain; mild and rewritten toxic texts come back at the end of training.

  Raises:
    ValueError: a score outside 0 to 3.

  Example:
    >>> from jaxrw.weights import error_log
    >>> error_log.severity_tiers([[1, 1, 1, 0, 0], [3, 0, 0, 0, 0], [2, 2, 3, 0, 0]])
    array([0, 1, 2])

  Source: official code of Toxicity of the Commons.
  """
  scores = np.asarray(scores)
  if not np.all(np.isin(scores, range(4))):
    wrong = scores[~np.isin(scores, range(4))][0]
    raise ValueError(f'scores must be whole numbers of 0 to 3, got {wrong}')
  total = scores.sum(axis=-1)
  mild = (total >= _MILD) | np.any(scores == 3, axis=-1)
  return np.where(total >= _TOXIC, 2, mild.astype(int))
