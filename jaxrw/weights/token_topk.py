"""Selective language modeling (Rho-1, Lin et al., NeurIPS 2024): train on the tokens worth it.

A reference model, trained on data one would like more of, says how hard each token is to predict.
The tokens whose loss is furthest above the reference loss are learnable and not yet learned; what
the model knows already (both losses low) and what nobody can predict (both high) is left out:

  score = loss - ref_loss         over all valid tokens of the step, on all devices
  w     = total / kept            for the `share` of tokens with the highest score, 0 for the others

with total and kept the masses sum(base * incoming) of all and of the kept tokens, so that the loss
of the step is the mean over the kept tokens at the learning rate one had before.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxrw import masked
from jaxrw.core import Weighting, at_step, declare, stateless
from jaxrw.weights._rows import check_share, keep_top

_PAPER = 'Lin et al., Rho-1: Not All Tokens Are What You Need, NeurIPS 2024 (arXiv 2404.07965)'
Share = float | jax.Array | Callable[[jax.Array], jax.Array]


def token_topk_weights(
  losses: jax.Array,
  ref_losses: jax.Array,
  share: float | jax.Array = 0.6,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The `share` of tokens with the highest loss - ref_loss, alike; the others get weight 0.

  k = max(1, ceil(share * number of valid tokens)) tokens are kept, and all that tie with the k-th.
  On a sharded batch this costs five small collectives (see `masked.top_share`; the fifth holds the
  masses) and no gather, so every topology selects the same tokens.

  Args:
    losses: float[B, T], one loss per token.
    ref_losses: float[B, T], of the reference model on the same tokens.
    share: in (0, 1]. 1 passes the incoming weights of all valid tokens unchanged.
    base: float[B, T]: how much each token counts in the ordinary mean, 0 for padding. Tokens are
      counted as tokens, whatever their base. Default: ones.
    weights: float[B, T]: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses) [B, T]; 0 for padding. The kept ones are NaN
    if any valid token's score is NaN or inf. All 0 if every kept token comes in with weight 0.

  Raises:
    ValueError: losses that are not [B, T], shapes that do not match, a share outside (0, 1].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> losses = jnp.array([[0.1, 2.0, 6.0, 1.5, 3.0]])
    >>> ref_losses = jnp.array([[0.1, 1.0, 6.0, 1.4, 1.0]])
    >>> w = jaxrw.token_topk_weights(losses, ref_losses, share=0.4)
    >>> [float(x) for x in w[0]]
    [0.0, 2.5, 0.0, 0.0, 2.5]

  Source: Lin et al., NeurIPS 2024: score and selection as its abstract and the authors' README
    state them (no training code is public). The default share is recalled (60 to 70% there).
  """
  if losses.ndim != 2:
    raise ValueError(
      f'token_topk needs one loss per token [B, T], got shape {losses.shape}; return the losses of '
      'the tokens from batched_loss, not their mean'
    )
  if ref_losses.shape != losses.shape:
    raise ValueError(f'ref_losses has shape {ref_losses.shape}, losses {losses.shape}')
  check_share(share)
  losses, base, weights = masked.fill_in(losses, base, weights)
  return keep_top(losses - jax.lax.stop_gradient(ref_losses), share, base, weights)


@declare('normalized', 'token', 'paper', _PAPER)
def token_topk(share: Share = 0.6) -> Weighting:
  """Stage of `token_topk_weights`; needs the signal `ref_losses` [B, T]. The share may be a
  schedule, a function of the step."""
  check_share(share)

  def update(weights, *, losses, ref_losses, base=None, step=None, **_):
    now = at_step(share, step, 'share')
    return token_topk_weights(losses, ref_losses, now, base=base, weights=weights)

  return stateless(update)
