"""Configs as data: what is refused and how it is said; JSON; diff; resume; origin of values."""

import json

import pytest

from configs import common
from experiments import config as config_lib
from experiments.config_rules import RULES
from experiments.errors import UserError


def changed(**overrides):
  """The base config with flat keys set, `optim__lr=...`, past ConfigDict's own type check."""
  config = common.base_config()
  with config.ignore_type():
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return config


def test_base_config_is_valid():
  config_lib.check(common.base_config())


def test_every_rule_is_about_an_existing_key_and_most_keys_have_one():
  keys = set(config_lib.flatten(common.base_config()))
  assert set(RULES) <= keys
  free = {k for k in keys - set(RULES) if not k.startswith('w.')}
  assert free == {
    'weighting', 'data.path', 'data.name', 'data.tfds_dir', 'data.root',
    'data.text_key', 'data.domain_key', 'data.weight_key',
    'model.scan', 'log.tensorboard', 'log.progress',
    'log.ledger',
    'keep.sampled', 'keep.reuse', 'target.domain', 'mixture.fn', 'mixture.args',
  }  # fmt: skip


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (dict(optim__lr=-1.0), 'config.optim.lr=-1.0: must be above 0'),
    (dict(optim__lr=float('nan')), 'config.optim.lr=nan: must be above 0'),
    (dict(optim__b1=1.0), 'config.optim.b1=1.0: must be at least 0 and below 1'),
    (dict(total_steps=0), 'config.total_steps=0: must be at least 1'),
    (dict(scope='batch'), "config.scope='batch': must be one of global, online, microbatch"),
    (dict(target__domain='web', keep__rows=2), 'needs a backward pass of all rows'),
    (dict(target__domain='web', checkpoint__every=75), 'must be a multiple of config.target.every'),
    (dict(checkpoint__keep_every=-1), 'config.checkpoint.keep_every=-1: must be at least 0'),
    (
      dict(checkpoint__best='bpb'),
      "config.checkpoint.best='bpb': must be '' or one of macro_bpb, ",
    ),
    (
      dict(checkpoint__best='macro_bpb', checkpoint__every=75),
      'config.eval.every=100 must be a multiple of config.checkpoint.every=75',
    ),
    (dict(data__tokenizer='bpe:12'), 'config.data.tokenizer='),
    (dict(data__tokenizer='no/tokenizer.json'), 'existing tokenizer.json'),
    (dict(data__mixture='web'), 'config.data.mixture='),
    (dict(data__mixture='web=0,code=0'), 'config.data.mixture='),
    (dict(data__mixture='web=-1,code=2'), 'config.data.mixture='),
    (dict(data__domains=('a', 'a')), 'config.data.domains='),
    (dict(data__source='folder'), "config.data.path='': data.source='folder' needs"),
    (dict(data__source='folder', data__path='no/such'), "config.data.path='no/such'"),
    (dict(data__source='tfds'), "config.data.name=''"),
    (
      dict(batch_size=10, microbatches=4),
      'config.batch_size=10 must be a multiple of config.micro',
    ),
    (dict(model__n_embd=30), 'config.model.n_embd=30 must be a multiple of config.model.n_head=4'),
    (dict(model__max_len=64), 'config.data.seq_len=128 is longer than config.model.max_len=64'),
    (dict(optim__warmup_steps=501), 'config.optim.warmup_steps=501'),
    (dict(mesh__data=0), 'config.mesh.data=0: must be at least 1, or -1'),
    (dict(mesh__fsdp=-1), 'only one may take all the rest'),
    (
      dict(checkpoint__init_from='no/run'),
      "config.checkpoint.init_from='no/run': must be an existing",
    ),
    (dict(weighting=()), 'config.weighting=()'),
    (dict(weighting=('loss', 'loss')), 'distinct'),
    (dict(weighting=('cap',)), "config.weighting names 'cap', so config.w.cap.fn"),
    (dict(optim__lr='fast'), "config.optim.lr='fast': must be of type float, such as 0.003"),
    (dict(total_steps=1.5), 'config.total_steps=1.5: must be of type int, such as 500'),
    (dict(model__scan=1), 'config.model.scan=1: must be of type bool'),
  ],
)
def test_bad_values(overrides, message):
  with pytest.raises(UserError) as error:
    config_lib.check(changed(**overrides))
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_good_values():
  for overrides in (
    dict(data__mixture='web=0.5,code=0'),
    dict(data__mixture='natural'),
    dict(data__tokenizer='bpe:4096'),
    dict(model__max_len=128),
    dict(optim__clip=0.0),
    dict(optim__final_lr_ratio=1.0),
    dict(optim__schedule='wsd', optim__decay_steps=450),
  ):
    config_lib.check(changed(**overrides))


def test_unknown_keys_name_the_nearest():
  config = common.base_config()
  config.optim.learning_rate = 1.0
  config.optim.beta2 = 0.5
  with pytest.raises(UserError, match=r'^config\.optim\.beta2: no such key \(did you mean'):
    config_lib.check(config)


def test_missing_keys():
  config = common.base_config()
  del config.optim.lr
  with pytest.raises(UserError, match=r'^config\.optim\.lr is missing'):
    config_lib.check(config)


def test_a_stage_that_nothing_uses():
  config = common.base_config()
  config.w.cap = dict(fn='cap', limit=4.0)
  with pytest.raises(UserError, match=r"^config\.w\.cap is never used: add 'cap'"):
    config_lib.check(config)
  config.weighting = ('loss', 'cap')
  config_lib.check(config)


# Loading


def write(tmp_path, text):
  path = tmp_path / 'mine.py'
  path.write_text(text)
  return path


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = (', ', line 1: SyntaxError: '),
    ('import nosuchmodule\ndef get_config(arg=""): pass', ', line 1: ModuleNotFoundError: '),
    ('def get_config(arg=""):\n  return {}["a"]', ', line 2: KeyError: a'),
    ('def get_config(arg=""):\n  raise ValueError("a\\nb")', ', line 2: ValueError: a b'),
    ('def get_config(arg=""):\n  return 3', ': get_config() must return a ConfigDict, got int'),
    ('def config(): pass', ": AttributeError: module '_config_file' has no attribute"),
    ('def get_config(arg=""):\n  open("no/file")', ', line 2: FileNotFoundError: '),
  ],
)
def test_a_broken_config_file(tmp_path, text, message):
  path = write(tmp_path, text)
  with pytest.raises(UserError) as error:
    config_lib.load(str(path))
  assert str(error.value).startswith(f'{path}{message}')
  assert '\n' not in str(error.value)


def test_no_such_file():
  with pytest.raises(UserError, match=r'^--config=nowhere\.py: no such file'):
    config_lib.load('nowhere.py:quick')


def test_the_argument_reaches_the_file(tmp_path):
  path = write(
    tmp_path,
    'from configs import common\n'
    'def get_config(arg=""):\n'
    '  c = common.base_config(); c.data.name = arg; return c',
  )
  assert config_lib.load(f'{path}:a=b:c').data.name == 'a=b:c'


# JSON, diff, hash


def test_json_round_trip():
  config = common.base_config()
  config.weighting = ('loss', 'cap')
  config.w.cap = dict(fn='cap', limits=(1, 2.5), nested=dict(deep=('x',)))
  config.data.domains = ('b', 'a')
  back = config_lib.from_json(config_lib.to_json(config))
  assert back == config
  assert config_lib.flatten(back) == config_lib.flatten(config)
  assert {k: type(v) for k, v in config_lib.flatten(back).items()} == {
    k: type(v) for k, v in config_lib.flatten(config).items()
  }
  assert config_lib.to_json(back) == config_lib.to_json(config)


def test_store_and_read(tmp_path):
  config_lib.write(tmp_path / 'run', common.base_config())
  assert config_lib.read(tmp_path / 'run') == common.base_config()
  with pytest.raises(UserError, match='is not a run directory'):
    config_lib.read(tmp_path)
  (tmp_path / 'config.json').write_text('{"seed": ')
  with pytest.raises(UserError, match='is not valid JSON'):
    config_lib.read(tmp_path)


def test_diff():
  a, b = changed(), changed(optim__lr=1e-2, seed=3)
  b.w.cap = dict(fn='cap')
  assert config_lib.diff(a, b) == {
    'optim.lr': (3e-3, 1e-2),
    'seed': (0, 3),
    'w.cap.fn': (None, 'cap'),
  }
  assert config_lib.diff(a, a) == {}


@pytest.mark.parametrize(
  'harmless',
  [
    dict(log__every=3),
    dict(checkpoint__best='macro_bpb', checkpoint__keep_every=7),
    dict(mesh__data=8),
    dict(data__root='/x'),
  ],
)
def test_harmless_keys(tmp_path, harmless):
  config_lib.write(tmp_path, changed())
  config_lib.check_same_run(tmp_path, changed(**harmless))
  assert config_lib.config_hash(changed()) == config_lib.config_hash(changed(**harmless))


@pytest.mark.parametrize(
  'change',
  [dict(seed=1), dict(w__loss__temperature=1.0), dict(eval__max_blocks=1), dict(total_steps=600)],
)
def test_other_keys_make_another_run(change):
  assert config_lib.config_hash(changed()) != config_lib.config_hash(changed(**change))


def test_hash_does_not_depend_on_order_or_container():
  config = common.base_config()
  assert config_lib.config_hash(config) == config_lib.config_hash(config.to_dict())
  assert config_lib.config_hash(config) == config_lib.config_hash(
    config_lib.from_json(config_lib.to_json(config))
  )


def test_resume_with_another_config(tmp_path):
  config_lib.check_same_run(tmp_path, changed())  # nothing there yet
  config_lib.write(tmp_path, changed())
  config_lib.check_same_run(tmp_path, changed())
  with pytest.raises(UserError) as error:
    config_lib.check_same_run(tmp_path, changed(optim__lr=1e-3))
  assert str(error.value) == (
    f'{tmp_path} holds a run with another config: optim.lr is 0.003 there and 0.001 here; '
    'set it back to resume that run, or choose another --workdir'
  )
  with pytest.raises(UserError, match=r'\(and 1 more\)'):
    config_lib.check_same_run(
      tmp_path, changed(seed=1, optim__lr=1e-3, optim__b1=0.5, total_steps=600)
    )


# Printing


def test_printed_values_say_where_they_come_from():
  config = changed(optim__lr=1e-3, seed=7)
  lines = config_lib.format_config(config, {'seed': 7}, 'configs/lm.py:lr=1e-3').splitlines()
  by_key = {line.split()[0]: line for line in lines}
  assert set(by_key) == set(config_lib.flatten(config))
  assert by_key['seed'].split() == ['seed', '=', '7', '#', 'command', 'line']
  assert by_key['optim.lr'].endswith('# configs/lm.py:lr=1e-3')
  assert '#' not in by_key['optim.b1']


def test_an_override_equal_to_the_default_is_still_an_override():
  text = config_lib.format_config(changed(), {'seed': 0}, 'x.py')
  assert text.count('#') == 1


def test_a_run_older_than_a_key_has_its_default(tmp_path):
  config = common.base_config()
  config.optim.lr = 0.5
  config_lib.write(tmp_path, config)
  stored = json.loads((tmp_path / 'config.json').read_text())
  del stored['keep'], stored['model']['loss_chunk']
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  assert config_lib.flatten(config_lib.read(tmp_path)) == config_lib.flatten(config)
  config_lib.check_same_run(tmp_path, config)
