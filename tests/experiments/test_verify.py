"""What `experiments.verify` finds: nothing in a good run, each kind of tampering by its name."""

from __future__ import annotations

import json
import shutil

import jax
import pytest

from experiments import checkpoints, files, train, verify
from experiments.errors import UserError
from tests.experiments import small


@pytest.fixture(scope='module')
def setup(tmp_path_factory):
  """(config, a finished run of it on all devices)."""
  folder = tmp_path_factory.mktemp('setup')
  config = small.config(small.write_corpus(folder / 'text'), folder / 'prepared', steps=4)
  config.log.ledger = True
  train.train(config, folder / 'run')
  return config, folder / 'run'


@pytest.fixture
def run(setup, tmp_path):
  return shutil.copytree(setup[1], tmp_path / 'run')


def findings(run):
  return {name: lines for name, lines in verify.verify(str(run)).items() if lines}


def edit_lines(path, edit):
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(edit(lines)))


def edit_json(path, edit):
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


def test_a_good_run_holds(run):
  assert findings(run) == {}
  assert set(verify.verify(str(run))) == {
    *('checkpoints', 'config', 'data', 'files', 'steps', 'versions')
  }


def test_a_tampered_line(run):
  edit_lines(run / 'metrics.jsonl', lambda lines: [lines[0].replace('1', '2', 1), *lines[1:]])
  assert findings(run)['files'] == ['metrics.jsonl was changed after the run']


def test_a_flipped_byte(run):
  file = max((run / 'checkpoints' / '2').rglob('d/*'), key=lambda p: p.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  name = file.relative_to(run / 'checkpoints' / '2')
  assert findings(run) == {'checkpoints': [f'2 is damaged: {name} is changed']}


def test_a_missing_seal_and_no_checkpoint(run):
  (run / 'checkpoints' / '4' / checkpoints.SEAL).unlink()
  assert findings(run) == {'checkpoints': ['4 has no seal, so nobody can tell']}
  shutil.rmtree(run / 'checkpoints')
  assert findings(run) == {'checkpoints': ['there is none']}


def test_another_config(run):
  edit_json(run / 'config.json', lambda config: config['optim'].update(lr=1.0))
  found = findings(run)
  assert found.keys() == {'config', 'files'}
  assert ['provenance.json says' in line for line in found['config']] == [True, False]
  assert 'result.json says' in found['config'][1]


def test_steps_that_are_missing_or_double(run):
  third = '"kind": "train", "step": 3'
  edit_lines(run / 'metrics.jsonl', lambda lines: [line for line in lines if third not in line])
  edit_lines(run / 'examples.jsonl', lambda lines: [*lines, lines[1], lines[2]])
  (run / 'ledger' / 'part-00000001-00000002.parquet').unlink()
  assert findings(run)['steps'] == [
    'metrics.jsonl, train: 0 of step 3, must be 1',
    'examples.jsonl: 16 of step 2 (and at 1 more), must be 8',
    'ledger: 0 of step 1 (and at 1 more), must be 8',
  ]


def test_an_evaluation_that_is_double(run):
  edit_lines(run / 'metrics.jsonl', lambda lines: [*lines, lines[-1]])
  assert findings(run)['steps'] == ['metrics.jsonl, eval: 2 of step 4, must be 1']


def test_a_run_that_is_not_finished(setup, tmp_path, monkeypatch):
  """Lines beyond its checkpoint will be written again; those before it count."""
  config, _ = setup
  with small.interrupted_after(2, monkeypatch):
    train.train(config, tmp_path)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"kind": "train", "step": 3}\n' * 2 + '{"kind"')
  assert findings(tmp_path) == {}
  with pytest.raises(UserError, match='is not finished: run its command again before --rerun'):
    verify.rerun(str(tmp_path))
  edit_lines(tmp_path / 'metrics.jsonl', lambda lines: lines[1:])
  assert findings(tmp_path) == {'steps': ['metrics.jsonl, train: 0 of step 1, must be 1']}
  # The rest at another rhythm: then any is as good, but no step may be there twice.
  config = config.copy_and_resolve_references()
  config.log.every = 4
  train.train(config, tmp_path)
  assert findings(tmp_path) == {}


def test_other_versions(run):
  edit_json(
    run / 'provenance.json', lambda record: record['sessions'][0]['versions'].update(jax='0.0.1')
  )
  line = f"session 1: jax is '0.0.1' there and {jax.__version__!r} here"
  assert findings(run) == {'versions': [line]}


def test_other_data(setup, run):
  """The text was changed after the run; or the record speaks of another tokenizer."""
  path = next((setup[1].parent / 'text').glob('easy.train.jsonl'))
  text = path.read_text()
  path.write_text(text.replace('the', 'tha', 1))
  (line,) = findings(run)['data']
  assert line.startswith('the text is ')
  path.write_text('{')
  (line,) = findings(run)['data']
  assert line.startswith('they cannot be opened: ')
  path.write_text(text)
  edit_json(run / 'provenance.json', lambda r: r['run']['tokenizer'].update(sha256='0' * 64))
  (line,) = findings(run)['data']
  assert line.endswith(' here and 000000000000 there')


def test_not_a_run(tmp_path, run):
  with pytest.raises(UserError, match='is not a run directory'):
    verify.verify(str(tmp_path))
  (run / 'provenance.json').unlink()
  with pytest.raises(UserError, match=r'cannot read .*provenance\.json'):
    verify.verify(str(run))


# Again


@pytest.mark.slow
def test_a_rerun_reproduces_and_finds_what_is_different(run):
  assert verify.rerun(str(run)) == 'reproduced'

  def tamper(line):
    record = json.loads(line)
    if (record['kind'], record['step']) == ('train', 3):
      record['domain']['easy']['loss'] += 1e-12
    return json.dumps(record) + '\n'

  edit_lines(run / 'metrics.jsonl', lambda lines: map(tamper, lines))
  edit_json(run / 'result.json', lambda result: result['final'].update(macro_bpb=0.0))
  shutil.rmtree(run / 'checkpoints' / '4')  # the one before has other parameters
  assert verify.rerun(str(run)) == (
    'different: metrics.jsonl from step 3 on: domain.easy.loss; result.json: macro_bpb; '
    'the parameters at the end'
  )


def test_a_rerun_that_fails(run):
  edit_json(run / 'config.json', lambda config: config['data'].update(path='/nowhere'))
  assert verify.rerun(str(run)).startswith('failed: UserError: ')


def test_first_difference():
  there = [{'step': 1, 'a': 1, 'wall': {'s': 1}}, {'step': 2, 'a': {'b': 1, 'c': 2}}, {'step': 3}]
  differs = lambda here: list(verify.first_difference('m', there, here))
  assert differs([{**there[0], 'wall': {'s': 2}}, *there[1:]]) == []
  assert differs([there[0], {'step': 2, 'a': {'b': 2, 'd': 2}}]) == [
    'm from step 2 on: a.b, a.c, a.d'
  ]
  assert differs(there[:2]) == ['m from step 3 on: step']


@pytest.mark.slow
def test_the_program(setup, tmp_path):
  """As a user calls it, on a run that the training program made."""
  corpus = setup[1].parent / 'text'
  workdir = tmp_path / 'run'
  made = small.program('experiments.main', corpus, workdir, '--config.seed=3')
  assert made.returncode == 0, made.stderr
  entries = files.read_json(workdir / 'provenance.json')['run']['config']
  assert entries['seed'] == {'value': 3, 'origin': 'command line'}
  assert entries['total_steps']['origin'].startswith('configs/lm.py:')
  checked = small.called('experiments.verify', workdir, str(workdir))
  assert checked.stderr == ''
  assert checked.stdout.count(' holds\n') == 6
  assert checked.returncode == 0
  (workdir / 'examples.jsonl').unlink()
  (workdir / 'examples.jsonl').touch()
  checked = small.called('experiments.verify', workdir, str(workdir))
  assert 'files        examples.jsonl was changed after the run\n' in checked.stdout
  assert checked.returncode == 1
  checked = small.called('experiments.verify', workdir)
  assert checked.stderr.startswith('error: give one run directory: ')
  assert checked.returncode == 2
