"""Trains one model with one weighting.

Examples:
  python -m experiments.main --config=configs/quickstart.py --workdir=runs/uniform
  python -m experiments.main --config=configs/lm.py:quick --dry_run
  python -m experiments.main --config=configs/llama.py:size=7b --compile_for=v5e:16x16
  python -m experiments.main --config=configs/quickstart.py --workdir=runs/hot \\
      --config.w.loss.fn=linupper --config.w.loss.temperature=1.0 --config.optim.lr=0.001

The same command resumes a run that was stopped or killed. On SIGTERM, which is how clusters take
machines back, it saves a checkpoint and ends. The run directory holds config.json, metrics.jsonl,
examples.jsonl (weight and loss of every example), checkpoints/ and, at the end, result.json. Exit
status: 0 done, 2 a mistake to fix, 3 a loss was not finite (see abort.json), 75 stopped and saved.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from configs import common
from experiments import cli
from experiments import config as config_lib
from experiments.errors import UserError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', '', 'run directory; created, or resumed')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'print config, parameters, memory, FLOPs and planned examples, and exit'
)
_COMPILE_FOR = flags.DEFINE_string(
  'compile_for',
  '',
  'dry run for other devices: v5e:16x16, v5p:4x4x8, 2*v5e:16x16 (slices), cpu:8 (simulated) or '
  'local; with what the weighting adds to a step, so it compiles three times',
)
_JSON = flags.DEFINE_string('json', '', 'dry run: write everything it counted to this file, too')
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', "several processes: host:port of the first, or 'auto' on a known cluster"
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'several processes: how many')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'several processes: which one, from 0')


def main(_) -> None:
  if _COMPILE_FOR.value or _DRY_RUN.value:
    dry_run()
    return
  if _JSON.value:
    raise UserError(f'--json={_JSON.value} is for a dry run: add --dry_run or --compile_for')
  if not _WORKDIR.value:
    raise UserError('--workdir is missing: try --workdir=runs/first')
  from experiments import mesh

  mesh.initialize_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  from experiments import train

  config = _CONFIG.value
  overrides, spec = cli.config_origin()
  train.say(config_lib.format_config(config, overrides, spec))
  cli.use_compilation_cache(Path(_WORKDIR.value) / '.jax_cache')
  result = train.train(config, _WORKDIR.value)
  final = result['final']
  train.say(
    f'done: {result["steps"]} steps, bits per byte macro {final["macro_bpb"]:.4f} '
    f'(byte bigram {result["bigram_floor_macro"]:.4f}), worst {final["worst_bpb"]:.4f} '
    f'({final["worst_domain"]}); {_WORKDIR.value}/result.json'
  )


def dry_run() -> None:
  """Prints what the run would do and cost, here or on devices that are elsewhere."""
  from experiments import hardware

  topology = hardware.parse_topology(_COMPILE_FOR.value or 'local')
  hardware.prepare(topology)
  from experiments import dry_run, files, train

  config = _CONFIG.value
  print(config_lib.format_config(config, *cli.config_origin()), flush=True)
  devices = hardware.devices(topology)
  run, uniform = train.build(config, devices), None
  if _COMPILE_FOR.value:
    plain = config.copy_and_resolve_references()
    common.set_weighting(plain, 'uniform')
    uniform = train.build(plain, devices)
  found = dry_run.report(run, uniform)
  print(dry_run.describe(run, found))
  if _JSON.value:
    files.write_json(_JSON.value, found)


if __name__ == '__main__':
  cli.run(main)
