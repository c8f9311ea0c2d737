"""Mesh sizes, layouts by path, and the checks a user meets before training."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import mesh as mesh_lib
from experiments import optim
from experiments.errors import UserError
from experiments.models import gpt2, lm

CFG = gpt2.GPT2Config(vocab_size=40, max_len=8, n_layer=2, n_head=2, n_embd=16)


def one_line(error):
  message = str(error.value)
  assert '\n' not in message
  return message


# Mesh -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape'),
  [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (8, 1, (8, 1)), (1, 8, (1, 8))],
)
def test_mesh_sizes(data, fsdp, shape):
  mesh = mesh_lib.make_mesh(data, fsdp)
  assert dict(mesh.shape) == {'data': shape[0], 'fsdp': shape[1], 'tensor': 1}
  assert mesh.axis_types == (AxisType.Auto,) * 3


def test_tensor_devices_share_rows():
  mesh = mesh_lib.make_mesh(2, -1, 2)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert mesh_lib.row_shards(mesh) == 4
  assert mesh_lib.batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
  mesh_lib.check_batch(4, 1, mesh)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """What makes a mesh of a pod's devices, as jax describes them."""

  id: int
  process_index: int
  slice_index: int
  coords: tuple[int, ...]
  core_on_chip: int = 0
  platform: str = 'tpu'
  device_kind: str = 'fake'


def fake_pod(slices, hosts, devices):
  """`slices` slices of `hosts` hosts each, every host with `devices` devices."""
  size = hosts * devices
  return [FakeDevice(i, i // devices, i // size, (i % size, 0, 0)) for i in range(slices * size)]


def test_only_data_goes_across_slices():
  devices = fake_pod(slices=2, hosts=2, devices=4)
  mesh = mesh_lib.make_mesh(-1, 4, 2, devices=devices)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4, 'tensor': 2}
  for one_copy in mesh.devices:
    assert len({d.slice_index for d in one_copy.flat}) == 1


def test_a_slice_is_not_torn_apart():
  with pytest.raises(UserError) as error:
    mesh_lib.make_mesh(1, 16, devices=fake_pod(slices=2, hosts=2, devices=4))
  assert 'mesh.data=1 must be a multiple of the 2 slices, which hold 8' in one_line(error)


def test_gpus_of_several_hosts_are_no_slices():
  gpus = [dataclasses.replace(d, platform='gpu') for d in fake_pod(slices=2, hosts=1, devices=4)]
  assert dict(mesh_lib.make_mesh(1, 8, devices=gpus).shape)['fsdp'] == 8


class Shuffled:
  """A mesh's batch sharding as process 0 of two sees it, when the mesh alternates between them."""

  def addressable_devices_indices_map(self, shape):
    size = shape[0] // 8
    return {i: (slice(i * size, (i + 1) * size),) for i in (0, 3, 4, 7)}


def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch):
  """On a pod neighbors along the mesh belong to different hosts."""
  monkeypatch.setattr(mesh_lib, 'batch_sharding', lambda mesh: Shuffled())
  rows = mesh_lib.local_rows(mesh_lib.make_mesh())
  np.testing.assert_array_equal(rows(16), [0, 1, 6, 7, 8, 9, 14, 15])


def test_devices_along_tensor_hold_the_same_rows():
  mesh = mesh_lib.make_mesh(2, 1, 4)
  np.testing.assert_array_equal(mesh_lib.local_rows(mesh)(6), np.arange(6))
  batch = {'x': np.arange(12).reshape(6, 2)}
  placed = mesh_lib.to_global(batch, mesh)['x']
  np.testing.assert_array_equal(placed, batch['x'])
  assert placed.sharding == mesh_lib.batch_sharding(mesh)


def test_mesh_over_some_devices():
  assert mesh_lib.make_mesh(devices=jax.devices()[:2]).size == 2
  assert mesh_lib.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(('data', 'fsdp'), [(3, 1), (-1, 3), (4, 4), (4, 1), (-1, -1), (0, 8)])
def test_mesh_that_does_not_fit(data, fsdp):
  with pytest.raises(UserError) as error:
    mesh_lib.make_mesh(data, fsdp)
  message = one_line(error)
  assert f'mesh.data={data}' in message
  assert f'mesh.fsdp={fsdp}' in message
  assert '8 devices' in message


# Layouts ----------------------------------------------------------------------------------------


def specs(tree):
  return jax.tree.map(lambda sharding: sharding.spec, tree)


def test_rules_lay_out_the_model():
  shapes = jax.eval_shape(lambda key: lm.init(key, CFG), jax.random.key(0))
  mesh = mesh_lib.make_mesh(2, 4)
  layout = specs(mesh_lib.tree_shardings(shapes, mesh, gpt2.GPT2Config.sharding_rules))
  for module in ('qkv', 'out'):
    assert layout['blocks']['attn'][module]['kernel'] == P(None, None, 'fsdp')
    assert layout['blocks']['attn'][module]['bias'] == P()
  assert layout['wte']['embedding'] == P(None, 'fsdp')
  assert layout['ln_f'] == {'scale': P(), 'bias': P()}


def test_rules_cut_all_large_arrays_of_the_published_models():
  cfg = gpt2.PRESETS['gpt2_124m']
  shapes = jax.eval_shape(lambda key: lm.init(key, cfg), jax.random.key(0))
  mesh = mesh_lib.make_mesh(1, 8)
  layout = mesh_lib.tree_shardings(shapes, mesh, gpt2.GPT2Config.sharding_rules)
  shard = jax.tree.map(lambda leaf, s: np.prod(s.shard_shape(leaf.shape)), shapes, layout)
  # Biases, norms and positions stay whole: 0.5M of 124.0M.
  assert sum(jax.tree.leaves(shard)) < cfg.num_params() / 8 + 0.6e6


def test_axes_that_do_not_divide_stay_whole():
  tree = {'a': jnp.zeros((6, 16)), 'b': jnp.zeros((6, 10)), 'c': jnp.zeros(16), 'd': jnp.zeros(())}
  rules = [(r'^[a-d]$', P('data', 'fsdp'))]
  layout = specs(mesh_lib.tree_shardings(tree, mesh_lib.make_mesh(2, 4), rules))
  assert layout == {'a': P('data', 'fsdp'), 'b': P('data', None), 'c': P(), 'd': P()}


def test_the_first_matching_rule_wins():
  rules = [('x/kernel$', P('data')), ('kernel$', P('fsdp'))]
  tree = {'x': {'kernel': jnp.zeros(8)}, 'y': {'kernel': jnp.zeros(8)}, 'kernel_not': jnp.zeros(8)}
  layout = specs(mesh_lib.tree_shardings(tree, mesh_lib.make_mesh(2, 4), rules))
  assert layout == {'x': {'kernel': P('data')}, 'y': {'kernel': P('fsdp')}, 'kernel_not': P()}


@pytest.mark.parametrize('nonfinite', ['abort', 'skip'])
def test_optimizer_moments_are_laid_out_like_their_parameters(nonfinite):
  config = SimpleNamespace(
    lr=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, schedule='constant',
    warmup_steps=0, final_lr_ratio=0.1, decay_steps=0,
  )  # fmt: skip
  tx, _ = optim.make_optimizer(config, 10, nonfinite=nonfinite)
  params = jax.eval_shape(lambda key: lm.init(key, CFG), jax.random.key(0))
  opt_state = jax.eval_shape(tx.init, params)
  mesh = mesh_lib.make_mesh(2, 4)
  layout = mesh_lib.tree_shardings((params, opt_state), mesh, gpt2.GPT2Config.sharding_rules)
  params_layout, opt_layout = layout
  for moment in ('mu', 'nu'):
    assert optax.tree.get(opt_layout, moment) == params_layout
  counts = [
    s for s, leaf in zip(jax.tree.leaves(opt_layout), jax.tree.leaves(opt_state)) if not leaf.ndim
  ]
  assert counts
  assert all(sharding.spec == P() for sharding in counts)


def test_to_global_keeps_rows_in_order():
  mesh = mesh_lib.make_mesh(2, 4)
  batch = {'tokens': np.arange(48, dtype=np.int32).reshape(16, 3), 'ids': np.arange(16)}
  placed = mesh_lib.to_global(batch, mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  shards = sorted(placed['tokens'].addressable_shards, key=lambda s: s.index[0].start)
  assert [s.data.shape for s in shards] == [(2, 3)] * 8


def test_pin_rows_lays_out_activations():
  mesh = mesh_lib.make_mesh(2, 4)
  pin = jax.jit(lambda x: mesh_lib.pin_rows(x * 1.0, mesh))
  assert pin(jnp.zeros((16, 3))).sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)
  one_row = jnp.zeros((1, 3))
  assert mesh_lib.pin_rows(one_row, mesh) is one_row
  assert mesh_lib.pin_rows(one_row, None) is one_row


# Checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('batch_size', 'microbatches', 'sizes'),
  [(16, 1, (8, 1)), (16, 2, (2, 4)), (5, 1, (1, 1)), (6, 1, (2, 1)), (4, 1, (2, 2, 8))],
)
def test_batches_that_fit(batch_size, microbatches, sizes):
  mesh_lib.check_batch(batch_size, microbatches, dict(zip(mesh_lib.AXES, sizes)))


@pytest.mark.parametrize(
  ('batch_size', 'microbatches', 'sizes', 'fix'),
  [
    (30, 2, (2, 2), '(4 devices x 2 microbatches): use 24 or 32'),
    (7, 1, (8, 1), '(8 devices x 1 microbatch): use 8'),
    (0, 1, (1, 1), '(1 device x 1 microbatch): use 1'),
  ],
)
def test_batches_that_do_not_fit(batch_size, microbatches, sizes, fix):
  with pytest.raises(UserError) as error:
    mesh_lib.check_batch(batch_size, microbatches, dict(zip(mesh_lib.AXES, sizes)))
  message = one_line(error)
  assert message.startswith(f'batch_size={batch_size} ')
  assert message.endswith(fix)


def test_check_batch_takes_a_mesh():
  mesh_lib.check_batch(16, 1, mesh_lib.make_mesh(2, 4))
  with pytest.raises(UserError, match='use 16 or 24'):
    mesh_lib.check_batch(20, 1, mesh_lib.make_mesh(2, 4))
