"""Checks that a run is what its files say and, with --rerun, that it comes out again bit for bit.

python -m experiments.verify runs/quickstart
python -m experiments.verify runs/quickstart --rerun

Without --rerun nothing is computed: seals of the checkpoints, config, data and tokenizer, files as
they were when the run ended, every step exactly once, versions here as there. Exit status: 0 all of
it holds, 1 something does not.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, files, metrics
from experiments import config as config_lib
from experiments.errors import UserError

FLAGS = flags.FLAGS


def verify(workdir: str) -> dict[str, list[str]]:
  """{what was checked: what does not hold, a line each}.

  Raises:
    UserError: not a run directory, or one without `provenance.json`.
  """
  from experiments import provenance

  folder, config = Path(workdir), config_lib.read(workdir)
  record = provenance.read(workdir)
  result = files.read_json(folder / 'result.json') if (folder / 'result.json').is_file() else None
  return {
    'checkpoints': list(_checkpoints(folder)),
    'config': list(_config(config, record, result)),
    'data': list(_data(config, record, result)),
    'files': list(_files(folder, record)),
    'steps': list(_steps(folder, config, record, result is not None)),
    'versions': list(_versions(record)),
  }


def _checkpoints(folder: Path) -> Iterator[str]:
  from experiments import checkpoints

  directory = folder / 'checkpoints'
  steps = checkpoints.committed_steps(directory)
  if not steps:
    yield 'there is none'
  for step in steps:
    if reason := checkpoints.damage(directory / str(step)):
      yield f'{step} is damaged: {reason}'
    elif not (directory / str(step) / checkpoints.SEAL).exists():
      yield f'{step} has no seal, so nobody can tell'


def _config(config: Any, record: Mapping[str, Any], result: Mapping | None) -> Iterator[str]:
  found = config_lib.config_hash(config)
  for name, told in (('provenance.json', record['run']), ('result.json', result or {})):
    if told.get('config_hash', found) != found:
      yield f'config.json has the hash {found}, {name} says {told["config_hash"]}'


def _data(config: Any, record: Mapping[str, Any], result: Mapping | None) -> Iterator[str]:
  from experiments.data import corpus as corpus_lib

  try:
    corpus = corpus_lib.open_corpus(config.data)
  except UserError as e:
    yield f'they cannot be opened: {config_lib.one_line(e)}'
    return
  run, tokenizer = record['run'], corpus.meta['tokenizer']['sha256']
  there = {run['data']['fingerprint'], *([result['corpus']['fingerprint']] if result else [])}
  if there != {corpus.fingerprint}:
    yield f'the text is {corpus.fingerprint[:12]} here and {_short(there)} there'
  if tokenizer != run['tokenizer']['sha256']:
    yield f'the tokenizer is {tokenizer[:12]} here and {run["tokenizer"]["sha256"][:12]} there'


def _short(fingerprints: Iterable[str]) -> str:
  return ' or '.join(sorted(text[:12] for text in fingerprints))


def _files(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
  from experiments import provenance

  sealed = record['sessions'][-1].get('ended', {}).get('files', {})
  found = provenance.digests(folder) if sealed else {}
  for name in sorted(sealed.keys() | found.keys()):
    if sealed.get(name) != found.get(name):
      what = 'changed' if name in sealed and name in found else 'added' if name in found else 'lost'
      yield f'{name} was {what} after the run'


def _versions(record: Mapping[str, Any]) -> Iterator[str]:
  from experiments import provenance, train

  here = {**train.versions(), 'git': provenance.git_state()}
  for number, session in enumerate(record['sessions'], 1):
    there = {**session['versions'], 'git': session['git']}
    for name, (a, b) in config_lib.diff(there, here).items():
      yield f'session {number}: {name} is {a!r} there and {b!r} here'


# Every step once


def _steps(folder: Path, config: Any, record: Mapping[str, Any], done: bool) -> Iterator[str]:
  """Of a run that is not done, up to its newest checkpoint: what follows is computed again."""
  from experiments import checkpoints

  saved = checkpoints.committed_steps(folder / 'checkpoints')
  last = config.total_steps if done else max(saved, default=0)
  every = lambda n: {s for s in range(1, last + 1) if s % n == 0 or s == config.total_steps}
  changed = {key for session in record['sessions'] for key in session['changed']}
  steady = lambda *keys: changed.isdisjoint(keys)  # else another rhythm was as good
  lines = metrics.read_jsonl(folder / 'metrics.jsonl')
  for kind, key in (('train', 'log.every'), ('eval', 'eval.every')):
    steps = [line['step'] for line in lines if line['kind'] == kind and line['step'] <= last]
    wanted = every(config_lib.flatten(config)[key]) if steady(key) else {*steps}
    yield from _once(f'metrics.jsonl, {kind}', Counter(steps), dict.fromkeys(wanted, 1))
  if config.log.examples_every and steady('log.examples_every'):
    rows = Counter()
    for line in metrics.read_jsonl(folder / 'examples.jsonl'):
      rows[line['step']] += len(line['example_id']) if line['step'] <= last else 0
    wanted = {s for s in range(1, last + 1) if s % config.log.examples_every == 0}
    yield from _once('examples.jsonl', +rows, dict.fromkeys(wanted, config.batch_size))
  if config.log.ledger and steady('log.ledger'):
    wanted = dict.fromkeys(range(1, last + 1), config.batch_size)
    yield from _once('ledger', _ledger_rows(folder / 'ledger', last), wanted)


def _ledger_rows(folder: Path, last: int) -> Counter:
  import pyarrow.parquet as pq

  rows = Counter()
  for part in sorted(folder.glob('part-*.parquet')):
    rows.update(step for step in pq.read_table(part)['step'].to_pylist() if step <= last)
  return rows


def _once(name: str, found: Mapping[int, int], wanted: Mapping[int, int]) -> Iterator[str]:
  """Says at which first step the numbers of lines or rows differ, and at how many more."""
  wrong = sorted(s for s in found.keys() | wanted.keys() if found.get(s, 0) != wanted.get(s, 0))
  if wrong:
    step, more = wrong[0], f' (and at {len(wrong) - 1} more)' if len(wrong) > 1 else ''
    yield f'{name}: {found.get(step, 0)} of step {step}{more}, must be {wanted.get(step, 0)}'


# Again


def rerun(workdir: str) -> str:
  """Trains the config of a finished run again, elsewhere: 'reproduced', 'different: <the first step
  and what differs there>' or 'failed: <error>'.

  Raises:
    UserError: the run is not finished.
  """
  folder, config = Path(workdir), config_lib.read(workdir)
  if not (folder / 'result.json').is_file():
    raise UserError(f'{workdir} is not finished: run its command again before --rerun')
  config.log.update(progress=False, tensorboard=False, wandb='')
  from experiments import train

  with tempfile.TemporaryDirectory() as again:
    try:
      train.train(config, again)
      differences = list(_differences(folder, Path(again), train.build(config)))
    except Exception as e:  # whatever ends it is the finding
      return f'failed: {type(e).__name__}: {config_lib.one_line(e)}'
  return f'different: {"; ".join(differences)}' if differences else 'reproduced'


def _differences(there: Path, here: Path, run: Any) -> Iterator[str]:
  import jax
  import numpy as np

  from experiments.checkpoints import restore_params

  for name in ('metrics.jsonl', 'examples.jsonl'):
    if (there / name).is_file() or (here / name).is_file():
      yield from first_difference(
        name, metrics.read_jsonl(there / name), metrics.read_jsonl(here / name)
      )
  results = [files.read_json(folder / 'result.json') for folder in (there, here)]
  if keys := config_lib.diff(results[0]['final'], results[1]['final']):
    yield f'result.json: {", ".join(keys)}'
  restored = [restore_params(folder, run.abstract_state.params) for folder in (there, here)]
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), *restored)
  if not all(jax.tree.leaves(same)):
    yield 'the parameters at the end'


def first_difference(name: str, there: Iterable[dict], here: Iterable[dict]) -> Iterator[str]:
  """Says at which first line two records differ, and in which keys; wall clocks are left out."""
  for a, b in zip_longest(there, here, fillvalue={}):
    keys = [key for key in config_lib.diff(a, b) if not key.startswith('wall')]
    if keys:
      yield f'{name} from step {(a or b)["step"]} on: {", ".join(keys)}'
      return


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_bool('rerun', False, 'train the run again in a temporary folder, and compare')


def main(arguments: list[str]) -> None:
  if len(arguments) != 1:
    raise UserError('give one run directory: python -m experiments.verify runs/quickstart')
  (workdir,) = arguments
  findings = verify(workdir)
  for name, lines in findings.items():
    for line in lines or ['holds']:
      print(f'{name:<12} {line}')
  verdict = rerun(workdir) if FLAGS.rerun else ''
  if verdict:
    print(f'{"rerun":<12} {verdict}')
  sys.exit(any(findings.values()) or verdict not in ('', 'reproduced'))


if __name__ == '__main__':
  define_flags()
  cli.run(main, positional=True)
