"""Stages of training, and ways to choose the part of the pool that the next one sees.

All runs of an arm, seeds by learning rates, are trained at once; between stages, scores of the
whole pool come to the host and rows of the next stage go back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import stats
from experiments.classify import model
from experiments.classify.sources import Examples, Source
from experiments.errors import UserError
from jaxrw import attribution, losses, selection

TUNING = 2  # seeds that choose the learning rates; the results are of others
_QUICK = {'xla_backend_optimization_level': 0}  # compiles in a fifth of the time
_PENALTIES = (1e-2, 1e-1, 1.0, 10.0)


class Settings(NamedTuple):
  """Sizes.

  Attributes:
    pool, noise: training examples, and the share whose label is replaced by another class.
    reference: clean examples, by which candidates are judged.
    held: clean examples that choose learning rates.
    stages, steps, batch: of training; the first stage is random for every arm.
    keep: share of the pool that a stage sees.
    probes: candidates that are tried out in each stage, for the scorer to learn from.
    temperature: of the sampling by standardized scores; 0 takes the best.
    rates: of Adam, with a cosine to 0.
  """

  pool: int = 1000
  noise: float = 0.4
  reference: int = 100
  held: int = 200
  stages: int = 5
  steps: int = 60
  batch: int = 32
  keep: float = 0.2
  probes: int = 200
  temperature: float = 0.5
  hidden: int = 64
  rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)


class Problem(NamedTuple):
  """Of one seed; `clean` bool[n] of the pool."""

  pool: Examples
  clean: np.ndarray
  reference: Examples
  held: Examples
  test: Examples


def problem(source: Source, s: Settings, seed: int) -> Problem:
  rng = np.random.default_rng([seed, 51])
  order, classes = rng.permutation(len(source.pool.y)), int(source.pool.y.max()) + 1
  ends = np.cumsum([s.pool, s.reference, s.held])
  if len(order) < ends[-1] + (source.test is None):
    raise UserError(f'{source.name} has {len(order)} examples; this study needs over {ends[-1]}')
  pool, reference, held, rest = (source.pool.take(r) for r in np.split(order, ends))
  wrong = rng.permutation(s.pool) < round(s.noise * s.pool)
  labels = np.where(wrong, (pool.y + rng.integers(1, classes, s.pool)) % classes, pool.y)
  mean, sd = pool.x.mean(0), pool.x.std(0) + 1e-2
  scaled = lambda e: e._replace(x=((e.x - mean) / sd).astype(np.float32))
  pool = scaled(pool._replace(y=labels.astype(np.int32)))
  return Problem(pool, ~wrong, scaled(reference), scaled(held), scaled(source.test or rest))


class Runs(NamedTuple):
  """R runs side by side: examples [R, n, ...], rates [R], states of model and optimizer."""

  x: jax.Array
  y: jax.Array
  reference_x: jax.Array
  reference_y: jax.Array
  rates: jax.Array
  params: Any
  moments: Any


_OPTIMIZER = model.adam(1e-4)


def _mean_loss(params, x, y) -> jax.Array:
  return jnp.mean(losses.cross_entropy(model.forward(params, x), y))


def _moved(params, moments, rate, x, y) -> tuple[Any, Any]:
  slope = jax.grad(_mean_loss)(params, x, y)
  return model.moved(_OPTIMIZER, rate, slope, moments, params)


@functools.partial(jax.jit, compiler_options=_QUICK)
def trained(runs: Runs, rows: jax.Array, decay: jax.Array) -> Runs:
  """After one stage on rows int[R, steps, batch], with rates times decay [steps]."""

  def one(run, rows):
    def step(state, now):
      rows, factor = now
      return _moved(*state, run.rates * factor, run.x[rows], run.y[rows]), None

    (params, moments), _ = jax.lax.scan(step, (run.params, run.moments), (rows, decay))
    return run._replace(params=params, moments=moments)

  return jax.vmap(one)(runs, rows)


@functools.partial(jax.jit, compiler_options=_QUICK)
def gains(runs: Runs, candidates: jax.Array, factor: jax.Array) -> jax.Array:
  """What one step on each candidate, int[R, m], takes off the reference loss: float[R, m]."""

  def one(run, candidates):
    step = lambda state, e: _moved(*state, run.rates * factor, e[0][None], e[1][None])
    objective = lambda state: _mean_loss(state[0], run.reference_x, run.reference_y)
    chosen = run.x[candidates], run.y[candidates]
    return attribution.lookahead(step, objective, (run.params, run.moments), chosen, together=50)

  return jax.vmap(one)(runs, candidates)


@functools.partial(jax.jit, compiler_options=_QUICK)
def first_order(runs: Runs) -> jax.Array:
  """Products of gradients with that of the reference loss, float[R, n]: one forward pass."""

  def one(run):
    own = lambda p: losses.cross_entropy(model.forward(p, run.x), run.y)
    slope = jax.grad(_mean_loss)(run.params, run.reference_x, run.reference_y)
    return attribution.influence(own, run.params, slope)

  return jax.vmap(one)(runs)


@functools.partial(jax.jit, compiler_options=_QUICK)
def small_loss(runs: Runs) -> jax.Array:
  """-loss of each example, float[R, n]: a control that needs no reference."""
  own = lambda run: -losses.cross_entropy(model.forward(run.params, run.x), run.y)
  return jax.vmap(own)(runs)


# Scorer -------------------------------------------------------------------------------------------


def features(x: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
  """Pixels of each example in the columns of its label, float[n, classes * (d + 1)]."""
  design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  return (np.eye(classes)[y][:, :, None] * design[:, None]).reshape(len(x), -1)


def fitted(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
  """Ridge regression on the probes; its penalty is the best of some on the last tenth of them.

  Returns:
    (coefficients, rank correlation on that tenth).
  """
  cut = len(inputs) - max(2, len(inputs) // 10)
  scale = (targets - targets[:cut].mean()) / (targets[:cut].std() + 1e-12)

  def solve(penalty):
    a, b = inputs[:cut], scale[:cut]
    kernel = a @ a.T + penalty * len(a) * np.eye(len(a))  # fewer probes than features
    return a.T @ np.linalg.solve(kernel, b)

  tried = [solve(penalty) for penalty in _PENALTIES]
  ranks = [stats.rank_correlation(inputs[cut:] @ w, scale[cut:]) for w in tried]
  best = int(np.argmax(ranks))
  return tried[best], ranks[best]


# Arms ---------------------------------------------------------------------------------------------


class Arm(NamedTuple):
  """How a stage is chosen.

  Attributes:
    by: 'random', 'loss', 'first order', 'oracle' (lookahead on all), 'scorer', or, for controls
      that do not choose, 'everything' and 'reference'.
    frozen: the scorer of the first stage stays.
    temperature: whether to sample, or to take the best.
  """

  by: str
  frozen: bool = False
  temperature: bool = True


ARMS = {
  'everything': Arm('everything'),
  'reference only': Arm('reference'),
  'random': Arm('random'),
  'small loss': Arm('loss', temperature=False),
  'scorer': Arm('scorer'),
  'scorer top': Arm('scorer', temperature=False),
  'frozen scorer': Arm('scorer', frozen=True),
  'first order': Arm('first order'),
  'oracle': Arm('oracle'),
}


class Result(NamedTuple):
  """Of an arm, by seed: accuracy, share of clean labels in what the later stages saw, the scorer's
  rank correlation with fresh lookaheads, entropy of the classes over its maximum."""

  rate: float
  accuracy: list[float]
  clean: list[float]
  correlation: list[float]
  spread: list[float]


def run(
  source: Source, s: Settings, arms: Sequence[str], seeds: int
) -> Iterator[tuple[str, Result]]:
  problems = [problem(source, s, seed) for seed in range(TUNING + seeds)]
  classes = int(source.pool.y.max()) + 1
  for name in arms:
    yield name, measure(ARMS[name], problems, s, classes)


def measure(arm: Arm, problems: Sequence[Problem], s: Settings, classes: int) -> Result:
  each = [(i, rate) for i in range(len(problems)) for rate in s.rates]
  state, notes = started(problems, each, s, classes), _Notes([], [], [])
  budget = max(1, round(s.keep * s.pool))
  if arm.by == 'reference':
    state = state._replace(x=state.reference_x, y=state.reference_y)
  size, total = state.x.shape[1], s.stages * s.steps
  decay = 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))
  scorers: list[np.ndarray] = []
  for stage in range(s.stages):
    rng = np.random.default_rng([stage, 61])
    if arm.by in ('everything', 'reference'):
      chosen = np.tile(np.arange(size), (len(each), 1))
    elif arm.by == 'random' or not stage:
      chosen = np.stack(
        [np.random.default_rng([stage, i, 63]).permutation(size)[:budget] for i, _ in each]
      )
    else:
      values = scored(arm, state, s, decay[stage * s.steps], rng, scorers, notes, classes)
      chosen = picked(values, budget, arm, s, stage)
    if stage:
      notes.see(chosen, [problems[i] for i, _ in each], arm, classes)
    rows = np.stack([_dealt(np.random.default_rng([stage, r]), c, s) for r, c in enumerate(chosen)])
    state = trained(state, jnp.asarray(rows), jnp.asarray(decay[stage * s.steps :][: s.steps]))
  return _result(state, problems, each, s, notes)


def started(problems, each, s: Settings, classes: int) -> Runs:
  of = lambda leaf: jnp.stack([leaf(problems[i]) for i, _ in each])
  keys = jax.vmap(jax.random.key)(jnp.array([i for i, _ in each]))
  features_ = problems[0].pool.x.shape[1]
  params = jax.vmap(lambda key: model.initial(key, features_, s.hidden, classes))(keys)
  return Runs(
    of(lambda p: p.pool.x), of(lambda p: p.pool.y),
    of(lambda p: p.reference.x), of(lambda p: p.reference.y),
    jnp.array([rate for _, rate in each]), params, jax.vmap(_OPTIMIZER.init)(params),
  )  # fmt: skip


def scored(arm, state: Runs, s: Settings, factor, rng, scorers, notes, classes) -> np.ndarray:
  """Scores of the pool, float[R, n], higher = better."""
  number, size = state.y.shape
  if arm.by == 'loss':
    return np.asarray(small_loss(state))
  if arm.by == 'first order':
    return np.asarray(first_order(state))
  if arm.by == 'oracle':
    everybody = jnp.tile(jnp.arange(size), (number, 1))
    return np.asarray(gains(state, everybody, factor))
  probes = np.stack([rng.permutation(size)[: s.probes] for _ in range(number)])
  found = np.asarray(gains(state, jnp.asarray(probes), factor), np.float64)
  x, y = np.asarray(state.x, np.float64), np.asarray(state.y)
  inputs = [features(x[r], y[r], classes) for r in range(number)]
  if not (arm.frozen and scorers):
    scorers[:] = [fitted(inputs[r][probes[r]], found[r])[0] for r in range(number)]
  values = np.stack([inputs[r] @ scorers[r] for r in range(number)])
  # What it is worth, on candidates that it has not been fitted to.
  fresh = np.stack([rng.permutation(np.setdiff1d(np.arange(size), p))[:100] for p in probes])
  truth = np.asarray(gains(state, jnp.asarray(fresh), factor))
  notes.correlation.append(
    [stats.rank_correlation(values[r][fresh[r]], truth[r]) for r in range(number)]
  )
  return values


def picked(values: np.ndarray, budget: int, arm: Arm, s: Settings, stage: int) -> np.ndarray:
  """Rows of each run, int[R, budget]."""
  z = (values - values.mean(1, keepdims=True)) / (values.std(1, keepdims=True) + 1e-12)
  temperature = s.temperature if arm.temperature else 0.0
  keys = jax.random.split(jax.random.key(100 + stage), len(z))
  draw = lambda key, z: selection.gumbel_top_k(key, z, budget, temperature=temperature)
  kept = np.asarray(jax.vmap(draw)(keys, jnp.asarray(z, jnp.float32)))
  return np.stack([np.flatnonzero(row) for row in kept])


def _dealt(rng: np.random.Generator, rows: np.ndarray, s: Settings) -> np.ndarray:
  passes = -(-s.steps * s.batch // len(rows))
  dealt = np.concatenate([rng.permutation(rows) for _ in range(passes)])
  return dealt[: s.steps * s.batch].reshape(s.steps, s.batch)


class _Notes(NamedTuple):
  """Of the later stages, each a list of numbers by run."""

  clean: list[list[float]]
  correlation: list[list[float]]
  spread: list[list[float]]

  def see(self, chosen: np.ndarray, problems: Sequence[Problem], arm: Arm, classes: int) -> None:
    if arm.by == 'reference':
      self.clean.append([1.0] * len(problems))
      self.spread.append([1.0] * len(problems))
      return
    self.clean.append([float(p.clean[c].mean()) for c, p in zip(chosen, problems)])
    shares = [
      np.bincount(p.pool.y[c], minlength=classes) / len(c) for c, p in zip(chosen, problems)
    ]
    entropy = [-np.sum(q[q > 0] * np.log(q[q > 0])) / np.log(classes) for q in shares]
    self.spread.append([float(e) for e in entropy])


def _result(state: Runs, problems, each, s: Settings, notes: _Notes) -> Result:
  forward = jax.jit(jax.vmap(model.forward))

  def accuracy(part) -> np.ndarray:
    sets = [part(problems[i]) for i, _ in each]
    logits = np.asarray(forward(state.params, jnp.stack([e.x for e in sets])))
    right = [np.mean(z.argmax(-1) == e.y) for z, e in zip(logits, sets)]
    return np.array(right).reshape(len(problems), len(s.rates))

  best = int(np.argmax(accuracy(lambda p: p.held)[:TUNING].mean(0)))
  mean = lambda rows: (
    np.mean(rows, axis=0).reshape(len(problems), -1)[TUNING:, best].tolist() if rows else []
  )
  return Result(
    s.rates[best],
    accuracy(lambda p: p.test)[TUNING:, best].tolist(),
    mean(notes.clean),
    mean(notes.correlation),
    mean(notes.spread),
  )
