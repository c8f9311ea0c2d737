"""The device mesh and how arrays lie on it.

Three axes: `data` (copies of the model), `fsdp` (one copy cut into shards, gathered where they are
used) and `tensor` (matrices cut for good, activations traded instead). A batch is cut over the
first two; devices along `tensor` hold the same rows. Axis types are Auto everywhere: the compiler
places the communication, and the program reads as if there were one device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # the axes that a batch is cut over
Rules = Sequence[tuple[str, PartitionSpec]]


def initialize_distributed(
  coordinator: str = '', num_processes: int = 0, process_id: int = -1
) -> None:
  """Joins this process to the others; call it before anything else touches jax.

  Args:
    coordinator: 'host:port' of process 0, the same in every process. '' with the other arguments
      at their defaults means a single process and does nothing; 'auto' asks the cluster (TPU pods,
      SLURM, MPI) for all three.
    num_processes: how many processes take part.
    process_id: which one this is, from 0.
  """
  if coordinator == 'auto':
    jax.distributed.initialize()
  elif coordinator:
    if not 0 <= process_id < num_processes:
      raise UserError(
        f'process_id={process_id} does not fit num_processes={num_processes}: '
        f'give each of the {num_processes} processes its own number, from 0'
      )
    jax.distributed.initialize(coordinator, num_processes, process_id)
  elif num_processes > 1:
    raise UserError(
      f'num_processes={num_processes} without a coordinator: give host:port of process 0'
    )


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh with axes ('data', 'fsdp', 'tensor') over all devices; one size may be -1 (the rest).

  Of several TPU slices, `data` alone goes across: it communicates once a step, and the network
  between slices is slow.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or tear a slice or host apart.
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
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if data % slices:
    raise UserError(
      f'mesh.data={data} must be a multiple of the {slices} slices, which hold {count // slices} '
      'devices each: make mesh.fsdp or mesh.tensor smaller'
    )
  local = count // len({d.process_index for d in devices})
  if local % tensor:
    raise UserError(
      f'mesh.tensor={tensor} must divide the {local} devices of a host, which reads the same rows '
      'for all of them'
    )
  types = (AxisType.Auto,) * len(AXES)
  if slices > 1:
    inside, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
    return Mesh(grid, AXES, axis_types=types)
  return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)


def row_shards(mesh: Mesh | Mapping[str, int]) -> int:
  """How many different parts a batch is cut into."""
  sizes = dict(getattr(mesh, 'shape', mesh))
  return int(np.prod([sizes.get(axis, 1) for axis in ROWS]))


def host_count(mesh: Mesh) -> int:
  """How many processes its devices belong to."""
  return len({device.process_index for device in mesh.devices.flat})


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


def to_global(local_batch: Any, mesh: Mesh) -> Any:
  """Assembles each process's rows (NumPy, axis 0) into jax arrays that span the mesh."""
  sharding = batch_sharding(mesh)
  put = lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
  return jax.tree.map(put, local_batch)


def check_batch(
  batch_size: int, microbatches: int, mesh: Mesh | Mapping[str, int], process_count: int = 1
) -> None:
  """Checks that the parts of every microbatch have the same number of rows.

  Args:
    batch_size: global rows of a step.
    microbatches: how many parts the step is computed in.
    mesh: the mesh, or its sizes by axis name.
    process_count: processes that read equal shares of the rows.

  Raises:
    UserError: names the nearest batch sizes that fit.
  """
  shards = row_shards(mesh)
  unit = int(np.lcm(shards * microbatches, process_count))
  if batch_size < 1 or batch_size % unit:
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    fix = f'{below} or {above}' if below > 0 else f'{above}'
    raise UserError(
      f'batch_size={batch_size} is not divisible by {unit} ({_plural(shards, "device")} x '
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
