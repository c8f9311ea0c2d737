"""DSIR: documents whose words look like those of a target corpus, by hashed n-grams.

A document is a bag of its words and neighboring words, hashed into m buckets: counts z. Target and
raw corpus are one distribution over the buckets each, p and q, and a document's score is the log
likelihood ratio

  log w = sum_j z_j (log(p_j + eps) - log(q_j + eps))

What is kept by it: `jaxrw.selection.gumbel_top_k(key, log_w, budget)`, sampling without replacement
in proportion to w. Of long documents the log weights differ by hundreds, so that sampling is nearly
top-k; a `temperature` there or `length_normalize` here brings the chance back.

Counting and scoring are plain NumPy on the host, a document at a time: features are hashes of
strings, and a corpus is read from disks. Counts of shards add up (`Counts.merge`), so both passes
run on any number of workers: see `experiments/select_corpus`.

Source: Xie et al., Data Selection for Language Models via Importance Resampling, NeurIPS 2023
(arXiv 2302.03169); the package `data-selection`, whose hashes and log weights these are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BUCKETS = 10_000
_WORDS = re.compile(r'\w+|[^\w\s]+')  # runs of letters and digits; runs of other marks


def tokenize(text: str) -> list[str]:
  """Words and runs of punctuation, in lower case.

  Example:
    >>> from jaxrw.scores import dsir
    >>> dsir.tokenize("Alice didn't go.")
    ['alice', 'didn', "'", 't', 'go', '.']

  Source: what the package does by default (NLTK's `wordpunct_tokenize`).
  """
  return _WORDS.findall(text.lower())


class Hasher:
  """The buckets of n-grams, int(sha256(ngram), 16) mod m; remembers what it has hashed.

  Args:
    order: n-grams of 1 to `order` words share the buckets.
    buckets: m.
    most_remembered: strings; then the memory is emptied. A string takes some 100 bytes.

  Raises:
    ValueError: numbers below 1.

  Example:
    >>> from jaxrw.scores import dsir
    >>> dsir.Hasher()(['alice', 'went'])
    array([6720, 5816,  114])
  """

  def __init__(self, order: int = 2, buckets: int = BUCKETS, most_remembered: int = 4_000_000):
    if order < 1 or buckets < 1 or most_remembered < 1:
      raise ValueError(
        f'order={order}, buckets={buckets} and {most_remembered=} must be at least 1'
      )
    self.order, self.buckets, self.most_remembered = order, buckets, most_remembered
    self._known: dict[str, int] = {}

  def __call__(self, words: Sequence[str]) -> np.ndarray:
    """Buckets of all n-grams of a list of words, int64[L], by order, then by place."""
    grams = list(words)
    for n in range(2, self.order + 1):
      grams += map(' '.join, zip(*(words[i:] for i in range(n))))
    known = self._known
    try:
      return np.fromiter(map(known.__getitem__, grams), np.int64, len(grams))
    except KeyError:
      if len(known) > self.most_remembered:
        known.clear()
      for gram in grams:
        if gram not in known:
          digest = hashlib.sha256(gram.encode()).digest()
          known[gram] = int.from_bytes(digest, 'big') % self.buckets
    return np.fromiter(map(known.__getitem__, grams), np.int64, len(grams))


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


def count(documents: Iterable[np.ndarray], buckets: int = BUCKETS) -> Counts:
  """Counts of documents given as buckets.

  Example:
    >>> import numpy as np
    >>> from jaxrw.scores import dsir
    >>> dsir.count([np.array([0, 1]), np.array([1])], buckets=3)
    Counts(ngrams=array([1, 2, 0]), documents=2)
  """
  total, seen = np.zeros(buckets, np.int64), 0
  for ids in documents:
    total += np.bincount(ids, minlength=buckets)
    seen += 1
  return Counts(total, seen)


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


def log_weight(ids: np.ndarray, ratio: np.ndarray, *, length_normalize: bool = False) -> float:
  """Sum of the log ratios of a document's n-grams, or their mean; 0 for an empty document.

  Args:
    ids: int[L], from a `Hasher`.
    ratio: float64[m], from `log_ratio`.
    length_normalize: the mean: a long document does not win by its length.

  Example:
    >>> import numpy as np
    >>> from jaxrw.scores import dsir
    >>> dsir.log_weight(np.array([0, 1, 1]), np.array([2.0, -0.5]))
    1.0
  """
  total = float(ratio[ids].sum())
  return total / max(1, len(ids)) if length_normalize else total


def number_of_words(ngrams: int, order: int = 2) -> int:
  """Words of a document with so many n-grams of 1 to `order` words (at least `order` of them)."""
  return (ngrams + order * (order - 1) // 2) // order


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
