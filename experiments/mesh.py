"""The device mesh and how arrays lie on it.

Three axes: `data` (copies of the model), `fsdp` (one copy cut into shards, gathered where they are
used) and `tensor` (matrices cut for good, activations traded instead). A batch is cut over the
first two; devices along `tensor` hold the same rows. Axis types are Auto everywhere: the compiler
places the communication, and the program reads as if there were one device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # the axes that a batch is cut over
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh with axes ('data', 'fsdp', 'tensor') over all devices; one size may be -1 (the rest).

  Of several TPU slices, `data` alone goes across: it communicates once a step, and the network
  between slices is slow.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or tear a slice apart.
  """
  devices = jax.devices() if devices is None else list(devices)
  count, sizes = len(devices), {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  given = {name: size for name, size in sizes.items() if size != -1}
  product = int(np.prod(list(given.values())))
  full = len(given) == len(sizes)
  if len(given) < 2 or product < 1 or count % product or (full and product != count):
    shown = ', '.join(f'mesh.{name}={size}' for name, size in sizes.items())
    raise UserError(
      f'{shown} do not fit {_plural(count, "device")}: their product must be {count}, and one of '
      'them may be -1 for the rest'
    )
  data, fsdp, tensor = (size if size != -1 else count // product for size in sizes.values())
  # A GPU has a slice_index as well, which is its host's.
  slices = len({getattr(d, 'slice_index', 0) for d in devices if d.platform == 'tpu'}) or 1
  if data % slices:
    raise UserError(
      f'mesh.data={data} must be a multiple of the {slices} slices, which hold {count // slices} '
      'devices each: make mesh.fsdp or mesh.tensor smaller'
    )
  types = (AxisType.Auto,) * len(AXES)
  shape = (data, fsdp, tensor)
  split = {'allow_split_physical_axes': True}
  if slices > 1:
    inside, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split)
    return Mesh(grid, AXES, axis_types=types)
  if len({getattr(d, 'slice_index', 0) for d in devices}) > 1:  # GPUs, which make_mesh refuses
    return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES, axis_types=types)
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # an axis has to take part of the chips along a wire
    return Mesh(mesh_utils.create_device_mesh(shape, devices, **split), AXES, axis_types=types)


def row_shards(mesh: Mesh | Mapping[str, int]) -> int:
  """How many different parts a batch is cut into."""
  sizes = dict(getattr(mesh, 'shape', mesh))
  return int(np.prod([sizes.get(axis, 1) for axis in ROWS]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows (axis 0) over `data` and `fsdp`, other axes whole."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def pin_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Inside jit: tells the compiler to keep axis 0 of an activation cut as the batch is.

  Needed where a sharded parameter meets the batch (the token lookup, each block): left alone, the
  partitioner may cut activations along features instead, and then trade them between devices in
  every layer. Returns x as it is without a mesh, or when its rows do not divide evenly (one row).
  """
  if mesh is None or x.shape[0] % row_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """One NamedSharding per leaf of `tree`, by matching patterns against paths.

  A leaf's path is its keys joined by '/', e.g. 'params/blocks/mlp/up/kernel'. The first rule whose
  pattern is found in the path (`re.search`) gives the layout, so patterns that end in '$' match by
  suffix, and the moments of an optimizer ('opt_state/1/0/mu/blocks/mlp/up/kernel') are laid out
  like the parameters they belong to. An axis that does not divide evenly, or that the array
  lacks, stays whole; so does a leaf that no rule matches.

  Args:
    tree: arrays or shape structs, e.g. from `jax.eval_shape`.
    mesh: from `make_mesh`.
    rules: (pattern, PartitionSpec) pairs, most specific first.
  """

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
    return NamedSharding(mesh, _fit(spec, leaf.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _fit(
  spec: PartitionSpec, shape: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
  """Drops from `spec` whatever an array of this shape cannot follow."""
  if len(spec) > len(shape):
    return PartitionSpec()
  even = lambda size, axes: axes is None or size % _axes_size(axes, mesh_shape) == 0
  return PartitionSpec(*(axes if even(size, axes) else None for size, axes in zip(shape, spec)))


def _axes_size(axes: str | tuple[str, ...], mesh_shape: Mapping[str, int]) -> int:
  names = (axes,) if isinstance(axes, str) else axes
  return int(np.prod([mesh_shape[name] for name in names]))


def local_rows(mesh: Mesh) -> Callable[[int], np.ndarray]:
  """(rows of a batch) -> those that the devices of this process hold, ascending, int64[n].

  On a pod they need not be neighbors, because a mesh follows the wires between chips; and processes
  along `tensor` hold the same.
  """
  sharding = batch_sharding(mesh)

  def rows(batch_size: int) -> np.ndarray:
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))

  return rows


def to_global(local_batch: Any, mesh: Mesh) -> Any:
  """Assembles the `local_rows` of every process (NumPy, axis 0) into arrays that span the mesh."""
  sharding, shards = batch_sharding(mesh), row_shards(mesh)
  rows_of = local_rows(mesh)
  local_shards = len(rows_of(shards))

  def put(leaf):
    leaf = np.asarray(leaf)
    batch_size = leaf.shape[0] * shards // local_shards
    rows = rows_of(batch_size)
    part = lambda index: leaf[np.searchsorted(rows, np.arange(batch_size)[index[0]])]
    return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

  return jax.tree.map(put, local_batch)


def check_batch(
  batch_size: int,
  microbatches: int,
  mesh: Mesh | Mapping[str, int],
  name: str = 'batch_size',
) -> None:
  """Checks that the parts of every microbatch have the same number of rows.

  Args:
    batch_size: global rows of a step.
    microbatches: how many parts the step is computed in.
    mesh: the mesh, or its sizes by axis name.
    name: of the number, for the message.

  Raises:
    UserError: names the nearest batch sizes that fit.
  """
  shards = row_shards(mesh)
  unit = shards * microbatches
  if batch_size < 1 or batch_size % unit:
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    fix = f'{below} or {above}' if below > 0 else f'{above}'
    raise UserError(
      f'{name}={batch_size} is not divisible by {unit} ({_plural(shards, "device")} x '
      f'{_plural(microbatches, "microbatch", "es")}): use {fix}'
    )


def _plural(count: int, noun: str, ending: str = 's') -> str:
  return f'{count} {noun}{ending if count != 1 else ""}'


def check_same_everywhere(values: Any, what: str) -> None:
  """Holds every process to the same numbers; nothing with one process.

  Raises:
    AssertionError: they differ. Processes that go on would train on different data.
  """
  if jax.process_count() > 1:
    multihost_utils.assert_equal(np.asarray(values), f'{what} differs between processes')
