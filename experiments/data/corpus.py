"""A prepared corpus: domains cut into blocks, with random access to every block."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import readers, tokenizers
from experiments.errors import UserError

FORMAT = 1  # raise it when a change in preparation makes older prepared data wrong
META = 'meta.json'
BLOCKS = 'blocks'  # folder of the TFDS dataset, and its name
_MAX_BLOCKS = 2**31 - 1  # example ids are int32


class Corpus:
  """Blocks of T + 1 tokens by (split, domain, index).

  Attributes:
    domains: names in order; the position is the `domain_id`.
    seq_len: T.
    tokenizer: the one that the blocks were made with.
    meta: the content of `meta.json`: sizes, byte counts, `bigram_floor`, tokenizer, fingerprints.
    fingerprint: SHA-256 of `meta`, which holds the fingerprints of text and tokenizer.
  """

  def __init__(self, directory: str | os.PathLike):
    """Opens what `open_corpus` prepared.

    Raises:
      UserError: if the folder is not a complete corpus or its tokenizer is not the original one.
    """
    self.directory = Path(directory)
    self._sources: dict[str, Any] = {}  # opened when first read
    with _damage_explained(self.directory):
      text = (self.directory / META).read_text(encoding='utf-8')
      self.meta: dict[str, Any] = json.loads(text)
      self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
      self.domains = tuple(self.meta['domains'])
      self.seq_len = int(self.meta['seq_len'])
      self.tokenizer = _checked_tokenizer(self.directory, self.meta['tokenizer'])
      self._offsets = {split: self.offsets(split) for split in self.splits}

  @property
  def splits(self) -> tuple[str, ...]:
    return tuple(self.meta['splits'])

  def sizes(self, split: str) -> np.ndarray:
    """Blocks of each domain, int64[K].

    Raises:
      UserError: if the corpus has no such split.
    """
    if split not in self.meta['splits']:
      raise UserError(f"split '{split}' is not in the corpus; it has {', '.join(self.splits)}")
    blocks = self.meta['splits'][split]['blocks']
    return np.asarray([blocks[domain] for domain in self.domains], np.int64)

  def offsets(self, split: str) -> np.ndarray:
    """The `example_id` of each domain's first block, int64[K]."""
    sizes = self.sizes(split)
    return np.cumsum(sizes) - sizes

  def example_id(self, domain_id: int, index: int, split: str = 'train') -> int:
    """The number of a block within its split."""
    return int(self._offsets[split][domain_id] + index)

  def locate(self, example_id: int, split: str = 'train') -> tuple[int, int]:
    """The (domain_id, index) of a block; the inverse of `example_id`."""
    domain_id = int(np.searchsorted(self._offsets[split], example_id, side='right')) - 1
    return domain_id, int(example_id - self._offsets[split][domain_id])

  def read(self, split: str, domain_id: int, index: int) -> dict[str, np.ndarray]:
    """One block: the entries of `rows` without their leading axis."""
    rows = self.rows(split, [self.example_id(domain_id, index, split)])
    return {key: value[0] for key, value in rows.items()}

  def rows(self, split: str, example_ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Blocks by example id, stacked.

    Returns:
      tokens int32[B, T+1], base float32[B, T] (1 where the target is real), domain_id int32[B],
      example_id int32[B], num_bytes float32[B] (of the real targets) and, where the data have
      weights, weights float32[B, T].

    Raises:
      UserError: if the stored blocks are damaged.
    """
    ids = np.asarray(example_ids, np.int64)
    records = self._records(split, ids.tolist())
    tokens = np.stack([record['tokens'] for record in records]).astype(np.int32)
    lengths = np.asarray([record['length'] for record in records])
    base = (np.arange(self.seq_len) < lengths[:, None]).astype(np.float32)
    rows = {
      'tokens': tokens,
      'base': base,
      'domain_id': (np.searchsorted(self._offsets[split], ids, side='right') - 1).astype(np.int32),
      'example_id': ids.astype(np.int32),
      'num_bytes': (self.tokenizer.token_bytes[tokens[:, 1:]] * base).sum(1, dtype=np.float32),
    }
    if self.meta['weights']:
      rows['weights'] = np.stack([record['weights'] for record in records])
    return rows

  def describe(self, example_id: int, split: str = 'train') -> dict[str, Any]:
    """Where a training block comes from and how it reads: {domain, doc, text}."""
    (record,) = self._records(split, [example_id])
    domain_id, _ = self.locate(example_id, split)
    return {
      'domain': self.domains[domain_id],
      'doc': record['doc'].decode('utf-8'),
      'text': self.tokenizer.decode(record['tokens'][: int(record['length']) + 1]),
    }

  def check(self) -> None:
    """Reads the ends of every split, where a file that is missing or cut short shows.

    Raises:
      UserError: the stored blocks are damaged.
    """
    for split in self.splits:
      size = int(self.sizes(split).sum())
      with _damage_explained(self.directory):
        if len(self._source(split)) != size:
          raise ValueError(f'{split} has {len(self._source(split))} blocks, {META} says {size}')
      if size:
        self.rows(split, [0, size - 1])

  def _records(self, split: str, ids: list[int]) -> list[dict[str, Any]]:
    with _damage_explained(self.directory):
      records = self._source(split).__getitems__(ids)
      if any(record['tokens'].shape != (self.seq_len + 1,) for record in records):
        raise ValueError(f'blocks of {split} are not of length {self.seq_len}')
      return records

  def _source(self, split: str) -> Any:
    if split not in self._sources:
      import tensorflow_datasets as tfds

      builder = tfds.builder_from_directory(self.directory / BLOCKS / BLOCKS / f'{FORMAT}.0.0')
      self._sources[split] = builder.as_data_source(split=split)
    return self._sources[split]


def open_corpus(data_config: Any) -> Corpus:
  """Opens the corpus that the configuration describes, preparing it first when there is none yet.

  Prepared data live in `data_config.root` ('' means $JAXRW_DATA, else ~/.cache/jaxrw), in a folder
  named after a hash of the text, tokenizer, block length and limits. Of several processes one
  prepares and the others wait for it.

  Args:
    data_config: `config.data`, or any object with its attributes.

  Raises:
    UserError: for anything wrong with the configuration or the data.
  """
  if data_config.seq_len < 1:
    raise UserError(f'data.seq_len={data_config.seq_len} must be at least 1')
  tokenizer = tokenizers.identify(data_config.tokenizer)
  source = readers.open_source(data_config)
  directory = readers.data_root(data_config) / _folder_name(source, tokenizer, data_config)
  if not directory.is_dir():
    with _lock(directory):
      if not directory.is_dir():  # nobody was faster
        from experiments.data import builders

        builders.prepare(source, data_config, directory)
  corpus = Corpus(directory)
  corpus.check()
  if max(corpus.sizes(split).sum() for split in corpus.splits) > _MAX_BLOCKS:
    raise UserError(f'{directory} has more than {_MAX_BLOCKS:,} blocks; raise data.seq_len')
  return corpus


def _folder_name(source: readers.Source, tokenizer: str, data_config: Any) -> str:
  identity = json.dumps(
    [
      FORMAT,
      source.fingerprint,
      list(source.domains),
      tokenizer,
      data_config.seq_len,
      data_config.max_bytes_per_domain,
      [data_config.text_key, data_config.weight_key],
    ]
  )
  label = re.sub(r'\W+', '_', source.label)[:80]  # a file's name can have 255 bytes
  return f'{label}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}'


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
  """Holds an exclusive lock for the folder; the system releases it if the process is killed."""
  with directory.with_name(f'.{directory.name}.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'another process is preparing {directory.name}; waiting', file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems
      raise UserError(
        f'{directory.parent} cannot lock files ({error}); set data.root to a local folder'
      ) from error
    yield


def _checked_tokenizer(directory: Path, stored: dict[str, Any]) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.load_saved(directory, stored['name'])
  if tokenizer.fingerprint != stored['sha256']:
    raise UserError(
      f'{directory / tokenizers.FILE} is not the tokenizer that the data were prepared with '
      f'({tokenizer.fingerprint[:12]}, expected {stored["sha256"][:12]}); '
      'delete that folder and the data are prepared again'
    )
  return tokenizer


@contextlib.contextmanager
def _damage_explained(directory: Path) -> Iterator[None]:
  """Turns what bad bytes lead to, which may be any exception of TFDS, into one line."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise UserError(
      f'the prepared data in {directory} are damaged ({reason}); '
      'delete that folder and they are prepared again'
    ) from error
