"""Data weights for JAX: small pure functions that drop into any training loop.

>>> import jax.numpy as jnp, jaxrw
>>> losses = jnp.array([0.5, 2.0, 3.0])                     # one per example, from your own vmap
>>> w = jaxrw.linupper_weights(losses, temperature=0.4)     # multipliers of mean 1
>>> loss = jnp.mean(w * losses)                             # instead of jnp.mean(losses)
"""

from jaxrw import diagnostics, losses, masked, weights
from jaxrw.core import Weighting, after, chain, from_config
from jaxrw.steps import TrainState, base_measure, make_train_step
from jaxrw.weights import *  # noqa: F403 - one list of public names, in jaxrw.weights.__all__
from jaxrw.weights import __all__ as _weight_names

__version__ = '0.1.0.dev0'

__all__ = [
  'TrainState',
  'Weighting',
  'after',
  'base_measure',
  'chain',
  'diagnostics',
  'from_config',
  'losses',
  'make_train_step',
  'masked',
  'weights',
]
__all__ += _weight_names
