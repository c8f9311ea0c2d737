"""Rebuilds the report of a comparison, or makes one from any runs.

  python -m experiments.report runs/board
  python -m experiments.report --out=runs/report runs/uniform runs/linupper

One self-contained page, report.html, and its figures as plots/*.png. Nothing is trained.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, files, plots
from experiments.board import Arm, Board, load_board
from experiments.errors import UserError
from experiments.markup import Html, join, table, tag
from experiments.report_documents import Describe, DocumentFinder, documents_section
from experiments.report_style import CSS, LIMITS
from experiments.verdict import (
  KIND_WORDS,
  arm_verdict,
  column,
  count,
  domain_sentence,
  edge_sentences,
  floor_sentence,
  number,
  seeds_cell,
  shown_sentence,
  tier_sentence,
)

FLAGS = flags.FLAGS
CAPTIONS = {
  'differences': (
    'Gains and losses',
    'Difference to the baseline at the end of training; lines are 95% intervals over paired seeds. '
    'An interval that crosses zero decides nothing.',
  ),
  'curves': (
    'Validation loss, domain by domain',
    'Mean over seeds; the shade spans them. The dashed line is a byte-bigram model fitted on the '
    'same text. The vertical axes differ, do not start at zero, and cut off the first quarter.',
  ),
  'frontier': (
    'What the numbers cost',
    'Matrix products of the compiled step, forward and backward, times the steps. Lower and '
    'further left is better; a way to choose rows must beat random rows at the same cost.',
  ),
  'learning_rates': (
    'Learning rates',
    'Every arm got the same grid on the same seeds. A ring marks the rate that was used, a cross '
    'one that diverged.',
  ),
  'domain_weights': (
    'Which domains were pushed down or up',
    'Mean weight of the examples of each domain in a batch, averaged over seeds and smoothed. '
    'Above 1 a domain counts more than under uniform weights, below 1 less.',
  ),
  'mixtures': (
    'How the mixture changed',
    'Share of each domain, averaged over seeds and smoothed: in the batches for methods that '
    'sample, in the loss for methods that weigh. The line is the equal share.',
  ),
  'epochs': (
    'Epochs consumed',
    'How often each arm went through the blocks of each domain, averaged over seeds. To the right '
    'of the line a domain was repeated.',
  ),
  'alignment': (
    'Which domains pull alike',
    "Cosine between the gradients of the domains' losses at the end of training. Where it is high, "
    'training on one domain helps the other.',
  ),
  'concentration': (
    'How much of each batch was used',
    'Uniform weights sit at 1, 1 and one over the batch size. The lower the effective sample size, '
    'the noisier the gradient.',
  ),
}


def write(board: Board, folder: str | Path, describe: Describe | None = None) -> Path:
  """Writes `report.html` and `plots/*.png` into `folder`; returns the page's path.

  Args:
    board: what to report.
    folder: made if it is missing.
    describe: (run, example id) -> {'domain', 'doc', 'text'} or None; default: look in the
      prepared data, if they are still there.
  """
  folder = Path(folder)
  (folder / 'plots').mkdir(parents=True, exist_ok=True)
  figures = []
  for name in plots.FIGURES:
    light = plots.render(board, name, plots.LIGHT)
    if light is not None:
      (folder / 'plots' / f'{name}.png').write_bytes(light)
      figures.append(figure(name, light, plots.render(board, name, plots.DARK)))
  page = folder / 'report.html'
  files.write_text(page, build(board, figures, describe or DocumentFinder()))
  return page


def build(board: Board, figures: list[Html], describe: Describe) -> Html:
  """The whole page."""
  names = [arm.name for arm in board.arms]
  title = f'{names[0]} against {", ".join(names[1:])}' if names[1:] else names[0]
  head = join(
    Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
    Html('<meta name="color-scheme" content="light dark">'),
    # The browser itself refuses to fetch anything, whatever a document's text says.
    Html(
      '<meta http-equiv="Content-Security-Policy" '
      "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    ),
    tag('title', f'{title} · jaxrw'),
    tag('style', Html(CSS)),
  )
  body = tag(
    'main',
    header_section(board, title),
    verdict_section(board),
    numbers_section(board),
    *figures,
    documents_section(board, describe),
    settings_section(board),
    tag('section', tag('h2', 'Limits'), tag('ul', *(tag('li', text) for text in LIMITS))),
  )
  return Html(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n')


def header_section(board: Board, title: str) -> Html:
  config = next((run.config for arm in board.arms for run in arm.runs), {})
  data = config.get('data', {})
  source = data.get('path') or data.get('name') or data.get('source', 'unknown')
  seeds = max((len(arm.runs) for arm in board.arms), default=0)
  facts = f'{source} text · {config.get("total_steps", "?")} steps · {count(seeds, "seed")}'
  return tag('header', tag('p', 'jaxrw comparison', class_='kicker'), tag('h1', title),
             tag('p', facts, class_='facts'))  # fmt: skip


def verdict_section(board: Board) -> Html:
  """The answer in words, before any number needs reading."""
  cards = []
  for arm in board.arms[1:]:
    verdict = arm_verdict(board, arm)
    cards.append(
      tag(
        'li',
        tag('span', KIND_WORDS[verdict.kind], class_=f'badge {verdict.kind}'),
        tag('p', minus(verdict.text)),
        tag('p', minus(domain_sentence(board, arm)), class_='aside'),
      )
    )
  warnings = [*edge_sentences(board), *unfinished_sentences(board)]
  return tag(
    'section',
    tag('h2', 'Verdict'),
    tag('p', tier_sentence(board), class_=f'tier {board.tier}'),
    tag('p', floor_sentence(board)),
    tag('ul', *cards, class_='cards')
    if cards
    else tag('p', 'One arm: nothing to compare it with.'),
    *(tag('p', text, class_='warning') for text in warnings),
  )


def unfinished_sentences(board: Board) -> list[str]:
  pending = [(arm, [r for r in arm.runs if not r.finished]) for arm in board.arms]
  return [
    f'{arm.name}: {count(len(runs), "run")} not finished and left out of every average.'
    for arm, runs in pending
    if runs
  ]


def numbers_section(board: Board) -> Html:
  """Means and paired differences as tables."""
  header = ['', 'learning rate', 'seeds', *(column(metric) for metric in board.shown_rows)]
  means = [
    [arm.name, 'diverged' if arm.lr is None else f'{arm.lr:g}', seeds_cell(arm)]
    + [number(arm.mean(metric)) for metric in board.shown_rows]
    for arm in board.arms
  ]
  floors = [number(board.floor(metric)) for metric in board.shown_rows]
  if any(cell != '-' for cell in floors):
    means.append(['byte bigram', '', '', *floors])
  parts = [
    tag('h2', 'Numbers'),
    tag(
      'p',
      'Final validation bits per byte (columns named loss: nats per token), mean over '
      'seeds; lower is better.',
    ),
    tag('p', shown_sentence(board)),
    table(header, means),
  ]
  arms = board.arms[1:]
  if arms:
    rows = [
      [column(metric), *(difference_cell(board, arm, metric) for arm in arms)]
      for metric in board.shown_rows
    ]
    parts += [
      tag(
        'p',
        f'Difference to {board.baseline.name}, with its 95% interval over paired seeds and '
        'the smallest effect that these seeds would find with 80% power. '
        '▼ lower and so better, ▲ higher and so worse, ○ not distinguishable.',
      ),
      table(['', *(arm.name for arm in arms)], rows, class_='differences'),
    ]
  return tag('section', *parts)


def difference_cell(board: Board, arm: Arm, metric: str) -> Html:
  result = board.difference(arm, metric)
  if result is None:
    return Html('-')
  if result.low is None:
    return join(tag('b', minus(f'{result.mean:+.4f}')), tag('small', 'one seed, no interval'))
  mark, kind = {'lower': ('▼', 'better'), 'higher': ('▲', 'worse')}.get(result.verdict, ('○', ''))
  return join(
    tag('b', minus(f'{mark} {result.mean:+.4f}'), class_=kind),
    tag('small', minus(f'{result.low:+.4f} to {result.high:+.4f}')),
    tag('small', f'detectable: {result.detectable:.4f}'),
  )


def figure(name: str, light: bytes, dark: bytes) -> Html:
  """Both themes inline; the browser picks one."""
  title, caption = CAPTIONS[name]
  width = int.from_bytes(light[16:20]) * 96 // plots.DPI  # as large as drawn, in CSS pixels
  image = Html(
    f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">'
    f'<img src="{data_uri(light)}" width="{width}" alt="{title}: {caption}"></picture>'
  )
  return tag(
    'section',
    tag('h2', title),
    tag('figure', tag('div', image, class_='x'), tag('figcaption', caption)),
  )


def data_uri(png: bytes) -> str:
  return f'data:image/png;base64,{base64.b64encode(png).decode()}'


def settings_section(board: Board) -> Html:
  """What was equal in all runs, software, corpus; enough to run it again."""
  runs = [run for arm in board.arms for run in arm.runs]
  if not runs:
    return Html('')
  from experiments.config import flatten

  configs = [flatten(run.config) for run in runs]
  keys = sorted(set().union(*configs))
  shared = [[k, show(configs[0].get(k))] for k in keys if all_equal([c.get(k) for c in configs])]
  varied = [
    [k, ', '.join(dict.fromkeys(show(c[k]) for c in configs if k in c))]
    for k in keys
    if not all_equal([c.get(k) for c in configs])
  ]
  result = next(iter(board.results), {})
  corpus = result.get('corpus', {})
  facts = [[f'version of {name}', str(v)] for name, v in result.get('versions', {}).items()]
  facts += [[f'corpus: {key}', show(value)] for key, value in corpus.items()]
  for key, name in (('epochs', 'passes over each domain'), ('devices', 'devices')):
    facts += [[name, show(result[key])]] if key in result else []
  seconds = [float(r['seconds']) for r in board.results if 'seconds' in r]
  facts += [['time of all these runs', f'{sum(seconds) / 60:.1f} min']]
  return tag(
    'section',
    tag('h2', 'Settings'),
    tag('p', 'What differed between the runs:'),
    table(['setting', 'values'], varied, class_='settings'),
    tag('details', tag('summary', 'What all runs shared'), table(['setting', 'value'], shared,
        class_='settings')),
    tag('details', tag('summary', 'Software and data'), table(['', ''], facts, class_='settings')),
  )  # fmt: skip


def show(value: Any) -> str:
  return value if isinstance(value, str) and value else json.dumps(value)


def all_equal(values: list[Any]) -> bool:
  return all(value == values[0] for value in values)


def minus(text: str) -> str:
  """Hyphens that start a number become minus signs, which are as wide as the plus."""
  return re.sub(r'(?<![\w.])-(?=\d)', '\N{MINUS SIGN}', text)


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_string('out', '', 'folder to write to; default: the one that is reported on')


def main(paths: list[str]) -> None:
  if not paths:
    raise UserError('which runs? try: python -m experiments.report runs/board')
  if len(paths) > 1 and not FLAGS.out:
    raise UserError('--out is missing: with several runs, say where the report goes')
  print(write(load_board(paths), FLAGS.out or paths[0]))


if __name__ == '__main__':
  define_flags()
  cli.run(main, positional=True)
