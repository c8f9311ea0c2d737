"""Students of a perceptron that see a part of its examples, by their distance to a border."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

SIDES = ('easy', 'random', 'hard', 'all')
_NEWTON = 25
_PENALTY = 1e-4  # the maximum margin, nearly


def errors(
  key: jax.Array, alpha: float, *, dims: int, keep: float, angle: float, seeds: int
) -> dict[str, np.ndarray]:
  """Errors of the student of each side, {side: float[seeds]}, in [0, 1].

  Args:
    key: draws teachers, probes and examples.
    alpha: examples for each dimension, before pruning.
    dims: d.
    keep: share to keep.
    angle: of the probe to the teacher, in degrees.
    seeds: how many.
  """
  total = round(alpha * dims)
  number = max(1, round(keep * total))

  def one(key):
    keys = jax.random.split(key, 4)
    unit = lambda v: v / jnp.linalg.norm(v)
    teacher = unit(jax.random.normal(keys[0], (dims,)))
    aside = jax.random.normal(keys[1], (dims,))
    aside = unit(aside - (aside @ teacher) * teacher)
    turn = math.radians(angle)
    probe = math.cos(turn) * teacher + math.sin(turn) * aside
    x = jax.random.normal(keys[2], (total, dims))
    y = jnp.sign(x @ teacher)
    order = jnp.argsort(jnp.abs(x @ probe))
    rows = {
      'easy': order[total - number :],
      'random': jax.random.permutation(keys[3], total)[:number],
      'hard': order[:number],
      'all': order,
    }
    return {side: _error(x[r], y[r], teacher) for side, r in rows.items()}

  found = jax.lax.map(jax.jit(one), jax.random.split(key, seeds))
  return {side: np.asarray(v, np.float64) for side, v in found.items()}


def _error(x, y, teacher):
  student = _fitted(x, y)
  agree = student @ teacher / _norm(student)
  return jnp.arccos(jnp.clip(agree, -1, 1)) / math.pi


def _norm(v):
  return jnp.maximum(jnp.linalg.norm(v), 1e-12)


def _fitted(x, y):
  """Logistic regression with a small penalty, by Newton's method with shrinking steps at first."""
  eye = jnp.eye(x.shape[1])

  def step(w, _):
    p = jax.nn.sigmoid(-y * (x @ w))
    slope = -x.T @ (y * p) / len(x) + _PENALTY * w
    curve = (x * (p * (1 - p))[:, None]).T @ x / len(x) + _PENALTY * eye
    move = jnp.linalg.solve(curve, slope)
    return w - move * jnp.minimum(1.0, 5.0 / _norm(move)), None

  return jax.lax.scan(step, jnp.zeros(x.shape[1]), length=_NEWTON)[0]
