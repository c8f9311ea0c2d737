"""The control every weighting must beat: its own weights, handed to the wrong examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, declare


@declare('normalized', 'example', 'ours', 'control for the weights being right, not just uneven')
def row_shuffled(stage: Weighting) -> Weighting:
  """Runs `stage`, then permutes its multipliers at random over the valid examples.

  The weights keep their distribution and lose their meaning. A method that beats uniform but not
  this control gained from uneven weights as such (noisier, in effect larger steps), not from the
  examples it chose. This is also what the official large-model code computes on every node but the
  first, by indexing weights with the local rank.

  Args:
    stage: an example-level weighting. Needs the signal `key` (the train step passes one per
      optimizer step).

  Returns:
    A stage; where examples differ in base the multipliers are rescaled so that sum(base * w) stays.
  """

  def update(weights, state, *, losses, base=None, key, **signals):
    new, state = stage.update(weights, state, losses=losses, base=base, key=key, **signals)
    base = jnp.ones_like(weights) if base is None else base
    _, measure = masked.example_level(weights, base * weights)
    own = masked.divide(masked.example_level(new, base * new)[1], measure)
    shuffled = _permute(own, measure > 0, key)
    mass, shuffled_mass = jnp.sum(jnp.stack([measure, measure * shuffled]), axis=1)
    factor = shuffled * masked.divide(mass, shuffled_mass)
    return (weights * masked.over_tokens(factor, weights)).astype(weights.dtype), state

  return Weighting(stage.init, update)


def _permute(values: jax.Array, valid: jax.Array, key: jax.Array) -> jax.Array:
  """A uniformly random permutation of the valid entries; the others become 0."""
  flat, chosen = masked.replicate(values), masked.replicate(valid)
  rows = jnp.arange(flat.size)
  noise = jax.random.uniform(key, flat.shape)
  targets = jnp.argsort(jnp.where(chosen, rows, rows.size + rows))  # valid rows first, in order
  sources = jnp.argsort(jnp.where(chosen, noise, 2.0))  # valid rows first, in random order
  permuted = jnp.zeros_like(flat).at[targets].set(flat[sources])
  return masked.reshard_like(jnp.where(chosen, permuted, 0), values)
