"""Whatever is typed, and whatever files hold, works or ends in one line; never in a traceback."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import zstandard
from absl import flags
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs import common
from experiments import cli, metrics, mixing, train
from experiments import config as config_lib
from experiments.data import mixture as mixture_lib
from experiments.data.corpus import Corpus, open_corpus
from experiments.errors import UserError
from tests.experiments import small

ROOT = Path(__file__).parents[2]
KEYS = sorted(config_lib.flatten(common.base_config()))

fuzz = settings(
  derandomize=True,  # the same examples everywhere: a failure is one of the change under test
  deadline=None,
  database=None,
  max_examples=80,
  suppress_health_check=list(HealthCheck),
)


def one_line(call, *args, **kwargs):
  """What the call returns; None where it ends in a UserError or ConfigError of one line."""
  try:
    return call(*args, **kwargs)
  except (UserError, common.ConfigError) as error:
    message = config_lib.one_line(error)
    assert message
    return None


# The command line

words = st.text(st.characters(exclude_characters='\0'), max_size=20)  # no argument can hold a NUL
numbers = st.one_of(
  st.integers(),
  st.integers(-(10**40), 10**40),
  st.floats(),
  st.sampled_from(['1e999', '-0', '0x10', '1_000', '\u0663', '1' * 5000, 'nan', '-inf', '1e-320']),
)
literals = st.recursive(
  st.one_of(numbers, st.booleans(), st.none(), words.map(repr)),
  lambda inner: st.lists(inner, max_size=3).map(lambda x: f'({",".join(map(str, x))},)'),
  max_leaves=6,
)
values = st.one_of(
  numbers,
  words,
  literals,
  st.sampled_from(['', 'true', 'false', 'x' * 300, '../' * 60, '/dev/null', '[' * 3000, 'a=1,b=2']),
).map(str)
keys = st.one_of(
  st.sampled_from(KEYS),
  st.sampled_from(KEYS).map(lambda key: key.rpartition('.')[0] or key),
  st.sampled_from(KEYS).map(lambda key: f'{key}[0]'),
  words,
)
overrides = st.one_of(
  st.tuples(st.sampled_from(KEYS), values).map(lambda kv: f'--config.{kv[0]}={kv[1]}'),
  st.tuples(keys, values).map(lambda kv: f'--config.{kv[0]}={kv[1]}'),
  keys.map(lambda key: f'--config.{key}'),
  keys.map(lambda key: f'--noconfig.{key}'),
  values,
)


def parse(*args):
  """The config of a command line, as a program gets it."""
  flag_values = flags.FlagValues()
  with (
    mock.patch.object(cli, 'FLAGS', flag_values),
    mock.patch.object(sys, 'argv', ['prog', *args]),
  ):
    cli.define_config()
    cli._parse(sys.argv, positional=False)
    return flag_values.config


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_the_parser_under_test_is_the_one_of_the_programs():
  config = parse('--config=configs/lm.py:quick', '--config.optim.lr=0.5')
  assert (config.total_steps, config.optim.lr) == (4, 0.5)
  with pytest.raises(UserError, match=r'config\.optim\.lr=-1\.0: must be above 0'):
    parse('--config=configs/lm.py', '--config.optim.lr=-1')


@fuzz
@given(st.lists(overrides, max_size=4))
def test_overrides(args):
  one_line(parse, '--config=configs/lm.py:quick', *args)


switches = st.sampled_from(
  'source path name tokenizer length layers steps lr weighting seed'.split()
)


@fuzz
@given(
  st.sampled_from(['lm', 'gpt2', 'quickstart', 'mixtures', 'languages', 'specialise', 'common']),
  st.lists(st.one_of(st.tuples(switches, values).map('='.join), words, values), max_size=4),
)
def test_arguments_of_config_files(name, items):
  one_line(parse, f'--config=configs/{name}.py:{",".join(items)}')


@fuzz
@given(words)
def test_names_of_config_files(name):
  one_line(parse, f'--config={name}')


# Weightings, mixtures, arms

WEIGHTINGS = [*common._TEMPERED, 'uniform', 'trimmed', 'token_topk', 'group_dro', 'cap', 'hedge']
parts = st.one_of(
  st.sampled_from(
    ['share', 'start', 'temperature', 'rate', 'every', 'mode', 'fn', 'args', 'stage']
  ),
  st.sampled_from(['items', 'keys', '__class__', 'a.b', 'target', 'floor', 'num_groups', 'limit']),
  words,
)
arguments = st.lists(st.one_of(st.tuples(parts, values).map('='.join), values), max_size=3).map(
  lambda items: ''.join(f':{item}' for item in items)
)
weightings = st.tuples(
  st.sampled_from(['', 'row_shuffled:']), st.one_of(st.sampled_from(WEIGHTINGS), words), arguments
).map(''.join)
mixtures = st.tuples(st.one_of(st.sampled_from(list(mixing.METHODS)), words), arguments).map(
  ''.join
)
arms = st.tuples(
  weightings,
  st.lists(st.one_of(st.tuples(keys, values).map('='.join), mixtures.map('mixture={}'.format))),
).map(lambda arm: '@'.join([arm[0], *arm[1]]))


def configured(set_it, spec):
  config = common.base_config()
  set_it(config, spec)
  config_lib.check(config)
  return config


@fuzz
@given(weightings)
@example('row_shuffled:' * 3000 + 'uniform')
def test_weightings(spec):
  one_line(configured, common.set_weighting, spec)


@fuzz
@given(mixtures)
def test_mixtures(spec):
  one_line(configured, common.set_mixture, spec)


@fuzz
@given(arms)
def test_arms(spec):
  one_line(configured, common.set_arm, spec)


# What is built before a run


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A small config whose data are prepared."""
  folder = tmp_path_factory.mktemp('fuzz')
  config = small.config(small.write_corpus(folder / 'text', documents=12), folder / 'data')
  open_corpus(config.data)
  return config


def built(prepared, change):
  """Builds the run of a config after `change(config)`; None where it is refused."""
  config = config_lib.from_json(config_lib.to_json(prepared))
  change(config)
  config_lib.check(config)
  return train.build(config, jax.devices()[:1])


small_numbers = st.one_of(st.integers(-2, 40), st.floats(), st.sampled_from([2**31, 10**12, 1e39]))
method_arguments = {name: [*mixing._arguments(name), 'x'] for name in mixing.METHODS}


@pytest.mark.slow
@settings(fuzz, max_examples=40)
@given(st.data())
def test_building_with_any_weighting(prepared, data):
  name = data.draw(st.sampled_from(WEIGHTINGS))
  stage = {'fn': name} | data.draw(
    st.dictionaries(st.sampled_from(['share', 'start', 'temperature', 'rate', 'limit', 'side']),
                    st.one_of(small_numbers, st.sampled_from(['low', 'nan', '']), st.booleans()),
                    max_size=3)
  )  # fmt: skip
  one_line(built, prepared, lambda config: setattr(config, 'w', dict(loss=stage)))


@pytest.mark.slow
@settings(fuzz, max_examples=30)
@given(st.data())
def test_building_with_any_mixture(prepared, data):
  name = data.draw(st.sampled_from(list(mixing.METHODS)))
  args = data.draw(
    st.dictionaries(
      st.sampled_from(method_arguments[name]),
      st.one_of(small_numbers, st.sampled_from(['cosine', 'easy', '']), st.booleans()),
      max_size=4,
    )
  )
  more = data.draw(
    st.fixed_dictionaries(
      {},
      optional={
        'mode': st.sampled_from(['sample', 'weigh']),
        'every': st.integers(1, 5),
        'lag': st.integers(1, 2**31 - 1),
        'rows': st.integers(1, 3),
        'target': st.sampled_from([(), ('easy',), ('x',)]),
        'max_epochs': st.integers(0, 2**31 - 1),
      },
    )
  )
  one_line(built, prepared, lambda config: config.mixture.update(fn=name, args=args, **more))


TINY = {
  'batch_size': st.integers(1, 12),
  'microbatches': st.integers(1, 3),
  'scope': st.sampled_from(['global', 'online', 'microbatch']),
  'example_base': st.sampled_from(['any', 'tokens']),
  'nonfinite': st.sampled_from(['abort', 'skip']),
  'seed': st.integers(-1, 2**31),
  'total_steps': st.integers(1, 2**31 - 1),
  'model.n_layer': st.integers(1, 3),
  'model.n_head': st.integers(1, 5),
  'model.n_embd': st.integers(1, 40),
  'model.max_len': st.integers(0, 40),
  'model.vocab_size': st.integers(0, 300),
  'model.dtype': st.sampled_from(['float32', 'bfloat16']),
  'model.scan': st.booleans(),
  'model.remat': st.sampled_from(['none', 'dots', 'full']),
  'model.loss_chunk': st.integers(0, 40),
  'model.dropout': st.floats(0, 1),
  'optim.lr': st.floats(0),
  'optim.eps': st.floats(0),
  'optim.clip': st.floats(0),
  'optim.schedule': st.sampled_from(['cosine', 'wsd', 'constant']),
  'optim.warmup_steps': st.integers(0, 2**31 - 1),
  'optim.decay_steps': st.integers(0, 2**31 - 1),
  'keep.rows': st.integers(0, 12),
  'keep.groups': st.integers(1, 12),
  'keep.sampled': st.booleans(),
  'target.domain': st.sampled_from(['', 'easy', 'x']),
  'target.read': st.sampled_from(['gradient', 'representation']),
  'target.blocks': st.integers(1, 2**20),
  'eval.batch_size': st.integers(1, 12),
  'eval.max_blocks': st.integers(0, 2**31 - 1),
  'data.mixture': st.sampled_from(['uniform', 'natural', 'easy=1', 'easy=1e308,hard=1e308']),
  'mesh.data': st.integers(-1, 3),
  'mesh.fsdp': st.integers(-1, 3),
}


@pytest.mark.slow
@settings(fuzz, max_examples=40)
@given(st.dictionaries(st.sampled_from(sorted(TINY)), st.none(), max_size=5), st.data())
def test_building_any_small_config(prepared, chosen, data):
  flat = {key: data.draw(TINY[key], label=key) for key in chosen}
  one_line(built, prepared, lambda config: config.update_from_flattened_dict(flat))


# Files of text

json_values = st.recursive(
  st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text()),
  lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
  max_leaves=5,
)
records = st.one_of(
  st.fixed_dictionaries(
    {},
    optional={name: json_values for name in ('text', 'weight', 'id', 'parent')},
  ),
  st.fixed_dictionaries({'text': st.text(min_size=1)}, optional={'weight': json_values}),
  json_values,
).map(lambda record: json.dumps(record).encode())
raw_lines = st.one_of(
  records,
  st.binary(max_size=60),
  st.sampled_from([b'[' * 50_000, b'1' * 5_000, b'{"text": "\\ud800"}', b'\xef\xbb\xbf{}', b'\r']),
)
contents = st.one_of(st.lists(raw_lines, max_size=5).map(b'\n'.join), st.binary(max_size=300))
SUFFIXES = {'': bytes, '.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}


@contextlib.contextmanager
def text_folder(tmp_path_factory, name, content):
  folder = tmp_path_factory.mktemp('text')
  small.write_corpus(folder / 'text', documents=3)
  (folder / 'text' / name).write_bytes(content)
  config = small.config(folder / 'text', folder / 'data')
  yield config
  shutil.rmtree(folder)


@settings(fuzz, max_examples=120)
@given(contents, st.sampled_from(sorted(SUFFIXES)), st.sampled_from(['jsonl', 'txt']), st.data())
def test_text(tmp_path_factory, content, suffix, kind, data):
  packed = bytearray(SUFFIXES[suffix](content))
  for _ in range(data.draw(st.integers(0, 2))):  # damage to the archive, or to the text itself
    if packed:
      packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
  del packed[len(packed) - data.draw(st.sampled_from([0, 0, 0, 1, 9])) :]
  with text_folder(tmp_path_factory, f'web.train.{kind}{suffix}', bytes(packed)) as config:
    corpus = one_line(open_corpus, config.data)
    if corpus is not None:
      rows = corpus.rows('train', range(corpus.sizes('train').sum()))
      assert np.isfinite(rows.get('weights', rows['base'])).all()


@settings(fuzz, max_examples=100)
@given(st.one_of(json_values.map(lambda v: json.dumps(v).encode()), st.binary(max_size=60)))
def test_tokenizer_files(tmp_path_factory, content):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  path.write_bytes(content)
  from experiments.data import tokenizers

  one_line(tokenizers.load_tokenizer, str(path))


VOCABULARIES = st.dictionaries(
  st.one_of(st.text(max_size=4), st.sampled_from(['[UNK]', 'a', '<0x41>', '</s>'])),
  st.integers(-1, 2**33),
  max_size=6,
)


@settings(fuzz, max_examples=60)
@given(
  VOCABULARIES,
  st.sampled_from(['WordLevel', 'BPE', 'WordPiece', 'Unigram', 'x']),
  st.text(max_size=30),
)
def test_tokenizer_files_in_form(tmp_path_factory, vocabulary, kind, text):
  from experiments.data import tokenizers

  model = {'type': kind, 'vocab': vocabulary, 'unk_token': '[UNK]', 'merges': []}
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  path.write_text(json.dumps({'version': '1.0', 'model': model}))
  tokenizer = one_line(tokenizers.load_tokenizer, str(path))
  if tokenizer is not None:
    one_line(tokenizer.encode, text)


# Files of our own


@pytest.fixture(scope='module')
def opened(prepared):
  return open_corpus(prepared.data)


def damaged(data, content: bytes) -> bytes:
  kind = data.draw(st.sampled_from(['flip', 'cut', 'insert', 'replace']))
  at = data.draw(st.integers(0, max(0, len(content) - 1)))
  if kind == 'cut':
    return content[:at]
  if kind == 'replace':
    return data.draw(st.binary(max_size=40))
  new = data.draw(st.binary(min_size=1, max_size=4))
  return content[:at] + new + content[at + (len(new) if kind == 'flip' else 0) :]


@settings(fuzz, max_examples=80)
@given(st.data())
def test_prepared_data(tmp_path_factory, opened, data):
  """Damage is noticed, or what is read is what was written."""
  folder = tmp_path_factory.mktemp('prepared') / opened.directory.name
  shutil.copytree(opened.directory, folder)
  path = data.draw(st.sampled_from(sorted(p for p in folder.rglob('*') if p.is_file())))
  content = path.read_bytes()
  at = 65_536 if 'array_record' in path.name and data.draw(st.booleans()) else 0  # past its header
  path.write_bytes(content[:at] + damaged(data, content[at:]))

  def read():
    corpus = Corpus(folder)
    corpus.check()
    return corpus, corpus.rows('train', range(corpus.sizes('train').sum()))

  found = one_line(read)
  if found is not None and path.name != 'meta.json':
    np.testing.assert_array_equal(
      found[1]['tokens'], opened.rows('train', range(opened.sizes('train').sum()))['tokens']
    )
  shutil.rmtree(folder.parent)


@settings(fuzz, max_examples=100)
@given(
  st.one_of(
    st.fixed_dictionaries(
      {'weights': st.fixed_dictionaries({}, optional={d: json_values for d in ('easy', 'hard')})},
      optional={name: json_values for name in ('corpus', 'epochs', 'made_by')},
    ),
    json_values,
  ).map(lambda v: json.dumps(v).encode()),
  st.sampled_from([bytes, lambda data: data[:-1], lambda data: data + b'\xff']),
)
@example(b'[' * 100_000, bytes)
@example(b'{"weights": {"easy": 0.5, "hard": 0.5}, "epochs": {"easy": null}}', bytes)
def test_mixture_files(tmp_path_factory, opened, content, change):
  path = tmp_path_factory.mktemp('mixture') / 'mixture.json'
  path.write_bytes(change(content))
  shares = one_line(mixture_lib.parse, str(path), opened)
  if shares is not None:
    assert shares.sum() == pytest.approx(1)
    planned = mixture_lib.planned_examples(opened, batch_size=8, total_steps=4, proportions=shares)
    mixture_lib.remarks(str(path), planned)


@settings(fuzz, max_examples=100)
@given(st.data())
def test_stored_configs(tmp_path_factory, prepared, data):
  folder = tmp_path_factory.mktemp('run')
  content = config_lib.to_json(prepared).encode()
  (folder / 'config.json').write_bytes(damaged(data, content))
  config = one_line(config_lib.read, folder)
  if config is not None:
    one_line(config_lib.check, config)
    one_line(config_lib.check_same_run, folder, prepared)


@settings(fuzz, max_examples=100)
@given(contents)
def test_records_of_runs(tmp_path_factory, content):
  path = tmp_path_factory.mktemp('run') / 'metrics.jsonl'
  path.write_bytes(content)
  one_line(lambda: metrics.JsonlFile(path, resume_step=3).close())
