"""Run directories as `experiments.train` writes them, made up in milliseconds."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from experiments import config as config_lib
from experiments.board import weighting_label
from experiments.errors import NonFiniteError

DOMAINS = ('code', 'docs', 'prose', 'tables')
FLOOR = {'code': 3.4, 'docs': 3.6, 'prose': 3.5, 'tables': 2.6}


def final_bpb(label: str, lr: float, seed: int) -> dict[str, float]:
  """Noise shared by all arms of a seed, a bowl in log lr around 3e-3, and an effect of the arm."""
  shared = np.random.default_rng(seed).normal(0, 0.02, len(DOMAINS))
  own = np.random.default_rng([seed, zlib.crc32(label.encode())]).normal(0, 0.004, len(DOMAINS))
  bowl = 0.05 * np.log(lr / 3e-3) ** 2
  effect = {
    'uniform': [0, 0, 0, 0],
    'linupper:1': [-0.03, 0.005, -0.04, 0.15],
    'linupper:0.4': [0.02, 0.05, -0.03, 0.4],
  }.get(label, [0.001, -0.001, 0.002, 0.0])
  values = np.array([2.9, 3.1, 3.3, 1.8]) + shared + own + bowl + np.array(effect)
  return dict(zip(DOMAINS, values.tolist()))


def summary(bpb: dict[str, float]) -> dict:
  worst = max(bpb, key=bpb.__getitem__)
  mean = sum(bpb.values()) / len(bpb)
  return {
    'bpb': bpb,
    'loss': {d: v * 0.69 for d, v in bpb.items()},
    'macro_bpb': mean,
    'micro_bpb': mean + 0.01,
    'worst_bpb': bpb[worst],
    'worst_domain': worst,
    'macro_loss': mean * 0.69,
    'micro_loss': mean * 0.69,
  }


def write_jsonl(path: Path, rows: list[dict]) -> None:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


class FakeTrain:
  """A stand-in for `experiments.train.train` that remembers what it was asked for.

  Args:
    diverges: (label, lr, seed) -> bool.
    steps: optimizer steps of a run.
    num_params, tokens: written to result.json; they decide the tier.
  """

  def __init__(self, diverges=lambda *_: False, *, steps=200, num_params=3e5, tokens=1e6):
    self.diverges = diverges
    self.steps = steps
    self.num_params, self.tokens = int(num_params), int(tokens)
    self.calls: list[tuple[str, float, int]] = []

  def __call__(self, config, workdir) -> None:
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    label, lr, seed = weighting_label(config.to_dict()), config.optim.lr, config.seed
    self.calls.append((label, lr, seed))
    config_lib.write(folder, config)
    if self.diverges(label, lr, seed):
      (folder / 'abort.json').write_text('{"step": 3}')
      raise NonFiniteError('loss is nan at step 3')
    bpb = final_bpb(label, lr, seed)
    write_jsonl(folder / 'metrics.jsonl', self.metrics(label, bpb, seed))
    write_jsonl(folder / 'examples.jsonl', self.examples(label, seed))
    result = {
      'status': 'done',
      'steps': self.steps,
      'tokens': self.tokens,
      'num_params': self.num_params,
      'final': summary(bpb),
      'bigram_floor': FLOOR,
      'bigram_floor_macro': sum(FLOOR.values()) / 4,
      'corpus': {'fingerprint': 'abc123', 'domains': list(DOMAINS), 'sizes': [100, 80, 60, 40]},
      'config_hash': config_lib.config_hash(config),
      'versions': {'jax': '0.10.2', 'python': '3.11'},
      'seconds': 12.0,
    }
    (folder / 'result.json').write_text(json.dumps(result))

  def metrics(self, label: str, bpb: dict[str, float], seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    sharp = {'uniform': 0.0, 'linupper:1': 0.4}.get(label, 1.0)
    rows = []
    for step in range(10, self.steps + 1, 10):
      on = sharp * (step > 0.1 * self.steps)
      domain = {
        d: {'loss': 2.0, 'weight': 1 + on * (w + rng.normal(0, 0.05)), 'share': 0.25}
        for d, w in zip(DOMAINS, (0.1, 0.15, 0.25, -0.5))
      }
      concentration = {
        'ess': 1 - on * (0.3 + rng.normal(0, 0.02)),
        'entropy': 1 - on * 0.1,
        'max_share': 1 / 16 * (1 + on),
      }
      rows.append(
        {'kind': 'train', 'step': step, 'loss': 5 / step, **concentration, 'domain': domain}
      )
      if step % (self.steps // 10) == 0:
        fall = 5.0 * np.exp(-12 * step / self.steps)
        rows.append(
          {'kind': 'eval', 'step': step, **summary({d: v + fall for d, v in bpb.items()})}
        )
    return rows

  def examples(self, label: str, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, 41):
      losses = rng.uniform(1, 4, 8)
      weights = np.ones(8) if label == 'uniform' or step < 5 else losses / losses.mean()
      rows.append({
        'step': step, 'example_id': rng.integers(0, 280, 8).tolist(),
        'weight': weights.round(5).tolist(), 'loss': losses.round(5).tolist(),
      })  # fmt: skip
    return rows
