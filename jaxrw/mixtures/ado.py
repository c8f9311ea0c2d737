"""Adaptive Data Optimization: sample the domains whose losses are predicted to fall fastest.

While the model trains, a power law is fitted to the training losses of each domain, every
`fit_every` steps; the slope of that law is what one more example is expected to be worth. One run,
no reference model, no proxy.

The history behind the fits is bounded however long the run is. A point is the mean of the losses
over a block of steps; when `capacity` points are there, neighbours are merged and blocks become
twice as long, so the points always cover the whole run. The official code smooths the curve by a
Savitzky-Golay filter over 101 steps and keeps every 10th, with memory that grows with the run.

Everything is in the state, history included: a run restored from a checkpoint of it goes on bit for
bit. (The released code saves none of it, and starts over from the prior.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrw import masked
from jaxrw.core import check_positive, declare
from jaxrw.mixtures._minimize import minimize
from jaxrw.mixtures._moves import acting, check_share, choose, signal, starting
from jaxrw.mixtures._simplex import Vector, check_drawn
from jaxrw.mixtures.core import Mixture, Mode

_PAPER = 'Jiang et al., Adaptive Data Optimization, ICLR 2025 (arXiv 2410.11820)'
_FEWEST_POINTS = 30  # fewer do not determine three parameters under noise


class PowerLaw(NamedTuple):
  """L(n) = exp(log_floor) + exp(log_scale) n^(-exponent)."""

  log_scale: jax.Array | float
  exponent: jax.Array | float
  log_floor: jax.Array | float


WALLS = (PowerLaw(-np.inf, 0.001, 0.5), PowerLaw(6.5, 0.8, np.inf))  # official: lowest, highest
EXPONENTS = tuple(np.linspace(0.05, 0.75, 8).tolist())


def fit_power_law(
  examples: jax.Array,
  losses: jax.Array,
  mask: jax.Array | None = None,
  *,
  grid: Sequence[float] = EXPONENTS,
  walls: tuple[PowerLaw, PowerLaw] | None = WALLS,
  huber_delta: float = 1e-3,
  max_iterations: int = 50,
) -> tuple[PowerLaw, jax.Array]:
  """Fits a power law to a learning curve, robustly and in relative error.

    min  sum_t huber(log L_t - log Lhat(n_t))  +  how far the parameters are beyond the walls

  by L-BFGS from several starts: for each exponent of the grid, the floor and scale that are best in
  least squares. On 40 noisy curves, 8 such starts with 50 iterations came within 1.2e-4 of
  the best objective that SciPy's Nelder-Mead found, half of them within 1e-6, and took 0.1 to 0.3 s
  for 8 curves of 256 points on two CPU cores. The official code takes 200 iterations from 512 fixed
  starts; 64 of those took 9 to 21 s for 8 curves of 512 points.

  A wall has slope 1, against a sum of residuals times `huber_delta`: in effect a hard limit. The
  defaults are the official ones, for a loss in nats of text, at most 0.8 for the exponent and at
  least 0.5 for log_floor. *That is a floor of 1.65: losses that get near or below it need other
  walls.*

  Differentiation through the fit is not supported. Write for one curve, `jax.vmap` for more.

  Args:
    examples: float or int[T], n, how many were seen when the loss was measured. Points with n <= 0
      are left out.
    losses: float[T], > 0.
    mask: bool[T], the points that count. Default: all. Three or more are needed to say anything.
    grid: exponents to start from.
    walls: (lowest, highest) parameters, infinite ones for no limit; None for no walls at all.
    huber_delta: > 0, relative error from which on residuals count linearly.
    max_iterations: of L-BFGS.

  Returns:
    (law, value), float32 (float64 for float64 losses). The law is NaN if no start ended with a
    finite value, as for a loss that is NaN or <= 0.

  Raises:
    ValueError: shapes that differ, an empty grid, a limit that is not positive.

  Example:
    >>> import jax.numpy as jnp
    >>> n = jnp.linspace(1e4, 1e6, 100)
    >>> law, _ = fit_power_law(n, 2.0 + 20.0 * n**-0.3)
    >>> [round(float(x), 2) for x in (jnp.exp(law.log_scale), law.exponent, jnp.exp(law.log_floor))]
    [20.0, 0.3, 2.0]

  Source: Jiang et al., ADO, ICLR 2025 (arXiv 2410.11820). Provenance: official_code; the starts and
  the number of iterations are ours.
  """
  check_positive(huber_delta=huber_delta, max_iterations=max_iterations)
  if not len(grid):
    raise ValueError('grid is empty; give at least one exponent to start from')
  losses = jnp.asarray(losses)
  losses = losses.astype(jnp.promote_types(jnp.float32, losses.dtype))
  examples = jnp.asarray(examples, losses.dtype)
  mask = jnp.asarray(True) if mask is None else jnp.asarray(mask)
  if losses.ndim != 1 or examples.shape != losses.shape or mask.shape not in ((), losses.shape):
    raise ValueError(
      f'examples {examples.shape}, losses {losses.shape} and mask {mask.shape} must be one curve '
      'of shape [T]; use jax.vmap for several'
    )
  count = (mask & (examples > 0)).astype(losses.dtype)
  losses = jnp.where(count > 0, losses, 1)  # a masked NaN would still reach the gradient
  x = jnp.where(count > 0, jnp.log(examples), 0)
  center = masked.mean(x, count)
  x = jnp.where(count > 0, x - center, 0)

  # L-BFGS moves the loss above the floor at the center of the points, not at n = 1 far outside.
  def law_of(point):
    log_above, exponent, log_floor = point
    return PowerLaw(log_above + exponent * center, exponent, log_floor)

  def objective(point):
    log_above, exponent, log_floor = point
    residuals = jnp.log(losses) - jnp.logaddexp(log_above - exponent * x, log_floor)
    value = masked.total(optax.losses.huber_loss(residuals, delta=huber_delta), count)
    if walls is None:
      return value
    beyond = lambda p, low, high: jnp.maximum(low - p, 0) + jnp.maximum(p - high, 0)
    return value + sum(map(beyond, law_of(point), *walls))

  lowest_floor = 0.0 if walls is None else np.exp(walls[0].log_floor)
  start = functools.partial(_least_squares, x, losses, count, lowest_floor)
  starts = jax.vmap(start)(jnp.asarray(grid, losses.dtype))
  points, values = jax.vmap(lambda point: minimize(objective, point, max_iterations))(starts)
  best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
  law = law_of(points[best])
  return PowerLaw(*(jnp.where(jnp.isfinite(values[best]), p, jnp.nan) for p in law)), values[best]


def learning_potential(
  law: PowerLaw, examples: jax.Array | float, min_exponent: float = 0.05
) -> jax.Array:
  """What one more example is predicted to lower the loss by: -dL/dn of the law.

    max(exponent, min_exponent) * exp(log_scale) n^(-exponent) / n

  Args:
    law: parameters of any shape.
    examples: n, float or int of a shape that broadcasts; below 1 it counts as 1.
    min_exponent: a flatter law has the slope as if it were this steep.

  Returns:
    float32[...], of the shape of the two together; >= 0.

  Example:
    >>> law = PowerLaw(log_scale=3.0, exponent=0.3, log_floor=0.7)
    >>> print(f'{float(learning_potential(law, 1e6)):.3g}')
    9.55e-08

  Source: Jiang et al., ADO, ICLR 2025 (arXiv 2410.11820). Provenance: official_code.
  """
  return jnp.exp(_log_potential(law, examples, min_exponent))


class History(NamedTuple):
  """Learning curves of bounded size: N is 1 if the domains share their count, else G."""

  losses: jax.Array  # float32[capacity, G], means over blocks of steps
  examples: jax.Array  # float32[capacity, N]
  filled: jax.Array  # int32[], points so far
  interval: jax.Array  # int32[], steps of a block
  loss_sum: jax.Array  # float32[G], of the block under way
  example_sum: jax.Array  # float32[N]
  terms: jax.Array  # int32[], steps in it


class ADOState(NamedTuple):
  """Of `ado`."""

  probs: jax.Array  # float32[G], p
  mean: jax.Array  # float32[G], of rho over all updates, with the prior before the first fit
  credit: jax.Array  # float32[G], h
  law: PowerLaw  # of float32[G]
  fits: jax.Array  # int32[], that were accepted
  updates: jax.Array  # int32[]
  last: jax.Array  # float32[G], the latest known losses
  examples: jax.Array  # float32[N], n
  rest: jax.Array  # float32[N], what rounding left out of n
  history: History


@declare('absolute', 'example', 'official_code', _PAPER)
def ado(
  num_domains: int,
  prior: Vector | None = None,
  *,
  fit_every: int = 1000,
  start_step: int = 1000,
  ignore: int = 500,
  thinning: int = 10,
  capacity: int = 256,
  own_counts: bool = False,
  credit_power: float = 0.5,
  credit_decay: float = 0.9,
  floor: float = 0.01,
  mix: float = 0.1,
  min_exponent: float = 0.05,
  walls: tuple[PowerLaw, PowerLaw] | None = WALLS,
  max_iterations: int = 50,
  mode: Mode = 'sample',
  sampled: Vector | None = None,
) -> Mixture:
  """ADO: towards the domains whose fitted law falls fastest.

    h    <- credit_decay h + (1 - credit_decay) counts / sum(counts)
    rho  =  prior * h^credit_power * learning_potential(law, n), normalized
    rho  <- max(rho, floor), normalized
    p    =  (1 - mix) * mean + mix * rho,  then  mean <- mean + (rho - mean) / (updates so far)

  in every step after the first accepted fit; before, p is the prior. `mean` includes that time, so
  what a new rho changes decays like 1 / step: late in a run p hardly moves. Normalizing after the
  floor puts small shares a little below it. A prior of 0 stays 0, without a floor (ours).

  A fit is due where step is a multiple of `fit_every` from `start_step` on, provided there are 30
  points or more; the official defaults would fit a single one. With any parameter NaN or inf it is
  rejected whole and the last laws stay, as for a domain whose loss is not positive.

  The update needs the signals `domain_losses` and `domain_counts`, float[G]. A domain with count 0
  keeps its last loss; if it was never seen, the mean over the first batch stands for it. A batch
  without examples, or with a NaN or inf among the counts or the losses of domains present, leaves
  the state as it was; a fit due in that step waits for the next.

  Compare with natural *and* uniform sampling: with the shared n, 1 / n cancels and the ranking is
  by exponent times loss above the floor only.

  Args:
    num_domains: G.
    prior: float[G], >= 0, not all 0; normalized. The paper's is each domain's share of the tokens.
      Default: uniform.
    fit_every, start_step: in optimizer steps. A fit for 8 domains takes some 0.2 s on two cores.
    ignore: the first steps, whose losses do not enter the history (their examples count in n).
    thinning: steps of a block at first, the thinning of the official code.
    capacity: points of the history, even and at least 60. It holds capacity * 2 G numbers at most.
    own_counts: whether n is the domain's own number of examples, or that of all (official default).
      One never seen has no law, and stays at its floor.
    credit_power: >= 0; 0 leaves what was sampled lately out of it.
    credit_decay: in [0, 1].
    floor: in [0, 1 / G).
    mix: in [0, 1], share of the newest rho in p.
    min_exponent: as in `learning_potential`.
    walls, max_iterations: as in `fit_power_law`. The default walls are for the loss of text.
    mode: 'sample' draws by p; 'weigh' draws by `sampled` and puts p in the loss (ours).
    sampled: float[G], q with mode='weigh'. Default: uniform.

  Returns:
    A `Mixture` with an `ADOState`.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> mixture = ado(2, prior=[3.0, 1.0], floor=0.05)
    >>> [float(x) for x in mixture.proportions(mixture.init())]
    [0.75, 0.25]

  Source: Jiang et al., Adaptive Data Optimization, ICLR 2025 (arXiv 2410.11820). Provenance:
  official_code; ours are the history and the starts of the fit (see the module and
  `fit_power_law`), ignore=500 and the 30 points.
  """
  first = starting(prior, num_domains, 'prior')
  check_positive(fit_every=fit_every, thinning=thinning, max_iterations=max_iterations)
  check_share(credit_decay, 'credit_decay')
  check_share(mix, 'mix')
  if not 0 <= floor * num_domains < 1:
    raise ValueError(
      f'floor={floor} for {num_domains} domains must be at least 0 and below 1 / {num_domains}: at '
      'that share the floor is all there is'
    )
  if credit_power < 0:
    raise ValueError(f'credit_power={credit_power} must be at least 0')
  if capacity < 2 * _FEWEST_POINTS or capacity % 2:
    raise ValueError(f'capacity={capacity} must be even and at least {2 * _FEWEST_POINTS}')
  if mode == 'weigh':
    check_drawn(starting(sampled, num_domains, 'sampled'), first, 'sampled', 'prior')
  views = acting(mode, sampled, first, 0.0, lambda state: state.probs)
  counters = num_domains if own_counts else 1

  def init():
    share = lambda: jnp.array(first)  # a buffer each: a trainer may donate the state
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    number = lambda value: jnp.array(value, jnp.int32)
    return ADOState(
      probs=share(),
      mean=share(),
      credit=share(),
      law=PowerLaw(*(zeros(num_domains) for _ in range(3))),
      fits=number(0),
      updates=number(0),
      last=zeros(num_domains),
      examples=zeros(counters),
      rest=zeros(counters),
      history=History(
        losses=zeros(capacity, num_domains),
        examples=zeros(capacity, counters),
        filled=number(0),
        interval=number(thinning),
        loss_sum=zeros(num_domains),
        example_sum=zeros(counters),
        terms=number(0),
      ),
    )

  def refit(law, fits, history):
    mask = jnp.arange(capacity) < history.filled
    fit = functools.partial(fit_power_law, walls=walls, max_iterations=max_iterations)
    examples = jnp.broadcast_to(history.examples, history.losses.shape)
    new, _ = jax.vmap(fit, in_axes=(1, 1, None))(examples, history.losses, mask)
    fine = jnp.all(jnp.isfinite(jnp.stack(new)))
    return choose(fine, new, law), fits + fine

  def policy(law, examples, credit):
    credit = jnp.maximum(credit, jnp.finfo(credit.dtype).tiny)  # a long absence is no end
    wish = jnp.log(first) + credit_power * jnp.log(credit)
    rho = jax.nn.softmax(wish + _log_potential(law, examples, min_exponent))
    rho = jnp.where(first > 0, jnp.maximum(rho, floor), 0)
    return rho / jnp.sum(rho)

  def update(state, *, step, domain_losses, domain_counts, **_):
    losses = signal(domain_losses, num_domains, 'domain_losses')
    counts = signal(domain_counts, num_domains, 'domain_counts')
    present, size = counts > 0, jnp.sum(counts)
    usable = jnp.all(jnp.isfinite(losses) | ~present) & jnp.isfinite(size) & (size > 0)

    unseen = jnp.where(state.updates == 0, masked.mean(losses, counts), state.last)
    last = jnp.where(present, losses, unseen)
    examples, rest = _add(state.examples, state.rest, counts if own_counts else size)
    history = choose(step >= ignore, _record(state.history, last, examples), state.history)
    credit = credit_decay * state.credit + (1 - credit_decay) * counts / size

    due = usable & (step >= start_step) & (step % fit_every == 0)
    due &= history.filled >= _FEWEST_POINTS
    kept = lambda law, fits, _: (law, fits)
    law, fits = jax.lax.cond(due, refit, kept, state.law, state.fits, history)

    rho = jnp.where(fits > 0, policy(law, examples, credit), first)
    probs = jnp.where(fits > 0, (1 - mix) * state.mean + mix * rho, first)
    updates = state.updates + 1
    mean = state.mean + (rho - state.mean) / updates
    new = ADOState(probs, mean, credit, law, fits, updates, last, examples, rest, history)
    return choose(usable, new, state)

  return Mixture(init, update, *views)


def _log_potential(law, examples, min_exponent):
  log_n = jnp.log(jnp.maximum(jnp.asarray(examples, jnp.float32), 1))
  slope = jnp.log(jnp.maximum(law.exponent, min_exponent))
  return slope + law.log_scale - (law.exponent + 1) * log_n


def _least_squares(x, losses, count, lowest_floor, exponent):
  """The start for an exponent: log of the loss above the floor at x = 0, exponent, log floor."""
  curve = jnp.exp(-exponent * x)
  mean_curve, mean_loss = masked.mean(curve, count), masked.mean(losses, count)
  centered = curve - mean_curve
  slope = masked.divide(
    masked.total(centered * (losses - mean_loss), count), masked.total(centered**2, count)
  )
  # Logarithms must exist even for a curve that rises, or has no points.
  smallest = jnp.maximum(1e-3 * mean_loss, jnp.finfo(losses.dtype).tiny)
  floor = jnp.maximum(mean_loss - slope * mean_curve, jnp.maximum(lowest_floor, smallest))
  above = jnp.maximum(masked.divide(mean_loss - floor, mean_curve), smallest)
  return jnp.stack([jnp.log(above), exponent, jnp.log(floor)])


def _add(total, rest, more):
  """Kahan's sum: beyond 2^24 examples, float32 would swallow small batches."""
  more = more - rest
  moved = total + more
  return moved, (moved - total) - more


def _record(history, losses, examples):
  """The history after one more step."""
  capacity = history.losses.shape[0]
  loss_sum, example_sum = history.loss_sum + losses, history.example_sum + examples
  terms = history.terms + 1
  complete = terms == history.interval
  put = lambda rows, total: jnp.where(complete, rows.at[history.filled].set(total / terms), rows)
  rows = put(history.losses, loss_sum), put(history.examples, example_sum)
  filled = history.filled + complete

  def merged(values):
    pairs = values.reshape(capacity // 2, 2, -1).mean(axis=1)
    return jnp.concatenate([pairs, jnp.zeros_like(pairs)])

  full = filled == capacity
  losses, examples = choose(full, tuple(map(merged, rows)), rows)
  return History(
    losses,
    examples,
    filled=jnp.where(full, capacity // 2, filled),
    interval=jnp.where(full, 2 * history.interval, history.interval),
    loss_sum=jnp.where(complete, 0, loss_sum),
    example_sum=jnp.where(complete, 0, example_sum),
    terms=jnp.where(complete, 0, terms),
  )
