"""The dry run: exact counts on simulated devices, and what it says when a model does not fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import common
from experiments import compiled, dry_run, hardware, train
from experiments.errors import UserError
from tests.experiments import small


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  base = tmp_path_factory.mktemp('dry')
  return small.config(small.write_corpus(base / 'text'), base / 'data')


@pytest.fixture(scope='module')
def llama(config):
  """A Llama cut along all three axes of a mesh of eight devices."""
  config = config.copy_and_resolve_references()
  config.model.update(name='llama', n_head=2, n_kv_head=2, d_ff=64, remat='full')
  config.mesh.update(data=2, fsdp=2, tensor=2)
  plain = config.copy_and_resolve_references()
  common.set_weighting(plain, 'uniform')
  return train.build(config), train.build(plain)


@pytest.fixture(scope='module')
def found(llama):
  return dry_run.report(*llama)


def test_memory_is_that_of_the_compiled_step(llama, found):
  run, _ = llama
  step = dry_run.compile_step(run, run.train_step)
  memory, sizes = step.memory_analysis(), found['bytes']
  assert sizes['arguments'] == memory.argument_size_in_bytes
  assert sizes['temporary'] == memory.temp_size_in_bytes
  assert sizes['peak'] == sum(size for kind, size in sizes.items() if kind != 'peak')
  # Batch and whole-step signals are small beside the state, which every argument is part of.
  assert found['state_bytes'] < sizes['arguments'] < 1.2 * found['state_bytes']


def test_state_bytes_are_those_of_the_arrays(llama, found):
  run, _ = llama
  state = run.init()
  held = sum(
    leaf.addressable_shards[0].data.nbytes
    for leaf in jax.tree.leaves(state)
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  )
  assert found['state_bytes'] == held


def test_useful_flops_are_less_than_what_is_computed(llama, found):
  run, _ = llama
  rows = run.config.batch_size * run.corpus.seq_len
  assert found['useful_flops'] == run.model.flops_per_token(run.corpus.seq_len) * rows // 8
  assert found['useful_flops'] < found['matmul_flops']


def test_collectives_are_named_by_axis_and_multiplied_by_their_loop(llama, found):
  run, _ = llama
  entries = found['collectives']
  assert all(set(e['axes']) <= {'data', 'fsdp', 'tensor'} for e in entries)
  assert {axis for e in entries for axis in e['axes']} == {'data', 'fsdp', 'tensor'}
  # Megatron's pattern: an activation of [rows / 4, T, D] is added up over `tensor` in every layer.
  activation = 4 * (run.config.batch_size // 4) * run.corpus.seq_len * run.model.n_embd
  (summed,) = (
    e
    for e in entries
    if e['kind'] == 'all-reduce' and e['axes'] == ['tensor'] and e['bytes'] == activation
  )
  assert summed['count'] % run.model.n_layer == 0
  assert summed['received'] == activation * summed['count']  # 2 (n - 1) / n of it, with n = 2
  counted = compiled.costs(dry_run.compile_step(run, run.train_step)).collectives
  assert sum(e['count'] for e in entries) == sum(c.count for c in counted)


def test_linupper_adds_two_small_reductions_and_no_products(found):
  adds = found['weighting_adds']
  assert adds['matmul_flops'] == 0
  assert [(e['kind'], e['bytes'], e['count']) for e in adds['collectives']] == [
    ('all-reduce', 8, 2)
  ]


def test_bounds_of_a_chip_by_hand():
  chip = hardware.Chip('x', flops=1e12, link=1e9)
  found = {
    'matmul_flops': 4e11,
    'useful_flops': 3e11,
    'collectives': [{'received': 3e8}, {'received': 2e8}],
  }
  times = dry_run.bound(found, chip)
  assert times == {'compute_seconds': 0.4, 'communication_seconds': 0.5, 'mfu': 0.6}
  assert dry_run.bound(found, chip._replace(link=None))['mfu'] == pytest.approx(0.75)


def test_traffic_of_a_ring_by_hand(llama):
  mesh = llama[0].mesh
  group = (0, 2, 4, 6)  # data x fsdp
  made = (
    compiled.Collective('all-reduce', 800, 3, '', group),
    compiled.Collective('all-gather', 800, 1, '', group),
    compiled.Collective('all-gather', 800, 2, '', group),
    compiled.Collective('collective-permute', 800, 1, '', (0, 1)),
  )
  assert dry_run.collectives(made, mesh) == [
    {'kind': 'all-reduce', 'bytes': 800, 'axes': ['data', 'fsdp'], 'count': 3, 'received': 3600},
    {'kind': 'all-gather', 'bytes': 800, 'axes': ['data', 'fsdp'], 'count': 3, 'received': 1800},
    {'kind': 'collective-permute', 'bytes': 800, 'axes': ['tensor'], 'count': 1, 'received': 800},
  ]


# What does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('message', 'sizes'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(23.50G) exceeds available HBM (15.75G).',
      (int(23.5 * 2**30), int(15.75 * 2**30)),
    ),
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
      'Used 512.00M of 256.00M hbm. Exceeded hbm capacity by 256.00M.',
      (512 * 2**20, 256 * 2**20),
    ),
    ('RESOURCE_EXHAUSTED: something new', (None, None)),
  ],
)
def test_the_compilers_own_words_are_understood(message, sizes):
  assert dry_run._out_of_memory(jax.errors.JaxRuntimeError(message)) == sizes


def test_another_error_of_the_compiler_is_not_taken_for_it():
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    dry_run._out_of_memory(jax.errors.JaxRuntimeError('INTERNAL: bug'))


def refusing(message):
  """A jitted step whose compiler says `message`."""

  class Step:
    def lower(self, *args):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError(message)

  return Step()


def test_what_does_not_fit_is_explained(llama):
  """The advice follows the config: what is already done is not advised, sizes are exact."""
  run, _ = llama
  full = 'RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.'
  found = dry_run.report(dataclasses.replace(run, train_step=refusing(full)))
  assert found['fits'] is False
  text = dry_run.describe(run, found)
  assert 'DOES NOT FIT: at least 21.47 GB of 16.91 GB a device; what to change:' in text
  state = found['state_bytes']
  assert f'config.mesh.fsdp=4: parameters and optimizer take {compiled.si(state, "B")}' in text
  rows = run.config.batch_size // 4
  logits = 4 * rows * run.corpus.seq_len * run.model.vocab_size
  assert f'config.model.loss_chunk=512: all logits at once take {compiled.si(logits, "B")}' in text
  assert 'config.model.remat' not in text  # it is 'full' already
  assert f'config.microbatches={rows}: a device computes {rows} rows' in text
  whole = dataclasses.replace(run, model=dataclasses.replace(run.model, remat='none', loss_chunk=8))
  lines = '\n'.join(dry_run.advice(whole, None))
  assert "config.model.remat='full'" in lines
  assert 'loss_chunk' not in lines


def test_a_chip_whose_memory_is_known_is_compared(llama, monkeypatch):
  run, _ = llama
  tiny = hardware.Chip('cpu', flops=1e12, memory=1000.0, link=1e9)
  monkeypatch.setattr(hardware, 'CHIPS', (tiny,))
  found = dry_run.report(run)
  assert found['fits'] is False
  assert 'more or larger devices' in ' '.join(found['advice'])
  assert 'DOES NOT FIT' in dry_run.describe(run, found)
  monkeypatch.setattr(hardware, 'CHIPS', (tiny._replace(memory=1e12),))
  found = dry_run.report(run)
  assert found['fits'] is True
  assert found['bound']['compute_seconds'] == found['matmul_flops'] / 1e12


# The program ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_compiles_for_devices_that_are_not_here(config, tmp_path):
  """16 simulated devices on a machine that has fewer; and everything it counted as JSON."""
  output = tmp_path / 'counts.json'
  command = [sys.executable, '-m', 'experiments.main', '--compile_for=cpu:16', f'--json={output}']
  command += [f'--config=configs/lm.py:path={config.data.path},quick,batch=16']
  command += ['--config.batch_size=16', f'--config.data.root={config.data.root}']
  command += ['--config.mesh.fsdp=4', '--config.eval.batch_size=16']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  for part in ('data 4 x fsdp 4 x tensor 1 = 16', 'collective', 'the weighting adds', 'planned:'):
    assert part in done.stdout
  found = json.loads(output.read_text())
  assert found['devices'] == 16
  assert found['hosts'] == 1
  assert found['versions']['jax'] == jax.__version__
  assert np.sum([e['count'] for e in found['weighting_adds']['collectives']]) == 2


def test_flags_that_do_not_belong_together():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.main', '--config=configs/quickstart.py', '--json=x'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: --json=x is for a dry run')


def test_a_mesh_that_does_not_fit_the_topology_is_one_line(config):
  config = config.copy_and_resolve_references()
  config.mesh.update(data=3, fsdp=1)
  with pytest.raises(UserError, match='their product must be 8'):
    train.build(config)
