"""Nearest domains: profiles against a loop, and blocks that must find their own kind."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments.data import resemblance


def corpus(texts):
  """Enough of a corpus: blocks of bytes by domain; one domain has blocks that end early."""
  blocks = [[np.frombuffer(t.encode(), np.uint8) for t in domain] for domain in texts]
  sizes = np.array([len(domain) for domain in blocks])
  flat = [b for domain in blocks for b in domain]
  longest = max(map(len, flat))

  def rows(split, ids):
    tokens = np.full((len(ids), longest), 256, np.int32)
    base = np.zeros((len(ids), longest - 1), np.float32)
    for i, block in enumerate(flat[j] for j in ids):
      tokens[i, : len(block)], base[i, : len(block) - 1] = block, 1
    return {'tokens': tokens, 'base': base}

  return types.SimpleNamespace(
    rows=rows, sizes=lambda split: sizes, offsets=lambda split: np.cumsum(sizes) - sizes
  )


ENGLISH = ['the weight of the loss is a number on the device', 'the loss of the number on a device']
CODE = ['def f(x):\n  return x + x(1)(2)', 'for i in range(3):\n  f(i)(x)', 'x = f(x)(x)']


def test_profiles_are_the_shares_of_n_grams():
  """Against a dictionary of n-grams: equal n-grams share a bucket, and no mass is lost."""
  tokens = np.array([[1, 2, 1, 2, 9]])
  found = resemblance.profiles(tokens, np.array([[1, 1, 1, 0]])) ** 2
  grams = [(1,), (2,), (1,), (2,), (1, 2), (2, 1), (1, 2), (1, 2, 1), (2, 1, 2)]
  expected = sorted(np.unique([str(g) for g in grams], return_counts=True)[1] / len(grams))
  np.testing.assert_allclose(sorted(found[found > 0]), expected, rtol=1e-6)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)


def test_padding_and_the_rest_of_the_batch_do_not_matter():
  tokens = np.array([[5, 6, 7, 0, 0], [1, 1, 1, 1, 1]])
  base = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
  both = resemblance.profiles(tokens, base)
  alone = resemblance.profiles(np.array([[5, 6, 7]]), np.ones((1, 2)))
  np.testing.assert_array_equal(both[0], alone[0])


def test_a_block_of_one_token():
  np.testing.assert_allclose(resemblance.profiles(np.array([[3]]), np.ones((1, 0))).sum(), 1)


@pytest.mark.parametrize('blocks', [1, 2, 256])
def test_blocks_find_their_own_kind(blocks):
  found = corpus([ENGLISH, CODE])
  nearest = resemblance.nearest_domains(found, np.arange(5), np.array([True, True]), blocks)
  assert nearest.tolist() == [0, 0, 1, 1, 1]


def test_only_the_domains_among_which_to_choose():
  found = corpus([ENGLISH, CODE, ENGLISH])
  nearest = resemblance.nearest_domains(found, [0, 1, 2], np.array([False, True, True]))
  assert nearest.tolist() == [2, 2, 1]
