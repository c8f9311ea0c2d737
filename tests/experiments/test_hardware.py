"""Chips by their names, and the spelling of devices that are elsewhere."""

import os

import jax
import pytest

from experiments import hardware
from experiments.errors import UserError


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA H200', 989e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5e', 197e12),
    ('TPU v5', 459e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('TPU v6e', 918e12),
    ('cpu', None),
  ],
)
def test_peaks(kind, peak):
  chip = hardware.chip(kind)
  assert (chip and chip.flops) == peak


def test_the_devices_at_hand_are_local():
  assert hardware.devices(hardware.parse_topology('local')) == jax.devices()


@pytest.mark.parametrize(
  ('spec', 'topology'),
  [
    ('local', hardware.Topology('local')),
    ('cpu:8', hardware.Topology('cpu', count=8)),
    ('v5e:16x16', hardware.Topology('tpu', 'v5e:16x16')),
    ('v5p:4x4x8', hardware.Topology('tpu', 'v5p:4x4x8')),
    ('2*v5e:4x4', hardware.Topology('tpu', 'v5e:4x4', 2)),
  ],
)
def test_topologies(spec, topology):
  assert hardware.parse_topology(spec) == topology


@pytest.mark.parametrize(
  'spec', ['', 'v5e', 'v5e-256', 'cpu', 'cpu:0', '0*v5e:4x4', 'h100:8', 'v5e:4x']
)
def test_what_is_no_topology_is_one_line(spec):
  with pytest.raises(UserError, match=r'^--compile_for=.*v5e:16x16') as error:
    hardware.parse_topology(spec)
  assert '\n' not in str(error.value)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(hardware.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  with pytest.raises(UserError, match=r"make libtpu.*pip install .*'libtpu==0\.0\.\d+\.\*'"):
    hardware.prepare(hardware.parse_topology('v5e:4x4'))


def test_the_compiler_is_found_where_the_makefile_puts_it(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  library = tmp_path / '.libtpu' / 'libtpu' / 'libtpu.so'
  library.parent.mkdir(parents=True)
  library.touch()
  (tmp_path / '.libtpu' / 'libtpu-1.2.3.dist-info').mkdir()
  for name in ('TPU_LIBRARY_PATH', 'TPU_SKIP_MDS_QUERY', 'TPU_WORKER_HOSTNAMES', 'JAX_PLATFORMS'):
    monkeypatch.setenv(name, '')  # which restores them afterwards
  hardware.prepare(hardware.parse_topology('v5e:4x4'))
  assert os.environ['TPU_LIBRARY_PATH'] == str(library)
  assert os.environ['JAX_PLATFORMS'] == 'cpu'
  assert hardware.libtpu_version() == '1.2.3'
