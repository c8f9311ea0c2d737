"""The ledger: every row there, whole files after a kill, and the documented questions answered."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import checkpoints, metrics, train
from experiments.errors import UserError
from experiments.ledger import PENDING, Ledger
from tests.experiments import small
from tests.experiments.fake_ledger import CORPUS, ROWS, examples

ROOT = Path(__file__).resolve().parents[2]


def write(folder, steps, flush_at, resume_step=0):
  ledger = Ledger(folder, CORPUS, resume_step=resume_step)
  for step in steps:
    ledger.add(step, examples(step))
    if step in flush_at:
      ledger.flush()
  ledger.close()


def rows(folder) -> dict[str, np.ndarray]:
  """All parts in order, as columns."""
  tables = [pq.read_table(path).to_pydict() for path in sorted(Path(folder).glob('*.parquet'))]
  return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def expected(steps) -> dict[str, np.ndarray]:
  made = [examples(step) for step in steps]
  columns = {name: np.concatenate([m[name] for m in made]) for name in made[0]}
  return {
    'step': np.repeat(list(steps), ROWS),
    'domain': np.where(columns['example_id'] < 10, 'easy', 'hard'),
    **columns,
  }


def assert_rows(folder, steps):
  found = rows(folder)
  for name, values in expected(steps).items():
    np.testing.assert_array_equal(found[name], values)
  assert set(found['target_dot']) == {None}


def names(folder):
  return sorted(path.name for path in Path(folder).iterdir())


def test_every_row_is_there_in_order(tmp_path):
  write(tmp_path, range(1, 8), flush_at=(3, 7))
  assert names(tmp_path) == ['part-00000001-00000003.parquet', 'part-00000004-00000007.parquet']
  assert_rows(tmp_path, range(1, 8))
  schema = pq.read_schema(tmp_path / names(tmp_path)[0])
  types = {field.name: str(field.type) for field in schema}
  assert types.pop('domain').startswith('dictionary<values=string')
  assert types == {
    'step': 'int32',
    'example_id': 'int64',
    'loss': 'float',
    'weight': 'float',
    'target_dot': 'float',
  }


def test_the_target_dot_is_kept_when_there_is_one(tmp_path):
  ledger = Ledger(tmp_path, CORPUS, resume_step=0)
  ledger.add(1, examples(1))
  ledger.add(2, examples(2, target=True))
  ledger.flush()
  ledger.close()
  found = rows(tmp_path)['target_dot']
  assert found[:ROWS].tolist() == [None] * ROWS
  np.testing.assert_array_equal(
    found[ROWS:].astype(np.float32), examples(2, target=True)['target_dot']
  )


def test_nothing_reaches_the_disk_between_flushes_and_empty_flushes_write_nothing(tmp_path):
  ledger = Ledger(tmp_path / 'ledger', CORPUS, resume_step=0)
  ledger.flush()
  ledger.add(1, examples(1))
  ledger.close()
  assert not (tmp_path / 'ledger').exists()


@pytest.mark.parametrize('step', [0, 2, 4, 5, 6, 9])
def test_resuming_keeps_exactly_the_rows_of_the_checkpoint(tmp_path, step):
  """Parts end at 2, 4, 6: whole parts go, and one that reaches beyond the step is cut."""
  write(tmp_path, range(1, 7), flush_at=(2, 4, 6))
  (tmp_path / '.part-00000007-00000009.parquet.x').write_text('half')
  write(tmp_path, range(step + 1, 11), flush_at=(10,), resume_step=step)
  kept = range(1, min(step, 6) + 1)
  assert_rows(tmp_path, [*kept, *range(step + 1, 11)])
  assert all(name.startswith('part-') for name in names(tmp_path))


def test_a_part_that_must_be_cut_and_cannot_be_read_is_one_line(tmp_path):
  (tmp_path / 'part-00000001-00000009.parquet').write_text('not parquet')
  with pytest.raises(UserError, match=r'part-00000001-00000009\.parquet') as error:
    Ledger(tmp_path, CORPUS, resume_step=5)
  assert '\n' not in str(error.value)


def test_what_cannot_be_written_is_told_at_the_flush_and_nobody_waits_for_ever(tmp_path):
  (tmp_path / 'ledger').write_text('a file where the folder should be')
  ledger = Ledger(tmp_path / 'ledger', CORPUS, resume_step=0)
  ledger.add(1, examples(1))
  for _ in range(2):
    with pytest.raises(UserError, match=r'cannot write .*ledger') as error:
      ledger.flush()
  assert '\n' not in str(error.value)
  for step in range(2, 2 * PENDING):
    ledger.add(step, examples(step))
  ledger.close()


def test_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match='pip install pyarrow'):
    Ledger(tmp_path, CORPUS, resume_step=0)


def test_killed_at_any_moment_all_parts_are_whole(tmp_path):
  """A process that writes a part every other step, killed again and again."""
  program = (
    'import itertools, sys\n'
    'from experiments.ledger import Ledger\n'
    'from tests.experiments.fake_ledger import CORPUS, examples\n'
    'ledger = Ledger(sys.argv[1], CORPUS, resume_step=int(sys.argv[2]))\n'
    'for step in itertools.count(int(sys.argv[2]) + 1):\n'
    '  ledger.add(step, examples(step))\n'
    '  if step % 2 == 0: ledger.flush()\n'
  )
  rng, last = np.random.default_rng(0), 0
  for _ in range(4):
    running = subprocess.Popen([sys.executable, '-c', program, tmp_path, str(last)], cwd=ROOT)
    while running.poll() is None and len(list(tmp_path.glob('part-*'))) <= last // 2 + 3:
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    parts = sorted(tmp_path.glob('*.parquet'))
    ends = [int(part.stem.split('-')[2]) for part in parts]
    assert ends == list(range(2, 2 * len(parts) + 1, 2))
    assert_rows(tmp_path, range(1, ends[-1] + 1))
    last = ends[-1] - 2  # as if the last checkpoint had not been finished


# In a run


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  base = tmp_path_factory.mktemp('ledger')
  config = small.config(small.write_corpus(base / 'corpus'), base / 'prepared')
  config.log.ledger = True
  config.target.update(domain='hard', blocks=4)
  return config


def run(config, workdir):
  return train.train(config, workdir, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished')
  run(config, workdir)
  return workdir


def test_a_run_writes_one_part_a_checkpoint(config, finished):
  assert names(finished / 'ledger') == [
    f'part-{first:08}-{first + 1:08}.parquet' for first in (1, 3, 5)
  ]
  found, lines = rows(finished / 'ledger'), metrics.read_jsonl(finished / 'examples.jsonl')
  np.testing.assert_array_equal(found['step'], np.repeat(range(1, 7), config.batch_size))
  np.testing.assert_array_equal(found['example_id'], np.ravel([r['example_id'] for r in lines]))
  for name in ('loss', 'weight'):
    np.testing.assert_allclose(found[name], np.ravel([r[name] for r in lines]), rtol=1e-5)
  assert np.all(np.isfinite(found['target_dot']))
  assert np.any(found['target_dot'] != 0)
  corpus = train.build(config, jax.devices()[:1]).corpus
  assert list(found['domain']) == [corpus.describe(i)['domain'] for i in found['example_id']]


@pytest.mark.parametrize('before_the_save', [True, False])
def test_an_interrupted_run_ends_with_the_same_ledger(
  config, finished, tmp_path, monkeypatch, before_the_save
):
  """Stopped at step 4: with the rows on disk but no checkpoint of them, or just after it."""
  save = checkpoints.Checkpoints.save

  def stop(self, step, *rest):
    if not before_the_save or step != 4:
      save(self, step, *rest)
      self.wait()
    if step == 4:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(checkpoints.Checkpoints, 'save', stop)
    run(config, tmp_path)
  assert len(names(tmp_path / 'ledger')) == 2
  assert checkpoints.committed_steps(tmp_path / 'checkpoints')[-1] == 2 + 2 * (not before_the_save)
  run(config, tmp_path)
  whole, resumed = rows(finished / 'ledger'), rows(tmp_path / 'ledger')
  for name in whole:
    np.testing.assert_array_equal(resumed[name], whole[name])


def test_without_the_switch_there_is_no_ledger(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.log.ledger = False
  run(config, tmp_path)
  assert not (tmp_path / 'ledger').exists()


# The questions in the documentation


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """(columns as NumPy, the answer to each documented query), on 50 steps; 5 of them burn-in."""
  workdir = tmp_path_factory.mktemp('questions')
  ledger = Ledger(workdir / 'ledger', CORPUS, resume_step=0)
  made = []
  for step in range(1, 51):
    made.append(examples(step, target=step % 2 == 0))
    if step <= 5:
      made[-1]['weight'] = np.ones(ROWS, np.float32)
    ledger.add(step, made[-1])
    if step % 20 == 0 or step == 50:
      ledger.flush()
  ledger.close()
  none = np.full(ROWS, np.nan)
  columns = {
    name: np.concatenate([np.asarray(m.get(name, none), np.float64) for m in made])
    for name in ('example_id', 'loss', 'weight', 'target_dot')
  }
  columns['step'] = np.repeat(np.arange(1, 51), ROWS)
  page = (ROOT / 'docs/ledger.md').read_text()
  queries = [
    q.replace('ledger/', f'{workdir}/ledger/')
    for q in re.findall(r'```sql\n(.*?)```', page, re.DOTALL)
  ]
  return columns, [duckdb.sql(query).fetchall() for query in queries]


def by_example(columns, keep, value):
  """[(domain, example_id, seen, value(rows of this example)...)]."""
  found = []
  for i in np.unique(columns['example_id'][keep]):
    mine = {name: column[keep & (columns['example_id'] == i)] for name, column in columns.items()}
    found.append(('easy' if i < 10 else 'hard', int(i), len(mine['step']), *value(mine)))
  return found


def assert_answer(answer, wanted):
  assert [row[:3] for row in answer] == [row[:3] for row in wanted]
  np.testing.assert_allclose([r[3:] for r in answer], [r[3:] for r in wanted], rtol=1e-5)


def test_which_documents_were_pushed_down_most(answers):
  columns, (answer, _) = answers
  wanted = by_example(
    columns, columns['step'] > 5, lambda mine: (mine['weight'].mean(), mine['loss'].mean())
  )
  wanted.sort(key=lambda row: row[3])
  assert_answer(answer, wanted[:20])
  assert len(answer) == 20


def test_which_documents_hurt_the_target(answers):
  columns, (_, answer) = answers
  wanted = by_example(
    columns,
    np.isfinite(columns['target_dot']),
    lambda mine: (np.sum(mine['target_dot']),),
  )
  wanted = sorted((row for row in wanted if row[3] < 0), key=lambda row: row[3])
  assert 5 < len(wanted) < 25
  assert_answer(answer, wanted[:20])
