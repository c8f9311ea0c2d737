"""Tokenizers: bytes (the default), BPE trained on the corpus itself, or any `tokenizer.json`.

Every tokenizer knows how many bytes of text each token stands for, so that losses can be quoted in
bits per byte and compared across tokenizers. Documents end with an end-of-text token, EOT, which
stands for no bytes and never arises from text, not even from text that spells its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.errors import UserError

FILE = 'tokenizer.json'  # name of a tokenizer saved with its data
MAX_VOCAB = 2**24  # ids above it are a mistake, and tables by id would fill the memory
_EOT_NAMES = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '[SEP]')


class Tokenizer(Protocol):
  """What the data pipeline asks of a tokenizer."""

  name: str
  vocab_size: int  # EOT included
  eot_id: int
  fingerprint: str  # SHA-256 of the definition; equal fingerprints encode alike
  token_bytes: np.ndarray  # int32[vocab_size]: bytes of text that each token stands for; 0 for EOT

  def encode(self, text: str) -> np.ndarray:
    """Token ids of the text, int32[n], without EOT."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids; EOT is dropped and bytes cut out of a character become U+FFFD."""
    ...

  def save(self, directory: str | os.PathLike) -> None:
    """Writes `tokenizer.json` into the directory, for `load_saved`."""
    ...


class ByteTokenizer:
  """One token per UTF-8 byte, plus EOT = 256."""

  name = 'byte'
  vocab_size = 257
  eot_id = 256
  _definition = json.dumps({'type': 'byte', 'eot_id': 256})
  fingerprint = hashlib.sha256(_definition.encode()).hexdigest()

  def __init__(self):
    self.token_bytes = np.r_[np.ones(256, np.int32), np.int32(0)]

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    ids = np.asarray(ids, np.int64)
    return ids[ids != self.eot_id].astype(np.uint8).tobytes().decode('utf-8', errors='replace')

  def save(self, directory: str | os.PathLike) -> None:
    Path(directory, FILE).write_text(self._definition, encoding='utf-8')


class JsonTokenizer:
  """Any tokenizer in the `tokenizer.json` format of the `tokenizers` package.

  EOT is the file's own end-of-text token where it has one with a usual name, else one id more.
  """

  def __init__(self, definition: str, name: str):
    import tokenizers

    self.name = name
    self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()
    self._definition = definition
    self._tokenizer = tokenizers.Tokenizer.from_str(definition)
    self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    if size > MAX_VOCAB:
      raise ValueError(f'it has the token id {size - 1}; ids must be below {MAX_VOCAB}')
    self.eot_id = next((vocabulary[e] for e in _EOT_NAMES if e in vocabulary), size)
    self.vocab_size = max(size, self.eot_id + 1)
    self.token_bytes = np.zeros(self.vocab_size, np.int32)
    length = _byte_level_length if '"ByteLevel"' in definition else _plain_length
    for token, i in vocabulary.items():
      self.token_bytes[i] = length(token)
    for i, added in self._tokenizer.get_added_tokens_decoder().items():
      self.token_bytes[i] = 0 if added.special else len(added.content.encode())
    self.token_bytes[self.eot_id] = 0

  def encode(self, text: str) -> np.ndarray:
    try:
      return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    except Exception as error:  # the package raises bare Exception for a missing unknown token
      raise UserError(
        f"data.tokenizer='{self.name}' cannot encode the text ({_first_line(error)}); "
        'use a byte-level tokenizer'
      ) from error

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode(
      [int(i) for i in ids if i != self.eot_id], skip_special_tokens=False
    )

  def save(self, directory: str | os.PathLike) -> None:
    Path(directory, FILE).write_text(self._definition, encoding='utf-8')


def identify(spec: str) -> str:
  """A string that names the tokenizer `spec` before it is built; for a file, by its content.

  Raises:
    UserError: if the spec is none of 'byte', 'bpe:<size>', '<path>.json', or the file is missing.
  """
  if spec == 'byte':
    return f'byte {ByteTokenizer.fingerprint}'
  if spec.startswith('bpe:'):
    return f'bpe {_bpe_size(spec)}'
  if spec.endswith('.json'):
    return f'json {hashlib.sha256(_read(spec).encode()).hexdigest()}'
  raise UserError(
    f"data.tokenizer='{spec}' is not known; use 'byte', 'bpe:4096' or the path of a tokenizer.json"
  )


def load_tokenizer(spec: str, train_texts: Callable[[], Iterable[str]] | None = None) -> Tokenizer:
  """Builds a tokenizer.

  Args:
    spec: 'byte', 'bpe:<vocabulary size, EOT included>' (fewer where the text offers no more merges)
      or the path of a `tokenizer.json`.
    train_texts: returns the texts that a BPE vocabulary is learned from.

  Raises:
    UserError: for an unknown spec or an unreadable file.
  """
  identify(spec)
  if spec == 'byte':
    return ByteTokenizer()
  if spec.startswith('bpe:'):
    if train_texts is None:
      raise ValueError(f'{spec} needs train_texts')
    return JsonTokenizer(_train_bpe(_bpe_size(spec), train_texts()), spec)
  return _from_definition(_read(spec), spec)


def load_saved(directory: str | os.PathLike, name: str) -> Tokenizer:
  """Loads what `Tokenizer.save` wrote.

  Raises:
    UserError: it is damaged.
  """
  try:
    return _from_definition(Path(directory, FILE).read_text(encoding='utf-8'), name)
  except (UserError, OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'{Path(directory, FILE)} is damaged; delete that folder and the data are prepared again'
    ) from error


def _from_definition(definition: str, name: str) -> Tokenizer:
  if definition == ByteTokenizer._definition:
    return ByteTokenizer()
  try:
    return JsonTokenizer(definition, name)
  except Exception as error:  # the package raises bare Exception for a malformed file
    raise UserError(
      f"data.tokenizer='{name}' cannot be loaded ({_first_line(error)}); "
      'give a tokenizer.json written by the `tokenizers` package'
    ) from error


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> str:
  """Learns a byte-level BPE and returns its definition. The last id is left for EOT."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - 1,
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str()


def _bpe_size(spec: str) -> int:
  size = spec.removeprefix('bpe:')
  if not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
    raise UserError(
      f"data.tokenizer='{spec}': the vocabulary size must be between 257 and 1000000, "
      "as in 'bpe:4096'"
    )
  return int(size)


def _byte_level_length(token: str) -> int:
  return len(token)  # byte-level vocabularies spell each byte as one character


def _plain_length(token: str) -> int:
  if len(token) == 6 and token.startswith('<0x') and token.endswith('>'):
    return 1  # byte fallback
  return len(token.replace('▁', ' ').encode())


def _read(path: str | os.PathLike) -> str:
  try:
    return Path(path).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"data.tokenizer: cannot read '{path}' ({_first_line(error)}); "
      "give the path of a tokenizer.json, or 'byte'"
    ) from error


def _first_line(error: Exception) -> str:
  return str(error).split('\n', 1)[0]
