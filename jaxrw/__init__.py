"""Data weights for JAX: small pure functions that drop into any training loop.

>>> import jax.numpy as jnp, jaxrw
>>> losses = jnp.array([0.5, 2.0, 3.0])                     # one per example, from your own vmap
>>> w = jaxrw.linupper_weights(losses, temperature=0.4)     # multipliers of mean 1
>>> loss = jnp.mean(w * losses)                             # instead of jnp.mean(losses)
"""

from jaxrw import (
  adversarial,
  attribution,
  class_stats,
  contrastive,
  density_ratio,
  diagnostics,
  gradients,
  heads,
  interop,
  losses,
  masked,
  mixtures,
  ordinal,
  quantiles,
  scores,
  selection,
  valuation,
  weights,
)
from jaxrw.bilevel import make_bilevel_step
from jaxrw.core import Weighting, after, chain, from_config
from jaxrw.selective import Keep
from jaxrw.steps import TrainState, base_measure, make_train_step
from jaxrw.weights import *  # noqa: F403 - one list of public names, in jaxrw.weights.__all__
from jaxrw.weights import __all__ as _weight_names

__version__ = '0.1.0.dev0'

__all__ = [
  'Keep',
  'TrainState',
  'Weighting',
  'adversarial',
  'after',
  'attribution',
  'base_measure',
  'chain',
  'class_stats',
  'contrastive',
  'density_ratio',
  'diagnostics',
  'from_config',
  'gradients',
  'heads',
  'interop',
  'losses',
  'make_bilevel_step',
  'make_train_step',
  'masked',
  'mixtures',
  'ordinal',
  'quantiles',
  'scores',
  'selection',
  'valuation',
  'weights',
]
__all__ += [name for name in _weight_names if name not in weights.RECONSTRUCTED]
for _name in weights.RECONSTRUCTED:
  del globals()[_name]
