"""Lines of text files, plain or compressed; damage is reported as one line with file and fix."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError

MAX_LINE = 2**28  # bytes; a small archive can hold a line that no memory does
MAX_TEXT = 2**31  # characters of a plain text, which is held as a whole
_ZST_PART = 2**12  # compressed bytes at a time; they can stand for 32,768 times as many


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


def whole(path: Path) -> str:
  """The text of a file.

  Raises:
    UserError: it cannot be read, or is longer than `MAX_TEXT`.
  """
  parts, size = [], 0
  for line in lines(path):
    parts.append(line)
    size += len(line)
    if size > MAX_TEXT:
      raise UserError(f'{path}: longer than {MAX_TEXT:,} characters; divide it, or use .jsonl')
  return ''.join(parts)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
  """Turns the many ways a damaged file can fail into one line."""
  try:
    yield
  except UserError:
    raise
  except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
    raise UserError(f'{path} cannot be read ({error}); fetch or compress it again') from error


def parse_json(line: str, path: Path, number: int) -> Any:
  """What a line of JSON says.

  Raises:
    UserError: it is not JSON.
  """
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:  # besides syntax: too many digits, too deep
    reason = getattr(error, 'msg', error)
    raise bad_line(path, number, f'not JSON ({reason}); each line must be one object') from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
  """(number of the line, what it says) of a file of JSON lines; blank ones are left out.

  Raises:
    UserError: the file is damaged, or a line is not JSON.
  """
  for number, line in enumerate(lines(path), start=1):
    if line.strip():
      yield number, parse_json(line, path, number)


def bad_line(path: Path, number: int, message: str) -> UserError:
  """The error for a line; or for the archive, if that is damaged and the line a mere symptom."""
  with _explained(path):
    for _ in _byte_lines(path):
      pass
  return UserError(f'{path}, line {number}: {message}')


def _byte_lines(path: Path) -> Iterator[bytes]:
  openers = {'.gz': gzip.open, '.zst': lambda path: io.BufferedReader(_Parts(_zst_chunks(path)))}
  with openers.get(path.suffix, lambda path: path.open('rb'))(path) as file:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b''), start=1):
      if len(line) > MAX_LINE:
        raise UserError(f'{path}, line {number}: longer than {MAX_LINE:,} bytes; divide the text')
      yield line


class _Parts(io.RawIOBase):
  """Bytes that come in parts, as a file."""

  def __init__(self, parts: Iterator[bytes]):
    self._parts, self._rest = parts, memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    while not self._rest:
      part = next(self._parts, None)
      if part is None:
        return 0
      self._rest = memoryview(part)
    size = min(len(buffer), len(self._rest))
    buffer[:size], self._rest = self._rest[:size], self._rest[size:]
    return size


def _zst_chunks(path: Path) -> Iterator[bytes]:
  """Decompresses frame by frame, because the stream reader takes a truncated frame for the end."""
  import zstandard

  with path.open('rb') as file:
    frame = None
    while data := file.read(_ZST_PART):
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
  with _explained(path), path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
