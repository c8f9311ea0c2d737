"""Weightings: for each idea the plain function and its `Weighting` side by side."""

from jaxrw.weights import balanced_bins, error_log
from jaxrw.weights.adapt import adapt, adapt_weights, anchor_mean, pool_positions
from jaxrw.weights.class_balance import (
  class_weights,
  effective_number,
  effective_number_weights,
  inverse_frequency,
  inverse_frequency_weights,
)
from jaxrw.weights.cvar import chi_square_dro, chi_square_dro_weights, cvar, cvar_weights
from jaxrw.weights.example_table import adawac, hedge, hedge_weights
from jaxrw.weights.fair_error_bound import (
  fair_error_bound,
  fair_error_bound_dice,
  fair_error_bound_weights,
)
from jaxrw.weights.generalized_cross_entropy import (
  generalized_cross_entropy,
  generalized_cross_entropy_weights,
)
from jaxrw.weights.grad_norm_sampling import grad_norm_sampling, grad_norm_sampling_weights
from jaxrw.weights.group_advantage import group_advantage, group_advantage_weights
from jaxrw.weights.group_cvar import group_cvar, group_cvar_weights
from jaxrw.weights.group_dro import group_dro, group_dro_weights
from jaxrw.weights.importance import importance, importance_weights
from jaxrw.weights.jtt import jtt, jtt_weights
from jaxrw.weights.learned import (
  learning_to_reweight,
  learning_to_reweight_weights,
  meta_weight_net,
  meta_weight_net_weights,
)
from jaxrw.weights.loss_based import (
  extremes,
  extremes_weights,
  kl_dro,
  kl_dro_weights,
  linupper,
  linupper_stale,
  linupper_weights,
  quadratic,
  quadratic_weights,
  uniform,
  upper,
  upper_weights,
)
from jaxrw.weights.rho_loss import (
  co_teaching,
  co_teaching_share,
  co_teaching_weights,
  rho_loss,
  rho_loss_weights,
)
from jaxrw.weights.row_shuffled import row_shuffled
from jaxrw.weights.schedules import temperature_schedule
from jaxrw.weights.selective_backprop import selective_backprop, selective_backprop_weights
from jaxrw.weights.self_paced import growing_threshold, self_paced, self_paced_weights
from jaxrw.weights.shaping import cap, cap_weights, unit_mean, unit_mean_weights
from jaxrw.weights.shrinkmatch import shrink_mask, shrinkmatch, shrinkmatch_weights
from jaxrw.weights.tilted import (
  tilted,
  tilted_groups,
  tilted_groups_weights,
  tilted_stream,
  tilted_weights,
)
from jaxrw.weights.token_topk import token_topk, token_topk_weights
from jaxrw.weights.trimmed import trimmed, trimmed_weights
from jaxrw.weights.vertex_class_balance import (
  vertex_class_balance,
  vertex_class_balance_weights,
)

__all__ = [
  'adapt',
  'adapt_weights',
  'adawac',
  'anchor_mean',
  'balanced_bins',
  'cap',
  'cap_weights',
  'chi_square_dro',
  'chi_square_dro_weights',
  'class_weights',
  'co_teaching',
  'co_teaching_share',
  'co_teaching_weights',
  'cvar',
  'cvar_weights',
  'effective_number',
  'effective_number_weights',
  'error_log',
  'extremes',
  'extremes_weights',
  'fair_error_bound',
  'fair_error_bound_dice',
  'fair_error_bound_weights',
  'generalized_cross_entropy',
  'generalized_cross_entropy_weights',
  'grad_norm_sampling',
  'grad_norm_sampling_weights',
  'group_advantage',
  'group_advantage_weights',
  'group_cvar',
  'group_cvar_weights',
  'group_dro',
  'group_dro_weights',
  'growing_threshold',
  'hedge',
  'hedge_weights',
  'importance',
  'importance_weights',
  'inverse_frequency',
  'inverse_frequency_weights',
  'jtt',
  'jtt_weights',
  'kl_dro',
  'kl_dro_weights',
  'learning_to_reweight',
  'learning_to_reweight_weights',
  'linupper',
  'linupper_stale',
  'linupper_weights',
  'meta_weight_net',
  'meta_weight_net_weights',
  'pool_positions',
  'quadratic',
  'quadratic_weights',
  'rho_loss',
  'rho_loss_weights',
  'row_shuffled',
  'selective_backprop',
  'selective_backprop_weights',
  'self_paced',
  'self_paced_weights',
  'shrink_mask',
  'shrinkmatch',
  'shrinkmatch_weights',
  'temperature_schedule',
  'tilted',
  'tilted_groups',
  'tilted_groups_weights',
  'tilted_stream',
  'tilted_weights',
  'token_topk',
  'token_topk_weights',
  'trimmed',
  'trimmed_weights',
  'uniform',
  'unit_mean',
  'unit_mean_weights',
  'upper',
  'upper_weights',
  'vertex_class_balance',
  'vertex_class_balance_weights',
]

# Rebuilt without the paper or its code in hand: found here and by configs, not at the top of jaxrw.
RECONSTRUCTED = (
  'adapt',
  'adapt_weights',
  'anchor_mean',
  'generalized_cross_entropy',
  'generalized_cross_entropy_weights',
  'group_advantage',
  'group_advantage_weights',
  'growing_threshold',
  'pool_positions',
  'self_paced',
  'self_paced_weights',
)
