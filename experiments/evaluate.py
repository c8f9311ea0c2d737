"""Evaluates a finished run again, on as much text as wanted.

python -m experiments.evaluate --workdir=runs/quickstart
python -m experiments.evaluate --workdir=runs/quickstart --split=train --max_blocks=256
python -m experiments.evaluate --workdir=runs/quickstart --step=best
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments import config as config_lib
from experiments.board import Run
from experiments.errors import UserError
from experiments.verdict import format_table

FLAGS = flags.FLAGS


def evaluate(
  workdir: str, *, split: str, max_blocks: int, step: str = ''
) -> tuple[dict[str, Any], str]:
  """Evaluates a checkpoint of a run on the first device: the newest, that of a step, or 'best'.

  Returns:
    (summary as of `experiments.evaluators.language.summarize`, fingerprint of the text).
  """
  config = open_config(workdir)
  if max_blocks < 0:
    raise UserError(f'--max_blocks={max_blocks}: must be at least 0, which takes all blocks')
  config.mesh.update(dict.fromkeys(config.mesh, 1))

  import jax

  from experiments import checkpoints, train

  which = checkpoints.resolve_step(config, step)
  run = train.build(config, devices=jax.local_devices()[:1])
  run.corpus.sizes(split)  # an unknown split fails before the checkpoint is read
  params = checkpoints.restore_params(workdir, run.abstract_state.params, which=which)
  return train.evaluate(run, params, split, max_blocks), run.corpus.fingerprint


def open_config(workdir: str) -> Any:
  if not workdir:
    raise UserError('--workdir is missing: give the directory of a finished run')
  return config_lib.read(workdir)


def summary_table(summary: dict[str, Any], floor: dict[str, float]) -> str:
  """One row a domain, then the averages; `floor` is the byte-bigram model's bits per byte."""
  rows = [
    [name, f'{bpb:.4f}', show(floor.get(name)), f'{summary["loss"][name]:.4f}',
     f'{summary["ppl"][name]:.2f}']
    for name, bpb in summary['bpb'].items()
  ]  # fmt: skip
  floors = [floor[name] for name in summary['bpb'] if name in floor]
  mean_floor = sum(floors) / len(floors) if floors else None
  rows += [
    ['macro average', f'{summary["macro_bpb"]:.4f}', show(mean_floor),
     f'{summary["macro_loss"]:.4f}', ''],
    ['micro average', f'{summary["micro_bpb"]:.4f}', '', f'{summary["micro_loss"]:.4f}',
     f'{math.exp(summary["micro_loss"]):.2f}'],
  ]  # fmt: skip
  header = ['domain', 'bits/byte', 'byte bigram', 'nats/token', 'perplexity']
  return format_table(header, rows)


def show(value: float | None) -> str:
  return '' if value is None else f'{value:.4f}'


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_string('workdir', '', 'the directory of the run')
  flags.DEFINE_string('split', 'validation', 'which split')
  flags.DEFINE_integer('max_blocks', 0, 'blocks of each domain; 0 takes all')
  flags.DEFINE_string('step', '', "which checkpoint: a step, or 'best'; empty: the newest")


def main(_: list[str]) -> None:
  summary, fingerprint = evaluate(
    FLAGS.workdir, split=FLAGS.split, max_blocks=FLAGS.max_blocks, step=FLAGS.step
  )
  result = Run(Path(FLAGS.workdir)).result or {}
  # The floor was measured on validation text and says nothing about another split.
  floor = result.get('bigram_floor', {}) if FLAGS.split == 'validation' else {}
  print(summary_table(summary, floor))
  print(
    f'\n{FLAGS.split}: {summary["tokens"]} tokens; worst domain {summary["worst_domain"]} '
    f'at {summary["worst_bpb"]:.4f} bits/byte'
  )
  trained_on = result.get('corpus', {}).get('fingerprint', fingerprint)
  if trained_on != fingerprint:
    print('note: the text differs from the one that the run was trained on; do not compare numbers')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
