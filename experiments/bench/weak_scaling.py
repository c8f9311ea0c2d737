"""Does a device's work grow with the number of devices? Exact counts; nothing is timed.

Examples:
  python -m experiments.bench.weak_scaling --config=configs/quickstart.py
  python -m experiments.bench.weak_scaling --config=configs/llama.py --layouts=data,fsdp \\
      --rows=2 --json=weak.json

Every device keeps as many rows as it had alone, on 1, 2, 4 and 8 devices (simulated on a CPU). The
numbers are those of one device of the compiled training step, logs included. What it receives in a
step is split: `gradients` are added up in the backward pass; `parameters` are gathered where `fsdp`
cut them; `rows` tell every host each row's id, loss and weight, for the logs; `sums` are all the
rest: what the weighting, the clipping of the gradient and the metrics need. In a ring of n devices
one receives (n - 1) / n of what is gathered, and twice that of what is added up.
"""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from experiments import cli
from experiments.errors import UserError

FLAGS = flags.FLAGS
PARTS = ('gradients', 'parameters', 'rows', 'sums')


def _refuse(text: str) -> int:
  raise UserError(f'--devices={text}: must be numbers of at least 1, such as 1,2,4,8')


def measure(config: Any, layouts: list[str], counts: list[int], rows: int) -> list[dict[str, Any]]:
  """One entry for each layout and number of devices.

  Raises:
    UserError: an unknown layout, or more devices than there are.
  """
  import jax

  from experiments import compiled, dry_run, train
  from experiments import mesh as mesh_lib

  if unknown := [layout for layout in layouts if layout not in mesh_lib.ROWS]:
    raise UserError(f'--layouts={unknown[0]}: must be among {", ".join(mesh_lib.ROWS)}')
  if max(counts) > len(jax.devices()):
    raise UserError(f'--devices={max(counts)}: there are {len(jax.devices())}')
  record = []
  for layout in layouts:
    for count in counts:
      config = config.copy_and_resolve_references()
      config.mesh.update({axis: 1 for axis in config.mesh} | {layout: count})
      config.batch_size = config.eval.batch_size = rows * count
      run = train.build(config, jax.devices()[:count])
      costs = compiled.costs(dry_run.compile_step(run, run.train_step))
      received = dict.fromkeys(PARTS, 0)
      for collective in costs.collectives:
        part = part_of(collective, config.batch_size)
        received[part] += sum(e['received'] for e in dry_run.collectives((collective,), run.mesh))
      record.append(
        {
          'layout': layout,
          'devices': count,
          'matmul_flops': costs.matmul_flops,
          'temporary_bytes': costs.temp_bytes,
          'state_bytes': dry_run.state_bytes(run),
          'collectives': sum(c.count for c in costs.collectives),
          'received': received,
        }
      )
  return record


def part_of(collective: Any, rows: int) -> str:
  """Which of PARTS a collective is."""
  if collective.kind == 'all-gather':
    return 'rows' if collective.bytes == 4 * rows else 'parameters'
  return 'gradients' if 'transpose(' in collective.name else 'sums'


def format_table(record: list[dict[str, Any]]) -> str:
  """Aligned; bytes that a device receives in a step by part."""
  from experiments.compiled import si
  from experiments.verdict import format_table

  head = ['layout', 'devices', 'matmul', 'temporary', 'state', 'collectives', *PARTS]
  rows = [
    [
      row['layout'],
      str(row['devices']),
      si(row['matmul_flops'], 'FLOP'),
      *(si(row[f'{kind}_bytes'], 'B') for kind in ('temporary', 'state')),
      str(row['collectives']),
      *(si(row['received'][part], 'B') for part in PARTS),
    ]
    for row in record
  ]
  return format_table(head, rows)


def main(_: list[str]) -> None:
  counts = [int(n) if n.isdigit() and int(n) else _refuse(n) for n in FLAGS.devices]
  os.environ.setdefault('JAX_NUM_CPU_DEVICES', str(max(counts)))
  record = measure(FLAGS.config, FLAGS.layouts, counts, FLAGS.rows)
  print(format_table(record))
  if FLAGS.json:
    from experiments import files

    files.write_json(FLAGS.json, record)


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_list('layouts', ['data', 'fsdp'], 'mesh axes to scale along, one by one')
  flags.DEFINE_integer('rows', 4, 'rows of a device', lower_bound=1)
  flags.DEFINE_list('devices', ['1', '2', '4', '8'], 'how many devices')
  flags.DEFINE_string('json', '', 'also write the numbers to this file')
  cli.run(main)
