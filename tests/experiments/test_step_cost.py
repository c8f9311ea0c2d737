"""The exact half of the step-cost benchmark: what a weighting adds to the compiled step."""

from __future__ import annotations

import jax
import pytest

from experiments.bench import step_cost
from tests.experiments import small


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  base = tmp_path_factory.mktemp('cost')
  return small.config(small.write_corpus(base / 'corpus'), base / 'prepared')


def test_linupper_adds_two_tiny_collectives_and_no_matmul(config):
  uniform, same, linupper = step_cost.count(
    config, ['uniform', 'uniform', 'linupper:0.4'], jax.devices()[:8]
  )
  assert uniform == same
  assert linupper['matmul_flops'] == uniform['matmul_flops'] > 0
  assert [(c['kind'], c['bytes'], c['count']) for c in linupper['extra']] == [
    ('all-reduce', 8, 1),  # max of the pair (l, -l)
    ('all-reduce', 8, 1),  # the sums that normalize
  ]


def test_global_scope_costs_one_more_forward_pass(config):
  whole, by_microbatch, in_all = step_cost.count_accumulation(
    config, 'linupper:0.4', 2, jax.devices()[:1]
  )
  assert by_microbatch['matmul_flops'] == whole['matmul_flops']
  extra = in_all['matmul_flops'] / whole['matmul_flops']
  assert extra == pytest.approx(4 / 3, rel=0.02)


def test_times_come_with_intervals(config):
  rows = step_cost.measure(config, ['uniform', 'linupper:0.4'], 3, jax.devices()[:1])
  assert rows[0]['ratio'] == 1.0
  assert rows[1]['low'] < rows[1]['ratio'] < rows[1]['high']


def test_the_tables_name_what_is_extra():
  counts = {'devices': 8, 'matmul_flops': 2e6, 'temp_bytes': 3e6, 'collectives': 5}
  extra = {'kind': 'all-reduce', 'bytes': 8, 'count': 1, 'name': 'reduce_max'}
  counted = [{'weighting': 'uniform', 'extra': [], **counts}]
  counted.append({'weighting': 'linupper:0.4', 'extra': [extra], **counts})
  times = {'rounds': 9, 'median_ms': 5.0, 'ratio': 1.01, 'low': 0.99, 'high': 1.03}
  accumulated = {'weighting': 'linupper:0.4', 'scope': 'global', 'matmul_flops': 2e6}
  table = step_cost.format_table(
    counted,
    [{'weighting': row['weighting'], **times} for row in counted],
    [{'microbatches': m, 'temp_bytes': 3e6, **accumulated} for m in (1, 4)],
  )
  assert '1 x all-reduce of 8 B (reduce_max)' in table
  assert '[0.9900, 1.0300]' in table
