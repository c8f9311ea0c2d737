"""The arms: a weighting and a loss by name, with the settings that all tasks share.

Hyperparameters are those of the papers where they carry over to models of this size, and were not
tuned; every arm gets the same grid of learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxrw
from jaxrw import losses
from jaxrw.core import Weighting

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Facts(NamedTuple):
  """What an arm may know in advance. Counts are of training examples, means over seeds."""

  class_counts: np.ndarray  # float[C]
  group_counts: np.ndarray  # float[G]
  examples: int
  steps: int


class Arm(NamedTuple):
  """How one model is trained.

  Attributes:
    weighting: (facts, table) -> Weighting. The table, [n], is what `prelude` left, or None.
    loss: facts -> per-example loss.
    cosine: whether the last layer compares directions: 16 cos(angle) for its logits.
    prelude: what is trained first: 'reference', a model of the trusted set, whose losses on the
      training set are the table; 'errors', a model of the training set for a tenth of the steps,
      whose mistakes are.
    trusted: whether it sees the trusted set, which the baseline does not.
    alone: whether it sees nothing but the trusted set.
    unlabeled: what `consistency` does with examples without labels: '' where there are none.
  """

  weighting: Callable[[Facts, Any], Weighting]
  loss: Callable[[Facts], Loss] = lambda _: losses.cross_entropy
  cosine: bool = False
  prelude: str = ''
  trusted: bool = False
  alone: bool = False
  unlabeled: str = ''


def plain(weighting: Callable[..., Weighting], **fields: Any) -> Arm:
  return Arm(lambda facts, table: weighting(), **fields)


ARMS = {
  'uniform': plain(jaxrw.uniform),
  'linupper': plain(lambda: jaxrw.linupper(1.0)),
  'trimmed low': plain(lambda: jaxrw.trimmed(0.6, 'low')),
  'trimmed high': plain(lambda: jaxrw.trimmed(0.5, 'high')),
  'kl_dro': plain(lambda: jaxrw.kl_dro(1.0)),
  'group_dro': Arm(lambda facts, _: jaxrw.group_dro(len(facts.group_counts), rate=0.1)),
  'learning_to_reweight': plain(jaxrw.learning_to_reweight, trusted=True),
  'trusted only': plain(jaxrw.uniform, alone=True),
  'labels only': plain(jaxrw.uniform, unlabeled='labels only'),
  'fixmatch': plain(jaxrw.uniform, unlabeled='fixmatch'),
}
