"""The README is a promise: its code runs, its commands parse, its files exist. So is the page on
mixtures."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments import compare
from experiments import config as config_lib

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
MIXTURES = (ROOT / 'docs/mixtures.md').read_text()


def blocks(language: str, text: str = README) -> list[str]:
  return re.findall(rf'```{language}\n(.*?)```', text, re.S)


def commands() -> list[list[str]]:
  """The `python -m experiments.X` commands of both, without comments."""
  text = '\n'.join(blocks('bash') + blocks('bash', MIXTURES)).replace('\\\n', ' ')
  lines = [shlex.split(line, comments=True) for line in text.splitlines()]
  return [line for line in lines if line[:2] == ['python', '-m']]


def test_the_three_lines():
  losses = jnp.array([0.5, 2.0, 3.0])
  scope = {'losses': losses, 'jnp': jnp}
  exec(blocks('python')[0], scope)
  assert scope['loss'] > jnp.mean(losses)  # the low loss counts less
  np.testing.assert_allclose(jnp.mean(scope['w']), 1, rtol=1e-6)


def test_the_longer_block():
  import jaxrw

  x, y = jnp.eye(8, 3), jnp.arange(8.0)
  scope = {
    **{'jax': jax, 'jnp': jnp, 'jaxrw': jaxrw, 'tx': optax.sgd(0.1), 'params': jnp.zeros(3)},
    'loss': lambda w, example: (example['x'] @ w - example['y']) ** 2,
    'batch': {'x': x, 'y': y},
  }
  exec(blocks('python')[1], scope)
  assert int(scope['state'].step) == 1


def test_the_block_on_mixtures():
  scope = {'jaxrw': __import__('jaxrw'), 'num_domains': 3}
  exec(blocks('python', MIXTURES)[0], scope)
  w, _ = scope['rw'].update(
    jnp.ones(3),
    scope['rw'].init(),
    losses=jnp.array([1.0, 2.0, 3.0]),
    group_ids=jnp.arange(3),
    sampling_prob=jnp.full(3, 1 / 3),
    step=0,
  )
  assert w[0] < w[1] < w[2]


@pytest.mark.parametrize('program', sorted({command[2] for command in commands()}))
def test_programs_teach(program):
  done = subprocess.run(
    [sys.executable, '-m', program, '--help'], capture_output=True, text=True, cwd=ROOT, timeout=120
  )
  assert done.returncode == 0
  assert f'python -m {program}' in done.stdout


@pytest.mark.parametrize('command', commands(), ids=' '.join)
def test_commands_use_flags_and_configs_that_exist(command):
  shown = subprocess.run(
    [sys.executable, '-m', command[2], '--help'], capture_output=True, text=True, cwd=ROOT
  ).stdout
  for argument in command[3:]:
    if not argument.startswith('--'):
      continue  # what a program works on
    name, _, value = argument.removeprefix('--').partition('=')
    assert f'--{name}' in shown
    if name == 'config':
      config_lib.load(str(ROOT / value))
    if name == 'weightings':
      for arm in value.split(','):
        common.set_arm(common.base_config(), compare.arm_spec(arm))


def test_links_and_make_targets_exist():
  for target in re.findall(r'\]\(([^)#]+)\)', README):
    if not target.startswith('http'):
      assert (ROOT / target).exists(), target
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(r'^make (\w+)', '\n'.join(blocks('bash')), re.M):
    assert re.search(rf'^{target}:', makefile, re.M), target
