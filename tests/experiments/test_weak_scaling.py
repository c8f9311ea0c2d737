"""What grows with the devices, counted; the numbers of the documents come from this program."""

from __future__ import annotations

import pytest

from experiments.bench import weak_scaling
from experiments.errors import UserError
from tests.experiments import small


@pytest.fixture(scope='module')
def record(tmp_path_factory):
  base = tmp_path_factory.mktemp('weak')
  config = small.config(small.write_corpus(base / 'text'), base / 'data')
  return weak_scaling.measure(config, ['data', 'fsdp'], [1, 2, 4], 2)


@pytest.mark.slow
def test_nothing_but_communication_grows(record):
  alone = record[0]
  assert alone['collectives'] == 0
  for row in record:
    assert row['matmul_flops'] == alone['matmul_flops']
    assert row['temporary_bytes'] < 1.2 * alone['temporary_bytes']


def test_the_gradient_of_copies_is_one_reduction_of_its_size(record):
  """A ring of n receives 2 (n - 1) / n of it; the rest is a few numbers for each row and step."""
  copies = [row for row in record if row['layout'] == 'data']
  # The state has two moments, too. The token table, of 257 bytes, counts as input and as output.
  gradient = copies[0]['state_bytes'] / 3 + 4 * 257 * 32
  for row in copies[1:]:
    n = row['devices']
    assert row['received']['gradients'] == pytest.approx(2 * (n - 1) / n * gradient, rel=0.01)
    assert row['received']['parameters'] == 0
    assert row['received']['rows'] == 3 * 4 * 2 * (n - 1)  # three numbers of each of the 2 n rows
    assert row['received']['sums'] < 100
  assert copies[1]['collectives'] == copies[2]['collectives']


def test_shards_hold_less_and_gather(record):
  shards = [row for row in record if row['layout'] == 'fsdp']
  assert shards[2]['state_bytes'] < 0.5 * shards[0]['state_bytes']
  assert 0 < shards[1]['received']['parameters'] < shards[2]['received']['parameters']
  assert shards[1]['collectives'] == shards[2]['collectives']


def test_the_table_has_a_line_for_each(record):
  lines = weak_scaling.format_table(record).splitlines()
  assert [line.split()[:2] for line in lines if line.startswith(('data', 'fsdp'))] == [
    [row['layout'], str(row['devices'])] for row in record
  ]


@pytest.mark.parametrize(
  ('layouts', 'counts', 'message'),
  [(['rows'], [1], '--layouts=rows: must be among'), (['data'], [99], '--devices=99: there are 8')],
)
def test_mistakes_are_one_line(layouts, counts, message, tmp_path):
  config = small.config(tmp_path, tmp_path)
  with pytest.raises(UserError, match=message):
    weak_scaling.measure(config, layouts, counts, 2)
