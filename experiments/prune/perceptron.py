"""Keep the hard examples or the easy ones? It depends on how many there are: a perceptron shows it.

  python -m experiments.prune.perceptron --workdir=runs/perceptron

Labels are sign(T x) of a teacher T in d dimensions, x Gaussian. A probe at an angle to the teacher
ranks the P = alpha d examples by their distance to its border; a share of them, the nearest (hard),
the farthest (easy) or a random one, trains a student by logistic regression. The student's error is
its angle to the teacher over pi, exactly.

Expect the easy to win where data are scarce (alpha below about 6) and the hard where they abound,
there losing nothing against all examples (Sorscher et al., NeurIPS 2022); and, with a probe that is
off by --angle degrees, a floor. One minute on two CPU cores. Intervals of 95%, over --seeds.

Writes result.json and crossover.png.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, files
from experiments.errors import UserError

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/perceptron')
  if FLAGS.seeds < 2:
    raise UserError(f'--seeds={FLAGS.seeds} must be at least 2, for an interval')
  if not 0 < FLAGS.keep < 1:
    raise UserError(f'--keep={FLAGS.keep} must be between 0 and 1')
  if not 0 <= FLAGS.angle <= 90:
    raise UserError(f'--angle={FLAGS.angle} must be from 0 to 90 degrees')
  alphas = [positive(text) for text in FLAGS.alphas]
  import jax
  from tqdm import tqdm

  from experiments import plots
  from experiments.prune import teacher

  run = functools.partial(
    teacher.errors, dims=FLAGS.dims, keep=FLAGS.keep, angle=FLAGS.angle, seeds=FLAGS.seeds
  )
  found: dict[str, Any] = {
    'settings': {n: getattr(FLAGS, n) for n in ('dims', 'keep', 'angle', 'seeds')},
    'errors': {},
  }
  for i, alpha in enumerate(tqdm(alphas, desc='alphas', disable=None)):
    sides = run(jax.random.key(i), alpha)
    found['errors'][f'{alpha:g}'] = {side: v.tolist() for side, v in sides.items()}
  folder = Path(FLAGS.workdir)
  files.write_json(folder / 'result.json', found)
  with files.replacing(folder / 'crossover.png') as picture:
    picture.write_bytes(plots.draw_png(lambda: draw(found, plots.LIGHT), plots.LIGHT))
  print('\n' + describe(found))


def positive(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise UserError(f'--alphas: {text!r} must be a number above 0')
  return value


def describe(found: dict[str, Any]) -> str:
  """Errors in %, by alpha; hard minus easy, paired."""
  from experiments import stats
  from experiments.prune.teacher import SIDES
  from experiments.verdict import format_table

  def number(values) -> str:
    pair = stats.paired(100 * np.array(values), np.zeros(len(values)))
    return f'{pair.mean:.2f} ±{pair.high - pair.mean:.2f}'

  rows = []
  for alpha, sides in found['errors'].items():
    difference = np.array(sides['hard']) - np.array(sides['easy'])
    rows.append((alpha, *(number(sides[side]) for side in SIDES), number(difference)))
  return format_table(('alpha', *(f'{side}, %' for side in SIDES), 'hard - easy'), rows)


def draw(found: dict[str, Any], theme: Any) -> Any:
  """Error over the number of examples kept, on logarithmic axes."""
  from matplotlib.figure import Figure

  from experiments import plots
  from experiments.prune.teacher import SIDES

  figure = Figure(figsize=(6.5, 4.4), layout='constrained')
  ax = figure.subplots()
  alphas = [float(alpha) for alpha in found['errors']]
  for i, side in enumerate(SIDES):
    y = [100 * np.mean(sides[side]) for sides in found['errors'].values()]
    ax.plot(alphas, y, marker=plots.marker_of(i), ms=4, label=side, **plots.style_of(i + 1, theme))
  ax.set_xscale('log', base=2)
  ax.set_yscale('log')
  ax.set_xlabel('examples for each dimension, before pruning')
  ax.set_ylabel("the student's error, %")
  ax.grid(True, alpha=0.3)
  ax.legend(frameon=False)
  return figure


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and crossover.png')
  flags.DEFINE_list('alphas', ['1', '2', '4', '8', '16', '32'], 'examples for each dimension')
  flags.DEFINE_float('keep', 0.3, 'share to keep')
  flags.DEFINE_float('angle', 0.0, 'of the probe to the teacher, in degrees')
  flags.DEFINE_integer('dims', 100, 'of the examples')
  flags.DEFINE_integer('seeds', 10, 'teachers and their examples')
  cli.run(main)
