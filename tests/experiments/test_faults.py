"""Killed at any moment, a run goes on and ends as if nothing had happened, bit for bit; and the
program that checks this notices when it is not so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import checkpoints, faults, files, train
from experiments import config as config_lib
from experiments.errors import UserError
from tests.experiments import small

STEPS = 60
KEYS = {'total_steps': STEPS, 'checkpoint.every': 5, 'eval.every': 10}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A folder for runs, with the environment of programs that run there."""
  base = tmp_path_factory.mktemp('faults')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_NUM_CPU_DEVICES', '1')
    patch.setenv('JAXRW_DATA', str(base / 'prepared'))
    yield base


@pytest.fixture(scope='module')
def plan(base) -> faults.Plan:
  """What a study of the tiny corpus is made of; the mixture moves with the gradients."""
  corpus = small.write_corpus(base / 'corpus')
  mixture = 'mixture=dga:rate=0.5:every=2:lag=3:floor=0.2:normalize=cosine'
  return faults.Plan(base / 'study', f'configs/lm.py:path={corpus},{mixture},quick', KEYS, kills=3)


def program(plan: faults.Plan, *more: str) -> subprocess.CompletedProcess:
  """The command line with the plan's config and folder."""
  command = [
    *(sys.executable, '-m', 'experiments.faults', f'--config={plan.spec}'),
    *(f'--workdir={plan.folder}', f'--kills={plan.kills}', *more),
    *(f'--config.{key}={value}' for key, value in plan.overrides.items()),
  ]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope='module')
def killed(plan):
  """A finished study: a kill in start-up, one in a save, and a SIGTERM."""
  plan = plan._replace(seed=7, signals=faults.SIGNALS['mixed'])
  faults.study(plan)
  return plan


@pytest.mark.slow
def test_nothing_is_lost(killed):
  found = files.read_json(killed.folder / 'faults.json')
  assert found['steps_differing'] == found['results_differing'] == found['arrays_differing'] == []
  assert (found['kills'], found['kills_lost'], found['checkpoints_lost']) == (3, 0, [])
  assert found['during']['save'] >= 1
  assert found['arrays'] > 40
  assert not faults.something_lost(found)
  shown = ' '.join(faults.table(found).split())
  assert f'kills survived 3 kills lost 0 steps that differ 0 of {STEPS}' in shown
  lives = found['lives']
  stopped = next(i for i, life in enumerate(lives) if life['statuses'] == [75])
  assert lives[stopped + 1]['resumed'] == lives[stopped]['reached'] == lives[stopped]['sealed'][-1]
  assert found['steps_redone'][stopped] == 0
  said = faults.log_of(killed.folder / 'logs' / f'{stopped:04}', 0).read_text()
  assert f'stopped: saved after step {lives[stopped]["reached"]}; the same command goes on' in said
  assert 'Traceback' not in said


def spoil_metrics(run: Path) -> None:
  path = run / 'metrics.jsonl'
  path.write_text(path.read_text().replace('"step": 30, "loss": ', '"step": 30, "loss": 1'))


def spoil_ledger(run: Path) -> None:
  next((run / 'ledger').glob('part-*-00000020.parquet')).unlink()


def spoil_parameter(run: Path) -> None:
  """Another value of one parameter, in a checkpoint that is whole."""
  config, directory = config_lib.read(run), run / 'checkpoints'
  shape = train.build(config, jax.devices()[:1]).abstract_state
  with checkpoints.Checkpoints(directory) as saved:
    state, *rest = saved.restore(shape, STEPS)
  shutil.rmtree(directory / str(STEPS))
  state.params['wte']['embedding'] = state.params['wte']['embedding'].at[0, 0].add(1e-7)
  with checkpoints.Checkpoints(directory) as saved:
    saved.save(STEPS, state, *rest)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('spoil', 'expected'),
  [
    (spoil_metrics, {'steps_differing': [30]}),
    (spoil_ledger, {'steps_differing': [16, 17, 18, 19, 20]}),
    (spoil_parameter, {'arrays_differing': ['params/wte/embedding']}),
  ],
)
def test_a_difference_is_found(killed, tmp_path, spoil, expected):
  plan = killed._replace(folder=tmp_path / 'spoiled')
  shutil.copytree(killed.folder, plan.folder)
  spoil(plan.folder / 'disturbed')
  found = faults.study(plan)
  nothing = {f'{name}_differing': [] for name in faults.Outcome._fields} | {'checkpoints_lost': []}
  assert {key: found[key] for key in nothing} == nothing | expected
  assert faults.something_lost(found)


@pytest.mark.slow
def test_a_deleted_checkpoint_ends_in_status_1(killed, tmp_path):
  plan = killed._replace(folder=tmp_path / 'spoiled')
  shutil.copytree(killed.folder, plan.folder)
  shutil.rmtree(plan.folder / 'disturbed' / 'checkpoints' / str(STEPS))
  done = program(plan, '--signal=mixed', '--seed=7')
  assert done.returncode == 1
  assert files.read_json(plan.folder / 'faults.json')['checkpoints_lost'] == [STEPS]
  assert 'cannot be compared: there is no checkpoint' in done.stdout
  assert 'not known' in done.stdout


# A program that only pretends to train, and has the faults that ours should not have.
FAKE = """
import hashlib, json, os, shutil, sys, time
from pathlib import Path

flags = dict(arg.removeprefix('--').partition('=')[::2] for arg in sys.argv[1:])
workdir = Path(flags['workdir'])
fault = os.environ['FAULT'] if workdir.name == 'disturbed' else ''
if flags.get('process_id') == '1':
  while fault == 'outlives' or not (workdir / 'result.json').exists():
    time.sleep(0.01)
  sys.exit()
directory, record = workdir / 'checkpoints', workdir / 'metrics.jsonl'
directory.mkdir(parents=True, exist_ok=True)
for half in directory.glob('*-tmp'):
  shutil.rmtree(half)
steps = [int(path.name) for path in directory.iterdir()]
resumed = max(steps, default=0)
if steps and fault == 'fails':
  sys.exit('error: it cannot')
if steps and fault == 'hangs':
  time.sleep(60)
if steps and fault == 'damages':
  (directory / str(resumed) / 'data').write_text('other')
if fault == 'forgets':
  resumed = 0
if resumed:
  print('resuming after step', resumed, flush=True)
lines = record.read_text().splitlines() if record.exists() else []
kept = [line + '\\n' for line in lines if json.loads(line)['step'] <= resumed]
(workdir / 'new').write_text(''.join(kept))
(workdir / 'new').rename(record)
with record.open('a', buffering=1) as file:
  for step in range(resumed + 1, int(flags['config.total_steps']) + 1):
    time.sleep(0.01)
    file.write(json.dumps({'kind': 'train', 'step': step}) + '\\n')
    if step % 10 == 0:
      time.sleep(0.05)
      file.write(json.dumps({'kind': 'eval', 'step': step}) + '\\n')
    path = directory / str(step)
    if step % 5 == 0 and not path.exists():
      half = directory / f'{step}.orbax-checkpoint-tmp'
      half.mkdir()
      (half / 'data').write_text(str(step))
      time.sleep(0.03)
      half.rename(path)
      seal = {'data': hashlib.sha256(str(step).encode()).hexdigest()}
      (path / 'seal').write_text(json.dumps(seal))
      (path / 'seal').rename(path / 'sha256.json')
      for old in sorted(directory.iterdir(), key=lambda path: int(path.name))[:-2]:
        shutil.rmtree(old)
(workdir / 'result.json').write_text('{}')
"""


@pytest.fixture
def pretended(plan, tmp_path, monkeypatch):
  """A function of a fault and of changes of the plan: what the study finds of the program above."""
  (tmp_path / 'fake.py').write_text(FAKE)
  monkeypatch.setattr(faults, 'PROGRAM', (str(tmp_path / 'fake.py'),))

  def find(fault, **changes):
    monkeypatch.setenv('FAULT', fault)
    return faults.study(plan._replace(folder=tmp_path / 'runs', kills=4, **changes))

  return find


# It writes no more than is watched, so there is nothing to compare in the end.
NOTHING_TO_COMPARE = 'cannot be compared: '


def test_what_a_kill_costs(pretended):
  found = pretended('')
  assert (found['kills'], found['kills_lost'], found['checkpoints_lost']) == (4, 0, [])
  (problem,) = found['problems']
  assert problem.startswith(NOTHING_TO_COMPARE)
  lives = found['lives']
  # What counts as redone is what the program did twice, and no kill strikes before its moment.
  done = sum(life['reached'] - life['resumed'] for life in lives if life['reached'] is not None)
  assert sum(found['steps_redone']) == done - STEPS
  for life in lives[:-1]:
    if life['killed']['during'] != 'start':
      assert life['reached'] >= life['killed']['step']
      assert life['ready'] <= life['seconds']
  assert sum(found['during'].values()) >= 4
  assert found['save_interval_seconds'] == pytest.approx(5 * found['usual_seconds']['step'])


@pytest.mark.parametrize(
  ('fault', 'problem'),
  [
    ('fails', 'ended with status 1: error: it cannot'),
    ('hangs', 'showed no sign of life for 5 s'),
    ('forgets', 'resumed after step 0 with checkpoint '),
    ('damages', NOTHING_TO_COMPARE),
  ],
)
def test_a_program_with_a_fault_loses_kills(pretended, fault, problem):
  found = pretended(fault, patience=5.0 if fault == 'hangs' else 60.0)
  assert problem in found['problems'][0]
  assert found['kills_lost'] >= 1
  assert bool(found['checkpoints_lost']) == (fault == 'damages')
  assert faults.something_lost(found)
  assert found['problems'][0] in faults.table(found)


def test_who_outlives_another_is_killed_after_the_grace_period(pretended):
  """The second process notices nothing; so kills of the first, and the end, leave it alone."""
  found = pretended('outlives', processes=2, grace=0.3)
  alone = [life for life in found['lives'] if life['killed'] and life['killed']['member'] == 0]
  assert alone
  assert all(life['forced'] == 1 and life['outlived'] >= 0.3 for life in alone)
  assert 'others had to be killed, too' in faults.table(found)
  assert 'ended with status -9' in found['problems'][0]


def test_a_study_goes_on_where_it_was_stopped(pretended, monkeypatch):
  live, lives = faults.live, []

  def interrupted(*args, **kwargs):
    lives.append(live(*args, **kwargs))
    if len(lives) == 3:
      raise KeyboardInterrupt
    return lives[-1]

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(faults, 'live', interrupted)
    pretended('')
  found = pretended('')
  assert found['kills'] == 4
  assert found['lives'][0]['seconds'] == lives[1].seconds  # the first was the undisturbed run
  with pytest.raises(UserError, match='holds a study of another config or number of processes'):
    pretended('', processes=2)


def test_mistakes_are_told_before_anything_runs(plan):
  short = plan._replace(overrides={**KEYS, 'total_steps': 30})
  with pytest.raises(UserError, match=r'config.total_steps=30: must be above 30, three times'):
    faults.study(short)
  done = program(plan._replace(folder=''))
  assert done.returncode == 2
  assert done.stderr == 'error: --workdir is missing: try --workdir=runs/faults\n'


@pytest.mark.slow
def test_ten_kills(plan):
  found = faults.study(plan._replace(folder=plan.folder.with_name('ten'), kills=10))
  assert (found['kills'], found['kills_lost']) == (10, 0)
  assert not faults.something_lost(found), faults.table(found)


@pytest.mark.slow
def test_two_processes(plan):
  """Killed together, or one of them, or one told to stop and telling the other."""
  two = plan._replace(folder=plan.folder.with_name('two'), kills=4, processes=2, grace=20)
  found = faults.study(two._replace(signals=faults.SIGNALS['mixed']))
  assert (found['kills'], found['kills_lost']) == (4, 0)
  assert not faults.something_lost(found), faults.table(found)
