"""Mixtures known before training: temperature sampling, Cooldown, UniMax, fixed and uniform.

Domains of sizes n_g are flattened by a temperature:

  p_g(tau) = n_g^(1/tau) / sum_j n_j^(1/tau)    tau = 1: proportional to size; inf: uniform

Either the domains are drawn with p(tau), or they are drawn with p(1) and an example of domain g
gets the loss weight p_g(tau) / p_g(1). The expected gradient is the same (theorem 1 of the Cooldown
paper); its noise is not. With G_g the mean squared norm of one example's gradient in domain g,

  weighting: E|g|^2 = sum_g p_g(tau)^2 / p_g(1) G_g      sampling: E|g|^2 = sum_g p_g(tau) G_g

Where we differ from the paper: its theorem 2 says that weighting never has the smaller variance,
but the proof takes G_g as equal for all domains. Then the ratio of the two is
F(tau) = sum_g p_g(tau)^2 / p_g(1) >= 1, which never falls for tau >= 1 (theorem 3). In general the
order can turn around: for n = (1000, 100, 10), tau = 5, G = (100, 1, 0.01) weighting has 28.1,
sampling 49.6. `second_moment_ratio` tells which case a run is in.

A flat mixture repeats small domains until they overfit. Cooldown therefore samples with a high
temperature first and proportionally afterwards; UniMax caps the number of epochs instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import at_step, check_positive, declare
from jaxrw.mixtures._simplex import (
  Vector,
  check_domains,
  check_drawn,
  normalized,
  on_simplex,
  sizes_of,
)
from jaxrw.mixtures.core import Mixture, Mode, check_mode

Schedule = Callable[[jax.Array], jax.Array]

_COOLDOWN = (
  'Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets, NAACL 2025 '
  '(arXiv 2410.04579)'
)


def temperature_probs(counts: Vector, tau: float | jax.Array) -> jax.Array:
  """p_g = n_g^(1/tau) / sum_j n_j^(1/tau), as the softmax of log n_g / tau.

  Args:
    counts: float[G], sizes n_g >= 0 of the domains, in any unit (examples, tokens).
    tau: float[], temperature > 0. 1 is proportional; inf is uniform over the domains that are not
      empty.

  Returns:
    float32[G], sums to 1, 0 for an empty domain. NaN throughout if traced counts hold a NaN, a
    negative number or nothing but zeros.

  Raises:
    ValueError: counts that are negative, not finite, all zero or no vector; tau <= 0.

  Example:
    >>> [round(float(p), 3) for p in temperature_probs([900, 100, 0], 2.0)]
    [0.75, 0.25, 0.0]

  Source: Cooldown, NAACL 2025 (arXiv 2410.04579); the rule is older. Provenance: paper.
  """
  check_positive(tau=tau)
  counts = sizes_of(counts, 'counts')
  empty = counts == 0
  logs = jnp.log(jnp.where(empty, 1, counts))
  # Relative to the largest before the division, which may overflow for a tau near 0.
  scaled = (logs - jnp.max(jnp.where(empty, -jnp.inf, logs))) / tau
  return jax.nn.softmax(jnp.where(empty, -jnp.inf, scaled)).astype(jnp.float32)


def scalarization_weights(counts: Vector, tau: float | jax.Array) -> jax.Array:
  """w_g = p_g(tau) / p_g(1): loss weights that make proportional sampling count like p(tau).

  Their mean under p(1) is 1, so a learning rate keeps its meaning. An example of domain g gets
  `weights[g]`.

  Args:
    counts: float[G], sizes of the domains, as in `temperature_probs`.
    tau: float[], temperature > 0; 1 gives ones exactly.

  Returns:
    float32[G], 0 for an empty domain.

  Raises:
    ValueError: as `temperature_probs`.

  Example:
    >>> [round(float(w), 3) for w in scalarization_weights([900, 100, 0], 2.0)]
    [0.833, 2.5, 0.0]

  Source: Cooldown, NAACL 2025 (arXiv 2410.04579). Provenance: paper.
  """
  return masked.divide(temperature_probs(counts, tau), temperature_probs(counts, 1.0))


def cooldown(switch_step: int, tau_high: float = 5.0, tau_low: float = 1.0) -> Schedule:
  """tau(step) = tau_high before `switch_step`, tau_low from it on.

  Args:
    switch_step: first step at the low temperature. The paper switches at half of the training.
    tau_high: temperature before it; inf is uniform sampling.
    tau_low: temperature from it on; 1 is proportional sampling.

  Returns:
    step -> float32[], for `scheduled`. Runs under jit.

  Raises:
    ValueError: a temperature <= 0, a negative step.

  Example:
    >>> tau = cooldown(switch_step=100)
    >>> [float(tau(step)) for step in (0, 99, 100, 200)]
    [5.0, 5.0, 1.0, 1.0]

  Source: Cooldown, NAACL 2025 (arXiv 2410.04579). Provenance: paper.
  """
  check_positive(tau_high=tau_high, tau_low=tau_low)
  if switch_step < 0:
    raise ValueError(f'switch_step={switch_step} must be at least 0')
  return lambda step: jnp.where(step < switch_step, jnp.float32(tau_high), jnp.float32(tau_low))


def dense_cooldown(
  steps: int,
  tau_high: float = 5.0,
  tau_low: float = 1.0,
  *,
  begin: int = 0,
  shape: Literal['linear', 'cosine'] = 'linear',
) -> Schedule:
  """tau(step) = tau_high + s (tau_low - tau_high), s from 0 to 1 over `steps` steps from `begin`.

  For comparison: the paper found schedules with many changes worse than the single one of
  `cooldown`. These two shapes are not its own.

  Args:
    steps: length of the ramp, >= 1.
    tau_high: temperature up to `begin`, finite.
    tau_low: temperature from `begin + steps` on, finite. Above tau_high, the order is reversed.
    begin: step at which the ramp starts.
    shape: 'linear', or 'cosine' (flat at both ends).

  Returns:
    step -> float32[], for `scheduled`. Runs under jit.

  Raises:
    ValueError: a temperature <= 0 or infinite (`jaxrw.temperature_schedule` goes in 1 / tau, where
      inf is an ordinary start), `steps` below 1, a negative `begin`, an unknown shape.

  Example:
    >>> tau = dense_cooldown(100, begin=50)
    >>> [float(tau(step)) for step in (0, 50, 75, 100, 150, 999)]
    [5.0, 5.0, 4.0, 3.0, 1.0, 1.0]

  Provenance: ours.
  """
  check_positive(tau_high=tau_high, tau_low=tau_low)
  for name, value in (('tau_high', tau_high), ('tau_low', tau_low)):
    if math.isinf(value):
      raise ValueError(
        f'{name}={value} must be finite; jaxrw.temperature_schedule takes inf: it goes in 1 / tau'
      )
  if steps < 1 or begin < 0:
    raise ValueError(f'steps={steps} must be at least 1 and begin={begin} at least 0')
  if shape not in ('linear', 'cosine'):
    raise ValueError(f"shape={shape!r} must be 'linear' or 'cosine'")

  def tau(step):
    done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / steps, 0, 1)
    if shape == 'cosine':
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    return (1 - done) * tau_high + done * tau_low  # exact at both ends

  return tau


def unimax_probs(
  counts: Vector, budget: float | jax.Array, max_epochs: float | jax.Array
) -> jax.Array:
  """UniMax: p_g ∝ min(level, max_epochs n_g), the level such that these sum to the budget.

  That is as uniform as a cap on epochs allows: what a small domain may not take, the larger ones
  share equally. A budget above max_epochs sum(n) cannot be met; then every domain is at its cap,
  which renormalized is p(1), and each is repeated budget / sum(n) > max_epochs times.

  Args:
    counts: float[G], sizes of the domains.
    budget: float[] > 0, what the whole training consumes, in the unit of the counts.
    max_epochs: float[] > 0, how often a domain may be repeated; inf gives uniform.

  Returns:
    float32[G], sums to 1, 0 for an empty domain. Traced bad counts as in `temperature_probs`.

  Raises:
    ValueError: counts as in `temperature_probs`; a budget or max_epochs <= 0, an infinite budget.

  Example:
    >>> p = unimax_probs([100, 1000, 9000], budget=1000, max_epochs=2)
    >>> [round(float(x), 3) for x in p]
    [0.2, 0.4, 0.4]

  Source: Chung et al., UniMax, ICLR 2023 (arXiv 2304.09151). Provenance: reconstructed; the paper
    visits domains from the smallest to the largest, this takes all candidate levels at once.
  """
  check_positive(budget=budget, max_epochs=max_epochs)
  if isinstance(budget, float) and math.isinf(budget):
    raise ValueError('budget=inf must be finite: give what the training consumes')
  counts = sizes_of(counts, 'counts')
  # Floats first: budgets in tokens are often integers beyond int32.
  epochs, budget = jnp.asarray(max_epochs, jnp.float32), jnp.asarray(budget, jnp.float32)
  share = jnp.minimum(counts * epochs / budget, 1)
  # An empty domain apart, because 0 * inf epochs is NaN; what else is not above 0 shall be NaN.
  caps = jnp.where(counts > 0, share, jnp.where(counts == 0, 0, jnp.nan)).astype(jnp.float32)
  ordered = jnp.sort(caps)
  before = jnp.concatenate([jnp.zeros(1, caps.dtype), jnp.cumsum(ordered)[:-1]])
  # The level if exactly the k smallest are at their caps; the first one below cap k is right.
  levels = (1 - before) / (caps.size - jnp.arange(caps.size))
  fits = levels <= ordered
  filled = jnp.minimum(caps, jnp.where(jnp.any(fits), levels[jnp.argmax(fits)], jnp.inf))
  return filled / jnp.sum(filled)


def second_moment_ratio(
  p_new: Vector, p_old: Vector, second_moments: Vector | None = None
) -> jax.Array:
  """sum(p_new^2 / p_old G) / sum(p_new G): gradient noise of weighting over that of sampling.

  Both aim at p_new; weighting draws from p_old and weighs with p_new / p_old, sampling draws from
  p_new. Above 1 sampling is the less noisy way, below 1 weighting is.

  Args:
    p_new: float[G] on the simplex, the mixture aimed at.
    p_old: float[G] on the simplex, what weighting draws from.
    second_moments: float[G], G_g = mean squared gradient norm of single examples of domain g. Not
      checked: a NaN in a domain with p_new > 0 comes out. Default: equal ones, which gives the F of
      the paper.

  Returns:
    float32[]. inf if p_new > 0 = p_old somewhere, so that weighting has nothing to weigh; NaN if
    all second moments are 0.

  Raises:
    ValueError: a mixture off the simplex, shapes that do not match.

  Example:
    >>> proportional, flat = (temperature_probs([1000, 100, 10], tau) for tau in (1.0, 5.0))
    >>> round(float(second_moment_ratio(flat, proportional)), 3)
    5.616
    >>> round(float(second_moment_ratio(flat, proportional, [100, 1, 0.01])), 3)
    0.566

  Source: theorem 2 of Cooldown, NAACL 2025 (arXiv 2410.04579). Provenance: paper for equal second
    moments, ours for others.
  """
  p_new, p_old = on_simplex(p_new, 'p_new'), on_simplex(p_old, 'p_old')
  moments = jnp.ones(p_new.shape) if second_moments is None else jnp.asarray(second_moments)
  for name, array in (('p_old', p_old), ('second_moments', moments)):
    if array.shape != p_new.shape:
      raise ValueError(f'{name} has shape {array.shape}, p_new {p_new.shape}; they must agree')
  sampling = jnp.where(p_new == 0, 0, p_new * moments)
  ratio = p_new / jnp.where(sampling == 0, 1, p_old)  # without 0 / 0, which is NaN in gradients
  return jnp.sum(sampling * ratio) / jnp.sum(sampling)


def importance_mixture(ids: Sequence[int] | np.ndarray | jax.Array, num_domains: int) -> jax.Array:
  """p_g = share of a target set's examples whose nearest domain (cluster) is g.

  Args:
    ids: int[N], 0 .. num_domains - 1, one for each example of the target set, N >= 1.
    num_domains: G.

  Returns:
    float32[G], sums to 1. NaN throughout if a traced id is out of range.

  Raises:
    IndexError: a concrete id out of range. -1 is one, too: leave unknown domains out.
    TypeError: ids that are not integers.
    ValueError: no ids, or no vector of them; num_domains < 1.

  Example:
    >>> importance_mixture([2, 0, 2, 2], 4).tolist()
    [0.25, 0.0, 0.75, 0.0]

  Source: the importance-sampling baseline of Dynamic Gradient Alignment (arXiv 2410.02498).
    Provenance: reconstructed.
  """
  check_domains(num_domains)
  ids = ids if isinstance(ids, jax.core.Tracer) else np.asarray(ids)
  if ids.ndim != 1 or not ids.size:
    raise ValueError(f'ids has shape {ids.shape}; expected [N] with N at least 1')
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f'ids has dtype {ids.dtype}; expected integers')
  fine = (ids >= 0) & (ids < num_domains)
  if not isinstance(fine, jax.core.Tracer) and not np.all(fine):
    wrong = ids[np.argmin(fine)]
    raise IndexError(
      f'ids holds {wrong}, but ids of {num_domains} domains are 0 to '
      f'{num_domains - 1}: leave out what belongs to none'
    )
  shares = jnp.bincount(ids, length=num_domains) / ids.size
  return jnp.where(jnp.all(fine), shares, jnp.nan).astype(jnp.float32)


@declare('absolute', 'example', 'ours', 'the same for every domain')
def stratified(num_domains: int) -> Mixture:
  """p = q = 1 / G: every domain alike, the baseline that any mixture should be compared with.
  Stateless.

  Raises:
    ValueError: num_domains < 1.

  Example:
    >>> mixture = stratified(4)
    >>> mixture.proportions(mixture.init()).tolist()
    [0.25, 0.25, 0.25, 0.25]
  """
  check_domains(num_domains)
  return fixed(np.ones(num_domains))


@declare('absolute', 'example', 'ours', 'importance weights')
def fixed(proportions: Vector, objective: Vector | None = None) -> Mixture:
  """Given mixtures, the same at every step. Stateless.

  Args:
    proportions: float[G], q, non-negative; normalized here.
    objective: float[G], p, non-negative; normalized here. Default: the proportions, so that all
      weights are 1.

  Raises:
    ValueError: values that are negative, not finite or all zero; shapes that do not match; an
      objective > 0 in a domain that is never drawn.

  Example:
    >>> mixture = fixed(unimax_probs([100, 1000, 9000], budget=1000, max_epochs=2))
    >>> [round(float(q), 3) for q in mixture.proportions(mixture.init())]
    [0.2, 0.4, 0.4]
  """
  q = normalized(proportions, 'proportions')
  p = q if objective is None else normalized(objective, 'objective')
  check_drawn(q, p, 'proportions', 'objective')
  return Mixture(
    init=lambda: (),
    update=lambda state, **_: state,
    proportions=lambda state: jnp.asarray(q),
    objective=lambda state: jnp.asarray(p),
  )


@declare('absolute', 'example', 'paper', _COOLDOWN)
def scheduled(
  counts: Vector,
  tau: float | Schedule = 1.0,
  *,
  mode: Mode = 'sample',
  sampled: Vector | None = None,
) -> Mixture:
  """`temperature_probs(counts, tau(step))`, drawn or weighed. State: it, float32[G].

  `init` gives the mixture of step 0 and `update` that of the `step` it is told, whatever the state
  was before; so tell it the step whose batch is to be drawn or weighed next.

  Args:
    counts: float[G], sizes of the domains.
    tau: temperature > 0, or a function of the step such as `cooldown`.
    mode: 'sample' draws with p(tau), all weights 1; 'weigh' draws with `sampled` and weighs with
      p(tau) / sampled.
    sampled: float[G], q of mode 'weigh', non-negative; normalized here. Default: p(1),
      proportional.

  Raises:
    ValueError: counts as in `temperature_probs`; tau <= 0; an unknown mode; `sampled` in mode
      'sample', of the wrong shape, or 0 in a domain that is not empty.
    TypeError: `update` without `step` when tau is a function of it.

  Example:
    >>> mixture = scheduled([900, 100], cooldown(switch_step=10, tau_high=2.0))
    >>> state = mixture.update(mixture.init(), step=9)
    >>> [round(float(q), 3) for q in mixture.proportions(state)]
    [0.75, 0.25]
    >>> [round(float(q), 3) for q in mixture.proportions(mixture.update(state, step=10))]
    [0.9, 0.1]
  """
  check_mode(mode)
  if mode == 'sample' and sampled is not None:
    raise ValueError("sampled is what mode='weigh' draws with: set that mode or leave it out")
  check_positive(tau=tau)
  sizes = sizes_of(counts, 'counts')
  q = normalized(sizes if sampled is None else sampled, 'sampled')
  check_drawn(q, sizes, 'sampled', 'counts')

  def update(state, *, step=None, **_):
    return temperature_probs(sizes, at_step(tau, step, 'tau'))

  return Mixture(
    init=lambda: update(None, step=0),
    update=update,
    proportions=lambda p: p if mode == 'sample' else jnp.asarray(q),
    objective=lambda p: p,
  )
