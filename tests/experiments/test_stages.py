"""Staged training: what is probed, what the scorer learns, what is picked, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import plots
from experiments.errors import UserError
from experiments.stages import __main__ as program
from experiments.stages import study

pytest.importorskip('sklearn')

SMALL = study.Settings(
  pool=150, reference=40, held=40, stages=2, steps=12, batch=16, probes=60, hidden=8, rates=(1e-2,)
)


@pytest.fixture(scope='module')
def problems():
  from experiments.classify import sources

  return [study.problem(sources.digits(), SMALL, seed) for seed in range(3)]


@pytest.fixture(scope='module')
def runs(problems):
  return study.started(problems, [(i, 1e-2) for i in range(3)], SMALL, 10)


def test_labels_are_wrong_where_it_says(problems):
  for p in problems:
    assert p.clean.sum() == 90
    assert len(p.reference.y) == 40
  from experiments.classify import sources

  source = sources.digits()
  order = np.random.default_rng([0, 51]).permutation(len(source.pool.y))[:150]
  np.testing.assert_array_equal(problems[0].pool.y == source.pool.y[order], problems[0].clean)


def test_gains_are_steps_of_the_optimizer_tried_out(runs):
  """Two candidates by hand: the first step of Adam, decayed weights included."""
  candidates = jnp.array([[3, 70]] * 3)
  found = np.asarray(study.gains(runs, candidates, jnp.float32(0.5)))
  for r in (0, 2):
    own = jax.tree.map(lambda leaf, r=r: leaf[r], runs)
    loss = lambda p, own=own: study._mean_loss(p, own.reference_x, own.reference_y)
    for c, i in enumerate((3, 70)):
      slope = jax.grad(study._mean_loss)(own.params, own.x[i][None], own.y[i][None])
      step = lambda p, g: p - 0.005 * (g / (jnp.abs(g) + 1e-8) + 1e-4 * p)
      expected = float(loss(own.params) - loss(jax.tree.map(step, own.params, slope)))
      assert found[r, c] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_first_order_and_small_loss(runs):
  own = jax.tree.map(lambda leaf: leaf[1], runs)
  reference = jax.grad(study._mean_loss)(own.params, own.reference_x, own.reference_y)
  first, small = np.asarray(study.first_order(runs)), np.asarray(study.small_loss(runs))
  for i in (0, 33):
    value, slope = jax.value_and_grad(study._mean_loss)(own.params, own.x[i][None], own.y[i][None])
    product = sum(
      float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(reference))
    )
    assert first[1, i] == pytest.approx(product, rel=1e-3, abs=1e-5)
    assert small[1, i] == pytest.approx(-float(value), rel=1e-5)


def test_features_are_pixels_under_the_label():
  x, y = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0])
  np.testing.assert_array_equal(study.features(x, y, 2), [[0, 0, 0, 1, 2, 1], [3, 4, 1, 0, 0, 0]])


def test_the_scorer_is_ridge_regression():
  from sklearn.linear_model import Ridge

  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(100, 7))
  targets = inputs @ rng.normal(size=7) + 0.1 * rng.normal(size=100)
  found, correlation = study.fitted(inputs, targets)
  assert correlation > 0.9
  scaled = (targets - targets[:90].mean()) / targets[:90].std()
  peers = [
    Ridge(alpha=penalty * 90, fit_intercept=False).fit(inputs[:90], scaled[:90]).coef_
    for penalty in study._PENALTIES
  ]
  assert min(np.abs(found - w).max() for w in peers) < 1e-8


def test_constant_gains_do_not_break_the_scorer():
  found, correlation = study.fitted(np.ones((20, 3)), np.full(20, 0.3))
  assert np.isfinite(found).all()
  assert correlation == 0


@pytest.mark.parametrize('temperature', [True, False])
def test_the_best_are_picked(temperature):
  values = np.random.default_rng(0).normal(size=(2, 100))
  arm = study.Arm('scorer', temperature=temperature)
  rows = study.picked(values, 20, arm, SMALL, 1)
  assert rows.shape == (2, 20)
  best = np.argsort(-values, axis=1)[:, :20]
  for mine, top in zip(rows, best):
    if temperature:
      assert len(set(mine) & set(top)) > 10  # nearer to the top than chance, and not the top
      assert set(mine) != set(top)
    else:
      assert set(mine) == set(top)


def test_every_row_is_seen_before_any_again():
  rows = study._dealt(np.random.default_rng(0), np.arange(50, 62), SMALL).reshape(-1)
  assert len(rows) == 12 * 16
  np.testing.assert_array_equal(np.sort(rows[:12]), np.arange(50, 62))


@pytest.mark.parametrize('name', ['scorer', 'frozen scorer', 'random', 'reference only', 'oracle'])
def test_arms(problems, name):
  found = study.measure(study.ARMS[name], problems, SMALL, 10)
  assert len(found.accuracy) == len(found.clean) == 1
  assert 0.1 <= found.accuracy[0] <= 1
  assert bool(found.correlation) == ('scorer' in name)
  if name == 'oracle':
    assert found.clean[0] > 0.65  # of 0.6 by chance


def test_too_little_data():
  from experiments.classify import sources

  with pytest.raises(UserError, match='this study needs over'):
    study.problem(sources.digits(), SMALL._replace(pool=5000), 0)


def test_table_and_picture():
  result = study.Result(1e-3, [0.8, 0.9], [0.7, 0.8], [0.5, 0.6], [0.9, 0.9])
  found = {
    'settings': {'rates': [1e-3, 1e-2]},
    'arms': {'random': result._asdict(), 'scorer': result._asdict()},
  }
  table = program.describe(found)
  assert '0.001!' in table
  assert '85.0 ±63.5' in table
  assert plots.draw_png(lambda: program.draw(found, plots.LIGHT), plots.LIGHT)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--workdir is missing'),
    (['--workdir=x', '--seeds=1'], '--seeds=1'),
    (['--workdir=x', '--noise=1'], '--noise=1'),
    (['--workdir=x', '--data=/nowhere'], 'is not a folder'),
  ],
)
def test_bad_flags(tmp_path, flags, message):
  from tests.experiments.forked import run

  done = run('experiments.stages', *flags, folder=tmp_path)
  assert done.status == 2
  assert message in done.stderr
