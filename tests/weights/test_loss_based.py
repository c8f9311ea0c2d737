"""The loss-based family against the method's printed numbers, NumPy loops and its theory."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from jaxrw import weights
from tests import oracles

INF = float('inf')
NAMES = ('linupper', 'quadratic', 'extremes', 'upper', 'kl_dro')
RANGED = NAMES[:4]  # those that see the losses through their range only


@functools.cache
def _function(name):
  """The plain function, jitted, with a NumPy result; the temperature is traced."""
  function = jax.jit(getattr(weights, f'{name}_weights'), static_argnames='nonfinite')
  return lambda losses, r=1.0, **kwargs: np.asarray(function(jnp.asarray(losses), r, **kwargs))


def _gamma(size=16, seed=0):
  return np.random.default_rng(seed).gamma(4.0, 0.7, size)


# Weights of the losses 1, 2, 3, 4, 5 that sum to 1, from the method card (computed in float64).
FIVE_POINTS = [
  ('linupper', 1.0, [0.09256, 0.15261, 0.25161, 0.25161, 0.25161]),
  ('linupper', 0.4, [0.02437, 0.08505, 0.29686, 0.29686, 0.29686]),
  ('quadratic', 1.0, [0.11170, 0.23648, 0.30364, 0.23648, 0.11170]),
  ('quadratic', 0.4, [0.03673, 0.23952, 0.44749, 0.23952, 0.03673]),
  ('extremes', 1.0, [0.27926, 0.16938, 0.10273, 0.16938, 0.27926]),
  ('extremes', 0.4, [0.37663, 0.10791, 0.03092, 0.10791, 0.37663]),
  ('upper', 1.0, [0.11405, 0.14644, 0.18804, 0.24145, 0.31002]),
]


@pytest.mark.parametrize(('name', 'r', 'expected'), FIVE_POINTS)
@pytest.mark.parametrize('x64', [False, True])
def test_five_point_table(name, r, expected, x64):
  with jax.enable_x64(x64):
    dtype = np.float64 if x64 else np.float32
    w = _function(name)(np.arange(1, 6, dtype=dtype), r)
    assert w.dtype == dtype
    np.testing.assert_allclose(w / 5, expected, rtol=0, atol=0.5e-5 + 1e-7)


@pytest.mark.parametrize('r', [0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize('name', NAMES)
def test_equals_the_official_formula(name, r):
  losses = _gamma()
  with jax.enable_x64(True):
    w = _function(name)(losses, r)
  np.testing.assert_allclose(w / losses.size, oracles.official_sum_one(name, losses, r), rtol=1e-12)


def test_the_published_entry_called_uniform_is_not_uniform():
  """softmax(h / r) puts .71488 on the largest of five losses; ours is the ordinary mean."""
  h = np.linspace(-1, 1, 5)
  np.testing.assert_allclose((np.exp(h / 0.4) / np.exp(h / 0.4).sum())[-1], 0.71488, atol=1e-5)
  incoming = jnp.array([0.3, 1.7, 1.0, 0.0, 2.0])
  w, state = jaxrw.uniform().update(incoming, (), losses=jnp.arange(5.0))
  np.testing.assert_array_equal(w, incoming)
  assert state == ()


@pytest.mark.parametrize('r', [0.05, 0.4, 1.0])
@pytest.mark.parametrize('name', NAMES)
def test_equals_a_numpy_loop_under_base_and_incoming_weights(name, r):
  rng = np.random.default_rng(3)
  losses, base = _gamma(), rng.integers(0, 9, 16).astype(float)
  base[2] = 0
  losses[2] = 1e4  # padding that would take over
  incoming = rng.uniform(0, 2, 16)
  with jax.enable_x64(True):
    w = _function(name)(losses, r, base=jnp.asarray(base), weights=jnp.asarray(incoming))
  expected = oracles.base_mean_one(name, losses, r, base, incoming)
  np.testing.assert_allclose(w, expected, rtol=1e-11)
  np.testing.assert_allclose(np.sum(base * w), np.sum(base * incoming), rtol=1e-12)
  assert w[2] == 0


@pytest.mark.parametrize('name', NAMES)
@hypothesis.given(
  losses=st.lists(st.floats(-64, 64, width=32), min_size=8, max_size=8),
  base=st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=8, max_size=8),
  r=st.sampled_from([0.25, 1.0, 4.0]),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_any_float32_losses_agree_with_float64(name, losses, base, r):
  """Ties, tiny ranges and large offsets included: the range is formed from exact differences."""
  losses = np.asarray(losses, np.float32)
  w = _function(name)(losses, r, base=jnp.asarray(base, jnp.float32))
  expected = oracles.base_mean_one(name, losses, r, base)
  np.testing.assert_allclose(w, expected, rtol=1e-4 if name == 'kl_dro' else 1e-5, atol=1e-30)


def test_nearly_equal_losses_keep_their_order_where_the_official_form_is_noise():
  """Losses a few float32 steps apart: within 2e-6 of float64; the published form is 7% off."""
  steps = np.spacing(np.float32(3.0)) * np.array([0, 1, 3, 6, 8, 13, 17])
  losses = (3.0 + steps).astype(np.float32)
  for name in RANGED:
    exact = oracles.base_mean_one(name, losses, 0.4)
    np.testing.assert_allclose(_function(name)(losses, 0.4), exact, rtol=2e-6)
    official = oracles.official_sum_one(name, losses, 0.4, dtype=np.float32) * losses.size
    assert np.max(np.abs(official / exact - 1)) > 0.05, name
  one_step_apart = np.array([3.0, np.nextafter(np.float32(3), np.float32(4))], np.float32)
  for name in RANGED:
    exact = oracles.base_mean_one(name, one_step_apart, 0.4)
    np.testing.assert_allclose(_function(name)(one_step_apart, 0.4), exact, rtol=2e-6)


@pytest.mark.parametrize('name', RANGED)
def test_affine_invariance(name):
  losses = _gamma()
  with jax.enable_x64(True):
    w = _function(name)(losses, 0.4)
    for scale, shift in ((3.7, -11.0), (0.02, 5.0), (1e3, 0.0)):
      np.testing.assert_allclose(_function(name)(scale * losses + shift, 0.4), w, rtol=1e-9)


def test_kl_dro_is_invariant_to_shifts_and_scales_with_its_temperature():
  losses = _gamma()
  with jax.enable_x64(True):
    f = _function('kl_dro')
    np.testing.assert_allclose(f(losses + 40, 0.4), f(losses, 0.4), rtol=1e-10)
    np.testing.assert_allclose(f(3 * losses, 1.2), f(losses, 0.4), rtol=1e-10)
    assert np.max(np.abs(f(3 * losses, 0.4) / f(losses, 0.4) - 1)) > 0.5


@pytest.mark.parametrize('name', ['linupper', 'upper', 'kl_dro'])
def test_a_higher_loss_never_gets_a_lower_weight(name):
  losses = np.sort(_gamma(64)).astype(np.float32)
  w = _function(name)(losses, 0.4)
  assert np.all(np.diff(w) >= 0)
  assert w[0] < w[-1]
  if name == 'linupper':
    mid = (losses.min() + losses.max()) / 2
    assert np.ptp(w[losses > mid + 1e-5]) == 0, 'flat above mid-range'
    assert np.all(np.diff(w[losses < mid]) > 0), 'strictly increasing below'


@pytest.mark.parametrize('r', [0.3, 1.0, 5.0])
@pytest.mark.parametrize('name', RANGED)
def test_ratio_and_bounds(name, r):
  for seed in range(4):
    losses = _gamma(11, seed)
    with jax.enable_x64(True):
      w = _function(name)(losses, r)
    count, ratio = losses.size, np.exp(1 / r)
    if name in ('linupper', 'upper'):
      np.testing.assert_allclose(w.max() / w.min(), ratio, rtol=1e-10)
    else:
      assert w.max() / w.min() <= ratio * (1 + 1e-10)
    assert w.min() >= count / (1 + (count - 1) * ratio) * (1 - 1e-10)
    assert w.max() <= count / (1 + (count - 1) / ratio) * (1 + 1e-10)
    if r >= 1 / np.log(2):
      assert w.max() <= 2, 'the cap assumed by the theorem holds at any batch from r = 1.443 on'


@pytest.mark.parametrize('name', NAMES)
def test_infinite_temperature_is_exactly_uniform(name):
  losses = _gamma().astype(np.float32)
  np.testing.assert_array_equal(_function(name)(losses, INF), np.ones(16, np.float32))
  np.testing.assert_allclose(_function(name)(losses, 1e6), np.ones(16), rtol=1e-5)
  incoming = jnp.asarray(_gamma(16, 5), jnp.float32)
  np.testing.assert_allclose(_function(name)(losses, INF, weights=incoming), incoming, rtol=1e-7)


@pytest.mark.parametrize('r', [1e-4, 1e-40, 0.0])
def test_zero_temperature_is_a_hard_selection(r):
  """Also below the smallest normal float and at 0 itself, where a schedule may end."""
  losses = np.array([1.0, 2.9, 3.5, 4.0, 5.0], np.float32)  # mid-range 3
  expected = {
    'linupper': [0, 0, 5 / 3, 5 / 3, 5 / 3],
    'quadratic': [0, 5, 0, 0, 0],
    'extremes': [2.5, 0, 0, 0, 2.5],
    'upper': [0, 0, 0, 0, 5],
    'kl_dro': [0, 0, 0, 0, 5],
  }
  for name in NAMES:
    np.testing.assert_allclose(_function(name)(losses, r), expected[name], rtol=1e-6)


def test_kl_dro_solves_the_robust_problem():
  """sum q l - r KL(q || b) is largest at q = b w, where it equals r log sum b exp(l / r)."""
  rng = np.random.default_rng(0)
  losses, b, r = _gamma(8), rng.dirichlet(np.ones(8)), 0.7
  with jax.enable_x64(True):
    q = b * _function('kl_dro')(losses, r, base=jnp.asarray(b))
  objective = lambda q: np.sum(q * losses, -1) - r * np.sum(q * np.log(q / b), -1)
  best = r * np.log(np.sum(b * np.exp(losses / r)))
  np.testing.assert_allclose(q.sum(), 1, rtol=1e-12)
  np.testing.assert_allclose(objective(q), best, rtol=1e-12)
  others = np.concatenate([rng.dirichlet(np.ones(8), 2000), rng.dirichlet(100 * q, 2000)])
  gap = best - objective(np.maximum(others, 1e-300))
  assert np.all(gap >= 0)
  assert gap.min() < 0.05, 'the random points never came near the optimum: a weak test'


def test_kl_dro_weights_are_the_gradient_of_the_robust_loss():
  """Envelope theorem: d/d theta of r log mean exp(l / r) is sum w_i grad l_i / M."""
  rng = np.random.default_rng(1)
  x, y, r = rng.normal(size=(12, 3)), rng.normal(size=12), 0.7
  with jax.enable_x64(True):
    theta = jnp.array([0.3, -0.2, 0.5])
    losses_of = lambda theta: (x @ theta - y) ** 2
    robust = lambda theta: r * jnp.log(jnp.mean(jnp.exp(losses_of(theta) / r)))
    w = lambda theta: weights.kl_dro_weights(losses_of(theta), r)
    weighted = lambda theta: jnp.mean(w(theta) * losses_of(theta))
    np.testing.assert_allclose(jax.grad(robust)(theta), jax.grad(weighted)(theta), rtol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_one_example_and_equal_losses_are_uniform(name):
  np.testing.assert_array_equal(_function(name)(np.float32([2.5]), 0.01), [1.0])
  np.testing.assert_array_equal(_function(name)(np.full(7, 3.3, np.float32), 0.01), np.ones(7))
  base = jnp.array([1.0, 0, 0, 2.0])
  w = _function(name)(np.float32([3.3, 9, np.nan, 3.3]), 0.01, base=base)
  np.testing.assert_array_equal(w, [1, 0, 0, 1])


@pytest.mark.parametrize('filler', [0.0, np.nan, INF, -INF])
@pytest.mark.parametrize('name', NAMES)
def test_nothing_valid_gives_zeros(name, filler):
  w = _function(name)(np.full(4, filler, np.float32), 0.4, base=jnp.zeros(4))
  np.testing.assert_array_equal(w, np.zeros(4))


@pytest.mark.parametrize('value', [np.nan, INF, -INF])
@pytest.mark.parametrize('name', NAMES)
def test_a_nonfinite_loss_propagates_or_is_masked(name, value):
  losses = _gamma(8).astype(np.float32)
  losses[3] = value
  if not (name == 'kl_dro' and value == -INF):  # exp(-inf) = 0 is that row's true weight
    assert np.all(np.isnan(_function(name)(losses, 0.4)))
  w = _function(name)(losses, 0.4, nonfinite='mask')
  rest = np.delete(losses, 3)
  np.testing.assert_allclose(np.delete(w, 3), _function(name)(rest, 0.4) * 8 / 7, rtol=2e-6)
  assert w[3] == 0
  np.testing.assert_allclose(w.sum(), 8, rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, INF])
def test_a_nonfinite_loss_on_one_of_eight_devices_reaches_all_weights(bad):
  """The max between devices may drop a NaN; the sums after it must not."""
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  losses = _gamma().astype(np.float32)
  losses[5] = bad
  losses = jax.device_put(losses, NamedSharding(mesh, PartitionSpec('data')))
  stages = [getattr(jaxrw, name)(0.4) for name in NAMES]
  stages += [jaxrw.chain(loss=stages[0], cap=jaxrw.cap(2.0)), jaxrw.row_shuffled(stages[0])]

  @jax.jit
  def weigh(losses):
    signals = {'losses': losses, 'key': jax.random.key(0)}
    return [stage.update(jnp.ones(16), stage.init(), **signals)[0] for stage in stages]

  for w in weigh(losses):
    assert np.all(np.isnan(w))


@pytest.mark.parametrize('name', NAMES)
def test_token_counts_as_base_give_the_length_weighted_softmax(name):
  """base * w / sum = p_i n_i / sum_j p_j n_j, with p the softmax of the unweighted batch."""
  losses, counts = _gamma(), np.random.default_rng(2).integers(1, 50, 16)
  with jax.enable_x64(True):
    w = _function(name)(losses, 0.4, base=jnp.asarray(counts, jnp.float64))
  p = oracles.official_sum_one(name, losses, 0.4)
  np.testing.assert_allclose(counts * w / counts.sum(), p * counts / np.sum(p * counts), rtol=1e-11)


@pytest.mark.parametrize('name', NAMES)
def test_token_losses_are_reduced_over_t_and_the_weight_is_broadcast(name):
  rng = np.random.default_rng(4)
  losses = rng.gamma(4.0, 0.7, (6, 5))
  valid = rng.random((6, 5)) < 0.7
  valid[1], valid[0] = False, True
  losses[~valid] = np.nan
  incoming = rng.uniform(0.5, 1.5, (6, 5))
  with jax.enable_x64(True):
    w = _function(name)(
      losses, 0.4, base=jnp.asarray(valid, jnp.float64), weights=jnp.asarray(incoming)
    )
  means = [np.mean(losses[i][valid[i]]) if valid[i].any() else np.nan for i in range(6)]
  measure = np.sum(valid * incoming, axis=1)  # base * incoming of an example
  own = oracles.base_mean_one(name, means, 0.4, valid.sum(1))
  own = own * measure.sum() / np.sum(measure * own)
  np.testing.assert_allclose(w, own[:, None] * incoming, rtol=1e-11)
  np.testing.assert_allclose(np.sum(valid * w), np.sum(valid * incoming), rtol=1e-12)


@pytest.mark.parametrize('name', ['quadratic', 'kl_dro'])
def test_examples_of_weight_zero_cannot_starve_the_others(name):
  """The top score of an example of weight 0 must not push the others below the range of exp."""
  losses = np.array([0.0, 0.2, 150.0, 300.0], np.float32)
  incoming = jnp.array([1.0, 1.0, 0.0, 0.0 if name == 'kl_dro' else 1.0])
  w = _function(name)(losses, 0.01 if name == 'quadratic' else 1.0, weights=incoming)
  np.testing.assert_allclose(w.sum(), incoming.sum(), rtol=1e-6)
  assert w[2] == 0


@pytest.mark.parametrize('name', NAMES)
def test_gradients_stop_at_the_losses_but_not_at_the_temperature(name):
  losses = jnp.asarray(_gamma(), jnp.float32)
  f = getattr(weights, f'{name}_weights')
  score = lambda losses, r: jnp.sum(f(losses, r) * jnp.arange(16.0))
  by_losses, by_r = jax.jit(jax.grad(score, argnums=(0, 1)))(losses, 0.4)
  np.testing.assert_array_equal(by_losses, np.zeros(16))
  assert np.isfinite(by_r)
  assert abs(by_r) > 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_stage_follows_a_schedule_of_the_step(name):
  losses = jnp.asarray(_gamma(), jnp.float32)
  stage = getattr(weights, name)(lambda step: 1.0 / (1 + step))
  update = jax.jit(lambda step: stage.update(jnp.ones(16), (), losses=losses, step=step)[0])
  for step in (0, 4):
    expected = _function(name)(losses, 1 / (1 + step))
    np.testing.assert_allclose(update(step), expected, rtol=1e-5)
  with pytest.raises(TypeError, match='step'):
    stage.update(jnp.ones(16), (), losses=losses)


def test_bad_arguments_name_the_field_and_the_value():
  losses = jnp.ones(3)
  with pytest.raises(ValueError, match='temperature=-1'):
    jaxrw.linupper(-1)
  with pytest.raises(ValueError, match=r'temperature=0\.0'):
    jaxrw.kl_dro_weights(losses, 0.0)
  with pytest.raises(ValueError, match='temperature=nan'):
    jaxrw.upper(float('nan'))
  with pytest.raises(TypeError, match=r"temperature='0\.4' must be a number"):
    jaxrw.quadratic('0.4')
  with pytest.raises(ValueError, match="nonfinite='ignore'"):
    jaxrw.linupper_weights(losses, nonfinite='ignore')
  with pytest.raises(ValueError, match=r'base has shape \(2,\)'):
    jaxrw.linupper_weights(losses, base=jnp.ones(2))
  with pytest.raises(ValueError, match=r'weights has shape \(3, 1\)'):
    jaxrw.linupper_weights(losses, weights=jnp.ones((3, 1)))
  with pytest.raises(ValueError, match=r'got shape \(\)'):
    jaxrw.linupper_weights(jnp.float32(1.0))
