"""Dynamic loss-based weights (Sow et al., ICLR 2025) and KL-DRO, which they start from.

At every step the losses of the current batch become weights, without gradient through them:

  h_i = ((l_i - min) - (max - l_i)) / (max - min)    in [-1, 1]
  w_i = exp(f(h_i) / r) / Z                          Z such that sum(base * w) = sum(base)

  | name      | f(h)          | effect                                                     |
  |-----------|---------------|------------------------------------------------------------|
  | linupper  | min(h + 1, 1) | pushes down losses below mid-range, treats the rest alike  |
  | quadratic | 1 - h^2       | favors mid-range losses, drops both ends                   |
  | extremes  | abs(h)        | favors both ends (the paper's negative control)            |
  | upper     | (h + 1) / 2   | favors high losses without a cap                           |
  | kl_dro    | l_i, not h_i  | the distributionally robust weights that start the line    |

The temperature r says how sharp: inf gives uniform weights exactly, small values a hard selection.
The weights are multipliers of base-mean 1, so a learning rate keeps its meaning; divide by the
number of examples for the paper's "weights sum to one".

Where the official code differs, on purpose: h is computed in the stable form above (the official
one subtracts two numbers of size l / 1e-6 when the losses are nearly equal); `uniform` is uniform
(the published snippet's entry of that name is softmax(h / r), the sharpest choice of all); with
token counts as base the weights are normalized over all devices at once (the official ragged-length
path depends on where examples are placed).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, check_positive, declare, stateless
from jaxrw.weights._tilt import Nonfinite, prepare, tilt

Temperature = float | jax.Array | Callable[[jax.Array], jax.Array]

_PAPER = 'Sow et al., Dynamic Loss-Based Sample Reweighting, ICLR 2025 (arXiv 2502.06733)'
_SMALLEST_RANGE = 1e-6  # a narrower spread of losses is scaled as if it were this wide (official)


@declare('normalized', 'entry', 'paper', 'the ordinary mean')
def uniform() -> Weighting:
  """The ordinary mean: weights pass unchanged, bit for bit."""
  return stateless(lambda weights, **_: weights, lambda *, losses, **_: _no_tilt(losses))


def linupper_weights(
  losses: jax.Array,
  temperature: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  nonfinite: Nonfinite = 'propagate',
) -> jax.Array:
  """LinUpper: w ∝ exp(min(h + 1, 1) / r). Pushes down low losses; flat above mid-range.

  Helps when part of the data is already learned; an outlier cannot take over, but it does set the
  range. max w / min w = exp(1 / r) unless all losses are equal, which gives uniform weights.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    temperature: r > 0; inf gives uniform weights. No unit: h spans 2 whatever the losses' scale.
    base: float, same shape: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.
    nonfinite: 'propagate' turns a NaN or inf among the losses into NaN weights; 'mask' gives that
      example weight 0 (its gradient is 0 only if the NaN arose after the differentiated part).

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base. All 0
    if the examples whose incoming weight is not 0 all lie so far below the others that exp
    underflows (r < 0.012).

  Raises:
    ValueError: shapes that do not match, a temperature <= 0, an unknown `nonfinite`.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.linupper_weights(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), temperature=0.4)
    >>> [round(float(x), 3) for x in w]
    [0.122, 0.425, 1.484, 1.484, 1.484]

  Source: Sow et al., ICLR 2025.
  """
  return _from_range(
    lambda h, top: jnp.minimum(h, 0), losses, temperature, base, weights, nonfinite
  )


def quadratic_weights(
  losses: jax.Array,
  temperature: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  nonfinite: Nonfinite = 'propagate',
) -> jax.Array:
  """Quadratic: w ∝ exp((1 - h^2) / r). Favors mid-range losses. Arguments as in `linupper_weights`.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.quadratic_weights(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), temperature=0.4)
    >>> [round(float(x), 3) for x in w]
    [0.184, 1.198, 2.237, 1.198, 0.184]

  Source: Sow et al., ICLR 2025.
  """
  return _from_range(
    lambda h, top: -h * h, losses, temperature, base, weights, nonfinite, shift=True
  )


def extremes_weights(
  losses: jax.Array,
  temperature: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  nonfinite: Nonfinite = 'propagate',
) -> jax.Array:
  """Extremes: w ∝ exp(|h| / r). Favors both ends; the paper's negative control. Arguments as
  `linupper_weights`.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.extremes_weights(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), temperature=0.4)
    >>> [round(float(x), 3) for x in w]
    [1.883, 0.54, 0.155, 0.54, 1.883]

  Source: Sow et al., ICLR 2025.
  """
  return _from_range(lambda h, top: jnp.abs(h) - top, losses, temperature, base, weights, nonfinite)


def upper_weights(
  losses: jax.Array,
  temperature: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  nonfinite: Nonfinite = 'propagate',
) -> jax.Array:
  """Upper: w ∝ exp((h + 1) / (2 r)). Favors high losses without a cap. Arguments as in
  `linupper_weights`.

  The GPT-2 branch of the official code has it under this name; the paper's own `upper` in the
  large-model branch is LinUpper.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.upper_weights(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), temperature=1.0)
    >>> [round(float(x), 3) for x in w]
    [0.57, 0.732, 0.94, 1.207, 1.55]

  Source: official code of Sow et al., ICLR 2025.
  """
  return _from_range(lambda h, top: (h - top) / 2, losses, temperature, base, weights, nonfinite)


def kl_dro_weights(
  losses: jax.Array,
  temperature: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  nonfinite: Nonfinite = 'propagate',
) -> jax.Array:
  """KL-DRO: w ∝ exp(l / r), the inner maximizer of sum(q l) - r KL(q || base). Outliers can take
  over.

  Unlike the others it depends on the scale of the losses: the temperature is in the losses' unit
  (nats). Other arguments as in `linupper_weights`.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.kl_dro_weights(jnp.array([1.0, 2.0, 3.0]), temperature=1.0)
    >>> [round(float(x), 3) for x in w]
    [0.27, 0.734, 1.996]

  Source: Sow et al., ICLR 2025, and its predecessor (arXiv 2402.14270); equals TERM with t = 1 / r.
  """
  example_losses, valid, base, weights = prepare(losses, base, weights, nonfinite)
  return tilt(example_losses, temperature, valid, base, weights, shift=True)


def _from_range(
  score: Callable[[jax.Array, jax.Array], jax.Array],
  losses: jax.Array,
  temperature: float | jax.Array,
  base: jax.Array | None,
  weights: jax.Array | None,
  nonfinite: Nonfinite,
  shift: bool = False,
) -> jax.Array:
  """Weights from the normalized losses h.

  `score(h, top)` is f(h) up to a constant, at most 0 and equal to 0 somewhere, where `top` is the
  largest h (1, or less when the range is below the smallest): then exp cannot overflow, and Z
  cannot underflow, without a further reduction over the batch. `shift` pays for that reduction
  where the largest f(h) is not known beforehand (see `tilt`).
  """
  example_losses, valid, base, weights = prepare(losses, base, weights, nonfinite)
  low, high = masked.min_max(example_losses, valid)
  spread = jnp.maximum(high - low, _SMALLEST_RANGE)
  # Differences of close floats are exact, a mid-range of close floats is not.
  h = ((example_losses - low) - (high - example_losses)) / spread
  scores = score(h, (high - low) / spread)
  return tilt(scores, temperature, valid, base, weights, shift)


def _weighting(
  function: Callable[..., jax.Array],
  temperature: Temperature,
  nonfinite: Nonfinite,
  log_weights: Callable[..., jax.Array] | None = None,
) -> Weighting:
  """The stage of a plain weight function; the temperature may follow the step."""
  check_positive(temperature=temperature)

  def update(weights, *, losses, base=None, step=None, **_):
    r = at_step(temperature, step, 'temperature')
    return function(losses, r, base=base, weights=weights, nonfinite=nonfinite)

  return stateless(update, log_weights)


@declare('normalized', 'example', 'paper', _PAPER)
def linupper(temperature: Temperature = 1.0, nonfinite: Nonfinite = 'propagate') -> Weighting:
  """Stage of `linupper_weights`; the temperature may be a schedule, a function of the step."""
  return _weighting(linupper_weights, temperature, nonfinite)


@declare('normalized', 'example', 'paper', _PAPER)
def quadratic(temperature: Temperature = 1.0, nonfinite: Nonfinite = 'propagate') -> Weighting:
  """Stage of `quadratic_weights`; the temperature may be a schedule, a function of the step."""
  return _weighting(quadratic_weights, temperature, nonfinite)


@declare('normalized', 'example', 'paper', _PAPER)
def extremes(temperature: Temperature = 1.0, nonfinite: Nonfinite = 'propagate') -> Weighting:
  """Stage of `extremes_weights`; the temperature may be a schedule, a function of the step."""
  return _weighting(extremes_weights, temperature, nonfinite)


@declare('normalized', 'example', 'official_code', _PAPER)
def upper(temperature: Temperature = 1.0, nonfinite: Nonfinite = 'propagate') -> Weighting:
  """Stage of `upper_weights`; the temperature may be a schedule, a function of the step."""
  return _weighting(upper_weights, temperature, nonfinite)


@declare('normalized', 'example', 'paper', _PAPER)
def kl_dro(temperature: Temperature = 1.0, nonfinite: Nonfinite = 'propagate') -> Weighting:
  """Stage of `kl_dro_weights`; the temperature may be a schedule, a function of the step. Of the
  softmax type: one pass over microbatches gives its exact global gradient."""

  def log_weights(*, losses, base=None, step=None, **_):
    scores, valid, *_ = prepare(losses, base, None, nonfinite)
    r = jnp.asarray(at_step(temperature, step, 'temperature'), scores.dtype)
    return jnp.where(valid, scores / r, -jnp.inf)

  return _weighting(kl_dro_weights, temperature, nonfinite, log_weights)


@declare('normalized', 'example', 'ours', _PAPER)
def linupper_stale(temperature: Temperature = 1.0) -> Weighting:
  """LinUpper with the range (min, max) of the losses of the step before: h is clipped to [-1, 1].

  Then a weight, up to the normalizer, depends on its own loss only, so that one pass over
  microbatches gives the exact global gradient of these weights (`make_train_step` with scope
  'online'); plain LinUpper needs all losses first, one more forward pass. The first step, without a
  range, is uniform. State: the range, float32[2].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> rw = jaxrw.linupper_stale(0.4)
    >>> losses = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    >>> w, state = rw.update(jnp.ones(5), rw.init(), losses=losses)
    >>> w, state = rw.update(jnp.ones(5), state, losses=losses - 1)
    >>> [round(float(x), 3) for x in w], [float(x) for x in state]
    ([0.167, 0.167, 0.585, 2.04, 2.04], [0.0, 4.0])
  """
  check_positive(temperature=temperature)

  def scores_of(losses, base, state):
    example_losses, valid, base, _ = prepare(losses, base, None, 'propagate')
    low, high = state
    spread = jnp.maximum(high - low, _SMALLEST_RANGE)
    h = ((example_losses - low) - (high - example_losses)) / spread
    h = jnp.where(low <= high, jnp.clip(h, -1, 1), example_losses * 0)  # * 0 keeps a NaN
    return jnp.minimum(h, 0), example_losses, valid

  def log_weights(state, *, losses, base=None, step=None, **_):
    scores, _, valid = scores_of(losses, base, state)
    r = jnp.asarray(at_step(temperature, step, 'temperature'), scores.dtype)
    return jnp.where(valid, scores / r, -jnp.inf)

  def update(weights, state, *, losses, base=None, step=None, **_):
    scores, example_losses, valid = scores_of(losses, base, state)
    base = jnp.ones_like(weights) if base is None else base
    r = at_step(temperature, step, 'temperature')
    weights = tilt(scores, r, valid, base, weights, shift=True)
    seen = jnp.stack(masked.min_max(example_losses, valid)).astype(jnp.float32)
    # A broken or empty batch must not spoil the range of the steps to come.
    return weights, jnp.where(jnp.all(jnp.isfinite(seen)) & jnp.any(valid), seen, state)

  return Weighting(lambda: jnp.array([jnp.inf, -jnp.inf], jnp.float32), update, log_weights)


def _no_tilt(losses: jax.Array) -> jax.Array:
  return jnp.zeros(losses.shape[:1], jnp.float32)
