"""Small files that are either the old version or the new one, never half of one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
  """A temporary file to write, which becomes `path`, durably, when the block ends without an error.

  A kill or a full disk leaves the old file, and at most a hidden one named `.<name>.*` beside it.

  Raises:
    UserError: the disk is full, or the folder cannot be written.
  """
  path = Path(path)
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    yield Path(temporary)
    with open(temporary, 'rb') as f:
      os.fsync(f.fileno())
    # Temporary files are private; a run directory is usually shared.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
  except OSError as e:
    raise UserError(
      f'cannot write {path}: {e.strerror or e}; free space or choose another folder'
    ) from e
  finally:
    if temporary is not None:
      Path(temporary).unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Replaces `path` by `text` atomically and durably: a kill or a full disk leaves the old file.

  Raises:
    UserError: the disk is full, or the folder cannot be written.
  """
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON, atomically. NaN and infinity become null; see `jsonable`."""
  write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + '\n')


def read_json(path: str | os.PathLike) -> Any:
  """The content of a JSON file.

  Raises:
    UserError: no such file, or not JSON.
  """
  try:
    return json.loads(Path(path).read_text(encoding='utf-8'))
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror}') from e
  except (ValueError, RecursionError) as e:
    raise UserError(f'{path} is not valid JSON ({e}); delete it or restore it from a copy') from e


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
  """Replaces `path` by an archive (npz) of arrays, whose bytes depend on nothing else."""
  import numpy as np

  with replacing(path) as temporary, temporary.open('wb') as out:
    np.savez(out, **arrays)


def read_arrays(path: str | os.PathLike, only: Sequence[str] | None = None) -> dict[str, Any]:
  """Arrays of an archive; all of them, or some.

  Raises:
    UserError: there is none, it is damaged, or lacks one of them.
  """
  import numpy as np

  try:
    with np.load(path, allow_pickle=False) as found:
      return {name: found[name] for name in (found.files if only is None else only)}
  except Exception as e:  # zipfile, zlib and NumPy have a dozen
    raise UserError(f'{path} cannot be read ({e}); delete it or restore it from a copy') from e


def sha256(path: str | os.PathLike) -> str:
  """The SHA-256 of a file, in hex."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def jsonable(value: Any) -> Any:
  """`value` with arrays as lists, array scalars as numbers, and NaN and infinity as None.

  JSON has no NaN, and a file with a bare `NaN` in it cannot be read outside Python.
  """
  if isinstance(value, dict):
    return {str(k): jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v) for v in value]
  if hasattr(value, 'tolist'):  # NumPy and JAX arrays and their scalars
    return jsonable(value.tolist())
  if isinstance(value, float) and (value != value or value in (float('inf'), float('-inf'))):
    return None
  return value


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike) -> Iterator[None]:
  """Holds `folder` for this process; the system lets go when the process ends, however it ends.

  Raises:
    UserError: another process holds it, or it cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      Path(folder).mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(Path(folder, '.lock').open('w'))
    except OSError as e:
      raise UserError(
        f'cannot write into {folder}: {e.strerror}; choose a --workdir that you can write to'
      ) from e
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{folder} is in use by another process: wait until it ends, or choose another --workdir'
      ) from None
    except OSError:
      pass  # some network file systems cannot lock; two writers are then the user's to avoid
    yield
