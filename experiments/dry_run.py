"""What a run would do and cost, without training anything."""

from __future__ import annotations

import jax

from experiments import compiled
from experiments.data import mixture as mixture_lib
from experiments.data import pipeline
from experiments.train import Run


def describe(run: Run) -> str:
  """What a run would do and cost, from the compiled step; nothing is trained."""
  config, corpus, model = run.config, run.corpus, run.model
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), any_batch(run)
  )
  signals = jax.eval_shape(run.signals, run.abstract_state.params)
  step = run.train_step.lower(run.abstract_state, batch, signals).compile()
  try:
    costs = compiled.costs(step)
    cost_lines = [compiled.format_costs(costs), *reading_text(run, costs)]
  except compiled.UncountableError as error:
    cost_lines = [str(error)]
  planned = mixture_lib.planned_examples(
    corpus,
    batch_size=config.batch_size,
    total_steps=config.total_steps,
    proportions=run.proportions,
    max_epochs=config.mixture.max_epochs,
  )
  width = max(map(len, planned))
  rows = [
    f'  {name:<{width}}  {plan.rows:>12,.1f} examples  {plan.epochs:>8.3f} epochs'
    for name, plan in planned.items()
  ]
  tokens = config.total_steps * config.batch_size * corpus.seq_len
  return '\n'.join(
    [
      f'parameters: {model.num_params():,}',
      f'mesh: {dict(run.mesh.shape)}, {run.mesh.devices.flat[0].device_kind}',
      f'tokens: {config.total_steps:,} steps x {config.batch_size} x {corpus.seq_len} = {tokens:,}',
      'compiled step, per device:',
      *cost_lines,
      f'planned{", before " + config.mixture.fn + " changes it" if run.mixture else ""}:',
      *rows,
      *(f'note: {remark}' for remark in mixture_lib.remarks(config.data.mixture, planned)),
    ]
  )


def reading_text(run: Run, step: compiled.Costs) -> list[str]:
  """What the mixture's readings cost beside the steps; nothing where it reads nothing."""
  if run.read_domains is None:
    return []
  times, flops = readings(run)
  steps = run.config.total_steps
  share = times * flops / (steps * step.matmul_flops)
  return [
    f'reading the domains for {run.config.mixture.fn}: {flops:.4g} matmul FLOP, {times:,} times in '
    f'{steps:,} steps: {share:.2%} of the matmul FLOPs of the steps'
  ]


def readings(run: Run) -> tuple[int, float]:
  """(how often the run reads domains for its mixture, matmul FLOPs of one reading)."""
  reader = run.read_domains
  read = reader.read.lower(run.abstract_state.params, *reader.draw(0)).compile()
  return sum(map(reader.due, range(run.config.total_steps))), compiled.costs(read).matmul_flops


def step_costs(run: Run) -> compiled.Costs:
  """Exact costs of the library's step, without what the training program logs beside it."""
  step = jax.jit(run.step, donate_argnums=0)
  signals = jax.eval_shape(run.signals, run.abstract_state.params)
  return compiled.costs(step.lower(run.abstract_state, any_batch(run), signals).compile())


def any_batch(run: Run) -> dict[str, jax.Array]:
  """A batch of the right shape, without touching the run's own position in the data."""
  batches = pipeline.eval_batches(
    run.corpus,
    split='train',
    batch_size=run.config.batch_size,
    max_blocks=run.config.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return run.to_global(next(batches))
