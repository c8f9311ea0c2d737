"""Importance of sources for retrieval: the expected utility of the top K, and its exact gradient.

A query retrieves a ranked list of sources r_1, r_2, ..., which would contribute u_1, u_2, ... (1 if
the answer from that source is right, say). Let every source be there with probability v, on its
own. The utility of what is there is the mean of u over the first K present ones (the sum divided by
K, even if fewer are there), and its expectation is

  F(v) = 1/K sum_i v_i u_i P(fewer than K of the sources before i are present)

With q_i[j] the probability that j < K of the first i are there, and d_i[j] what the i-th would add
to the rest of the list if j came before it,

  q_i[j] = q_{i-1}[j] + v_i (q_{i-1}[j-1] - q_{i-1}[j])           forwards
  d_i[j] = u_i / K + a_i[j+1] - a_i[j],   a_{i-1}[j] = a_i[j] + v_i d_i[j]     backwards
  dF/dv_i = sum_j q_{i-1}[j] d_i[j]

so that one scan each way gives F and all of its derivatives for M ranks in O(M K). Learned v near 0
marks a source that answers better be made without.

Source: Lyu et al., Improving Retrieval-Augmented Large Language Models via Data Importance Learning
(arXiv 2307.03027): the model and the learning loop. The recursion is derived; the official one
costs O(M (K^2 + K E)) for E different utilities, which it rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import check_positive


@functools.partial(jax.jit, static_argnames=('neighbors', 'chunk'))
def retrieval_gradient(
  presence: jax.Array,
  ids: jax.Array,
  utilities: jax.Array,
  neighbors: int,
  *,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """The expected utility of the top K, a mean over queries, and its derivative by every v.

  Args:
    presence: float[C], v of every source, in [0, 1].
    ids: int[N, M], ranked sources of each query, best first; -1 for nothing (a list that is
      shorter). A source may occur once in a list: twice, its derivatives are added up as if they
      were two sources that happen to have the same v.
    utilities: float[N, M]; what -1 has does not matter.
    neighbors: K >= 1, may be larger than M.
    chunk: queries at a time; memory is chunk * M * K.

  Returns:
    (F float[], dF/dv float[C]).

  Raises:
    ValueError: K < 1, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> ids, u = jnp.array([[0, 1]]), jnp.array([[0.0, 1.0]])
    >>> valuation.retrieval_gradient(jnp.array([0.5, 0.5]), ids, u, neighbors=1)
    (Array(0.25, dtype=float32), Array([-0.5,  0.5], dtype=float32))
  """
  _check(presence, ids, utilities, neighbors)
  dtype = jnp.promote_types(jnp.float32, presence.dtype)
  presence = presence.astype(dtype)
  number, ranks = ids.shape
  size = min(chunk, number)
  blocks = -(-number // size)
  short = ((0, blocks * size - number), (0, 0))
  # Beyond the end: rank -1, which has v = 0 and adds nothing.
  rows = jnp.pad(ids, short, constant_values=-1).reshape(blocks, size, ranks)
  worth = jnp.pad(utilities, short).reshape(blocks, size, ranks)

  def of_block(carry, block):
    total, gradient = carry
    own, u = (x.T for x in block)  # [M, Q]: a rank is a row, so that scans read it whole
    there = own >= 0
    v = jnp.where(there, presence.at[own].get(mode='clip'), 0)
    u = jnp.where(there, u.astype(dtype), 0) / neighbors

    def backwards(ahead, now):
      u, v = now
      beyond = jnp.concatenate([ahead[1:], jnp.zeros_like(ahead[:1])])  # K before it: all is full
      added = u + beyond - ahead
      return ahead + v * added, added

    def forwards(before, now):
      v, added = now
      slope = jnp.sum(before * added, axis=0)
      one_less = jnp.concatenate([jnp.zeros_like(before[:1]), before[:-1]])
      return before + v * (one_less - before), slope

    end = jnp.zeros((neighbors, size), dtype)
    whole, added = jax.lax.scan(backwards, end, (u, v), reverse=True)
    start = end.at[0].set(1)
    _, slopes = jax.lax.scan(forwards, start, (v, added))
    slopes = jnp.where(there, slopes, 0)
    gradient = gradient.at[jnp.where(there, own, presence.size)].add(slopes, mode='drop')
    return (total + jnp.sum(whole[0]), gradient), None

  start = jnp.zeros((), dtype), jnp.zeros(presence.size, dtype)
  (total, gradient), _ = jax.lax.scan(of_block, start, (rows, worth))
  return total / number, gradient / number


def expected_utility(presence: jax.Array, utilities: jax.Array, neighbors: int) -> jax.Array:
  """F of one ranked list, differentiable in every argument: a soft top-K.

  Args:
    presence: float[M], in [0, 1]; 0 for padding.
    utilities: float[M].
    neighbors: K >= 1.

  Returns:
    float[].

  Raises:
    ValueError: K < 1, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> valuation.expected_utility(jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0]), 1)
    Array(0.25, dtype=float32)
  """
  if neighbors < 1 or presence.ndim != 1 or presence.shape != utilities.shape:
    raise ValueError(
      f'presence has shape {presence.shape}, utilities {utilities.shape}, {neighbors=}; expected '
      '[M] twice and K of at least 1'
    )

  def step(before, now):
    v, u = now
    gain = v * u * jnp.sum(before) / neighbors
    one_less = jnp.concatenate([jnp.zeros_like(before[:1]), before[:-1]])
    return before + v * (one_less - before), gain

  start = jnp.zeros(neighbors, jnp.result_type(presence, utilities)).at[0].set(1)
  return jnp.sum(jax.lax.scan(step, start, (presence, utilities))[1])


def learn_importance(
  ids: jax.Array,
  utilities: jax.Array,
  sources: int,
  neighbors: int,
  *,
  rate: float,
  steps: int,
  groups: jax.Array | None = None,
  chunk: int = 128,
) -> jax.Array:
  """v by projected gradient ascent from 0.5: v <- clip(v + rate dF/dv, 0, 1).

  Args:
    ids, utilities, neighbors, chunk: as in `retrieval_gradient`.
    sources: C.
    rate: > 0. The gradient is a mean over queries, so for sources that occur in few of many it is
      small, and the rate large: 10 to 500 in the official code.
    steps: > 0.
    groups: int[C], sources that share one v (web pages of a domain), 0 .. G - 1: after each step v
      is replaced by its mean over the group. -1 is a group of its own.

  Returns:
    float32[C] in [0, 1]; 0.5 for a source that no query retrieves.

  Raises:
    IndexError: an id that is no source.
    ValueError: bad shapes or numbers, utilities that are not finite.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> ids, u = jnp.array([[0, 1], [0, 2]]), jnp.array([[0.0, 1.0], [0.0, 1.0]])
    >>> valuation.learn_importance(ids, u, 4, neighbors=1, rate=1.0, steps=5)
    Array([0. , 1. , 1. , 0.5], dtype=float32)

  Source: official code of Lyu et al. (package `ragbooster`).
  """
  return streamed_importance(
    lambda: [(ids, utilities)], sources, neighbors,
    rate=rate, steps=steps, groups=groups, chunk=chunk,
  )  # fmt: skip


def streamed_importance(
  read: Callable[[], Iterable[tuple[jax.Array, jax.Array]]],
  sources: int,
  neighbors: int,
  *,
  rate: float,
  steps: int,
  groups: jax.Array | None = None,
  chunk: int = 128,
) -> jax.Array:
  """`learn_importance` of queries in shards, of which one at a time is in memory.

  Args:
    read: () -> the shards (ids int[N_s, M_s], utilities float[N_s, M_s]), read once in every step.
      Each shape is compiled for, so let most shards have the same.
    sources, neighbors, rate, steps, groups, chunk: as there.

  Returns:
    float32[C] in [0, 1]; that of all shards together, but for rounding.

  Raises:
    IndexError: an id that is no source; names the shard.
    ValueError: no shards, bad shapes or numbers, utilities that are not finite.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> shards = [(jnp.array([[0, 1]]), jnp.array([[0.0, 1.0]])),
    ...           (jnp.array([[0, 2]]), jnp.array([[0.0, 1.0]]))]
    >>> valuation.streamed_importance(lambda: shards, 4, neighbors=1, rate=1.0, steps=5)
    Array([0. , 1. , 1. , 0.5], dtype=float32)

  Source: as `learn_importance`; a mean over queries is that of the shards' means, by their sizes.
  """
  check_positive(rate=rate, steps=steps, sources=sources, chunk=chunk)
  if groups is not None and groups.shape != (sources,):
    raise ValueError(f'groups have shape {groups.shape}; expected [{sources}], one for each source')
  presence = jnp.full(sources, 0.5, jnp.float32)
  for step in range(steps):
    total, queries = 0.0, 0
    for number, (ids, utilities) in enumerate(read()):
      ids, utilities = jnp.asarray(ids), jnp.asarray(utilities)
      if not step:
        presence = presence.astype(jnp.promote_types(presence.dtype, utilities.dtype))
        _check_shard(number, presence, ids, utilities, neighbors)
      _, gradient = retrieval_gradient(presence, ids, utilities, neighbors, chunk=chunk)
      total, queries = total + len(ids) * gradient, queries + len(ids)
    if not queries:
      raise ValueError('there are no queries: read() gives no shards')
    presence = _moved(presence, total / queries, rate, groups)
  return presence


def _check_shard(number: int, presence, ids, utilities, neighbors: int) -> None:
  _check(presence, ids, utilities, neighbors)
  sources = len(presence)
  if int(jnp.max(ids)) >= sources or int(jnp.min(ids)) < -1:
    raise IndexError(
      f'ids are {int(jnp.min(ids))} to {int(jnp.max(ids))}, but there are {sources} sources: 0 to '
      f'{sources - 1}, or -1 for none (shard {number})'
    )
  if not bool(jnp.all(jnp.isfinite(jnp.where(ids >= 0, utilities, 0)))):
    raise ValueError(f'utilities must be finite (shard {number})')


@jax.jit
def _moved(presence, gradient, rate, groups):
  presence = jnp.clip(presence + rate * gradient, 0, 1)
  return presence if groups is None else group_means(presence, groups)


def group_means(values: jax.Array, groups: jax.Array) -> jax.Array:
  """Every value replaced by the mean of its group; -1 keeps its own.

  Args:
    values: float[C].
    groups: int[C], below C.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> valuation.group_means(jnp.array([0.0, 1.0, 3.0]), jnp.array([0, 0, -1]))
    Array([0.5, 0.5, 3. ], dtype=float32)
  """
  into = jnp.where(groups >= 0, groups, values.size)
  sums, counts = (
    jnp.zeros(values.size, values.dtype).at[into].add(x, mode='drop')
    for x in (values, jnp.ones_like(values))
  )
  return jnp.where(groups >= 0, masked.divide(sums, counts)[groups], values)


def ranks_needed(
  presence: jax.Array, ids: jax.Array, neighbors: int, *, error: float, utility: float = 1.0
) -> jax.Array:
  """How many ranks of each list matter: beyond, every derivative is at most `error`.

  At rank i the derivative is at most 2 max|u| / K times the probability that fewer than K of the
  sources before it are there, which is what this sums up, exactly.

  Args:
    presence: float[C].
    ids: int[N, M], -1 for nothing.
    neighbors: K.
    error: > 0, allowed for a single query's derivative.
    utility: max |u|.

  Returns:
    int32[N], 0 .. M. Cut all lists to the largest of them. The ranks are right for this v: as v
    falls, more of them count.

  Raises:
    ValueError: bad shapes or numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> ids = jnp.arange(100)[None]
    >>> valuation.ranks_needed(jnp.full(100, 0.5), ids, 10, error=1e-3)
    Array([34], dtype=int32)

  Provenance: ours; the paper bounds the same tail by Chernoff.
  """
  check_positive(error=error, utility=utility)
  _check(presence, ids, ids, neighbors)
  v = jnp.where(ids >= 0, presence.at[ids].get(mode='clip'), 0).T

  def step(before, v):
    matters = 2 * utility / neighbors * jnp.sum(before, axis=0) > error
    one_less = jnp.concatenate([jnp.zeros_like(before[:1]), before[:-1]])
    return before + v * (one_less - before), matters

  start = jnp.zeros((neighbors, ids.shape[0]), v.dtype).at[0].set(1)
  return jnp.sum(jax.lax.scan(step, start, v)[1], axis=0).astype(jnp.int32)


def kept_sources(presence: np.ndarray, counts: np.ndarray, drop: float) -> np.ndarray:
  """Without the least important sources that together are a share `drop` of what is retrieved.

  Args:
    presence: float[C], learned v.
    counts: int[C], how often each source is retrieved.
    drop: in [0, 1); chosen on validation data.

  Returns:
    bool[C]. Sources of the same v go in order of their number.

  Raises:
    ValueError: shapes that do not match, a share outside [0, 1).

  Example:
    >>> import numpy as np
    >>> from jaxrw import valuation
    >>> valuation.kept_sources(np.array([0.9, 0.1, 0.5]), np.array([5, 3, 2]), drop=0.5)
    array([ True, False, False])

  Source: official experiments of Lyu et al.
  """
  presence, counts = np.asarray(presence), np.asarray(counts)
  if presence.ndim != 1 or presence.shape != counts.shape or not 0 <= drop < 1:
    raise ValueError(
      f'presence has shape {presence.shape}, counts {counts.shape}, drop={drop}; expected '
      '[C] twice and a share in [0, 1)'
    )
  order = np.argsort(presence, kind='stable')
  gone = np.cumsum(counts[order]) <= drop * counts.sum() * (1 + 1e-12)
  kept = np.ones(len(presence), bool)
  kept[order[gone & (drop > 0)]] = False
  return kept


def _check(presence, ids, utilities, neighbors) -> None:
  if presence.ndim != 1 or ids.ndim != 2 or not ids.size or ids.shape != utilities.shape:
    raise ValueError(
      f'presence has shape {presence.shape}, ids {ids.shape}, utilities {utilities.shape}; '
      'expected [C], [N, M] and [N, M], not empty'
    )
  if neighbors < 1:
    raise ValueError(f'neighbors={neighbors} must be at least 1')
