"""What a comparison knows once its runs are on disk: arms, seeds, values, differences, tier.

A *run* is one directory written by `experiments.train`. An *arm* is one weighting at its best
learning rate, with one run per seed. The first arm is the baseline. Reading is all that happens
here: no accelerator, no plots, so a report can be rebuilt anywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import files, metrics, stats
from experiments.errors import UserError

METRICS = {
  'macro_bpb': 'macro bits per byte',
  'micro_bpb': 'micro bits per byte',
  'worst_bpb': 'worst-domain bits per byte',
  'macro_loss': 'macro nats per token',
  'micro_loss': 'micro nats per token',
}


ALIGNMENT = 'alignment.json'  # of a run, where experiments.alignment has read it
MAX_DOMAINS = 16  # in tables and pictures
EVIDENCE_PARAMS = 15e6
EVIDENCE_TOKENS = 100e6


def metric_title(metric: str) -> str:
  """A metric in words."""
  domain = metric.removeprefix('bpb/')
  return METRICS.get(metric) or (f'bits per byte of {domain}' if domain != metric else metric)


@dataclass(frozen=True)
class Run:
  """One run directory. Values are read once, on first use."""

  path: Path

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    return _json_or_none(self.path / 'config.json') or {}

  @functools.cached_property
  def result(self) -> dict[str, Any] | None:
    return _json_or_none(self.path / 'result.json')

  @functools.cached_property
  def alignment(self) -> dict[str, Any] | None:
    return _json_or_none(self.path / ALIGNMENT)

  @functools.cached_property
  def metrics(self) -> list[dict[str, Any]]:
    return self.lines('metrics.jsonl')

  def lines(self, name: str) -> list[dict[str, Any]]:
    """Rows of one of its JSON-lines files; none if it has no such file."""
    path = self.path / name
    return metrics.read_jsonl(path) if path.exists() else []

  def rows(self, kind: str) -> list[dict[str, Any]]:
    return [row for row in self.metrics if row.get('kind') == kind]

  @property
  def seed(self) -> int:
    return int(self.config.get('seed', 0))

  @property
  def lr(self) -> float:
    return float(self.config.get('optim', {}).get('lr', math.nan))

  @property
  def diverged(self) -> bool:
    return self.result is None and (self.path / 'abort.json').exists()

  @property
  def finished(self) -> bool:
    """Nothing is left to do: it reached the end, or it diverged and would do so again."""
    return self.result is not None or self.diverged

  def value(self, metric: str) -> float:
    """The final value of 'macro_bpb', ..., 'bpb/<domain>' or, their mean, 'bpb/<domain>+<domain>'.

    inf if the run diverged (or finished without a finite number), nan if it is unfinished.
    """
    if self.result is None:
      return math.inf if self.diverged else math.nan
    value = lookup(self.result.get('final', {}), metric)
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Arm:
  """One weighting at its best learning rate.

  `grid` holds (learning rate, mean value on the tuning seeds) of every rate tried; `lr` is None,
  and `runs` empty, when every rate diverged. `step_flops` are the matmul FLOPs of one compiled
  step, counted where arms differ in more than the weighting.
  """

  name: str
  lr: float | None
  runs: tuple[Run, ...]
  grid: tuple[tuple[float, float], ...] = ()
  step_flops: float | None = None

  @property
  def edge(self) -> str | None:
    """'lowest' or 'highest' when the best rate is the grid's last one on that side."""
    rates = [lr for lr, _ in self.grid]
    if self.lr is None or len(rates) < 2:
      return None
    return {min(rates): 'lowest', max(rates): 'highest'}.get(self.lr)

  @property
  def survivors(self) -> tuple[Run, ...]:
    return tuple(run for run in self.runs if run.result is not None)

  def values(self, metric: str) -> dict[int, float]:
    """Finite final values by seed."""
    pairs = ((run.seed, run.value(metric)) for run in self.runs)
    return {seed: value for seed, value in pairs if math.isfinite(value)}

  def mean(self, metric: str) -> float:
    values = list(self.values(metric).values())
    return sum(values) / len(values) if values else math.nan

  @property
  def alignment(self) -> dict[str, Any] | None:
    """What `experiments.alignment` has read in the first of the runs that it was pointed at."""
    return next((found for run in self.runs if (found := run.alignment) is not None), None)

  @property
  def diverged_seeds(self) -> list[int]:
    return [run.seed for run in self.runs if run.value('macro_bpb') == math.inf]


@dataclass(frozen=True)
class Board:
  """Arms in the order they were asked for; lower is better for every metric."""

  arms: tuple[Arm, ...]
  metric: str = 'macro_bpb'

  @property
  def baseline(self) -> Arm:
    return self.arms[0]

  @functools.cached_property
  def results(self) -> list[dict[str, Any]]:
    return [run.result for arm in self.arms for run in arm.survivors]

  @property
  def domains(self) -> tuple[str, ...]:
    """In the corpus's order where it is known."""
    for result in self.results:
      known = result.get('corpus', {}).get('domains') or ()
      measured = result.get('final', {}).get('bpb', {})
      return tuple(d for d in known if d in measured) or tuple(measured)
    return ()

  @property
  def rows(self) -> tuple[str, ...]:
    """Every metric: the chosen one first, then the averages, then every domain."""
    return self._rows(self.domains)

  @property
  def shown_rows(self) -> tuple[str, ...]:
    """The metrics worth a row in a table or picture: `rows` of `shown_domains`."""
    return self._rows(self.shown_domains)

  def _rows(self, domains: Sequence[str]) -> tuple[str, ...]:
    averages = (self.metric, 'macro_bpb', 'micro_bpb', 'worst_bpb')
    return tuple(dict.fromkeys((*averages, *(f'bpb/{d}' for d in domains))))

  @functools.cached_property
  def shown_domains(self) -> tuple[str, ...]:
    """All domains, or of very many those in which arms differ most (a single arm: is worst), in the
    corpus's order."""
    if len(self.domains) <= MAX_DOMAINS:
      return self.domains

    def spread(domain: str) -> float:
      means = [arm.mean(f'bpb/{domain}') for arm in self.arms]
      known = [mean for mean in means if math.isfinite(mean)]
      if len(self.arms) == 1:
        return max(known, default=0.0)
      return max(known, default=0.0) - min(known, default=0.0)

    chosen = set(sorted(self.domains, key=spread)[-MAX_DOMAINS:])
    return tuple(domain for domain in self.domains if domain in chosen)

  def floor(self, metric: str) -> float:
    """Bits per byte of the byte-bigram model; nan where it does not apply."""
    floors = next((r['bigram_floor'] for r in self.results if r.get('bigram_floor')), {})
    if metric.startswith('bpb/'):
      return lookup({'bpb': floors}, metric)
    if not floors or metric not in ('macro_bpb', 'worst_bpb'):
      return math.nan
    values = list(floors.values())
    return sum(values) / len(values) if metric == 'macro_bpb' else max(values)

  def difference(self, arm: Arm, metric: str) -> stats.Paired | None:
    """Arm minus baseline over the seeds that both finished; None when there is no such seed."""
    ours, base = arm.values(metric), self.baseline.values(metric)
    seeds = sorted(ours.keys() & base.keys())
    return stats.paired([ours[s] for s in seeds], [base[s] for s in seeds]) if seeds else None

  @property
  def size(self) -> tuple[int, int]:
    """(parameters, tokens) of the smallest finished run; (0, 0) without one."""
    sizes = [(int(r.get('num_params', 0)), int(r.get('tokens', 0))) for r in self.results]
    return (min(p for p, _ in sizes), min(t for _, t in sizes)) if sizes else (0, 0)

  @property
  def tier(self) -> str:
    """'evidence' for runs large enough to argue from, else 'mechanics', which ranks nothing."""
    params, tokens = self.size
    return 'evidence' if params >= EVIDENCE_PARAMS and tokens >= EVIDENCE_TOKENS else 'mechanics'


def load_board(paths: Sequence[str | Path]) -> Board:
  """A board from one comparison directory (`compare.json`) or from any run directories."""
  folders = [Path(path) for path in paths]
  if len(folders) == 1 and (folders[0] / 'compare.json').exists():
    return load_comparison(folders[0])
  for folder in folders:
    if not (folder / 'config.json').exists():
      raise UserError(
        f'{str(folder)!r} is neither a comparison (compare.json) nor a run (config.json); '
        'pass the --workdir of experiments.compare or of experiments.main'
      )
  return board_of_runs([Run(folder) for folder in folders])


def load_comparison(folder: Path) -> Board:
  """The board that `experiments.compare` recorded in `folder`."""
  record = files.read_json(folder / 'compare.json')
  try:
    return Board(
      tuple(
        Arm(
          name=arm['name'],
          lr=arm['lr'],
          runs=tuple(Run(folder / run) for run in arm['runs']),
          grid=tuple(
            (p['lr'], math.inf if p['value'] is None else p['value']) for p in arm['grid']
          ),
          step_flops=arm.get('step_flops'),
        )
        for arm in record['arms']
      ),
      record['metric'],
    )
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{folder / "compare.json"} is not what experiments.compare writes; run it again, which '
      'trains nothing twice'
    ) from error


def board_of_runs(runs: Sequence[Run]) -> Board:
  """Loose runs become arms by weighting and learning rate; 'uniform', if there, is the baseline."""
  groups: dict[tuple[str, float], list[Run]] = {}
  for run in runs:
    groups.setdefault((weighting_label(run.config), run.lr), []).append(run)
  labels = [label for label, _ in groups]
  arms = []
  for (label, lr), members in groups.items():
    name = label if labels.count(label) == 1 else f'{label} lr {lr:g}'
    arms.append(Arm(name, lr, tuple(sorted(members, key=lambda run: run.seed))))
  arms.sort(key=lambda arm: arm.name.split()[0] != 'uniform')
  return Board(tuple(arms))


def weighting_label(config: dict[str, Any]) -> str:
  """'uniform', 'linupper:0.4', 'row_shuffled:linupper:0.4', with later stages as '+cap'."""
  stages = list(config.get('weighting') or ())
  specs = config.get('w') or {}
  return '+'.join(_stage_label(specs.get(stage) or {}, stage) for stage in stages) or 'uniform'


def _stage_label(spec: dict[str, Any], fallback: str) -> str:
  parts = [str(spec.get('fn', fallback))]
  if isinstance(spec.get('stage'), dict):
    parts.append(_stage_label(spec['stage'], ''))
  temperature = spec.get('temperature')
  if temperature is not None:
    is_number = isinstance(temperature, (int, float))
    parts.append(f'{temperature:g}' if is_number else 'scheduled')
  return ':'.join(parts)


def lookup(row: dict[str, Any], path: str) -> float:
  """row['bpb']['web'] for 'bpb/web', row['loss'] for 'loss'; nan if absent or null.

  'bpb/web+qa' is the mean of the two.
  """
  group, _, name = path.partition('/')
  found = row.get(group)
  if name:
    found = found if isinstance(found, dict) else {}
    if '+' in name and name not in found:
      names = name.split('+')
      return sum(lookup(row, f'{group}/{each}') for each in names) / len(names)
    found = found.get(name)
  return float(found) if isinstance(found, (int, float)) else math.nan


def _json_or_none(path: Path) -> dict[str, Any] | None:
  found = files.read_json(path) if path.exists() else None
  if not isinstance(found, dict | None):
    raise UserError(f'{path} is damaged; restore it from a copy, or leave the run out')
  return found
