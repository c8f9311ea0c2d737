"""A pulse for every config: its `quick` form trains to the end on the embedded corpus."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from experiments import config as config_lib
from experiments import train

CONFIGS = sorted(str(path) for path in config_lib.config_files())
SWITCHES = {'configs/specialise.py': 'target=docs,'}  # what a config cannot do without


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('prepared')


@pytest.mark.parametrize('path', CONFIGS)
def test_config_trains(path, root, tmp_path):
  config = config_lib.load(f'{path}:{SWITCHES.get(path, "")}quick')
  config.data.root = str(root)
  config.data.max_bytes_per_domain = 20_000
  config.log.progress = False
  config_lib.check(config)
  result = train.train(config, tmp_path, devices=jax.devices()[:1])
  assert result['steps'] == config.total_steps
  assert len(result['final']['bpb']) >= 4
  assert list(Path(tmp_path, 'tensorboard').iterdir())


def test_there_are_configs():
  assert len(CONFIGS) >= 3
