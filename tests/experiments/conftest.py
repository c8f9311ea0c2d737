"""What tests of several programs need."""

import pytest

from tests.experiments.fake_slurm import Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  made = Slurm(tmp_path / 'slurm')
  monkeypatch.setenv('PATH', made.path)
  yield made
  made.kill()
