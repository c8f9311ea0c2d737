"""Repeat the best data, or add the second best? A utility law against runs, at every compute.

  python -m experiments.carve --source=my/text --out=my/pages
  python -m experiments.repetition --config=configs/lm.py:path=my/pages,steps=1024,batch=8 \\
    --pools=qa,web,code --target=qa --bytes=65536 --seeds=3 --workdir=runs/repetition

Each domain of --pools is cut to --bytes, so that all are equally large and soon repeated. A model
is trained on each pool alone, at a constant learning rate, so that one run shows its error at every
compute; the law of Scaling Laws for Data Filtering is fitted to these curves, with one scale and
one floor for all pools. The law then says how the best two, three, ... pools would do mixed, and
how many to mix at which compute. Those mixtures are trained, too, and the two are compared. The
error is bits per byte on validation text of --target.

Every run resumes; repeat the command to continue. Prints two tables and what the claims come to;
writes WORKDIR/repetition.json and WORKDIR/repetition.png.

Scaling Laws for Data Filtering, CVPR 2024 (arXiv 2404.07177), is about image and text pairs and
zero-shot accuracy. That its law holds for bits per byte, too, is our assumption, tested here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from scipy import optimize

from configs.common import set_mixture, set_weighting
from experiments import cli, compare, files, stats
from experiments import config as config_lib
from experiments.board import Board, lookup
from experiments.data import corpus as corpus_lib
from experiments.errors import UserError
from experiments.verdict import format_table
from jaxrw import mixtures

FLAGS = flags.FLAGS
EVALUATIONS = 32
HALF_LIVES = (0.05, 100.0)  # epochs, the ends of the search
# The law counts examples in units of 100,000, and the paper's pools have 12.8M. Where pools share a
# scale, the unit matters: after one unit of examples their curves meet. So pools of any size are
# told to the law as if they had as many examples as the paper's.
_PAPERS_POOL = 12.8e6
_EQUAL = 1.1  # pools whose sizes differ by less than this factor are equally large, as the law asks


class Curve(NamedTuple):
  """One arm: bits per byte on the target after so many examples."""

  samples: np.ndarray  # float64[m]
  errors: np.ndarray  # float64[seeds, m]


class Law(NamedTuple):
  """The fit to all pools: two numbers of each, and two for all."""

  utilities: np.ndarray  # float64[P], b
  half_lives: np.ndarray  # float64[P], tau
  scale: float
  floor: float
  residual: float  # root mean square, in bits per byte

  def of(self, pools: Sequence[int]) -> Law:
    """The law of some of the pools."""
    index = list(pools)
    return self._replace(utilities=self.utilities[index], half_lives=self.half_lives[index])

  def predict(self, samples: np.ndarray, pool_size: float) -> np.ndarray:
    """Errors after so many examples of its pools mixed, float64[m]."""
    found = mixtures.repeated_data_error(
      np.asarray(samples) * _PAPERS_POOL / pool_size,
      _PAPERS_POOL,
      self.utilities,
      self.half_lives,
      self.scale,
      self.floor,
    )
    return np.asarray(found, np.float64)


class Study(NamedTuple):
  """What was measured and predicted; arms are the best pool, the best two, ..."""

  pools: tuple[str, ...]  # the best first
  pool_size: float  # examples
  law: Law  # of the pools in this order
  alone: tuple[Curve, ...]  # each pool
  mixed: tuple[Curve, ...]  # the best p pools, p = 1, 2, ...
  predicted: np.ndarray  # float64[P, m]


def study_config(
  config: ConfigDict, pools: Sequence[str], target: str, pool_bytes: int
) -> ConfigDict:
  """The config of every run of the study, but for the mixture.

  Raises:
    UserError: fewer than two pools, one that is there twice, or no target.
  """
  if len(pools) < 2 or not all(pools) or len(set(pools)) < len(pools) or '+' in ''.join(pools):
    listed = ','.join(pools)
    raise UserError(f'--pools={listed}: must be two domains or more, each once and without a +')
  if not target:
    raise UserError('--target is missing: name the domain on whose validation text to measure')
  if pool_bytes < 1:
    raise UserError(f'--bytes={pool_bytes}: must be at least 1')
  config = config_lib.from_json(config_lib.to_json(config))
  set_weighting(config, 'uniform')
  set_mixture(config, '')
  config.data.domains = tuple(sorted({*pools, target}))
  config.data.max_bytes_per_domain = pool_bytes
  config.optim.schedule = 'constant'
  config.eval.every = max(1, config.total_steps // EVALUATIONS)
  config.checkpoint.every = max(1, config.total_steps // 4)
  config.log.examples_every = 0
  config_lib.check(config)
  return config


def pool_size(config: ConfigDict, pools: Sequence[str]) -> float:
  """Blocks in one pool.

  Raises:
    UserError: an unknown domain, or pools that are not equally large.
  """
  corpus = corpus_lib.open_corpus(config.data)
  sizes = dict(zip(corpus.domains, corpus.sizes('train').tolist()))
  sizes = {name: sizes[name] for name in pools}
  if min(sizes.values()) < 1 or max(sizes.values()) > _EQUAL * min(sizes.values()):
    listed = ', '.join(f'{name} {size:,}' for name, size in sizes.items())
    raise UserError(
      f'the pools are not equally large ({listed} blocks), which the law is for: choose larger '
      'domains or fewer --bytes, and cut long documents to pages with experiments.carve'
    )
  return float(np.mean(list(sizes.values())))


def train_arms(
  config: ConfigDict, arms: dict[str, Sequence[str]], seeds: int, folder: Path, jobs: int
) -> Board:
  """A board with a run for each arm, {name: the domains it is trained on}, and seed."""
  others = lambda pools: '+'.join(d for d in config.data.domains if d not in pools)
  mixture = lambda pools: f'uniform except {left}' if (left := others(pools)) else 'uniform'
  plan = compare.Plan(
    config=config,
    weightings=tuple(f'{n}:=uniform@data.mixture={mixture(p)}' for n, p in arms.items()),
    lrs=(config.optim.lr,),
    seeds=tuple(range(config.seed, config.seed + seeds)),
    metric='macro_bpb',
    folder=folder,
  )
  return compare.compare(plan, jobs=jobs)


def curves_of(board: Board, target: str, batch_size: int, pool_size: float) -> list[Curve]:
  """The curve of each arm from one pool's worth of examples on.

  Raises:
    UserError: a run that diverged.
  """
  found = []
  for arm in board.arms:
    if arm.diverged_seeds:
      raise UserError(f'{arm.name} diverged on seed {arm.diverged_seeds[0]}: lower config.optim.lr')
    rows = [run.rows('eval') for run in arm.runs]
    samples = np.array([row['step'] * batch_size for row in rows[0]], np.float64)
    errors = np.array([[lookup(row, f'bpb/{target}') for row in of_run] for of_run in rows])
    kept = samples >= pool_size
    found.append(Curve(samples[kept], errors[:, kept]))
  return found


def fit(curves: Sequence[Curve], pool_size: float) -> Law:
  """Least squares of the law to the seeds' mean curves, scale and floor shared by all pools.

  From several starts, because a lower floor looks much like a smaller utility.

  Raises:
    UserError: too few evaluations.
  """
  means = np.array([curve.errors.mean(0) for curve in curves])
  if means.shape[1] < 5:
    raise UserError(
      f'{means.shape[1]} evaluations after the first epoch of a pool are too few to fit the law: '
      'train for more steps, or with fewer --bytes'
    )
  samples = curves[0].samples * _PAPERS_POOL / pool_size
  epochs, count, lowest = int(np.ceil(samples[-1] / _PAPERS_POOL)) + 1, len(means), means.min()

  def unpack(x):
    """(utilities, half-lives, scale, floor); the logarithms keep signs."""
    return -jnp.exp(x[2 : 2 + count]), jnp.exp(x[2 + count :]), jnp.exp(x[0]), x[1]

  def residuals(x):
    utilities, half_lives, scale, floor = unpack(x)
    of_pool = lambda b, tau: mixtures.repeated_data_error(
      samples, _PAPERS_POOL, b, tau, scale, floor, max_epochs=epochs
    )
    return (jax.vmap(of_pool)(utilities, half_lives) - means).ravel()

  def pack(scale, floor, utility, half_life):
    """One point, with the same utility (its size) and half-life for all pools."""
    each = [np.log(utility)] * count + [np.log(half_life)] * count
    return np.array([np.log(scale), floor, *each])

  with jax.enable_x64(True):
    value, slope = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))
    fits = [
      optimize.least_squares(
        lambda x: np.asarray(value(x)),
        pack(2.0, part * lowest, 0.2, tau),
        jac=lambda x: np.asarray(slope(x)),
        bounds=(pack(1e-3, 0, 1e-3, HALF_LIVES[0]), pack(1e3, lowest, 5, HALF_LIVES[1])),
      )
      for part in (0.1, 0.5, 0.9)
      for tau in (1.0, 4.0)
    ]
    best = min(fits, key=lambda found: found.cost)
    utilities, half_lives, scale, floor = (np.asarray(part) for part in unpack(best.x))
  residual = float(np.sqrt(np.mean(best.fun**2)))
  return Law(utilities, half_lives, float(scale), float(floor), residual)


def make_study(
  pools: Sequence[str],
  size: float,
  law: Law,
  order: Sequence[int],
  alone: Sequence[Curve],
  mixed: Sequence[Curve],
) -> Study:
  """Everything by the order of the pools; `mixed` are the best two, the best three, ..."""
  alone = tuple(alone[i] for i in order)
  law = law.of(order)
  predicted = [law.of(range(p + 1)).predict(alone[0].samples, size) for p in range(len(order))]
  return Study(
    tuple(pools[i] for i in order), size, law, alone, (alone[0], *mixed), np.array(predicted)
  )


# What it says -------------------------------------------------------------------------------------


def names(study: Study) -> list[str]:
  """'qa', 'best 2', 'best 3', ..."""
  return [study.pools[0], *(f'best {p}' for p in range(2, len(study.pools) + 1))]


def at(study: Study) -> list[int]:
  """Positions on the curves nearest to 1, 2, 4, ... epochs of one pool."""
  epochs = study.alone[0].samples / study.pool_size
  wanted = 2.0 ** np.arange(int(np.ceil(np.log2(epochs[-1]))) + 1)
  return list(dict.fromkeys(int(np.argmin(np.abs(epochs - w))) for w in wanted))


def measured(study: Study) -> np.ndarray:
  """Mean over seeds, float64[P, m]."""
  return np.array([curve.errors.mean(0) for curve in study.mixed])


def claims(study: Study) -> list[str]:
  """What the runs say of each claim of the paper."""
  found, index = measured(study), at(study)
  chosen = study.predicted.argmin(0)
  lines = [
    f'the law fits each pool alone: {study.law.residual:.3f} bits per byte off (root mean square)'
  ]
  # The law has seen no mixture. Without it one might take the mean of what its pools do alone, or
  # what the best of them does.
  pools = np.array([curve.errors.mean(0) for curve in study.alone])
  guesses = {
    "their pools' mean": np.cumsum(pools, axis=0) / np.arange(1, len(pools) + 1)[:, None],
    'their best pool': np.minimum.accumulate(pools, axis=0),
  }
  off = lambda guess: np.abs(guess[1:] - found[1:]).mean()
  by_guess = ', '.join(f'{name} {off(guess):.3f}' for name, guess in guesses.items())
  lines.append(
    f'it predicts mixtures: {off(study.predicted):.3f} bits per byte off (mean), {by_guess}: '
    f'{_verdict(off(study.predicted) < min(map(off, guesses.values())))}'
  )
  # What more pools than the best are worth, at the least and the most compute.
  more = 1 + int(found[1:, -1].argmin())
  gains = study.mixed[more].errors - study.mixed[0].errors
  grows = stats.paired(gains[:, -1], gains[:, index[0]])
  interval = '' if grows.low is None else f' ({grows.low:+.3f} to {grows.high:+.3f})'
  lines.append(
    f'more compute wants more pools: {names(study)[more]} against the best alone '
    f'{gains[:, index[0]].mean():+.3f} at first and {gains[:, -1].mean():+.3f} at last, by '
    f'{grows.mean:+.3f}{interval}: {_verdict(grows.high is not None and grows.high < 0)}'
  )
  regret = lambda choice: (found[choice, np.arange(found.shape[1])] - found.min(0))[index].mean()
  ours, fixed = regret(chosen), [regret(np.full(len(chosen), p)) for p in range(len(found))]
  lines.append(
    f'its choice of pools: {ours:.3f} bits per byte above the best one, averaged over the computes '
    f'of the table; best fixed choice {min(fixed):.3f} ({names(study)[int(np.argmin(fixed))]}): '
    f'{_verdict(ours < min(fixed))}'
  )
  return lines


def _verdict(holds: bool) -> str:
  return 'reproduced' if holds else 'not reproduced'


def tables(study: Study) -> str:
  """The fit, then measured and predicted errors at 1, 2, 4, ... epochs of one pool."""
  law, found = study.law, measured(study)
  fitted = format_table(
    ('pool', 'utility', 'half-life, epochs'),
    [
      (name, f'{b:.4f}', f'{tau:.2f}')
      for name, b, tau in zip(study.pools, law.utilities, law.half_lives)
    ],
  )
  rows = []
  for i in at(study):
    cells = [f'{m:.3f} / {p:.3f}' for m, p in zip(found[:, i], study.predicted[:, i])]
    best, chosen = found[:, i].argmin() + 1, study.predicted[:, i].argmin() + 1
    samples = study.alone[0].samples[i]
    rows.append(
      (f'{samples:,.0f}', f'{samples / study.pool_size:.1f}', *cells, f'{best} / {chosen}')
    )
  head = ('examples', 'epochs of one pool', *names(study), 'best')
  shared = f'scale {law.scale:.4g}, floor {law.floor:.4g}, pools of {study.pool_size:,.0f} blocks'
  if np.any((law.half_lives < 1.01 * HALF_LIVES[0]) | (law.half_lives > 0.99 * HALF_LIVES[1])):
    shared += (
      '\na half-life lies at the end of the search: the curves do not have the shape of the law'
    )
  return f'{fitted}\n{shared}\n\nmeasured / predicted\n{format_table(head, rows)}'


def draw(study: Study, theme):
  """Measured errors (points, the range of the seeds) and the law (lines) over examples."""
  from matplotlib.figure import Figure

  fig = Figure(figsize=(9, 3.8), layout='constrained')
  left, right = fig.subplots(1, 2, sharey=True)
  alone = [study.law.of([i]).predict(c.samples, study.pool_size) for i, c in enumerate(study.alone)]
  for ax, title, curves, lines, labels in (
    (left, 'each pool alone: fitted', study.alone, alone, study.pools),
    (right, 'pools mixed: predicted', study.mixed, study.predicted, names(study)),
  ):
    for i, (curve, line, label) in enumerate(zip(curves, lines, labels)):
      color = theme.colors[i % len(theme.colors)]
      epochs = curve.samples / study.pool_size
      ax.fill_between(
        epochs, curve.errors.min(0), curve.errors.max(0), color=color, alpha=0.2, lw=0
      )
      ax.plot(epochs, curve.errors.mean(0), 'o', ms=3, color=color, label=label)
      ax.plot(epochs, line, color=color, lw=1.3)
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:g}')
    ax.set_title(title)
    ax.set_xlabel('examples, in epochs of one pool')
    ax.grid()
    ax.legend(frameon=False)
  left.set_ylabel('bits per byte of the target')
  return fig


def record(study: Study) -> dict:
  """`repetition.json`."""
  law = study.law
  return {
    'pools': study.pools,
    'pool_size': study.pool_size,
    'law': {
      **law._asdict(),
      'utilities': law.utilities.tolist(),
      'half_lives': law.half_lives.tolist(),
    },
    'samples': study.alone[0].samples.tolist(),
    'alone': {n: c.errors.tolist() for n, c in zip(study.pools, study.alone)},
    'mixed': {n: c.errors.tolist() for n, c in zip(names(study), study.mixed)},
    'predicted': dict(zip(names(study), study.predicted.tolist())),
    'claims': claims(study),
  }


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/repetition')
  if FLAGS.seeds < 1:
    raise UserError(f'--seeds={FLAGS.seeds}: must be at least 1; 3 or more give an interval')
  from experiments import plots

  pools, folder = tuple(FLAGS.pools), Path(FLAGS.workdir)
  config = study_config(FLAGS.config, pools, FLAGS.target, FLAGS.bytes)
  cli.use_compilation_cache(folder / '.jax_cache')
  size = pool_size(config, pools)
  trained = lambda arms: curves_of(
    train_arms(config, arms, FLAGS.seeds, folder, FLAGS.jobs), FLAGS.target, config.batch_size, size
  )
  alone = trained({name: [name] for name in pools})
  law = fit(alone, size)
  order = np.argsort(law.utilities)  # the most negative is the best
  prefixes = [[pools[i] for i in order[:p]] for p in range(2, len(pools) + 1)]
  mixed = trained({f'best_{len(p)}': p for p in prefixes})
  study = make_study(pools, size, law, order, alone, mixed)
  print(tables(study))
  print('\n' + '\n'.join(claims(study)))
  files.write_json(folder / 'repetition.json', record(study))
  with files.replacing(folder / 'repetition.png') as path:
    path.write_bytes(plots.draw_png(lambda: draw(study, plots.LIGHT), plots.LIGHT))


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_list('pools', [], 'domains, at least two')
  flags.DEFINE_string('target', '', 'the domain on whose validation text to measure')
  flags.DEFINE_integer('bytes', 65536, 'of training text in each pool')
  flags.DEFINE_integer('seeds', 3, 'runs of each arm, from config.seed on')
  flags.DEFINE_integer('jobs', 1, 'runs at once, in processes of their own', lower_bound=1)
  flags.DEFINE_string('workdir', '', 'where runs and results go; the same one to continue')
  cli.run(main)
