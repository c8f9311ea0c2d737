"""Per-example and per-token losses. Nothing here reduces over examples or tokens.

A weighting needs the losses one by one; the step takes the weighted mean.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Softmax cross entropy of each label, in nats: -log softmax(logits)[label].

  Args:
    logits: float[..., V]. Computed in float32 or wider, whatever the input's dtype.
    labels: int[...], class or token indices.

  Returns:
    float32[...], one loss per label, never reduced.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.losses.cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
    Array([1.3862944, 1.3862944], dtype=float32)
  """
  logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def bpr(positive: jax.Array, negative: jax.Array) -> jax.Array:
  """Bayesian personalized ranking: -log sigmoid(positive - negative), of each pair.

  Args:
    positive: float[...], scores of what was chosen. Computed in float32 or wider.
    negative: float[...], scores of what was not.

  Returns:
    float32[...], one loss per pair, never reduced.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.losses.bpr(jnp.array([1.0, 0.0]), jnp.array([1.0, 200.0]))
    Array([  0.6931472, 200.       ], dtype=float32)

  Source: Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
  """
  wide = jnp.promote_types(jnp.float32, jnp.result_type(positive, negative))
  return jax.nn.softplus(negative.astype(wide) - positive.astype(wide))


def chunked_cross_entropy(
  hidden: jax.Array, table: jax.Array, labels: jax.Array, *, chunk: int
) -> jax.Array:
  """`cross_entropy(hidden @ table.T, labels)` with logits for at most `chunk` positions at a time.

  The logits of all positions, [..., T, V], are most of the memory of a small model with a large
  vocabulary. Here they never exist at once, forwards or backwards: each chunk of positions is
  computed, reduced to its losses and forgotten, and computed again for its gradient. That costs
  one more product with the table, so 4/3 of the head's FLOPs.

  Forms that compute the gradient in the forward pass and spare the recomputation need to know
  what each token's loss will be multiplied by. Weights that depend on the losses are only known
  after all of them, so this one returns the losses and leaves the product to the caller.

  Only positions are cut: rows stay on their devices. Plain JAX inside, so `vmap`, `jvp` and
  `grad` work in any combination. On a mesh of devices, under `jax.shard_map`, the gradient of the
  table crosses devices once; left to the partitioner, once a chunk.

  Args:
    hidden: float[..., T, D]; its dtype is that of the products, which are summed in float32.
    table: float[V, D], one row per class; rounded to the dtype of `hidden` inside each chunk, so
      that the chunks' gradients add up in the table's own dtype.
    labels: int[..., T].
    chunk: positions at a time. T need not be a multiple: the chunks are made equally long, and
      what is missing at the end is filled up and cut off again.

  Returns:
    float32[..., T], one loss per label, never reduced.

  Example:
    >>> import jax, jax.numpy as jnp, jaxrw
    >>> hidden, table = jnp.ones((2, 5, 3)), jnp.zeros((4, 3))
    >>> labels = jnp.zeros((2, 5), int)
    >>> losses = jaxrw.losses.chunked_cross_entropy(hidden, table, labels, chunk=2)
    >>> losses.shape, float(losses[0, 0])
    ((2, 5), 1.3862943649291992)
  """
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be a whole number of positions, at least 1')
  length = labels.shape[-1]
  count = max(1, math.ceil(length / chunk))
  size = math.ceil(length / count)

  def cut(x, axis):
    """[..., T, ...] -> [count, ..., size, ...]."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - length)
    x = jnp.pad(x, padding)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  @functools.partial(jax.checkpoint, prevent_cse=False)  # the loop itself prevents it
  def chunk_losses(part):
    hidden, labels = part
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    logits = jnp.einsum(
      '...td,vd->...tv', hidden, table.astype(hidden.dtype), preferred_element_type=wide
    )
    return cross_entropy(logits, labels)

  axis = labels.ndim - 1
  losses = jnp.moveaxis(jax.lax.map(chunk_losses, (cut(hidden, axis), cut(labels, axis))), 0, axis)
  return losses.reshape(*labels.shape[:-1], count * size)[..., :length]
