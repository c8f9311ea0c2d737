"""What accelerators can do, by their vendors' tables; and the devices of one not at hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UserError

# Where `make libtpu` puts the TPU compiler; inside an environment it would make jax look for chips.
LIBTPU = Path('.libtpu')


class Chip(NamedTuple):
  """One device.

  Attributes:
    kind: a part of `device.device_kind`.
    flops: dense bfloat16 matmul peak, FLOP/s.
    memory: bytes; None where it varies.
    link: bytes/s that it can send to its neighbors, all links together; None where it varies.
  """

  kind: str
  flops: float
  memory: float | None = None
  link: float | None = None


# The first whose kind matches counts.
CHIPS = (
  Chip('H200', 989e12, 141e9, 450e9),
  Chip('H100 PCIe', 756e12, 80e9),
  Chip('H100', 989e12, 80e9, 450e9),
  Chip('A100', 312e12, None, 300e9),
  Chip('TPU v6', 918e12, 32 * 2**30, 448e9),
  Chip('TPU v5 lite', 197e12, 16 * 2**30, 200e9),
  Chip('TPU v5e', 197e12, 16 * 2**30, 200e9),
  Chip('TPU v5', 459e12, 95 * 2**30, 600e9),
  Chip('TPU v4', 275e12, 32 * 2**30, 300e9),
)


def chip(device_kind: str) -> Chip | None:
  """The chip that `device.device_kind` names, or None."""
  return next((c for c in CHIPS if c.kind.lower() in device_kind.lower()), None)


# Devices that are not here ----------------------------------------------------------------------


class Topology(NamedTuple):
  """What `--compile_for` names.

  Attributes:
    platform: 'local', 'cpu' or 'tpu'.
    name: of a TPU slice, such as 'v5e:16x16'.
    count: simulated CPU devices, or slices.
  """

  platform: str
  name: str = ''
  count: int = 1


def parse_topology(spec: str) -> Topology:
  """Reads 'local', 'cpu:8', 'v5e:16x16' or, for several slices, '2*v5e:16x16'.

  Raises:
    UserError: it is none of them.
  """
  if spec == 'local':
    return Topology('local')
  if match := re.fullmatch(r'cpu:([1-9]\d{0,4})', spec):
    return Topology('cpu', count=int(match[1]))
  if match := re.fullmatch(r'(?:([1-9]\d{0,2})\*)?(v\d+\w*:\d+x\d+(?:x\d+)?)', spec):
    return Topology('tpu', match[2], int(match[1] or 1))
  raise UserError(
    f"--compile_for={spec}: write a TPU slice such as 'v5e:16x16' or 'v5p:4x4x8', several such as "
    "'2*v5e:16x16', 'cpu:8' for simulated devices, or 'local'"
  )


def prepare(topology: Topology) -> None:
  """Sets the environment in which jax can make the devices; call it before jax is imported.

  Raises:
    UserError: the TPU compiler is not installed.
  """
  if topology.platform == 'cpu':
    os.environ.update(JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(topology.count))
  if topology.platform == 'tpu':
    # It is needed as a compiler only: as a backend it would look for chips, and wait.
    os.environ.update(JAX_PLATFORMS='cpu', TPU_LIBRARY_PATH=str(find_libtpu()))
    os.environ.update(TPU_SKIP_MDS_QUERY='true', TPU_WORKER_HOSTNAMES='localhost')
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # else a second dry run is refused


def find_libtpu() -> Path:
  """The TPU compiler: where TPU_LIBRARY_PATH says, in .libtpu, or in the environment."""
  candidates = [os.environ.get('TPU_LIBRARY_PATH', ''), LIBTPU / 'libtpu' / 'libtpu.so']
  if found := importlib.util.find_spec('libtpu'):
    candidates.append(Path(found.origin).parent / 'libtpu.so')
  for path in map(Path, candidates):
    if path.is_file():
      return path.absolute()
  raise UserError(
    "--compile_for: the TPU compiler is not installed: 'make libtpu' gets it (200 MB), or "
    f"python -m pip install --no-deps --target {LIBTPU} '{libtpu_requirement()}'"
  )


def libtpu_requirement() -> str:
  """The libtpu that the installed jax asks for, such as 'libtpu==0.0.42.*'."""
  wanted = importlib.metadata.requires('jax') or []
  return next(r.partition(';')[0].strip() for r in wanted if r.startswith('libtpu'))


def libtpu_version() -> str:
  """Of the TPU compiler that was loaded; '' where its folder does not say."""
  folder = Path(os.environ['TPU_LIBRARY_PATH']).parent.parent
  found = sorted(folder.glob('libtpu-*.dist-info'))
  return found[-1].name.removeprefix('libtpu-').removesuffix('.dist-info') if found else ''


def devices(topology: Topology) -> list[Any]:
  """Devices to compile for; of a TPU slice, none of them can run anything here.

  Raises:
    UserError: the TPU compiler knows no such slice.
  """
  import jax
  from jax.experimental import topologies

  if topology.platform != 'tpu':
    return jax.devices()
  # A v4 chip's two cores act as one device, as they do on the machine.
  config = {'chip_config_name': 'megacore'} if topology.name.startswith('v4:') else {}
  try:
    made = topologies.get_topology_desc(
      platform='tpu', topology_name=topology.name, num_slices=topology.count, **config
    )
  except Exception as e:
    reason = ' '.join(str(e).partition('\n')[0].split())
    raise UserError(f'--compile_for={topology.name}: no such TPU slice ({reason})') from e
  return list(made.devices)


if __name__ == '__main__':
  print(libtpu_requirement())  # for the Makefile
