"""DSIR: documents whose words look like those of a target corpus, by hashed n-grams.

A document is a bag of its words and neighboring words, hashed into m buckets: counts z. Target and
raw corpus are one distribution over the buckets each, p and q, and a document's score is the log
likelihood ratio

  log w = sum_j z_j (log(p_j + eps) - log(q_j + eps))

What is kept by it: `jaxrw.selection.gumbel_top_k(key, log_w, budget)`, sampling without replacement
in proportion to w. Of long documents the log weights differ by hundreds, so that sampling is nearly
top-k; a `temperature` there or `Scored.per_ngram` here brings the chance back.

Counting and scoring are NumPy on the host: features are hashes of strings, and a corpus is read
from disks, twice, or hashed once if it fits into memory (`Hasher.hash`). A text becomes an array of
characters, in which words are found, and n-grams are looked up, for many documents at once; only an
n-gram that is new costs a SHA-256. Counts of shards add up (`Counts.merge`), so both passes run on
any number of workers: see `experiments/select_corpus`.

Source: Xie et al., Data Selection for Language Models via Importance Resampling, NeurIPS 2023
(arXiv 2302.03169); the package `data-selection`, whose hashes and log weights these are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrw.scores import _sha256

BUCKETS = 10_000
_WORDS = re.compile(r'\w+|[^\w\s]+')  # runs of letters and digits; runs of other marks
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_STEP = 0xD6E8FEB86659FD93
_LOW = np.uint64(0xFFFF)
_BATCH = 1 << 18  # characters: arrays of their size stay in the cache
_FEW = 2000  # n-grams, which are hashed one by one


def tokenize(text: str) -> list[str]:
  """Words and runs of punctuation, in lower case.

  Example:
    >>> from jaxrw.scores import dsir
    >>> dsir.tokenize("Alice didn't go.")
    ['alice', 'didn', "'", 't', 'go', '.']

  Source: what the package does by default: `wordpunct_tokenize` of NLTK, up to 3.9. From
  3.10 on it takes superscript digits, as in m³, for punctuation.
  """
  return _WORDS.findall(text.lower())


class Hasher:
  """The buckets of a text's n-grams: int(sha256(words joined by a blank), 16) mod m.

  What was hashed once is remembered under a fingerprint of 48 bits and its place in the table; of
  1e9 lookups of new n-grams one is mistaken for another with a chance of 1e-5.

  Args:
    order: n-grams of 1 to `order` words share the buckets.
    buckets: m, at most 65,536.
    remembered: n-grams to remember, rounded up to a power of 2, 8 bytes each. With more different
      ones some are hashed again.

  Raises:
    ValueError: numbers out of range.

  Example:
    >>> from jaxrw.scores import dsir
    >>> dsir.Hasher().buckets_of('Alice went')
    array([6720, 5816,  114])
  """

  def __init__(self, order: int = 2, buckets: int = BUCKETS, remembered: int = 1 << 22):
    if order < 1 or not 1 <= buckets <= 1 << 16 or remembered < 2:
      raise ValueError(
        f'order={order} must be at least 1, buckets={buckets} in [1, 65536], '
        f'remembered={remembered} at least 2'
      )
    self.order, self.buckets = order, buckets
    bits = (remembered - 1).bit_length()
    self._shift = np.uint64(64 - bits)
    # The upper 48 bits of a fingerprint and its bucket; 0 is an empty place.
    self._table = np.zeros(1 << bits, np.uint64)

  def buckets_of(self, text: str) -> np.ndarray:
    """Buckets of the n-grams of one text, int64[L], by order, then by place."""
    return np.concatenate([found for found, _ in self._orders([text])]).astype(np.int64)

  def hash(self, texts: Iterable[str]) -> Hashed:
    """The n-grams of texts that fit into memory, to count and to score without a second look.

    Two bytes for each n-gram, in all about as many as the texts have.
    """
    return Hashed([self._orders(batch) for batch in _batches(texts)], self.buckets)

  def count(self, texts: Iterable[str]) -> Counts:
    """How often each bucket occurs in the texts."""
    total = Counts(np.zeros(self.buckets, np.int64))
    for batch in _batches(texts):
      total = total.merge(self.hash(batch).count())
    return total

  def score(self, texts: Iterable[str], ratio: np.ndarray) -> Scored:
    """Sums of the log ratios of each text's n-grams.

    Args:
      texts: documents.
      ratio: float64[m], from `log_ratio`.

    Returns:
      Scored; the log weight of a text without words is 0. Each is the same number whatever texts it
      is scored with.

    Raises:
      ValueError: a ratio that is not [m].
    """
    scored = [self.hash(batch).score(ratio) for batch in _batches(texts)]
    return Scored(*map(np.concatenate, zip(*scored))) if scored else self.hash([]).score(ratio)

  def _orders(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(buckets of all texts, number in each text) of unigrams, then bigrams, ..."""
    words, out = _words(texts), []
    unigrams = prints = words.prints
    for n in range(1, self.order + 1):
      if n > 1:
        prints = _mixed(prints[:-1] * np.uint64(_BASE) + unigrams[n - 1 :])
      document = words.document[: len(prints)]
      first = np.flatnonzero(document == words.document[n - 1 :])  # where none crosses to the next
      numbers = np.bincount(document[first], minlength=len(texts))
      out.append((self._look_up(prints[first], words, n, first), numbers))
    return out

  def _look_up(self, prints: np.ndarray, words: _Words, n: int, first: np.ndarray) -> np.ndarray:
    """Buckets of the n-grams that begin with the words `first`, by fingerprints; new ones are
    hashed. Each has two places to be at."""
    place = prints * np.uint64(_STEP)
    entry = self._table[place >> self._shift]
    missed = np.flatnonzero((entry ^ prints) > _LOW)
    entry[missed] = self._table[place[missed] * np.uint64(_BASE) >> self._shift]
    new = missed[(entry[missed] ^ prints[missed]) > _LOW]
    if len(new):
      # One that comes again in these texts is hashed again: cheaper than to look for it.
      bucket = words.hashed(n, first[new], self.buckets)
      made = (prints[new] & ~_LOW) | bucket.astype(np.uint64)
      entry[new] = made
      one, two = place[new] >> self._shift, (place[new] * np.uint64(_BASE)) >> self._shift
      self._table[np.where(self._table[one] == 0, one, two)] = made
    return entry.astype(np.uint16)  # the lower 16 bits


class _Words(NamedTuple):
  """The words of some texts: the bytes of the texts in lower case, where words are in them, the
  number of the text each is in, and fingerprints."""

  data: np.ndarray
  starts: np.ndarray
  ends: np.ndarray
  document: np.ndarray
  prints: np.ndarray

  def hashed(self, n: int, first: np.ndarray, buckets: int) -> np.ndarray:
    """Buckets of the n-grams that begin with these words."""
    rows = first + np.arange(n)[:, None]
    starts, ends = self.starts[rows], self.ends[rows]
    short = (ends - starts).sum(axis=0) + n - 1 <= _sha256.LONGEST
    if np.count_nonzero(short) < _FEW:
      short[:] = False
    found = np.empty(len(first), np.int64)
    if short.any():
      found[short] = _sha256.buckets(self.data, starts[:, short], ends[:, short], buckets)
    data = b'' if short.all() else self.data.tobytes()
    for i in np.flatnonzero(~short).tolist():
      parts = zip(starts[:, i].tolist(), ends[:, i].tolist())
      digest = hashlib.sha256(b' '.join([data[a:b] for a, b in parts])).digest()
      found[i] = int.from_bytes(digest, 'big') % buckets
    return found


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if size >= _BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


@functools.cache
def _kinds() -> np.ndarray:
  """Of every character: 0 white space, 1 part of a word, 2 another mark."""
  kind = np.full(sys.maxunicode + 1, 2, np.uint8)
  everything = ''.join(map(chr, range(sys.maxunicode + 1)))
  for pattern, number in ((r'\s+', 0), (r'\w+', 1)):
    for run in re.finditer(pattern, everything):
      kind[run.start() : run.end()] = number
  return kind


def _words(texts: Sequence[str]) -> _Words:
  """Finds the words, and their fingerprints: sum of (byte + 1) BASE^(place in the word), by
  differences of cumulative sums, divided by BASE^start; all modulo 2^64."""
  lower = [text.lower() for text in texts]
  text = '\n'.join(lower)  # white space, so that no word crosses
  data = np.frombuffer(text.encode('utf8', 'surrogatepass'), np.uint8)
  kind = np.zeros(len(data) + 2, np.uint8)  # of every byte, with white space around
  kind[1:-1] = _kinds()[data]
  if len(data) != len(text):
    _mark_wide(kind, data)
  before, after = kind[:-1], kind[1:]
  change = before != after
  starts, ends = np.flatnonzero(change & (after > 0)), np.flatnonzero(change & (before > 0))
  sizes = [len(t) if t.isascii() else len(t.encode('utf8', 'surrogatepass')) for t in lower]
  per_text = np.diff(
    np.searchsorted(starts, np.cumsum(sizes) + np.arange(1, len(lower) + 1)), prepend=0
  )
  powers, inverses = _powers(1 << max(20, len(data).bit_length()))
  sums = np.zeros(len(data) + 1, np.uint64)
  np.cumsum(powers[: len(data)] * (data + np.uint64(1)), out=sums[1:])
  prints = _mixed((sums[ends] - sums[starts]) * inverses[starts])
  return _Words(data, starts, ends, np.repeat(np.arange(len(lower)), per_text), prints)


def _mixed(prints: np.ndarray) -> np.ndarray:
  """Every bit spread over the whole number, one to one."""
  prints *= np.uint64(_STEP)
  prints ^= prints >> np.uint64(32)
  prints *= np.uint64(_BASE)
  return prints


def _mark_wide(kind: np.ndarray, data: np.ndarray) -> None:
  """The kinds of all bytes of characters beyond ASCII."""
  first = np.flatnonzero(data >= 0xC0)
  after = np.concatenate([data, np.zeros(3, np.uint8)])
  lead = data[first].astype(np.int32)
  one, two, three = (after[first + i].astype(np.int32) & 0x3F for i in (1, 2, 3))
  point = np.where(
    lead < 0xE0,
    (lead & 0x1F) << 6 | one,
    np.where(
      lead < 0xF0,
      (lead & 0xF) << 12 | one << 6 | two,
      (lead & 0x7) << 18 | one << 12 | two << 6 | three,
    ),
  )
  own = _kinds()[point]
  for i, least in enumerate((0xC0, 0xC0, 0xE0, 0xF0)):
    kind[1 + i + first[lead >= least]] = own[lead >= least]


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Powers of BASE and of its inverse, uint64[size] each."""
  out = []
  for base in (_BASE, pow(_BASE, -1, 1 << 64)):
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    out.append(np.cumprod(factors))
  return out[0], out[1]


@dataclasses.dataclass(frozen=True)
class Hashed:
  """The n-grams of texts as buckets, from `Hasher.hash`.

  Attributes:
    parts: of some texts each: for unigrams, bigrams, ... the buckets, uint16[L], and how many of
      them each text has, int64[n].
    buckets: m.

  Example:
    >>> from jaxrw.scores import dsir
    >>> raw = dsir.Hasher().hash(['Alice went', 'the Queen went'])
    >>> target = dsir.Hasher().count(['the Queen of hearts'])
    >>> raw.score(dsir.log_ratio(target, raw.count())).log_weights.round(2)
    array([-49.72, -32.98])
  """

  parts: list[list[tuple[np.ndarray, np.ndarray]]]
  buckets: int

  def count(self) -> Counts:
    """As `Hasher.count`."""
    total, documents = np.zeros(self.buckets, np.int64), 0
    for part in self.parts:
      documents += len(part[0][1])
      for found, _ in part:
        total += np.bincount(found, minlength=self.buckets)
    return Counts(total, documents)

  def score(self, ratio: np.ndarray) -> Scored:
    """As `Hasher.score`, the same numbers."""
    if ratio.shape != (self.buckets,):
      raise ValueError(f'ratio has shape {ratio.shape}; expected [{self.buckets}], one per bucket')
    if not self.parts:
      return Scored(np.zeros(0), np.zeros(0, np.int64))
    sums = []
    for part in self.parts:
      total = 0.0
      for found, numbers in part:
        document = np.repeat(np.arange(len(numbers)), numbers)
        # bincount adds in order, so that a sum does not depend on what else is in the part.
        total += np.bincount(document, weights=ratio[found], minlength=len(numbers))
      sums.append(total)
    return Scored(np.concatenate(sums), np.concatenate([part[0][1] for part in self.parts]))


class Scored(NamedTuple):
  """log_weights float64[n] and numbers of words int64[n] of documents."""

  log_weights: np.ndarray
  words: np.ndarray

  def per_ngram(self, order: int = 2) -> np.ndarray:
    """Mean log ratio of an n-gram, float64[n]: a long document does not win by its length."""
    ngrams = sum(np.maximum(self.words - n, 0) for n in range(order))
    return self.log_weights / np.maximum(ngrams, 1)


class Counts(NamedTuple):
  """How often each bucket occurs in a corpus, int64[m], and in how many documents they were."""

  ngrams: np.ndarray
  documents: int = 0

  def merge(self, other: Counts) -> Counts:
    """Counts of both corpora together; associative and commutative, exactly."""
    if self.ngrams.shape != other.ngrams.shape:
      raise ValueError(
        f'counts of {self.ngrams.size} and of {other.ngrams.size} buckets do not add up'
      )
    return Counts(self.ngrams + other.ngrams, self.documents + other.documents)

  @property
  def distribution(self) -> np.ndarray:
    """Shares of the buckets, float64[m]; zeros if nothing was counted."""
    return self.ngrams / max(1, self.ngrams.sum())


def log_ratio(
  target: Counts, raw: Counts, *, smoothing: float = 0.0, eps: float = 1e-8
) -> np.ndarray:
  """log(p + eps) - log(q + eps) of every bucket, p with `smoothing` added to the target's counts.

  Args:
    target, raw: counts of the two corpora.
    smoothing: >= 0. With 0 every bucket that the target lacks costs about 18, so that rare words
      decide.
    eps: > 0.

  Returns:
    float64[m].

  Raises:
    ValueError: an empty corpus, different numbers of buckets, bad numbers.

  Example:
    >>> import numpy as np
    >>> from jaxrw.scores import dsir
    >>> target, raw = dsir.Counts(np.array([3, 1])), dsir.Counts(np.array([2, 2]))
    >>> dsir.log_ratio(target, raw).round(4)
    array([ 0.4055, -0.6931])
  """
  if not smoothing >= 0 or not eps > 0:
    raise ValueError(f'smoothing={smoothing} must be at least 0 and eps={eps} greater than 0')
  if target.ngrams.shape != raw.ngrams.shape:
    raise ValueError(f'target has {target.ngrams.size} buckets, raw {raw.ngrams.size}')
  for name, counts in (('target', target), ('raw', raw)):
    if not counts.ngrams.sum():
      raise ValueError(f'{name} has no n-grams: the corpus is empty')
  smoothed = target.ngrams + smoothing
  return np.log(smoothed / smoothed.sum() + eps) - np.log(raw.distribution + eps)


def kl_divergence(p: np.ndarray, q: np.ndarray, eps: float = 1e-8) -> float:
  """sum_j p_j log((p_j + eps) / (q_j + eps)), in nats."""
  return float(np.sum(p * (np.log(p + eps) - np.log(q + eps))))


def kl_reduction(targets: Sequence[Counts], raw: Counts, selected: Counts) -> float:
  """How much nearer to the targets the selection is: mean over targets of KL(p || raw) - KL(p ||
  selected), by which data are compared without training.

  Args:
    targets: counts of one or more target corpora.
    raw: of what was chosen from.
    selected: of what was chosen.

  Returns:
    Nats; 0 for everything, below 0 where chance left buckets empty.

  Raises:
    ValueError: no target, an empty corpus.

  Example:
    >>> import numpy as np
    >>> from jaxrw.scores import dsir
    >>> target, raw = dsir.Counts(np.array([3, 1])), dsir.Counts(np.array([2, 2]))
    >>> round(dsir.kl_reduction([target], raw, selected=target), 4)
    0.1308

  Source: Xie et al., NeurIPS 2023, as recalled; the package does not offer it.
  """
  if not targets:
    raise ValueError('targets is empty; name at least one')
  for name, counts in (('raw', raw), ('selected', selected)):
    if not counts.ngrams.sum():
      raise ValueError(f'{name} has no n-grams')
  before, after = raw.distribution, selected.distribution
  gains = [
    kl_divergence(t.distribution, before) - kl_divergence(t.distribution, after) for t in targets
  ]
  return math.fsum(gains) / len(gains)


def shares(budget: int, targets: Mapping[str, Counts]) -> dict[str, int]:
  """The budget divided over several targets in proportion to their n-grams; the last gets the rest.

  Example:
    >>> import numpy as np
    >>> from jaxrw.scores import dsir
    >>> dsir.shares(10, {'a': dsir.Counts(np.array([1])), 'b': dsir.Counts(np.array([2]))})
    {'a': 3, 'b': 7}

  Source: the package's default.
  """
  total = sum(int(counts.ngrams.sum()) for counts in targets.values())
  if not total:
    raise ValueError('no target has n-grams')
  parts = {name: budget * int(c.ngrams.sum()) // total for name, c in targets.items()}
  *_, last = parts
  parts[last] += budget - sum(parts.values())
  return parts
