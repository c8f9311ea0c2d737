"""The inner maximization of adversarial training: projected gradient ascent in an l-infinity ball.

  x_0     = x + noise, uniform in [-eps, eps]
  x_{t+1} = project(x_t + step * sign(gradient of the loss at x_t))

`project` clips to the ball around x and then to the bounds. Adversarial training takes the loss of
what comes back, and weights it as any other: the attack itself is unweighted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def pgd_linf(
  loss: Callable[[Any, jax.Array, Any], jax.Array],
  params: Any,
  x: jax.Array,
  y: Any,
  *,
  eps: float | jax.Array,
  step: float | jax.Array,
  steps: int,
  key: jax.Array,
  bounds: tuple[float, float],
) -> jax.Array:
  """Inputs near x that raise the loss, |x' - x| <= eps in every entry; one attack per example.

  An example's attack depends on that example and its place in the batch (the noise), never on the
  others. A model with batch statistics has to use stored ones inside `loss`.

  Args:
    loss: (params, x of one example, y of one example) -> scalar.
    params: pytree, the model.
    x: float[B, ...], inside the bounds.
    y: pytree with leading axis B: labels, or whatever else the loss needs.
    eps: radius of the ball, >= 0. At 0 the result is x.
    step: length of a step in every entry, > 0. steps * step >= 2 eps reaches every corner.
    steps: number of steps; 0 leaves the noise.
    key: for the noise; row i takes it from fold_in(key, i).
    bounds: (low, high), the valid range of x; (-inf, inf) if it has none.

  Returns:
    Shape and dtype of x; a constant for differentiation. A NaN gradient makes its entry NaN.

  Raises:
    TypeError: x that is not floating point.
    ValueError: eps < 0, step <= 0, steps < 0, or bounds in the wrong order.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw.adversarial import pgd_linf
    >>> loss = lambda w, x, y: jax.nn.softplus(-y * (x @ w))
    >>> w, x, y = jnp.array([1.0, -2.0]), jnp.zeros((1, 2)), jnp.array([1.0])
    >>> pgd_linf(loss, w, x, y, eps=0.5, step=0.25, steps=4, key=jax.random.key(0), bounds=(-1, 1))
    Array([[-0.5,  0.5]], dtype=float32)

  Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, in
    its textbook form.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x has dtype {x.dtype}; an attack moves floating point inputs')
  if isinstance(eps, (int, float)) and not eps >= 0:
    raise ValueError(f'eps={eps} must be at least 0')
  if isinstance(step, (int, float)) and not step > 0:
    raise ValueError(f'step={step} must be greater than 0')
  if steps < 0:
    raise ValueError(f'steps={steps} must be at least 0')
  low, high = bounds
  if not low < high:
    raise ValueError(f'bounds={bounds} must be (low, high) with low < high')

  params, x, y = jax.lax.stop_gradient((params, x, y))
  gradient = jax.vmap(jax.grad(loss, argnums=1), (None, 0, 0))

  def project(moved):
    return jnp.clip(jnp.clip(moved, x - eps, x + eps), low, high).astype(x.dtype)

  def climb(now, _):
    return project(now + step * jnp.sign(gradient(params, now, y))), None

  row_noise = lambda i: jax.random.uniform(
    jax.random.fold_in(key, i), x.shape[1:], x.dtype, minval=-1, maxval=1
  )
  noise = jax.vmap(row_noise)(jnp.arange(x.shape[0]))
  return jax.lax.scan(climb, project(x + eps * noise), length=steps)[0]
