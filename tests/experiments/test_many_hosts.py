"""One, two and four processes with eight devices in all train the same model on the same data.

Example ids are equal. Losses, weights and parameters agree as far as the order of a sum allows,
which differs with what travels between processes: 1e-5 relative for losses and weights, and what
a few steps of Adam make of that for parameters.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import checkpoints, metrics, train
from experiments import config as config_lib
from tests.experiments import small

STEPS = 6


def train_on(processes: int, base) -> tuple[list[dict], dict, dict]:
  """(examples of every step, final evaluation, parameters) of a run with 8 simulated devices."""
  workdir = base / f'{processes}_processes'
  command = [
    *(sys.executable, '-m', 'experiments.main', f'--workdir={workdir}'),
    f'--config=configs/llama.py:path={base / "text"},weighting=linupper:1.0,quick',
    *(f'--config.total_steps={STEPS}', f'--config.checkpoint.every={STEPS}'),
    *('--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=2'),
    *('--config.w.loss.start=0', '--noconfig.log.tensorboard', f'--config.eval.every={STEPS}'),
  ]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  together = [f'--coordinator={address}', f'--num_processes={processes}']
  running = [
    subprocess.Popen(
      [*command, *(together if processes > 1 else []), *([f'--process_id={i}'] * (processes > 1))],
      env={
        **os.environ,
        'JAX_NUM_CPU_DEVICES': str(8 // processes),
        'JAXRW_DATA': str(base / 'prepared'),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(processes)
  ]
  for process in running:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
  config = config_lib.read(workdir)
  config.data.root = str(base / 'prepared')
  run = train.build(config)
  with checkpoints.Checkpoints(workdir / 'checkpoints') as saved:
    state, _, _ = saved.restore(run.abstract_state, STEPS)
  examples = metrics.read_jsonl(workdir / 'examples.jsonl')
  (evaluated,) = (
    record for record in metrics.read_jsonl(workdir / 'metrics.jsonl') if record['kind'] == 'eval'
  )
  return examples, evaluated, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """(where the runs are, what a single process found)."""
  base = tmp_path_factory.mktemp('hosts')
  small.write_corpus(base / 'text')
  return base, train_on(1, base)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_many_hosts_equal_one(one, processes):
  base, (examples, evaluated, params) = one
  theirs, their_evaluated, their_params = train_on(processes, base)
  assert len(examples) == STEPS
  assert [e['example_id'] for e in theirs] == [e['example_id'] for e in examples]
  for name in ('loss', 'weight'):
    ours = np.array([e[name] for e in examples])
    np.testing.assert_allclose([e[name] for e in theirs], ours, rtol=1e-5)
  assert np.ptp([e['weight'] for e in examples]) > 0.1  # the weights do something
  assert their_evaluated['macro_bpb'] == pytest.approx(evaluated['macro_bpb'], rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), their_params, params
  )
