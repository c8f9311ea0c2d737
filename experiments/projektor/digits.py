"""Predict and improve mixtures of three label-skewed sources of digits, on a CPU in minutes.

Example:
  python -m experiments.projektor.digits --workdir=runs/projektor

Pilots of 200 and 300 examples on a grid of mixtures are fitted by jaxrw.mixtures.projection and
projected to 900 examples. There the predictions for mixtures that no pilot had are compared with
what training measures, and the mixture found by gradient ascent with uniform and random ones. Every
repetition has its own split, pilots and mixtures; intervals are Student's t over repetitions.
Writes result.json and digits.png. Needs POT and scikit-learn.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import cli
from experiments.errors import UserError

RICH = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))  # the classes a source has most of
SOURCES = len(RICH)
METHODS = ('transport', 'no transport', 'p-blind')

FLAGS = flags.FLAGS


class Settings(NamedTuple):
  """Sizes of the experiment; a test shrinks them."""

  repetitions: int = 5
  sizes: tuple[int, int] = (200, 300)
  target: int = 900
  grid: int = 10  # shares of the pilots' mixtures are multiples of 1 / grid
  draws: int = 5  # pilots of each mixture and size
  held_out: int = 20  # mixtures to predict
  target_draws: int = 5  # runs at the target size for each
  compared_draws: int = 20  # the same for the mixtures compared at the end
  ascent: int = 60  # steps
  rate: float = 4.0
  decay: float = 0.95
  evaluated: int = 300  # validation examples, and as many for the test
  own_share: float = 0.9  # of a source's examples that are of its own classes
  steps: int = 150  # of the learner


class Task(NamedTuple):
  """One split of the digits, seen from its sources."""

  images: np.ndarray  # float32[pool, 64], in [0, 1]
  labels: np.ndarray  # int[pool]
  shares: np.ndarray  # float[m, pool]: how likely source i draws an example
  cost: np.ndarray  # float[pool, v]: transport of one unit from an example to a validation example
  validation: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/projektor')
  from experiments import files, plots

  folder = Path(FLAGS.workdir)
  cli.use_compilation_cache(folder / '.jax_cache')
  record = run(Settings(draws=FLAGS.draws), FLAGS.seed)
  files.write_json(folder / 'result.json', record)
  with files.replacing(folder / 'digits.png') as path:
    path.write_bytes(plots.draw_png(lambda: draw(record, plots.LIGHT), plots.LIGHT))
  print(describe(record), flush=True)


def run(settings: Settings, seed: int = 0) -> dict[str, Any]:
  """All repetitions, and what they show together."""
  library('ot')
  images, labels = load()
  started, repetitions = time.perf_counter(), []
  for index in range(settings.repetitions):
    rng = np.random.default_rng([seed, index])
    repetitions.append(repeat(settings, make_task(images, labels, settings, rng), rng))
    print(f'repetition {index + 1} of {settings.repetitions} done', flush=True)
  record = {
    'settings': settings._asdict(),
    'seed': seed,
    'seconds': time.perf_counter() - started,
    'repetitions': repetitions,
  }
  return record | {'claims': (claims := judge(repetitions)), 'verdict': verdict_of(claims)}


def repeat(settings: Settings, task: Task, rng: np.random.Generator) -> dict[str, Any]:
  """Pilots, fits, predictions of held-out mixtures, and one ascent."""
  from jaxrw.mixtures.projection import project_log

  fit_response, predict, step = _jitted(settings)
  mixtures = grid_mixtures(settings.grid)
  pilots = np.repeat(mixtures, settings.draws, axis=0)
  fits = {'transport': [], 'no transport': [], 'p-blind': []}
  for size in settings.sizes:
    drawn = [sample(task, p, size, rng)[0] for p in pilots]
    accuracy = train(task, np.stack(drawn), settings.steps)[0]
    distances = np.array([transport(task.cost[rows])[0] for rows in drawn])
    for method, values in (('transport', distances), ('no transport', 0 * distances)):
      fits[method].append(fit_response(pilots, values, accuracy))
    fits['p-blind'].append(float(accuracy.mean()))

  held_out = rng.dirichlet(np.ones(SOURCES), settings.held_out)
  measured, test = measure(task, held_out, settings.target_draws, settings, rng)
  predicted = {method: [] for method in METHODS}
  for low_or_high, size in enumerate(settings.sizes):
    near = [mean_distance(task, p, size, settings.draws, rng) for p in held_out]
    for method in METHODS[:2]:
      fit = fits[method][low_or_high]
      predicted[method].append(predict(fit, held_out, np.array(near)))
    predicted['p-blind'].append(np.full(len(held_out), fits['p-blind'][low_or_high]))
  at_target = (*settings.sizes, settings.target)
  predicted = {m: np.asarray(project_log(*pair, *at_target)) for m, pair in predicted.items()}

  path = ascend(settings, task, functools.partial(step, fits['transport']), rng)
  compared = np.stack([path[-1], np.full(SOURCES, 1 / SOURCES)])
  chosen, uniform = measure(task, compared, settings.compared_draws, settings, rng)[1]
  return {
    'held_out': held_out,
    'measured': measured,
    'predicted': predicted,
    'mae': {method: np.mean(np.abs(x - measured)) for method, x in predicted.items()},
    'bias': {method: np.mean(x - measured) for method, x in predicted.items()},
    'r2': {method: r_squared(x, measured) for method, x in predicted.items()},
    'mixture': path[-1],
    'path': path,
    'test': {'chosen': chosen, 'uniform': uniform, 'random': test.mean()},
  }


def ascend(settings: Settings, task: Task, step, rng) -> np.ndarray:
  """float[ascent + 1, m]: from uniform, with new samples of the mixture in every step."""
  path = [np.full(SOURCES, 1 / SOURCES, np.float32)]
  for t in range(settings.ascent):
    samples = [sample(task, path[-1], size, rng) for size in settings.sizes]
    solved = [(*transport(task.cost[rows]), ids) for rows, ids in samples]
    path.append(np.asarray(step(solved, path[-1], settings.rate * settings.decay**t)))
  return np.stack(path)


@functools.cache
def _jitted(settings: Settings):
  """(fit, predict, one step of the ascent), compiled."""
  import jax

  from jaxrw.mixtures import projection

  def step(fits, solved, p, rate):
    slopes = []
    for fit, (distance, potentials, ids) in zip(fits, solved):
      moved = projection.transport_mixture_gradient(potentials, ids, SOURCES)
      slopes.append(projection.performance_gradient(fit, p, distance, moved))
    slope = projection.project_log(*slopes, *settings.sizes, settings.target)
    return projection.improve_mixture(p, slope, rate)

  fit, predict = projection.fit_mixture_response, projection.predict_performance
  return jax.jit(fit), jax.jit(predict), jax.jit(step)


# Data and transport -------------------------------------------------------------------------------


def library(name: str) -> Any:
  """The module, or an error that says what to install."""
  # We pass NumPy arrays; every other backend would import its framework.
  for backend in ('JAX', 'PYTORCH', 'TENSORFLOW', 'CUPY') if name == 'ot' else ():
    os.environ.setdefault(f'POT_BACKEND_DISABLE_{backend}', '1')
  package = {'ot': 'POT', 'sklearn.datasets': 'scikit-learn'}[name]
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise UserError(f'this experiment needs {package}: pip install {package}') from e


def load() -> tuple[np.ndarray, np.ndarray]:
  """All digits: images float32[n, 64] in [0, 1] and labels int[n]."""
  images, labels = library('sklearn.datasets').load_digits(return_X_y=True)
  return (images / 16).astype(np.float32), labels


def make_task(images, labels, settings: Settings, rng: np.random.Generator) -> Task:
  """Splits the digits; sources differ in how often they draw a class, and draw with replacement."""
  validation, test, pool = np.split(
    rng.permutation(len(labels)), [settings.evaluated, 2 * settings.evaluated]
  )
  own = np.stack([np.isin(np.arange(10), classes) for classes in RICH])
  by_class = np.where(
    own,
    settings.own_share / own.sum(1, keepdims=True),
    (1 - settings.own_share) / (~own).sum(1, keepdims=True),
  )
  shares = (by_class / np.bincount(labels[pool], minlength=10))[:, labels[pool]]
  return Task(
    images[pool],
    labels[pool],
    shares / shares.sum(1, keepdims=True),
    label_cost(images[pool], labels[pool], images[validation], labels[validation]),
    (images[validation], labels[validation]),
    (images[test], labels[test]),
  )


def label_cost(images, labels, val_images, val_labels) -> np.ndarray:
  """|x - x'| + the transport distance between the images of the two labels: float[n, v]."""
  cost = np.sqrt(np.maximum(
    np.sum(images**2, 1)[:, None] + np.sum(val_images**2, 1) - 2 * images @ val_images.T, 0
  )).astype(np.float64)  # fmt: skip
  classes = range(10)
  # Sources differ in how often they show a class, not in what it looks like.
  few = [np.flatnonzero(labels == c)[:60] for c in classes]
  between = np.array(
    [[transport(cost[np.ix_(few[c], val_labels == d)])[0] for d in classes] for c in classes]
  )
  return cost + between[labels][:, val_labels]


def transport(cost: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
  """(exact transport distance, potentials of the rows), with equal weights of the columns."""
  ot = library('ot')
  columns = np.full(cost.shape[1], 1 / cost.shape[1])
  rows = np.full(len(cost), 1 / len(cost)) if weights is None else weights
  distance, log = ot.emd2(rows, columns, cost, log=True, numItermax=1_000_000)
  return float(distance), log['u']


def sample(task: Task, mixture, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
  """(rows of the pool, their sources), both int[size]: size p_i of source i, rounded."""
  counts = np.diff(np.rint(np.cumsum(mixture) * size).astype(int), prepend=0)
  drawn = [rng.choice(len(task.labels), n, p=share) for n, share in zip(counts, task.shares)]
  return np.concatenate(drawn), np.repeat(np.arange(SOURCES), counts)


def mean_distance(task: Task, mixture, size: int, draws: int, rng) -> float:
  samples = [sample(task, mixture, size, rng)[0] for _ in range(draws)]
  return float(np.mean([transport(task.cost[rows])[0] for rows in samples]))


def grid_mixtures(grid: int) -> np.ndarray:
  """float[k, 3]: all mixtures of three sources in steps of 1 / grid."""
  return np.array([
    (i, j, grid - i - j) for i in range(grid + 1) for j in range(grid + 1 - i)
  ]) / grid  # fmt: skip


# Learner ------------------------------------------------------------------------------------------


def train(task: Task, rows: np.ndarray, steps: int) -> np.ndarray:
  """float[2, k]: accuracy on validation and test of k models, each trained on rows[k]."""
  arguments = (task.images, task.labels, rows, task.validation, task.test)
  return np.asarray(_learner()(*arguments, steps))


def measure(task: Task, mixtures, draws: int, settings: Settings, rng) -> np.ndarray:
  """float[2, k]: the same at the target size for k mixtures, each the mean of some runs."""
  rows = [sample(task, p, settings.target, rng)[0] for p in mixtures for _ in range(draws)]
  accuracy = train(task, np.stack(rows), settings.steps)
  return accuracy.reshape(2, len(mixtures), draws).mean(-1)


@functools.cache
def _learner():
  """Multinomial logistic regression by full-batch Adam, many models at a time."""
  import jax
  import jax.numpy as jnp
  import optax

  optimizer = optax.adam(0.05)

  def accuracy(params, images, labels):
    return jnp.mean(jnp.argmax(images @ params['w'] + params['b'], axis=-1) == labels)

  @functools.partial(jax.jit, static_argnums=5)
  def train_all(images, labels, rows, validation, test, steps):
    def one(rows):
      x, y = images[rows], labels[rows]

      def loss(params):
        logits = x @ params['w'] + params['b']
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(errors) + 1e-3 * jnp.sum(params['w'] ** 2)

      def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

      params = {'w': jnp.zeros((images.shape[1], 10)), 'b': jnp.zeros(10)}
      (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
      return jnp.stack([accuracy(params, *validation), accuracy(params, *test)])

    return jax.vmap(one, out_axes=1)(rows)

  return train_all


# What it shows ------------------------------------------------------------------------------------


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
  return 1 - np.sum((predicted - measured) ** 2) / np.sum((measured - measured.mean()) ** 2)


def judge(repetitions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Four claims, each as a difference that should be positive, with its interval."""
  from experiments import stats

  column = lambda key, name: [r[key][name] for r in repetitions]
  pairs = {
    'error below no transport': ('mae', 'no transport', 'transport'),
    'error below p-blind': ('mae', 'p-blind', 'transport'),
    'gain over uniform p': ('test', 'chosen', 'uniform'),
    'gain over random p': ('test', 'chosen', 'random'),
  }
  paired = {
    claim: stats.paired(column(key, a), column(key, b)) for claim, (key, a, b) in pairs.items()
  }
  return {claim: p._asdict() | {'verdict': p.verdict} for claim, p in paired.items()}


def verdict_of(claims: dict[str, dict[str, Any]]) -> str:
  """'reproduced' if every claim is resolved in its favor, 'not reproduced' if one is against it."""
  found = {claim['verdict'] for claim in claims.values()}
  if found == {'higher'}:
    return 'reproduced'
  return 'not reproduced' if 'lower' in found else 'undecided'


def describe(record: dict[str, Any]) -> str:
  """The tables, and one line of verdict."""
  from experiments.verdict import format_table

  runs = record['repetitions']
  mean = lambda key, name: float(np.mean([r[key][name] for r in runs]))
  errors = format_table(
    ('prediction at the target size', 'MAE', 'bias', 'R2'),
    [
      (m, f'{mean("mae", m):.4f}', f'{mean("bias", m):+.4f}', f'{mean("r2", m):+.2f}')
      for m in METHODS
    ],
  )
  tests = format_table(
    ('mixture', 'test accuracy'), [(m, f'{mean("test", m):.4f}') for m in runs[0]['test']]
  )
  interval = lambda c: '-' if c['low'] is None else f'{c["low"]:+.4f} to {c["high"]:+.4f}'
  words = {'higher': 'holds', 'lower': 'fails', 'unresolved': 'open', 'single': 'open'}
  claims = format_table(
    ('claim', 'difference', '95% interval', ''),
    [
      (name, f'{c["mean"]:+.4f}', interval(c), words[c['verdict']])
      for name, c in record['claims'].items()
    ],
  )
  chosen = [' '.join(f'{x:.2f}' for x in r['mixture']) for r in runs]
  which = {
    word: ', '.join(name for name, c in record['claims'].items() if words[c['verdict']] == word)
    for word in ('holds', 'fails', 'open')
  }
  parts = '; '.join(f'{word}: {names}' for word, names in which.items() if names)
  return '\n\n'.join(
    [
      errors,
      tests,
      claims,
      f'chosen p, by repetition: {"; ".join(chosen)} (class-balanced: 0.40 0.30 0.30)',
      f'Verdict: {record["verdict"]} ({parts}). {len(runs)} repetitions, '
      f'{record["seconds"]:.0f} s.',
    ]
  )


def draw(record: dict[str, Any], theme) -> Any:
  """Predicted against measured, and the claims with their intervals."""
  from matplotlib.figure import Figure

  from experiments.plots import MARKERS

  figure = Figure(figsize=(8.6, 4.0), layout='constrained')
  left, right = figure.subplots(1, 2)
  measured = np.concatenate([r['measured'] for r in record['repetitions']])
  ends = [measured.min(), measured.max()]
  left.plot(ends, ends, color=theme.ink, lw=1)
  for i, method in enumerate(METHODS, 1):
    predicted = np.concatenate([r['predicted'][method] for r in record['repetitions']])
    left.plot(
      measured, predicted, MARKERS[i], color=theme.colors[i], ms=3.5, alpha=0.7, label=method
    )
  left.set_xlabel(f'measured accuracy, {record["settings"]["target"]} examples')
  left.set_ylabel('predicted from pilots')
  left.legend(frameon=False)
  left.grid()
  names = list(record['claims'])[::-1]
  right.axvline(0, color=theme.ink, lw=1)
  for y, name in enumerate(names):
    claim = record['claims'][name]
    if claim['low'] is not None:
      right.plot([claim['low'], claim['high']], [y, y], color=theme.colors[1], lw=2)
    right.plot(claim['mean'], y, 'o', color=theme.colors[1])
  right.set_yticks(range(len(names)), names)
  right.set_ylim(-0.6, len(names) - 0.4)
  right.set_xlabel('accuracy      better →')
  right.grid(axis='x')
  return figure


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and digits.png')
  flags.DEFINE_integer(
    'draws', 5, 'pilots of each mixture and size; more of them, less noise', lower_bound=1
  )
  flags.DEFINE_integer('seed', 0, 'of the first repetition')
  cli.run(main)
