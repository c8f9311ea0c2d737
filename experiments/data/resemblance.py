"""Which domain a block resembles most: the nearest of the domains' mean n-gram profiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.data.corpus import Corpus

ORDERS = (1, 2, 3)  # n-grams of tokens
BUCKETS = 4096  # that they are hashed into
_BLOCKS = 2**16  # to read of all domains together
_PART = 1024  # blocks whose profiles are held at once
_FACTOR = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive numbers


def profiles(tokens: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Square roots of the shares of hashed n-grams: float32[N, BUCKETS], each of length 1.

  With square roots, a few very frequent n-grams do not outweigh all others; the inner product of
  two profiles is their Bhattacharyya coefficient.

  Args:
    tokens: int[N, T + 1].
    base: float[N, T], 0 where the token after the first is padding.
  """
  counts = np.zeros((tokens.shape[0], BUCKETS), np.float32)
  row = np.arange(tokens.shape[0])[:, None]
  real = np.insert(base, 0, 1, axis=1) > 0  # the first token always is
  for order in ORDERS[: tokens.shape[1]]:
    width = tokens.shape[1] - order + 1
    code = np.full((tokens.shape[0], width), order, np.uint64)
    for i in range(order):
      code = (code + tokens[:, i : i + width].astype(np.uint64)) * np.uint64(_FACTOR)
    bucket = (code >> np.uint64(40)) % np.uint64(BUCKETS)
    np.add.at(counts, (row, bucket.astype(np.int64)), real[:, order - 1 :])
  return np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def nearest_domains(
  corpus: Corpus, example_ids: Sequence[int] | np.ndarray, among: np.ndarray, blocks: int = 0
) -> np.ndarray:
  """The domain whose mean profile is nearest to that of each training block, int64[N].

  Args:
    corpus: of the blocks.
    example_ids: the blocks.
    among: bool[K], the domains to choose from.
    blocks: of each domain, spread evenly over it, that its mean is taken of; 0: 256, and where
      there are more than 256 domains fewer, at least 16.
  """
  candidates = np.flatnonzero(among)
  blocks = blocks or int(np.clip(_BLOCKS // len(candidates), 16, 256))
  sizes, offsets = corpus.sizes('train'), corpus.offsets('train')

  def profiles_of(ids):
    rows = corpus.rows('train', ids)
    return profiles(rows['tokens'], rows['base'])

  means = np.empty((len(candidates), BUCKETS), np.float32)
  for mean, domain in zip(means, candidates):  # one at a time: there may be thousands
    count = min(blocks, int(sizes[domain]))
    mean[:] = profiles_of(offsets[domain] + np.arange(count) * sizes[domain] // count).mean(0)
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  ids = np.asarray(example_ids)
  nearest = [
    np.argmax(profiles_of(ids[i : i + _PART]) @ means.T, axis=1) for i in range(0, ids.size, _PART)
  ]
  return candidates[np.concatenate(nearest)]
