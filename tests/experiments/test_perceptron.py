"""Hard or easy examples: the student, its error, and the crossover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import plots
from experiments.prune import perceptron, teacher


def test_the_student_is_logistic_regression():
  from sklearn.linear_model import LogisticRegression

  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5))
  y = np.sign(x @ rng.normal(size=5) + 0.5 * rng.normal(size=60))
  found = teacher._fitted(jnp.asarray(x), jnp.asarray(y))
  peer = LogisticRegression(
    C=1 / (60 * teacher._PENALTY), fit_intercept=False, tol=1e-8, max_iter=5000
  )
  np.testing.assert_allclose(found, peer.fit(x, y).coef_[0], rtol=2e-3, atol=2e-3)


def test_the_error_is_the_share_of_disagreements():
  rng = np.random.default_rng(1)
  x, truth = rng.normal(size=(40, 5)), rng.normal(size=5)
  truth /= np.linalg.norm(truth)
  y = np.sign(x @ truth)
  error = float(teacher._error(jnp.asarray(x), jnp.asarray(y), jnp.asarray(truth)))
  student = np.asarray(teacher._fitted(jnp.asarray(x), jnp.asarray(y)))
  fresh = rng.normal(size=(200_000, 5))
  measured = np.mean(np.sign(fresh @ student) != np.sign(fresh @ truth))
  assert error == pytest.approx(measured, abs=0.003)


def test_easy_wins_where_data_are_scarce_and_hard_where_they_abound():
  run = lambda alpha, angle=0.0: {
    side: v.mean()
    for side, v in teacher.errors(
      jax.random.key(0), alpha, dims=40, keep=0.3, angle=angle, seeds=4
    ).items()
  }
  scarce, plenty = run(1.0), run(20.0)
  assert scarce['all'] < scarce['easy'] + 0.05 < scarce['random'] < scarce['hard']
  assert plenty['hard'] < plenty['easy'] < plenty['random']
  assert plenty['hard'] < 1.3 * plenty['all']
  blind = run(20.0, angle=90.0)  # a probe that knows nothing
  assert blind['hard'] == pytest.approx(blind['random'], rel=0.5)


def test_table_and_picture():
  sides = {side: [0.1, 0.2] for side in teacher.SIDES} | {'hard': [0.3, 0.5]}
  found = {'errors': {'1': sides, '2': sides}}
  table = perceptron.describe(found)
  assert '15.00 ±63.53' in table
  assert '25.00 ±63.53' in table  # hard - easy: 20 and 30
  assert plots.draw_png(lambda: perceptron.draw(found, plots.LIGHT), plots.LIGHT)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--workdir is missing'),
    (['--workdir=x', '--keep=1'], '--keep=1'),
    (['--workdir=x', '--alphas=1,-2'], "'-2' must be a number above 0"),
    (['--workdir=x', '--angle=91'], '--angle=91'),
  ],
)
def test_bad_flags(tmp_path, flags, message):
  from tests.experiments.forked import run

  done = run('experiments.prune.perceptron', *flags, folder=tmp_path)
  assert done.status == 2
  assert message in done.stderr
