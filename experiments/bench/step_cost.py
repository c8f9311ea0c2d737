"""What a weighting costs a train step: exact counts of the compiled program, interleaved times.

Examples:
  python -m experiments.bench.step_cost --config=configs/quickstart.py
  python -m experiments.bench.step_cost --config=configs/lm.py:layers=4,width=256 \\
      --weightings=uniform,linupper:0.4,kl_dro:1.0 --rounds=60 --json=cost.json

Counts (matmul FLOPs, collectives, temporary memory) are those of the step on 8 devices, simulated
on a CPU, and repeat exactly. Times are of one device: every round runs each arm once,
in random order, and the ratio to the first arm is taken round by round, so that a machine that
slows down slows both. The interval is that of the mean log ratio (Student's t).
"""

from __future__ import annotations

import os
import time

from absl import flags

from experiments import cli

_CONFIG = cli.define_config()
_WEIGHTINGS = flags.DEFINE_list(
  'weightings', ['uniform', 'uniform', 'linupper:0.4'], 'arms; the first is the reference'
)
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'timed rounds', lower_bound=2)
_MICROBATCHES = flags.DEFINE_integer('microbatches', 4, 'M of the accumulated rows', lower_bound=2)
_JSON = flags.DEFINE_string('json', '', 'also write the numbers to this file')


def main(_) -> None:
  os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
  import jax

  specs = _WEIGHTINGS.value
  counted = count(_CONFIG.value, specs, jax.devices()[:8])
  timed = measure(_CONFIG.value, specs, _ROUNDS.value, jax.devices()[:1])
  accumulated = count_accumulation(_CONFIG.value, specs[-1], _MICROBATCHES.value, jax.devices()[:1])
  print(format_table(counted, timed, accumulated))
  if _JSON.value:
    from experiments import files

    files.write_json(_JSON.value, {'counts': counted, 'times': timed, 'accumulation': accumulated})


def build(config, spec: str, devices, **changes):
  """The run of one arm, at another batch where the devices need it."""
  from configs import common
  from experiments import train

  config = config.copy_and_resolve_references()
  if 'loss' in config.w and 'start' in config.w.loss:
    config.w.loss.start = 0  # burn-in is for training; here the weighting acts at once
  common.set_weighting(config, spec)
  config.update(changes)
  return train.build(config, devices)


def costs_of(run):
  """Exact costs of the library's step, without what the training program logs beside it."""
  import jax

  from experiments import compiled, dry_run

  step = jax.jit(run.step, donate_argnums=0)
  return compiled.costs(step.lower(run.abstract_state, dry_run.any_batch(run)).compile())


def count(config, specs: list[str], devices) -> list[dict]:
  """Exact costs of every arm, and the collectives it has beyond the first."""
  from experiments import compiled

  rows, reference = [], None
  for spec in specs:
    costs = costs_of(build(config, spec, devices))
    reference = reference or costs
    extra = compiled.extra_collectives(reference, costs)
    rows.append(
      {
        'weighting': spec,
        'devices': len(devices),
        'matmul_flops': costs.matmul_flops,
        'temp_bytes': costs.temp_bytes,
        'collectives': sum(c.count for c in costs.collectives),
        'extra': [c._asdict() for c in extra],
      }
    )
  return rows


def count_accumulation(config, spec: str, microbatches: int, devices) -> list[dict]:
  """What accumulation costs an arm in either scope, against one batch of the same size."""
  rows = []
  for m, scope in ((1, 'global'), (microbatches, 'microbatch'), (microbatches, 'global')):
    costs = costs_of(build(config, spec, devices, microbatches=m, scope=scope))
    rows.append(
      {
        'weighting': spec,
        'microbatches': m,
        'scope': scope,
        'matmul_flops': costs.matmul_flops,
        'temp_bytes': costs.temp_bytes,
      }
    )
  return rows


def measure(config, specs: list[str], rounds: int, devices) -> list[dict]:
  """Median step time of every arm, and the ratio to the first with its 95% interval."""
  import jax
  import numpy as np

  from experiments import dry_run, stats

  arms = []
  for spec in specs:
    run = build(config, spec, devices)
    arms.append([run.train_step, run.init(), dry_run.any_batch(run)])

  def once(arm) -> float:
    step, state, batch = arm
    started = time.perf_counter()
    arm[1], record = step(state, batch)
    jax.block_until_ready((arm[1], record))
    return time.perf_counter() - started

  for arm in arms:  # compile, and let clocks and caches settle
    for _ in range(3):
      once(arm)
  seconds = np.zeros((rounds, len(arms)))
  rng = np.random.default_rng(0)
  for row in seconds:
    for i in rng.permutation(len(arms)):
      row[i] = once(arms[i])
  rows = []
  for i, spec in enumerate(specs):
    log_ratio = np.log(seconds[:, i]) - np.log(seconds[:, 0])
    paired = stats.paired(log_ratio, np.zeros(rounds)) if i else None
    rows.append(
      {
        'weighting': spec,
        'rounds': rounds,
        'median_ms': float(1000 * np.median(seconds[:, i])),
        'ratio': float(np.exp(paired.mean)) if paired else 1.0,
        'low': float(np.exp(paired.low)) if paired else 1.0,
        'high': float(np.exp(paired.high)) if paired else 1.0,
      }
    )
  return rows


def format_table(counted: list[dict], timed: list[dict], accumulated: list[dict]) -> str:
  """The three tables for people."""
  width = max(len(row['weighting']) for row in counted)
  lines = [
    f'one step on {counted[0]["devices"]} devices, per device',
    f'{"":{width}}  {"MFLOP":>10}  {"temp MB":>8}  {"collectives":>11}  beyond the first arm',
  ]
  for row in counted:
    extra = '; '.join(
      f'{c["count"]} x {c["kind"]} of {c["bytes"]} B ({c["name"]})' for c in row['extra']
    )
    lines.append(
      f'{row["weighting"]:{width}}  {row["matmul_flops"] / 1e6:>10,.3f}  '
      f'{row["temp_bytes"] / 1e6:>8.2f}  {row["collectives"]:>11}  {extra or "none"}'
    )
  lines += [
    '',
    f'one device, {timed[0]["rounds"]} interleaved rounds',
    f'{"":{width}}  {"ms/step":>10}  {"ratio":>7}  95% interval',
  ]
  for row in timed:
    lines.append(
      f'{row["weighting"]:{width}}  {row["median_ms"]:>10.2f}  {row["ratio"]:>7.4f}  '
      f'[{row["low"]:.4f}, {row["high"]:.4f}]'
    )
  base = accumulated[0]['matmul_flops']
  lines += [
    '',
    f'accumulation, {accumulated[0]["weighting"]}, one device',
    f'{"M":>4}  {"scope":<10}  {"MFLOP":>10}  {"x M=1":>6}  {"temp MB":>8}',
  ]
  for row in accumulated:
    lines.append(
      f'{row["microbatches"]:>4}  {row["scope"]:<10}  {row["matmul_flops"] / 1e6:>10,.3f}  '
      f'{row["matmul_flops"] / base:>6.3f}  {row["temp_bytes"] / 1e6:>8.2f}'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
