"""Group advantages against a loop, their invariances, and the policy gradient by enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw
from jaxrw import weights
from jaxrw.weights import group_advantage

# Compiled as a whole: dispatched one by one, its operations take seconds.
group_advantage_weights = jax.jit(
  weights.group_advantage_weights,
  static_argnames=('num_groups', 'normalize_std', 'leave_one_out', 'eps'),
)


def _data(seed=0, rows=24, groups=5):
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, groups - 1, rows)  # the last group stays empty
  ids[7] = groups - 2
  ids[(ids == groups - 2) & (np.arange(rows) != 7)] = 0  # and the one before has a single member
  base = rng.integers(0, 4, rows).astype(float)
  base[7] = 2
  return rng.normal(size=rows), ids, base


def _loop(rewards, ids, base, normalize_std, leave_one_out, eps):
  out = np.zeros(len(rewards))
  for i, (r, g) in enumerate(zip(rewards, ids)):
    if base[i] == 0:
      continue
    group = [rewards[j] for j in range(len(rewards)) if ids[j] == g and base[j] > 0]
    if len(group) == 1:
      continue
    mean = sum(group) / len(group)
    others = (sum(group) - r) / (len(group) - 1)
    out[i] = r - (others if leave_one_out else mean)
    if normalize_std:
      out[i] /= math.sqrt(sum((x - mean) ** 2 for x in group) / len(group)) + eps
  return out


@pytest.mark.parametrize('leave_one_out', [False, True])
@pytest.mark.parametrize('normalize_std', [False, True])
def test_equals_a_loop(normalize_std, leave_one_out):
  rewards, ids, base = _data()
  with jax.enable_x64(True):
    out = group_advantage_weights(
      jnp.asarray(rewards), jnp.asarray(ids), 5, normalize_std=normalize_std,
      leave_one_out=leave_one_out, eps=1e-3, base=jnp.asarray(base),
    )  # fmt: skip
  out = np.asarray(out)
  expected = _loop(rewards, ids, base, normalize_std, leave_one_out, 1e-3)
  np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-14)
  assert out[7] == 0
  for g in range(5):
    np.testing.assert_allclose(np.sum(out[ids == g]), 0, atol=1e-13)


def test_shift_and_scale_of_the_rewards_do_not_matter():
  rewards, ids, base = _data(1)
  with jax.enable_x64(True):
    weigh = lambda r: group_advantage_weights(
      jnp.asarray(r), jnp.asarray(ids), 5, base=jnp.asarray(base), eps=1e-12
    )
    np.testing.assert_allclose(weigh(100 + 7 * rewards), weigh(rewards), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('reward', [0.1, 1e3 / 3, -1e30])
def test_equal_rewards_give_exactly_zero(reward):
  """A mean of equal floats is not that float; dividing the rounding by its own spread gives ±1."""
  out = group_advantage_weights(jnp.full(7, reward), jnp.zeros(7, jnp.int32), 1)
  np.testing.assert_array_equal(out, np.zeros(7))


def test_rows_without_base_and_without_group():
  rewards = jnp.array([1.0, 0.0, jnp.nan, 9.0, 4.0])
  ids, base = jnp.array([0, 0, 0, -1, 1]), jnp.array([[1.0, 1], [1, 0], [0, 0], [1, 1], [1, 1]])
  out = group_advantage_weights(rewards, ids, 2, base=base, eps=0.0)
  np.testing.assert_allclose(out, [[1, 1], [-1, -1], [0, 0], [1, 1], [0, 0]], rtol=1e-6)
  doubled = group_advantage_weights(rewards, ids, 2, base=base, weights=2 * base, eps=0.0)
  np.testing.assert_allclose(doubled, 2 * base * out)


def test_ids_out_of_range():
  rewards = jnp.array([1.0, 0.0, 3.0])
  with pytest.raises(IndexError, match='group_ids holds 2'):
    weights.group_advantage_weights(rewards, jnp.array([0, 0, 2]), 2)
  out = group_advantage_weights(rewards, jnp.array([0, 0, 2]), 2)
  np.testing.assert_array_equal(np.isnan(out), [False, False, True])


def test_a_broken_reward_spoils_its_own_group_and_is_not_hidden():
  rewards = jnp.array([1.0, jnp.nan, 3.0, 5.0])
  out = group_advantage_weights(rewards, jnp.array([0, 0, 1, 1]), 2)
  np.testing.assert_array_equal(np.isnan(out), [True, True, False, False])


def test_missing_rewards_are_named():
  with pytest.raises(TypeError, match=r"extra\['rewards'\]"):
    group_advantage(2).update(jnp.ones(2), (), group_ids=jnp.zeros(2, jnp.int32), extra={})


@pytest.mark.parametrize('leave_one_out', [False, True])
def test_the_weighted_gradient_is_reinforce_with_the_group_baseline(leave_one_out):
  """Softmax policy over 3 answers, prompts with 2 completions, all 9 draws enumerated.

  The gradient of the step, averaged over the draws, is the gradient of the expected reward, times
  1 - 1/n when a row's own reward is in its baseline.
  """
  logits = np.array([[0.3, -0.5, 0.1], [1.0, 0.2, -0.4]])  # one policy for each of two prompts
  rewards = np.array([[1.0, 0.0, 0.4], [0.2, 0.9, -1.0]])
  n = 2
  with jax.enable_x64(True):
    probabilities = jax.nn.softmax(jnp.asarray(logits))

    def expected_reward(logits):
      return jnp.sum(jax.nn.softmax(logits) * rewards)

    truth = jax.grad(expected_reward)(jnp.asarray(logits))

    def batched_loss(params, batch):
      log_p = jax.nn.log_softmax(params)[batch['group_ids'], batch['answer']]
      return -log_p, {'rewards': batch['reward']}

    tx = optax.sgd(1.0)
    rw = group_advantage(2, normalize_std=False, leave_one_out=leave_one_out)
    step = jax.jit(jaxrw.make_train_step(None, tx, rw, batched_loss=batched_loss, microbatches=1))
    state = jaxrw.TrainState.create(jnp.asarray(logits), tx, rw)
    estimate = np.zeros_like(logits)
    mass = 0.0
    for draw in itertools.product(range(3), repeat=2 * n):
      answer = np.asarray(draw)
      prompt = np.repeat([0, 1], n)
      chance = float(np.prod(np.asarray(probabilities)[prompt, answer]))
      batch = {
        'answer': jnp.asarray(answer),
        'group_ids': jnp.asarray(prompt),
        'reward': jnp.asarray(rewards[prompt, answer]),
      }
      new, _ = step(state, batch)
      estimate += chance * (new.params - state.params) * len(draw) / n  # the step divides by B
      mass += chance
    np.testing.assert_allclose(mass, 1, rtol=1e-12)
    np.testing.assert_allclose(
      estimate, truth if leave_one_out else truth * (1 - 1 / n), rtol=1e-10, atol=1e-12
    )
