"""How fast batches reach the device, and what thousands of domains cost: one process, one thread.

  python -m experiments.bench.data_speed --domains=8,4096 --out=runs/data_speed.json

Writes a folder of that many small domains, prepares it like any corpus and reads batches as a run
does, with proportions that are others in every step. Prints, for each number of domains, tokens per
second of CPU time (all threads counted, so per core), planning alone as well, and what a reader of
that many domains holds: threads, open files and memory.
"""

from __future__ import annotations

import json
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import cli, files
from experiments.errors import UserError

FLAGS = flags.FLAGS
WORDS = 'a data weight that is the same number on one device and on many survives'.split()


class Speed(NamedTuple):
  """What one number of domains costs."""

  domains: int
  blocks: int
  tokens_per_second: float  # of CPU time, planned, read and put on the device
  plans_per_second: float
  threads: int
  open_files: int
  megabytes: float  # peak, of the whole process


def write_folder(folder: Path, domains: int, characters: int) -> None:
  """`domains` domains with a training and a validation file each."""
  folder.mkdir(parents=True)
  for i in range(domains):
    rng = random.Random(i)
    for split, size in (('train', characters), ('validation', 64)):
      text = ' '.join(rng.choices(WORDS, k=size // 5))
      (folder / f'd{i:05d}.{split}.jsonl').write_text(json.dumps({'text': text}) + '\n')


def measure(data_config: Any, batch_size: int, batches: int) -> Speed:
  """Reads `batches` batches, with another mixture in every step."""
  import jax

  from experiments import mesh as mesh_lib
  from experiments.data import corpus as corpus_lib
  from experiments.data import pipeline
  from jaxrw.mixtures import Planner

  corpus = corpus_lib.open_corpus(data_config)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  rng, count = np.random.default_rng(0), len(corpus.domains)
  live = rng.dirichlet(np.ones(count), size=16)
  start = np.full(count, 1 / count)
  data = pipeline.train_iterator(
    corpus,
    batch_size=batch_size,
    seed=0,
    proportions=start,
    live=lambda step: live[step % 16],
    prefetch=data_config.prefetch,
  )
  put = lambda: jax.block_until_ready(mesh_lib.to_global(next(data), mesh))
  put()
  began = time.process_time()
  for _ in range(batches):
    put()
  seconds = time.process_time() - began
  threads, open_files = threading.active_count(), len(os.listdir('/proc/self/fd'))
  planner = Planner(corpus.sizes('train'), batch_size, start, seed=0)
  state, began = planner.init(), time.process_time()
  for step in range(batches):
    _, state = planner.plan(state, live[step % 16])
  return Speed(
    domains=count,
    blocks=int(corpus.sizes('train').sum()),
    tokens_per_second=batches * batch_size * corpus.seq_len / seconds,
    plans_per_second=batches / (time.process_time() - began),
    threads=threads,
    open_files=open_files,
    megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  )


def speed_text(rows: Sequence[Speed]) -> str:
  """An aligned table."""
  head = ('domains', 'blocks', 'tokens/s of a core', 'plans/s', 'threads', 'open files', 'MB')
  cells = [
    (
      f'{r.domains:,}',
      f'{r.blocks:,}',
      f'{r.tokens_per_second:,.0f}',
      f'{r.plans_per_second:,.0f}',
      str(r.threads),
      str(r.open_files),
      f'{r.megabytes:,.0f}',
    )
    for r in rows
  ]
  widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
  return '\n'.join('  '.join(f'{c:>{w}}' for c, w in zip(row, widths)) for row in (head, *cells))


def main(_: list[str]) -> None:
  from configs import common

  try:
    counts = [int(item) for item in FLAGS.domains.split(',')]
  except ValueError:
    counts = [0]
  if min(counts) < 1:
    raise UserError(f'--domains={FLAGS.domains}: write numbers of domains such as 8,4096')
  rows = []
  for count in counts:
    with tempfile.TemporaryDirectory() as folder:
      characters = max(FLAGS.characters // count, 2 * FLAGS.seq_len)
      write_folder(Path(folder) / 'text', count, characters)
      data = common.base_config().data
      data.update(source='folder', path=f'{folder}/text', root=f'{folder}/root')
      data.seq_len = FLAGS.seq_len
      rows.append(measure(data, FLAGS.batch_size, FLAGS.batches))
  print(speed_text(rows))
  if FLAGS.out:
    files.write_json(FLAGS.out, [row._asdict() for row in rows])


if __name__ == '__main__':
  flags.DEFINE_string('domains', '8,4096', 'numbers of domains')
  flags.DEFINE_integer('characters', 8_000_000, 'of text in all domains together')
  flags.DEFINE_integer('seq_len', 512, 'tokens of a block')
  flags.DEFINE_integer('batch_size', 64, 'blocks of a batch')
  flags.DEFINE_integer('batches', 200, 'to read')
  flags.DEFINE_string('out', '', 'JSON file to write')
  cli.run(main)
