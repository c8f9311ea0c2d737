"""Folders of shards whose lines name their domains: `{split}/**/*.jsonl[.gz|.zst]`.

Which domains a shard holds is known only once it has been read, and a corpus of this kind may take
hours to read. So what was found is kept, by size and time of change of each file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments import files
from experiments.data import text_files
from experiments.errors import UserError

_KINDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst')


class Shards(NamedTuple):
  """What a folder holds.

  Attributes:
    parts: the files of each (domain, split), in order; most hold several domains.
    digests: of each file, a hash of its content and of what names the domains in it.
  """

  parts: dict[tuple[str, str], list[Path]]
  digests: dict[Path, str]


def scan(root: Path, splits: Sequence[str], key: str, folder: Path) -> Shards:
  """Reads every shard that is new or changed.

  Args:
    root: holds a folder for each split, with shards at any depth.
    splits: names of such folders.
    key: where a line names its domain; see `domain_of`.
    folder: where to keep what was found.

  Raises:
    UserError: a file is damaged, or a line has no domain; names both.
  """
  paths = [(split, path) for split in splits for path in _paths(root / split)]
  name = hashlib.sha256(f'{root.resolve()}\0{key}'.encode()).hexdigest()[:16]
  kept_in = folder / f'shards-{name}.json'
  known = files.read_json(kept_in) if kept_in.is_file() else {}
  kept = dict(known)
  parts, digests = {}, {}
  for split, path in tqdm(paths, desc='reading domains', unit=' shards', disable=None):
    where, stat = str(path.relative_to(root)), path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    if kept.get(where, {}).get('stamp') != stamp:
      lines = text_files.json_lines(path)
      names = {domain_of(record, key, f'{path}, line {number}') for number, record in lines}
      found = {'domains': sorted(names), 'digest': text_files.digest(path)}
      kept[where] = {'stamp': stamp, **found}
    digests[path] = f'{key} {kept[where]["digest"]}'
    for domain in kept[where]['domains']:
      parts.setdefault((domain, split), []).append(path)
  if kept != known:
    files.write_json(kept_in, kept)
  return Shards(parts, digests)


def domain_of(record: Any, key: str, where: str) -> str:
  """The name under a key such as 'meta.redpajama_set_name', whose dots go into nested objects.

  Raises:
    UserError: there is none.
  """
  value = record
  for part in key.split('.'):
    value = value.get(part) if isinstance(value, dict) else None
  if not isinstance(value, str) or not value:
    raise UserError(
      f"{where}: no domain under '{key}'; add the field or set data.domain_key to its name"
    )
  return value


def _paths(folder: Path) -> list[Path]:
  """The shards of a split; folders that are links are followed, each once."""
  found, seen = [], set()
  for where, folders, names in os.walk(folder, followlinks=True):
    seen.add(os.path.realpath(where))
    folders[:] = [name for name in folders if os.path.realpath(Path(where, name)) not in seen]
    paths = (Path(where, name) for name in names if name.endswith(_KINDS))
    found += [path for path in paths if path.is_file() and not path.name.startswith('.')]
  return sorted(found)
