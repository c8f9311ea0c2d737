"""Losses for imbalance and noise: NumPy, optax, finite differences and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrw import losses

LABELS = np.array([0, 2, 1, 3, 0])
COUNTS = np.array([500.0, 60.0, 7.0, 1.0])


def _logits(scale=3.0):
  return np.random.default_rng(0).normal(size=(5, 4)) * scale


def _probabilities(logits):
  e = np.exp(logits - logits.max(axis=1, keepdims=True))
  return (e / e.sum(axis=1, keepdims=True))[np.arange(5), LABELS]


CASES = {
  'focal': (
    lambda z: losses.focal(z, LABELS, 1.5, jnp.array([1.0, 2.0, 3.0, 4.0])),
    lambda z: -(1 + LABELS) * (1 - _probabilities(z)) ** 1.5 * np.log(_probabilities(z)),
  ),
  'generalized': (
    lambda z: losses.generalized_cross_entropy(z, LABELS, 0.6),
    lambda z: (1 - _probabilities(z) ** 0.6) / 0.6,
  ),
  'ldam': (
    lambda z: losses.ldam(z, LABELS, losses.ldam_margins(COUNTS), 4.0),
    lambda z: -np.log(_probabilities(4 * (z - np.eye(4)[LABELS] * 0.5 * COUNTS**-0.25))),
  ),
  'adjusted': (
    lambda z: losses.logit_adjusted_cross_entropy(z, LABELS, np.log(COUNTS), 0.7),
    lambda z: -np.log(_probabilities(z + 0.7 * np.log(COUNTS))),
  ),
  'balanced': (
    lambda z: losses.balanced_softmax(z, LABELS, COUNTS),
    lambda z: -np.log(COUNTS[LABELS] * np.exp(z)[np.arange(5), LABELS] / (np.exp(z) @ COUNTS)),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
  ours, formula = CASES[name]
  with jax.enable_x64(True):
    z = _logits()
    value, pull = jax.vjp(jax.jit(ours), jnp.asarray(z))
    np.testing.assert_allclose(value, formula(z), rtol=1e-6)
    direction = np.random.default_rng(1).normal(size=z.shape)
    eps = 1e-6
    slope = (formula(z + eps * direction) - formula(z - eps * direction)).sum() / (2 * eps)
    np.testing.assert_allclose(np.sum(pull(jnp.ones(5))[0] * direction), slope, rtol=1e-5)


def test_limits():
  z = jnp.asarray(_logits(), jnp.float32)
  plain = losses.cross_entropy(z, LABELS)
  for same in (
    losses.focal(z, LABELS, 0.0),
    losses.generalized_cross_entropy(z, LABELS, 0.0),
    losses.ldam(z, LABELS, jnp.zeros(4), 1.0),
    losses.logit_adjusted_cross_entropy(z, LABELS, np.log(COUNTS), 0.0),
  ):
    np.testing.assert_array_equal(same, plain)
  np.testing.assert_allclose(losses.generalized_cross_entropy(z, LABELS, 1e-4), plain, rtol=1e-3)
  even = losses.balanced_softmax(z, LABELS, [7, 7, 7, 7])
  np.testing.assert_allclose(even, plain, rtol=1e-5, atol=1e-6)
  error = np.abs(jax.nn.softmax(z) - jax.nn.one_hot(LABELS, 4)).sum(axis=1)
  np.testing.assert_allclose(
    losses.generalized_cross_entropy(z, LABELS, 1.0), error / 2, rtol=1e-5, atol=1e-7
  )


def test_focal_of_two_classes_is_optaxs():
  z = jnp.asarray(np.random.default_rng(2).normal(size=6) * 30, jnp.float32)
  labels = jnp.array([0, 1, 0, 1, 1, 0])
  ours = losses.focal(jnp.stack([jnp.zeros(6), z], axis=1), labels, 2.0)
  peer = optax.losses.sigmoid_focal_loss(z, labels, gamma=2.0)
  np.testing.assert_allclose(ours, peer, rtol=1e-4, atol=1e-12)


def test_extreme_logits_have_finite_gradients():
  z = jnp.array([[200.0, -200.0], [-200.0, 200.0]])
  for loss in (losses.focal, losses.generalized_cross_entropy):
    value, pull = jax.vjp(lambda z, loss=loss: loss(z, jnp.array([0, 0])), z)
    assert np.all(np.isfinite(value)), loss
    assert np.all(np.isfinite(pull(jnp.ones(2))[0])), loss


def test_focal_with_no_other_class_left():
  """Nothing else can be it: the loss is 0, its gradient too. A log sum of nothing has none."""
  for z in (jnp.array([[1.0, -jnp.inf, -jnp.inf]]), jnp.array([[1.0]])):
    value, pull = jax.vjp(lambda z: losses.focal(z, jnp.array([0])), z)
    np.testing.assert_array_equal(value, [0])
    np.testing.assert_array_equal(pull(jnp.ones(1))[0], jnp.zeros_like(z))


def test_a_class_that_does_not_occur_is_never_predicted_in_training():
  z = jnp.zeros((1, 3))
  value, pull = jax.vjp(lambda z: losses.balanced_softmax(z, jnp.array([0]), [1, 1, 0]), z)
  np.testing.assert_allclose(value, [np.log(2)], rtol=1e-6)
  np.testing.assert_allclose(pull(jnp.ones(1))[0], [[-0.5, 0.5, 0]], atol=1e-6)


def test_distillation_is_its_formula():
  rng = np.random.default_rng(5)
  z, t = rng.normal(size=(5, 4)) * 2, rng.normal(size=(5, 4)) * 2
  soft = lambda x: np.exp(x / 3) / np.exp(x / 3).sum(axis=1, keepdims=True)
  apart = np.sum(soft(t) * np.log(soft(t) / soft(z)), axis=1)
  expected = 0.3 * -np.log(_probabilities(z)) + 0.7 * 9 * apart
  with jax.enable_x64(True):
    found = losses.distillation(jnp.asarray(z), jnp.asarray(t), LABELS, alpha=0.7, temperature=3.0)
  np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_limits_of_distillation():
  rng = np.random.default_rng(6)
  z, t = (jnp.asarray(rng.normal(size=(5, 4))) for _ in range(2))
  run = lambda z=z, t=t, labels=LABELS, alpha=1.0, **settings: losses.distillation(
    z, t, labels, alpha=alpha, **settings
  )
  np.testing.assert_array_equal(run(alpha=0.0), losses.cross_entropy(z, LABELS))
  np.testing.assert_array_equal(run(labels=LABELS[::-1]), run())
  np.testing.assert_allclose(run(t=t + 5), run(), rtol=1e-4, atol=1e-5)
  same = jax.grad(lambda z: jnp.sum(run(z=z, t=t)))(t)
  np.testing.assert_allclose(same, np.zeros((5, 4)), atol=1e-5)
  to_teacher = jax.grad(lambda t: jnp.sum(run(t=t)))(t)
  np.testing.assert_array_equal(to_teacher, np.zeros((5, 4)))
  with jax.enable_x64(True):
    z64, t64 = np.float64(z), np.float64(t)
    hot = run(z=jnp.asarray(z64), t=jnp.asarray(t64), temperature=1e4)
    centered = lambda x: x - x.mean(axis=1, keepdims=True)
    apart = np.sum((centered(z64) - centered(t64)) ** 2, axis=1) / 8
    np.testing.assert_allclose(hot, apart, rtol=1e-3)
  never = jnp.full((5, 4), -jnp.inf).at[:, 0].set(0.0)  # a sure teacher
  value, pull = jax.vjp(lambda z: run(z=z, t=never), z)
  assert np.all(np.isfinite(value))
  assert np.all(np.isfinite(pull(jnp.ones(5))[0]))


def test_a_broken_teacher_is_seen_and_labels_are_not_at_alpha_one():
  z, broken = jnp.zeros((1, 3)), jnp.array([[jnp.nan, 0.0, 0.0]])
  for alpha in (0.5, 1.0):
    assert np.isnan(losses.distillation(z, broken, jnp.array([0]), alpha=alpha)[0])
  never = jnp.array([[-jnp.inf, 0.0, 0.0]])
  found = losses.distillation(never, never, jnp.array([0]), alpha=1.0)
  np.testing.assert_array_equal(found, [0])


def test_errors():
  z = jnp.zeros((2, 3))
  labels = jnp.array([0, 1])
  for call, message in (
    (lambda: losses.focal(z, labels, -1), 'gamma=-1 must be at least 0'),
    (lambda: losses.generalized_cross_entropy(z, labels, 1.5), r'q=1\.5 must be in'),
    (lambda: losses.ldam(z, labels, jnp.zeros(2)), r'margins has shape \(2,\); expected \[3\]'),
    (lambda: losses.ldam(z, labels, jnp.zeros(3), 0), 'scale=0 must be greater than 0'),
    (lambda: losses.ldam_margins([1, 0]), r'must be \[C\] and > 0'),
    (lambda: losses.balanced_softmax(z, labels, [1, 2]), r'counts has shape \(2,\)'),
    (lambda: losses.balanced_softmax(z, labels, [3, -1, 2]), 'must be at least 0 and finite'),
    (lambda: losses.logit_adjusted_cross_entropy(z, labels, jnp.zeros(3), np.nan), 'tau=nan must'),
    (lambda: losses.focal(z, labels, 1.0, jnp.ones(2)), r'alpha has shape \(2,\)'),
    (lambda: losses.distillation(z, z, labels, alpha=1.5), r'alpha=1\.5 must be in \[0, 1\]'),
    (lambda: losses.distillation(z, z[:1], labels, alpha=1), r'teacher has shape \(1, 3\)'),
    (lambda: losses.distillation(z, z, labels, alpha=1, temperature=0), 'temperature=0 must be'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  prior = jnp.zeros(3)
  for name, traced in (
    ('gamma', lambda v: losses.focal(z, labels, v)),
    ('q', lambda v: losses.generalized_cross_entropy(z, labels, v)),
    ('tau', lambda v: losses.logit_adjusted_cross_entropy(z, labels, prior, v)),
  ):
    with pytest.raises(TypeError, match=f'{name} is traced; pass a number'):
      jax.jit(traced)(0.5)
