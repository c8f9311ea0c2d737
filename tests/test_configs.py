"""Every config: loads without heavy imports, is valid, shrinks, and says what it costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from experiments import config as config_lib
from experiments.errors import UserError

ROOT = Path(__file__).parents[1]
FILES = sorted(p.name for p in (ROOT / 'configs').glob('[!_]*.py') if p.name != 'common.py')
SPECS = [
  'quickstart.py',
  'lm.py',
  'lm.py:layers=4,width=128,steps=300,weighting=row_shuffled:linupper:1.0',
  'gpt2.py',
  'gpt2.py:size=209m',
  'gpt2.py:size=294m,weighting=uniform',
  'gpt2.py:evidence',
  'llama.py',
  'llama.py:size=1b,tensor=4,weighting=uniform',
  'llama.py:size=7b,fsdp=16',
  'mixtures.py',
  'mixtures.py:steps=1465,temperature=0.4',
  'languages.py',
  'languages.py:tau=3,epochs=4,steps=300',
  'specialise.py:target=qa',
  'specialise.py:target=qa,small=8,large=64',
]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def load(spec):
  config = config_lib.load(f'configs/{spec}')
  config_lib.check(config)
  return config


def test_every_config_file_is_in_the_table():
  assert set(FILES) == {spec.partition(':')[0] for spec in SPECS}


def test_loading_all_of_them_imports_nothing_heavy():
  script = (
    'import sys, json; from experiments import config\n'
    f'for spec in {SPECS!r}: config.check(config.load("configs/" + spec))\n'
    'print(json.dumps(sorted({m.partition(".")[0] for m in sys.modules})))'
  )
  out = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True, cwd=ROOT
  )
  heavy = {'jax', 'jaxlib', 'flax', 'optax', 'chex', 'tensorflow_datasets', 'tensorflow', 'grain'}
  heavy |= {'orbax', 'numpy', 'matplotlib', 'jaxrw'}
  assert not heavy & set(json.loads(out.stdout))


@pytest.mark.parametrize('spec', SPECS)
def test_full_size_is_valid(spec):
  load(spec)


@pytest.mark.parametrize('spec', SPECS)
def test_quick_is_valid_and_tiny(spec):
  config = load(spec + (',quick' if ':' in spec else ':quick'))
  assert config.total_steps <= 4
  assert config.batch_size * config.data.seq_len * config.total_steps <= 2_000
  assert config.model.n_layer * config.model.n_embd**2 <= 5_000
  assert config.checkpoint.every < config.total_steps  # so that a smoke run also saves
  assert config.w.loss.get('start', 0) < config.total_steps  # ... and passes the burn-in


@pytest.mark.parametrize('file', FILES)
def test_docstring_says_command_cost_and_expectation(file):
  doc = config_lib.describe(f'configs/{file}')
  for word in ('Command:', 'Cost:', 'Expected:', f'configs/{file}'):
    assert word in doc


@pytest.mark.parametrize('file', FILES)
def test_every_switch_is_documented(file):
  source = Path('configs', file).read_text()
  call = source[source.index('_SWITCHES = dict(' if '_SWITCHES' in source else 'parse_arg(') :]
  switches = re.findall(r'\b(\w+)=', call[: call.index(')\n')])
  assert 'quick' in switches
  doc = config_lib.describe(f'configs/{file}')
  assert [s for s in switches if not re.search(rf'\b{s}\b', doc)] == []


def test_quickstart_is_about_a_million_tokens():
  c = load('quickstart.py')
  assert 0.9e6 < c.total_steps * c.batch_size * c.data.seq_len < 1.1e6


def test_evidence_reaches_the_evidence_tier():
  """15M parameters and 100M tokens; 12 d^2 per layer leaves out embeddings, biases and norms."""
  c = load('gpt2.py:evidence')
  assert c.model.n_layer * 12 * c.model.n_embd**2 >= 15e6
  assert c.total_steps * c.batch_size * c.data.seq_len >= 100e6


def test_gpt2_follows_the_paper():
  c = load('gpt2.py')
  assert (c.total_steps, c.batch_size, c.data.seq_len) == (20_000, 48, 512)
  assert (c.optim.b1, c.optim.b2, c.optim.weight_decay, c.optim.clip) == (0.9, 0.999, 0.01, 1.0)
  assert c.optim.lr == 5e-4
  assert c.optim.lr * c.optim.final_lr_ratio == pytest.approx(1e-4)
  assert c.optim.warmup_steps == 500
  assert c.w.loss.to_dict() == {'fn': 'linupper', 'temperature': 0.4, 'start': 1_000}
  assert c.model.dtype == 'bfloat16'


def test_switches_imply_the_source(tmp_path):
  assert load(f'lm.py:path={tmp_path}').data.source == 'folder'
  assert load('lm.py:name=my_ds/config:1.0.0').data.source == 'tfds'
  assert load('lm.py').data.source == 'embedded'


@pytest.mark.parametrize('spec', SPECS)
def test_arms_of_a_config_are_arms_of_its_comparison(spec):
  """Each parses and is another run than the others; the first is the baseline."""
  from experiments import compare

  arms = compare.default_arms({}, f'configs/{spec}')
  plan = compare.make_plan(load(spec), arms, None, 1, 'macro_bpb', 'runs/x')
  assert compare.arm_spec(plan.weightings[0]) == 'uniform'


def test_arms_with_schedules_refuse_other_steps(tmp_path):
  from experiments import compare

  with pytest.raises(
    UserError, match=r'--config\.total_steps=9: the arms of configs/languages\.py'
  ):
    compare.default_arms({'total_steps': 9}, 'configs/languages.py')
  assert compare.default_arms({'total_steps': 9}, 'configs/lm.py') == 'uniform,linupper:0.4'
  (tmp_path / 'mine.py').write_text("def get_arms(arg=''):\n  return ['uniform']\n")
  with pytest.raises(UserError, match=r'mine\.py: get_arms\(\) must return a dict'):
    compare.default_arms({}, str(tmp_path / 'mine.py'))


def test_arms_of_languages():
  """Cooldown changes at half of the run, also of a quick one."""
  arms = config_lib.arms('configs/languages.py:steps=300,tau=3')
  assert next(iter(arms)) == 'stratified'
  assert arms['cooldown'].endswith('cooldown:switch_step=150:tau_high=3')
  assert config_lib.arms('configs/languages.py:quick')['cooldown'].split(':')[1] == 'switch_step=2'
  assert config_lib.arms('configs/lm.py') == {}


def test_a_specialist_needs_a_target():
  for read in (config_lib.load, config_lib.arms):
    with pytest.raises(UserError, match=r'specialise\.py: target is missing: name a domain'):
      read('configs/specialise.py')


# parse_arg


def test_parse_arg_types():
  got = common.parse_arg(
    'n=3,lr=1e-2,name=x:y=z,on,off=false', n=1, lr=0.1, name='', on=False, off=True, kept=5
  )
  assert got.to_dict() == dict(n=3, lr=0.01, name='x:y=z', on=True, off=False, kept=5)


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('stepz=3', "unknown argument 'stepz' (did you mean 'steps'?); this config has steps, quick"),
    ('steps', "argument 'steps' needs a value: steps=1"),
    ('steps=many', 'argument steps=many is not a valid int'),
    ('quick=perhaps', 'argument quick=perhaps is not a valid bool'),
  ],
)
def test_parse_arg_errors(arg, message):
  with pytest.raises(common.ConfigError) as error:
    common.parse_arg(arg, steps=1, quick=False)
  assert str(error.value) == message


# set_weighting


@pytest.mark.parametrize(
  ('spec', 'expected'),
  [
    ('uniform', dict(fn='uniform')),
    ('linupper:0.4', dict(fn='linupper', temperature=0.4, start=50)),
    ('kl_dro:2', dict(fn='kl_dro', temperature=2.0, start=50)),
    ('quadratic', dict(fn='quadratic', temperature=0.4, start=50)),
    ('trimmed:share=0.5:side=low', dict(fn='trimmed', share=0.5, side='low', start=50)),
    ('trimmed:share=0.5:start=0', dict(fn='trimmed', share=0.5, start=0)),
    ('group_dro', dict(fn='group_dro', start=50)),
    (
      'row_shuffled:linupper:1.0',
      dict(fn='row_shuffled', stage=dict(fn='linupper', temperature=1.0), start=50),
    ),
  ],
)
def test_set_weighting(spec, expected):
  config = common.base_config()
  config.lock()
  common.set_weighting(config, spec)
  assert config.weighting == ('loss',)
  assert config.w.to_dict() == {'loss': expected}
  assert config.is_locked
  config_lib.check(config)


def test_set_weighting_replaces_the_other_stages():
  config = common.base_config()
  config.w.cap = dict(fn='cap', limit=4.0)
  config.weighting = ('loss', 'cap')
  common.set_weighting(config, 'upper:1.0')
  assert list(config.w) == ['loss']


@pytest.mark.parametrize(
  'spec',
  [
    '',
    ':1',
    'linupper:hot',
    'linupper:-1',
    'linupper:0',
    'linupper:nan',
    'uniform:1',
    'trimmed:share=',
    'row_shuffled',
  ],
)
def test_set_weighting_rejects(spec):
  with pytest.raises(common.ConfigError, match='weighting'):
    common.set_weighting(common.base_config(), spec)


def test_set_arm_changes_the_weighting_and_any_key():
  config = common.base_config()
  config.lock()
  common.set_arm(config, 'upper:1.0@keep.rows=8@keep.sampled=true@batch_size=24@optim.clip=0')
  assert config.w.loss.fn == 'upper'
  assert config.keep.to_dict() == {'rows': 8, 'groups': 1, 'sampled': True, 'reuse': False}
  assert (config.batch_size, config.optim.clip) == (24, 0.0)
  assert isinstance(config.optim.clip, float)
  config_lib.check(config)


@pytest.mark.parametrize(
  'arm',
  [
    'uniform@',
    'uniform@batch_size',
    'uniform@batchsize=8',
    'uniform@keep=8',
    'uniform@keep.row=8',
    'uniform@model.n_layer.x=8',
    'uniform@batch_size=many',
    'uniform@data.domains=web',
    'linupper:-1@batch_size=8',
  ],
)
def test_set_arm_rejects(arm):
  with pytest.raises(common.ConfigError, match=r'arm|weighting|batch_size'):
    common.set_arm(common.base_config(), arm)


def test_base_config_is_fresh_every_time():
  common.base_config().optim.lr = 1.0
  assert common.base_config().optim.lr == 3e-3
