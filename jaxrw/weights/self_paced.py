"""Self-paced learning: easy examples first, with a threshold that grows.

The weights v in [0, 1] are what minimizes sum_i v_i l_i + f(v_i) for a regularizer f that pays for
leaving examples out. With threshold c > 0, in the losses' unit:

  | kind    | f(v)              | v(l)                                             |
  |---------|-------------------|--------------------------------------------------|
  | hard    | -c v              | 1 below c, else 0                                |
  | linear  | c (v^2 / 2 - v)   | max(0, 1 - l / c)                                |
  | log     | z v - z^v / log z | log(l + z) / log z below c, else 0; z = 1 - c    |
  | mixture | -k log(v + k / c) | 1 below e, k / l - k / c between, 0 above c      |

with k = c e / (c - e); the kind 'log' needs c < 1.

The weights are absolute: with a low threshold little is trained on and steps are short. Add
`unit_mean()` after it for steps of full length. A `trimmed(share, side='low')` with a growing share
is the hard kind with a quantile for a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, check_positive, declare, stateless

Kind = Literal['hard', 'linear', 'log', 'mixture']
Threshold = float | jax.Array | Callable[[jax.Array], jax.Array]

_KINDS = ('hard', 'linear', 'log', 'mixture')
_SOURCE = 'Kumar et al., NeurIPS 2010; Jiang et al., Easy Samples First, ACM MM 2014'


def self_paced_weights(
  losses: jax.Array,
  threshold: float | jax.Array,
  kind: Kind = 'linear',
  *,
  easy: float = 0.5,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """v in [0, 1] from the loss and a threshold; the formulas are in the module's table.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example. >= 0.
    threshold: c > 0, in the losses' unit; kind 'log' needs c < 1.
    kind: 'hard', 'linear', 'log' or 'mixture'.
    easy: e / c of the kind 'mixture', in (0, 1): examples below e = easy * c count in full.
    base: float, same shape, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in. Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base. NaN
    for a loss that is NaN or inf.

  Raises:
    ValueError: shapes that do not match, a threshold <= 0 (or >= 1 for 'log'), an unknown kind, an
      `easy` outside (0, 1).

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.weights.self_paced_weights(jnp.array([0.0, 0.5, 1.0, 4.0]), 2.0, 'linear')
    Array([1.  , 0.75, 0.5 , 0.  ], dtype=float32)

  Provenance: reconstructed: recalled, and held to be the minimizer of the table's problem.
  """
  _check(threshold, kind, easy)
  losses, base, weights = masked.fill_in(losses, base, weights)
  example_losses, example_base = masked.example_level(losses, base)
  loss = jnp.where(example_base > 0, example_losses, 0)
  c = jnp.asarray(threshold, loss.dtype)
  if kind == 'hard':
    v = jnp.where(loss < c, 1, 0)
  elif kind == 'linear':
    v = jnp.maximum(1 - loss / c, 0)
  elif kind == 'log':
    # log(l + z) / log z with z = 1 - c, as log1p: c may be small.
    v = jnp.where(loss < c, jnp.log1p(jnp.minimum(loss, c) - c) / jnp.log1p(-c), 0)
  else:
    # k / l - k / c = e (c - l) / (l (c - e)), with e = easy * c
    v = easy / (1 - easy) * (c - loss) / jnp.maximum(loss, easy * c)
  v = jnp.clip(v, 0, 1) + 0 * loss  # NaN where the loss is not finite
  return jnp.where(base > 0, weights * masked.over_tokens(v, weights), 0)


@declare('absolute', 'example', 'reconstructed', _SOURCE)
def self_paced(threshold: Threshold, kind: Kind = 'linear', easy: float = 0.5) -> Weighting:
  """Stage of `self_paced_weights`; the threshold may be a schedule, e.g. `growing_threshold`."""
  _check(threshold, kind, easy)

  def update(weights, *, losses, base=None, step=None, **_):
    now = at_step(threshold, step, 'threshold')
    return self_paced_weights(losses, now, kind, easy=easy, base=base, weights=weights)

  return stateless(update)


def growing_threshold(
  init: float, growth: float, *, every: int = 1, limit: float = math.inf
) -> Callable[[jax.Array], jax.Array]:
  """threshold(step) = min(init * growth^floor(step / every), limit): more examples as time goes.

  Args:
    init: threshold at step 0, > 0.
    growth: factor, >= 1.
    every: optimizer steps between two increases, e.g. those of an epoch.
    limit: largest threshold.

  Returns:
    step -> float32[].

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jaxrw
    >>> c = jaxrw.weights.growing_threshold(0.5, 1.2, every=100, limit=0.7)
    >>> [round(float(c(step)), 3) for step in (0, 99, 100, 1000)]
    [0.5, 0.5, 0.6, 0.7]

  Provenance: reconstructed (factors of 1.1 to 1.3 an epoch are usual, as recalled).
  """
  check_positive(init=init, every=every, limit=limit)
  if growth < 1:
    raise ValueError(f'growth={growth} must be at least 1')

  def threshold(step):
    times = jnp.floor_divide(step, every).astype(jnp.float32)
    # In logarithms: a power would overflow to inf in long runs, and inf * 0 is NaN.
    return jnp.minimum(jnp.exp(jnp.log(init) + times * jnp.log(growth)), limit)

  return threshold


def _check(threshold: Threshold, kind: str, easy: float) -> None:
  check_positive(threshold=threshold)
  if kind not in _KINDS:
    raise ValueError(f'kind={kind!r} must be one of {", ".join(map(repr, _KINDS))}')
  if kind == 'log' and isinstance(threshold, (int, float)) and not threshold < 1:
    raise ValueError(f"threshold={threshold} must be below 1 for kind='log'")
  if not 0 < easy < 1:
    raise ValueError(f'easy={easy} must be in (0, 1)')
