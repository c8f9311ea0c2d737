"""The pruning study: schedules, what the scores find, and the program's parts on few examples."""

import numpy as np
import pytest

from experiments import plots, stats
from experiments.errors import UserError
from experiments.prune import __main__ as program
from experiments.prune import study

pytest.importorskip('sklearn')

SMALL = study.Settings(
  examples=300, held=100, steps=60, batch=32, score_steps=60, scorers=2, rates=(3e-3, 1e-2)
)


@pytest.fixture(scope='module')
def source():
  from experiments.classify import sources

  return sources.digits()


@pytest.fixture(scope='module')
def noisy(source):
  """(problems, scores) with a fifth of the labels replaced."""
  settings = SMALL._replace(noise=0.2)
  problems = [study.problem(source, settings, seed) for seed in range(2)]
  return problems, study.score(problems, settings, 10)


def test_an_epoch_sees_every_row_once():
  rows = np.arange(100, 120)
  dealt = study.epochs(np.random.default_rng(0), rows, 15, 8).reshape(-1)
  assert dealt.shape == (120,)
  for epoch in dealt.reshape(6, 20):
    np.testing.assert_array_equal(np.sort(epoch), rows)


def test_rounds_deal_out_everything_before_they_repeat():
  dealt = study.rounds(0, 40, 10, 10, 8).reshape(-1)  # two cycles of four rounds
  for cycle in dealt.reshape(2, 40):
    np.testing.assert_array_equal(np.sort(cycle), np.arange(40))


def test_problems_of_a_seed_are_apart_and_have_as_many_wrong_labels_as_asked_for(source, noisy):
  (first, second), _ = noisy
  clean = study.problem(source, SMALL, 0)
  assert not clean.wrong.any()
  np.testing.assert_array_equal(clean.train.y != first.train.y, first.wrong)
  assert abs(first.wrong.mean() - 0.2) < 0.06
  assert first.train.x.shape == second.train.x.shape
  assert not np.array_equal(first.train.y, second.train.y)
  with pytest.raises(UserError, match='has 1797 examples; this study needs over 1800'):
    study.problem(source, SMALL._replace(examples=1700), 0)


def test_wrong_labels_have_high_scores(noisy):
  problems, found = noisy
  for p, f in zip(problems, found):
    for name in ('el2n', 'margin', 'grand'):
      assert stats.auc(f[name], p.wrong) > 0.85, name


def test_auc_is_a_count_of_pairs():
  rng = np.random.default_rng(0)
  value, positive = rng.permutation(50), rng.random(50) < 0.3
  expected = np.mean(value[positive][:, None] > value[~positive])
  np.testing.assert_allclose(stats.auc(value, positive), expected)


@pytest.mark.parametrize('name', [n for n, arm in study.ARMS.items() if arm.choose])
def test_every_arm_keeps_its_budget(noisy, name):
  problems, found = noisy
  labels = problems[0].train.y
  for budget in (12, 150, 290):
    rows = study.ARMS[name].choose(found[0], labels, budget, np.random.default_rng(0))
    assert len(set(rows.tolist())) == budget
    if 'balanced' in name and budget == 150:
      assert np.ptp(np.bincount(labels[rows], minlength=10)) <= 1


def test_the_window_leaves_wrong_labels_out(noisy):
  problems, found = noisy
  wrong = problems[0].wrong
  choose = lambda name: study.ARMS[name].choose(
    found[0], problems[0].train.y, 150, np.random.default_rng(0)
  )
  assert wrong[choose('el2n window')].mean() < wrong[choose('el2n high')].mean() - 0.05


def test_from_start_to_end(source):
  """All of the report's parts; a subset of everything is as good as everything."""
  arms, fractions = ['random', 'random distilled', 'rs2', 'all data'], [0.1, 1.0]
  found = {'settings': SMALL._asdict(), 'arms': {}}
  for name, fraction, result, _ in study.run(source, SMALL, arms, fractions, 2):
    found['arms'].setdefault(name, {})[f'{fraction:g}'] = result._asdict()
    assert len(result.accuracy) == 2
    assert 0.4 < np.mean(result.accuracy) <= 1
  arms = {name: {f: np.mean(r['accuracy']) for f, r in by.items()}
          for name, by in found['arms'].items()}  # fmt: skip
  assert arms['rs2']['0.1'] > arms['random']['0.1']
  assert abs(arms['random']['1'] - arms['all data']['1']) < 0.03
  text = program.describe(found)
  assert 'minus random, points' in text
  assert text.count('random distilled') == 3
  assert plots.draw_png(lambda: program.draw(found, plots.LIGHT), plots.LIGHT)[:4] == b'\x89PNG'


def test_every_arm_can_be_named_on_the_command_line():
  assert not [name for name in study.ARMS if ',' in name]


def test_fractions_that_are_none():
  assert program.read_fractions(['0.1', '1']) == [0.1, 1.0]
  for text in ('0', '1.5', 'half', 'nan'):
    with pytest.raises(UserError, match=f'--fractions: {text!r} must be a number in'):
      program.read_fractions([text])
