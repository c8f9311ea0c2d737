"""The report's section on documents: which a weighting pushed down or up, and how they read."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.board import Board, Run
from experiments.markup import Html, tag
from experiments.movers import Mover, extremes, movers
from experiments.verdict import count

Describe = Callable[[Run, int], Mapping[str, Any] | None]

SHOWN = 5  # documents at either end


def documents_section(board: Board, describe: Describe) -> Html:
  """The lightest and heaviest training blocks of each arm's first finished run."""
  parts = []
  for arm in board.arms:
    run = next(iter(arm.survivors), None)
    ordered = movers(run.lines('examples.jsonl')) if run else []
    if not ordered:
      continue
    pick = functools.partial(describe, run)
    down, up = (distinct(side, pick) for side in extremes(ordered, 8 * SHOWN))
    parts += [
      tag('h3', f'{arm.name}, seed {run.seed}: {count(len(ordered), "block")} seen'),
      tag('h4', 'pushed down'), documents(down),
      tag('h4', 'pushed up'), documents(up),
    ]  # fmt: skip
  if not parts:
    parts = [tag('p', 'No arm gave unequal weights, or no run kept its examples.')]
  else:
    parts.insert(
      0,
      tag('p', 'Training blocks by their mean weight; where weights tie, the lowest losses are '
          'listed as pushed down and the highest as pushed up. A block is named after the document '
          'it begins in. Steps with equal weights, such as the burn-in, are left out.'),
    )  # fmt: skip
  return tag('section', tag('h2', 'Which documents were pushed down or up'), *parts)


def distinct(
  side: list[Mover], describe: Callable[[int], Mapping[str, Any] | None]
) -> list[tuple[Mover, Mapping[str, Any] | None]]:
  """The first few, no document twice."""
  found, seen = [], set()
  for mover in side:
    about = describe(mover.example_id)
    key = (about['domain'], about['doc']) if about else mover.example_id
    if key not in seen:
      seen.add(key)
      found.append((mover, about))
    if len(found) == SHOWN:
      break
  return found


def documents(side: list[tuple[Mover, Mapping[str, Any] | None]]) -> Html:
  items = []
  for mover, about in side:
    place = f'{about["domain"]} · {about["doc"]}' if about else f'example {mover.example_id}'
    facts = (
      f'weight {mover.weight:.3f} · loss {mover.loss:.2f} nats · seen {count(mover.seen, "time")}'
    )
    snippet = [tag('pre', str(about['text'])[:280])] if about else []
    items.append(tag('li', tag('b', place), ' ', tag('span', facts, class_='aside'), *snippet))
  return tag('ol', *items, class_='documents')


class DocumentFinder:
  """Finds documents in the very data that a run was trained on; None where those are gone."""

  def __init__(self):
    self.corpora: dict[str, Any] = {}

  def __call__(self, run: Run, example_id: int) -> Mapping[str, Any] | None:
    fingerprint = ((run.result or {}).get('corpus') or {}).get('fingerprint', '')
    if fingerprint not in self.corpora:
      root = run.config.get('data', {}).get('root', '')
      self.corpora[fingerprint] = find_corpus(fingerprint, root)
    corpus = self.corpora[fingerprint]
    return corpus.describe(example_id) if corpus else None


def find_corpus(fingerprint: str, root: str):
  """The prepared corpus with this fingerprint, or None. Prepares nothing."""
  folder = Path(root or os.environ.get('JAXRW_DATA') or '~/.cache/jaxrw').expanduser()
  for meta in sorted(folder.glob('*/meta.json')):
    if hashlib.sha256(meta.read_bytes()).hexdigest() == fingerprint:
      from experiments.data.corpus import Corpus

      return Corpus(meta.parent)
  return None
