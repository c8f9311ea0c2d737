"""Effective robustness: how far a model is above the accuracy under shift that its own accuracy
predicts, judged by a line through reference models in logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_CLIP = 1e-4  # accuracies of 0 and 1 have no logit


class LogitLine(NamedTuple):
  """logit(shifted accuracy) = slope * logit(accuracy) + offset.

  `low` and `high` are the accuracies of the references between which it was fitted.
  """

  slope: float
  offset: float
  low: float
  high: float


def logit(accuracy: np.ndarray) -> np.ndarray:
  """log(a / (1 - a)), with a kept away from 0 and 1."""
  a = np.clip(np.asarray(accuracy, np.float64), _CLIP, 1 - _CLIP)
  return np.log(a) - np.log1p(-a)


def fit_logit_line(accuracy: Sequence[float], shifted: Sequence[float]) -> LogitLine:
  """Least squares through reference models.

  Args:
    accuracy: [M], in distribution.
    shifted: [M], of the same models under shift.

  Raises:
    ValueError: fewer than two models, shapes that differ, or all of one accuracy.
  """
  x, y = logit(accuracy), logit(shifted)
  if x.shape != y.shape or x.ndim != 1 or x.size < 2:
    raise ValueError(f'accuracy {x.shape} and shifted {y.shape} must be [M], M at least 2')
  if np.ptp(x) < 1e-9:
    raise ValueError('the reference models all have one accuracy: take some that are worse')
  slope, offset = np.polyfit(x, y, 1)
  return LogitLine(float(slope), float(offset), float(np.min(accuracy)), float(np.max(accuracy)))


def effective_robustness(
  accuracy: np.ndarray | float, shifted: np.ndarray | float, line: LogitLine
) -> np.ndarray:
  """shifted - what the line predicts from the accuracy; 0 on the line, positive above.

  Source: Quality Not Quantity, NeurIPS 2022 (arXiv 2208.05516), after Taori et al. 2020; the
  formula is as we recall it.
  """
  predicted = 1 / (1 + np.exp(-(line.slope * logit(np.asarray(accuracy)) + line.offset)))
  return np.asarray(shifted) - predicted
