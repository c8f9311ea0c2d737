"""Values of a few examples of digits, some with wrong labels: are these found, and what is lost
when the worst, or the best, are taken away?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import stats
from experiments.classify.sources import Source
from jaxrw import attribution, losses, valuation

_PENALTY = 1e-3
_FIT_STEPS, _FIT_RATE = 60, 0.5  # of gradient descent with momentum


class Settings(NamedTuple):
  """Sizes.

  Attributes:
    players: examples to value.
    wrong: share whose label is replaced by another class.
    held: validation examples, whose accuracy is the utility.
    orders: of TMC-Shapley; the other sampled methods get as many fits.
    taken: shares to take away.
    rate, epochs: of the SGD that G-Shapley and in-run values watch.
  """

  players: int = 100
  wrong: float = 0.2
  held: int = 200
  orders: int = 100
  taken: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
  rate: float = 0.1
  epochs: int = 5
  batch: int = 10


class Problem(NamedTuple):
  """Of one seed."""

  x: jax.Array
  y: jax.Array
  wrong: np.ndarray
  held_x: jax.Array
  held_y: jax.Array
  test_x: jax.Array
  test_y: jax.Array


def problem(source: Source, s: Settings, seed: int) -> Problem:
  rng = np.random.default_rng([seed, 31])
  order = rng.permutation(len(source.pool.y))
  own, held, test = (source.pool.take(r) for r in np.split(order, [s.players, s.players + s.held]))
  wrong = rng.permutation(s.players) < round(s.wrong * s.players)
  labels = np.where(wrong, (own.y + rng.integers(1, 10, s.players)) % 10, own.y)
  to = jnp.asarray
  return Problem(to(own.x), to(labels), wrong, to(held.x), to(held.y), to(test.x), to(test.y))


# Utility ------------------------------------------------------------------------------------------


def fit(x: jax.Array, y: jax.Array, present: jax.Array) -> jax.Array:
  """Softmax regression on those present, [d + 1, 10]; of nobody: zeros."""
  design = _design(x)
  number = jnp.maximum(jnp.sum(present), 1)

  def loss(w):
    each = losses.cross_entropy(design @ w, y)
    return jnp.sum(present * each) / number + _PENALTY * jnp.sum(w**2)

  def step(carry, _):
    w, speed = carry
    speed = 0.9 * speed - _FIT_RATE * jax.grad(loss)(w)
    return (w + speed, speed), None

  zeros = jnp.zeros((design.shape[1], 10))
  return jax.lax.scan(step, (zeros, zeros), length=_FIT_STEPS)[0][0]


def accuracy(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.mean(jnp.argmax(_design(x) @ w, axis=-1) == y)


def _design(x: jax.Array) -> jax.Array:
  return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1)


class Game(NamedTuple):
  """The utility of a problem, one function object so that it is compiled once."""

  problem: Problem
  utility: valuation.Utility


def game(p: Problem) -> Game:
  return Game(p, lambda present: accuracy(fit(p.x, p.y, present), p.held_x, p.held_y))


# Methods: (game, settings, seed) -> (values, fits) ------------------------------------------------

Found = tuple[np.ndarray, int]


def _tmc(g: Game, s: Settings, seed: int) -> Found:
  found = valuation.permutation_values(
    jax.random.key(seed), g.utility, s.players, permutations=s.orders, truncation=0.01, together=20,
    chunk=20,
  )  # fmt: skip
  return found.mean, found.calls


def _beta(g: Game, s: Settings, seed: int) -> Found:
  found = valuation.permutation_values(
    jax.random.key(seed), g.utility, s.players, permutations=s.orders, together=20, chunk=20,
    coefficients=valuation.beta_coefficients(s.players, 16, 1),
  )  # fmt: skip
  return found.mean, found.calls


def _banzhaf(g: Game, s: Settings, seed: int) -> Found:
  found = valuation.subset_values(
    jax.random.key(seed), g.utility, s.players, subsets=s.orders * s.players, together=400
  )
  return found.mean, found.calls


def _leave_one_out(g: Game, s: Settings, seed: int) -> Found:
  masks = 1 - jnp.eye(s.players)
  without = np.asarray(jax.jit(jax.vmap(g.utility))(masks), np.float64)
  return float(g.utility(jnp.ones(s.players))) - without, s.players + 1


def _gradient(g: Game, s: Settings, seed: int) -> Found:
  p = g.problem
  found = valuation.gradient_values(
    jax.random.key(seed),
    lambda w, example: losses.cross_entropy(_design(example[0]) @ w, example[1]),
    lambda w: accuracy(w, p.held_x, p.held_y),
    jnp.zeros((p.x.shape[1] + 1, 10)),
    (p.x, p.y),
    rate=s.rate, permutations=s.orders, together=20,
  )  # fmt: skip
  return found.mean, s.orders


def _in_run(order: int) -> Callable[[Game, Settings, int], Found]:
  def values(g: Game, s: Settings, seed: int) -> Found:
    p = g.problem
    rng = np.random.default_rng([seed, 41])
    rows = np.concatenate([rng.permutation(s.players) for _ in range(s.epochs)])
    rows = jnp.asarray(rows[: len(rows) // s.batch * s.batch].reshape(-1, s.batch))
    target = lambda w: jnp.mean(losses.cross_entropy(_design(p.held_x) @ w, p.held_y))

    @jax.jit
    def run(rows):
      def step(w, batch):
        own = lambda w: losses.cross_entropy(_design(p.x[batch]) @ w, p.y[batch])
        total, rate = jax.grad(lambda w: jnp.sum(own(w)))(w), s.rate / s.batch
        direction = attribution.in_run_direction(target, w, total, rate, order=order)
        return w - rate * total, attribution.influence(own, w, direction)

      return jax.lax.scan(step, jnp.zeros((p.x.shape[1] + 1, 10)), rows)[1]

    return np.asarray(attribution.add_up(run(rows), rows, s.players), np.float64), 1

  return values


def _neighbors(g: Game, s: Settings, seed: int) -> Found:
  p = g.problem
  return np.asarray(valuation.knn_shapley(p.x, p.y, p.held_x, p.held_y, 5), np.float64), 0


def _loss(g: Game, s: Settings, seed: int) -> Found:
  """The control that costs one fit: examples with a high training loss are the worst."""
  p = g.problem
  w = fit(p.x, p.y, jnp.ones(s.players))
  return -np.asarray(losses.cross_entropy(_design(p.x) @ w, p.y), np.float64), 1


def _random(g: Game, s: Settings, seed: int) -> Found:
  return np.random.default_rng([seed, 43]).normal(size=s.players), 0


METHODS: dict[str, Callable[[Game, Settings, int], Found]] = {
  'tmc-shapley': _tmc,
  'beta(16,1)': _beta,
  'banzhaf': _banzhaf,
  'leave-one-out': _leave_one_out,
  'g-shapley': _gradient,
  'in-run, order 1': _in_run(1),
  'in-run, order 2': _in_run(2),
  'knn-shapley': _neighbors,
  'training loss': _loss,
  'random': _random,
}


class Result(NamedTuple):
  """Of a method, for every seed: AUC for wrong labels, models fitted, test accuracy [share] after
  the lowest or highest were taken away."""

  auc: list[float]
  fits: list[int]
  lowest_taken: list[list[float]]
  highest_taken: list[list[float]]


def measure(source: Source, s: Settings, seeds: Sequence[int], method: str) -> Result:
  out = Result([], [], [], [])
  for seed in seeds:
    g = game(problem(source, s, seed))
    values, fits = METHODS[method](g, s, seed)
    out.auc.append(stats.auc(-values, g.problem.wrong))
    out.fits.append(fits)
    rank = np.argsort(np.argsort(values, kind='stable'), kind='stable')
    sizes = [round(share * s.players) for share in s.taken]
    masks = [rank >= size for size in sizes] + [rank < s.players - size for size in sizes]
    reached = np.asarray(_tested(g.problem, jnp.asarray(np.stack(masks), jnp.float32)))
    out.lowest_taken.append(reached[: len(sizes)].tolist())
    out.highest_taken.append(reached[len(sizes) :].tolist())
  return out


def everything(source: Source, s: Settings, seeds: Sequence[int]) -> list[float]:
  """Test accuracy with all examples."""
  problems = [problem(source, s, seed) for seed in seeds]
  return [float(_tested(p, jnp.ones((1, s.players)))[0]) for p in problems]


def _tested(p: Problem, masks: jax.Array) -> jax.Array:
  arrays = {name: v for name, v in p._asdict().items() if name != 'wrong'}
  return _tested_arrays(arrays, masks)


@functools.partial(jax.jit)
def _tested_arrays(p: dict[str, Any], masks: jax.Array) -> jax.Array:
  one = lambda present: accuracy(fit(p['x'], p['y'], present), p['test_x'], p['test_y'])
  return jax.vmap(one)(masks)
