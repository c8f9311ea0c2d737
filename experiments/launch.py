r"""Runs a sweep: many runs of one config, on this machine, on a SLURM cluster or on a TPU slice.

  python -m experiments.launch --config=configs/quickstart.py --workdir=runs/sweep --jobs=2
  python -m experiments.launch --config=configs/lm.py:path=my/text --workdir=runs/mine --on=slurm \
      --partition=gpu --gpus=1 --time=240 \
      --sweep='arm=uniform,linupper:1.0 optim.lr=1e-3,3e-3 seed=0,1,2'
  python -m experiments.launch --config=configs/quickstart.py --workdir=runs/sweep --on=print

--sweep names a grid: keys of the config, each with its values; 'arm' takes arms as in
experiments.compare ('linupper:1.0', 'uniform@batch_size=8', 'odm:=uniform@mixture=odm'). Without
it, the config's own `sweep(add)` is run, which may be any list of units, also a random one. What
the command line says with --config.<key>=<value> holds for all units.

A unit is a run of experiments.main in WORKDIR/units/<name>; its log is WORKDIR/jobs/<name>/log.txt.
Repeat the command to go on after anything: finished units are skipped, those under way are waited
for, stopped and killed ones resume, failed ones are tried again. Ctrl-C and SIGTERM stop the units,
which save; a killed launcher leaves them running. At the end: WORKDIR/results.csv, results.parquet
and sweep.png. docs/launch.md has more. Exit status: 0 all units ended, 2 a mistake or a failed
unit, 75 stopped.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from experiments import cli, files
from experiments import config as config_lib
from experiments.errors import StoppedError, UserError

FLAGS = flags.FLAGS
ASK_AGAIN = 5.0  # seconds
TPU_SCRIPT = Path(__file__).parent.parent / 'tpu_scripts' / 'train.sh'


def launch(sweep, runner, progress) -> list:
  """Runs what is not finished; returns the units that failed.

  Args:
    sweep: from `make_sweep`, written.
    runner: where units run; see experiments/sweep/runners.py.
    progress: is shown the state of every unit.

  Raises:
    StoppedError: asked to stop, by SIGTERM or SIGINT; the units have saved.
  """
  stopping = _listen()
  tried: set[str] = set()
  asked_at = -ASK_AGAIN
  while True:
    alive = runner.alive(sweep.units)  # before any result is read, so that none is missed
    tried |= alive.keys()
    states = {
      unit.name: alive.get(unit.name) or _state(unit, unit.name in tried, bool(stopping))
      for unit in sweep.units
    }
    progress.show(states)
    waiting = [unit for unit in sweep.units if states[unit.name] == 'waiting']
    if stopping:
      if not alive:
        raise StoppedError('units under way have saved; the same command goes on')
      if time.monotonic() - asked_at >= ASK_AGAIN:
        runner.stop([unit for unit in sweep.units if unit.name in alive])
        asked_at = time.monotonic()
    elif waiting and runner.room(alive) > 0:
      chosen = waiting[: runner.room(alive)]
      runner.start(chosen)
      tried |= {unit.name for unit in chosen}
    elif not alive and not waiting:
      return [unit for unit in sweep.units if states[unit.name] == 'failed']
    time.sleep(runner.interval)


def _listen() -> list[int]:
  """The signals that ask to stop, as they come."""
  received: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(number))
  return received


def _state(unit, tried: bool, stopping: bool) -> str:
  """Of a unit that is not under way."""
  run = unit.run
  if run.finished:
    return 'diverged' if run.diverged else 'done'
  if tried and stopping:
    return 'stopped'
  # One that was told to stop by somebody else has saved, and goes on.
  return 'failed' if tried and unit.status != StoppedError.exit_status else 'waiting'


def make_runner(sweep, on: str):
  """Where units run, by the flags."""
  from experiments.sweep import runners

  if on == 'slurm':
    several = FLAGS.nodes * FLAGS.tasks_per_node > 1
    more = ('--coordinator=auto',) if several else ()
    return runners.Slurm(
      sweep.folder,
      lambda unit: sweep.command(unit, *more),
      FLAGS.jobs or 100,
      partition=FLAGS.partition,
      gpus=FLAGS.gpus,
      minutes=FLAGS.time,
      nodes=FLAGS.nodes,
      tasks_per_node=FLAGS.tasks_per_node,
      more=parse_options(FLAGS.slurm),
    )
  if on == 'tpu':
    if (FLAGS.jobs or 1) > 1:
      raise UserError(f'--jobs={FLAGS.jobs}: a TPU slice runs one unit after the other')
    print_tpu(sweep, sweep.units[:1], quiet=True)  # whether the names are there
    return runners.Local(sweep.folder, lambda unit: tpu_command(sweep, unit), 1)
  return runners.Local(sweep.folder, sweep.command, FLAGS.jobs or 1, FLAGS.gpus)


def tpu_command(sweep, unit) -> list[str]:
  """Runs a unit on all hosts of a slice."""
  command = sweep.command(unit, '--coordinator=auto', python='python')
  return ['bash', os.path.relpath(TPU_SCRIPT), str(unit.folder), *command]


def print_tpu(sweep, units: Sequence, *, quiet: bool = False) -> None:
  """Prints what the scripts would do, without doing it.

  Raises:
    UserError: a name is missing.
  """
  if sweep.folder.is_absolute():
    raise UserError(
      f'--workdir={sweep.folder}: must be relative for a TPU, which has it below its own tree'
    )
  for unit in units:
    done = subprocess.run(
      tpu_command(sweep, unit), env={**os.environ, 'TPU_DRY_RUN': '1'},
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
      raise UserError(f'--on=tpu: {done.stderr.strip().removeprefix("error: ")}')
    if not quiet:
      print(done.stdout, end='')


def print_commands(sweep) -> None:
  """The commands of every unit: on this machine and, where a TPU is named, on that."""
  for unit in sweep.units:
    print(shlex.join(sweep.command(unit, python='python')))
  if os.environ.get('TPU_NAME'):
    print_tpu(sweep, sweep.units)
  else:
    print('# for the commands of a TPU slice, set TPU_NAME and so on: see docs/launch.md')


def parse_options(text: str) -> Mapping[str, str]:
  """'account=mine,qos=high' as a dict.

  Raises:
    UserError: it does not parse.
  """
  pairs = [item.partition('=') for item in filter(None, text.split(','))]
  if not all(name and value for name, _, value in pairs):
    raise UserError(f'--slurm={text}: write --slurm=account=mine,qos=high')
  return {name: value for name, _, value in pairs}


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  cli.define_config()
  flags.DEFINE_string('sweep', None, "a grid, 'key=value,value ...'; default: the config's sweep")
  places = ('local', 'slurm', 'tpu', 'print')
  flags.DEFINE_enum('on', 'local', places, 'where; print: show the commands and run nothing')
  flags.DEFINE_string('workdir', '', 'the directory of the sweep; the same one to continue')
  flags.DEFINE_string('metric', 'macro_bpb', 'what the table and the picture show')
  flags.DEFINE_integer('jobs', None, 'units at a time; default: 1, slurm: 100', lower_bound=1)
  flags.DEFINE_integer('gpus', 0, 'GPUs of each unit (slurm: of each of its nodes)', lower_bound=0)
  flags.DEFINE_string('partition', '', 'slurm: where to queue')
  flags.DEFINE_integer('time', 60, 'slurm: minutes until a unit is queued again', lower_bound=1)
  flags.DEFINE_integer('nodes', 1, 'slurm: nodes of each unit', lower_bound=1)
  flags.DEFINE_integer('tasks_per_node', 1, 'slurm: processes on each node', lower_bound=1)
  flags.DEFINE_string('slurm', '', 'slurm: other options of sbatch, account=mine,qos=high')


def main(_: list[str]) -> None:
  from experiments.board import METRICS
  from experiments.sweep import units

  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/sweep')
  if FLAGS.metric not in METRICS and not FLAGS.metric.startswith('bpb/'):
    raise UserError(
      f'--metric={FLAGS.metric}: must be one of {", ".join(METRICS)}, or bpb/<domain>'
    )
  shared, spec = cli.config_origin()
  named = config_lib.sweep(spec) if FLAGS.sweep is None else units.parse(FLAGS.sweep)
  sweep = units.make_sweep(spec, shared, FLAGS.config, named, FLAGS.workdir)
  if FLAGS.on == 'print':
    print_commands(sweep)
    return
  from experiments.sweep import results
  from experiments.sweep.progress import Progress

  runner = make_runner(sweep, FLAGS.on)
  with files.exclusive(sweep.folder), Progress(sweep.units, FLAGS.metric) as progress:
    sweep.write()
    failed = launch(sweep, runner, progress)
  print(results.write(sweep.units, FLAGS.metric, sweep.folder), flush=True)
  if failed:
    raise UserError(
      f'{len(failed)} of {len(sweep.units)} units failed: see their logs in '
      f'{sweep.folder / "jobs"}, and repeat the command to try again'
    )


if __name__ == '__main__':
  define_flags()
  cli.run(main)
