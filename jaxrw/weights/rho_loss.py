"""Selection with a second model: reducible loss (RHO-loss) and the exchange of co-teaching.

Both train on a share of the examples of a large batch, chosen with the help of the losses of
another model on the same examples, the signal `ref_losses`:

  rho_loss      the highest l_i - ref_i      ref: a model trained on held-out data, kept fixed
  co_teaching   the lowest ref_i             ref: a peer that trains beside this one, and is taught
                                             by it in turn

A loss that is high for both is noise or hopeless, one that is low for both is learned: RHO-loss
leaves both out. Two networks err differently, so that in co-teaching each filters the mislabeled
examples that the other has begun to memorize.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, declare, stateless
from jaxrw.weights._rows import check_share, keep_top

Share = float | jax.Array | Callable[[jax.Array], jax.Array]

_RHO = 'Mindermann et al., Prioritized Training on Points that are learnable, ICML 2022 (RHO-Loss)'
_CO_TEACHING = 'Han et al., Co-teaching, NeurIPS 2018 (arXiv 1804.06872)'


def rho_loss_weights(
  losses: jax.Array,
  ref_losses: jax.Array,
  share: float | jax.Array = 0.1,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The `share` of examples with the highest reducible loss l - ref, alike; the others get 0.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    ref_losses: float, same shape, of the model trained on held-out data: constant in training, so
      they can be computed once and come with the batch.
    share: in (0, 1]. 1 passes the incoming weights unchanged.
    base: float, same shape: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base. The
    kept ones are NaN if any valid score is NaN or inf.

  Raises:
    ValueError: shapes that do not match, a share outside (0, 1].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> losses, ref_losses = jnp.array([0.1, 2.0, 5.0, 3.0]), jnp.array([0.1, 0.5, 5.0, 1.0])
    >>> jaxrw.rho_loss_weights(losses, ref_losses, share=0.25)
    Array([0., 0., 0., 4.], dtype=float32)

  Source: official code of Mindermann et al. (32 of 320 examples).
  """
  check_share(share)
  losses, ref_losses, base, weights = _of_both(losses, ref_losses, base, weights)
  return keep_top(losses - ref_losses, share, base, weights)


def co_teaching_weights(
  losses: jax.Array,
  ref_losses: jax.Array,
  share: float | jax.Array = 0.8,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The `share` of examples with the lowest loss of the *peer*, alike; the others get weight 0.

  Call it once for each of the two networks with the losses exchanged. With a model as its own peer
  this is `trimmed_weights(side='low')`. The official code divides the mean over the kept examples
  by their number once more, which shortens its steps; here sum(base * w) stays.

  Args:
    losses: float[B] or [B, T], of the model that is trained; only its shape and base matter.
    ref_losses: float, same shape, of the peer on the same batch.
    share: in (0, 1], see `co_teaching_share`. 1 passes the incoming weights unchanged.
    base: float, same shape, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    As `rho_loss_weights`.

  Raises:
    ValueError: shapes that do not match, a share outside (0, 1].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> mine, peers = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([9.0, 1.0, 2.0, 8.0])
    >>> jaxrw.co_teaching_weights(mine, peers, share=0.5)
    Array([0., 2., 2., 0.], dtype=float32)

  Source: official code of Han et al., but for the second division.
  """
  check_share(share)
  losses, ref_losses, base, weights = _of_both(losses, ref_losses, base, weights)
  return keep_top(-ref_losses + 0 * losses, share, base, weights)


def _of_both(losses, ref_losses, base, weights):
  """(losses [B], reference losses [B], base, weights), checked."""
  if losses.ndim not in (1, 2):
    raise ValueError(f'losses must be [B] or [B, T], got shape {losses.shape}')
  if ref_losses.shape != losses.shape:
    raise ValueError(f'ref_losses has shape {ref_losses.shape}, losses {losses.shape}')
  losses, base, weights = masked.fill_in(losses, base, weights)
  ref_losses = jax.lax.stop_gradient(ref_losses.astype(losses.dtype))
  rows = [masked.example_level(x, base)[0] for x in (losses, ref_losses)]
  return *rows, base, weights


@declare('normalized', 'example', 'official_code', _RHO)
def rho_loss(share: Share = 0.1) -> Weighting:
  """Stage of `rho_loss_weights`; needs the signal `ref_losses`. The share may be a schedule."""
  return _with_reference(rho_loss_weights, share)


@declare('normalized', 'example', 'official_code', _CO_TEACHING)
def co_teaching(share: Share = 0.8) -> Weighting:
  """Stage of `co_teaching_weights`; needs the signal `ref_losses`, the peer's losses. The share may
  be a schedule such as `co_teaching_share`."""
  return _with_reference(co_teaching_weights, share)


def _with_reference(function: Callable[..., jax.Array], share: Share) -> Weighting:
  check_share(share)

  def update(weights, *, losses, ref_losses, base=None, step=None, **_):
    now = at_step(share, step, 'share')
    return function(losses, ref_losses, now, base=base, weights=weights)

  return stateless(update)


def co_teaching_share(
  noise_rate: float, steps: int, *, exponent: float = 1.0
) -> Callable[[jax.Array], jax.Array]:
  """share(step) = 1 - noise_rate^exponent * min(step / steps, 1): all at first, then the clean.

  Args:
    noise_rate: estimated share of mislabeled examples, in [0, 1).
    steps: over how many optimizer steps the dropped part grows (ten epochs in the paper).
    exponent: c of the official code.

  Returns:
    step -> float32[].

  Raises:
    ValueError: a noise rate outside [0, 1), fewer than 1 step, a negative exponent.

  Example:
    >>> import jaxrw
    >>> share = jaxrw.co_teaching_share(0.4, steps=100)
    >>> [round(float(share(step)), 2) for step in (0, 50, 100, 999)]
    [1.0, 0.8, 0.6, 0.6]

  Source: official code of Han et al.
  """
  if not 0 <= noise_rate < 1:
    raise ValueError(f'noise_rate={noise_rate} must be in [0, 1)')
  if steps < 1 or exponent < 0:
    raise ValueError(f'steps={steps} must be at least 1, exponent={exponent} at least 0')
  dropped = noise_rate**exponent
  if dropped >= 1:
    raise ValueError(f'noise_rate={noise_rate} ** exponent={exponent} leaves no example')
  return lambda step: 1 - dropped * jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1)
