"""Selection with a second model, against a sort; the step of the official co-teaching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw


def _by_sorting(score, share, base):
  rows = sorted((i for i in range(len(score)) if base[i] > 0), key=lambda i: -score[i])
  kept = rows[: max(1, int(np.ceil(share * len(rows) - 1e-6)))]
  out = np.zeros(len(score))
  out[kept] = sum(base) / sum(base[i] for i in kept)
  return out


@pytest.mark.parametrize('share', [0.1, 0.5, 1.0])
def test_equals_a_sort(share):
  rng = np.random.default_rng(0)
  losses, peers = rng.gamma(2.0, 1.0, (2, 10))
  base = rng.integers(0, 3, 10).astype(float)
  arguments = [jnp.asarray(x) for x in (losses, peers, share)]
  rho = jax.jit(jaxrw.rho_loss_weights)(*arguments, base=jnp.asarray(base))
  np.testing.assert_allclose(rho, _by_sorting(losses - peers, share, base), rtol=1e-6)
  co = jax.jit(jaxrw.co_teaching_weights)(*arguments, base=jnp.asarray(base))
  np.testing.assert_allclose(co, _by_sorting(-peers, share, base), rtol=1e-6)


def test_a_constant_reference_is_the_largest_losses():
  losses = jnp.asarray(np.random.default_rng(1).normal(size=12))
  rho = jaxrw.rho_loss_weights(losses, jnp.full(12, 0.3), 0.25)
  np.testing.assert_array_equal(rho, jaxrw.trimmed_weights(losses, 0.25, 'high'))


def test_a_model_that_is_its_own_peer_is_small_loss_trimming():
  losses = jnp.asarray(np.random.default_rng(2).normal(size=12))
  co = jaxrw.co_teaching_weights(losses, losses, 0.7)
  np.testing.assert_array_equal(co, jaxrw.trimmed_weights(losses, 0.7, 'low'))


def test_sequences_are_selected_whole():
  losses = jnp.array([[1.0, 3.0], [2.0, 2.5], [9.0, 9.0]])
  base = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
  ref_losses = jnp.array([[1.0, 1.0], [1.9, 0.0], [0.0, 0.0]])
  w = jaxrw.rho_loss_weights(losses, ref_losses, 0.5, base=base)
  np.testing.assert_allclose(w, [[1.5, 1.5], [0, 0], [0, 0]])


def test_one_step_is_not_divided_twice():
  """The official update divides the mean over the kept by their number again."""
  losses = jnp.array([1.0, 2.0, 3.0, 4.0])
  w = jaxrw.co_teaching_weights(losses, losses, 0.5)
  kept_mean = np.mean([1.0, 2.0])
  official = kept_mean / 2
  np.testing.assert_allclose(jnp.mean(w * losses), kept_mean)
  assert abs(float(jnp.mean(w * losses)) - official) > 0.5


def test_the_share_falls_to_the_clean_part():
  share = jaxrw.co_teaching_share(0.4, 10, exponent=2)
  np.testing.assert_allclose(
    [share(s) for s in (0, 5, 10, 20)], [1, 1 - 0.08, 1 - 0.16, 1 - 0.16], rtol=1e-6
  )
  rw = jaxrw.co_teaching(share)
  signals = {'losses': jnp.arange(4.0), 'ref_losses': jnp.arange(4.0)}
  np.testing.assert_array_equal(rw.update(jnp.ones(4), (), step=0, **signals)[0], np.ones(4))


def test_errors():
  with pytest.raises(ValueError, match=r'ref_losses has shape \(3,\), losses \(2,\)'):
    jaxrw.rho_loss_weights(jnp.ones(2), jnp.ones(3))
  with pytest.raises(ValueError, match=r'share=1\.5 must be in'):
    jaxrw.co_teaching(1.5)
  with pytest.raises(TypeError, match='ref_losses'):
    jaxrw.rho_loss().update(jnp.ones(2), (), losses=jnp.ones(2))
  with pytest.raises(ValueError, match=r'noise_rate=1\.0 must be in'):
    jaxrw.co_teaching_share(1.0, 10)
