"""What came out of a sweep: one table, as CSV and Parquet, and one picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from matplotlib.figure import Figure

from experiments import files, plots, stats
from experiments.board import METRICS, metric_title
from experiments.compare import arm_name
from experiments.sweep.units import Unit, shown
from experiments.verdict import column, format_table

RATE, SEED = 'optim.lr', 'seed'
TICKS = 8  # more values than these are not all named on the axis


class Group(NamedTuple):
  """Units that differ in nothing but the seed.

  `settings` holds what they share of what the sweep changes; `values` the finite final values of a
  metric; `diverged` counts units without one. `interval` is the 95% interval of the mean over
  seeds, None for fewer than two.
  """

  settings: dict[str, Any]
  values: tuple[float, ...]
  diverged: int

  @property
  def mean(self) -> float:
    return sum(self.values) / len(self.values) if self.values else math.nan

  @property
  def interval(self) -> tuple[float, float] | None:
    if len(self.values) < 2:
      return None
    result = stats.paired(self.values, np.zeros(len(self.values)))  # of the values themselves
    return result.low, result.high


def groups(units: Iterable[Unit], metric: str) -> list[Group]:
  """Finished and diverged units by their settings without the seed, in the order of the sweep."""
  found: dict[str, tuple[dict, list[float]]] = {}
  for unit in units:
    if unit.run.finished:
      settings = {k: v for k, v in unit.overrides.items() if k != SEED}
      found.setdefault(str(sorted(settings.items())), (settings, []))[1].append(
        unit.run.value(metric)
      )
  return [
    Group(settings, tuple(filter(math.isfinite, values)), sum(map(math.isinf, values)))
    for settings, values in found.values()
  ]


def write(units: Sequence[Unit], metric: str, folder: Path) -> str:
  """Writes results.csv, results.parquet and, if it has more than one group, sweep.png.

  Returns:
    The table for a terminal, and what was written.
  """
  table = pa.Table.from_pylist(rows(units), pa.schema(_fields(units)))
  paths = [folder / 'results.csv', folder / 'results.parquet']
  for path, save in zip(paths, (pyarrow.csv.write_csv, pyarrow.parquet.write_table)):
    with files.replacing(path) as temporary:
      save(table, temporary)
  found = groups(units, metric)
  image = plots.draw_png(lambda: draw(found, metric, plots.LIGHT), plots.LIGHT)
  if image is not None:
    paths.append(folder / 'sweep.png')
    with files.replacing(paths[-1]) as temporary:
      temporary.write_bytes(image)
  return f'{text(found, metric)}\n\n' + '\n'.join(map(str, paths))


def rows(units: Sequence[Unit]) -> list[dict[str, Any]]:
  """One row for each unit: its overrides, its state, its final numbers."""
  metrics = _metrics(units)
  return [
    {
      'unit': unit.name,
      **{key: _cell(value) for key, value in unit.overrides.items()},
      'state': 'diverged' if unit.run.diverged else 'done' if unit.run.finished else 'unfinished',
      **{name: (unit.run.result or {}).get(name) for name in ('steps', 'tokens', 'seconds')},
      **{name: _finite(unit.run.value(name)) for name in metrics},
    }
    for unit in units
  ]


def _fields(units: Sequence[Unit]) -> list[tuple[str, pa.DataType]]:
  kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
  changed = {
    key: kinds.get(type(value), pa.string())
    for unit in units
    for key, value in unit.overrides.items()
  }
  counted = {'steps': pa.int64(), 'tokens': pa.int64(), 'seconds': pa.float64()}
  measured = dict.fromkeys(_metrics(units), pa.float64())
  return list({'unit': pa.string(), **changed, 'state': pa.string(), **counted, **measured}.items())


def _metrics(units: Iterable[Unit]) -> list[str]:
  finals = ((unit.run.result or {}).get('final', {}) for unit in units)
  domains = dict.fromkeys(domain for final in finals for domain in final.get('bpb', {}))
  return [*METRICS, *(f'bpb/{domain}' for domain in domains)]


def _cell(value: Any) -> Any:
  return shown(value) if isinstance(value, tuple) else value


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def text(found: Sequence[Group], metric: str) -> str:
  """Means over seeds, aligned."""
  keys = _keys(found)
  body = []
  for group in found:
    low_high = group.interval
    half = f' ± {group.mean - low_high[0]:.4f}' if low_high else ''
    seeds = f'{len(group.values)}' + f', {group.diverged} diverged' * bool(group.diverged)
    mean = f'{group.mean:.4f}{half}' if group.values else 'diverged'
    body.append([*(_name(group, [key]) for key in keys), seeds, mean])
  header = [*(key.rpartition('.')[2] for key in keys), 'seeds', column(metric)]
  return f'{metric_title(metric)}, mean ± 95% interval over seeds\n\n' + format_table(header, body)


def _keys(found: Iterable[Group]) -> list[str]:
  return list(dict.fromkeys(key for group in found for key in group.settings))


def _name(group: Group, keys: Iterable[str]) -> str:
  """'linupper:1.0', 'linupper:1.0 clip=0.5': what tells a group from others, in these keys."""
  parts = []
  for key in keys:
    if key in group.settings:
      value = shown(group.settings[key])
      parts.append(arm_name(value) if key == 'arm' else value)
  return ' '.join(parts) or '-'


def draw(found: Sequence[Group], metric: str, theme: plots.Theme) -> Figure | None:
  """The metric by arm over the learning rate (or the first other number that the sweep changes),
  with 95% intervals over seeds; a cross marks settings of which a seed diverged."""
  if len(found) < 2 or not any(group.values for group in found):
    return None
  keys = _keys(found)
  x = next((key for key in sorted(keys, key=lambda key: key != RATE) if _is_axis(found, key)), None)
  lines: dict[str, list[Group]] = {}
  for group in found:
    lines.setdefault(_name(group, [key for key in keys if key != x]), []).append(group)
  figure = Figure(figsize=(7.2, 4), layout='constrained')
  ax = figure.subplots()
  top = max(group.mean for group in found if group.values)
  for i, (name, members) in enumerate(lines.items()):
    style = plots.style_of(i, theme)
    members = sorted(members, key=lambda group: group.settings[x] if x else 0)
    places = _beside([g.settings[x] for g in members], i, len(lines), x == RATE) if x else [i]
    good = [(place, group) for place, group in zip(places, members) if group.values]
    ax.plot(
      [place for place, _ in good], [group.mean for _, group in good], lw=1.4,
      marker=plots.marker_of(i), ms=5.5, label=name, **style,
    )  # fmt: skip
    for place, group in good:
      if group.interval:
        ax.plot([place] * 2, group.interval, color=style['color'], lw=2, alpha=0.6)
    for place, group in zip(places, members):
      if group.diverged:
        ax.plot(place, top, 'x', color=style['color'], ms=8, mew=2)
  if x:
    values = sorted({group.settings[x] for group in found})
    ax.set_xscale('log' if x == RATE else 'linear')
    if len(values) <= TICKS:
      ax.set_xticks(values, [shown(value) for value in values])
      ax.minorticks_off()
    ax.set_xlabel('peak learning rate (log scale)' if x == RATE else x)
    figure.legend(loc='outside upper left', ncols=4, frameon=False)
  else:
    ax.set_xticks(range(len(lines)), list(lines))
    ax.set_xlim(-0.5, len(lines) - 0.5)
  ax.set_ylabel(f'{metric_title(metric)},\nmean and 95% interval over seeds')
  ax.grid(axis='y')
  return figure


def _beside(values: Sequence[float], line: int, lines: int, factors: bool) -> list[float]:
  """The values, each line's a little to the side of the others', so that intervals can be seen."""
  shift = 0.02 * (line - (lines - 1) / 2)
  return [value * math.exp(shift) if factors else value * (1 + shift) for value in values]


def _is_axis(found: Sequence[Group], key: str) -> bool:
  """Whether every group has a number under this key, and not all the same."""
  values = [group.settings.get(key) for group in found]
  return all(isinstance(v, (int, float)) for v in values) and len(set(values)) > 1
