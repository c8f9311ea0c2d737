"""The embedded corpus: text that every Python installation already carries. Nothing is downloaded.

Domains (each left out where the installation has too little of it):
  code      sources of the standard library
  tests     test sources of Python; where a distribution strips them, NumPy's
  docs      the language reference behind `help()`, and the descriptions of our dependencies
  licenses  licence texts of Python and of our dependencies, with their natural repetitions
  tables    codec tables and the names of the Unicode characters
  headers   C headers of Python and NumPy

Files are read, never imported, except two tables of the standard library (`pydoc_data.topics`,
`unicodedata`). A domain takes its files in the order of a hash of their names, until it is full, so
that what it holds is a fair sample. The corpus depends on the installation: numbers are comparable
within one installation only, and its fingerprint says which one.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from experiments.data.text import pieces, unit_hash

MAX_BYTES = 1_500_000  # of each domain
MIN_BYTES = 100_000  # a smaller domain is left out
# Not all that is installed: the corpus of a run must survive `pip install` of something else.
PACKAGES = (
  'absl_py',
  'array_record',
  'chex',
  'flax',
  'grain',
  'jax',
  'jaxlib',
  'matplotlib',
  'ml_collections',
  'numpy',
  'optax',
  'orbax_checkpoint',
  'scipy',
  'tensorboardx',
  'tensorflow_datasets',
  'tensorstore',
  'tokenizers',
  'tqdm',
)
DOMAINS = ('code', 'tests', 'docs', 'licenses', 'tables', 'headers')

_NOT_CODE = (
  'test',
  'tests',
  'idle_test',
  'encodings',
  'pydoc_data',
  'site-packages',
  'dist-packages',
)


def works(domain: str) -> list[tuple[str, str]]:
  """The (name, text) pairs of a domain: whole files, in hash order, `MAX_BYTES` at most.

  An empty list where the installation has less than `MIN_BYTES`.
  """
  candidates = _CANDIDATES[domain]()
  chosen, size = [], 0
  for name in sorted(candidates, key=unit_hash):
    text = candidates[name]
    text = _read(text) if isinstance(text, Path) else text
    length = len(text.encode('utf-8'))
    if text and size + length <= MAX_BYTES:
      chosen.append((name, text))
      size += length
  return chosen if size >= MIN_BYTES else []


def records(domain: str) -> Iterator[tuple[str, str, str]]:
  """The (id, parent, text) triples of a domain: works cut into records at ends of paragraphs."""
  for name, text in works(domain):
    for i, piece in enumerate(pieces(text)):
      yield f'{name}#{i}', name, piece


def _code() -> dict[str, Path | str]:
  root = _stdlib()
  return {f'python/{path}': root / path for path in _files(root, '.py', skip=_NOT_CODE)}


def _tests() -> dict[str, Path | str]:
  root = _stdlib() / 'test'
  found = {f'python/test/{path}': root / path for path in _files(root, '.py')}
  if sum(path.stat().st_size for path in found.values()) >= MIN_BYTES:
    return found
  root = _numpy()
  return {f'numpy/{path}': root / path for path in _files(root, '.py') if 'tests' in path.parts}


def _docs() -> dict[str, Path | str]:
  from pydoc_data.topics import topics

  found = {f'topics/{name}': text for name, text in topics.items()}
  for directory in _distributions():
    metadata = _read(directory / 'METADATA')
    _, _, description = metadata.partition('\n\n')
    found[f'packages/{directory.name}'] = description
  return found


def _licenses() -> dict[str, Path | str]:
  found: dict[str, Path | str] = {'python/LICENSE.txt': _stdlib() / 'LICENSE.txt'}
  for directory in _distributions():
    for path in _files(directory):
      if any(word in path.name.upper() for word in ('LICEN', 'COPYING', 'NOTICE')):
        found[f'packages/{directory.name}/{path}'] = directory / path
  return found


def _tables() -> dict[str, Path | str]:
  root = _stdlib()
  paths = [*root.glob('encodings/*.py'), root / 'html/entities.py', root / 'mimetypes.py']
  found: dict[str, Path | str] = {f'python/{path.relative_to(root)}': path for path in paths}
  return found | {f'unicode/{start:06x}': _unicode_block(start) for start in range(0, 0x20000, 256)}


def _headers() -> dict[str, Path | str]:
  roots = {'python': Path(sysconfig.get_path('include')), 'numpy': _numpy()}
  return {
    f'{label}/{path}': root / path for label, root in roots.items() for path in _files(root, '.h')
  }


_CANDIDATES = {
  'code': _code,
  'tests': _tests,
  'docs': _docs,
  'licenses': _licenses,
  'tables': _tables,
  'headers': _headers,
}


def _unicode_block(start: int) -> str:
  """Code point, category and name of 256 characters, a line each; empty where none has a name."""
  import unicodedata

  lines = []
  for code in range(start, start + 256):
    name = unicodedata.name(chr(code), '')
    if name and not name.startswith(('CJK UNIFIED', 'HANGUL SYLLABLE')):  # names without words
      lines.append(f'{code:04X};{unicodedata.category(chr(code))};{name}\n')
  return ''.join(lines)


def _stdlib() -> Path:
  return Path(sysconfig.get_path('stdlib'))


def _distributions() -> list[Path]:
  """Metadata folders of `PACKAGES`, which are there wherever the experiments run."""
  found = {}
  for root in {sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), _numpy().parent}:
    for path in Path(root).glob('*.dist-info'):
      found[path.name.partition('-')[0].lower()] = path
  return [found[name] for name in PACKAGES if name in found]


def _numpy() -> Path:
  return Path(np.__file__).parent


def _files(root: Path, suffix: str = '', skip: Collection[str] = ()) -> Iterator[Path]:
  """Files below `root`, relative to it; never enters folders named in `skip`, which may be huge."""
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in skip]
    yield from (Path(folder, name).relative_to(root) for name in names if name.endswith(suffix))


def _read(path: Path) -> str:
  """The text of a file; empty where there is none or it is not UTF-8 (some tests are not)."""
  try:
    return path.read_bytes().decode('utf-8')
  except (OSError, UnicodeDecodeError):
    return ''
