"""Checkpoints that are whole or absent: bits, meshes, kills, damage, full disks, two processes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from configs import common
from experiments import checkpoints
from experiments.checkpoints import Checkpoints, restore_params
from experiments.errors import UserError

ROOT = Path(__file__).parents[2]


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any
  weighting: Any


def make_state(seed=0, weighting=None):
  params = {
    'wte': jax.random.normal(jax.random.key(seed), (16, 8)),
    'block': {
      'b': jnp.linspace(0, 1, 8, dtype=jnp.bfloat16),
      'ids': jnp.arange(5, dtype=jnp.uint8),
    },
  }
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      optax.constant_schedule(1e-3), mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
  )
  state = State(jnp.int32(seed), params, optax.apply_if_finite(tx, 3).init(params), weighting or {})
  return jax.tree.map(jnp.asarray, state)


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def run_with(tmp_path, *steps, scores=None, **policy):
  """A run directory whose checkpoint of step s holds make_state(s), evaluated if it has a score."""
  with Checkpoints(tmp_path / 'checkpoints', **policy) as saved:
    for step in steps:
      metrics = {'macro_bpb': scores[step], 'tokens': 9} if step in (scores or {}) else None
      saved.save(step, make_state(step), {'used': [step]}, {'loss': step / 2}, metrics)
  return tmp_path / 'checkpoints'


def steps_of(directory):
  return sorted(map(int, os.listdir(directory)))


def largest_file(path):
  files = [p for p in path.rglob('*') if p.is_file() and p.parent.name == 'd']
  return max(files, key=lambda p: p.stat().st_size)


# Bits and meshes


@pytest.mark.parametrize('weighting', [{}, {'table': {'ema': jnp.ones((3,)), 'none': ()}}])
def test_round_trip(tmp_path, weighting):
  state = make_state(7, weighting)
  data_state = {'step': 7, 'used': [1, 2**40], 'named': {'web': 0.1}}
  with Checkpoints(tmp_path / 'c') as saved:
    assert saved.latest_step() is None
    saved.save(7, state, data_state, {'config': {'optim': {'lr': 3e-3}}})
  with Checkpoints(tmp_path / 'c') as saved:
    assert saved.latest_step() == 7
    back, data_back, metadata = saved.restore(abstract(state))
  assert_same_bits(back, state)
  assert data_back == data_state
  assert metadata == {'config': {'optim': {'lr': 3e-3}}}


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  sharding = NamedSharding(mesh((8,), ('data',)), PartitionSpec('data'))
  make = jax.jit(lambda: {'w': jnp.arange(2**20, dtype=jnp.float32)}, out_shardings=sharding)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  state = make()
  shapes = abstract(state)
  with Checkpoints(tmp_path / 'c') as saved:
    saved.save(1, state, {}, {})
    for _ in range(3):
      state = overwrite(state)
    jax.block_until_ready(state)
    saved.wait()
    back, _, _ = saved.restore(shapes)
  np.testing.assert_array_equal(back['w'], np.arange(2**20))


def mesh(shape, names):
  devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
  return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize(
  ('shape', 'spec'), [((8, 1), ('data',)), ((2, 4), ('data', 'fsdp')), ((1, 1), ())]
)
def test_restore_on_another_mesh(tmp_path, shape, spec):
  saved_on = NamedSharding(mesh((4, 2), ('data', 'fsdp')), PartitionSpec('fsdp'))
  state = make_state(3)
  state = state._replace(params={'wte': jax.device_put(state.params['wte'], saved_on)})
  with Checkpoints(tmp_path / 'c') as saved:
    saved.save(3, state, {}, {})
    here = NamedSharding(mesh(shape, ('data', 'fsdp')), PartitionSpec(*spec))
    wanted = abstract(state)._replace(
      params={'wte': jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=here)}
    )
    back, _, _ = saved.restore(wanted)
  assert back.params['wte'].sharding == here
  assert_same_bits(back, state)


# Which checkpoints there are


def test_keeps_the_newest(tmp_path):
  directory = run_with(tmp_path, 1, 2, 3, 4, 5, keep=3)
  assert sorted(os.listdir(directory)) == ['3', '4', '5']
  with Checkpoints(directory) as saved:
    back, data_state, metadata = saved.restore(abstract(make_state()), step=4)
  assert_same_bits(back, make_state(4))
  assert (data_state, metadata) == ({'used': [4]}, {'loss': 2.0})


SCORES = {2: 1.5, 3: 1.25, 4: 1.25, 5: float('nan'), 6: 1.75}


def test_the_best_and_every_fourth_stay(tmp_path):
  """Of equal scores the newest; a step without a finite score, 1 and 5, is never the best."""
  policy = dict(scores=SCORES, keep=1, keep_every=4, best='macro_bpb')
  directory = run_with(tmp_path, 1, 2, 3, **policy)
  assert steps_of(directory) == [3]
  assert steps_of(run_with(tmp_path, 4, 5, 6, 7, 8, 9, **policy)) == [4, 8, 9]
  assert steps_of(run_with(tmp_path, 10, scores={10: 1.0}, keep=1, best='macro_bpb')) == [10]


def test_the_best_is_the_same_after_a_kill(tmp_path):
  """A process may die after a save and before what it makes superfluous is deleted."""
  policy = dict(scores=SCORES, keep=1, best='macro_bpb')
  kept = steps_of(run_with(tmp_path / 'undisturbed', 1, 2, 3, 6, 7, **policy))
  assert kept == [3, 7]
  directory = run_with(tmp_path / 'killed', 1, 2, 3, 6, scores=SCORES, keep=9)
  assert steps_of(directory) == [1, 2, 3, 6]
  assert steps_of(run_with(tmp_path / 'killed', 7, **policy)) == kept


def test_read_the_best_or_a_step(tmp_path, capfd):
  directory = run_with(tmp_path, 2, 3, 4, 6, 7, scores=SCORES, keep=9)
  shapes = abstract(make_state().params)
  read = lambda which: restore_params(tmp_path, shapes, which=which)
  assert_same_bits(read('macro_bpb'), make_state(4).params)
  assert_same_bits(read('6'), make_state(6).params)
  assert_same_bits(read(''), make_state(7).params)
  truncate(directory / '4')
  assert_same_bits(read('macro_bpb'), make_state(3).params)
  (directory / '3' / 'metrics' / 'metrics').unlink()
  assert_same_bits(read('macro_bpb'), make_state(2).params)
  assert 'checkpoints/3 is damaged (metrics/metrics is missing); left out' in capfd.readouterr().err
  for absent in ('5', 'micro_bpb'):
    with pytest.raises(
      UserError, match=f'no checkpoint {absent!r} that can be read; .* 2, 3, 4, 6'
    ):
      read(absent)


def test_what_step_means():
  config = common.base_config()
  assert checkpoints.resolve_step(config, '') == ''
  assert checkpoints.resolve_step(config, '200') == '200'
  with pytest.raises(UserError, match=r"--step=best: the run has config\.checkpoint\.best=''"):
    checkpoints.resolve_step(config, 'best')
  with pytest.raises(UserError, match="--step=last: must be a step such as 200, or 'best'"):
    checkpoints.resolve_step(config, 'last')
  config.checkpoint.best = 'worst_bpb'
  assert checkpoints.resolve_step(config, 'best') == 'worst_bpb'


@pytest.mark.parametrize('jump', [-1e6, 1e6])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, jump):
  """Retention and resume go by steps."""
  now = [time.time()]
  monkeypatch.setattr(time, 'time', lambda: now[0])
  monkeypatch.setattr(time, 'time_ns', lambda: int(now[0] * 1e9))
  for step in range(1, 6):
    directory = run_with(tmp_path, step, keep=2)
    for file in directory.rglob('*'):
      os.utime(file, (now[0], now[0]))
    now[0] += jump
  assert steps_of(directory) == [4, 5]
  with Checkpoints(directory) as saved:
    assert_same_bits(saved.restore(abstract(make_state()))[0], make_state(5))


def test_a_saved_step_is_left_as_it_is(tmp_path):
  directory = run_with(tmp_path, 3)
  with Checkpoints(directory) as saved:
    saved.save(3, make_state(9), {'used': [9]}, {})
    assert_same_bits(saved.restore(abstract(make_state()))[0], make_state(3))


def test_half_written_folders_are_removed(tmp_path):
  directory = run_with(tmp_path, 1)
  (directory / '2.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  with Checkpoints(directory) as saved:
    assert saved.latest_step() == 1
  assert os.listdir(directory) == ['1']


def test_no_checkpoint(tmp_path):
  with (
    Checkpoints(tmp_path / 'c') as saved,
    pytest.raises(UserError, match='has no checkpoint that can be read'),
  ):
    saved.restore(abstract(make_state()))
  with (
    pytest.raises(UserError, match=r'there is no checkpoint .*/5'),
    Checkpoints(tmp_path) as saved,
  ):
    saved.restore(abstract(make_state()), step=5)


# Damage


def truncate(path):
  os.truncate(largest_file(path), 10)


def flip_a_bit(path):
  file = largest_file(path)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def remove_a_file(path):
  (path / 'state' / '_METADATA').unlink()


def break_the_seal(path):
  (path / checkpoints.SEAL).write_text('{"state')


@pytest.mark.parametrize('harm', [truncate, flip_a_bit, remove_a_file, break_the_seal])
def test_damaged_newest_falls_back(tmp_path, capfd, harm):
  directory = run_with(tmp_path, 1, 2)
  harm(directory / '2')
  params = restore_params(tmp_path, abstract(make_state().params))
  assert_same_bits(params, make_state(1).params)
  assert 'trying the one before' in capfd.readouterr().err
  with Checkpoints(directory) as saved:
    message = capfd.readouterr().err
    assert saved.latest_step() == 1
    back, data_state, _ = saved.restore(abstract(make_state()))
    assert_same_bits(back, make_state(1))
    assert data_state == {'used': [1]}
    saved.save(2, make_state(2), {}, {})  # the run goes on and reaches the same step again
  assert message.startswith(f'checkpoint {directory}/2 is damaged (')
  assert message.endswith('): renamed to 2.damaged, using the one before\n')
  assert message.count('\n') == 1
  assert sorted(os.listdir(directory)) == ['1', '2', '2.damaged']


def test_orbax_alone_does_not_notice_a_flipped_bit(tmp_path):
  """Why there are seals. If this fails, Orbax has learned it and the seals may go."""
  state = {'w': jax.random.normal(jax.random.key(0), (100_000,))}
  with Checkpoints(tmp_path / 'c') as saved:
    saved.save(1, state, {}, {})
  flip_a_bit(tmp_path / 'c' / '1')
  back = ocp.load_checkpointables(tmp_path / 'c' / '1', {'state': abstract(state)})['state']
  assert np.asarray(back['w']).tobytes() != np.asarray(state['w']).tobytes()


def test_an_unsealed_checkpoint_counts_if_it_can_be_read(tmp_path, capfd, monkeypatch):
  """A process may be killed after the rename and before the seal."""
  directory = run_with(tmp_path, 1, 2)
  (directory / '2' / checkpoints.SEAL).unlink()
  with Checkpoints(directory) as saved:
    assert_same_bits(saved.restore(abstract(make_state()))[0], make_state(2))
  load = checkpoints._load
  broken = lambda path, *rest: 1 / 0 if path.name == '2' else load(path, *rest)
  monkeypatch.setattr(checkpoints, '_load', broken)
  with Checkpoints(directory) as saved:
    assert saved.latest_step() == 2
    assert_same_bits(saved.restore(abstract(make_state()))[0], make_state(1))
    assert saved.latest_step() == 1
  message = (
    'damaged (ZeroDivisionError while reading it): renamed to 2.damaged, using the one before'
  )
  assert message in capfd.readouterr().err


@pytest.mark.parametrize('name', ['state/_METADATA', '_CHECKPOINT_METADATA'])
def test_an_unsealed_checkpoint_that_does_not_say_what_it_holds(tmp_path, capfd, name):
  """Several processes cannot try to read it, so it must be seen before."""
  directory = run_with(tmp_path, 1, 2)
  (directory / '2' / checkpoints.SEAL).unlink()
  (directory / '2' / name).unlink()
  with Checkpoints(directory) as saved:
    assert saved.latest_step() == 1
  assert 'renamed to 2.damaged, using the one before\n' in capfd.readouterr().err


def test_the_two_newest_are_damaged(tmp_path, capfd):
  directory = run_with(tmp_path, 1, 2, 3, keep=3)
  flip_a_bit(directory / '3')
  largest_file(directory / '2').write_bytes(b'')
  with Checkpoints(directory) as saved:
    assert_same_bits(saved.restore(abstract(make_state()))[0], make_state(1))
  assert capfd.readouterr().err.count('using the one before\n') == 2
  assert sorted(os.listdir(directory)) == ['1', '2.damaged', '3.damaged']


@pytest.mark.parametrize('content', [b'', b'{"macro'])
def test_an_older_checkpoint_whose_metrics_are_damaged(tmp_path, capfd, content):
  """Orbax reads the metrics of all checkpoints, and a broken file would stop the run."""
  directory = run_with(tmp_path, 2, 3, 6, scores=SCORES, keep=9)
  (directory / '3' / 'metrics' / 'metrics').write_bytes(content)
  run_with(tmp_path, 7, scores=SCORES, keep=1, best='macro_bpb')
  assert sorted(os.listdir(directory)) == ['2', '3.damaged', '7']
  message = 'checkpoints/3 is damaged (metrics/metrics is changed): renamed to 3.damaged\n'
  assert capfd.readouterr().err.endswith(message)


def test_files_in_the_place_of_folders(tmp_path, capfd):
  directory = run_with(tmp_path, 1)
  (directory / '2').write_text('')
  assert sorted(os.listdir(run_with(tmp_path, 2))) == ['1', '2', '2.damaged']
  assert '2 is damaged (it is not a folder): renamed to 2.damaged\n' in capfd.readouterr().err
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot save a checkpoint in .*file: File exists; free'):
    Checkpoints(tmp_path / 'file')


def test_the_run_directory_vanishes(tmp_path):
  with Checkpoints(tmp_path / 'run' / 'checkpoints') as saved:
    saved.save(1, make_state(1), {}, {})
    saved.wait()
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(UserError, match=r'run/checkpoints has vanished while the run was going on'):
      saved.save(2, make_state(2), {}, {})
  assert not (tmp_path / 'run').exists()


def test_everything_damaged(tmp_path):
  directory = run_with(tmp_path, 1, 2)
  truncate(directory / '1')
  truncate(directory / '2')
  with pytest.raises(UserError, match='holds no checkpoint that can be read'):
    restore_params(tmp_path, abstract(make_state().params))
  with Checkpoints(directory) as saved:
    assert saved.latest_step() is None


# Another model


def test_another_model_is_a_user_error_and_nothing_is_touched(tmp_path):
  directory = run_with(tmp_path, 1, 2)
  wanted = abstract(make_state())
  params = {**wanted.params, 'wte': jax.ShapeDtypeStruct((32, 8), jnp.float32)}
  with Checkpoints(directory) as saved:
    with pytest.raises(UserError) as error:
      saved.restore(wanted._replace(params=params))
    assert str(error.value) == (
      f'checkpoint {directory}/2 is of another model or optimizer: params/wte is float32[16,8] '
      'there and float32[32,8] here; use the config it was saved with'
    )
    with pytest.raises(UserError, match=r'weighting/table is absent there and float32\[3\] here'):
      saved.restore(wanted._replace(weighting={'table': jax.ShapeDtypeStruct((3,), jnp.float32)}))
    with pytest.raises(UserError, match=r'step is int32\[\] there and absent here'):
      saved.restore(wanted._replace(step=None))
  assert sorted(os.listdir(directory)) == ['1', '2']


@pytest.mark.parametrize('where', ['.', 'checkpoints'])
def test_restore_params(tmp_path, where):
  run_with(tmp_path, 1, 2)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state().params)
  params = restore_params(tmp_path / where, shapes)
  assert_same_bits(params, make_state(2).params)
  assert params['wte'].devices() == {jax.devices()[0]}


def test_restore_params_mistakes(tmp_path):
  shapes = abstract(make_state().params)
  with pytest.raises(UserError, match='give the directory of a finished run'):
    restore_params(tmp_path / 'nowhere', shapes)
  run_with(tmp_path, 1)
  wrong = {**shapes, 'wte': jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)}
  with pytest.raises(
    UserError, match=r'params/wte is float32\[16,8\] there and bfloat16\[16,8\] h'
  ):
    restore_params(tmp_path, wrong)
  with pytest.raises(UserError, match='params/extra is absent there'):
    restore_params(tmp_path, {**shapes, 'extra': shapes['wte']})


# In processes of their own

COMMON = """
import os, resource, sys
import jax, jax.numpy as jnp
from absl import logging
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError
logging.set_verbosity(logging.INFO)

def state(step, size):
  return {'step': jnp.int32(step), 'w': jax.random.normal(jax.random.key(step), (size,))}
"""


def start(script, *args, **env):
  environ = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2', **env}
  return subprocess.Popen(
    [sys.executable, '-c', COMMON + script, *map(str, args)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=environ,
  )


SAVE_FOREVER = """
with Checkpoints(sys.argv[1], keep=2) as saved:
  first = saved.latest_step() or 0
  if first:
    shapes = jax.eval_shape(lambda: state(0, 500_000))
    put = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), shapes)
    back, data, _ = saved.restore(shapes)
    assert int(back['step']) == data['step'] == first, (back['step'], data, first)
    assert bool((back['w'] == state(first, 500_000)['w']).all()), 'other contents'
  print('restored', first, flush=True)
  for step in range(first + 1, 10**6):
    saved.save(step, state(step, 500_000), {'step': step}, {})
    print('started', step, flush=True)
"""


def test_kill_while_saving(tmp_path):
  """Whenever the process dies, the newest checkpoint there is holds exactly its own step."""
  rng = np.random.default_rng(0)
  acknowledged = 0
  for _ in range(3):
    process = start(SAVE_FOREVER, tmp_path / 'c')
    line = process.stdout.readline()
    assert line.startswith('restored '), process.stderr.read()
    restored = int(line.split()[1])
    # Save s starts once s - 1 is committed, so at most the last acknowledged one may be missing.
    assert restored >= acknowledged - 1
    for _ in range(int(rng.integers(2, 5))):
      acknowledged = int(process.stdout.readline().split()[1])
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    acknowledged = max([acknowledged, *(int(n.split()[1]) for n in rest.splitlines() if n[7:])])
  with Checkpoints(tmp_path / 'c') as saved:
    newest = saved.latest_step()
  assert newest >= acknowledged - 1
  # One that was being deleted, for there are two newer ones, may have been found half gone.
  half = {f'{step}.damaged' for step in range(newest - 1)}
  assert all(name.isdigit() or name in half for name in os.listdir(tmp_path / 'c'))


FULL_DISK = """
def fill(directory, discover):
  saved = Checkpoints(directory)
  saved.save(1, state(1, 1000), {}, {})
  saved.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    saved.save(2, state(2, 1_000_000), {}, {})
    discover(saved)
  except UserError as e:
    print(e)
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  print(saved.latest_step(), os.listdir(directory))

hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
fill(sys.argv[1], lambda saved: saved.close())
fill(sys.argv[2], lambda saved: saved.save(3, state(3, 1000), {}, {}))
"""


def test_disk_full(tmp_path):
  """Found out at the end of the run or at the next save: one line, nothing else on the screen."""
  folders = tmp_path / 'a', tmp_path / 'b'
  out, err = start(FULL_DISK, *folders).communicate(timeout=100)
  expected = []
  for folder in folders:
    expected += [
      f'cannot save a checkpoint in {folder}: File too large; free space or choose another '
      '--workdir, then run the same command again: earlier checkpoints are intact',
      "1 ['1']",
    ]
  assert out.splitlines() == expected
  assert err == ''
  for folder in folders:
    assert checkpoints.damage(folder / '1') == ''


READ_ONLY = """
from experiments import files
os.geteuid() or os.seteuid(65534)  # root may write anywhere
for attempt in (lambda: Checkpoints(sys.argv[1]), files.exclusive(sys.argv[2]).__enter__):
  try:
    attempt()
  except UserError as e:
    print(e)
"""


def test_a_directory_that_cannot_be_written():
  """In a folder of its own: pytest's are closed to other users."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    directory = run_with(folder, 1)
    truncate(directory / '1')
    for path in (directory, folder):
      path.chmod(0o555)
    out, err = start(READ_ONLY, directory, folder).communicate(timeout=100)
    folder.chmod(0o755)
    directory.chmod(0o755)
  assert out.splitlines() == [
    f'cannot save a checkpoint in {directory}: Permission denied; free space or choose another '
    '--workdir, then run the same command again: earlier checkpoints are intact',
    f'cannot write into {folder}: Permission denied; choose a --workdir that you can write to',
  ]
  assert err == ''


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    UserError, match=r'cannot save a checkpoint in .*: Not a directory; free space'
  ):
    Checkpoints(tmp_path / 'file' / 'c')


TWO_PROCESSES = """
import time
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P('data'))
make = jax.jit(lambda s: {'w': s * 1000 + jnp.arange(4096.), 'n': jnp.zeros((8, 2)) + s},
               out_shardings=sharding)
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      jax.eval_shape(make, 0))
with Checkpoints(sys.argv[1]) as saved:
  first = saved.latest_step() or 0
  if first:
    back, data, _ = saved.restore(shapes)
    for shard in back['w'].addressable_shards:
      np.testing.assert_array_equal(shard.data, first * 1000 + np.arange(4096.)[shard.index])
    assert data == {'step': first}
  print('restored', first, flush=True)
  for step in range(first + 1, first + 4):
    saved.save(step, make(step), {'step': step}, {})
  if sys.argv[4] == 'kill':
    saved.wait()
    print('waiting', flush=True)
    while True:
      step += 1
      saved.save(step, make(step), {'step': step}, {})
      print('started', step, flush=True)
print('done')
"""


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def two_processes(directory, mode):
  address = f'127.0.0.1:{free_port()}'
  return [start(TWO_PROCESSES, directory, address, i, mode) for i in (0, 1)]


def test_two_processes_save_die_and_resume(tmp_path):
  directory = tmp_path / 'c'
  processes = two_processes(directory, 'kill')
  line = ''
  while line != 'started 6\n':  # jax prints lines of its own
    line = processes[0].stdout.readline()
    assert line, processes[0].stderr.read()
  for process in processes:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  acknowledged = int(line.split()[1])
  outputs = [p.communicate(timeout=200)[0] for p in two_processes(directory, 'end')]
  restored = [re.search(r'^restored (\d+)$', out, re.MULTILINE)[1] for out in outputs]
  assert restored[0] == restored[1]
  assert int(restored[0]) >= acknowledged - 1
  assert [out.splitlines()[-1] for out in outputs] == ['done', 'done']
  assert len(os.listdir(directory)) == 2
  with Checkpoints(directory) as saved:  # and one process reads what two wrote
    step = saved.latest_step()
    shapes = {
      'w': jax.ShapeDtypeStruct((4096,), jnp.float32),
      'n': jax.ShapeDtypeStruct((8, 2), jnp.float32),
    }
    back, _, _ = saved.restore(shapes)
  np.testing.assert_array_equal(back['w'], step * 1000 + np.arange(4096.0))
