"""Checkpoints that are whole or absent: saved in the background, checked byte by byte when opened.

Orbax writes into a temporary folder and renames it, so a killed save leaves no checkpoint. But it
reads a file with a flipped bit without complaint (a test shows it), so a committed checkpoint is
sealed with the SHA-256 of each of its files; opening a run sets aside what no longer matches and
goes on from the checkpoint before.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from experiments import files, hosts
from experiments.errors import UserError

SEAL = 'sha256.json'
_NEVER = 2**31  # seconds
_SMALL = 2**16  # bytes; what describes a checkpoint is smaller, and Orbax reads it of all of them

# What Orbax logs it also raises, and what it raises is reported here, once.
logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)


class Checkpoints:
  """The checkpoints of one run, `directory/<step>/`.

  Opening one removes what a killed save left behind and renames damaged checkpoints to
  `<step>.damaged`, saying so. Every process of a distributed run makes the same calls, on a
  directory that all of them share.

  Args:
    directory: created when missing.
    keep: how many of the newest checkpoints stay.
    keep_every: checkpoints at multiples of this step stay as well; 0: none.
    best: a metric; the checkpoint with the lowest stays, of equal ones the newest. '': none.
  """

  def __init__(
    self, directory: str | os.PathLike, *, keep: int = 2, keep_every: int = 0, best: str = ''
  ):
    self.directory = Path(directory).absolute()
    with _write_errors(self.directory):
      if jax.process_index() == 0:
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove_half_written(self.directory)
        _set_damaged_aside(self.directory)
      hosts.barrier('the checkpoints are open')
      self._orbax = ocp.training.Checkpointer(
        self.directory,
        preservation_policy=_stays(keep, keep_every, best),
        # Orbax goes by the system's clock; one that is set during a save looks like a timeout.
        context=ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=_NEVER)),
      )
    self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix='seal')
    self._pending: Future | None = None

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """The step of the newest good checkpoint, or None. A save in progress does not count."""
    newest = max(committed_steps(self.directory), default=-1)
    if jax.process_count() > 1:  # a network file system may show another its older listing
      newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    return newest if newest >= 0 else None

  def save(
    self,
    step: int,
    state: Any,
    data_state: dict,
    metadata: dict,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts to save and returns once `state` may be donated; waits for the save before it, if any.

    Args:
      step: the optimizer step; a step that is already saved is left as it is.
      state: a pytree whose leaves are all `jax.Array`.
      data_state: JSON, the position of the data iterator; identical on every process.
      metadata: JSON, whatever should travel along; identical on every process.
      metrics: the evaluation of `state`, if there was one; its finite floats can be the `best`.

    Raises:
      UserError: this save, or the one before, could not be written. Earlier checkpoints are intact.
    """
    self.wait()
    if not self.directory.is_dir():
      raise UserError(
        f'{self.directory} has vanished while the run was going on: put it back, or choose another '
        '--workdir, then run the same command again'
      )
    if step in committed_steps(self.directory):
      return
    finite = lambda value: isinstance(value, float) and math.isfinite(value)
    metrics = {name: value for name, value in (metrics or {}).items() if finite(value)}
    with _write_errors(self.directory):
      response = self._orbax.save_checkpointables_async(
        step,
        {'state': state},
        force=True,
        metrics=metrics or None,
        custom_metadata={'data_state': data_state, 'metadata': metadata, 'metrics': metrics},
      )
    self._pending = self._worker.submit(self._finish, response, step)

  def _finish(self, response: ocp.AsyncResponse, step: int) -> None:
    response.result()
    if jax.process_index() == 0:
      seal(self.directory / str(step))

  def wait(self) -> None:
    """Returns when nothing is being saved.

    Raises:
      UserError: the last save could not be written. Earlier checkpoints are intact.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      with _write_errors(self.directory):
        self._orbax.wait()  # Orbax raises once in each thread: hear of it here, and not in close()
        pending.result()

  def close(self) -> None:
    """Waits and releases; the object is of no use afterwards. Raises what `wait` raises."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._orbax.close()

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict, dict]:
    """Reads a checkpoint.

    Args:
      abstract_state: a pytree of `jax.ShapeDtypeStruct` with shardings, in the structure that was
        saved; the mesh may be another one.
      step: which; None means the newest that can be read.

    Returns:
      (state, data_state, metadata), the arrays bit for bit as saved.

    Raises:
      UserError: no such checkpoint, or one of another model or optimizer.
    """
    self.wait()
    while True:
      chosen = self.latest_step() if step is None else step
      if chosen is None:
        raise UserError(f'{self.directory} has no checkpoint that can be read; start a new run')
      path = self.directory / str(chosen)
      try:
        state, custom = _load(path, abstract_state)
        return state, custom['data_state'], custom['metadata']
      except UserError:
        raise
      except Exception as e:
        # An intact checkpoint that does not load is no damage (out of memory, a bug): show it. One
        # that was committed but not yet sealed when its process died may be either.
        if step is not None or (path / SEAL).exists() or jax.process_count() > 1:
          raise
        _set_aside(path, f'{type(e).__name__} while reading it', ', using the one before')
        self._orbax.reload()


def _stays(keep: int, keep_every: int, best: str) -> Any:
  """Which checkpoints stay: judged by their steps and metrics alone, so never by a clock."""
  policies = ocp.training.preservation_policies
  chosen = [policies.LatestN(keep)]
  if keep_every:
    chosen.append(policies.EveryNSteps(keep_every))
  if best:
    chosen.append(
      policies.BestN(
        get_metric_fn=lambda metrics: -metrics.get(best, math.inf),
        n=1,
        keep_checkpoints_without_metrics=False,
      )
    )
  return policies.AnyPreservationPolicy(chosen)


def restore_params(
  path: str | os.PathLike, abstract_params: Any, *, field: str = 'params', which: str = ''
) -> Any:
  """Reads the parameters of one good checkpoint, and nothing else.

  Args:
    path: a run directory, or its `checkpoints`.
    abstract_params: a pytree of `jax.ShapeDtypeStruct`; leaves without a sharding go to the first
      device.
    field: the field of the saved state to read.
    which: '': the newest; '200': of that step; 'macro_bpb': the one where that metric is lowest.

  Raises:
    UserError: there is no such checkpoint, or it holds other parameters.
  """
  path = Path(path).absolute()
  directory = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
  for step in _candidates(directory, which):
    if reason := damage(directory / str(step)):
      _say(f'checkpoint {directory / str(step)} is damaged ({reason}); trying the one before')
      continue
    return _load(directory / str(step), {field: abstract_params}, partial=True)[0][field]
  there = ', '.join(map(str, committed_steps(directory)))
  if which and there:
    raise UserError(
      f'{directory} has no checkpoint {which!r} that can be read; there is one of each step {there}'
    )
  raise UserError(
    f'{path} holds no checkpoint that can be read; give the directory of a finished run'
  )


def resolve_step(config: Any, step: str) -> str:
  """What --step means for the run of `config`: '', a step, or 'best', which is the run's metric.

  Raises:
    UserError: none of these, or the run kept no best checkpoint.
  """
  if step != 'best':
    if step and not step.isdecimal():
      raise UserError(f"--step={step}: must be a step such as 200, or 'best'; empty: the newest")
    return step
  if not config.checkpoint.best:
    raise UserError(
      "--step=best: the run has config.checkpoint.best='', so it kept no best checkpoint; "
      'leave --step out for the newest'
    )
  return config.checkpoint.best


def _candidates(directory: Path, which: str) -> list[int]:
  """The steps that fit `which`, see `restore_params`, in the order to try them."""
  steps = committed_steps(directory)[::-1]
  if not which:
    return steps
  if which.isdecimal():
    return [step for step in steps if step == int(which)]
  metrics = {step: _metrics(directory / str(step)) for step in steps}
  return sorted(
    (step for step in steps if which in metrics[step]), key=lambda step: metrics[step][which]
  )


def _metrics(path: Path) -> dict[str, float]:
  if reason := damage(path, _SMALL):
    _say(f'checkpoint {path} is damaged ({reason}); left out')
    return {}
  return ocp.checkpointables_metadata(path).custom_metadata.get('metrics', {})


# Reading


def _load(path: Path, abstract: Any, *, partial: bool = False) -> tuple[Any, dict]:
  """(the arrays that `abstract` asks for, the JSON beside them)."""
  if not path.is_dir():
    raise UserError(f'there is no checkpoint {path}')
  found = ocp.checkpointables_metadata(path)
  _check_same_tree(path, abstract, found.metadata['state'], partial)
  context = ocp.Context()
  context.pytree.loading.partial_load = partial
  with context:
    loaded = ocp.load_checkpointables(path, {'state': jax.tree.map(_placed, abstract)})
  return loaded['state'], found.custom_metadata


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same_tree(path: Path, abstract: Any, saved: Any, partial: bool) -> None:
  """Orbax casts and pads without a word, and its error for another tree fills a screen."""
  wanted, saved = _leaves(abstract), _leaves(saved)
  if not saved:
    raise ValueError('it lists no arrays')
  for name in sorted(wanted.keys() | (set() if partial else saved.keys())):
    if wanted.get(name) != saved.get(name):
      raise UserError(
        f'checkpoint {path} is of another model or optimizer: {name} is '
        f'{saved.get(name, "absent")} there and {wanted.get(name, "absent")} here; '
        'use the config it was saved with'
      )


def _leaves(tree: Any) -> dict[str, str]:
  """{'params/wte': 'float32[257,96]', ...}; named tuples and dicts look the same."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(keys, simple=True, separator='/'): (
      f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'
    )
    for keys, leaf in flat
  }


# Seals


def seal(path: Path) -> None:
  """Writes the SHA-256 of every file of a committed checkpoint into it."""
  files.write_json(path / SEAL, _digests(path))


def damage(path: Path, largest: float = math.inf) -> str:
  """What is wrong with a checkpoint in a few words, or ''.

  One without a seal, whose process was killed before it, must at least list its arrays.

  Args:
    path: the folder of the checkpoint.
    largest: files of more bytes are not read.
  """
  try:
    if not (path / SEAL).exists():
      found = ocp.checkpointables_metadata(path)
      described = _leaves(found.metadata['state']) and found.custom_metadata
      return '' if described else 'it does not say what it holds'
    sealed = files.read_json(path / SEAL)
    found = _digests(path, largest)
  except Exception as e:  # Orbax raises whatever parsing a broken file does
    return str(e).partition('\n')[0] or type(e).__name__
  for name in sorted(sealed.keys() | found.keys()):
    if found.get(name, '') not in (sealed.get(name), 'unread'):
      return f'{name} is {"changed" if name in found else "missing"}'
  return ''


def _digests(path: Path, largest: float = math.inf) -> dict[str, str]:
  digests = {}
  for file in sorted(p for p in path.rglob('*') if p.is_file() and p.name != SEAL):
    name = file.relative_to(path).as_posix()
    digests[name] = 'unread' if file.stat().st_size > largest else files.sha256(file)
  return digests


# The directory


def committed_steps(directory: Path) -> list[int]:
  """The steps whose folders were renamed into place, ascending; damaged ones included."""
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit())


def _remove_half_written(directory: Path) -> None:
  for path in directory.glob('*.orbax-checkpoint-tmp*'):
    shutil.rmtree(path, ignore_errors=True)


def _set_damaged_aside(directory: Path) -> None:
  """Renames the newest checkpoints until one is good; of older ones only small files are read."""
  for path in directory.glob('*'):
    if path.name.isdigit() and not path.is_dir():
      _set_aside(path, 'it is not a folder')
  found_good = False
  for step in reversed(committed_steps(directory)):
    path = directory / str(step)
    if reason := damage(path, _SMALL if found_good else math.inf):
      _set_aside(path, reason, '' if found_good else ', using the one before')
    else:
      found_good = True


def _set_aside(path: Path, reason: str, then: str = '') -> None:
  aside = path.with_name(f'{path.name}.damaged')
  if aside.is_dir():
    shutil.rmtree(aside, ignore_errors=True)
  path.rename(aside)
  _say(f'checkpoint {path} is damaged ({reason}): renamed to {aside.name}{then}')


def _say(message: str) -> None:
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
  """Turns what the file system refuses into a UserError; TensorStore reports it as a ValueError."""
  try:
    yield
  except (OSError, ValueError) as e:
    reason = re.search(r': ([^:\[]*) \[os_error_code=', str(e))
    if not (reason or isinstance(e, OSError)):
      raise
    if jax.process_index() == 0:
      _remove_half_written(directory)
    raise UserError(
      f'cannot save a checkpoint in {directory}: {reason[1] if reason else e.strerror or e}; free '
      'space or choose another --workdir, then run the same command again: earlier checkpoints are '
      'intact'
    ) from e
