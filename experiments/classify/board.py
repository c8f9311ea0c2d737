"""Arms against the plain mean: rates chosen, seeds trained, claims judged, and the board drawn."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import stats
from experiments.classify import learner, tasks
from experiments.classify.arms import ARMS, Arm
from experiments.classify.sources import Source
from experiments.verdict import format_table

TUNING = 3  # seeds that choose the learning rates; the claims are tested on others


class Claim(NamedTuple):
  """That an arm's metric is higher (or lower) than that of the arm it is held against."""

  task: str
  arm: str
  metric: str
  expected: str = 'higher'
  against: str = 'uniform'


_LONG, _NOISY, _BIRDS, _FAIR, _SEMI, _RARE = (
  *('long_tail', 'noisy_labels', 'worst_group'),
  *('fairness', 'semi_supervised', 'rare_events'),
)
CLAIMS = (
  Claim(_LONG, 'inverse_frequency', 'balanced accuracy'),
  Claim(_LONG, 'effective_number', 'balanced accuracy'),
  Claim(_LONG, 'deferred', 'balanced accuracy'),
  Claim(_LONG, 'ldam', 'balanced accuracy'),
  Claim(_LONG, 'ldam+deferred', 'balanced accuracy'),
  Claim(_LONG, 'balanced_softmax', 'balanced accuracy'),
  Claim(_LONG, 'balanced_softmax', 'tail accuracy'),
  Claim(_LONG, 'focal', 'balanced accuracy'),
  Claim(_NOISY, 'trimmed low', 'accuracy'),
  Claim(_NOISY, 'co_teaching', 'accuracy'),
  Claim(_NOISY, 'generalized_cross_entropy', 'accuracy'),
  Claim(_NOISY, 'tilted t=-1', 'accuracy'),
  Claim(_NOISY, 'tilted t=-2', 'accuracy'),
  Claim(_NOISY, 'self_paced', 'accuracy'),
  Claim(_NOISY, 'learning_to_reweight', 'accuracy'),
  Claim(_NOISY, 'learning_to_reweight', 'accuracy', against='trusted only'),
  Claim(_NOISY, 'rho_loss', 'accuracy'),
  Claim(_NOISY, 'rho_loss', 'accuracy', against='trusted only'),
  Claim(_NOISY, 'tilted t=1', 'accuracy', 'lower'),
  Claim(_NOISY, 'linupper', 'accuracy', 'lower'),
  Claim(_NOISY, 'selective_backprop', 'accuracy', 'lower'),
  Claim(_BIRDS, 'group_dro', 'worst group'),
  Claim(_BIRDS, 'group_dro', 'accuracy', 'lower'),
  Claim(_BIRDS, 'group_cvar', 'worst group'),
  Claim(_BIRDS, 'jtt', 'worst group'),
  Claim(_BIRDS, 'cvar', 'worst group'),
  Claim(_BIRDS, 'chi_square_dro', 'worst group'),
  Claim(_FAIR, 'group_dro', 'worst group'),
  Claim(_FAIR, 'group_dro', 'equity-scaled'),
  Claim(_FAIR, 'group_cvar', 'worst group'),
  Claim(_FAIR, 'fair_error_bound', 'worst group'),
  Claim(_FAIR, 'fair_error_bound', 'equity-scaled'),
  Claim(_FAIR, 'cvar', 'worst group'),
  Claim(_FAIR, 'chi_square_dro', 'worst group'),
  Claim(_SEMI, 'fixmatch', 'accuracy', against='labels only'),
  Claim(_SEMI, 'shrinkmatch', 'accuracy', against='fixmatch'),
  Claim(_RARE, 'inverse_frequency', 'recall'),
  Claim(_RARE, 'inverse_frequency', 'F1'),
  Claim(_RARE, 'inverse_frequency', 'average precision'),
  Claim(_RARE, 'effective_number', 'recall'),
  Claim(_RARE, 'effective_number', 'F1'),
  Claim(_RARE, 'balanced_softmax', 'F1'),
  Claim(_RARE, 'focal', 'average precision'),
  Claim(_RARE, 'presto', 'average precision'),
)


UNTESTABLE = {
  'vertex_class_balance': 'needs many outputs at once (hands in contact, HACO); see docs/results',
  'fair_error_bound_dice': 'needs medical images with masks and demographics (FairSeg)',
  'adawac': 'needs two losses an example (segmentation of medical volumes)',
}


class Result(NamedTuple):
  """An arm on a task.

  Attributes:
    rate: chosen learning rate.
    validation: (rate, metric it was chosen by) for the grid.
    values: metric -> one number per seed, on the test sets.
    seconds: training and compilation.
  """

  rate: float
  validation: Sequence[tuple[float, float]]
  values: dict[str, list[float]]
  seconds: float


def arms_of(task: str, claims: Iterable[Claim] = CLAIMS) -> list[str]:
  """The arms that the claims on a task need, baselines first."""
  found = [claim for claim in claims if claim.task == task]
  return list(dict.fromkeys([*(c.against for c in found), *(c.arm for c in found)]))


def run_task(
  task: tasks.Task, source: Source, arms: Sequence[str], seeds: int
) -> Iterator[tuple[str, Result]]:
  """Arm by arm, every seed at the rate that is best for the arm on the validation sets of `TUNING`
  seeds of their own."""
  problems = [tasks.problem(task, source, seed) for seed in range(TUNING + seeds)]
  stacked = learner.stack(problems)
  tested = list(range(TUNING, TUNING + seeds))
  for name in arms:
    started = time.perf_counter()
    validation = try_rates(task, ARMS[name], problems, stacked)
    rate = max(validation, key=lambda pair: pair[1])[0]
    logits = learner.train(task, ARMS[name], stacked, tested, [rate] * seeds)
    rows = [measured(task, problems[s], *each) for s, *each in zip(tested, *logits)]
    values = {metric: [float(row[metric]) for row in rows] for metric in rows[0]}
    yield name, Result(rate, validation, values, time.perf_counter() - started)


def try_rates(
  task: tasks.Task, arm: Arm, problems: Sequence[tasks.Problem], stacked: tasks.Problem
) -> list[tuple[float, float]]:
  """(learning rate, mean of the task's metric on validation) for the grid."""
  runs = [(seed, rate) for rate in task.rates for seed in range(TUNING)]
  logits, _ = learner.train(task, arm, stacked, *zip(*runs))
  own = lambda i, seed: task.measure(logits[i], problems[seed].validation, 0.0)[task.metric]
  values = [own(i, seed) for i, (seed, _) in enumerate(runs)]
  means = np.reshape(values, (len(task.rates), TUNING)).mean(1)
  return list(zip(task.rates, means.tolist()))


def measured(
  task: tasks.Task, problem: tasks.Problem, validation: np.ndarray, test: np.ndarray
) -> dict[str, float]:
  """The metrics on the test set; a threshold, where there is one, is that of the validation set."""
  threshold = 0.0
  if task.classes == 2:
    threshold = tasks.best_threshold(validation, problem.validation)
  return task.measure(test, problem.test, threshold)


# What it shows ------------------------------------------------------------------------------------


def judge(claim: Claim, results: dict[str, Result]) -> tuple[stats.Paired, str]:
  """(difference of the arms, verdict): 'reproduced' if the interval lies on the expected side of 0,
  'opposite' if on the other, 'not reproduced' if it holds 0."""
  a, b = (results[name].values[claim.metric] for name in (claim.arm, claim.against))
  difference = stats.paired(a, b)
  if difference.verdict == 'unresolved':
    return difference, 'not reproduced'
  return difference, 'reproduced' if difference.verdict == claim.expected else 'opposite'


def record(
  results: dict[str, dict[str, Result]], claims: Iterable[Claim] = CLAIMS
) -> dict[str, Any]:
  """What is written: every number, and every claim whose arms were run, judged."""
  judged = []
  for claim in claims:
    found = results.get(claim.task, {})
    if claim.arm in found and claim.against in found:
      difference, verdict = judge(claim, found)
      judged.append({**claim._asdict(), **difference._asdict(), 'verdict': verdict})
  tables = {
    task: {name: result._asdict() for name, result in arms.items()}
    for task, arms in results.items()
    if arms
  }
  return {
    'tasks': tables,
    'claims': judged,
    'methods': methods(judged),
    'untestable here': UNTESTABLE,
  }


def methods(judged: Sequence[dict[str, Any]]) -> dict[str, str]:
  """Arm -> 'reproduced' if all of its claims are, else 'not reproduced', with the count."""
  verdicts = {}
  for name in dict.fromkeys(claim['arm'] for claim in judged):
    own = [claim['verdict'] for claim in judged if claim['arm'] == name]
    word = 'reproduced' if set(own) == {'reproduced'} else 'not reproduced'
    against = f', {own.count("opposite")} opposite' if 'opposite' in own else ''
    verdicts[name] = f'{word} ({own.count("reproduced")} of {len(own)}{against})'
  return verdicts


def describe(found: dict[str, Any]) -> str:
  """The tables of a record."""
  parts = []
  for task, arms in found['tasks'].items():
    metrics = list(next(iter(arms.values()))['values'])
    rows = [
      (name, f'{arm["rate"]:g}{edge(arm)}', *(mean(arm['values'][m]) for m in metrics))
      for name, arm in arms.items()
    ]
    parts.append(format_table((task, 'rate', *metrics), rows))
  rows = [
    (
      label(c),
      c['task'],
      f'{c["mean"]:+.3f}',
      f'{c["low"]:+.3f} to {c["high"]:+.3f}',
      c['verdict'],
    )
    for c in found['claims']
  ]
  parts.append(format_table(('claim', 'task', 'difference', '95% interval', 'verdict'), rows))
  parts.append(format_table(('method', 'verdict'), list(found['methods'].items())))
  absent = [f'{name}: untestable here, {why}' for name, why in found['untestable here'].items()]
  return '\n\n'.join([*parts, '\n'.join(absent)])


def label(claim: dict[str, Any]) -> str:
  """'rho_loss over trusted only, accuracy ↑'; the plain mean goes without saying."""
  other = '' if claim['against'] == 'uniform' else f' over {claim["against"]}'
  arrow = {'higher': '↑', 'lower': '↓'}[claim['expected']]
  return f'{claim["arm"]}{other}, {claim["metric"]} {arrow}'


def edge(arm: dict[str, Any]) -> str:
  """A mark for a rate that is the first or the last of its grid: a better one may lie outside."""
  first, *_, last = (rate for rate, _ in arm['validation'])
  return '!' if arm['rate'] in (first, last) else ''


def mean(values: Sequence[float]) -> str:
  interval = stats.paired(values, np.zeros(len(values)))
  return f'{interval.mean:.3f} ±{interval.high - interval.mean:.3f}'


def draw(found: dict[str, Any], theme: Any) -> Any:
  """Differences with their intervals, a panel for each task."""
  from matplotlib.figure import Figure

  by_task: dict[str, list[dict[str, Any]]] = {}
  for claim in found['claims']:
    by_task.setdefault(claim['task'], []).append(claim)
  names = list(by_task)
  columns = [names[::2], names[1::2]] if len(names) > 1 else [names]
  lines = max(sum(len(by_task[task]) + 2.5 for task in column) for column in columns)
  figure = Figure(figsize=(5.6 * len(columns), 0.9 + 0.24 * lines), layout='constrained')
  for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns):
    ratios = [len(by_task[task]) + 1 for task in column]
    panels = part.subplots(len(column), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, task in zip(panels, column):
      draw_panel(ax, task, by_task[task][::-1], theme)
  for verdict, color in COLORS.items():
    ax.plot([], [], 'o-', color=theme.colors[color], label=verdict)
  figure.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
  figure.suptitle('difference to the baseline, percentage points (arrows: the claim)', fontsize=10)
  return figure


COLORS = {'reproduced': 3, 'not reproduced': 0, 'opposite': 2}  # among a theme's


def draw_panel(ax: Any, task: str, claims: Sequence[dict[str, Any]], theme: Any) -> None:
  ax.axvline(0, color=theme.ink, lw=1)
  for y, claim in enumerate(claims):
    color = theme.colors[COLORS[claim['verdict']]]
    ax.plot([100 * claim['low'], 100 * claim['high']], [y, y], color=color, lw=2)
    ax.plot(100 * claim['mean'], y, 'o', color=color, ms=4.5)
  ax.set_yticks(range(len(claims)), map(label, claims))
  ax.set_ylim(-0.6, len(claims) - 0.4)
  ax.set_title(task.replace('_', ' '))
  ax.grid(axis='x')
