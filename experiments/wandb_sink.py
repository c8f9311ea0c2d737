"""Weights & Biases as a copy of the metrics that no run depends on."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from experiments import files
from experiments.config_rules import WANDB, is_installed
from experiments.errors import UserError

TIMEOUT = 60.0  # seconds to wait at the end of a run
_PENDING = 10_000  # records that may wait
_SETTINGS = {  # unless the user has chosen others
  'WANDB_SILENT': 'true',  # it asks for no key, which nobody would see beside a progress bar
  'WANDB_CONSOLE': 'off',  # it leaves stdout and stderr alone
  'WANDB_FINISH_TIMEOUT': '30',  # it does not wait forever, also at the end of the process
}


class WandbSink:
  """Sends numbers to Weights & Biases; whatever happens there, the run goes on.

  All calls are made in a thread of its own, so none of them keeps the run waiting. The first
  exception, or a queue that nothing is taken from any more, is reported once and is the end of it.
  A resumed run goes on as the same W&B run: its id is in the run directory, as `wandb.id`.

  Args:
    project: where the run appears.
    workdir: the run directory; W&B's own files, also those of its offline mode, go to `wandb/`.
    timeout: seconds that `close` waits for what is still under way.

  Raises:
    UserError: the package is missing.
  """

  def __init__(self, project: str, workdir: Path, *, timeout: float = TIMEOUT):
    if not is_installed('wandb'):
      raise UserError(f'config.log.wandb={project!r}: must be {WANDB.text}')
    self._timeout, self._off = timeout, False
    self._queue: queue.Queue = queue.Queue(_PENDING)
    self._thread = threading.Thread(target=self._work, args=(project, workdir), daemon=True)
    self._thread.start()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Hands on what belongs to a step; steps ascend."""
    try:
      if not self._off:
        self._queue.put_nowait((step, values))
    except queue.Full:
      self._give_up(f'{_PENDING} records wait')

  def close(self) -> None:
    """Waits until everything has arrived, but not for longer than the timeout."""
    if self._off:
      return
    end = time.monotonic() + self._timeout
    with contextlib.suppress(queue.Full):
      self._queue.put(None, timeout=self._timeout)
    self._thread.join(max(0.0, end - time.monotonic()))
    if self._thread.is_alive():
      self._give_up(f'it did not finish within {self._timeout:g} s')

  def _work(self, project: str, workdir: Path) -> None:
    try:
      for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
      import wandb

      run = wandb.init(
        project=project,
        id=_run_id(workdir / 'wandb.id'),
        resume='allow',
        name=workdir.name,
        dir=str(workdir),
        config=files.read_json(workdir / 'config.json'),
      )
      while (record := self._queue.get()) is not None:
        run.log(record[1], step=record[0])
      run.finish()
    except BaseException as e:  # a library that exits is no reason to stop, either
      self._give_up(f'{type(e).__name__}: {" ".join(str(e).split())}')

  def _give_up(self, reason: str) -> None:
    if not self._off:
      self._off = True
      print(f'note: W&B gets nothing more of this run ({reason})', file=sys.stderr, flush=True)


def _run_id(path: Path) -> str:
  if not path.exists():
    files.write_text(path, secrets.token_hex(4))
  return path.read_text(encoding='utf-8')
