"""Trains several weightings alike and says which differences between them can be believed.

  python -m experiments.compare --config=configs/quickstart.py --workdir=runs/board \\
    --weightings=uniform,linupper:1.0,linupper:0.4 --lrs=1e-3,3e-3,1e-2 --seeds=3

Every weighting (an arm; the first is the baseline) is trained at every learning rate on the first
seed (with --tune_seeds=N, on N); each arm's best rate is then trained on all seeds. Runs with equal
seeds share their initial parameters and their batches, so differences are paired. A unit of this
work is one run directory in WORKDIR/runs; finished ones are skipped and killed ones resume, so
repeat the command to continue.
--jobs=N trains N units at a time, for machines with cores to spare.

An arm may change more than the weighting: 'uniform@batch_size=8' or, for selective backward,
'trimmed:share=0.5@keep.rows=8'; any key of the config will do, and '@mixture=' takes a method with
its arguments. 'NAME:=ARM' gives it a short name: 'odm:=uniform@mixture=odm:lag=4'. Some configs
bring the arms that they are made for (configs/languages.py); without --weightings, those are run.

Prints a table; writes WORKDIR/compare.json, WORKDIR/report.html and WORKDIR/plots/*.png.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import queue
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from configs.common import ConfigError, set_arm
from experiments import cli, files
from experiments import config as config_lib
from experiments.board import METRICS, Arm, Board, Run
from experiments.errors import NonFiniteError, StoppedError, UserError
from experiments.verdict import arm_verdict, board_text

FLAGS = flags.FLAGS
TrainFn = Callable[[ConfigDict, str], object]
_GO_ON = 'the same command goes on with what is left'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be compared. `make_plan` checks it."""

  config: ConfigDict
  weightings: tuple[str, ...]
  lrs: tuple[float, ...]
  seeds: tuple[int, ...]
  metric: str
  folder: Path
  tune_seeds: int = 1  # how many of the seeds choose the learning rate

  @property
  def cache(self) -> Path:
    """Where compiled programs are kept, for the units to share."""
    return self.folder / '.jax_cache'

  @property
  def num_units(self) -> int:
    others = len(self.seeds) - self.tune_seeds
    return len(self.weightings) * (len(self.lrs) * self.tune_seeds + others)

  def unit_config(self, weighting: str, lr: float, seed: int) -> ConfigDict:
    config = config_lib.from_json(config_lib.to_json(self.config))
    set_arm(config, arm_spec(weighting))
    config.optim.lr, config.seed = lr, seed
    return config

  def unit_folder(self, weighting: str, lr: float, seed: int) -> Path:
    """Readable, and different whenever anything that changes the numbers differs."""
    digest = config_lib.config_hash(self.unit_config(weighting, lr, seed))
    name = (
      f'{re.sub("[^A-Za-z0-9.]+", "-", arm_name(weighting))[:80]}__lr{lr:g}__seed{seed}__{digest}'
    )
    return self.folder / 'runs' / name


def arm_name(arm: str) -> str:
  """The name an arm is shown under: what stands before ':=', or the arm itself."""
  return arm.partition(':=')[0]


def arm_spec(arm: str) -> str:
  """What an arm is, for `configs.common.set_arm`."""
  return arm.rpartition(':=')[2]


def make_plan(
  config: ConfigDict,
  weightings: str,
  lrs: str | None,
  seeds: int,
  metric: str,
  workdir: str,
  tune_seeds: int = 1,
) -> Plan:
  """Checks everything that can be wrong before hours are spent.

  Raises:
    UserError: an empty or repeated arm or rate, a weighting or value that does not exist.
  """
  if not workdir:
    raise UserError('--workdir is missing: try --workdir=runs/board')
  if seeds < 1:
    raise UserError(f'--seeds={seeds}: must be at least 1; 3 or more give a usable interval')
  if not 1 <= tune_seeds <= seeds:
    raise UserError(f'--tune_seeds={tune_seeds}: must be from 1 to the number of --seeds={seeds}')
  if metric not in METRICS and not metric.startswith('bpb/'):
    known = ', '.join(METRICS)
    raise UserError(f'--metric={metric}: must be one of {known}, or bpb/<domain>[+<domain>]')
  plan = Plan(
    config=config,
    weightings=split_list('--weightings', weightings, 'uniform,linupper:0.4'),
    lrs=(config.optim.lr,) if lrs is None else parse_rates(lrs),
    seeds=tuple(range(config.seed, config.seed + seeds)),
    metric=metric,
    folder=Path(workdir),
    tune_seeds=tune_seeds,
  )
  seen: dict[str, str] = {}
  names = [arm_name(arm) for arm in plan.weightings]
  if repeated := sorted({name for name in names if names.count(name) > 1 or not name}):
    raise UserError(
      f'--weightings: the name {repeated[0]!r} is empty or there twice; choose another'
    )
  for weighting in plan.weightings:
    try:
      arm = plan.unit_config(weighting, plan.lrs[0], plan.seeds[0])
    except ConfigError as e:
      raise UserError(f'--weightings={weightings}: {e}') from e
    config_lib.check(arm)
    same = seen.setdefault(config_lib.config_hash(arm), weighting)
    if same != weighting:
      raise UserError(f'--weightings: {same!r} and {weighting!r} are the same arm; drop one')
    check_weighting(weighting, arm)
  return plan


def check_weighting(name: str, config: ConfigDict) -> None:
  """Builds the pipeline of one arm once, so that a wrong name fails before anything is trained."""
  from experiments import mixing, signals

  try:
    if config.mixture.fn:
      mixing.check_method(config.mixture.fn, config.mixture.args.to_dict())
    signals.make_weighting(config)
    signals.make_keep(config)
  except UserError as e:
    raise UserError(f'--weightings: {name!r} cannot be built: {e}') from e


def split_list(flag: str, text: str, example: str) -> tuple[str, ...]:
  items = tuple(item.strip() for item in text.split(','))
  if not all(items):
    raise UserError(f'{flag}={text!r}: has an empty entry; write {flag}={example}')
  repeated = sorted({item for item in items if items.count(item) > 1})
  if repeated:
    raise UserError(f'{flag}={text}: {repeated[0]!r} is there twice; drop one')
  return items


def parse_rates(text: str) -> tuple[float, ...]:
  try:
    rates = tuple(float(item) for item in split_list('--lrs', text, '1e-3,3e-3,1e-2'))
  except ValueError:
    rates = (-1.0,)
  if not all(0 < rate < math.inf for rate in rates):
    raise UserError(f'--lrs={text}: every rate must be a positive number; write --lrs=1e-3,3e-3')
  if len(set(rates)) < len(rates):
    raise UserError(f'--lrs={text}: the same rate is there twice; drop one')
  return tuple(sorted(rates))


def compare(plan: Plan, train: TrainFn | None = None, jobs: int = 1) -> Board:
  """Runs what is not finished yet and returns the board.

  Args:
    plan: from `make_plan`.
    train: `train(config, folder)`, which leaves a run directory or raises NonFiniteError after
      writing `abort.json` to it; default `experiments.train.train`.
    jobs: how many units run at once, each in a process of its own; 1 runs them in this process.

  Raises:
    StoppedError: it was asked to stop (SIGTERM); units that were under way have saved.
  """
  from experiments.stopping import StopRequest  # which imports jax

  train = train or (default_train() if jobs == 1 else TrainInProcess(plan, jobs))
  with StopRequest(children=True) as stop:
    return _compare(plan, Units(plan, train, jobs, lambda: stop.requested))


def _compare(plan: Plan, units: Units) -> Board:
  tuning, others = plan.seeds[: plan.tune_seeds], plan.seeds[plan.tune_seeds :]
  tried: dict[str, dict[float, list[float]]] = {weighting: {} for weighting in plan.weightings}
  tries = [(w, lr, seed) for seed in tuning for lr in plan.lrs for w in plan.weightings]
  for (weighting, lr, _), run in zip(tries, units.finish(tries)):
    tried[weighting].setdefault(lr, []).append(run.value(plan.metric))
  # The mean is infinite where a seed diverged.
  grids = {w: {lr: statistics.fmean(v) for lr, v in rates.items()} for w, rates in tried.items()}
  best = {weighting: best_rate(grid) for weighting, grid in grids.items()}
  units.skip(len(others) * sum(lr is None for lr in best.values()))
  runs: dict[str, list[Run]] = {weighting: [] for weighting in plan.weightings}
  for weighting, lr in best.items():
    if lr is not None:
      runs[weighting].extend(Run(plan.unit_folder(weighting, lr, seed)) for seed in tuning)
  # Seeds outside, arms inside: whenever this is killed, most pairs are complete.
  repeats = [(w, lr, seed) for seed in others for w, lr in best.items() if lr is not None]
  for (weighting, *_), run in zip(repeats, units.finish(repeats)):
    runs[weighting].append(run)
  return Board(
    tuple(
      Arm(arm_name(w), best[w], tuple(runs[w]), tuple(grids[w].items())) for w in plan.weightings
    ),
    plan.metric,
  )


def count_flops(plan: Plan, board: Board) -> Board:
  """The board with the FLOPs of a step, where arms change more than the weighting."""
  if not any('@' in arm for arm in plan.weightings):
    return board
  from experiments import compiled, dry_run, train

  def counted(spec: str, arm: Arm) -> Arm:
    run = train.build(plan.unit_config(spec, plan.lrs[0], plan.seeds[0]))
    try:
      return dataclasses.replace(arm, step_flops=dry_run.step_costs(run).matmul_flops)
    except compiled.UncountableError as error:
      say(f'FLOPs of {arm.name} are not shown: {error}')
      return arm

  return dataclasses.replace(board, arms=tuple(map(counted, plan.weightings, board.arms)))


def best_rate(grid: dict[float, float]) -> float | None:
  """The rate with the lowest value, the lower one on a tie; None if every one of several diverged.

  A grid of one rate leaves no choice: that rate is kept, diverged or not.
  """
  if len(grid) == 1:
    return next(iter(grid))
  lr = min(grid, key=lambda rate: (grid[rate], rate))
  return lr if math.isfinite(grid[lr]) else None


def default_train() -> TrainFn:
  from experiments.train import train

  return train


class TrainInProcess:
  """Trains a unit in a new process, so that `jobs` can run beside each other.

  Each has its own share of the processors: two runs that both use all of them take a sixth longer.
  """

  def __init__(self, plan: Plan, jobs: int):
    self.cache = plan.cache
    self.shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for share in processor_shares(jobs):
      self.shares.put(share)

  def __call__(self, config: ConfigDict, folder: str) -> None:
    share = self.shares.get()
    try:
      with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as process:
        process.submit(_train_unit, config_lib.to_json(config), folder, self.cache, share).result()
    finally:
      self.shares.put(share)


def processor_shares(jobs: int) -> list[set[int]]:
  """The processors this process may use, dealt out to `jobs`; all to each if they do not suffice.

  Empty sets where the system does not say (macOS).
  """
  if not hasattr(os, 'sched_getaffinity'):
    return [set() for _ in range(jobs)]
  processors = sorted(os.sched_getaffinity(0))
  if len(processors) < jobs:
    return [set(processors) for _ in range(jobs)]
  return [set(processors[i::jobs]) for i in range(jobs)]


def _train_unit(config: str, folder: str, cache: Path, processors: set[int]) -> None:
  if processors:
    os.sched_setaffinity(0, processors)  # before jax counts them for its threads
  cli.keep_freed_memory()
  cli.use_compilation_cache(cache)
  unit = config_lib.from_json(config)
  unit.log.progress = False  # lines of several runs would be mixed
  default_train()(unit, folder)


class Units:
  """Finishes units and says on stderr which, how they went and how long is left."""

  def __init__(self, plan: Plan, train: TrainFn, jobs: int, stopping: Callable[[], bool]):
    self.plan = plan
    self.train = train
    self.jobs = jobs
    self.stopping = stopping  # whether the comparison was asked to stop
    self.lock = threading.Lock()
    self.done = 0
    self.total = plan.num_units
    self.seconds: list[float] = []

  def finish(self, units: Sequence[tuple[str, float, int]]) -> list[Run]:
    """The runs of these (weighting, learning rate, seed), `jobs` at a time."""
    if self.jobs == 1:
      return [self.finish_one(*unit) for unit in units]
    with ThreadPoolExecutor(self.jobs) as pool:
      return list(pool.map(lambda unit: self.finish_one(*unit), units))

  def finish_one(self, weighting: str, lr: float, seed: int) -> Run:
    """The run of one unit, trained or resumed unless a finished one is there."""
    folder = self.plan.unit_folder(weighting, lr, seed)
    title = f'{arm_name(weighting)}  lr {lr:g}  seed {seed}'
    fresh = not Run(folder).finished
    if fresh:
      if self.stopping():
        raise StoppedError(_GO_ON)
      say(f'[{self.done + 1}/{self.total}] {title}  ...{self.time_left()}')
      start = time.monotonic()
      try:
        self.train(self.plan.unit_config(weighting, lr, seed), str(folder))
      except NonFiniteError as e:
        if not (folder / 'abort.json').exists():
          files.write_json(folder / 'abort.json', {'message': str(e)})
      except BrokenProcessPool as error:
        if self.stopping():  # told before it could listen
          raise StoppedError(_GO_ON) from error
        raise
      took = time.monotonic() - start
    run = Run(folder)
    outcome = (
      'diverged' if run.diverged else f'{self.plan.metric} {run.value(self.plan.metric):.4f}'
    )
    with self.lock:
      self.done += 1
      if fresh:
        self.seconds.append(took)
      how = f'{took:.0f} s' if fresh else 'was finished'
      say(f'[{self.done}/{self.total}] {title}  {outcome}  ({how})')
    return run

  def skip(self, n: int) -> None:
    self.total -= n

  def time_left(self) -> str:
    if not self.seconds:
      return ''
    left = (self.total - self.done) * sum(self.seconds) / len(self.seconds) / self.jobs
    return f'  about {left / 60:.0f} min left' if left > 90 else f'  about {left:.0f} s left'


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def record(board: Board) -> dict:
  """`compare.json`: which run is which, and every number of the table; null stands for diverged."""
  return {
    'metric': board.metric,
    'tier': board.tier,
    'baseline': board.baseline.name,
    'arms': [
      {
        'name': arm.name,
        'lr': arm.lr,
        'lr_at_edge': arm.edge,
        'grid': [{'lr': lr, 'value': value} for lr, value in arm.grid],
        'step_flops': arm.step_flops,
        'runs': [f'runs/{run.path.name}' for run in arm.runs],
        'values': {metric: arm.values(metric) for metric in board.rows},
        'difference': {
          metric: result._asdict() if (result := board.difference(arm, metric)) else None
          for metric in board.rows
        },
        'verdict': arm_verdict(board, arm)._asdict() if arm is not board.baseline else None,
      }
      for arm in board.arms
    ],
  }


def default_arms(overrides: Mapping[str, object], spec: str) -> str:
  """The arms that the config file is made for, or those of the README.

  Raises:
    UserError: the file's arms go by its number of steps, which was set elsewhere.
  """
  arms = config_lib.arms(spec)
  if arms and 'total_steps' in overrides:
    raise UserError(
      f'--config.total_steps={overrides["total_steps"]}: the arms of {spec.partition(":")[0]} have '
      'schedules in steps; set them in its argument, steps=..., or name arms with --weightings'
    )
  return ','.join(f'{name}:={arm}' for name, arm in arms.items()) or 'uniform,linupper:0.4'


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  cli.define_config()
  flags.DEFINE_string('weightings', None, "arms; the first: baseline; default: the config's")
  flags.DEFINE_string('lrs', None, 'peak learning rates to try; default: the one of the config')
  flags.DEFINE_integer('seeds', 3, 'paired seeds of every arm, from config.seed on')
  flags.DEFINE_integer('tune_seeds', 1, 'how many of them choose the learning rate, by their mean')
  known = ', '.join(METRICS)
  flags.DEFINE_string('metric', 'macro_bpb', f'{known} or bpb/<domain>[+<domain>], their mean')
  flags.DEFINE_integer('jobs', 1, 'runs at once, in processes of their own', lower_bound=1)
  flags.DEFINE_string('workdir', '', 'where runs and report go; the same one to continue')


def main(_: list[str]) -> None:
  from experiments import report  # here, so that a missing library is known before training

  plan = make_plan(
    FLAGS.config,
    default_arms(*cli.config_origin()) if FLAGS.weightings is None else FLAGS.weightings,
    FLAGS.lrs,
    FLAGS.seeds,
    FLAGS.metric,
    FLAGS.workdir,
    FLAGS.tune_seeds,
  )
  cli.use_compilation_cache(plan.cache)
  board = count_flops(plan, compare(plan, jobs=FLAGS.jobs))
  files.write_json(plan.folder / 'compare.json', record(board))
  print(board_text(board), flush=True)
  page = report.write(board, plan.folder)
  print(f'\nreport: {page}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
