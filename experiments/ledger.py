"""What every example went through, as Parquet: who was seen when, at which loss and weight.

`ledger/part-<first step>-<last step>.parquet`, one file between two checkpoints; docs/ledger.md
has the columns and questions to ask. No jax here.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import files
from experiments.data.corpus import Corpus
from experiments.errors import UserError

PENDING = 64  # steps that may wait for the writer; beyond that, training waits


class Ledger:
  """Collects the examples of each step in a thread of its own, and writes them at each `flush`.

  To be exact on resume, flush before saving a checkpoint: what a checkpoint has seen is then on
  disk whenever the process is killed, and what it has not seen is removed when it is restored.

  Args:
    folder: created when missing.
    corpus: tells an example's domain.
    resume_step: the step of the restored checkpoint; later rows go. 0 starts afresh.

  Raises:
    UserError: pyarrow is missing, or the folder holds parts that cannot be read or cut.
  """

  def __init__(self, folder: str | os.PathLike, corpus: Corpus, *, resume_step: int):
    self._arrow, self._parquet = _import()
    self.folder, self._corpus = Path(folder), corpus
    self._offsets = corpus.offsets('train')
    self._cut_back(resume_step)
    self._rows: list[tuple[int, Any]] = []  # (step, its rows), of the part to come
    self._error: Exception | None = None
    self._queue: queue.Queue = queue.Queue(PENDING)
    self._thread = threading.Thread(target=self._work, name='ledger', daemon=True)
    self._thread.start()

  def add(self, step: int, examples: Mapping[str, np.ndarray]) -> None:
    """Takes the examples of a step, steps in ascending order; nothing reaches the disk yet.

    Args:
      step: the optimizer step.
      examples: example_id int[B], loss and weight float[B], and target_dot float[B] if the run
        computes it. Not to be changed afterwards.
    """
    self._queue.put((step, examples))

  def flush(self) -> None:
    """Returns when all rows so far are on disk.

    Raises:
      UserError: they could not be written.
    """
    done = threading.Event()
    self._queue.put(done)
    done.wait()
    if self._error is not None:
      raise self._error

  def close(self) -> None:
    """Ends the thread. Rows since the last flush are of no checkpoint, and are dropped."""
    self._queue.put(None)
    self._thread.join()

  def _work(self) -> None:
    for item in iter(self._queue.get, None):
      try:
        if self._error is not None:
          pass  # keep taking, so that nobody waits for ever; `flush` tells
        elif isinstance(item, threading.Event):
          self._write()
        else:
          self._rows.append((item[0], self._table(*item)))
      except Exception as e:
        self._error = e
      finally:
        if isinstance(item, threading.Event):
          item.set()

  def _table(self, step: int, examples: Mapping[str, np.ndarray]) -> Any:
    arrow = self._arrow
    ids = np.asarray(examples['example_id'], np.int64)
    domains = np.searchsorted(self._offsets, ids, side='right') - 1
    names = arrow.array(self._corpus.domains, arrow.string())
    target = examples.get('target_dot')
    columns = {
      'step': arrow.array(np.full(len(ids), step, np.int32)),
      'example_id': arrow.array(ids),
      'domain': arrow.DictionaryArray.from_arrays(arrow.array(domains.astype(np.int32)), names),
      'loss': arrow.array(np.asarray(examples['loss'], np.float32)),
      'weight': arrow.array(np.asarray(examples['weight'], np.float32)),
      'target_dot': arrow.nulls(len(ids), arrow.float32())
      if target is None
      else arrow.array(np.asarray(target, np.float32)),
    }
    return arrow.table(columns)

  def _write(self) -> None:
    if not self._rows:
      return
    table = self._arrow.concat_tables([rows for _, rows in self._rows])
    self._write_part(self._rows[0][0], self._rows[-1][0], table)
    self._rows = []

  def _write_part(self, first: int, last: int, table: Any) -> None:
    with files.replacing(self.folder / f'part-{first:08}-{last:08}.parquet') as temporary:
      self._parquet.write_table(table, temporary, compression='zstd')

  def _cut_back(self, step: int) -> None:
    for path in self.folder.glob('.part-*'):
      path.unlink()
    for path in sorted(self.folder.glob('part-*.parquet')):
      name = re.fullmatch(r'part-(\d+)-(\d+)\.parquet', path.name)
      if name is None or int(name[2]) <= step:
        continue
      if int(name[1]) <= step:  # written without a checkpoint at its end
        try:
          table = self._parquet.read_table(path, filters=[('step', '<=', step)])
        except (OSError, ValueError) as e:
          raise UserError(f'cannot read {path} ({e}); delete it to go on without its rows') from e
        self._write_part(int(name[1]), step, table)
      path.unlink()


def _import() -> tuple[Any, Any]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as e:
    raise UserError(
      'config.log.ledger=True needs pyarrow: pip install pyarrow, or set it to False'
    ) from e
  return pyarrow, pyarrow.parquet
