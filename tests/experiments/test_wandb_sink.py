"""Weights & Biases gets a copy; whatever it does, the run goes on. A fake stands in for it."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time

import jax
import pytest

from configs import common
from experiments import config as config_lib
from experiments import metrics, train, wandb_sink
from experiments.config_rules import is_installed
from experiments.errors import UserError
from tests.experiments import small

FAKE = """
import threading
calls, fails, hangs, release = [], {fails!r}, {hangs!r}, threading.Event()

def called(name, /, *args, **kwargs):
  calls.append((name, args, kwargs))
  if name in hangs:
    release.wait(60)
  if name in fails:
    raise fails[name]('no\\nway')

class Run:
  def log(self, values, step):
    called('log', step, values)
  def finish(self):
    called('finish')

def init(**kwargs):
  called('init', **kwargs)
  return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """(fails, hangs, text) -> the module that `import wandb` finds from now on."""
  folder = tmp_path / 'packages'
  folder.mkdir()
  monkeypatch.syspath_prepend(folder)
  for name in wandb_sink._SETTINGS:
    monkeypatch.setenv(name, '')  # so that what the sink sets is taken back
    monkeypatch.delenv(name)

  def install(fails=(), hangs=(), text=None):
    errors = '{' + ', '.join(f'{name!r}: {error}' for name, error in dict(fails).items()) + '}'
    source = FAKE.replace('{fails!r}', errors).replace('{hangs!r}', repr(tuple(hangs)))
    (folder / 'wandb.py').write_text(source if text is None else text)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    importlib.invalidate_caches()
    return None if text else importlib.import_module('wandb')

  yield install
  if 'wandb' in sys.modules:
    sys.modules['wandb'].release.set()
    monkeypatch.delitem(sys.modules, 'wandb')


def write(workdir, steps=(1, 2), timeout=10.0, **kwargs):
  """What a run does with its sink."""
  workdir.mkdir(exist_ok=True)
  config_lib.write(workdir, common.base_config())
  sink = wandb_sink.WandbSink('project', workdir, timeout=timeout, **kwargs)
  for step in steps:
    sink.write(step, {'train/loss': 1 / step})
  sink.close()


def test_what_it_is_told(fake, tmp_path):
  wandb = fake()
  write(tmp_path / 'run')
  (init, _, told), *logs, finish = wandb.calls
  assert (init, finish) == ('init', ('finish', (), {}))
  assert told['config']['optim']['lr'] == 3e-3
  assert told | {'config': {}, 'id': ''} == {
    'project': 'project', 'id': '', 'resume': 'allow', 'name': 'run', 'config': {},
    'dir': str(tmp_path / 'run'),
  }  # fmt: skip
  assert logs == [
    ('log', (1, {'train/loss': 1.0}), {}),
    ('log', (2, {'train/loss': 0.5}), {}),
  ]


def test_a_resumed_run_is_the_same_run(fake, tmp_path):
  wandb = fake()
  for _ in range(2):
    write(tmp_path / 'run')
  write(tmp_path / 'other')
  first, second, other = (call[2]['id'] for call in wandb.calls if call[0] == 'init')
  assert first == second == (tmp_path / 'run' / 'wandb.id').read_text()
  assert other != first


@pytest.mark.parametrize('name', ['init', 'log', 'finish'])
@pytest.mark.parametrize('error', ['RuntimeError', 'SystemExit'])
def test_an_exception_is_reported_once_and_is_the_end_of_it(fake, tmp_path, capfd, name, error):
  wandb = fake(fails={name: error})
  write(tmp_path / 'run', steps=range(1, 6))
  assert capfd.readouterr().err == f'note: W&B gets nothing more of this run ({error}: no way)\n'
  assert wandb.calls[-1][0] == name
  assert [call[0] for call in wandb.calls].count(name) == 1


def test_a_package_that_cannot_be_imported(fake, tmp_path, capfd):
  fake(text='raise TypeError("broken")')
  write(tmp_path / 'run')
  assert capfd.readouterr().err == 'note: W&B gets nothing more of this run (TypeError: broken)\n'


@pytest.mark.parametrize('name', ['init', 'log', 'finish'])
def test_a_call_that_never_returns(fake, tmp_path, capfd, name):
  fake(hangs=[name])
  start = time.monotonic()
  write(tmp_path / 'run', timeout=0.3)
  assert 0.3 <= time.monotonic() - start < 30
  assert capfd.readouterr().err == (
    'note: W&B gets nothing more of this run (it did not finish within 0.3 s)\n'
  )


def test_a_queue_that_nothing_is_taken_from(fake, tmp_path, capfd, monkeypatch):
  fake(hangs=['init'])
  monkeypatch.setattr(wandb_sink, '_PENDING', 3)
  write(tmp_path / 'run', steps=range(1, 9), timeout=0.1)
  assert capfd.readouterr().err == 'note: W&B gets nothing more of this run (3 records wait)\n'


def test_only_one_process_of_several_has_it(fake, tmp_path):
  wandb = fake()
  writer = metrics.MetricWriter(tmp_path, wandb='project', primary=False)
  writer.write('train', 1, {'loss': 1.0})
  writer.close()
  assert wandb.calls == []


def test_a_missing_package_is_known_before_training(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  config = common.base_config()
  config_lib.check(config)
  config.log.wandb = 'project'
  with pytest.raises(UserError) as error:
    config_lib.check(config)
  assert str(error.value) == (
    "config.log.wandb='project': must be '' where wandb is not installed: pip install wandb, or "
    'leave it out'
  )
  with pytest.raises(UserError, match='pip install wandb'):
    wandb_sink.WandbSink('project', tmp_path)


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
  """W&B's offline mode leaves one where it runs."""
  (tmp_path / 'wandb_').mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  assert importlib.util.find_spec('wandb_') is not None
  assert not is_installed('wandb_')
  assert is_installed('json')


def test_a_run_with_it_is_a_run_without_it(fake, tmp_path):
  config = small.config(small.write_corpus(tmp_path / 'text'), tmp_path / 'data', steps=4)
  wandb = fake()
  results = {}
  for project in ('', 'project'):
    config.log.wandb = project
    results[project] = train.train(config, tmp_path / f'run{project}', devices=jax.devices()[:1])
  assert results['']['final'] == results['project']['final']
  logged = [call[1] for call in wandb.calls if call[0] == 'log']
  assert [step for step, _ in logged] == [1, 2, 2, 3, 4, 4]
  records = metrics.read_jsonl(tmp_path / 'runproject/metrics.jsonl')
  assert [v.get('train/loss') for _, v in logged] == [
    r['loss'] if r['kind'] == 'train' else None for r in records
  ]
  assert logged[-1][1]['eval/macro_bpb'] == results['project']['final']['macro_bpb']
  assert not any(thread.name == 'wandb' for thread in threading.enumerate())
