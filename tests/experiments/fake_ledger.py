"""Made-up examples for the ledger; imported by processes that are killed, so nothing slow here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

# Examples 0 .. 9 are easy, 10 .. 29 hard.
CORPUS = SimpleNamespace(domains=('easy', 'hard'), offsets=lambda split: np.array([0, 10]))
ROWS = 8


def examples(step: int, target: bool = False) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  made = {
    'example_id': rng.permutation(30)[:ROWS].astype(np.int32),
    'loss': rng.gamma(4.0, 0.7, ROWS).astype(np.float32),
    'weight': rng.gamma(1.0, 1.0, ROWS).astype(np.float32),
  }
  return made | ({'target_dot': rng.normal(size=ROWS).astype(np.float32)} if target else {})
