"""Jobs over shards: each executor gives the same, failures are named, what is done stays done."""

import dataclasses
import os
import re
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from experiments import corpus_job, files
from experiments.errors import UserError


@dataclasses.dataclass(frozen=True)
class Letters:
  """How often each byte occurs; leaves a line in `log` for every shard that it maps."""

  log: str
  name: ClassVar[str] = 'letters'

  def map(self, name, path):
    data = path.read_bytes()
    if b'poison' in data:
      os._exit(9)
    if not data.endswith(b'\n'):
      raise UserError(f'{path} is cut short')
    with open(self.log, 'a') as log:
      log.write(f'{name}\n')
    return {'counts': np.bincount(np.frombuffer(data, np.uint8), minlength=256)}

  def merge(self, one, other):
    return {'counts': one['counts'] + other['counts']}


@pytest.fixture
def shards(tmp_path):
  """{name: path} of seven."""
  folder = tmp_path / 'shards'
  folder.mkdir()
  out = {}
  for i in range(7):
    out[f'{i}.txt'] = folder / f'{i}.txt'
    out[f'{i}.txt'].write_text('abc' * i + '\n')
  return out


def expected(shards):
  data = b''.join(path.read_bytes() for path in shards.values())
  return np.bincount(np.frombuffer(data, np.uint8), minlength=256)


def mapped(tmp_path):
  log = tmp_path / 'log'
  return sorted(log.read_text().split()) if log.exists() else []


def run(tmp_path, shards, executor=None):
  job, folder = Letters(str(tmp_path / 'log')), tmp_path / 'out'
  return corpus_job.run(job, shards, folder, executor or corpus_job.local(1))['counts']


def parts(tmp_path):
  """{name: bytes} of what was kept of each shard."""
  folder = tmp_path / 'out'
  return {p.name: p.read_bytes() for p in folder.glob('*.npz') if p.name != 'merged.npz'}


def test_serial(tmp_path, shards):
  np.testing.assert_array_equal(run(tmp_path, shards), expected(shards))
  assert mapped(tmp_path) == sorted(shards)


def on_hosts(tmp_path, shards):
  """Two threads as two hosts; what each returns."""
  answers = [None, None]

  def one(i):
    answers[i] = run(tmp_path, shards, corpus_job.host(i, 2, wait=60))

  threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  np.testing.assert_array_equal(*answers)
  return answers[0]


@pytest.mark.parametrize('kind', ['local', 'hosts', 'beam', 'slurm'])
def test_every_executor_gives_the_same_bytes(tmp_path, shards, kind, request):
  run(tmp_path, shards)
  before = parts(tmp_path)
  (tmp_path / 'out').rename(tmp_path / 'before')
  (tmp_path / 'log').unlink()
  if kind == 'beam':
    pytest.importorskip('apache_beam')
  if kind == 'slurm':
    request.getfixturevalue('slurm')
  if kind == 'hosts':
    found = on_hosts(tmp_path, shards)
  else:
    executors = {
      'local': lambda: corpus_job.local(2),
      'beam': corpus_job.beam,
      'slurm': lambda: corpus_job.slurm(3, partition='cpu'),
    }
    found = run(tmp_path, shards, executors[kind]())
  np.testing.assert_array_equal(found, expected(shards))
  assert parts(tmp_path) == before
  assert mapped(tmp_path) == sorted(shards)  # each once


def test_slurm_gets_an_array(tmp_path, shards, slurm):
  run(tmp_path, shards, corpus_job.slurm(3, partition='cpu', minutes=5))
  options = set(slurm.script.splitlines())
  assert {'#SBATCH --array=0-2%3', '#SBATCH --partition=cpu', '#SBATCH --time=5'} <= options


def test_without_slurm(tmp_path, shards, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match='--on=slurm'):
    run(tmp_path, shards, corpus_job.slurm())


def test_what_is_done_is_not_done_again(tmp_path, shards):
  first = dict(list(shards.items())[:4])
  run(tmp_path, first)
  run(tmp_path, shards)
  assert mapped(tmp_path) == sorted(shards)
  run(tmp_path, shards)
  assert mapped(tmp_path) == sorted(shards)


def test_a_changed_shard_or_job_is_done_again(tmp_path, shards):
  run(tmp_path, shards)
  shards['3.txt'].write_text('something else\n')
  np.testing.assert_array_equal(run(tmp_path, shards), expected(shards))
  assert mapped(tmp_path) == sorted([*shards, '3.txt'])
  job = Letters(str(tmp_path / 'other log'))
  corpus_job.run(job, shards, tmp_path / 'out', corpus_job.local(1))
  assert len((tmp_path / 'other log').read_text().split()) == 7


@pytest.mark.parametrize('kind', ['serial', 'local', 'beam', 'slurm'])
def test_a_truncated_shard_is_named_and_the_others_are_done(tmp_path, shards, kind, request):
  whole = shards['2.txt'].read_text()
  shards['2.txt'].write_text(whole[:-1])
  if kind == 'beam':
    pytest.importorskip('apache_beam')
  if kind == 'slurm':
    request.getfixturevalue('slurm')
  executors = {
    'serial': lambda: corpus_job.local(1), 'local': lambda: corpus_job.local(2),
    'beam': corpus_job.beam, 'slurm': lambda: corpus_job.slurm(2),
  }  # fmt: skip
  with pytest.raises(UserError, match=r'1 of 7 shards failed, the other 6 .*2\.txt is cut short'):
    run(tmp_path, shards, executors[kind]())
  assert mapped(tmp_path) == sorted(set(shards) - {'2.txt'})
  shards['2.txt'].write_text(whole)
  np.testing.assert_array_equal(run(tmp_path, shards), expected(shards))
  assert mapped(tmp_path) == sorted(shards)


def test_a_missing_shard_is_named(tmp_path, shards):
  shards['5.txt'].unlink()
  with pytest.raises(UserError, match=r'1 of 7 shards failed.*5\.txt'):
    run(tmp_path, shards)


def test_a_worker_that_dies(tmp_path, shards):
  shards['4.txt'].write_text('poison\n')
  with pytest.raises(UserError, match='a worker died'):
    run(tmp_path, shards, corpus_job.local(2))
  shards['4.txt'].write_text('mended\n')
  np.testing.assert_array_equal(run(tmp_path, shards), expected(shards))


def test_a_host_that_never_comes_is_named(tmp_path, shards):
  with pytest.raises(UserError, match=r'host 1 of 2 owes 1\.txt'):
    run(tmp_path, shards, corpus_job.host(0, 2, wait=0.2))


def test_a_failure_of_another_host_ends_the_wait(tmp_path, shards):
  shards['1.txt'].write_text('cut')
  errors = []

  def one(i):
    with pytest.raises(UserError, match='1 of 7 shards failed') as error:
      run(tmp_path, shards, corpus_job.host(i, 2, wait=60))
    errors.append(str(error.value))

  threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
  begun = time.monotonic()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(errors) == 2
  assert time.monotonic() - begun < 30


def test_a_damaged_part_is_made_again(tmp_path, shards):
  run(tmp_path, shards)
  part = next((tmp_path / 'out').glob('*.npz'))
  part.write_bytes(part.read_bytes()[:100])
  np.testing.assert_array_equal(run(tmp_path, shards), expected(shards))
  assert len(mapped(tmp_path)) == 8


@pytest.mark.parametrize(('index', 'count'), [(2, 2), (-1, 2), (0, 0)])
def test_bad_hosts(index, count):
  with pytest.raises(UserError, match='--host'):
    corpus_job.host(index, count)


def test_no_shards(tmp_path):
  with pytest.raises(UserError, match='no shards'):
    run(tmp_path, {})


def test_digests_see_every_field(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Job:
    a: object
    b: object

  seen = [Job(1, 'x'), Job(2, 'x'), Job(1, 'y'), Job(np.arange(3), 'x'), Job(np.arange(4), 'x')]
  assert len({corpus_job.digest(job) for job in seen}) == len(seen)
  assert corpus_job.digest(Job(np.arange(3), 'x')) == corpus_job.digest(seen[3])


def test_archives_have_no_time_in_them(tmp_path):
  arrays = {'a': np.arange(5), 'b': np.array('text')}
  one, two = Path(tmp_path, 'one.npz'), Path(tmp_path, 'two.npz')
  files.write_arrays(one, arrays)
  time.sleep(2.1)  # zip files count in steps of two seconds
  files.write_arrays(two, arrays)
  assert one.read_bytes() == two.read_bytes()


def test_the_job_of_the_documentation_runs(tmp_path, monkeypatch):
  page = Path(__file__).parents[2] / 'docs' / 'corpus_jobs.md'
  (block,) = re.findall(r'```python\n(.*?)```', page.read_text(), re.S)
  folder = tmp_path / 'my' / 'shards'
  folder.mkdir(parents=True)
  (folder / 'a.jsonl').write_text('1\n22\n')
  monkeypatch.chdir(tmp_path)
  scope = {'__name__': __name__}
  exec(block, scope)
  np.testing.assert_array_equal(np.flatnonzero(scope['found']['counts']), [2])  # 2 and 3 bytes
