"""Temperature schedules: even steps in 1 / r."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

INF = float('inf')


def _values(schedule, steps):
  return np.asarray([schedule(step) for step in steps])


@pytest.mark.parametrize(('init', 'end'), [(INF, 0.4), (100.0, 0.4), (0.4, INF), (2.0, 1.0)])
def test_linear_in_the_inverse(init, end):
  r = jaxrw.temperature_schedule(init, end, begin=10, steps=20)
  steps = np.arange(0, 41, 5)
  done = np.clip((steps - 10) / 20, 0, 1)
  expected = (1 - done) / init + done / end
  np.testing.assert_allclose(1 / _values(r, steps), expected, rtol=1e-6)


def test_cosine_starts_and_ends_flat_and_is_half_way_in_the_middle():
  r = jaxrw.temperature_schedule(2.0, 0.5, begin=100, steps=200, shape='cosine')
  inverse = 1 / _values(r, [0, 100, 110, 200, 290, 300, 999])
  small = (2 - 0.5) * (1 - np.cos(np.pi / 20)) / 2
  expected = [0.5, 0.5, 0.5 + small, 1.25, 2 - small, 2, 2]
  np.testing.assert_allclose(inverse, expected, rtol=1e-6)


@pytest.mark.parametrize('shape', ['linear', 'cosine'])
def test_ends_are_exact_and_a_jump_has_no_ramp(shape):
  jump = jaxrw.temperature_schedule(INF, 0.4, begin=3, shape=shape)
  np.testing.assert_array_equal(_values(jump, [0, 2, 3, 10**6]), np.float32([INF, INF, 0.4, 0.4]))
  ramp = jaxrw.temperature_schedule(INF, 0.4, begin=3, steps=4, shape=shape)
  np.testing.assert_array_equal(_values(ramp, [0, 3, 7, 10**6]), np.float32([INF, INF, 0.4, 0.4]))


def test_under_jit_the_step_is_an_array_and_the_result_float32():
  r = jaxrw.temperature_schedule(INF, 0.5, begin=10, steps=10)
  out = jax.jit(jax.vmap(r))(jnp.array([0, 10, 15, 20]))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, [INF, INF, 1.0, 0.5])


def test_the_ramp_begins_at_uniform_weights_and_moves_evenly():
  """In 1 / r the log-ratio of the weights grows linearly; it is what the ramp is for."""
  stage = jaxrw.linupper(jaxrw.temperature_schedule(INF, 0.5, begin=0, steps=4))
  losses = jnp.arange(6.0)
  update = jax.jit(lambda step: stage.update(jnp.ones(6), (), losses=losses, step=step)[0])
  ratios = [float(jnp.log(jnp.max(w) / jnp.min(w))) for w in map(update, range(6))]
  np.testing.assert_allclose(ratios, [0, 0.5, 1.0, 1.5, 2.0, 2.0], atol=1e-6)
  np.testing.assert_array_equal(update(0), np.ones(6))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'init': 0.0, 'end': 1.0}, r'init=0\.0'),
    ({'init': 1.0, 'end': -0.4}, r'end=-0\.4'),
    ({'init': 1.0, 'end': 0.4, 'begin': -1}, 'begin=-1'),
    ({'init': 1.0, 'end': 0.4, 'steps': -5}, 'steps=-5'),
    ({'init': 1.0, 'end': 0.4, 'shape': 'stairs'}, "shape='stairs'"),
  ],
)
def test_bad_arguments_name_the_field(arguments, message):
  with pytest.raises(ValueError, match=message):
    jaxrw.temperature_schedule(**arguments)
