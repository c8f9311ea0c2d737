"""Schedules against their formulas, AdamW against a NumPy loop, the decay mask by name."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optim
from experiments.errors import UserError
from experiments.models import gpt2, lm


def config(**changes):
  defaults = dict(
    lr=0.5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, schedule='cosine',
    warmup_steps=10, final_lr_ratio=0.1, decay_steps=0,
  )  # fmt: skip
  return SimpleNamespace(**{**defaults, **changes})


# Schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['cosine', 'wsd', 'constant'])
def test_warm_up_rises_linearly_and_never_stands_still(name):
  schedule = optim.make_schedule(config(schedule=name), 100)
  rates = [float(schedule(step)) for step in range(10)]
  np.testing.assert_allclose(rates, 0.05 * np.arange(1, 11), rtol=1e-6)


@pytest.mark.parametrize('name', ['cosine', 'wsd', 'constant'])
def test_no_warm_up_starts_at_the_top(name):
  assert float(optim.make_schedule(config(schedule=name, warmup_steps=0), 100)(0)) == 0.5


def test_cosine_at_chosen_steps():
  schedule = optim.make_schedule(config(), 110)  # 100 steps after the warm-up
  assert float(schedule(10)) == pytest.approx(0.5)
  assert float(schedule(60)) == pytest.approx(0.5 * 0.55)
  quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
  assert float(schedule(35)) == pytest.approx(0.5 * quarter)
  assert float(schedule(110)) == pytest.approx(0.05)
  assert float(schedule(500)) == pytest.approx(0.05)


@pytest.mark.parametrize(('decay_steps', 'start'), [(0, 80), (40, 60)])
def test_wsd_at_chosen_steps(decay_steps, start):
  schedule = optim.make_schedule(config(schedule='wsd', decay_steps=decay_steps), 100)
  assert [float(schedule(step)) for step in (10, 30, start)] == [0.5, 0.5, 0.5]
  assert float(schedule((start + 100) // 2)) == pytest.approx(0.5 * 0.55)
  assert float(schedule(start + 1)) == pytest.approx(0.5 * (1 - 0.9 / (100 - start)))
  assert float(schedule(100)) == pytest.approx(0.05)


def test_constant_stays():
  schedule = optim.make_schedule(config(schedule='constant'), 100)
  assert {float(schedule(step)) for step in range(10, 100)} == {0.5}


def test_schedules_take_traced_steps():
  schedule = optim.make_schedule(config(), 100)
  steps = jnp.arange(100)
  np.testing.assert_allclose(
    jax.vmap(schedule)(steps), [schedule(s) for s in range(100)], rtol=1e-6
  )


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'schedule': 'linear'}, ("optim.schedule='linear'", 'constant, cosine, wsd')),
    ({'warmup_steps': 101}, ('optim.warmup_steps=101', 'total_steps=100')),
    ({'schedule': 'wsd', 'warmup_steps': 90}, ('decay_steps=20', 'total_steps=100')),
  ],
)
def test_bad_schedules_are_explained(changes, words):
  with pytest.raises(UserError) as error:
    optim.make_schedule(config(**changes), 100)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


# Updates ----------------------------------------------------------------------------------------


def test_updates_equal_a_numpy_adamw():
  settings = config(lr=0.01, clip=1.5, warmup_steps=2)
  tx, schedule = optim.make_optimizer(settings, 6)
  rng = np.random.default_rng(0)
  params = {'a': {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}}
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  expected = jax.tree.map(np.float64, params)
  moments = jax.tree.map(lambda x: [np.zeros(x.shape), np.zeros(x.shape)], params)
  state = tx.init(params)
  for step in range(6):
    # Every second gradient is larger than the clip.
    scale = 3.0 if step % 2 else 0.1
    grads = jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), params)  # noqa: B023
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in grads['a'].values()))
    for name, decay in (('kernel', 0.1), ('bias', 0.0)):
      g = grads['a'][name].astype(float) * min(1.0, 1.5 / norm)
      m, v = moments['a'][name]
      m[:] = 0.9 * m + 0.1 * g
      v[:] = 0.95 * v + 0.05 * g**2
      m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
      p = expected['a'][name]
      p -= float(schedule(step)) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * p)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, expected
    )


def test_clip_zero_leaves_the_gradient_alone():
  params = {'kernel': jnp.zeros((2, 2))}
  grads = {'kernel': jnp.full((2, 2), 100.0)}
  states = []
  for clip in (0.0, 1e9):
    tx, _ = optim.make_optimizer(config(clip=clip), 100)
    states.append(optax.tree.get(tx.update(grads, tx.init(params), params)[1], 'mu'))
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_decay_touches_matrices_and_tables_only():
  cfg = gpt2.PRESETS['tiny']
  shapes = jax.eval_shape(lambda key: lm.init(key, cfg), jax.random.key(0))
  mask = optim.decay_mask(shapes)
  assert jax.tree.structure(mask) == jax.tree.structure(shapes)
  for path, decayed in jax.tree_util.tree_leaves_with_path(mask):
    name = jax.tree_util.keystr(path)
    assert decayed == (not any(word in name for word in ('bias', 'scale'))), name
  assert mask['wte']['embedding']
  assert mask['blocks']['mlp']['up'] == {'kernel': True, 'bias': False}
  assert mask['blocks']['ln_1'] == {'scale': False, 'bias': False}


def test_skip_ignores_gradients_that_are_not_finite():
  tx, _ = optim.make_optimizer(config(), 100, nonfinite='skip')
  params = {'kernel': jnp.ones((2, 2))}
  state = tx.init(params)
  good = {'kernel': jnp.full((2, 2), 0.1)}
  for bad_value in (jnp.nan, jnp.inf):
    bad = {'kernel': good['kernel'].at[0, 0].set(bad_value)}
    updates, after = tx.update(bad, state, params)
    assert not np.any(updates['kernel'])
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert after.total_notfinite == state.total_notfinite + 1
    state = after
  updates, _ = tx.update(good, state, params)
  assert np.all(np.isfinite(updates['kernel']))
  assert np.all(updates['kernel'] != 0)


def test_skip_never_gives_up():
  tx, _ = optim.make_optimizer(config(), 1000, nonfinite='skip')
  params = {'kernel': jnp.ones(2)}
  bad = {'kernel': jnp.full(2, jnp.nan)}

  def body(state, _):
    updates, state = tx.update(bad, state, params)
    return state, updates['kernel']

  _, updates = jax.lax.scan(body, tx.init(params), length=300)
  assert not np.any(updates)


def test_abort_lets_a_bad_gradient_show():
  tx, _ = optim.make_optimizer(config(), 100)
  params = {'kernel': jnp.ones(2)}
  updates, _ = tx.update({'kernel': jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
  assert np.any(np.isnan(updates['kernel']))
