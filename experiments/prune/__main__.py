"""Which part of the data to train on? Scores, subsets and controls at the same number of steps.

  python -m experiments.prune --workdir=runs/prune                  scikit-learn's digits
  python -m experiments.prune --workdir=runs/noisy --noise=0.1      a tenth of the labels wrong
  python -m experiments.prune --workdir=runs/fm --data=FOLDER       Fashion-MNIST from files
  python -m experiments.prune --workdir=runs/tfds --tfds=cifar10    an image set of TFDS

Arms: a fixed random subset; the hardest by EL2N, with and without the top tenth; the easiest, as
many of each class; large gradients; far from and near the class's mean; even over EL2N; a random
subset with a teacher that saw all data; and two controls at equal steps, a new random subset every
round (RS2) and all data on the compressed schedule. Subsets see the same number of steps as all
data, not of epochs.

Scores are the mean of five short runs. Each arm at each fraction chooses its learning rate on the
validation sets of two seeds; the accuracies are those of --seeds others, on the test set.
Differences are paired by seed, with 95% intervals, to the random subset and to RS2.

About two minutes on two CPU cores without files. Expect EL2N to beat a fixed random subset where
half is kept and to lose to it where a tenth is, and no arm to beat RS2 and the compressed schedule,
which cost nothing to choose, unless labels are wrong.

Writes result.json (settings, versions, every seed's number) and curves.png.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
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
    raise UserError('--workdir is missing: try --workdir=runs/prune')
  if FLAGS.seeds < 2:
    raise UserError(f'--seeds={FLAGS.seeds} must be at least 2, for an interval')
  if not 0 <= FLAGS.noise < 1:
    raise UserError(f'--noise={FLAGS.noise} must be in [0, 1)')
  fractions = read_fractions(FLAGS.fractions)
  folder = Path(FLAGS.workdir)
  cli.use_compilation_cache(folder / '.jax_cache')
  from experiments import plots
  from experiments.prune import study

  source, settings = opened(study)
  arms = chosen('arms', FLAGS.arms, study.ARMS)
  found: dict[str, Any] = {
    'settings': settings._asdict() | {'data': source.name, 'seeds': FLAGS.seeds},
    'versions': versions(),
    'arms': {},
  }
  for name, fraction, result, seconds in study.run(source, settings, arms, fractions, FLAGS.seeds):
    found['arms'].setdefault(name, {})[f'{fraction:g}'] = result._asdict()
    files.write_json(folder / 'result.json', found)
    print(f'{name}, {fraction:g}: {np.mean(result.accuracy):.3f} ({seconds:.0f} s)', flush=True)
  if settings.noise:
    auc = study.noise_auc(source, settings, FLAGS.seeds)
    found['noise_auc'] = {name: pair._asdict() for name, pair in auc.items()}
    files.write_json(folder / 'result.json', found)
  with files.replacing(folder / 'curves.png') as picture:
    picture.write_bytes(plots.draw_png(lambda: draw(found, plots.LIGHT), plots.LIGHT))
  print('\n' + describe(found))


def read_fractions(texts: Sequence[str]) -> list[float]:
  """Shares to keep, in (0, 1]."""
  out = []
  for text in texts:
    try:
      value = float(text)
    except ValueError:
      value = float('nan')
    if not 0 < value <= 1:
      raise UserError(f'--fractions: {text!r} must be a number in (0, 1]')
    out.append(value)
  return out


def opened(study: Any) -> tuple[Any, Any]:
  """(source, settings)."""
  from experiments.classify import sources

  large = {'examples': FLAGS.examples or 10_000, 'held': 2_000, 'steps': FLAGS.steps or 2_000}
  large['score_steps'] = 3 * large['examples'] // 64  # three epochs
  if FLAGS.tfds:
    source, sizes = sources.tfds_images(FLAGS.tfds, FLAGS.tfds_dir), large
  elif FLAGS.data:
    if not Path(FLAGS.data).is_dir():
      raise UserError(f'--data={FLAGS.data} is not a folder; name one with images/ in it')
    (name,) = chosen('images', [FLAGS.images], sources.IMAGE_SETS)
    source, sizes = sources.images(Path(FLAGS.data), name), large
  else:
    source = sources.digits()
    sizes = {'examples': FLAGS.examples or 1000, 'held': 250, 'steps': FLAGS.steps or 600}
    sizes['score_steps'] = max(1, 3 * sizes['examples'] // 64)
  return source, study.Settings(**sizes, noise=FLAGS.noise)


def versions() -> dict[str, str]:
  import jax

  return {'python': platform.python_version(), 'jax': jax.__version__}


def describe(found: dict[str, Any]) -> str:
  """Accuracies by fraction, then differences to the random subset and to RS2."""
  from experiments.verdict import format_table

  arms = found['arms']
  fractions = list(next(iter(arms.values())))
  rows = [
    (name, *(_mean(by[f]['accuracy']) + _edge(by[f], found) for f in fractions))
    for name, by in arms.items()
  ]
  parts = [format_table(('accuracy, kept:', *fractions), rows)]
  for base in ('random', 'rs2'):
    if base in arms:
      rows = [
        (name, *(_difference(by[f], arms[base][f]) for f in fractions))
        for name, by in arms.items()
        if name != base
      ]
      parts.append(format_table((f'minus {base}, points', *fractions), rows))
  if 'noise_auc' in found:
    rows = [
      (name, f'{p["mean"]:.3f} ±{p["high"] - p["mean"]:.3f}')
      for name, p in found['noise_auc'].items()
    ]
    parts.append(format_table(('score', 'AUC for wrong labels'), rows))
  return '\n\n'.join(parts)


def _mean(values: Sequence[float]) -> str:
  from experiments import stats

  interval = stats.paired(values, np.zeros(len(values)))
  return f'{interval.mean:.3f} ±{interval.high - interval.mean:.3f}'


def _edge(result: dict[str, Any], found: dict[str, Any]) -> str:
  """A mark for a rate at the end of its grid: a better one may lie outside."""
  rates = found['settings']['rates']
  return '!' if result['rate'] in (min(rates), max(rates)) else ''


def _difference(result: dict[str, Any], base: dict[str, Any]) -> str:
  from experiments import stats

  pair = stats.paired(result['accuracy'], base['accuracy'])
  sign = {'higher': '*', 'lower': '*'}.get(pair.verdict, '')
  return f'{100 * pair.mean:+.1f} ±{100 * (pair.high - pair.mean):.1f}{sign}'


def draw(found: dict[str, Any], theme: Any) -> Any:
  """Accuracy over the fraction kept, with intervals; controls dashed."""
  from matplotlib.figure import Figure

  from experiments import plots, stats

  figure = Figure(figsize=(8, 4.8), layout='constrained')
  ax = figure.subplots()
  controls = [name for name in ('random', 'rs2', 'all data') if name in found['arms']]
  index = 0
  for name, by in found['arms'].items():
    x = [float(f) for f in by]
    pairs = [stats.paired(r['accuracy'], np.zeros(len(r['accuracy']))) for r in by.values()]
    y, half = np.array([(p.mean, p.high - p.mean) for p in pairs]).T
    if name in controls:
      style = {'color': theme.ink, 'linestyle': ('-', '--', ':')[controls.index(name)]}
    else:
      index += 1 + ((index + 1) % plots.LINES_BEFORE_REPEAT == 0)  # the first color is the ink's
      style = plots.style_of(index, theme)
    ax.plot(x, y, lw=1.6, marker=plots.marker_of(index), ms=4, label=name, **style)
    ax.errorbar(x, y, half, fmt='none', ecolor=style['color'], elinewidth=1, capsize=2)
  ax.set_xscale('log')
  ax.set_xticks(x, [f'{100 * value:g}%' for value in x])
  ax.set_xticks([], minor=True)
  ax.set_xlabel('share of the training set kept')
  ax.set_ylabel('test accuracy')
  ax.grid(True, alpha=0.3)
  ax.legend(frameon=False, fontsize=8, loc='lower right')
  return figure


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and curves.png')
  flags.DEFINE_list('arms', [], 'some of the arms, by comma')
  flags.DEFINE_list('fractions', ['0.03', '0.1', '0.25', '0.5', '0.75'], 'shares to keep')
  flags.DEFINE_integer('seeds', 5, 'paired seeds, beside the two that choose learning rates')
  flags.DEFINE_float('noise', 0.0, 'share of training labels to replace by another class')
  flags.DEFINE_integer('steps', 0, 'of training; 0: 600, or 2000 on large image sets')
  flags.DEFINE_integer('examples', 0, 'of the training set; 0: 1000, or 10000 on large sets')
  flags.DEFINE_string('data', '', 'folder with images/')
  flags.DEFINE_string('images', 'fashion_mnist', 'image set in it: fashion_mnist, mnist or cifar10')
  flags.DEFINE_string('tfds', '', 'image set of TFDS')
  flags.DEFINE_string('tfds_dir', '', 'where TFDS keeps it, if elsewhere than usual')
  cli.run(main)
