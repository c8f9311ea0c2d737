"""Batches are the same on any number of processes and resume exactly."""

import json
import os
import threading
import time

import numpy as np
import pytest

from experiments.data import pipeline
from experiments.data.corpus import open_corpus
from experiments.errors import UserError
from tests.experiments.fake_data import data_config, words, write_corpus, write_jsonl

SHARES = np.array([0.5, 0.3, 0.2])


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  root = tmp_path_factory.mktemp('pipeline')
  return open_corpus(data_config(path=str(write_corpus(root / 'text')), root=str(root)))


def iterate(corpus, **overrides):
  kwargs = dict(batch_size=8, seed=0, proportions=SHARES, prefetch=2)
  return pipeline.train_iterator(corpus, **{**kwargs, **overrides})


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(batches, others):
  assert len(batches) == len(others)
  for a, b in zip(batches, others):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_batch_is_what_the_loop_expects(corpus):
  batch = next(iterate(corpus))
  assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
    'tokens': ((8, 17), 'int32'),
    'base': ((8, 16), 'float32'),
    'domain_id': ((8,), 'int32'),
    'example_id': ((8,), 'int32'),
    'sampling_prob': ((8,), 'float32'),
    'num_bytes': ((8,), 'float32'),
  }
  np.testing.assert_array_equal(
    batch['sampling_prob'], SHARES.astype(np.float32)[batch['domain_id']]
  )
  for row in range(8):
    domain_id, index = corpus.locate(int(batch['example_id'][row]))
    assert domain_id == batch['domain_id'][row]
    np.testing.assert_array_equal(
      batch['tokens'][row], corpus.read('train', domain_id, index)['tokens']
    )


def test_an_epoch_visits_every_block_once(corpus):
  size = int(corpus.sizes('train')[2])
  iterator = iterate(corpus, proportions=[0, 0, 1], batch_size=4)
  batches = take(iterator, size // 2)  # nearly two epochs
  index = np.concatenate([batch['example_id'] for batch in batches]) - corpus.offsets('train')[2]
  first, second = index[:size], index[size:]
  assert sorted(first) == list(range(size))
  assert len(set(second)) == second.size
  assert first[: second.size].tolist() != second.tolist()


def part(index, count):
  """The rows of one of several processes that hold equal parts of a batch."""
  return lambda rows: np.array_split(np.arange(rows), count)[index]


@pytest.mark.parametrize('processes', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(corpus, processes):
  whole = take(iterate(corpus), 5)
  parts = [iterate(corpus, local_rows=part(i, processes)) for i in range(processes)]
  local = [take(part, 5) for part in parts]
  joined = [
    {key: np.concatenate([batches[t][key] for batches in local]) for key in whole[0]}
    for t in range(5)
  ]
  assert_same(joined, whole)
  assert all(part.get_state() == parts[0].get_state() for part in parts)
  # A restart on another number of processes goes on with the same global batches.
  single = iterate(corpus)
  single.set_state(json.loads(json.dumps(parts[-1].get_state())))
  expected = take(iterate(corpus), 7)[5:]
  assert_same(take(single, 2), expected)


@pytest.mark.parametrize('prefetch', [0, 1, 5])
def test_state_is_that_of_the_last_batch_handed_out(corpus, prefetch):
  iterator = iterate(corpus, prefetch=prefetch)
  for step in range(4):
    assert iterator.get_state()['step'] == step
    assert sum(iterator.get_state()['used']) == 8 * step
    next(iterator)
    time.sleep(0.02)  # let the reader run ahead
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 6)
  resumed = iterate(corpus, prefetch=prefetch)
  resumed.set_state(state)
  assert resumed.get_state() == state
  assert_same(take(resumed, 6), expected)
  iterator.set_state(state)  # also on an iterator that has read ahead
  assert_same(take(iterator, 6), expected)
  iterator.close()
  resumed.close()


def test_seeds_give_other_batches(corpus):
  a, b = next(iterate(corpus, seed=0)), next(iterate(corpus, seed=1))
  assert a['example_id'].tolist() != b['example_id'].tolist()


def test_state_of_other_data_is_refused(corpus, tmp_path):
  other = open_corpus(
    data_config(path=str(write_corpus(tmp_path, documents=5)), root=str(tmp_path))
  )
  state = iterate(corpus).get_state()
  with pytest.raises(UserError, match=r'made with other data') as error:
    iterate(other, prefetch=0).set_state(state)
  assert '\n' not in str(error.value)


def test_damage_found_while_reading_ahead_reaches_the_loop(corpus, monkeypatch):
  def damaged(*args):
    raise UserError('the prepared data are damaged')

  iterator = iterate(corpus)
  next(iterator)
  monkeypatch.setattr(corpus, 'rows', damaged)
  with pytest.raises(UserError, match=r'damaged'):
    take(iterator, 10)


def test_evaluation_sees_every_block_once(corpus):
  batches = list(pipeline.eval_batches(corpus, split='validation', batch_size=5))
  assert {key: value.shape for key, value in batches[-1].items()} == {
    key: value.shape for key, value in batches[0].items()
  }
  assert 'sampling_prob' in batches[0]
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  ids, real = joined['example_id'], joined['example_id'] >= 0
  assert ids[real].tolist() == list(range(corpus.sizes('validation').sum()))
  assert not np.any(joined['base'][~real])
  assert not np.any(joined['num_bytes'][~real])
  assert not np.any(joined['domain_id'][~real])
  assert (~real).sum() == -real.sum() % 5
  meta = corpus.meta['splits']['validation']
  for k, domain in enumerate(corpus.domains):
    mine = real & (joined['domain_id'] == k)
    assert joined['num_bytes'][mine].sum() == meta['bytes'][domain]
    assert joined['base'][mine].sum() == meta['tokens'][domain]


def test_evaluation_of_a_few_blocks_spreads_them(corpus):
  (batch,) = pipeline.eval_batches(corpus, split='validation', batch_size=16, max_blocks=4)
  for k, size in enumerate(corpus.sizes('validation')):
    index = batch['example_id'][(batch['domain_id'] == k) & (batch['example_id'] >= 0)]
    index = index - corpus.offsets('validation')[k]
    assert index.tolist() == [0, size // 4, size // 2, 3 * size // 4]


def test_evaluation_is_the_same_on_two_processes(corpus):
  kwargs = dict(split='validation', batch_size=6, max_blocks=5)
  whole = list(pipeline.eval_batches(corpus, **kwargs))
  halves = [list(pipeline.eval_batches(corpus, **kwargs, local_rows=part(i, 2))) for i in range(2)]
  joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves)]
  assert_same(joined, whole)


def test_weights_reach_the_training_batch_only(tmp_path):
  for split in ('train', 'validation'):
    records = [{'text': 'abcdef' * 9, 'weight': 3.0, 'id': str(i)} for i in range(3)]
    write_jsonl(tmp_path / f'web.{split}.jsonl', records)
  corpus = open_corpus(data_config(path=str(tmp_path), root=str(tmp_path / 'p')))
  batch = next(iterate(corpus, proportions=[1.0]))
  assert batch['weights'].dtype == np.float32
  np.testing.assert_array_equal(batch['weights'], 3 * batch['base'])
  (evaluation,) = pipeline.eval_batches(corpus, split='validation', batch_size=32)
  assert 'weights' not in evaluation


def test_many_domains_need_few_files_threads_and_bytes(tmp_path):
  """300 domains, prepared and read with another mixture in every step: as many open files and
  threads as three, and no state that grows with domains but a few numbers each."""
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(300):
    for split in ('train', 'validation'):
      (folder / f'd{i:03d}.{split}.jsonl').write_text(json.dumps({'text': words(i, 30)}) + '\n')
  count = lambda: (len(os.listdir('/proc/self/fd')), threading.active_count())
  files_before, threads_before = count()
  corpus = open_corpus(data_config(path=str(folder), root=str(tmp_path / 'p')))
  live = np.random.default_rng(0).dirichlet(np.ones(300), size=4)
  batches = pipeline.train_iterator(
    corpus, batch_size=32, seed=0, proportions=live[0], live=lambda step: live[step % 4]
  )
  seen = {int(d) for _ in range(20) for d in next(batches)['domain_id']}
  assert len(seen) > 150
  files_after, threads_after = count()
  assert files_after - files_before <= 8
  assert threads_after - threads_before <= 8
  assert len(json.dumps(batches.get_state())) < 300 * 8


@pytest.mark.parametrize('hosts', [2, 4])
def test_live_batches_are_the_same_on_any_number_of_hosts(corpus, hosts):
  live = np.random.default_rng(1).dirichlet(np.ones(3), size=6)
  read = lambda index, count: pipeline.train_iterator(
    corpus,
    batch_size=8,
    seed=3,
    proportions=live[0],
    live=lambda step: live[step],
    local_rows=part(index, count),
    prefetch=0,
  )
  whole, parts = read(0, 1), [read(i, hosts) for i in range(hosts)]
  for _ in range(6):
    expected, got = next(whole), [next(part) for part in parts]
    for name, value in expected.items():
      np.testing.assert_array_equal(np.concatenate([g[name] for g in got]), value)


def test_many_domains_stay_cheap(corpus):
  """The state of 4,096 domains is copied with every batch; it must not dominate."""
  planner = pipeline.planning.Planner([100] * 4096, 64, np.ones(4096), seed=0)
  iterator = iter(pipeline._Plans(planner, 'fingerprint', lambda step: None))
  start = time.perf_counter()
  for _ in range(20):
    next(iterator)
    json.dumps(iterator.get_state())
  assert (time.perf_counter() - start) / 20 < 0.05
