"""Per-domain language-model evaluation: sums on the device, float64 totals on the host.

Every number is a ratio of two totals, divided once at the end, so neither the batch size nor the
number of devices nor the padding of the last batch changes it (beyond float32 rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, Any]
EvalStep = Callable[[Any, Batch], jax.Array]


def make_eval_step(token_losses: Callable[[Any, Batch], jax.Array], num_domains: int) -> EvalStep:
  """Builds `(params, batch) -> f32[G, 3]`: nats, targets and bytes of each domain in the batch.

  Pure; the caller jits it. Rows and positions with base 0 count nowhere, whatever they hold.

  Args:
    token_losses: (params, batch) -> f32[B, T] in nats, unmasked.
    num_domains: G.
  """

  def eval_step(params, batch):
    valid = batch['base'] > 0
    nats = jnp.sum(jnp.where(valid, token_losses(params, batch), 0.0), axis=1)
    targets = jnp.sum(valid, axis=1, dtype=jnp.float32)
    num_bytes = jnp.where(targets > 0, batch['num_bytes'], 0.0)
    rows = jnp.stack([nats, targets, num_bytes], axis=1)
    domain = jax.nn.one_hot(batch['domain_id'], num_domains)
    # Not a matmul: it would round the inputs to 16 bits on some accelerators.
    return jnp.sum(domain[:, :, None] * rows[:, None, :], axis=0)

  return eval_step


def evaluate(
  eval_step: EvalStep,
  params: Any,
  batches: Iterable[Batch],
  to_global: Callable[[Batch], Batch],
  domains: Sequence[str],
) -> dict[str, Any]:
  """Runs the jitted eval step over host batches; returns what `summarize` does.

  With several processes the step's output must be replicated, and all pass as many batches.
  """
  totals = np.zeros((len(domains), 3), np.float64)
  pending = None
  for batch in batches:
    sums = eval_step(params, to_global(batch))
    if pending is not None:
      # Fetched one batch late, so that the device is never idle while the host reads.
      totals += np.asarray(pending, np.float64)
    pending = sums
  if pending is not None:
    totals += np.asarray(pending, np.float64)
  return summarize(totals, domains)


def summarize(sums: np.ndarray, domains: Sequence[str]) -> dict[str, Any]:
  """Turns totals into the numbers people read. Plain floats, ready for JSON.

  Per domain: loss = nats / targets, ppl = exp(loss), bpb = nats / (ln 2 * bytes). Micro numbers
  divide the totals over all domains; macro numbers average the domains; worst is the largest bpb.
  Domains without any valid target are left out everywhere.

  Args:
    sums: f64[G, 3], nats, targets and bytes of each domain.
    domains: the G names.

  Returns:
    {'bpb', 'loss', 'ppl': {domain: float}, 'micro_bpb', 'macro_bpb', 'worst_bpb', 'worst_domain',
    'macro_loss', 'micro_loss', 'tokens'}.

  Raises:
    ValueError: there was not a single valid target.
  """
  sums = np.asarray(sums, np.float64)
  present = {name: row for name, row in zip(domains, sums, strict=True) if row[1] > 0}
  if not present:
    raise ValueError('nothing to evaluate: no batch held a valid target')
  loss = {name: float(nats / targets) for name, (nats, targets, _) in present.items()}
  bpb = {name: _bits_per_byte(nats, size) for name, (nats, _, size) in present.items()}
  nats, targets, size = np.sum(list(present.values()), axis=0)
  worst = max(bpb, key=bpb.__getitem__)
  return {
    'bpb': bpb,
    'loss': loss,
    'ppl': {name: float(np.exp(value)) for name, value in loss.items()},
    'micro_bpb': _bits_per_byte(nats, size),
    'macro_bpb': float(np.mean(list(bpb.values()))),
    'worst_bpb': bpb[worst],
    'worst_domain': worst,
    'macro_loss': float(np.mean(list(loss.values()))),
    'micro_loss': float(nats / targets),
    'tokens': int(targets),
  }


def _bits_per_byte(nats: float, num_bytes: float) -> float:
  return float(nats / np.log(2) / num_bytes)
