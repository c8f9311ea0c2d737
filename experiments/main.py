"""Trains one model with one weighting.

Examples:
  python -m experiments.main --config=configs/quickstart.py --workdir=runs/uniform
  python -m experiments.main --config=configs/lm.py:quick --dry_run
  python -m experiments.main --config=configs/llama.py:size=7b --compile_for=v5e:16x16
  python -m experiments.main --config=configs/quickstart.py --workdir=runs/hot \\
      --config.w.loss.fn=linupper --config.w.loss.temperature=1.0 --config.optim.lr=0.001

The same command resumes a run that was stopped or killed. On SIGTERM, which is how clusters take
machines back, it saves a checkpoint and ends. The run directory holds config.json, provenance.json
(see experiments.verify), metrics.jsonl, examples.jsonl (weight and loss of every example),
checkpoints/ and, at the end, result.json. docs/reliability.md says what survives what. Exit
status: 0 done, 2 a mistake to fix, 3 a loss was not finite (see abort.json), 69 another process of
the run is lost, 75 stopped and saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from configs import common
from experiments import cli
from experiments import config as config_lib
from experiments.errors import UserError

_CONFIG = cli.define_config()
_ARM = flags.DEFINE_string(
  'arm', '', "a weighting, and what else an arm of a comparison changes: 'linupper:1.0@keep.rows=8'"
)
_WORKDIR = flags.DEFINE_string('workdir', '', 'run directory; created, or resumed')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'print config, parameters, memory, FLOPs and planned examples, and exit'
)
_COMPILE_FOR = flags.DEFINE_string(
  'compile_for',
  '',
  'dry run for other devices: v5e:16x16, v5p:4x4x8, 2*v5e:16x16 (slices), cpu:8 (simulated) or '
  'local',
)
_ADDS = flags.DEFINE_bool(
  'weighting_adds',
  True,
  'with --compile_for: compile uniform weights, too, and count what is added',
)
_JSON = flags.DEFINE_string('json', '', 'dry run: write everything it counted to this file, too')
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', "several processes: host:port of the first, or 'auto' on a known cluster"
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'several processes: how many')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'several processes: which one, from 0')
_JOIN_TIMEOUT = flags.DEFINE_integer(
  'join_timeout', 300, 'several processes: seconds to wait for all of them at the start'
)
_HOST_TIMEOUT = flags.DEFINE_integer(
  'host_timeout', 60, 'several processes: seconds without a sign of life until the others end'
)


def main(_) -> None:
  if _COMPILE_FOR.value or _DRY_RUN.value:
    dry_run()
    return
  if _JSON.value:
    raise UserError(f'--json={_JSON.value} is for a dry run: add --dry_run or --compile_for')
  if not _WORKDIR.value:
    raise UserError('--workdir is missing: try --workdir=runs/first')
  config, origin = resolved_config()
  join()
  from experiments import hosts, train

  train.say(config_lib.format_config(config, *origin))
  cli.use_compilation_cache(Path(_WORKDIR.value) / '.jax_cache')
  with hosts.ending_together():
    result = train.train(config, _WORKDIR.value, origin=origin)
  final = result['final']
  train.say(
    f'done: {result["steps"]} steps, bits per byte macro {final["macro_bpb"]:.4f} '
    f'(byte bigram {result["bigram_floor_macro"]:.4f}), worst {final["worst_bpb"]:.4f} '
    f'({final["worst_domain"]}); {_WORKDIR.value}/result.json'
  )


def resolved_config() -> tuple[Any, tuple[dict, str]]:
  """(the config with the arm, where its values come from); see `cli.config_origin`."""
  config, (overrides, spec) = _CONFIG.value, cli.config_origin()
  if _ARM.value:
    common.set_arm(config, _ARM.value)
    config_lib.check(config)
    spec = f'{spec} --arm={_ARM.value}'
  return config, (overrides, spec)


def join() -> None:
  """Finds the other processes, if there are any."""
  from experiments import hosts

  hosts.initialize(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    join_timeout=_JOIN_TIMEOUT.value,
    host_timeout=_HOST_TIMEOUT.value,
  )


def dry_run() -> None:
  """Prints what the run would do and cost, here or on devices that are elsewhere."""
  from experiments import hardware

  topology = hardware.parse_topology(_COMPILE_FOR.value or 'local')
  hardware.prepare(topology)
  if topology.platform == 'local':
    join()
  from experiments import dry_run, files, train

  config, origin = resolved_config()
  for key, value in (('reference', config.reference), ('target.domain', config.target.domain)):
    if value and topology.platform == 'tpu':
      raise UserError(
        f'config.{key}={value!r} is read onto devices, and those of --compile_for='
        f'{_COMPILE_FOR.value} are not here: leave it out, or use --compile_for=cpu:8'
      )
  train.say(config_lib.format_config(config, *origin))
  devices = hardware.devices(topology)
  run, uniform = train.build(config, devices), None
  if _COMPILE_FOR.value and _ADDS.value:
    plain = config.copy_and_resolve_references()
    common.set_weighting(plain, 'uniform')
    uniform = train.build(plain, devices)
  found = dry_run.report(run, uniform)
  train.say(dry_run.describe(run, found))
  if _JSON.value:
    files.write_json(_JSON.value, found)


if __name__ == '__main__':
  cli.run(main)
