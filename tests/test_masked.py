"""Masked reductions against NumPy on the entries present, on plain, Auto and Explicit arrays."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrw import masked

FILLERS = (0.0, np.nan, np.inf, -np.inf)


def _case(filler=np.nan, shape=(16,), seed=0):
  rng = np.random.default_rng(seed)
  values, base = rng.normal(size=shape) - 3, rng.integers(0, 4, shape).astype(float)
  base.flat[:2] = 0, 2
  return np.where(base > 0, values, filler).astype(np.float32), base.astype(np.float32)


@pytest.mark.parametrize('filler', FILLERS)
def test_reductions_see_only_what_is_present(filler):
  values, base = map(jnp.asarray, _case(filler))
  present = np.asarray(base) > 0
  here, b = (np.asarray(x, float)[present] for x in (values, base))
  np.testing.assert_allclose(masked.total(values, base), np.sum(b * here), rtol=1e-6)
  np.testing.assert_allclose(masked.mean(values, base), np.average(here, weights=b), rtol=1e-6)
  low, high = masked.min_max(values, base > 0)
  assert (low, high) == (here.min().astype(np.float32), here.max().astype(np.float32))
  assert masked.largest(values, base > 0) == here.max().astype(np.float32)


@pytest.mark.parametrize('filler', FILLERS)
def test_empty_sets_give_zero(filler):
  values, base = jnp.full(4, filler), jnp.zeros(4)
  assert masked.total(values, base) == masked.mean(values, base) == 0
  assert masked.min_max(values, base > 0) == (0, 0)
  assert masked.largest(values, base > 0) == 0
  table = masked.mean(jnp.full((2, 3), filler), jnp.array([[0, 0, 0], [1, 0, 0.0]]), axis=1)
  assert table[0] == 0


def test_a_nan_that_is_present_propagates():
  values, base = jnp.array([1.0, jnp.nan, 3.0]), jnp.ones(3)
  assert np.isnan(masked.total(values, base))
  assert np.all(np.isnan(masked.min_max(values, base > 0)))
  assert np.isnan(masked.largest(values, base > 0))
  low, high = masked.min_max(jnp.array([1.0, jnp.inf]), jnp.array([True, True]))
  assert (low, high) == (1, np.inf)


def test_gradients_of_masked_sums_ignore_padding():
  values, base = _case(np.nan)
  gradient = jax.grad(lambda v: masked.mean(v, base))(values)
  np.testing.assert_allclose(gradient, base / base.sum(), rtol=1e-6)
  assert np.all(np.isfinite(jax.grad(lambda x: masked.divide(x, 0 * x))(2.0)))


def test_divide_by_hand():
  np.testing.assert_array_equal(
    masked.divide(jnp.array([6.0, 5.0, 0.0]), jnp.array([3.0, 0.0, 0.0])), [2, 0, 0]
  )
  assert np.isnan(masked.divide(jnp.float32(1.0), jnp.float32(jnp.nan)))


def test_example_level_is_the_base_mean_and_the_base_sum():
  losses = jnp.array([[1.0, 3.0, jnp.nan], [2.0, 5.0, 8.0], [jnp.nan, jnp.inf, 0.0]])
  base = jnp.array([[1.0, 3.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
  means, sums = masked.example_level(losses, base)
  np.testing.assert_allclose(means, [2.5, 5.0, 0.0])
  np.testing.assert_allclose(sums, [4.0, 1.5, 0.0])
  same, same_base = masked.example_level(means, sums)
  assert same is means
  assert same_base is sums


def test_over_tokens_broadcasts_only_when_asked():
  w = jnp.array([1.0, 2.0])
  assert masked.over_tokens(w, jnp.zeros(2)).shape == (2,)
  np.testing.assert_array_equal(masked.over_tokens(w, jnp.zeros((2, 3))), [[1.0], [2.0]])


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_sharded_vectors_reduce_and_sort_alike(axis_type):
  """Also with devices that hold padding only. A sum keeps the NaN of one device (a max may not)."""
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(axis_type,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  values, base = _case(np.nan)
  base[4:8], values[4:8] = 0, np.nan
  broken = values.copy()
  broken[1] = np.nan
  assert base[1] > 0

  @jax.jit
  def everything(values, base, broken):
    back = masked.reshard_like(jnp.sort(masked.replicate(base)), base)
    return (
      masked.mean(values, base),
      masked.min_max(values, base > 0),
      masked.largest(values, base > 0),
      masked.mean(broken, base),
      back,
    )

  with jax.set_mesh(mesh):
    out = everything(*(jax.device_put(x, rows) for x in (values, base, broken)))
  mean, (low, high), largest, broken_mean, back = out
  here = values[base > 0]
  np.testing.assert_allclose(mean, np.average(here, weights=base[base > 0]), rtol=1e-6)
  assert (low, high, largest) == (here.min(), here.max(), here.max())
  assert np.isnan(broken_mean)
  np.testing.assert_array_equal(back, np.sort(base))
  if axis_type == AxisType.Explicit:
    assert back.sharding.spec == PartitionSpec('data')


def test_fill_in_completes_and_checks():
  losses, base, weights = masked.fill_in(jnp.ones(3, jnp.bfloat16), None, None)
  assert losses.dtype == base.dtype == weights.dtype == jnp.float32
  np.testing.assert_array_equal(base, np.ones(3))
  np.testing.assert_array_equal(weights, np.ones(3))
  with pytest.raises(ValueError, match=r'base has shape \(2,\), losses \(3,\)'):
    masked.fill_in(losses, jnp.ones(2), None)
  with pytest.raises(ValueError, match=r'weights has shape \(3, 1\), losses \(3,\)'):
    masked.fill_in(losses, None, jnp.ones((3, 1)))
  np.testing.assert_array_equal(
    jax.grad(lambda x: jnp.sum(masked.fill_in(x, None, None)[0] ** 2))(losses), np.zeros(3)
  )


@pytest.mark.parametrize('axis_type', [None, AxisType.Auto, AxisType.Explicit])
def test_lookup_is_indexing_with_zero_outside(axis_type):
  table, ids = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([0, 2, -1, 3, 2, 0, 1, -7])
  if axis_type is not None:
    mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(axis_type,))
    ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec('data')))
  found = jax.jit(masked.lookup)(table, ids)
  np.testing.assert_array_equal(found, [1, 3, 0, 0, 3, 1, np.nan, 0])


_top_share = jax.jit(masked.top_share)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32, jnp.float64])
@hypothesis.given(
  values=st.lists(
    st.one_of(
      st.floats(allow_nan=False, allow_subnormal=False, width=32), st.sampled_from([0.0, -0.0, 1.0])
    ),
    min_size=8,
    max_size=8,
  ),
  valid=st.lists(st.booleans(), min_size=8, max_size=8),
  share=st.sampled_from([0.01, 0.25, 0.5, 0.6, 0.9, 1.0]),
)
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_top_share_is_that_of_a_sort(dtype, values, valid, share):
  with jax.enable_x64(True):
    values, valid = jnp.asarray(values, dtype), np.asarray(valid)
    keep = np.asarray(_top_share(values, valid, share))
  present = np.asarray(values, np.float64)[valid]
  expected = np.zeros(8, bool)
  if present.size:
    k = max(1, math.ceil(Fraction(str(share)) * present.size))
    expected = valid & (np.asarray(values, np.float64) >= np.sort(present)[-k])
  np.testing.assert_array_equal(keep, expected)


def test_top_share_counts_exactly_and_forgives_the_rounding_of_the_share():
  """k = ceil(share * n) for the share as written: 0.6 of 5 is 3, though 0.6 is not a float."""
  number = np.arange(1, 129)
  shares = [Fraction(i, 20) for i in range(1, 21)]
  values = jnp.asarray(np.random.default_rng(0).permutation(128), jnp.float32)
  count = lambda n, share: jnp.sum(masked.top_share(values, jnp.arange(128) < n, share))
  table = jax.jit(jax.vmap(jax.vmap(count, (None, 0)), (0, None)))
  found = table(jnp.asarray(number), jnp.asarray([float(s) for s in shares], jnp.float32))
  np.testing.assert_array_equal(found, [[math.ceil(s * int(n)) for s in shares] for n in number])


def test_top_share_puts_nan_first():
  values = jnp.array([1.0, -jnp.nan, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(
    _top_share(values, values == values, 0.5), [False, False, True, False]
  )
  np.testing.assert_array_equal(
    _top_share(values, jnp.ones(4, bool), 0.5), [False, True, False, True]
  )
