"""Lines of text files, plain or compressed; damage is reported as one line with file and fix."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError


def lines(path: Path) -> Iterator[str]:
  """Lines of a UTF-8 file, plain or compressed."""
  with _explained(path):
    for number, line in enumerate(_byte_lines(path), start=1):
      try:
        yield line.decode('utf-8')
      except UnicodeDecodeError as error:
        fix = f'(0x{line[error.start]:02x}); convert the file, e.g. with iconv -t utf-8'
        raise bad_line(
          path, number, f'not UTF-8 at byte {error.start} of the line {fix}'
        ) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
  """Turns the many ways a damaged file can fail into one line."""
  try:
    yield
  except UserError:
    raise
  except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
    raise UserError(f'{path} cannot be read ({error}); fetch or compress it again') from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
  """(number of the line, what it says) of a file of JSON lines; blank ones are left out.

  Raises:
    UserError: the file is damaged, or a line is not JSON.
  """
  for number, line in enumerate(lines(path), start=1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except json.JSONDecodeError as error:
      raise bad_line(
        path, number, f'not JSON ({error.msg}); each line must be one object'
      ) from error
    yield number, value


def bad_line(path: Path, number: int, message: str) -> UserError:
  """The error for a line; or for the archive, if that is damaged and the line a mere symptom."""
  with _explained(path):
    for _ in _byte_lines(path):
      pass
  return UserError(f'{path}, line {number}: {message}')


def _byte_lines(path: Path) -> Iterator[bytes]:
  if path.suffix == '.gz':
    with gzip.open(path, 'rb') as file:
      yield from file
  elif path.suffix == '.zst':
    rest = b''
    for chunk in _zst_chunks(path):
      *whole, rest = (rest + chunk).split(b'\n')
      yield from (line + b'\n' for line in whole)
    if rest:
      yield rest
  else:
    with path.open('rb') as file:
      yield from file


def _zst_chunks(path: Path) -> Iterator[bytes]:
  """Decompresses frame by frame, because the stream reader takes a truncated frame for the end."""
  import zstandard

  with path.open('rb') as file:
    frame = None
    while data := file.read(1 << 20):
      while data:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
          yield frame.decompress(data)
        except zstandard.ZstdError as error:
          raise OSError(error) from error
        data = frame.unused_data
        if frame.eof:
          frame = None
    if frame is not None:
      raise EOFError('the last zstd frame is cut short')


def digest(path: Path) -> str:
  """SHA-256 of a file's bytes."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
