"""Scores of single predictions: how far the model is from the label.

All of them rise with difficulty. That makes them informative early in training, on clean data and
where much is kept; with wrong labels the highest are the mislabeled, and where little is kept the
easy are the better half. See `docs/families/scores.md`.

Every function works on any leading axes. A sequence's score is the base-mean over its tokens:
`jaxrw.masked.example_level(scores, base)[0]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked


def el2n(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Length of the error vector: ||softmax(logits) - onehot(label)||_2.

  Args:
    logits: float[..., V], of the model in evaluation mode, a few epochs into training.
    labels: int[...].

  Returns:
    float32[...] in [0, sqrt(2)], high = hard. 0 exactly if the model is certain and right. For two
    classes sqrt(2) |p - y|. The mean over about ten models is much less noisy than one.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> p = jnp.array([[0.9, 0.1], [0.2, 0.8]])
    >>> [round(float(s), 4) for s in scores.el2n(jnp.log(p), jnp.array([0, 0]))]
    [0.1414, 1.1314]

  Source: Paul et al., Deep Learning on a Data Diet, NeurIPS 2021 (arXiv 2107.07075), official code.
  """
  return error_norm(logits, labels, 2)


def error_norm(logits: jax.Array, labels: jax.Array, order: float = 2) -> jax.Array:
  """(sum_c |p_c - y_c|^order)^(1 / order), p = softmax(logits), y the label as one-hot vector.

  Args:
    logits: float[..., V].
    labels: int[...].
    order: >= 1; 1 gives 2 (1 - p_label), 2 `el2n`, inf the largest error.

  Returns:
    float32[...], high = hard.

  Raises:
    ValueError: shapes that do not match, an order below 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> p = jnp.array([[0.75, 0.25]])
    >>> round(float(scores.error_norm(jnp.log(p), jnp.array([0]), order=1)[0]), 4)
    0.5

  Source: official code of Paul et al., NeurIPS 2021.
  """
  if not order >= 1:
    raise ValueError(f'order={order} must be at least 1')
  p, own = _probabilities(logits, labels)
  return jnp.linalg.norm(p - own, ord=order, axis=-1)


def margin_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Largest probability of a wrong class minus that of the label: max_{c != y} p_c - p_y.

  Args:
    logits: float[..., V], V at least 2.
    labels: int[...].

  Returns:
    float32[...] in [-1, 1]: below 0 where the model is right, high = hard.

  Raises:
    ValueError: shapes that do not match, a single class.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> p = jnp.array([[0.75, 0.125, 0.125], [0.25, 0.5, 0.25]])
    >>> [round(float(m), 4) for m in scores.margin_error(jnp.log(p), jnp.array([0, 0]))]
    [-0.625, 0.25]

  Source: official code of Paul et al., NeurIPS 2021.
  """
  p, own = _probabilities(logits, labels)
  if p.shape[-1] < 2:
    raise ValueError(f'logits have shape {logits.shape}: a margin needs two classes')
  label = jnp.sum(jnp.where(own, p, 0), axis=-1)
  return jnp.max(jnp.where(own, -jnp.inf, p), axis=-1) - label


def logit_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """logit_y - logsumexp of the other logits: the log odds of the label, log(p_y / (1 - p_y)).

  Args:
    logits: float[..., V], V at least 2.
    labels: int[...].

  Returns:
    float32[...], unbounded, high = easy. Nearly linear in the parameters, so that attribution
    predicts it better than a probability.

  Raises:
    ValueError: shapes that do not match, a single class.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> scores.logit_margin(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([1]))
    Array([-1.0986123], dtype=float32)

  Source: Park et al., TRAK, ICML 2023: the model output to attribute.
  """
  _check(logits, labels)
  if logits.shape[-1] < 2:
    raise ValueError(f'logits have shape {logits.shape}: a margin needs two classes')
  logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
  own = labels[..., None] == jnp.arange(logits.shape[-1])
  others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
  return jnp.sum(jnp.where(own, logits, 0), axis=-1) - others


def perplexity(losses: jax.Array, base: jax.Array | None = None) -> jax.Array:
  """exp of the base-mean of the token losses: in effect out of how many tokens the model chooses.

  Args:
    losses: float[B, T], in nats.
    base: float[B, T], 0 for padding. Default: ones.

  Returns:
    float32[B], at least 1 up to rounding; high = surprising. An example of padding only has 1.

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> scores.perplexity(jnp.log(jnp.full((1, 3), 8.0)))
    Array([8.], dtype=float32)
  """
  losses, base, _ = masked.fill_in(losses, base, None)
  if losses.ndim != 2:
    raise ValueError(f'losses have shape {losses.shape}; expected [B, T]')
  return jnp.exp(masked.example_level(losses, base)[0])


def _probabilities(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(p, one-hot labels as bool), float[..., V]."""
  _check(logits, labels)
  wide = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
  return jax.nn.softmax(wide), labels[..., None] == jnp.arange(logits.shape[-1])


def _check(logits: jax.Array, labels: jax.Array) -> None:
  if logits.shape[:-1] != labels.shape:
    raise ValueError(f'labels have shape {labels.shape}, logits {logits.shape}')
