"""Mixtures from a swarm: train small models on random mixtures, fit a law, minimize the law.

  swarm    K mixtures around a prior, each trained on: losses[k, i] of validation domain i
  law      f_i(p) = exp(c_i) + exp(<t_i, p>)
  answer   min over p of  sum_i w_i f_i(p) + strength KL(p || prior),  p on the simplex, p <= caps

The law has G + 1 parameters for each loss, so a swarm of a few times G runs can do. Its second term
is convex in p, and so is the problem: there is one answer. Repetition is no part of the law; keep
the small runs' number of epochs equal to the large run's (`repetition_subsample`), and say in the
caps what the data can bear.

Mixtures are sampled and the problem is solved on the host; the fit, and what measures it
(`spearman`, `decision_accuracy`), run under jit, too.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrw import masked
from jaxrw.core import check_positive
from jaxrw.mixtures._minimize import minimize
from jaxrw.mixtures._simplex import Vector, nonnegative, normalized, on_simplex

_STRENGTHS = 15
_BLOCK = 1024  # candidates at a time; another number would give other mixtures for the same key
_MAX_BLOCKS = 2000
_MAX_IN_VAIN = 100
_BARRIER = 1e-12  # relative to the objective, when the answer is taken
_MAX_BARRIERS = 50


class MixingLaw(NamedTuple):
  """f_i(p) = exp(log_floor_i) + exp(<slopes_i, p>), of n losses over G domains."""

  log_floor: jax.Array  # float32[n], c
  slopes: jax.Array  # float32[n, G], t


def sample_mixtures(
  key: jax.Array,
  prior: Vector,
  count: int,
  *,
  min_strength: float = 0.1,
  max_strength: float = 5.0,
  temperature: float = 0.5,
  min_share: float = 2e-4,
  max_ratio: float = 15.0,
) -> np.ndarray:
  """Different mixtures around a prior, from nearly pure to nearly the prior: RegMix's swarm.

    p ~ Dirichlet(s prior^temperature / Z), s one of 15 from min_strength to max_strength

  Shares below min_share become 0 and p is normalized; then p is kept if p <= max_ratio prior, and
  if no mixture before it is the same in units of min_share. A longer list for the same key begins
  with the shorter one.

  Args:
    key: PRNG key; it seeds a generator on the host.
    prior: float[G], sizes of the domains or their shares. A domain of prior 0 gets nothing.
    count: how many.
    min_strength, max_strength: ends of the 15 strengths, spaced geometrically. A weak one gives
      mixtures of few domains.
    temperature: exponent of the prior in [0, 1]; 1 keeps it, 0 is uniform.
    min_share: in [0, 1), below which a small model would hardly see the domain.
    max_ratio: > 1, the largest share in units of the prior's: in a run over as many tokens as there
      are, the most epochs. inf: no limit.

  Returns:
    float32[count, G] on the host, rows on the simplex.

  Raises:
    ValueError: arguments out of range; too few such mixtures among many candidates.

  Example:
    >>> swarm = sample_mixtures(jax.random.key(0), [0.6, 0.3, 0.1], 4, max_ratio=2.0)
    >>> swarm.shape, bool((swarm[:, 2] <= 0.2).all())
    ((4, 3), True)

  Source: RegMix, ICLR 2025 (arXiv 2407.01492). Provenance: official_code for the distribution;
    there the limit is applied before small shares are dropped, shares are rounded, and the mixtures
    are drawn from a hundred times as many.
  """
  check_positive(min_strength=min_strength, max_strength=max_strength)
  if not min_strength <= max_strength < np.inf:
    raise ValueError(f'min_strength={min_strength} must be at most max_strength={max_strength}')
  if not 0 <= temperature <= 1 or not 0 <= min_share < 1 or not max_ratio > 1 or count < 1:
    raise ValueError(
      f'temperature={temperature} must be in [0, 1], min_share={min_share} in [0, 1), '
      f'max_ratio={max_ratio} above 1 and count={count} at least 1'
    )
  prior = np.asarray(normalized(prior, 'prior'), np.float64)
  used = np.flatnonzero(prior)
  tempered = prior[used] ** temperature
  strengths = np.geomspace(min_strength, max_strength, _STRENGTHS)
  with np.errstate(over='ignore'):
    limit = np.float32(max_ratio * prior[used])

  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  found: dict[bytes, np.ndarray] = {}
  blocks_in_vain = 0
  for _ in range(_MAX_BLOCKS):
    before = len(found)
    draws = _draw(rng, np.outer(strengths, tempered / tempered.sum()))
    draws[draws < min_share] = 0
    draws = (draws / np.maximum(draws.sum(1, keepdims=True), 1e-30)).astype(np.float32)
    # A large min_share may leave nothing of a draw.
    fits = np.all(draws <= limit, axis=1) & draws.any(axis=1)
    for mixture in draws[fits]:
      found.setdefault(np.rint(mixture / max(min_share, 1e-6)).tobytes(), mixture)
      if len(found) == count:
        swarm = np.zeros((count, prior.size), np.float32)
        swarm[:, used] = np.stack(list(found.values()))
        return swarm
    blocks_in_vain = blocks_in_vain + 1 if len(found) == before else 0
    if blocks_in_vain == _MAX_IN_VAIN:
      break
  raise ValueError(
    f'found only {len(found)} of count={count} different mixtures: raise max_ratio={max_ratio} or '
    f'max_strength={max_strength}, or lower min_share={min_share}'
  )


def _draw(rng, alphas):
  """float64[_BLOCK, G]: each from one of the Dirichlet distributions, chosen at random."""
  rows = rng.integers(len(alphas), size=_BLOCK)
  draws = np.empty((_BLOCK, alphas.shape[1]))
  for row, alpha in enumerate(alphas):
    draws[rows == row] = rng.dirichlet(alpha, np.sum(rows == row))
  return draws


def fit_mixing_law(
  mixtures: Any,
  losses: Any,
  *,
  starts: int = 6,
  delta: float = 0.02,
  steps: int = 100,
) -> MixingLaw:
  """Fits f_i(p) = exp(c_i) + exp(<t_i, p>) to every column of losses, by its mean Huber loss.

  For a given floor, log(loss - floor) is linear in p. So each start is a floor between 0 and the
  column's least loss with its weighted least squares, from which L-BFGS goes on; the best is taken.

  A domain that no mixture has gets the mean slope, which is a guess. Raising all slopes of a loss
  and lowering its floor can have hardly any effect, so compare predictions, not parameters.

  Args:
    mixtures: float[K, G] on the simplex, K > G.
    losses: float[K, n] > 0, after training on each mixture.
    starts: how many floors to start from, >= 1.
    delta: residual beyond which the Huber loss is linear, in the unit of the losses.
    steps: of L-BFGS, at most; 0 gives the best start.

  Returns:
    `MixingLaw`. All NaN for a column of traced losses that holds a NaN.

  Raises:
    ValueError: shapes that do not match, K <= G, concrete losses that are not above 0 and finite,
      mixtures off the simplex, options out of range.

  Example:
    >>> law = MixingLaw(jnp.array([0.5]), jnp.array([[0.2, 1.0, -0.5]]))
    >>> p = sample_mixtures(jax.random.key(1), [1, 1, 1], 32)
    >>> fit = fit_mixing_law(p, predict_losses(law, p))
    >>> float(abs(predict_losses(fit, p) - predict_losses(law, p)).max()) < 1e-3
    True

  Source: Olmix (arXiv 2602.12237), which starts at random points. Provenance: official_code for
    the law and its loss, ours for the starts.
  """
  check_positive(delta=delta)
  if starts < 1 or steps < 0:
    raise ValueError(f'starts={starts} must be at least 1 and steps={steps} at least 0')
  mixtures = jnp.asarray(on_simplex(mixtures, 'mixtures', ndim=2), jnp.float32)
  losses = nonnegative(losses, 'losses', ndim=2)
  if losses.shape[0] != mixtures.shape[0] or mixtures.shape[0] <= mixtures.shape[1]:
    raise ValueError(
      f'mixtures has shape {mixtures.shape}, losses {losses.shape}; expected [K, G] and [K, n] '
      'with K above G: every loss has G + 1 parameters'
    )
  if isinstance(losses, np.ndarray) and not losses.all():
    raise ValueError('losses holds 0; the law is above 0 everywhere, so losses must be')
  return _fit(mixtures, jnp.asarray(losses, jnp.float32), starts, delta, steps)


def predict_losses(law: MixingLaw, mixtures: Any) -> jax.Array:
  """f_i(p) = exp(c_i) + exp(<t_i, p>) at each mixture.

  Args:
    law: from `fit_mixing_law`, n losses over G domains.
    mixtures: float[..., G], not checked.

  Returns:
    float32[..., n].

  Example:
    >>> law = MixingLaw(jnp.zeros(1), jnp.array([[0.0, 1.0]]))
    >>> predict_losses(law, jnp.array([[1.0, 0.0], [0.0, 1.0]])).round(3).tolist()
    [[2.0], [3.7180001735687256]]

  Source: Olmix (arXiv 2602.12237). Provenance: official_code.
  """
  mixtures = jnp.asarray(mixtures, jnp.float32)
  return jnp.exp(law.log_floor) + jnp.exp(mixtures @ law.slopes.T)


def best_mixture(
  law: MixingLaw,
  target_weights: Vector,
  prior: Vector,
  strength: float = 0.05,
  caps: Vector | None = None,
) -> np.ndarray:
  """The mixture of the lowest predicted loss, held near the prior; exact, as it is convex.

    min sum_i w_i exp(<t_i, p>) + strength KL(p || prior)    p on the simplex, p <= caps

  Weights are taken as they are, so `strength` is relative to their sum. By Newton's method with a
  barrier, in float64 on the host: not under jit.

  Args:
    law: from `fit_mixing_law`.
    target_weights: float[n] >= 0, what each loss counts; 1 / n each for the mean.
    prior: float[G], sizes of the domains or their shares. A domain of prior 0 gets nothing.
    strength: >= 0, of the pull to the prior; 0 without it, inf gives the prior (within the caps,
      the mixture nearest to it).
    caps: float[G] >= 0, the largest shares. For at most r epochs over N_g tokens each in a run of R
      tokens, r N_g / R.

  Returns:
    float32[G] on the host, on the simplex.

  Raises:
    ValueError: shapes that do not match, numbers out of range, a law that is not finite, caps whose
      sum over domains of positive prior is below 1.

  Example:
    >>> law = MixingLaw(jnp.zeros(1), jnp.array([[-1.0, 0.0, 1.0]]))
    >>> best_mixture(law, [1.0], [1, 1, 1], strength=0.5).round(2).tolist()
    [0.6899999976158142, 0.23000000417232513, 0.07999999821186066]
    >>> best_mixture(law, [1.0], [1, 1, 1], strength=0.5, caps=[0.5, 1, 1]).round(2).tolist()
    [0.5, 0.4000000059604645, 0.10000000149011612]

  Source: Olmix (arXiv 2602.12237), with a general solver. Provenance: official_code for the
    problem, ours for the method.
  """
  slopes = np.asarray(law.slopes, np.float64)
  weights = np.asarray(nonnegative(target_weights, 'target_weights'), np.float64)
  prior = np.asarray(normalized(prior, 'prior'), np.float64)
  caps = np.ones(prior.size) if caps is None else np.asarray(caps, np.float64)
  if slopes.shape != (weights.size, prior.size) or caps.shape != prior.shape:
    raise ValueError(
      f'slopes has shape {slopes.shape}, target_weights {weights.shape}, prior {prior.shape}, caps '
      f'{caps.shape}; expected [n, G], [n], [G] and [G]'
    )
  if not np.all(np.isfinite(slopes)):
    raise ValueError('law has slopes that are not finite: was it fitted to finite losses?')
  if not strength >= 0:
    raise ValueError(f'strength={strength} must be at least 0')
  if not np.all(caps >= 0):
    raise ValueError(f'caps holds {caps[~(caps >= 0)][0]:g}; expected numbers, at least 0')
  caps = np.where(prior > 0, np.minimum(caps, 1), 0)
  if caps.sum() < 1 - 1e-6:
    raise ValueError(
      f'caps allow a total share of {caps.sum():.4g} for the domains of positive prior; it must be '
      'at least 1: raise them'
    )
  used = np.flatnonzero(caps)
  answer = np.zeros(prior.size)
  if caps.sum() < 1 + 1e-6:  # one point
    answer[used] = caps[used]
  else:
    answer[used] = _solve(slopes[:, used], weights, prior[used], strength, caps[used])
  return (answer / answer.sum()).astype(np.float32)


def expand_reuse(frozen: Vector, mixture: Vector) -> np.ndarray:
  """p = [rho frozen, p_new]: a mixture of changed domains and of one that stands for all others.

  When few domains change, keep the relative shares of the others, treat these as one domain
  (a row of `sample_mixtures`, `best_mixture`), and expand what comes out.

  Args:
    frozen: float[F] on the simplex, relative shares of the domains that did not change.
    mixture: float[..., 1 + N] on the simplex; the first entry is rho, the share of all those.

  Returns:
    float32[..., F + N] on the host, on the simplex.

  Raises:
    ValueError: vectors off the simplex.

  Example:
    >>> expand_reuse([0.75, 0.25], [0.5, 0.375, 0.125]).tolist()
    [0.375, 0.125, 0.375, 0.125]

  Source: Olmix (arXiv 2602.12237). Provenance: paper.
  """
  frozen = np.asarray(on_simplex(frozen, 'frozen'))
  mixture = np.asarray(on_simplex(mixture, 'mixture', ndim=np.ndim(mixture) or 1))
  return np.concatenate([mixture[..., :1] * frozen, mixture[..., 1:]], axis=-1)


def repetition_subsample(
  document_ids: Iterable[str | int], share: float, seed: int = 0
) -> np.ndarray:
  """Which documents a small run should use, so that it repeats data as often as a large one will.

  A run of R tokens goes p_g R / N_g times through domain g. One of R' < R tokens does so, too, for
  every p at once, on a share R' / R of each domain's documents. A document is kept or not by its id
  alone: in any order, in any shard, and a smaller share keeps a part of what a larger one keeps.

  Args:
    document_ids: str or int, one for each document; equal ids are kept or dropped together.
    share: R' / R in [0, 1]. About this share of the documents is kept, as of independent draws.
    seed: another one keeps others.

  Returns:
    bool[N].

  Raises:
    ValueError: a share outside [0, 1].

  Example:
    >>> kept = repetition_subsample(range(10_000), 1 / 16)
    >>> int(kept.sum())
    677

  Source: Repetition Mismatch (arXiv 2606.07597), which subsamples documents; by what rule we do not
    know. Provenance: reconstructed.
  """
  if not 0 <= share <= 1:
    raise ValueError(f'share={share} must be in [0, 1]')
  hashes = [
    int.from_bytes(hashlib.blake2b(f'{seed}:{name}'.encode(), digest_size=6).digest(), 'little')
    for name in document_ids
  ]
  return np.array(hashes, np.float64) < share * 2.0**48


def spearman(a: Any, b: Any) -> jax.Array:
  """Rank correlation: Pearson's correlation of the ranks, equal values sharing their mean rank.

  Args:
    a, b: float[N], N >= 2.

  Returns:
    float32[] in [-1, 1]. NaN if a value is NaN, or all values of one are equal.

  Raises:
    ValueError: other shapes.

  Example:
    >>> float(spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]))
    0.800000011920929

  Provenance: reconstructed; textbook.
  """
  a, b = (_centered_ranks(x) for x in _two_vectors(a, b))
  return jnp.clip(jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b)), -1, 1)


def decision_accuracy(predicted: Any, observed: Any) -> jax.Array:
  """Share of pairs that small runs order as large ones do.

  Args:
    predicted: float[N], such as losses of small runs, or a law's predictions. A tie is half right.
    observed: float[N], of what is to be chosen. Pairs that are equal here do not count.

  Returns:
    float32[] in [0, 1]; 1 / 2 is guessing. NaN if a value is NaN, or all observed ones are equal.

  Raises:
    ValueError: other shapes.

  Example:
    >>> float(decision_accuracy([3.0, 2.0, 1.0], [2.9, 2.7, 2.8]))
    0.6666666865348816

  Source: DataDecide, ICML 2025 (arXiv 2504.11393). Provenance: paper; ties are ours.
  """
  a, b = _two_vectors(predicted, observed)
  order = lambda x: jnp.sign(x[:, None] - x)
  different = order(b) != 0
  right = jnp.where(different, (1 + order(a) * order(b)) / 2, 0)
  accuracy = jnp.sum(right) / jnp.sum(different)
  return jnp.where(jnp.any(jnp.isnan(a) | jnp.isnan(b)), jnp.nan, accuracy)


def _two_vectors(a, b):
  a, b = jnp.asarray(a, float), jnp.asarray(b, float)
  if a.ndim != 1 or a.shape != b.shape or a.size < 2:
    raise ValueError(f'got shapes {a.shape} and {b.shape}; expected [N] both, N at least 2')
  return a, b


def _centered_ranks(x):
  ordered = jnp.sort(x)
  below, upto = (jnp.searchsorted(ordered, x, side=side) for side in ('left', 'right'))
  ranks = (below + upto - x.size) / 2
  return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, ranks)


@functools.partial(jax.jit, static_argnames='starts')
def _fit(mixtures, losses, starts, delta, steps):
  fit = jax.vmap(lambda column: _fit_column(mixtures, column, starts, delta, steps))
  return MixingLaw(*fit(losses.T))


def _fit_column(mixtures, losses, starts, delta, steps):
  """(log floor, slopes) for one column: float32[], float32[G]."""
  huber = lambda residuals: jnp.mean(optax.losses.huber_loss(residuals, delta=delta))
  spread = huber(losses - jnp.mean(losses))
  # Coordinates in which the mixtures are spread alike, for L-BFGS.
  moment = mixtures.T @ mixtures / mixtures.shape[0]
  ridge = 1e-6 * jnp.trace(moment) / mixtures.shape[1]
  factor = jnp.linalg.cholesky(moment + ridge * jnp.eye(mixtures.shape[1]))
  to_slopes = lambda z: jax.scipy.linalg.solve_triangular(factor.T, z, lower=False)

  def objective(point):
    predicted = jnp.exp(point[0]) + jnp.exp(mixtures @ to_slopes(point[1:]))
    return masked.divide(huber(predicted - losses), spread)  # near 1: what L-BFGS expects

  def run(fraction):
    floor = fraction * jnp.min(losses)
    start = jnp.concatenate(
      [jnp.log(floor)[None], factor.T @ _log_linear(mixtures, losses - floor)]
    )
    return minimize(objective, start, steps)

  # The floor of the last start is close to the least loss, as when one mixture is nearly perfect.
  fractions = 1 - jnp.geomspace(0.99, 0.02, starts)
  points, values = jax.vmap(run)(fractions)
  best = points[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))]
  bad = jnp.isnan(spread)
  return jnp.where(bad, jnp.nan, best[0]), jnp.where(bad, jnp.nan, to_slopes(best[1:]))


def _log_linear(mixtures, heights):
  """Slopes t with exp(<t, p>) near the heights: least squares of the logs, weighted by height."""
  logs = jnp.log(heights)
  weight = heights / jnp.sum(heights)
  weight = weight * heights  # an error in the log is one of that times the height
  mean = jnp.sum(weight * logs) / jnp.sum(weight)
  gram = (mixtures.T * weight) @ mixtures
  ridge = 1e-4 * jnp.trace(gram) / mixtures.shape[1]
  # Shares sum to 1: adding the mean to all slopes adds it to all logs.
  right = (mixtures.T * weight) @ (logs - mean)
  return mean + jnp.linalg.solve(gram + ridge * jnp.eye(mixtures.shape[1]), right)


def _solve(slopes, weights, prior, strength, caps):
  """`best_mixture` on domains with a positive cap that sum to more than 1, in float64."""
  p = caps / caps.sum()
  pull = 1.0 if np.isinf(strength) else strength
  weights = np.zeros_like(weights) if np.isinf(strength) else weights
  size = lambda p: pull + weights @ np.exp(slopes @ p)
  barrier = size(p)
  for _ in range(_MAX_BARRIERS):
    p = _newton(p, slopes, weights, prior, pull, caps, barrier)
    if barrier <= _BARRIER * size(p):
      break
    barrier /= 10
  return p


def _newton(p, slopes, weights, prior, pull, caps, barrier):
  """Minimizes the objective - barrier sum(log p + log(caps - p)) over sum(p) = 1, from inside."""

  def value(p):
    kl = np.sum(p * np.log(p / prior))
    return weights @ np.exp(slopes @ p) + pull * kl - barrier * np.sum(np.log(p * (caps - p)))

  for _ in range(60):
    heights, room = weights * np.exp(slopes @ p), caps - p
    gradient = slopes.T @ heights + pull * (np.log(p / prior) + 1) - barrier * (1 / p - 1 / room)
    diagonal = pull / p + barrier * (1 / p**2 + 1 / room**2)
    # In units of the diagonal, which spans many orders of magnitude.
    scale = 1 / np.sqrt(diagonal)
    scaled = (slopes * scale).T
    system = np.eye(p.size) + (scaled * heights) @ scaled.T
    along, ones = np.linalg.solve(system, np.stack([-gradient * scale, scale], axis=1)).T
    step = scale * (along - ones * (scale @ along) / (scale @ ones))
    decrease = -gradient @ step
    if decrease < 1e-6 * barrier:
      break
    with np.errstate(divide='ignore'):
      ratios = np.where(step > 0, room, -p) / np.where(step == 0, np.inf, step)
    length = min(1.0, 0.99 * np.min(ratios[step != 0], initial=np.inf))
    here = value(p)
    while value(p + length * step) > here - 0.25 * length * decrease and length > 1e-9:
      length /= 2
    p = p + length * step
    p = p / p.sum()
  return p
