"""The train step: per-example losses, weights, one weighted gradient. Pure; you jit, donate and
shard it.

  loss of a step = sum(base * w * loss) / sum(base)

Sums are carried to one final division, so microbatches, padding and devices cannot change what the
mean is. What each way to accumulate over M microbatches costs, in forward passes of the whole batch
(a backward pass is two):

  | scope        | weights compare an example with  | forward | backward | which weightings        |
  |--------------|----------------------------------|---------|----------|-------------------------|
  | 'global'     | the whole step                   | 2       | 1        | all (M = 1: 1 forward)  |
  | 'online'     | the whole step, in one pass      | 1       | 1        | softmax type (KL-DRO)   |
  | 'microbatch' | its microbatch                   | 1       | 1        | all                     |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxrw import masked, selective
from jaxrw.core import SIGNALS, Weighting, check_signals
from jaxrw.selective import Keep

Scope = Literal['global', 'online', 'microbatch']
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
# Values for the whole step, passed unsplit: to the weighting, and to `row_signals` alone.
_STEP_SIGNALS = ('anchor', 'objective_prob', 'extra')
_ROW_SIGNAL_INPUTS = ('direction', 'reference')
_KEEP_STREAM = 1  # keeps the sampling of rows independent of the weighting's own noise


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
  row_signals: Callable[[Any, Batch, Mapping[str, Any]], Mapping[str, Any]] | None = None,
  microbatches: int = 1,
  scope: Scope = 'global',
  keep: Keep | None = None,
  probed_loss: Callable[[Any, Batch, Any], jax.Array] | None = None,
  probe_shards: int = 1,
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
    row_signals: (params, batch, signals) -> dict of further row signals for the weighting, such as
      the `alignment` with a direction or reference losses. Nothing is differentiated through them.
    microbatches: M, a count; row i goes to microbatch i mod M on every topology. One optimizer
      update in all.
    scope: over what weights are normalized, and how that is computed; see the table above.
      'online' needs a weighting of the softmax type (`Weighting.log_weights`).
    keep: selective backward, see `jaxrw.Keep`; all rows get losses and weights, some a gradient.
    probed_loss: (params, batch, probe) -> the losses of `batched_loss` from layers that take a
      probe (`jaxrw.gradients`). Then the backward pass of the step also gives `row_grad_norms` [B]
      and, with the signal `direction`, `row_alignment` [B]: of each row's own term
      base * w * loss / sum(base), so that the alignments add up to that of the step's gradient.
    probe_shards: devices that share the rows, for `probed_loss`.
    example_base: 'any' gives every non-empty example mass 1; 'tokens' its number of valid tokens.
    seed: the weighting's `key` at a step is fold_in(key(seed), step).

  Returns:
    The step. `batch` is a dict of arrays with a common leading axis B. Known leaves: `base`
      (validity, float[B] or [B, T]; default all ones), `weights` (float[B] or [B, T], the weights a
      chain starts from), `domain_id`, `example_id`, and any row signal of the weighting. `signals`
      are values for the whole step: `anchor`, `objective_prob`, `extra`; for `row_signals` alone
      `direction` (a pytree like params) and `reference` (another model's). Metrics are sums (divide
      them once): `loss_sum` sum(base * loss), `weighted_loss_sum` sum(base * w * loss), `base_sum`;
      `grad_norm`; the arrays `losses`, `weights`, `base` of the examples, in row order; with `keep`
      also `overflow`, rows of non-zero weight without gradient.

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
  if not isinstance(microbatches, int) or microbatches < 1:
    raise ValueError(f'microbatches={microbatches!r} must be a whole number of at least 1')
  if scope not in ('global', 'online', 'microbatch'):
    raise ValueError(f"scope={scope!r} must be 'global', 'online' or 'microbatch'")
  if scope == 'online' and rw.log_weights is None:
    raise ValueError(
      "scope='online' rescales softmax weights as it goes; this weighting is not of that type "
      "(kl_dro, tilted, linupper_stale and their chains are): use scope='global'"
    )
  if keep is not None and scope != 'global':
    raise ValueError(f"keep needs scope='global', not {scope!r}: all weights come first")

  if probed_loss is not None and (keep is not None or scope == 'online'):
    raise ValueError(
      'probed_loss needs a backward pass of all rows under their weights: leave out '
      "keep, and use scope='global' or 'microbatch'"
    )

  forward = forward_fn(loss, batched_loss, example_base, row_signals)
  weigh = weigh_fn(rw, seed)

  def gradient(params, batch, step_signals, weights_of):
    """Gradient of sum(base * w * loss) over some rows; `weights_of(losses, base, row signals)`
    returns (w, anything). Also (losses, w, base), what a probe read, and that thing."""

    def objective(params, forward):
      losses, base, signals = forward(params, batch, step_signals)
      w, more = weights_of(jax.lax.stop_gradient(losses), base, signals)
      w = jax.lax.stop_gradient(w)
      return masked.total(losses, base * w), ((losses, w, base), more)

    if probed_loss is None:
      grads, (examples, more) = jax.grad(objective, has_aux=True)(params, forward)
      return grads, examples, {}, more

    from jaxrw import gradients  # here, because it imports this module

    def probed(params, probe):
      losses = lambda params, batch: cast(Callable, probed_loss)(params, batch, probe)
      return objective(params, forward_fn(None, losses, example_base, row_signals))

    directions = (step_signals['direction'],) if 'direction' in step_signals else ()
    rows = jax.tree.leaves(batch)[0].shape[0]
    probe = gradients.make_probe(rows, directions, shards=probe_shards)
    read = gradients.probed_value_and_grad(probed, has_aux=True)
    (_, (examples, more)), grads, readings = read(params, probe)
    named = {'row_grad_norms': jnp.sqrt(readings.squared_norms)}
    if directions:
      named['row_alignment'] = readings.products[:, 0]
    return grads, examples, named, more

  def accumulate(params, carry, rows, part):
    """Sums `part(carry, rows) -> (gradient, factor of the sum so far, carry, outputs)` over the
    microbatches of `rows`."""

    def body(state, rows):
      grads, carry = state
      new, factor, carry, outputs = part(carry, rows)
      return (jax.tree.map(lambda a, b: a * factor + b, grads, new), carry), outputs

    wide = lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.float32, p.dtype))
    start = (jax.tree.map(wide, params), carry)
    (grads, carry), outputs = jax.lax.scan(body, start, split_rows(rows, microbatches))
    return grads, carry, join_rows(outputs)

  def weigh_here(state, weighting, batch, step_signals):
    return lambda losses, base, signals: weigh(
      weighting, losses, base, batch, signals, state.step, step_signals
    )

  def one_pass(state, batch, step_signals):
    grads, examples, readings, weighting = gradient(
      state.params, batch, step_signals, weigh_here(state, state.weighting, batch, step_signals)
    )
    return grads, weighting, examples, readings

  def microbatch_scope(state, batch, step_signals):
    def part(weighting, rows):
      grads, examples, readings, weighting = gradient(
        state.params, rows, step_signals, weigh_here(state, weighting, rows, step_signals)
      )
      return grads, 1, weighting, (examples, readings)

    grads, weighting, outputs = accumulate(state.params, state.weighting, batch, part)
    return grads, weighting, *outputs

  def online(state, batch, step_signals):
    """Gradients under unnormalized weights exp(s - m), where m is the largest s so far: the sum so
    far shrinks when m grows, and is normalized at the end."""

    def part(carry, rows):
      top, mass, tilted = carry

      def unnormalized(losses, base, signals):
        incoming = _initial_weights(rows.get('weights'), losses)
        log_weights = cast(Callable, rw.log_weights)(
          state.weighting,
          **_gather_signals(rows, signals, step_signals),
          losses=losses,
          base=base,
          step=state.step,
        )
        _, measure = masked.example_level(base, base * incoming)
        new_top = jnp.maximum(top, jnp.max(jnp.where(measure != 0, log_weights, -jnp.inf)))
        shift = jnp.where(new_top == -jnp.inf, 0, new_top)
        tilt = jnp.where(measure != 0, jnp.exp(log_weights - shift), 0)
        factor = jnp.where(top == -jnp.inf, 0, jnp.exp(top - shift))
        sums = jnp.sum(jnp.stack([measure, measure * tilt]), axis=1)
        carry = new_top, mass + sums[0], tilted * factor + sums[1]
        return incoming * masked.over_tokens(tilt, losses), (factor, carry, signals)

      grads, (losses, _, base), _, (factor, carry, signals) = gradient(
        state.params, rows, step_signals, unnormalized
      )
      return grads, factor, carry, (losses, base, signals)

    zero = jnp.zeros((), jnp.float32)
    grads, (_, mass, tilted), (losses, base, signals) = accumulate(
      state.params, (zero - jnp.inf, zero, zero), batch, part
    )
    normalizer = masked.divide(mass, tilted)
    weights, weighting = weigh_here(state, state.weighting, batch, step_signals)(
      losses, base, signals
    )
    grads = jax.tree.map(lambda g: g * normalizer, grads)
    return grads, weighting, (losses, weights, base), {}

  def forward_all(state, batch, step_signals):
    """Losses, base and row signals of all rows, without a gradient."""
    if microbatches == 1:
      return forward(state.params, batch, step_signals)
    parts = split_rows(batch, microbatches)
    return join_rows(jax.lax.map(lambda rows: forward(state.params, rows, step_signals), parts))

  def gradient_under(state, batch, step_signals, weights):
    """The gradient of rows whose weights are known, and what a probe read."""

    def part(carry, rows):
      rows, w = rows
      grads, _, readings, _ = gradient(state.params, rows, step_signals, lambda *_: (w, None))
      return grads, 1, carry, readings

    if microbatches == 1:
      grads, _, _, readings = part((), (batch, weights))
    else:
      grads, _, readings = accumulate(state.params, (), (batch, weights), part)
    return grads, readings

  def two_pass(state, batch, step_signals):
    """All losses first, then weights once over the whole step, then the gradients."""
    losses, base, signals = forward_all(state, batch, step_signals)
    weights, weighting = weigh_here(state, state.weighting, batch, step_signals)(
      losses, base, signals
    )
    grads, readings = gradient_under(state, batch, step_signals, weights)
    return grads, weighting, (losses, weights, base), readings

  def selective_backward(state, batch, step_signals):
    """Losses and weights of all rows, the gradient of the kept ones."""
    keep_rows, backward = cast(Keep, keep), None

    def losses_of(params, batch):
      losses, *more = forward(params, batch, step_signals)
      return losses, more

    if keep_rows.reuse:
      losses, (base, signals), backward = selective.kept_gradient(losses_of, state.params, batch)
    else:
      losses, base, signals = forward_all(state, batch, step_signals)
    weights, weighting = weigh_here(state, state.weighting, batch, step_signals)(
      losses, base, signals
    )
    _, mass = masked.example_level(base, base * jnp.abs(weights))
    key = jax.random.fold_in(_step_key(seed, state.step), _KEEP_STREAM)
    indices, factors = selective.choose_rows(mass, keep_rows, key)
    rows, kept_base, kept = selective.take_rows((batch, base, weights), indices)
    kept = kept * masked.over_tokens(factors.reshape(-1), kept)
    if backward is not None:
      grads = backward(indices, jnp.where(kept_base != 0, kept_base * kept, 0))
    else:
      grads, _ = gradient_under(state, rows, step_signals, kept)
    overflow = jnp.sum(mass != 0) - jnp.sum(factors != 0)
    return grads, weighting, (losses, weights, base), {'overflow': overflow}

  if keep is not None:
    compute = selective_backward
  elif microbatches == 1:
    compute = one_pass
  else:
    compute = {'global': two_pass, 'online': online, 'microbatch': microbatch_scope}[scope]

  def step(state: TrainState, batch: Batch, signals: Mapping[str, Any] | None = None):
    signals = dict(signals or {})
    _check_step_signals(signals)
    _check_rows(batch, microbatches, keep)
    grads, weighting, examples, more = compute(state, batch, signals)
    state, metrics = finish(tx, state, grads, weighting, *examples)
    for name in ('row_grad_norms', 'row_alignment'):
      if name in more:
        more[name] = masked.divide(more[name], metrics['base_sum'])
    return state, metrics | more

  return step


def forward_fn(
  loss: Callable[[Any, Any], jax.Array] | None,
  batched_loss: Callable[[Any, Batch], Any] | None,
  example_base: ExampleBase,
  row_signals: Callable[[Any, Batch, Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Callable[..., tuple[jax.Array, jax.Array, dict[str, Any]]]:
  """`forward(params, batch, step signals) -> (losses, base, row signals)` of some rows.

  Losses are float32 or wider; row signals are constants for differentiation.
  """
  if loss is None and batched_loss is None:
    raise ValueError('give loss(params, example), batched_loss(params, batch), or both')
  if example_base not in ('any', 'tokens'):
    raise ValueError(f"example_base={example_base!r} must be 'any' or 'tokens'")
  compute_losses = batched_loss or jax.vmap(cast(Callable, loss), in_axes=(None, 0))

  def forward(params, batch, step_signals):
    out = compute_losses(params, batch)
    losses, signals = out if isinstance(out, tuple) else (out, {})
    _check_losses(losses, batch)
    _check_row_signals('batched_loss', signals, losses.shape[0])
    if row_signals is not None:
      more = row_signals(jax.lax.stop_gradient(params), batch, step_signals)
      _check_row_signals('row_signals', more, losses.shape[0])
      signals = {**signals, **more}
    losses = losses.astype(jnp.promote_types(jnp.float32, losses.dtype))
    base = base_measure(batch.get('base'), losses, example_base)
    return losses, base, jax.lax.stop_gradient(dict(signals))

  return forward


def weigh_fn(rw: Weighting, seed: int) -> Callable[..., tuple[jax.Array, Any]]:
  """`weigh(weighting state, losses, base, batch, row signals, step, step signals) -> (weights,
  weighting state)`, with every signal the weighting may ask for."""

  def weigh(weighting, losses, base, batch, row_signals, step, step_signals):
    return rw.update(
      _initial_weights(batch.get('weights'), losses),
      weighting,
      **_gather_signals(batch, row_signals, step_signals),
      losses=jax.lax.stop_gradient(losses),
      base=base,
      step=step,
      key=_step_key(seed, step),
    )

  return weigh


def finish(
  tx: optax.GradientTransformation,
  state: TrainState,
  grads: Any,
  weighting: Any,
  losses: jax.Array,
  weights: jax.Array,
  base: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The one division, the optimizer's update and the metrics; `grads` are those of
  sum(base * w * loss)."""
  measures = jnp.stack([base, base * weights, base])
  terms = jnp.where(measures != 0, measures * jnp.stack([losses, losses, jnp.ones_like(losses)]), 0)
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


def _step_key(seed: int, step: jax.Array) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), step)


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


def _check_row_signals(source: str, signals: Mapping[str, Any], rows: int) -> None:
  if not isinstance(signals, Mapping):
    raise TypeError(f'{source} returned {type(signals).__name__}; expected a dict of row signals')
  for name, value in signals.items():
    if name in SIGNALS and name not in _ROW_SIGNALS.values():
      raise TypeError(
        f'{source} returned {name!r}, a reserved name that is not one of a row signal; '
        'rename it (your own signals reach the weighting in extra)'
      )
    for leaf in jax.tree.leaves(value):
      if jnp.shape(leaf)[:1] != (rows,):
        raise ValueError(
          f'{source} returned {name!r} with shape {jnp.shape(leaf)}; expected one row for each of '
          f'the {rows} examples'
        )


def _check_rows(batch: Batch, microbatches: int, keep: Keep | None) -> None:
  rows = {
    jax.tree_util.keystr(path): leaf.shape[:1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
  }
  if len(set(rows.values())) != 1 or () in rows.values():
    raise ValueError(f'all batch leaves need the same leading axis B, got {rows}')
  (count,) = next(iter(rows.values()))
  if count % microbatches:
    raise ValueError(f'a batch of {count} rows does not split into microbatches={microbatches}')
  if keep is not None:
    keep.check(count, microbatches)


def _check_step_signals(signals: Mapping[str, Any]) -> None:
  check_signals(name for name in signals if name not in _ROW_SIGNAL_INPUTS)
  for name in signals:
    if name not in _STEP_SIGNALS + _ROW_SIGNAL_INPUTS:
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
  whole_step = {name: v for name, v in step_signals.items() if name not in _ROW_SIGNAL_INPUTS}
  signals |= {name: value for name, value in whole_step.items() if name != 'extra'}
  if extra:
    signals['extra'] = extra
  return jax.lax.stop_gradient(signals)
