"""How often each domain is to be sampled: what `data.mixture` says, and files that say it by name.

A mixture file is JSON:

  weights    {domain: share}, sums to 1
  made_by    what they come from, for people
  corpus     of the data: fingerprint, tokenizer (name and sha256), seq_len, sizes {domain: blocks}
  epochs     {domain: how often the run that made them went through it}

Only `weights` must be there. Shares are looked up by the domain's name, never by its position; a
share counts blocks, so it means something else under another tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import files
from experiments.data import readers
from experiments.data.corpus import Corpus
from experiments.errors import UserError
from jaxrw.mixtures import Planner

SUFFIX = '.json'
EXCEPT = ' except '
_ANY = 2.0**53  # a weight that may still be added to others
_SUM_ERROR = 1e-3  # published weights are rounded
_REPEATED_ALIKE = 2.0  # epochs that differ by less than this factor


class Planned(NamedTuple):
  """What a whole run will draw from one domain."""

  rows: float
  epochs: float


def proportions(data_config: Any, corpus: Corpus) -> np.ndarray:
  """The proportions that `data_config.mixture` asks for, float64[K]; see `parse`."""
  return parse(data_config.mixture, corpus)


def parse(text: str, corpus: Corpus) -> np.ndarray:
  """Proportions of the domains, float64[K] with sum 1.

  Args:
    text: 'uniform', 'natural' (by number of blocks), either 'except' some domains ('uniform except
      qa+law'), 'web=0.5,code=0.5', where domains that are not named get nothing and the sum need
      not be 1, or the path of a mixture file.
    corpus: whose domains.

  Raises:
    UserError: if the text does not parse, names an unknown or empty domain, or sums to 0; a file
      that does not fit the corpus.
  """
  sizes = corpus.sizes('train')
  kind, _, left_out = text.partition(EXCEPT)
  if kind in ('uniform', 'natural'):
    weights = np.ones(len(corpus.domains)) if kind == 'uniform' else sizes.astype(np.float64)
    for name in [left_out] if left_out in corpus.domains else filter(None, left_out.split('+')):
      weights[_index(name, corpus.domains)] = 0
  elif text.endswith(SUFFIX):
    weights = read_file(text, corpus)
  else:
    weights = _named(text, corpus.domains)
  for domain, weight, size in zip(corpus.domains, weights, sizes):
    if weight > 0 and size < 1:
      raise UserError(f"data.mixture='{text}': domain '{domain}' has no blocks; leave it out")
  if weights.sum() <= 0:
    raise UserError(f"data.mixture='{text}' sums to 0; give some domain a positive share")
  return weights / weights.sum()


def planned_examples(
  corpus: Corpus,
  *,
  batch_size: int,
  total_steps: int,
  proportions: np.ndarray,
  max_epochs: int = 0,
) -> dict[str, Planned]:
  """Expected rows and epochs of each domain over a run with fixed proportions.

  Raises:
    UserError: the domains with a share do not hold that much within `max_epochs`.
  """
  sizes = corpus.sizes('train')
  planner = Planner(sizes, batch_size, proportions, 0, max_epochs)
  try:
    rows = planner.expected_counts(total_steps)
  except ValueError as error:
    raise UserError(f'config.mixture.max_epochs={max_epochs}: {error}') from error
  return {
    domain: Planned(float(n), float(n / max(size, 1)))
    for domain, n, size in zip(corpus.domains, rows, sizes)
  }


def remarks(text: str, planned: Mapping[str, Planned]) -> list[str]:
  """What to tell about a mixture before a run: domains hardly ever drawn, and a mixture file whose
  own run repeated the data more, or less, than this one will."""
  said = []
  rare = {name: plan.rows for name, plan in planned.items() if 0 < plan.rows < 1}
  if rare:
    listed = ', '.join(f'{name} ({rows:.2g})' for name, rows in list(rare.items())[:5])
    said.append(
      f'expected rows below 1 in the whole run: {listed}{", ..." * (len(rare) > 5)}; they are '
      'drawn with that probability, so most likely not at all'
    )
  if text.endswith(SUFFIX):
    said += _mismatches(files.read_json(text).get('epochs', {}), planned)
  return said


def write(
  path: Path,
  corpus: Corpus,
  weights: Sequence[float] | np.ndarray,
  *,
  made_by: Mapping[str, Any],
  epochs: Mapping[str, float],
) -> None:
  """Writes a mixture file, atomically."""
  tokenizer = corpus.meta['tokenizer']
  files.write_json(
    path,
    {
      'weights': {name: float(w) for name, w in zip(corpus.domains, weights, strict=True)},
      'made_by': made_by,
      'corpus': {
        'fingerprint': corpus.fingerprint,
        'tokenizer': {key: tokenizer[key] for key in ('name', 'sha256')},
        'seq_len': corpus.seq_len,
        'sizes': dict(zip(corpus.domains, corpus.sizes('train').tolist())),
      },
      'epochs': epochs,
    },
  )


def _named(text: str, domains: Sequence[str]) -> np.ndarray:
  weights = np.zeros(len(domains))
  for item in text.split(','):
    name, equals, share = (part.strip() for part in item.partition('='))
    if not equals:
      raise UserError(
        f"data.mixture='{text}' does not parse at '{item}'; "
        "use 'uniform', 'natural', 'uniform except qa', 'web=0.5,code=0.5' or a mixture file "
        '(.json)'
      )
    index = _index(name, domains)
    try:
      value = float(share)
    except ValueError:
      value = np.nan
    if not np.isfinite(value) or value < 0:
      raise UserError(f"data.mixture: '{item.strip()}' needs a finite share that is not negative")
    weights[index] = value
  return weights


def _index(name: str, domains: Sequence[str]) -> int:
  if name not in domains:
    raise UserError(f"data.mixture: no domain '{name}'; {readers.known_domains(name, domains)}")
  return list(domains).index(name)


def read_file(path: str, corpus: Corpus) -> np.ndarray:
  """The weights of a mixture file in the order of the corpus, float64[K] that sum to 1.

  Raises:
    UserError: a file that is not one, or does not fit the corpus.
  """
  stored = files.read_json(path)
  shares = stored.get('weights') if isinstance(stored, Mapping) else None
  if not isinstance(shares, Mapping) or not shares:
    raise UserError(f'{path} is not a mixture file: it has no weights by domain name')
  for name, share in shares.items():
    if not _is_number(share) or not 0 <= share < _ANY:
      raise UserError(f'{path}: the weight of {name!r} is {share!r:.40}; it must be at least 0')
  total = sum(shares.values())
  if abs(total - 1) > _SUM_ERROR:
    raise UserError(f'{path}: the weights sum to {total:.6g}; they must sum to 1')
  for name, epochs in _section(path, stored, 'epochs').items():
    if not _is_number(epochs):
      raise UserError(f'{path}: the epochs of {name!r} are {epochs!r:.40}; write a number')
  _check_tokenizer(path, _section(path, _section(path, stored, 'corpus'), 'tokenizer'), corpus)
  for name in shares:
    if name not in corpus.domains:
      raise UserError(
        f'{path} has a weight for {name!r}, which is not among the domains here; '
        f'{readers.known_domains(name, corpus.domains)}. Bring the domain back, or make the '
        'weights without it'
      )
  missing = [name for name in corpus.domains if name not in shares]
  if missing:
    raise UserError(
      f'{path} has no weight for the domain {missing[0]!r}; give it one (0 is fine), or leave the '
      'domain out with data.domains'
    )
  weights = np.array([shares[name] for name in corpus.domains], np.float64)
  return weights / weights.sum()


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _section(path: str, stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  found = stored.get(name, {})
  if not isinstance(found, Mapping):
    raise UserError(f'{path}: {name} is {found!r:.40}; it must be an object, or left out')
  return found


def _check_tokenizer(path: str, made_with: Mapping[str, str], corpus: Corpus) -> None:
  here = corpus.meta['tokenizer']
  label = lambda t: f'{t.get("name")!r} ({str(t.get("sha256"))[:12]})'
  if made_with and made_with.get('sha256') != here['sha256']:
    raise UserError(
      f'{path} was made with the tokenizer {label(made_with)}, here it is {label(here)}: shares '
      'count blocks of tokens, so make them again with this one, or name the shares you want: '
      "data.mixture='web=0.5,code=0.5'"
    )


def _mismatches(theirs: Mapping[str, float], planned: Mapping[str, Planned]) -> list[str]:
  found = []
  for name, plan in planned.items():
    before = theirs.get(name)
    if before is None or max(before, plan.epochs) <= 1:
      continue
    if max(before, plan.epochs) > _REPEATED_ALIKE * min(before, plan.epochs):
      found.append(f'{name} {before:.2g} times there and {plan.epochs:.2g} times here')
  if not found:
    return []
  return [
    f'repetition differs from the run that made these weights: {", ".join(found[:5])}'
    f'{", ..." * (len(found) > 5)}. What is best at one number of epochs need not be at another; '
    'make the weights on a part of the data that is repeated as often '
    '(data.max_bytes_per_domain), or limit it with mixture.max_epochs'
  ]
