"""What a live mixture costs a run, each part timed by itself against the train step.

  python -m experiments.bench.mixture_cost --config=configs/quickstart.py --config.batch_size=48
  python -m experiments.bench.mixture_cost --config=configs/lm.py:layers=4,width=256 \\
    --mixtures=odm,dga:rate=1:every=100:rows=1:target_rows=8 --json=cost.json

The difference of two step times drowns in noise long before 0.1% of a step. So here the stage of
the mixture runs alone: what it does to the losses of a batch, its update, q and p, step after step
in one compiled loop, as often as the run has steps. Methods that read domains beside the steps are
timed reading, too, host work included. Every round times each part and the step once, in random
order; shares of the step are geometric means over the rounds, with 95% intervals. In the step
itself the stage may cost less, where it is fused with what is there, or more, where collectives of
many devices wait; those are counted by experiments.bench.step_cost. With a reference (DoReMi), its
forward pass is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import cli
from experiments.errors import UserError
from experiments.verdict import format_table

FLAGS = flags.FLAGS
MIXTURES = (
  'group_dro:mode=weigh:rate=0.01',
  'odm',
  'ado:start_step=150:fit_every=50:ignore=50:thinning=2',
  'cooldown:switch_step=250',
  'dga:rate=1:every=100:rows=1:target_rows=8',
  'doge:mode=weigh:every=100:rows=1:target_rows=8',
)


class Share(NamedTuple):
  """A time over that of the train steps beside it."""

  mean: float
  low: float
  high: float


class Cost(NamedTuple):
  """What one mixture adds to a run, as shares of the time (and matmul FLOPs) of its train steps."""

  mixture: str
  stage: Share
  reading: Share | None  # None: it reads nothing beside the steps
  reading_flops: float


def measure(config: Any, specs: list[str], rounds: int, devices: Any) -> tuple[float, list[Cost]]:
  """(median milliseconds of the plain train step, the cost of every mixture)."""
  import jax

  from experiments import dry_run
  from experiments.bench.arms import build, interleaved, timed_step

  plain = build(config, 'uniform', devices)
  state = plain.init()
  batch = dry_run.any_batch(plain)
  step_flops = dry_run.step_costs(plain).matmul_flops
  timed: list[Callable[[], None]] = [
    timed_step(plain.train_step, state, batch, plain.signals(state.params))
  ]
  parts = []  # (spec, position of the stage, of the reading or None, readings a step, their FLOPs)
  for spec in specs:
    run = build(config, f'uniform@mixture={spec}', devices)
    if run.mixture is None:
      raise UserError(f'--mixtures: {spec!r} is not a mixture that changes')
    timed.append(stage_alone(run, batch))
    stage, reading, per_step, flops = len(timed) - 1, None, 0.0, 0.0
    if run.read_domains is not None:
      times, one = dry_run.readings(run)
      per_step, flops = times / config.total_steps, one
    if per_step:
      reader, params = run.read_domains, run.init().params
      timed.append(lambda r=reader, p=params: jax.block_until_ready(r.read(p, *r.draw(0))))
      reading = len(timed) - 1
    parts.append((spec, stage, reading, per_step, per_step * flops / step_flops))
  seconds = interleaved(timed, rounds)
  costs = [
    Cost(
      spec,
      _share(seconds[:, stage] / config.total_steps, seconds[:, 0]),
      None if reading is None else _share(per_step * seconds[:, reading], seconds[:, 0]),
      flops,
    )
    for spec, stage, reading, per_step, flops in parts
  ]
  return float(1000 * np.median(seconds[:, 0])), costs


def stage_alone(run: Any, batch: Any) -> Callable[[], None]:
  """A function of nothing that takes the mixture through all steps of the run, without a model."""
  import jax
  import jax.numpy as jnp

  from experiments import mixing

  config = run.config
  extra = {} if run.read_domains is None else run.read_domains.zeros()
  losses = jnp.ones((config.batch_size, config.data.seq_len), jnp.float32)

  @jax.jit
  def all_steps(losses, batch, extra):
    def one(step, carry):
      state, total = carry
      now = losses * (1 + total / (1 + total))  # others in every step, so that none is left out
      weights, state = run.weighting.update(
        jnp.ones_like(now),
        state,
        losses=now,
        base=batch['base'],
        group_ids=batch['domain_id'],
        sampling_prob=batch['sampling_prob'],
        step=step,
        extra=extra,
        **({'ref_losses': losses} if config.reference else {}),
      )
      found = mixing.summarize(run.mixture, state[mixing.STAGE])
      return state, 1 + found['noise'] + found['proportions'][0] + weights[0, 0]

    carry = run.weighting.init(), jnp.float32(0)
    return jax.lax.fori_loop(0, config.total_steps, one, carry)

  return lambda: jax.block_until_ready(all_steps(losses, batch, extra))


def _share(part: np.ndarray, whole: np.ndarray) -> Share:
  from experiments import stats

  ratio = np.log(part / whole)
  found = stats.paired(ratio, np.zeros_like(ratio))
  return Share(*(float(np.exp(x)) for x in (found.mean, found.low, found.high)))


def format_costs(milliseconds: float, costs: list[Cost]) -> str:
  """The table that is printed."""
  percent = lambda s: f'{s.mean:.4%} [{s.low:.4%}, {s.high:.4%}]'
  rows = [
    (
      cost.mixture,
      percent(cost.stage),
      '-' if cost.reading is None else percent(cost.reading),
      f'{cost.reading_flops:.3%}' if cost.reading else '-',
    )
    for cost in costs
  ]
  head = ('mixture', 'stage, time', 'readings, time', 'readings, FLOPs')
  return f'{format_table(head, rows)}\nshares of the train steps; one takes {milliseconds:.1f} ms'


def main(_: list[str]) -> None:
  import jax

  from experiments import files

  milliseconds, costs = measure(FLAGS.config, FLAGS.mixtures, FLAGS.rounds, jax.devices()[:1])
  print(format_costs(milliseconds, costs))
  if FLAGS.json:
    record = [
      cost._asdict()
      | {'stage': cost.stage._asdict(), 'reading': cost.reading and cost.reading._asdict()}
      for cost in costs
    ]
    files.write_json(
      FLAGS.json, {'step_ms': milliseconds, 'rounds': FLAGS.rounds, 'mixtures': record}
    )


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_list('mixtures', list(MIXTURES), 'methods with their arguments')
  flags.DEFINE_integer('rounds', 30, 'timed rounds', lower_bound=2)
  flags.DEFINE_string('json', '', 'also write the numbers to this file')
  cli.run(main)
