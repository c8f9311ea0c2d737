"""What a run would do and cost, from its compiled step; nothing is trained.

The step can be compiled for devices that are not here (see experiments.hardware), so that it is
known whether a model fits a pod, and what its chips would say to each other, before one is paid
for. All counts are exact for the program that would run; the time bounds are those of perfect
hardware: no step is faster, most are slower.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import numpy as np

from experiments import compiled, hardware, hlo
from experiments import mesh as mesh_lib
from experiments.compiled import si
from experiments.data import mixture as mixture_lib
from experiments.data import pipeline
from experiments.train import Run, versions


def report(run: Run, uniform: Run | None = None) -> dict[str, Any]:
  """Everything that is known before a run starts; JSON.

  Args:
    run: what would run.
    uniform: the same with uniform weights, to count what the weighting adds to a step.
  """
  config, device = run.config, run.mesh.devices.flat[0]
  chip = hardware.chip(device.device_kind)
  found: dict[str, Any] = {
    'parameters': run.model.num_params(),
    'mesh': dict(run.mesh.shape),
    'device': device.device_kind,
    'devices': run.mesh.size,
    'hosts': len({device.process_index for device in run.mesh.devices.flat}),
    'memory': chip.memory if chip else None,
    'tokens_per_step': config.batch_size * config.data.seq_len,
    'steps': config.total_steps,
    'versions': versions(),
    'state_bytes': state_bytes(run),
  }
  if device.platform == 'tpu':
    found['versions']['libtpu'] = hardware.libtpu_version()
  try:
    step = compiled.costs(compile_step(run, run.train_step))
  except compiled.UncountableError as error:
    return found | {'fits': None, 'problem': str(error)}
  except jax.errors.JaxRuntimeError as error:
    needed, available = _out_of_memory(error)
    return found | {
      'fits': False,
      'needed_bytes': needed,
      'available_bytes': available,
      'advice': advice(run, available),
    }
  found |= {
    'fits': not found['memory'] or step.peak_bytes <= found['memory'],
    'bytes': {
      'arguments': step.argument_bytes,
      'new outputs': step.output_bytes - step.alias_bytes,
      'temporary': step.temp_bytes,
      'program': step.code_bytes,
      'peak': step.peak_bytes,
    },
    'matmul_flops': step.matmul_flops,
    'useful_flops': run.model.flops_per_token(run.corpus.seq_len)
    * found['tokens_per_step']
    // run.mesh.size,
    'collectives': collectives(step.collectives, run.mesh),
  }
  if not found['fits']:
    found['advice'] = advice(run, found['memory'])
  if chip is not None:
    found['bound'] = bound(found, chip)
  if run.read_domains is not None and device in jax.devices():
    times, flops = readings(run)
    found['readings'] = {'times': times, 'matmul_flops': flops}
  if uniform is not None:
    ours, theirs = step_costs(run), step_costs(uniform)
    found['weighting_adds'] = {
      'matmul_flops': ours.matmul_flops - theirs.matmul_flops,
      'peak_bytes': ours.peak_bytes - theirs.peak_bytes,
      'collectives': collectives(compiled.extra_collectives(theirs, ours), run.mesh),
    }
  return found


def state_bytes(run: Run) -> int:
  """Bytes of parameters and optimizer on one device, by their shardings."""
  leaves = jax.tree.leaves(run.abstract_state)
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
  )


def collectives(found: tuple[compiled.Collective, ...], mesh: jax.sharding.Mesh) -> list[dict]:
  """One entry for each kind, size and mesh axis, most bytes first.

  `bytes` is the size of the array, `count` how often a step sends it, `received` what one device
  receives for it in a step when rings are used.
  """
  counts: Counter = Counter()
  for c in found:
    counts[c.kind, c.bytes, hlo.axes_of(c.group, mesh.shape), len(c.group) or mesh.size] += c.count
  entries = [
    {
      'kind': kind,
      'bytes': size,
      'axes': list(axes),
      'count': count,
      'received': count * _received(kind, size, devices),
    }
    for (kind, size, axes, devices), count in counts.items()
  ]
  return sorted(entries, key=lambda e: (-e['received'], -e['bytes'], e['kind'], e['axes']))


def _received(kind: str, size: int, devices: int) -> int:
  """Bytes that one of so many devices receives, when they form a ring."""
  if kind == 'collective-permute':
    return size
  return size * (devices - 1) // devices * (2 if kind == 'all-reduce' else 1)


def bound(found: dict[str, Any], chip: hardware.Chip) -> dict[str, float | None]:
  """Times that perfect hardware would need, in seconds, and the utilization that they allow.

  `mfu` is useful FLOPs over what the peak would do in the longer of both times: when everything
  that is sent hides behind products.
  """
  compute = found['matmul_flops'] / chip.flops
  sent = sum(entry['received'] for entry in found['collectives'])
  communication = sent / chip.link if chip.link else None
  longest = max(compute, communication or 0.0)
  return {
    'compute_seconds': compute,
    'communication_seconds': communication,
    'mfu': found['useful_flops'] / chip.flops / longest if longest else None,
  }


def _out_of_memory(error: Exception) -> tuple[int | None, int | None]:
  """(needed, available) bytes as the compiler says; what is no lack of memory is raised again."""
  text = str(error)
  if 'RESOURCE_EXHAUSTED' not in text:
    raise error
  found = re.search(r'([\d.]+)([KMGT])\)? (?:exceeds available \w+ \(|of )([\d.]+)([KMGT])', text)
  if found is None:
    return None, None
  size = lambda number, unit: int(float(number) * 2 ** (10 * ('KMGT'.index(unit) + 1)))
  return size(*found.group(1, 2)), size(*found.group(3, 4))


def advice(run: Run, available: float | None) -> list[str]:
  """What to change when a step does not fit, most effective first, with what it saves."""
  config, model, mesh = run.config, run.model, run.mesh
  rows = config.batch_size // config.microbatches // mesh_lib.row_shards(mesh)
  tokens, width = rows * config.data.seq_len, jax.numpy.dtype(model.dtype).itemsize
  lines, state = [], state_bytes(run)
  cut = mesh.shape['fsdp'] * mesh.shape['tensor']
  if cut < mesh.size:
    lines.append(
      f'config.mesh.fsdp={mesh.size // mesh.shape["tensor"]}: parameters and optimizer take '
      f'{si(state, "B")} of a device, and could take {si(state * cut / mesh.size, "B")}'
    )
  if not model.loss_chunk:
    logits = 4 * tokens * model.vocab_size
    lines.append(f'config.model.loss_chunk=512: all logits at once take {si(logits, "B")}')
  if model.remat != 'full':
    stored = model.n_layer * tokens * model.n_embd * width
    lines.append(
      f"config.model.remat='full': of the blocks only their inputs are stored, {si(stored, 'B')}"
    )
  if rows > 1:
    lines.append(
      f'config.microbatches={config.microbatches * rows}: a device computes {rows} rows of '
      f'{config.data.seq_len} tokens at once, and could compute one'
    )
  elif mesh.shape['tensor'] == 1:
    lines.append('config.mesh.tensor=2: a device then holds half of each matrix it works with')
  if available and state > available / 2:
    lines.append(
      f'more or larger devices: {si(state, "B")} of parameters and optimizer leave little of '
      f'{si(available, "B")}'
    )
  return lines


# In words ---------------------------------------------------------------------------------------


def describe(run: Run, found: dict[str, Any]) -> str:
  """`report` for people, and what the run would read."""
  sizes = ' x '.join(f'{axis} {size}' for axis, size in found['mesh'].items())
  steps, tokens = found['steps'], found['tokens_per_step']
  lines = [
    f'parameters: {found["parameters"]:,}',
    f'mesh: {sizes} = {found["devices"]} x {found["device"]}, hosts: {found["hosts"]}',
    f'tokens: {steps:,} steps x {tokens:,} = {steps * tokens:,}',
  ]
  if found['fits'] is None:
    lines.append(found['problem'])
  else:
    lines += _step_text(found) if 'bytes' in found else []
  if found['fits'] is False:
    peak = found.get('needed_bytes') or found.get('bytes', {}).get('peak')
    available = found.get('available_bytes') or found['memory']
    told = f': at least {si(peak, "B")} of {si(available, "B")}' if peak and available else ''
    lines += [f'DOES NOT FIT{told} a device; what to change:']
    lines += [f'  {line}' for line in found['advice']]
  return '\n'.join([*lines, *_reading_text(run, found), *_planned_text(run)])


def _step_text(found: dict[str, Any]) -> list[str]:
  sizes, memory = found['bytes'], found['memory']
  parts = ', '.join(f'{si(size, "B")} {kind}' for kind, size in sizes.items() if kind != 'peak')
  of = f' of {si(memory, "B")} ({sizes["peak"] / memory:.0%})' if memory else ''
  lines = [
    'compiled step, per device:',
    f'  memory     {si(sizes["peak"], "B")}{of}: {parts}',
    f'  matmul     {si(found["matmul_flops"], "FLOP")}, of them useful '
    f'{si(found["useful_flops"], "FLOP")}',
  ]
  if 'bound' in found:
    times = found['bound']
    sent = times['communication_seconds']
    if sent is not None:
      lines.append(
        f'  time       at least {times["compute_seconds"]:.4f} s for products, {sent:.4f} s for '
        'communication'
      )
    lines.append(f'  MFU        at most {times["mfu"]:.1%}')
  lines += _table(found['collectives'])
  if 'weighting_adds' in found:
    adds = found['weighting_adds']
    lines.append(
      f'the weighting adds {si(adds["matmul_flops"], "FLOP")}, {si(adds["peak_bytes"], "B")} and '
      f'{sum(e["count"] for e in adds["collectives"])} collectives a step to uniform weights:'
    )
    lines += _table(adds['collectives'])
  return lines


def _table(entries: list[dict]) -> list[str]:
  if not entries:
    return ['  collectives none']
  rows = [('collective', 'axis', 'array', 'times', 'received')]
  for e in entries:
    axes = '+'.join(e['axes']) or '-'
    rows.append((e['kind'], axes, si(e['bytes'], 'B'), f'{e["count"]:,}', si(e['received'], 'B')))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    '  '
    + '  '.join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
    for row in rows
  ]


def _reading_text(run: Run, found: dict[str, Any]) -> list[str]:
  """What the mixture's readings cost beside the steps; nothing where it reads nothing."""
  if 'readings' not in found:
    return []
  times, flops = found['readings']['times'], found['readings']['matmul_flops']
  share = times * flops / (found['steps'] * found['matmul_flops'])
  return [
    f'reading the domains for {run.config.mixture.fn}: {flops:.4g} matmul FLOP, {times:,} times in '
    f'{found["steps"]:,} steps: {share:.2%} of the matmul FLOPs of the steps'
  ]


def _planned_text(run: Run) -> list[str]:
  config = run.config
  planned = mixture_lib.planned_examples(
    run.corpus,
    batch_size=config.batch_size,
    total_steps=config.total_steps,
    proportions=run.proportions,
    max_epochs=config.mixture.max_epochs,
  )
  width = max(map(len, planned))
  return [
    f'planned{", before " + config.mixture.fn + " changes it" if run.mixture else ""}:',
    *(
      f'  {name:<{width}}  {plan.rows:>12,.1f} examples  {plan.epochs:>8.3f} epochs'
      for name, plan in planned.items()
    ),
    *(f'note: {remark}' for remark in mixture_lib.remarks(config.data.mixture, planned)),
  ]


# Compiling --------------------------------------------------------------------------------------


def compile_step(run: Run, step: Any) -> Any:
  """A jitted step of the run, compiled for its mesh."""
  signals = jax.eval_shape(run.signals, run.abstract_state.params)
  return step.lower(run.abstract_state, batch_shapes(run), signals).compile()


def step_costs(run: Run) -> compiled.Costs:
  """Exact costs of the library's step, without what the training program logs beside it."""
  return compiled.costs(compile_step(run, jax.jit(run.step, donate_argnums=0)))


def readings(run: Run) -> tuple[int, float]:
  """(how often the run reads domains for its mixture, matmul FLOPs of one reading)."""
  reader = run.read_domains
  read = reader.read.lower(run.abstract_state.params, *reader.draw(0)).compile()
  return sum(map(reader.due, range(run.config.total_steps))), compiled.costs(read).matmul_flops


def batch_shapes(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
  """A global batch's shapes, dtypes and shardings, also for devices that are not here."""
  rows = mesh_lib.batch_sharding(run.mesh)
  struct = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
  return jax.tree.map(struct, dict(_first_rows(run, np.arange)))


def any_batch(run: Run) -> dict[str, jax.Array]:
  """A batch of the right shape, without touching the run's own position in the data."""
  return run.to_global(_first_rows(run, mesh_lib.local_rows(run.mesh)))


def _first_rows(run: Run, local_rows: pipeline.LocalRows) -> dict[str, np.ndarray]:
  batches = pipeline.eval_batches(
    run.corpus,
    split='train',
    batch_size=run.config.batch_size,
    max_blocks=run.config.batch_size,
    local_rows=local_rows,
  )
  return next(batches)
