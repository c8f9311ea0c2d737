"""Aioli: measure during the run how each domain lowers the losses of all, and sample accordingly.

A round of `round_steps` steps begins with bursts. Burst after burst the batches come mostly from
one domain, and held-out losses before and after it say what that did:

  drops[i, j] = loss_i before a burst of domain j - loss_i after it      mean over a round's sweeps
  drops[i]    = mixtures @ A[i]     what a burst's mixture does is the sum of what its domains do
  A          <- (A - min(A, 0)) / sum                                           `interactions`
  alpha_j    <- alpha_j exp(rate * sum_i A[i, j]) / Z                   the rest of the round

Bursts are ordinary training steps, so the schedule costs no steps; it costs the evaluations.

When things happen, with `first = max(warmup_steps, lag)`: round r has the batches from
first + r round_steps on. Its burst k has burst_steps of them, and its evaluation is that after the
step of the last one. What precedes the first burst is compared with the evaluation after step
first + r round_steps - 1. The batch of step t is drawn by proportions read after the update of step
t - lag, the first `lag` batches by those of `init()`; bursts are in the right place because the
mixture knows `lag`. The new alpha exists after the last burst's evaluation, so it is in force from
the lag-th batch after that; the lag - 1 batches before it have the old one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw.core import at_step, declare
from jaxrw.mixtures._moves import (
  Rate,
  check_rate,
  check_share,
  choose,
  log_shares,
  log_step,
  signal,
  starting,
)
from jaxrw.mixtures._simplex import Vector, check_domains
from jaxrw.mixtures.core import Mixture

_AIOLI = 'Chen et al., Aioli, ICLR 2025 (arXiv 2411.05735)'
_LARGEST_CONDITION = 1e6  # beyond it float32 has no digit of the answer left


class AioliState(NamedTuple):
  """Of `aioli`."""

  log_weights: jax.Array  # float32[G], log alpha
  interactions: jax.Array  # float32[G, G], the last normalized A, averaged with ema; at first 0
  losses: jax.Array  # float32[G], of the last evaluation used
  drops: jax.Array  # float32[G, G], sums over the round's sweeps so far
  step: jax.Array  # int32[], of the last update; at first -1


def smoothed_one_hot(num_domains: int, share: float | jax.Array) -> jax.Array:
  """The bursts' mixtures: `share` on the diagonal, (1 - share) / (G - 1) elsewhere.

  Args:
    num_domains: G. Of a single domain the mixture is [[1]], whatever the share.
    share: in [0, 1]. 1 gives the identity; at 1 / G all rows are alike.

  Returns:
    float32[G, G], rows and columns sum to 1.

  Raises:
    ValueError: a share outside [0, 1], num_domains < 1.

  Example:
    >>> smoothed_one_hot(3, 0.5).tolist()
    [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]

  Source: Chen et al., Aioli, ICLR 2025 (arXiv 2411.05735). Provenance: official_code.
  """
  check_domains(num_domains)
  check_share(share, 'share')
  if num_domains == 1:
    return jnp.ones((1, 1), jnp.float32)
  others = (1 - share) / (num_domains - 1)
  return jnp.where(jnp.eye(num_domains, dtype=bool), share, others).astype(jnp.float32)


def solve_interactions(drops: jax.Array, mixtures: jax.Array) -> jax.Array:
  """A with mixtures @ A[i] = drops[i]: what one domain alone would do, from bursts that mix them.

  Args:
    drops: float[G, G], how much the loss of domain i fell in the burst on mixture j.
    mixtures: float[G, G], row j is the mixture of burst j.

  Returns:
    float32[G, G], A[i, j]: how much the loss of i falls if j alone is trained on. NaN or inf, or
    nothing but rounding, if traced mixtures are singular, as for `smoothed_one_hot(G, 1 / G)`.

  Raises:
    ValueError: concrete mixtures that are singular, shapes other than [G, G].

  Example:
    >>> import jax.numpy as jnp
    >>> A = solve_interactions(jnp.array([[0.75, 0.25], [1.5, 0.5]]), smoothed_one_hot(2, 0.75))
    >>> [[round(abs(float(x)), 3) for x in row] for row in A]
    [[1.0, 0.0], [2.0, 0.0]]

  Source: Chen et al., Aioli, ICLR 2025 (arXiv 2411.05735). Provenance: official_code.
  """
  _check_square(drops, 'drops')
  _check_square(mixtures, 'mixtures')
  if drops.shape != mixtures.shape:
    raise ValueError(f'drops has shape {drops.shape}, mixtures {mixtures.shape}; they must agree')
  if not isinstance(mixtures, jax.core.Tracer):
    condition = np.linalg.cond(np.asarray(mixtures, np.float64))
    if not condition < _LARGEST_CONDITION:
      raise ValueError(
        f'mixtures is singular (condition {condition:.3g}): bursts on mixtures that hardly differ '
        'do not tell domains apart; raise the share'
      )
  drops, mixtures = jnp.asarray(drops, jnp.float32), jnp.asarray(mixtures, jnp.float32)
  return jnp.linalg.solve(mixtures, drops.T).T


def normalize_interactions(interactions: jax.Array) -> jax.Array:
  """A, shifted to a minimum of 0 if one is negative, divided by its sum.

  The shift is the same for all columns and so changes no preference; the division makes `rate` free
  of the losses' unit, and of how much there is left to learn.

  Args:
    interactions: float[G, G].

  Returns:
    float32[G, G], >= 0, sums to 1; 1 / G^2 everywhere if all entries are equal. A NaN or inf makes
    it NaN.

  Raises:
    ValueError: a shape other than [G, G].

  Example:
    >>> import jax.numpy as jnp
    >>> normalize_interactions(jnp.array([[0.5, -0.25], [0.25, 0.0]])).tolist()
    [[0.5, 0.0], [0.3333333432674408, 0.1666666716337204]]

  Source: Chen et al., Aioli, ICLR 2025 (arXiv 2411.05735). Provenance: official_code, which divides
  by 0 for equal entries.
  """
  _check_square(interactions, 'interactions')
  interactions = jnp.asarray(interactions, jnp.float32)
  shifted = interactions - jnp.minimum(jnp.min(interactions), 0)
  total = jnp.sum(shifted)
  flat = total == 0
  return jnp.where(flat, 1 / shifted.size, shifted / jnp.where(flat, 1, total))


def aioli_measures(
  step: Any,
  num_domains: int,
  *,
  round_steps: int,
  rounds_of_bursts: int,
  burst_steps: int,
  lag: int = 1,
  warmup_steps: int = 0,
) -> Any:
  """Whether `aioli` uses the held-out losses after step `step`, so that a loop evaluates only then.

  That is 1 + G rounds_of_bursts times in a round: before its bursts and at the end of each.

  Args:
    step: int, or an array of them.
    num_domains, round_steps, rounds_of_bursts, burst_steps, lag, warmup_steps: as in `aioli`.

  Returns:
    bool for an int, else an array of bool.

  Raises:
    ValueError: as `aioli`.

  Example:
    >>> schedule = dict(round_steps=12, rounds_of_bursts=1, burst_steps=3)
    >>> [step for step in range(24) if aioli_measures(step, 2, **schedule)]
    [0, 3, 6, 12, 15, 18]

  Provenance: ours.
  """
  first, length = _schedule(
    num_domains, round_steps, rounds_of_bursts, burst_steps, lag, warmup_steps
  )
  return _evaluated(step + 1 - first, round_steps, burst_steps, length)


@declare('absolute', 'example', 'official_code', _AIOLI)
def aioli(
  num_domains: int,
  rate: Rate,
  *,
  round_steps: int,
  rounds_of_bursts: int,
  burst_steps: int,
  share: float,
  ema: float | None = None,
  lag: int = 1,
  diagonal: bool = False,
  warmup_steps: int = 0,
  seed: int = 0,
  start: Vector | None = None,
) -> Mixture:
  """Aioli: bursts that measure, then exponentiated steps along the column sums of A.

    ema=None:  alpha <- alpha exp(rate * sum_i A[i]) / Z             mirror descent, the paper's
    ema=g:     M     <- (1 - g) A + g M, in the first round A
               alpha <- exp(rate * sum_i M[i]) / Z                   from uniform in every round

  The two agree in the first round only. With `ema` no share can pass e^rate / (e^rate + G - 1), so
  the published settings, all with `ema`, stay near uniform. Neutral, but for the bursts, at rate 0.

  A round's bursts are `rounds_of_bursts` sweeps, each through all domains in an order of its own:
  permutations from fold_in(key(seed), round). The module says when each step happens.

  The update needs the signal `domain_eval_losses`, float[G]: the held-out loss of each domain after
  step `step`, on the same examples each time. It is used where `aioli_measures` says so; at other
  steps any values will do. If one used is NaN or inf, so are its round's drops, and the round ends
  with alpha and A as they were; the next one measures afresh.

  It acts through sampling only: `objective` is `proportions`, bursts included, hence loss weights
  are 1 if both are read at the same time.

  Args:
    num_domains: G.
    rate: no unit, since A sums to 1; or a schedule, read at the step that ends the bursts. The
      official scripts take 0.1 to 1.
    round_steps: length of a round, at least G rounds_of_bursts burst_steps + lag, so that the new
      alpha draws a batch.
    rounds_of_bursts: sweeps through the domains in a round; 2 to 6 in the official scripts.
    burst_steps: steps in a burst; 4 to 10 there.
    share: of a burst's own domain, above 1 / G, at most 1; .5 to .75 there. The others get equal
      parts of the rest, which `solve_interactions` takes out.
    ema: in [0, 1], how much of the last M stays, or None for no average. 0 keeps nothing, but is
      still not None: nothing accumulates in alpha.
    lag: steps from the update after which proportions are read to the batch that they draw, >= 1.
    diagonal: take A = diag(drops) / share: what a domain does for itself.
    warmup_steps: steps on `start` before the first round; less than `lag` counts as `lag`.
    seed: of the permutations.
    start: float[G], the first alpha, non-negative; normalized here. Default: uniform. The official
      code forgets it when the rounds begin, here `ema=None` continues from it: a share of 0 stays
      0, though bursts draw from that domain, too.

  Returns:
    A `Mixture` with an `AioliState`.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> schedule = dict(round_steps=20, rounds_of_bursts=2, burst_steps=2)
    >>> mixture = aioli(2, rate=1.0, **schedule, share=0.75)
    >>> update, proportions = jax.jit(mixture.update), jax.jit(mixture.proportions)
    >>> state, losses = mixture.init(), jnp.array([3.0, 3.0])
    >>> effect = jnp.array([[0.04, 0.0], [0.02, 0.02]])  # domain 0 helps 1 as much as itself
    >>> for step in range(20):
    ...   losses = losses - effect @ proportions(state)
    ...   state = update(state, step=step, domain_eval_losses=losses)
    >>> [round(float(x), 2) for x in proportions(state)]
    [0.62, 0.38]

  Source: Chen et al., Aioli, ICLR 2025 (arXiv 2411.05735). Provenance: official_code; its
  accumulation without ema is the paper's as we know it from others' notes. Ours: `lag`, equal
  entries of A, signals that are not finite, `start` with ema=None, `diagonal` at share 1 (where the
  official code ignores it).
  """
  check_rate(rate)
  first, length = _schedule(
    num_domains, round_steps, rounds_of_bursts, burst_steps, lag, warmup_steps
  )
  if num_domains > 1 and not 1 < share * num_domains <= num_domains:
    raise ValueError(
      f'share={share} must be above 1 / num_domains = {1 / num_domains:.4g}, where all bursts are '
      'the same, and at most 1'
    )
  if ema is not None:
    check_share(ema, 'ema')
  initial = starting(start, num_domains)
  mixtures = smoothed_one_hot(num_domains, share)

  def burst_domain(round_index, burst):
    """The domain of a burst of a round."""
    key = jax.random.fold_in(jax.random.key(seed), jnp.maximum(round_index, 0))
    # The order of random numbers, row by row: permutations that are independent.
    order = jnp.argsort(jax.random.bits(key, (rounds_of_bursts, num_domains)), axis=1).ravel()
    return order[jnp.clip(burst, 0, order.size - 1)]

  def init():
    size = (num_domains, num_domains)
    return AioliState(
      log_shares(initial),
      jnp.zeros(size, jnp.float32),
      jnp.zeros(num_domains, jnp.float32),
      jnp.zeros(size, jnp.float32),
      jnp.array(-1, jnp.int32),
    )

  def end_of_bursts(state):
    mean = state.drops / rounds_of_bursts
    if diagonal:
      measured = jnp.diag(jnp.diag(mean) / mixtures[0, 0])
    else:
      measured = solve_interactions(mean, mixtures)
    measured = normalize_interactions(measured)
    origin = state.log_weights
    if ema is not None:
      origin = jnp.full(num_domains, -np.log(num_domains), jnp.float32)
      known = jnp.any(state.interactions > 0)  # what is normalized sums to 1
      measured = jnp.where(known, (1 - ema) * measured + ema * state.interactions, measured)
    now = at_step(rate, state.step, 'rate')
    log_weights = log_step(origin, jnp.sum(measured, axis=0), now, 0.0)
    new = state._replace(log_weights=log_weights, interactions=measured)
    return choose(jnp.all(jnp.isfinite(measured)), new, state)

  def update(state, *, step, domain_eval_losses, **_):
    losses = signal(domain_eval_losses, num_domains, 'domain_eval_losses')
    done = jnp.asarray(step, jnp.int32) + 1 - first
    position = done % round_steps
    used = _evaluated(done, round_steps, burst_steps, length)
    begins = used & (position == 0)
    domain = burst_domain(done // round_steps, position // burst_steps - 1)
    column = used & (jnp.arange(num_domains) == domain)
    drops = state.drops + jnp.where(column, (state.losses - losses)[:, None], 0)
    state = state._replace(
      losses=jnp.where(used, losses, state.losses),
      drops=jnp.where(begins, 0, drops),
      step=jnp.asarray(step, jnp.int32),
    )
    ends = used & (position == length)
    return jax.lax.cond(ends, end_of_bursts, _unchanged, state)

  def proportions(state):
    done = state.step + lag - first
    position = done % round_steps
    row = mixtures[burst_domain(done // round_steps, position // burst_steps)]
    return jnp.where((done >= 0) & (position < length), row, jnp.exp(state.log_weights))

  return Mixture(init, update, proportions, proportions)


def _schedule(num_domains, round_steps, rounds_of_bursts, burst_steps, lag, warmup_steps):
  """(first step of the first round, steps of a round's bursts), checked."""
  check_domains(num_domains)
  for name, value, least in (
    ('rounds_of_bursts', rounds_of_bursts, 1),
    ('burst_steps', burst_steps, 1),
    ('lag', lag, 1),
    ('warmup_steps', warmup_steps, 0),
  ):
    if value < least:
      raise ValueError(f'{name}={value} must be at least {least}')
  length = num_domains * rounds_of_bursts * burst_steps
  if round_steps < length + lag:
    raise ValueError(
      f'round_steps={round_steps} must be at least {length + lag}: {length} steps of bursts, and '
      f'lag={lag} for a batch of the new mixture'
    )
  return max(warmup_steps, lag), length


def _evaluated(done, round_steps, burst_steps, length):
  """Whether the losses are used once `done` steps of the rounds are done."""
  position = done % round_steps
  return (done >= 0) & (position <= length) & (position % burst_steps == 0)


def _unchanged(state):
  return state


def _check_square(matrix, name: str) -> None:
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
    raise ValueError(f'{name} has shape {matrix.shape}; expected [G, G]')
