"""Fits losses of runs on known mixtures, and writes the mixture of the lowest predicted loss.

  python -m experiments.regmix.fit --mixtures=swarm.csv --losses=losses.csv --out=mixture.json
  python -m experiments.regmix.fit --mixtures=swarm.csv --losses=losses.csv --target=web \\
    --regressor=log_linear --strength=0.05 --max_ratio=4 --out=mixture.json
  python -m experiments.regmix.fit --mixtures=swarm.csv.gz --losses=losses.csv.gz \\
    --test_mixtures=large.csv.gz --test_losses=large_losses.csv.gz --out=mixture.json

Both files are CSV, plain or .gz, with a header line and one line a run; the column 'index' joins
them. The other columns of --mixtures are the domains, with shares that sum to 1 in each line; those
of --losses are what was measured. `jaxrw.mixtures.sample_mixtures` draws such a swarm.

One regressor is fitted to each loss. It is judged on runs that it did not see in any way: those of
--test_mixtures and --test_losses (of larger models, perhaps: then only the rank correlation says
something), or else a fifth of the runs; for the answer it is then fitted to all of them.

  lightgbm    boosted trees, as in RegMix; how many trees is decided on a part of the train runs
  ridge       linear in the shares
  quadratic   ridge with all products of two shares
  log_linear  exp(c) + exp(<t, p>), as in Olmix: needs the fewest runs

The answer of log_linear is exact: the least target + --strength KL(mixture || prior). That of the
others is RegMix's: the mean of the --best of --draws mixtures drawn around the prior.

Prints tables; writes --out, a file for `--config.data.mixture=mixture.json`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli, files
from experiments.errors import UserError

FLAGS = flags.FLAGS
MEAN = 'mean'  # of all losses, or of all train mixtures
INDEX = 'index'
_SUM_ERROR = 0.01  # published shares are rounded to three digits
_MIN_RUNS = 20
_BLOCK = 5000  # mixtures predicted at a time
_FAR_BELOW = 0.1  # of the range of the runs


class Runs(NamedTuple):
  """Runs of one kind."""

  domains: tuple[str, ...]
  losses: tuple[str, ...]
  mixtures: np.ndarray  # float64[K, G]
  values: np.ndarray  # float64[K, n]

  def at(self, rows: np.ndarray) -> Runs:
    return self._replace(mixtures=self.mixtures[rows], values=self.values[rows])


class Model(NamedTuple):
  """A fitted regressor."""

  predict: Callable[[np.ndarray, Sequence[int]], np.ndarray]  # [N, G], C columns -> float64[N, C]
  law: Any = None  # a MixingLaw, if it is one


class Quality(NamedTuple):
  """On runs that were not fitted; the last entry is of the mean of the losses."""

  names: tuple[str, ...]
  spearman: np.ndarray  # float64[n + 1]
  mse: np.ndarray  # float64[n + 1]


# Files --------------------------------------------------------------------------------------------


def read_runs(mixtures_path: str, losses_path: str) -> Runs:
  """Joins the two files by their column 'index'; mixtures are divided by their sums.

  Raises:
    UserError: a file that cannot be read or parsed, rows that do not join, shares off the simplex.
  """
  domains, mixtures = read_table(mixtures_path)
  names, losses = read_table(losses_path)
  for here, there, one, other in (
    (mixtures, losses, mixtures_path, losses_path),
    (losses, mixtures, losses_path, mixtures_path),
  ):
    alone = [name for name in here if name not in there]
    if alone:
      raise UserError(
        f'{one} has {len(alone)} rows that {other} does not have, the first with '
        f'{INDEX}={alone[0]}; both need the same runs'
      )
  shares = np.array(list(mixtures.values()))
  for name, row in zip(mixtures, shares):
    if row.min() < 0 or abs(row.sum() - 1) > _SUM_ERROR:
      raise UserError(
        f'{mixtures_path}: the shares of {INDEX}={name} sum to {row.sum():g}, the least is '
        f'{row.min():g}; they must be at least 0 and sum to 1'
      )
  shares = shares / shares.sum(axis=1, keepdims=True)
  return Runs(domains, names, shares, np.array([losses[name] for name in mixtures]))


def read_table(path: str) -> tuple[tuple[str, ...], dict[str, list[float]]]:
  """(names of the columns without the index, {index: row}) of a CSV file.

  Raises:
    UserError: no such file, no or two equal indices, a cell that is not a finite number.
  """
  try:
    opened = gzip.open if path.endswith('.gz') else open
    with opened(path, 'rt', encoding='utf-8', newline='') as file:
      header, *lines = [line for line in csv.reader(file) if line] or [[]]
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror or e}') from e
  except (EOFError, UnicodeDecodeError, csv.Error) as e:
    raise UserError(f'{path} is not a CSV file: {e}') from e
  header = [name.strip() for name in header]
  if INDEX not in header or len(header) < 2 or len(set(header)) < len(header):
    raise UserError(
      f"{path} needs a header with different names, '{INDEX}' and at least one more among them; it "
      f'has {header[:4]}'
    )
  at, rows = header.index(INDEX), {}
  for number, line in enumerate(lines, 2):
    if len(line) != len(header):
      raise UserError(f'{path}, line {number}: {len(line)} cells, but the header has {len(header)}')
    name = line[at].strip()
    if name in rows:
      raise UserError(f'{path}, line {number}: {INDEX}={name} is there twice; drop one')
    rows[name] = [_number(path, number, *cell) for cell in zip(header, line) if cell[0] != INDEX]
  if not rows:
    raise UserError(f'{path} has no rows')
  return tuple(name for name in header if name != INDEX), rows


def _number(path: str, line: int, column: str, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = np.nan
  if not np.isfinite(value):
    raise UserError(f'{path}, line {line}: {column}={text!r} is not a finite number; drop the run')
  return value


def read_prior(text: str, train: Runs) -> np.ndarray:
  """float64[G], sums to 1: 'mean' of the train mixtures, 'uniform', or a mixture file.

  Raises:
    UserError: another text, a file without a usable weight for each domain.
  """
  if text == MEAN:
    return train.mixtures.mean(axis=0)
  if text == 'uniform':
    return np.full(len(train.domains), 1 / len(train.domains))
  if not text.endswith('.json'):
    raise UserError(f"--prior={text}: must be '{MEAN}', 'uniform' or a mixture file (.json)")
  stored = files.read_json(text)
  weights = stored.get('weights') if isinstance(stored, dict) else None
  if not isinstance(weights, dict) or set(weights) != set(train.domains):
    raise UserError(
      f'{text} must have a weight for each domain of --mixtures and no other: '
      f'{", ".join(train.domains[:4])}{", ..." * (len(train.domains) > 4)}'
    )
  try:
    prior = np.array([float(weights[name]) for name in train.domains])
  except (TypeError, ValueError):
    prior = np.array([np.nan])
  if not np.all(prior >= 0) or not 0 < prior.sum() < np.inf:
    raise UserError(f'{text}: weights must be numbers, at least 0 and not all 0')
  return prior / prior.sum()


# Regressors: (mixtures float64[K, G], values float64[K, n], seed) -> Model ------------------------


def fit_lightgbm(mixtures: np.ndarray, values: np.ndarray, seed: int) -> Model:
  """RegMix's trees: at most 1000 of rate 0.01. The fifth of these runs on which their number is
  decided then joins the others."""
  lightgbm = _import_lightgbm()
  rest, part = _split(len(mixtures), seed)
  # Without the last two, results differ from machine to machine.
  options = {
    'learning_rate': 0.01, 'verbosity': -1, 'seed': seed, 'num_threads': 1, 'deterministic': True,
  }  # fmt: skip

  def fit(column):
    data = lambda rows: lightgbm.Dataset(mixtures[rows], column[rows])
    stop = lightgbm.early_stopping(3, verbose=False)
    trial = lightgbm.train(options, data(rest), 1000, valid_sets=[data(part)], callbacks=[stop])
    return lightgbm.train(options, lightgbm.Dataset(mixtures, column), trial.best_iteration)

  bar = tqdm(values.T, desc='fitting', unit=' losses', disable=None, leave=False)
  models = [fit(column) for column in bar]

  def predict(p, columns):
    with ThreadPoolExecutor() as pool:
      values = pool.map(lambda c: models[c].predict(p, num_threads=1), columns)
      return np.stack(list(values), axis=1)

  return Model(predict)


def fit_ridge(mixtures: np.ndarray, values: np.ndarray, seed: int) -> Model:
  """Linear regression; how much it shrinks is decided by leaving out one run at a time."""
  del seed
  weights, offset = _ridge(mixtures, values)
  return Model(lambda p, columns: p @ weights[:, columns] + offset[columns])


def fit_quadratic(mixtures: np.ndarray, values: np.ndarray, seed: int) -> Model:
  """`fit_ridge` on the shares and all products of two of them."""
  i, j = np.triu_indices(mixtures.shape[1])
  features = lambda p: np.concatenate([p, p[:, i] * p[:, j]], axis=1)
  ridge = fit_ridge(features(mixtures), values, seed)
  return Model(lambda p, columns: ridge.predict(features(p), columns))


def fit_log_linear(mixtures: np.ndarray, values: np.ndarray, seed: int) -> Model:
  """See `jaxrw.mixtures.fit_mixing_law`."""
  del seed
  from jaxrw.mixtures.regression import fit_mixing_law, predict_losses

  try:
    law = fit_mixing_law(mixtures, values)
  except ValueError as e:
    raise UserError(f'--regressor=log_linear: {e}') from e
  predict = lambda p, columns: np.asarray(predict_losses(law, p), np.float64)[:, columns]
  return Model(predict, law)


REGRESSORS = {
  'lightgbm': fit_lightgbm,
  'ridge': fit_ridge,
  'quadratic': fit_quadratic,
  'log_linear': fit_log_linear,
}


def _import_lightgbm():
  try:
    import lightgbm
  except (ImportError, OSError) as e:  # OSError: its OpenMP library is missing
    raise UserError(
      f'--regressor=lightgbm needs the package lightgbm ({e}): pip install lightgbm, or choose '
      '--regressor=log_linear'
    ) from e
  return lightgbm


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(weights [F, n], offset [n]); each column shrinks its standardized features as it likes."""
  center, scale = x.mean(axis=0), x.std(axis=0)
  scale = np.where(scale > 0, scale, 1)
  u, s, vt = np.linalg.svd((x - center) / scale, full_matrices=False)
  left = u.T @ (y - y.mean(axis=0))
  best = np.full(y.shape[1], np.inf)
  weights = np.zeros((x.shape[1], y.shape[1]))
  for strength in len(x) * np.geomspace(1e-8, 1e2, 41):
    kept = s**2 / (s**2 + strength)
    leverage = u**2 @ kept + 1 / len(x)
    residuals = y - y.mean(axis=0) - u @ (kept[:, None] * left)
    # What the residual would be if the run had been left out.
    error = np.mean((residuals / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2, axis=0)
    found = vt.T @ ((s / (s**2 + strength))[:, None] * left)
    weights = np.where(error < best, found, weights)
    best = np.minimum(error, best)
  weights = weights / scale[:, None]
  return weights, y.mean(axis=0) - center @ weights


def _split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """(four fifths, one fifth) of the rows."""
  order = np.random.default_rng(seed).permutation(count)
  return np.sort(order[count // 5 :]), np.sort(order[: count // 5])


# Judging and proposing ----------------------------------------------------------------------------


def judge(model: Model, test: Runs) -> Quality:
  from jaxrw.mixtures.regression import spearman

  predicted = _with_mean(model.predict(test.mixtures, range(len(test.losses))))
  observed = _with_mean(test.values)
  # Of host ranks: losses that differ in the eighth digit would be equal in float32.
  ranks = lambda x: np.unique(x, return_inverse=True)[1]
  return Quality(
    (*test.losses, MEAN),
    np.array([float(spearman(ranks(a), ranks(b))) for a, b in zip(predicted.T, observed.T)]),
    np.mean((predicted - observed) ** 2, axis=0),
  )


def propose_by_simulation(
  target: Callable[[np.ndarray], np.ndarray],
  prior: np.ndarray,
  *,
  max_ratio: float,
  draws: int,
  best: int,
  seed: int,
) -> np.ndarray:
  """The mean of the `best` of so many mixtures from Dirichlet(prior): float64[G].

  `target` maps mixtures [N, G] to what is to be small, [N].

  Raises:
    UserError: too few of them obey max_ratio.
  """
  used = np.flatnonzero(prior)
  mixtures = np.zeros((draws, prior.size))
  mixtures[:, used] = np.random.default_rng(seed).dirichlet(prior[used], draws)
  if max_ratio:
    mixtures = mixtures[np.all(mixtures <= max_ratio * prior, axis=1)]
  if len(mixtures) < best:
    raise UserError(
      f'--max_ratio={max_ratio:g} leaves {len(mixtures)} of --draws={draws}, fewer than '
      f'--best={best}: raise it or --draws, or choose --regressor=log_linear'
    )
  blocks = np.array_split(mixtures, -(-len(mixtures) // _BLOCK))
  bar = tqdm(blocks, desc='simulating', unit=' blocks', disable=None, leave=False)
  order = np.argsort(np.concatenate([target(block) for block in bar]), kind='stable')
  return mixtures[order[:best]].mean(axis=0)


def propose_exactly(
  law, column: int, prior: np.ndarray, *, max_ratio: float, strength: float
) -> np.ndarray:
  """`jaxrw.mixtures.best_mixture` for one loss, or for the mean of all: float64[G]."""
  from jaxrw.mixtures.regression import best_mixture

  n = len(law.log_floor)
  weights = np.full(n, 1 / n) if column == n else np.eye(n)[column]
  caps = max_ratio * prior if max_ratio else None
  return np.asarray(best_mixture(law, weights, prior, strength, caps), np.float64)


def _with_mean(values: np.ndarray) -> np.ndarray:
  return np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)


# The program --------------------------------------------------------------------------------------


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_string('mixtures', '', 'CSV: index, one share a domain')
  flags.DEFINE_string('losses', '', 'CSV: index, one loss a column')
  flags.DEFINE_string('test_mixtures', '', 'CSV, of runs to judge the fit on')
  flags.DEFINE_string('test_losses', '', 'CSV, of the same runs')
  flags.DEFINE_string('target', MEAN, f"what to minimize: a column of --losses, or '{MEAN}'")
  flags.DEFINE_enum('regressor', 'lightgbm', list(REGRESSORS), 'what to fit')
  flags.DEFINE_string('prior', MEAN, f"'{MEAN}' of the mixtures, 'uniform' or a mixture file")
  flags.DEFINE_float('strength', 0.05, 'pull to the prior (log_linear)', lower_bound=0)
  flags.DEFINE_float('max_ratio', 0, 'largest share, in units of the prior; 0: no limit')
  flags.DEFINE_integer('draws', 100_000, 'mixtures to simulate (not log_linear)', lower_bound=1)
  flags.DEFINE_integer('best', 128, 'how many of them to average', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'of the splits and the simulation', lower_bound=0)
  flags.DEFINE_string('out', '', 'the mixture file to write')


def main(_: list[str]) -> None:
  for name in ('mixtures', 'losses', 'out'):
    if not FLAGS[name].value:
      raise UserError(f'--{name} is missing; see --help')
  if not FLAGS.out.endswith('.json'):
    raise UserError(f'--out={FLAGS.out}: must end in .json, like every mixture file')
  if FLAGS.max_ratio and not FLAGS.max_ratio > 1:
    raise UserError(f'--max_ratio={FLAGS.max_ratio:g}: must be above 1, or 0 for no limit')
  if bool(FLAGS.test_mixtures) != bool(FLAGS.test_losses):
    raise UserError('--test_mixtures and --test_losses belong together: give both or none')
  runs = read_runs(FLAGS.mixtures, FLAGS.losses)
  if len(runs.mixtures) < _MIN_RUNS:
    raise UserError(f'{FLAGS.mixtures} has {len(runs.mixtures)} runs; at least {_MIN_RUNS} needed')
  column = _target_column(FLAGS.target, runs.losses)
  prior = read_prior(FLAGS.prior, runs)
  fit = REGRESSORS[FLAGS.regressor]

  if FLAGS.test_mixtures:
    test = _like(runs, read_runs(FLAGS.test_mixtures, FLAGS.test_losses))
    model = fit(runs.mixtures, runs.values, FLAGS.seed)
    quality = judge(model, test)
    print(f'{FLAGS.regressor} fitted to {len(runs.mixtures)} runs, on {len(test.mixtures)} others:')
  else:
    rest, held_out = _split(len(runs.mixtures), FLAGS.seed)
    some, test = runs.at(rest), runs.at(held_out)
    quality = judge(fit(some.mixtures, some.values, FLAGS.seed), test)
    model = fit(runs.mixtures, runs.values, FLAGS.seed)
    print(f'{FLAGS.regressor} fitted to {len(rest)} runs, on the other {len(held_out)}:')
  print(quality_table(quality))

  columns = range(len(runs.losses)) if column == len(runs.losses) else [column]
  target = lambda p: model.predict(p, columns).mean(axis=1)
  limit = FLAGS.max_ratio
  if FLAGS.regressor == 'log_linear':
    how = {'strength': FLAGS.strength}
    answer = propose_exactly(model.law, column, prior, max_ratio=limit, **how)
  else:
    how = {'draws': FLAGS.draws, 'best': FLAGS.best, 'seed': FLAGS.seed}
    answer = propose_by_simulation(target, prior, max_ratio=limit, **how)
  best = _with_mean(runs.values)[:, column]
  predicted = target(np.stack([prior, answer]))
  print(f'\n{proposal_table(runs, best, prior, answer, predicted)}')
  if predicted[1] < best.min() - _FAR_BELOW * np.ptp(best):
    print(
      'note: far below what any run had, so the fit is asked about mixtures unlike theirs; limit '
      '--max_ratio, or try another regressor'
    )
  made_by = {
    'program': 'experiments.regmix.fit',
    'mixtures': Path(FLAGS.mixtures).name,
    'losses': Path(FLAGS.losses).name,
    'runs': len(runs.mixtures),
    'regressor': FLAGS.regressor,
    'target': FLAGS.target,
    'spearman': quality.spearman[column],
    'prior': FLAGS.prior,
    'max_ratio': limit,
    **how,
  }
  weights = dict(zip(runs.domains, answer / answer.sum()))
  files.write_json(FLAGS.out, {'weights': weights, 'made_by': made_by})
  print(f'\nwrote {FLAGS.out}')


def quality_table(quality: Quality) -> str:
  from experiments.verdict import format_table

  rows = [
    [name, f'{rank:.4f}', f'{mse:.5f}']
    for name, rank, mse in zip(quality.names, quality.spearman, quality.mse)
  ]
  return format_table(['loss', 'Spearman', 'MSE'], rows)


def proposal_table(
  runs: Runs, target: np.ndarray, prior: np.ndarray, answer: np.ndarray, predicted: np.ndarray
) -> str:
  """The shares, and the target: float[K] of the runs, float[2] predicted at prior and answer."""
  from experiments.verdict import format_table

  best = runs.mixtures[target.argmin()]
  rows = [
    [name, *(f'{share:.4f}' for share in shares)]
    for name, *shares in zip(runs.domains, prior, answer, best)
  ]
  rows += [
    ['target, predicted', f'{predicted[0]:.4f}', f'{predicted[1]:.4f}', ''],
    ['target, measured', '', '', f'{target.min():.4f}'],
  ]
  return format_table(['domain', 'prior', 'proposed', 'best run'], rows)


def _target_column(target: str, losses: tuple[str, ...]) -> int:
  names = (*losses, MEAN)
  if target not in names:
    near = difflib.get_close_matches(target, names, n=1, cutoff=0.3) or [MEAN]
    raise UserError(f'--target={target}: no such column of --losses; did you mean {near[0]}?')
  return names.index(target)


def _like(train: Runs, test: Runs) -> Runs:
  """The test runs with their columns in the order of the train runs.

  Raises:
    UserError: other columns.
  """
  for flag, there, here in (
    ('--test_mixtures', test.domains, train.domains),
    ('--test_losses', test.losses, train.losses),
  ):
    if other := sorted(set(there) ^ set(here)):
      raise UserError(f'{flag}: the column {other[0]!r} is in one of the two files only')
  return Runs(
    train.domains,
    train.losses,
    test.mixtures[:, [test.domains.index(name) for name in train.domains]],
    test.values[:, [test.losses.index(name) for name in train.losses]],
  )


if __name__ == '__main__':
  define_flags()
  cli.run(main)
