"""Trains a swarm of small runs on mixtures drawn around a prior, for `regmix.fit`.

  python -m experiments.regmix.swarm --config=configs/quickstart.py --runs=24 --workdir=runs/swarm
  python -m experiments.regmix.fit --mixtures=runs/swarm/mixtures.csv \\
    --losses=runs/swarm/losses.csv --regressor=log_linear --out=runs/swarm/mixture.json
  python -m experiments.compare --config=configs/quickstart.py --workdir=runs/regmix \\
    --weightings=stratified:=uniform,regmix:=uniform@data.mixture=runs/swarm/mixture.json

Mixtures are RegMix's: Dirichlet around the prior (--prior: natural, uniform or a mixture file),
from nearly pure to nearly the prior, no domain above --max_ratio times its prior share. The config
is that of the small runs; it should repeat data as the large run will (`experiments.carve`).
Log-linear laws need about 3 (domains + 1) runs, boosted trees more than a hundred.

Every run resumes, and a larger --runs goes on where a smaller one ended. Writes
WORKDIR/mixtures.csv and WORKDIR/losses.csv (final bits per byte of every domain); runs that
diverged are left out and named.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs.common import set_mixture, set_weighting
from experiments import cli, compare, files
from experiments import config as config_lib
from experiments.data import corpus as corpus_lib
from experiments.data import mixture as mixture_lib
from experiments.errors import UserError
from experiments.regmix.fit import INDEX
from jaxrw.mixtures import sample_mixtures

FLAGS = flags.FLAGS


def write_mixtures(
  config: ConfigDict, prior: str, runs: int, max_ratio: float, folder: Path
) -> tuple[tuple[str, ...], np.ndarray, list[Path]]:
  """(domains, mixtures float64[runs, G], a mixture file of each).

  Raises:
    UserError: a prior that is none, or around which there are not as many mixtures.
  """
  corpus = corpus_lib.open_corpus(config.data)
  try:
    drawn = sample_mixtures(
      jax.random.key(config.seed), mixture_lib.parse(prior, corpus), runs, max_ratio=max_ratio
    ).astype(np.float64)
  except ValueError as error:
    raise UserError(f'--runs={runs}, --max_ratio={max_ratio}: {error}') from error
  drawn /= drawn.sum(axis=1, keepdims=True)
  # Runs are told apart by their configs, which hold the path: other shares need another one.
  digest = lambda shares: hashlib.sha256(shares.astype('<f4').tobytes()).hexdigest()[:8]
  paths = [folder / 'mixtures' / f'{i:04d}-{digest(p)}.json' for i, p in enumerate(drawn)]
  for path, mixture in zip(paths, drawn):
    mixture_lib.write(path, corpus, mixture, made_by={'method': 'swarm', 'prior': prior}, epochs={})
  return corpus.domains, drawn, paths


def train_swarm(
  config: ConfigDict, domains: Sequence[str], paths: Sequence[Path], folder: Path, jobs: int
) -> tuple[np.ndarray, list[int]]:
  """(final bits per byte float64[finished, G], which runs those are)."""
  plan = compare.Plan(
    config=config,
    weightings=tuple(f'{path.stem}:=uniform@data.mixture={path}' for path in paths),
    lrs=(config.optim.lr,),
    seeds=(config.seed,),
    metric='macro_bpb',
    folder=folder,
  )
  board = compare.compare(plan, jobs=jobs)
  finished = [i for i, arm in enumerate(board.arms) if arm.survivors]
  if not finished:
    raise UserError(f'every run diverged: lower config.optim.lr={config.optim.lr}')
  losses = [[board.arms[i].mean(f'bpb/{name}') for name in domains] for i in finished]
  return np.array(losses), finished


def write_table(path: Path, names: Sequence[str], rows: np.ndarray, index: Sequence[int]) -> None:
  """A CSV file that `regmix.fit` reads."""
  with files.replacing(path) as temporary, temporary.open('w', encoding='utf-8', newline='') as f:
    writer = csv.writer(f)
    writer.writerow([INDEX, *names])
    writer.writerows([f'{i:04d}', *map(repr, row)] for i, row in zip(index, rows.tolist()))


def define_flags() -> None:
  """The command line; defined only by the program that runs."""
  cli.define_config()
  flags.DEFINE_integer('runs', 24, 'mixtures to train on', lower_bound=1)
  flags.DEFINE_string('prior', 'natural', 'what they are drawn around; as in data.mixture')
  flags.DEFINE_float('max_ratio', 15.0, "largest share of a domain, in units of the prior's")
  flags.DEFINE_integer('jobs', 1, 'runs at once, in processes of their own', lower_bound=1)
  flags.DEFINE_string('workdir', '', 'where runs and tables go; the same one to continue')


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/swarm')
  folder = Path(FLAGS.workdir)
  config = config_lib.from_json(config_lib.to_json(FLAGS.config))
  set_weighting(config, 'uniform')
  set_mixture(config, '')
  config_lib.check(config)
  cli.use_compilation_cache(folder / '.jax_cache')
  domains, mixtures, paths = write_mixtures(
    config, FLAGS.prior, FLAGS.runs, FLAGS.max_ratio, folder
  )
  losses, finished = train_swarm(config, domains, paths, folder, FLAGS.jobs)
  write_table(folder / 'mixtures.csv', domains, mixtures[finished], finished)
  write_table(folder / 'losses.csv', domains, losses, finished)
  if lost := [paths[i].stem for i in range(FLAGS.runs) if i not in finished]:
    print(f'left out, because they diverged: {", ".join(lost)}')
  low, high = losses.min(0), losses.max(0)
  width = max(len('domain'), *map(len, domains))
  print(f'{"domain":<{width}}  bits per byte, best to worst of {len(finished)} runs')
  for name, best, worst in zip(domains, low, high):
    print(f'{name:<{width}}  {best:.3f} to {worst:.3f}')
  print(f'\n{folder / "mixtures.csv"} and {folder / "losses.csv"} are for experiments.regmix.fit')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
