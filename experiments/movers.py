"""Which training examples a weighting pushed down or up, from a run's `examples.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

TOLERANCE = 1e-6


class Mover(NamedTuple):
  """One example: its mean weight and mean loss over the times it was seen under unequal weights."""

  example_id: int
  weight: float
  loss: float
  seen: int


def movers(rows: Iterable[Mapping[str, Any]]) -> list[Mover]:
  """Every example seen, lightest first; equal weights are ordered by loss.

  A step whose weights are all equal (burn-in, or the uniform weighting) says nothing about which
  example was preferred and is left out.

  Args:
    rows: {'example_id': [B], 'weight': [B], 'loss': [B]} of one step each. A weight of None or NaN
      is left out.
  """
  sums: dict[int, list[float]] = {}
  for row in rows:
    weights = [w for w in row['weight'] if w is not None]
    if not weights or max(weights) - min(weights) <= TOLERANCE * max(1.0, max(map(abs, weights))):
      continue
    for example_id, weight, loss in zip(row['example_id'], row['weight'], row['loss'], strict=True):
      if weight is None or loss is None or weight != weight:
        continue
      total = sums.setdefault(int(example_id), [0.0, 0.0, 0.0])
      total[0] += weight
      total[1] += loss
      total[2] += 1
  found = [Mover(i, w / n, loss / n, int(n)) for i, (w, loss, n) in sums.items()]
  return sorted(found, key=lambda m: (round(m.weight, 6), m.loss, m.example_id))


def extremes(ordered: list[Mover], k: int) -> tuple[list[Mover], list[Mover]]:
  """The k lightest and the k heaviest (heaviest first), without overlap."""
  k = min(k, len(ordered) // 2)
  return ordered[:k], ordered[len(ordered) - k :][::-1]
