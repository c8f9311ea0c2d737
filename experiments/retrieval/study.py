"""Questions, ranked lists of sources with the answer that each would give, and votes over them.

Importance of sources is learned on the training questions, what is free (how many votes, whether
domains share importance, how much to drop) is chosen on validation questions, and accuracy is that
of test questions. So it is for every arm, the plain ones included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.data import text_files
from experiments.errors import UserError
from jaxrw import valuation

SHARES = (0.4, 0.2, 0.4)  # of the questions: training, validation, test
VOTES = (1, 3, 5, 10, 20, 50)
DROPPED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEIGHBORS = (5, 10, 20)
RATES = (10.0, 100.0, 500.0)
STEPS = 20
PRIOR = (1.0, 3.0, 10.0)  # questions' worth of the mean, for a source that was seldom seen
_DRAWS = 16


class Lists(NamedTuple):
  """Ranked sources of N questions.

  Attributes:
    ids: int[N, M], sources, best first; -1 beyond the end.
    answers: int[N, M], the source's answer, numbered within the question by first occurrence.
    right: bool[N, M].
    domains: int[C], of each source.
  """

  ids: np.ndarray
  answers: np.ndarray
  right: np.ndarray
  domains: np.ndarray

  def take(self, rows: np.ndarray) -> Lists:
    return Lists(self.ids[rows], self.answers[rows], self.right[rows], self.domains)

  @property
  def sources(self) -> int:
    return len(self.domains)

  @property
  def first(self) -> np.ndarray:
    """bool[N, M]: whether the source is not in the list before; what is not is used once only."""
    order = np.argsort(self.ids, axis=1, kind='stable')
    ids = np.take_along_axis(self.ids, order, axis=1)
    fresh = np.ones(ids.shape, bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    out = np.empty_like(fresh)
    np.put_along_axis(out, order, fresh, axis=1)
    return out & (self.ids >= 0)


def read(folder: Path, relation: str) -> Lists:
  """`{relation}.jsonl.gz` and `{relation}_websites_by_domain.jsonl.gz`, as of ragbooster.

  Raises:
    UserError: a file is missing or damaged, lists differ in length, no questions.
  """
  path, by_domain = (folder / f'{relation}{end}.jsonl.gz' for end in ('', '_websites_by_domain'))
  questions, numbers = [], {}
  for line, record in text_files.json_lines(path):
    try:
      sites, given = record['retrieved_websites'], record['retrieved_answers']
      correct = {_folded(a) for a in record['correct_answers']}
    except (TypeError, KeyError) as error:
      raise text_files.bad_line(path, line, f'a question lacks {error}') from error
    if len(sites) != len(given):
      raise text_files.bad_line(
        path, line, f'{len(sites)} retrieved_websites and {len(given)} retrieved_answers'
      )
    ids = [numbers.setdefault(site, len(numbers)) for site in sites]
    answers = [_folded(answer) for answer in given]
    codes: dict[str, int] = {}
    questions.append((
      ids, [codes.setdefault(a, len(codes)) for a in answers], [a in correct for a in answers]
    ))  # fmt: skip
  if not questions:
    raise UserError(f'{path} has no questions')
  domains = np.full(len(numbers), -1)
  for line, record in text_files.json_lines(by_domain):
    if not isinstance(record, dict) or not isinstance(record.get('elements'), list):
      raise text_files.bad_line(by_domain, line, 'a domain lacks the list elements')
    for site in record['elements']:
      if site in numbers:
        domains[numbers[site]] = line
  alone = domains < 0
  domains[alone] = -1 - np.arange(alone.sum())  # a domain of its own
  return _lists(questions, np.unique(domains, return_inverse=True)[1])


def _folded(answer: Any) -> str:
  return str(answer).strip().casefold()


def _lists(questions: Sequence[tuple[list, list, list]], domains: np.ndarray) -> Lists:
  most = max(len(ids) for ids, _, _ in questions)
  shape = (len(questions), most)
  out = Lists(np.full(shape, -1), np.zeros(shape, int), np.zeros(shape, bool), domains)
  for row, parts in enumerate(questions):
    for array, part in zip(out, parts):
      array[row, : len(part)] = part
  return out


def made_up(questions: int = 400, sources: int = 200, ranks: int = 30) -> Lists:
  """Sources that are right with a chance of .9, or, three quarters of them, of .2; wrong answers
  are one of three, so that they gather votes."""
  rng = np.random.default_rng(0)
  reliable = np.where(rng.permutation(sources) < sources // 4, 0.9, 0.2)
  rows = []
  for _ in range(questions):
    ids = rng.permutation(sources)[:ranks]
    right = rng.random(ranks) < reliable[ids]
    given = np.where(right, 0, rng.choice([1, 1, 1, 2, 3], ranks))
    codes: dict[int, int] = {}
    rows.append((ids, [codes.setdefault(a, len(codes)) for a in given.tolist()], right))
  return _lists(rows, np.arange(sources))


def split(lists: Lists, seed: int) -> tuple[Lists, Lists, Lists]:
  """Training, validation and test questions."""
  number = len(lists.ids)
  ends = np.cumsum([round(share * number) for share in SHARES[:2]])
  if not 0 < ends[0] < ends[1] < number:
    raise UserError(f'{number} questions are too few to divide by {SHARES}: give 10 or more')
  order = np.random.default_rng([seed, 71]).permutation(number)
  train, validation, test = (lists.take(rows) for rows in np.split(order, ends))
  return train, validation, test


# Votes --------------------------------------------------------------------------------------------


def vote(lists: Lists, weights: np.ndarray, votes: int) -> np.ndarray:
  """Whether the answer with most weight among the first `votes` that have any is right, bool[N].

  Args:
    lists: of N questions.
    weights: float[N, M], >= 0; 0 leaves a source out. Of equal answers the first one wins.
    votes: how many.
  """
  there = weights > 0
  counted = there & (np.cumsum(there, axis=1) <= votes)
  number, ranks = weights.shape
  totals = np.zeros((number, ranks))
  rows = np.arange(number)[:, None]
  np.add.at(totals, (rows, lists.answers), np.where(counted, weights, 0))
  place = np.where(counted, np.arange(ranks), ranks)
  first = np.full((number, ranks), ranks)
  np.minimum.at(first, (rows, lists.answers), place)
  best = totals.max(axis=1, keepdims=True)
  leading = (totals >= best * (1 - 1e-12)) & (first < ranks)
  winner = np.where(leading, first, ranks).argmin(axis=1)
  is_right = np.zeros((number, ranks), bool)
  np.logical_or.at(is_right, (rows, lists.answers), lists.right & (lists.ids >= 0))
  return is_right[np.arange(number), winner] & leading.any(axis=1)


def of_source(lists: Lists, values: np.ndarray) -> np.ndarray:
  """values[source] for each place of the lists; 0 where there is none, or it was there before."""
  return np.where(lists.first, values[lists.ids], 0)


# Arms ---------------------------------------------------------------------------------------------

Predict = Callable[[Lists], np.ndarray]
"""lists -> share of right answers of each question, float[N]."""


def _first_hit(train: Lists) -> Iterator[Predict]:
  yield lambda lists: vote(lists, (lists.ids >= 0).astype(float), 1)


def _majority(train: Lists) -> Iterator[Predict]:
  for votes in VOTES:
    yield lambda lists, k=votes: vote(lists, (lists.ids >= 0).astype(float), k)
    yield lambda lists, k=votes: vote(lists, lists.first.astype(float), k)


def _pruned(train: Lists, values: np.ndarray, votes: Sequence[int]) -> Iterator[Predict]:
  """Without the sources of the lowest values, each share of what is retrieved."""
  counts = np.bincount(train.ids[train.first], minlength=train.sources)
  for drop, k in itertools.product(DROPPED, votes):
    kept = valuation.kept_sources(values, counts, drop).astype(float)
    yield lambda lists, kept=kept, k=k: vote(lists, of_source(lists, kept), k)


def _leave_one_out(train: Lists) -> Iterator[Predict]:
  """Values: questions that the vote gets right with the source, less those without it."""
  for neighbors in NEIGHBORS:
    yield from _pruned(train, leave_one_out(train, neighbors), [neighbors])


def leave_one_out(train: Lists, votes: int) -> np.ndarray:
  weights, out = train.first.astype(float), np.zeros(train.sources)
  whole = vote(train, weights, votes).astype(float)
  for rank in range(train.ids.shape[1]):
    there = train.first[:, rank]
    less = weights.copy()
    less[:, rank] = 0
    np.add.at(out, train.ids[there, rank], (whole - vote(train, less, votes))[there])
  return out


def _learned(train: Lists) -> Iterator[tuple[np.ndarray, int]]:
  """(importance float[C], K) of every setting."""
  ids = jnp.asarray(np.where(train.first, train.ids, -1), jnp.int32)
  right = jnp.asarray(train.right, jnp.float32)
  for groups, neighbors, rate in itertools.product(
    (None, jnp.asarray(train.domains, jnp.int32)), NEIGHBORS, RATES
  ):
    found = valuation.learn_importance(
      ids, right, train.sources, neighbors, rate=rate, steps=STEPS, groups=groups
    )
    yield np.asarray(found, np.float64), neighbors


def _learned_pruned(train: Lists) -> Iterator[Predict]:
  for values, neighbors in _learned(train):
    yield from _pruned(train, values, [neighbors])


def _learned_drawn(train: Lists) -> Iterator[Predict]:
  """Each source is there with its chance; accuracy is the mean over draws."""
  for values, neighbors in _learned(train):

    def predict(lists, values=values, k=neighbors):
      rng = np.random.default_rng(0)
      draws = [values >= rng.random(len(values)) for _ in range(_DRAWS)]
      return np.mean([vote(lists, of_source(lists, d.astype(float)), k) for d in draws], axis=0)

    yield predict


def _learned_weights(train: Lists) -> Iterator[Predict]:
  for values, neighbors in _learned(train):
    yield lambda lists, v=values, k=neighbors: vote(lists, of_source(lists, v), k)


def accuracies(train: Lists, prior: float, groups: np.ndarray) -> np.ndarray:
  """How often each source, or its group, is right, drawn towards the mean: float[C]."""
  seen = train.first
  into = groups[train.ids[seen]]
  size = groups.max() + 1
  right = np.bincount(into, weights=train.right[seen], minlength=size)
  count = np.bincount(into, minlength=size)
  mean = right.sum() / count.sum()
  return ((right + prior * mean) / (count + prior))[groups]


def _smoothed(train: Lists) -> Iterator[np.ndarray]:
  for prior, groups in itertools.product(PRIOR, (np.arange(train.sources), train.domains)):
    yield accuracies(train, prior, groups)


def _accuracy_pruned(train: Lists) -> Iterator[Predict]:
  for values in _smoothed(train):
    yield from _pruned(train, values, NEIGHBORS)


def _accuracy_weights(train: Lists) -> Iterator[Predict]:
  for values, votes in itertools.product(_smoothed(train), VOTES):
    yield lambda lists, v=values, k=votes: vote(lists, of_source(lists, v), k)


ARMS: dict[str, Callable[[Lists], Iterator[Predict]]] = {
  'first hit': _first_hit,
  'majority': _majority,
  'leave-one-out': _leave_one_out,
  'learned and pruned': _learned_pruned,
  'learned and drawn': _learned_drawn,
  'learned as weights': _learned_weights,
  'accuracy and pruned': _accuracy_pruned,
  'accuracy as weights': _accuracy_weights,
}


class Result(NamedTuple):
  """Accuracy on test and validation questions, by seed."""

  test: list[float]
  validation: list[float]


def measure(
  lists: Lists, arm: str, seeds: Sequence[int], show: Callable[[Any], Any] = iter
) -> Result:
  """The setting that is best on validation questions, on test questions; the first of equals."""
  out = Result([], [])
  for seed in show(seeds):
    train, validation, test = split(lists, seed)
    best, chosen = -1.0, None
    for predict in ARMS[arm](train):
      reached = float(np.mean(predict(validation)))
      if reached > best:
        best, chosen = reached, predict
    out.validation.append(best)
    out.test.append(float(np.mean(chosen(test))))
  return out
