"""The training program: it runs, resumes bit for bit, and stops with one line on bad input."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments import checkpoints, dry_run, evaluate, files, metrics, provenance, step_log, train
from experiments.errors import NonFiniteError, UserError
from tests.experiments import small


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return small.write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('prepared')


@pytest.fixture
def config(corpus, root):
  return small.config(corpus, root)


def run(config, workdir, devices=1):
  return train.train(config, workdir, devices=jax.devices()[:devices])


def lines(workdir, name='metrics.jsonl'):
  """The record of a run without its wall-clock fields."""
  return [{k: v for k, v in r.items() if k != 'wall'} for r in records(workdir, name)]


def records(workdir, name='metrics.jsonl'):
  return metrics.read_jsonl(workdir / name)


def parameters(config, workdir):
  built = train.build(config, jax.devices()[:1])
  return checkpoints.restore_params(workdir, built.abstract_state.params)


@pytest.fixture(scope='module')
def finished(corpus, root, tmp_path_factory):
  """An uninterrupted run, to compare others with."""
  workdir = tmp_path_factory.mktemp('finished')
  config = small.config(corpus, root)
  return config, workdir, run(config, workdir)


def test_a_run_writes_what_it_promises(finished):
  config, workdir, result = finished
  assert result == files.read_json(workdir / 'result.json')
  assert result['status'] == 'done'
  assert result['tokens'] == config.total_steps * config.batch_size * config.data.seq_len
  assert set(result['final']['bpb']) == {'easy', 'hard'}
  kinds = [(record['kind'], record['step']) for record in lines(workdir)]
  assert kinds.count(('eval', 6)) == 1
  assert [step for kind, step in kinds if kind == 'train'] == [1, 2, 3, 4, 5, 6]
  examples = lines(workdir, 'examples.jsonl')
  assert [len(e['example_id']) for e in examples] == [config.batch_size] * 6
  epochs = sum(e * n for e, n in zip(result['epochs'].values(), result['corpus']['sizes']))
  assert round(epochs) == config.total_steps * config.batch_size


def test_weights_are_neutral_in_burn_in_and_of_mean_one_after(finished):
  config, workdir, _ = finished
  for record in lines(workdir, 'examples.jsonl'):
    weights = np.array(record['weight'])
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
    step_signal = record['step'] - 1
    assert (np.ptp(weights) == 0) == (step_signal < config.w.loss.start)


def test_loss_falls_and_the_easy_domain_is_pushed_down(corpus, root, tmp_path):
  config = small.config(corpus, root, steps=60)
  config.eval.every = config.checkpoint.every = 60
  run(config, tmp_path)
  steps = [r for r in lines(tmp_path) if r['kind'] == 'train']
  assert steps[-1]['loss'] < steps[0]['loss'] - 1
  late = [r['domain'] for r in steps[-20:] if len(r['domain']) == 2]
  weight = {d: np.mean([r[d]['weight'] for r in late]) for d in ('easy', 'hard')}
  assert weight['easy'] < 0.9 < 1.1 < weight['hard']


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
  config, workdir, result = finished
  monkeypatch.setattr(train, 'build', lambda *_: pytest.fail('built again'))
  assert run(config, workdir) == result


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch):
  config, workdir, result = finished
  with small.interrupted_after(4, monkeypatch):
    run(config, tmp_path)
  # Lines beyond the checkpoint, and a torn one, as a kill leaves them.
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write(json.dumps({'kind': 'train', 'step': 5, 'loss': -1.0}) + '\n{"kind": "tra')
  assert run(config, tmp_path)['final'] == result['final']
  assert lines(tmp_path) == lines(workdir)
  assert lines(tmp_path, 'examples.jsonl') == lines(workdir, 'examples.jsonl')
  jax.tree.map(
    np.testing.assert_array_equal, parameters(config, tmp_path), parameters(config, workdir)
  )


@pytest.mark.parametrize('jump', [-1e6, 1e6])
def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, monkeypatch, jump):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.log.progress = True
  real, now, step = time.time, [0.0], step_log.StepLog.step
  monkeypatch.setattr(time, 'time', lambda: real() + now[0])

  def jump_and_log(*args):
    now[0] += jump
    step(*args)

  monkeypatch.setattr(step_log.StepLog, 'step', jump_and_log)
  with small.interrupted_after(4, monkeypatch):
    run(config, tmp_path)
  result = run(config, tmp_path)
  assert lines(tmp_path) == lines(workdir)
  assert lines(tmp_path, 'examples.jsonl') == lines(workdir, 'examples.jsonl')
  assert 0 < result['seconds'] < 300
  assert all(0 <= r['wall']['seconds'] < 300 for r in records(tmp_path) if r['kind'] == 'train')
  assert checkpoints.committed_steps(tmp_path / 'checkpoints') == [4, 6]


def test_the_best_checkpoint_survives_and_can_be_evaluated(finished, tmp_path, monkeypatch):
  """Training that gets worse keeps its best state, also across a kill."""
  config, _, _ = finished
  config = config.copy_and_resolve_references()
  config.optim.update(lr=1.0, clip=0.0, warmup_steps=8, schedule='constant')
  config.total_steps = 10
  config.checkpoint.update(keep=1, best='macro_bpb')
  run(config, tmp_path / 'whole')
  with small.interrupted_after(8, monkeypatch):
    run(config, tmp_path / 'killed')
  run(config, tmp_path / 'killed')
  scores = {r['step']: r['macro_bpb'] for r in lines(tmp_path / 'whole') if r['kind'] == 'eval'}
  best = min(scores, key=scores.get)
  assert best < 10
  for name in ('whole', 'killed'):
    workdir = tmp_path / name
    assert checkpoints.committed_steps(workdir / 'checkpoints') == [best, 10]
    for step, score in (('best', scores[best]), ('10', scores[10]), ('', scores[10])):
      found, _ = evaluate.evaluate(str(workdir), split='validation', max_blocks=2, step=step)
      assert found['macro_bpb'] == score


def test_a_run_directory_that_vanishes_stays_away(config, tmp_path, monkeypatch):
  """Nothing writes half a run into a new one of its name."""
  save = checkpoints.Checkpoints.save

  def save_in_vain(self, *arguments):
    self.wait()
    shutil.rmtree(tmp_path / 'run')
    save(self, *arguments)

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', save_in_vain)
  with pytest.raises(UserError, match='has vanished while the run was going on'):
    run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_killed_between_the_last_checkpoint_and_the_result(finished, tmp_path, monkeypatch):
  config, _, result = finished
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train, 'summarize_run', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    run(config, tmp_path)
  assert run(config, tmp_path)['final'] == result['final']


@pytest.mark.parametrize('mesh', [(8, 1), (2, 4)])
def test_eight_devices_train_like_one(finished, tmp_path, mesh):
  config, workdir, result = finished
  config = config.copy_and_resolve_references()
  config.mesh.data, config.mesh.fsdp = mesh
  many = run(config, tmp_path, devices=8)
  assert [e['example_id'] for e in lines(tmp_path, 'examples.jsonl')] == [
    e['example_id'] for e in lines(workdir, 'examples.jsonl')
  ]
  np.testing.assert_allclose(many['final']['macro_bpb'], result['final']['macro_bpb'], rtol=1e-4)
  for a, b in zip(lines(tmp_path, 'examples.jsonl'), lines(workdir, 'examples.jsonl')):
    np.testing.assert_allclose(a['weight'], b['weight'], rtol=2e-3)


def test_accumulation_in_global_scope_is_one_big_batch(finished, tmp_path):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.microbatches = 4
  run(config, tmp_path)
  for a, b in zip(lines(tmp_path, 'examples.jsonl'), lines(workdir, 'examples.jsonl')):
    assert a['example_id'] == b['example_id']
    np.testing.assert_allclose(a['weight'], b['weight'], rtol=2e-3)


def test_init_from_another_run(finished, tmp_path):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.checkpoint.init_from = str(workdir)
  config.optim.lr = 1e-9
  run(config, tmp_path)
  first = next(r for r in lines(tmp_path) if r['kind'] == 'eval')
  last = [r for r in lines(workdir) if r['kind'] == 'eval'][-1]
  np.testing.assert_allclose(first['macro_bpb'], last['macro_bpb'], rtol=1e-4)


def test_weights_of_the_dataset_reach_the_loss(config, tmp_path):
  """A `weight` field multiplies every token of its document; the weighting comes on top."""
  folder = small.write_corpus(tmp_path / 'corpus')
  for path in folder.glob('*.train.jsonl'):
    weight = {'easy': 0.25, 'hard': 2.0}[path.name.partition('.')[0]]
    weighted = [json.loads(line) | {'weight': weight} for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(record) + '\n' for record in weighted))
  config.data.path = str(folder)
  common.set_weighting(config, 'uniform')
  run(config, tmp_path / 'run')
  corpus = train.build(config, jax.devices()[:1]).corpus
  seen = {
    corpus.domains[corpus.locate(i)[0]]: weight
    for record in lines(tmp_path / 'run', 'examples.jsonl')
    for i, weight in zip(record['example_id'], record['weight'])
  }
  assert seen == {'easy': 0.25, 'hard': 2.0}


def test_dry_run_says_what_it_would_cost(config):
  built = train.build(config, jax.devices()[:1])
  text = dry_run.describe(built, dry_run.report(built))
  for part in ('parameters: ', 'FLOP', 'temporary', 'easy', 'hard', 'epochs'):
    assert part in text


# Numbers that stop being finite


@pytest.fixture
def exploding(config):
  config.optim.update(lr=1e30, clip=1e30)
  config.checkpoint.every = 1
  return config


def test_nonfinite_abort_names_the_examples_and_keeps_good_checkpoints(exploding, tmp_path):
  with pytest.raises(NonFiniteError, match=r'step \d+: .*abort\.json'):
    run(exploding, tmp_path)
  report = files.read_json(tmp_path / 'abort.json')
  assert report['examples']
  assert {'example_id', 'loss', 'weight', 'domain', 'text'} <= set(report['examples'][0])
  for step in checkpoints.committed_steps(tmp_path / 'checkpoints'):
    assert step < report['step']
  assert not (tmp_path / 'result.json').exists()
  ended = provenance.read(tmp_path)['sessions'][0]['ended']
  assert (ended['status'], ended['error'], ended['exit_status']) == ('aborted', 'NonFiniteError', 3)
  assert 'Lower config.optim.lr' in ended['message']


@pytest.mark.slow
def test_nonfinite_skip_goes_on(exploding, tmp_path, monkeypatch):
  """Updates that are not finite are left out; parameters stay finite."""
  exploding.nonfinite = 'skip'
  exploding.optim.lr = 1e-3
  make = train.optim.make_optimizer

  def broken_on_odd_steps(*args, **kwargs):
    tx, schedule = make(*args, **kwargs)

    def update(grads, state, params=None):
      count, inner = state
      grads = jax.tree.map(lambda g: jnp.where(count % 2 == 1, jnp.nan, g), grads)
      updates, inner = tx.update(grads, inner, params)
      return updates, (count + 1, inner)

    return tx._replace(
      init=lambda p: (jnp.zeros((), jnp.int32), tx.init(p)), update=update
    ), schedule

  monkeypatch.setattr(train.optim, 'make_optimizer', broken_on_odd_steps)
  result = run(exploding, tmp_path)
  assert np.isfinite(result['final']['macro_bpb'])
  built = train.build(exploding, jax.devices()[:1])
  with checkpoints.Checkpoints(tmp_path / 'checkpoints') as saved:
    state, _, _ = saved.restore(built.abstract_state)
  assert int(state.opt_state[1].total_notfinite) == 3  # steps 2, 4 and 6


# Bad input: one line, before any training


def refuses(config, workdir, message, devices=1):
  with pytest.raises(UserError, match=message) as error:
    run(config, workdir, devices)
  assert '\n' not in str(error.value)
  assert not (workdir / 'metrics.jsonl').exists()


def test_a_missing_corpus(config, tmp_path):
  config.data.path = str(tmp_path / 'nowhere')
  refuses(config, tmp_path / 'run', 'nowhere')


def test_an_empty_domain(config, tmp_path):
  folder = small.write_corpus(tmp_path / 'corpus')
  (folder / 'void.train.jsonl').write_text('')
  config.data.path = str(folder)
  refuses(config, tmp_path / 'run', 'void')


def test_a_corrupt_gzip(config, tmp_path):
  folder = small.write_corpus(tmp_path / 'corpus')
  packed = gzip.compress(b'{"text": "a whole line of text"}\n' * 500)
  (folder / 'bad.train.jsonl.gz').write_bytes(packed[: len(packed) // 2])
  config.data.path = str(folder)
  refuses(config, tmp_path / 'run', r'bad\.train\.jsonl\.gz')


def test_text_that_is_not_utf8(config, tmp_path):
  folder = small.write_corpus(tmp_path / 'corpus')
  (folder / 'latin.train.jsonl').write_bytes(b'{"text": "caf\xe9"}\n')
  config.data.path = str(folder)
  refuses(config, tmp_path / 'run', r'latin\.train\.jsonl.*UTF-8')


def test_a_batch_that_does_not_fit_the_mesh(config, tmp_path):
  config.batch_size = 12
  refuses(config, tmp_path, 'batch_size=12', devices=8)


def test_a_sequence_longer_than_the_model(config, tmp_path):
  config.model.max_len = 16
  refuses(config, tmp_path, 'max_len')


@pytest.mark.parametrize(
  ('weighting', 'message'),
  [
    ({'fn': 'linuper', 'temperature': 0.4}, 'linupper'),
    ({'fn': 'linupper', 'temperature': -1.0}, 'temperature'),
    ({'fn': 'linupper', 'temprature': 1.0}, 'temprature'),
  ],
)
def test_a_weighting_that_does_not_exist(config, tmp_path, weighting, message):
  config.w.loss = weighting
  refuses(config, tmp_path, message)


def test_a_missing_workdir_is_one_line():
  command = [sys.executable, '-m', 'experiments.main', '--config=configs/quickstart.py']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == 'error: --workdir is missing: try --workdir=runs/first\n'


def test_a_workdir_with_another_run(finished, tmp_path):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.optim.lr = 1e-4
  with pytest.raises(UserError, match=r'optim\.lr'):
    run(config, workdir)


def test_a_workdir_that_another_process_uses(config, tmp_path):
  with files.exclusive(tmp_path):
    refuses(config, tmp_path, 'in use by another process')


def test_set_weighting_reaches_the_step(config, tmp_path):
  common.set_weighting(config, 'uniform')
  run(config, tmp_path)
  for record in lines(tmp_path, 'examples.jsonl'):
    assert set(record['weight']) == {1.0}
