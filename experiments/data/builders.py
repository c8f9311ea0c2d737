"""Prepares a corpus: documents -> one token stream per domain -> blocks in a TFDS dataset.

A domain's stream is EOT, document, EOT, document, ..., EOT. It is cut into blocks of T + 1 tokens
with stride T, so each token but the first EOT is the target of exactly one block; the last block is
padded. All domains of a split lie one after the other in the TFDS split of that name: the record
number is the `example_id`. Preparation happens in a folder of its own that is renamed when
complete, so a prepared corpus is there in full or not at all.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from experiments.data import tokenizers
from experiments.data.corpus import BLOCKS, FORMAT, META
from experiments.data.readers import Document, Source
from experiments.errors import UserError

_SMOOTHING = 0.01  # of the byte bigram
_BPE_BYTES = 4_000_000  # of each domain, to learn a vocabulary from


class Stream(NamedTuple):
  """The token stream of one domain and split, in files; nothing of it stays open or in memory."""

  token_file: Path
  weight_file: Path | None
  num_tokens: int
  starts: np.ndarray  # int64[documents]: position of each document's first token
  ids: list[str]
  num_bytes: int

  def tokens(self) -> np.ndarray:
    """int32[num_tokens], starting and ending with EOT."""
    return _mapped(self.token_file, np.int32)

  def weights(self) -> np.ndarray | None:
    """float32[num_tokens], of each token as a target."""
    return None if self.weight_file is None else _mapped(self.weight_file, np.float32)


class Blocks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """TFDS builder: `tokens` [T+1], `length` (valid targets), `doc` and perhaps `weights` [T]."""

  VERSION = tfds.core.Version(f'{FORMAT}.0.0')
  code_path = None  # only locates checksums of downloads; finding it needs a package TFDS forgot

  def __init__(self, *, streams: dict[str, list[Stream]], seq_len: int, vocab_size: int, **kwargs):
    self._streams = streams
    self._seq_len = seq_len
    self._dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    self._weighted = any(s.weight_file is not None for split in streams.values() for s in split)
    super().__init__(file_format='array_record', **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    tensor = tfds.features.Tensor
    features: dict[str, Any] = {
      'tokens': tensor(shape=(self._seq_len + 1,), dtype=self._dtype, encoding='bytes'),
      'length': np.int32,
      'doc': tfds.features.Text(),
    }
    if self._weighted:
      features['weights'] = tensor(shape=(self._seq_len,), dtype=np.float32, encoding='bytes')
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
    del dl_manager
    return {split: self._generate_examples(streams) for split, streams in self._streams.items()}

  def _generate_examples(self, streams: Sequence[Stream]) -> Iterator[tuple[int, dict[str, Any]]]:
    blocks = (block for stream in streams for block in cut(stream, self._seq_len))
    total = sum(num_blocks(stream, self._seq_len) for stream in streams)
    bar = tqdm(blocks, total=total, desc='writing blocks', unit=' blocks', disable=None)
    for key, block in enumerate(bar):
      block['tokens'] = block['tokens'].astype(self._dtype)
      if self._weighted:
        block.setdefault('weights', np.ones(self._seq_len, np.float32))
      yield key, block


def num_blocks(stream: Stream, seq_len: int) -> int:
  """Blocks that cover the stream; its first token is a target of none."""
  return -(-(stream.num_tokens - 1) // seq_len)


def cut(stream: Stream, seq_len: int) -> Iterator[dict[str, Any]]:
  """The blocks of a stream in order. `doc` is the document of a block's first target."""
  documents = np.searchsorted(
    stream.starts, 1 + np.arange(num_blocks(stream, seq_len)) * seq_len, side='right'
  )
  stored, weights = stream.tokens(), stream.weights()
  for i, document in enumerate(documents - 1):
    start = i * seq_len
    tokens = stored[start : start + seq_len + 1]
    length = tokens.size - 1
    block = {
      'tokens': _padded(tokens, seq_len + 1, stored[0]),
      'length': length,
      'doc': stream.ids[document],
    }
    if weights is not None:
      block['weights'] = _padded(weights[start + 1 : start + 1 + length], seq_len, 0)
    yield block


def encode(
  documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, stem: Path, max_bytes: int = 0
) -> tuple[Stream, np.ndarray]:
  """Encodes documents into a stream kept in files beside `stem`, so memory does not grow with it.

  Takes whole documents until `max_bytes` (0: no limit) are reached. A document's closing EOT has
  the weight of its last token.

  Returns:
    (stream, int64[256, 256]: how often each byte follows another within documents).
  """
  token_file, weight_file = stem.with_suffix('.tokens'), stem.with_suffix('.weights')
  starts, ids, position, num_bytes = [], [], 1, 0
  bigrams = np.zeros(256 * 256, np.int64)
  with token_file.open('wb') as tokens_out, contextlib.ExitStack() as stack:
    weights_out = None
    tokens_out.write(np.int32(tokenizer.eot_id).tobytes())
    for document in documents:
      if not document.text:
        continue
      tokens = np.append(tokenizer.encode(document.text), np.int32(tokenizer.eot_id))
      tokens_out.write(tokens.tobytes())
      if document.weight is not None and weights_out is None:
        weights_out = stack.enter_context(weight_file.open('wb'))
        weights_out.write(np.ones(position, np.float32).tobytes())
      if weights_out is not None:
        weights_out.write(_token_weights(document, tokens.size).tobytes())
      raw = np.frombuffer(document.text.encode('utf-8'), np.uint8).astype(np.int64)
      np.add.at(bigrams, raw[:-1] * 256 + raw[1:], 1)
      starts.append(position)
      ids.append(document.id)
      position += tokens.size
      num_bytes += raw.size
      if 0 < max_bytes <= num_bytes:
        break
  stream = Stream(
    token_file=token_file,
    weight_file=None if weights_out is None else weight_file,
    num_tokens=position,
    starts=np.asarray(starts, np.int64),
    ids=ids,
    num_bytes=num_bytes,
  )
  return stream, bigrams.reshape(256, 256)


def bigram_floor(train: np.ndarray, validation: np.ndarray) -> float:
  """Bits per byte of a byte bigram with add-0.01 smoothing, fitted on `train`.

  Args:
    train, validation: counts [256, 256] of (byte, next byte); measured on the second.
  """
  smoothed = train + _SMOOTHING
  log_prob = np.log2(smoothed) - np.log2(smoothed.sum(axis=1, keepdims=True))
  return float(-(validation * log_prob).sum() / max(1, validation.sum()))


def prepare(source: Source, data_config: Any, directory: Path) -> None:
  """Prepares the source in `directory`, atomically.

  Raises:
    UserError: for anything wrong with the data, or if the disk does not take them.
  """
  partial = directory.with_name(f'.{directory.name}.partial')
  shutil.rmtree(
    partial, ignore_errors=True
  )  # what a killed preparation left; the caller holds the lock
  try:
    (partial / BLOCKS).mkdir(parents=True)
    meta = _write(source, data_config, partial)
    (partial / META).write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
    os.rename(partial, directory)
    print(f'prepared {_summary(meta)} in {directory}', file=sys.stderr)
  except OSError as error:
    raise UserError(
      f'cannot prepare the data in {directory.parent} ({error}); '
      'free some space there or set data.root to another folder'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write(source: Source, data_config: Any, partial: Path) -> dict[str, Any]:
  """Writes everything but the meta file, which it returns."""
  print(f'preparing {len(source.domains)} domains ({source.label}), once', file=sys.stderr)
  tokenizer = tokenizers.load_tokenizer(data_config.tokenizer, lambda: _bpe_texts(source))
  tokenizer.save(partial)
  scratch = partial / 'scratch'
  scratch.mkdir()
  streams: dict[str, list[Stream]] = {split: [] for split in source.splits}
  floors: dict[str, float] = {}
  for i, domain in enumerate(tqdm(source.domains, desc='encoding', unit=' domains', disable=None)):
    bigrams = {}
    for split in source.splits:
      stream, bigrams[split] = encode(
        source.documents(domain, split),
        tokenizer,
        scratch / f'{split}{i}',
        data_config.max_bytes_per_domain,
      )
      _check(stream, domain, split, tokenizer)
      streams[split].append(stream)
    floors[domain] = bigram_floor(bigrams['train'], bigrams['validation'])
  tfds.disable_progress_bar()  # ours says more than its three
  with contextlib.redirect_stdout(io.StringIO()):
    Blocks(
      data_dir=partial / BLOCKS,
      streams=streams,
      seq_len=data_config.seq_len,
      vocab_size=tokenizer.vocab_size,
    ).download_and_prepare()
  shutil.rmtree(scratch)
  return _meta(source, data_config, tokenizer, streams, floors)


def _meta(
  source: Source,
  data_config: Any,
  tokenizer: tokenizers.Tokenizer,
  streams: dict[str, list[Stream]],
  floors: dict[str, float],
) -> dict[str, Any]:
  """What is known of the prepared corpus; nothing in it depends on the machine or the time."""

  def per_domain(split: str, value: Any) -> dict[str, Any]:
    return {domain: value(s) for domain, s in zip(source.domains, streams[split])}

  return {
    'format': FORMAT,
    'source': source.label,
    'source_fingerprint': source.fingerprint,
    'domains': list(source.domains),
    'seq_len': data_config.seq_len,
    'max_bytes_per_domain': data_config.max_bytes_per_domain,
    'tokenizer': {
      'name': tokenizer.name,
      'sha256': tokenizer.fingerprint,
      'vocab_size': tokenizer.vocab_size,
    },
    'weights': any(s.weight_file is not None for split in streams.values() for s in split),
    'splits': {
      split: {
        'blocks': per_domain(split, lambda s: num_blocks(s, data_config.seq_len)),
        'documents': per_domain(split, lambda s: len(s.ids)),
        'tokens': per_domain(split, lambda s: s.num_tokens - 1),
        'bytes': per_domain(split, lambda s: s.num_bytes),
      }
      for split in streams
    },
    'bigram_floor': floors,
  }


def _summary(meta: dict[str, Any]) -> str:
  sizes = meta['splits'].values()
  blocks = sum(sum(size['blocks'].values()) for size in sizes)
  text = sum(sum(size['bytes'].values()) for size in sizes)
  return f'{blocks:,} blocks from {text / 1e6:.1f} MB of text'


def _check(stream: Stream, domain: str, split: str, tokenizer: tokenizers.Tokenizer) -> None:
  if not stream.ids and split == 'train':
    raise UserError(
      f"domain '{domain}' has no training text; add documents (two at least, where the validation "
      'data are held out of them), or leave the domain out with data.domains'
    )
  if not stream.ids and split == 'validation':
    raise UserError(
      f"domain '{domain}' has no validation text; add {domain}.validation.jsonl, "
      'or leave the domain out with data.domains'
    )
  counted = int(tokenizer.token_bytes[stream.tokens()].sum())
  if abs(counted - stream.num_bytes) > 0.01 * stream.num_bytes:
    raise UserError(
      f"data.tokenizer='{tokenizer.name}' loses text: its tokens stand for {counted:,} bytes "
      f"of the {stream.num_bytes:,} in domain '{domain}'; use a byte-level tokenizer"
    )


def _token_weights(document: Document, size: int) -> np.ndarray:
  """Weights of a document's tokens and closing EOT, float32[size]."""
  weight = 1.0 if document.weight is None else document.weight
  if isinstance(weight, float):
    return np.full(size, weight, np.float32)
  if weight.size != size - 1:
    raise UserError(
      f"document '{document.id}' of domain '{document.domain}' has {weight.size} weights for "
      f'{size - 1} tokens; give one number, or one per token'
    )
  return np.append(weight, weight[-1]).astype(np.float32)


def _bpe_texts(source: Source) -> Iterator[str]:
  """Training text of every domain, the same amount of each where there is enough."""
  for domain in source.domains:
    size = 0
    for document in source.documents(domain, 'train'):
      yield document.text
      size += len(document.text)
      if size >= _BPE_BYTES:
        break


def _mapped(path: Path, dtype: Any) -> np.ndarray:
  """A file as an array; as a plain view, because slices of `np.memmap` itself are slow."""
  return np.asarray(np.memmap(path, dtype, 'r'))


def _padded(values: np.ndarray, size: int, fill: Any) -> np.ndarray:
  if values.size == size:
    return values
  return np.concatenate([values, np.full(size - values.size, fill, values.dtype)])
