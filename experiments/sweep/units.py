"""The units of a sweep: what each changes, its name, its command. A unit is one run directory.

`WORKDIR/base/config.json` holds what all units share, `WORKDIR/units/<name>/` the run and its
`overrides.json`, `WORKDIR/jobs/<name>/` how it went: log.txt, the exit status, a lock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import common
from experiments import config as config_lib
from experiments import files
from experiments.board import Run
from experiments.compare import arm_name, arm_spec
from experiments.errors import UserError

EXAMPLE = "--sweep='arm=uniform,linupper:1.0 optim.lr=1e-3,3e-3 seed=0,1'"


@dataclasses.dataclass(frozen=True)
class Unit:
  """One run of a sweep.

  Attributes:
    overrides: flat keys of the config, and perhaps 'arm', with their values.
    name: readable, with a hash of the overrides.
    config: what it trains.
    sweep: the directory of the sweep.
  """

  overrides: dict[str, Any]
  name: str
  config: ConfigDict
  sweep: Path

  @property
  def folder(self) -> Path:
    """The run directory."""
    return self.sweep / 'units' / self.name

  @property
  def job(self) -> Path:
    """Where its log, its exit status and its lock are."""
    return self.sweep / 'jobs' / self.name

  @property
  def run(self) -> Run:
    return Run(self.folder)

  @property
  def status(self) -> int | None:
    """The exit status of its last attempt; None while that goes on, or if it was killed."""
    path = self.job / 'status'
    return int(path.read_text()) if path.exists() else None

  def last_words(self) -> str:
    """The last line of its log, after what killed it if that was a signal."""
    path, status = self.job / 'log.txt', self.status
    lines = path.read_text(errors='replace').split('\n') if path.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), 'no log')
    if status is None:
      return f'killed; {last}'
    return f'killed by {signal.Signals(-status).name}; {last}' if status < 0 else last


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Units of one config file; `make_sweep` checks them.

  Attributes:
    spec: the value of --config.
    shared: what the command line changes in all units, by flat key.
    config: the config with `shared`.
  """

  spec: str
  shared: dict[str, Any]
  config: ConfigDict
  units: tuple[Unit, ...]
  folder: Path

  def command(self, unit: Unit, *more: str, python: str = sys.executable) -> list[str]:
    """The command line that trains, or resumes, this unit."""
    changes = {**self.shared, **unit.overrides}
    arm = changes.pop('arm', None)
    return [
      *(python, '-m', 'experiments.main', f'--config={self.spec}'),
      *(f'--config.{key}={value}' for key, value in changes.items()),
      *([] if arm is None else [f'--arm={arm_spec(arm)}']),
      f'--workdir={unit.folder}',
      *more,
    ]

  def write(self) -> None:
    """Makes the directory of the sweep.

    Raises:
      UserError: it holds a sweep of another config.
    """
    base = self.folder / 'base'
    config_lib.check_same_run(base, self.config)
    config_lib.write(base, self.config)
    for unit in self.units:
      files.write_json(unit.folder / 'overrides.json', unit.overrides)


def parse(text: str) -> list[common.Unit]:
  """The grid that --sweep names: 'key=value,value key=value,value', with quotes as in a shell.

  Raises:
    UserError: it does not parse.
  """
  axes: dict[str, list[str]] = {}
  try:
    items = shlex.split(text)
  except ValueError as e:
    raise UserError(f'--sweep={text!r}: {e}; write {EXAMPLE}') from e
  for item in items:
    key, _, values = item.partition('=')
    axis = values.split(',')
    if not key or not all(axis) or key in axes:
      raise UserError(f'--sweep: {item!r} is not a new <key>=<value>,<value>; write {EXAMPLE}')
    axes[key] = axis
  return list(common.grid(axes)) if axes else []


def make_sweep(
  spec: str,
  shared: Mapping[str, Any],
  config: ConfigDict,
  units: Sequence[common.Unit],
  folder: str | Path,
) -> Sweep:
  """Checks every unit, before anything of any is started.

  Args:
    spec: the value of --config.
    shared: what the command line changes in all units, by flat key.
    config: the config with those changes.
    units: flat keys to values; text is read as the type of the key, a tuple as 'web+code'.
    folder: the directory of the sweep.

  Raises:
    UserError: no units, an unknown key, a wrong value, a unit that is there twice.
  """
  if not units:
    raise UserError(f'nothing to sweep: write {EXAMPLE}, or a sweep(add) in {spec}')
  made: list[Unit] = []
  seen: dict[str, dict] = {}
  for unit in units:
    mine = config_lib.from_json(config_lib.to_json(config))
    try:
      overrides = _apply(mine, unit)
      config_lib.check(mine)
      check_methods(mine)
    except (UserError, common.ConfigError) as e:
      raise UserError(f'unit {show(unit)}: {e}') from e
    same = seen.setdefault(config_lib.to_json(mine), overrides)
    if same is not overrides:
      raise UserError(f'units {show(same)} and {show(overrides)} are the same run; drop one')
    made.append(Unit(overrides, unit_name(overrides), mine, Path(folder)))
  return Sweep(spec, dict(shared), config, tuple(made), Path(folder))


def _apply(config: ConfigDict, unit: common.Unit) -> dict[str, Any]:
  """Changes `config` as the program will; returns the unit with its values as they are stored."""
  known = {**config_lib.flatten(config), 'arm': ''}
  if wrong := [key for key in unit if key not in known]:
    raise UserError(config_lib.unknown_key(wrong[0], known))
  overrides = {key: _typed(key, value, known[key]) for key, value in unit.items()}
  config.update_from_flattened_dict({k: v for k, v in overrides.items() if k != 'arm'})
  if 'arm' in overrides:  # last, as in experiments.main
    common.set_arm(config, arm_spec(overrides['arm']))
  return overrides


def _typed(key: str, value: Any, default: Any) -> Any:
  kind = type(default)
  try:
    if isinstance(value, str) and kind is not str:
      return tuple(value.split('+')) if kind is tuple else common.parse_value(key, value, kind)
    fits = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
    if isinstance(value, fits) and (kind is bool or not isinstance(value, bool)):
      return kind(value)
  except common.ConfigError:
    pass
  raise UserError(config_lib.wrong_type(key, value, default))


def check_methods(config: ConfigDict) -> None:
  """Builds the weighting and looks up the mixture, so that a wrong name fails at once.

  Raises:
    UserError: no such method, or one that does not take its arguments.
  """
  from experiments import mixing, signals

  if config.mixture.fn:
    mixing.check_method(config.mixture.fn, config.mixture.args.to_dict())
  signals.make_weighting(config)
  signals.make_keep(config)


def unit_name(overrides: Mapping[str, Any]) -> str:
  """'uniform__lr0.001__seed0__1a2b3c4d'."""
  digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
  parts = [
    arm_name(value) if key == 'arm' else f'{key.rpartition(".")[2]}{shown(value)}'
    for key, value in overrides.items()
  ]
  parts.sort(key=lambda part: part.startswith('seed'))
  return '__'.join([re.sub('[^A-Za-z0-9._]+', '-', '__'.join(parts))[:80], digest])


def shown(value: Any) -> str:
  """A value in names and tables."""
  if isinstance(value, tuple):
    return '+'.join(map(str, value))
  return f'{value:g}' if isinstance(value, float) else str(value)


def show(unit: common.Unit) -> str:
  """A unit in the words of --sweep."""
  return ' '.join(f'{key}={shown(value)}' for key, value in unit.items())
