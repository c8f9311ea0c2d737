"""What are examples worth? Values and attributions against what training without them does.

  python -m experiments.value --workdir=runs/value --parts=shapley         digits, two minutes
  python -m experiments.value --workdir=runs/value --parts=text            a small GPT, 40 minutes
  python -m experiments.value --workdir=runs/value --parts=unlearn         digits, two minutes
  python -m experiments.value --workdir=runs/value --parts=labels --data=FOLDER

shapley  100 examples of scikit-learn's digits, a fifth of them with a wrong label, softmax
         regression. TMC-Shapley, Beta(16,1) and Banzhaf values with about the same number of fits,
         leave-one-out, G-Shapley, in-run Shapley, KNN-Shapley, and two controls: the training loss
         and chance. AUC for wrong labels; test accuracy after the lowest, or highest, are taken.
text     a small GPT on 512 pieces of text of four domains (the embedded corpus, or --corpus), and
         again without random parts of it. Scores for each of eight held-out targets: metagradients,
         EK-FAC influence, TRAK, TracIn, products of gradients, and two controls without a model:
         overlap of trigrams, and the same domain. The linear datamodeling score (LDS): rank
         correlation of the foretold with the actual rise of the target's loss, for the same run and
         for runs with other seeds; and the cost in training runs.
unlearn  40 of 1,000 digits, random ones or neighbors, are to be forgotten by 100 small networks.
         KLoM: how far the log odds of forgotten, kept and new examples are from those of 100
         networks that were trained without; 100 more of these have 0.35. Gradient ascent,
         fine-tuning, and outputs foretold by influence; settings are chosen on other forget sets.
labels   label errors in the test sets of MNIST and CIFAR-10, by cross-validated probabilities, in a
         folder FOLDER/label_errors (those of cleanlab/label-errors).

Intervals are of 95%, over --seeds (labels: over examples drawn anew). Expect Shapley values to find
wrong labels, leave-one-out not to; metagradients to foretell the run they come from well
where little is left out, and runs with other seeds no better than EK-FAC does; influence to beat
gradient ascent at forgetting.

Writes result.json, removal.png, foretold.png and forgotten.png; of text also a file for each seed,
with which the same command goes on after a kill.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, files
from experiments.classify.__main__ import chosen
from experiments.errors import UserError

FLAGS = flags.FLAGS
PARTS = ('shapley', 'text', 'unlearn', 'labels')


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/value')
  if FLAGS.seeds < 2:
    raise UserError(f'--seeds={FLAGS.seeds} must be at least 2, for an interval')
  parts = chosen('parts', FLAGS.parts, PARTS)
  if 'labels' in parts and not (Path(FLAGS.data, 'label_errors').is_dir() and FLAGS.data):
    raise UserError(f'--data={FLAGS.data} has no folder label_errors, which --parts=labels needs')
  folder = Path(FLAGS.workdir)
  cli.use_compilation_cache(folder / '.jax_cache')
  import jax

  known = folder / 'result.json'
  found = files.read_json(known) if known.exists() else {}
  found['versions'] = {'python': platform.python_version(), 'jax': jax.__version__}
  runs = {'shapley': shapley, 'text': text, 'unlearn': unlearn, 'labels': labels}
  for part in parts:
    found[part] = runs[part](folder)
    files.write_json(known, found)
    print('\n' + TABLES[part](found[part]))


def shapley(folder: Path) -> dict[str, Any]:
  from tqdm import tqdm

  from experiments.classify import sources
  from experiments.value import players

  source, settings = sources.digits(), players.Settings()
  if FLAGS.quick:
    settings = settings._replace(players=30, orders=4)
  seeds = range(FLAGS.seeds)
  out: dict[str, Any] = {
    'settings': settings._asdict(),
    'all': players.everything(source, settings, seeds),
    'methods': {},
  }
  for name in tqdm(players.METHODS, desc='values', unit=' methods', disable=None):
    out['methods'][name] = players.measure(source, settings, seeds, name)._asdict()
  _picture(folder / 'removal.png', lambda theme: draw_removal(out, theme))
  return out


def text(folder: Path) -> dict[str, Any]:
  from tqdm import tqdm

  from configs import lm
  from experiments.data import readers
  from experiments.value import text as study

  config = lm.get_config(f'path={FLAGS.corpus}' if FLAGS.corpus else '')
  settings = study.Settings()
  if FLAGS.quick:
    settings = settings._replace(examples=64, steps=8, batch=16, subsets=3, target_size=4, sketch=8)
  trainer = study.Trainer(settings, study.read(readers.open_source(config.data), settings))
  truths, scored, cost = [], {name: [] for name in study.METHODS}, {}
  for seed in range(FLAGS.seeds):
    show = lambda masks, seed=seed: tqdm(
      masks, desc=f'training without, seed {seed}', unit=' runs', disable=None
    )
    found = _kept(
      folder / 'text' / f'{seed}.npz',
      f'{settings} {trainer.data.train.tolist()} {trainer.data.targets.tolist()}',
      lambda seed=seed, show=show: study.one_seed(trainer, seed, show),
    )
    truths.append(study.Truth(**{name: found[name] for name in study.Truth._fields}))
    for name in study.METHODS:
      scored[name].append(found[f'scores {name}'])
      cost[name] = float(found[f'cost {name}'])
  out: dict[str, Any] = {
    'settings': settings._asdict(),
    'domains': trainer.data.names,
    'targets': len(trainer.data.targets),
    'target_losses': [t.whole.tolist() for t in truths],
    'mean_rise': {
      f'{share:g}': float(np.mean([t.rise[t.share == share].mean() for t in truths]))
      for share in settings.left_out
    },
    'methods': {},
  }
  for name in study.METHODS:
    by: dict[str, Any] = {'cost_in_runs': cost[name], 'same_run': {}, 'other_runs': {}}
    for share in settings.left_out:
      pairs = list(zip(scored[name], truths))
      by['same_run'][f'{share:g}'] = [study.agreement(v, t, share) for v, t in pairs]
      by['other_runs'][f'{share:g}'] = [
        study.agreement(v, study.others(truths, i), share) for i, v in enumerate(scored[name])
      ]
    out['methods'][name] = by
  _picture(folder / 'foretold.png', lambda theme: draw_foretold(out, theme))
  return out


def _kept(path: Path, made_of: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What `make` gives; read from `path` if it was made of the same before."""
  import hashlib

  stamp = hashlib.sha256(made_of.encode()).hexdigest()
  if path.exists():
    found = files.read_arrays(path)
    if str(found.pop('stamp')) == stamp:
      return found
  found = make()
  files.write_arrays(path, found | {'stamp': np.array(stamp)})
  return found


def unlearn(folder: Path) -> dict[str, Any]:
  from tqdm import tqdm

  from experiments.classify import sources
  from experiments.value import unlearn as study

  source, settings = sources.digits(), study.Settings()
  if FLAGS.quick:
    settings = settings._replace(models=4, steps=20, steps_after=(2,), rates=(1e-4,), points=20)
  out: dict[str, Any] = {'settings': settings._asdict(), 'kinds': {}}
  for kind in study.KINDS:
    show = lambda problems, kind=kind: tqdm(
      problems, desc=f'training, {kind}', unit=' forget sets', disable=None
    )
    arms = study.study(source, settings, kind, FLAGS.seeds, show)
    out['kinds'][kind] = {name: result._asdict() for name, result in arms}
  _picture(folder / 'forgotten.png', lambda theme: draw_forgotten(out, theme))
  return out


def labels(folder: Path) -> dict[str, Any]:
  from experiments.value import label_errors as study

  out = {}
  for name in study.SETS:
    read = study.read(Path(FLAGS.data, 'label_errors'), name)
    out[name] = {
      'suspects': len(read.suspects),
      'errors': int(read.wrong.sum()),
      'scores': {score: study.measure(read, score)._asdict() for score in study.SCORES},
    }
  return out


# Tables -------------------------------------------------------------------------------------------


def describe_shapley(found: Mapping[str, Any]) -> str:
  from experiments.verdict import format_table

  shares = [f'{100 * share:g}%' for share in found['settings']['taken']]
  head = ('', 'fits', 'AUC, wrong labels', *(f'lowest {s}' for s in shares), 'highest 20%')
  rows = []
  for name, r in found['methods'].items():
    lowest, highest = np.array(r['lowest_taken']), np.array(r['highest_taken'])
    rows.append((
      name, f'{np.mean(r["fits"]):,.0f}', interval(r['auc'], 3),
      *(interval(100 * column, 1) for column in lowest.T), interval(100 * highest[:, 1], 1),
    ))  # fmt: skip
  everything = interval(100 * np.array(found['all']), 1)
  return f'{format_table(head, rows)}\n\nTest accuracy with all examples: {everything}'


def describe_text(found: Mapping[str, Any]) -> str:
  from experiments.verdict import format_table

  shares = [f'{share:g}' for share in found['settings']['left_out']]
  head = ['', 'cost, runs']
  head += [
    f'{kind}, {100 * float(s):g}% out' for kind in ('same run', 'other runs') for s in shares
  ]
  rows = []
  for name, r in found['methods'].items():
    rows.append((
      name, f'{r["cost_in_runs"]:.1f}',
      *(interval(r[kind][s], 2) for kind in ('same_run', 'other_runs') for s in shares),
    ))  # fmt: skip
  targets = found['targets']
  return (
    f'{format_table(tuple(head), rows)}\n\nLDS; costs are of scores for all {targets} targets, in '
    'matrix products of a training run.'
  )


def describe_unlearn(found: Mapping[str, Any]) -> str:
  from experiments.value import unlearn as study
  from experiments.verdict import format_table

  rows = []
  for kind, arms in found['kinds'].items():
    influence = np.array(arms['influence, as it is']['mean'])[:, 0]
    for i, (name, r) in enumerate(arms.items()):
      mean, high = np.array(r['mean']), np.array(r['high'])
      chosen = ' '.join(f'{key} {value:g}' for key, value in r['setting'].items() if value)
      rows.append((
        '' if i else kind, name, chosen, f'{r["cost"]:.2f}', *(interval(v, 2) for v in mean.T),
        interval(high[:, 0], 2), interval(influence - mean[:, 0], 2),
      ))  # fmt: skip
  head = (
    '', '', 'chosen', 'cost, runs', *study.POINTS, 'forgotten, 95th percentile',
    'forgotten, influence minus this',
  )  # fmt: skip
  return f'{format_table(head, rows)}\n\nKLoM; costs are gradients of examples, in training runs.'


def describe_labels(found: Mapping[str, Any]) -> str:
  from experiments.verdict import format_table

  rows = []
  for name, r in found.items():
    title = f'{name}: {r["errors"]} errors of {r["suspects"]} suspects'
    for score, values in r['scores'].items():
      everywhere, suspects = (
        '{:.3f} ({:.3f}, {:.3f})'.format(*values[kind]) for kind in ('everywhere', 'suspects')
      )
      rows.append((title, score, everywhere, suspects, str(values['first_hundred'])))
      title = ''
  return format_table(('', 'score', 'AUC, all', 'AUC, suspects', 'errors in first 100'), rows)


TABLES = {
  'shapley': describe_shapley,
  'text': describe_text,
  'unlearn': describe_unlearn,
  'labels': describe_labels,
}


def interval(values: Sequence[float] | np.ndarray, digits: int) -> str:
  """Mean and half of the 95% interval."""
  from experiments import stats

  pair = stats.paired(values, np.zeros(len(values)))
  return f'{pair.mean:.{digits}f} ±{pair.high - pair.mean:.{digits}f}'


# Pictures -----------------------------------------------------------------------------------------


def _picture(path: Path, draw: Any) -> None:
  from experiments import plots

  with files.replacing(path) as picture:
    picture.write_bytes(plots.draw_png(lambda: draw(plots.LIGHT), plots.LIGHT))


def draw_removal(found: Mapping[str, Any], theme: Any) -> Any:
  """Test accuracy over the share taken away: the lowest first, the highest first."""
  from matplotlib.figure import Figure

  from experiments import plots

  figure = Figure(figsize=(9.5, 4.4), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  x = [0.0, *found['settings']['taken']]
  start = np.mean(found['all'])
  for ax, key, title in zip(
    axes, ('lowest_taken', 'highest_taken'), ('lowest values taken', 'highest values taken')
  ):
    index = 0
    for name, r in found['methods'].items():
      if name in ('random', 'training loss'):
        style = {'color': theme.ink, 'linestyle': ':' if name == 'random' else '--'}
      else:
        index += 1 + ((index + 1) % plots.LINES_BEFORE_REPEAT == 0)  # the first color is the ink's
        style = plots.style_of(index, theme)
      y = [start, *np.mean(r[key], axis=0)]
      ax.plot([100 * v for v in x], y, lw=1.6, label=name, **style)
    ax.set_title(title)
    ax.set_xlabel('% of the examples taken')
    ax.grid(True, alpha=0.3)
  axes[0].set_ylabel('test accuracy')
  axes[1].legend(frameon=False, fontsize=8)
  return figure


def draw_foretold(found: Mapping[str, Any], theme: Any) -> Any:
  """LDS of every method, in the same run and in others, by the share left out."""
  from matplotlib.figure import Figure

  from experiments import plots, stats

  figure = Figure(figsize=(11, 4.4), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  for ax, kind, title in zip(axes, ('same_run', 'other_runs'), ('the same run', 'other seeds')):
    for i, (name, r) in enumerate(found['methods'].items()):
      style = plots.style_of(i + 1, theme)
      x = [100 * float(share) * 1.02 ** (i - 3) for share in r[kind]]  # beside each other
      pairs = [stats.paired(v, np.zeros(len(v))) for v in r[kind].values()]
      y, half = np.array([(p.mean, p.high - p.mean) for p in pairs]).T
      ax.plot(x, y, lw=1.6, marker=plots.marker_of(i), ms=4, label=name, **style)
      ax.errorbar(x, y, half, fmt='none', ecolor=style['color'], elinewidth=1, capsize=2)
    shares = [100 * share for share in found['settings']['left_out']]
    ax.set_xscale('log')
    ax.set_xticks(shares, [f'{v:g}' for v in shares])
    ax.set_xticks([], minor=True)
    ax.set_title(title)
    ax.set_xlabel('% of the examples left out')
    ax.grid(True, alpha=0.3)
  axes[0].set_ylabel('rank correlation, foretold and actual')
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False)
  return figure


def draw_forgotten(found: Mapping[str, Any], theme: Any) -> Any:
  """Mean KLoM of forgotten, kept and new points, an arm a line, a kind of forget set a panel."""
  from matplotlib.figure import Figure

  from experiments import plots, stats
  from experiments.value import unlearn as study

  figure = Figure(figsize=(9.5, 3.8), layout='constrained')
  panels = figure.subplots(1, len(found['kinds']), sharex=True, sharey=True)
  for ax, (kind, arms) in zip(panels, found['kinds'].items()):
    for i, part in enumerate(study.POINTS):
      pairs = [
        stats.paired(v, np.zeros(len(v)))
        for v in (np.array(r['mean'])[:, i] for r in arms.values())
      ]
      half = [p.high - p.mean for p in pairs]
      style = plots.style_of(i + 1, theme)
      ax.errorbar(
        [p.mean for p in pairs], np.arange(len(arms)) + 0.18 * (i - 1), xerr=half, ms=5, lw=1,
        capsize=2, label=part, color=style['color'], fmt=plots.marker_of(i),
      )  # fmt: skip
    ax.set_xscale('log')
    ax.set_xticks([0.2, 0.5, 1, 2, 5, 10], ['0.2', '0.5', '1', '2', '5', '10'])
    ax.set_xticks([], minor=True)
    ax.set_title(f'forget set: {kind}')
    ax.set_xlabel('mean KLoM (less is better)')
    ax.grid(True, axis='x', alpha=0.3)
    ax.set_yticks(range(len(arms)), list(arms))
  panels[0].invert_yaxis()
  panels[-1].legend(frameon=False, fontsize=8)
  return figure


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for result.json and the pictures')
  flags.DEFINE_list('parts', ['shapley'], 'of shapley, text, unlearn and labels, by comma')
  flags.DEFINE_integer('seeds', 5, 'of everything that is drawn')
  flags.DEFINE_string('corpus', '', 'text for --parts=text, as for configs/lm.py; empty: embedded')
  flags.DEFINE_string('data', '', 'folder with label_errors/, for --parts=labels')
  flags.DEFINE_bool('quick', False, 'tiny sizes, to see that it runs')
  cli.run(main)
