"""The figures of a report. Each function draws one board in one theme, or returns None if it has
nothing to show. Colors are Okabe and Ito's, told apart by color-blind readers; lines that share a
panel also differ in dash, and are labeled where they end wherever there is room.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.board import MAX_DOMAINS, Arm, Board, lookup, metric_title
from experiments.verdict import column

DASHES: tuple[Any, ...] = ('-', (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
LINES_BEFORE_REPEAT = 7
NAMED_LINES = 12  # as many labels as fit at the side of a panel
DPI = 150


@dataclass(frozen=True)
class Theme:
  """Page, ink, faint ink, and line colors; the first is the baseline's."""

  name: str
  paper: str
  ink: str
  faint: str
  colors: tuple[str, ...]


LIGHT = Theme(
  'light', '#ffffff', '#1d2128', '#8a919c',
  ('#1d2128', '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b07c00', '#56b4e9'),
)  # fmt: skip
DARK = Theme(
  'dark', '#1a1d23', '#e8eaed', '#868e99',
  ('#e8eaed', '#56b4e9', '#f08a4b', '#2fc79a', '#e0a3c6', '#e6b93c', '#9db8ff'),
)  # fmt: skip


def style_of(index: int, theme: Theme) -> dict[str, Any]:
  """Color and dash of the index-th line; seven colors, then the same with another dash."""
  return {
    'color': theme.colors[index % LINES_BEFORE_REPEAT],
    # Twice the round, because one more line per seven colors would meet the same dash again.
    'linestyle': DASHES[(2 * (index // LINES_BEFORE_REPEAT) + index) % len(DASHES)],
  }


def marker_of(index: int) -> str:
  """The marker of the index-th line: another one where the color is the same."""
  return MARKERS[(index + index // LINES_BEFORE_REPEAT) % len(MARKERS)]


def draw_differences(board: Board, theme: Theme) -> Figure | None:
  """Arm minus baseline, by metric and domain, with 95% intervals."""
  arms = [(i, arm) for i, arm in enumerate(board.arms) if i]
  metrics = [m for m in board.shown_rows if not m.endswith('_loss')]
  drawn = [(i, arm, m, board.difference(arm, m)) for i, arm in arms for m in metrics]
  if not any(result for *_, result in drawn):
    return None
  height = 1.3 + len(metrics) * (0.16 + 0.16 * len(arms))
  fig = Figure(figsize=(8.2, height), layout='constrained')
  ax = fig.subplots()
  ax.axvline(0, color=theme.ink, lw=1)
  for i, arm, metric, result in drawn:
    if result is None:
      continue
    y = metrics.index(metric) + 0.7 * (i - (len(arms) + 1) / 2) / len(arms)
    color = theme.colors[i % LINES_BEFORE_REPEAT]
    if result.low is not None:
      ax.plot([result.low, result.high], [y, y], color=color, lw=2, solid_capstyle='butt')
    label = arm.name if metric == metrics[0] else None
    ax.plot(
      result.mean, y, MARKERS[(i - 1) % len(MARKERS)], color=color, ms=5.5, label=label, ls='none'
    )
  ax.set_yticks(range(len(metrics)), [column(m) for m in metrics])
  ax.set_ylim(len(metrics) - 0.45, -0.55)
  ax.axhline(len([m for m in metrics if '/' not in m]) - 0.5, color=theme.faint, lw=0.6)
  ax.set_xlabel(
    f'← better      bits per byte minus {board.baseline.name}, final evaluation      worse →'
  )
  ax.grid(axis='x')
  ax.tick_params(axis='y', length=0)
  fig.legend(loc='outside upper left', ncols=4, frameon=False)
  return fig


def draw_rates(board: Board, theme: Theme) -> Figure | None:
  """The learning-rate grid on the seeds that chose; that rate is ringed, a diverged one is x."""
  if all(len(arm.grid) < 2 for arm in board.arms):
    return None
  fig = Figure(figsize=(6.4, 3.5), layout='constrained')
  ax = fig.subplots()
  finite = [v for arm in board.arms for _, v in arm.grid if math.isfinite(v)]
  ceiling = max(finite, default=1.0) + 0.08 * (max(finite, default=1.0) - min(finite, default=0.0))
  ends = []
  for i, arm in enumerate(board.arms):
    grid = sorted(arm.grid)
    good = [(lr, value) for lr, value in grid if math.isfinite(value)]
    style = style_of(i, theme)
    if good:
      ax.plot(*zip(*good), marker='.', lw=1.6, **style)
      ends.append((*good[-1], arm.name, style['color']))
    for lr in (lr for lr, value in grid if not math.isfinite(value)):
      ax.plot(lr, ceiling, 'x', color=style['color'], ms=8, mew=2)
    for lr, value in good:
      if lr == arm.lr:
        ax.plot(lr, value, 'o', ms=11, mfc='none', mec=style['color'], mew=1.4)
  rates = sorted({lr for arm in board.arms for lr, _ in arm.grid})
  ax.set_xscale('log')
  ax.set_xticks(rates, [f'{lr:g}' for lr in rates], minor=False)
  ax.minorticks_off()
  ax.set_xlabel('peak learning rate (log scale)')
  ax.set_ylabel(f'{metric_title(board.metric)},\nmean over the tuning seeds')
  ax.grid(axis='y')
  label_ends(ax, ends)
  return fig


def draw_curves(board: Board, theme: Theme) -> Figure | None:
  """Validation bits per byte over training: the macro average and every domain, with its floor."""
  metrics = ['macro_bpb', *(f'bpb/{domain}' for domain in board.shown_domains)]
  if not any(run.rows('eval') for arm in board.arms for run in arm.runs):
    return None
  fig, panels = small_multiples(len(metrics))
  for ax, metric in zip(panels, metrics):
    settled = []
    for i, arm in enumerate(board.arms):
      steps, curves = seed_curves(arm, 'eval', lambda row, m=metric: lookup(row, m))
      if not len(steps):
        continue
      style = style_of(i, theme)
      ax.fill_between(steps, curves.min(0), curves.max(0), color=style['color'], alpha=0.18, lw=0)
      marker = '.' if len(steps) < 3 else None
      ax.plot(steps, curves.mean(0), lw=1.7, marker=marker, label=arm.name, **style)
      settled.append(curves[:, steps >= 0.25 * steps[-1]])
    floor = board.floor(metric)
    if math.isfinite(floor):
      ax.axhline(floor, color=theme.faint, lw=1.2, ls=(0, (2, 2)))
      ax.annotate(
        'byte bigram', (1, floor), xycoords=('axes fraction', 'data'), xytext=(-2, 2),
        textcoords='offset points', ha='right', va='bottom', color=theme.faint, fontsize=8,
      )  # fmt: skip
    set_settled_range(ax, [*settled, np.array([[floor]])])
    ax.set_title('macro average' if metric == 'macro_bpb' else column(metric))
    ax.grid(axis='y')
  frame(fig, panels, 'optimizer step', 'bits per byte')
  return fig


def draw_domain_weights(board: Board, theme: Theme) -> Figure | None:
  """Mean weight of each domain's examples over training, one panel for each arm that reweights."""
  weight = lambda row, domain: lookup(row.get('domain', {}).get(domain, {}), 'weight')
  arms = [arm for arm in board.arms if reweights(arm)]
  return draw_by_domain(board, arms, weight, theme, 'mean weight (1 is neutral)', neutral=1)


def draw_mixtures(board: Board, theme: Theme) -> Figure | None:
  """Share of each domain over training, one panel for each arm whose mixture changes: in the loss
  for those that weigh, in the batches for those that sample."""

  def share(row, domain):
    mixture = row.get('mixture', {})
    return lookup(mixture.get('objective', {}), domain)

  arms = [arm for arm in board.arms if any('mixture' in row for row in _train_rows(arm))]
  neutral = 1 / max(len(board.domains), 1)
  return draw_by_domain(board, arms, share, theme, 'share of the domain', neutral=neutral)


def draw_by_domain(
  board: Board,
  arms: Sequence[Arm],
  value: Callable[[dict, str], float],
  theme: Theme,
  title: str,
  neutral: float,
) -> Figure | None:
  """A number of every domain over training, one panel for each arm.

  Of very many domains a panel names those that go farthest from neutral; the others are faint.
  """
  if not arms:
    return None
  fig, panels = small_multiples(len(arms), columns=2, size=(4.6, 3.1))
  for ax, arm in zip(panels, arms):
    lines = {}
    for domain in board.domains:
      steps, curves = seed_curves(arm, 'train', lambda row, d=domain: value(row, d))
      if len(steps):
        lines[domain] = steps, smooth(curves.mean(0))
    farthest = lambda d: np.abs(lines[d][1] - neutral).max()  # noqa: B023
    named = set(sorted(lines, key=farthest)[-NAMED_LINES:])
    ends = []
    for i, domain in enumerate(board.domains):
      if domain not in lines:
        continue
      style = style_of(i, theme)
      if domain in named:
        ax.plot(*lines[domain], lw=1.6, **style)
        ends.append((lines[domain][0][-1], lines[domain][1][-1], domain, style['color']))
      else:
        ax.plot(*lines[domain], lw=0.6, color=theme.faint, alpha=0.6)
    ax.axhline(neutral, color=theme.faint, lw=1)
    others = len(lines) - len(named)
    ax.set_title(f'{arm.name}  (faint: {others:,} more domains)' if others else arm.name)
    ax.grid(axis='y')
    label_ends(ax, ends)
  frame(fig, panels, 'optimizer step', title, legend=False)
  return fig


def draw_epochs(board: Board, theme: Theme) -> Figure | None:
  """How often each arm went through each domain, where arms differ in that."""
  arms = [(i, arm) for i, arm in enumerate(board.arms) if arm.survivors]
  epochs = np.array(
    [
      [
        np.mean([run.result.get('epochs', {}).get(d, 0.0) for run in arm.survivors])
        for d in board.domains
      ]
      for _, arm in arms
    ]
  )
  if not epochs.size:
    return None
  # Of very many domains, those that some arm repeats most.
  shown = np.sort(np.argsort(-epochs.max(0))[:MAX_DOMAINS])
  domains, epochs = [board.domains[g] for g in shown], epochs[:, shown]
  if np.ptp(epochs, axis=0).max() <= 0.05 * epochs.max():
    return None
  fig = Figure(figsize=(8, 1.2 + 0.34 * len(domains)), layout='constrained')
  ax = fig.subplots()
  for (i, arm), values in zip(arms, epochs):
    offset = (i - (len(board.arms) - 1) / 2) * 0.6 / len(board.arms)
    ax.plot(
      values, np.arange(len(values)) + offset, marker_of(i), ms=5,
      color=style_of(i, theme)['color'], label=arm.name,
    )  # fmt: skip
  if epochs.max() > 1:
    ax.axvline(1, color=theme.faint, lw=1)
  ax.set_yticks(range(len(domains)), domains)
  ax.invert_yaxis()
  ax.set_xlim(0, None)
  ax.grid(axis='x')
  ax.set_xlabel('epochs at the end of training')
  fig.legend(loc='outside upper left', ncols=4, frameon=False)
  return fig


def draw_alignment(board: Board, theme: Theme) -> Figure | None:
  """Cosines between the domains' gradients, for the arms that `experiments.alignment` has read."""
  found = [(arm, read) for arm in board.arms if (read := arm.alignment) is not None]
  if not found:
    return None
  fig, panels = small_multiples(len(found), columns=2, size=(4.4, 4.0))
  for ax, (arm, read) in zip(panels, found):
    draw_matrix(ax, np.array(read['cosines']), read['domains'])
    ax.set_title(arm.name)
  return fig


def draw_matrix(ax: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
  """A symmetric matrix of cosines with its numbers."""
  ax.imshow(matrix, cmap='RdBu_r', vmin=-1, vmax=1)
  ax.set_xticks(range(len(names)), names, rotation=45, ha='right')
  ax.set_yticks(range(len(names)), names)
  for (i, j), value in np.ndenumerate(matrix):
    ink = '#ffffff' if abs(value) > 0.6 else '#1d2128'  # on the map's colors, in either theme
    ax.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=7.5, color=ink)


def draw_concentration(board: Board, theme: Theme) -> Figure | None:
  """How many examples a step really used: effective sample size, entropy, largest share."""
  quantities = {
    'ess': 'effective sample size\n(fraction of the batch)',
    'entropy': 'entropy of the weights\n(fraction of its maximum)',
    'max_share': 'largest share of one example\n(fraction of the step)',
  }
  fig, panels = small_multiples(3)
  drawn = False
  for ax, (key, title) in zip(panels, quantities.items()):
    for i, arm in enumerate(board.arms):
      steps, curves = seed_curves(arm, 'train', lambda row, k=key: lookup(row, k))
      if len(steps):
        ax.plot(steps, smooth(curves.mean(0)), lw=1.6, label=arm.name, **style_of(i, theme))
        drawn = True
    ax.set_title(title)
    ax.set_ylim(0, None if key == 'max_share' else 1.03)
    ax.grid(axis='y')
  frame(fig, panels, 'optimizer step')
  return fig if drawn else None


def draw_frontier(board: Board, theme: Theme) -> Figure | None:
  """Validation metric against the matmul FLOPs spent so far, where arms differ in FLOPs."""
  arms = [(i, arm) for i, arm in enumerate(board.arms) if arm.step_flops and arm.survivors]
  if len({arm.step_flops for _, arm in arms}) < 2:
    return None
  fig = Figure(figsize=(7, 4), layout='constrained')
  ax = fig.subplots()
  for i, arm in arms:
    unit = arm.step_flops / 1e12
    style = style_of(i, theme)
    steps, curves = seed_curves(arm, 'eval', lambda row: lookup(row, board.metric))
    if len(steps):
      ax.plot(steps * unit, curves.mean(0), lw=1.4, **style)
    values = list(arm.values(board.metric).values())
    spent = arm.survivors[0].result['steps'] * unit
    ax.plot([spent] * len(values), values, '.', color=style['color'], alpha=0.5)
    marker = marker_of(i)
    ax.plot(spent, np.mean(values), marker, color=style['color'], ms=7, label=arm.name)
  ax.set_xlim(0, None)
  ax.grid()
  ax.set_xlabel('matmul TFLOP spent')
  ax.set_ylabel(f'{metric_title(board.metric)}, mean and every seed')
  longest = max(len(arm.name) for _, arm in arms)
  fig.legend(loc='outside upper left', ncols=1 if longest > 40 else 2, frameon=False)
  return fig


FIGURES: dict[str, Callable[[Board, Theme], Figure | None]] = {
  'differences': draw_differences,
  'frontier': draw_frontier,
  'learning_rates': draw_rates,
  'curves': draw_curves,
  'domain_weights': draw_domain_weights,
  'mixtures': draw_mixtures,
  'epochs': draw_epochs,
  'alignment': draw_alignment,
  'concentration': draw_concentration,
}


def render(board: Board, name: str, theme: Theme) -> bytes | None:
  """One figure as PNG, or None if the board has nothing to show in it."""
  return draw_png(lambda: FIGURES[name](board, theme), theme)


def draw_png(draw: Callable[[], Figure | None], theme: Theme) -> bytes | None:
  """What `draw` draws, in the fonts and inks of the theme; None if it draws nothing."""
  settings = {
    'font.size': 10, 'axes.titlesize': 10, 'axes.titlelocation': 'left', 'axes.labelsize': 9,
    'xtick.labelsize': 8.5, 'ytick.labelsize': 8.5, 'legend.fontsize': 9.5,
    'font.family': 'DejaVu Sans', 'axes.spines.top': False, 'axes.spines.right': False,
    'figure.facecolor': theme.paper, 'axes.facecolor': theme.paper, 'text.color': theme.ink,
    'axes.edgecolor': theme.faint, 'axes.labelcolor': theme.ink, 'axes.titlecolor': theme.ink,
    'xtick.color': theme.ink, 'ytick.color': theme.ink, 'grid.color': theme.faint,
    'grid.alpha': 0.25, 'grid.linewidth': 0.7,
  }  # fmt: skip
  with matplotlib.rc_context(settings):
    figure = draw()
    if figure is None:
      return None
    buffer = io.BytesIO()
    # Without matplotlib's name and version in the file, equal figures are equal bytes.
    figure.savefig(buffer, format='png', dpi=DPI, metadata={'Software': None})
    return buffer.getvalue()


def draw_step_cost(record: dict[str, Any], theme: Theme) -> Figure:
  """Step time, matmul FLOPs and temporary memory of the arms, over those of the first; and how the
  counts grow, where the record has that."""
  times = {row['weighting']: row for row in record.get('times', ())}
  counts = {row['weighting']: row for row in record['counts']}
  names = list(dict.fromkeys((*times, *counts)))[::-1]
  height, growth = 1.3 + 0.36 * len(names), record.get('growth', ())
  figure = Figure(figsize=(8.5, height + 3.2 * bool(growth)), layout='constrained')
  ratios, *below = figure.subfigures(2, height_ratios=(height, 3.2)) if growth else (figure,)
  panels = ratios.subplots(1, 3, sharey=True)
  first = record['counts'][0]
  columns = (
    ('step time', {name: row['ratio'] for name, row in times.items()}),
    ('matmul FLOPs', {n: row['matmul_flops'] / first['matmul_flops'] for n, row in counts.items()}),
    ('temporary memory', {n: row['temp_bytes'] / first['temp_bytes'] for n, row in counts.items()}),
  )
  for ax, (title, values) in zip(panels, columns):
    ax.set_title(title)
    ax.axvline(1, color=theme.faint, linewidth=1)
    for y, name in enumerate(names):
      if name in values:
        ax.plot(values[name], y, MARKERS[0], color=theme.colors[1])
      if ax is panels[0] and name in times:
        ax.plot([times[name]['low'], times[name]['high']], [y, y], color=theme.colors[1])
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.95), max(high, 1.05))  # differences of no account look like it
    ax.grid(axis='x')
    ax.set_xlabel(f'ratio to {first["weighting"]}')
  panels[0].set_yticks(range(len(names)), names)
  for part in below:
    draw_growth(part, growth, theme)
  return figure


def draw_growth(figure: Any, rows: Sequence[dict[str, Any]], theme: Theme) -> None:
  """FLOPs (solid) and temporary memory (dashed) of a device over batch, sequence and devices."""
  axes = ('batch_size', 'seq_len', 'devices')
  base = {axis: rows[0][axis] for axis in axes}
  arms = list(dict.fromkeys(row['weighting'] for row in rows))
  kinds = (('matmul_flops', 1e6, '-', 'MFLOP'), ('temp_bytes', 1e6, '--', 'temporary MB'))
  for ax, axis in zip(figure.subplots(1, 3, sharey=True), axes):
    for i, arm in enumerate(arms):
      others = [other for other in axes if other != axis]
      line = [
        row
        for row in rows
        if row['weighting'] == arm and all(row[other] == base[other] for other in others)
      ]
      line.sort(key=lambda row: row[axis])
      for key, unit, style, label in kinds:
        values = [row[key] / unit for row in line]
        ax.plot(
          [row[axis] for row in line], values, style + marker_of(i), ms=4,
          color=theme.colors[i % LINES_BEFORE_REPEAT], label=f'{label}, {arm}',
        )  # fmt: skip
    ticks = sorted({row[axis] for row in rows})
    ax.set_xscale('log', base=2)
    ax.set_yscale('log')
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel({'batch_size': 'rows', 'seq_len': 'positions'}.get(axis, axis))
    ax.grid()
  figure.legend(*ax.get_legend_handles_labels(), loc='outside upper left', ncols=2, frameon=False)


def seed_curves(
  arm: Arm, kind: str, value: Callable[[dict], float]
) -> tuple[np.ndarray, np.ndarray]:
  """(steps [N], values [seeds, N]) on the steps that every seed has; empty if there are none."""
  series = []
  for run in arm.survivors or arm.runs:
    points = {row['step']: value(row) for row in run.rows(kind)}
    series.append({step: y for step, y in points.items() if math.isfinite(y)})
  series = [points for points in series if points]
  steps = sorted(set.intersection(*map(set, series))) if series else []
  return np.array(steps), np.array([[points[s] for s in steps] for points in series])


def reweights(arm: Arm) -> bool:
  """Whether any step of any seed had unequal weights."""
  return any(row.get('ess', 1.0) < 1 - 1e-4 for row in _train_rows(arm))


def _train_rows(arm: Arm) -> Iterator[dict[str, Any]]:
  return (row for run in arm.runs for row in run.rows('train'))


def smooth(values: np.ndarray) -> np.ndarray:
  """Centered moving average over about a fifteenth of the curve; the ends use what there is."""
  half = len(values) // 30
  sums = np.cumsum(np.concatenate([[0.0], values]))
  at = np.arange(len(values))
  low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def small_multiples(
  n: int, columns: int = 3, size: tuple[float, float] = (3.1, 2.5)
) -> tuple[Figure, list[Axes]]:
  columns = min(columns, n)
  rows = -(-n // columns)
  width = max(size[0] * columns, 5.2)
  fig = Figure(figsize=(width, size[1] * rows + 0.35), layout='constrained')
  panels = list(fig.subplots(rows, columns, squeeze=False).flat)
  for ax in panels[n:]:
    ax.set_axis_off()
  return fig, panels[:n]


def frame(fig: Figure, panels: Sequence[Axes], x: str, y: str = '', *, legend: bool = True) -> None:
  """Axis titles once for the whole figure, one legend above it."""
  fig.supxlabel(x, fontsize=9)
  for ax in panels:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
  if y:
    fig.supylabel(y, fontsize=9)
  handles, labels = panels[0].get_legend_handles_labels()
  if legend and handles:
    fig.legend(handles, labels, loc='outside upper left', ncols=4, frameon=False)


def set_settled_range(ax: Axes, parts: Sequence[np.ndarray]) -> None:
  """A y range for what follows the first quarter of training; the fall before it is cut off."""
  values = np.concatenate([part.ravel() for part in parts])
  values = values[np.isfinite(values)]
  if len(values):
    low, high = values.min(), values.max()
    margin = 0.08 * (high - low) or 0.05
    ax.set_ylim(low - margin, high + margin)


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
  """Names lines at their right ends, moved apart where they would overlap."""
  if not ends:
    return
  low, high = ax.get_ylim()
  gap = 0.075 * (high - low)
  ends = sorted(ends, key=lambda end: end[1])
  heights = [end[1] for end in ends]
  for i in range(1, len(heights)):
    heights[i] = max(heights[i], heights[i - 1] + gap)
  ceiling = high
  for i in reversed(range(len(heights))):  # those that were moved out come back, and no others
    heights[i] = min(heights[i], ceiling)
    ceiling = heights[i] - gap
  for (x, y, name, color), height in zip(ends, heights):
    ax.annotate(
      name, (x, y), xytext=(1.02, height), textcoords=ax.get_yaxis_transform(), va='center',
      color=color, fontsize=8.5, annotation_clip=False,
    )  # fmt: skip
