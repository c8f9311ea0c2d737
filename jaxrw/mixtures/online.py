"""Mixtures that follow the run: one exponentiated step, and a score for each method.

  alpha_g <- alpha_g exp(rate * score_g) / Z      then  (1 - floor) alpha_g + floor / G

  | method            | score_g                                                   | alpha acts by |
  |-------------------|-----------------------------------------------------------|---------------|
  | dga               | <grad L_g, grad of the target's loss>                     | sampling      |
  | doge              | lr times the same / mean gradient norm, in [0, 5 lr]      | loss          |
  | doremi            | mean over tokens of max(loss - reference loss, 0)         | loss          |
  | group_dro_mixture | L_g, the mean loss                                        | loss          |

`mode` overrides the last column where both make sense: 'sample' gives q = p = alpha, 'weigh' keeps
q = `sampled` and gives p = alpha.

Shares are kept as logarithms, so a domain that fell to exp(-300) can come back; and a share
of exactly 0 stays 0 without a floor, whatever its signal holds. If a signal of a domain with a
share is NaN or inf, `update` returns the state as it was: one bad batch, which a trainer may skip,
must not end the mixture. Log the signals themselves to see that it happened.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import diagnostics, masked
from jaxrw.core import at_step, check_positive, check_range, declare
from jaxrw.mixtures._moves import (
  Rate,
  acting,
  check_rate,
  check_share,
  choose,
  log_mix,
  log_shares,
  log_step,
  signal,
  starting,
  usable,
)
from jaxrw.mixtures._simplex import Vector, on_simplex
from jaxrw.mixtures.core import Mixture, Mode

_DGA = 'Dynamic Gradient Alignment for Online Data Mixing (arXiv 2410.02498)'
_DOGE = 'Fan et al., DoGE, ICML 2024 (arXiv 2310.15393)'
_DOREMI = 'Xie et al., DoReMi, NeurIPS 2023 (arXiv 2305.10429)'
_DRO = 'Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020 (arXiv 1911.08731)'


def exponentiated_step(
  alpha: Vector,
  score: Vector,
  rate: float | jax.Array,
  floor: float | jax.Array = 0.0,
) -> jax.Array:
  """One step of exponentiated gradient: softmax(log alpha + rate * score), mixed with uniform.

  Without a floor it is the exact solution of

    argmin_p  -<score, p> + KL(p || alpha) / rate      over the simplex.

  Args:
    alpha: float[G], on the simplex. An entry of 0 stays 0, whatever its score, unless floor > 0.
    score: float[G], what is to grow. A constant added to all entries changes nothing.
    rate: step size, >= 0, in 1 / the score's unit; 0 keeps alpha.
    floor: in [0, 1]: the result is (1 - floor) * step + floor / G.

  Returns:
    float32[G] (float64 for float64 alpha), on the simplex. NaN everywhere if the score of an entry
    with alpha > 0 is NaN or +inf.

  Raises:
    ValueError: shapes that differ, concrete alpha off the simplex, rate < 0, floor outside [0, 1].

  Example:
    >>> alpha = exponentiated_step([0.5, 0.5, 0.0], [0.0, 1.0, 9.0], rate=1.0)
    >>> [round(float(x), 3) for x in alpha]
    [0.269, 0.731, 0.0]

  Source: exponentiated gradient (Kivinen and Warmuth 1997), textbook form. That the methods of this
  module share it: Chen et al., Aioli, ICLR 2025 (arXiv 2411.05735). Provenance: reconstructed.
  """
  check_rate(rate)
  check_share(floor, 'floor')
  on_simplex(alpha, 'alpha')
  alpha = jnp.asarray(alpha)
  alpha = alpha.astype(jnp.promote_types(jnp.float32, alpha.dtype))
  score = jnp.asarray(score, alpha.dtype)
  if score.shape != alpha.shape:
    raise ValueError(f'score has shape {score.shape}, alpha {alpha.shape}; they must agree')
  return jnp.exp(log_step(jnp.log(alpha), score, rate, floor))


def excess_losses(
  losses: jax.Array,
  ref_losses: jax.Array,
  base: jax.Array | None,
  group_ids: jax.Array,
  num_domains: int,
) -> tuple[jax.Array, jax.Array]:
  """How far each domain's tokens are above a reference model: the signal of `doremi`.

    excess_g = mean over the domain's entries, under base, of max(loss - reference loss, 0)

  The maximum is taken entry by entry, so what is already better than the reference cannot hide what
  is not.

  Args:
    losses: float[B, T], or [B]: then an example is one entry.
    ref_losses: the same shape: losses of the reference model on the same entries.
    base: float, same shape, 0 for padding, or None for ones.
    group_ids: int[B], the domain of each example. -1 belongs to no domain, nor does a traced id
      out of range.
    num_domains: G.

  Returns:
    (excess, mass), both float32[G]: the signals `domain_excess` and `domain_counts`. mass is the
    domain's sum of base, 0 for a domain that is absent, whose excess is 0 as well. One collective
    on a sharded batch. No gradient flows through it.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> losses, ref = jnp.array([[1.0, 3.0], [2.0, 2.0]]), jnp.array([[2.0, 1.0], [1.5, 1.0]])
    >>> excess_losses(losses, ref, None, jnp.array([0, 2]), 3)
    (Array([1.  , 0.  , 0.75], dtype=float32), Array([2., 0., 2.], dtype=float32))

  Source: official code of Xie et al., DoReMi, NeurIPS 2023.
  """
  if losses.ndim not in (1, 2) or group_ids.shape != losses.shape[:1]:
    raise ValueError(
      f'losses {losses.shape} must be [B] or [B, T], and group_ids {group_ids.shape} then [B]'
    )
  if ref_losses.shape != losses.shape:
    raise ValueError(f'ref_losses has shape {ref_losses.shape}, losses {losses.shape}')
  check_range(group_ids, num_domains, 'group_ids')
  losses, base, _ = masked.fill_in(losses, base, None)
  reference = jax.lax.stop_gradient(ref_losses.astype(losses.dtype))
  tokens = tuple(range(1, losses.ndim))
  above = jnp.where(base != 0, base * jnp.maximum(losses - reference, 0), 0)
  columns = jnp.stack([jnp.sum(x, axis=tokens) for x in (above, base)], axis=1)
  sums = diagnostics.group_sums(columns, group_ids, num_domains)
  return masked.divide(sums[:, 0], sums[:, 1]), sums[:, 1]


# Steps from the last alpha ------------------------------------------------------------------------


class DGAState(NamedTuple):
  """Logarithms, so -inf is a share of 0."""

  log_alpha: jax.Array  # float32[G], what the mixture uses
  log_instant: jax.Array  # float32[G], the last step before the moving average


class AveragedState(NamedTuple):
  """Of `doge` and `doremi`, whose answer is `average_proportions` of it."""

  log_alpha: jax.Array  # float32[G]
  scores: jax.Array  # float32[G], the last of each domain
  mean: jax.Array  # float32[G], of alpha over the updates
  terms: jax.Array  # int32[], how many alphas are in the mean


@declare('absolute', 'example', 'reconstructed', _DGA)
def dga(
  num_domains: int,
  rate: Rate,
  *,
  ema: float | None = None,
  ema_feedback: bool = True,
  every: int = 1,
  floor: float = 0.0,
  normalize: Literal['none', 'cosine', 'mean_norm'] = 'none',
  mode: Mode = 'sample',
  sampled: Vector | None = None,
  start: Vector | None = None,
) -> Mixture:
  """DGA: towards the domains whose gradient agrees with that of a small target set.

    instant = exponentiated_step(alpha, a, rate, floor)      a_g = <grad L_g, grad L_target>
    alpha  <- (1 - ema) alpha + ema * instant                every `every` steps, else nothing

  Neutral at rate = 0 or ema = 0; ema = 1 is no average at all.

  The update needs the signal `domain_alignment`, float[G] (`jaxrw.gradients.alignment` of the
  domains' losses along the target's gradient), each domain measured on a batch of its own; it does
  not look at `domain_counts`. At steps in between any values will do, they are not used.

  Args:
    num_domains: G.
    rate: in 1 / the alignment's unit, or a schedule. Plain alignments scale with the squared size
      of the gradients and so with the model; `normalize` takes that out.
    ema: weight of the new vector in a moving average over alpha; None for no average.
    ema_feedback: whether the step starts from the averaged alpha (True) or from the last instant.
    every: update at the steps that are its multiples, step 0 among them.
    floor: share spread uniformly, so that no domain is lost for good.
    normalize: 'cosine' divides a_g by |grad L_g| |grad L_target|, and needs the signals
      `domain_grad_norms` float[G] and `target_grad_norm` float[]; a domain without gradient has
      cosine 0. 'mean_norm' divides all a_g by mean_g |grad L_g|, from `domain_grad_norms`.
    mode: 'sample' or 'weigh'.
    sampled: float[G], q of mode 'weigh', non-negative; normalized here. Default: uniform.
    start: float[G], the first alpha, non-negative; normalized here. Default: uniform.

  Returns:
    A `Mixture` with a `DGAState`.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jax.numpy as jnp
    >>> mixture = dga(3, rate=1.0, ema=0.5)
    >>> state = mixture.update(mixture.init(), step=0, domain_alignment=jnp.array([1.0, 0.0, -1.0]))
    >>> [round(float(x), 3) for x in mixture.proportions(state)]
    [0.499, 0.289, 0.212]

  Source: Dynamic Gradient Alignment for Online Data Mixing (arXiv 2410.02498).
  Provenance: reconstructed without the paper's formulas at hand; the form of the average is as we
  remember it, and which vector the step starts from is not settled, hence `ema_feedback`.
  """
  check_rate(rate)
  check_share(floor, 'floor')
  if ema is not None:
    check_share(ema, 'ema')
  if every < 1:
    raise ValueError(f'every={every} must be at least 1; 1 updates at every step')
  if normalize not in ('none', 'cosine', 'mean_norm'):
    raise ValueError(f"normalize={normalize!r} must be 'none', 'cosine' or 'mean_norm'")
  first = starting(start, num_domains)
  views = acting(mode, sampled, first, floor, lambda state: jnp.exp(state.log_alpha))

  def init():
    return DGAState(
      log_shares(first), log_shares(first)
    )  # two arrays: one could not be donated twice

  def update(state, *, step, domain_alignment, **signals):
    score = signal(domain_alignment, num_domains, 'domain_alignment')
    if normalize != 'none':
      needed = _needed(signals, 'domain_grad_norms', normalize)
      norms = signal(needed, num_domains, 'domain_grad_norms')
      if normalize == 'cosine':
        norms = norms * _needed(signals, 'target_grad_norm', normalize)
      else:
        norms = jnp.mean(norms)
      score = _by_norm(score, norms)
    origin = state.log_alpha if ema_feedback else state.log_instant
    instant = log_step(origin, score, at_step(rate, step, 'rate'), floor)
    log_alpha = instant if ema is None else log_mix(state.log_alpha, instant, ema)
    due = step % every == 0
    return choose(due & usable(score, origin), DGAState(log_alpha, instant), state)

  return Mixture(init, update, *views)


@declare('absolute', 'example', 'official_code', _DOGE)
def doge(
  num_domains: int,
  learning_rate: Rate,
  mu: float = 0.05,
  *,
  clip: float = 5.0,
  floor: float = 0.0,
  mode: Mode = 'weigh',
  sampled: Vector | None = None,
  start: Vector | None = None,
) -> Mixture:
  """DoGE: towards the domains whose gradient lowers the loss of the target domains.

    W_g    = lr <grad L_g, sum of the target domains' gradients> / (mean_g |grad L_g| + 1e-6)
    alpha <- softmax(log alpha + min(max(W, 0), clip * lr) / mu)

  The answer of the method is the mean of alpha over the run, `average_proportions(state)`, for the
  training of a larger model.

  The update needs the signals `domain_alignment` and `domain_grad_norms`, float[G]. A domain of
  gradient norm 0 was not measured: it keeps its last score (0 at first) and is not in the mean.
  Where the official code differs: it keeps the last gradient of such a domain, and its norm in the
  mean; and it clips each domain's gradient to norm 1 beforehand, which is left to the caller.

  Args:
    num_domains: G.
    learning_rate: of the model's optimizer, or its schedule. It scales W, so alpha cools with it.
    mu: > 0, the strength of staying; 0.05 is the official default, its configs use 0.01.
    clip: largest score, in learning rates.
    floor, mode, sampled, start: as in `dga`.

  Returns:
    A `Mixture` with an `AveragedState`.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jax.numpy as jnp
    >>> mixture = doge(2, learning_rate=0.1)
    >>> state = mixture.update(
    ...     mixture.init(), step=0,
    ...     domain_alignment=jnp.array([0.4, -1.0]), domain_grad_norms=jnp.array([0.5, 1.5]))
    >>> [round(float(x), 3) for x in mixture.objective(state)]
    [0.69, 0.31]

  Source: Fan et al., DoGE, ICML 2024 (arXiv 2310.15393). Provenance: official_code, a later fork of
  it, but for domains that were not measured.
  """
  check_rate(learning_rate, 'learning_rate')
  check_positive(mu=mu, clip=clip)

  def new_scores(state, *, step, domain_alignment, domain_grad_norms, **_):
    products = signal(domain_alignment, num_domains, 'domain_alignment')
    norms = signal(domain_grad_norms, num_domains, 'domain_grad_norms')
    lr, measured = at_step(learning_rate, step, 'learning_rate'), norms != 0
    size = masked.mean(norms, measured.astype(norms.dtype))
    score = lr * _by_norm(products, size + 1e-6)
    # The clip must not hide an inf from the check that follows; a NaN passes it.
    clipped = jnp.where(jnp.isinf(score), score, jnp.clip(score, 0, clip * lr))
    return jnp.where(measured, clipped, state.scores)

  # The official mean is over what the updates gave, without the first alpha.
  return _averaged(new_scores, 1 / mu, num_domains, 0.0, 0, floor, mode, sampled, start)


@declare('absolute', 'example', 'official_code', _DOREMI)
def doremi(
  num_domains: int,
  rate: Rate = 1.0,
  smoothing: float = 1e-4,
  *,
  initial_score: float = 0.0,
  mode: Mode = 'weigh',
  sampled: Vector | None = None,
  start: Vector | None = None,
) -> Mixture:
  """DoReMi: towards the domains where a small model is furthest above its reference.

    alpha <- (1 - smoothing) softmax(log alpha + rate * excess) + smoothing / G

  with `excess` from `excess_losses`. The answer of the method is the mean of alpha over the run,
  the first one included, `average_proportions(state)`; a new model is then trained on it.

  The update needs the signals `domain_excess` and `domain_counts`, float[G]. A domain with count 0
  keeps its last score, and goes on moving by it.

  Args:
    num_domains: G.
    rate: in 1 / the losses' unit, or a schedule.
    smoothing: in [0, 1]; 1e-4 in the official code, 1e-3 in the paper as we remember it.
    initial_score: of a domain never seen so far. The official code takes the logarithm of the
      vocabulary's size, so that a domain grows until it is seen; 0 lets it shrink instead.
    mode, sampled, start: as in `dga`. The official code starts at the reference's proportions and
      samples by them.

  Returns:
    A `Mixture` with an `AveragedState`.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jax.numpy as jnp
    >>> mixture = doremi(2)
    >>> state = mixture.update(
    ...     mixture.init(), step=0,
    ...     domain_excess=jnp.array([0.0, 1.0]), domain_counts=jnp.array([8.0, 8.0]))
    >>> [round(float(x), 3) for x in mixture.objective(state)]
    [0.269, 0.731]
    >>> [round(float(x), 3) for x in average_proportions(state)]
    [0.384, 0.616]

  Source: Xie et al., DoReMi, NeurIPS 2023 (arXiv 2305.10429). Provenance: official_code.
  """
  check_rate(rate)
  check_share(smoothing, 'smoothing')

  def new_scores(state, *, step, domain_excess, domain_counts, **_):
    present = signal(domain_counts, num_domains, 'domain_counts') > 0
    return jnp.where(present, signal(domain_excess, num_domains, 'domain_excess'), state.scores)

  return _averaged(new_scores, rate, num_domains, initial_score, 1, smoothing, mode, sampled, start)


def average_proportions(state: AveragedState) -> jax.Array:
  """The answer of `doge` and `doremi`: alpha averaged over the updates, float32[G]."""
  return state.mean


@declare('absolute', 'example', 'official_code', _DRO)
def group_dro_mixture(
  num_domains: int,
  rate: Rate = 0.01,
  *,
  floor: float = 0.0,
  mode: Mode = 'weigh',
  sampled: Vector | None = None,
  start: Vector | None = None,
) -> Mixture:
  """Group DRO over domains: towards the domains of largest loss.

    alpha <- exponentiated_step(alpha, L, rate, floor)

  The update needs the signals `domain_losses` and `domain_counts`, float[G]. A domain with count 0
  has L = 0 in that step, as in the official code, and so falls behind the others: its loss is not
  known. `jaxrw.group_dro` is the same for groups inside a batch, as a weighting.

  Args:
    num_domains: G.
    rate: in 1 / the losses' unit, or a schedule.
    floor, mode, sampled, start: as in `dga`. The authors advise sampling all groups alike.

  Returns:
    A `Mixture`; its state is log alpha, float32[G].

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jax.numpy as jnp
    >>> mixture = group_dro_mixture(2, rate=1.0)
    >>> state = mixture.update(
    ...     mixture.init(), step=0,
    ...     domain_losses=jnp.array([1.0, 2.0]), domain_counts=jnp.array([8.0, 8.0]))
    >>> [round(float(x), 3) for x in mixture.objective(state)]
    [0.269, 0.731]

  Source: Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020 (arXiv 1911.08731).
  Provenance: official_code; floor and mode are ours.
  """
  check_rate(rate)
  check_share(floor, 'floor')
  first = starting(start, num_domains)

  def update(log_alpha, *, step, domain_losses, domain_counts, **_):
    present = signal(domain_counts, num_domains, 'domain_counts') > 0
    score = jnp.where(present, signal(domain_losses, num_domains, 'domain_losses'), 0)
    moved = log_step(log_alpha, score, at_step(rate, step, 'rate'), floor)
    return choose(usable(score, log_alpha), moved, log_alpha)

  return Mixture(lambda: log_shares(first), update, *acting(mode, sampled, first, floor, jnp.exp))


# Shared by these methods -----------------------------------------------------------------------


def _averaged(new_scores, rate, num_domains, initial, terms, floor, mode, sampled, start):
  """A step by scores that are remembered, and the mean of alpha; `terms` is 1 if the first alpha
  is in the mean, else 0."""
  check_share(floor, 'floor')
  first = starting(start, num_domains)

  def init():
    return AveragedState(
      log_shares(first),
      jnp.full(num_domains, initial, jnp.float32),
      jnp.array(first),
      jnp.array(terms, jnp.int32),
    )

  def update(state, *, step, **signals):
    scores = new_scores(state, step=step, **signals)
    log_alpha = log_step(state.log_alpha, scores, at_step(rate, step, 'rate'), floor)
    terms = state.terms + 1
    mean = state.mean + (jnp.exp(log_alpha) - state.mean) / terms
    kept = jnp.where(jnp.isfinite(scores), scores, state.scores)  # of a domain without a share
    new = AveragedState(log_alpha, kept, mean, terms)
    return choose(usable(scores, state.log_alpha), new, state)

  views = acting(mode, sampled, first, floor, lambda state: jnp.exp(state.log_alpha))
  return Mixture(init, update, *views)


def _needed(signals, name: str, normalize: str):
  if signals.get(name) is None:
    raise TypeError(f'dga with normalize={normalize!r} needs the signal {name!r}')
  return signals[name]


def _by_norm(products, norms):
  """products / norms, 0 for a norm of 0; NaN where the norm is not finite, since x / inf would
  pass for a measurement."""
  return jnp.where(jnp.isfinite(norms), masked.divide(products, norms), jnp.nan)
