"""The record of a run under kills and resumes, what TensorBoard sees, and the clock of the bar."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import files, metrics
from experiments.errors import UserError

ROOT = Path(__file__).parents[2]


def strict(path):
  """Reads JSON lines as a strict reader would: bare NaN is an error."""

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# Small files


def test_jsonable():
  value = {'a': np.float32(0.5), 'b': (np.arange(3), float('nan')), 3: [np.inf, True, None, 'x']}
  assert files.jsonable(value) == {'a': 0.5, 'b': [[0, 1, 2], None], '3': [None, True, None, 'x']}


def test_write_text_replaces_or_leaves(tmp_path):
  path = tmp_path / 'deep' / 'result.json'
  files.write_json(path, {'a': 1})
  files.write_json(path, {'a': 2})
  assert files.read_json(path) == {'a': 2}
  assert os.listdir(path.parent) == ['result.json']
  assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
  umask = os.umask(0)
  os.umask(umask)
  return umask


def test_write_text_on_a_full_disk_keeps_the_old_file(tmp_path):
  script = (
    'import resource, sys; from experiments import files\n'
    'files.write_text(sys.argv[1], "old")\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n'
    'try: files.write_text(sys.argv[1], "new" * 1000)\n'
    'except files.UserError as e: print(e)'
  )
  path = tmp_path / 'a.txt'
  out = subprocess.run(
    [sys.executable, '-c', script, str(path)], capture_output=True, text=True, cwd=ROOT
  )
  assert out.stdout == f'cannot write {path}: File too large; free space or choose another folder\n'
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['a.txt']


# JSON lines


def test_lines_are_there_before_close(tmp_path):
  writer = metrics.MetricWriter(tmp_path, tensorboard=False)
  writer.write('train', 1, {'loss': np.float32(0.25), 'domain': {'web': {'loss': float('nan')}}})
  assert strict(tmp_path / 'metrics.jsonl') == [
    {'kind': 'train', 'step': 1, 'loss': 0.25, 'domain': {'web': {'loss': None}}}
  ]


def test_resume_cuts_back(tmp_path):
  path = tmp_path / 'examples.jsonl'
  uninterrupted = metrics.JsonlFile(path)
  for step in range(1, 6):
    uninterrupted.write({'step': step, 'loss': 1 / step})
  uninterrupted.close()
  whole = path.read_bytes()
  resumed = metrics.JsonlFile(path, resume_step=3)
  assert [r['step'] for r in metrics.read_jsonl(path)] == [1, 2, 3]
  for step in (4, 5):
    resumed.write({'step': step, 'loss': 1 / step})
  resumed.close()
  assert path.read_bytes() == whole


@pytest.mark.parametrize('torn', ['{"step": 3, "lo', '{"step": 3}', '\0\0\0\n', '\xff'])
def test_a_torn_last_line(tmp_path, torn):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn.encode('latin-1'))
  assert [r['step'] for r in metrics.read_jsonl(path)] == [1, 2]
  file = metrics.JsonlFile(path, resume_step=10)
  file.write({'step': 11})
  assert strict(path) == [{'step': 1}, {'step': 2}, {'step': 11}]


def test_a_broken_line_in_the_middle_is_not_swallowed(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl, line 2 is not JSON'):
    metrics.read_jsonl(path)


def test_a_new_run_starts_empty(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  metrics.MetricWriter(tmp_path, tensorboard=False).close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.MetricWriter(tmp_path / 'run', primary=False)
  writer.write('train', 1, {'loss': 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_kill_loses_at_most_the_last_line(tmp_path):
  script = (
    'import sys; from experiments import metrics\n'
    'f = metrics.JsonlFile(sys.argv[1]); step = 0\n'
    'while True:\n'
    '  step += 1; f.write({"step": step, "pad": "x" * 200}); print(step, flush=True)'
  )
  path = tmp_path / 'metrics.jsonl'
  process = subprocess.Popen(
    [sys.executable, '-c', script, str(path)], stdout=subprocess.PIPE, cwd=ROOT
  )
  lines = [process.stdout.readline() for _ in range(200)]
  process.send_signal(signal.SIGKILL)
  lines += process.stdout.readlines()
  process.wait()
  acknowledged = sum(line.endswith(b'\n') for line in lines)
  steps = [r['step'] for r in metrics.read_jsonl(path)]
  assert steps == list(range(1, len(steps) + 1))
  assert len(steps) >= acknowledged


def test_a_full_disk_is_a_user_error(tmp_path):
  script = (
    'import resource, sys; from experiments import metrics\n'
    'f = metrics.JsonlFile(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n'
    'try:\n  for s in range(3): f.write({"step": s})\n'
    'except metrics.UserError as e: print(e)'
  )
  path = tmp_path / 'm.jsonl'
  out = subprocess.run(
    [sys.executable, '-c', script, str(path)], capture_output=True, text=True, cwd=ROOT
  )
  assert out.stdout == f'cannot write {path}: File too large; free space and run again\n'


# TensorBoard


def events(folder):
  """(session starts, {(tag, step): value}) of all event files, parsed record by record."""
  from tensorboardX.proto.event_pb2 import Event

  starts, values = [], {}
  for path in sorted(folder.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from('<Q', data, at)
      event = Event.FromString(data[at + 12 : at + 12 + length])
      at += 12 + length + 4
      if event.HasField('session_log'):
        starts.append(event.step)
      for value in event.summary.value:
        values[value.tag, event.step] = value.simple_value
  return starts, values


def test_tensorboard_scalars_are_nested_and_cut_back(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  values = {'bpb': {'web': 1.5, 'code': float('nan')}, 'worst_domain': 'web', 'ids': [1, 2]}
  writer.write('eval', 7, values)
  writer.close()
  starts, seen = events(tmp_path / 'tensorboard')
  assert seen == {('eval/bpb/web', 7): 1.5}
  assert starts == [0]
  time.sleep(1.1)  # event files are named by the second
  metrics.MetricWriter(tmp_path, resume_step=5).close()
  assert events(tmp_path / 'tensorboard')[0] == [0, 6]


# Progress


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


def make(clock, **kwargs):
  stream = io.StringIO()
  kwargs = dict(tokens_per_step=1000, stream=stream, clock=clock) | kwargs
  return metrics.Progress(100, **kwargs), stream


def test_rate_leaves_out_compilation_and_evaluation():
  clock = Clock()
  progress, _ = make(clock, initial=10, flops_per_token=2e9, peak=1e12)
  clock.now += 60  # compiling the step
  progress.update(11, 1.0)
  assert progress.tokens_per_second is None
  clock.now += 4
  with progress.paused():
    clock.now += 1000
  clock.now += 1
  progress.update(21, 1.0)
  assert progress.seconds == 5
  assert progress.tokens_per_second == 2000  # 10 steps of 1000 in 5 s
  assert progress.mfu == pytest.approx(4.0)  # 2000 * 2e9 / 1e12; a peak that low is a test's


def test_lines_come_now_and_then_and_at_the_end():
  clock = Clock()
  progress, stream = make(clock)
  for step in range(1, 13):
    progress.update(step, 2.0)
    clock.now += 1
  progress.close()
  progress.close()
  lines = stream.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == ['1/100', '6/100', '11/100', '12/100']
  assert lines[1] == 'step 6/100  loss 2.0000  1,000 tokens/s  ETA 1m34s'


def test_a_terminal_gets_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  clock, stream = Clock(), Terminal()
  progress = metrics.Progress(10, 4, tokens_per_step=10, stream=stream, clock=clock)
  progress.update(5, 1.25)
  clock.now += 1
  progress.update(10, 1.25)
  progress.close()
  assert '10/10 ' in stream.getvalue()
  assert 'loss 1.2500' in stream.getvalue()


def test_disabled_still_measures():
  clock = Clock()
  progress, stream = make(clock, enabled=False)
  progress.update(1, 1.0)
  clock.now += 1
  progress.update(2, 1.0)
  progress.close()
  assert stream.getvalue() == ''
  assert progress.tokens_per_second == 1000
  assert progress.mfu is None


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0, '0s'), (59.6, '1m00s'), (185, '3m05s'), (7620, '2h07m')]
)
def test_format_seconds(seconds, text):
  assert metrics.format_seconds(seconds) == text
