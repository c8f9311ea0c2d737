"""A mixture inside the train step, as one more stage of its weighting.

There it sees the losses before they are reduced, is saved and restored with the train state, and
acts within the step where it acts on the loss. Where it acts on the sampling, q leaves with the
state: q of step s is for the batch of step s + lag, so that whoever plans batches need not wait for
the step that is running.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import diagnostics, masked
from jaxrw.core import Weighting, check_range
from jaxrw.mixtures.core import Mixture
from jaxrw.mixtures.online import excess_losses
from jaxrw.weights.importance import importance_weights


class MixingState(NamedTuple):
  """Of `mixing`.

  Attributes:
    mixture: the mixture's own state.
    queue: float32[lag, G], q of the last `lag` steps, the newest last; before there were as many,
      the first q. With S steps done, row i is q for the batch of step S + i.
  """

  mixture: Any
  queue: jax.Array


def domain_signals(
  losses: jax.Array,
  base: jax.Array | None,
  group_ids: jax.Array,
  num_domains: int,
  ref_losses: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """What a step knows of its domains: the signals of the mixtures that follow losses.

  Args:
    losses: float[B], or float[B, T], whose mean over T is the loss of an example.
    base: float, same shape, 0 for padding, or None for ones.
    group_ids: int[B], the domain of each example; -1 belongs to none.
    num_domains: G.
    ref_losses: float, shape of the losses: a reference model's.

  Returns:
    `domain_losses` float32[G], the mean over a domain's examples, 0 for an absent one;
    `domain_counts` float32[G], how many examples there are of it; with `ref_losses` also
    `domain_excess` (see `excess_losses`). One collective, or two with the excess. Constants for
    differentiation: for alignments reduce losses with `jaxrw.diagnostics.group_sums`.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> domain_signals(jnp.array([1.0, 3.0, 5.0]), None, jnp.array([0, 0, 2]), 3)
    {'domain_counts': Array([2., 0., 1.], dtype=float32), 'domain_losses': Array([2., 0., 5.], \
dtype=float32)}
  """
  if group_ids.shape != losses.shape[:1]:
    raise ValueError(f'group_ids has shape {group_ids.shape}, losses {losses.shape}: expected [B]')
  check_range(group_ids, num_domains, 'group_ids')
  losses, base, _ = masked.fill_in(losses, base, None)
  example, mass = masked.example_level(losses, base)
  columns = jnp.stack([mass != 0, mass, jnp.where(mass != 0, mass * example, 0)], axis=1)
  counts, mass, total = diagnostics.group_sums(columns, group_ids, num_domains).T
  signals = {'domain_counts': counts, 'domain_losses': masked.divide(total, mass)}
  if ref_losses is not None:
    signals['domain_excess'], _ = excess_losses(losses, ref_losses, base, group_ids, num_domains)
  return signals


def mixing(mixture: Mixture, *, lag: int = 1, every: int = 1, weigh: bool = False) -> Weighting:
  """The stage of a mixture: first it takes the step's signals in, then it acts.

    state <- mixture.update(state, step, domain_losses, domain_counts, ...)     at every `every`-th
    w_i   <- w_i p_g / sampling_prob_i       with `weigh`, p = objective(state), already updated
    q     =  proportions(state), for the batch of step s + lag

  Needs the signals `losses`, `group_ids` and `step`, and with `weigh` `sampling_prob`. The mixture
  is told `domain_signals` (the excess where there are `ref_losses`) and whatever is in `extra`:
  measurements of the loop's own, such as `domain_alignment`.

  Put it first in a chain, so that normalized stages normalize under its weights. Use it in scope
  'global': with microbatches of its own scope it would see each of them as a step.

  Args:
    mixture: any.
    lag: steps between an update and the batch that is drawn by it, at least 1.
    every: update at the steps that are its multiples, step 0 among them.
    weigh: False leaves the weights alone: the mixture acts through sampling.

  Returns:
    A `Weighting` with a `MixingState`; its scale is absolute.

  Raises:
    ValueError: lag or every < 1.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> from jaxrw import mixtures
    >>> stage = mixtures.mixing(mixtures.group_dro_mixture(2, rate=1.0), weigh=True)
    >>> w, state = stage.update(
    ...     jnp.ones(2), stage.init(), losses=jnp.array([1.0, 2.0]), group_ids=jnp.array([0, 1]),
    ...     sampling_prob=jnp.array([0.5, 0.5]), step=0)
    >>> [round(float(x), 3) for x in w]
    [0.538, 1.462]
  """
  if lag < 1 or every < 1:
    raise ValueError(f'lag={lag} and every={every} must be at least 1')

  def init():
    state = mixture.init()
    return MixingState(state, jnp.tile(mixture.proportions(state), (lag, 1)))

  def update(weights, state, *, losses, group_ids, step, **signals):
    told = domain_signals(
      losses, signals.get('base'), group_ids, state.queue.shape[1], signals.get('ref_losses')
    )
    now = mixture.update(state.mixture, step=step, **told, **signals.get('extra', {}))
    if every > 1:
      now = jax.tree.map(lambda a, b: jnp.where(step % every == 0, a, b), now, state.mixture)
    if weigh:
      if 'sampling_prob' not in signals:
        raise TypeError("mixing with weigh=True needs the signal 'sampling_prob'")
      factor = importance_weights(mixture.objective(now), signals['sampling_prob'], group_ids)
      weights = weights * masked.over_tokens(factor.astype(weights.dtype), weights)
    queue = jnp.concatenate([state.queue[1:], mixture.proportions(now)[None]])
    return weights, MixingState(now, queue)

  return Weighting(init, update)
