"""Sources and votes, against a plain loop; nothing of the test questions is seen in training."""

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments import plots
from experiments.errors import UserError
from experiments.retrieval import __main__ as program
from experiments.retrieval import study


def lists_of(rng, questions=30, sources=12, ranks=9):
  """Sources occur twice in some lists, and some lists are shorter."""
  rows = []
  for _ in range(questions):
    size = int(rng.integers(3, ranks + 1))
    ids = rng.integers(0, sources, size)
    given = rng.integers(0, 4, size)
    codes = {}
    rows.append((ids, [codes.setdefault(a, len(codes)) for a in given.tolist()], given == 0))
  return study._lists(rows, np.arange(sources) // 2)


def by_hand(lists, weights, votes, row):
  total, order, left = Counter(), [], votes
  for rank in range(lists.ids.shape[1]):
    if weights[row, rank] > 0 and left:
      code = int(lists.answers[row, rank])
      total[code] += weights[row, rank]
      order += [code] if code not in order else []
      left -= 1
  if not order:
    return False
  winner = max(order, key=lambda code: (round(total[code], 9), -order.index(code)))
  listed = lists.ids[row] >= 0
  return bool(lists.right[row][listed & (lists.answers[row] == winner)].any())


@pytest.mark.parametrize('votes', [1, 3, 50])
def test_vote_is_a_count_with_ties_to_the_first(votes):
  rng = np.random.default_rng(votes)
  lists = lists_of(rng, questions=200)
  for weights in (
    (lists.ids >= 0).astype(float),
    lists.first.astype(float),
    np.where(lists.ids >= 0, rng.choice([0.0, 0.5, 1.0], lists.ids.shape), 0),
    np.zeros(lists.ids.shape),
  ):
    expected = [by_hand(lists, weights, votes, row) for row in range(200)]
    np.testing.assert_array_equal(study.vote(lists, weights, votes), expected)


def test_a_source_counts_at_its_best_rank():
  lists = lists_of(np.random.default_rng(0))
  for ids, first in zip(lists.ids, lists.first):
    seen = set()
    for source, is_first in zip(ids.tolist(), first.tolist()):
      assert is_first == (source >= 0 and source not in seen)
      seen.add(source)


def test_leave_one_out_is_one_vote_less():
  lists = lists_of(np.random.default_rng(1))
  found = study.leave_one_out(lists, 3)
  for source in range(12):
    weights = lists.first.astype(float)
    less = np.where(lists.ids == source, 0, weights)
    expected = study.vote(lists, weights, 3).sum() - study.vote(lists, less, 3).sum()
    assert found[source] == expected


def test_accuracies_are_drawn_towards_the_mean():
  lists = lists_of(np.random.default_rng(2))
  seen = [(int(i), bool(r)) for ids, right, first in zip(lists.ids, lists.right, lists.first)
          for i, r, f in zip(ids, right, first) if f]  # fmt: skip
  mean = np.mean([r for _, r in seen])
  for groups in (np.arange(12), lists.domains):
    found = study.accuracies(lists, 3.0, groups)
    for source in range(12):
      mine = [r for i, r in seen if groups[i] == groups[source]]
      assert found[source] == pytest.approx((sum(mine) + 3 * mean) / (len(mine) + 3))


def test_splits_are_disjoint_and_seeded():
  lists = study.made_up(questions=50)
  marked = lists._replace(ids=np.tile(np.arange(50)[:, None], (1, lists.ids.shape[1])))
  parts = [part.ids[:, 0] for part in study.split(marked, 3)]
  assert [len(part) for part in parts] == [20, 10, 20]
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(50))
  again = [part.ids[:, 0] for part in study.split(marked, 3)]
  np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(again))
  assert (study.split(marked, 4)[0].ids[:, 0] != parts[0]).any()


def test_test_answers_are_not_seen():
  """With other verdicts on test questions every arm chooses the same setting."""
  lists = study.made_up(questions=60)
  train, validation, test = study.split(lists, 0)
  rows = np.random.default_rng([0, 71]).permutation(60)[36:]
  other = lists._replace(right=lists.right.copy())
  other.right[rows] = ~other.right[rows]
  for arm in ('majority', 'learned and pruned', 'accuracy as weights'):
    one, two = (study.measure(x, arm, [0]) for x in (lists, other))
    assert one.validation == two.validation
  assert (study.split(other, 0)[0].right == train.right).all()
  assert (study.split(other, 0)[1].right == validation.right).all()
  assert (study.split(other, 0)[2].right != test.right).all()


def test_learned_importance_finds_the_reliable_sources():
  lists = study.made_up()
  reliable = np.random.default_rng(0).permutation(200) < 50
  train, _, test = study.split(lists, 0)
  values, neighbors = next(study._learned(train))
  assert values[reliable].mean() > values[~reliable].mean() + 0.2
  majority = study.vote(test, test.first.astype(float), neighbors).mean()
  weighted = study.vote(test, study.of_source(test, values), neighbors).mean()
  assert weighted > majority + 0.2


# Files --------------------------------------------------------------------------------------------


def write(folder, questions=None, domains=None):
  folder.mkdir(parents=True, exist_ok=True)
  questions = questions or [
    {
      'question': f'{i}', 'correct_answers': ['Yes '], 'retrieved_websites': ['a.x', 'b.x', 'a.x'],
      'retrieved_answers': ['yes', 'No', 'maybe'],
    }
    for i in range(12)
  ]  # fmt: skip
  domains = domains or [{'name': 'x', 'elements': ['a.x', 'other']}]
  for name, rows in (('currency', questions), ('currency_websites_by_domain', domains)):
    with gzip.open(folder / f'{name}.jsonl.gz', 'wt') as out:
      out.writelines(json.dumps(row) + '\n' for row in rows)
  return folder


def test_read(tmp_path):
  lists = study.read(write(tmp_path), 'currency')
  np.testing.assert_array_equal(lists.ids[0], [0, 1, 0])
  np.testing.assert_array_equal(lists.right[0], [True, False, False])  # case and blanks aside
  np.testing.assert_array_equal(lists.answers[0], [0, 1, 2])
  assert lists.domains[0] != lists.domains[1]


QUESTION = {'correct_answers': ['a'], 'retrieved_websites': ['s'], 'retrieved_answers': ['a', 'b']}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda f: (f / 'currency.jsonl.gz').unlink(), 'currency.jsonl.gz cannot be read'),
    (lambda f: (f / 'currency_websites_by_domain.jsonl.gz').unlink(), 'by_domain.jsonl.gz cannot'),
    (lambda f: write(f, questions=[QUESTION]), 'line 1: 1 retrieved_websites and 2 retrieved_ans'),
    (lambda f: write(f, questions=[{'question': 'a'}]), "lacks 'retrieved_websites'"),
    (lambda f: write(f, questions=['a']), 'line 1: a question lacks'),
    (lambda f: write(f, domains=[{'name': 'x'}]), 'lacks the list elements'),
    (lambda f: gzip.open(f / 'currency.jsonl.gz', 'w').close(), 'has no questions'),
  ],
)
def test_damaged_files(tmp_path, change, message):
  change(write(tmp_path))
  with pytest.raises(UserError, match=re.escape(message)):
    study.read(tmp_path, 'currency')


def test_too_few_questions():
  with pytest.raises(UserError, match='2 questions are too few'):
    study.split(study.made_up(questions=2), 0)


def test_base_rates_of_the_published_questions():
  default = Path(__file__).parents[3] / 'shared/data/retrieval/wikifact'
  folder = Path(os.environ.get('JAXRW_WIKIFACT_DIR') or default)
  if not folder.is_dir():
    pytest.skip('the published questions are not here; set JAXRW_WIKIFACT_DIR to their folder')
  lists = study.read(folder, 'currency')
  listed = (lists.ids >= 0).astype(float)
  assert lists.ids.shape[0] == 1696
  assert lists.sources == 10_034
  assert study.vote(lists, listed, 1).mean() == pytest.approx(0.370, abs=6e-4)
  assert study.vote(lists, listed, 50).mean() == pytest.approx(0.360, abs=6e-4)


# The program --------------------------------------------------------------------------------------


def test_program(tmp_path):
  from tests.experiments.forked import run

  write(tmp_path / 'data' / 'wikifact')
  arms = '--arms=majority,learned as weights'
  done = run(
    'experiments.retrieval', '--workdir=out', '--data=data', '--seeds=2', arms, folder=tmp_path
  )
  assert done.status == 0, done.stderr
  assert 'minus majority' in done.stdout
  found = json.loads((tmp_path / 'out' / 'result.json').read_text())
  assert found['questions'] == 12
  assert list(found['arms']) == ['majority', 'learned as weights']
  assert (tmp_path / 'out' / 'retrieval.png').exists()


def test_table_and_picture():
  arms = {name: study.Result([0.4, 0.5], [0.5, 0.5])._asdict() for name in study.ARMS}
  arms['learned and pruned'] = study.Result([0.5, 0.6], [0.5, 0.5])._asdict()
  table = program.describe({'arms': arms})
  assert '55.0 ±63.5' in table
  assert '+10.0 ±0.0*' in table
  assert plots.draw_png(lambda: program.draw({'arms': arms}, plots.LIGHT), plots.LIGHT)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--workdir is missing'),
    (['--workdir=x', '--seeds=1'], '--seeds=1'),
    (['--workdir=x', '--data=/nowhere'], 'cannot be read'),
    (['--workdir=x', '--arms=none'], 'none'),
  ],
)
def test_bad_flags(tmp_path, flags, message):
  from tests.experiments.forked import run

  done = run('experiments.retrieval', *flags, folder=tmp_path)
  assert done.status == 2
  assert message in done.stderr
