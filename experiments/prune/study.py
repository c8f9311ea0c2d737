"""Scores of a training set, subsets by them, and models trained on each for as many steps.

An arm is a schedule of rows, int[steps, batch], made in advance: epochs over a fixed subset, or,
for the controls, over all data. So one compiled program trains every arm, fraction, seed and rate.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import stats
from experiments.classify import model
from experiments.classify.sources import Examples, Source
from experiments.errors import UserError
from jaxrw import losses, scores, selection

TUNING = 2  # seeds that choose the learning rates; the results are of others
TEACHER = 4.0  # temperature
_QUICK = {'xla_backend_optimization_level': 0}  # compiles in a fifth of the time


class Settings(NamedTuple):
  """What the sizes are.

  Attributes:
    examples: of the training set, before pruning.
    held: of the validation set, which chooses learning rates.
    steps, batch: of every training.
    score_steps, scorers: length of the runs that score, and how many there are to average over.
    noise: share of labels that are replaced by another class, in training and validation.
    rates: of Adam, with a cosine to 0.
  """

  examples: int
  held: int
  steps: int
  batch: int = 64
  score_steps: int = 100
  scorers: int = 5
  hidden: int = 64
  noise: float = 0.0
  rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)


class Problem(NamedTuple):
  """Of one seed; `wrong` bool[n] says which training labels were replaced."""

  train: Examples
  validation: Examples
  test: Examples
  wrong: np.ndarray


def problem(source: Source, settings: Settings, seed: int) -> Problem:
  """Sets of one seed, standardized by the training set."""
  rng = np.random.default_rng([seed, 77])
  order = rng.permutation(len(source.pool.y))
  n, held = settings.examples, settings.held
  if len(order) < n + held + (source.test is None):
    raise UserError(f'{source.name} has {len(order)} examples; this study needs over {n + held}')
  train, validation, rest = (source.pool.take(r) for r in np.split(order, [n, n + held]))
  classes = int(source.pool.y.max()) + 1
  both = np.concatenate([train.y, validation.y])
  wrong = rng.permutation(len(both)) < round(settings.noise * len(both))
  labels = np.where(wrong, (both + rng.integers(1, classes, len(both))) % classes, both)
  labels = labels.astype(np.int32)
  mean, sd = train.x.mean(0), train.x.std(0) + 1e-2
  scaled = lambda e: e._replace(x=((e.x - mean) / sd).astype(np.float32))
  return Problem(
    scaled(train._replace(y=labels[:n])),
    scaled(validation._replace(y=labels[n:])),
    scaled(source.test or rest),
    wrong[:n],
  )


# Training -----------------------------------------------------------------------------------------


def epochs(rng: np.random.Generator, rows: np.ndarray, steps: int, batch: int) -> np.ndarray:
  """Rows of every step, int32[steps, batch]: shuffled anew whenever all have been used."""
  passes = -(-steps * batch // len(rows))
  dealt = np.concatenate([rng.permutation(rows) for _ in range(passes)])
  return dealt[: steps * batch].reshape(steps, batch).astype(np.int32)


def rounds(seed: int, n: int, kept: int, steps: int, batch: int) -> np.ndarray:
  """RS2 without replacement: a new subset of `kept` rows for every pass over as many."""
  key = jax.random.key(seed)
  draw = jax.jit(functools.partial(selection.rs2, key, size=n, budget=kept))
  dealt = np.concatenate([draw(r) for r in range(-(-steps * batch // kept))])
  return dealt[: steps * batch].reshape(steps, batch).astype(np.int32)


@functools.partial(jax.jit, static_argnames=('hidden', 'classes'), compiler_options=_QUICK)
def train(
  x: jax.Array,
  y: jax.Array,
  schedules: jax.Array,
  seeds: jax.Array,
  rates: jax.Array,
  alphas: jax.Array,
  teachers: jax.Array,
  *,
  hidden: int,
  classes: int,
) -> model.Params:
  """Parameters of R models, the leading axis of all arguments and of the result.

  Args:
    x, y: float[R, n, d], int[R, n].
    schedules: int[R, steps, batch].
    seeds: int[R], of the initial parameters.
    rates: float[R].
    alphas: float[R], weight of the teacher; 0 trains on labels.
    teachers: float[R, n, C], logits; zeros without one.
  """
  steps = schedules.shape[1]
  decay = optax.cosine_decay_schedule(1.0, steps)
  optimizer = model.adam(1e-4)

  def one(x, y, schedule, seed, rate, alpha, teacher):
    params = model.initial(jax.random.key(seed), x.shape[1], hidden, classes)

    def objective(params, rows):
      logits = model.forward(params, x[rows])
      hard = losses.cross_entropy(logits, y[rows])
      soft = losses.distillation(logits, teacher[rows], y[rows], alpha=1.0, temperature=TEACHER)
      return jnp.mean((1 - alpha) * hard + alpha * soft)

    def step(carry, now):
      params, moments = carry
      rows, t = now
      slope = jax.grad(objective)(params, rows)
      return model.moved(optimizer, rate * decay(t), slope, moments, params), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, (schedule, jnp.arange(steps)))[0][0]

  return jax.vmap(one)(x, y, schedules, seeds, rates, alphas, teachers)


@jax.jit
def outputs(params: model.Params, x: jax.Array) -> jax.Array:
  """Logits [R, n, C] of R models on their own x [R, n, d]."""
  return jax.vmap(model.forward)(params, x)


# Scores -------------------------------------------------------------------------------------------


def score(problems: Sequence[Problem], settings: Settings, classes: int) -> list[dict[str, Any]]:
  """Scores of every problem's training set, by models trained for a few steps: the mean over them.

  All of all problems' models are trained at once, and at one rate, the middle one.
  """
  each = [(i, s) for i in range(len(problems)) for s in range(settings.scorers)]
  of = lambda leaf: jnp.stack([leaf(problems[i].train) for i, _ in each])
  x, y = of(lambda e: e.x), of(lambda e: e.y)
  n, steps = x.shape[1], settings.score_steps
  schedules = [
    epochs(np.random.default_rng([i, s, 5]), np.arange(n), steps, settings.batch) for i, s in each
  ]
  fixed = {'hidden': settings.hidden, 'classes': classes}
  count = len(each)
  rate = sorted(settings.rates)[len(settings.rates) // 2]
  params = train(
    x, y, jnp.asarray(np.stack(schedules)), jnp.arange(count) + 1000, jnp.full(count, rate),
    jnp.zeros(count), jnp.zeros((count, n, classes)), **fixed,
  )  # fmt: skip
  logits = outputs(params, x)
  hidden = jax.vmap(lambda p, x: jax.nn.relu(x @ p['in'] + p['in_bias']))(params, x)
  values = {
    'el2n': scores.el2n(logits, y),
    'grand': jax.vmap(scores.grand_last_layer)(logits, y, hidden),
    'margin': scores.margin_error(logits, y),
  }
  own = jax.vmap(lambda h, y: scores.prototype_distance(
    h, scores.class_prototypes(h, y, classes), y
  ))  # fmt: skip
  values['prototype'] = own(hidden, y)
  mean = lambda v: np.asarray(v).reshape(len(problems), settings.scorers, n).mean(1)
  means = {name: mean(v) for name, v in values.items()}
  return [{name: v[i] for name, v in means.items()} for i in range(len(problems))]


class Arm(NamedTuple):
  """A way of choosing.

  Attributes:
    choose: (scores, labels, budget, rng) -> rows, or None for a control that sees all data.
    distilled: trained with a teacher that saw all data.
  """

  choose: Callable[[dict[str, Any], np.ndarray, int, np.random.Generator], np.ndarray] | None
  distilled: bool = False


def _by(name: str, side: str, skip: float = 0.0):
  """The budget's best by a score; `skip` is a share of all examples."""

  def choose(found, labels, budget, rng):
    passed = min(round(skip * len(labels)), len(labels) - budget)
    kept = selection.keep_window(jnp.asarray(found[name]), budget, side=side, skip=passed)
    return np.flatnonzero(kept)

  return choose


def _balanced(name: str, side: str):
  def choose(found, labels, budget, rng):
    sizes = np.bincount(labels)
    budgets = selection.group_budgets(sizes, np.zeros(len(sizes)), budget, floor=1.0)
    kept = selection.keep_by_group(
      jnp.asarray(found[name]), jnp.asarray(labels), budgets, side=side
    )
    return np.flatnonzero(kept)

  return choose


def _random(found, labels, budget, rng):
  return rng.permutation(len(labels))[:budget]


def _stratified(found, labels, budget, rng):
  key = jax.random.key(int(rng.integers(1 << 31)))
  skip = 0.1 if budget <= 0.9 * len(labels) else 0.0
  return np.flatnonzero(selection.stratified(key, found['el2n'], budget, skip=skip))


ARMS = {
  'random': Arm(_random),
  'el2n high': Arm(_by('el2n', 'high')),
  'el2n window': Arm(_by('el2n', 'high', 0.1)),  # without the hardest tenth
  'el2n low balanced': Arm(_balanced('el2n', 'low')),
  'grand high': Arm(_by('grand', 'high')),
  'prototype far': Arm(_by('prototype', 'high')),
  'prototype near': Arm(_by('prototype', 'low')),
  'stratified': Arm(_stratified),
  'random distilled': Arm(_random, distilled=True),
  'rs2': Arm(None),  # controls: a new subset every round; all data, the schedule compressed
  'all data': Arm(None),
}


class Result(NamedTuple):
  """Of an arm at a fraction: the rate chosen, accuracy of all seeds, and share of wrong labels kept
  (of all data for the controls)."""

  rate: float
  accuracy: list[float]
  wrong_kept: float


def run(
  source: Source,
  settings: Settings,
  arms: Sequence[str],
  fractions: Sequence[float],
  seeds: int,
) -> Iterator[tuple[str, float, Result, float]]:
  """(arm, fraction, result, seconds), one after the other."""
  problems = [problem(source, settings, s) for s in range(TUNING + seeds)]
  classes = int(source.pool.y.max()) + 1
  found = score(problems, settings, classes)
  teachers = None
  for name in arms:
    arm = ARMS[name]
    if arm.distilled and teachers is None:
      teachers = teach(problems, settings, classes)
    for fraction in fractions:
      begun = time.perf_counter()
      result = _measure(name, arm, fraction, problems, found, teachers, settings, classes)
      yield name, fraction, result, time.perf_counter() - begun


def teach(problems: Sequence[Problem], settings: Settings, classes: int) -> np.ndarray:
  """Logits [P, n, C] of a model trained on all of each problem's data, for as many steps, at the
  middle rate."""
  n, count = settings.examples, len(problems)
  rows = [
    epochs(np.random.default_rng([i, 9]), np.arange(n), settings.steps, settings.batch)
    for i in range(count)
  ]
  x, y = (jnp.stack([leaf(p.train) for p in problems]) for leaf in (lambda e: e.x, lambda e: e.y))
  rate = sorted(settings.rates)[len(settings.rates) // 2]
  params = train(
    x, y, jnp.asarray(np.stack(rows)), jnp.arange(count) + 500, jnp.full(count, rate),
    jnp.zeros(count), jnp.zeros((count, n, classes)), hidden=settings.hidden, classes=classes,
  )  # fmt: skip
  return np.asarray(outputs(params, x))


def _measure(name, arm, fraction, problems, found, teachers, settings, classes) -> Result:
  """Chooses the rate on the tuning seeds, then trains the others at it."""
  budget, seeds = max(1, round(fraction * settings.examples)), range(len(problems))
  schedules, wrong = [], []
  for s in seeds:
    rng = np.random.default_rng([s, budget, 3])
    if arm.choose is None and name == 'rs2':
      schedules.append(rounds(s, settings.examples, budget, settings.steps, settings.batch))
      wrong.append(problems[s].wrong.mean())
      continue
    rows = np.arange(settings.examples)
    if arm.choose is not None:
      rows = arm.choose(found[s], problems[s].train.y, budget, rng)
    wrong.append(problems[s].wrong[rows].mean())
    schedules.append(epochs(rng, rows, settings.steps, settings.batch))
  alpha = 1 - 0.5 * fraction if arm.distilled else 0.0

  def trained(runs: Sequence[tuple[int, float]]) -> model.Params:
    which = [s for s, _ in runs]
    of = lambda leaf: jnp.stack([leaf(problems[s].train) for s in which])
    shape = (len(runs), settings.examples, classes)
    teacher = jnp.asarray(teachers[which]) if arm.distilled else jnp.zeros(shape)
    return train(
      of(lambda e: e.x), of(lambda e: e.y), jnp.asarray(np.stack([schedules[s] for s in which])),
      jnp.asarray(which), jnp.asarray([rate for _, rate in runs]), jnp.full(len(runs), alpha),
      teacher, hidden=settings.hidden, classes=classes,
    )  # fmt: skip

  def accuracies(runs, part) -> np.ndarray:
    params, sets = trained(runs), [part(problems[s]) for s, _ in runs]
    logits = np.asarray(outputs(params, jnp.stack([e.x for e in sets])))
    return np.array([np.mean(z.argmax(-1) == e.y) for z, e in zip(logits, sets)])

  tuning = [(s, rate) for rate in settings.rates for s in range(TUNING)]
  tried = accuracies(tuning, lambda p: p.validation).reshape(-1, TUNING).mean(1)
  rate = settings.rates[int(np.argmax(tried))]
  reached = accuracies([(s, rate) for s in seeds if s >= TUNING], lambda p: p.test)
  return Result(rate, reached.tolist(), float(np.mean(wrong)))


# What it shows ------------------------------------------------------------------------------------


def noise_auc(source: Source, settings: Settings, seeds: int) -> dict[str, stats.Paired]:
  """How often a wrong label scores above a right one (.5 is chance), by score."""
  problems = [problem(source, settings, s) for s in range(TUNING, TUNING + seeds)]
  found = score(problems, settings, int(source.pool.y.max()) + 1)
  out = {}
  for name in found[0]:
    values = [stats.auc(f[name], p.wrong) for f, p in zip(found, problems)]
    out[name] = stats.paired(values, np.zeros(len(values)))
  return out
