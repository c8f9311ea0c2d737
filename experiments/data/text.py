"""Small operations on text that every source shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

PIECE = 16_384  # characters; about four pages


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
  """Cuts a long text into pieces of about `size` characters, which join to the text again.

  A cut falls at the last end of a paragraph within reach, else at the last end of a line, else
  anywhere.
  """
  start = 0
  while len(text) - start > size:
    end = _last_break(text, start + size // 2, start + size)
    yield text[start:end]
    start = end
  if start < len(text):
    yield text[start:]


def unit_hash(text: str) -> float:
  """A number in [0, 1) that depends on the text alone, on every machine."""
  return int.from_bytes(hashlib.sha256(text.encode('utf-8')).digest()[:6], 'big') / 2.0**48


def _last_break(text: str, low: int, high: int) -> int:
  for separator in ('\n\n', '\n'):
    found = text.rfind(separator, low, high)
    if found >= 0:
      return found + len(separator)
  return high
