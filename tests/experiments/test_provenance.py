"""Where a run comes from: one record, whole after every resume, and equal where runs are equal."""

from __future__ import annotations

import copy
import subprocess

import jax
import pytest

from experiments import config as config_lib
from experiments import files, provenance, train
from tests.experiments import small


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  return small.config(small.write_corpus(folder / 'text'), folder / 'prepared', steps=4)


def run(config, workdir, **arguments):
  train.train(config, workdir, devices=jax.devices()[:1], **arguments)
  return provenance.read(workdir)


@pytest.fixture(scope='module')
def record(config, tmp_path_factory):
  return run(config, tmp_path_factory.mktemp('run'))


def test_the_same_run_has_the_same_record(config, record, tmp_path):
  again = run(config, tmp_path)
  assert again != record
  assert provenance.difference(record, again) == {}


def test_another_rate_is_another_record(config, record, tmp_path):
  config = config.copy_and_resolve_references()
  config.optim.lr = 1e-4
  found = provenance.difference(record, run(config, tmp_path))
  assert found['run.config.optim.lr.value'] == (3e-3, 1e-4)
  assert found.keys() == {
    *('run.config.optim.lr.value', 'run.config.optim.lr.origin', 'run.config_hash')
  }


def leaves(tree, path=()):
  if isinstance(tree, dict) and tree:
    for key, value in tree.items():
      yield from leaves(value, (*path, key))
  else:
    yield path


def test_each_changed_field_is_reported_and_nothing_else(record):
  view = {'run': record['run'], 'session': record['sessions'][-1]}
  paths = list(leaves(view))
  assert len(paths) > 100
  for path in paths:
    other = copy.deepcopy(record)
    node = {'run': other['run'], 'session': other['sessions'][-1]}
    for key in path[:-1]:
      node = node[key]
    node[path[-1]] = 'tampered'
    name = '.'.join(path)
    expected = set() if name.startswith(provenance._TIMES) else {name}
    assert provenance.difference(record, other).keys() == expected


def test_what_is_on_record(config, record, tmp_path):
  values = {key: entry['value'] for key, entry in record['run']['config'].items()}
  assert values == files.jsonable(config_lib.flatten(config))
  assert record['run']['config_hash'] == config_lib.config_hash(config)
  built = train.build(config, jax.devices()[:1])
  assert record['run']['data']['fingerprint'] == built.corpus.fingerprint
  assert record['run']['tokenizer']['sha256'] == built.corpus.tokenizer.fingerprint
  (session,) = record['sessions']
  assert session['versions'] == train.versions()
  assert session['mesh'] == {'data': 1, 'fsdp': 1, 'tensor': 1}
  assert session['environment']['JAX_PLATFORMS'] == 'cpu'
  assert (session['processes'], session['devices']) == (1, '1 x cpu')
  assert session['ended']['status'] == 'done'
  assert session['ended']['seconds'] > 0
  files.write_json(tmp_path / provenance.FILE, record)
  assert provenance.read(tmp_path) == record


def test_who_set_a_value(config, tmp_path):
  entries = run(config, tmp_path, origin=({'seed': 0}, 'my.py'))['run']['config']
  assert entries['seed']['origin'] == 'command line'
  assert entries['total_steps']['origin'] == 'my.py'
  assert entries['optim.b1']['origin'] == 'default'


def test_sessions_of_an_interrupted_run(config, tmp_path, monkeypatch):
  with small.interrupted_after(2, monkeypatch):
    run(config, tmp_path)
  config = config.copy_and_resolve_references()
  config.log.every = 2
  record = run(config, tmp_path)
  first, second = record['sessions']
  assert first['ended']['status'] == 'aborted'
  assert first['ended']['error'] == 'KeyboardInterrupt'
  assert (first['resumed_after'], second['resumed_after']) == (0, 2)
  assert (first['changed'], second['changed']) == ({}, {'log.every': [1, 2]})
  assert second['ended']['status'] == 'done'
  assert record['run']['config']['log.every']['value'] == 2


def git(folder, *arguments):
  name = ['-c', 'user.name=a', '-c', 'user.email=a@b']
  subprocess.run(['git', '-C', folder, *name, *arguments], check=True, capture_output=True)


def test_state_of_the_code(tmp_path):
  state = lambda: provenance.git_state.__wrapped__(tmp_path)
  assert state() is None
  git(tmp_path, 'init')
  (tmp_path / 'code.py').write_text('a = 1\n')
  assert state() is None
  git(tmp_path, 'add', '.')
  git(tmp_path, 'commit', '-m', 'a')
  clean = state()
  assert (clean['dirty'], clean['diff'], len(clean['commit'])) == (False, '', 40)
  (tmp_path / 'code.py').write_text('a = 2\n')
  two = state()
  assert (two['dirty'], two['commit']) == (True, clean['commit'])
  (tmp_path / 'code.py').write_text('a = 3\n')
  assert state()['diff'] not in ('', two['diff'])
  inside = tmp_path / 'site-packages' / 'experiments'
  inside.mkdir(parents=True)
  assert provenance.git_state.__wrapped__(inside) is None
