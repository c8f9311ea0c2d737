"""The record of a run: JSON lines that survive a kill, TensorBoard and W&B, a progress bar.

`metrics.jsonl` is the truth; everything else can be rebuilt from it. Only the primary process
writes.
No jax here: values may be NumPy or JAX arrays all the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import files
from experiments.errors import UserError
from experiments.wandb_sink import WandbSink


class JsonlFile:
  """A file with one JSON object a line, each with a `step`; appended to, cut back on resume.

  Every line reaches the operating system before `write` returns, so a kill loses at most the line
  that was being written. NaN and infinity are stored as null.

  Args:
    path: the file; its folder is created when missing.
    resume_step: lines of later steps are dropped, as is a torn last line; None starts afresh.
  """

  def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
    self.path = Path(path)
    _cut_back(self.path, -1 if resume_step is None else resume_step)
    self._file = self.path.open('ab', buffering=0)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one line.

    Raises:
      UserError: the disk is full.
    """
    line = json.dumps(files.jsonable(record), allow_nan=False) + '\n'
    try:
      self._file.write(line.encode())
    except OSError as e:
      raise UserError(f'cannot write {self.path}: {e.strerror}; free space and run again') from e

  def close(self) -> None:
    self._file.close()


def read_jsonl(path: str | os.PathLike) -> list[dict]:
  """All lines of a file that `JsonlFile` wrote; a last line torn by a kill is left out.

  Raises:
    UserError: no such file, or a broken line in the middle.
  """
  try:
    lines = Path(path).read_bytes().split(b'\n')
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror}') from e
  records = []
  for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn, or empty
    try:
      record = json.loads(line)
      if not isinstance(record, dict) or not isinstance(record.get('step'), int):
        raise ValueError('no step')
    except (ValueError, RecursionError) as e:
      if number == len(lines) - 1:
        break
      raise UserError(
        f'{path}, line {number} is not JSON with a step; delete that line and run again'
      ) from e
    records.append(record)
  return records


def _cut_back(path: Path, last_step: int) -> None:
  records = read_jsonl(path) if path.exists() and last_step >= 0 else []
  kept = [json.dumps(r) + '\n' for r in records if r['step'] <= last_step]
  files.write_text(path, ''.join(kept))


class MetricWriter:
  """Writes a run's `metrics.jsonl` and, if asked to, sends its scalars to TensorBoard and W&B.

  To be exact on resume, write the lines of a step before saving the checkpoint of that step.

  Args:
    workdir: the run directory.
    resume_step: the step of the restored checkpoint; later lines go. None starts a new record.
    tensorboard: whether to write TensorBoard events, under `tensorboard/`.
    wandb: a project of Weights & Biases, or ''.
    primary: other processes pass False and write nothing.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_step: int | None = None,
    tensorboard: bool = True,
    wandb: str = '',
    primary: bool = True,
  ):
    self._lines = self._events = self._wandb = None
    if not primary:
      return
    self._lines = JsonlFile(Path(workdir) / 'metrics.jsonl', resume_step=resume_step)
    if tensorboard:
      self._events = _event_writer(Path(workdir) / 'tensorboard', resume_step)
    if wandb:
      self._wandb = WandbSink(wandb, Path(workdir))

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends {'kind': kind, 'step': step, **values}; wall-clock values belong under 'wall'."""
    if self._lines is None:
      return
    record = files.jsonable({'kind': kind, 'step': step, **values})
    self._lines.write(record)
    if self._events is not None:
      for name, value in scalars(values):
        self._events.add_scalar(f'{kind}/{name}', value, step)
    if self._wandb is not None:
      self._wandb.write(step, {f'{kind}/{name}': value for name, value in scalars(values)})

  def close(self) -> None:
    for sink in (self._lines, self._events, self._wandb):
      if sink is not None:
        sink.close()


def _event_writer(folder: Path, resume_step: int | None):
  try:
    from tensorboardX import SummaryWriter
  except ImportError as e:
    raise UserError(
      'config.log.tensorboard=True needs tensorboardX: pip install tensorboardX, or set it to False'
    ) from e
  # TensorBoard hides what earlier event files hold from `purge_step` on.
  return SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)


def scalars(values: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, float]]:
  """('domain/web/loss', 1.5), ... for every finite number in nested `values`, and nothing else."""
  for name, value in files.jsonable(values).items():
    if isinstance(value, dict):
      yield from scalars(value, f'{prefix}{name}/')
    elif isinstance(value, (int, float)):
      yield f'{prefix}{name}', float(value)


# Progress


class Progress:
  """How far, how fast, how long still: a bar on a terminal, now and then a line elsewhere.

  The clock starts at the first `update`, when the step has been compiled, and stands still inside
  `paused()`; so the rate is that of training alone.

  Args:
    total: steps of the whole run.
    initial: steps that were done before this process started.
    tokens_per_step: over all devices.
    flops_per_token: useful FLOPs of a training step, for MFU; None leaves MFU out.
    peak: FLOP/s of all devices together; None leaves MFU out.
    enabled: False prints nothing and still measures.
    stream: where to print.
    interval: seconds between lines when `stream` is not a terminal.
    clock: seconds, monotonic.
  """

  def __init__(
    self,
    total: int,
    initial: int = 0,
    *,
    tokens_per_step: int,
    flops_per_token: float | None = None,
    peak: float | None = None,
    enabled: bool = True,
    stream: Any = None,
    interval: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.total, self.step = total, initial
    self._tokens_per_step = tokens_per_step
    self._flops_per_token, self._peak = flops_per_token, peak
    self._stream = sys.stderr if stream is None else stream
    self._interval, self._clock = interval, clock
    self._start: tuple[int, float] | None = None  # (step, time) of the first update
    self._paused = 0.0
    self._printed_at = -float('inf')
    self._unprinted = ''
    self._enabled = enabled
    self._bar = self._make_bar() if enabled and self._stream.isatty() else None

  def _make_bar(self):
    from tqdm import tqdm

    form = '{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}'
    return tqdm(total=self.total, initial=self.step, file=self._stream, bar_format=form)

  def update(self, step: int, loss: float) -> None:
    """Says that `step` steps are done, the last with this loss, which has arrived on the host."""
    now = self._clock()
    if self._start is None:
      self._start = (step, now)
      self._paused = 0.0
    self.step = step
    if self._bar is not None:
      self._bar.set_postfix_str(self._status(loss), refresh=False)
      self._bar.update(step - self._bar.n)
    elif self._enabled:
      self._unprinted = f'step {step}/{self.total}  {self._status(loss)}'
      if now - self._printed_at >= self._interval:
        self._print_line()

  def _print_line(self) -> None:
    print(self._unprinted, file=self._stream, flush=True)
    self._unprinted, self._printed_at = '', self._clock()

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    elif self._enabled:
      print(text, file=self._stream, flush=True)

  @contextmanager
  def paused(self) -> Iterator[None]:
    """What happens inside (evaluation, a compilation) does not count as training time."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  @property
  def seconds(self) -> float:
    """Training time since the first update, pauses left out."""
    return 0.0 if self._start is None else self._clock() - self._start[1] - self._paused

  @property
  def tokens_per_second(self) -> float | None:
    """Over all devices, since the first update; None before the second."""
    if self._start is None or self.step == self._start[0] or self.seconds <= 0:
      return None
    return (self.step - self._start[0]) * self._tokens_per_step / self.seconds

  @property
  def mfu(self) -> float | None:
    """Useful FLOP/s as a fraction of the chips' bfloat16 peak; None where either is unknown."""
    rate = self.tokens_per_second
    if rate is None or self._flops_per_token is None or self._peak is None:
      return None
    return rate * self._flops_per_token / self._peak

  def _status(self, loss: float) -> str:
    parts = [f'loss {loss:.4f}']
    rate = self.tokens_per_second
    if rate is not None:
      parts.append(f'{rate:,.0f} tokens/s')
      if self.mfu is not None:
        parts.append(f'MFU {self.mfu:.1%}')
      left = (self.total - self.step) * self._tokens_per_step / rate
      parts.append(f'ETA {format_seconds(left)}')
    return '  '.join(parts)

  def close(self) -> None:
    """Prints the last state if it has not been."""
    if self._bar is not None:
      self._bar.close()
    elif self._unprinted:
      self._print_line()


def format_seconds(seconds: float) -> str:
  """'42s', '3m05s', '2h07m'."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02d}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
