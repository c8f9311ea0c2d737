"""Weightings: for each idea the plain function and its `Weighting` side by side."""

from jaxrw.weights.loss_based import (
  extremes,
  extremes_weights,
  kl_dro,
  kl_dro_weights,
  linupper,
  linupper_weights,
  quadratic,
  quadratic_weights,
  uniform,
  upper,
  upper_weights,
)
from jaxrw.weights.row_shuffled import row_shuffled
from jaxrw.weights.schedules import temperature_schedule
from jaxrw.weights.shaping import cap, cap_weights, unit_mean, unit_mean_weights

__all__ = [
  'cap',
  'cap_weights',
  'extremes',
  'extremes_weights',
  'kl_dro',
  'kl_dro_weights',
  'linupper',
  'linupper_weights',
  'quadratic',
  'quadratic_weights',
  'row_shuffled',
  'temperature_schedule',
  'uniform',
  'unit_mean',
  'unit_mean_weights',
  'upper',
  'upper_weights',
]
