"""Just train twice (JTT, Liu et al., ICML 2021): what a first model gets wrong counts more.

A short ordinary run ends in the set of training examples it misclassifies; a second run, from new
parameters, shows each of them `upweight` times as often:

  w_i = u_i n / sum u            u = upweight for the examples of the error set, 1 for the others

with the mean over all n examples of the data, so that it is 1: in expectation, the mean loss over
the upsampled data. Groups are not needed for training, but were needed to choose `upweight` and the
length of the first run, on validation data.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, check_positive, check_range, declare

_PAPER = 'Liu et al., Just Train Twice, ICML 2021 (arXiv 2107.09044)'


def jtt_weights(
  errors: jax.Array, example_ids: jax.Array, upweight: float | jax.Array
) -> jax.Array:
  """upweight or 1 by the error set, over their mean; one factor per example.

  Args:
    errors: bool[n], the error set. May be sharded over its rows, in an Auto mesh.
    example_ids: int[B]. -1 is an unknown example: weight 1.
    upweight: > 0; the paper's choices on four data sets are between 4 and 100.

  Returns:
    float32[B]. A traced id outside -1 .. n - 1 gives NaN.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: an upweight <= 0.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> errors = jnp.array([False, True, False, False])
    >>> jaxrw.jtt_weights(errors, jnp.array([0, 1, -1]), upweight=5.0)
    Array([0.5, 2.5, 1. ], dtype=float32)

  Source: the authors' README.
  """
  check_positive(upweight=upweight)
  if errors.ndim != 1:
    raise ValueError(f'errors has shape {errors.shape}; expected [n], one entry per example')
  fine = check_range(example_ids, errors.size, 'example_ids')
  rows = jnp.where(example_ids < 0, errors.size, example_ids)  # past the end: nothing is read
  wrong = errors.at[rows].get(mode='fill', fill_value=False)
  mean = 1 + (upweight - 1) * jnp.mean(errors, dtype=jnp.float32)
  factor = jnp.where(wrong, upweight, 1) / mean
  return jnp.where(example_ids == -1, 1, jnp.where(fine, factor, jnp.nan)).astype(jnp.float32)


@declare('absolute', 'example', 'paper', _PAPER)
def jtt(num_examples: int, upweight: float, until: int) -> Weighting:
  """Both runs of JTT in one stage; needs the signals `example_ids`, `step`, `logits`, `labels`.

  Before step `until` weights pass unchanged, and an example is in the error set if it was
  misclassified when it was last seen; from then on the set is fixed and `jtt_weights` act. For JTT
  proper start again from new parameters at that step, and keep this state.

  State: the error set, bool[n]. On several devices shard its rows over the data axis.

  Args:
    num_examples: n.
    upweight: > 0.
    until: length of the first run, in optimizer steps.

  Raises:
    ValueError: an upweight <= 0, a negative `until`, logits that are not [B, C].
  """
  check_positive(upweight=upweight, num_examples=num_examples)
  if until < 0:
    raise ValueError(f'until={until} must be at least 0')

  def update(weights, errors, *, losses, example_ids, step, logits, labels, base=None, **_):
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
      raise ValueError(f'jtt: logits {logits.shape} must be [B, C] and labels {labels.shape} [B]')
    losses, base, weights = masked.fill_in(losses, base, weights)
    factor = jtt_weights(errors, example_ids, upweight)
    loss, example_base = masked.example_level(losses, base)
    valid = example_base > 0
    wrong = (jnp.argmax(logits, axis=-1) != labels) & (labels >= 0)
    sound = jnp.all(jnp.isfinite(logits), axis=-1) & jnp.isfinite(jnp.where(valid, loss, 0))
    known = (step < until) & valid & (example_ids >= 0) & sound
    rows = jnp.where(known, example_ids, errors.size)
    # Copies of an id in one batch: wrong if any was, whatever their order.
    errors = errors.at[rows].set(False, mode='drop').at[rows].max(wrong, mode='drop')
    finding = jnp.where(jnp.isnan(factor), factor, 1)
    factor = jnp.where(step < until, finding, factor)
    factor = jnp.where(valid, factor + 0 * loss, 0).astype(weights.dtype)
    return jnp.where(base > 0, weights * masked.over_tokens(factor, weights), 0), errors

  return Weighting(lambda: jnp.zeros(num_examples, bool), update)
