"""The three passes over the shards: count n-grams, score documents, write those that are chosen."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments import files
from experiments.corpus_job import Arrays
from experiments.data import text_files
from experiments.errors import UserError
from jaxrw.scores import dsir

FIELD = 'selection'  # of a written document: what chose it
RANDOM = 'random'
_NOISE_ROWS = 4096  # documents whose noise is drawn at once, so that one shape is compiled


@dataclasses.dataclass(frozen=True)
class Count:
  """How often each bucket of n-grams occurs."""

  text_key: str
  order: int
  buckets: int
  name: ClassVar[str] = 'count'

  def map(self, name: str, path: Path) -> Arrays:
    counts = _hasher(self.order, self.buckets).count(
      text for _, text, _ in documents(path, self.text_key)
    )
    return {'ngrams': counts.ngrams, 'documents': np.array(counts.documents)}

  def merge(self, one: Arrays, other: Arrays) -> Arrays:
    return {key: one[key] + other[key] for key in one}


@dataclasses.dataclass(frozen=True)
class Score:
  """The best documents for each target, and as many by chance.

  Attributes:
    ratios: float64[T, m], log ratios of the targets.
    budget: documents to keep of each ranking: all that could be chosen.
    temperature: of the sampling.
    per_ngram: whether log weights are means over n-grams.
    min_words: documents with fewer are left out.
    seed: of the noise.
    multiplicity: file of `Multiplicity.finish`, or ''.
  """

  text_key: str
  order: int
  buckets: int
  ratios: np.ndarray
  budget: int
  temperature: float
  per_ngram: bool
  min_words: int
  seed: int
  multiplicity: str
  multiplicity_digest: str = ''
  name: ClassVar[str] = 'score'

  def map(self, name: str, path: Path) -> Arrays:
    hasher, rows = _hasher(self.order, self.buckets), []
    texts = []
    for line, text, _ in documents(path, self.text_key):
      rows.append(line)
      texts.append(text)
    lines, shard = np.array(rows, np.int64), shard_id(name)
    scored = [hasher.score(texts, ratio) for ratio in self.ratios]
    kept = scored[0].words >= self.min_words
    ids, out = np.full(kept.sum(), shard, np.uint64), {}
    copies = 0.0
    if self.multiplicity:
      sizes = _loaded(self.multiplicity, self.multiplicity_digest)
      copies = np.log(_copies(sizes, shard, lines))
    for t, found in enumerate(scored):
      key = found.per_ngram(self.order) if self.per_ngram else found.log_weights
      if self.temperature:
        key = key / self.temperature + noise(self.seed, t, shard, lines)
      key = key - copies  # a chance divided by their number, at any temperature
      out |= _ranking(t, key[kept], ids, lines[kept], self.budget)
    # The control: equal chances, from the same documents.
    key = noise(self.seed, len(scored), shard, lines)
    out |= _ranking(RANDOM, key[kept], ids, lines[kept], self.budget)
    return out | {'kept': np.array(kept.sum()), 'documents': np.array(len(lines))}

  def merge(self, one: Arrays, other: Arrays) -> Arrays:
    out = {key: one[key] + other[key] for key in ('kept', 'documents')}
    for t in (*map(str, range(len(self.ratios))), RANDOM):
      key, shard, line = (
        np.concatenate([one[f'{what}_{t}'], other[f'{what}_{t}']])
        for what in ('key', 'shard', 'line')
      )
      out |= _ranking(t, key, shard, line, self.budget)
    return out


def _ranking(which: int | str, key, shard, line, budget: int) -> Arrays:
  best = np.lexsort((line, shard, -key))[:budget]  # a tie goes to the smaller id
  return {f'key_{which}': key[best], f'shard_{which}': shard[best], f'line_{which}': line[best]}


@dataclasses.dataclass(frozen=True)
class Write:
  """The chosen documents of a shard, as a shard of the same name under OUT/train/NAME."""

  text_key: str
  order: int
  buckets: int
  chosen: str
  chosen_digest: str
  names: tuple[str, ...]
  out: str
  name: ClassVar[str] = 'write'

  def map(self, name: str, path: Path) -> Arrays:
    by_line = _chosen(_loaded(self.chosen, self.chosen_digest), shard_id(name))
    kept: list[list[dict[str, Any]]] = [[] for _ in self.names]
    if by_line:
      for line, _, record in documents(path, self.text_key):
        for which in by_line.get(line, ()):
          kept[which].append(record | {'id': record.get('id', f'{name}:{line}')})
    out: Arrays = {}
    hasher = _hasher(self.order, self.buckets)
    for which, (label, records) in enumerate(zip(self.names, kept)):
      texts = [r[self.text_key] for r in records]
      out[f'ngrams_{which}'] = hasher.count(texts).ngrams
      out[f'documents_{which}'] = np.array(len(texts))
      out[f'bytes_{which}'] = np.array(sum(len(t.encode('utf-8', 'replace')) for t in texts))
      target = written(Path(self.out), label, name)
      if records:
        write_jsonl(target, (r | {FIELD: label} for r in records))
      else:
        target.unlink(missing_ok=True)
    return out

  def merge(self, one: Arrays, other: Arrays) -> Arrays:
    return {key: one[key] + other[key] for key in one}


@dataclasses.dataclass(frozen=True)
class Multiplicity:
  """MinHash bands of all documents, by datasketch: near duplicates share one.

  Attributes:
    threshold: Jaccard similarity of word 5-grams from which on two documents are likely to meet.
    permutations: of each signature.
  """

  text_key: str
  threshold: float
  permutations: int = 64
  name: ClassVar[str] = 'minhash'

  def map(self, name: str, path: Path) -> Arrays:
    try:
      import datasketch
    except ImportError as error:
      raise UserError("--duplicates needs datasketch: pip install 'jaxrw[experiments]'") from error
    lsh = datasketch.MinHashLSH(threshold=self.threshold, num_perm=self.permutations)
    lines, bands = [], []
    for line, text, _ in documents(path, self.text_key):
      words = dsir.tokenize(text)
      shingles = {' '.join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
      signature = datasketch.MinHash(num_perm=self.permutations, seed=1)
      signature.update_batch([s.encode('utf-8', 'replace') for s in sorted(shingles)])
      values = signature.hashvalues[: lsh.b * lsh.r].reshape(lsh.b, lsh.r)
      lines.append(line)
      bands.append([hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values])
    shape = (len(lines), lsh.b)
    return {
      'shard': np.full(len(lines), shard_id(name), np.uint64),
      'line': np.array(lines, np.int64),
      'bands': np.frombuffer(b''.join(b for row in bands for b in row), np.uint64).reshape(shape),
    }

  def merge(self, one: Arrays, other: Arrays) -> Arrays:
    both = {key: np.concatenate([one[key], other[key]]) for key in one}
    order = np.lexsort((both['line'], both['shard']))
    return {key: value[order] for key, value in both.items()}

  def finish(self, merged: Arrays) -> Arrays:
    """Ids of documents and the size of the group that each is in, which shares bands in a chain."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number = len(merged['line'])
    pairs = [np.zeros((0, 2), np.int64)]
    for band in merged['bands'].T:
      order = np.argsort(band, kind='stable')
      same = np.flatnonzero(band[order][1:] == band[order][:-1])
      pairs.append(np.stack([order[same], order[same + 1]], axis=1))
    rows, columns = np.concatenate(pairs).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(number, number))
    _, group = connected_components(graph, directed=False)
    sizes = np.bincount(group, minlength=1)
    return {'shard': merged['shard'], 'line': merged['line'], 'size': sizes[group]}


# Reading and writing ------------------------------------------------------------------------------


def documents(path: Path, text_key: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
  """(number of the line, text, record) of a shard.

  Raises:
    UserError: the file is damaged, or a line has no text.
  """
  for number, record in text_files.json_lines(path):
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
      raise text_files.bad_line(
        path, number, f'no text under {text_key!r}; set --text_key to the name of the field'
      )
    yield number, record[text_key], record


def write_jsonl(path: Path, records: Iterator[Mapping[str, Any]]) -> None:
  """Replaces `path`, compressed without a time stamp."""
  with (
    files.replacing(path) as temporary,
    temporary.open('wb') as raw,
    gzip.GzipFile('', 'wb', fileobj=raw, mtime=0) as packed,
  ):
    for record in records:
      packed.write(json.dumps(record, ensure_ascii=False).encode('utf-8', 'surrogatepass') + b'\n')


def written(out: Path, selection: str, name: str) -> Path:
  """Where the chosen documents of a shard go."""
  return out / 'train' / selection / f'{name.partition(".jsonl")[0]}.jsonl.gz'


@functools.lru_cache(maxsize=2)
def _hasher(order: int, buckets: int) -> dsir.Hasher:
  """One of each process: what it remembers serves all shards."""
  return dsir.Hasher(order, buckets)


def shard_id(name: str) -> int:
  """64 bits of a hash of the shard's name: a document keeps its chance when others come or go."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big')


def noise(seed: int, which: int, shard: int, lines: np.ndarray) -> np.ndarray:
  """Gumbel noise of documents, float64[n], by the ids (shard, line)."""
  import jax
  import jax.numpy as jnp

  from jaxrw import selection

  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    key = jax.random.key(seed)
    for part in (which, shard >> 32, shard & 0xFFFFFFFF):
      key = jax.random.fold_in(key, part)
    out = []
    for begin in range(0, len(lines), _NOISE_ROWS):
      rows = lines[begin : begin + _NOISE_ROWS]
      ids = np.zeros((_NOISE_ROWS, 2), np.uint32)
      ids[: len(rows)] = np.stack([rows >> 32, rows & 0xFFFFFFFF], axis=1)
      drawn = selection.perturbed(key, jnp.zeros(_NOISE_ROWS), example_ids=jnp.asarray(ids))
      out.append(np.asarray(drawn, np.float64)[: len(rows)])
  return np.concatenate(out) if out else np.zeros(0)


@functools.lru_cache(maxsize=1)
def _loaded(path: str, digest: str) -> Arrays:
  """The arrays of a file, read once for all shards; of another digest, again."""
  return files.read_arrays(path)


def _copies(found: Arrays, shard: int, lines: np.ndarray) -> np.ndarray:
  """Sizes of the groups that the documents of a shard are in."""
  low, high = (
    np.searchsorted(found['shard'], np.uint64(shard), side) for side in ('left', 'right')
  )
  if not np.array_equal(found['line'][low:high], lines):
    raise UserError('a shard has changed since its duplicates were counted; start again')
  return found['size'][low:high]


def _chosen(found: Arrays, shard: int) -> dict[int, list[int]]:
  """{line: numbers of the selections} of a shard."""
  out: dict[int, list[int]] = {}
  for which in range(int(found['selections'])):
    mine = found[f'shard_{which}'] == np.uint64(shard)
    for line in found[f'line_{which}'][mine].tolist():
      out.setdefault(line, []).append(which)
  return out


# Choosing -----------------------------------------------------------------------------------------


class Choice(NamedTuple):
  """Ids of the documents of one selection, uint64[k] and int64[k], sorted."""

  shard: np.ndarray
  line: np.ndarray


def choose(merged: Arrays, budgets: Sequence[int]) -> Choice:
  """Serves the targets in order: each takes its best of what the earlier ones have left.

  Args:
    merged: of `Score`.
    budgets: documents of each target.
  """
  taken: set[tuple[int, int]] = set()
  for t, budget in enumerate(budgets):
    ids = zip(merged[f'shard_{t}'].tolist(), merged[f'line_{t}'].tolist())
    taken |= set(itertools.islice((i for i in ids if i not in taken), budget))
  return _sorted(taken)


def by_chance(merged: Arrays, budget: int) -> Choice:
  """As many documents with equal chances."""
  shard, line = merged[f'shard_{RANDOM}'][:budget], merged[f'line_{RANDOM}'][:budget]
  return _sorted(set(zip(shard.tolist(), line.tolist())))


def _sorted(ids: set[tuple[int, int]]) -> Choice:
  shard, line = zip(*sorted(ids))
  return Choice(np.array(shard, np.uint64), np.array(line, np.int64))
