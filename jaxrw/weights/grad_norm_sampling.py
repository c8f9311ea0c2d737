"""Importance sampling by gradient norm (Katharopoulos and Fleuret, ICML 2018).

Of a large batch, b examples are drawn with replacement by p_i ∝ m_i G_i, where m = base * incoming
weights and G is a bound on the gradient's norm that costs one forward pass
(`gradients.last_layer_grad_norms`). An example that is drawn n_i times gets

  w_i = n_i / (b p_i)

so that the expectation of the step's gradient is that of the whole batch, at the smallest variance
that drawing by a bound can have. Drawing pays only where the norms are uneven enough. With p0 = m /
sum(m), the chances without the norms:

  tau^2 = sum p_i^2 / p0_i                  1 for even norms
  on    = EMA of tau > (B + 3 b) / (3 b)    B valid examples; a forward pass is a third of a step

and until then all weights are the incoming ones. `make_train_step(keep=Keep(...))` skips the
backward pass of what was not drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, declare
from jaxrw.weights._rows import fill_in

_PAPER = 'Katharopoulos and Fleuret, Not All Samples Are Created Equal, ICML 2018 (1803.00942)'


def grad_norm_sampling_weights(
  grad_norms: jax.Array,
  draws: int,
  key: jax.Array,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """n_i / (b p_i) for examples drawn n_i times by p ∝ m G, and tau of the batch.

  Args:
    grad_norms: float[B], G >= 0. An example of norm 0 is never drawn; if all are 0, they are drawn
      by their base.
    draws: b >= 1.
    key: of the step.
    base: float[B] or [B, T]: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones [B].
    weights: float, shape of the base: weights so far, multiplied in. Default: ones.

  Returns:
    (weights, tau float32[]). Weights have the shape of the base, and the incoming ones as their
    expectation; all are NaN if a valid norm is NaN, inf or negative.

  Raises:
    ValueError: shapes that do not match, fewer than 1 draw.

  Example:
    >>> import jax, jax.numpy as jnp, jaxrw
    >>> w, tau = jaxrw.grad_norm_sampling_weights(jnp.array([0.0, 3.0]), 4, jax.random.key(0))
    >>> w, round(float(tau), 3)
    (Array([0., 1.], dtype=float32), 1.414)

  Source: official code of the authors; an uneven base is ours.
  """
  _check(draws)
  grad_norms, base, weights = fill_in(grad_norms, base, weights, 'grad_norms')
  measure = masked.example_level(base, base * weights)[1]
  norms = jnp.where(measure > 0, grad_norms, 0)
  norms = jnp.where(norms >= 0, norms, jnp.nan)
  mass, reach = jnp.sum(jnp.stack([measure, measure * norms]), axis=1)
  ordinary = masked.divide(measure, mass)
  p = jnp.where(reach == 0, ordinary, masked.divide(measure * norms, reach))
  tau = jnp.sqrt(jnp.sum(masked.divide(p * p, ordinary)))
  drawn = jax.random.choice(key, p.size, (draws,), p=masked.replicate(p))
  times = masked.reshard_like(jnp.sum(drawn[:, None] == jnp.arange(p.size), axis=0), p)
  factor = masked.divide(times, draws * p) + 0 * reach
  return jnp.where(base > 0, weights * masked.over_tokens(factor, weights), 0), tau


@declare('absolute', 'example', 'official_code', _PAPER)
def grad_norm_sampling(draws: int, threshold: float | None = None, decay: float = 0.9) -> Weighting:
  """Stage of `grad_norm_sampling_weights`; needs the signals `grad_norms` and `key`.

  State: the moving average of tau, float32[], from 0. An empty or broken batch leaves it alone.

  Args:
    draws: b, examples drawn of each batch, with replacement.
    threshold: of the average tau, above which drawing is on. Default: (B + 3 b) / (3 b). 0 is
      always on.
    decay: of the average, in [0, 1).

  Raises:
    ValueError: fewer than 1 draw, a negative threshold, a decay outside [0, 1).
  """
  _check(draws)
  if threshold is not None and not threshold >= 0:
    raise ValueError(f'threshold={threshold} must be at least 0')
  if not 0 <= decay < 1:
    raise ValueError(f'decay={decay} must be in [0, 1)')

  def update(weights, average, *, losses, grad_norms, key, base=None, **_):
    losses, base, weights = masked.fill_in(losses, base, weights)
    drawn, tau = grad_norm_sampling_weights(grad_norms, draws, key, base=base, weights=weights)
    tau = jax.lax.stop_gradient(tau).astype(average.dtype)
    average = jnp.where(jnp.isfinite(tau) & (tau > 0), decay * average + (1 - decay) * tau, average)
    loss, mass = masked.example_level(losses, base)
    number = jnp.sum(mass > 0)
    limit = (number + 3 * draws) / (3 * draws) if threshold is None else threshold
    weights = jnp.where(average > limit, drawn.astype(weights.dtype), weights)
    # What was not drawn has weight 0, which would hide a broken loss.
    broken = masked.over_tokens(jnp.where(mass > 0, 0 * loss, 0), weights)
    return jnp.where(base > 0, weights + broken, weights), average

  return Weighting(lambda: jnp.zeros((), jnp.float32), update)


def _check(draws: int) -> None:
  if not isinstance(draws, int) or draws < 1:
    raise ValueError(f'draws={draws!r} must be a whole number of at least 1')
