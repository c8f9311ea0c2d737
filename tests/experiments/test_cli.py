"""The command line as a user meets it: a program in a process of its own."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = '''"""Trains one model.

  python -m experiments.prog --config=configs/quickstart.py --workdir=runs/a
"""
import sys
from absl import flags, logging
from experiments import cli, config, errors

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', '', 'the run directory')
_FAIL = flags.DEFINE_string('fail', '', 'how to fail')

def main(argv):
  if _FAIL.value == 'user':
    raise errors.UserError('batch_size=3 does not fit;\\nuse 4')
  if _FAIL.value == 'nan':
    raise errors.NonFiniteError('loss is nan at step 3')
  if _FAIL.value == 'bug':
    raise ZeroDivisionError('a bug')
  if _FAIL.value == 'interrupt':
    raise KeyboardInterrupt
  logging.info('chatter')
  logging.warning('a warning')
  print(config.format_config(_CONFIG.value, *cli.config_origin()))

if __name__ == '__main__':
  try:
    cli.run(main)
  finally:
    heavy = {'jax', 'flax', 'optax', 'grain', 'tensorflow_datasets', 'orbax', 'numpy'}
    print('heavy:', sorted(heavy & set(sys.modules)))
'''
LM = '--config=configs/lm.py'


@pytest.fixture(scope='module')
def program(tmp_path_factory):
  path = tmp_path_factory.mktemp('cli') / 'prog.py'
  path.write_text(PROGRAM)

  def run(*args):
    out = subprocess.run(
      [sys.executable, str(path), *args],
      capture_output=True,
      text=True,
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      timeout=60,
    )
    assert out.stdout.rstrip().endswith('heavy: []')
    return out

  return run


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], '--config is missing: try --config=configs/quickstart.py'),
    (['--config=configs/no.py'], '--config=configs/no.py: no such file; there is configs/gpt2.py'),
    (
      [LM + ':stepz=3'],
      "--config=configs/lm.py:stepz=3: unknown argument 'stepz' (did you mean 'steps'?)",
    ),
    ([LM + ':steps=x'], 'argument steps=x is not a valid int'),
    ([LM, '--config.optim.lrr=1'], "--config.optim.lrr: no such key (did you mean 'optim.lr'?)"),
    (
      [LM, '--config.optim.lr', 'abc'],
      "--config.optim.lr='abc': must be of type float, such as 0.003",
    ),
    ([LM, '--config.total_steps=1.5'], "--config.total_steps='1.5': must be of type int"),
    ([LM, '--config.model.scan=3'], "--config.model.scan='3': must be of type bool"),
    ([LM, '--config.optim=3'], '--config.optim is a group of keys'),
    ([LM, '--config.optim.lr=-1'], 'config.optim.lr=-1.0: must be above 0'),
    ([LM, '--config.data.source=folder'], "config.data.path=''"),
    ([LM, '--wordir=x'], "Unknown command line flag 'wordir'. Did you mean: workdir"),
    ([LM, 'seed=3'], "unexpected argument 'seed=3': every option is written --name=value"),
    ([LM, '--fail=user'], 'batch_size=3 does not fit; use 4'),
  ],
)
def test_mistakes_end_in_one_line_and_status_2(program, args, message):
  out = program(*args)
  assert out.returncode == 2
  assert out.stderr.startswith('error: ')
  assert message in out.stderr
  assert out.stderr.count('\n') == 1


def test_non_finite_numbers_end_in_status_3(program):
  out = program(LM, '--fail=nan')
  assert (out.returncode, out.stderr) == (3, 'error: loss is nan at step 3\n')


def test_an_interrupt_has_no_traceback(program):
  out = program(LM, '--fail=interrupt')
  assert (out.returncode, out.stderr) == (130, 'interrupted\n')


def test_a_bug_keeps_its_traceback(program):
  out = program(LM, '--fail=bug')
  assert out.returncode == 1
  assert 'Traceback' in out.stderr


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_teaches(program, flag):
  out = program(flag)
  assert out.returncode == 0
  assert 'python -m experiments.prog --config=configs/quickstart.py --workdir=runs/a' in out.stdout
  assert '--workdir: the run directory' in out.stdout
  assert 'configs/quickstart.py: A byte-level GPT' in out.stdout
  assert out.stderr == ''


def test_help_about_one_config(program):
  out = program('--help', LM)
  assert 'Switches: source, path' in out.stdout


def test_overrides_and_their_origin(program):
  out = program(
    LM + ':steps=300',
    '--config.optim.lr=1e-2',
    '--noconfig.model.scan',
    '--config.data.domains=a',
    '--config.data.domains=b',
    '--config.w.loss.temperature=1',
  )
  assert out.returncode == 0
  values = dict(line.split(' = ', 1) for line in out.stdout.splitlines() if ' = ' in line)
  values = {k.strip(): ' '.join(v.split()) for k, v in values.items()}
  assert values['optim.lr'] == '0.01 # command line'
  assert values['model.scan'] == 'False # command line'
  assert values['data.domains'] == "('a', 'b') # command line"
  assert values['w.loss.temperature'] == '1.0 # command line'
  assert values['total_steps'] == '300 # configs/lm.py:steps=300'
  assert values['seed'] == '0'


def test_libraries_are_quiet_unless_asked(program):
  out = program(LM)
  assert 'chatter' not in out.stderr
  assert 'a warning' in out.stderr
  assert 'chatter' in program(LM, '--verbosity=0').stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not glibc')
def test_a_freed_block_is_used_again_without_page_faults():
  program = """
import ctypes, resource
from experiments import cli
cli.keep_freed_memory()
libc, size = ctypes.CDLL(None), 64 << 20  # far above what glibc keeps by itself
libc.malloc.restype = ctypes.c_void_p
faults = []
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
  ctypes.memset(block, 1, size)
  libc.free(block)
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
  command = [sys.executable, '-c', program]
  out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  first, second = map(int, out.split())
  assert second < first / 100
