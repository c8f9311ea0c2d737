"""Weightings on small classification tasks, each against the plain mean of the losses.

  python -m experiments.classify --workdir=runs/classify                     digits, generated data
  python -m experiments.classify --workdir=runs/real --data=FOLDER           files you have
  python -m experiments.classify --workdir=runs/tfds --tfds=fashion_mnist    a TFDS image set
  python -m experiments.classify --workdir=runs/one --tasks=noisy_labels --arms=linupper --seeds=5

Tasks: long_tail (classes whose sizes fall exponentially; the test is balanced), noisy_labels (40%
wrong, in validation too; the test is clean), worst_group (a spurious feature), fairness (an income
table), semi_supervised (four labels a class), rare_events (1 to 3% positive).

Every arm, the plain mean included, gets the same grid of learning rates and picks one on the
validation sets of three seeds; the claims are then tested on `--seeds` others, paired. A claim is
reproduced if the 95% interval of the difference lies on the side the method's authors say, opposite
if on the other, not reproduced if it holds 0. Where there is no difference, one claim of 40 is
reproduced by chance.

FOLDER has images/fashion_mnist, images/mnist (the four idx .gz) or images/cifar10 (two npz of JPEG
streams), tabular/adult.{train,test}.csv.gz and tabular/wine_quality.csv.gz; worst_group needs no
files. Images become at most 256 averages over squares of pixels, for the perceptron's sake.

On two CPU cores about 8 minutes without files, 15 with all of them. Expect losses made for noise
(generalized cross entropy, co-teaching, a small negative tilt) to win 8 points of accuracy under it
and emphasis on high losses to lose up to 23; Group DRO to win 19 points in the worst group.

Writes result.json (settings, all seeds' numbers, chosen rates, versions) after every arm, and
board.png. Called again, it trains only the arms that result.json lacks.
"""

from __future__ import annotations

import difflib
import hashlib
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from experiments import cli, files
from experiments.errors import UserError

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/classify')
  if FLAGS.seeds < 2:
    raise UserError(f'--seeds={FLAGS.seeds} must be at least 2, for an interval')
  if FLAGS.steps < 0:
    raise UserError(f'--steps={FLAGS.steps} must be positive; leave it out for what the task has')
  folder = Path(FLAGS.workdir)
  cli.use_compilation_cache(folder / '.jax_cache')
  from experiments import plots
  from experiments.classify import board

  path, opened = folder / 'result.json', open_tasks()
  arms = chosen('arms', FLAGS.arms, list(dict.fromkeys(c.arm for c in board.CLAIMS)))
  names = chosen('tasks', FLAGS.tasks, list(opened))
  claims = [c for c in board.CLAIMS if c.arm in arms and c.task in names]
  if not claims:
    raise UserError(f'no claim is about --arms={",".join(arms)} on --tasks={",".join(names)}')
  known = before(path)
  results = {name: known.get(name, {}) for name in opened}
  for name in dict.fromkeys(claim.task for claim in claims):
    (task, source), done = opened[name], results[name]
    task = task._replace(steps=FLAGS.steps or task.steps)
    missing = [arm for arm in board.arms_of(name, claims) if arm not in done]
    for arm, result in board.run_task(task, source(), missing, FLAGS.seeds) if missing else ():
      done[arm] = result
      found = {'settings': settings(), **board.record(results)}
      files.write_json(path, found)
      print(f'{name}: {arm} ({result.seconds:.0f} s)', flush=True)
  found = {'settings': settings(), **board.record(results)}
  with files.replacing(folder / 'board.png') as picture:
    picture.write_bytes(plots.draw_png(lambda: board.draw(found, plots.LIGHT), plots.LIGHT))
  print('\n' + board.describe(found))


def before(path: Path) -> dict:
  """Results that the folder has from a run that was ended, or asked for other arms: {task: {arm}}.

  Raises:
    UserError: they were made with other settings.
  """
  from experiments.classify import board

  if not path.exists():
    return {}
  found = files.read_json(path)
  if changed := [key for key, value in settings().items() if found['settings'][key] != value]:
    raise UserError(
      f'{path} was made with another {changed[0]} ({found["settings"][changed[0]]}): '
      'choose another --workdir'
    )
  return {
    task: {name: board.Result(**arm) for name, arm in arms.items()}
    for task, arms in found['tasks'].items()
  }


def open_tasks():
  """The tasks there are data for."""
  from experiments.classify import sources, tasks

  folder = Path(FLAGS.data)
  if FLAGS.data and not folder.is_dir():
    raise UserError(
      f'--data={FLAGS.data} is not a folder; name one with images/ and tabular/ in it, or leave it '
      'out for data that need no files'
    )
  if FLAGS.tfds:
    return tasks.of_images(lambda: sources.tfds_images(FLAGS.tfds, FLAGS.tfds_dir))
  if FLAGS.data:
    (name,) = chosen('images', [FLAGS.images], sources.IMAGE_SETS)
    return tasks.of_images(lambda: sources.images(folder, name)) | tasks.of_tables(folder)
  return tasks.offline()


def chosen(flag: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
  """`names`, or all that are known if there are none.

  Raises:
    UserError: an unknown name, with the nearest known one.
  """
  known = list(known)
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(known)}'
      raise UserError(f'--{flag}: {name!r} is not one of them; {hint}')
  return list(names) or known


def settings() -> dict:
  import jax

  names = ('seeds', 'steps', 'images', 'tfds')
  versions = {'python': platform.python_version(), 'jax': jax.__version__}
  # The folder's path would be of no use to others; results of another folder are still told apart.
  where = '|'.join(str(Path(f).resolve()) if f else '' for f in (FLAGS.data, FLAGS.tfds_dir))
  data = hashlib.sha256(where.encode()).hexdigest()[:12] if where != '|' else ''
  return {name: FLAGS[name].value for name in names} | {'data': data, **versions}


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and board.png')
  flags.DEFINE_list('tasks', [], 'some of the tasks, by comma')
  flags.DEFINE_list(
    'arms', [], 'some of the arms, by comma; what they are held against comes along'
  )
  flags.DEFINE_integer('seeds', 10, 'paired seeds, beside the three that choose learning rates')
  flags.DEFINE_integer('steps', 0, 'of training; 0: 500, or 1000 on large image sets')
  flags.DEFINE_string('data', '', 'folder with images/ and tabular/')
  flags.DEFINE_string('images', 'fashion_mnist', 'image set in it: fashion_mnist, mnist or cifar10')
  flags.DEFINE_string('tfds', '', 'image set of TFDS')
  flags.DEFINE_string('tfds_dir', '', 'where TFDS keeps it, if elsewhere than usual')
  cli.run(main)
