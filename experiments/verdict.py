"""What the numbers of a board allow us to say, in words and in plain-text tables."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from experiments import stats
from experiments.board import Arm, Board, metric_title

WIDTH = 118  # columns of a printed table


class Verdict(NamedTuple):
  """`kind`: better, worse, unresolved, single, diverged or none. `text` is one or two sentences."""

  kind: str
  text: str


KIND_WORDS = {
  'better': 'better',
  'worse': 'worse',
  'unresolved': 'not distinguishable',
  'single': 'one seed, no verdict',
  'diverged': 'diverged',
  'none': 'no verdict',
}


def arm_verdict(board: Board, arm: Arm) -> Verdict:
  """The sentence for one arm against the baseline, on the metric the comparison was run for."""
  base = board.baseline.name
  if board.baseline.lr is None:
    return Verdict('none', f'No verdict on {arm.name}: the baseline diverged at every rate tried.')
  if arm.lr is None:
    return Verdict(
      'diverged', f'{arm.name} diverged at every learning rate tried: worse than {base}.'
    )
  result = board.difference(arm, board.metric)
  if result is None:
    return Verdict('none', f'No verdict on {arm.name}: no seed was finished by it and by {base}.')
  lost = arm.diverged_seeds
  if lost:
    return Verdict(
      'diverged',
      f'{arm.name} diverged on {len(lost)} of {count(len(arm.runs), "seed")} '
      f'({", ".join(map(str, lost))}), which counts as worse than {base}; over the seeds that '
      f'survived the difference is {describe(result, board.metric)}.',
    )
  kind, words = {
    'lower': ('better', 'is better than'),
    'higher': ('worse', 'is worse than'),
    'unresolved': ('unresolved', 'cannot be told apart from'),
    'single': ('single', 'was compared on one seed only with'),
  }[result.verdict]
  return Verdict(kind, f'{arm.name} {words} {base}: {describe(result, board.metric)}.')


def describe(result: stats.Paired, metric: str) -> str:
  """'+0.0123 macro bits per byte (95% interval ...; 3 paired seeds could have shown ...)'."""
  difference = f'{result.mean:+.4f} {metric_title(metric)}'
  if result.low is None:
    return f'{difference}; one pair of runs gives no interval, so this may be chance alone'
  return (
    f'{difference} (95% interval {result.low:+.4f} to {result.high:+.4f}; '
    f'{result.n} paired seeds could have detected {result.detectable:.4f} or more)'
  )


def domain_sentence(board: Board, arm: Arm) -> str:
  """Where the arm wins and where it loses, domain by domain; '' without intervals."""
  wins, losses, open_ = [], [], 0
  for domain in board.domains:
    result = board.difference(arm, f'bpb/{domain}')
    if result is None or result.low is None:
      return ''
    if result.verdict == 'unresolved':
      open_ += 1
    else:
      (wins if result.mean < 0 else losses).append((result.mean, domain))
  parts = []
  if wins:
    parts.append(f'wins in {_listed(sorted(wins))}')
  if losses:
    parts.append(f'loses in {_listed(sorted(losses)[::-1])}')
  if open_:
    parts.append(f'cannot be told apart in {count(open_, "domain")}')
  return f'By domain it {"; it ".join(parts)}.' if parts else ''


def _listed(found: Sequence[tuple[float, str]], most: int = 8) -> str:
  """The first of these, and how many more there are."""
  shown = ', '.join(f'{domain} ({mean:+.3f})' for mean, domain in found[:most])
  return f'{shown} and {len(found) - most:,} more' if len(found) > most else shown


def tier_sentence(board: Board) -> str:
  params, tokens = board.size
  size = f'{si(params)} parameters, {si(tokens)} tokens a run'
  if board.tier == 'evidence':
    return f'Evidence tier ({size}): large enough to argue from, for this data and this recipe.'
  return (
    f'Mechanics tier ({size}): this shows that the machinery works and ranks nothing. '
    'The evidence tier starts at 15M parameters and 100M tokens.'
  )


def floor_sentence(board: Board) -> str:
  """Whether the baseline learned more than pairs of letters; '' where no floor is known."""
  floor, mean = board.floor('macro_bpb'), board.baseline.mean('macro_bpb')
  if not (math.isfinite(floor) and math.isfinite(mean)):
    return ''
  if mean < floor:
    return (
      f'{board.baseline.name} reaches {mean:.3f} macro bits per byte, below the {floor:.3f} of a '
      'byte-bigram model: it has learned more than pairs of letters.'
    )
  return (
    f'{board.baseline.name} ends at {mean:.3f} macro bits per byte, above the {floor:.3f} of a '
    'byte-bigram model: these runs are too short to have learned anything worth comparing.'
  )


def shown_sentence(board: Board) -> str:
  """Which domains the tables leave out; '' where they show all."""
  if len(board.shown_domains) == len(board.domains):
    return ''
  which = 'in which the arms differ most' if len(board.arms) > 1 else 'with most bits per byte'
  return (
    f'Of {len(board.domains):,} domains the {len(board.shown_domains)} {which} are shown; '
    'compare.json has all.'
  )


def edge_sentences(board: Board) -> list[str]:
  """One warning for each arm whose best learning rate is the grid's last."""
  return [
    f'{arm.name}: the best learning rate, {arm.lr:g}, is the {arm.edge} of the grid; '
    'the true best may lie outside.'
    for arm in board.arms
    if arm.edge
  ]


def means_table(board: Board) -> str:
  """Mean final value of every arm, and the byte-bigram floor."""
  header = ['arm', 'lr', 'seeds', *(column(metric) for metric in board.shown_rows)]
  rows = [
    [
      arm.name,
      '-' if arm.lr is None else f'{arm.lr:g}',
      seeds_cell(arm),
      *(number(arm.mean(metric)) for metric in board.shown_rows),
    ]
    for arm in board.arms
  ]
  floors = [number(board.floor(metric)) for metric in board.shown_rows]
  if any(cell != '-' for cell in floors):
    rows.append(['byte bigram', '', '', *floors])
  return format_table(header, rows)


def differences_table(board: Board) -> str:
  """Arm minus baseline by metric: mean ± half the 95% interval (smallest detectable effect)."""
  arms = board.arms[1:]
  header = ['', *(arm.name for arm in arms)]
  rows = [
    [column(metric), *(difference_cell(board.difference(arm, metric)) for arm in arms)]
    for metric in board.shown_rows
  ]
  return format_table(header, rows)


def difference_cell(result: stats.Paired | None) -> str:
  if result is None:
    return '-'
  if result.low is None:
    return f'{result.mean:+.4f}'
  mark = ' ' if result.verdict == 'unresolved' else '*'
  return f'{result.mean:+.4f}{mark}±{result.high - result.mean:.4f} ({result.detectable:.4f})'


def seeds_cell(arm: Arm) -> str:
  """'3', or '2 of 3' when a seed diverged or is unfinished."""
  done = len(arm.survivors)
  return str(done) if done == len(arm.runs) else f'{done} of {len(arm.runs)}'


def board_text(board: Board) -> str:
  """Everything a terminal gets to see."""
  said = (tier_sentence(board), floor_sentence(board), shown_sentence(board))
  lines = [*map(wrap, filter(None, said)), '', means_table(board), '']
  if len(board.arms) > 1:
    lines += [
      wrap(
        f'Difference to {board.baseline.name}, negative is better. '
        '± is the 95% interval of paired seeds, * excludes zero; '
        'in brackets the smallest effect these seeds would find with 80% power.'
      ),
      '',
      differences_table(board),
      '',
      *(wrap(arm_verdict(board, arm).text) for arm in board.arms[1:]),
    ]
  lines += map(wrap, edge_sentences(board) + cost_sentences(board))
  text = '\n'.join(lines).strip('\n')
  return text.replace('\n\n\n', '\n\n')


def cost_sentences(board: Board) -> list[str]:
  """What a step of each arm costs, where that was counted."""
  first = board.baseline.step_flops
  if not first:
    return []
  ratios = [f'{arm.name} {arm.step_flops / first:.3f}' for arm in board.arms if arm.step_flops]
  return [f'Matmul FLOPs of a step, relative to {board.baseline.name}: {", ".join(ratios)}.']


def wrap(text: str) -> str:
  return textwrap.fill(text, WIDTH, subsequent_indent='  ')


def column(metric: str) -> str:
  """A short heading: 'macro', 'worst', the domain's name, 'macro loss'."""
  if metric.startswith('bpb/'):
    return metric.removeprefix('bpb/')
  return metric.removesuffix('_bpb').replace('_', ' ')


def number(value: float) -> str:
  return f'{value:.3f}' if math.isfinite(value) else '-'


def count(n: int, noun: str) -> str:
  return f'{n} {noun}' if n == 1 else f'{n} {noun}s'


def si(value: float) -> str:
  """1234567 -> '1.2M'."""
  for size, suffix in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if value >= size:
      return f'{value / size:.3g}{suffix}'
  return f'{value:g}'


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
  """Aligned columns, the first to the left; what does not fit goes below, under the first again."""
  columns = [list(cells) for cells in zip(header, *rows, strict=True)]
  widths = [max(map(len, cells)) for cells in columns]
  blocks: list[list[int]] = [[]]
  used = widths[0]
  for i in range(1, len(columns)):
    if used + 2 + widths[i] > width and blocks[-1]:
      blocks.append([])
      used = widths[0]
    blocks[-1].append(i)
    used += 2 + widths[i]
  texts = []
  for block in blocks:
    lines = [
      '  '.join([columns[0][r].ljust(widths[0]), *(columns[i][r].rjust(widths[i]) for i in block)])
      for r in range(len(rows) + 1)
    ]
    lines.insert(1, '-' * len(lines[0]))
    texts.append('\n'.join(line.rstrip() for line in lines))
  return '\n\n'.join(texts)
