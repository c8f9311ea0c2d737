"""Where a run comes from: `provenance.json`, written at its start and added to at every resume.

`run` holds what the numbers follow from: every value of the config and who set it, the data, the
tokenizer, the seed. `sessions` has an entry for each time that the command ran: when, with which
code and versions, on what, and how it ended. One that was killed has no `ended`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments import config as config_lib
from experiments import files
from experiments.errors import StoppedError, UserError

FILE = 'provenance.json'
RECORDS = ('config.json', 'result.json', 'metrics.jsonl', 'examples.jsonl', 'mixture.json')
# What differs between two sessions that computed the same.
_TIMES = ('session.started', 'session.ended.seconds', 'session.ended.files')
_ENVIRONMENT = ('JAX_', 'XLA_', 'LIBTPU_', 'NCCL_')  # variables that may change numbers


class Session:
  """One process time of a run, as a context: entered, it is on record; left, so is how it ended.

  Args:
    run: an `experiments.train.Run`.
    workdir: the run directory.
    versions: of what computes the numbers.
    origin: (keys set on the command line, name of the config file); None if a program made the
      config.
    primary: other processes pass False and write nothing.
  """

  def __init__(
    self,
    run: Any,
    workdir: str | os.PathLike,
    versions: Mapping[str, str],
    origin: tuple[Mapping[str, Any], str] | None = None,
    primary: bool = True,
  ):
    self._workdir, self._primary = Path(workdir), primary
    if not primary:
      return
    path = self._workdir / FILE
    before = files.read_json(path) if path.is_file() else {'sessions': []}
    described = _describe_run(run, origin)
    self._session = _describe_session(run, versions)
    self._session['changed'] = _changed(before, described)
    self.record = {'run': described, 'sessions': [*before['sessions'], self._session]}
    self._started = time.monotonic()

  def __enter__(self) -> Session:
    self._write()
    return self

  def resumed(self, step: int) -> None:
    """Says which step this session goes on from; 0 for the beginning."""
    if self._primary:
      self._session['resumed_after'] = step
      self._write()

  def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
    if not (self._primary and (self._workdir / FILE).exists()):  # a run directory may vanish
      return
    self._session['ended'] = {
      **_ending(error),
      'seconds': time.monotonic() - self._started,
      'files': {} if error else digests(self._workdir),
    }
    try:
      self._write()
    except UserError:
      if error is None:  # else that one is the one to see
        raise

  def _write(self) -> None:
    if self._primary:
      files.write_json(self._workdir / FILE, self.record)


def read(workdir: str | os.PathLike) -> dict[str, Any]:
  """The record of a run.

  Raises:
    UserError: it has none, or it is not JSON.
  """
  return files.read_json(Path(workdir) / FILE)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """{field: (in a, in b)} of two records and their last sessions, but for clock readings."""
  one, other = ({'run': r['run'], 'session': r['sessions'][-1]} for r in (a, b))
  changes = config_lib.diff(one, other)
  return {k: v for k, v in changes.items() if not k.startswith(_TIMES)}


def digests(workdir: Path) -> dict[str, str]:
  """SHA-256 of each file that a finished run is judged by."""
  paths = [workdir / name for name in RECORDS] + sorted(workdir.glob('ledger/part-*'))
  return {p.relative_to(workdir).as_posix(): files.sha256(p) for p in paths if p.is_file()}


def _describe_run(run: Any, origin: tuple[Mapping[str, Any], str] | None) -> dict[str, Any]:
  overrides, file = origin or ({}, 'program')
  origins = config_lib.origins(run.config, overrides, file)
  corpus = run.corpus
  return files.jsonable(
    {
      'config_hash': config_lib.config_hash(run.config),
      'config': {
        key: {'value': value, 'origin': origins[key]}
        for key, value in config_lib.flatten(run.config).items()
      },
      'seed': run.config.seed,
      'data': {
        'fingerprint': corpus.fingerprint,
        'domains': corpus.domains,
        'sizes': corpus.sizes('train'),
      },
      'tokenizer': {key: corpus.meta['tokenizer'][key] for key in ('name', 'sha256')},
    }
  )


def _describe_session(run: Any, versions: Mapping[str, str]) -> dict[str, Any]:
  devices = run.mesh.devices
  return {
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': list(sys.argv),
    'versions': dict(versions),
    'git': git_state(),
    'platform': platform.platform(),
    'environment': {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
    'processes': jax.process_count(),
    'devices': f'{devices.size} x {devices.flat[0].device_kind}',
    'mesh': dict(run.mesh.shape),
  }


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
  """{key: [before, now]} of the config; only harmless keys may change."""
  if 'run' not in before:
    return {}
  values = lambda run: {key: entry['value'] for key, entry in run['config'].items()}
  changes = config_lib.diff(values(before['run']), values(now))
  return {key: list(change) for key, change in changes.items()}


def _ending(error: BaseException | None) -> dict[str, Any]:
  if error is None:
    return {'status': 'done'}
  status = 'stopped' if isinstance(error, StoppedError) else 'aborted'
  found = {'status': status, 'error': type(error).__name__, 'message': config_lib.one_line(error)}
  if hasattr(error, 'exit_status'):
    found['exit_status'] = error.exit_status
  return found


@functools.cache
def git_state(folder: Path = Path(__file__).parent) -> dict[str, Any] | None:
  """{commit, dirty, diff: hash of what is not committed of tracked files} of the code that runs.

  None where the code is no git checkout, as when it was installed.
  """
  try:
    _git(folder, 'ls-files', '--error-unmatch', '.')  # not merely a folder inside another project
    diff = _git(folder, 'diff', 'HEAD', '--binary')
    return {
      'commit': _git(folder, 'rev-parse', 'HEAD').decode().strip(),
      'dirty': bool(diff),
      'diff': hashlib.sha256(diff).hexdigest() if diff else '',
    }
  except (OSError, subprocess.SubprocessError):
    return None


def _git(folder: Path, *arguments: str) -> bytes:
  return subprocess.run(
    ['git', '-C', str(folder), '--no-optional-locks', *arguments],
    capture_output=True,
    check=True,
    timeout=30,
  ).stdout
