"""What an example is worth looking at: scores from predictions, gradients, time and features.

A score is a number for each example, with a stated direction: 'high = hard', say. What is kept by
it is decided in `jaxrw.selection`; which scores point at wrong labels, and which at data to keep,
is measured in `experiments/prune`.
"""

from jaxrw.scores import dsir
from jaxrw.scores.errors import el2n, error_norm, logit_margin, margin_error, perplexity
from jaxrw.scores.gradient_norm import grand, grand_last_layer, grand_sketch
from jaxrw.scores.prototypes import class_prototypes, kmeans, knn_agreement, prototype_distance
from jaxrw.scores.trajectories import (
  Forgetting,
  Trajectories,
  forgetting,
  record,
  record_correct,
  trajectories,
)

__all__ = [
  'Forgetting',
  'Trajectories',
  'class_prototypes',
  'dsir',
  'el2n',
  'error_norm',
  'forgetting',
  'grand',
  'grand_last_layer',
  'grand_sketch',
  'kmeans',
  'knn_agreement',
  'logit_margin',
  'margin_error',
  'perplexity',
  'prototype_distance',
  'record',
  'record_correct',
  'trajectories',
]
