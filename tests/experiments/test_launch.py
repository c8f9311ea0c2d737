"""Sweeps: which units there are, what is run, skipped, tried again, stopped; what comes out."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs import common
from experiments import config as config_lib
from experiments import files, launch, plots
from experiments.errors import StoppedError, UserError
from experiments.sweep import progress, results, runners, units, worker
from tests.experiments import small
from tests.experiments.fake_runs import FakeTrain, final_bpb
from tests.experiments.fake_slurm import Slurm

QUICKSTART = 'configs/quickstart.py'
GRID = 'arm=uniform,linupper:1.0 optim.lr=1e-3,3e-3 seed=0,1'


def make(folder, named=GRID, spec=QUICKSTART, shared=None):
  config = config_lib.load(spec)
  config.update_from_flattened_dict(shared or {})
  named = units.parse(named) if isinstance(named, str) else named
  return units.make_sweep(spec, shared or {}, config, named, folder)


# Which units there are


def test_helpers_for_units():
  assert list(common.grid({'a': (1, 2), 'b': 'xy'})) == [
    {'a': 1, 'b': 'x'},
    {'a': 1, 'b': 'y'},
    {'a': 2, 'b': 'x'},
    {'a': 2, 'b': 'y'},
  ]
  assert list(common.paired({'a': (1, 2), 'b': 'xy'})) == [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]
  assert list(common.seeds([{'a': 1}, {'a': 2}], 2, first=5)) == [
    {'a': 1, 'seed': 5},
    {'a': 2, 'seed': 5},
    {'a': 1, 'seed': 6},
    {'a': 2, 'seed': 6},
  ]
  with pytest.raises(common.ConfigError, match='a has 2, b has 1'):
    list(common.paired({'a': (1, 2), 'b': 'x'}))


def test_random_units_are_spread_as_they_should_be_and_the_same_again():
  axes = {
    'lr': common.log_uniform(1e-4, 1e-2),
    'clip': common.uniform(1, 3),
    'arm': common.choice('a', 'b'),
  }
  found = list(common.sampled(axes, 400, seed=3))
  assert found == list(common.sampled(axes, 400, seed=3))
  assert found[:5] != list(common.sampled(axes, 5, seed=4))
  assert all(1e-4 <= unit['lr'] <= 1e-2 and 1 <= unit['clip'] <= 3 for unit in found)
  # Half of a log-uniform lies below the geometric mean; of a uniform, below the arithmetic one.
  for key, middle in (('lr', 1e-3), ('clip', 2)):
    assert abs(sum(unit[key] < middle for unit in found) - 200) < 50
  assert {unit['arm'] for unit in found} == {'a', 'b'}


def test_a_config_brings_its_sweep(tmp_path):
  found = config_lib.sweep(QUICKSTART)
  assert len(found) == 12
  assert len(make(tmp_path, found).units) == 12
  assert config_lib.sweep('configs/lm.py') == []
  (tmp_path / 'mine.py').write_text('def sweep(add):\n  add(seed=1)\n  add(seed=1 / 0)\n')
  with pytest.raises(UserError, match=r'mine\.py, line 3: ZeroDivisionError'):
    config_lib.sweep(str(tmp_path / 'mine.py'))


def test_a_grid_on_the_command_line(tmp_path):
  sweep = make(
    tmp_path,
    "arm=uniform,even:=linupper:1.0@keep.rows=8@mixture=odm:lag=4 data.mixture='uniform except qa' "
    'model.scan=true data.domains=code+docs,docs',
  )
  first, *_, last = sweep.units
  assert first.overrides == {
    'arm': 'uniform', 'data.mixture': 'uniform except qa', 'model.scan': True,
    'data.domains': ('code', 'docs'),
  }  # fmt: skip
  assert len(sweep.units) == 4
  assert (last.config.keep.rows, last.config.mixture.fn, last.config.w.loss.fn) == (
    *(8, 'odm', 'linupper'),
  )


def test_the_command_of_a_unit_makes_its_config(tmp_path):
  """What experiments.main would train is what was checked."""
  shared = {'total_steps': 60, 'data.domains': ('code', 'docs')}
  named = 'arm=odm:=linupper:1.0@mixture=odm optim.lr=1e-5 optim.clip=0 log.tensorboard=false'
  sweep = make(tmp_path / 'sweep', named, shared=shared)
  (unit,) = sweep.units
  command = sweep.command(unit)
  assert command[1:4] == ['-m', 'experiments.main', f'--config={QUICKSTART}']
  code = (
    'import runpy, sys; from experiments import train, config\n'
    f'train.train = lambda given, *_, **__: sys.exit(config.to_json(given))\n'
    f'sys.argv = {command[2:]!r}\n'
    'runpy.run_module("experiments.main", run_name="__main__")\n'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.stderr == config_lib.to_json(unit.config) + '\n'
  assert f'{QUICKSTART} --arm=linupper:1.0@mixture=odm' in done.stdout


def test_a_name_is_readable_and_of_its_own(tmp_path):
  names = [unit.name for unit in make(tmp_path).units]
  assert len(set(names)) == 8
  assert names[0].startswith('uniform__lr0.001__seed0__')
  assert names == [unit.name for unit in make(tmp_path, GRID.replace('1e-3', '0.001')).units]
  # Too close for the readable part.
  close = [unit.name for unit in make(tmp_path, 'optim.lr=0.00100001,0.00100002').units]
  assert len(set(close)) == 2


@pytest.mark.parametrize(
  ('named', 'message'),
  [
    ('', 'nothing to sweep'),
    ('seed', "'seed' is not a new <key>=<value>,<value>"),
    ('seed=', "'seed=' is not a new"),
    ('seed=1,', "'seed=1,' is not a new"),
    ('seed=1 seed=2', "'seed=2' is not a new"),
    ("arm='uniform", 'No closing quotation'),
    ('seed=1,2 sead=0', "unit seed=1 sead=0: config.sead: no such key (did you mean 'seed'?)"),
    ('optim=1', 'config.optim: no such key'),
    ('seed=0,1.5', "unit seed=1.5: config.seed='1.5': must be of type int"),
    ([{'seed': True}], 'config.seed=True: must be of type int'),
    ([{'model.scan': 1}], 'config.model.scan=1: must be of type bool'),
    ('optim.lr=-1', 'config.optim.lr=-1.0: must be above 0'),
    ('arm=uniform,linuper:1.0', 'unit arm=linuper:1.0'),
    ('arm=linupper:-1', 'positive temperature'),
    ('arm=uniform@mixture=odmm', "did you mean 'odm'"),
    ('arm=linupper,linupper:0.4', 'units arm=linupper and arm=linupper:0.4 are the same run'),
  ],
)
def test_bad_units_are_found_before_anything_starts(tmp_path, named, message):
  with pytest.raises((UserError, common.ConfigError)) as error:
    make(tmp_path / 'sweep', named)
  assert message in str(error.value)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'sweep').exists()


def test_a_directory_holds_sweeps_of_one_config(tmp_path):
  make(tmp_path).write()
  assert files.read_json(make(tmp_path).units[0].folder / 'overrides.json') == {
    'arm': 'uniform', 'optim.lr': 1e-3, 'seed': 0
  }  # fmt: skip
  make(tmp_path, 'seed=7').write()
  make(tmp_path, shared={'checkpoint.every': 7}).write()  # changes no number
  with pytest.raises(UserError, match='total_steps is 500 there and 90 here'):
    make(tmp_path, shared={'total_steps': 90}).write()


# The loop


class FakeRunner:
  """Runs units at the next look, one after the other, by a `FakeTrain`.

  Args:
    statuses: how the attempts end that do not finish their unit: {name: [2, 75]}.
  """

  interval = 0.0

  def __init__(self, statuses=None, train=None):
    self.statuses, self.train = statuses or {}, train or FakeTrain()
    self.started, self.stopped, self.under_way = [], [], []

  def alive(self, units):
    if self.under_way and not self.stopped:
      unit = self.under_way.pop(0)
      unit.job.mkdir(parents=True, exist_ok=True)
      status = (self.statuses.get(unit.name) or [0]).pop(0)
      if status:
        (unit.job / 'log.txt').write_text(f'...\nends with {status}\n\n')
      else:
        self.train(unit.config, unit.folder)
      files.write_text(unit.job / 'status', str(status))
    return {unit.name: 'running' for unit in self.under_way}

  def room(self, alive):
    return 3 - len(alive)

  def start(self, chosen):
    self.started += [unit.name for unit in chosen]
    self.under_way += chosen

  def stop(self, chosen):
    self.stopped += [unit.name for unit in chosen]
    self.under_way = []


def run(sweep, runner):
  """(units that failed, lines that were printed)."""
  stream = io.StringIO()
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    with progress.Progress(sweep.units, 'macro_bpb', stream) as shown:
      failed = launch.launch(sweep, runner, shown)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  return [unit.name for unit in failed], stream.getvalue().splitlines()


def test_finished_units_are_skipped_and_failed_ones_are_tried_again(tmp_path):
  sweep = make(tmp_path)
  names = [unit.name for unit in sweep.units]
  runner = FakeRunner({names[1]: [2], names[3]: [75, 75], names[4]: [-9]})
  failed, lines = run(sweep, runner)
  assert failed == [names[1], names[4]]
  assert sorted(runner.started) == sorted([*names, names[3], names[3]])
  assert f'failed   {names[1]}  ends with 2  ({tmp_path}/jobs/{names[1]}/log.txt)' in lines
  assert any(line.startswith(f'failed   {names[4]}  killed by SIGKILL; ends') for line in lines)
  again = FakeRunner()
  failed, lines = run(sweep, again)
  assert failed == []
  assert again.started == [names[1], names[4]]
  assert sum(line.endswith('(was finished)') for line in lines) == 6
  assert run(sweep, third := FakeRunner())[0] == third.started == []


def test_a_diverged_unit_is_a_result(tmp_path):
  sweep = make(tmp_path)

  class Diverging(FakeRunner):
    def alive(self, units):
      try:
        return super().alive(units)
      except ArithmeticError:
        return self.alive(units)

  def train(config, folder):
    if config.seed == 1 and config.optim.lr == 3e-3:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / 'abort.json').write_text('{}')
    else:
      FakeTrain()(config, folder)

  assert run(sweep, FakeRunner(train=train))[0] == []
  again = FakeRunner()
  _, lines = run(sweep, again)
  assert again.started == []
  assert sum(line.startswith('diverged') for line in lines) == 2
  found = results.groups(sweep.units, 'macro_bpb')
  assert [group.diverged for group in found] == [0, 1, 0, 1]
  assert '1, 1 diverged' in results.text(found, 'macro_bpb')
  assert [row['state'] for row in results.rows(sweep.units)].count('diverged') == 2


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_stops_its_units_and_starts_no_more(tmp_path, number):
  class Telling(FakeRunner):
    def start(self, chosen):
      super().start(chosen)
      os.kill(os.getpid(), number)

  sweep, runner = make(tmp_path), Telling()
  with pytest.raises(StoppedError, match='the same command goes on'):
    run(sweep, runner)
  assert len(runner.started) == 3
  # One of the three had finished when the units were asked.
  assert runner.stopped == runner.started[1:]


def test_what_another_launcher_has_started_is_waited_for(tmp_path):
  sweep, runner = make(tmp_path), FakeRunner()
  runner.under_way = list(sweep.units[:2])
  run(sweep, runner)
  assert runner.started == [unit.name for unit in sweep.units[2:]]


# What is shown


def write_metrics(folder, step, loss, torn=''):
  folder.mkdir(parents=True, exist_ok=True)
  wall = {'tokens_per_s': 100.0}
  rows = [
    {'kind': 'train', 'step': s, 'loss': loss, 'tokens': 50 * s, 'wall': wall, 'pad': 'x' * 400}
    for s in range(10, step + 1, 10)
  ]
  rows.append({'kind': 'eval', 'step': step, 'macro_bpb': 3.0})
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text + torn)


def test_progress_is_read_from_the_run(tmp_path):
  assert progress.read(tmp_path, 100) == (0, None, None)
  write_metrics(tmp_path, 5000, 2.5, torn='{"kind": "train", "st')
  # 100 steps of 50 tokens at 100 tokens a second.
  assert progress.read(tmp_path, 5100) == (5000, 2.5, 50.0)


def test_lines_say_how_far_units_are(tmp_path, monkeypatch):
  monkeypatch.setattr(progress, 'INTERVAL', 0)
  sweep, stream = make(tmp_path), io.StringIO()
  first, second, *_ = sweep.units
  write_metrics(first.folder, 480, 2.5)
  states = dict.fromkeys((unit.name for unit in sweep.units), 'waiting')
  with progress.Progress(sweep.units, 'macro_bpb', stream) as shown:
    shown.show({**states, first.name: 'running', second.name: 'queued'})
  assert stream.getvalue().splitlines() == [
    f'running  {first.name}',
    f'queued   {second.name}',
    f'         {first.name}  step 480/500  loss 2.5000  ETA 10s',
    '1 running, 1 queued, 6 waiting',
  ]


def test_a_terminal_gets_bars(tmp_path):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  sweep, stream = make(tmp_path), Terminal()
  first = sweep.units[0]
  states = dict.fromkeys((unit.name for unit in sweep.units), 'waiting')
  with progress.Progress(sweep.units, 'macro_bpb', stream) as shown:
    shown.show({**states, first.name: 'running'})
    write_metrics(first.folder, 250, 2.5)
    shown.show({**states, first.name: 'running'})
    assert f'{first.name}  step 250/500  loss 2.5000' in stream.getvalue()
    FakeTrain()(first.config, first.folder)
    shown.show({**states, first.name: 'done'})
  assert f'done     {first.name}  macro_bpb' in stream.getvalue()
  assert '1 done' in stream.getvalue()


# What comes out


@pytest.fixture
def finished(tmp_path):
  sweep = make(tmp_path, GRID.replace('seed=0,1', 'seed=0,1,2'))
  run(sweep, FakeRunner())
  return sweep


def test_the_table_is_the_runs(finished):
  text = results.write(finished.units, 'macro_bpb', finished.folder)
  table = pq.read_table(finished.folder / 'results.parquet').to_pylist()
  assert len(table) == 12
  for unit, row in zip(finished.units, table):
    mine = unit.overrides
    bpb = final_bpb(mine['arm'].removesuffix('.0'), mine['optim.lr'], mine['seed'])
    assert row['macro_bpb'] == pytest.approx(sum(bpb.values()) / 4)
    assert {name: row[f'bpb/{name}'] for name in bpb} == bpb
    assert {key: row[key] for key in mine} == mine
    assert (row['unit'], row['state'], row['steps']) == (unit.name, 'done', 200)
  with (finished.folder / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [float(row['macro_bpb']) for row in rows] == [row['macro_bpb'] for row in table]
  # Mean ± t s / sqrt(n), t of 2 degrees of freedom.
  values = [row['macro_bpb'] for row in table if (row['arm'], row['optim.lr']) == ('uniform', 1e-3)]
  mean = sum(values) / 3
  half = 4.302653 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2) / math.sqrt(3)
  row = text.splitlines()[4].split()
  assert row == ['uniform', '0.001', '3', f'{mean:.4f}', '±', f'{half:.4f}']
  assert text.endswith(f'{finished.folder / "sweep.png"}')


def test_the_picture_is_the_metric_by_arm_over_rates(finished):
  found = results.groups(finished.units, 'macro_bpb')
  (ax,) = results.draw(found, 'macro_bpb', plots.LIGHT).axes
  assert [tick.get_text() for tick in ax.get_xticklabels()] == ['0.001', '0.003']
  means = {line.get_label(): line.get_ydata() for line in ax.lines if line.get_marker() != 'None'}
  assert list(means) == ['uniform', 'linupper:1.0']
  assert list(means['uniform']) == [group.mean for group in found[:2]]
  bars = [tuple(line.get_ydata()) for line in ax.lines if line.get_marker() == 'None']
  assert bars == [group.interval for group in found]


def test_without_rates_arms_stand_side_by_side(tmp_path):
  sweep = make(tmp_path, 'arm=uniform,linupper:1.0,odm:=uniform@mixture=odm seed=0,1')
  run(sweep, FakeRunner())
  (ax,) = results.draw(results.groups(sweep.units, 'micro_bpb'), 'micro_bpb', plots.LIGHT).axes
  assert [tick.get_text() for tick in ax.get_xticklabels()] == ['uniform', 'linupper:1.0', 'odm']


def test_seeds_alone_are_one_group(tmp_path):
  sweep = make(tmp_path, 'seed=0,1')
  run(sweep, FakeRunner())
  lines = results.write(sweep.units, 'macro_bpb', tmp_path).splitlines()
  assert lines[2].split() == ['seeds', 'macro']
  assert lines[4].split()[0] == '2'
  assert not (tmp_path / 'sweep.png').exists()


def test_units_that_differ_in_kind_share_a_table(tmp_path):
  named = [{'seed': 1}, {'optim.clip': 0.5, 'seed': 1}, {'data.domains': ('code', 'docs')}]
  sweep = make(tmp_path, named)
  run(sweep, FakeRunner({sweep.units[2].name: [2]}))
  assert results.write(sweep.units, 'macro_bpb', tmp_path)
  table = pq.read_table(tmp_path / 'results.parquet').to_pylist()
  assert [(row['optim.clip'], row['data.domains']) for row in table] == [
    *((None, None), (0.5, None), (None, 'code+docs')),
  ]
  assert [row['state'] for row in table] == ['done', 'done', 'unfinished']
  assert table[2]['macro_bpb'] is None


# Workers and runners


def python(code: str) -> list[str]:
  return [sys.executable, '-c', textwrap.dedent(code)]


# Trains in ten steps of a tenth of a second; told to stop, it ends with 75 and goes on from there.
TRAINER = """
  import json, os, pathlib, signal, sys, time
  folder = pathlib.Path({folder!r})
  told = []
  signal.signal(signal.SIGTERM, lambda *_: told.append(1))
  path = folder / 'count'
  count = int(path.read_text()) if path.exists() else 0
  print('from', count, 'visible', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)
  while count < 10:
    time.sleep(0.1)
    count += 1
    path.write_text(str(count))
    if told: sys.exit(75)
  (folder / 'result.json').write_text(json.dumps({{'final': {{'macro_bpb': 1.0}}}}))
"""


def trainer(unit) -> list[str]:
  return python(TRAINER.format(folder=str(unit.folder)))


def wait_until(condition, seconds=60) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.fixture
def sweep(tmp_path):
  made = make(tmp_path / 'sweep', 'seed=0,1')
  made.write()
  yield made
  for unit in made.units:
    if worker.is_held(unit.job):
      os.kill(int((unit.job / 'lock').read_text()), signal.SIGKILL)


def ended(runner, sweep):
  return lambda: not runner.alive(sweep.units)


def test_local_units_get_their_shares(sweep, monkeypatch):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  runner = runners.Local(sweep.folder, trainer, jobs=1)
  first, second = sweep.units
  assert runner.room({}) == 1
  runner.start([first])
  assert runner.alive(sweep.units) == {first.name: 'running'}
  assert runner.room(runner.alive(sweep.units)) == 0
  wait_until(ended(runner, sweep))
  assert (first.status, first.run.finished) == (0, True)
  assert (first.job / 'log.txt').read_text() == 'from 0 visible None\n'  # not hidden by submitit
  runner = runners.Local(sweep.folder, trainer, jobs=2, gpus=1)
  runner.start([first, second])
  wait_until(ended(runner, sweep))
  assert [unit.last_words() for unit in sweep.units] == ['from 10 visible 0', 'from 0 visible 1']


def test_a_local_unit_is_stopped_and_goes_on(sweep):
  runner, unit = runners.Local(sweep.folder, trainer, jobs=1), sweep.units[0]
  runner.start([unit])
  wait_until((unit.folder / 'count').exists)
  runner.stop([unit])
  wait_until(ended(runner, sweep))
  assert unit.status == 75
  saved = int((unit.folder / 'count').read_text())
  runner.start([unit])
  wait_until(ended(runner, sweep))
  assert unit.last_words().startswith(f'from {saved} ')
  assert unit.run.finished


def test_units_of_a_launcher_that_is_gone_are_found_and_can_be_stopped(sweep):
  unit, other = sweep.units
  forever = lambda unit: python('import time; time.sleep(600)')
  gone = runners.Local(sweep.folder, forever, jobs=2)
  gone.start([unit])
  wait_until(lambda: worker.is_held(unit.job) and (unit.job / 'lock').read_text())
  runner = runners.Local(sweep.folder, trainer, jobs=1)
  assert runner.alive(sweep.units) == {unit.name: 'running'}
  assert runner.room(runner.alive(sweep.units)) == 0
  # Also when only the run itself is left.
  parent = subprocess.run(
    ['ps', '-o', 'ppid=', '-p', (unit.job / 'lock').read_text()], capture_output=True, text=True
  )
  os.kill(int(parent.stdout), signal.SIGKILL)
  wait_until(lambda: gone.alive([other]) == {} and not gone._started)
  assert runner.alive(sweep.units) == {unit.name: 'running'}
  runner.stop(sweep.units)
  wait_until(ended(runner, sweep))
  assert unit.status is None


def test_what_a_launcher_that_is_gone_has_dealt_out_is_not_dealt_out_again(sweep, monkeypatch):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  unit, other = sweep.units
  forever = lambda unit: python('import time; time.sleep(600)')
  runners.Local(sweep.folder, forever, jobs=2, gpus=1).start([unit])
  wait_until(lambda: worker.is_held(unit.job) and (unit.job / 'lock').read_text())
  runner = runners.Local(sweep.folder, trainer, jobs=2, gpus=1)
  assert runner.room(runner.alive(sweep.units)) == 1
  runner.start([other])
  wait_until(lambda: other.name not in runner.alive(sweep.units))
  assert other.last_words() == 'from 0 visible 1'  # GPU 0 is taken
  runner.stop([unit])
  wait_until(ended(runner, sweep))


def test_ctrl_c_reaches_the_launcher_only(sweep):
  """The terminal sends it to every process of its group."""
  unit = sweep.units[0]
  code = f"""
    import pathlib, signal, time
    from tests.experiments import test_launch as t
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    sweep = t.make({str(sweep.folder)!r}, 'seed=0,1')
    t.runners.Local(sweep.folder, t.trainer, jobs=1).start(sweep.units[:1])
    time.sleep(600)
  """
  launcher = subprocess.Popen(python(code), start_new_session=True,
                              stderr=subprocess.DEVNULL)  # fmt: skip
  wait_until((unit.folder / 'count').exists)
  os.killpg(launcher.pid, signal.SIGINT)
  assert launcher.wait(60) != 0
  wait_until(lambda: not worker.is_held(unit.job))
  assert unit.run.finished


def test_shares_of_gpus(monkeypatch):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  assert runners.gpu_shares(2, 0) == [None, None]
  assert runners.gpu_shares(2, 2) == ['0,1', '2,3']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
  assert runners.gpu_shares(2, 0) == ['4,7', '4,7']
  assert runners.gpu_shares(2, 1) == ['4', '7']
  with pytest.raises(UserError, match='CUDA_VISIBLE_DEVICES=4,7 has only 2'):
    runners.gpu_shares(3, 1)


def start_worker(job: Path, command: list[str], **environ: str) -> subprocess.Popen:
  code = f'from experiments.sweep import worker; worker.run({command!r}, {str(job)!r}, {{}})'
  return subprocess.Popen(python(code), env={**os.environ, **environ})


@pytest.mark.parametrize(
  ('number', 'state', 'again'),
  [
    (signal.SIGUSR1, 'RUNNING', True),  # its time is nearly up
    (signal.SIGUSR2, 'COMPLETING', True),
    (signal.SIGTERM, 'RUNNING', True),  # preempted
    (signal.SIGTERM, 'COMPLETING', False),  # cancelled
    (signal.SIGTERM, 'stop', False),  # by a launcher
  ],
)
def test_a_job_is_queued_again_once_its_run_has_saved(tmp_path, number, state, again):
  slurm, job = Slurm(tmp_path / 'slurm'), tmp_path / 'job'
  slow_to_save = python("""
    import signal, sys, time
    def save(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    print('listening', flush=True)
    time.sleep(600)
  """)
  process = start_worker(
    job, slow_to_save, PATH=slurm.path, SUBMITIT_EXECUTOR='slurm', SLURM_JOB_ID='5',
    SLURM_ARRAY_JOB_ID='4', SLURM_ARRAY_TASK_ID='1',
  )  # fmt: skip
  log = job / 'log.txt'
  wait_until(lambda: log.exists() and 'listening' in log.read_text())
  slurm.state(state)
  if state == 'stop':
    (job / 'stop').touch()
  if number != signal.SIGTERM:  # SLURM warns the run itself, too, and that must not end it
    os.kill(int((job / 'lock').read_text()), number)
  process.send_signal(number)
  assert process.wait(60) == 0
  assert log.read_text() == 'listening\nsaved\n'
  assert (job / 'status').read_text() == '75'
  assert slurm.calls == (['scontrol requeue 4_1'] if again else [])


def test_a_run_that_is_told_before_it_can_listen_counts_as_stopped(tmp_path):
  process = start_worker(
    tmp_path, python('import time; time.sleep(600)'),
    SUBMITIT_EXECUTOR='local', SUBMITIT_LOCAL_JOB_ID='5',
  )  # fmt: skip
  wait_until(lambda: (tmp_path / 'lock').exists() and (tmp_path / 'lock').read_text())
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 0
  assert (tmp_path / 'status').read_text() == '75'


def test_slurm_runs_an_array(slurm, sweep):
  runner = runners.Slurm(
    sweep.folder, trainer, jobs=1, partition='gpu', gpus=2, minutes=90, nodes=2, tasks_per_node=4,
    more={'account': 'mine'},
  )  # fmt: skip
  runner.start(sweep.units)
  assert set(runner.alive(sweep.units).values()) == {'running'}
  options = set(slurm.script.splitlines())
  assert options >= {
    *('#SBATCH --array=0-1%1', '#SBATCH --partition=gpu', '#SBATCH --gpus-per-node=2'),
    *('#SBATCH --time=90', '#SBATCH --nodes=2', '#SBATCH --ntasks-per-node=4'),
    *('#SBATCH --requeue', '#SBATCH --signal=USR2@120', '#SBATCH --account=mine'),
    *('#SBATCH --job-name=sweep', '#SBATCH --open-mode=append'),
  }
  # Another launcher finds them.
  other = runners.Slurm(sweep.folder, trainer, jobs=1)
  assert other.alive(sweep.units).keys() == {unit.name for unit in sweep.units}
  wait_until(ended(other, sweep))
  assert all(unit.run.finished and unit.status == 0 for unit in sweep.units)


def test_slurm_stops_its_units(slurm, sweep):
  runner = runners.Slurm(sweep.folder, trainer, jobs=2, minutes=1)
  runner.start(sweep.units[:1])
  unit = sweep.units[0]
  wait_until((unit.folder / 'count').exists)
  runner.stop([unit])
  wait_until(ended(runner, sweep))
  assert unit.status == 75
  runner.stop(sweep.units[1:])  # without an id, scancel would take all of the user's jobs
  assert slurm.calls == ['scancel --state=PENDING 70', 'scancel --signal=TERM 70']
  assert (unit.job / 'stop').exists()
  assert '#SBATCH --signal=USR2@30' in slurm.script
  runner.start([unit])
  assert not (unit.job / 'stop').exists()


def test_errors_of_slurm_are_one_line(slurm, sweep, monkeypatch):
  (slurm.folder / 'refuse').touch()
  runner = runners.Slurm(sweep.folder, trainer, jobs=2)
  with pytest.raises(UserError, match='sbatch failed: sbatch: error: invalid partition'):
    runner.start(sweep.units)
  (slurm.folder / 'bin/squeue').write_text('#!/bin/sh\necho broken >&2; exit 1\n')
  monkeypatch.setattr(runners, 'PAUSES', (0, 0))
  with pytest.raises(UserError, match='squeue failed: broken'):
    runner.alive(sweep.units)
  monkeypatch.setenv('PATH', str(sweep.folder))
  with pytest.raises(UserError, match=r'--on=slurm: .*srun'):
    runners.Slurm(sweep.folder, trainer, jobs=2)


# The program


def program(*flags: str, **environ: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.launch', *flags],
    capture_output=True, text=True, env={**os.environ, 'TPU_NAME': '', **environ},
  )  # fmt: skip


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--workdir='], '--workdir is missing'),
    (['--metric=accuracy'], '--metric=accuracy: must be one of macro_bpb'),
    (['--sweep=sead=1'], "unit sead=1: config.sead: no such key (did you mean 'seed'?)"),
    (['--on=cloud'], '--on'),
    (['--on=tpu', '--jobs=2'], '--jobs=2: a TPU slice runs one unit after the other'),
  ],
)
def test_mistakes_are_one_line(flags, message, tmp_path):
  workdir = os.path.relpath(tmp_path / 'sweep')
  done = program(f'--config={QUICKSTART}', '--sweep=seed=1', f'--workdir={workdir}', *flags)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'sweep').exists()


def test_mistakes_of_places(tmp_path, monkeypatch):
  monkeypatch.setenv('TPU_NAME', '')
  sweep = make(os.path.relpath(tmp_path / 'sweep'), 'seed=1')
  with pytest.raises(UserError, match=r'^--on=tpu: TPU_NAME is missing: set it, such as [^\n]*$'):
    launch.print_tpu(sweep, sweep.units)
  with pytest.raises(UserError, match=r'--workdir=/\S*: must be relative for a TPU'):
    launch.print_tpu(make(tmp_path, 'seed=1'), [])
  with pytest.raises(UserError, match='--slurm=account: write --slurm=account=mine,qos=high'):
    launch.parse_options('account')
  assert launch.parse_options('account=mine,comment=a=b') == {'account': 'mine', 'comment': 'a=b'}


def test_printing_runs_nothing(tmp_path):
  workdir = os.path.relpath(tmp_path / 'sweep')
  flags = (f'--config={QUICKSTART}', '--sweep=arm=uniform seed=0,1', f'--workdir={workdir}')
  done = program(*flags, '--on=print')
  assert done.returncode == 0, done.stderr
  first, second, hint = done.stdout.splitlines()
  assert first.startswith(f'python -m experiments.main --config={QUICKSTART} --config.seed=0')
  assert f'--arm=uniform --workdir={workdir}/units/uniform__seed1__' in second
  assert hint.startswith('# for the commands of a TPU slice, set TPU_NAME')
  names = dict(TPU_NAME='s', TPU_ZONE='z', TPU_PROJECT='p', TPU_TYPE='v6e-8', TPU_VERSION='v')
  done = program(*flags, '--on=print', **names)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'{first}\n{second}\ngcloud compute tpus queued-resources describe')
  assert done.stdout.count('--config.seed=1 --arm=uniform') == 2
  assert not (tmp_path / 'sweep').exists()


def test_help_does_not_import_jax():
  code = (
    'import sys, runpy; sys.argv = ["launch", "--help"]\n'
    'try: runpy.run_module("experiments.launch", run_name="__main__")\n'
    'except SystemExit as e: assert not e.code\n'
    'assert "jax" not in sys.modules'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert '--sweep' in done.stdout


def real_command(tmp_path, steps: int) -> tuple[list[str], dict[str, str]]:
  corpus = small.write_corpus(tmp_path / 'corpus')
  command = [
    *(sys.executable, '-m', 'experiments.launch', f'--workdir={tmp_path / "sweep"}', '--jobs=2'),
    *(f'--config=configs/lm.py:path={corpus},quick', '--sweep=arm=uniform,linupper:1.0'),
    *('--config.eval.every=1000', '--config.checkpoint.every=1000', '--config.model.n_layer=1'),
    *(f'--config.total_steps={steps}', '--noconfig.model.scan', '--noconfig.log.tensorboard'),
  ]
  return command, {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'JAXRW_DATA': str(tmp_path / 'data')}


@pytest.mark.slow
def test_the_program_trains_a_sweep(tmp_path):
  command, environ = real_command(tmp_path, 4)
  done = subprocess.run(command, env=environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  check_summary(tmp_path / 'sweep', done.stdout)
  # A mistake that only the run can see is shown, and tried again.
  shutil.rmtree(tmp_path / 'corpus')
  (tmp_path / 'corpus').mkdir()
  done = subprocess.run([*command, '--sweep=seed=5'], env=environ, capture_output=True, text=True)
  assert done.returncode == 2
  (line,) = (line for line in done.stderr.splitlines() if line.startswith('failed'))
  assert str(tmp_path / 'corpus') in line
  assert done.stderr.splitlines()[-1].startswith('error: 1 of 1 units failed')


def check_summary(folder: Path, stdout: str) -> None:
  table = pq.read_table(folder / 'results.parquet').to_pylist()
  assert [row['arm'] for row in table] == ['uniform', 'linupper:1.0']
  for row in table:
    final = files.read_json(folder / 'units' / row['unit'] / 'result.json')['final']
    assert row['macro_bpb'] == final['macro_bpb']
    assert f'{final["macro_bpb"]:.4f}' in stdout
  assert (folder / 'sweep.png').stat().st_size > 1000


@pytest.mark.slow
def test_a_sweep_survives_a_killed_launcher_and_goes_on_after_a_stop(tmp_path):
  """Killed, the launcher leaves its units; the next one finds them, is told to stop, and they save;
  then they are killed; the last one ends as if nothing had happened."""
  command, environ = real_command(tmp_path, 1500)
  folder = tmp_path / 'sweep'

  def run(name: str) -> subprocess.Popen:
    # Into files: the units of a launcher that is gone would keep a pipe open.
    with (tmp_path / name).open('w') as out:
      return subprocess.Popen(command, env=environ, stdout=out, stderr=out)

  text = lambda name: (tmp_path / name).read_text()
  steps = lambda: [
    path.read_bytes().count(b'"kind": "train"')
    for path in sorted(folder.glob('units/*/metrics.jsonl'))
  ]
  first = run('first')
  wait_until(lambda: len(steps()) == 2 and min(steps()) > 3, 300)
  first.kill()
  first.wait()
  before = steps()
  wait_until(lambda: all(now > then for now, then in zip(steps(), before)))  # they go on
  second = run('second')
  wait_until(lambda: text('second').count('running ') == 2, 300)
  second.send_signal(signal.SIGTERM)
  assert second.wait(120) == 75, text('second')
  assert text('second').splitlines()[-1].startswith('stopped: ')
  jobs = list((folder / 'jobs').iterdir())
  assert not any(map(worker.is_held, jobs))
  assert len(list(folder.glob('units/*/checkpoints/*/sha256.json'))) == 2
  third = run('third')
  resumed = lambda job: 'resuming after step' in (job / 'log.txt').read_text()
  wait_until(lambda: all(map(resumed, jobs)), 300)
  third.kill()
  third.wait()
  for job in jobs:
    os.kill(int((job / 'lock').read_text()), signal.SIGKILL)
  fourth = run('fourth')
  assert fourth.wait(600) == 0, text('fourth')
  check_summary(folder, text('fourth'))
