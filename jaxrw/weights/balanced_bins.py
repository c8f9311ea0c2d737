"""Balanced bins: rare scores as often as common ones (BCS, HACO, NeurIPS 2025).

Scores are cut into bins whose edges grow with a logarithm, and each bin comes to the mean size, by
drawing or by weights:

  edge_k = min + (max - min) * log(1 + s t_k) / log(1 + s),     t_k = k / K, s = 5
  w_i    = mean size of the bins that hold something / size of i's bin

Every example is in exactly one bin. The official bins lose the examples at the lowest and at the
highest score, and cannot do with an empty one.
"""

from __future__ import annotations

import numpy as np

_STEEPNESS = 5.0


def rarity_scores(outputs: np.ndarray) -> np.ndarray:
  """How unlike the average an example's binary outputs are: mean_v c_iv (1 - 2 mean_v).

  Args:
    outputs: bool or float[N, V].

  Returns:
    float64[N]; high for what is on in few examples.

  Example:
    >>> import numpy as np
    >>> from jaxrw.weights import balanced_bins
    >>> balanced_bins.rarity_scores(np.array([[1, 0], [1, 0], [1, 1], [1, 0]]))
    array([-0.5 , -0.5 , -0.25, -0.5 ])

  Source: official code of HACO.
  """
  outputs = np.asarray(outputs, np.float64)
  if outputs.ndim != 2 or not outputs.size:
    raise ValueError(f'outputs have shape {outputs.shape}; expected [N, V], not empty')
  return np.mean(outputs * (1 - 2 * outputs.mean(axis=0)), axis=1)


def bins(scores: np.ndarray, count: int = 5) -> np.ndarray:
  """int64[N], the bin of each score: 0 .. count - 1, by the module's edges.

  Args:
    scores: float[N], finite.
    count: K >= 1.

  Raises:
    ValueError: scores that are not [N] and finite, fewer than 1 bin.

  Example:
    >>> from jaxrw.weights import balanced_bins
    >>> balanced_bins.bins([0.0, 0.1, 0.5, 0.7, 0.8, 1.0])
    array([0, 0, 1, 2, 3, 4])

  Source: official code of HACO, with both ends closed.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 1 or not scores.size or not np.all(np.isfinite(scores)):
    raise ValueError(f'scores must be [N], finite and not empty, got shape {scores.shape}')
  if count < 1:
    raise ValueError(f'count={count} must be at least 1')
  fractions = np.log1p(_STEEPNESS * np.arange(1, count) / count) / np.log1p(_STEEPNESS)
  inner = scores.min() + np.ptp(scores) * fractions
  return (
    np.searchsorted(inner, scores, side='right') if np.ptp(scores) else np.zeros(len(scores), int)
  )


def bin_weights(scores: np.ndarray, count: int = 5) -> np.ndarray:
  """float32[N] of mean 1: every bin that holds something has the same weight in sum.

  What drawing does in expectation, without copies; pass it as the batch's `weights`.

  Example:
    >>> from jaxrw.weights import balanced_bins
    >>> balanced_bins.bin_weights([0.0, 0.0, 0.0, 1.0], count=2)
    array([0.6666667, 0.6666667, 0.6666667, 2.       ], dtype=float32)

  Provenance: ours.
  """
  of = bins(scores, count)
  sizes = np.bincount(of, minlength=count)
  return (len(of) / np.sum(sizes > 0) / sizes[of]).astype(np.float32)


def draw_balanced(scores: np.ndarray, count: int = 5, seed: int = 0) -> np.ndarray:
  """Indices of examples with as many of each bin that holds something, in random order.

  The size of each is the mean, rounded; larger bins are drawn from without replacement, smaller
  ones give every example as often as they go round, and the rest without replacement.

  Args:
    scores: float[N].
    count: number of bins.
    seed: of the draw.

  Returns:
    int64[bins that hold something * size].

  Example:
    >>> from jaxrw.weights import balanced_bins
    >>> drawn = balanced_bins.draw_balanced([0.0, 0.0, 0.0, 1.0], count=2)
    >>> len(drawn), int((drawn == 3).sum())
    (4, 2)

  Source: official code of HACO; it fills small bins by drawing with replacement.
  """
  of, rng = bins(scores, count), np.random.default_rng(seed)
  held = np.unique(of)
  size = max(1, round(len(of) / len(held)))
  drawn = []
  for k in held:
    members = np.flatnonzero(of == k)
    drawn += [
      np.tile(members, size // len(members)),
      rng.permutation(members)[: size % len(members)],
    ]
  return rng.permutation(np.concatenate(drawn))
