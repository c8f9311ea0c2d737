"""DSIR: published hashes, the public package's log weights, and its formulas in a loop."""

import collections
import hashlib
import sys

import numpy as np
import pytest

from jaxrw.scores import dsir

WORDS = 'the a of alice went to store and bought seven red apples from bob who did not mind'.split()


def _documents(seed, number=30, length=40):
  rng = np.random.default_rng(seed)
  p = rng.dirichlet(np.full(len(WORDS), 0.5))
  return [' '.join(rng.choice(WORDS, length, p=p)) + '.' for _ in range(number)]


def _buckets(text, order=2, size=10_000):
  """The definition, one n-gram at a time."""
  words = dsir.tokenize(text)
  grams = [' '.join(words[i : i + n]) for n in range(1, order + 1)
           for i in range(len(words) - n + 1)]  # fmt: skip
  return [int(hashlib.sha256(g.encode()).hexdigest(), 16) % size for g in grams]


def _count(documents, **settings):
  return dsir.Hasher(**settings).count(documents)


def test_hashes_that_the_package_publishes():
  hasher = dsir.Hasher()
  assert list(hasher.buckets_of('alice')) == [6720]
  assert list(hasher.buckets_of('Alice went'))[-1] == 114
  assert len(hasher.buckets_of('Alice went to the store')) == 9


def test_tokens():
  assert dsir.tokenize("It's 5.5%,\nnaïve_x (ÉTÉ)") == [
    *('it', "'", 's', '5', '.', '5', '%,'), *('naïve_x', '(', 'été', ')'),
  ]  # fmt: skip
  assert dsir.tokenize('  \n') == []


TEXTS = (
  "Alice didn't go to the STORE -- for 5.5%, (naïve_x).",
  'Ünïcödé ÉTÉ İstanbul \u1680 x\u2028y ½ ² 中文分词,测试 ١٢٣ 😀😀 a😀b',
  'a ' * 5 + 'b' * 54 + ' ' + 'c' * 55 + ' ' + 'd' * 56 + ' ' + 'é' * 40,
  '', '  \n', '.', 'x',
)  # fmt: skip


@pytest.mark.parametrize('order', [1, 2, 3])
def test_buckets_are_a_loop(order):
  hasher = dsir.Hasher(order, 9973)
  for _ in range(2):  # new, then remembered
    for text in TEXTS:
      np.testing.assert_array_equal(hasher.buckets_of(text), _buckets(text, order, 9973))


def test_every_character_is_of_the_kind_that_the_expression_says():
  """One text of all characters, each between blanks and each behind a letter."""
  points = [i for i in range(1, sys.maxunicode, 7) if not 0xD800 <= i < 0xE000]
  text = ' '.join(map(chr, points)) + ' ' + 'a'.join(map(chr, points))
  found = dsir._words([text])
  words = [found.data[a:b].tobytes().decode() for a, b in zip(found.starts, found.ends)]
  assert words == dsir.tokenize(text)


def test_half_a_surrogate_pair_does_not_stop_the_job():
  """JSON may hold one; it cannot be encoded, and the package fails."""
  assert len(dsir.Hasher().buckets_of('a \ud800 b')) == 5


@pytest.mark.parametrize('order', [2, 3])
def test_thousands_of_new_ngrams_are_hashed_at_once(order):
  rng = np.random.default_rng(1)
  letters = np.array(list('abcdefgé'))
  words = [''.join(rng.choice(letters, rng.integers(1, 28))) for _ in range(4000)]
  text = ' '.join(words)
  np.testing.assert_array_equal(dsir.Hasher(order).buckets_of(text), _buckets(text, order))


def test_what_is_remembered_and_what_comes_along_change_nothing(monkeypatch):
  documents = [*TEXTS, *_documents(0, 200)]
  ratio = np.random.default_rng(0).normal(size=10_000)
  alone = [dsir.Hasher().score([text], ratio) for text in documents]
  tiny = dsir.Hasher(remembered=2)
  monkeypatch.setattr(dsir, '_BATCH', 500)
  for hasher in (tiny, dsir.Hasher()):
    together = hasher.score(iter(documents), ratio)
    np.testing.assert_array_equal(together.log_weights, [s.log_weights[0] for s in alone])
    np.testing.assert_array_equal(together.words, [len(dsir.tokenize(t)) for t in documents])


@pytest.mark.parametrize('order', [1, 3])
def test_hashed_once_is_the_same_as_read_twice(monkeypatch, order):
  documents = [*TEXTS, *_documents(0, 50)]
  monkeypatch.setattr(dsir, '_BATCH', 500)
  hashed = dsir.Hasher(order).hash(iter(documents))
  assert len(hashed.parts) > 3
  grams = [_buckets(text, order) for text in documents]
  ngrams = np.bincount(np.concatenate(grams).astype(int), minlength=10_000)
  for counts in (hashed.count(), dsir.Hasher(order).count(documents)):
    np.testing.assert_array_equal(counts.ngrams, ngrams)
    assert counts.documents == len(documents)
  ratio = np.random.default_rng(0).normal(size=10_000)
  found, twice = hashed.score(ratio), dsir.Hasher(order).score(documents, ratio)
  np.testing.assert_array_equal(found.log_weights, twice.log_weights)
  np.testing.assert_array_equal(found.words, twice.words)
  np.testing.assert_allclose(found.log_weights, [ratio[g].sum() for g in grams], atol=1e-10)
  assert sum(part[0].nbytes for parts in hashed.parts for part in parts) == 2 * ngrams.sum()


def test_no_texts():
  hashed, ratio = dsir.Hasher().hash([]), np.zeros(10_000)
  assert hashed.count().documents == 0
  for scored in (hashed.score(ratio), dsir.Hasher().score([], ratio)):
    assert scored.log_weights.shape == scored.words.shape == (0,)


def test_weights_are_a_loop():
  target, raw = _documents(0), _documents(1)
  ratio = dsir.log_ratio(_count(target), _count(raw), smoothing=0.5)
  totals = [collections.Counter(j for text in d for j in _buckets(text)) for d in (target, raw)]
  p = np.array([totals[0][j] + 0.5 for j in range(10_000)])
  q = np.array([totals[1][j] for j in range(10_000)])
  found = dsir.Hasher().score(raw[:5], ratio)
  for i, text in enumerate(raw[:5]):
    ids = _buckets(text)
    terms = [np.log(p[j] / p.sum() + 1e-8) - np.log(q[j] / q.sum() + 1e-8) for j in ids]
    np.testing.assert_allclose(found.log_weights[i], sum(terms), rtol=1e-12)
    np.testing.assert_allclose(found.per_ngram()[i], np.mean(terms), rtol=1e-12)


def test_features_are_the_packages():
  """`data-selection` 1.0.3, where it is installed (extra `peers`)."""
  package = pytest.importorskip('data_selection.hashed_ngram_dsir')
  for text in [*TEXTS, *_documents(2)]:
    expected = package.get_ngram_counts(text, n=2, num_buckets=10_000)
    np.testing.assert_array_equal(_count([text]).ngrams, expected)


def test_the_same_corpus_has_weights_of_one():
  counts = _count(_documents(3))
  assert np.all(dsir.log_ratio(counts, counts) == 0)
  assert dsir.kl_reduction([counts], counts, counts) == 0


def test_counts_of_shards_add_up_in_any_order():
  documents = _documents(4)
  whole = _count(documents)
  a, b, c = (_count(documents[i::3]) for i in range(3))
  for merged in (a.merge(b).merge(c), c.merge(a.merge(b))):
    np.testing.assert_array_equal(merged.ngrams, whole.ngrams)
    assert merged.documents == whole.documents == 30


def test_unigram_weights_add_up_over_documents():
  """Bigrams cross the seam; words do not."""
  hasher = dsir.Hasher(order=1)
  ratio = dsir.log_ratio(hasher.count(_documents(5)), hasher.count(_documents(6)), smoothing=1.0)
  first, second = _documents(7)[:2]
  found = hasher.score([first, second, f'{first} {second}'], ratio)
  np.testing.assert_allclose(found.log_weights[2], found.log_weights[:2].sum(), rtol=1e-12)


def test_selecting_by_weight_comes_nearer_to_the_target():
  target, mixed = _documents(8, 60), _documents(8, 30) + _documents(9, 270)
  goal, raw = _count(target), _count(mixed)
  weights = dsir.Hasher().score(mixed, dsir.log_ratio(goal, raw)).log_weights
  best = np.argsort(weights)[-30:]
  assert np.mean(best < 30) > 0.95
  gain = dsir.kl_reduction([goal], raw, _count(mixed[i] for i in best))
  chance = dsir.kl_reduction([goal], raw, _count(mixed[30:60]))
  assert gain > 0.3 > chance


def test_shares_of_several_targets():
  counts = lambda n: dsir.Counts(np.array([n]))
  assert dsir.shares(10, {'a': counts(1), 'b': counts(1), 'c': counts(1)}) == {
    'a': 3, 'b': 3, 'c': 4,
  }  # fmt: skip


def test_errors():
  counts, empty = _count(_documents(0)), dsir.Counts(np.zeros(10_000, np.int64))
  for call, message in (
    (lambda: dsir.log_ratio(empty, counts), 'target has no n-grams: the corpus is empty'),
    (lambda: dsir.log_ratio(counts, empty), 'raw has no n-grams'),
    (lambda: dsir.log_ratio(counts, counts, eps=0), r'eps=0 greater than 0'),
    (lambda: dsir.log_ratio(counts, dsir.Counts(np.ones(3))), 'target has 10000 buckets, raw 3'),
    (lambda: counts.merge(dsir.Counts(np.ones(3))), 'do not add up'),
    (lambda: dsir.Hasher(order=0), 'order=0'),
    (lambda: dsir.Hasher(buckets=1 << 17), 'buckets=131072'),
    (lambda: dsir.Hasher().score(['a'], np.ones(3)), r'ratio has shape \(3,\)'),
    (lambda: dsir.Hasher().score([], np.ones(3)), r'ratio has shape \(3,\)'),
    (lambda: dsir.kl_reduction([], counts, counts), 'targets is empty'),
    (lambda: dsir.kl_reduction([counts], counts, empty), 'selected has no n-grams'),
    (lambda: dsir.shares(3, {'a': empty}), 'no target has n-grams'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
