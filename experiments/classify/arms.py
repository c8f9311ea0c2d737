"""The arms: a weighting and a loss by name, with the settings that all tasks share.

Hyperparameters are those of the papers where they carry over to models of this size, and were not
tuned; every arm gets the same grid of learning rates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrw import losses, weights
from jaxrw.core import Weighting, after

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
    weighting: facts -> Weighting.
    loss: facts -> per-example loss.
    cosine: whether the last layer compares directions: its logits are cosines.
    restart: after this share of the steps parameters begin anew and are trained for all of the
      steps; the weighting's state stays.
    reference: whether a model of the trusted set is trained first, whose losses are `ref_losses`.
    aligned: whether the signal `alignment` with the gradient of the trusted set is computed.
    alone: whether it is trained on the trusted set and nothing else.
    loop: a loop other than the plain one: 'co_teaching', 'presto', or what `consistency` does with
      examples without labels.
  """

  weighting: Callable[[Facts], Weighting]
  loss: Callable[[Facts], Loss] = lambda _: losses.cross_entropy
  cosine: bool = False
  restart: float = 0.0
  reference: bool = False
  aligned: bool = False
  alone: bool = False
  loop: str = ''


def plain(weighting: Weighting, **fields: Any) -> Arm:
  """An arm that needs to know nothing in advance."""
  return Arm(lambda _: weighting, **fields)


def _effective_number(facts: Facts) -> Weighting:
  return weights.effective_number(facts.class_counts, 0.9999)


def _deferred(facts: Facts) -> Weighting:
  return after(round(0.8 * facts.steps), _effective_number(facts))


def _balanced_softmax(facts: Facts) -> Loss:
  return functools.partial(losses.balanced_softmax, counts=facts.class_counts)


def _ldam(facts: Facts) -> Loss:
  return functools.partial(losses.ldam, margins=losses.ldam_margins(facts.class_counts))


def _first_run(facts: Facts) -> int:
  return max(1, round(0.1 * facts.steps))


def _co_teaching(facts: Facts) -> Weighting:
  return weights.co_teaching(weights.co_teaching_share(0.4, max(1, facts.steps // 5)))


def _self_paced(facts: Facts) -> Weighting:
  grown = weights.growing_threshold(2.5, 1.1, every=max(1, facts.steps // 10))
  return weights.self_paced(grown)


def _group_cvar(facts: Facts) -> Weighting:
  return weights.group_cvar(facts.group_counts / facts.group_counts.sum(), 0.2)


UNIFORM = plain(weights.uniform())
ARMS = {
  'uniform': UNIFORM,
  'trusted only': UNIFORM._replace(alone=True),
  'presto': UNIFORM._replace(loop='presto'),
  'labels only': UNIFORM._replace(loop='labels only'),
  'fixmatch': UNIFORM._replace(loop='fixmatch'),
  'shrinkmatch': UNIFORM._replace(loop='shrinkmatch'),
  'inverse_frequency': Arm(lambda facts: weights.inverse_frequency(facts.class_counts)),
  'effective_number': Arm(_effective_number),
  'deferred': Arm(_deferred),
  'focal': UNIFORM._replace(loss=lambda _: losses.focal),
  'balanced_softmax': UNIFORM._replace(loss=_balanced_softmax),
  'ldam': UNIFORM._replace(loss=_ldam, cosine=True),
  'ldam+deferred': Arm(_deferred, _ldam, cosine=True),
  # Shares of 0.6 and 0.4 know how much of the noise there is, as co-teaching's authors do.
  'trimmed low': plain(weights.trimmed(0.6, 'low')),
  'co_teaching': Arm(_co_teaching, loop='co_teaching'),
  'generalized_cross_entropy': plain(weights.generalized_cross_entropy(0.7)),
  'tilted t=-1': plain(weights.tilted(-1.0)),
  'tilted t=-2': plain(weights.tilted(-2.0)),
  'tilted t=1': plain(weights.tilted(1.0)),
  'linupper': plain(weights.linupper(1.0)),
  'selective_backprop': plain(weights.selective_backprop()),
  'self_paced': Arm(_self_paced),
  'rho_loss': plain(weights.rho_loss(0.1), reference=True),
  'learning_to_reweight': plain(weights.learning_to_reweight(), aligned=True),
  'group_dro': Arm(lambda facts: weights.group_dro(len(facts.group_counts), rate=0.1)),
  'jtt': Arm(lambda facts: weights.jtt(facts.examples, 20.0, _first_run(facts)), restart=0.1),
  'group_cvar': Arm(_group_cvar),
  'fair_error_bound': Arm(lambda facts: weights.fair_error_bound(len(facts.group_counts))),
  'cvar': plain(weights.cvar(0.2)),
  'chi_square_dro': plain(weights.chi_square_dro(0.5)),
}
