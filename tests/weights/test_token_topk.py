"""Selection of tokens against a NumPy sort; what it costs on a mesh; limits and errors."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled

_weights = jax.jit(jaxrw.token_topk_weights)


def _case(seed=0, shape=(8, 12), ties=False):
  rng = np.random.default_rng(seed)
  losses, ref_losses = rng.gamma(2.0, 1.0, (2, *shape)).astype(np.float32)
  if ties:
    losses, ref_losses = np.round(losses), np.round(ref_losses)
  base = rng.integers(0, 3, shape).astype(np.float32)
  incoming = rng.uniform(0.5, 2, shape).astype(np.float32)
  return losses, ref_losses, base, incoming


def _sorted(losses, ref_losses, base, incoming, share):
  """Keeps what is at least the k-th of the sorted scores."""
  score = (losses - ref_losses)[base > 0]
  k = math.ceil(Fraction(str(share)) * score.size)
  keep = (losses - ref_losses >= np.sort(score)[-k]) & (base > 0)
  measure = base.astype(float) * incoming
  return np.where(keep, incoming * measure.sum() / measure[keep].sum(), 0), k


@pytest.mark.parametrize('share', [0.001, 0.1, 0.6, 0.999, 1.0])
@pytest.mark.parametrize('ties', [False, True])
def test_equals_a_numpy_sort(share, ties):
  losses, ref_losses, base, incoming = case = _case(seed=3, ties=ties)
  dirty = np.where(base > 0, losses, np.nan)
  w = np.asarray(_weights(dirty, ref_losses, share, base=base, weights=incoming))
  expected, k = _sorted(*case, share)
  np.testing.assert_allclose(w, expected, rtol=1e-5)
  kept = np.sum(w > 0)
  assert kept == k if not ties else kept >= k
  np.testing.assert_allclose(np.sum(base * w), np.sum(base * incoming), rtol=1e-5)


def test_the_step_is_the_mean_loss_of_the_selected_tokens():
  losses, ref_losses, _, _ = _case(seed=1)
  w = np.asarray(_weights(losses, ref_losses, 0.6))
  expected = np.mean(losses[w > 0])
  np.testing.assert_allclose(np.sum(w * losses) / losses.size, expected, rtol=1e-5)
  assert np.mean(w > 0) == math.ceil(0.6 * 96) / 96


def test_a_constant_reference_selects_the_largest_losses_and_a_shift_changes_nothing():
  losses, ref_losses, _, _ = _case(seed=2)
  w = np.asarray(_weights(losses, np.full_like(losses, 0.25), 0.25))
  assert losses[w > 0].min() > losses[w == 0].max()
  assert np.sum(w > 0) == 24
  w = _weights(losses, ref_losses, 0.25)
  np.testing.assert_array_equal(_weights(losses + 2, ref_losses + 2, 0.25) > 0, w > 0)


def test_all_tokens_that_tie_with_the_last_are_kept():
  losses = jnp.array([[3.0, 2.0, 2.0], [2.0, 1.0, 0.0]])
  w = _weights(losses, jnp.zeros((2, 3)), 0.3)  # k = 2, but three tokens share second place
  np.testing.assert_array_equal(w, [[1.5, 1.5, 1.5], [1.5, 0, 0]])


def test_share_one_is_exactly_uniform():
  losses, ref_losses, base, incoming = _case(seed=4)
  w = np.asarray(_weights(losses, ref_losses, 1.0, base=base, weights=incoming))
  np.testing.assert_array_equal(w, np.where(base > 0, incoming, 0))


@pytest.mark.parametrize('value', [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('which', [0, 1])
def test_a_score_that_is_not_finite_is_not_hidden(which, value):
  case = list(_case(seed=5)[:2])
  case[which][2, 3] = value
  w = np.asarray(_weights(*case, 0.1))
  assert np.isnan(np.sum(w))


def test_nothing_valid_and_nothing_left():
  losses, ref_losses, _, incoming = _case(seed=6)
  zeros = jnp.zeros_like(losses)
  np.testing.assert_array_equal(_weights(losses, ref_losses, 0.5, base=zeros), zeros)
  none = incoming * 0
  np.testing.assert_array_equal(_weights(losses, ref_losses, 0.5, weights=none), zeros)


def test_the_share_may_follow_the_step():
  losses, ref_losses, _, _ = _case(seed=7)
  rw = jaxrw.token_topk(lambda step: 1 - 0.1 * step)
  signals = {'losses': losses, 'ref_losses': ref_losses}
  w, state = rw.update(jnp.ones_like(losses), (), step=4, **signals)
  np.testing.assert_array_equal(w, _weights(losses, ref_losses, 0.6))
  assert state == ()
  with pytest.raises(TypeError, match='share is a schedule'):
    rw.update(jnp.ones_like(losses), (), **signals)


def test_errors_say_what_to_do():
  losses = jnp.ones((2, 3))
  with pytest.raises(TypeError, match='ref_losses'):
    jaxrw.token_topk().update(losses, (), losses=losses)
  with pytest.raises(ValueError, match=r'one loss per token \[B, T\], got shape \(2,\).*batched_'):
    jaxrw.token_topk_weights(jnp.ones(2), jnp.ones(2))
  with pytest.raises(ValueError, match=r'ref_losses has shape \(2,\)'):
    jaxrw.token_topk_weights(losses, jnp.ones(2))
  for share in (0, 1.5, float('nan')):
    with pytest.raises(ValueError, match='must be in'):
      jaxrw.token_topk(share)


def test_nothing_flows_back_to_the_losses():
  losses, ref_losses, _, _ = map(jnp.asarray, _case(seed=8))
  value = lambda losses, ref: jnp.sum(jaxrw.token_topk_weights(losses, ref, 0.5) ** 2)
  for gradient in jax.jit(jax.grad(value, argnums=(0, 1)))(losses, ref_losses):
    np.testing.assert_array_equal(gradient, np.zeros_like(losses))


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_five_small_collectives_whatever_the_number_of_tokens(axis_type):
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(axis_type,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  losses, ref_losses, base, incoming = _case(seed=9, shape=(16, 64))
  with jax.set_mesh(mesh):
    arguments = jax.device_put((losses, ref_losses), rows)
    given = jax.device_put({'base': base, 'weights': incoming}, rows)
    found = compiled.costs(_weights.lower(*arguments, 0.6, **given).compile()).collectives
    out = _weights(*arguments, 0.6, **given)
  sizes = sorted((c.kind, c.bytes) for c in found for _ in range(c.count))
  assert sizes == [('all-reduce', 3 * 4)] + 4 * [('all-reduce', 256 * 4)]
  alone = np.asarray(_weights(losses, ref_losses, 0.6, base=base, weights=incoming))
  np.testing.assert_array_equal(np.asarray(out) > 0, alone > 0)
  np.testing.assert_allclose(out, alone, rtol=1e-6)
