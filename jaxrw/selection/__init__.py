"""From scores to a subset, to probabilities, or to how often each example is used.

  | by                  | function                       | gives                       |
  |---------------------|--------------------------------|-----------------------------|
  | rank                | keep_window                    | mask: top, bottom, window   |
  | rank in groups      | keep_by_group, group_budgets   | mask, with floors           |
  | even over the score | stratified                     | mask                        |
  | chance and weight   | gumbel_top_k                   | mask, without replacement   |
  | chance              | rs2                            | indices of a round          |
  | quality and chance  | noisy_threshold                | mask                        |
  | weight              | stochastic_round               | repeat counts               |
  | duplicates          | soft_dedup                     | weights                     |
  | distance            | k_center                       | indices                     |
  | helpfulness, overlap| greedy_interaction             | indices                     |
  | reward of clusters  | cluster_bandit, bandit_*       | clusters to visit           |

`experiments/prune` compares them at equal numbers of steps, with random subsets, RS2 and a
compressed schedule as controls: at equal steps, few selections beat the last two.
"""

from jaxrw.selection.bandit import (
  ClusterBandit,
  bandit_pick,
  bandit_scores,
  bandit_update,
  cluster_bandit,
)
from jaxrw.selection.geometry import greedy_interaction, k_center
from jaxrw.selection.keep import group_budgets, keep_by_group, keep_window, stratified
from jaxrw.selection.sampling import (
  gumbel_top_k,
  noisy_threshold,
  perturbed,
  rs2,
  soft_dedup,
  stochastic_round,
)

__all__ = [
  'ClusterBandit',
  'bandit_pick',
  'bandit_scores',
  'bandit_update',
  'cluster_bandit',
  'greedy_interaction',
  'group_budgets',
  'gumbel_top_k',
  'k_center',
  'keep_by_group',
  'keep_window',
  'noisy_threshold',
  'perturbed',
  'rs2',
  'soft_dedup',
  'stochastic_round',
  'stratified',
]
