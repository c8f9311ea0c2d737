"""GraNd: the norm of each example's loss gradient, in full, of the last layer, or sketched.

  | function           | gradient of              | costs                                       |
  |--------------------|--------------------------|---------------------------------------------|
  | grand              | all parameters           | one gradient per example, `chunk` at a time |
  | grand_last_layer   | the output layer         | a closed form of the logits                 |
  | grand_sketch       | all parameters, on average | `directions` forward-mode passes          |

In a step that trains anyway, `jaxrw.gradients.Probe` reads the full norms inside the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrw import gradients
from jaxrw.attribution.influence import projected_gradients
from jaxrw.core import check_positive


def grand(
  loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any, *, chunk: int | None = None
) -> jax.Array:
  """||grad_params loss(params, example)||_2 of every example.

  Args:
    loss: (params, example) -> scalar, without the batch axis.
    params: a tree.
    batch: a tree whose leaves have a leading axis B.
    chunk: examples at a time; each needs memory of the size of the parameters. Default: all.

  Returns:
    float[B], high = moves the model much.

  Raises:
    ValueError: a chunk below 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> loss = lambda w, x: (w @ x) ** 2 / 2
    >>> scores.grand(loss, jnp.array([1.0, 0.0]), jnp.array([[3.0, 4.0], [0.0, 1.0]]))
    Array([15.,  0.], dtype=float32)

  Source: official code of Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, which holds the
    whole Jacobian. Its result at initialization did not reproduce (arXiv 2303.14753).
  """

  def norm(example):
    squares = [jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(params, example))]
    return jnp.sqrt(sum(squares))

  if chunk is None:
    return jax.vmap(norm)(batch)
  check_positive(chunk=chunk)
  return jax.lax.map(norm, batch, batch_size=chunk)


def grand_last_layer(logits: jax.Array, labels: jax.Array, hidden: jax.Array) -> jax.Array:
  """Norm of the gradient of cross entropy by the output layer's matrix and bias.

  el2n * sqrt(1 + ||hidden||^2), for a layer logits = hidden W + b.

  Args:
    logits: float[B, V].
    labels: int[B].
    hidden: float[B, D], the input of the output layer.

  Returns:
    float32[B]. Of a linear model it is the norm of the whole gradient.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> norms = scores.grand_last_layer(jnp.zeros((1, 2)), jnp.array([0]), jnp.ones((1, 2)))
    >>> round(float(norms[0]), 4)
    1.2247

  Source: derived; DeepCore's GraNd takes this layer alone.
  """
  with_bias = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
  return gradients.last_layer_grad_norms(logits, labels, with_bias)


def grand_sketch(
  key: jax.Array,
  losses_of_params: Callable[[Any], jax.Array],
  params: Any,
  *,
  directions: int = 32,
) -> jax.Array:
  """Estimate of the gradient norms without a gradient: sqrt(mean_k <grad L_i, r_k>^2).

  r_k ~ N(0, I), so that each square has the squared norm as its mean. The relative standard
  deviation of the mean is sqrt(2 / directions), a quarter for 32. All products with one direction
  come from one forward-mode pass over the batch: the norm of `attribution.projected_gradients`.

  Args:
    key: draws the directions.
    losses_of_params: params -> float[B], of losses that differentiate forwards.
    params: a tree.
    directions: how many, > 0.

  Returns:
    float32[B].

  Raises:
    ValueError: directions <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import scores
    >>> x = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    >>> norms = scores.grand_sketch(
    ...   jax.random.key(0), lambda w: x @ w, jnp.zeros(2), directions=1000)
    >>> [round(float(n)) for n in norms]
    [5, 1]

  Provenance: ours.
  """
  check_positive(directions=directions)
  projected = projected_gradients(key, losses_of_params, params, directions)
  return jnp.linalg.norm(projected, axis=1)
