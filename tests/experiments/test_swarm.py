"""The swarm of small runs: by name, resumable, and readable by the fit."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import files
from experiments.errors import UserError
from experiments.regmix import fit, swarm
from tests.experiments import small


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return small.write_corpus(tmp_path_factory.mktemp('corpus'))


def command(corpus, workdir, *flags):
  flags = ('--config.model.n_layer=1', '--noconfig.log.tensorboard', *flags)
  return small.program('experiments.regmix.swarm', corpus, workdir, *flags)


@pytest.mark.slow
def test_a_larger_swarm_goes_on_where_a_smaller_one_ended(corpus, tmp_path):
  done = command(corpus, tmp_path / 'run', '--runs=2')
  assert done.returncode == 0, done.stderr
  first = (tmp_path / 'run/losses.csv').read_text()
  done = command(corpus, tmp_path / 'run', '--runs=3')
  assert done.returncode == 0, done.stderr
  assert done.stderr.count('was finished') == 2
  runs = fit.read_runs(str(tmp_path / 'run/mixtures.csv'), str(tmp_path / 'run/losses.csv'))
  assert runs.domains == runs.losses == ('easy', 'hard')
  assert runs.mixtures.shape == runs.values.shape == (3, 2)
  assert (tmp_path / 'run/losses.csv').read_text().startswith(first)
  paths = sorted((tmp_path / 'run/mixtures').iterdir())
  stored = files.read_json(paths[2])
  np.testing.assert_allclose(runs.mixtures[2], list(stored['weights'].values()))
  for i, folder in enumerate(sorted((tmp_path / 'run/runs').iterdir())):
    config = files.read_json(folder / 'config.json')
    assert config['data']['mixture'] == str(paths[i])
    final = files.read_json(folder / 'result.json')['final']['bpb']
    np.testing.assert_allclose(runs.values[i], [final['easy'], final['hard']])


def test_another_prior_makes_other_runs_in_the_same_folder(corpus, tmp_path):
  """A finished run is known by its path, so equal paths must mean equal shares."""
  config = small.config(corpus, tmp_path / 'data')
  write = lambda prior: swarm.write_mixtures(config, prior, 2, 4.0, tmp_path)
  (_, natural, there), (_, again, same) = write('natural'), write('natural')
  np.testing.assert_array_equal(natural, again)
  assert there == same
  assert not set(there) & set(write('easy=0.9,hard=0.1')[2])


@pytest.mark.parametrize(
  ('prior', 'runs', 'ratio', 'message'),
  [
    ('even', 2, 4.0, "does not parse at 'even'"),
    ('natural', 2, 1.0, 'max_ratio=1.0 above 1'),
    ('easy=1', 5, 4.0, '--runs=5'),
  ],
)
def test_bad_input_is_one_line_before_training(corpus, tmp_path, prior, runs, ratio, message):
  config = small.config(corpus, tmp_path / 'data')
  with pytest.raises(UserError, match=message):
    swarm.write_mixtures(config, prior, runs, ratio, tmp_path)
  assert not (tmp_path / 'mixtures').exists()
