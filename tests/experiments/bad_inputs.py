"""What a user can get wrong, and what is said about it: one list, tested and printed as a page.

python -m tests.experiments.bad_inputs > docs/errors.md
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MAIN = ('--config=configs/lm.py:path=text,quick', '--config.data.root=data', '--workdir=runs/new')


class Damage(NamedTuple):
  """Something done to the files before the program starts."""

  path: str
  do: Callable[[Path], object]


class Case(NamedTuple):
  """One mistake.

  Attributes:
    what: the mistake, for people.
    args: of the command line. Those of `MAIN` that they do not replace come first.
    problem: what the message names, field and value. An ellipsis stands for words of a library, or
      for the folder that the program runs in.
    fix: how the message goes on: what to do.
    damage: to the files of a folder in which the command without `args` would work.
    program: the module.
    status: of the exit.
    progress: whether the run was under way, so that more than the error is on stderr.
  """

  what: str
  args: tuple[str, ...]
  problem: str
  fix: str
  damage: tuple[Damage, ...] = ()
  program: str = 'main'
  status: int = 2
  progress: bool = False

  @property
  def command(self) -> tuple[str, ...]:
    """All arguments; `--config` first."""
    if self.program not in ('main', 'compare'):
      return self.args
    given = {arg.partition('=')[0] for arg in self.args}
    whole = [*(arg for arg in MAIN if arg.partition('=')[0] not in given), *self.args]
    return tuple(sorted(whole, key=lambda arg: not arg.startswith('--config=')))

  @property
  def needs_runs(self) -> bool:
    """Whether it is about a run that was there before."""
    return any('runs/' in part for part in (*self.args, *(d.path for d in self.damage)))


def prepare(folder: Path) -> None:
  """Makes `folder` one in which `MAIN` works: the configs, some text in `text`, ready in `data`."""
  from experiments.data import corpus
  from tests.experiments import small

  (folder / 'configs').symlink_to(Path(__file__).parents[2] / 'configs')
  text = small.write_corpus(folder / 'text', documents=20)
  corpus.open_corpus(small.config(text, folder / 'data').data)


def write(path: str, content: str | bytes) -> Damage:
  data = content.encode() if isinstance(content, str) else content

  def do(folder):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)

  return Damage(path, do)


def edit(pattern: str, change: Callable[[bytes], bytes]) -> Damage:
  def do(folder):
    (path,) = folder.glob(pattern)
    path.write_bytes(change(path.read_bytes()))

  return Damage(pattern, do)


def remove(pattern: str) -> Damage:
  def do(folder):
    (path,) = folder.glob(pattern)
    (shutil.rmtree if path.is_dir() else os.unlink)(path)

  return Damage(pattern, do)


def copy(source: str, target: str) -> Damage:
  return Damage(target, lambda folder: shutil.copytree(folder / source, folder / target))


def cut(data: bytes) -> bytes:
  return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
  """Some bytes in the middle changed."""
  middle = len(data) // 2
  return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 100]) + data[middle + 100 :]


def jsonl(*lines: str | bytes, name: str = 'web.train.jsonl') -> tuple[Damage]:
  """A good line, then these."""
  encoded = [line.encode() if isinstance(line, str) else line for line in lines]
  return (write(f'text/{name}', b'\n'.join([b'{"text": "fine"}', *encoded, b''])),)


def unseal(run: str) -> tuple[Damage, ...]:
  """No checkpoint of a run matches its seal."""
  return tuple(edit(f'{run}/checkpoints/{step}/sha256.json', lambda _: b'{}') for step in (2, 4))


def set_lm(*items: str) -> str:
  return f'--config=configs/lm.py:{",".join(["path=text", "quick", *items])}'


BLOCKS = 'data/*/blocks/blocks/1.0.0'
PREPARED = 'delete that folder and they are prepared again'
OTHER_WORKDIR = 'choose a --workdir that you can write to'
RESTORE = 'restore it from a copy'
NUMBERS = json.dumps({'easy': 0.5, 'hard': 0.5})
RESUMED = (copy('runs/done', 'runs/cut'), remove('runs/cut/result.json'))
CUT = ('--workdir=runs/cut',)

CASES: dict[str, tuple[Case, ...]] = {
  'The command line': (
    Case('no config', ('--config=',), '--config is missing:', 'try --config=configs/quickstart.py'),
    Case(
      'a config file that is not there',
      ('--config=configs/lmm.py',),
      '--config=configs/lmm.py: no such file;',
      'there is configs/gpt2.py, …',
    ),
    Case(
      'an argument that the config does not have',
      (set_lm('stepz=3'),),
      "--config=configs/lm.py:path=text,quick,stepz=3: unknown argument 'stepz'",
      "(did you mean 'steps'?); this config has source, path, …",
    ),
    Case(
      'an argument of the wrong type',
      (set_lm('steps=many'),),
      '--config=configs/lm.py:path=text,quick,steps=many:',
      'argument steps=many is not a valid int',
    ),
    Case(
      'a flag that does not exist',
      ('--workdri=x',),
      "Unknown command line flag 'workdri'.",
      'Did you mean: workdir ?',
    ),
    Case(
      'an argument without dashes',
      ('seed=3',),
      "unexpected argument 'seed=3':",
      'every option is written --name=value',
    ),
    Case('no run directory', ('--workdir=',), '--workdir is missing:', 'try --workdir=runs/first'),
    Case(
      'a flag without its value',
      ('--config.optim.lr',),
      '--config.optim.lr has no value:',
      'write --config.optim.lr=<value>',
    ),
    Case(
      'a word where a number belongs',
      ('--num_processes=two',),
      '--num_processes=two:',
      'must be a number',
    ),
    Case(
      'options in a file',
      ('--flagfile=flags.txt',),
      '--flagfile=flags.txt: options in a file are not read;',
      'write them on the command line',
    ),
  ),
  'Values of the config': (
    Case(
      'a key that does not exist',
      ('--config.optim.lrr=1',),
      '--config.optim.lrr: no such key',
      "(did you mean 'optim.lr'?)",
    ),
    Case(
      'a group of keys',
      ('--config.optim=3',),
      '--config.optim is a group of keys:',
      'set one of them, --config.optim.<key>',
    ),
    Case(
      'a word where a number belongs',
      ('--config.optim.lr=fast',),
      "--config.optim.lr='fast':",
      'must be of type float, such as 0.003',
    ),
    Case(
      'a fraction where a whole number belongs',
      ('--config.total_steps=1.5',),
      "--config.total_steps='1.5':",
      'must be of type int, such as 4',
    ),
    Case(
      'an empty value',
      ('--config.optim.lr=',),
      "--config.optim.lr='':",
      'must be of type float, such as 0.003',
    ),
    Case(
      'a negative learning rate',
      ('--config.optim.lr=-1',),
      'config.optim.lr=-1.0:',
      'must be above 0',
    ),
    Case('nan', ('--config.optim.lr=nan',), 'config.optim.lr=nan:', 'must be above 0'),
    Case(
      'a number that nothing can count to',
      ('--config.total_steps=3000000000',),
      'config.total_steps=3000000000:',
      'must be at least 1 and at most 2147483647',
    ),
    Case(
      'a seed below 0',
      ('--config.seed=-1',),
      'config.seed=-1:',
      'must be at least 0 and at most 2147483647',
    ),
    Case(
      'a word that is none of the choices',
      ('--config.scope=batch',),
      "config.scope='batch':",
      'must be one of global, online, microbatch',
    ),
    Case(
      'a split that does not exist',
      ('--config.eval.split=tset',),
      "config.eval.split='tset':",
      'must be one of train, validation, test',
    ),
    Case(
      'a warm-up longer than the run',
      ('--config.optim.warmup_steps=5',),
      'config.optim.warmup_steps=5 and decay_steps=0',
      'do not fit into config.total_steps=4',
    ),
    Case(
      'text that is not UTF-8',
      ('--config.data.text_key=caf\udce9',),
      "config.data.text_key='caf\\udce9':",
      'must be UTF-8 text without NUL; choose another name',
    ),
  ),
  'Weightings': (
    Case(
      'one that does not exist',
      ('--config.w.loss.fn=linuper',),
      "config.w.loss.fn='linuper' is not a weighting;",
      "did you mean 'linupper'?",
    ),
    Case(
      'one without its temperature',
      (set_lm('weighting=linupper:hot'),),
      "--config=configs/lm.py:path=text,quick,weighting=linupper:hot: weighting 'linupper:hot':",
      "write a name and a positive temperature, 'linupper:0.4', or a name and arguments, "
      "'trimmed:share=0.5'",
    ),
    Case(
      'a temperature out of range',
      ('--config.w.loss.temperature=-1',),
      'config.w.loss: temperature=-1.0',
      'must be greater than 0',
    ),
    Case(
      'a share out of range',
      (set_lm('weighting=trimmed:share=2'),),
      'config.w.loss: share=2',
      'must be in (0, 1]',
    ),
    Case(
      'a burn-in below 0',
      ('--config.w.loss.start=-5',),
      'config.w.loss: start=-5',
      'must be at least 0',
    ),
    Case(
      'a stage without a weighting',
      ('--config.weighting=loss', '--config.weighting=cap'),
      "config.weighting names 'cap', so config.w.cap.fn",
      'must name a weighting',
    ),
    Case(
      'a stage named twice',
      ('--config.weighting=loss', '--config.weighting=loss'),
      "config.weighting=('loss', 'loss'):",
      "must be distinct stage names, such as ('loss',)",
    ),
    Case(
      "a weighting that needs a reference's losses",
      (set_lm('weighting=token_topk'),),
      "config.w does not fit … token_topk.<locals>.update() missing … 'ref_losses':",
      'set config.reference to a finished run',
    ),
    Case(
      'a weighting that needs a target domain',
      (set_lm('weighting=adapt'),),
      "config.w does not fit … adapt.<locals>.update() missing … 'representation' and 'anchor':",
      "set config.target.domain, and config.target.read='representation'",
    ),
    Case(
      'a target domain that is not in the data',
      ('--config.target.domain=eazy',),
      "config.target.domain: no domain 'eazy';",
      "did you mean 'easy'? known: easy, hard",
    ),
    Case(
      'more rows to keep than there are',
      ('--config.keep.rows=100',),
      'config.keep: rows=100 of each group,',
      'but a group has 8 (a batch of 8 in groups=1)',
    ),
    Case(
      'some rows only, and weights of parts of the batch',
      ('--config.keep.rows=4', '--config.scope=microbatch'),
      'config.keep.rows=4 needs all weights first:',
      "use scope='global', not 'microbatch'",
    ),
    Case(
      'one pass for a weighting that needs two',
      ('--config.scope=online',),
      "config.scope='online' is for weightings of the softmax type (kl_dro, tilted, linupper_stale "
      'and their chains):',
      "use scope='global'",
    ),
    Case(
      'a reference that is no run',
      ('--config.reference=text',),
      'text is not a run directory:',
      'it has no config.json',
    ),
  ),
  'Mixtures': (
    Case(
      'shares that do not parse',
      ('--config.data.mixture=easy',),
      "config.data.mixture='easy':",
      "must be 'uniform', 'natural', 'uniform except qa+law', shares such as 'web=0.5,code=0.5' or "
      'an existing mixture.json',
    ),
    Case(
      'a domain that does not exist',
      ('--config.data.mixture=easy=1,hrad=2',),
      "data.mixture: no domain 'hrad';",
      "did you mean 'hard'? known: easy, hard",
    ),
    Case(
      'a file whose weights do not sum to 1',
      ('--config.data.mixture=mix.json',),
      'mix.json: the weights sum to 0.7;',
      'they must sum to 1',
      (write('mix.json', '{"weights": {"easy": 0.5, "hard": 0.2}}'),),
    ),
    Case(
      'a file without weights',
      ('--config.data.mixture=mix.json',),
      'mix.json is not a mixture file:',
      'it has no weights by domain name',
      (write('mix.json', '[0.5, 0.5]'),),
    ),
    Case(
      'a file that is cut short',
      ('--config.data.mixture=mix.json',),
      'mix.json is not valid JSON (…);',
      f'delete it or {RESTORE}',
      (write('mix.json', '{"weights": {"easy": 0.5'),),
    ),
    Case(
      'a file with something else under a known name',
      ('--config.data.mixture=mix.json',),
      'mix.json: epochs is 3;',
      'it must be an object, or left out',
      (write('mix.json', f'{{"weights": {NUMBERS}, "epochs": 3}}'),),
    ),
    Case(
      'a method that does not exist',
      ('--config.mixture.fn=dgaa',),
      "config.mixture.fn='dgaa':",
      "did you mean 'dga'? known: temperature, …",
    ),
    Case(
      'an argument that the method does not take',
      (set_lm('mixture=dga:rate=1:evry=3'),),
      'config.mixture.args.evry:',
      "'dga' takes rate, …",
    ),
    Case(
      'an argument out of range',
      (set_lm('mixture=dga:rate=-1'),),
      "config.mixture.args of 'dga': rate=-1",
      'must be finite and at least 0; …',
    ),
    Case(
      'a name that is none',
      (set_lm('mixture=dga:a.b=1'),),
      "--config=configs/lm.py:path=text,quick,mixture=dga:a.b=1: mixture 'dga:a.b=1':",
      "write a method and its arguments, 'dga:rate=1.0:every=50'",
    ),
    Case(
      'more epochs than are allowed',
      ('--config.mixture.max_epochs=1', '--config.total_steps=4000'),
      'config.mixture.max_epochs=1: the domains with a share have … rows:',
      'raise max_epochs, train for fewer steps or give other domains a share',
    ),
  ),
  'Text': (
    Case(
      'no such folder',
      ('--config.data.path=txet',),
      "config.data.path='txet':",
      "data.source='folder' needs an existing folder",
    ),
    Case(
      'a folder without text',
      ('--config.data.path=empty',),
      "data.path='empty' holds no corpus:",
      'expected {domain}.{train|validation|test}.jsonl[.gz|.zst] or .txt, {domain}/*.txt, or '
      'shards train/*.jsonl[.gz|.zst]; found nothing',
      (Damage('empty', lambda folder: (folder / 'empty').mkdir()),),
    ),
    Case(
      'a domain without training text',
      (),
      "domain 'web' has no training file in text;",
      'add web.train.jsonl, or leave it out with data.domains',
      (write('text/web.validation.jsonl', '{"text": "fine"}\n'),),
    ),
    Case(
      'an empty file',
      (),
      "domain 'web' has no training text;",
      'add documents (two at least, where the validation data are held out of them), or leave the '
      'domain out with data.domains',
      (write('text/web.train.jsonl', ''),),
    ),
    Case(
      'one document, of which none can be held out',
      (),
      "domain 'web' has no validation text;",
      'add web.validation.jsonl, or leave the domain out with data.domains',
      jsonl(),
    ),
    Case(
      'the same text twice',
      (),
      'text/easy.train.jsonl and text/easy.train.jsonl.gz hold the same domain and split;',
      'keep one',
      (write('text/easy.train.jsonl.gz', gzip.compress(b'{"text": "fine"}\n')),),
    ),
    Case(
      'a domain that is not there',
      ('--config.data.domains=eazy',),
      "data.domains: no domain 'eazy';",
      "did you mean 'easy'? known: easy, hard",
    ),
    Case(
      'a line that is not JSON',
      (),
      'text/web.train.jsonl, line 2: not JSON (…);',
      'each line must be one object',
      jsonl('{"text": "cut'),
    ),
    Case(
      'a line that is nested without end',
      (),
      'text/web.train.jsonl, line 2: not JSON (…);',
      'each line must be one object',
      jsonl('[' * 100_000),
    ),
    Case(
      'a line without text',
      (),
      "text/web.train.jsonl, line 2: no text under 'text';",
      'add the field or set data.text_key to its name',
      jsonl('{"content": "fine"}'),
    ),
    Case(
      'a line of a shard that names no domain',
      ('--config.data.path=shards', '--config.data.domain_key=meta.set'),
      "shards/train/0.jsonl, line 1: no domain under 'meta.set';",
      'add the field or set data.domain_key to its name',
      (write('shards/train/0.jsonl', '{"text": "fine", "meta": {}}'),),
    ),
    Case(
      'a line that is not UTF-8',
      (),
      'text/web.train.jsonl, line 2: not UTF-8 at byte 13 of the line (0xe9);',
      'convert the file, e.g. with iconv -t utf-8',
      jsonl(b'{"text": "caf\xe9"}'),
    ),
    Case(
      'half a character',
      (),
      'text/web.train.jsonl, line 2: the text holds half a surrogate pair at character 3;',
      'drop it',
      jsonl('{"text": "caf\\ud83d"}'),
    ),
    Case(
      'the same in a name',
      (),
      'text/web.train.jsonl, line 2: the text holds half a surrogate pair at character 0;',
      'drop it',
      jsonl('{"text": "fine", "id": "\\ud83d"}'),
    ),
    Case(
      'a negative weight',
      (),
      'text/web.train.jsonl, line 2: weight -0.5',
      'must be finite and not negative; fix or drop it',
      jsonl('{"text": "fine", "weight": -0.5}'),
    ),
    Case(
      'a weight that is not a number',
      (),
      'text/web.train.jsonl, line 2: weight nan',
      'must be finite and not negative; fix or drop it',
      jsonl('{"text": "fine", "weight": NaN}'),
    ),
    Case(
      'an infinite weight',
      (),
      'text/web.train.jsonl, line 2: weight inf',
      'must be finite and not negative; fix or drop it',
      jsonl('{"text": "fine", "weight": Infinity}'),
    ),
    Case(
      'a weight that float32 cannot hold',
      (),
      'text/web.train.jsonl, line 2: weight 1e+39',
      'must be finite and not negative; fix or drop it',
      jsonl('{"text": "fine", "weight": 1e39}'),
    ),
    Case(
      'a weight in quotes',
      (),
      "text/web.train.jsonl, line 2: weight '2' is not a number;",
      'write a number such as 1.0',
      jsonl('{"text": "fine", "weight": "2"}'),
    ),
    Case(
      'weights by token, and too few',
      (),
      "document 'web.train.jsonl:2' of domain 'web' has 2 weights for 4 tokens;",
      'give one number, or one per token',
      jsonl('{"text": "fine", "weight": [1, 2]}', '{"text": "fine"}'),
    ),
    Case(
      'a gzip file that is cut short',
      (),
      'text/web.train.jsonl.gz cannot be read (…);',
      'fetch or compress it again',
      (write('text/web.train.jsonl.gz', cut(gzip.compress(b'{"text": "fine"}\n' * 99))),),
    ),
    Case(
      'a zstd file that is none',
      (),
      'text/web.train.jsonl.zst cannot be read (…);',
      'fetch or compress it again',
      (write('text/web.train.jsonl.zst', 'text'),),
    ),
    Case(
      'a file name that is not UTF-8',
      (),
      "text: the file name 'caf\\udce9.train.jsonl' is not UTF-8;",
      'rename it',
      jsonl(name='caf\udce9.train.jsonl'),
    ),
    Case(
      'a dataset that is not prepared',
      ('--config.data.source=tfds', '--config.data.name=my_ds', '--config.data.tfds_dir=data'),
      "data.name='my_ds' is not a prepared dataset in data;",
      "prepare it with file_format='array_record' (a few need tensorflow-cpu to prepare, none to "
      'read) or set data.tfds_dir',
    ),
    Case(
      'a dataset outside its folder',
      ('--config.data.source=tfds', '--config.data.name=../x', '--config.data.tfds_dir=data'),
      "data.name='../x' is not a prepared dataset in data;",
      "prepare it with file_format='array_record' (a few need tensorflow-cpu to prepare, none to "
      'read) or set data.tfds_dir',
    ),
  ),
  'Tokenizers and prepared data': (
    Case(
      'a tokenizer that does not exist',
      ('--config.data.tokenizer=word',),
      "config.data.tokenizer='word':",
      "must be 'byte', 'bpe:<vocabulary of 257 to 1000000>' or an existing tokenizer.json",
    ),
    Case(
      'a vocabulary smaller than the bytes',
      ('--config.data.tokenizer=bpe:100',),
      "config.data.tokenizer='bpe:100':",
      "must be 'byte', 'bpe:<vocabulary of 257 to 1000000>' or an existing tokenizer.json",
    ),
    Case(
      'a file that is not a tokenizer',
      ('--config.data.tokenizer=tokenizer.json',),
      "data.tokenizer='tokenizer.json' cannot be loaded (…);",
      'give a tokenizer.json written by the `tokenizers` package',
      (write('tokenizer.json', '{"model": 3}'),),
    ),
    Case(
      'prepared data with another tokenizer',
      (),
      'data/…/tokenizer.json is not the tokenizer that the data were prepared with (…);',
      'delete that folder and the data are prepared again',
      (Damage('data/*/tokenizer.json', lambda folder: _other_tokenizer(folder)),),
    ),
    Case(
      'a damaged tokenizer of prepared data',
      (),
      'data/…/tokenizer.json is damaged;',
      'delete that folder and the data are prepared again',
      (edit('data/*/tokenizer.json', cut),),
    ),
    Case(
      'a description that is cut short',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (edit('data/*/meta.json', cut),),
    ),
    Case(
      'a description of something else',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (edit('data/*/meta.json', lambda _: b'{}'),),
    ),
    Case(
      'a missing description',
      (),
      'the prepared data in data/… are damaged (… No such file …);',
      PREPARED,
      (remove('data/*/meta.json'),),
    ),
    Case(
      'missing blocks',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (remove('data/*/blocks'),),
    ),
    Case(
      'blocks that are cut short',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (edit(f'{BLOCKS}/*train.array_record*', cut),),
    ),
    Case(
      'bytes changed in the blocks',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (edit(f'{BLOCKS}/*train.array_record*', flip),),
    ),
    Case(
      'no validation blocks',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (edit(f'{BLOCKS}/*validation.array_record*', lambda _: b''),),
    ),
    Case(
      'blocks described as something else',
      (),
      'the prepared data in data/… are damaged (…);',
      PREPARED,
      (edit(f'{BLOCKS}/features.json', lambda data: data.replace(b'uint16', b'uint17')),),
    ),
    Case(
      'no place for prepared data',
      ('--config.data.root=text/easy.train.jsonl',),
      "data.root='text/easy.train.jsonl' cannot be used (…);",
      'set it to a folder you can write to',
    ),
  ),
  'Shapes and devices': (
    Case(
      'a batch that the devices cannot share',
      ('--config.batch_size=12',),
      'batch_size=12 is not divisible by 8 (8 devices x 1 microbatch):',
      'use 8 or 16',
    ),
    Case(
      'a batch that its parts cannot share',
      ('--config.microbatches=3',),
      'config.batch_size=8',
      'must be a multiple of config.microbatches=3',
    ),
    Case(
      'parts that the devices cannot share',
      ('--config.microbatches=2',),
      'batch_size=8 is not divisible by 16 (8 devices x 2 microbatches):',
      'use 16',
    ),
    Case(
      'a width that the heads cannot share',
      ('--config.model.n_head=3',),
      'config.model.n_embd=32',
      'must be a multiple of config.model.n_head=3',
    ),
    Case(
      'a sequence longer than the model',
      ('--config.model.max_len=16',),
      'config.data.seq_len=32 is longer than config.model.max_len=16:',
      'shorten the sequence, or set max_len=0 to follow it',
    ),
    Case(
      'a vocabulary smaller than that of the tokenizer',
      ('--config.model.vocab_size=100',),
      'model.vocab_size=100 is smaller than the tokenizer (257 tokens):',
      'use 0 or at least 257',
    ),
    Case(
      'a mesh that the devices do not fill',
      ('--config.mesh.data=3',),
      'mesh.data=3, mesh.fsdp=1, mesh.tensor=1 do not fit 8 devices:',
      'their product must be 8, and one of them may be -1 for the rest',
    ),
    Case(
      'a mesh without any size',
      ('--config.mesh.fsdp=-1',),
      'config.mesh.data=-1, config.mesh.fsdp=-1, config.mesh.tensor=1:',
      'only one may take all the rest',
    ),
    Case(
      'groups that devices would divide',
      ('--config.keep.rows=3', '--config.keep.groups=2'),
      'config.keep.groups=2 is not a multiple of the 8 devices, …',
      'set config.keep.groups=8 …',
    ),
    Case(
      'several processes, and nobody to meet',
      ('--num_processes=2', '--process_id=0'),
      'num_processes=2 without a coordinator:',
      'give host:port of process 0',
    ),
    Case(
      'a process too many',
      ('--coordinator=localhost:1234', '--num_processes=2', '--process_id=2'),
      'process_id=2 does not fit num_processes=2:',
      'give each of the 2 processes its own number, from 0',
    ),
  ),
  'Run directories and checkpoints': (
    Case(
      'a name that no directory can have',
      ('--workdir=' + 'long' * 70,),
      '--workdir: longlonglonglonglonglonglonglonglonglong... is longer than 255 bytes;',
      'choose a shorter name',
    ),
    Case(
      'a file',
      ('--workdir=text/easy.train.jsonl',),
      'cannot write into text/easy.train.jsonl: File exists;',
      OTHER_WORKDIR,
    ),
    Case(
      'a place that cannot be written',
      ('--workdir=text/easy.train.jsonl/run',),
      'cannot write into text/easy.train.jsonl/run: Not a directory;',
      OTHER_WORKDIR,
    ),
    Case(
      'a run with another config',
      ('--workdir=runs/done', '--config.optim.lr=1e-4'),
      'runs/done holds a run with another config: optim.lr is 0.003 there and 0.0001 here;',
      'set it back to resume that run, or choose another --workdir',
    ),
    Case(
      'a config that is cut short',
      CUT,
      'runs/cut/config.json is not valid JSON (…);',
      f'delete it or {RESTORE}',
      (*RESUMED, edit('runs/cut/config.json', cut)),
    ),
    Case(
      'a config that is none',
      CUT,
      'runs/cut/config.json is damaged: () stands where a group of keys belongs;',
      RESTORE,
      (*RESUMED, write('runs/cut/config.json', '[]')),
    ),
    Case(
      'a config without its groups',
      CUT,
      'runs/cut/config.json is damaged: 3 stands where a group of keys belongs;',
      RESTORE,
      (*RESUMED, write('runs/cut/config.json', '{"optim": 3}')),
    ),
    Case(
      'a broken line in the metrics',
      CUT,
      'runs/cut/metrics.jsonl, line 1 is not JSON with a step;',
      'delete that line and run again',
      (*RESUMED, edit('runs/cut/metrics.jsonl', lambda data: b'{"kind": "tr\n' + data)),
    ),
    Case(
      'a line without a step in the examples',
      CUT,
      'runs/cut/examples.jsonl, line 1 is not JSON with a step;',
      'delete that line and run again',
      (*RESUMED, edit('runs/cut/examples.jsonl', lambda data: b'{"loss": [1]}\n' + data)),
    ),
    Case(
      'a result that is cut short',
      ('--workdir=runs/done',),
      'runs/done/result.json is not valid JSON (…);',
      f'delete it or {RESTORE}',
      (edit('runs/done/result.json', cut),),
    ),
    Case(
      'parameters from what is no run',
      ('--config.checkpoint.init_from=text',),
      '…/text holds no checkpoint that can be read;',
      'give the directory of a finished run',
    ),
    Case(
      'parameters from a folder that is not there',
      ('--config.checkpoint.init_from=runs/doen',),
      "config.checkpoint.init_from='runs/doen':",
      'must be an existing run directory or Hugging Face folder',
    ),
    Case(
      'parameters of another model',
      ('--config.checkpoint.init_from=runs/done', '--config.model.n_embd=64'),
      'checkpoint …/runs/done/checkpoints/4 is of another model or optimizer: … is … there and … '
      'here;',
      'use the config it was saved with',
    ),
    Case(
      'parameters from checkpoints that are all damaged',
      ('--config.checkpoint.init_from=runs/done',),
      '…/runs/done holds no checkpoint that can be read;',
      'give the directory of a finished run',
      unseal('runs/done'),
      progress=True,
    ),
    Case(
      'a loss that is not finite',
      ('--config.optim.lr=1e30', '--config.optim.clip=1e30'),
      'step 2: weighted loss nan, gradient norm nan; runs/new/abort.json names the examples.',
      'Lower config.optim.lr, or set config.nonfinite=skip; checkpoints up to here are good',
      status=3,
      progress=True,
    ),
  ),
  'Looking at runs': (
    Case(
      'weights of a model that ours do not compute',
      ('--describe=hf',),
      "hf/config.json: model_type='mamba' is not supported:",
      'use gpt2 or llama',
      (write('hf/config.json', '{"model_type": "mamba"}'),),
      program='export_hf',
    ),
    Case(
      'an export into a folder that holds something',
      ('--workdir=runs/done', '--out=text'),
      'text is there and not an empty folder;',
      'choose another name',
      program='export_hf',
    ),
    Case(
      'a benchmark without tasks',
      ('--workdir=runs/done',),
      '--tasks is missing:',
      'name some, such as --tasks=lambada_openai,piqa',
      program='harness',
    ),
    Case(
      'no run',
      (),
      '--workdir is missing:',
      'give the directory of a finished run',
      program='evaluate',
    ),
    Case(
      'a folder that is no run',
      ('--workdir=text',),
      'text is not a run directory:',
      'it has no config.json',
      program='evaluate',
    ),
    Case(
      'a run that has saved nothing yet',
      CUT,
      '…/runs/cut holds no checkpoint that can be read;',
      'give the directory of a finished run',
      (*RESUMED, remove('runs/cut/checkpoints')),
      program='evaluate',
    ),
    Case(
      'a split that does not exist',
      ('--workdir=runs/done', '--split=tset'),
      "split 'tset' is not in the corpus;",
      'it has train, validation',
      program='evaluate',
    ),
    Case(
      'a negative number of blocks',
      ('--workdir=runs/done', '--max_blocks=-1'),
      '--max_blocks=-1:',
      'must be at least 0, which takes all blocks',
      program='evaluate',
    ),
    Case(
      'no run',
      ('--prompt=x',),
      '--workdir is missing:',
      'give the directory of a finished run',
      program='sample',
    ),
    Case(
      'no tokens',
      ('--workdir=runs/done', '--num_tokens=0'),
      '--num_tokens=0:',
      'must be at least 1',
      program='sample',
    ),
    Case(
      'a prompt that is not UTF-8',
      ('--workdir=runs/done', '--prompt=caf\udce9'),
      "--prompt='caf\\udce9':",
      'must be UTF-8 text without NUL',
      program='sample',
    ),
    Case(
      'a seed out of range',
      ('--workdir=runs/done', '--seed=-1'),
      '--seed=-1:',
      'must be at least 0 and below 2147483648',
      program='sample',
    ),
    Case(
      'nothing to report on',
      (),
      'which runs?',
      'try: python -m experiments.report runs/board',
      program='report',
    ),
    Case(
      'a folder that is neither run nor comparison',
      ('text',),
      "'text' is neither a comparison (compare.json) nor a run (config.json);",
      'pass the --workdir of experiments.compare or of experiments.main',
      program='report',
    ),
    Case(
      'a comparison whose record is damaged',
      ('runs/board',),
      'runs/board/compare.json is not what experiments.compare writes;',
      'run it again, which trains nothing twice',
      (write('runs/board/compare.json', '{"arms": 3}'),),
      program='report',
    ),
    Case(
      'a run whose result is damaged',
      ('runs/done',),
      'runs/done/result.json is damaged;',
      'restore it from a copy, or leave the run out',
      (write('runs/done/result.json', '[]'),),
      program='report',
    ),
  ),
  'Comparisons': (
    Case(
      'a weighting that does not exist',
      ('--weightings=uniform,linuper:1',),
      "--weightings: 'linuper:1' cannot be built: config.w.loss.fn='linuper' is not a weighting;",
      "did you mean 'linupper'?",
      program='compare',
    ),
    Case(
      'the same arm twice',
      ('--weightings=uniform,uniform',),
      "--weightings=uniform,uniform: 'uniform' is there twice;",
      'drop one',
      program='compare',
    ),
    Case(
      'an arm with a key that does not exist',
      ('--weightings=uniform,uniform@batchsize=8',),
      "--weightings=uniform,uniform@batchsize=8: arm 'uniform@batchsize=8': 'batchsize=8'",
      'is not a <key of the config>=<value>',
      program='compare',
    ),
    Case(
      'a learning rate of 0',
      ('--lrs=0,1e-3',),
      '--lrs=0,1e-3:',
      'every rate must be a positive number; write --lrs=1e-3,3e-3',
      program='compare',
    ),
    Case(
      'no seeds',
      ('--seeds=0',),
      '--seeds=0:',
      'must be at least 1; 3 or more give a usable interval',
      program='compare',
    ),
    Case(
      'a metric that does not exist',
      ('--metric=accuracy',),
      '--metric=accuracy:',
      'must be one of macro_bpb, micro_bpb, worst_bpb, macro_loss, micro_loss, or '
      'bpb/<domain>[+<domain>]',
      program='compare',
    ),
    Case('no folder', ('--workdir=',), '--workdir is missing:', 'try --workdir=runs/board',
         program='compare'),
  ),
}  # fmt: skip


def _other_tokenizer(folder: Path) -> None:
  from experiments.data import tokenizers

  (path,) = folder.glob('data/*/tokenizer.json')
  tokenizers.load_tokenizer('bpe:260', lambda: ['some text']).save(path.parent)


PAGE = f"""# What programs say about bad input

What you can fix ends in one line on stderr, `error: ...`, and exit status 2, before any training; a
loss or gradient that is not finite in status 3. The line names the field, its value and the fix. A
traceback is a bug of ours, please report it.

This page is printed from `tests/experiments/bad_inputs.py`, and a test runs every row of it. The
commands are `python -m experiments.PROGRAM` with the arguments below; where those of `main` and
`compare` do not say otherwise, they have

```
{' '.join(MAIN)}
```

as well. An ellipsis stands for words of a library, or for a folder.
"""

DECISIONS = """
## What is not an error

- A domain shorter than a block is padded to one; a document of any length may cross blocks.
- A last line of `metrics.jsonl` or `examples.jsonl` that a kill has torn is dropped on resume.
- A damaged checkpoint is renamed to `<step>.damaged`, and the run goes on from the one before.

## What is trusted

- **A config file is code**, and is executed: read one before you run it. Nothing else is: data,
  prepared data, mixtures, tokenizers, run directories and checkpoints are read as data, without
  pickle, `eval` or a shell (`tests/test_hardening.py` looks for them).
- **Paths of the command line and of the config are yours** and are taken as they are, also above
  the current folder. Links are followed: a corpus of links into a shared folder is common, and its
  fingerprint is that of the text.
- **Names inside the data are never paths.** Domains, documents and datasets may be called
  `../../x`: what is prepared goes by a hash. A domain's name must be printable.
- **What is read has bounds**: a line 268,435,456 bytes, a plain text 2,147,483,648 characters, also
  out of an archive that holds more; a vocabulary 16,777,216 ids.
"""


def page() -> str:
  """docs/errors.md."""
  parts = [PAGE]
  for section, cases in CASES.items():
    rows = ['| what | command | message |', '|---|---|---|', *map(_row, cases)]
    parts.append('\n'.join([f'## {section}', '', *rows, '']))
  return '\n'.join(parts) + DECISIONS


def _row(case: Case) -> str:
  shown = [arg for arg in case.args if case.program not in ('main', 'compare') or arg not in MAIN]
  words = [case.program, *shown]
  touched = list(dict.fromkeys(damage.path for damage in case.damage))
  command = _code(' '.join(words)) + ''.join(f', {_code(path)}' for path in touched)
  return f'| {case.what} | {command} | {_code(f"{case.problem} {case.fix}")} |'


def _code(text: str) -> str:
  shown = text if len(text) < 400 else text[:60] + '…'
  shown = shown.encode('ascii', 'backslashreplace').decode().replace('\\u2026', '…')
  fence = '``' if '`' in shown else '`'
  return f'{fence}{shown}{fence}'.replace('|', '\\|')


def every() -> list[Case]:
  return list(itertools.chain(*CASES.values()))


if __name__ == '__main__':
  print(page(), end='')
