"""Several processes: found or missed, waited for, and ended together; each with one line."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from experiments import hosts
from experiments.errors import UserError

# Joins the others, and runs a line of Python with what it needs.
PROGRAM = """
import json, sys, time
import jax
from jax.experimental import multihost_utils
from experiments import cli, hosts
from experiments.errors import UserError

def main(arguments):
  hosts.initialize(**json.loads(arguments[0]))
  together = lambda: multihost_utils.process_allgather(jax.numpy.ones(2)).sum()
  me = jax.process_index()
  with hosts.ending_together():
    exec(arguments[1])

cli.run(main, positional=True)
"""


def start(code: str = 'pass', environment: dict | None = None, **arguments) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', PROGRAM, json.dumps(arguments), code],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', **(environment or {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def pair(code: str, **arguments) -> list[subprocess.Popen]:
  address = f'127.0.0.1:{free_port()}'
  return [
    start(code, coordinator=address, num_processes=2, process_id=i, **arguments) for i in (0, 1)
  ]


def end(process: subprocess.Popen) -> tuple[int, str, str]:
  """(exit status, stdout, stderr)."""
  out, err = process.communicate(timeout=200)
  return process.returncode, out, err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('', 2, 0), 'num_processes=2 without a coordinator'),
    (('localhost:1234', 2, 2), 'process_id=2 does not fit num_processes=2'),
    (('localhost:1234', 0, -1), 'process_id=-1 does not fit num_processes=0'),
    (('localhost', 2, 0), "coordinator='localhost': must be 'auto', or host:port"),
    (('localhost:65536', 2, 0), "coordinator='localhost:65536': must be 'auto', or host:port"),
  ],
)
def test_arguments_are_checked_before_connecting(arguments, message):
  with pytest.raises(UserError, match=message):
    hosts.initialize(*arguments)


def test_a_process_of_its_own_joins_nobody():
  hosts.initialize()
  hosts.initialize('', 1, 0)
  hosts.barrier('nobody else')
  with pytest.raises(UserError, match='host_timeout=0: both must be at least 1 second'):
    hosts.initialize(host_timeout=0)
  with pytest.raises(ZeroDivisionError), hosts.ending_together():
    1 / 0  # noqa: B018


@pytest.mark.parametrize('me', [0, 1])
def test_the_others_do_not_come(me):
  address = f'127.0.0.1:{free_port()}'
  status, out, err = end(start(coordinator=address, num_processes=2, process_id=me, join_timeout=2))
  why = ('not all of them came: check', r'nothing answers there \(Connection refused\): check')[me]
  assert re.fullmatch(
    rf'error: process {me} could not join the others at {address} within 2 seconds; {why}.*\n', err
  )
  assert (status, out) == (2, '')


def test_a_port_that_is_taken():
  with socket.create_server(('', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError) as error:
      hosts.initialize(f'127.0.0.1:{port}', 2, 0)
  assert str(error.value) == (
    f'coordinator: process 0 cannot listen at port {port} (Address already in use); choose a free '
    'port, the same for all processes'
  )


def test_auto_without_a_cluster():
  status, _, err = end(start(coordinator='auto'))
  assert re.fullmatch(r'error: coordinator=auto cannot be used \(.*\): start every .*\n', err)
  assert status == 2


def slurm(task: int) -> dict[str, str]:
  """What srun sets for one of two tasks; jax makes the port from the number of the job."""
  return {
    'SLURM_JOB_ID': str(os.getpid() % 4096),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(task),
    'SLURM_LOCALID': str(task),
  }


BARRIERS = """
hosts.barrier('both')
print(me, jax.process_count(), flush=True)
if me == 1:
  time.sleep(5)
hosts.barrier('too late', 2)
"""


@pytest.mark.slow
def test_auto_under_slurm_and_a_barrier_that_one_misses():
  running = [start(BARRIERS, slurm(task), coordinator='auto') for task in (0, 1)]
  (status, out, err), (other_status, other_out, _) = map(end, running)
  assert out.splitlines()[0] == '0 2'
  assert other_out.splitlines()[0] == '1 2'
  assert (
    "lost: process 1 of 2 did not arrive at 'too late' within 2 seconds; look at the output there"
  ) in err
  assert status == other_status == 69


@pytest.mark.slow
def test_one_that_fails_alone_takes_the_other_with_it():
  """And does not wait for it: its own error and status come first."""
  code = """
together()
if me == 1:
  raise UserError('my disk is full')
time.sleep(1)
together()
"""
  started = time.monotonic()
  (status, _, err), (own_status, _, own_err) = map(end, pair(code, host_timeout=100))
  assert time.monotonic() - started < 90
  assert own_status == 2
  assert own_err.splitlines()[-1] == 'error: my disk is full'
  assert status == 69
  assert re.match(
    r'lost: another process of this run died or cannot be reached', err.splitlines()[-1]
  )


@pytest.mark.slow
def test_one_that_hangs_up_while_the_other_waits_for_no_collective():
  """Nothing but the missing signs of life tells: jax aborts, and the last line is ours."""
  code = """
together()
if me == 1:
  import os; os.kill(os.getpid(), 9)
time.sleep(100)
"""
  started = time.monotonic()
  (status, _, err), (other_status, _, _) = map(end, pair(code, host_timeout=8))
  assert time.monotonic() - started < 80
  assert other_status == -9
  assert err.splitlines()[-1].startswith('lost: another process of this run died')
  assert status == 69


def test_all_fail_alike():
  """Each says it, though they end at different times."""
  code = """
time.sleep(me)
raise UserError(f'process {me} is wrong')
"""
  for me, (status, _, err) in enumerate(map(end, pair(code))):
    # jax may add that it misses the other.
    assert f'error: process {me} is wrong' in err.splitlines()
    assert status == 2
