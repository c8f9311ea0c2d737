"""Mixtures of domains: which examples make up each batch."""

from jaxrw.mixtures.planner import (
  Plan,
  Planner,
  PlannerState,
  shuffled_index,
  state_from_dict,
  state_to_dict,
)

__all__ = [
  'Plan',
  'Planner',
  'PlannerState',
  'shuffled_index',
  'state_from_dict',
  'state_to_dict',
]
