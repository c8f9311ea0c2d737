"""Trains one model with one weighting.

Examples:
  python -m experiments.main --config=configs/quickstart.py --workdir=runs/uniform
  python -m experiments.main --config=configs/lm.py:quick --dry_run
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
_ARM = flags.DEFINE_string(
  'arm', '', "a weighting, and what else an arm of a comparison changes: 'linupper:1.0@keep.rows=8'"
)
_WORKDIR = flags.DEFINE_string('workdir', '', 'run directory; created, or resumed')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'print config, parameters, memory, FLOPs and planned examples, and exit'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', "several processes: host:port of the first, or 'auto' on a known cluster"
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'several processes: how many')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'several processes: which one, from 0')


def main(_) -> None:
  if not (_WORKDIR.value or _DRY_RUN.value):
    raise UserError('--workdir is missing: try --workdir=runs/first')
  config = _CONFIG.value
  overrides, spec = cli.config_origin()
  if _ARM.value:
    common.set_arm(config, _ARM.value)
    config_lib.check(config)
    spec = f'{spec} --arm={_ARM.value}'
  from experiments import mesh

  mesh.initialize_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  from experiments import train

  train.say(config_lib.format_config(config, overrides, spec))
  if _DRY_RUN.value:
    from experiments import dry_run

    train.say(dry_run.describe(train.build(config)))
    return
  cli.use_compilation_cache(Path(_WORKDIR.value) / '.jax_cache')
  result = train.train(config, _WORKDIR.value)
  final = result['final']
  train.say(
    f'done: {result["steps"]} steps, bits per byte macro {final["macro_bpb"]:.4f} '
    f'(byte bigram {result["bigram_floor_macro"]:.4f}), worst {final["worst_bpb"]:.4f} '
    f'({final["worst_domain"]}); {_WORKDIR.value}/result.json'
  )


if __name__ == '__main__':
  cli.run(main)
