"""What is public, and what of it lacks documentation. `make docs` and the tests fail on a gap.

python docs/coverage.py        # lists the gaps; exit status 1 if there are any
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import types
from pathlib import Path

FAMILIES = Path(__file__).parent / 'families'
# Packages that list their names, which are documented under the package and not under the module
# that defines them; the names of all other modules are what is defined in them.
_PACKAGES = tuple(
  f'jaxrw.{name}'
  for name in ('attribution', 'mixtures', 'scores', 'selection', 'valuation', 'weights')
)


def modules() -> list[str]:
  """Names of the public modules, the package first."""
  import jaxrw

  found = [m.name for m in pkgutil.walk_packages(jaxrw.__path__, 'jaxrw.')]
  public = [name for name in found if not any(part.startswith('_') for part in name.split('.'))]
  alone = {name for name in public if not name.startswith(tuple(f'{p}.' for p in _PACKAGES))}
  # Modules of plain functions that are reached as jaxrw.weights.<module>.<function>.
  for package in _PACKAGES:
    listed = importlib.import_module(package)
    inside = [n for n in listed.__all__ if isinstance(getattr(listed, n), types.ModuleType)]
    alone |= {f'{package}.{name}' for name in inside}
  return ['jaxrw', *sorted(alone)]


def names(module: str) -> dict[str, object]:
  """{name: object} of the public functions and classes of a module."""
  found = importlib.import_module(module)
  if module == 'jaxrw':  # what it passes on from the weights is documented there
    weights = importlib.import_module('jaxrw.weights')
    listed = [name for name in found.__all__ if name not in weights.__all__]
  elif module in _PACKAGES:
    listed = found.__all__
  else:
    own = lambda value: getattr(value, '__module__', None) == module
    listed = [name for name, value in vars(found).items() if name[0] != '_' and own(value)]
  values = {name: getattr(found, name) for name in listed}
  documented = inspect.isclass, inspect.isfunction
  return {n: v for n, v in values.items() if any(kind(v) for kind in documented)}


def weightings() -> dict[str, object]:
  """{name: factory} of everything that makes a weighting."""
  weights = importlib.import_module('jaxrw.weights')
  core = importlib.import_module('jaxrw.core')
  made = {n: getattr(weights, n) for n in weights.__all__}
  return {n: f for n, f in made.items() if hasattr(f, 'declaration')} | {
    n: getattr(core, n) for n in ('after', 'chain')
  }


def gaps(families: Path = FAMILIES) -> list[str]:
  """One line for each public name without a docstring, and each weighting without an entry."""
  lines = []
  for module in modules():
    if not importlib.import_module(module).__doc__:
      lines.append(f'{module} has no docstring')
    for name, value in names(module).items():
      if not inspect.getdoc(value):
        lines.append(f'{module}.{name} has no docstring')
  pages = ''.join(path.read_text() for path in sorted(families.glob('*.md')))
  entries = set(re.findall(r'`(\w+)`', '\n'.join(re.findall(r'^###? .*$', pages, re.M))))
  for name in weightings():
    if name not in entries:
      lines.append(f'{name} has no entry (a heading with `{name}`) in docs/families/')
  return lines


if __name__ == '__main__':
  sys.path.insert(0, str(Path(__file__).parent.parent))
  missing = gaps()
  print('\n'.join(missing) or 'every public name is documented')
  sys.exit(bool(missing))
