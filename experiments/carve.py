"""Makes a folder corpus out of another: splits a domain by a field, keeps a part of each piece.

  python -m experiments.carve --source=my/text --domain=multilingual --by=lang \\
    --keep=fr=0.5,pl=0.1,sl=0.01 --out=my/languages
  python -m experiments.carve --source=my/text --keep=0.0625 --out=my/proxy

The first makes a domain of each language, some of them small. Training documents are cut into
pieces of about a page at ends of paragraphs; those that stay have the smallest hashes of their ids,
so a smaller part is contained in every larger one. Validation and test documents all stay whole.

The second keeps a sixteenth of every domain, which repeats each as often in a run of a sixteenth of
the steps: proxy runs should repeat data as the large run will (mixtures that are best at one number
of epochs need not be at another).
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import cli, files
from experiments.data import text_files
from experiments.data.text import pieces, unit_hash
from experiments.errors import UserError

FLAGS = flags.FLAGS
PAGE = 2_000  # characters
SPLITS = ('train', 'validation', 'test')


def parse_keep(text: str) -> tuple[float, dict[str, float]]:
  """(share of all other domains, {domain: share}) from '0.5', 'fr=0.5,pl=0.1' or '0.5,pl=0.1'.

  Raises:
    UserError: a share that is not above 0 and at most 1.
  """
  rest, shares = 1.0, {}
  for item in filter(None, (part.strip() for part in text.split(','))):
    name, _, value = item.rpartition('=')
    try:
      share = float(value)
    except ValueError:
      share = -1.0
    if not 0 < share <= 1:
      raise UserError(f'--keep={text}: {item!r} needs a share above 0 and at most 1, as in fr=0.5')
    if name:
      shares[name] = share
    else:
      rest = share
  return rest, shares


def carve(
  source: Path, out: Path, *, domain: str = '', by: str = '', keep: str = '1', seed: int = 0
) -> dict[str, dict[str, int]]:
  """Writes `{domain}.{split}.jsonl.gz` files; see the module.

  Args:
    source: a folder of `{domain}.{split}.jsonl[.gz|.zst]`.
    out: a folder that does not exist yet, or holds nothing.
    domain: the only one to take; empty: all.
    by: a field whose values name the new domains (dots become underscores); empty: they keep their
      names.
    keep: see `parse_keep`.
    seed: of the hashes.

  Returns:
    {new domain: {split: documents, for training pieces of them}}.

  Raises:
    UserError: no such folder or domain, a document without the field, a domain of --keep that there
      is not, a folder with something in it.
  """
  rest, shares = parse_keep(keep)
  found = _inputs(source, domain)
  if out.exists() and any(out.iterdir()):
    raise UserError(f'--out={out} already holds something; choose a new folder')
  counts: dict[str, dict[str, int]] = {}
  named_by: dict[str, str] = {}  # a new domain -> the value that named it
  with contextlib.ExitStack() as outputs:
    sinks: dict[str, Any] = {}
    for path, name, split in tqdm(found, desc='carving', unit=' files', disable=None):
      for number, record in _records(path):
        value = name if not by else _value(record, by, path, number)
        new = value.replace('.', '_') if by else name  # a domain's name ends at the first dot
        if named_by.setdefault(new, value) != value:
          raise UserError(
            f'{path}, line {number}: {named_by[new]!r} and {value!r} would both be the domain '
            f'{new!r}'
          )
        by_split = counts.setdefault(new, dict.fromkeys(SPLITS, 0))
        kept = [record]
        if split == 'train':
          name_of_it = str(record.get('id', f'{path.name}:{number}'))
          kept = [p for p in _pieces(record, name_of_it) if _hash(seed, p) < shares.get(new, rest)]
        target = f'{new}.{split}.jsonl.gz'
        if target not in sinks:
          temporary = outputs.enter_context(files.replacing(out / target))
          sinks[target] = outputs.enter_context(gzip.open(temporary, 'wt', encoding='utf-8'))
        by_split[split] += len(kept)
        sinks[target].writelines(json.dumps(p, ensure_ascii=False) + '\n' for p in kept)
    unknown = sorted(set(shares) - set(counts))
    if unknown:
      raise UserError(f'--keep: no domain {unknown[0]!r}; there is {", ".join(sorted(counts))}')
    empty = sorted(name for name, by_split in counts.items() if not by_split['train'])
    if empty:
      raise UserError(f'--keep={keep} leaves no training document of {empty[0]!r}: keep more of it')
  return counts


def _inputs(source: Path, domain: str) -> list[tuple[Path, str, str]]:
  """(file, domain, split) of every file to read."""
  if not source.is_dir():
    raise UserError(f'--source={source} is not a folder')
  found = []
  for path in sorted(source.glob('*.jsonl*')):
    name, _, rest = path.name.partition('.')
    split = rest.partition('.')[0]
    if split in SPLITS and domain in ('', name):
      found.append((path, name, split))
  if not found:
    what = f'domain {domain!r}' if domain else '{domain}.{train|validation|test}.jsonl[.gz|.zst]'
    raise UserError(f'--source={source} holds no {what}')
  return found


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
  for number, line in enumerate(text_files.lines(path), start=1):
    if not line.strip():
      continue
    record = text_files.parse_json(line, path, number)
    if not isinstance(record, dict):
      raise text_files.bad_line(path, number, 'not a JSON object')
    yield number, record


def _pieces(record: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
  """The record with its text in parts; one whose weights go by tokens stays whole."""
  if not isinstance(record.get('text'), str) or isinstance(record.get('weight'), list):
    yield {**record, 'id': name}
    return
  for i, text in enumerate(pieces(record['text'], PAGE)):
    yield {**record, 'text': text, 'id': f'{name}#{i}', 'parent': record.get('parent', name)}


def _hash(seed: int, record: Mapping[str, Any]) -> float:
  return unit_hash(f'{seed} {record["id"]}')


def _value(record: Mapping[str, Any], by: str, path: Path, number: int) -> str:
  value = record.get(by)
  if not isinstance(value, str) or not value.isprintable() or not value or '/' in value:
    raise UserError(
      f'{path}, line {number}: --by={by} needs a text that can name a file there, found {value!r}'
    )
  return value


def main(_: list[str]) -> None:
  if not FLAGS.source or not FLAGS.out:
    raise UserError('--source and --out must be folders: --source=my/text --out=my/part')
  counts = carve(
    Path(FLAGS.source),
    Path(FLAGS.out),
    domain=FLAGS.domain,
    by=FLAGS.by,
    keep=FLAGS.keep,
    seed=FLAGS.seed,
  )
  width = max(map(len, counts))
  print(f'{"domain":<{width}}' + ''.join(f'  {split:>10}' for split in SPLITS))
  for name, by_split in sorted(counts.items()):
    print(f'{name:<{width}}' + ''.join(f'  {by_split[split]:>10,}' for split in SPLITS))


if __name__ == '__main__':
  flags.DEFINE_string('source', '', 'folder to read')
  flags.DEFINE_string('domain', '', 'take this one only; empty: all')
  flags.DEFINE_string('by', '', 'field whose values become domains')
  flags.DEFINE_string('keep', '1', "share of the training documents: '0.5', 'fr=0.5,pl=0.1'")
  flags.DEFINE_integer('seed', 0, 'of the hashes that choose documents')
  flags.DEFINE_string('out', '', 'folder to write')
  cli.run(main)
