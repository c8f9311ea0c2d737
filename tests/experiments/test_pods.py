"""Three models compiled for three pods, against what was counted before with the same compiler.

Needs the TPU compiler (`make libtpu`); takes two to five minutes a case on two cores. A compiler of
another version may well count otherwise: its numbers are then missing here, and
`UPDATE_GOLDEN=1 python -m pytest -m slow tests/experiments/test_pods.py` adds them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import files, hardware
from experiments.errors import UserError

GOLDEN = Path(__file__).parents[1] / 'golden' / 'pods.json'
LLAMA = 'configs/llama.py:batch=256,size='
CASES = {
  'gpt2_124m': (
    '--config=configs/gpt2.py:size=124m,tokenizer=byte',
    *('--config.model.vocab_size=50257', '--config.batch_size=256', '--config.eval.batch_size=256'),
  ),
  'llama_1.4b': (f'--config={LLAMA}1.4b,fsdp=16',),
  'llama_7b': (f'--config={LLAMA}7b,fsdp=16',),
}
TOPOLOGIES = ('v5e:4x4', 'v5e:16x16', 'v5p:4x4x8')
# Where uniform weights are compiled, too, which takes three times as long.
COMPARED = (
  'gpt2_124m v5e:4x4',
  'llama_1.4b v5e:4x4',
  'llama_1.4b v5e:16x16',
  'llama_7b v5e:16x16',
)


def summary(found: dict) -> dict:
  """The numbers that decide whether a run is paid for."""
  if not found['fits']:
    return {'fits': False, 'needed': found['needed_bytes'], 'available': found['available_bytes']}
  numbers = {
    'fits': True,
    'peak': found['bytes']['peak'],
    'state': found['state_bytes'],
    'matmul_flops': found['matmul_flops'],
    'collectives': sum(e['count'] for e in found['collectives']),
    'received': sum(e['received'] for e in found['collectives']),
    'mfu_bound': found['bound']['mfu'],
  }
  if 'weighting_adds' in found:
    adds = found['weighting_adds']
    numbers |= {
      'weighting_collectives': sum(e['count'] for e in adds['collectives']),
      'weighting_bytes': sum(e['bytes'] * e['count'] for e in adds['collectives']),
      'weighting_flops': adds['matmul_flops'],
    }
  return numbers


@pytest.mark.slow
@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('model', CASES)
def test_a_pod_is_counted_as_before(model, topology, tmp_path):
  try:
    hardware.find_libtpu()
  except UserError as missing:
    pytest.skip(str(missing))
  output = tmp_path / 'found.json'
  command = [sys.executable, '-m', 'experiments.main', f'--compile_for={topology}']
  uncompared = [] if f'{model} {topology}' in COMPARED else ['--noweighting_adds']
  # Without what tests/conftest.py sets for this machine's own compiler.
  environment = {
    k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')
  }
  done = subprocess.run(
    [*command, f'--json={output}', *CASES[model], *uncompared],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(output.read_text())
  compiler = f'jax {found["versions"]["jax"]}, libtpu {found["versions"]["libtpu"]}'
  golden = files.read_json(GOLDEN)
  if os.environ.get('UPDATE_GOLDEN'):
    golden.setdefault(compiler, {})[f'{model} {topology}'] = summary(found)
    files.write_json(GOLDEN, golden)
  if compiler not in golden:
    pytest.skip(f'nothing was counted with {compiler} yet')
  expected = golden[compiler][f'{model} {topology}']
  assert summary(found) == {
    name: pytest.approx(value, rel=0.02) if not isinstance(value, bool) else value
    for name, value in expected.items()
  }
