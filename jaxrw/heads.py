"""Weights of the rows of a classifier's last layer: after training, without data.

Training on classes that are rare, or were seen earlier, leaves their rows short and predictions
biased towards the others:

  align_rows      new rows times gamma = mean |old row| / mean |new row|
  tau_normalize   every row divided by |row|^tau: 0 changes nothing, 1 makes all norms 1

Aligning helps where gamma < 1, which weight decay and long training bring about. With gamma > 1 it
*enlarges* the new rows, and hurt in every setting it was tried in: look at gamma first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked


def align_rows(kernel: jax.Array, old: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
  """The kernel with its new rows scaled to the old rows' mean norm, and the factor gamma.

  Args:
    kernel: float, one axis of which are the classes, e.g. [D, C] of a dense layer in flax.
    old: bool[C], the classes whose rows stay. Without an old or a new class, or where all new rows
      are 0, gamma is 1.
    axis: of the classes.

  Returns:
    (kernel, gamma float32[]). Biases are left alone. A cosine classifier does not see the change.

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import heads
    >>> kernel = jnp.array([[1.0, 0.0], [0.0, 1.0], [4.0, 0.0]])  # classes along axis 0
    >>> aligned, gamma = heads.align_rows(kernel, jnp.array([True, True, False]), axis=0)
    >>> float(gamma), aligned[2]
    (0.25, Array([1., 0.], dtype=float32))

  Source: Zhao et al., Maintaining Discrimination and Fairness, CVPR 2020 (arXiv 1911.07053), as two
    public implementations have it; the paper also holds the rows non-negative in training.
  """
  norms = _norms(kernel, axis)
  if old.shape != norms.shape:
    raise ValueError(f'old has shape {old.shape}; expected [{norms.size}], one for each class')
  mean_old, mean_new = (masked.mean(norms, group.astype(norms.dtype)) for group in (old, ~old))
  usable = (mean_old != 0) & (mean_new != 0)  # NaN stays NaN
  gamma = jnp.where(usable, mean_old / jnp.where(usable, mean_new, 1), 1)
  return _scaled(kernel, jnp.where(old, 1, gamma), axis), gamma


def tau_normalize(kernel: jax.Array, tau: float | jax.Array = 1.0, axis: int = -1) -> jax.Array:
  """Every row divided by its norm to the power tau.

  Args:
    kernel: float, one axis of which are the classes.
    tau: 0 leaves the kernel as it is, 1 makes all norms 1. Chosen on validation data.
    axis: of the classes.

  Returns:
    The kernel's shape and dtype. A row of zeros stays.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import heads
    >>> heads.tau_normalize(jnp.array([[3.0, 0.0], [4.0, 2.0]]))
    Array([[0.6, 0. ],
           [0.8, 1. ]], dtype=float32)

  Source: Kang et al., Decoupling Representation and Classifier, ICLR 2020, as recalled.
  """
  norms = _norms(kernel, axis)
  return _scaled(kernel, jnp.where(norms > 0, jnp.where(norms > 0, norms, 1) ** -tau, 1), axis)


def _norms(kernel: jax.Array, axis: int) -> jax.Array:
  wide = kernel.astype(jnp.promote_types(jnp.float32, kernel.dtype))
  rest = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
  return jnp.sqrt(jnp.sum(wide * wide, axis=rest))


def _scaled(kernel: jax.Array, factors: jax.Array, axis: int) -> jax.Array:
  shape = [1] * kernel.ndim
  shape[axis] = -1
  return (kernel * factors.reshape(shape)).astype(kernel.dtype)
