"""Jobs over the shards of a corpus: a map of each, and a merge that may happen in any order.

A job has `name`, `map(name of the shard, its path)` -> arrays, and `merge(arrays, arrays)`, which
must be associative and commutative to the bit (whole numbers, tops of rankings): then every
executor gives the same bytes.

  local(jobs)        processes of this machine, the default
  slurm(jobs, ...)   an array of jobs on a SLURM cluster, through submitit
  host(i, n)         this process is the i-th of n that were started alike (hosts of a TPU pod, or
                     any scheduler): each maps its shards, and waits for those of the others
  beam(options)      an Apache Beam pipeline, merge being its CombineFn

The arrays of every shard are a file of their own, which is there whole or not at all; so the same
command goes on where the last one was killed, with whatever executor. A shard that cannot be read
does not stop the others: it is named at the end. All workers must see the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from experiments import files
from experiments.errors import UserError

Arrays = dict[str, np.ndarray]
_STAMP = 'stamp'
_POLL = 0.5  # seconds between looks for what other machines have done


class Job(Protocol):
  """What to do; a frozen dataclass that can be pickled."""

  name: str

  def map(self, name: str, path: Path) -> Arrays:
    """What one shard gives.

    Raises:
      UserError: the shard is damaged.
    """
    ...

  def merge(self, one: Arrays, other: Arrays) -> Arrays:
    """Both together; in any order, to the bit."""
    ...


@dataclasses.dataclass(frozen=True)
class Task:
  """A job on some shards, {name: path}, whose results go to `folder`."""

  job: Job
  shards: Mapping[str, str]
  folder: str

  def part(self, name: str) -> Path:
    """The file of a shard's arrays."""
    return Path(self.folder, f'{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz')

  def run(self, name: str) -> bool:
    """Maps one shard, unless that was done; whether it could be read."""
    if self.done(name):
      return True
    self._failed(name).unlink(missing_ok=True)
    stamp = self._stamp(name)
    try:
      found = self.job.map(name, Path(self.shards[name]))
    except (UserError, OSError) as error:
      files.write_text(self._failed(name), f'{stamp}\n{error}')
      return False
    files.write_arrays(self.part(name), {**found, _STAMP: np.array(stamp)})
    return True

  def done(self, name: str) -> bool:
    """Whether there are arrays of this shard as it is now, by this job."""
    try:
      return str(files.read_arrays(self.part(name), [_STAMP])[_STAMP]) == self._stamp(name)
    except UserError:  # not there, or damaged
      return False

  def arrays(self, name: str) -> Arrays:
    """What `map` gave; of a shard that is done."""
    found = files.read_arrays(self.part(name))
    del found[_STAMP]
    return found

  def problem(self, name: str) -> str:
    """What was wrong with a shard when it was last tried, or ''; a changed one may be mended."""
    with contextlib.suppress(OSError):
      stamp, _, text = self._failed(name).read_text(encoding='utf-8').partition('\n')
      return text if stamp == self._stamp(name) else ''
    return ''

  def _failed(self, name: str) -> Path:
    return self.part(name).with_suffix('.failed')

  @functools.cached_property
  def _job_digest(self) -> str:
    return digest(self.job)

  def _stamp(self, name: str) -> str:
    with contextlib.suppress(OSError):
      stat = Path(self.shards[name]).stat()
      return f'{self._job_digest} {stat.st_size} {stat.st_mtime_ns}'
    return 'missing'


Executor = Callable[[Task, Sequence[str]], Arrays | None]
"""Runs a task on these shards; returns all that is merged, or None: `run` merges."""


def run(job: Job, shards: Mapping[str, Path], folder: Path, executor: Executor) -> Arrays:
  """Maps all shards that are not done, and merges.

  Args:
    job: what to do.
    shards: {name: path}, at least one.
    folder: of this job's files.
    executor: where to do it.

  Raises:
    UserError: some shards could not be read (all others are done by then), or workers died.
  """
  if not shards:
    raise UserError(f'{job.name}: there are no shards')
  folder.mkdir(parents=True, exist_ok=True)
  task = Task(job, {name: str(path.absolute()) for name, path in shards.items()}, str(folder))
  left = [name for name in shards if not task.done(name)]
  merged = executor(task, left)
  if problems := [problem for name in left if (problem := task.problem(name))]:
    rest = len(shards) - len(problems)
    raise UserError(
      f'{job.name}: {len(problems)} of {len(shards)} shards failed, the other {rest} are done: '
      f'{"; ".join(problems[:5])}{"; ..." if len(problems) > 5 else ""}. Mend or remove them; the '
      'same command goes on with what is left'
    )
  return merged if merged is not None else functools.reduce(job.merge, map(task.arrays, shards))


# Executors ----------------------------------------------------------------------------------------


def local(jobs: int = 0) -> Executor:
  """`jobs` processes of this machine at a time; 0: as many as it has cores.

  They stay for the next job, with what they remember.
  """
  jobs = jobs or os.cpu_count() or 1
  pool: ProcessPoolExecutor | None = None

  def execute(task: Task, names: Sequence[str]) -> None:
    nonlocal pool
    with _bar(task, len(names)) as bar:
      if min(jobs, len(names)) < 2:
        for name in names:
          task.run(name)
          bar.update()
        return
      if pool is None:  # not forked: JAX has threads
        pool = ProcessPoolExecutor(jobs, get_context('spawn'), initializer=_ignore_interrupts)
      try:
        # On the host only: an accelerator belongs to one process.
        with _environment(JAX_PLATFORMS='cpu'):
          futures = [pool.submit(task.run, name) for name in names]
          for future in as_completed(futures):
            future.result()
            bar.update()
      except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        pool = None
        if isinstance(error, BrokenProcessPool):
          raise UserError(
            f'{task.job.name}: a worker died, perhaps of too little memory; the same command goes '
            'on with what is left, and --jobs=1 needs least'
          ) from error
        raise

  return execute


def slurm(jobs: int = 0, *, partition: str = '', minutes: int = 60) -> Executor:
  """An array of `jobs` jobs (0: one for each shard, at most 100), each with every jobs-th shard.

  Args:
    jobs: how many.
    partition, minutes: of each.
  """

  def execute(task: Task, names: Sequence[str]) -> None:
    if not names:
      return
    import submitit

    count = min(jobs or 100, len(names))
    try:
      executor = submitit.AutoExecutor(Path(task.folder, 'submitit'), cluster='slurm')
    except RuntimeError as error:
      raise UserError(f'--on=slurm: {error} Run it where sbatch and srun are found') from error
    executor.update_parameters(
      name=task.job.name, timeout_min=minutes, slurm_array_parallelism=count,
      slurm_setup=['export JAX_PLATFORMS=cpu'],
      **({'slurm_partition': partition} if partition else {}),
    )  # fmt: skip
    try:
      started = executor.map_array(
        _run_all, [task] * count, [list(names[i::count]) for i in range(count)]
      )
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
      raise UserError(f'sbatch failed: {error}') from error
    with _bar(task, len(names)) as bar:
      waiting = list(names)
      while not all(job.done() for job in started):
        waiting = _still(bar, task, waiting)
        time.sleep(_POLL)
      _still(bar, task, waiting)
    for job in started:
      if error := job.exception():
        raise UserError(
          f'{task.job.name}: job {job.job_id} failed ({str(error).strip().splitlines()[-1]}); see '
          f'{job.paths.stderr}; the same command goes on with what is left'
        )

  return execute


def host(index: int, count: int, wait: float = float('inf')) -> Executor:
  """The shards index, index + count, ...; then waits until the other hosts have done theirs.

  Args:
    index: of this process, from 0.
    count: of processes, all started with the same arguments otherwise.
    wait: seconds without any news after which the others count as dead.
  """
  if not 0 <= index < count:
    raise UserError(f'--host={index}/{count}: must be i/n with i from 0 to n - 1, as in 0/4')

  def execute(task: Task, names: Sequence[str]) -> None:
    everything = list(task.shards)
    with _bar(task, len(everything)) as bar:
      waiting = everything
      for name in everything[index::count]:
        task.run(name)
        waiting = _still(bar, task, waiting)
      news = time.monotonic()
      while waiting:
        before, waiting = waiting, _still(bar, task, waiting)
        if len(waiting) < len(before):
          news = time.monotonic()
        if waiting and time.monotonic() - news > wait:
          owing = everything.index(waiting[0]) % count
          raise UserError(
            f'{task.job.name}: nothing new for {wait:g} s; host {owing} of {count} owes '
            f'{waiting[0]}: start it again, then this one'
          )
        time.sleep(_POLL if waiting else 0)

  return execute


def beam(options: Sequence[str] = ()) -> Executor:
  """A pipeline; `options` are Beam's, ['--runner=FlinkRunner']. Without any: in this process."""

  def execute(task: Task, names: Sequence[str]) -> Arrays | None:
    try:
      import apache_beam
      from apache_beam.options.pipeline_options import PipelineOptions
      from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    except ImportError as error:
      raise UserError("--on=beam needs Apache Beam: pip install 'jaxrw[beam]'") from error

    class Merge(apache_beam.CombineFn):
      """The job's merge; None is what is merged of nothing."""

      def create_accumulator(self):
        return None

      def add_input(self, so_far, arrays):
        return arrays if so_far is None else task.job.merge(so_far, arrays)

      def merge_accumulators(self, parts):
        present = [part for part in parts if part is not None]
        return functools.reduce(task.job.merge, present) if present else None

      def extract_output(self, merged):
        return merged

    def mapped(name: str) -> list[Arrays]:
      return [task.arrays(name)] if task.run(name) else []

    def kept(merged: Arrays | None) -> None:
      if merged is not None:
        files.write_arrays(out, merged)

    out = Path(task.folder, 'merged.npz')
    out.unlink(missing_ok=True)
    # Its own local runner would fetch a program over the network.
    runner = {} if options else {'runner': FnApiRunner()}
    with apache_beam.Pipeline(options=PipelineOptions(list(options)), **runner) as pipeline:
      _ = (
        pipeline
        | apache_beam.Create(list(task.shards))
        | apache_beam.Reshuffle()
        | apache_beam.FlatMap(mapped)
        | apache_beam.CombineGlobally(Merge())
        | apache_beam.Map(kept)
      )
    return files.read_arrays(out) if out.exists() else None

  return execute


def _run_all(task: Task, names: Sequence[str]) -> None:
  for name in names:
    task.run(name)


def _still(bar: tqdm, task: Task, waiting: Sequence[str]) -> list[str]:
  """Those that are neither done nor failed; the others move the bar."""
  left = [name for name in waiting if not (task.done(name) or task.problem(name))]
  bar.update(len(waiting) - len(left))
  return left


def _bar(task: Task, total: int) -> tqdm:
  return tqdm(total=total, desc=task.job.name, unit=' shards', disable=None)


def _ignore_interrupts() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
  before = {key: os.environ.get(key) for key in variables}
  os.environ.update(variables)
  try:
    yield
  finally:
    for key, value in before.items():
      if value is None:
        del os.environ[key]
      else:
        os.environ[key] = value


def digest(job: Any) -> str:
  """SHA-256 of a job's type and fields."""
  out = hashlib.sha256(type(job).__name__.encode())
  for field in dataclasses.fields(job):
    value = getattr(job, field.name)
    is_array = isinstance(value, np.ndarray)
    out.update(f'\0{field.name}\0'.encode())
    out.update(value.tobytes() if is_array else repr(value).encode())
  return out.hexdigest()[:32]
