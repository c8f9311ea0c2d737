"""What examples, groups of them or sources are worth: values of the game "train on a subset".

  exact_values          all 2^n subsets: the reference
  permutation_values    random orders, truncation, standard errors (TMC-Shapley and semivalues)
  subset_values         random subsets (Banzhaf)
  gradient_values       one SGD pass along each order (G-Shapley)
  knn_shapley           exact for K nearest neighbors, no training at all
  learn_importance      sources of a retrieval corpus

In-run values, a product of gradients in each training step, are `jaxrw.gradients.alignment` or its
`Probe`. Positive = helpful everywhere. From values to weights: max(0, phi), or a mask by
`jaxrw.selection`.
"""

from jaxrw.valuation.games import (
  all_utilities,
  banzhaf_coefficients,
  beta_coefficients,
  exact_values,
  loo_coefficients,
  shapley_coefficients,
)
from jaxrw.valuation.neighbors import knn_shapley
from jaxrw.valuation.retrieval import (
  expected_utility,
  group_means,
  kept_sources,
  learn_importance,
  ranks_needed,
  retrieval_gradient,
  streamed_importance,
)
from jaxrw.valuation.sampled import (
  Estimate,
  Utility,
  gradient_values,
  permutation_values,
  subset_values,
  unsettled,
)

__all__ = [
  'Estimate',
  'Utility',
  'all_utilities',
  'banzhaf_coefficients',
  'beta_coefficients',
  'exact_values',
  'expected_utility',
  'gradient_values',
  'group_means',
  'kept_sources',
  'knn_shapley',
  'learn_importance',
  'loo_coefficients',
  'permutation_values',
  'ranks_needed',
  'retrieval_gradient',
  'shapley_coefficients',
  'streamed_importance',
  'subset_values',
  'unsettled',
]
