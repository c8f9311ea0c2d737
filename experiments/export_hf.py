"""Writes the model of a finished run as the Hugging Face library reads it, or says what fits one.

python -m experiments.export_hf --workdir=runs/mine --out=exported/mine
python -m experiments.export_hf --workdir=runs/mine --out=exported/half --dtype=bfloat16
python -m experiments.export_hf --describe=exported/mine

The folder holds config.json, model.safetensors (in shards above 5 GB) and the run's tokenizer.json,
if it has one: bytes are no tokenizer of theirs. The last command prints the flags with which
experiments.main goes on from such a folder.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import cli
from experiments.errors import UserError
from experiments.evaluate import open_config

FLAGS = flags.FLAGS
DTYPES = ('float32', 'bfloat16')


def export(workdir: str, out: str, dtype: str = 'float32', step: str = '') -> Path:
  """Writes a checkpoint of a run (the newest, that of a step, or 'best') to the folder `out`, which
  must be new or empty."""
  if not out:
    raise UserError('--out is missing: give the folder to write')
  if dtype not in DTYPES:
    raise UserError(f'--dtype={dtype}: must be one of {", ".join(DTYPES)}')
  config = open_config(workdir)

  import jax

  from experiments import finished
  from experiments.data.tokenizers import ByteTokenizer
  from experiments.mesh import make_mesh
  from experiments.models import hf

  # In the host's memory, which is usually larger than a device's.
  mesh = make_mesh(devices=jax.local_devices(backend='cpu')[:1])
  run = finished.open_run(workdir, config, mesh, step)
  hf.save(out, run.params, run.model, eot_id=run.tokenizer.eot_id, dtype=dtype)
  if not isinstance(run.tokenizer, ByteTokenizer):
    run.tokenizer.save(out)
  return Path(out)


def describe(folder: str) -> str:
  """The flags of experiments.main that fit a folder, one a line."""
  from experiments.models import hf

  values = {f'model.{key}': value for key, value in hf.model_keys(folder).items()}
  if (tokenizer := Path(folder) / 'tokenizer.json').is_file():
    values['data.tokenizer'] = tokenizer
  values['checkpoint.init_from'] = folder
  return '\n'.join(f'--config.{key}={value}' for key, value in values.items())


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_string('workdir', '', 'the directory of the run')
  flags.DEFINE_string('out', '', 'the folder to write; new or empty')
  flags.DEFINE_string('dtype', 'float32', ' or '.join(DTYPES))
  flags.DEFINE_string('step', '', "which checkpoint: a step, or 'best'; empty: the newest")
  flags.DEFINE_string('describe', '', 'print the config keys that fit this folder, and exit')


def main(_: list[str]) -> None:
  if FLAGS.describe:
    print(describe(FLAGS.describe))
  else:
    print(export(FLAGS.workdir, FLAGS.out, FLAGS.dtype, FLAGS.step))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
