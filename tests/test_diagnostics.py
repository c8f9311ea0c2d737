"""Diagnostics of weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrw
from jaxrw import diagnostics


@pytest.mark.parametrize('token_base', [False, True])
def test_summary_against_numpy(token_base):
  rng = np.random.default_rng(0)
  w = rng.gamma(1.0, 1.0, 12)
  base = rng.integers(1, 6, 12).astype(float) if token_base else np.ones(12)
  base[3] = 0
  out = jax.jit(diagnostics.summarize)(
    jnp.asarray(np.where(base > 0, w, np.nan), jnp.float32), jnp.asarray(base, jnp.float32)
  )
  b, w = base[base > 0], w[base > 0]
  shares = b * w / np.sum(b * w)
  effective = np.sum(b * w) ** 2 / (np.sum(b) * np.sum(b * w**2))
  entropy = -np.sum(shares * np.log(shares)) / np.log(w.size)
  np.testing.assert_allclose(out, [effective, entropy, shares.max()], rtol=1e-5)


def test_effective_fraction_is_kish_over_n():
  w = jnp.array([2.0, 1.0, 1.0, 0.0])
  assert float(diagnostics.summarize(w).effective_fraction) == pytest.approx(16 / 6 / 4)


@pytest.mark.parametrize(
  ('weights', 'base', 'expected'),
  [
    (np.ones(5), None, [1, 1, 0.2]),
    ([7.0], None, [1, 1, 1]),  # a single example
    ([0.0, 3.0, 0.0, 0.0], None, [0.25, 0, 1]),  # everything on one of four
    ([2.0, 2.0, 0.0, 0.0], None, [0.5, 0.5, 0.5]),
    ([1.0, 1.0, 9.0, np.nan], [1.0, 1.0, 0.0, 0.0], [1, 1, 0.5]),  # padding
    ([1.0, 2.0], [0.0, 0.0], [0, 0, 0]),  # nothing valid
    ([0.0, 0.0], None, [0, 0, 0]),  # all weights 0
  ],
)
def test_corner_cases(weights, base, expected):
  base = None if base is None else jnp.asarray(base)
  out = diagnostics.summarize(jnp.asarray(weights, jnp.float32), base)
  np.testing.assert_allclose(out, expected, atol=1e-6)


def test_token_weights_count_as_their_examples_mean():
  weights = jnp.array([[1.0, 3.0, 9.0], [2.0, 2.0, 2.0]])
  base = jnp.array([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
  np.testing.assert_allclose(diagnostics.summarize(weights, base), [1, 1, 0.5], rtol=1e-6)


def test_uniform_weights_on_examples_of_uneven_base():
  """The effective fraction sees weights only; shares, and so entropy, see the base as well."""
  out = diagnostics.summarize(jnp.ones(2), jnp.array([3.0, 1.0]))
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
  np.testing.assert_allclose(out, [1, entropy, 0.75], rtol=1e-6)


def test_group_sums_against_a_loop():
  rng = np.random.default_rng(0)
  values, ids = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(-1, 5, 20)
  out = jax.jit(diagnostics.group_sums, static_argnums=2)(values, ids, 4)
  expected = [values[ids == g].sum(0) for g in range(4)]  # ids -1 and 4: nobody's
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_group_keeps_its_nan_to_itself():
  out = diagnostics.group_sums(jnp.array([[jnp.nan], [2.0]]), jnp.array([-1, 0]), 2)
  np.testing.assert_array_equal(out, [[2.0], [0.0]])


# Which mean does a loop take? ---------------------------------------------------------------------

# losses and base of some rows -> scalar
MEANS = {
  'token mean': lambda x, b: jnp.sum(b * x) / jnp.sum(b),
  'sequence mean': lambda x, b: jnp.mean(jnp.sum(b * x, axis=1) / jnp.sum(b, axis=1)),
  'sum': lambda x, b: jnp.sum(b * x),
  'sum / sequences': lambda x, b: jnp.sum(b * x) / len(x),
  'sum / positions': lambda x, b: jnp.mean(b * x),
  'position mean': lambda x, b: jnp.mean(x),
}


def accumulate(mean, groups, combine=jnp.mean):
  """A loop over groups of rows, given as index arrays."""

  def loop(token_losses, params, batch):
    def gradient(rows):
      part = jax.tree.map(lambda leaf: leaf[rows], batch)
      return jax.grad(lambda p: mean(token_losses(p, part), part['base']))(params)

    return combine(jnp.stack([gradient(np.asarray(rows)) for rows in groups]), axis=0)

  return loop


@pytest.mark.parametrize('name', MEANS)
def test_each_reduction_is_named(name):
  found = diagnostics.explain_reduction(reduce=MEANS[name])
  assert (found.name, found.scope, found.scale) == (name, 'over the global batch', 1)
  assert found.also == ()


@pytest.mark.parametrize(('combine', 'word'), [(jnp.mean, 'averaged'), (jnp.sum, 'summed')])
@pytest.mark.parametrize(
  ('groups', 'part'),
  [
    (np.arange(16).reshape(4, 4), 'microbatch of consecutive rows'),
    (np.arange(16).reshape(4, 4).T, 'interleaved microbatch'),
  ],
)
def test_means_of_means_are_named(groups, part, combine, word):
  loop = accumulate(MEANS['token mean'], groups, combine)
  found = diagnostics.explain_reduction(loop, microbatches=4)
  assert (found.name, found.scope) == ('token mean', f'per {part}, {word} over 4')


@pytest.mark.parametrize(
  ('rows', 'part'),
  [
    # [microbatch, device, row]
    (np.arange(16).reshape(2, 4, 2), 'microbatch and device, consecutive rows'),
    (np.arange(16).reshape(4, 2, 2).swapaxes(0, 1), 'microbatch and device, consecutive rows'),
    (np.arange(16).reshape(4, 2, 2).transpose(2, 0, 1), 'interleaved microbatch and device'),
  ],
)
def test_means_per_microbatch_and_device(rows, part):
  groups = rows.reshape(8, 2)
  found = diagnostics.explain_reduction(
    accumulate(MEANS['token mean'], groups), microbatches=2, shards=4
  )
  assert (found.name, found.scope) == ('token mean', f'per {part}, averaged over 8')


@pytest.mark.parametrize(
  ('groups', 'scope'),
  [
    # Sums over devices inside a microbatch, and over microbatches inside a device.
    (
      np.arange(16).reshape(4, 2, 2).swapaxes(0, 1).reshape(2, 8),
      'per microbatch of consecutive rows of each device, averaged over 2',
    ),
    (
      np.arange(16).reshape(2, 4, 2).swapaxes(0, 1).reshape(4, 4),
      'per device that holds a share of each microbatch, averaged over 4',
    ),
  ],
)
def test_one_of_the_two_levels_is_summed_right(groups, scope):
  found = diagnostics.explain_reduction(
    accumulate(MEANS['token mean'], groups), microbatches=2, shards=4
  )
  assert (found.name, found.scope) == ('token mean', scope)


def test_a_sequence_mean_survives_equal_parts():
  loop = accumulate(MEANS['sequence mean'], np.arange(16).reshape(4, 4))
  found = diagnostics.explain_reduction(loop, microbatches=4)
  assert (found.name, found.scope) == ('sequence mean', 'over the global batch')
  assert 'sequence mean per microbatch of consecutive rows, averaged over 4' in found.also


@pytest.mark.parametrize('example_base', ['any', 'tokens'])
@pytest.mark.parametrize(
  ('microbatches', 'scope'), [(1, 'global'), (4, 'global'), (4, 'online'), (4, 'microbatch')]
)
def test_our_step_takes_the_mean_it_says(microbatches, scope, example_base):
  def loop(token_losses, params, batch):
    tx, rw = optax.sgd(1.0), jaxrw.kl_dro(0.4)
    step = jaxrw.make_train_step(
      None,
      tx,
      rw,
      batched_loss=token_losses,
      microbatches=microbatches,
      scope=scope,
      example_base=example_base,
    )
    state, _ = jax.jit(step)(jaxrw.TrainState.create(params, tx, rw), batch)
    return params - state.params

  found = diagnostics.explain_reduction(loop, microbatches=microbatches)
  name = {'any': 'sequence mean', 'tokens': 'token mean'}[example_base]
  assert (found.name, found.scope) == (name, 'over the global batch')


def test_optax_multi_steps_takes_a_mean_of_means():
  def loop(token_losses, params, batch):
    tx = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)
    state, new = tx.init(params), params
    for rows in np.arange(16).reshape(4, 4):
      part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
      gradient = jax.grad(lambda p: MEANS['token mean'](token_losses(p, part), part['base']))(new)  # noqa: B023
      updates, state = tx.update(gradient, state, new)
      new = optax.apply_updates(new, updates)
    return params - new

  found = diagnostics.explain_reduction(loop, microbatches=4)
  assert found.name == 'token mean'
  assert found.scope == 'per microbatch of consecutive rows, averaged over 4'


@pytest.mark.parametrize(
  ('local', 'scope'),
  [
    (
      lambda x, b: jax.lax.pmean(jnp.sum(b * x) / jnp.sum(b), 'data'),
      'per device of consecutive rows, averaged over 8',
    ),
    (
      lambda x, b: jax.lax.psum(jnp.sum(b * x), 'data') / jax.lax.psum(jnp.sum(b), 'data'),
      'over the global batch',
    ),
  ],
)
def test_data_parallel_loops_on_eight_devices(local, scope):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))

  def loop(token_losses, params, batch):
    loss = jax.shard_map(
      lambda p, rows: local(token_losses(p, rows), rows['base']),
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=P(),
    )
    return jax.jit(jax.grad(loss))(params, batch)

  found = diagnostics.explain_reduction(loop, shards=8)
  assert (found.name, found.scope) == ('token mean', scope)


def test_a_mesh_with_explicit_axes():
  mesh = jax.make_mesh((8,), ('data',))

  def loop(token_losses, params, batch):
    with jax.set_mesh(mesh):
      batch = jax.device_put(batch, NamedSharding(mesh, P('data')))
      params = jax.device_put(params, NamedSharding(mesh, P()))
      mean = lambda p: MEANS['token mean'](token_losses(p, batch), batch['base'])
      return jax.jit(jax.grad(mean))(params)

  found = diagnostics.explain_reduction(loop, shards=8)
  assert (found.name, found.scope) == ('token mean', 'over the global batch')


def test_large_batches_whose_parts_are_nearly_even():
  """1024 rows in two halves: the two means differ by less than the tolerance."""
  loop = accumulate(MEANS['token mean'], np.arange(1024).reshape(2, 512))
  found = diagnostics.explain_reduction(loop, batch=1024, microbatches=2)
  low, high = found.factors['token mean over the global batch']
  assert high / low < 1 + diagnostics._TOLERANCE
  assert found.scope == 'per microbatch of consecutive rows, averaged over 2'


def test_sixteen_bit_gradients_are_still_named():
  loop = accumulate(MEANS['token mean'], np.arange(16).reshape(4, 4))
  low = lambda *args: loop(*args).astype(jnp.bfloat16)
  found = diagnostics.explain_reduction(low, microbatches=4)
  assert found.scope == 'per microbatch of consecutive rows, averaged over 4'


def test_factors_by_hand():
  """From a token mean, to every other convention."""
  found = diagnostics.explain_reduction(reduce=MEANS['token mean'], batch=8, microbatches=2)
  lengths = found.base.sum(axis=1)
  tokens = lengths.sum()
  factors = {name.removesuffix(' over the global batch'): f for name, f in found.factors.items()}
  assert 'token mean' not in factors
  for name, expected in {
    'sum': (tokens, tokens),
    'sum / sequences': (tokens / 8, tokens / 8),
    'sum / positions': (tokens / found.base.size,) * 2,
    'sequence mean': (tokens / lengths.max() / 8, tokens / lengths.min() / 8),
  }.items():
    np.testing.assert_allclose(factors[name], expected, rtol=1e-5)
  halves = tokens / 2 / lengths.reshape(2, 4).sum(axis=1)
  np.testing.assert_allclose(
    factors['token mean per microbatch of consecutive rows, averaged over 2'],
    (halves.min(), halves.max()),
    rtol=1e-5,
  )


def test_a_constant_that_is_left_over_is_told():
  found = diagnostics.explain_reduction(reduce=lambda x, b: MEANS['sequence mean'](x, b) * 1024)
  assert (found.name, found.scope) == ('sequence mean', 'over the global batch')
  assert found.scale == pytest.approx(1024)
  assert str(found).startswith('your loop: 1024 x sequence mean over the global batch')


def test_padding_that_is_trained_on_is_told():
  report = str(diagnostics.explain_reduction(reduce=lambda x, b: jnp.sum(x) / jnp.sum(b)))
  assert 'position mean' in report
  assert 'multiply the losses by base' in report
  assert 'padding' not in str(diagnostics.explain_reduction(reduce=MEANS['sum']))


def test_the_report_reads_well():
  loop = accumulate(MEANS['token mean'], np.arange(8).reshape(2, 4))
  found = diagnostics.explain_reduction(loop, batch=8, length=8, microbatches=2)
  low, high = found.factors['token mean over the global batch']
  lines = [' '.join(line.split()) for line in str(found).splitlines()]
  assert lines[0] == 'your loop: token mean per microbatch of consecutive rows, averaged over 2'
  assert f'token mean over the global batch {low:.4g} to {high:.4g}, by token: no constant' in lines


def test_an_unknown_reduction_says_what_is_near():
  """A root of the length: between a token mean and a sequence mean."""
  found = diagnostics.explain_reduction(
    reduce=lambda x, b: jnp.sum(b * x / jnp.sqrt(jnp.sum(b, axis=1, keepdims=True)))
  )
  assert (found.name, found.scope) == ('unknown', '')
  assert 'mean over the global batch' in found.nearest
  roots = 1 / np.sqrt(found.base.sum(axis=1))
  assert f'{roots.min():.4g} to {roots.max():.4g}' in str(found)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (8, 2, 1), (16, 4, 1), (16, 1, 8), (16, 2, 4)])
@pytest.mark.parametrize('length', [16, 32])
def test_the_probe_tells_all_conventions_apart(sizes, length):
  """Whatever is not the same thing differs by more than twice the tolerance."""
  batch, microbatches, shards = sizes
  base = diagnostics._uneven_base(batch, length)
  all_of_them = list(diagnostics._conventions(base, microbatches, shards).values())
  for i, a in enumerate(all_of_them):
    for b in all_of_them[:i]:
      apart = np.abs(a - b).max() / max(a.max(), b.max())
      assert apart < 1e-9 or apart > 2 * diagnostics._TOLERANCE


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({}, 'either a loop or reduce='),
    ({'reduce': MEANS['sum'], 'loop': print}, 'either a loop or reduce='),
    ({'reduce': MEANS['sum'], 'batch': 6, 'microbatches': 4}, 'batch=6 .* microbatches=4'),
    ({'reduce': MEANS['sum'], 'shards': 0}, 'shards=0'),
    ({'loop': lambda losses, params, batch: params[0]}, r'shape \(32,\), expected finite'),
    ({'loop': lambda losses, params, batch: params * jnp.nan}, 'expected finite'),
  ],
)
def test_what_cannot_be_explained_is_an_error(arguments, words):
  with pytest.raises(ValueError, match=words):
    diagnostics.explain_reduction(**arguments)
