"""Forgetting: can models trained with some examples be made like models trained without them?

Many perceptrons on digits, with everything, and as many oracles without a forget set. Each arm
turns the first into something that should pass for the second; KLoM says, point by point, how well
the two crowds can be told apart by the log odds of the right class. Settings of an arm are chosen
on other forget sets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.classify import model
from experiments.classify.sources import Source
from jaxrw import attribution, losses, scores

KINDS = ('random', 'neighbors')
POINTS = ('forgotten', 'kept', 'new')
TUNING = 4  # forget sets of each kind


class Settings(NamedTuple):
  """Sizes.

  Attributes:
    train, forget: examples, and those to forget.
    models: of each crowd.
    steps, batch, rate: of Adam with a cosine to 0, when models are trained.
    penalty: times |params|^2 / 2.
    points: kept, and new, points to measure at.
    kept_per_forgotten: of the examples that outputs are matched on.
    curve, solver_steps: examples that the Gauss-Newton matrix is a mean over, conjugate gradients.
    oracles: whose mean is matched by the arm that may see them.
    rates, steps_after: of Adam afterwards; all pairs are tried.
    dampings, match_rates: the same for matching influence, with the larger number of steps.
  """

  train: int = 1000
  forget: int = 40
  models: int = 100
  hidden: int = 32
  steps: int = 400
  batch: int = 100
  rate: float = 1e-2
  penalty: float = 1e-3
  points: int = 200
  kept_per_forgotten: int = 3
  curve: int = 250
  solver_steps: int = 20
  oracles: int = 10
  rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2)
  steps_after: tuple[int, ...] = (15, 50)
  dampings: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
  match_rates: tuple[float, ...] = (3e-3, 1e-2)


class Problem(NamedTuple):
  """A forget set: training examples; rows of those to forget, to keep, to match outputs on and to
  take the curvature from; points to measure at, in the order of POINTS."""

  x: jax.Array
  y: jax.Array
  forget: jax.Array
  kept: jax.Array
  match: jax.Array
  curve: jax.Array
  points_x: jax.Array
  points_y: jax.Array


def problem(source: Source, s: Settings, kind: str, seed: int) -> Problem:
  """The training set is the same for all seeds; what is to be forgotten is not."""
  order = np.random.default_rng(71).permutation(len(source.pool.y))
  train, rest = source.pool.take(order[: s.train]), source.pool.take(order[s.train :])
  rng = np.random.default_rng([seed, KINDS.index(kind), 73])
  center = train.x[rng.integers(s.train)]
  far = rng.random(s.train) if kind == 'random' else ((train.x - center) ** 2).sum(1)
  nearest = np.argsort(far, kind='stable')
  forget, kept = nearest[: s.forget], rng.permutation(nearest[s.forget :])
  new = rng.permutation(len(rest.y))[: s.points]
  seen = np.concatenate([forget, kept[-s.points :]])
  to = jnp.asarray
  return Problem(
    to(train.x), to(train.y), to(forget), to(kept),
    to(np.concatenate([forget, kept[: s.kept_per_forgotten * s.forget]])),
    to(rng.permutation(s.train)[: s.curve]),
    to(np.concatenate([train.x[seen], rest.x[new]])),
    to(np.concatenate([train.y[seen], rest.y[new]])),
  )  # fmt: skip


# Training -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=3)
def trained(keys: jax.Array, p: Problem, weights: jax.Array, s: Settings) -> model.Params:
  """A crowd: one model for each key, on examples with weights 1, or 0 = not there."""
  optimizer = optax.adam(optax.cosine_decay_schedule(s.rate, s.steps))

  def one(key):
    start, deal = jax.random.split(key)
    params = model.initial(start, p.x.shape[1], s.hidden, 10)

    def step(state, key):
      params, moments = state
      rows = jax.random.choice(key, s.train, (s.batch,), p=weights / jnp.sum(weights))
      slope = jax.grad(_objective)(params, p.x[rows], p.y[rows], s)
      move, moments = optimizer.update(slope, moments)
      return (optax.apply_updates(params, move), moments), None

    state = (params, optimizer.init(params))
    return jax.lax.scan(step, state, jax.random.split(deal, s.steps))[0][0]

  return jax.lax.map(one, keys, batch_size=25)


def _objective(params: model.Params, x: jax.Array, y: jax.Array, s: Settings) -> jax.Array:
  size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
  return jnp.mean(losses.cross_entropy(model.forward(params, x), y)) + s.penalty / 2 * size


# Arms ---------------------------------------------------------------------------------------------


class Setting(NamedTuple):
  """rate and steps of Adam, damping of the solver, by which the arms vary."""

  rate: float = 0.0
  steps: int = 0
  damping: float = 0.0


class Crowds(NamedTuple):
  """Models trained with everything, oracles without, and as many more oracles."""

  whole: model.Params
  oracle: model.Params
  again: model.Params


Arm = Callable[
  [Crowds, Problem, Setting, Settings], jax.Array
]  # -> logits [R, M, 10] of the points


def _nothing(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  return _outputs(crowds.whole, p)


def _retrained(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  return _outputs(crowds.again, p)


def _ascent(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  loss = lambda params, _: -_objective(params, p.x[p.forget], p.y[p.forget], s)
  return _outputs(_tuned(loss, crowds.whole, None, setting), p)


def _ascent_descent(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  loss = lambda params, _: (
    _objective(params, p.x[p.kept], p.y[p.kept], s)
    - _objective(params, p.x[p.forget], p.y[p.forget], s)
  )
  return _outputs(_tuned(loss, crowds.whole, None, setting), p)


def _descent(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  loss = lambda params, _: _objective(params, p.x[p.kept], p.y[p.kept], s)
  return _outputs(_tuned(loss, crowds.whole, None, setting), p)


def _influence(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  """What influence says the outputs would be, as they are."""
  return foretold(crowds.whole, p, p.points_x, setting.damping, s)


def _matched(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  targets = foretold(crowds.whole, p, p.x[p.match], setting.damping, s)
  return _outputs(_tuned(_to_match(p), crowds.whole, targets, setting), p)


def _matched_oracles(crowds: Crowds, p: Problem, setting: Setting, s: Settings) -> jax.Array:
  """The ideal: the targets are means over models that were trained without (not those that the
  outcome is compared with)."""
  few = jax.tree.map(lambda leaf: leaf[: s.oracles], crowds.again)
  mean = jax.vmap(lambda params: model.forward(params, p.x[p.match]))(few).mean(axis=0)
  targets = jnp.broadcast_to(mean, (s.models, *mean.shape))
  return _outputs(_tuned(_to_match(p), crowds.whole, targets, setting), p)


ARMS: dict[str, Arm] = {
  'retrained': _retrained,
  'nothing done': _nothing,
  'gradient ascent': _ascent,
  'ascent and descent': _ascent_descent,
  'fine-tuned on kept': _descent,
  'influence, as it is': _influence,
  'influence, matched': _matched,
  'oracles, matched': _matched_oracles,
}


def settings_of(arm: str, s: Settings) -> list[Setting]:
  """What an arm chooses from: nothing, or the same number for all but one."""
  if arm in ('retrained', 'nothing done'):
    return [Setting()]
  if arm == 'influence, as it is':
    return [Setting(damping=d) for d in s.dampings]
  if arm == 'influence, matched':
    return [Setting(r, s.steps_after[-1], d) for r in s.match_rates for d in s.dampings]
  return [Setting(r, steps) for r in s.rates for steps in s.steps_after]


def cost(arm: str, setting: Setting, s: Settings) -> float:
  """Gradients of examples, in those of one training run; a product with the Gauss-Newton matrix is
  two."""
  size = {
    'gradient ascent': s.forget,
    'ascent and descent': s.train,
    'fine-tuned on kept': s.train - s.forget,
  }.get(arm, (1 + s.kept_per_forgotten) * s.forget)
  total = setting.steps * size
  if arm.startswith('influence'):
    total += 2 * s.solver_steps * s.curve + s.forget
  if arm == 'retrained':
    total += s.steps * s.batch
  if arm == 'oracles, matched':
    total += s.oracles * s.steps * s.batch
  return total / (s.steps * s.batch)


def _outputs(params: model.Params, p: Problem) -> jax.Array:
  return jax.vmap(lambda params: model.forward(params, p.points_x))(params)


def _to_match(p: Problem) -> Callable[[model.Params, jax.Array], jax.Array]:
  return lambda params, targets: jnp.mean(
    attribution.match_loss(model.forward(params, p.x[p.match]), targets)
  )


def _tuned(loss: Callable, crowd: model.Params, targets: Any, setting: Setting) -> model.Params:
  """Every model of the crowd after steps of Adam down its own loss(params, targets)."""
  optimizer = optax.scale_by_adam()

  def one(params, targets):
    def step(state, _):
      params, moments = state
      slope = jax.grad(loss)(params, targets)
      return model.moved(optimizer, setting.rate, slope, moments, params), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=setting.steps)[0][0]

  return jax.vmap(one)(crowd, targets)


def foretold(
  crowd: model.Params, p: Problem, x: jax.Array, damping: float | jax.Array, s: Settings
) -> jax.Array:
  """Outputs [R, M, 10] at x that each model would have without the forget set, by influence: f(x)
  less J_x applied to -H^-1 (sum of the gradients of the forgotten) / n, one solution for all."""

  def one(params):
    own = lambda params: jnp.sum(
      losses.cross_entropy(model.forward(params, p.x[p.forget]), p.y[p.forget])
    )
    solved = attribution.gauss_newton_solve(
      lambda params: model.forward(params, p.x[p.curve]),
      lambda z: jnp.mean(losses.cross_entropy(z, p.y[p.curve])),
      params, jax.grad(own)(params), damping=damping, steps=s.solver_steps,
    )  # fmt: skip
    outputs, moved = jax.jvp(lambda params: model.forward(params, x), (params,), (solved,))
    effect = -moved[..., None] / s.train
    return attribution.predicted(outputs, effect, jnp.ones(1, bool))

  return jax.vmap(one)(crowd)


# Measurement --------------------------------------------------------------------------------------


class Result(NamedTuple):
  """Of an arm, for one kind of forget set: the setting chosen, its cost, and for each seed the mean
  and the 95th percentile of KLoM over the POINTS."""

  setting: dict[str, float]
  cost: float
  mean: list[list[float]]
  high: list[list[float]]


def study(
  source: Source, s: Settings, kind: str, seeds: int, show: Callable[[Any], Any] = iter
) -> Iterator[tuple[str, Result]]:
  problems = [problem(source, s, kind, seed) for seed in range(TUNING + seeds)]
  key, everything = jax.random.key(79), jnp.ones(s.train)
  keys = lambda *numbers: jax.random.split(
    functools.reduce(jax.random.fold_in, numbers, key), s.models
  )
  whole = trained(keys(0, 0), problems[0], everything, s)  # the same for all forget sets
  crowds = []
  for i, p in enumerate(show(problems)):
    without = everything.at[p.forget].set(0)
    crowds.append(Crowds(whole, *(trained(keys(crowd, i), p, without, s) for crowd in (1, 2))))
  for name in ARMS:
    chosen = min(settings_of(name, s), key=lambda setting: np.nan_to_num(np.mean([
      _measured(name, setting, c, p, s)[0] for c, p in zip(crowds, problems[:TUNING])
    ]), nan=np.inf))  # fmt: skip
    pairs = [_measured(name, chosen, c, p, s) for c, p in zip(crowds[TUNING:], problems[TUNING:])]
    mean, high = ([list(v) for v in part] for part in zip(*pairs))
    yield name, Result(chosen._asdict(), cost(name, chosen, s), mean, high)


def _measured(
  name: str, setting: Setting, crowds: Crowds, p: Problem, s: Settings
) -> tuple[Sequence[float], Sequence[float]]:
  values = np.split(np.asarray(_divergence(name, setting.steps, setting, crowds, p, s)),
                    [s.forget, s.forget + s.points])  # fmt: skip
  return [float(v.mean()) for v in values], [float(np.quantile(v, 0.95)) for v in values]


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _divergence(
  name: str, steps: int, setting: Setting, crowds: Crowds, p: Problem, s: Settings
) -> jax.Array:
  """KLoM of every point. `steps` again: a number that the compiler must know."""
  logits = ARMS[name](crowds, p, setting._replace(steps=steps), s)
  margins = lambda z: jax.vmap(lambda z: scores.logit_margin(z, p.points_y))(z)
  return attribution.klom(margins(logits), margins(_outputs(crowds.oracle, p)))
