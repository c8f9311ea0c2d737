"""Per-example and per-token losses. Nothing here reduces over examples or tokens.

A weighting needs the losses one by one; the step takes the weighted mean.
"""

from __future__ import annotations

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
