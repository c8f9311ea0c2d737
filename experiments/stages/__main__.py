"""Training in stages, each on the part of the pool that the present model gains most from (MATES).

  python -m experiments.stages --workdir=runs/stages                  scikit-learn's digits
  python -m experiments.stages --workdir=runs/fm --data=FOLDER        Fashion-MNIST from files

40% of the pool's labels are wrong; 100 clean examples are a reference. Before each stage but the
first, some candidates are tried out: one step of the optimizer on each alone, and the drop of the
reference loss. A ridge regression learns to foretell that from pixels and label, reads the whole
pool, and a fifth of it is drawn by score for the next stage.

Arms: the scorer, fitted anew each stage; taking the best instead of drawing; the scorer of the
first time, frozen; every candidate tried out (oracle); products of gradients in its place (first
order). Controls: everything; the reference alone, as training data; a random fifth each stage; the
smallest losses, which need no reference. All take as many steps. What scoring costs is not counted.

Each arm chooses its learning rate on two seeds; results are of --seeds others, paired, with 95%
intervals. Writes result.json and stages.png. Three minutes on two CPU cores.
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


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/stages')
  if FLAGS.seeds < 2:
    raise UserError(f'--seeds={FLAGS.seeds} must be at least 2, for an interval')
  if not 0 <= FLAGS.noise < 1:
    raise UserError(f'--noise={FLAGS.noise} must be in [0, 1)')
  folder = Path(FLAGS.workdir)
  cli.use_compilation_cache(folder / '.jax_cache')
  import jax
  from tqdm import tqdm

  from experiments import plots
  from experiments.classify import sources
  from experiments.stages import study

  settings = study.Settings(noise=FLAGS.noise)
  if FLAGS.data:
    if not Path(FLAGS.data).is_dir():
      raise UserError(f'--data={FLAGS.data} is not a folder; name one with images/ in it')
    (name,) = chosen('images', [FLAGS.images], sources.IMAGE_SETS)
    source = sources.images(Path(FLAGS.data), name)
    settings = settings._replace(pool=4000, steps=120, probes=500, held=500)
  else:
    source = sources.digits()
  arms = chosen('arms', FLAGS.arms, study.ARMS)
  found: dict[str, Any] = {
    'settings': settings._asdict() | {'data': source.name, 'seeds': FLAGS.seeds},
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'arms': {},
  }
  progress = tqdm(total=len(arms), desc='arms', disable=None)
  for name, result in study.run(source, settings, arms, FLAGS.seeds):
    found['arms'][name] = result._asdict()
    files.write_json(folder / 'result.json', found)
    progress.update()
  progress.close()
  with files.replacing(folder / 'stages.png') as picture:
    picture.write_bytes(plots.draw_png(lambda: draw(found, plots.LIGHT), plots.LIGHT))
  print('\n' + describe(found))


def describe(found: Mapping[str, Any]) -> str:
  from experiments import stats
  from experiments.verdict import format_table

  arms = found['arms']

  def number(values, scale=1.0, digits=2) -> str:
    if not values:
      return '-'
    pair = stats.paired(scale * np.array(values), np.zeros(len(values)))
    return f'{pair.mean:.{digits}f} ±{pair.high - pair.mean:.{digits}f}'

  rates = found['settings']['rates']
  rows = []
  for name, r in arms.items():
    against = '-'
    if 'random' in arms and name != 'random':
      pair = stats.paired(r['accuracy'], arms['random']['accuracy'])
      mark = '' if pair.verdict == 'unresolved' else '*'
      against = f'{100 * pair.mean:+.1f} ±{100 * (pair.high - pair.mean):.1f}{mark}'
    edge = '!' if r['rate'] in (min(rates), max(rates)) else ''
    rows.append((
      name, f'{r["rate"]:g}{edge}', number(r['accuracy'], 100, 1), against,
      number(r['clean'], 100, 0), number(r['correlation']), number(r['spread']),
    ))  # fmt: skip
  head = ('', 'rate', 'accuracy', 'minus random', 'clean, %', 'rank correlation', 'class entropy')
  return format_table(head, rows)


def draw(found: Mapping[str, Any], theme: Any) -> Any:
  """Accuracy over the share of clean labels, an arm a point, with intervals."""
  from matplotlib.figure import Figure

  from experiments import plots, stats

  figure = Figure(figsize=(7.5, 4.6), layout='constrained')
  ax = figure.subplots()
  for i, (name, r) in enumerate(found['arms'].items()):
    pair = stats.paired(r['accuracy'], np.zeros(len(r['accuracy'])))
    color = plots.style_of(i + 1, theme)['color']
    ax.errorbar(
      100 * np.mean(r['clean']), 100 * pair.mean, 100 * (pair.high - pair.mean), capsize=2,
      fmt=plots.marker_of(i), color=color, label=name,
    )  # fmt: skip
  ax.set_xlabel('% of clean labels in what the later stages saw')
  ax.set_ylabel('test accuracy, %')
  ax.grid(True, alpha=0.3)
  ax.legend(frameon=False, fontsize=8)
  return figure


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and stages.png')
  flags.DEFINE_list('arms', [], 'some of the arms, by comma')
  flags.DEFINE_integer('seeds', 10, 'paired seeds, beside the two that choose learning rates')
  flags.DEFINE_float('noise', 0.4, "share of the pool's labels to replace by another class")
  flags.DEFINE_string('data', '', 'folder with images/')
  flags.DEFINE_string('images', 'fashion_mnist', 'image set in it: fashion_mnist, mnist or cifar10')
  cli.run(main)
