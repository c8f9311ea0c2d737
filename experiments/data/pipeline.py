"""Batches: a planner decides which blocks, and grain reads each process' rows ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from experiments.data import readers
from experiments.data.corpus import Corpus
from experiments.errors import UserError
from jaxrw.mixtures import planner as planning

Batch = dict[str, np.ndarray]
Live = Callable[[int], np.ndarray | None]
LocalRows = Callable[[int], np.ndarray]


class Closed(Exception):
  """No more batches are wanted."""


def train_iterator(
  corpus: Corpus,
  *,
  batch_size: int,
  seed: int,
  proportions: np.ndarray,
  live: Live | None = None,
  max_epochs: int = 0,
  local_rows: LocalRows = np.arange,
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
    live: (step) -> the proportions of that step, counted from 0, instead; called where batches are
      planned, and may wait there. `Closed` ends the iterator.
    max_epochs: see `Planner`.
    local_rows: (rows of a batch) -> which of them this process reads; see `mesh.local_rows`.
    prefetch: batches that a thread reads ahead; 0 reads none.

  Returns:
    An iterator of {tokens, base, domain_id, example_id, num_bytes, sampling_prob[, weights]}.

  Raises:
    UserError: while iterating, if every domain with a share has been used up.
  """
  rows = local_rows(batch_size)
  planner = planning.Planner(corpus.sizes('train'), batch_size, proportions, seed, max_epochs)
  offsets = corpus.offsets('train')

  def read(plan: planning.Plan) -> Batch:
    batch = corpus.rows('train', offsets[plan.domain[rows]] + plan.index[rows])
    batch['sampling_prob'] = plan.sampling_prob[rows]
    return batch

  plans = _Plans(planner, corpus.fingerprint, live or (lambda step: None))
  batches = plans.map(read)
  return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch))


def eval_batches(
  corpus: Corpus,
  *,
  split: str,
  batch_size: int,
  max_blocks: int = 0,
  local_rows: LocalRows = np.arange,
) -> Iterator[Batch]:
  """Batches of fixed shape that go once through the blocks of every domain, in order.

  Args:
    corpus: where blocks are read.
    split: which split.
    batch_size: rows of the global batch.
    max_blocks: of each domain, spread evenly over it; 0 takes all.
    local_rows: as in `train_iterator`.

  Yields:
    As `train_iterator`, with `sampling_prob` 1 and without `weights`. Rows beyond the end have base
    0, num_bytes 0, domain_id 0 and example_id -1.
  """
  rows = local_rows(batch_size)
  ids = _spread(corpus.sizes(split), max_blocks)
  for start in range(0, ids.size, batch_size):
    global_ids = np.full(batch_size, -1, np.int64)
    chosen = ids[start : start + batch_size]
    global_ids[: chosen.size] = chosen
    yield _rows_or_padding(corpus, split, global_ids[rows])


def domain_batch(
  corpus: Corpus,
  domain: str,
  *,
  split: str,
  blocks: int,
  multiple: int = 1,
  local_rows: LocalRows = np.arange,
) -> Batch:
  """One batch of up to `blocks` blocks spread evenly over a domain, as `eval_batches` yields them.

  Args:
    multiple: rows of padding follow until the global batch is a multiple of it.

  Raises:
    UserError: there is no such domain.
  """
  if domain not in corpus.domains:
    raise UserError(
      f'config.target.domain: no domain {domain!r}; {readers.known_domains(domain, corpus.domains)}'
    )
  index = corpus.domains.index(domain)
  size = int(corpus.sizes(split)[index])
  count = min(size, blocks)
  ids = [corpus.example_id(index, i * size // count, split) for i in range(count)]
  return padded_rows(corpus, split, ids, multiple, local_rows=local_rows)


def padded_rows(
  corpus: Corpus,
  split: str,
  example_ids: Sequence[int] | np.ndarray,
  multiple: int = 1,
  *,
  domain_ids: np.ndarray | None = None,
  local_rows: LocalRows = np.arange,
) -> Batch:
  """This process' rows of one batch of given blocks, as `eval_batches` yields them; rows of padding
  follow until the global batch is a multiple of `multiple`.

  `domain_ids`, int32[N], stand in the place of the domains that the blocks belong to.
  """
  padding = -len(example_ids) % multiple
  ids = np.append(np.asarray(example_ids, np.int64), np.full(padding, -1))
  local = local_rows(ids.size)
  batch = _rows_or_padding(corpus, split, ids[local])
  if domain_ids is not None:
    batch['domain_id'] = np.append(domain_ids, np.zeros(padding, domain_ids.dtype))[local]
  return batch


class _Plans(grain.IterDataset):
  """An endless dataset of plans; its iterator's state is the planner's."""

  def __init__(self, planner: planning.Planner, fingerprint: str, live: Live):
    super().__init__()
    self._parts = planner, fingerprint, live

  def __iter__(self) -> _PlanIterator:
    return _PlanIterator(*self._parts)


class _PlanIterator(grain.DatasetIterator):
  def __init__(self, planner: planning.Planner, fingerprint: str, live: Live):
    super().__init__()
    self._planner = planner
    self._fingerprint = fingerprint
    self._live = live
    self._state = planner.init()

  def __next__(self) -> planning.Plan:
    try:
      plan, self._state = self._planner.plan(self._state, self._live(self._state.step))
    except Closed:
      raise StopIteration from None
    except ValueError as error:
      raise UserError(f'the next batch cannot be planned: {error}') from error
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


def _spread(sizes: np.ndarray, max_blocks: int) -> np.ndarray:
  """Example ids of up to `max_blocks` evenly spaced blocks of each domain, int64[n]."""
  ids = []
  for offset, size in zip(np.cumsum(sizes) - sizes, sizes):
    count = min(size, max_blocks) if max_blocks else size
    ids.append(offset + np.arange(count) * size // max(1, count))
  return np.concatenate(ids)


def _rows_or_padding(corpus: Corpus, split: str, ids: np.ndarray) -> Batch:
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
