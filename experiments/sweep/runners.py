"""Where units run: on this machine or on a SLURM cluster, both through submitit.

A runner knows which units are under way, also those that an earlier launcher has started.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from experiments import files
from experiments.compare import processor_shares
from experiments.errors import UserError
from experiments.sweep import worker
from experiments.sweep.units import Unit

Command = Callable[[Unit], list[str]]
CUDA = 'CUDA_VISIBLE_DEVICES'
PAUSES = (1, 5, 30, 60)  # seconds, after a command of SLURM that failed
SHARE = 'share.json'  # the processors and GPUs of a unit, for a launcher that comes later
YEAR = 60 * 24 * 365  # minutes


class Local:
  """Units on this machine, `jobs` at a time, each with its share of the processors and GPUs.

  Args:
    folder: the directory of the sweep.
    command: what runs a unit.
    jobs: how many at a time.
    gpus: how many GPUs each has to itself; 0: all see what this process sees.
  """

  interval = 0.5  # seconds between looks

  def __init__(self, folder: Path, command: Command, jobs: int, gpus: int = 0):
    self._folder, self._command = folder, command
    shares = processor_shares(jobs) if jobs > 1 else [set()]
    self._free = list(zip(shares, gpu_shares(jobs, gpus)))
    self._started: dict[str, tuple[submitit.Job, Any]] = {}
    self._left: list[Unit] = []
    self._executor = submitit.AutoExecutor(folder / 'submitit', cluster='local')
    self._executor.update_parameters(timeout_min=YEAR)

  def alive(self, units: Sequence[Unit]) -> dict[str, str]:
    """{name: 'running'} of those under way."""
    for name, (job, share) in list(self._started.items()):
      if job.done():
        del self._started[name]
        self._free.append(share)
    # What an earlier launcher has started, and has not ended.
    self._left = [u for u in units if u.name not in self._started and worker.is_held(u.job)]
    running = {*self._started, *(unit.name for unit in self._left)}
    return {unit.name: 'running' for unit in units if unit.name in running}

  def room(self, alive: Mapping[str, str]) -> int:
    """How many more may be started now."""
    return len(self._free) - len(alive.keys() - self._started.keys())

  def start(self, units: Sequence[Unit]) -> None:
    """Starts units, not more than there is room for."""
    taken = [_share(unit) for unit in self._left]
    for unit in units:
      share = next((share for share in self._free if _plain(share) not in taken), self._free[0])
      self._free.remove(share)
      processors, visible = share
      files.write_json(unit.job / SHARE, _plain(share))
      with _away_from_the_terminal():
        job = self._executor.submit(
          worker.run, self._command(unit), str(unit.job.absolute()),
          {**_cache(self._folder), CUDA: visible}, sorted(processors),
        )  # fmt: skip
      self._started[unit.name] = job, share

  def stop(self, units: Sequence[Unit]) -> None:
    """Asks these units to save and end; those that are just starting may have to be asked again."""
    for unit in units:
      pid = (unit.job / 'lock').read_text() if worker.is_held(unit.job) else ''
      if not pid and unit.name in self._started:
        pid = self._started[unit.name][0].job_id  # of the process that submitit started
      if pid:
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(pid), signal.SIGTERM)


class Slurm:
  """Units as one job array; a unit is under way as long as squeue lists its job.

  Args:
    folder: the directory of the sweep, on a file system that all nodes see.
    command: what runs a unit.
    jobs: how many at a time.
    partition, gpus, minutes, nodes, tasks_per_node: of each job.
    more: any other option of sbatch, {'account': 'mine'}.
  """

  interval = 5.0

  def __init__(
    self,
    folder: Path,
    command: Command,
    jobs: int,
    *,
    partition: str = '',
    gpus: int = 0,
    minutes: int = 60,
    nodes: int = 1,
    tasks_per_node: int = 1,
    more: Mapping[str, str] | None = None,
  ):
    self._folder, self._command = folder, command
    try:
      self._executor = submitit.AutoExecutor(folder / 'submitit', cluster='slurm')
    except RuntimeError as e:
      raise UserError(f'--on=slurm: {e} Run it where sbatch and srun are found') from e
    self._executor.update_parameters(
      name=folder.name,
      timeout_min=minutes,
      nodes=nodes,
      tasks_per_node=tasks_per_node,
      slurm_array_parallelism=jobs,
      slurm_signal_delay_s=min(120, 30 * minutes),
      slurm_additional_parameters={'requeue': True, **(more or {})},
      **({'gpus_per_node': gpus} if gpus else {}),
      **({'slurm_partition': partition} if partition else {}),
    )

  def alive(self, units: Sequence[Unit]) -> dict[str, str]:
    """{name: 'queued' or 'running'} of those under way."""
    listed = {}
    for line in _slurm('squeue', '-h', '-r', '-o', '%i %T', f'--user={getpass.getuser()}'):
      job_id, state = line.split()
      listed[job_id] = 'queued' if state == 'PENDING' else 'running'
    ids = ((unit.name, _job_id(unit)) for unit in units)
    return {name: listed[job_id] for name, job_id in ids if job_id in listed}

  def room(self, alive: Mapping[str, str]) -> int:
    """How many more may be started now: SLURM itself keeps them waiting."""
    return 10_000

  def start(self, units: Sequence[Unit]) -> None:
    """Submits units."""
    for unit in units:
      (unit.job / 'stop').unlink(missing_ok=True)
    try:
      with self._executor.batch():
        jobs = [
          self._executor.submit(
            worker.run, self._command(unit), str(unit.job.absolute()), _cache(self._folder)
          )
          for unit in units
        ]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
      raise UserError(f'sbatch failed: {e}') from e
    for unit, job in zip(units, jobs):
      files.write_json(unit.job / 'slurm.json', {'job_id': job.job_id})

  def stop(self, units: Sequence[Unit]) -> None:
    """Asks these units to save and end; those that are just starting may have to be asked again."""
    ids = [job_id for unit in units if (job_id := _job_id(unit))]
    for unit in units:
      files.write_text(unit.job / 'stop', '')  # or it would queue itself again
    # Cancelled, a running job would have seconds to save; told, it ends when it has. A job that has
    # just ended makes scancel fail.
    for how in ('--state=PENDING', '--signal=TERM'):
      if ids:
        subprocess.run(['scancel', how, *ids], capture_output=True, check=False)


def _job_id(unit: Unit) -> str | None:
  path = unit.job / 'slurm.json'
  return files.read_json(path)['job_id'] if path.exists() else None


def _slurm(*command: str) -> list[str]:
  """The lines that a command of SLURM prints.

  Raises:
    UserError: it fails again and again.
  """
  for pause in PAUSES:  # a controller that restarts is back soon
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
      return done.stdout.splitlines()
    time.sleep(pause)
  raise UserError(f'{command[0]} failed: {done.stderr.strip()}; units that run go on')


def _cache(folder: Path) -> dict[str, str]:
  """Where compiled programs are kept, for the units to share, unless the user has said where."""
  name = 'JAX_COMPILATION_CACHE_DIR'
  return {name: os.environ.get(name) or str((folder / '.jax_cache').absolute())}


def _plain(share: tuple[set[int], str | None]) -> list:
  """A share as JSON has it."""
  return [sorted(share[0]), share[1]]


def _share(unit: Unit) -> list | None:
  """What a unit was started with; None where nobody noted it."""
  path = unit.job / SHARE
  return files.read_json(path) if path.is_file() else None


def gpu_shares(jobs: int, gpus: int) -> list[str | None]:
  """CUDA_VISIBLE_DEVICES of each of `jobs`: `gpus` to each, or with 0 what this process has.

  Raises:
    UserError: this process sees fewer.
  """
  visible = os.environ.get(CUDA)
  if not gpus:
    return [visible] * jobs
  names = visible.split(',') if visible else [str(i) for i in range(jobs * gpus)]
  if len(names) < jobs * gpus:
    raise UserError(f'--jobs={jobs} --gpus={gpus}: {CUDA}={visible} has only {len(names)}')
  return [','.join(names[i * gpus : (i + 1) * gpus]) for i in range(jobs)]


@contextlib.contextmanager
def _away_from_the_terminal():
  """What is started inside hears neither Ctrl-C nor the end of the terminal: `stop` tells it."""
  terminal = {signal.SIGINT, signal.SIGHUP}
  before = signal.pthread_sigmask(signal.SIG_BLOCK, terminal)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


logging.getLogger('submitit').setLevel(logging.ERROR)
