"""Mixtures of domains: how often each is sampled, what it counts, which examples make a batch."""

from jaxrw.mixtures.core import Mixture
from jaxrw.mixtures.online import (
  average_proportions,
  dga,
  doge,
  doremi,
  excess_losses,
  exponentiated_step,
  group_dro_mixture,
  odm,
)
from jaxrw.mixtures.planner import (
  Plan,
  Planner,
  PlannerState,
  shuffled_index,
  state_from_dict,
  state_to_dict,
)
from jaxrw.mixtures.static import (
  basis_mixture,
  cooldown,
  dense_cooldown,
  fixed,
  importance_mixture,
  scalarization_weights,
  scheduled,
  second_moment_ratio,
  stratified,
  temperature_probs,
  unimax_probs,
)

__all__ = [
  'Mixture',
  'Plan',
  'Planner',
  'PlannerState',
  'average_proportions',
  'basis_mixture',
  'cooldown',
  'dense_cooldown',
  'dga',
  'doge',
  'doremi',
  'excess_losses',
  'exponentiated_step',
  'fixed',
  'group_dro_mixture',
  'importance_mixture',
  'odm',
  'scalarization_weights',
  'scheduled',
  'second_moment_ratio',
  'shuffled_index',
  'state_from_dict',
  'state_to_dict',
  'stratified',
  'temperature_probs',
  'unimax_probs',
]
