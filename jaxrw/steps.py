"""The train step: per-example losses, weights, one weighted gradient. Pure; you jit, donate and
shard it.

  loss of a step = sum(base * w * loss) / sum(base)

Sums are carried to one final division, so microbatches, padding and devices cannot change what the
mean is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxrw import masked
from jaxrw.core import SIGNALS, Weighting, check_signals

Scope = Literal['global', 'microbatch']
ExampleBase = Literal['any', 'tokens']
Batch = Mapping[str, jax.Array]

# Batch leaves (one row per example) that reach the weighting, and the signal each becomes.
_ROW_SIGNALS = {
  'domain_id': 'group_ids',
  'example_id': 'example_ids',
  **{
    name: name
    for name in (
      'group_ids',
      'example_ids',
      'labels',
      'logits',
      'grad_norms',
      'alignment',
      'ref_losses',
      'representation',
      'sampling_prob',
    )
  },
}
_STEP_SIGNALS = ('anchor', 'objective_prob', 'extra')  # whole-step values, passed unsplit


class TrainState(NamedTuple):
  """Everything a step changes: optimizer step (int32[]), parameters, optimizer state, weighting
  state."""

  step: jax.Array
  params: Any
  opt_state: Any
  weighting: Any

  @classmethod
  def create(cls, params: Any, tx: optax.GradientTransformation, rw: Weighting) -> TrainState:
    """State at step 0."""
    return cls(jnp.zeros((), jnp.int32), params, tx.init(params), rw.init())


def make_train_step(
  loss: Callable[[Any, Any], jax.Array] | None,
  tx: optax.GradientTransformation,
  rw: Weighting,
  *,
  batched_loss: Callable[[Any, Batch], Any] | None = None,
  microbatches: int = 1,
  scope: Scope = 'global',
  example_base: ExampleBase = 'any',
  seed: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds `step(state, batch, signals=None) -> (state, metrics)`.

  Args:
    loss: (params, example) -> scalar; its vmap defines the per-example losses. May be None with
      `batched_loss`.
    tx: optax optimizer.
    rw: weighting. Its weights are constants for differentiation.
    batched_loss: (params, batch) -> losses [B] or [B, T], or (losses, dict of row signals); used
      when given and must agree with `loss`.
    microbatches: M, a count; row i goes to microbatch i mod M on every topology. One optimizer
      update in all.
    scope: over what weights are normalized. 'global' is the whole step: with M > 1 it costs one
      more forward pass (about +1/3). 'microbatch' needs none, and weights then compare an example
      with its microbatch only.
    example_base: 'any' gives every non-empty example mass 1; 'tokens' its number of valid tokens.
    seed: the weighting's `key` at a step is fold_in(key(seed), step).

  Returns:
    The step. `batch` is a dict of arrays with a common leading axis B. Known leaves: `base`
    (validity, float[B] or
      [B, T]; default all ones), `weights` (float[B] or [B, T], the weights a chain starts from),
      `domain_id`, `example_id`, and any row signal of the weighting. `signals` are values for the
      whole step: `anchor`, `objective_prob`, `extra`. Metrics are sums (divide them once):
      `loss_sum` sum(base * loss), `weighted_loss_sum` sum(base * w * loss), `base_sum`;
      `grad_norm`; and the arrays `losses`, `weights`, `base` of the examples, in row order.

  Raises:
    ValueError, TypeError: on building or tracing, for arguments or batches that do not fit.

  Example:
    >>> import jax, jax.numpy as jnp, optax, jaxrw
    >>> loss = lambda w, example: (example['x'] @ w - example['y']) ** 2
    >>> tx, rw = optax.sgd(0.1), jaxrw.linupper(0.4)
    >>> step = jax.jit(jaxrw.make_train_step(loss, tx, rw))
    >>> batch = {'x': jnp.eye(4, 3), 'y': jnp.arange(4.0)}
    >>> state, metrics = step(jaxrw.TrainState.create(jnp.zeros(3), tx, rw), batch)
    >>> float(metrics['loss_sum'] / metrics['base_sum'])
    3.5
  """
  if loss is None and batched_loss is None:
    raise ValueError('give loss(params, example), batched_loss(params, batch), or both')
  if not isinstance(microbatches, int) or microbatches < 1:
    raise ValueError(f'microbatches={microbatches!r} must be a whole number of at least 1')
  if scope not in ('global', 'microbatch'):
    raise ValueError(f"scope={scope!r} must be 'global' or 'microbatch'")
  if example_base not in ('any', 'tokens'):
    raise ValueError(f"example_base={example_base!r} must be 'any' or 'tokens'")

  compute_losses = batched_loss or jax.vmap(cast(Callable, loss), in_axes=(None, 0))

  def forward(params, batch):
    """(losses, base, row signals of the forward pass) of some rows."""
    out = compute_losses(params, batch)
    losses, signals = out if isinstance(out, tuple) else (out, {})
    _check_losses(losses, batch)
    _check_row_signals(signals, losses.shape[0])
    losses = losses.astype(jnp.promote_types(jnp.float32, losses.dtype))
    return losses, base_measure(batch.get('base'), losses, example_base), signals

  def weigh(weighting, losses, base, batch, row_signals, step, step_signals):
    """The weights of some rows, constant for differentiation, and the weighting's new state."""
    weights, weighting = rw.update(
      _initial_weights(batch.get('weights'), losses),
      weighting,
      **_gather_signals(batch, row_signals, step_signals),
      losses=jax.lax.stop_gradient(losses),
      base=base,
      step=step,
      key=jax.random.fold_in(jax.random.key(seed), step),
    )
    return jax.lax.stop_gradient(weights), weighting

  def gradient(params, weighting, batch, step, step_signals, weights=None):
    """Gradient of sum(base * w * loss) over some rows; computes the weights unless they are
    given."""

    def objective(params):
      losses, base, row_signals = forward(params, batch)
      w, state = weights, weighting
      if w is None:
        w, state = weigh(weighting, losses, base, batch, row_signals, step, step_signals)
      return masked.total(losses, base * w), (state, (losses, w, base))

    return jax.grad(objective, has_aux=True)(params)

  def one_pass(state, batch, step_signals):
    return gradient(state.params, state.weighting, batch, state.step, step_signals)

  def accumulated(state, batch, step_signals, weights=None):
    """Sums the gradients of the microbatches; `weights` [B] are sliced when given."""
    rows = split_rows((batch, weights), microbatches)

    def body(carry, rows):
      grads, weighting = carry
      part, w = rows
      new, (weighting, examples) = gradient(
        state.params, weighting, part, state.step, step_signals, w
      )
      return (jax.tree.map(jnp.add, grads, new), weighting), examples

    wide = lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.float32, p.dtype))
    zeros = jax.tree.map(wide, state.params)
    (grads, weighting), examples = jax.lax.scan(body, (zeros, state.weighting), rows)
    return grads, (weighting, join_rows(examples))

  def two_pass(state, batch, step_signals):
    """All losses first, then weights once over the whole step, then the gradients."""
    parts = split_rows(batch, microbatches)
    losses, base, row_signals = join_rows(jax.lax.map(lambda b: forward(state.params, b), parts))
    weights, weighting = weigh(
      state.weighting, losses, base, batch, row_signals, state.step, step_signals
    )
    grads, (_, examples) = accumulated(state, batch, step_signals, weights)
    return grads, (weighting, examples)

  many = two_pass if scope == 'global' else accumulated
  compute = one_pass if microbatches == 1 else many

  def step(state: TrainState, batch: Batch, signals: Mapping[str, Any] | None = None):
    signals = dict(signals or {})
    _check_step_signals(signals)
    _check_rows(batch, microbatches)
    grads, (weighting, (losses, weights, base)) = compute(state, batch, signals)
    measures = jnp.stack([base, base * weights, base])
    terms = jnp.where(
      measures != 0, measures * jnp.stack([losses, losses, jnp.ones_like(losses)]), 0
    )
    sums = jnp.sum(terms, axis=tuple(range(1, terms.ndim)))  # one collective for all three
    per_base = masked.divide(jnp.ones_like(sums[2]), sums[2])
    grads = jax.tree.map(lambda g, p: (g * per_base).astype(p.dtype), grads, state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss_sum': sums[0],
      'weighted_loss_sum': sums[1],
      'base_sum': sums[2],
      'grad_norm': optax.tree.norm(grads),
      'losses': losses,
      'weights': weights,
      'base': base,
    }
    return TrainState(state.step + 1, params, opt_state, weighting), metrics

  return step


def base_measure(
  validity: jax.Array | None, losses: jax.Array, example_base: ExampleBase = 'any'
) -> jax.Array:
  """The measure of the ordinary mean, in the shape of the losses.

  With v the validity, 'tokens' gives v; 'any' gives v / max(1, sum_T v), so that an example has
  mass 1 however long it is, and 0 if it is empty. Token validity of `[B]` losses is summed over T.

  Args:
    validity: float[B], float[B, T] or None (all valid). A count of tokens `[B]` is validity, too.
    losses: float[B] or float[B, T].
    example_base: 'any' or 'tokens'.

  Returns:
    float, the losses' shape and dtype.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.base_measure(jnp.array([[1.0, 1.0], [1.0, 0.0]]), jnp.zeros((2, 2)))
    Array([[0.5, 0.5],
           [1. , 0. ]], dtype=float32)
  """
  v = jnp.ones_like(losses) if validity is None else validity.astype(losses.dtype)
  if v.ndim < losses.ndim:
    v = jnp.broadcast_to(v[:, None], losses.shape)
  if example_base == 'any':
    count = v if v.ndim == 1 else jnp.sum(v, axis=1, keepdims=True)
    v = v / jnp.maximum(1, count)
  if v.ndim > losses.ndim:
    v = jnp.sum(v, axis=1)
  if v.shape != losses.shape:
    shape = jnp.shape(cast(jax.Array, validity))
    raise ValueError(f'base has shape {shape}, losses {losses.shape}; they must agree')
  return v


def split_rows(tree: Any, microbatches: int) -> Any:
  """`[B, ...]` leaves become `[M, B / M, ...]`; row i goes to microbatch i mod M, without moving
  between devices."""
  return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), tree)


def join_rows(tree: Any) -> Any:
  """Inverse of `split_rows`: back to row order."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _check_losses(losses: jax.Array, batch: Batch) -> None:
  rows = jax.tree.leaves(batch)[0].shape[0]
  if losses.ndim not in (1, 2) or losses.shape[0] != rows:
    raise ValueError(
      f'losses have shape {losses.shape}; expected [B] or [B, T] with B = {rows} rows. '
      'Return one loss per example or token, not their mean'
    )


def _check_row_signals(signals: Mapping[str, Any], rows: int) -> None:
  if not isinstance(signals, Mapping):
    raise TypeError(
      f'batched_loss returned {type(signals).__name__} beside the losses; '
      'expected a dict of signals'
    )
  for name, value in signals.items():
    if name in SIGNALS and name not in _ROW_SIGNALS.values():
      raise TypeError(
        f'batched_loss returned the signal {name!r}, which does not come from the forward pass; '
        'rename it (your own signals reach the weighting in extra)'
      )
    for leaf in jax.tree.leaves(value):
      if jnp.shape(leaf)[:1] != (rows,):
        raise ValueError(
          f'batched_loss returned {name!r} with shape {jnp.shape(leaf)}; expected one row for each '
          f'of the {rows} examples'
        )


def _check_rows(batch: Batch, microbatches: int) -> None:
  rows = {
    jax.tree_util.keystr(path): leaf.shape[:1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
  }
  if len(set(rows.values())) != 1 or () in rows.values():
    raise ValueError(f'all batch leaves need the same leading axis B, got {rows}')
  (count,) = next(iter(rows.values()))
  if count % microbatches:
    raise ValueError(f'a batch of {count} rows does not split into microbatches={microbatches}')


def _check_step_signals(signals: Mapping[str, Any]) -> None:
  check_signals(signals)
  for name in signals:
    if name not in _STEP_SIGNALS:
      raise TypeError(
        f'signal {name!r} has one row per example: pass it as a batch leaf or return it from '
        f'batched_loss; signals= takes {", ".join(_STEP_SIGNALS)}'
      )


def _initial_weights(weights: jax.Array | None, losses: jax.Array) -> jax.Array:
  """The weights a chain starts from: the dataset's, broadcast to the losses' shape, or ones."""
  if weights is None:
    return jnp.ones_like(losses)
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    raise TypeError(f'batch["weights"] has dtype {weights.dtype}; store weights as floats')
  if weights.ndim > losses.ndim:
    raise ValueError(
      f'batch["weights"] has shape {weights.shape}, but the losses are per example {losses.shape}; '
      'return per-token losses from batched_loss'
    )
  return jnp.broadcast_to(
    masked.over_tokens(weights, losses) if weights.ndim == 1 else weights, losses.shape
  ).astype(losses.dtype)


def _gather_signals(batch: Batch, row_signals: Mapping[str, Any], step_signals: Mapping[str, Any]):
  """Signals of some rows: reserved batch leaves, what the forward pass returned, whole-step
  values."""
  signals: dict[str, Any] = {
    signal: batch[leaf] for leaf, signal in _ROW_SIGNALS.items() if leaf in batch
  }
  extra = dict(step_signals.get('extra', {}))
  for name, value in row_signals.items():
    if name in SIGNALS:
      signals[name] = value
    else:
      extra[name] = value
  signals |= {name: value for name, value in step_signals.items() if name != 'extra'}
  if extra:
    signals['extra'] = extra
  return jax.lax.stop_gradient(signals)
