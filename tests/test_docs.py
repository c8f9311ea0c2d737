"""The documentation's promise: a public name without documentation fails the build.

The build itself, with its notebooks, is `make docs`.
"""

import importlib.util
import re
from pathlib import Path

import jaxrw

DOCS = Path(__file__).parent.parent / 'docs'


def _coverage():
  spec = importlib.util.spec_from_file_location('docs_coverage', DOCS / 'coverage.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


coverage = _coverage()


def test_every_public_name_is_documented():
  assert coverage.gaps() == []
  assert len(coverage.weightings()) > 35
  assert {'jaxrw.losses', 'jaxrw.density_ratio', 'jaxrw.weights.error_log'} <= {*coverage.modules()}
  assert 'cross_entropy' in coverage.names('jaxrw.losses')


def test_a_gap_is_found(monkeypatch, tmp_path):
  def undocumented():
    pass

  undocumented.__module__ = 'jaxrw.losses'
  monkeypatch.setattr(jaxrw.losses, 'undocumented', undocumented, raising=False)
  for page in (DOCS / 'families').glob('*.md'):
    (tmp_path / page.name).write_text(page.read_text().replace('## `cvar`', '## CVaR'))
  assert coverage.gaps(tmp_path) == [
    'jaxrw.losses.undocumented has no docstring',
    'cvar has no entry (a heading with `cvar`) in docs/families/',
  ]


def test_tables_of_provenance_name_every_weighting_and_files_exist():
  pages = {path.name: path.read_text() for path in sorted((DOCS / 'families').glob('*.md'))}
  named = ' '.join(re.findall(r'```{provenance}\n(.*?)```', ''.join(pages.values()), re.S)).split()
  assert set(coverage.weightings()) - set(named) == {'after', 'chain'}
  for name, page in pages.items():
    for path in re.findall(r'`(tests/[\w/]+\.py)`', page):
      assert (DOCS.parent / path).exists(), f'{name} names {path}'


def test_the_tutorial_runs():
  blocks = re.findall(r'```python\n(.*?)```', (DOCS / 'add_your_own.md').read_text(), re.S)
  scope = {}
  exec('\n'.join(blocks[:2]), scope)
  for promise in ('shape_dtype_and_sum', 'degenerate_batches', 'mesh_parity'):
    jaxrw.testing.check_weighting(scope['late'](), promises=[promise])


def test_the_index_lists_every_page():
  listed = set(re.findall(r'^([\w/]+)$', (DOCS / 'index.md').read_text(), re.M))
  pages = {
    str(path.relative_to(DOCS).with_suffix(''))
    for path in DOCS.rglob('*.md')
    if 'api' not in path.parts and path.parent.parent.name != 'results'
  }
  assert pages - {'index'} == listed - {'api/index'}
