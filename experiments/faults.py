"""Kills a run again and again, starts it again each time, and counts what it lost.

  python -m experiments.faults --config=configs/quickstart.py --workdir=runs/faults --kills=20
  python -m experiments.faults --config=configs/quickstart.py --workdir=runs/two --processes=2

Trains once undisturbed, and once more under kills at random moments: a third of them while a
checkpoint is saved, a sixth in start-up, a sixth in an evaluation, the rest wherever the run is. Of
several processes (on this machine) it kills all, or one: the others must end by themselves, or are
killed --grace seconds later (jax takes a minute or two to miss a dead process). Then the two runs
are compared: metrics, examples and ledger rows of every step, the result, and every array of the
last checkpoint, bit for bit.

What a kill costs is a restart and the steps since the last checkpoint; config.checkpoint.every well
below total_steps / kills keeps the whole short. Repeat the command to go on where it was stopped.
Prints a table; writes WORKDIR/faults.json. Exit status 1: something was lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import cli, files, metrics
from experiments import config as config_lib
from experiments.errors import StoppedError, UserError
from experiments.verdict import format_table

FLAGS = flags.FLAGS
PROGRAM = ('-m', 'experiments.main')
RECORD_ALL = {'log.every': 1, 'log.examples_every': 1, 'log.ledger': True}
QUIET = {'log.tensorboard': False, 'log.progress': False, 'log.wandb': ''}
DURING = ('save', 'step', 'start', 'save', 'step', 'evaluation')
SIGNALS = {'kill': ('SIGKILL',), 'term': ('SIGTERM',), 'mixed': ('SIGKILL', 'SIGTERM')}
POLL = 0.004  # seconds


class Plan(NamedTuple):
  """What is to be run and killed."""

  folder: Path
  spec: str  # the value of --config
  overrides: Mapping[str, Any]  # flat keys of the config
  kills: int = 20
  processes: int = 1
  signals: tuple[str, ...] = ('SIGKILL',)
  seed: int = 0
  grace: float = 120.0  # seconds
  patience: float = 600.0  # seconds without a sign of life

  @property
  def config(self) -> ConfigDict:
    config = config_lib.load(self.spec)
    config.update_from_flattened_dict({**self.overrides, **RECORD_ALL, **QUIET})
    return config

  @property
  def environment(self) -> dict[str, str]:
    """Every launch finds what an earlier one has compiled, so that a kill costs seconds."""
    return {
      'JAX_COMPILATION_CACHE_DIR': str(self.folder.absolute() / '.jax_cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      **os.environ,
    }

  def command(self, workdir: Path) -> list[str]:
    config_flags = []
    for key, value in {**self.overrides, **RECORD_ALL, **QUIET}.items():
      values = value if isinstance(value, tuple) else (value,)
      config_flags += [f'--config.{key}={item}' for item in values]
    return [
      *(sys.executable, *PROGRAM, f'--config={self.spec}', f'--workdir={workdir}'),
      *config_flags,
    ]


class Moment(NamedTuple):
  """When to kill, and whom."""

  step: int  # once this one is on record, which a kill in start-up does not wait for
  during: str  # one of DURING
  part: float  # how much later, of the time that it usually takes
  signal: str
  member: int | None  # one of the processes; None: all

  def has_come(self, step: int | None, doing: Sequence[str]) -> bool:
    return self.during in doing and (self.during == 'start' or step >= self.step)


class Life(NamedTuple):
  """One launch of the program, to its end."""

  killed: Moment | None  # None: it ended by itself
  doing: Sequence[str]  # when it was killed
  resumed: int | None  # after which step; None: it did not come that far
  reached: int | None  # the last step on record
  ready: float | None  # seconds until its first step was on record
  seconds: float  # until the kill or the end
  spent: dict[str, float]  # seconds in each of DURING
  statuses: Sequence[int]  # exit status of each process
  outlived: float  # seconds that other processes went on for after the kill of one
  forced: int  # how many of them had to be killed, too
  sealed: Sequence[int]  # the finished checkpoints that it left
  lost: Sequence[int]  # those that were finished and should be there, and are not, or not whole
  problem: str  # what went wrong, or ''


def moments(plan: Plan) -> list[Moment]:
  """When to kill: random, and the same for the same plan.

  Raises:
    UserError: the run is too short.
  """
  config = plan.config
  # A save and an evaluation, missed once or twice, still follow the last of them.
  end = 3 * max(config.checkpoint.every, config.eval.every)
  if config.total_steps <= end:
    raise UserError(
      f'config.total_steps={config.total_steps}: must be above {end}, three times '
      'config.checkpoint.every and config.eval.every, so that there is something to interrupt'
    )
  rng = random.Random(plan.seed)
  during = [DURING[i % len(DURING)] for i in range(plan.kills)]
  rng.shuffle(during)
  steps = sorted(rng.randint(1, config.total_steps - end) for _ in during)
  members = [None, *range(plan.processes)] if plan.processes > 1 else [None]
  return [
    Moment(step, what, rng.random(), rng.choice(plan.signals), rng.choice(members))
    for step, what in zip(steps, during)
  ]


# Processes


def start(
  command: Sequence[str], processes: int, log: Path, environment: Mapping[str, str]
) -> list[subprocess.Popen]:
  """Starts a program as one process or as several on this machine; each prints to `log_of`."""
  joins: list[list[str]] = [[]]
  if processes > 1:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    joins = [
      [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}']
      for i in range(processes)
    ]
  log.parent.mkdir(parents=True, exist_ok=True)
  running = []
  for number, join in enumerate(joins):
    with log_of(log, number).open('wb') as output:
      running.append(
        subprocess.Popen(
          [*command, *join], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
      )
  return running


def log_of(log: Path, number: int) -> Path:
  """What one of the processes prints."""
  return log.with_name(f'{log.name}.{number}.log')


def end(
  running: Sequence[subprocess.Popen], grace: float, how: str = '', told: int | None = None
) -> tuple[float, int]:
  """Signals one of the processes, or all, and waits for all.

  Args:
    running: the processes.
    grace: seconds, after which those that still run are killed.
    how: 'SIGKILL' or 'SIGTERM'; '' only waits.
    told: which one gets the signal; None: all.

  Returns:
    (seconds until the last had ended, how many had to be killed after all).
  """
  began, forced = time.monotonic(), 0
  for process in running if told is None else [running[told]]:
    if how:
      process.send_signal(signal.Signals[how])
  for process in running:
    try:
      process.wait(max(0, began + grace - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      forced += 1
  return time.monotonic() - began, forced


class Watch:
  """Tells by the files of a run what the processes that are about to be started do."""

  def __init__(self, workdir: Path, log: Path, eval_every: int):
    self.resumed: int | None = None  # after which step, once they have begun to record
    self._workdir, self._log, self._eval_every = workdir, log_of(log, 0), eval_every
    self._old = self._stamp()

  def _stamp(self) -> tuple[int, int] | None:
    try:
      found = (self._workdir / 'metrics.jsonl').stat()
    except FileNotFoundError:
      return None
    return found.st_ino, found.st_mtime_ns

  def look(self) -> tuple[int | None, list[str]]:
    """(the last step on record, what goes on: 'start', or 'step' and perhaps more of DURING)."""
    if self.resumed is None:
      if self._stamp() == self._old:  # that of the processes before
        return None, ['start']
      said = re.search(r'resuming after step (\d+)', self._log.read_text(errors='replace'))
      self.resumed = int(said[1]) if said else 0
    record = last_record(self._workdir / 'metrics.jsonl')
    step = record.get('step', 0)
    if step <= self.resumed:
      return step, ['start']
    doing = ['step']
    if save_under_way(self._workdir / 'checkpoints', self.resumed):
      doing.append('save')
    if record['kind'] == 'train' and step % self._eval_every == 0:
      doing.append('evaluation')
    return step, doing


def last_record(path: Path) -> dict:
  """The last whole line of a JSONL file that is being written; {} if there is none."""
  with path.open('rb') as file:
    length, part = file.seek(0, os.SEEK_END), 4096
    while True:
      file.seek(max(0, length - part))
      lines = file.read().split(b'\n')
      if len(lines) > 2 or part >= length:
        return json.loads(lines[-2]) if len(lines) > 1 else {}
      part *= 4


def save_under_way(directory: Path, after: int = 0) -> bool:
  """Whether a save of a later step is being written, or has not been sealed."""
  if any(directory.glob('*.orbax-checkpoint-tmp*')):
    return True
  return any(step > after and not whole for step, whole in saved(directory).items())


def saved(directory: Path) -> dict[int, bool]:
  """{step: whether its checkpoint is sealed, and so finished}."""
  from experiments import checkpoints

  steps = checkpoints.committed_steps(directory)
  return {step: (directory / str(step) / checkpoints.SEAL).exists() for step in steps}


def sealed(directory: Path) -> list[int]:
  return [step for step, whole in saved(directory).items() if whole]


def lost(directory: Path, steps: Iterable[int], keep: int) -> list[int]:
  """Those of `steps`, all sealed, that are not whole and not replaced by `keep` newer ones."""
  from experiments import checkpoints

  present = saved(directory)
  whole = lambda step: step in present and not checkpoints.damage(directory / str(step))
  newer = lambda step: sum(other > step for other in present)
  return [step for step in sorted(set(steps)) if newer(step) < keep and not whole(step)]


# Lives of a run


def live(
  plan: Plan, workdir: Path, name: str, bar: Any, moment: Moment | None = None,
  usual: Mapping[str, float] | None = None, before: Sequence[int] = (),
) -> Life:  # fmt: skip
  """Launches the program and kills it at the moment, or lets it end.

  Args:
    plan: of the study.
    workdir: the run.
    name: of the launch, for its logs.
    bar: tqdm, of steps.
    moment: when to kill; None never does.
    usual: seconds that each of DURING takes.
    before: the checkpoints that the life before has left, sealed.
  """
  config, directory, log = plan.config, workdir / 'checkpoints', plan.folder / 'logs' / name
  watch = Watch(workdir, log, config.eval.every)
  known, killed, problem = list(before), None, ''
  ready = due = seen = None
  spent = dict.fromkeys(DURING, 0.0)
  outlived, forced, doing = 0.0, 0, ['start']
  began = now = changed = time.monotonic()
  running = start(plan.command(workdir), plan.processes, log, plan.environment)
  try:
    while not (killed or problem) and all(process.poll() is None for process in running):
      time.sleep(POLL)
      earlier, now = now, time.monotonic()
      step, doing = watch.look()
      for what in doing:
        spent[what] += now - earlier
      if (step, doing) != seen:
        seen, changed = (step, doing), now
        bar.update((step or 0) - bar.n)
      if ready is None and 'start' not in doing:
        ready = now - began
      if moment and due is None and moment.has_come(step, doing):
        due = now + moment.part * usual[moment.during]
      if due is not None and (now >= due or moment.during not in doing):
        known += sealed(directory)
        outlived, forced = end(running, plan.grace, moment.signal, moment.member)
        killed = moment
      elif now > changed + plan.patience:
        problem = f'showed no sign of life for {plan.patience:g} s'
    if not (killed or problem):
      end(running, plan.grace)
  finally:
    end(running, 0, 'SIGKILL')
  statuses = [process.returncode for process in running]
  reached, left = watch.look()
  stopping = killed is not None and killed.signal == 'SIGTERM'
  if watch.resumed is not None and watch.resumed < max(before, default=0):
    problem = f'resumed after step {watch.resumed} with checkpoint {max(before)} on disk'
  elif stopping and 'start' not in doing and set(statuses) != {StoppedError.exit_status}:
    problem = f'was told to stop and ended with status {" and ".join(map(str, statuses))}'
  elif not (killed or problem) and any(statuses):
    number = next(i for i, status in enumerate(statuses) if status)
    said = log_of(log, number).read_text(errors='replace').strip()
    problem = f'ended with status {statuses[number]}: {said.rpartition(chr(10))[2]}'
  return Life(
    killed=killed,
    # What a kill has left tells best; one that was asked to stop leaves nothing half done.
    doing=doing if stopping else left,
    resumed=watch.resumed,
    reached=reached if watch.resumed is not None else None,
    ready=ready,
    seconds=now - began,
    spent=spent,
    statuses=statuses,
    outlived=outlived,
    forced=forced,
    sealed=sealed(directory),
    lost=lost(directory, known, config.checkpoint.keep),
    problem=problem and f'launch {name} {problem}',
  )


def undisturbed(plan: Plan) -> dict[str, Any]:
  """Trains the reference, unless that was done; seconds that it, and each of DURING, took.

  Raises:
    UserError: it failed, or the folder belongs to another study.
  """
  path, workdir = plan.folder / 'reference.json', plan.folder / 'reference'
  config = plan.config
  of = {'config': json.loads(config_lib.to_json(config)), 'processes': plan.processes}
  if path.exists():
    known = files.read_json(path)
    if known['of'] != of:
      raise UserError(
        f'--workdir={plan.folder} holds a study of another config or number of processes: '
        'choose another'
      )
    return known['usual']
  shutil.rmtree(workdir, ignore_errors=True)  # one that was itself interrupted
  with tqdm(total=config.total_steps, desc='undisturbed', unit='step') as bar:
    life = live(plan, workdir, 'reference', bar)
  if life.problem:
    raise UserError(f'{life.problem}; see {plan.folder}/logs')
  times = lambda every: math.ceil(config.total_steps / every)
  usual = {
    'run': life.seconds,
    'start': life.ready,
    'step': (life.seconds - life.ready) / config.total_steps,
    'save': life.spent['save'] / times(config.checkpoint.every),
    'evaluation': life.spent['evaluation'] / times(config.eval.every),
  }
  files.write_json(path, {'of': of, 'usual': usual})
  return usual


def disturbed(plan: Plan, ahead: Sequence[Moment], usual: dict[str, Any]) -> list[Life]:
  """The lives of the other run, up to one that ends by itself; those on record are not repeated."""
  path, workdir, config = plan.folder / 'lives.json', plan.folder / 'disturbed', plan.config
  lives = [_life(known) for known in files.read_json(path)] if path.exists() else []
  with tqdm(total=config.total_steps, desc='disturbed', unit='step') as bar:
    while not lives or lives[-1].killed:
      bar.set_postfix_str(f'{len(lives)} of {plan.kills} kills')
      # The undisturbed run may have had to compile first, so later starts tell how long one takes.
      start = next((life.ready for life in reversed(lives) if life.ready), usual['start'])
      lives.append(
        live(
          plan,
          workdir,
          f'{len(lives):04}',
          bar,
          ahead[len(lives)] if len(lives) < len(ahead) else None,
          {**usual, 'start': start},
          lives[-1].sealed if lives else (),
        )
      )
      files.write_json(path, [_plain(life) for life in lives])
  return lives


def _plain(life: Life) -> dict:
  return {**life._asdict(), 'killed': life.killed and life.killed._asdict()}


def _life(known: dict) -> Life:
  return Life(**{**known, 'killed': known['killed'] and Moment(**known['killed'])})


# What was lost


class Outcome(NamedTuple):
  """Everything of a finished run that must not depend on kills."""

  steps: dict[int, list]  # each step's metrics, examples and ledger rows
  results: dict[str, Any]  # result.json, and the position in the data
  arrays: dict[str, str]  # SHA-256 of each leaf of the last state


def read_outcome(workdir: Path) -> Outcome:
  """Reads a finished run; needs one device, whatever the run had.

  Raises:
    UserError: it is not finished, or something of it cannot be read.
  """
  import jax
  import numpy as np
  import pyarrow.parquet as parquet

  from experiments import checkpoints, train

  results = files.read_json(workdir / 'result.json')
  results.pop('seconds', None)
  config = config_lib.read(workdir)
  config.mesh.update(dict.fromkeys(config.mesh, 1))
  run = train.build(config, jax.devices()[:1])
  with checkpoints.Checkpoints(workdir / 'checkpoints', keep=config.checkpoint.keep) as opened:
    state, results['data_state'], _ = opened.restore(run.abstract_state, config.total_steps)
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  arrays = {}
  for keys, leaf in flat:
    value = np.asarray(leaf)
    digest = hashlib.sha256(f'{value.dtype}{value.shape}'.encode() + value.tobytes())
    arrays[jax.tree_util.keystr(keys, simple=True, separator='/')] = digest.hexdigest()
  rows = metrics.read_jsonl(workdir / 'metrics.jsonl')
  rows += metrics.read_jsonl(workdir / 'examples.jsonl')
  # Where its parts are cut depends on where a run was stopped; its rows do not.
  for part in sorted((workdir / 'ledger').glob('*.parquet')):
    rows += parquet.read_table(part).to_pylist()
  steps: dict[int, list] = {}
  for row in rows:
    row.pop('wall', None)
    steps.setdefault(row['step'], []).append(row)
  return Outcome(steps, results, arrays)


def differing(a: Mapping, b: Mapping) -> list:
  """The keys under which two dicts do not hold the same."""
  return sorted(
    key for key in a.keys() | b.keys() if key not in a or key not in b or a[key] != b[key]
  )


def report(plan: Plan, usual: dict[str, Any], lives: Sequence[Life]) -> dict[str, Any]:
  """`faults.json`: what the kills did, and what was lost by them."""
  config, kills = plan.config, [life for life in lives if life.killed]
  problems = [life.problem for life in lives if life.problem]
  after_all = lost(
    plan.folder / 'disturbed' / 'checkpoints', lives[-1].sealed, config.checkpoint.keep
  )
  found: dict[str, Any] = {'steps_differing': None}
  if not lives[-1].problem:
    try:
      a, b = (read_outcome(plan.folder / name) for name in ('reference', 'disturbed'))
      found = {f'{name}_differing': differing(*both) for name, *both in zip(a._fields, a, b)}
      found['arrays'] = len(a.arrays)
    except UserError as e:
      problems.append(f'cannot be compared: {e}')
  redone, restart = redone_and_restarts(lives)
  return {
    'config': plan.spec,
    'overrides': plan.overrides,
    'processes': plan.processes,
    'signals': list(plan.signals),
    'seed': plan.seed,
    'total_steps': config.total_steps,
    'kills_asked': plan.kills,
    'kills': len(kills),
    'kills_lost': sum(
      bool(life.lost or after.problem) for life, after in itertools.pairwise(lives) if life.killed
    ),
    **found,
    'checkpoints_lost': [step for life in lives for step in life.lost] + after_all,
    'problems': problems,
    'during': {what: sum(what in life.doing for life in kills) for what in sorted(set(DURING))},
    'one_of_several': [
      {'outlived': life.outlived, 'forced': life.forced}
      for life in kills
      if life.killed.member is not None
    ],
    'steps_redone': redone,
    'restart_seconds': restart,
    'seconds_lost': [n * usual['step'] + s for n, s in zip(redone, restart)],
    'save_interval_seconds': config.checkpoint.every * usual['step'],
    'undisturbed_seconds': usual['run'],
    'disturbed_seconds': sum(life.seconds for life in lives),
    'usual_seconds': usual,
    'lives': [_plain(life) for life in lives],
  }


def redone_and_restarts(lives: Sequence[Life]) -> tuple[list[int], list[float]]:
  """For each kill: steps that were done twice, and seconds until the next launch did a new one."""
  redone, restart = [], []
  for i, life in enumerate(lives[:-1]):
    resumed = next((n.resumed for n in lives[i + 1 :] if n.resumed is not None), life.reached)
    redone.append(0 if life.reached is None else life.reached - resumed)
    after = lives[i + 1]
    restart.append(after.seconds if after.ready is None else after.ready)
  return redone, restart


def something_lost(found: Mapping[str, Any]) -> bool:
  """Whether a run was not, in the end, as if nothing had happened."""
  differ = [found.get(f'{name}_differing') for name in Outcome._fields]
  return bool(any(differ) or None in differ or found['checkpoints_lost'] or found['problems'])


def table(found: Mapping[str, Any]) -> str:
  """What `report` found, aligned."""
  count = lambda name, total: (
    'not known' if found.get(name) is None else f'{len(found[name])} of {total}'
  )
  spread = lambda values, form: (
    f'{statistics.mean(values):{form}} / {max(values):{form}}' if values else ''
  )
  rows = [
    ('kills, of those asked for', f'{found["kills"]} of {found["kills_asked"]}'),
    *((f'  during {what}', str(n)) for what, n in found['during'].items()),
    ('kills survived', str(found['kills'] - found['kills_lost'])),
    ('kills lost', str(found['kills_lost'])),
    ('steps that differ', count('steps_differing', found['total_steps'])),
    ('arrays that differ', count('arrays_differing', found.get('arrays'))),
    ('results that differ', ', '.join(found.get('results_differing') or ()) or '0'),
    ('checkpoints lost', str(len(found['checkpoints_lost']))),
    ('steps redone per kill, mean / max', spread(found['steps_redone'], '.1f')),
    ('restart, seconds, mean / max', spread(found['restart_seconds'], '.1f')),
    ('seconds lost per kill, mean / max', spread(found['seconds_lost'], '.1f')),
    ('save interval, seconds', f'{found["save_interval_seconds"]:.1f}'),
  ]
  if alone := found['one_of_several']:
    forced = sum(bool(kill['forced']) for kill in alone)
    rows += [
      ('kills of one process', str(len(alone))),
      ('  others had to be killed, too', str(forced)),
      ('  others went on for, seconds', spread([kill['outlived'] for kill in alone], '.1f')),
    ]
  title = f'{found["processes"]} process{"es" * (found["processes"] > 1)}'
  return '\n'.join([format_table(('', title), rows), *found['problems']])


def study(plan: Plan) -> dict[str, Any]:
  """Does what is left to do of the plan; the content of `faults.json`."""
  from experiments import checkpoints  # noqa: F401  a second or two, and not while a run is watched

  ahead = moments(plan)
  with files.exclusive(plan.folder):
    usual = undisturbed(plan)
    found = report(plan, usual, disturbed(plan, ahead, usual))
    files.write_json(plan.folder / 'faults.json', found)
  return found


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  cli.define_config()
  flags.DEFINE_string('workdir', '', 'where runs and results go; the same one to continue')
  flags.DEFINE_integer('kills', 20, 'how many', lower_bound=1)
  flags.DEFINE_integer('processes', 1, 'of each run, on this machine', lower_bound=1)
  flags.DEFINE_enum('signal', 'kill', list(SIGNALS), 'SIGKILL, SIGTERM, or either at random')
  flags.DEFINE_integer('seed', 0, 'of the moments')
  flags.DEFINE_float('grace', 120, 'seconds in which the other processes must end', lower_bound=0)


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/faults')
  overrides, spec = cli.config_origin()
  plan = Plan(
    Path(FLAGS.workdir),
    spec,
    overrides,
    signals=SIGNALS[FLAGS.signal],
    kills=FLAGS.kills,
    processes=FLAGS.processes,
    seed=FLAGS.seed,
    grace=FLAGS.grace,
  )
  signal.signal(signal.SIGTERM, _stop)  # so that no process is left behind
  found = study(plan)
  print(table(found), flush=True)
  if something_lost(found):
    sys.exit(1)


def _stop(*_) -> None:
  raise StoppedError('the same command goes on with what is left')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
