"""Which documents of a large corpus look like a small one? Importance resampling (DSIR), by shards.

  python -m experiments.select_corpus --raw=FOLDER --targets=med=med.jsonl.gz --keep=0.1 --out=OUT
  python -m experiments.select_corpus ... --on=slurm --jobs=200 --partition=cpu
  python -m experiments.select_corpus ... --on=host --host=0/4          on each of four hosts
  python -m experiments.select_corpus ... --on=beam --beam=--runner=FlinkRunner,--parallelism=64

RAW holds shards, **/*.jsonl[.gz|.zst], of objects with a text; a target is such a file or folder.
Several targets share the documents in proportion to their n-grams, in the order given.

Three passes over the shards: hashed n-grams are counted, every document gets its log weight
log p(target) - log p(raw), and the top of log weight / temperature + noise is written, under the
names of the shards, to OUT/train/dsir, with the field "selection". Noise hangs on the seed, the
shard's name and the line, so that every executor, and any number of workers, writes the same bytes.
OUT/train/random is the control: as many documents by chance. Targets go to OUT/train/NAME and, with
--validation, to OUT/validation/NAME: then OUT is a corpus to train on, and the command is printed.

A pass takes up where it was killed. A damaged shard is named when all others are done; mend it, or
remove it, and run the command again. On several machines, all must see the folders; SLURM is waited
for; Dataflow's workers see no folder of yours, unless a bucket is mounted on them (not tried here).

Log weights of long documents differ by hundreds, so that sampling is nearly a top-k of them, and
longer documents win: --per_ngram takes the mean over n-grams, with which --temperature (try 0.01)
decides between chance and top-k. --duplicates=0.8 divides a document's chance by the number of its
near duplicates (MinHash of word 5-grams, by datasketch).

Writes OUT/result.json: settings, counts, and the KL reduction, by which selections are compared
untrained (the mean over targets of KL(target || raw) - KL(target || selection), in nats).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, files
from experiments.errors import UserError

FLAGS = flags.FLAGS
SETTINGS = ('raw', 'targets', 'validation', 'keep', 'temperature', 'per_ngram', 'min_words',
            'smoothing', 'duplicates', 'text_key', 'seed')  # fmt: skip


def main(_: list[str]) -> None:
  for name in ('raw', 'targets', 'out'):
    if not getattr(FLAGS, name):
      raise UserError(f'--{name} is missing: --raw=FOLDER --targets=NAME=FILE --out=FOLDER')
  # All of it is on the host, and an accelerator of this machine may be another's.
  import jax

  jax.config.update('jax_platforms', 'cpu')
  from experiments.select_corpus import run

  settings = {name: getattr(FLAGS, name) for name in SETTINGS}
  out = Path(FLAGS.out)
  with held(out, settings):
    result = run.select(run.Settings(**settings, out=out), executor())
  print(describe(result))
  if result['validation']:
    targets = list(result['targets'])
    print(
      '\nWhat a model learns from each, at equal steps:\n'
      f'  python -m experiments.compare --config=configs/lm.py:path={out} \\\n'
      '    --config.data.domain_key=selection --lrs=3e-3,6e-3 --seeds=3 --tune_seeds=2 \\\n'
      f'    --metric=bpb/{targets[0]} --workdir=runs/selected \\\n'
      "    --weightings='random:=uniform@data.mixture=random=1,dsir:=uniform@data.mixture=dsir=1'"
    )


def held(out: Path, settings: dict[str, Any]) -> contextlib.AbstractContextManager:
  """Checks that OUT holds no other finished selection; hosts share it, others may not.

  Unfinished work may go on with other settings: each pass knows what its parts were made of.
  """
  known = out / 'result.json'
  if known.exists():
    before = files.read_json(known).get('settings', {})
    for name, value in files.jsonable(settings).items():
      if before.get(name) != value:
        raise UserError(
          f'--out={out} holds a selection with --{name}={before.get(name)}, not {value}: choose '
          'another --out, or delete it'
        )
  elif out.exists() and not (out / 'work').exists() and any(out.iterdir()):
    raise UserError(f'--out={out} already holds something else; choose a new folder')
  return contextlib.nullcontext() if FLAGS.on == 'host' else files.exclusive(out)


def executor() -> Any:
  """What --on names."""
  from experiments import corpus_job

  if FLAGS.on == 'slurm':
    return corpus_job.slurm(FLAGS.jobs, partition=FLAGS.partition, minutes=FLAGS.minutes)
  if FLAGS.on == 'beam':
    return corpus_job.beam(FLAGS.beam)
  if FLAGS.on == 'host':
    index, slash, count = FLAGS.host.partition('/')
    if not slash or not index.isdecimal() or not count.isdecimal():
      raise UserError(f'--host={FLAGS.host!r}: must be i/n, this process and how many, as in 0/4')
    return corpus_job.host(int(index), int(count), 60 * FLAGS.wait or float('inf'))
  return corpus_job.local(FLAGS.jobs)


def describe(result: dict[str, Any]) -> str:
  """What was read and what was chosen."""
  from experiments.verdict import format_table

  rows = [('raw', f'{result["raw"]["documents"]:,}', '', '')]
  for name, r in result['selections'].items():
    rows.append(
      (name, f'{r["documents"]:,}', f'{r["bytes"] / 1e6:.2f}', f'{r["kl_reduction"]:+.4f}')
    )
  return format_table(('', 'documents', 'MB of text', 'KL reduction'), rows)


if __name__ == '__main__':
  flags.DEFINE_string('raw', '', 'folder of shards to choose from')
  flags.DEFINE_list('targets', [], 'NAME=file or folder of JSON lines, by comma')
  flags.DEFINE_list('validation', [], 'NAME=file or folder of held-out documents of targets')
  flags.DEFINE_float('keep', 0.1, 'share of the documents to choose or, from 1 on, their number')
  flags.DEFINE_float('temperature', 1.0, '0 takes the best, inf draws blindly')
  flags.DEFINE_bool('per_ngram', False, 'score a document by its mean, not its sum, over n-grams')
  flags.DEFINE_integer('min_words', 100, 'leave shorter documents out')
  flags.DEFINE_float('smoothing', 0.0, "added to the targets' counts of each bucket")
  flags.DEFINE_float('duplicates', 0.0, 'similarity of near duplicates to discount; 0: none')
  flags.DEFINE_string('text_key', 'text', 'field of the text')
  flags.DEFINE_integer('seed', 0, 'of the sampling')
  flags.DEFINE_string('out', '', 'folder to write')
  flags.DEFINE_enum('on', 'local', ['local', 'slurm', 'host', 'beam'], 'where to run')
  flags.DEFINE_integer('jobs', 0, 'at a time; 0: one for each core (slurm: for each shard, <= 100)')
  flags.DEFINE_string('host', '', 'with --on=host: i/n, this process of how many')
  flags.DEFINE_float('wait', 0, 'minutes without news until other hosts count as dead; 0: never')
  flags.DEFINE_string('partition', '', "SLURM's")
  flags.DEFINE_integer('minutes', 60, 'of each SLURM job')
  flags.DEFINE_list('beam', [], "Beam's options; none: its local runner, in this process")
  cli.run(main)
