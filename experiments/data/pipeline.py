"""Batches: a planner decides which blocks, and grain reads each process' rows ahead of time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from experiments.data import readers
from experiments.data.corpus import Corpus
from experiments.errors import UserError
from jaxrw.mixtures import planner as planning

Batch = dict[str, np.ndarray]


class Planned(NamedTuple):
  """What a whole run will draw from one domain."""

  rows: float
  epochs: float


def parse_mixture(text: str, domains: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
  """Proportions of the domains, float64[K] with sum 1.

  Args:
    text: 'uniform', 'natural' (by number of blocks), or 'web=0.5,code=0.5', where domains that are
      not named get nothing and the sum need not be 1.
    domains: names in order.
    sizes: blocks of each domain.

  Raises:
    UserError: if the text does not parse, names an unknown or empty domain, or sums to 0.
  """
  if text == 'uniform':
    weights = np.ones(len(domains))
  elif text == 'natural':
    weights = np.asarray(sizes, np.float64)
  else:
    weights = _named_weights(text, domains)
  for domain, weight, size in zip(domains, weights, sizes):
    if weight > 0 and size < 1:
      raise UserError(f"data.mixture='{text}': domain '{domain}' has no blocks; leave it out")
  if weights.sum() <= 0:
    raise UserError(f"data.mixture='{text}' sums to 0; give some domain a positive share")
  return weights / weights.sum()


def proportions(data_config: Any, corpus: Corpus) -> np.ndarray:
  """The proportions that `data_config.mixture` asks for, float64[K]."""
  return parse_mixture(data_config.mixture, corpus.domains, corpus.sizes('train'))


def planned_examples(
  corpus: Corpus, *, batch_size: int, total_steps: int, proportions: np.ndarray
) -> dict[str, Planned]:
  """Expected rows and epochs of each domain over a run, for a dry run."""
  sizes = corpus.sizes('train')
  planner = planning.Planner(sizes, batch_size, proportions, seed=0)
  rows = planner.expected_counts(total_steps)
  return {
    domain: Planned(float(n), float(n / size))
    for domain, n, size in zip(corpus.domains, rows, sizes)
  }


def train_iterator(
  corpus: Corpus,
  *,
  batch_size: int,
  seed: int,
  proportions: np.ndarray,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """Endless training batches: this process' rows of each global batch.

  `get_state()` returns a JSON-able dict that stands for the last batch handed out, whatever has
  been read ahead; it is the same on every process, and `set_state` takes it under any number of
  processes.

  Args:
    corpus: where blocks are read.
    batch_size: rows of the global batch.
    seed: of the plan.
    proportions: of the domains, float[K].
    process_index, process_count: this process reads the `process_index`-th of `process_count` equal
      parts of the rows.
    prefetch: batches that a thread reads ahead; 0 reads none.

  Returns:
    An iterator of {tokens, base, domain_id, example_id, num_bytes, sampling_prob[, weights]}.

  Raises:
    UserError: if the rows do not divide evenly among the processes.
  """
  rows = _local_rows(batch_size, process_index, process_count)
  planner = planning.Planner(corpus.sizes('train'), batch_size, proportions, seed)
  offsets = corpus.offsets('train')

  def read(plan: planning.Plan) -> Batch:
    batch = corpus.rows('train', offsets[plan.domain[rows]] + plan.index[rows])
    batch['sampling_prob'] = plan.sampling_prob[rows]
    return batch

  plans = _Plans(planner, corpus.fingerprint)
  batches = plans.map(read)
  return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch))


def eval_batches(
  corpus: Corpus,
  *,
  split: str,
  batch_size: int,
  max_blocks: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Batches of fixed shape that go once through the blocks of every domain, in order.

  Args:
    corpus: where blocks are read.
    split: which split.
    batch_size: rows of the global batch.
    max_blocks: of each domain, spread evenly over it; 0 takes all.
    process_index, process_count: as in `train_iterator`.

  Yields:
    As `train_iterator`, with `sampling_prob` 1 and without `weights`. Rows beyond the end have base
    0, num_bytes 0, domain_id 0 and example_id -1.
  """
  rows = _local_rows(batch_size, process_index, process_count)
  ids = _spread(corpus.sizes(split), max_blocks)
  for start in range(0, ids.size, batch_size):
    global_ids = np.full(batch_size, -1, np.int64)
    chosen = ids[start : start + batch_size]
    global_ids[: chosen.size] = chosen
    yield _padded_rows(corpus, split, global_ids[rows])


def domain_batch(
  corpus: Corpus,
  domain: str,
  *,
  split: str,
  blocks: int,
  multiple: int = 1,
  process_index: int = 0,
  process_count: int = 1,
) -> Batch:
  """One batch of up to `blocks` blocks spread evenly over a domain, as `eval_batches` yields them.

  Args:
    multiple: rows of padding follow until the global batch is a multiple of it.

  Raises:
    UserError: there is no such domain.
  """
  if domain not in corpus.domains:
    raise UserError(f'no domain {domain!r}; {readers.known_domains(domain, corpus.domains)}')
  index = corpus.domains.index(domain)
  size = int(corpus.sizes(split)[index])
  count = min(size, blocks)
  ids = [corpus.example_id(index, i * size // count, split) for i in range(count)]
  ids += [-1] * (-count % math.lcm(multiple, process_count))
  rows = _local_rows(len(ids), process_index, process_count)
  return _padded_rows(corpus, split, np.asarray(ids, np.int64)[rows])


class _Plans(grain.IterDataset):
  """An endless dataset of plans; its iterator's state is the planner's."""

  def __init__(self, planner: planning.Planner, fingerprint: str):
    super().__init__()
    self._planner = planner
    self._fingerprint = fingerprint

  def __iter__(self) -> _PlanIterator:
    return _PlanIterator(self._planner, self._fingerprint)


class _PlanIterator(grain.DatasetIterator):
  def __init__(self, planner: planning.Planner, fingerprint: str):
    super().__init__()
    self._planner = planner
    self._fingerprint = fingerprint
    self._state = planner.init()

  def __next__(self) -> planning.Plan:
    plan, self._state = self._planner.plan(self._state)
    return plan

  def get_state(self) -> dict[str, Any]:
    return {'corpus': self._fingerprint, **planning.state_to_dict(self._state)}

  def set_state(self, state: Mapping[str, Any]) -> None:
    if state['corpus'] != self._fingerprint:
      raise UserError(
        f'the checkpoint was made with other data (corpus {state["corpus"][:12]}, now '
        f'{self._fingerprint[:12]}); restore the data or start in a new workdir'
      )
    self._state = planning.state_from_dict(state)


def _named_weights(text: str, domains: Sequence[str]) -> np.ndarray:
  weights = np.zeros(len(domains))
  for item in text.split(','):
    name, equals, share = (part.strip() for part in item.partition('='))
    if not equals:
      raise UserError(
        f"data.mixture='{text}' does not parse at '{item}'; "
        "use 'uniform', 'natural' or 'web=0.5,code=0.5'"
      )
    if name not in domains:
      raise UserError(f"data.mixture: no domain '{name}'; {readers.known_domains(name, domains)}")
    try:
      value = float(share)
    except ValueError:
      value = np.nan
    if not np.isfinite(value) or value < 0:
      raise UserError(f"data.mixture: '{item.strip()}' needs a finite share that is not negative")
    weights[list(domains).index(name)] = value
  return weights


def _local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'batch_size={batch_size} does not divide among {process_count} processes; '
      f'use a multiple of {process_count}'
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)


def _spread(sizes: np.ndarray, max_blocks: int) -> np.ndarray:
  """Example ids of up to `max_blocks` evenly spaced blocks of each domain, int64[n]."""
  ids = []
  for offset, size in zip(np.cumsum(sizes) - sizes, sizes):
    count = min(size, max_blocks) if max_blocks else size
    ids.append(offset + np.arange(count) * size // max(1, count))
  return np.concatenate(ids)


def _padded_rows(corpus: Corpus, split: str, ids: np.ndarray) -> Batch:
  """The rows of the ids; -1 stands for a row of padding."""
  present = ids >= 0
  batch = corpus.rows(split, np.where(present, ids, 0))
  batch.pop('weights', None)
  for key in ('base', 'num_bytes', 'domain_id'):
    batch[key] = batch[key] * present.reshape((-1,) + (1,) * (batch[key].ndim - 1)).astype(
      batch[key].dtype
    )
  batch['tokens'] = np.where(present[:, None], batch['tokens'], corpus.tokenizer.eot_id)
  batch['tokens'] = batch['tokens'].astype(np.int32)
  batch['example_id'] = ids.astype(np.int32)
  batch['sampling_prob'] = np.ones(ids.size, np.float32)
  return batch
