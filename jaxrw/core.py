"""The interface: a weighting is a pair of pure functions, and weightings compose.

`weights` are dimensionless multipliers with neutral value 1. A stage receives the weights so far
and returns them times its own, so a chain starts at ones and ends at the multipliers of the losses.
The pair looks like an optax transformation but is its own type: weights change with the *optimizer
step*, which is a signal here, and never with a count of calls.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

SIGNALS = (
  'losses',
  'base',
  'group_ids',
  'labels',
  'logits',
  'example_ids',
  'step',
  'key',
  'grad_norms',
  'alignment',
  'ref_losses',
  'representation',
  'anchor',
  'sampling_prob',
  'objective_prob',
  'extra',
)

Factory = TypeVar('Factory', bound=Callable[..., Any])


class Weighting(NamedTuple):
  """A stateful map from signals to weights.

  Attributes:
    init: () -> state. A stateless weighting returns `()`.
    update: (weights, state, **signals) -> (weights, state). `weights` are float[B] or float[B, T],
      the shape of the losses; what comes back has the same shape, dtype and sharding. A signal the
      stage needs is a keyword without default; the rest it swallows.
    log_weights: (state, **signals) -> float[B], for weightings of the softmax type: `update`
      multiplies by exp(log_weights) and then normalizes over the rows. A row's value may depend on
      that row and the state only, so one pass can accumulate gradients of rows whose normalizer it
      does not know yet (`make_train_step` with scope 'online'). None for all others.
  """

  init: Callable[[], Any]
  update: Callable[..., tuple[jax.Array, Any]]
  log_weights: Callable[..., jax.Array] | None = None


def stateless(
  update: Callable[..., jax.Array], log_weights: Callable[..., jax.Array] | None = None
) -> Weighting:
  """A weighting without state, from `update(weights, **signals) -> weights`, and
  `log_weights(**signals)` if it is of the softmax type."""
  return Weighting(
    lambda: (),
    lambda weights, state, **signals: (update(weights, **signals), state),
    None if log_weights is None else lambda state, **signals: log_weights(**signals),
  )


@dataclasses.dataclass(frozen=True)
class Declaration:
  """What a public weighting promises; shown in the docs and held to by the contract tests.

  Attributes:
    scale: 'normalized' keeps sum(base * w); 'absolute' does not look at the batch's sum, and its
      mean may be anything; 'signed' may sum to 0.
    level: 'example' gives all tokens of an example the same multiplier; 'entry' acts on `[B]` or
      `[B, T]` as is; 'token' needs `[B, T]`.
    provenance: 'paper', 'official_code', 'reconstructed' or 'ours'.
    source: where the formula comes from.
  """

  scale: str
  level: str
  provenance: str
  source: str = ''


def declare(
  scale: str, level: str, provenance: str, source: str = ''
) -> Callable[[Factory], Factory]:
  """Attaches a `Declaration` to a public factory, as its attribute `declaration`."""

  def mark(factory: Factory) -> Factory:
    vars(factory)['declaration'] = Declaration(scale, level, provenance, source)
    return factory

  return mark


def at_step(value: Any, step: Any, name: str) -> Any:
  """A hyperparameter at a step: `value(step)` for a schedule, else the value itself."""
  if not callable(value):
    return value
  if step is None:
    raise TypeError(f'{name} is a schedule, so the weighting needs the signal `step`')
  return value(step)


def check_signals(names: Iterable[str]) -> None:
  """Rejects signal names nobody defined; a stage would silently swallow a misspelled one.

  Raises:
    TypeError: for an unknown name, with the nearest known one.
  """
  for name in names:
    if name not in SIGNALS:
      near = difflib.get_close_matches(name, SIGNALS, n=1)
      hint = f'did you mean {near[0]!r}? ' if near else ''
      raise TypeError(
        f"unknown signal {name!r}: {hint}your own signals go in extra={{'{name}': ...}}"
      )


def chain(**stages: Weighting) -> Weighting:
  """Runs stages in the order given; each gets the weights of the one before.

  The state is a dict keyed by stage name in which stateless stages leave no trace, so a checkpoint
  survives adding or removing one.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> rw = jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(1.5))
    >>> w, _ = rw.update(jnp.ones(3), rw.init(), losses=jnp.array([1.0, 2.0, 3.0]))
    >>> [round(float(x), 4) for x in w]
    [0.1183, 1.4409, 1.4409]
  """

  def init() -> dict[str, Any]:
    states = {name: stage.init() for name, stage in stages.items()}
    return {name: state for name, state in states.items() if jax.tree.leaves(state)}

  def update(weights: jax.Array, state: Mapping[str, Any], **signals: Any):
    check_signals(signals)
    new_state = {}
    for name, stage in stages.items():
      inner = state[name] if name in state else stage.init()
      if name not in state and jax.tree.leaves(inner):
        raise KeyError(f'no state for stage {name!r}; start from init()')
      weights, inner = stage.update(weights, inner, **signals)
      if name in state:
        new_state[name] = inner
    return weights, new_state

  tilts = {name: s.log_weights for name, s in stages.items() if s.log_weights is not None}
  if not stages or len(tilts) < len(stages):
    return Weighting(init, update)

  def log_weights(state: Mapping[str, Any], **signals: Any):
    check_signals(signals)
    inner = lambda name: state[name] if name in state else stages[name].init()
    return sum((f(inner(name), **signals) for name, f in tilts.items()), start=jnp.zeros(()))

  return Weighting(init, update, log_weights)


def after(start: int, stage: Weighting) -> Weighting:
  """Burn-in: the stage acts from optimizer step `start` on; before, weights and state pass
  unchanged.

  Args:
    start: first step at which the stage acts; 0 is the stage itself.
    stage: any weighting that keeps the shape of the weights.

  Raises:
    ValueError: if `start` is negative, or the stage changes the weights' shape.
  """
  if start < 0:
    raise ValueError(f'start={start} must be at least 0')

  def update(weights: jax.Array, state: Any, *, step: Any, **signals: Any):
    new, new_state = stage.update(weights, state, step=step, **signals)
    if new.shape != weights.shape:
      raise ValueError(f'after: the stage turned weights {weights.shape} into {new.shape}')
    return jax.tree.map(
      lambda a, b: jnp.where(step >= start, a, b), (new, new_state), (weights, state)
    )

  tilt = stage.log_weights
  if tilt is None:
    return Weighting(stage.init, update)

  def log_weights(state: Any, *, step: Any, **signals: Any):
    return jnp.where(step >= start, tilt(state, step=step, **signals), 0)

  return Weighting(stage.init, update, log_weights)


def from_config(order: Iterable[str], specs: Mapping[str, Mapping[str, Any]]) -> Weighting:
  """Builds a chain from plain mappings, for configs.

  Args:
    order: stage names, first to last. Order lives here because config mappings sort their keys.
    specs: stage name -> dict(fn=name in `jaxrw.weights`, start=burn-in steps (optional),
      **arguments). A `temperature` may be a mapping with the arguments of `temperature_schedule`; a
      `stage` may be another spec.

  Raises:
    ValueError: unknown stage or function, arguments the function refuses, or a stage after one
      with signed weights.

  Example:
    >>> import jaxrw
    >>> rw = jaxrw.from_config(('loss', 'cap'), {
    ...     'loss': dict(fn='linupper', temperature=0.4, start=1_000),
    ...     'cap': dict(fn='cap', limit=4.0)})
  """
  from jaxrw import weights  # here, because the weightings themselves import this module

  order = tuple(order)
  if len(set(order)) != len(order):
    raise ValueError(f'weighting={order} names a stage twice; stage names must differ')
  unused = sorted(set(specs) - set(order))
  if unused:
    raise ValueError(f'w.{unused[0]} is not in weighting={order}; add it there or remove it')
  missing = [name for name in order if name not in specs]
  if missing:
    raise ValueError(f'weighting={order} names {missing[0]!r}, but w.{missing[0]} is missing')
  stages = {name: _stage_from_config(f'w.{name}', specs[name]) for name in order}
  for name, following in itertools.pairwise(order):
    fn = specs[name]['fn']
    if getattr(weights, fn).declaration.scale == 'signed':
      raise ValueError(
        f'w.{name}.fn={fn!r} gives signed weights, which can sum to 0; {following!r} after it '
        f'would scale them by that sum: put {name!r} last'
      )
  return chain(**stages)


def _stage_from_config(path: str, spec: Mapping[str, Any]) -> Weighting:
  from jaxrw import weights  # here, because the weightings themselves import this module

  arguments = dict(spec)
  start = arguments.pop('start', 0)
  name = arguments.pop('fn', None)
  known = [n for n in weights.__all__ if hasattr(getattr(weights, n), 'declaration')]
  if name not in known:
    near = difflib.get_close_matches(str(name).removesuffix('_weights'), known, n=1)
    hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(known)}'
    raise ValueError(f'{path}.fn={name!r} is not a weighting; {hint}')
  if 'stage' in arguments:
    if not isinstance(arguments['stage'], Mapping):
      raise ValueError(f'{path}.stage={arguments["stage"]!r} must be a mapping with its own fn')
    arguments['stage'] = _stage_from_config(f'{path}.stage', arguments['stage'])
  try:
    if isinstance(arguments.get('temperature'), Mapping):
      arguments['temperature'] = weights.temperature_schedule(**arguments['temperature'])
    stage = getattr(weights, name)(**arguments)
    return after(start, stage) if start else stage
  except (TypeError, ValueError) as error:
    raise ValueError(f'{path}: {error}') from error


def check_range(ids: jax.Array, size: int, name: str) -> jax.Array:
  """Which ids name one of `size` entries, or are -1 (unknown).

  Indexing clamps or drops an id out of range without a word. Concrete arrays are checked here; for
  traced ones the caller turns the weight of such a row into NaN, which the trainer reports.

  Args:
    ids: int[B].
    size: number of entries, valid ids are 0 .. size - 1.
    name: the signal's name, for the message.

  Returns:
    bool[B], False where an id is out of range.

  Raises:
    TypeError: ids that are not integers.
    IndexError: a concrete id out of range.
  """
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f'{name} has dtype {ids.dtype}; expected integers')
  fine = (ids >= -1) & (ids < size)
  # Inside jit even jnp.all of a host array is traced.
  every = np.all if isinstance(fine, np.ndarray) else jnp.all
  if not isinstance(fine, jax.core.Tracer) and not bool(every(fine)):
    raise IndexError(
      f'{name} holds {ids[~fine][0]}, but there are {size} entries: ids are 0 to {size - 1}, or -1 '
      'for unknown'
    )
  return fine


def check_groups(group_ids: jax.Array, num_groups: int, rows: int) -> jax.Array:
  """Which rows name one of `num_groups` groups, are unknown (-1), or belong to several in part.

  Args:
    group_ids: int[B], checked as by `check_range`; or float[B, G], how far each row belongs to each
      group (the probabilities of a proxy): at least 0 and at most 1 in sum; what a row lacks
      to 1 is unknown. Concrete arrays are checked here; for traced ones the caller turns the weight
      of such a row into NaN.
    num_groups: G.
    rows: B.

  Returns:
    bool[B], False where an id or a row is out of range.

  Raises:
    TypeError: ids that are not integers.
    IndexError: a concrete id out of range.
    ValueError: another shape; concrete memberships that are negative or more than 1 in sum.
  """
  if group_ids.shape not in ((rows,), (rows, num_groups)):
    raise ValueError(
      f'group_ids has shape {group_ids.shape}; expected ids [{rows}] or memberships '
      f'[{rows}, {num_groups}]'
    )
  if group_ids.ndim == 1:
    return check_range(group_ids, num_groups, 'group_ids')
  fine = jnp.all(group_ids >= 0, axis=1) & (jnp.sum(group_ids, axis=1) <= 1 + 1e-4)
  if not isinstance(fine, jax.core.Tracer) and not bool(jnp.all(fine)):
    row = int(jnp.argmin(fine))
    raise ValueError(f'group_ids[{row}] = {group_ids[row]} must be at least 0 and at most 1 in sum')
  return fine


def number_of(value: Any) -> float | None:
  """The value of a number, or of a concrete array of shape []; None for what has none yet: traced
  values, schedules, arrays."""
  if isinstance(value, (int, float, np.generic)):
    return float(value)
  if isinstance(value, jax.core.Tracer) or not isinstance(value, (jax.Array, np.ndarray)):
    return None
  return float(value) if value.ndim == 0 else None


def check_positive(**values: Any) -> None:
  """Holds hyperparameters to be numbers > 0; schedules, vectors and traced values pass unchecked.

  Raises:
    TypeError: for what is neither a number, an array nor a schedule.
    ValueError: for a number <= 0 or NaN.
  """
  for name, value in values.items():
    if (number := number_of(value)) is not None:
      if not number > 0:
        raise ValueError(f'{name}={value} must be greater than 0')
    elif not (callable(value) or isinstance(value, (jax.Array, np.ndarray, np.generic))):
      raise TypeError(f'{name}={value!r} must be a number')
