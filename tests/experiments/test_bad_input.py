"""Every mistake of the list ends in the line that the page promises, and costs no training."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import files
from experiments.data.corpus import open_corpus
from tests.experiments import bad_inputs, forked, small
from tests.experiments.bad_inputs import MAIN, Case

ROOT = Path(__file__).parents[2]
SLOW = {'a loss that is not finite', 'parameters of another model'}  # which compile


def params(needs_runs: bool) -> list:
  return [
    pytest.param(
      case,
      id=f'{case.program}: {case.what}',
      marks=[pytest.mark.slow] if case.what in SLOW else [],
    )
    for case in bad_inputs.every()
    if case.needs_runs == needs_runs
  ]


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A folder in which `MAIN` works, with the data prepared."""
  folder = tmp_path_factory.mktemp('text')
  bad_inputs.prepare(folder)
  return folder


@pytest.fixture(scope='module')
def runs(text, tmp_path_factory):
  """The same with a finished run, `runs/done`."""
  folder = tmp_path_factory.mktemp('runs') / 'folder'
  shutil.copytree(text, folder, symlinks=True)
  args = (*MAIN[:2], '--workdir=runs/done')
  done = forked.run('experiments.main', *args, folder=folder, devices=1)
  assert done.status == 0, done.stderr
  return folder


def check(case: Case, template: Path, tmp_path: Path) -> None:
  folder = tmp_path / 'folder'
  shutil.copytree(template, folder, symlinks=True)
  for damage in case.damage:
    damage.do(folder)
  done = forked.run(f'experiments.{case.program}', *case.command, folder=folder)
  assert 'Traceback' not in done.stderr, done.stderr
  assert done.status == case.status, done
  *before, last = done.stderr.splitlines()
  assert re.fullmatch(pattern(f'error: {case.problem} {case.fix}'), last), last
  allowed = r'step |checkpoint ' if case.progress else 'preparing '
  assert all(re.match(allowed, line) for line in before), before
  assert case.progress or not (folder / 'runs/new/metrics.jsonl').exists()


def pattern(message: str) -> str:
  return '.*'.join(map(re.escape, message.split('…')))


@pytest.mark.parametrize('case', params(needs_runs=False))
def test_a_mistake_is_one_line(case, text, tmp_path):
  check(case, text, tmp_path)


@pytest.mark.parametrize('case', params(needs_runs=True))
def test_a_mistake_about_a_run_is_one_line(case, runs, tmp_path):
  check(case, runs, tmp_path)


@pytest.mark.parametrize('case', bad_inputs.every()[:40:8], ids=lambda case: case.what)
def test_a_process_of_its_own_says_the_same(case, text):
  """What the cases run in is a fork of a process with all imports; this is what users have."""
  command = [sys.executable, '-m', f'experiments.{case.program}', *case.command]
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(command, cwd=text, env=env, capture_output=True, text=True)
  forked_done = forked.run(f'experiments.{case.program}', *case.command, folder=text)
  assert (done.returncode, done.stderr) == (forked_done.status, forked_done.stderr)
  assert done.stderr.startswith('error: ')


def test_the_messages_name_what_was_given_and_a_fix():
  """A word of the arguments, or of the files that were damaged, and something to do."""
  assert len(bad_inputs.every()) > 100
  for case in bad_inputs.every():
    given = ' '.join((*case.args, *(damage.path for damage in case.damage), 'missing which'))
    words = re.findall(r'\w{3,}', given)
    assert any(word in case.problem + case.fix for word in words), case
    assert len(case.fix) > 5, case
    assert '\n' not in case.problem + case.fix


def test_the_page_is_what_the_list_says():
  written = (ROOT / 'docs/errors.md').read_text()
  assert written == bad_inputs.page(), 'python -m tests.experiments.bad_inputs > docs/errors.md'


def test_a_run_that_another_process_holds(text, tmp_path):
  folder = tmp_path / 'folder'
  shutil.copytree(text, folder, symlinks=True)
  with files.exclusive(folder / 'runs/new'):
    done = forked.run('experiments.main', *MAIN, folder=folder)
  assert (done.status, done.stderr) == (
    2,
    'error: runs/new is in use by another process: wait until it ends, or choose another '
    '--workdir\n',
  )


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(text, tmp_path):
  folder = tmp_path / 'folder'
  shutil.copytree(text, folder, symlinks=True)
  (folder / 'runs').mkdir(mode=0o555)
  done = forked.run('experiments.main', *MAIN, folder=folder)
  assert (done.status, done.stderr) == (
    2,
    'error: cannot write into runs/new: Permission denied; choose a --workdir that you can write '
    'to\n',
  )


def test_a_torn_last_line_is_no_mistake(runs, tmp_path):
  folder = tmp_path / 'folder'
  shutil.copytree(runs, folder, symlinks=True)
  (folder / 'runs/done/result.json').unlink()
  with (folder / 'runs/done/metrics.jsonl').open('a') as file:
    file.write('{"kind": "tr')
  done = forked.run('experiments.main', *MAIN[:2], '--workdir=runs/done', folder=folder)
  assert done.status == 0, done.stderr


def test_a_domain_shorter_than_a_block_is_no_mistake(tmp_path):
  folder = small.write_corpus(tmp_path / 'text', documents=6)
  for path in folder.glob('hard.*'):
    path.write_text('{"text": "a"}\n')
  corpus = open_corpus(small.config(folder, tmp_path / 'data').data)
  assert corpus.read('train', 1, 0)['base'].sum() == 2  # a character, and the end of the document
