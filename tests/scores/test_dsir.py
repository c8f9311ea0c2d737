"""DSIR: published hashes, the public package's log weights, and its formulas in a loop."""

import collections
import hashlib

import numpy as np
import pytest

from jaxrw.scores import dsir

WORDS = 'the a of alice went to store and bought seven red apples from bob who did not mind'.split()


def _documents(seed, number=30, length=40):
  rng = np.random.default_rng(seed)
  p = rng.dirichlet(np.full(len(WORDS), 0.5))
  return [' '.join(rng.choice(WORDS, length, p=p)) + '.' for _ in range(number)]


def _buckets(documents, hasher=None):
  hasher = hasher or dsir.Hasher()
  return [hasher(dsir.tokenize(text)) for text in documents]


def test_hashes_that_the_package_publishes():
  hasher = dsir.Hasher()
  assert list(hasher(['alice'])) == [6720]
  assert list(hasher(['alice', 'went']))[-1] == 114
  assert len(hasher(dsir.tokenize('Alice went to the store'))) == 9


def test_tokens():
  assert dsir.tokenize("It's 5.5%,\nnaïve_x (ÉTÉ)") == [
    *('it', "'", 's', '5', '.', '5', '%,'), *('naïve_x', '(', 'été', ')'),
  ]  # fmt: skip
  assert dsir.tokenize('  \n') == []


@pytest.mark.parametrize('order', [1, 2, 3])
def test_ngrams_are_a_loop(order):
  words = WORDS[:7]
  grams = [' '.join(words[i : i + n]) for n in range(1, order + 1) for i in range(8 - n)]
  expected = [int(hashlib.sha256(g.encode()).hexdigest(), 16) % 97 for g in grams]
  np.testing.assert_array_equal(dsir.Hasher(order, 97)(words), expected)
  assert dsir.number_of_words(len(expected), order) == 7
  assert list(dsir.Hasher(order, 97)([])) == []


def test_what_is_remembered_does_not_change_what_is_found():
  small, large = dsir.Hasher(most_remembered=3), dsir.Hasher()
  for words in (WORDS, WORDS[::-1], WORDS):
    np.testing.assert_array_equal(small(words), large(words))


def test_weights_are_a_loop():
  target, raw = _buckets(_documents(0)), _buckets(_documents(1))
  ratio = dsir.log_ratio(dsir.count(target), dsir.count(raw), smoothing=0.5)
  totals = [collections.Counter(np.concatenate(ids).tolist()) for ids in (target, raw)]
  p = np.array([totals[0][j] + 0.5 for j in range(10_000)])
  q = np.array([totals[1][j] for j in range(10_000)])
  for ids in raw[:5]:
    terms = [np.log(p[j] / p.sum() + 1e-8) - np.log(q[j] / q.sum() + 1e-8) for j in ids]
    np.testing.assert_allclose(dsir.log_weight(ids, ratio), sum(terms), rtol=1e-12)
    np.testing.assert_allclose(
      dsir.log_weight(ids, ratio, length_normalize=True), np.mean(terms), rtol=1e-12
    )


def test_weights_are_the_packages():
  """`data-selection` 1.0.3, where it is installed (extra `peers`)."""
  package = pytest.importorskip('data_selection.hashed_ngram_dsir')
  documents = _documents(2)
  from nltk.tokenize import WordPunctTokenizer

  for text in documents:
    words = WordPunctTokenizer().tokenize(text.lower())
    assert words == dsir.tokenize(text)
    expected = package.get_ngram_counts(text.lower(), n=2, num_buckets=10_000)
    found = np.bincount(dsir.Hasher()(words), minlength=10_000)
    np.testing.assert_array_equal(found, expected)


def test_the_same_corpus_has_weights_of_one():
  raw = _buckets(_documents(3))
  counts = dsir.count(raw)
  assert np.all(dsir.log_ratio(counts, counts) == 0)
  assert dsir.kl_reduction([counts], counts, counts) == 0


def test_counts_of_shards_add_up_in_any_order():
  documents = _buckets(_documents(4))
  whole = dsir.count(documents)
  a, b, c = (dsir.count(documents[i::3]) for i in range(3))
  for merged in (a.merge(b).merge(c), c.merge(a.merge(b))):
    np.testing.assert_array_equal(merged.ngrams, whole.ngrams)
    assert merged.documents == whole.documents == 30


def test_unigram_weights_add_up_over_documents():
  """Bigrams cross the seam; words do not."""
  hasher = dsir.Hasher(order=1)
  target, raw = dsir.count(_buckets(_documents(5), hasher)), dsir.count(
    _buckets(_documents(6), hasher)
  )  # fmt: skip
  ratio = dsir.log_ratio(target, raw, smoothing=1.0)
  first, second = (hasher(dsir.tokenize(text)) for text in _documents(7)[:2])
  both = np.concatenate([first, second])
  total = dsir.log_weight(first, ratio) + dsir.log_weight(second, ratio)
  np.testing.assert_allclose(dsir.log_weight(both, ratio), total, rtol=1e-12)


def test_selecting_by_weight_comes_nearer_to_the_target():
  target, mixed = _documents(8, 60), _documents(8, 30) + _documents(9, 270)
  hashed = _buckets(mixed)
  goal, raw = dsir.count(_buckets(target)), dsir.count(hashed)
  ratio = dsir.log_ratio(goal, raw)
  weights = [dsir.log_weight(ids, ratio) for ids in hashed]
  best = np.argsort(weights)[-30:]
  assert np.mean(best < 30) > 0.95
  gain = dsir.kl_reduction([goal], raw, dsir.count(hashed[i] for i in best))
  chance = dsir.kl_reduction([goal], raw, dsir.count(hashed[i] for i in range(30, 60)))
  assert gain > 0.3 > chance


def test_shares_of_several_targets():
  counts = lambda n: dsir.Counts(np.array([n]))
  assert dsir.shares(10, {'a': counts(1), 'b': counts(1), 'c': counts(1)}) == {
    'a': 3, 'b': 3, 'c': 4,
  }  # fmt: skip


def test_errors():
  counts, empty = dsir.count(_buckets(_documents(0))), dsir.Counts(np.zeros(10_000, np.int64))
  for call, message in (
    (lambda: dsir.log_ratio(empty, counts), 'target has no n-grams: the corpus is empty'),
    (lambda: dsir.log_ratio(counts, empty), 'raw has no n-grams'),
    (lambda: dsir.log_ratio(counts, counts, eps=0), r'eps=0 greater than 0'),
    (lambda: dsir.log_ratio(counts, dsir.Counts(np.ones(3))), 'target has 10000 buckets, raw 3'),
    (lambda: counts.merge(dsir.Counts(np.ones(3))), 'do not add up'),
    (lambda: dsir.Hasher(order=0), 'order=0'),
    (lambda: dsir.kl_reduction([], counts, counts), 'targets is empty'),
    (lambda: dsir.kl_reduction([counts], counts, empty), 'selected has no n-grams'),
    (lambda: dsir.shares(3, {'a': empty}), 'no target has n-grams'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
