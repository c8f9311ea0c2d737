"""What runs a unit where submitit has put it: on this machine, or on every task of a cluster's job.

submitit's own handlers would swallow SIGTERM, and kill what they have started when the time is
nearly up; this hands both on as SIGTERM, on which a run saves and ends with status 75.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import submitit

from experiments import files
from experiments.errors import StoppedError

WARNINGS = {signal.SIGUSR1, signal.SIGUSR2}  # the job's time is nearly up
STOPS = {signal.SIGTERM, *WARNINGS}


def run(
  command: Sequence[str],
  folder: str,
  environ: Mapping[str, str | None],
  processors: Sequence[int] = (),
) -> None:
  """Runs `command`; its output goes to `folder`/log.txt, its exit status to `folder`/status.

  A SLURM job whose time is nearly up, or that is preempted, is put back into the queue once the run
  has saved. One that was cancelled is not, nor one that a launcher stops: its folder has a file
  `stop`.

  Args:
    command: what to run.
    folder: of the unit's job. While its file `lock` is locked, the command runs on this machine.
    environ: variables to set or, where None, to unset.
    processors: those that it may use; all of them if empty.
  """
  task, job = submitit.JobEnvironment(), Path(folder)
  job.mkdir(parents=True, exist_ok=True)
  if processors:
    os.sched_setaffinity(0, processors)  # before jax counts them for its threads
  env = {k: v for k, v in {**os.environ, **environ}.items() if v is not None}
  first = task.global_rank == 0
  received: set[int] = set()
  process = None

  def hand_on(number: int, _) -> None:
    received.add(number)
    if process is not None:
      process.send_signal(signal.SIGTERM)

  for number in STOPS:
    signal.signal(number, hand_on)
  with (
    held(job) if first else contextlib.nullcontext() as lock,
    (job / ('log.txt' if first else f'log.{task.global_rank}.txt')).open('ab') as log,
  ):
    if first:
      (job / 'status').unlink(missing_ok=True)
    # SLURM warns all processes of a job, and one that does not listen dies of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    process = subprocess.Popen(
      command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
      pass_fds=[lock.fileno()] if lock else [],
    )  # fmt: skip
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WARNINGS)
    if received:
      process.send_signal(signal.SIGTERM)
    if lock:
      lock.write(str(process.pid))
      lock.flush()
    status = process.wait()
    if status == -signal.SIGTERM and received:  # told before it could listen, so nothing to save
      status = StoppedError.exit_status
    if first:
      files.write_text(job / 'status', str(status))
  stopped = status == StoppedError.exit_status and received and not (job / 'stop').exists()
  if first and stopped and task.cluster == 'slurm':
    asked = subprocess.run(['squeue', '-h', '-o', '%T', '-j', task.job_id], stdout=subprocess.PIPE)
    if received & WARNINGS or asked.stdout.strip() == b'RUNNING':  # and not cancelled
      subprocess.run(['scontrol', 'requeue', task.job_id], check=False)


@contextlib.contextmanager
def held(job: Path) -> Iterator[IO[str]]:
  """The lock of a unit, an empty file to write the process id to. Waits until it is free.

  Whoever inherits the file keeps the lock: a run outlives the process that started it.
  """
  with (job / 'lock').open('a+') as lock:
    with contextlib.suppress(OSError):  # some network file systems cannot lock
      fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    yield lock


def is_held(job: Path) -> bool:
  """Whether the unit runs on this machine."""
  path = job / 'lock'
  if not path.exists():
    return False
  with path.open('a') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    except OSError:
      pass  # a file system that cannot lock
  return False
