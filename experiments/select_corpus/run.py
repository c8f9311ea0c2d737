"""The passes one after the other, and what they come to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import corpus_job, files
from experiments.errors import UserError
from experiments.select_corpus import jobs
from jaxrw.scores import dsir

KINDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
DSIR = 'dsir'
_ORDER, _BUCKETS = 2, dsir.BUCKETS


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the flags of the program say."""

  raw: str
  targets: Sequence[str]
  out: Path
  validation: Sequence[str] = ()
  keep: float = 0.1
  temperature: float = 1.0
  per_ngram: bool = False
  min_words: int = 100
  smoothing: float = 0.0
  duplicates: float = 0.0
  text_key: str = 'text'
  seed: int = 0

  def check(self) -> None:
    """Raises UserError for a number out of range."""
    for name, value, good, rule in (
      ('keep', self.keep, 0 < self.keep < math.inf, 'must be above 0'),
      ('temperature', self.temperature, self.temperature >= 0, 'must be at least 0'),
      ('min_words', self.min_words, self.min_words >= 0, 'must be at least 0'),
      ('smoothing', self.smoothing, 0 <= self.smoothing < math.inf, 'must be at least 0'),
      ('duplicates', self.duplicates, 0 <= self.duplicates < 1, 'must be in [0, 1); try 0.8'),
    ):
      if not good:
        raise UserError(f'--{name}={value:g} {rule}')
    if self.keep > 1 and self.keep != int(self.keep):
      raise UserError(f'--keep={self.keep:g}: from 1 on it is a number of documents, a whole one')


def select(settings: Settings, executor: corpus_job.Executor) -> dict[str, Any]:
  """Counts, scores and writes; returns what result.json gets.

  Raises:
    UserError: bad settings, no shards, an empty target, damaged shards, too few documents.
  """
  settings.check()
  raw = shards(Path(settings.raw), '--raw')
  targets, validation = named(settings.targets, 'targets'), named(settings.validation, 'validation')
  for name in validation:
    if name not in targets:
      raise UserError(f'--validation: {name!r} is not among the targets, {", ".join(targets)}')
  if taken := {DSIR, jobs.RANDOM} & set(targets):
    raise UserError(f'--targets: {sorted(taken)[0]!r} is the name of a selection; choose another')
  work, key = settings.out / 'work', settings.text_key

  def run(job: Any, over: Mapping[str, Path], folder: str) -> corpus_job.Arrays:
    return corpus_job.run(job, over, work / folder, executor)

  count = jobs.Count(key, _ORDER, _BUCKETS)
  target_counts = {}
  for name, over in targets.items():
    target_counts[name] = _counts(run(count, over, f'target_{name}'))
    if not target_counts[name].ngrams.sum():
      raise UserError(f'--targets: {name} has no words in {", ".join(map(str, over.values()))}')
  raw_counts = _counts(run(count, raw, 'count'))
  if not raw_counts.ngrams.sum():
    raise UserError(f'--raw={settings.raw} has no words under {key!r}')
  budget = round(settings.keep * raw_counts.documents if settings.keep < 1 else settings.keep)
  if not 0 < budget < raw_counts.documents:
    raise UserError(
      f'--keep={settings.keep:g} asks for {budget:,} of {raw_counts.documents:,} documents: fewer '
      'than all, and at least one'
    )
  budgets = list(dsir.shares(budget, target_counts).values())
  copies = ''
  if settings.duplicates:
    job = jobs.Multiplicity(key, settings.duplicates)
    copies = str(_written(work / 'copies.npz', job.finish(run(job, raw, 'minhash'))))
  score = jobs.Score(
    key, _ORDER, _BUCKETS,
    np.stack([
      dsir.log_ratio(c, raw_counts, smoothing=settings.smoothing) for c in target_counts.values()
    ]),
    budget, settings.temperature, settings.per_ngram, settings.min_words, settings.seed,
    copies, files.sha256(copies) if copies else '',
  )  # fmt: skip
  merged = run(score, raw, 'score')
  if budget > merged['kept']:
    raise UserError(
      f'--keep={settings.keep:g} asks for {budget:,} documents, and {int(merged["kept"]):,} of '
      f'{int(merged["documents"]):,} have --min_words={settings.min_words}: change one of them'
    )
  choices = {DSIR: jobs.choose(merged, budgets), jobs.RANDOM: jobs.by_chance(merged, budget)}
  chosen = _written(
    work / 'chosen.npz',
    {'selections': np.array(len(choices))}
    | {f'shard_{i}': c.shard for i, c in enumerate(choices.values())}
    | {f'line_{i}': c.line for i, c in enumerate(choices.values())},
  )
  write = jobs.Write(
    key, _ORDER, _BUCKETS, str(chosen), files.sha256(chosen), tuple(choices), str(settings.out)
  )
  written = run(write, raw, 'write')
  for name, choice in choices.items():
    _check_written(settings.out, name, choice, raw)
  for split, groups in (('train', targets), ('validation', validation)):
    for name, over in groups.items():
      _copy(over, settings.out / split / f'{name}.jsonl.gz', name, key)
  of_targets = list(target_counts.values())
  kept = dataclasses.asdict(settings)
  del kept['out']
  result = {
    'settings': kept,
    'raw': {'documents': raw_counts.documents, 'shards': len(raw)},
    'targets': {n: {'documents': c.documents} for n, c in target_counts.items()},
    'validation': list(validation),
    'selections': {
      name: {
        'documents': int(written[f'documents_{i}']),
        'bytes': int(written[f'bytes_{i}']),
        'kl_reduction': dsir.kl_reduction(
          of_targets, raw_counts, dsir.Counts(written[f'ngrams_{i}'])
        ),
      }
      for i, name in enumerate(choices)
    },
  }
  files.write_json(settings.out / 'result.json', result)
  return result


def shards(root: Path, flag: str) -> dict[str, Path]:
  """{relative name: path} of a folder's shards, or of one file."""
  if root.is_file() and root.name.endswith(KINDS):
    return {root.name: root}
  found = {
    path.relative_to(root).as_posix(): path
    for path in sorted(root.rglob('*'))
    if path.name.endswith(KINDS) and not path.name.startswith('.') and path.is_file()
  }
  if not found:
    raise UserError(f'{flag}: {root} holds no {", ".join(KINDS)}')
  stems: dict[str, str] = {}
  for name in found:
    if (other := stems.setdefault(name.partition('.jsonl')[0], name)) != name:
      raise UserError(f'{flag}: {other} and {name} would be written under one name; rename one')
  return found


def named(texts: Sequence[str], flag: str) -> dict[str, dict[str, Path]]:
  """{name: its shards} of 'name=path' texts."""
  out: dict[str, dict[str, Path]] = {}
  for text in texts:
    name, equals, path = text.partition('=')
    if not equals or not name or '/' in name or name in out:
      raise UserError(f'--{flag}: {text!r} must be NAME=file or folder, each name once')
    out[name] = shards(Path(path), f'--{flag}')
  return out


def _counts(merged: corpus_job.Arrays) -> dsir.Counts:
  return dsir.Counts(merged['ngrams'], int(merged['documents']))


def _written(path: Path, arrays: corpus_job.Arrays) -> Path:
  files.write_arrays(path, arrays)
  return path.absolute()


def _check_written(out: Path, name: str, choice: jobs.Choice, raw: Mapping[str, Path]) -> None:
  """Removes shards of an earlier selection, of raw shards that have gone; none may be missing."""
  chosen = set(choice.shard.tolist())
  wanted = {jobs.written(out, name, shard) for shard in raw if jobs.shard_id(shard) in chosen}
  there = set((out / 'train' / name).rglob('*.jsonl.gz'))
  if missing := sorted(wanted - there):
    raise UserError(
      f'{missing[0]} was written and is missing: delete {out / "work" / "write"}, and the same '
      'command writes it again'
    )
  for path in there - wanted:
    path.unlink()


def _copy(over: Mapping[str, Path], out: Path, name: str, text_key: str) -> None:
  """A target as one shard of the corpus to train on."""
  jobs.write_jsonl(
    out,
    (
      record | {jobs.FIELD: name}
      for path in over.values()
      for _, _, record in jobs.documents(path, text_key)
    ),
  )
