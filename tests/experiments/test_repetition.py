"""The repetition study: the fit on planted curves, what it concludes, and the command."""

from __future__ import annotations

import numpy as np
import pytest

from configs import common
from experiments import files, plots, repetition
from experiments.errors import UserError
from jaxrw import mixtures
from tests.experiments import small

POOL = 500.0
SAMPLES = POOL * np.arange(1, 17)
LAW = repetition.Law(np.array([-0.25, -0.3]), np.array([1.5, 1.5]), 3.0, 1.5, 0.0)


def planted(pools, noise=0.0, shift=0.0):
  """A curve of the law, with three seeds."""
  mean = LAW.of(pools).predict(SAMPLES, POOL) + shift
  rng = np.random.default_rng(0)
  return repetition.Curve(SAMPLES, mean + noise * rng.normal(size=(3, mean.size)))


def study(mixed):
  alone = [planted([0]), planted([1])]
  return repetition.make_study(
    ('low', 'high'), POOL, LAW, np.argsort(LAW.utilities), alone, [mixed]
  )


def test_planted_laws_are_recovered_with_one_scale_and_floor():
  law = repetition.fit([planted([0]), planted([1])], POOL)
  assert law.residual < 1e-5
  np.testing.assert_allclose(law.utilities, LAW.utilities, rtol=1e-3)
  np.testing.assert_allclose(law.half_lives, LAW.half_lives, rtol=1e-3)
  np.testing.assert_allclose((law.scale, law.floor), (LAW.scale, LAW.floor), rtol=1e-3)
  mixture = planted([0, 1]).errors.mean(0)
  np.testing.assert_allclose(law.predict(SAMPLES, POOL)[1:], mixture[1:], atol=1e-4)


def test_the_best_pool_comes_first_and_prefixes_follow_the_law():
  found = study(planted([0, 1]))
  assert found.pools == ('high', 'low')
  assert repetition.names(found) == ['high', 'best 2']
  np.testing.assert_allclose(found.predicted[0], found.alone[0].errors.mean(0), rtol=1e-6)
  np.testing.assert_allclose(found.predicted[1], planted([1, 0]).errors.mean(0), rtol=1e-6)
  assert [SAMPLES[i] / POOL for i in repetition.at(found)] == [1, 2, 4, 8, 16]


def test_claims_where_the_law_is_true():
  said = repetition.claims(study(planted([0, 1], noise=1e-4)))
  assert 'it predicts mixtures: 0.000' in said[1]
  assert said[1].endswith(': reproduced')
  crossing = LAW.of([0, 1]).predict(SAMPLES, POOL) < LAW.of([1]).predict(SAMPLES, POOL)
  assert not crossing[0], 'the best pool alone should win at first, or this test shows nothing'
  assert crossing[-1]
  assert 'best 2 against the best alone +0.0' in said[2]
  assert said[2].endswith(': reproduced')
  assert said[3].startswith('its choice of pools: 0.000')


def test_claims_where_it_is_wrong():
  """A mixture that is far worse than predicted: neither the prediction nor the choice holds."""
  said = repetition.claims(study(planted([0, 1], noise=1e-4, shift=0.5)))
  assert said[1].endswith(': not reproduced')
  assert said[3].startswith('its choice of pools: 0.')
  assert said[3].endswith(': not reproduced')


def test_tables_and_picture():
  found = study(planted([0, 1]))
  text = repetition.tables(found)
  assert 'utility' in text
  assert '8,000' in text
  assert plots.draw_png(lambda: repetition.draw(found, plots.LIGHT), plots.LIGHT)


def test_too_few_evaluations():
  short = repetition.Curve(SAMPLES[:4], planted([0]).errors[:, :4])
  with pytest.raises(UserError, match='4 evaluations after the first epoch'):
    repetition.fit([short, short], POOL)


@pytest.mark.parametrize(
  ('pools', 'target', 'size', 'message'),
  [
    (['easy'], 'easy', 100, 'two domains or more'),
    (['c', 'c++'], 'c', 100, r'without a \+'),
    (['easy', 'easy'], 'easy', 100, 'each once'),
    (['easy', 'hard'], '', 100, '--target is missing'),
    (['easy', 'hard'], 'easy', 0, '--bytes=0'),
  ],
)
def test_bad_input(pools, target, size, message):
  with pytest.raises(UserError, match=message):
    repetition.study_config(common.base_config(), pools, target, size)


def test_pools_must_be_equally_large(tmp_path):
  folder = small.write_corpus(tmp_path / 'text')
  config = small.config(folder, tmp_path / 'data')
  config = repetition.study_config(config, ['easy', 'hard'], 'easy', 10**6)
  with pytest.raises(UserError, match=r'pools are not equally large \(easy'):
    repetition.pool_size(config, ['easy', 'hard'])


@pytest.mark.slow
def test_the_command_and_a_second_one_that_trains_nothing(tmp_path):
  folder = small.write_corpus(tmp_path / 'text')
  flags = ('--pools=easy,hard', '--target=hard', '--bytes=1000', '--seeds=1')
  config = ('--config.total_steps=32', '--config.model.n_layer=1', '--noconfig.log.tensorboard')
  run = lambda: small.program('experiments.repetition', folder, tmp_path / 'run', *flags, *config)
  done = run()
  assert done.returncode == 0, done.stderr
  assert 'measured / predicted' in done.stdout
  stored = files.read_json(tmp_path / 'run/repetition.json')
  assert set(stored['alone']) == {'easy', 'hard'}
  assert set(stored['mixed']) == {stored['pools'][0], 'best 2'}
  assert len(stored['claims']) == 4
  assert (tmp_path / 'run/repetition.png').stat().st_size > 0
  again = run()
  assert again.stderr.count('was finished') == 3
  assert again.stdout == done.stdout


def test_the_law_is_the_one_of_the_library_for_pools_of_the_papers_size():
  theirs = mixtures.repeated_data_error(SAMPLES * 25_600, 12.8e6, -0.3, 1.5, 3.0, 1.5)
  np.testing.assert_array_equal(LAW.of([1]).predict(SAMPLES, POOL), np.asarray(theirs, float))
