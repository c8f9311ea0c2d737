"""One row of state per example: hedging between the loss terms of each example (AdaWAC).

Every example has J loss terms, and a distribution over them that follows its own losses by
exponentiated gradient, over all steps in which the example is seen:

  z_i  = z_i + rate * (l_i1, ..., l_iJ)                         its row of the table
  w_ij = exp(z_ij) sum_j m_ij / sum_j m_ij exp(z_ij)            m = base * incoming weights

so each example keeps its mass and w_i is J times a softmax when base is even. Which way is a
choice: rate > 0 moves weight towards the LARGER loss, as AdaWAC does (the worst case per example);
rate < 0 moves it towards the smaller one; at rate 0 nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, check_range, declare

_ADAWAC = 'AdaWAC, ICML 2023 (arXiv 2210.01891)'
Rate = float | jax.Array | Callable[[jax.Array], jax.Array]

# Rows are stored with their largest logit at 0 (a softmax does not see the shift, and sums of
# losses would outgrow float32), and the others no lower than this. For J = 2 it clips the logit of
# beta to +-20: without it, a term that was ahead for 1000 steps would take 1000 to come back.
_LOWEST = -20.0


def hedge_weights(
  logits: jax.Array,
  example_ids: jax.Array,
  losses: jax.Array,
  rate: float | jax.Array,
  base: jax.Array | None = None,
  *,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Adds rate * losses to the rows of the examples, then weighs each one's terms by softmax.

  An id that occurs several times in the batch moves its row by the sum, and all its copies get the
  weights of the moved row (the official code keeps one of the moves).

  Args:
    logits: float32[n, J], one row per example of the data set. May be sharded over its rows, in an
      Auto mesh.
    example_ids: int[B]. -1 is an unknown example: weight 1, nothing stored.
    losses: float[B, J], the loss terms of each example.
    rate: step size in 1 / the losses' unit; > 0 towards the larger loss, < 0 towards the smaller.
    base: float[B, J], 0 for a term the example does not have: its logit does not move, its weight
      is 0. Default: ones.
    weights: float[B, J]: weights so far, multiplied in; every example keeps its sum(base *
      weights). Default: ones.

  Returns:
    (weights [B, J], logits). Weights float32 (float64 for float64 losses). A traced id outside
    -1 .. n - 1 makes its weights NaN and stores nothing.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: losses that are not [B, J], or shapes that do not match.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> logits, ids = jnp.zeros((100, 2)), jnp.array([7, 42])
    >>> losses = jnp.array([[2.0, 1.0], [1.0, 1.0]])
    >>> w, logits = jaxrw.hedge_weights(logits, ids, losses, rate=1.0)
    >>> [[round(float(x), 3) for x in row] for row in w]
    [[1.462, 0.538], [1.0, 1.0]]

  Source: AdaWAC for J terms; Freund and Schapire's Hedge (1997), one per example.
  """
  size, terms = logits.shape
  if losses.ndim != 2 or losses.shape[1] != terms:
    raise ValueError(
      f'losses have shape {losses.shape}; expected [B, {terms}], one column per loss term of the '
      'table. Return the terms from batched_loss, not their sum'
    )
  if example_ids.shape != losses.shape[:1]:
    raise ValueError(f'example_ids has shape {example_ids.shape}; expected [{losses.shape[0]}]')
  fine = check_range(example_ids, size, 'example_ids')[:, None]
  losses, base, weights = masked.fill_in(losses, base, weights)
  present = base > 0
  rows = jnp.where(example_ids < 0, size, example_ids)  # past the end: nothing read or written
  moves = jnp.where(present, rate * losses, 0).astype(logits.dtype)
  # A broken loss is seen in its own weights and moves nothing.
  sound = jnp.all(jnp.isfinite(moves), axis=1, keepdims=True)
  moves = jnp.where(sound, moves, 0)
  z = logits.at[rows].add(moves, mode='drop').at[rows].get(mode='fill', fill_value=0)
  z = jnp.maximum(z - jnp.max(z, axis=1, keepdims=True), _LOWEST)
  logits = logits.at[rows].set(z, mode='drop')  # copies of an id write the same row
  tilt = jnp.exp(z.astype(losses.dtype))
  measure = base * weights
  mass = jnp.sum(measure, axis=1, keepdims=True)
  own = tilt * masked.divide(mass, jnp.sum(measure * tilt, axis=1, keepdims=True))
  own = jnp.where(example_ids[:, None] == -1, 1, own)
  return jnp.where(present, weights * jnp.where(fine & sound, own, jnp.nan), 0), logits


@declare('normalized', 'token', 'ours', f'{_ADAWAC} for J terms; Freund and Schapire, Hedge, 1997')
def hedge(num_examples: int, num_terms: int, rate: Rate) -> Weighting:
  """Stage of `hedge_weights`; needs the signal `example_ids` and losses [B, J].

  State: the table of logits, float32[n, J], 4 J bytes per example. On several devices shard its
  rows over the data axis (`out_shardings` of the jit that creates it and of the step): then only
  arrays of the size of the batch travel; for a replicated table the compiler sums all of it over
  the devices in every step. The rate may be a schedule, a function of the step.
  """

  def update(weights, logits, *, losses, example_ids, base=None, step=None, **_):
    now = at_step(rate, step, 'rate')
    return hedge_weights(logits, example_ids, losses, now, base, weights=weights)

  return Weighting(lambda: jnp.zeros((num_examples, num_terms), jnp.float32), update)


@declare('normalized', 'token', 'official_code', _ADAWAC)
def adawac(num_examples: int, rate: Rate = 1.0) -> Weighting:
  """AdaWAC: `hedge` between the supervised and the consistency loss of each example.

  losses[:, 0] is the cross-entropy averaged over two augmentations, losses[:, 1] the consistency
  loss between them, already times its factor lambda (2.0 in the official runs, where rate is 1 to
  8). The weights are 2 beta and 2 (1 - beta), beta = sigmoid(rate * sum of all differences so far):
  weight goes to the larger loss, so that examples with much to label are trained on their labels.

  Source: official code; where an id occurs twice in a batch see `hedge_weights`.
  """
  return hedge(num_examples, 2, rate)
