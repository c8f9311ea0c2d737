"""What the weights are doing: how uneven, and on which groups; and what mean a loop really takes.

`summarize` and `group_sums` return sums or ratios of sums over the whole batch and work on sharded
arrays. `explain_reduction` runs on the host, once, before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked


class WeightSummary(NamedTuple):
  """How uneven weights are, over the examples.

  Attributes:
    effective_fraction: effective sample size over the number of examples, in (0, 1]; 1 for uniform
      weights.
    entropy: entropy of the examples' shares over its maximum log n, in [0, 1]; 1 for uniform
      weights on examples of equal base (it sees an uneven base, as `max_share` does).
    max_share: largest share of one example in the step, in (0, 1].
  """

  effective_fraction: jax.Array
  entropy: jax.Array
  max_share: jax.Array


def summarize(weights: jax.Array, base: jax.Array | None = None) -> WeightSummary:
  """Effective sample size, entropy and top share of weights.

  With shares p = base w / sum(base w) over the n examples of non-zero base:
  effective_fraction = (sum base w)^2 / (sum base * sum base w^2), entropy = -sum p log p / log n,
  max_share = max p.

  Args:
    weights: float[B] or float[B, T], non-negative.
    base: float, same shape. Default: ones.

  Returns:
    WeightSummary of float32[]; all zero for an all-masked batch, entropy 1 for a single example.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> summary = jaxrw.diagnostics.summarize(jnp.array([2.0, 2.0, 0.0, 0.0]))
    >>> [round(float(x), 3) for x in summary]
    [0.5, 0.5, 0.5]

  Source: Kish's effective sample size.
  """
  base = jnp.ones_like(weights) if base is None else base
  w, b = masked.example_level(weights, base)  # the base-mean of an example's weights, and its base
  mass = jnp.where(b > 0, b * w, 0)
  sums = jnp.sum(jnp.stack([b, mass, jnp.where(b > 0, mass * w, 0), b > 0]), axis=1)
  total_base, total_mass, total_square, count = sums
  shares = masked.divide(mass, total_mass)
  entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0))
  return WeightSummary(
    effective_fraction=masked.divide(total_mass**2, total_base * total_square),
    entropy=jnp.where(count > 1, masked.divide(entropy, jnp.log(count)), count),
    max_share=jnp.max(shares),
  )


def group_sums(values: jax.Array, group_ids: jax.Array, num_groups: int) -> jax.Array:
  """Sums of the columns of `values` over the examples of each group.

  Args:
    values: float[B, C], already multiplied by base.
    group_ids: int[B]; an id outside 0 .. num_groups - 1 (-1: unknown) belongs to no group. Or
      float[B, G], how far each example belongs to each group.
    num_groups: G.

  Returns:
    float[G, C]. One collective on a sharded batch, for all groups and columns.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.diagnostics.group_sums(jnp.array([[1.0], [2.0], [4.0]]), jnp.array([1, 0, 1]), 2)
    Array([[2.],
           [5.]], dtype=float32)
  """
  member = masked.membership(group_ids, num_groups)[:, :, None].astype(values.dtype)
  values = values[:, None, :]
  return jnp.sum(jnp.where((member != 0) & (values != 0), member * values, 0), axis=0)


def equity_scaled(
  performance: jax.Array,
  group_performance: jax.Array,
  present: jax.Array | None = None,
  alpha: float = 1.0,
) -> jax.Array:
  """performance / (1 + alpha * sum over groups of |group's - overall performance|).

  Args:
    performance: float[], higher is better: accuracy, Dice, ...
    group_performance: float[G], the same of each group.
    present: bool[G], groups that were measured; the others have no part. Default: all.
    alpha: price of inequality, >= 0. 0 is the performance itself.

  Returns:
    float32[], at most the performance.

  Raises:
    ValueError: a negative alpha, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> round(float(jaxrw.diagnostics.equity_scaled(0.9, jnp.array([0.95, 0.8]))), 4)
    0.7826

  Source: official code of FairSeg, ICLR 2024 (arXiv 2311.02189); its first version divided by 1 +
    the groups' standard deviation.
  """
  group_performance = jnp.asarray(group_performance)
  present = jnp.ones(group_performance.shape, bool) if present is None else jnp.asarray(present)
  if not alpha >= 0 or group_performance.ndim != 1 or present.shape != group_performance.shape:
    raise ValueError(
      f'alpha={alpha} must be at least 0, group_performance {group_performance.shape} and present '
      f'{present.shape} both [G]'
    )
  gaps = jnp.where(present, jnp.abs(group_performance - performance), 0)
  return performance / (1 + alpha * jnp.sum(gaps))


# Which mean does a loop take? ---------------------------------------------------------------------

_TOLERANCE = 5e-3  # of the largest coefficient; sums in 16 bits pass


class Reduction(NamedTuple):
  """How a training loop turns token losses into one loss; `print` it.

  Attributes:
    name: 'token mean', 'sequence mean', 'sum', 'sum / sequences', 'sum / positions' (padding adds
      nothing, but is counted), 'position mean' (padding is trained on); or 'unknown'.
    scope: 'over the global batch', or the parts that are reduced one by one and how these are
      combined: 'per microbatch of consecutive rows, averaged over 4'. Interleaved means that row i
      is in microbatch i mod M.
    scale: what the loop multiplies that by; 1 unless a constant is left over (a loss scale).
    also: other conventions that are the same thing on batches like this one.
    nearest: the nearest convention, if the name is 'unknown'; else ''.
    factors: {other convention: (lowest, highest)}, what to multiply the coefficients of valid
      tokens by to get that one. Where both are equal it is one number, for the loss or the learning
      rate; elsewhere no number will do: it must be reduced another way.
    coefficients: float64[B, T], the derivative of the loop's loss by each token's.
    base: float32[B, T], 1 for a valid token and 0 for padding, as the loop was given it.
  """

  name: str
  scope: str
  scale: float
  also: tuple[str, ...]
  nearest: str
  factors: Mapping[str, tuple[float, float]]
  coefficients: np.ndarray
  base: np.ndarray

  def __str__(self) -> str:
    if self.name == 'unknown':
      lines = [f'your loop: none of the known reductions; the nearest is {self.nearest}']
    else:
      scale = '' if self.scale == 1 else f'{self.scale:.4g} x '
      lines = [f'your loop: {scale}{self.name} {self.scope}']
      lines += [f'  which here is the same as {other}' for other in self.also]
    valid, padding = self.coefficients[self.base > 0], self.coefficients[self.base == 0]
    lines.append(f'coefficients of valid tokens: {valid.min():.4g} to {valid.max():.4g}')
    if np.any(np.abs(padding) > _TOLERANCE * np.abs(valid).max()):
      lines.append(
        f'of padding: {padding.min():.4g} to {padding.max():.4g}; multiply the losses by base'
      )
    lines.append('to get another one, multiply by')
    width = max(map(len, self.factors))
    for label, (low, high) in self.factors.items():
      text = f'{low:.4g}' if _same(low, high) else f'{low:.4g} to {high:.4g}, by token: no constant'
      lines.append(f'  {label:<{width}}  {text}')
    return '\n'.join(lines)


def explain_reduction(
  loop: Callable[..., jax.Array] | None = None,
  *,
  reduce: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  batch: int = 16,
  length: int = 32,
  microbatches: int = 1,
  shards: int = 1,
) -> Reduction:
  """Names the mean that a training loop takes of its token losses, and the factors to the others.

  The loop is run on a probe whose parameters *are* the token losses, so that its gradient is the
  coefficient of each token, exactly, however the loop accumulates, shards or compiles:

    coefficient[i, t] = d loss / d token_loss[i, t]

  Compared with token mean, sequence mean, sum, sum / sequences, sum / positions and position mean,
  over the global batch or per microbatch, device or both, then averaged or summed.

  Args:
    loop: (token_losses, params, batch) -> gradient, the loop on the probe. `token_losses(params,
      batch)` returns float32[b, T] for any b rows of the batch, in any order; `params` is
      float32[B, T]; `batch` holds `row` int32[B] and `base` float32[B, T] (uneven lengths, padding
      at the end). The gradient has the shape of `params`, before clipping or a preconditioner; of
      a whole optimizer step with sgd(1), return params - new_params. All losses are 1, so that
      weights that compare losses are neutral.
    reduce: instead of a loop, (losses [B, T], base [B, T]) -> scalar.
    batch: B, a multiple of microbatches * shards.
    length: T.
    microbatches: how many the loop accumulates over.
    shards: how many devices it cuts the rows over.

  Returns:
    Reduction; `print(...)` of it is a report.

  Raises:
    ValueError: sizes that do not divide, or a gradient that is not finite or of another shape.

  Example:
    >>> import jax, jax.numpy as jnp, jaxrw
    >>> def loop(token_losses, params, batch):  # two microbatches, a token mean of each
    ...   def loss(params, rows):
    ...     base = batch['base'][rows]
    ...     return jnp.sum(base * token_losses(params, {'row': rows})) / jnp.sum(base)
    ...   first, second = batch['row'][:8], batch['row'][8:]
    ...   return (jax.grad(loss)(params, first) + jax.grad(loss)(params, second)) / 2
    >>> found = jaxrw.diagnostics.explain_reduction(loop, microbatches=2)
    >>> print(found.name, found.scope)
    token mean per microbatch of consecutive rows, averaged over 2
  """
  if min(batch, microbatches, shards, length - 1) < 1 or batch % (microbatches * shards):
    raise ValueError(
      f'batch={batch} rows of length={length} do not split into microbatches={microbatches} times '
      f'shards={shards}: use a multiple, and a length of at least 2'
    )
  rows = jnp.arange(batch, dtype=jnp.int32)
  base = _uneven_base(batch, length)
  probe = {'row': rows, 'base': jnp.asarray(base)}
  params = jnp.ones((batch, length))

  def token_losses(params, batch):
    # A product instead of a lookup: that works in meshes with Explicit axes as well.
    return jnp.matmul(batch['row'][:, None] == rows, params, precision='highest')

  if loop is not None and reduce is None:
    gradient = loop(token_losses, params, probe)
  elif reduce is not None and loop is None:
    gradient = jax.grad(lambda p: reduce(token_losses(p, probe), probe['base']))(params)
  else:
    raise ValueError('give either a loop or reduce=')
  found = np.asarray(gradient, np.float64)
  if found.shape != base.shape or not np.all(np.isfinite(found)):
    raise ValueError(
      f'the loop returned a gradient of shape {found.shape}, expected finite values {base.shape}: '
      'return the gradient by params, or params - new_params of a step with sgd(1)'
    )
  return _explain(found, base, _conventions(base, microbatches, shards))


def _explain(
  found: np.ndarray, base: np.ndarray, conventions: Mapping[tuple[str, str], np.ndarray]
) -> Reduction:
  labels = {key: ' '.join(key) for key in conventions}
  distance = lambda c: float(np.max(np.abs(found - c)) / np.max(np.abs(c)))
  best_scale = lambda c: float(np.sum(found * c) / np.sum(c * c)) or 1.0
  plain = {key: distance(c) for key, c in conventions.items()}
  scaled = {key: distance(best_scale(c) * c) for key, c in conventions.items()}
  near = min(scaled, key=scaled.__getitem__)
  scale, exact, nearest = best_scale(conventions[near]), [], ''
  if min(plain.values()) < _TOLERANCE:
    # All that are the same thing on this batch, the plainest name first.
    exact = [key for key in plain if plain[key] <= min(plain.values()) + 1e-6]
    (name, scope), scale = exact[0], 1.0
  elif scaled[near] < _TOLERANCE:
    name, scope = near
  else:
    name, scope = 'unknown', ''
    nearest = labels[near] if _same(scale, 1.0) else f'{scale:.4g} x {labels[near]}'
  factors, seen = {}, []
  for key, c in conventions.items():
    # What is summed instead of averaged is a constant away, and so not worth a line each.
    if 'summed' in key[1] or key in exact or any(np.allclose(c, other) for other in seen):
      continue
    seen.append(c)
    with np.errstate(divide='ignore'):
      ratio = c[base > 0] / found[base > 0]
    factors[labels[key]] = float(ratio.min()), float(ratio.max())
  also = tuple(labels[key] for key in exact[1:])
  return Reduction(name, scope, scale, also, nearest, factors, found, base)


def _same(low: float, high: float) -> bool:
  return abs(high - low) <= _TOLERANCE * abs(high)


def _uneven_base(rows: int, length: int) -> np.ndarray:
  """float32[rows, length]: rows of 1 to `length` valid tokens, in no order."""
  lengths = 1 + np.random.default_rng(0).permutation(rows) * (length - 1) // rows
  return (np.arange(length) < lengths[:, None]).astype(np.float32)


def _conventions(
  base: np.ndarray, microbatches: int, shards: int
) -> dict[tuple[str, str], np.ndarray]:
  """{(name, scope): coefficients [B, T]}, the plainest names first."""
  found = {(name, 'over the global batch'): c for name, c in _means(base).items()}
  for part, ids in _partitions(len(base), microbatches, shards):
    count = len(set(ids.tolist()))
    for name in _means(base):
      whole = np.zeros_like(base, np.float64)
      for i in range(count):
        whole[ids == i] = _means(base[ids == i])[name]
      found[name, f'per {part}, averaged over {count}'] = whole / count
      found[name, f'per {part}, summed over {count}'] = whole
  return found


def _means(base: np.ndarray) -> dict[str, np.ndarray]:
  """Coefficients of each way to reduce some rows, float64 of the shape of `base` [b, T]."""
  base = base.astype(np.float64)
  rows, lengths = len(base), base.sum(axis=1, keepdims=True)
  return {
    'token mean': base / base.sum(),
    'sequence mean': base / lengths / rows,
    'sum': base,
    'sum / sequences': base / rows,
    'sum / positions': base / base.size,
    'position mean': np.ones_like(base) / base.size,
  }


def _partitions(rows: int, microbatches: int, shards: int) -> Iterator[tuple[str, np.ndarray]]:
  """(what a part is, the part of each row) for the ways in which loops cut a batch."""
  i, m, s = np.arange(rows), microbatches, shards
  device = i // (rows // s)  # the rows of one device after the other
  if m > 1:
    yield 'microbatch of consecutive rows', i // (rows // m)
    yield 'interleaved microbatch', i % m
  if s > 1:
    yield 'device of consecutive rows', device
  if m > 1 and s > 1:
    yield 'microbatch of consecutive rows of each device', i % (rows // s) // (rows // (m * s))
    yield 'device that holds a share of each microbatch', i % (rows // m) // (rows // (m * s))
    yield 'microbatch and device, consecutive rows', i // (rows // (m * s))
    yield 'interleaved microbatch and device', device * m + i % m
