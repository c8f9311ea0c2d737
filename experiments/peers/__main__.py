"""Our functions beside those of other packages: the same input, both timed, the answers compared.

  python -m experiments.peers --workdir=runs/peers                         all cases
  python -m experiments.peers --workdir=runs/peers --cases=knn_shapley
  python -m experiments.peers --workdir=runs/peers --corpus=FOLDER         DSIR on your jsonl files

Cases:
  knn_shapley   exact values of 2,000 examples by 500 test points      pyDVL 0.10.0
  knn_shapley_slice   the same by 50 test points                       dattri 0.3.0
  tmc_shapley   80 points, logistic regression, 12 random orders       pyDVL 0.10.0
  tmc_shapley_truncated   the same, an order given up near the end     pyDVL 0.10.0
  dsir          hashed n-grams: counts, then log weights               data-selection 1.0.3
  dsir_large    the same for 84 MB instead of 4.2                      data-selection 1.0.3
  retrieval     a gradient of 20,000 queries x 100 ranks, K = 20       ragbooster 0.1.1
  ekfac         influence of 512 pieces of text in a small GPT         kronfluence 1.0.1
  retrieval_large   ten steps of 1,000,000 x 100 (100M items); ours alone, needs 3 GB

A peer runs in a virtual environment of its own, under WORKDIR/environments, which is made when it
is missing (a minute each; a few hundred MB, but 6 GB each for dattri and kronfluence, which bring
torch). Its imports are not timed. Ours has two times: with compilation, and the second call. Ratios
are to be believed on the machine and in the run they come from. Each in one process; five minutes
on two CPU cores once the environments are there.

Writes result.json (versions, all times, differences of the answers).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from absl import flags

from experiments import cli, files
from experiments.classify.__main__ import chosen
from experiments.errors import UserError

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/peers')
  from experiments.peers import cases
  from experiments.verdict import format_table

  folder = Path(FLAGS.workdir)
  results = {}
  for name in chosen('cases', FLAGS.cases, cases.CASES):
    print(f'{name} ...', flush=True)
    results[name] = cases.run(name, folder, Path(FLAGS.corpus) if FLAGS.corpus else None)
    files.write_json(folder / 'result.json', {'versions': versions(), 'cases': results})
  rows = [
    (
      name,
      r['peer'],
      *(
        f'{r[key]:.3g}' if r[key] is not None else '-' for key in ('peer_s', 'first_s', 'second_s')
      ),
      f'{r["peer_s"] / r["second_s"]:.3g}x' if r['peer_s'] else '-',
      f'{r["difference"]:.1e}' if r['difference'] is not None else '-',
      r['note'],
    )
    for name, r in results.items()
  ]
  head = ('case', 'peer', 'peer, s', 'ours first, s', 'second, s', 'ratio', 'difference', '')
  print('\n' + format_table(head, rows))


def versions() -> dict[str, str]:
  import jax
  import numpy as np

  return {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'numpy': np.__version__,
    'devices': str(jax.devices()),
    'cores': str(os.cpu_count()),
  }


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and the environments')
  flags.DEFINE_list('cases', [], 'some of the cases, by comma')
  flags.DEFINE_string('corpus', '', 'folder of .jsonl or .jsonl.gz files with "text", for dsir')
  cli.run(main)
