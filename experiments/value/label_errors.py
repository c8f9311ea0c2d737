"""Do scores find labels of published test sets that people call wrong?

Folder of cleanlab/label-errors: class probabilities by cross-validation, the labels as published,
and what five people each said about some hundred suspects.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import files, stats
from experiments.errors import UserError
from jaxrw import losses, scores

SETS = ('mnist', 'cifar10')
VOTES = 3  # of five: fewer for the given label, and it counts as an error


class Labels(NamedTuple):
  """probabilities float[n, C], given int[n]; of the suspects, ids int[m] and wrong bool[m]."""

  probabilities: np.ndarray
  given: np.ndarray
  suspects: np.ndarray
  wrong: np.ndarray


def read(folder: Path, name: str) -> Labels:
  """`{name}_test.npz` and `{name}_mturk.json.gz`.

  Raises:
    UserError: a file is missing or damaged.
  """
  arrays, votes = folder / f'{name}_test.npz', folder / f'{name}_mturk.json.gz'
  found = files.read_arrays(arrays, ['probs', 'given_label'])
  probabilities, given = found['probs'].astype(np.float64), found['given_label'].astype(int)
  try:
    with gzip.open(votes, 'rt') as file:
      records = json.load(file)
    ids = np.array([r['id'] for r in records])
    wrong = np.array([r['mturk']['given'] < VOTES for r in records])
  except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{votes} cannot be read ({error!r}); it needs id and mturk.given') from error
  if not len(ids) or not (ids.min() >= 0 and ids.max() < len(given)):
    raise UserError(f'{votes}: ids must be places in {arrays.name}, which has {len(given)}')
  if not wrong.any() or wrong.all():
    raise UserError(f'{votes}: all suspects have the same verdict; nothing can be told apart')
  return Labels(probabilities, given, ids, wrong)


def _uncertainty(logits: Any, labels: Any) -> Any:
  """The control that does not look at the label."""
  p = jnp.exp(logits)
  return -jnp.sum(p * logits, axis=-1)


SCORES: dict[str, Callable[[Any, Any], Any]] = {
  'loss': losses.cross_entropy,
  'el2n': scores.el2n,
  'margin': scores.margin_error,
  'entropy (no label)': _uncertainty,
}


class Result(NamedTuple):
  """Of a score: AUC for errors among all examples, where unchecked ones count as right, and among
  the suspects alone, with 95% intervals; errors among its first 100."""

  everywhere: tuple[float, float, float]
  suspects: tuple[float, float, float]
  first_hundred: int


def measure(labels: Labels, name: str) -> Result:
  logits = jnp.log(jnp.maximum(labels.probabilities, 1e-12))
  values = np.asarray(SCORES[name](logits, jnp.asarray(labels.given)), np.float64)
  wrong = np.zeros(len(values), bool)
  wrong[labels.suspects[labels.wrong]] = True
  first = np.argsort(-values, kind='stable')[:100]
  return Result(
    _interval(values, wrong),
    _interval(values[labels.suspects], labels.wrong),
    int(wrong[first].sum()),
  )


def _interval(values: np.ndarray, wrong: np.ndarray, draws: int = 1000) -> tuple[float, ...]:
  """(AUC, low, high): examples drawn anew, right and wrong ones apart."""
  rng = np.random.default_rng(0)
  yes, no = values[wrong], values[~wrong]
  drawn = []
  for _ in range(draws):
    both = np.concatenate([rng.choice(yes, len(yes)), rng.choice(no, len(no))])
    drawn.append(stats.auc(both, np.arange(len(both)) < len(yes)))
  return stats.auc(values, wrong), *np.quantile(drawn, [0.025, 0.975]).tolist()
