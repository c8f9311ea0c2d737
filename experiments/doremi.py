"""DoReMi in its three stages: a reference, a proxy that finds a mixture, models trained on it.

  python -m experiments.doremi --config=configs/lm.py:path=my/text --workdir=runs/doremi \\
    --rate=0.1 --larger=model.n_layer=4@model.n_embd=128 --lrs=3e-3,5e-3 --seeds=3

  1. reference  the config, trained on data.mixture with uniform weights
  2. proxy      the same model and mixture; the domains in which it is furthest above the reference
                count more in the loss (method 'doremi' of config.mixture). Its weights, averaged
                over the run, are WORKDIR/proxy/mixture.json
  3. final      models that differ by --larger, compared as experiments.compare does: trained on
                data.mixture (the baseline) and on the proxy's mixture, at the same rates and seeds

Every stage is a run directory that resumes; repeat the command to continue. The published use has a
larger final model and 200,000 steps for the proxy; what holds at another size is to be measured,
which is what stage 3 is for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs.common import set_arm, set_mixture, set_weighting
from experiments import cli, compare, files, mixing
from experiments import config as config_lib
from experiments.errors import UserError
from experiments.verdict import board_text

FLAGS = flags.FLAGS


def stage_configs(
  config: ConfigDict, folder: Path, rate: float, smoothing: float, larger: str
) -> tuple[ConfigDict, ConfigDict, ConfigDict]:
  """(reference, proxy, final model on data.mixture), checked.

  Raises:
    UserError, ConfigError: a value that does not fit.
  """

  def changed(change) -> ConfigDict:
    copy = config_lib.from_json(config_lib.to_json(config))
    set_weighting(copy, 'uniform')
    set_mixture(copy, '')
    change(copy)
    return copy

  def to_proxy(copy):
    set_mixture(copy, f'doremi:mode=weigh:rate={rate}:smoothing={smoothing}')
    copy.reference = str(folder / 'reference')

  reference = changed(lambda copy: None)
  proxy = changed(to_proxy)
  final = changed(lambda copy: set_arm(copy, f'uniform@{larger}' if larger else 'uniform'))
  for stage in (reference, final):
    config_lib.check(stage)
  mixing.check_method(proxy.mixture.fn, proxy.mixture.args.to_dict())
  return reference, proxy, final


def mixture_text(path: Path, start: np.ndarray) -> str:
  """The found weights beside those it started from, aligned."""
  weights = files.read_json(path)['weights']
  width = max(len('domain'), *map(len, weights))
  rows = [
    f'  {name:<{width}}  {before:>8.4f}  {after:>8.4f}  {after / before if before else 0:>6.2f} x'
    for (name, after), before in zip(weights.items(), start)
  ]
  return '\n'.join([f'  {"domain":<{width}}  {"start":>8}  {"found":>8}', *rows])


def define_flags() -> None:
  """The command line; defined only by the program that runs."""
  cli.define_config()
  flags.DEFINE_string('workdir', '', 'where the stages go; the same one to continue')
  flags.DEFINE_float('rate', 1.0, 'step size of the domain weights; 1.0 in the official code')
  flags.DEFINE_float('smoothing', 1e-4, 'share spread uniformly; 1e-4 in the official code')
  flags.DEFINE_string('larger', '', "what the final models change: 'model.n_layer=4@batch_size=32'")
  flags.DEFINE_string('lrs', None, "learning rates of the final models; default: the config's")
  flags.DEFINE_integer('seeds', 3, 'paired seeds of the final models')
  flags.DEFINE_integer('tune_seeds', 1, 'how many of them choose the learning rate')
  flags.DEFINE_integer('jobs', 1, 'final models at once', lower_bound=1)


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/doremi')
  folder = Path(FLAGS.workdir)
  reference, proxy, final = stage_configs(
    FLAGS.config, folder, FLAGS.rate, FLAGS.smoothing, FLAGS.larger
  )
  found = folder / 'proxy' / mixing.FILE
  final_plan = lambda arms: compare.make_plan(
    final, arms, FLAGS.lrs, FLAGS.seeds, 'macro_bpb', str(folder / 'final'), FLAGS.tune_seeds
  )
  final_plan('uniform')  # its mistakes before anything is trained
  from experiments import report, train

  cli.use_compilation_cache(folder / '.jax_cache')
  train.say('stage 1 of 3: the reference')
  train.train(reference, folder / 'reference')
  config_lib.check(proxy)
  train.say('stage 2 of 3: the proxy')
  train.train(proxy, folder / 'proxy')
  train.say(mixture_text(found, train.build(reference).proportions))
  train.say('stage 3 of 3: the final models')
  plan = final_plan(f'{final.data.mixture}:=uniform,doremi:=uniform@data.mixture={found}')
  board = compare.compare(plan, jobs=FLAGS.jobs)
  files.write_json(plan.folder / 'compare.json', compare.record(board))
  print(board_text(board), flush=True)
  print(f'\nreport: {report.write(board, plan.folder)}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
