"""Three stages in one command: they chain by file and name, and resume."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import doremi, files
from tests.experiments import small


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return small.write_corpus(tmp_path_factory.mktemp('corpus'))


def command(*arguments):
  return small.program('experiments.doremi', *arguments)


@pytest.mark.slow
def test_three_stages_and_a_second_call_that_trains_nothing(corpus, tmp_path):
  flags = ('--rate=5', '--larger=model.n_embd=48', '--seeds=1')
  done = command(corpus, tmp_path / 'run', *flags)
  assert done.returncode == 0, done.stderr
  proxy = files.read_json(tmp_path / 'run/proxy/config.json')
  assert proxy['mixture']['fn'] == 'doremi'
  assert proxy['reference'] == str(tmp_path / 'run/reference')
  found = files.read_json(tmp_path / 'run/proxy/mixture.json')['weights']
  assert sum(found.values()) == pytest.approx(1, abs=1e-5)
  board = files.read_json(tmp_path / 'run/final/compare.json')
  assert [arm['name'] for arm in board['arms']] == ['uniform', 'doremi']
  final = files.read_json(tmp_path / 'run/final' / board['arms'][1]['runs'][0] / 'config.json')
  assert final['model']['n_embd'] == 48
  assert final['data']['mixture'].endswith('proxy/mixture.json')
  again = command(corpus, tmp_path / 'run', *flags)
  assert again.returncode == 0, again.stderr
  assert again.stderr.count('was finished') == 2


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--larger=model.n_embd',), 'is not a <key of the config>=<value>'),
    (('--config.data.seq_len=0',), 'config.data.seq_len=0'),
  ],
)
def test_mistakes_are_one_line_before_any_stage(corpus, tmp_path, flags, message):
  done = command(corpus, tmp_path / 'run', *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_the_table_of_weights(tmp_path):
  files.write_json(tmp_path / 'm.json', {'weights': {'web': 0.6, 'code': 0.4}})
  text = doremi.mixture_text(tmp_path / 'm.json', np.array([0.5, 0.5]))
  assert '  web       0.5000    0.6000    1.20 x' in text.splitlines()
