"""kill -9 at any moment: the run continues and ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import checkpoints, files, metrics, provenance, train, verify
from experiments import config as config_lib
from tests.experiments import small

STEPS = 40
HOST_TIMEOUT = 20  # seconds


@pytest.fixture(scope='module')
def setup(tmp_path_factory):
  """(folder of text, environment of the programs, a directory for runs)."""
  base = tmp_path_factory.mktemp('kill')
  environment = {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': '1',
    'JAXRW_DATA': str(base / 'prepared'),
    'JAX_COMPILATION_CACHE_DIR': str(base / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  return small.write_corpus(base / 'corpus'), environment, base


def start(setup, workdir: Path, *flags: str, processes: int = 1) -> list[subprocess.Popen]:
  """Starts the program, as one process or as several on this machine."""
  corpus, environment, _ = setup
  switches = f'path={corpus},mixture=dga:rate=0.5:every=2:lag=3:floor=0.2:normalize=cosine,quick'
  command = [
    *(sys.executable, '-m', 'experiments.main', f'--config=configs/lm.py:{switches}'),
    *(f'--workdir={workdir}', f'--config.total_steps={STEPS}', '--config.checkpoint.every=5'),
    *('--config.eval.every=20', '--noconfig.log.tensorboard'),
    *('--config.log.ledger', *flags),
  ]
  if processes == 1:
    members = [[]]
  else:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    members = [
      [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}']
      for i in range(processes)
    ]
  return [
    subprocess.Popen(
      [*command, *member], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for member in members
  ]


def finish(running: list[subprocess.Popen]) -> None:
  for process in running:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output.decode()[-3000:]


def kill(running: list[subprocess.Popen]) -> None:
  for process in running:
    process.send_signal(signal.SIGKILL)
  for process in running:
    process.communicate(timeout=60)


def wait_until(condition, running: list[subprocess.Popen]) -> bool:
  """True when the condition held while the program ran; False when it ended first."""
  while all(process.poll() is None for process in running):
    if condition():
      return True
    time.sleep(0.002)
  return False


def steps_done(workdir: Path) -> int:
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def a_save_is_under_way(workdir: Path) -> bool:
  """Orbax writes into a folder with a temporary name, or the seal is not there yet."""
  folders = [p for p in (workdir / 'checkpoints').glob('*') if p.is_dir()]
  return any(not p.name.isdigit() or not (p / 'sha256.json').exists() for p in folders)


def outcome(setup, workdir: Path) -> tuple:
  """Everything of a finished run that must not depend on kills."""
  records = [
    {k: v for k, v in record.items() if k != 'wall'}
    for record in metrics.read_jsonl(workdir / 'metrics.jsonl')
  ]
  config = config_lib.read(workdir)
  config.data.root = setup[1]['JAXRW_DATA']
  run = train.build(config, jax.devices()[:1])
  with checkpoints.Checkpoints(workdir / 'checkpoints') as saved:
    state, data_state, _ = saved.restore(run.abstract_state, STEPS)
  final = files.read_json(workdir / 'result.json')['final']
  # Where its parts are cut depends on where a run was stopped; its rows do not.
  parts = sorted((workdir / 'ledger').iterdir())
  ledger = [row for part in parts for row in pq.read_table(part).to_pylist()]
  return (
    *(records, metrics.read_jsonl(workdir / 'examples.jsonl'), ledger, final, data_state),
    jax.tree.map(np.asarray, state),
  )


def assert_same(outcome: tuple, reference: tuple) -> None:
  assert outcome[:-1] == reference[:-1]
  jax.tree.map(np.testing.assert_array_equal, outcome[-1], reference[-1])


@pytest.fixture(scope='module')
def uninterrupted(setup):
  workdir = setup[2] / 'uninterrupted'
  finish(start(setup, workdir))
  return outcome(setup, workdir)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(setup, uninterrupted):
  workdir = setup[2] / 'during_save'
  running = start(setup, workdir)
  assert wait_until(lambda: steps_done(workdir) > 12 and a_save_is_under_way(workdir), running)
  kill(running)
  assert not (workdir / 'result.json').exists()
  finish(start(setup, workdir))
  assert_same(outcome(setup, workdir), uninterrupted)
  killed, last = provenance.read(workdir)['sessions']
  assert 'ended' not in killed
  assert last['resumed_after'] > 0
  assert last['ended']['status'] == 'done'


def ask_to_stop(running: list[subprocess.Popen], told: int = 0) -> list[str]:
  """SIGTERM to one of the processes; what they all print before they end."""
  running[told].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=120)[0].decode() for process in running]
  assert [process.returncode for process in running] == [75] * len(running), outputs[0][-3000:]
  return outputs


@pytest.mark.slow
def test_asked_to_stop_it_saves_where_it_is(setup, uninterrupted):
  """Twice, at steps where no checkpoint is due; the second time as soon as the program listens."""
  workdir = setup[2] / 'stopped'
  for least in (7, 18):
    running = start(setup, workdir)
    assert wait_until(lambda: steps_done(workdir) >= least, running)  # noqa: B023
    (output,) = ask_to_stop(running)
    last = max(checkpoints.committed_steps(workdir / 'checkpoints'))
    assert last >= least
    assert f'stopped: saved after step {last}; the same command goes on' in output
    assert 'Traceback' not in output
  assert not (workdir / 'result.json').exists()
  finish(start(setup, workdir))
  assert_same(outcome(setup, workdir), uninterrupted)
  ended = [session['ended'] for session in provenance.read(workdir)['sessions']]
  assert [e['status'] for e in ended] == ['stopped', 'stopped', 'done']
  assert [e.get('exit_status') for e in ended] == [75, 75, None]
  assert not any(verify.verify(str(workdir)).values())


@pytest.mark.slow
def test_killed_at_five_random_moments(setup, uninterrupted):
  workdir, rng = setup[2] / 'five_kills', random.Random(7)
  for moment in sorted(rng.sample(range(1, STEPS - 2), 5)):
    running = start(setup, workdir)
    assert wait_until(lambda: steps_done(workdir) >= moment, running), f'ended before {moment}'  # noqa: B023
    time.sleep(rng.random() * 0.02)
    kill(running)
  assert not (workdir / 'result.json').exists()
  finish(start(setup, workdir))
  assert_same(outcome(setup, workdir), uninterrupted)


ids = lambda outcome: [example['example_id'] for example in outcome[1]]


@pytest.fixture(scope='module')
def two_hosts(setup):
  workdir = setup[2] / 'two_hosts'
  finish(start(setup, workdir, processes=2))
  return outcome(setup, workdir)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(setup, two_hosts):
  """Two hosts with a device each, killed once, end bit-identically to two hosts never killed; the
  mixture moves with the gradients."""
  workdir = setup[2] / 'two_hosts_killed'
  running = start(setup, workdir, processes=2)
  assert wait_until(lambda: steps_done(workdir) >= 17, running)
  kill(running)
  finish(start(setup, workdir, processes=2))
  assert_same(outcome(setup, workdir), two_hosts)


@pytest.mark.slow
def test_one_of_two_processes_told_to_stop(setup, two_hosts):
  """It tells the other, and both save the same step."""
  workdir = setup[2] / 'two_hosts_stopped'
  running = start(setup, workdir, processes=2)
  assert wait_until(lambda: steps_done(workdir) >= 7, running)
  outputs = ask_to_stop(running, told=1)
  last = max(checkpoints.committed_steps(workdir / 'checkpoints'))
  assert all(f'saved after step {last};' in output for output in outputs)
  finish(start(setup, workdir, processes=2))
  assert_same(outcome(setup, workdir), two_hosts)


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_one_of_two_processes_is_killed(setup, two_hosts, killed):
  """The other ends in time, says why, and the same command goes on bit for bit."""
  workdir = setup[2] / f'two_hosts_without_{killed}'
  running = start(setup, workdir, f'--host_timeout={HOST_TIMEOUT}', processes=2)
  assert wait_until(lambda: steps_done(workdir) >= 17, running)
  running[killed].send_signal(signal.SIGKILL)
  started = time.monotonic()
  output = running[1 - killed].communicate(timeout=120)[0].decode()
  assert time.monotonic() - started < HOST_TIMEOUT + 30
  assert running[1 - killed].returncode == 69, output[-3000:]
  assert output.splitlines()[-1].startswith('lost: another process of this run died')
  running[killed].communicate()
  finish(start(setup, workdir, processes=2))
  assert_same(outcome(setup, workdir), two_hosts)


@pytest.mark.slow
def test_other_numbers_of_processes_read_the_same_examples(setup, uninterrupted, two_hosts):
  """Also from the middle of a run: what two have begun, one ends."""
  assert ids(two_hosts) == ids(uninterrupted)
  workdir = setup[2] / 'two_hosts_then_one'
  running = start(setup, workdir, processes=2)
  assert wait_until(lambda: steps_done(workdir) >= 17, running)
  kill(running)
  finish(start(setup, workdir))
  assert ids(outcome(setup, workdir)) == ids(uninterrupted)
  finish(start(setup, setup[2] / 'four_hosts', processes=4))
  assert ids(outcome(setup, setup[2] / 'four_hosts')) == ids(uninterrupted)


@pytest.mark.slow
def test_only_the_first_process_writes(setup, tmp_path):
  """But for its part of the arrays, which Orbax writes from C++."""
  spy = tmp_path / 'sitecustomize.py'
  spy.write_text(
    'import os, sys\n'
    'def spy(event, arguments):\n'
    "  if event == 'open' and arguments[1] and set('wax+') & set(arguments[1]):\n"
    "    os.write(2, f'\\nwrites {arguments[0]}\\n'.encode())\n"
    'sys.addaudithook(spy)\n'
  )
  corpus, environment, base = setup
  environment = {**environment, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{Path.cwd()}'}
  workdir = base / 'two_hosts_watched'
  running = start((corpus, environment, base), workdir, processes=2)
  outputs = [process.communicate(timeout=900)[0].decode() for process in running]
  assert [process.returncode for process in running] == [0, 0]
  written = [
    {path for path in re.findall(r'^writes (.*)$', output, re.MULTILINE) if str(workdir) in path}
    for output in outputs
  ]
  assert f'{workdir}/metrics.jsonl' in written[0]
  assert {path for path in written[1] if not path.startswith(f'{workdir}/checkpoints/')} == set()
