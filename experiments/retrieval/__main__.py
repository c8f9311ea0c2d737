"""Which sources of a retrieval corpus are to be believed? Learned importance, and votes by it.

  python -m experiments.retrieval --workdir=runs/retrieval                     made-up sources
  python -m experiments.retrieval --workdir=runs/wiki --data=FOLDER --relation=currency

Every question has a ranked list of web sites and the answer that a model read from each. FOLDER
holds wikifact/{relation}.jsonl.gz and wikifact/{relation}_websites_by_domain.jsonl.gz, as published
with ragbooster. Without --data: 200 made-up sources, a quarter of them reliable.

The importance of a source is the probability v of its presence under which the expected share of
right answers among the first K is largest (learned by gradient ascent on the exact expectation).
Arms: the sources of the lowest v dropped; sources present by chance v; votes weighted by v. To
beat: the first hit; the majority of the first K; leave-one-out values in place of v; and how often
a source was right, drawn towards the mean, in place of v, which needs no learning at all.

Questions are split at random into training (40%: v), validation (20%: K, domains or sites, rate,
share to drop) and test (40%), anew for each seed. Intervals of 95% over --seeds splits, which share
questions: they say how much the split matters, not how other questions would do. Answers are
compared without case. Sources without training questions keep v = 0.5.

Two minutes on two CPU cores for 1,700 questions. Writes result.json and retrieval.png.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, files
from experiments.classify.__main__ import chosen
from experiments.errors import UserError

FLAGS = flags.FLAGS
BASES = ('majority', 'accuracy and pruned')


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/retrieval')
  if FLAGS.seeds < 2:
    raise UserError(f'--seeds={FLAGS.seeds} must be at least 2, for an interval')
  import jax
  from tqdm import tqdm

  from experiments import plots
  from experiments.retrieval import study

  folder = Path(FLAGS.workdir)
  if FLAGS.data:
    lists = study.read(Path(FLAGS.data, 'wikifact'), FLAGS.relation)
  else:
    lists = study.made_up()
  arms = chosen('arms', FLAGS.arms, study.ARMS)
  found: dict[str, Any] = {
    'data': FLAGS.relation if FLAGS.data else 'made up',
    'questions': len(lists.ids),
    'sources': lists.sources,
    'seeds': FLAGS.seeds,
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'arms': {},
  }
  for name in arms:
    show = lambda seeds, name=name: tqdm(seeds, desc=name, unit=' splits', disable=None)
    found['arms'][name] = study.measure(lists, name, range(FLAGS.seeds), show)._asdict()
    files.write_json(folder / 'result.json', found)
  with files.replacing(folder / 'retrieval.png') as picture:
    picture.write_bytes(plots.draw_png(lambda: draw(found, plots.LIGHT), plots.LIGHT))
  print(f'\n{found["questions"]:,} questions, {found["sources"]:,} sources\n')
  print(describe(found))


def describe(found: Mapping[str, Any]) -> str:
  """Accuracy, and differences to the plain arms."""
  from experiments import stats
  from experiments.verdict import format_table

  arms = found['arms']
  bases = [base for base in BASES if base in arms]
  rows = []
  for name, r in arms.items():
    pair = stats.paired(100 * np.array(r['test']), np.zeros(len(r['test'])))
    cells = [name, f'{pair.mean:.1f} ±{pair.high - pair.mean:.1f}']
    for base in bases:
      pair = stats.paired(r['test'], arms[base]['test'])
      mark = '' if pair.verdict == 'unresolved' else '*'
      half = 100 * (pair.high - pair.mean)
      cells.append('-' if name == base else f'{100 * pair.mean:+.1f} ±{half:.1f}{mark}')
    rows.append(tuple(cells))
  return format_table(('', 'accuracy, %', *(f'minus {base}' for base in bases)), rows)


def draw(found: Mapping[str, Any], theme: Any) -> Any:
  """Accuracy of every arm, a point a split."""
  from matplotlib.figure import Figure

  from experiments import plots

  figure = Figure(figsize=(7, 0.6 + 0.45 * len(found['arms'])), layout='constrained')
  ax = figure.subplots()
  for i, (name, r) in enumerate(found['arms'].items()):
    color = plots.style_of(i + 1, theme)['color']
    ax.plot(
      100 * np.array(r['test']), np.full(len(r['test']), -i), 'o', ms=4, alpha=0.5, color=color
    )
    ax.plot(100 * np.mean(r['test']), -i, '|', ms=16, mew=2, color=color, label=name)
  ax.set_yticks([-i for i in range(len(found['arms']))], list(found['arms']))
  ax.set_xlabel('accuracy on test questions, %')
  ax.grid(True, axis='x', alpha=0.3)
  return figure


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and retrieval.png')
  flags.DEFINE_string('data', '', 'folder with wikifact/; empty: made-up sources')
  flags.DEFINE_string('relation', 'currency', 'which questions of wikifact')
  flags.DEFINE_integer('seeds', 10, 'splits of the questions')
  flags.DEFINE_list('arms', [], 'some of the arms, by comma')
  cli.run(main)
