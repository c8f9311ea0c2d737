"""Where text comes from: a folder of files, a prepared TFDS dataset, or the embedded corpus.

A `Source` names its domains in order, fingerprints the content, and yields the documents of a
domain and split. Whatever a user may have got wrong in the data is reported here, on one line with
file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config_rules import is_text
from experiments.data import embedded, shards, text_files
from experiments.data.text import pieces, unit_hash
from experiments.errors import UserError

SPLITS = ('train', 'validation', 'test')
MAX_NAME = 200  # characters of a domain's name
HELD_OUT = 0.05  # share of the parents that become validation data where no split says so

_FILE = re.compile(
  r'(?P<domain>.+)\.(?P<split>train|validation|test)\.(?P<kind>jsonl|txt)(\.gz|\.zst)?'
)
_NOT_DOMAINS = (
  'mini',
  'stats',
  '.',
)  # prefixes of files and folders that a data folder may hold beside
_MAX_WEIGHT = float(np.finfo(np.float32).max)
_EXPECTED = (
  'expected {domain}.{train|validation|test}.jsonl[.gz|.zst] or .txt, {domain}/*.txt, or shards '
  'train/*.jsonl[.gz|.zst]'
)


class Document(NamedTuple):
  """One text."""

  domain: str
  split: str
  id: str
  text: str
  weight: float | np.ndarray | None = None  # of every token, or float32[tokens] one by one
  parent: str | None = None  # the work it was cut from; never divided between splits


@dataclasses.dataclass(frozen=True)
class Source:
  """A set of domains.

  Attributes:
    label: short name for folders.
    domains: names in order; the position is the domain id.
    splits: those that it has, out of `SPLITS`; 'train' and 'validation' always.
    fingerprint: SHA-256 of the content.
    documents: (domain, split) -> iterator of `Document`, in a fixed order.
  """

  label: str
  domains: tuple[str, ...]
  splits: tuple[str, ...]
  fingerprint: str
  documents: Callable[[str, str], Iterator[Document]]


def open_source(data_config: Any) -> Source:
  """Opens the source that `data_config.source` names, limited to `data_config.domains`.

  Raises:
    UserError: if there is no such source, folder, dataset or domain.
  """
  openers = {
    'embedded': embedded_source,
    'folder': folder_source,
    'tfds': tfds_source,
  }
  if data_config.source not in openers:
    raise UserError(
      f"data.source='{data_config.source}' is not known; use 'embedded', 'folder' or 'tfds'"
    )
  return openers[data_config.source](data_config)


def embedded_source(data_config: Any) -> Source:
  """The text that comes with Python; see `experiments.data.embedded`."""
  corpus = {domain: list(embedded.records(domain)) for domain in embedded.DOMAINS}
  domains = select_domains([domain for domain, records in corpus.items() if records], data_config)

  def documents(domain: str) -> Iterator[Document]:
    for name, parent, text in corpus[domain]:
      yield Document(domain, 'train', name, text, parent=parent)

  digest = _digest(f'{domain}\0{r[0]}\0{r[2]}' for domain in domains for r in corpus[domain])
  return Source('embedded', domains, SPLITS[:2], digest, _with_held_out(documents))


def folder_source(data_config: Any) -> Source:
  """A folder of `{domain}.{split}.jsonl[.gz|.zst]`, `{domain}.{split}.txt` or `{domain}/*.txt`.

  Or of shards, `{split}/**/*.jsonl[.gz|.zst]`, whose lines name their domains under
  `data_config.domain_key`; see `experiments.data.shards`.

  A JSON line needs the text key and may have `id`, `parent` and the weight key. Long plain texts
  are cut into documents at ends of paragraphs. Where a domain has no validation file, about 5% of
  its parents (else of its documents), chosen by a hash of the name, are held out.
  """
  root = Path(os.path.expanduser(data_config.path))
  if not data_config.path or not os.path.isdir(root):
    raise UserError(
      f"data.path='{data_config.path}' is not a folder; give the folder of the corpus "
      '(--config.data.path=DIR)'
    )
  parts, digest_of = _corpus_files(root), text_files.digest
  sharded = not parts
  if sharded:
    parts, digests = shards.scan(root, SPLITS, data_config.domain_key, data_root(data_config))
    digest_of = digests.__getitem__
  name_of = lambda path: path.relative_to(root).as_posix() if sharded else path.name
  if not parts:
    found = ', '.join(sorted(path.name for path in root.iterdir())[:5]) or 'nothing'
    raise UserError(f"data.path='{root}' holds no corpus: {_EXPECTED}; found {found}")
  domains = select_domains(sorted({domain for domain, _ in parts}), data_config)
  for domain in domains:
    if (domain, 'train') not in parts:
      raise UserError(
        f"domain '{domain}' has no training file in {root}; add {domain}.train.jsonl, "
        'or leave it out with data.domains'
      )

  def read(domain: str, split: str) -> Iterator[Document]:
    for path in parts.get((domain, split), ()):
      if sharded:
        yield from _read_jsonl(path, domain, split, data_config, name_of(path))
      else:
        read_file = _read_jsonl if '.jsonl' in path.name else _read_text
        yield from read_file(path, domain, split, data_config)

  held_out = _with_held_out(functools.partial(read, split='train'))

  def documents(domain: str, split: str) -> Iterator[Document]:
    if (domain, 'validation') in parts or split == 'test':
      return read(domain, split)
    return held_out(domain, split)

  digest = _digest(
    f'{domain}\0{split}\0{name_of(path)}\0{digest_of(path)}'
    for domain in domains
    for split in SPLITS
    for path in parts.get((domain, split), ())
  )
  with_test = any((domain, 'test') in parts for domain in domains)
  label = root.resolve().name
  return Source(label, domains, SPLITS if with_test else SPLITS[:2], digest, documents)


def tfds_source(data_config: Any) -> Source:
  """A dataset prepared by TFDS, by name, read without TensorFlow.

  The domain comes from the feature `data_config.domain_key`; without it the dataset is one domain.
  The weight feature, if there, must have a floating dtype. Without a validation split, documents
  are held out as for a folder.
  """
  from experiments.data import prepared_tfds

  dataset = prepared_tfds.open_dataset(data_config)
  domains = select_domains(dataset.domains, data_config)

  def read(domain: str, split: str) -> Iterator[Document]:
    for name, text, weight in dataset.records(domain, split):
      yield Document(domain, split, name, text, weight)

  held_out = _with_held_out(functools.partial(read, split='train'))
  own_validation = 'validation' in dataset.splits
  splits = tuple(s for s in SPLITS if s in dataset.splits or s == 'validation')
  documents = read if own_validation else lambda d, s: (read if s == 'test' else held_out)(d, s)
  return Source(dataset.label, domains, splits, dataset.fingerprint, documents)


def data_root(data_config: Any) -> Path:
  """The folder that holds prepared data, made if it is not there; see `open_corpus`."""
  root = data_config.root or os.environ.get('JAXRW_DATA') or '~/.cache/jaxrw'
  path = Path(os.path.expanduser(root))
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"data.root='{path}' cannot be used ({error}); set it to a folder you can write to"
    ) from error
  return path


def select_domains(available: Sequence[str], data_config: Any) -> tuple[str, ...]:
  """`data_config.domains` checked against what there is; all of it when empty.

  Raises:
    UserError: for an unknown or repeated name, with the nearest known one, and for one in the data
      that cannot be printed.
  """
  wanted = tuple(data_config.domains)
  for name in wanted:
    if name not in available:
      raise UserError(f"data.domains: no domain '{name}'; {known_domains(name, available)}")
  if len(set(wanted)) < len(wanted):
    raise UserError(f'data.domains={wanted} names a domain twice; name each once')
  for name in wanted or available:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
      raise UserError(
        f'the domain {name[:MAX_NAME]!r} needs a name of 1 to {MAX_NAME} printable characters; '
        'rename it in the data'
      )
  return wanted or tuple(available)


def known_domains(name: str, available: Sequence[str]) -> str:
  """The end of an error message about an unknown domain: the nearest name and the first few."""
  near = difflib.get_close_matches(name, available, 1)
  listed = ', '.join(available[:20]) + (', ...' if len(available) > 20 else '')
  return (f"did you mean '{near[0]}'? " if near else '') + f'known: {listed}'


def check_weight(value: Any, where: str) -> float | np.ndarray | None:
  """A number, or a list of one number per token, finite and non-negative; None stays None.

  Raises:
    UserError: otherwise.
  """
  if value is None:
    return None
  numbers = value if isinstance(value, list) else [value]
  for number in numbers:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
      raise UserError(f'{where}: weight {number!r} is not a number; write a number such as 1.0')
    if not 0 <= number <= _MAX_WEIGHT:
      raise UserError(
        f'{where}: weight {number!r:.40} must be finite and not negative; fix or drop it'
      )
  return np.asarray(value, np.float32) if isinstance(value, list) else float(value)


def _with_held_out(
  documents: Callable[[str], Iterator[Document]],
) -> Callable[[str, str], Iterator[Document]]:
  """Divides the documents of a domain into 'train' and 'validation' by a hash of their parents.

  Parents are held out in the order of their hash until they hold `HELD_OUT` of the text; those that
  would overshoot it by far stay in training. So the order of files never matters, and added data
  move hardly any document to the other side.
  """

  @functools.cache
  def held_out(domain: str) -> frozenset[str]:
    sizes: dict[str, int] = {}
    for document in documents(domain):
      sizes[_parent(document)] = sizes.get(_parent(document), 0) + len(document.text)
    budget = HELD_OUT * sum(sizes.values())
    chosen, held = [], 0
    for parent in sorted(sizes, key=_held_out_order):
      if held < budget and sizes[parent] <= 1.4 * budget:
        chosen.append(parent)
        held += sizes[parent]
    smallest = sorted(sizes, key=lambda parent: (sizes[parent], parent))[:1]
    return frozenset(chosen or (smallest if len(sizes) > 1 else ()))

  def split_documents(domain: str, split: str) -> Iterator[Document]:
    for document in documents(domain):
      if (_parent(document) in held_out(domain)) == (split == 'validation'):
        yield document._replace(split=split)

  return split_documents


def _parent(document: Document) -> str:
  return document.parent or document.id


def _held_out_order(parent: str) -> float:
  return unit_hash(f'held out: {parent}')  # independent of any other choice by hash


def _corpus_files(root: Path) -> dict[tuple[str, str], list[Path]]:
  """The files of each (domain, split)."""
  found: dict[tuple[str, str], list[Path]] = {}
  try:
    paths_there = sorted(root.iterdir())
  except OSError as error:
    raise UserError(
      f"data.path='{root}' cannot be read ({error.strerror}); give a folder that you can read"
    ) from error
  for path in paths_there:
    if path.name.startswith(_NOT_DOMAINS):
      continue
    match = _FILE.fullmatch(path.name)
    if path.is_dir() and (texts := sorted(path.glob('*.txt'))):
      key, paths = (path.name, 'train'), texts
    elif match and path.is_file():
      key, paths = (match['domain'], match['split']), [path]
    else:
      continue
    if key in found:  # most likely the same text twice, such as a file and its compressed copy
      raise UserError(f'{found[key][0]} and {paths[0]} hold the same domain and split; keep one')
    for unprintable in (path for path in paths if not is_text(path.name)):
      raise UserError(f'{root}: the file name {unprintable.name!r} is not UTF-8; rename it')
    found[key] = paths
  return found


def _read_jsonl(
  path: Path, domain: str, split: str, data_config: Any, shard: str = ''
) -> Iterator[Document]:
  """The documents of a file; of a `shard`, which is then its name, those of the domain."""
  for number, record in text_files.json_lines(path):
    where = f'{path}, line {number}'
    if shard and shards.domain_of(record, data_config.domain_key, where) != domain:
      continue
    key = data_config.text_key
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
      raise UserError(
        f"{where}: no text under '{key}'; add the field or set data.text_key to its name"
      )
    text = _checked_text(record[key], where)
    weight = check_weight(record.get(data_config.weight_key), where)
    name = _checked_text(str(record.get('id', f'{shard or path.name}:{number}')), where)
    parent = record.get('parent')
    if parent is not None:
      parent = _checked_text(str(parent), where)
    yield Document(domain, split, name, text, weight, parent)


def _read_text(path: Path, domain: str, split: str, data_config: Any) -> Iterator[Document]:
  """A plain text file as documents of a few pages.

  In `{domain}/*.txt` each file is a work of its own, held out whole; a `{domain}.{split}.txt` is a
  mere container, whose pieces may be held out one by one.
  """
  del data_config
  work = path.name if path.parent.name == domain else None
  for i, piece in enumerate(pieces(text_files.whole(path))):
    yield Document(domain, split, f'{path.name}#{i}', piece, parent=work)


def _checked_text(text: str, where: str) -> str:
  """JSON can spell half of a surrogate pair, which no encoding of Unicode can hold."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: the text holds half a surrogate pair at character {error.start}; drop it'
    ) from error
  return text


def _digest(parts: Iterator[str]) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(hashlib.sha256(part.encode('utf-8')).digest())
  return digest.hexdigest()
