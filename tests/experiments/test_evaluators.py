"""Per-domain sums against a NumPy loop, and the ratios against their definitions."""

import json
import math
from functools import partial

import jax
import numpy as np
import pytest

from experiments import mesh as mesh_lib
from experiments.evaluators import language

DOMAINS = ('code', 'docs', 'tables')


def table_losses(params, batch):
  """A model without any modelling: the loss of a token is looked up."""
  return params[batch['tokens'][:, 1:]]


def make_batch(seed, rows=8, length=5, padding=0):
  rng = np.random.default_rng(seed)
  base = (rng.random((rows, length)) < 0.8).astype(np.float32)
  batch = {
    'tokens': rng.integers(0, 20, (rows, length + 1)).astype(np.int32),
    'base': base,
    'domain_id': rng.integers(0, 2, rows).astype(np.int32),
    'num_bytes': rng.integers(5, 15, rows).astype(np.float32),
  }
  if padding:
    for name in ('base', 'domain_id', 'num_bytes'):
      batch[name][-padding:] = 0
  return batch


@pytest.fixture(scope='module')
def params():
  return np.random.default_rng(9).random(20).astype(np.float32)


def numpy_sums(params, batches):
  sums = np.zeros((3, 3))
  for batch in batches:
    for row in range(len(batch['base'])):
      if not batch['base'][row].any():
        continue
      domain = batch['domain_id'][row]
      for t, valid in enumerate(batch['base'][row]):
        if valid:
          sums[domain, 0] += float(params[batch['tokens'][row, t + 1]])
          sums[domain, 1] += 1
      sums[domain, 2] += batch['num_bytes'][row]
  return sums


def run(params, batches, to_global=lambda batch: batch):
  step = jax.jit(language.make_eval_step(table_losses, 3))
  return language.evaluate(step, params, iter(batches), to_global, DOMAINS)


def test_sums_equal_a_numpy_loop(params):
  batch = make_batch(0)
  sums = jax.jit(language.make_eval_step(table_losses, 3))(params, batch)
  assert sums.dtype == np.float32
  np.testing.assert_allclose(sums, numpy_sums(params, [batch]), rtol=1e-6)


def test_summary_equals_its_definition(params):
  batches = [make_batch(seed) for seed in range(4)]
  summary = run(params, batches)
  sums = numpy_sums(params, batches)
  for row, name in enumerate(DOMAINS[:2]):
    nats, targets, size = sums[row]
    assert summary['bpb'][name] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert summary['loss'][name] == pytest.approx(nats / targets, rel=1e-6)
    assert summary['ppl'][name] == pytest.approx(math.exp(nats / targets), rel=1e-6)
  nats, targets, size = sums.sum(0)
  assert summary['micro_bpb'] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
  assert summary['micro_loss'] == pytest.approx(nats / targets, rel=1e-6)
  assert summary['macro_bpb'] == pytest.approx(np.mean(list(summary['bpb'].values())))
  assert summary['macro_loss'] == pytest.approx(np.mean(list(summary['loss'].values())))
  assert summary['worst_bpb'] == max(summary['bpb'].values())
  assert summary['bpb'][summary['worst_domain']] == summary['worst_bpb']
  assert summary['tokens'] == targets
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_one_bit_for_every_byte_is_one():
  # 10 targets of ln 2 nats that stand for 10 bytes; then for 25.
  one = language.summarize(np.array([[10 * math.log(2), 10, 10]]), ['a'])
  assert one['bpb']['a'] == pytest.approx(1.0)
  assert one['ppl']['a'] == pytest.approx(2.0)
  fewer = language.summarize(np.array([[10 * math.log(2), 10, 25]]), ['a'])
  assert fewer['bpb']['a'] == pytest.approx(0.4)


def test_micro_follows_the_bytes_and_macro_does_not():
  sums = np.array([[1 * math.log(2), 1, 1], [2 * 99 * math.log(2), 99, 99]])
  summary = language.summarize(sums, ['small', 'large'])
  assert summary['macro_bpb'] == pytest.approx(1.5)
  assert summary['micro_bpb'] == pytest.approx(1.99)
  assert (summary['worst_domain'], summary['worst_bpb']) == ('large', pytest.approx(2.0))


def test_a_domain_without_targets_is_left_out(params):
  summary = run(params, [make_batch(0)])  # no row is of the third domain
  assert set(summary['bpb']) == {'code', 'docs'} == set(summary['loss'])


def test_padding_rows_count_nowhere_whatever_they_hold(params):
  plain = [make_batch(0, padding=3)]
  filled = [jax.tree.map(np.copy, plain[0])]
  filled[0]['tokens'][-3:] = 19
  filled[0]['num_bytes'][-3:] = 1e6
  filled[0]['domain_id'][-3:] = 1
  poisoned = params.copy()
  poisoned[19] = np.nan
  filled[0]['tokens'][:-3] = np.minimum(filled[0]['tokens'][:-3], 18)
  plain[0]['tokens'] = np.minimum(plain[0]['tokens'], 18)
  assert run(poisoned, filled) == run(params, plain)


def test_batch_size_does_not_matter(params):
  whole = make_batch(3, rows=12)
  split = [jax.tree.map(lambda leaf, i=i: leaf[4 * i : 4 * i + 4], whole) for i in range(3)]
  one, many = run(params, [whole]), run(params, split)
  assert one['tokens'] == many['tokens']
  assert one['macro_bpb'] == pytest.approx(many['macro_bpb'], rel=1e-6)


def test_eight_devices_equal_one(params):
  mesh = mesh_lib.make_mesh(2, 4)
  batches = [make_batch(seed) for seed in range(2)]
  spread = run(params, batches, partial(mesh_lib.to_global, mesh=mesh))
  alone = run(params, batches)
  assert spread['tokens'] == alone['tokens']
  assert spread['macro_bpb'] == pytest.approx(alone['macro_bpb'], rel=1e-6)


def test_totals_do_not_lose_small_batches():
  # In float32, 2**24 + 1 == 2**24: a million targets would vanish one by one.
  step = lambda params, batch: np.array([[1.0, 1.0, 1.0]]) * batch
  batches = [np.float32(2**24), *[np.float32(1)] * 100]
  summary = language.evaluate(step, None, batches, lambda batch: batch, ['a'])
  assert summary['tokens'] == 2**24 + 100


def test_nothing_to_evaluate_is_an_error(params):
  with pytest.raises(ValueError, match='no batch held a valid target'):
    run(params, [])
