"""The contract suite: what every weighting promises, as checks for your own weightings too.

>>> import jaxrw, jaxrw.testing
>>> jaxrw.testing.check_weighting(jaxrw.linupper(0.4))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrw import masked
from jaxrw.core import Weighting, chain
from jaxrw.steps import TrainState, base_measure, make_train_step

_ROWS, _TERMS, _GROUPS = 16, 6, 3
_WHOLE_STEP = ('anchor', 'objective_prob')  # signals that are not rows of the batch


@dataclasses.dataclass(frozen=True)
class Subject:
  """A weighting under test and what it claims; see `check_weighting`."""

  weighting: Weighting
  scale: str = 'normalized'
  level: str = 'example'
  equivariant: bool = True
  rtol: float = 2e-5
  extra_signals: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda signals: {}
  nonfinite: str = 'propagate'
  ids: str | None = None
  table: bool = False
  terms: int = _TERMS

  def shape(self, rows: int) -> tuple[int, ...]:
    """Of the simplest losses it accepts: one per example, or `[B, T]` where it needs them."""
    return (rows, self.terms) if self.level == 'token' else (rows,)

  def example(self, seed=0):
    """(losses, base, incoming weights) of that shape; see `_example`."""
    return _example(self.shape(_ROWS), seed)

  def examples(self, seed=0):
    """One example for each rank it accepts."""
    shapes = {self.shape(_ROWS), (_ROWS, self.terms)}
    return [_example(shape, seed) for shape in sorted(shapes)]

  def apply(self, losses, base, weights=None, rows=None, state=None, jit=True):
    """(weights, state) for losses [B] or [B, T]; `rows` are the examples' identities."""
    rows = np.arange(losses.shape[0]) if rows is None else rows
    signals = {
      'losses': losses,
      'base': base,
      'group_ids': jnp.asarray(rows % _GROUPS, jnp.int32),
      'example_ids': jnp.asarray(rows, jnp.int32),
      'step': jnp.asarray(7, jnp.int32),
      'key': jax.random.key(3),
    }
    signals |= self.extra_signals(signals)
    weights = jnp.ones(losses.shape, jnp.float32) if weights is None else weights
    state = self.weighting.init() if state is None else state
    update = jax.jit(self.weighting.update) if jit else self.weighting.update
    return update(weights, state, **signals)


def _example(shape: tuple[int, ...], seed: int = 0):
  """Losses, uneven base with padding, and incoming weights of base-mean 1."""
  rng = np.random.default_rng(seed)
  losses = rng.gamma(4.0, 0.7, shape).astype(np.float32)
  valid = rng.random(shape) < 0.8
  valid[3] = False  # an example that is all padding
  valid[0] = True
  base = np.asarray(base_measure(jnp.asarray(valid, jnp.float32), jnp.asarray(losses), 'any'))
  if len(shape) == 1:
    base = base * rng.integers(1, 9, shape).astype(np.float32)
  weights = rng.uniform(0.5, 2.0, shape)
  return losses, base, (weights * np.sum(base) / np.sum(base * weights)).astype(np.float32)


def _assert_states_agree(state, expected, rtol, message=''):
  chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
  for (path, leaf), other in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected)
  ):
    name = f'{message} state{jax.tree_util.keystr(path)}'
    np.testing.assert_allclose(leaf, other, rtol=rtol, atol=rtol and 1e-6, err_msg=name)


def shape_dtype_and_sum(subject: Subject) -> None:
  """Same shape, float32, finite, non-negative unless signed; sum(base * w) kept where
  normalized."""
  for losses, base, weights in subject.examples():
    for incoming in (np.ones_like(weights), weights):
      out, _ = subject.apply(jnp.asarray(losses), jnp.asarray(base), jnp.asarray(incoming))
      chex.assert_shape(out, losses.shape)
      assert out.dtype == jnp.float32, f'weights have dtype {out.dtype}, not float32'
      valid = np.asarray(out)[base > 0]
      assert np.all(np.isfinite(valid)), f'weights are not finite: {valid}'
      if subject.scale != 'signed':
        assert np.all(valid >= 0), f'negative weights: {valid.min()}'
      if subject.scale == 'normalized':
        np.testing.assert_allclose(np.sum(base * np.asarray(out)), np.sum(base), rtol=1e-5)


def padding_is_ignored(subject: Subject) -> None:
  """Entries with base 0 never influence others, whatever they hold; whole examples may be left
  out."""
  for losses, base, weights in subject.examples():
    clean, state = subject.apply(jnp.asarray(losses), jnp.asarray(base), jnp.asarray(weights))
    for filler in (0.0, 1e30, np.inf, np.nan):
      dirty = np.where(base > 0, losses, np.float32(filler))
      out, dirty_state = subject.apply(jnp.asarray(dirty), jnp.asarray(base), jnp.asarray(weights))
      np.testing.assert_array_equal(np.asarray(out)[base > 0], np.asarray(clean)[base > 0])
      _assert_states_agree(dirty_state, state, rtol=0, message=f'padding of {filler}:')
    if subject.equivariant:
      full = base > 0 if base.ndim == 1 else np.any(base > 0, axis=1)
      rows = np.flatnonzero(full)
      subset, _ = subject.apply(
        jnp.asarray(losses[full]), jnp.asarray(base[full]), jnp.asarray(weights[full]), rows
      )
      chosen = base[full] > 0
      np.testing.assert_allclose(
        np.asarray(subset)[chosen], np.asarray(clean)[full][chosen], rtol=subject.rtol
      )


def permutation_equivariant(subject: Subject) -> None:
  """Reordering the examples reorders the weights."""
  if not subject.equivariant:
    return
  order = np.random.default_rng(1).permutation(_ROWS)
  for losses, base, weights in subject.examples():
    out, _ = subject.apply(jnp.asarray(losses), jnp.asarray(base), jnp.asarray(weights))
    permuted, _ = subject.apply(
      jnp.asarray(losses[order]), jnp.asarray(base[order]), jnp.asarray(weights[order]), order
    )
    valid = base[order] > 0
    np.testing.assert_allclose(
      np.asarray(permuted)[valid], np.asarray(out)[order][valid], rtol=subject.rtol
    )


def example_level(subject: Subject) -> None:
  """An example-level weighting multiplies all tokens of an example alike."""
  if subject.level != 'example':
    return
  losses, base, _ = _example((_ROWS, subject.terms))
  out = np.asarray(subject.apply(jnp.asarray(losses), jnp.asarray(base))[0])
  for row in range(_ROWS):
    valid = out[row][base[row] > 0]
    assert valid.size == 0 or np.ptp(valid) == 0, f'example {row} has token weights {valid}'


def token_level(subject: Subject) -> None:
  """A weighting of tokens or loss terms refuses losses of one number per example (ValueError)."""
  if subject.level != 'token':
    return
  losses, base, _ = _example((_ROWS,))
  try:
    subject.apply(jnp.asarray(losses), jnp.asarray(base))
  except ValueError:
    return
  raise AssertionError(f'losses of shape {losses.shape} were accepted')


def unknown_ids(subject: Subject) -> None:
  """A row of id -1 keeps its incoming weight and moves nothing. An id out of range raises, or makes
  the row NaN where ids are traced (padding stays defined)."""
  if subject.ids is None:
    return
  odd = np.arange(_ROWS) % 4 == 1

  def applied(value, *args, **kwargs):
    """With the ids of the odd rows replaced."""

    def signals(given):
      own = subject.extra_signals(given)
      return {**own, subject.ids: jnp.where(odd, value, {**given, **own}[subject.ids])}

    return dataclasses.replace(subject, extra_signals=signals).apply(*args, **kwargs)

  for batch in subject.examples():
    losses, base, weights = map(jnp.asarray, batch)
    valid = batch[1] > 0
    out, state = map(jax.device_get, applied(-1, losses, base, weights))
    np.testing.assert_array_equal(out[odd][valid[odd]], batch[2][odd][valid[odd]])
    rest, rest_state = subject.apply(losses[~odd], base[~odd], weights[~odd], np.flatnonzero(~odd))
    np.testing.assert_allclose(
      out[~odd][valid[~odd]], np.asarray(rest)[valid[~odd]], rtol=subject.rtol
    )
    _assert_states_agree(state, rest_state, subject.rtol)
    for wrong in (-2, 2**31 - 1):
      out = np.asarray(applied(wrong, losses, base, weights)[0])
      noticed = np.all(np.isnan(out[odd][valid[odd]]))
      assert noticed, f'a traced id of {wrong} gives weights {out[odd]}'
      empty = out[~valid.reshape(_ROWS, -1).any(axis=1) & odd]
      assert np.all(np.isfinite(empty)), f'an id of {wrong} gives padding weights {empty}'
      try:
        applied(wrong, losses, base, weights, jit=False)
      except (IndexError, ValueError):
        continue
      raise AssertionError(f'an id of {wrong} was accepted')


def state_is_stable(subject: Subject) -> None:
  """The state keeps its tree, shapes and dtypes over updates."""
  losses, base, _ = subject.example()
  state = subject.weighting.init()
  _, new = subject.apply(jnp.asarray(losses), jnp.asarray(base), state=state)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


def signals_are_checked(subject: Subject) -> None:
  """A stage swallows signals it does not use; a chain rejects names nobody defined."""
  losses, base, _ = subject.example()
  spare = dataclasses.replace(
    subject, extra_signals=lambda s: {'ref_losses': s['losses'], **subject.extra_signals(s)}
  )
  chex.assert_trees_all_equal(
    spare.apply(jnp.asarray(losses), jnp.asarray(base)),
    subject.apply(jnp.asarray(losses), jnp.asarray(base)),
  )
  misspelled = dataclasses.replace(
    subject,
    weighting=chain(only=subject.weighting),
    extra_signals=lambda s: {**subject.extra_signals(s), 'grup_ids': s['group_ids']},
  )
  message = ''
  try:
    misspelled.apply(jnp.asarray(losses), jnp.asarray(base))
  except TypeError as error:
    message = str(error)
  assert 'group_ids' in message, f'a misspelled signal was accepted, or without a hint: {message}'


def jit_and_scan(subject: Subject) -> None:
  """jit equals no jit, a second call does not compile again, and update works inside scan."""
  losses, base, _ = subject.example()
  losses, base = jnp.asarray(losses), jnp.asarray(base)
  eager, state = subject.apply(losses, base, jit=False)
  second, state = subject.apply(losses, base, state=state, jit=False)
  traces = []

  @jax.jit
  def compiled(losses, base):
    traces.append(1)
    return subject.apply(losses, base)[0]

  np.testing.assert_allclose(compiled(losses, base), eager, rtol=subject.rtol)
  compiled(losses + 1, base)
  assert len(traces) == 1, 'the second call traced again'

  def body(state, losses):
    out, state = subject.apply(losses, base, state=state)
    return state, out

  scanned, stacked = jax.lax.scan(body, subject.weighting.init(), jnp.stack([losses, losses]))
  np.testing.assert_allclose(stacked[0], eager, rtol=subject.rtol)
  np.testing.assert_allclose(stacked[1], second, rtol=subject.rtol)
  _assert_states_agree(scanned, state, subject.rtol)


def mesh_parity(subject: Subject) -> None:
  """All devices together compute the weights and the state of one device over two updates, in Auto
  and in Explicit meshes, and leave both laid out as they were."""
  devices = np.asarray(jax.devices())
  if _ROWS % devices.size:
    devices = devices[:1]

  def weigh(runs, state):  # all ranks in one program: half the time to compile
    results = []
    for batches in runs:
      weights, new = [], state
      for batch in batches:
        out, new = subject.apply(*batch, state=new)
        weights.append(out)
      results.append((weights, new))
    return results

  state = subject.weighting.init()
  seeds = (0, 1) if jax.tree.leaves(state) else (0,)  # without a state one update says it all
  runs = list(zip(*(subject.examples(seed) for seed in seeds)))
  alone = jax.jit(weigh)(jax.tree.map(jnp.asarray, runs), state)
  for axis_type in (AxisType.Auto,) if subject.table else (AxisType.Auto, AxisType.Explicit):
    mesh = Mesh(devices, ('data',), axis_types=(axis_type,))
    rows = NamedSharding(mesh, PartitionSpec('data'))
    place = rows if subject.table else NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
      start = jax.device_put(state, place)
      together = jax.jit(weigh)(jax.device_put(runs, rows), start)
    for (weights, new), (expected, expected_state) in zip(together, alone):
      for out, one in zip(weights, expected):
        np.testing.assert_allclose(out, one, rtol=subject.rtol, err_msg=f'{axis_type}')
        if axis_type == AxisType.Explicit:
          assert out.sharding.spec[0] == 'data', f'weights left {rows} for {out.sharding}'
      _assert_states_agree(new, expected_state, subject.rtol, f'{axis_type}:')
      for leaf in jax.tree.leaves(new):
        kept = leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert kept, f'{axis_type}: the state left {place} for {leaf.sharding}'


def bfloat16_losses(subject: Subject) -> None:
  """bfloat16 losses are accepted; weights are float32 and those of the same losses in float32."""
  losses, base, _ = subject.example()
  half = jnp.asarray(losses, jnp.bfloat16)
  out, _ = subject.apply(half, jnp.asarray(base))
  assert out.dtype == jnp.float32, f'weights have dtype {out.dtype}, not float32'
  full, _ = subject.apply(half.astype(jnp.float32), jnp.asarray(base))
  np.testing.assert_allclose(out, full, rtol=1e-6)


def degenerate_batches(subject: Subject) -> None:
  """One example, equal losses, nothing valid: defined, never NaN. A NaN loss is not hidden, and
  does not stay in the state."""
  full = lambda rows, value: jnp.full(subject.shape(rows), value, jnp.float32)
  one = subject.apply(full(1, 2.5), full(1, 1.0))[0]
  assert np.all(np.isfinite(one)), f'one example: {one}'
  rows = 5 * _GROUPS  # as many in each group, so that group weights are 1, too
  equal = subject.apply(full(rows, 3.0), full(rows, 1.0))[0]
  assert np.all(np.isfinite(equal)), f'equal losses: {equal}'
  if subject.scale == 'normalized':
    np.testing.assert_allclose(one, np.ones_like(one), rtol=1e-6)
    np.testing.assert_allclose(equal, np.ones_like(equal), rtol=1e-6)
  empty = subject.apply(full(_ROWS, jnp.nan), full(_ROWS, 0.0))[0]
  assert np.all(np.isfinite(empty)), f'all masked: {empty}'
  losses, base, _ = subject.example()
  first = (0,) * losses.ndim
  for value in (jnp.nan, jnp.inf):
    broken = jnp.asarray(losses).at[first].set(value)
    out, state = subject.apply(broken, jnp.asarray(base))
    for leaf, start in zip(jax.tree.leaves(state), jax.tree.leaves(subject.weighting.init())):
      new = np.isnan(leaf) & ~np.isnan(start)  # NaN may mark an empty place
      assert not np.any(new), f'a loss of {value} stays in the state: {leaf}'
    total = masked.total(
      broken, jnp.asarray(base) * out
    )  # as the train step does it: weight 0 leaves a row out
    if subject.nonfinite == 'propagate':
      assert not np.isfinite(total), f'a loss of {value} vanished from the weighted loss'
    else:
      assert np.isfinite(total), f'a loss of {value} was not masked: {out}'
      assert out[first] == 0, f'a loss of {value} has weight {out[first]}'
      np.testing.assert_allclose(np.sum(base * out), np.sum(base), rtol=1e-5)


def trains(subject: Subject) -> None:
  """The train step takes it: one global step, and accumulation over microbatches, stay finite."""
  rng = np.random.default_rng(0)
  y = jnp.asarray(rng.normal(size=subject.shape(_ROWS)), jnp.float32)
  batch = {
    'x': jnp.asarray(rng.normal(size=(_ROWS, 3)), jnp.float32),
    'y': y,
    'group_ids': jnp.arange(_ROWS) % _GROUPS,
    'example_ids': jnp.arange(_ROWS),
  }
  own = dict(subject.extra_signals({**batch, 'losses': y, 'base': jnp.ones_like(y)}))
  whole = {name: own.pop(name) for name in _WHOLE_STEP if name in own}
  extra = own.pop('extra', {})  # rows: they come with the batch and return from the forward pass
  batch |= own | extra

  def losses_of(w, batch):
    predicted = masked.over_tokens(batch['x'] @ w, batch['y'])
    return (predicted - batch['y']) ** 2, {name: batch[name] for name in extra}

  modes = ((1, 'global'), (4, 'global'), (4, 'microbatch'))
  tx = optax.sgd(0.05)
  steps = [
    make_train_step(
      None, tx, subject.weighting, batched_loss=losses_of, microbatches=m, scope=scope
    )
    for m, scope in modes
  ]
  compiled = jax.jit(  # in one program: a third less time to compile
    lambda states, batch: [step(state, batch, whole) for step, state in zip(steps, states)]
  )
  states = [TrainState.create(jnp.zeros(3), tx, subject.weighting) for _ in modes]
  for _ in range(2):
    results = compiled(states, batch)
    states = [state for state, _ in results]
  for (microbatches, scope), (state, metrics) in zip(modes, results):
    where = f'{scope} scope, {microbatches} microbatches'
    assert np.isfinite(metrics['weighted_loss_sum']), where
    assert np.all(np.isfinite(state.params)), where


PROMISES: dict[str, Callable[[Subject], None]] = {
  promise.__name__: promise
  for promise in (
    shape_dtype_and_sum,
    padding_is_ignored,
    permutation_equivariant,
    example_level,
    token_level,
    unknown_ids,
    state_is_stable,
    signals_are_checked,
    jit_and_scan,
    mesh_parity,
    bfloat16_losses,
    degenerate_batches,
    trains,
  )
}


def check_weighting(
  weighting: Weighting,
  *,
  scale: str = 'normalized',
  level: str = 'example',
  equivariant: bool = True,
  rtol: float = 2e-5,
  extra_signals: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda signals: {},
  nonfinite: str = 'propagate',
  ids: str | None = None,
  table: bool = False,
  terms: int = _TERMS,
  promises: Iterable[str] | None = None,
) -> None:
  """Holds a weighting to the contract; run it on your own.

  Args:
    weighting: what to check.
    scale: 'normalized' (keeps sum(base * w)), 'absolute' or 'signed'.
    level: 'example' (all tokens of an example alike), 'entry', or 'token': needs losses [B, T],
      one per token or per loss term.
    equivariant: False for a weighting that is random by position.
    rtol: float32 tolerance of parities; a temperature r amplifies the losses' rounding by 1 / r.
    extra_signals: from the standard signals of a batch to the further ones the weighting needs.
      They should follow from the losses (and base): promises are about batches of given losses.
    nonfinite: 'propagate' (a NaN or inf loss in a valid row must reach the weighted loss) or 'mask'
      (that row gets weight 0 and the others share its mass).
    ids: the signal that holds the rows' ids, where -1 means unknown; None if it has no such signal.
    table: the state has one row per example in each of its arrays. It is laid out over the devices
      as the batch is, in Auto meshes only.
    terms: number of loss terms T, where the weighting fixes it.
    promises: names from `PROMISES`; default all.

  Raises:
    AssertionError: naming the promise that was broken.

  Mesh parity uses all devices JAX sees; simulate eight with JAX_NUM_CPU_DEVICES=8.
  """
  subject = Subject(
    weighting, scale, level, equivariant, rtol, extra_signals, nonfinite, ids, table, terms
  )
  for name in PROMISES if promises is None else promises:
    try:
      PROMISES[name](subject)
    except Exception as error:  # one that fails to trace or to shard breaks the promise, too
      raise AssertionError(f'{name}: {PROMISES[name].__doc__} {error}') from error
