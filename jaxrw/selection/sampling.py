"""Selection by chance, the same on every mesh: an example's noise hangs on its id, not its place.

gumbel_top_k       k of N without replacement, in proportion to weights
stochastic_round   whole repeat counts with a given mean
noisy_threshold    keep above a random threshold (the rule of GPT-3's quality filter)
soft_dedup         the weight 1 / size of the cluster of duplicates
rs2                a new random subset every round: the baseline that others must beat
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw.core import check_positive, check_range
from jaxrw.selection.keep import _check_budget, _checked, _ranks


def gumbel_top_k(
  key: jax.Array,
  log_weights: jax.Array,
  budget: int,
  *,
  temperature: float | jax.Array = 1.0,
  example_ids: jax.Array | None = None,
  valid: jax.Array | None = None,
) -> jax.Array:
  """`budget` examples without replacement, one by one in proportion to w^(1 / temperature).

  Keeps the largest log_w / temperature + Gumbel noise, which is that sampling (Plackett-Luce).

  Args:
    key: with an example's id it gives the noise of the example.
    log_weights: float[N]; -inf is taken only when nothing else is left.
    budget: examples to keep.
    temperature: >= 0. 0 is plain top-k, inf ignores the weights.
    example_ids: int[N], or uint32[N, 2] (high, low). Default: positions. With ids of the whole
      corpus, the top of the shards' tops is the top of the whole.
    valid: bool[N], False for padding.

  Returns:
    bool[N].

  Raises:
    ValueError: a budget above the number of examples, a concrete NaN, a negative temperature.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import selection
    >>> log_w = jnp.array([5.0, 0.0, 6.0, -50.0])
    >>> selection.gumbel_top_k(jax.random.key(0), log_w, 2, temperature=0.01)
    Array([ True, False,  True, False], dtype=bool)

  Source: Yellott, 1977; Kool et al., ICML 2019. MATES' code keeps the smallest of -log w + noise,
    which is another distribution.
  """
  log_weights, valid = _checked(log_weights, valid)
  _check_budget(budget, 0, valid)
  noisy = perturbed(key, log_weights, temperature=temperature, example_ids=example_ids)
  return (_ranks(-noisy, valid) < budget) & valid


def perturbed(
  key: jax.Array,
  log_weights: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  example_ids: jax.Array | None = None,
) -> jax.Array:
  """log_w / temperature + Gumbel noise, whose largest entries are the sample: for merging shards.

  Args:
    key, log_weights, temperature, example_ids: as in `gumbel_top_k`; at temperature 0 plain log_w.

  Returns:
    float[N].

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import selection
    >>> key, log_w, ids = jax.random.key(0), jnp.zeros(4), jnp.arange(4)
    >>> whole = selection.perturbed(key, log_w)
    >>> half = selection.perturbed(key, log_w[2:], example_ids=ids[2:])
    >>> bool((whole[2:] == half).all())
    True
  """
  if isinstance(temperature, (int, float)) and not temperature >= 0:
    raise ValueError(f'temperature={temperature} must be at least 0')
  if isinstance(temperature, (int, float)) and temperature == 0:
    return log_weights
  ids = jnp.arange(len(log_weights)) if example_ids is None else example_ids
  if ids.shape[:1] != log_weights.shape or ids.ndim > 2 or ids.shape[1:] not in ((), (2,)):
    raise ValueError(f'example_ids have shape {ids.shape}; expected [N] or [N, 2] of N weights')
  dtype = jnp.promote_types(jnp.float32, log_weights.dtype)

  def noise(identity):
    own = key
    for part in identity.reshape(-1):
      own = jax.random.fold_in(own, part)
    return jax.random.gumbel(own, dtype=dtype)

  return log_weights / temperature + jax.vmap(noise)(ids)


def stochastic_round(key: jax.Array, weights: jax.Array) -> jax.Array:
  """Whole numbers with the weights as their means: floor, or one more by chance.

  Args:
    key: draws.
    weights: float[N], >= 0: how often an example should occur on average.

  Returns:
    int32[N], within 1 of the weights.

  Raises:
    ValueError: a concrete weight below 0 or NaN.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import selection
    >>> selection.stochastic_round(jax.random.key(0), jnp.array([2.0, 0.0, 1.0]))
    Array([2, 0, 1], dtype=int32)

  Source: textbook form.
  """
  if not isinstance(weights, jax.core.Tracer) and not bool(jnp.all(weights >= 0)):
    raise ValueError('weights must be at least 0 and not NaN')
  whole = jnp.floor(weights)
  more = jax.random.uniform(key, weights.shape) < weights - whole
  return whole.astype(jnp.int32) + more


def noisy_threshold(key: jax.Array, quality: jax.Array, alpha: float = 9.0) -> jax.Array:
  """quality > 1 - X, X drawn from a Lomax distribution of shape alpha: some of the low ones pass.

  P(kept | quality) = (2 - quality)^(-alpha).

  Args:
    key: draws.
    quality: float[N], in [0, 1], of a classifier.
    alpha: > 0; larger keeps less of what is not near 1.

  Returns:
    bool[N].

  Raises:
    ValueError: alpha <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import selection
    >>> kept = selection.noisy_threshold(jax.random.key(0), jnp.full(10_000, 0.9))
    >>> round(float(kept.mean()), 1), round(1.1**-9, 1)
    (0.4, 0.4)

  Source: Brown et al., GPT-3, NeurIPS 2020, appendix A (numpy's `pareto(9)`, which is Lomax), as
    recalled.
  """
  check_positive(alpha=alpha)
  uniform = jax.random.uniform(key, quality.shape, minval=jnp.finfo(jnp.float32).tiny)
  return quality > 1 - (uniform ** (-1 / alpha) - 1)


def soft_dedup(cluster_ids: jax.Array, num_clusters: int) -> jax.Array:
  """1 / size of the example's cluster: duplicates count as one; 1 for the cluster -1 (alone).

  Args:
    cluster_ids: int[N], from a deduplication tool; -1 for what has no duplicate.
    num_clusters: number of clusters.

  Returns:
    float32[N], absolute weights: sum = number of clusters + number of -1.

  Raises:
    IndexError: a concrete id out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> selection.soft_dedup(jnp.array([0, 0, 1, -1]), 2)
    Array([0.5, 0.5, 1. , 1. ], dtype=float32)

  Source: textbook form.
  """
  check_range(cluster_ids, num_clusters, 'cluster_ids')
  known = cluster_ids >= 0
  sizes = jnp.bincount(jnp.where(known, cluster_ids, num_clusters), length=num_clusters + 1)
  return jnp.where(known, 1 / jnp.maximum(sizes[cluster_ids], 1), 1).astype(jnp.float32)


def rs2(
  key: jax.Array, round_: int | jax.Array, size: int, budget: int, *, replacement: bool = False
) -> jax.Array:
  """The examples of one round of repeated random sampling (RS2), a function of key and round.

  Without replacement a cycle of floor(size / budget) rounds deals out a permutation of all examples
  (what is left over at its end waits for the next cycle), so that training with it *is* ordinary
  training on all data, stopped early, with the schedule compressed to that length: the control for
  every selection that claims to save steps.

  Args:
    key: the same in all rounds.
    round_: counts from 0.
    size: N.
    budget: k, examples of a round, 1 .. N.
    replacement: a fresh subset every round, so that an example may wait long; within a round none
      occurs twice.

  Returns:
    int32[k], in random order.

  Raises:
    ValueError: a budget outside 1 .. N.

  Example:
    >>> import jax
    >>> from jaxrw import selection
    >>> rounds = [selection.rs2(jax.random.key(0), t, 6, 2) for t in range(3)]
    >>> sorted(int(i) for rows in rounds for i in rows)
    [0, 1, 2, 3, 4, 5]

  Source: Okanovic et al., Repeated Random Sampling, ICLR 2024; its code wraps around within a
    permutation, so that an example may occur twice in a cycle.
  """
  if not 1 <= budget <= size:
    raise ValueError(f'budget={budget} must be between 1 and {size}, the examples there are')
  rounds = 1 if replacement else size // budget
  cycle, place = round_ // rounds, round_ % rounds
  dealt = jax.random.permutation(jax.random.fold_in(key, cycle), size)
  return jax.lax.dynamic_slice_in_dim(dealt, place * budget, budget)
