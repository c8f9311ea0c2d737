"""How a sweep goes: bars on a terminal, lines elsewhere. Everything shown is read from the runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.metrics import format_seconds
from experiments.sweep.units import Unit

INTERVAL = 30.0  # seconds between lines
SHOWN = 16  # running units shown at a time
TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last lines
ENDED = ('done', 'diverged', 'failed')


class Reading(NamedTuple):
  """The last training step a run has written; zeros and Nones before the first."""

  step: int = 0
  loss: float | None = None
  seconds_left: float | None = None


def read(folder: Path, total_steps: int) -> Reading:
  """How far the run in `folder` is."""
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return Reading()
  with path.open('rb') as file:
    file.seek(max(0, path.stat().st_size - TAIL))
    lines = file.read().split(b'\n')[:-1]  # what follows the last newline is torn
  for line in reversed(lines):
    try:
      row = json.loads(line)
    except ValueError:
      break  # the first one, cut by TAIL
    if row.get('kind') == 'train':
      return Reading(row['step'], row['loss'], _seconds_left(row, total_steps))
  return Reading()


def _seconds_left(row: Mapping[str, Any], total_steps: int) -> float | None:
  rate = row['wall']['tokens_per_s']
  return (total_steps - row['step']) * row['tokens'] / row['step'] / rate if rate else None


class Progress:
  """Says what becomes of the units.

  Args:
    units: all of the sweep.
    metric: the final number that is shown of a finished unit.
    stream: where to print.
  """

  def __init__(self, units: Sequence[Unit], metric: str, stream: Any = None):
    self._units, self._metric = units, metric
    self._stream = sys.stderr if stream is None else stream
    self._before: dict[str, str] = {}
    self._printed_at = time.monotonic()
    self._bars: dict[str, tqdm] | None = {} if self._stream.isatty() else None

  def show(self, states: Mapping[str, str]) -> None:
    """Prints what has changed, and how far those are that run.

    Args:
      states: 'waiting', 'queued', 'running', 'done', 'diverged', 'failed' or 'stopped', by name.
    """
    for unit in self._units:
      state, before = states[unit.name], self._before.get(unit.name)
      if state != before and not (before is None and state == 'waiting'):
        self._say(self._line(unit, state, before))
    self._before = dict(states)
    running = [unit for unit in self._units if states[unit.name] == 'running']
    if self._bars is not None:
      self._draw(running, states)
    elif running and time.monotonic() - self._printed_at >= INTERVAL:
      self._printed_at = time.monotonic()
      for unit in running[:SHOWN]:
        self._say(f'         {unit.name}  {_status(unit)}')
      self._say(_counts(states))

  def _line(self, unit: Unit, state: str, before: str | None) -> str:
    text = f'{state:8} {unit.name}'
    if state == 'done':
      text += f'  {self._metric} {unit.run.value(self._metric):.4f}'
      text += '  (was finished)' * (before is None)
    elif state in ('failed', 'diverged'):
      text += f'  {unit.last_words()}  ({unit.job / "log.txt"})'
    return text

  def _say(self, text: str) -> None:
    tqdm.write(text, file=self._stream) if self._bars else print(
      text, file=self._stream, flush=True
    )

  def _draw(self, running: Sequence[Unit], states: Mapping[str, str]) -> None:
    shown = {unit.name: unit for unit in running[:SHOWN]}
    for name in self._bars.keys() - shown.keys() - {''}:
      self._bars.pop(name).close()
    for name, unit in shown.items():
      bar = self._bar(name, unit.config.total_steps)
      bar.n = read(unit.folder, unit.config.total_steps).step
      bar.set_description_str(f'{name}  {_status(unit)}', refresh=True)
    total = self._bar('', len(self._units))
    total.n = sum(state in ENDED for state in states.values())
    total.set_description_str(_counts(states), refresh=True)

  def _bar(self, name: str, total: int) -> tqdm:
    if name not in self._bars:
      form = '{desc} {bar:20}'
      self._bars[name] = tqdm(total=total, file=self._stream, bar_format=form, leave=False)
    return self._bars[name]

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_) -> None:
    for bar in (self._bars or {}).values():
      bar.close()


def _status(unit: Unit) -> str:
  total = unit.config.total_steps
  reading = read(unit.folder, total)
  parts = [f'step {reading.step}/{total}']
  if reading.loss is not None:
    parts.append(f'loss {reading.loss:.4f}')
  if reading.seconds_left is not None:
    parts.append(f'ETA {format_seconds(reading.seconds_left)}')
  return '  '.join(parts)


def _counts(states: Mapping[str, str]) -> str:
  kinds = ('running', 'queued', 'waiting', *ENDED, 'stopped')
  values = list(states.values())
  return ', '.join(f'{values.count(kind)} {kind}' for kind in kinds if kind in values)
