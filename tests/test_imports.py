"""The dependency rule: who may import what, and what importing costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)


def _imports(path):
  """Absolute names of everything a file imports, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text('utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import in line {node.lineno}'
      yield node.module


def _sources(room):
  files = sorted((ROOT / room).rglob('*.py'))
  assert files, f'{room}/ has no files: the test looks in the wrong place'
  return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in files]


@pytest.mark.parametrize('path', _sources('jaxrw'))
def test_the_library_imports_four_packages(path):
  allowed = {'jax', 'optax', 'chex', 'numpy', 'jaxrw'} | STANDARD
  assert {name for name in _imports(path) if name.split('.')[0] not in allowed} == set()


@pytest.mark.parametrize('path', _sources('configs'))
def test_configs_import_only_ml_collections_and_each_other(path):
  allowed = {'ml_collections', 'configs'} | STANDARD
  assert {name for name in _imports(path) if name.split('.')[0] not in allowed} == set()


def test_the_parser_sees_imports_inside_functions(tmp_path):
  source = tmp_path / 'a.py'
  source.write_text('import os.path\ndef f():\n  from flax import nnx\n')
  assert list(_imports(source)) == ['os.path', 'flax']


_BLOCKED = {
  *('flax', 'orbax', 'tensorflow', 'tensorflow_datasets', 'grain', 'array_record', 'tokenizers'),
  *('ml_collections', 'tensorboardX', 'matplotlib', 'tqdm', 'zstandard', 'scipy', 'torch'),
  *('experiments', 'configs'),
}

_PROGRAM = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {blocked!r} and not from_jax():
      raise ImportError(f'blocked: {{name}}')

def from_jax():  # jax itself tries optional packages (scipy, ...), which are not ours to judge
  frame = sys._getframe(2)
  while frame is not None:
    module = frame.f_globals.get('__name__', '').split('.')[0]
    if module == 'jaxrw':
      return False
    if module in ('jax', 'jaxlib', 'optax', 'chex', 'numpy'):
      return True
    frame = frame.f_back
  return False

sys.meta_path.insert(0, Blocker())
{body}
"""


def _run(body):
  program = _PROGRAM.format(blocked=_BLOCKED, body=body)
  return subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_the_library_works_where_only_its_four_packages_are():
  body = """
import jax, jax.numpy as jnp, jaxrw, jaxrw.testing
w = jaxrw.linupper_weights(jnp.arange(4.0), 0.4)
assert w.shape == (4,)
ours = {m.split('.')[0] for m in sys.modules}
assert not ours & {'flax', 'orbax', 'grain', 'ml_collections', 'experiments', 'configs'}, ours
"""
  done = _run(body)
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_blocker_blocks():
  done = _run('import ml_collections')
  assert done.returncode != 0
  assert 'blocked: ml_collections' in done.stderr


def test_importing_the_library_starts_no_device_and_builds_no_mesh():
  """Import must stay free of side effects: `jax.distributed.initialize` comes after it."""
  body = """
import jaxrw, jaxrw.testing
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
  done = _run(body)
  assert done.returncode == 0, done.stderr[-2000:]


def test_public_names_exist_and_are_listed_once():
  import jaxrw
  from jaxrw import weights

  assert len(set(jaxrw.__all__)) == len(jaxrw.__all__)
  assert set(weights.__all__) - set(weights.RECONSTRUCTED) <= set(jaxrw.__all__)
  for name in jaxrw.__all__:
    assert hasattr(jaxrw, name), name
  assert jaxrw.__version__


def test_reconstructed_methods_stay_out_of_the_top_namespace():
  import jaxrw
  from jaxrw import weights

  provenance = {
    name: getattr(weights, name).declaration.provenance
    for name in weights.__all__
    if hasattr(getattr(weights, name), 'declaration')
  }
  rebuilt = {name for name, value in provenance.items() if value == 'reconstructed'}
  assert rebuilt == set(weights.RECONSTRUCTED) & set(provenance)
  for name in weights.RECONSTRUCTED:
    assert name in weights.__all__
    assert not hasattr(jaxrw, name)
  jaxrw.from_config(('anchor',), {'anchor': {'fn': 'adapt'}})  # configs find them
