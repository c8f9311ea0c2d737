"""A bandit over clusters: sample where the reward was high, or where little is known (Quad).

  score_c = S_c / n_c + alpha sqrt(2 log(sum n) / (n_c + 1))

Each visit of a cluster adds its reward to S and 1 to n; through `neighbors` it counts for similar
clusters, too, by as much as they are similar. A reward is the mean influence of a few of its
documents, less the threshold from which on a cluster is worth taking.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import masked


class ClusterBandit(NamedTuple):
  """total float32[C] (S), visits float32[C] (n), exhausted bool[C]."""

  total: jax.Array
  visits: jax.Array
  exhausted: jax.Array


def cluster_bandit(clusters: int) -> ClusterBandit:
  """A bandit that has not visited anything."""
  if clusters < 1:
    raise ValueError(f'clusters={clusters} must be at least 1')
  return ClusterBandit(jnp.zeros(clusters), jnp.zeros(clusters), jnp.zeros(clusters, bool))


def bandit_scores(state: ClusterBandit, alpha: float | jax.Array) -> jax.Array:
  """Upper confidence bounds, float32[C]; -inf for an exhausted cluster.

  Args:
    state: of the bandit.
    alpha: >= 0, in the unit of the rewards: 0 goes by the means alone, a large one takes turns.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> state = selection.cluster_bandit(2)
    >>> state = selection.bandit_update(state, jnp.array([0, 1]), jnp.array([1.0, 3.0]))
    >>> [round(float(s), 3) for s in selection.bandit_scores(state, alpha=0.5)]
    [1.416, 3.416]

  Source: official code of Quad, ICLR 2025 (arXiv 2409.16986).
  """
  mean = masked.divide(state.total, state.visits)
  # Before any visit there is no logarithm: all clusters are alike.
  spread = jnp.sqrt(2 * jnp.log(jnp.maximum(jnp.sum(state.visits), 1)) / (state.visits + 1))
  return jnp.where(state.exhausted, -jnp.inf, mean + alpha * spread)


def bandit_pick(state: ClusterBandit, alpha: float | jax.Array, number: int) -> jax.Array:
  """The clusters with the highest scores, int32[number]; ties by position.

  Args:
    state: of the bandit.
    alpha: as in `bandit_scores`.
    number: of clusters, 1 .. C. If fewer are left, exhausted ones fill up the end.

  Example:
    >>> from jaxrw import selection
    >>> selection.bandit_pick(selection.cluster_bandit(5), 1.0, 2)
    Array([0, 1], dtype=int32)
  """
  if not 1 <= number <= state.total.size:
    raise ValueError(f'number={number} must be between 1 and {state.total.size}, the clusters')
  return jax.lax.top_k(bandit_scores(state, alpha), number)[1]


def bandit_update(
  state: ClusterBandit,
  clusters: jax.Array,
  rewards: jax.Array,
  neighbors: jax.Array | None = None,
) -> ClusterBandit:
  """The bandit after visits.

  Args:
    state: of the bandit.
    clusters: int[M], visited; one may occur several times.
    rewards: float[M].
    neighbors: float[C, C], how much a visit of row c says about each cluster, 1 on the diagonal;
      Quad takes max(0, 1 - distance / 0.2). Default: only about itself.

  Returns:
    The new state; `exhausted` is the caller's: `state._replace(exhausted=...)`.

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> near = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    >>> state = selection.cluster_bandit(2)
    >>> selection.bandit_update(state, jnp.array([0]), jnp.array([4.0]), near).total
    Array([4., 2.], dtype=float32)

  Source: official code of Quad, where n counts a neighbor in full, whatever its weight.
  """
  number = state.total.size
  if clusters.shape != rewards.shape or clusters.ndim != 1:
    raise ValueError(f'clusters have shape {clusters.shape}, rewards {rewards.shape}: [M] and [M]')
  if neighbors is not None and neighbors.shape != (number, number):
    raise ValueError(f'neighbors have shape {neighbors.shape}; expected [{number}, {number}]')
  near = jax.nn.one_hot(clusters, number) if neighbors is None else neighbors[clusters]
  total = state.total + rewards @ near
  return state._replace(total=total, visits=state.visits + jnp.sum(near > 0, axis=0))
