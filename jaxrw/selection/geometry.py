"""Selection by coverage: examples far from each other, or that do not repeat each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def k_center(x: jax.Array, budget: int, *, first: int | jax.Array = 0) -> jax.Array:
  """Greedy k-center: again and again the row that is farthest from all rows chosen so far.

  The largest distance of any row to a chosen one is at most twice that of the best choice.

  Args:
    x: float[N, D].
    budget: rows to choose, 1 .. N.
    first: the row to begin with.

  Returns:
    int32[budget], in the order chosen; ties by position. Once every row coincides with a chosen
    one, rows not yet chosen follow by position.

  Raises:
    ValueError: a budget outside 1 .. N, a wrong shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> selection.k_center(jnp.array([[0.0], [1.0], [9.0], [5.0]]), 3)
    Array([0, 2, 3], dtype=int32)

  Source: Gonzalez, 1985; Sener and Savarese, ICLR 2018.
  """
  if x.ndim != 2 or not 1 <= budget <= len(x):
    raise ValueError(f'x has shape {x.shape} and budget={budget}; expected [N, D] and 1 to N')

  def choose(carry, _):
    distance, row = carry
    distance = jnp.minimum(distance, jnp.sum((x - x[row]) ** 2, axis=1))
    distance = distance.at[row].set(-1)  # chosen: below every other, 0 included
    return (distance, jnp.argmax(distance).astype(jnp.int32)), row

  start = jnp.full(len(x), jnp.inf, x.dtype), jnp.asarray(first, jnp.int32)
  return jax.lax.scan(choose, start, length=budget)[1]


def greedy_interaction(
  helpfulness: jax.Array, similarity: jax.Array, rate: float | jax.Array, budget: int
) -> jax.Array:
  """The most helpful examples, each discounted by what the ones before it already do (GREATS).

  s_i = rate * <g_i, g_target>; the largest is taken, then s -= rate^2 <g_i, g_taken>.

  Args:
    helpfulness: float[n], <g_i, g_target>, positive = helpful, e.g. `gradients.alignment`.
    similarity: float[n, n], <g_i, g_j>.
    rate: learning rate of the step.
    budget: examples to take, 1 .. n.

  Returns:
    int32[budget], in the order taken; ties by position. With no similarity it is top-k.

  Raises:
    ValueError: a budget outside 1 .. n, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> similarity = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> selection.greedy_interaction(jnp.array([1.0, 0.9, 0.5]), similarity, 1.0, 2)
    Array([0, 2], dtype=int32)

  Source: official code of Wang et al., GREATS, NeurIPS 2024: the target's Hessian is the identity.
  """
  n = helpfulness.size
  if helpfulness.shape != (n,) or similarity.shape != (n, n) or not 1 <= budget <= n:
    raise ValueError(
      f'helpfulness has shape {helpfulness.shape}, similarity {similarity.shape}, budget={budget}; '
      'expected [n], [n, n] and 1 to n'
    )

  def take(score, _):
    row = jnp.argmax(score).astype(jnp.int32)
    return (score - rate**2 * similarity[row]).at[row].set(-jnp.inf), row

  return jax.lax.scan(take, rate * helpfulness, length=budget)[1]
