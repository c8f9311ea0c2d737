"""Shares by name: what data.mixture may say, and files that carry weights from run to run."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments import files
from experiments.data import mixture
from experiments.errors import UserError

DOMAINS, SIZES = ('web', 'code', 'qa'), (50, 20, 30)
TOKENIZER = {'name': 'byte', 'sha256': 'b' * 64}


def corpus(domains=DOMAINS, sizes=SIZES, tokenizer=TOKENIZER):
  return types.SimpleNamespace(
    domains=domains,
    sizes=lambda split: np.asarray(sizes),
    meta={'tokenizer': tokenizer},
    fingerprint='f' * 64,
    seq_len=16,
  )


def refuses(text, part, here=None):
  with pytest.raises(UserError) as error:
    mixture.parse(str(text), here or corpus())
  assert part in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('uniform', [1 / 3, 1 / 3, 1 / 3]),
    ('natural', [0.5, 0.2, 0.3]),
    ('web=0.5,code=0.5', [0.5, 0.5, 0]),
    ('qa=2, web = 6', [0.75, 0, 0.25]),
    ('uniform except qa', [0.5, 0.5, 0]),
    ('natural except code', [5 / 8, 0, 3 / 8]),
    ('uniform except web+qa', [0, 1, 0]),
  ],
)
def test_mixtures(text, expected):
  np.testing.assert_allclose(mixture.parse(text, corpus()), expected)


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('web=0.5,cod=0.5', "no domain 'cod'; did you mean 'code'"),
    ('even', "does not parse at 'even'"),
    ('web=0.5,', "does not parse at ''"),
    ('web=half', "'web=half' needs a finite share"),
    ('web=-1,code=2', "'web=-1' needs"),
    ('web=nan', "'web=nan' needs"),
    ('web=0', 'sums to 0'),
    ('uniform except cod', "no domain 'cod'; did you mean 'code'"),
    ('uniform except web+code+qa', 'sums to 0'),
  ],
)
def test_bad_mixtures(text, part):
  refuses(text, part)


def test_mixture_of_an_empty_domain():
  empty = corpus(sizes=(50, 20, 0))
  refuses('uniform', "domain 'qa' has no blocks", empty)
  np.testing.assert_allclose(mixture.parse('web=1', empty), [1, 0, 0])


def test_planned_examples_and_their_limit():
  plan = lambda steps, max_epochs=0: mixture.planned_examples(
    corpus(),
    batch_size=10,
    total_steps=steps,
    proportions=np.array([0.5, 0.4, 0.1]),
    max_epochs=max_epochs,
  )
  assert list(plan(10)) == list(DOMAINS)
  assert [p.rows for p in plan(10).values()] == pytest.approx([50, 40, 10])
  assert [p.epochs for p in plan(10).values()] == pytest.approx([1, 2, 1 / 3])
  # code stops at its 20 blocks; the 20 rows it would have had go to the others 5 : 1
  assert [p.rows for p in plan(7, 1).values()] == pytest.approx([50 * 5 / 6, 20, 50 / 6])
  with pytest.raises(UserError, match=r'config\.mixture\.max_epochs=1: .* 100 records left'):
    plan(11, 1)


# Files


@pytest.fixture
def written(tmp_path):
  """Weights of one run, with what it takes to use them in another."""
  path = tmp_path / 'mixture.json'
  mixture.write(
    path,
    corpus(),
    [0.2, 0.5, 0.3],
    made_by={'method': 'doremi'},
    epochs={'web': 0.5, 'code': 4.0, 'qa': 1.0},
  )
  return path


def test_weights_are_found_by_name_and_not_by_position(written):
  other = corpus(('qa', 'web', 'code'), (5, 6, 7))
  np.testing.assert_allclose(mixture.parse(str(written), other), [0.3, 0.2, 0.5])


def test_a_file_says_where_its_weights_come_from(written):
  stored = files.read_json(written)
  assert stored['corpus'] == {
    'fingerprint': 'f' * 64,
    'tokenizer': TOKENIZER,
    'seq_len': 16,
    'sizes': dict(zip(DOMAINS, SIZES)),
  }
  assert stored['made_by'] == {'method': 'doremi'}


def test_a_domain_that_vanished(written):
  refuses(
    written, "weight for 'code', which is not among the domains", corpus(('web', 'qa'), (1, 1))
  )


def test_a_domain_that_is_new(written):
  refuses(written, "no weight for the domain 'law'", corpus((*DOMAINS, 'law'), (1, 1, 1, 1)))


def test_weights_from_another_tokenizer(written):
  bpe = {'name': 'bpe:4096', 'sha256': 'c' * 64}
  refuses(written, "made with the tokenizer 'byte'", corpus(tokenizer=bpe))


@pytest.mark.parametrize(
  ('content', 'part'),
  [
    ({'weights': {'web': 0.5, 'code': 0.3, 'qa': 0.1}}, 'sum to 0.9; they must sum to 1'),
    ({'weights': {'web': 1.5, 'code': -0.5, 'qa': 0}}, "weight of 'code' is -0.5"),
    ({'weights': {'web': None, 'code': 1, 'qa': 0}}, "weight of 'web' is None"),
    ({'weights': {}}, 'is not a mixture file'),
    ([0.2, 0.5, 0.3], 'is not a mixture file'),
  ],
)
def test_files_that_are_wrong(tmp_path, content, part):
  files.write_json(tmp_path / 'm.json', content)
  refuses(tmp_path / 'm.json', part)


def test_a_truncated_file(written):
  written.write_text(written.read_text()[:40])
  refuses(written, 'is not valid JSON')


def test_published_weights_by_name_alone(tmp_path):
  """Rounded, without a corpus: accepted."""
  files.write_json(tmp_path / 'm.json', {'weights': {'web': 0.2, 'code': 0.5004, 'qa': 0.3}})
  np.testing.assert_allclose(mixture.parse(str(tmp_path / 'm.json'), corpus()).sum(), 1)


def test_remarks_on_rare_domains_and_on_repetition(written):
  planned = {
    'web': mixture.Planned(0.01, 0.0002),
    'code': mixture.Planned(20, 1.0),
    'qa': mixture.Planned(50, 1.7),
  }
  assert mixture.remarks('uniform', {'qa': planned['qa']}) == []
  rare, repeated = mixture.remarks(str(written), planned)
  assert 'web (0.01)' in rare
  assert 'code 4 times there and 1 times here' in repeated
  assert 'qa' not in repeated
