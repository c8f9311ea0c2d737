"""Which domains pull the same way: cosines between their gradients, at the end of a run.

  python -m experiments.alignment runs/first
  python -m experiments.alignment --blocks=64 runs/board/runs/uniform*

Reads `--blocks` training blocks of every domain, prints the matrix and writes alignment.json into
the run directory; the report of a comparison that holds the run then shows it. For K domains this
takes K gradients and K forward passes with a derivative; no more than one gradient is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, files
from experiments import config as config_lib
from experiments.board import ALIGNMENT
from experiments.errors import UserError

FLAGS = flags.FLAGS


def read_alignment(workdir: str | Path, blocks: int, devices: Sequence[Any] | None = None) -> dict:
  """{'domains', 'blocks', 'step', 'inner': [K][K], 'cosines': [K][K]} of the last checkpoint.

  Args:
    workdir: a run directory.
    blocks: of each domain; fewer where it has fewer.
    devices: default: all.

  Raises:
    UserError: not a run directory, or one without a checkpoint.
  """
  from experiments import checkpoints, domain_reader, train

  config = config_lib.read(workdir)
  run = train.build(config, devices)
  params = checkpoints.restore_params(workdir, run.abstract_state.params)
  inner = domain_reader.read_matrix(run.model, run.mesh, run.corpus, blocks)(params)
  norms = np.sqrt(np.diag(inner))
  steps = checkpoints.committed_steps(Path(workdir) / 'checkpoints')
  return {
    'domains': list(run.corpus.domains),
    'blocks': blocks,
    'step': steps[-1],
    'inner': inner.tolist(),
    'cosines': (inner / np.maximum(np.outer(norms, norms), 1e-30)).tolist(),
  }


def matrix_text(domains: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
  """Aligned, with two decimals."""
  width = max(6, *map(len, domains))
  head = ' ' * width + ''.join(f'  {name:>{width}}' for name in domains)
  rows = [
    f'{name:<{width}}' + ''.join(f'  {value:>{width}.2f}' for value in row)
    for name, row in zip(domains, matrix)
  ]
  return '\n'.join([head, *rows])


def main(paths: list[str]) -> None:
  if not paths:
    raise UserError('which run? python -m experiments.alignment runs/first')
  if FLAGS.blocks < 1:
    raise UserError(f'--blocks={FLAGS.blocks} must be at least 1')
  for path in paths:
    found = read_alignment(path, FLAGS.blocks)
    files.write_json(Path(path) / ALIGNMENT, found)
    print(f'{path}, step {found["step"]}: cosines between the gradients of the domains')
    print(matrix_text(found['domains'], found['cosines']), flush=True)


if __name__ == '__main__':
  flags.DEFINE_integer('blocks', 32, 'training blocks of each domain')
  cli.run(main, positional=True)
