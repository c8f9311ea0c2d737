"""Self-paced weights against the minimum they stand for, by a grid over v."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw import weights

LOSSES = np.array([0.0, 0.05, 0.3, 0.45, 0.62, 0.79, 0.81, 3.0])
C, EASY = 0.8, 0.4


def _regularizer(kind, v):
  z, k = 1 - C, C * EASY * C / (C - EASY * C)
  return {
    'hard': lambda: -C * v,
    'linear': lambda: C * (v**2 / 2 - v),
    'log': lambda: z * v - z**v / np.log(z),
    'mixture': lambda: -k * np.log(v + k / C),
  }[kind]()


@pytest.mark.parametrize('kind', ['hard', 'linear', 'log', 'mixture'])
def test_minimizes_the_weighted_loss_plus_the_regularizer(kind):
  grid = np.linspace(0, 1, 100_001)
  expected = [grid[np.argmin(grid * loss + _regularizer(kind, grid))] for loss in LOSSES]
  v = weights.self_paced_weights(jnp.asarray(LOSSES), C, kind, easy=EASY)
  np.testing.assert_allclose(v, expected, atol=2e-5)
  assert v[0] == 1
  assert v[-1] == 0


def test_the_threshold_grows():
  threshold = weights.growing_threshold(0.5, 1.3, every=10, limit=2.0)
  expected = [min(0.5 * 1.3 ** (step // 10), 2.0) for step in (0, 9, 10, 35, 60, 999)]
  found = [threshold(jnp.int32(step)) for step in (0, 9, 10, 35, 60, 10**6)]  # no overflow
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  rw = weights.self_paced(threshold, 'hard')
  counts = [
    int(rw.update(jnp.ones(8), (), losses=jnp.asarray(LOSSES), step=step)[0].sum())
    for step in (0, 10, 20, 60)
  ]
  assert counts == [4, 5, 7, 7]


def test_a_share_instead_of_a_threshold_is_trimming():
  v = weights.self_paced_weights(jnp.asarray(LOSSES), float(np.quantile(LOSSES, 0.5)), 'hard')
  np.testing.assert_allclose(
    jaxrw.unit_mean_weights(v), jaxrw.trimmed_weights(jnp.asarray(LOSSES), 0.5, 'low')
  )


def test_nothing_may_be_left():
  rw = jaxrw.chain(pace=weights.self_paced(0.1, 'hard'), mean=jaxrw.unit_mean())
  w, _ = rw.update(jnp.ones(2), rw.init(), losses=jnp.array([1.0, 2.0]))
  np.testing.assert_array_equal(w, [0, 0])


def test_errors():
  for arguments, message in (
    ((-1.0,), 'threshold=-1.0 must be greater than 0'),
    ((2.0, 'cubic'), "kind='cubic' must be one of 'hard', 'linear', 'log', 'mixture'"),
    ((1.0, 'log'), "threshold=1.0 must be below 1 for kind='log'"),
    ((1.0, 'mixture', 1.0), r'easy=1.0 must be in \(0, 1\)'),
  ):
    with pytest.raises(ValueError, match=message):
      weights.self_paced(*arguments)
  with pytest.raises(ValueError, match=r'growth=0\.9 must be at least 1'):
    weights.growing_threshold(1.0, 0.9)
