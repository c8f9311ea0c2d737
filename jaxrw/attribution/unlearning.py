"""Forgetting by attribution: predict the outputs of a model without some data, and match them.

  predicted     f(x) - sum of what the forgotten examples did for f(x)
  match_loss    fine-tune to these outputs, on the forgotten and a few other examples
  klom          how far the outcome is from models that were really trained without

Source: Georgiev et al., Attribute-to-Delete: Machine Unlearning via Datamodel Matching, ICLR 2025
(arXiv 2410.23232); single files of the authors' code.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxrw import masked


def predicted(
  outputs: jax.Array, effects: jax.Array, forget: jax.Array, *, multiplier: float = 1.0
) -> jax.Array:
  """Outputs without some examples: f(x) - multiplier * sum_{i in forget} effect_i(x).

  Args:
    outputs: float[M] or [M, C], of the model as trained.
    effects: float[M, N] or [M, C, N], what training on i adds to each output, positive = raises it:
      `influence` / n for a mean loss over n, or `trak`. The prediction is linear: it degrades when
      much is forgotten.
    forget: bool[N].
    multiplier: for effects known up to a factor; 1 for exact ones.

  Returns:
    The shape of `outputs`; without anything to forget they are returned as they are.

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> effects = jnp.array([[0.5, 0.1, -0.2]])
    >>> attribution.predicted(jnp.array([1.0]), effects, jnp.array([True, False, True]))
    Array([0.7], dtype=float32)
  """
  if effects.shape[:-1] != outputs.shape or forget.shape != effects.shape[-1:]:
    raise ValueError(
      f'outputs have shape {outputs.shape}, effects {effects.shape}, forget {forget.shape}; '
      'expected [...], [..., N] and [N]'
    )
  return outputs - multiplier * jnp.sum(jnp.where(forget, effects, 0), axis=-1)


def match_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean over classes of (output - target)^2, one loss per example.

  Args:
    outputs: float[B, C], of the model that is fine-tuned.
    targets: float[B, C], from `predicted`, computed once from the model as trained.

  Returns:
    float32[B].

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> attribution.match_loss(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]]))
    Array([2.], dtype=float32)
  """
  if outputs.shape != targets.shape or outputs.ndim != 2:
    raise ValueError(f'outputs have shape {outputs.shape}, targets {targets.shape}; both [B, C]')
  return jnp.mean((outputs - jax.lax.stop_gradient(targets)) ** 2, axis=1)


@functools.partial(jax.jit, static_argnames='bins')
def klom(
  unlearned: jax.Array, oracle: jax.Array, *, bins: int = 20, eps: float = 1e-5
) -> jax.Array:
  """KL divergence of margins: how well unlearned models can be told from models trained without.

  Of every point, the margins of both kinds of models, clipped to [-100, 100], are counted in bins
  of equal width over their joint range; the divergence is sum_b p_b log(p_b / q_b), with eps for a
  q_b of 0.

  Args:
    unlearned: float[R, M], margins (`scores.logit_margin`) of R unlearned models at M points.
    oracle: float[S, M], of S models trained without the forgotten data.
    bins: number of bins.
    eps: for bins that no oracle is in.

  Returns:
    float32[M], >= 0 up to eps; 0 where the counts agree, NaN where a margin is. Report
    percentiles, over forgotten, kept and new points apart.

  Raises:
    ValueError: shapes that do not match, no models.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> margins = jnp.array([[0.0], [1.0]])
    >>> attribution.klom(margins, margins)
    Array([0.], dtype=float32)

  Source: code of the authors' benchmark, where the largest margin falls out of the last bin; here
    it is in it.
  """
  if unlearned.ndim != 2 or oracle.ndim != 2 or unlearned.shape[1:] != oracle.shape[1:]:
    raise ValueError(
      f'unlearned has shape {unlearned.shape}, oracle {oracle.shape}; expected [R, M] and [S, M]'
    )
  if not len(unlearned) or not len(oracle) or bins < 1:
    raise ValueError(f'{len(unlearned)} and {len(oracle)} models, bins={bins}: at least 1 each')

  def of_point(p, q):
    p, q = (jnp.clip(x, -100, 100) for x in (p, q))
    low, high = (f(jnp.append(p, q)) for f in (jnp.min, jnp.max))
    place = lambda x: masked.divide(x - low, high - low) * bins
    share = lambda x: jnp.mean(
      jnp.minimum(place(x).astype(int), bins - 1)[:, None] == jnp.arange(bins), axis=0
    )
    p, q = share(p), share(q)
    q = jnp.where(q > 0, q, eps)
    divergence = jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1) / q), 0))
    return jnp.where(jnp.isnan(low + high), jnp.nan, divergence)  # or all would be in one bin

  return jax.vmap(of_point, in_axes=(1, 1))(unlearned, oracle)
