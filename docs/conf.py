"""The documentation's build: `make docs`, or `python -m sphinx -W docs build/docs`."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import coverage  # noqa: E402

project = 'jaxrw'
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'myst_nb']
html_theme = 'sphinx_book_theme'
html_title = 'jaxrw'
exclude_patterns = ['results/*/**']
default_role = 'code'
suppress_warnings = ['myst.xref_missing', 'myst.header']
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_custom_sections = ['Source', 'Provenance']
myst_enable_extensions = ['colon_fence', 'dollarmath']
nb_execution_mode = 'force'
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True

_SECTIONS = r'(Args|Attributes|Returns|Raises|Yields|Example|Examples|Source|Provenance):(\s.*)?$'


def literal_formulas(app, what, name, obj, options, lines: list[str]) -> None:
  """Our docstrings are plain text: formulas and tables are indented blocks, to be shown as they
  are, and characters that mean something in reStructuredText mean themselves."""
  out, block, section = [], False, False
  for index, line in enumerate(lines):
    indented = line.startswith('  ') and line.strip()
    if re.match(_SECTIONS, line):
      section, block = True, False
      head, _, rest = line.partition(':')
      out += ['', f'{head}:'] + ([f'  {_escaped(rest.strip())}'] if rest.strip() else [])
      continue
    if line.strip() and not line.startswith(' ') and not line.startswith(('-', '|')):
      section = section and out[-1:] != ['']
    if not section and indented:
      if not block:
        out += ['', '::', '']
      block = True
      out.append('  ' + line)
    elif line.startswith('|') and not section:
      if not block:
        out += ['', '::', '']
      block = True
      out.append('    ' + line)
    else:
      if block and line.strip():
        out.append('')
      block = block and not line.strip()
      doctest = line.lstrip().startswith(('>>>', '...')) or _output(lines, index)
      out.append(line if doctest else _escaped(line))
  lines[:] = out


def _output(lines: list[str], index: int) -> bool:
  """Whether a line is what a doctest above it prints."""
  for line in reversed(lines[:index]):
    if not line.strip():
      return False
    if line.lstrip().startswith(('>>>', '...')):
      return True
  return False


def _escaped(line: str) -> str:
  """Everything outside `code` as it stands."""
  parts = line.split('`')
  for i in range(0, len(parts), 2):
    parts[i] = re.sub(r'([*|]|(?<=\w)_(?=\W|$))', r'\\\1', parts[i].replace('\\', '\\\\'))
  return '`'.join(parts)


class Provenance(SphinxDirective):
  """A table of what the named weightings declare of themselves."""

  has_content = True

  def run(self) -> list[nodes.Node]:
    rows = [('weighting', 'scale', 'acts on', 'provenance', 'source')]
    for name in ' '.join(self.content).split():
      made = coverage.weightings().get(name)
      if made is None:
        raise self.error(f'{name} is not a weighting')
      told = made.declaration
      rows.append((name, told.scale, told.level, told.provenance, told.source))
    table = nodes.table()
    group = nodes.tgroup(cols=len(rows[0]))
    group += [nodes.colspec(colwidth=w) for w in (20, 12, 10, 14, 44)]
    parts = nodes.thead(), nodes.tbody()
    for i, cells in enumerate(rows):
      row = nodes.row()
      for j, cell in enumerate(cells):
        text = nodes.literal('', cell) if i and not j else nodes.Text(cell)
        row += nodes.entry('', nodes.paragraph('', '', text))
      parts[min(i, 1)].append(row)
    group += parts
    table += group
    return [table]


def write_reference(app) -> None:
  """docs/api/: one page for each public module, with every public name."""
  if missing := coverage.gaps():
    raise SphinxError('undocumented:\n' + '\n'.join(missing))
  folder = HERE / 'api'
  folder.mkdir(exist_ok=True)
  index = ['# Reference', '', '```{toctree}', ':maxdepth: 1', '']
  for module in coverage.modules():
    found = coverage.names(module)
    text = [module, '=' * len(module), '', f'.. automodule:: {module}', '']
    for name, value in found.items():
      kind = 'class' if inspect.isclass(value) else 'function'
      text += [f'.. auto{kind}:: {module}.{name}', '']
    (folder / f'{module}.rst').write_text('\n'.join(text))
    index.append(module)
  (folder / 'index.md').write_text('\n'.join([*index, '```', '']))


def check_reference(app, exception) -> None:
  """Every public name is an entry of the built reference."""
  if exception or app.builder.name != 'html':
    return
  entries = app.env.domaindata['py']['objects']
  wanted = [f'{m}.{n}' for m in coverage.modules() for n in coverage.names(m)]
  if missing := [name for name in wanted if name not in entries]:
    raise SphinxError(f'not in the reference: {", ".join(missing)}')


def setup(app) -> None:
  app.connect('builder-inited', write_reference)
  app.connect('autodoc-process-docstring', literal_formulas, priority=100)
  app.connect('build-finished', check_reference)
  app.add_directive('provenance', Provenance)
