"""What a weighting or mode costs a train step: exact counts of the compiled program, timed ratios.

Examples:
  python -m experiments.bench.step_cost --config=configs/quickstart.py
  python -m experiments.bench.step_cost --config=configs/lm.py:layers=4,width=256 \\
      --weightings=uniform,uniform,linupper:0.4,trimmed:share=0.5@keep.rows=1@keep.groups=8 \\
      --rounds=60 --json=cost.json --plot=cost.png
  python -m experiments.bench.step_cost --config=configs/quickstart.py --baseline=cost.json

An arm is a weighting and, after '@', changes of the config, as in experiments.compare. Counts
(matmul FLOPs, collectives, temporary memory) repeat exactly: of the step on 8 devices, simulated on
a CPU, or of one device with --growth, which follows them over batch, sequence and devices. Times
are of one device: every round runs each arm once, in random order, and the ratio to the first arm
is taken round by round, so that a machine that slows down slows both. The interval is that of the
mean log ratio (Student's t). --torch runs the same model in PyTorch in the same rounds, where it is
installed. --baseline prints what changed since an earlier --json; counts that grew fail.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench import arms as arms_lib
from experiments.errors import UserError

_CONFIG = cli.define_config()
_WEIGHTINGS = flags.DEFINE_list(
  'weightings', ['uniform', 'uniform', 'linupper:0.4'], 'arms; the first is the reference'
)
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'timed rounds; 0: counts only', lower_bound=0)
_MICROBATCHES = flags.DEFINE_integer('microbatches', 4, 'M of the accumulated rows', lower_bound=2)
_ACCUMULATED = flags.DEFINE_list(
  'accumulated', ['linupper:0.4', 'linupper_stale:0.4'], 'arms to count under accumulation'
)
_GROWTH = flags.DEFINE_bool('growth', False, 'count over batch, sequence and devices, too')
_TORCH = flags.DEFINE_bool('torch', False, 'time the same model in PyTorch in the same rounds')
_JSON = flags.DEFINE_string('json', '', 'also write the numbers to this file')
_PLOT = flags.DEFINE_string('plot', '', 'also draw the ratios to this PNG')
_BASELINE = flags.DEFINE_string('baseline', '', 'a file written with --json to compare with')


def main(_) -> None:
  from experiments import files

  config, specs = _CONFIG.value, _WEIGHTINGS.value
  earlier = files.read_json(_BASELINE.value) if _BASELINE.value else None
  # A process that simulates 8 devices has 8 threads for one device's work, too: times taken there
  # are a third too long on 2 cores. Counting is over before this process starts jax.
  with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as process:
    record = process.submit(
      count_all, config, specs, _ACCUMULATED.value, _MICROBATCHES.value, _GROWTH.value
    ).result()
  if _ROUNDS.value:
    import jax

    devices = jax.devices()[:1]
    record['times'] = measure(config, specs, _ROUNDS.value, devices, with_torch=_TORCH.value)
    print('\n' + format_times(record['times']), flush=True)
  if _JSON.value:
    files.write_json(_JSON.value, record)
  if _PLOT.value:
    from experiments import plots

    figure = lambda: plots.draw_step_cost(record, plots.LIGHT)
    with files.replacing(_PLOT.value) as path:
      path.write_bytes(plots.draw_png(figure, plots.LIGHT))
  if earlier is not None:
    changes, grew = compare(record, earlier)
    print('\n' + changes)
    if grew:
      raise UserError(f'exact counts grew since {_BASELINE.value}; see above')


def count_all(
  config, arms: list[str], accumulated: list[str], microbatches: int, growth: bool
) -> dict[str, Any]:
  """Every exact count, on 8 simulated devices if there is no accelerator; printed as it comes."""
  os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
  import jax

  one = jax.devices()[:1]
  record = {'counts': count(config, arms, jax.devices()[:8])}
  print(format_counts(record['counts']), flush=True)
  record['accumulation'] = count_accumulation(config, accumulated, microbatches, one)
  print('\n' + format_accumulation(record['accumulation']), flush=True)
  if growth:
    record['growth'] = count_growth(config, [arms[0], arms[-1]], jax.devices())
    print('\n' + format_growth(record['growth']), flush=True)
  return record


def count(config, arms: list[str], devices) -> list[dict]:
  """Exact costs of every arm, and the collectives it has beyond the first."""
  from experiments import compiled, dry_run

  rows, reference = [], None
  for arm in arms:
    started = time.perf_counter()
    costs = dry_run.step_costs(arms_lib.build(config, arm, devices))
    reference = reference or costs
    extra = compiled.extra_collectives(reference, costs)
    rows.append(
      {
        'weighting': arm,
        'devices': len(devices),
        'matmul_flops': costs.matmul_flops,
        'temp_bytes': costs.temp_bytes,
        'collectives': sum(c.count for c in costs.collectives),
        'extra': [c._asdict() for c in extra],
        'build_seconds': time.perf_counter() - started,
      }
    )
  return rows


def count_accumulation(config, arms: list[str], microbatches: int, devices) -> list[dict]:
  """What accumulation costs an arm in every scope it has, against one batch of the same size."""
  from experiments import dry_run

  rows = []
  for arm in arms:
    run = arms_lib.build(config, arm, devices)
    scopes = ['microbatch', 'global']
    if run.weighting.log_weights is not None:
      scopes.insert(1, 'online')
    for m, scope in [(1, 'global'), *((microbatches, scope) for scope in scopes)]:
      costs = dry_run.step_costs(arms_lib.build(config, arm, devices, microbatches=m, scope=scope))
      rows.append(
        {
          'weighting': arm,
          'microbatches': m,
          'scope': scope,
          'matmul_flops': costs.matmul_flops,
          'temp_bytes': costs.temp_bytes,
        }
      )
  return rows


def count_growth(config, arms: list[str], devices) -> list[dict]:
  """Exact costs of arms at other sizes: batch and sequence on one device, then more devices."""
  from experiments import dry_run

  batch, length = config.batch_size, config.data.seq_len
  sizes = [(batch * k, length, 1) for k in (1, 2, 4)]
  sizes += [(batch, length // k, 1) for k in (2, 4) if length % k == 0]
  sizes += [(batch, length, n) for n in (2, 4, 8) if n <= len(devices) and batch % n == 0]
  rows = []
  for rows_of_batch, positions, count_devices in sizes:
    for arm in arms:
      changes = {'batch_size': rows_of_batch, 'data.seq_len': positions}
      costs = dry_run.step_costs(arms_lib.build(config, arm, devices[:count_devices], **changes))
      rows.append(
        {
          'weighting': arm,
          'batch_size': rows_of_batch,
          'seq_len': positions,
          'devices': count_devices,
          'matmul_flops': costs.matmul_flops,
          'temp_bytes': costs.temp_bytes,
          'collective_bytes': sum(c.bytes * c.count for c in costs.collectives),
        }
      )
  return rows


def measure(config, arms: list[str], rounds: int, devices, *, with_torch: bool = False):
  """Median step time of every arm, and the ratio to the first with its 95% interval."""
  import jax
  import numpy as np

  from experiments import dry_run, stats

  names, steps, compile_seconds = list(arms), [], []
  for arm in arms:
    run = arms_lib.build(config, arm, devices)
    started = time.perf_counter()
    state = run.init()
    signals = run.signals(state.params)
    batch = dry_run.any_batch(run)
    steps.append(arms_lib.timed_step(run.train_step, state, batch, signals))
    steps[-1]()
    compile_seconds.append(time.perf_counter() - started)
  if with_torch:
    for arm in dict.fromkeys(arms):
      if (step := _torch_step(arms_lib.build(config, arm, devices), arm)) is not None:
        names.append(f'PyTorch {arm}')
        steps.append(step)
        compile_seconds.append(0.0)
  seconds = arms_lib.interleaved(steps, rounds)
  tokens = config.batch_size * config.data.seq_len
  rows = []
  for i, name in enumerate(names):
    log_ratio = np.log(seconds[:, i]) - np.log(seconds[:, 0])
    paired = stats.paired(log_ratio, np.zeros(rounds)) if i else None
    median = float(np.median(seconds[:, i]))
    rows.append(
      {
        'weighting': name,
        'rounds': rounds,
        'median_ms': 1000 * median,
        'tokens_per_s': tokens / median,
        'compile_s': compile_seconds[i],
        'ratio': float(np.exp(paired.mean)) if paired else 1.0,
        'low': float(np.exp(paired.low)) if paired else 1.0,
        'high': float(np.exp(paired.high)) if paired else 1.0,
      }
    )
  jax.clear_caches()
  return rows


def _torch_step(run, arm: str):
  """The same step in PyTorch, or None for an arm it does not know (uniform and linupper only)."""
  name, _, temperature = arm.partition(':')
  if name not in ('uniform', 'linupper') or '@' in arm:
    return None
  import jax
  import numpy as np
  import torch

  from experiments import dry_run
  from experiments.bench import torch_peer

  device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
  step = torch_peer.make_step(
    run.init().params,
    run.model,
    run.config.optim,
    float(temperature or 0.4) if name == 'linupper' else float('inf'),
    device=device,
    compiled=device == 'cuda',
  )
  tokens = torch.from_numpy(np.array(dry_run.any_batch(run)['tokens'], np.int64)).to(device)
  return lambda: step(tokens)


def compare(record: dict, earlier: dict) -> tuple[str, bool]:
  """(what changed since an earlier record, whether an exact count grew)."""
  lines, grew = ['since the baseline'], False
  key = lambda row: tuple(
    row.get(k) for k in ('weighting', 'microbatches', 'scope', 'batch_size', 'seq_len', 'devices')
  )
  for section in ('counts', 'accumulation', 'growth'):
    before = {key(row): row for row in earlier.get(section, ())}
    for row in record.get(section, ()):
      old = before.get(key(row))
      label = ' '.join(str(part) for part in key(row) if part is not None)
      if old is None:
        lines.append(f'  {section:<12}  {label}: new')
        continue
      for name in ('matmul_flops', 'temp_bytes', 'collectives', 'collective_bytes'):
        if row.get(name) != old.get(name):
          change = row[name] / old[name] - 1 if old.get(name) else float('inf')
          lines.append(f'  {section:<12}  {label}: {name} {old.get(name):,} -> {row[name]:,}')
          grew |= change > 0
  before = {row['weighting']: row for row in earlier.get('times', ())}
  for row in record.get('times', ()):
    if old := before.get(row['weighting']):
      apart = row['low'] > old['high'] or row['high'] < old['low']
      note = 'differs' if apart else 'same within the intervals'
      ratios = f'{old["ratio"]:.4f} -> {row["ratio"]:.4f}'
      lines.append(f'  {"times":<12}  {row["weighting"]}: ratio {ratios}, {note}')
  if not grew:
    lines.append('  no exact count grew')
  return '\n'.join(lines), grew


# Tables


def format_counts(rows: list[dict]) -> str:
  width = max(len(row['weighting']) for row in rows)
  lines = [
    f'one step on {rows[0]["devices"]} devices, per device',
    f'{"":{width}}  {"MFLOP":>10}  {"temp MB":>8}  {"build s":>7}  {"collectives":>11}  beyond the '
    'first arm',
  ]
  for row in rows:
    extra = describe_extra(row['extra'])
    lines.append(
      f'{row["weighting"]:{width}}  {row["matmul_flops"] / 1e6:>10,.3f}  '
      f'{row["temp_bytes"] / 1e6:>8.2f}  {row["build_seconds"]:>7.1f}  {row["collectives"]:>11}  '
      f'{extra or "none"}'
    )
  return '\n'.join(lines)


def describe_extra(extra: list[dict], shown: int = 3) -> str:
  """The collectives an arm adds: each of them, or the largest and the sum of many."""
  largest = sorted(extra, key=lambda c: -c['bytes'])[:shown] if len(extra) > shown else extra
  parts = [f'{c["count"]} x {c["kind"]} of {c["bytes"]:,} B ({c["name"][-40:]})' for c in largest]
  if len(extra) > shown:
    total = sum(c['count'] * c['bytes'] for c in extra)
    parts.append(f'... {sum(c["count"] for c in extra)} in all, {total:,} B')
  return '; '.join(parts)


def format_accumulation(rows: list[dict]) -> str:
  width = max(len(row['weighting']) for row in rows)
  lines = [
    'accumulation over M microbatches, one device',
    f'{"":{width}}  {"M":>3}  {"scope":<10}  {"MFLOP":>10}  {"x M=1":>6}  {"temp MB":>8}',
  ]
  for row in rows:
    if row['microbatches'] == 1:
      whole = row['matmul_flops']
    lines.append(
      f'{row["weighting"]:{width}}  {row["microbatches"]:>3}  {row["scope"]:<10}  '
      f'{row["matmul_flops"] / 1e6:>10,.3f}  {row["matmul_flops"] / whole:>6.3f}  '
      f'{row["temp_bytes"] / 1e6:>8.2f}'
    )
  return '\n'.join(lines)


def format_growth(rows: list[dict]) -> str:
  width = max(len(row['weighting']) for row in rows)
  lines = [
    'growth, per device',
    f'{"":{width}}  {"batch":>6}  {"length":>6}  {"devices":>7}  {"MFLOP":>10}  {"temp MB":>8}  '
    f'{"moved kB":>9}',
  ]
  for row in rows:
    lines.append(
      f'{row["weighting"]:{width}}  {row["batch_size"]:>6}  {row["seq_len"]:>6}  '
      f'{row["devices"]:>7}  {row["matmul_flops"] / 1e6:>10,.3f}  {row["temp_bytes"] / 1e6:>8.2f}  '
      f'{row["collective_bytes"] / 1e3:>9,.1f}'
    )
  return '\n'.join(lines)


def format_times(rows: list[dict]) -> str:
  width = max(len(row['weighting']) for row in rows)
  lines = [
    f'one device, {rows[0]["rounds"]} interleaved rounds',
    f'{"":{width}}  {"ms/step":>10}  {"tokens/s":>10}  {"compile s":>9}  {"ratio":>7}  95% '
    'interval',
  ]
  for row in rows:
    lines.append(
      f'{row["weighting"]:{width}}  {row["median_ms"]:>10.2f}  {row["tokens_per_s"]:>10,.0f}  '
      f'{row["compile_s"]:>9.1f}  {row["ratio"]:>7.4f}  [{row["low"]:.4f}, {row["high"]:.4f}]'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
