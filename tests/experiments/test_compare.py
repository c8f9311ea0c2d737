"""Which units run, what resumes, what wins, and what the tables say; training itself is faked."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from configs import common
from experiments import board as board_lib
from experiments import compare, files, verdict
from experiments.errors import NonFiniteError, UserError
from tests.experiments import small
from tests.experiments.fake_runs import DOMAINS, FLOOR, FakeTrain, final_bpb


def make_plan(folder, weightings='uniform,linupper:1.0', lrs='1e-3,3e-3,1e-2', seeds=3, **kwargs):
  settings = {'metric': 'macro_bpb', 'workdir': str(folder), **kwargs}
  return compare.make_plan(common.base_config(), weightings, lrs, seeds, **settings)


def test_every_arm_gets_the_same_grid_then_its_best_rate_on_all_seeds(tmp_path):
  train = FakeTrain()
  compare.compare(make_plan(tmp_path), train)
  grid = [(arm, lr, 0) for lr in (1e-3, 3e-3, 1e-2) for arm in ('uniform', 'linupper:1')]
  # The bowl of fake_runs has its bottom at 3e-3; seed 0 at the best rate is not run again.
  best = [(arm, 3e-3, seed) for seed in (1, 2) for arm in ('uniform', 'linupper:1')]
  assert train.calls == grid + best
  assert len(train.calls) == make_plan(tmp_path).num_units


def test_an_arm_may_have_a_name_and_a_mixture(tmp_path):
  arms = 'even:=uniform,dga:=uniform@mixture=dga:rate=0.2:every=10:target=qa+law,linupper:1.0'
  plan = make_plan(tmp_path, arms, lrs='1e-3', seeds=1)
  unit = plan.unit_config(plan.weightings[1], 1e-3, 0)
  assert (unit.mixture.fn, unit.mixture.every) == ('dga', 10)
  assert unit.mixture.target == ('qa', 'law')
  assert unit.mixture.args.to_dict() == {'rate': 0.2}
  board = compare.compare(plan, FakeTrain())
  assert [arm.name for arm in board.arms] == ['even', 'dga', 'linupper:1.0']
  assert all(run.path.name.startswith(f'{arm.name[:3]}') for arm in board.arms for run in arm.runs)
  files.write_json(tmp_path / 'compare.json', compare.record(board))
  assert [arm.name for arm in board_lib.load_board([tmp_path]).arms] == [
    'even',
    'dga',
    'linupper:1.0',
  ]


def test_the_rate_may_be_picked_by_one_domain(tmp_path):
  board = compare.compare(make_plan(tmp_path, metric=f'bpb/{DOMAINS[1]}'), FakeTrain())
  text = verdict.board_text(board)
  assert f'bits per byte of {DOMAINS[1]}' in text


def test_the_mean_of_some_domains_is_a_metric(tmp_path):
  several = compare.compare(make_plan(tmp_path, metric='bpb/code+docs'), FakeTrain())
  arm = several.arms[1]
  parts = [arm.values(f'bpb/{name}') for name in ('code', 'docs')]
  for seed, value in arm.values('bpb/code+docs').items():
    assert value == pytest.approx((parts[0][seed] + parts[1][seed]) / 2)
  assert several.floor('bpb/code+docs') == pytest.approx((FLOOR['code'] + FLOOR['docs']) / 2)
  assert math.isnan(several.floor('bpb/code+dogs'))
  assert 'bits per byte of code+docs' in verdict.board_text(several)


def test_only_weighting_rate_and_seed_differ_between_units(tmp_path):
  plan = make_plan(tmp_path)
  a, b = plan.unit_config('uniform', 1e-3, 0), plan.unit_config('linupper:1.0', 1e-2, 2)
  changed = {key.split('.')[0] for key in compare.config_lib.diff(a, b)}
  assert changed == {'seed', 'optim', 'w'}
  assert b.w.loss.start == common.base_config().w.loss.start


def test_the_rate_is_picked_by_the_metric_on_the_first_seed(tmp_path):
  class Misleading(FakeTrain):
    """Seed 0 likes 1e-3, every other seed would like 1e-2."""

    def __call__(self, config, workdir):
      super().__call__(config, workdir)
      path = f'{workdir}/result.json'
      result = files.read_json(path)
      good = 1e-3 if config.seed == 0 else 1e-2
      result['final']['worst_bpb'] = 1.0 if config.optim.lr == good else 2.0
      files.write_json(path, result)

  board = compare.compare(make_plan(tmp_path, metric='worst_bpb'), Misleading())
  assert [arm.lr for arm in board.arms] == [1e-3, 1e-3]
  assert [arm.edge for arm in board.arms] == ['lowest', 'lowest']
  assert 'uniform: the best learning rate, 0.001, is the lowest' in verdict.board_text(board)
  tuned = make_plan(tmp_path / 'tuned', metric='worst_bpb', tune_seeds=3)
  train = Misleading()
  board = compare.compare(tuned, train)
  assert [arm.lr for arm in board.arms] == [1e-2, 1e-2]
  assert board.arms[0].grid == ((1e-3, 5 / 3), (3e-3, 2.0), (1e-2, 4 / 3))
  assert [len(arm.runs) for arm in board.arms] == [3, 3]
  assert len(train.calls) == tuned.num_units == 18


def test_paired_differences_are_by_seed(tmp_path):
  board = compare.compare(make_plan(tmp_path), FakeTrain())
  result = board.difference(board.arms[1], 'bpb/tables')
  by_hand = [
    final_bpb('linupper:1', 3e-3, s)['tables'] - final_bpb('uniform', 3e-3, s)['tables']
    for s in range(3)
  ]
  assert result.n == 3
  assert result.mean == pytest.approx(sum(by_hand) / 3)
  sd = math.sqrt(sum((d - result.mean) ** 2 for d in by_hand) / 2)
  assert result.high - result.mean == pytest.approx(4.302653 * sd / math.sqrt(3), rel=1e-6)


def test_finished_units_are_skipped_and_a_killed_one_runs_again(tmp_path):
  class Killed(FakeTrain):
    def __call__(self, config, workdir):
      if len(self.calls) == 4:
        compare.Path(workdir).mkdir(parents=True)
        (compare.Path(workdir) / 'metrics.jsonl').write_text('{"kind": "train", "st')
        raise KeyboardInterrupt
      super().__call__(config, workdir)

  plan = make_plan(tmp_path)
  first, second, third = Killed(), FakeTrain(), FakeTrain()
  with pytest.raises(KeyboardInterrupt):
    compare.compare(plan, first)
  resumed = compare.compare(plan, second)
  assert first.calls + second.calls == unbroken_calls(tmp_path / 'other')
  again = compare.compare(plan, third)
  assert third.calls == []
  assert verdict.board_text(again) == verdict.board_text(resumed)


def unbroken_calls(folder):
  train = FakeTrain()
  compare.compare(make_plan(folder), train)
  return train.calls


def test_another_config_does_not_reuse_units(tmp_path):
  compare.compare(make_plan(tmp_path, seeds=1), FakeTrain())
  plan, train = make_plan(tmp_path, seeds=1), FakeTrain()
  plan.config.total_steps += 1
  compare.compare(plan, train)
  assert len(train.calls) == 6


def test_one_rate_needs_no_first_stage(tmp_path):
  train = FakeTrain()
  board = compare.compare(make_plan(tmp_path, lrs=None), train)
  assert train.calls == [(arm, 3e-3, s) for s in range(3) for arm in ('uniform', 'linupper:1')]
  assert all(arm.edge is None for arm in board.arms)


def test_one_seed_gives_no_interval(tmp_path):
  board = compare.compare(make_plan(tmp_path, seeds=1), FakeTrain())
  assert compare.record(board)['arms'][1]['difference']['macro_bpb']['low'] is None
  said = verdict.arm_verdict(board, board.arms[1])
  assert said.kind == 'single'
  assert 'no interval' in said.text
  assert '±' not in verdict.differences_table(board)


def test_a_diverged_rate_never_wins_and_the_rest_goes_on(tmp_path):
  train = FakeTrain(lambda label, lr, seed: label != 'uniform' and lr == 3e-3)
  board = compare.compare(make_plan(tmp_path), train)
  arm = board.arms[1]
  assert dict(arm.grid)[3e-3] == math.inf
  assert arm.lr in (1e-3, 1e-2)
  assert len(arm.values('macro_bpb')) == 3
  assert compare.record(board)['arms'][1]['grid'][1]['lr'] == 3e-3


def test_a_diverged_unit_is_not_run_again(tmp_path):
  diverges = lambda label, lr, seed: seed == 1 and label != 'uniform'
  compare.compare(make_plan(tmp_path), FakeTrain(diverges))
  train = FakeTrain(diverges)
  compare.compare(make_plan(tmp_path), train)
  assert train.calls == []


def test_divergence_without_a_note_is_noted(tmp_path):
  def train(config, workdir):
    raise NonFiniteError('loss is nan')

  board = compare.compare(make_plan(tmp_path, lrs='1e-3', seeds=1), train)
  assert all(run.diverged for arm in board.arms for run in arm.runs)
  assert verdict.board_text(board)


def test_divergence_on_one_seed_is_said_and_counts_as_worse(tmp_path):
  train = FakeTrain(lambda label, lr, seed: label != 'uniform' and seed == 2)
  board = compare.compare(make_plan(tmp_path), train)
  said = verdict.arm_verdict(board, board.arms[1])
  assert said.kind == 'diverged'
  assert 'diverged on 1 of 3 seeds (2)' in said.text
  assert board.difference(board.arms[1], 'macro_bpb').n == 2


@pytest.mark.parametrize('arm', ['uniform', 'linupper:1'])
def test_divergence_at_every_rate(tmp_path, arm):
  train = FakeTrain(lambda label, lr, seed: label == arm)
  board = compare.compare(make_plan(tmp_path), train)
  assert len(train.calls) == 6 + 2  # no further seeds for the arm without a rate
  said = verdict.arm_verdict(board, board.arms[1])
  assert said.kind == ('none' if arm == 'uniform' else 'diverged')
  files.write_json(tmp_path / 'compare.json', compare.record(board))
  again = board_lib.load_board([tmp_path])
  assert verdict.board_text(again) == verdict.board_text(board)


def test_an_error_of_the_user_stops_everything(tmp_path):
  def train(config, workdir):
    raise UserError('config.batch_size=3')

  with pytest.raises(UserError, match='batch_size'):
    compare.compare(make_plan(tmp_path), train)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'weightings': 'uniform,uniform'}, "'uniform' is there twice"),
    ({'weightings': 'linupper,linupper:0.4'}, 'are the same arm'),
    ({'weightings': 'uniform,'}, 'empty entry'),
    ({'weightings': 'a:=uniform,a:=linupper'}, "the name 'a' is empty or there twice"),
    ({'weightings': 'uniform,uniform@mixture=dgaa:rate=1'}, "did you mean 'dga'"),
    ({'weightings': 'uniform,uniform@mixture=dga:rate'}, 'write a method and its arguments'),
    ({'weightings': 'uniform,linuper:0.4'}, 'linuper'),
    ({'weightings': 'uniform,linupper:-1'}, 'positive temperature'),
    ({'lrs': ''}, "--lrs=''"),
    ({'lrs': '1e-3,x'}, '--lrs=1e-3,x'),
    ({'lrs': '1e-3,0'}, 'positive'),
    ({'lrs': '1e-3,0.001'}, 'the same rate'),
    ({'seeds': 0}, '--seeds=0'),
    ({'metric': 'accuracy'}, '--metric=accuracy'),
    ({'workdir': ''}, '--workdir'),
  ],
)
def test_bad_input_is_one_line(tmp_path, change, message):
  with pytest.raises(UserError) as error:
    make_plan(tmp_path, **change)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_record_is_json_and_complete(tmp_path):
  board = compare.compare(make_plan(tmp_path), FakeTrain())
  record = json.loads(json.dumps(compare.record(board)))
  assert record['tier'] == 'mechanics'
  assert set(record['arms'][1]['values']) == {
    'macro_bpb', 'micro_bpb', 'worst_bpb', *(f'bpb/{d}' for d in DOMAINS)
  }  # fmt: skip
  assert record['arms'][1]['verdict']['kind'] == 'worse'
  assert record['arms'][0]['verdict'] is None


@pytest.mark.parametrize(
  ('params', 'tokens', 'tier'),
  [(15e6, 100e6, 'evidence'), (14.9e6, 1e9, 'mechanics'), (1e9, 99e6, 'mechanics')],
)
def test_tier(tmp_path, params, tokens, tier):
  train = FakeTrain(num_params=params, tokens=tokens)
  board = compare.compare(make_plan(tmp_path, seeds=1, lrs=None), train)
  assert board.tier == tier
  assert ('ranks nothing' in verdict.board_text(board)) == (tier == 'mechanics')


def test_table_is_aligned_and_narrow(tmp_path):
  arms = 'uniform,linupper:1.0,linupper:0.4,row_shuffled:linupper:0.4'
  text = verdict.board_text(compare.compare(make_plan(tmp_path, arms), FakeTrain()))
  assert max(map(len, text.splitlines())) <= 120
  lines = verdict.means_table(compare.compare(make_plan(tmp_path, arms), FakeTrain())).splitlines()
  assert len({len(line) for line in lines}) == 1


def test_wide_tables_continue_below_under_the_same_first_column():
  text = verdict.format_table(['arm', 'aaaa', 'bbbb'], [['x', '1', '2']], width=10)
  assert text == 'arm  aaaa\n---------\nx       1\n\narm  bbbb\n---------\nx       2'


def test_help_does_not_import_jax():
  code = (
    'import sys, runpy; sys.argv = ["compare", "--help"]\n'
    'try: runpy.run_module("experiments.compare", run_name="__main__")\n'
    'except SystemExit as e: assert not e.code\n'
    'assert "jax" not in sys.modules'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert '--weightings' in done.stdout


def test_several_jobs_give_the_same_board(tmp_path):
  alone, beside = make_plan(tmp_path / 'a'), make_plan(tmp_path / 'b')
  first = compare.record(compare.compare(alone, FakeTrain()))
  train = FakeTrain()
  assert compare.record(compare.compare(beside, train, jobs=3)) == first
  assert len(train.calls) == beside.num_units


@pytest.mark.parametrize(
  ('processors', 'jobs', 'shares'),
  [
    ({0, 1, 2, 3, 4}, 2, [{0, 2, 4}, {1, 3}]),
    ({7}, 2, [{7}, {7}]),
    (None, 2, [set(), set()]),
  ],
)
def test_processors_are_dealt_out_to_the_jobs(monkeypatch, processors, jobs, shares):
  if processors is None:
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
  else:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: processors, raising=False)
  assert compare.processor_shares(jobs) == shares


@pytest.mark.slow
def test_the_program_runs_units_in_processes_of_their_own(tmp_path):
  corpus = small.write_corpus(tmp_path / 'corpus')

  def program(path):
    command = [
      *(sys.executable, '-m', 'experiments.compare', f'--config=configs/lm.py:path={path},quick'),
      *('--weightings=uniform,uniform@batch_size=4', '--seeds=1', '--jobs=2'),
      *('--config.total_steps=2', f'--config.data.root={tmp_path / "prepared"}'),
      f'--workdir={tmp_path / "board"}',
    ]
    environ = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}
    return subprocess.run(command, capture_output=True, text=True, env=environ)

  done = program(corpus)
  assert done.returncode == 0, done.stderr
  arms = files.read_json(tmp_path / 'board' / 'compare.json')['arms']
  assert arms[0]['step_flops'] == 2 * arms[1]['step_flops'] > 0
  assert (tmp_path / 'board' / 'report.html').stat().st_size > 1000
  assert 'uniform@batch_size=4' in done.stdout

  # A mistake in a unit comes back as the one line it is.
  broken = program(tmp_path)
  assert broken.returncode == 2
  assert 'data.path' in broken.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize('jobs', [1, 2])
def test_a_comparison_that_is_asked_to_stop_saves_and_goes_on_later(tmp_path, jobs):
  corpus = small.write_corpus(tmp_path / 'corpus')
  command = [
    *(sys.executable, '-m', 'experiments.compare', f'--workdir={tmp_path / "board"}'),
    *(f'--config=configs/lm.py:path={corpus},quick', '--config.total_steps=2000', '--seeds=2'),
    *('--config.eval.every=1000', '--config.checkpoint.every=1000', f'--jobs={jobs}'),
    *('--config.model.n_layer=1', '--noconfig.model.scan', '--noconfig.log.tensorboard'),
  ]
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'JAXRW_DATA': str(tmp_path / 'data')}
  running = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
  started = lambda: len(list((tmp_path / 'board/runs').glob('*/metrics.jsonl'))) >= jobs
  while running.poll() is None and not started():
    time.sleep(0.05)
  running.send_signal(signal.SIGTERM)
  error = running.communicate(timeout=120)[1]
  assert running.returncode == 75, error
  assert 'stopped: ' in error
  assert 'Traceback' not in error
  saved = list((tmp_path / 'board/runs').glob('*/checkpoints/*/sha256.json'))
  assert len(saved) >= jobs
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'resuming after step' in done.stderr + done.stdout
