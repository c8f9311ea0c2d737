"""Online Data Mixing: the Exp3 bandit over domains."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw.core import check_positive, declare
from jaxrw.mixtures._moves import check_share, choose, signal
from jaxrw.mixtures._simplex import check_domains
from jaxrw.mixtures.core import Mixture

_ODM = 'Albalak et al., Efficient Online Data Mixing (arXiv 2312.02406)'


class ODMState(NamedTuple):
  """Of `odm`."""

  rewards: jax.Array  # float32[G], R
  probs: jax.Array  # float32[G], pi


@declare('absolute', 'example', 'reconstructed', _ODM)
def odm(num_domains: int, decay: float = 0.9, gain: float = 0.1) -> Mixture:
  """Online Data Mixing: the Exp3 bandit, whose reward for sampling a domain is its loss.

    R_g  <- decay * R_g + gain * L_g / pi_g      for the domains sampled in the step
    pi   <- (1 - G eps_t) softmax(eps_{t-1} R) + eps_t,   eps_t = min(1 / G, sqrt(ln G / (G t)))

  with t = step + 1. Dividing by pi makes up for how seldom a domain is seen. eps_t is exploration,
  so no domain falls below it; pi is uniform as long as t <= G ln G.

  The update needs the signals `domain_losses` and `domain_counts`, float[G]. A domain with count 0
  keeps its R. pi is the one in the state: with a pipeline that plans some steps ahead, the batch
  was drawn by a slightly older one. It only acts through sampling, so there is no `mode`.

  Args:
    num_domains: G.
    decay: in [0, 1]. 1 is Exp3's own sum; the official code's Exp3 is decay 1, gain 0.1.
    gain: > 0, the scale of the rewards.

  Returns:
    A `Mixture` with an `ODMState`.

  Raises:
    ValueError: an argument out of its range.

  Example:
    >>> import jax.numpy as jnp
    >>> mixture = odm(2)
    >>> state = mixture.init()
    >>> for step in range(100):
    ...   state = mixture.update(
    ...       state, step=step,
    ...       domain_losses=jnp.array([4.0, 2.0]), domain_counts=jnp.array([8.0, 8.0]))
    >>> [round(float(x), 3) for x in mixture.proportions(state)]
    [0.54, 0.46]

  Source: Albalak et al., Efficient Online Data Mixing (arXiv 2312.02406). Provenance: reconstructed
  from a description of the averaged form; eps and pi as in the official code. Its own averaged
  variant is another one: exp(loss), without dividing by pi.
  """
  check_domains(num_domains)
  check_share(decay, 'decay')
  check_positive(gain=gain)

  def exploration(t):
    # 1 / G is the smaller one at t = 1 already, so t = 0 needs no case of its own.
    bound = jnp.sqrt(np.log(num_domains) / (num_domains * jnp.maximum(t, 1.0)))
    return jnp.minimum(1 / num_domains, bound)

  def init():
    return ODMState(
      jnp.zeros(num_domains, jnp.float32), jnp.full(num_domains, 1 / num_domains, jnp.float32)
    )

  def update(state, *, step, domain_losses, domain_counts, **_):
    losses = signal(domain_losses, num_domains, 'domain_losses')
    present = signal(domain_counts, num_domains, 'domain_counts') > 0
    moved = decay * state.rewards + gain * losses / state.probs
    rewards = jnp.where(present, moved, state.rewards)
    now, before = exploration(step + 1), exploration(step)
    probs = (1 - num_domains * now) * jax.nn.softmax(before * rewards) + now
    return choose(jnp.all(jnp.isfinite(rewards)), ODMState(rewards, probs), state)

  view = lambda state: state.probs
  return Mixture(init, update, view, view)
