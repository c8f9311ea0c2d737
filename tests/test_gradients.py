"""Gradient signals against per-example gradients made one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw
from jaxrw import gradients

ROWS, LENGTH, WIDTH, OUT, VOCAB = 6, 5, 4, 7, 9


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def like(seed, tree):
  leaves, structure = jax.tree.flatten(tree)
  return structure.unflatten([draw(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def tokens_with_repeats():
  """int[B, T], three different tokens a row at most, so every row repeats some."""
  return jnp.asarray(np.random.default_rng(0).integers(2, 5, (ROWS, LENGTH)))


def sums(a, b):
  """Inner products of the rows of two trees, [B]."""
  products = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), a, b)
  return sum(jax.tree.leaves(products))


@functools.partial(jax.jit, static_argnums=0)
def oracle(row_term, params, rows, directions):
  """(gradient, squared norms, products) from one full gradient per row."""
  each = jax.vmap(lambda row: jax.grad(row_term)(params, row))(rows)
  products = jnp.stack([sums(each, u) for u in directions], axis=1)
  return jax.tree.map(lambda g: g.sum(0), each), sums(each, each), products


# Probed layers ------------------------------------------------------------------------------------


def tied(params, row, probe):
  """A transformer without attention: every layer, and a table at both ends."""
  at = lambda name: probe and probe.at(name)
  table = params['table']['embedding']
  if probe is None:
    x = table[row['tokens']] + params['places']['embedding'][: row['tokens'].shape[-1]]
  else:
    x, link = gradients.tied_embedding(table, row['tokens'], at('table'))
    x = gradients.add_positions(x, params['places']['embedding'], at('places'))
  x = x + linear(params['down'], jnp.tanh(linear(params['up'], x, at('up'))), at('down'))
  x = affine(params['norm'], jax.nn.standardize(x), at('norm'))
  if probe is None:
    return x @ table.T
  return gradients.tied_head(x, table, row['tokens'], link, at('table'))


def linear(params, x, probe):
  if probe is not None:
    return gradients.linear(x, params['kernel'], params.get('bias'), probe)
  return x @ params['kernel'] + params.get('bias', 0)


def affine(params, x, probe):
  if probe is not None:
    return gradients.scale_bias(x, params['scale'], params.get('bias'), probe)
  return x * params['scale'] + params.get('bias', 0)


def lookup(params, tokens, probe):
  if probe is not None:
    return gradients.embedding(params['embedding'], tokens, probe)
  return params['embedding'][tokens]


def add_places(params, x, probe):
  if probe is not None:
    return gradients.add_positions(x, params['embedding'], probe)
  return x + params['embedding'][:LENGTH]


LAYERS = {
  'linear': (linear, {'kernel': (WIDTH, OUT)}, (LENGTH, WIDTH)),
  'linear with bias': (linear, {'kernel': (WIDTH, OUT), 'bias': (OUT,)}, (LENGTH, WIDTH)),
  'linear, one position': (linear, {'kernel': (WIDTH, OUT), 'bias': (OUT,)}, (WIDTH,)),
  'linear, two axes of positions': (linear, {'kernel': (WIDTH, OUT)}, (LENGTH, 2, WIDTH)),
  'norm': (affine, {'scale': (WIDTH,), 'bias': (WIDTH,)}, (LENGTH, WIDTH)),
  'norm without bias': (affine, {'scale': (WIDTH,)}, (LENGTH, WIDTH)),
  'norm, one position': (affine, {'scale': (WIDTH,), 'bias': (WIDTH,)}, (WIDTH,)),
  'embedding': (lookup, {'embedding': (VOCAB, WIDTH)}, None),
  'positions': (add_places, {'embedding': (LENGTH + 2, WIDTH)}, (LENGTH, WIDTH)),
  'tied': (
    tied,
    {
      'table': {'embedding': (VOCAB, WIDTH)},
      'places': {'embedding': (LENGTH + 2, WIDTH)},
      'up': {'kernel': (WIDTH, OUT), 'bias': (OUT,)},
      'down': {'kernel': (OUT, WIDTH)},
      'norm': {'scale': (WIDTH,), 'bias': (WIDTH,)},
    },
    {'tokens': None},
  ),
}


def build(name):
  """(layer, params, rows, two directions) of one entry of the table, float64 if enabled."""
  layer, shapes, inputs = LAYERS[name]
  is_shape = lambda x: isinstance(x, tuple) or x is None
  make = lambda shape: tokens_with_repeats() if shape is None else draw(7, ROWS, *shape)
  params = jax.tree.map(lambda shape: draw(len(shape), *shape), shapes, is_leaf=is_shape)
  rows = jax.tree.map(make, inputs, is_leaf=is_shape)
  return layer, params, rows, [like(10, params), like(30, params)]


def row_term(layer, params, row):
  """A curved function of one row's output, with a different weight on every number."""
  one = jax.tree.map(lambda x: x[None], row['inputs'])
  return term(layer(params, one, None), jax.tree.map(lambda x: x[None], row['weights']))


def term(outputs, weights):
  return jnp.sum(weights * jnp.sin(outputs))


def compare(name, chunks, rtol):
  layer, params, inputs, directions = build(name)
  outputs = jax.eval_shape(lambda: layer(params, inputs, None))
  rows = {'inputs': inputs, 'weights': draw(5, *outputs.shape)}
  probe = gradients.make_probe(ROWS, directions, chunks=chunks)

  def objective(params, probe):
    return term(layer(params, inputs, probe), rows['weights'])

  value, gradient, readings = jax.jit(gradients.probed_value_and_grad(objective))(params, probe)
  expected = oracle(functools.partial(row_term, layer), params, rows, directions)
  assert readings.squared_norms.dtype == outputs.dtype
  np.testing.assert_allclose(value, objective(params, None), rtol=rtol)
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=10 * rtol)
  jax.tree.map(close, (gradient, *readings), expected)


@pytest.mark.parametrize('name', LAYERS)
def test_readings_are_those_of_one_gradient_per_row(name):
  compare(name, None, 2e-5)


@pytest.mark.parametrize('name', LAYERS)
def test_readings_in_float64(name):
  with jax.enable_x64(True):
    compare(name, None, 1e-12)


@pytest.mark.parametrize('chunks', [1, 2, 3, 6])
def test_chunks_do_not_change_the_readings(chunks):
  compare('tied', chunks, 2e-5)


def test_repeated_tokens_add_up_before_the_norm_is_taken():
  # Both positions read token 1, whose row moves by their sum: (1 + 2)^2, not 1 + 4.
  table, tokens = jnp.zeros((3, 1)), jnp.array([[1, 1], [1, 2]])

  def objective(table, probe):
    return jnp.sum(jnp.array([1.0, 2.0]) * gradients.embedding(table, tokens, probe)[..., 0])

  probe = gradients.make_probe(2)
  _, _, readings = gradients.probed_value_and_grad(objective)(table, probe)
  np.testing.assert_array_equal(readings.squared_norms, [9, 5])


def test_bfloat16_inputs_are_summed_in_float32():
  # Small whole numbers are exact in bfloat16, their sums only in a wider type.
  rng = np.random.default_rng(3)
  x, c = (rng.integers(-20, 21, (ROWS, 64, width)) for width in (WIDTH, OUT))
  each = np.einsum('btd,btp->bdp', x, c)
  assert np.abs(each).max() > 256  # where bfloat16 stops counting
  kernel, direction = jnp.zeros((WIDTH, OUT)), rng.integers(-3, 4, (WIDTH, OUT))
  low = lambda a: jnp.asarray(a, jnp.bfloat16)

  def objective(kernel, probe):
    return jnp.sum(low(c) * gradients.linear(low(x), kernel, None, probe), dtype=jnp.float32)

  probe = gradients.make_probe(ROWS, [{'kernel': jnp.asarray(direction, jnp.float32)}])
  _, gradient, readings = jax.jit(gradients.probed_value_and_grad(objective))(kernel, probe)
  assert gradient.dtype == jnp.float32
  np.testing.assert_array_equal(gradient, each.sum(0))
  np.testing.assert_allclose(readings.squared_norms, (each**2).sum((1, 2)), rtol=1e-6)
  np.testing.assert_array_equal(readings.products[:, 0], (each * direction).sum((1, 2)))


def test_readings_belong_to_the_weighted_terms_and_convert_to_losses():
  layer, params, inputs, directions = build('tied')
  mass = jnp.array([0.5, 2.0, 0.0, 1.0, -1.5, 0.25])
  labels = jnp.asarray(np.random.default_rng(4).integers(0, VOCAB, (ROWS, LENGTH)))

  def losses(params, rows, probe):
    return jaxrw.losses.cross_entropy(layer(params, rows['inputs'], probe), rows['labels']).mean(1)

  rows = {'inputs': inputs, 'labels': labels}
  row_loss = lambda p, row: losses(p, jax.tree.map(lambda x: x[None], row), None)[0]
  _, norms, products = oracle(row_loss, params, rows, directions)
  objective = lambda params, probe: jnp.sum(mass * losses(params, rows, probe))
  probe = gradients.make_probe(ROWS, directions)
  _, _, terms = jax.jit(gradients.probed_value_and_grad(objective))(params, probe)
  np.testing.assert_allclose(terms.squared_norms, mass**2 * norms, rtol=1e-5)
  per_loss = terms.per_loss(mass)
  present = np.asarray(mass != 0)
  np.testing.assert_allclose(per_loss.squared_norms, norms * present, rtol=1e-5)
  np.testing.assert_allclose(per_loss.products, products * present[:, None], rtol=1e-4, atol=1e-6)


def test_agrees_with_microbatched_gradients_of_optax():
  """optax.microbatching makes the gradients a few rows at a time: bounded memory, other code."""
  layer, params, inputs, (direction, _) = build('tied')
  weights = draw(5, ROWS, LENGTH, VOCAB)
  reference = optax.microbatching.micro_grad(
    lambda params, tokens, weights: term(layer(params, {'tokens': tokens}, None), weights),
    batch_argnums=(1, 2),
    microbatch_size=2,
    metrics_fn=lambda g: (optax.tree.norm(g, squared=True), optax.tree.vdot(g, direction)),
  )
  expected, each = jax.jit(reference)(params, inputs['tokens'], weights)
  objective = lambda params, probe: term(layer(params, inputs, probe), weights)
  probe = gradients.make_probe(ROWS, [direction])
  _, gradient, readings = jax.jit(gradients.probed_value_and_grad(objective))(params, probe)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, gradient, expected)
  close(readings.squared_norms, each.metrics[0])
  close(readings.products[:, 0], each.metrics[1])


def test_auxiliary_outputs_pass_through():
  layer, params, inputs, _ = build('linear')

  def objective(params, probe):
    y = layer(params, inputs, probe)
    return jnp.sum(y), y

  compute = gradients.probed_value_and_grad(objective, has_aux=True)
  (value, y), _, readings = compute(params, gradients.make_probe(ROWS))
  np.testing.assert_allclose(value, y.sum(), rtol=1e-6)
  assert readings.products.shape == (ROWS, 0)


@pytest.mark.parametrize('wrong', [{'shards': 4}, {'chunks': 4}, {'shards': 3, 'chunks': 3}])
def test_a_probe_that_does_not_split_is_an_error(wrong):
  with pytest.raises(ValueError, match='rows=6 do not split'):
    gradients.make_probe(6, **wrong)


def test_fewest_chunks_that_stay_within_the_activations():
  assert gradients._chunks(rows=12, length=128, width=128) == 1
  assert gradients._chunks(rows=12, length=128, width=129) == 2
  assert gradients._chunks(rows=12, length=128, width=5 * 128) == 6
  assert gradients._chunks(rows=12, length=1, width=1000) == 12  # one row at a time at least


# Alignment ----------------------------------------------------------------------------------------


def token_losses(params, rows):
  logits = tied(params, rows, None)
  return jaxrw.losses.cross_entropy(logits, rows['labels'])


def language_rows():
  _, params, rows, (direction, _) = build('tied')
  labels = np.random.default_rng(4).integers(0, VOCAB, (ROWS, LENGTH))
  return params, {**rows, 'labels': jnp.asarray(labels)}, direction


@pytest.mark.parametrize('shape', ['[B, T]', '[B]', '[K]'])
def test_alignment_is_the_inner_product_with_every_gradient(shape):
  params, rows, direction = language_rows()
  domains = jax.nn.one_hot(jnp.arange(ROWS) % 3, 3, axis=0)
  losses = {
    '[B, T]': lambda p: token_losses(p, rows),
    '[B]': lambda p: token_losses(p, rows).mean(1),
    '[K]': lambda p: domains @ token_losses(p, rows).mean(1),
  }[shape]
  each = jax.jit(jax.jacrev(losses))(params)  # [..., parameters]
  products = jax.tree.map(lambda g, u: jnp.tensordot(g, u, u.ndim), each, direction)
  expected = sum(jax.tree.leaves(products))
  aligned = jax.jit(lambda p, u: gradients.alignment(losses, p, u))(params, direction)
  assert aligned.shape == jax.eval_shape(losses, params).shape
  np.testing.assert_allclose(aligned, expected, rtol=1e-4, atol=1e-5)


def test_alignment_explains_functions_without_a_forward_derivative():
  params, rows, direction = language_rows()
  probe = gradients.make_probe(ROWS, [direction])
  losses = lambda p: jaxrw.losses.cross_entropy(tied(p, rows, probe), rows['labels'])
  for compute in (gradients.alignment, jax.jit(gradients.alignment, static_argnums=0)):
    with pytest.raises(TypeError, match=r'custom_vjp.*use its plain form'):
      compute(losses, params, direction)


def test_alignment_takes_a_direction_in_another_dtype():
  params, rows, direction = language_rows()
  losses = lambda p: token_losses(p, rows).mean(1)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), direction)
  aligned = jax.jit(functools.partial(gradients.alignment, losses))
  np.testing.assert_allclose(aligned(params, low), aligned(params, direction), atol=0.02)


def test_values_of_a_step_add_up_to_the_change_of_the_target_loss():
  """First-order in-run Shapley values: the error of their sum falls with lr^2."""
  with jax.enable_x64(True):
    params, rows, _ = language_rows()
    half = lambda start: jax.tree.map(lambda x: x[start::2], rows)
    train, target = half(0), half(1)
    target_loss = jax.jit(lambda p, rows: token_losses(p, rows).mean())
    train_losses = lambda p: token_losses(p, train).mean(1)
    direction = gradients.target_direction(target_loss, params, target)
    aligned = jax.jit(functools.partial(gradients.alignment, train_losses))(params, direction)
    step = jax.jit(jax.grad(lambda p: train_losses(p).sum()))(params)
    before = target_loss(params, target)

    def error(lr):
      moved = jax.tree.map(lambda p, g: p - lr * g, params, step)
      return abs(target_loss(moved, target) - before - jnp.sum(-lr * aligned))

    assert error(1e-4) < 0.05 * jnp.abs(jnp.sum(1e-4 * aligned))
    assert error(1e-4) / error(0.5e-4) == pytest.approx(4, rel=0.05)


def test_the_signal_weighs_the_same_step_by_its_own_alignment():
  params, rows, direction = language_rows()
  base = jnp.asarray(np.random.default_rng(8).integers(0, 2, (ROWS, LENGTH)), jnp.float32)
  base = base.at[0].set(0).at[1].set(1)
  batched_loss = lambda p, batch: (token_losses(p, batch), {'mine': batch['base']})
  helpful = jaxrw.Weighting(
    lambda: (),
    lambda w, state, *, alignment, **signals: (w * (alignment > 0)[:, None], state),
  )
  tx = optax.sgd(0.1)
  step = jaxrw.make_train_step(
    None,
    tx,
    helpful,
    batched_loss=batched_loss,
    row_signals=gradients.alignment_signal(batched_loss),
  )
  state = jaxrw.TrainState.create(params, tx, helpful)
  batch = {**rows, 'base': base}
  _, metrics = jax.jit(step)(state, batch, {'direction': direction})

  def row_loss(params, row):
    losses = token_losses(params, jax.tree.map(lambda x: x[None], row))[0]
    return jnp.sum(row['base'] * losses) / jnp.maximum(1, row['base'].sum())

  _, _, products = oracle(row_loss, params, batch, [direction])
  signs = np.asarray(products[:, 0]) > 0
  assert 0 < signs[1:].sum() < ROWS - 1  # some help, some do not
  np.testing.assert_array_equal(metrics['weights'][:, 0] > 0, signs)
  row_signals = gradients.alignment_signal(batched_loss)
  aligned = jax.jit(row_signals)(params, batch, {'direction': direction})['alignment']
  np.testing.assert_allclose(aligned, products[:, 0], rtol=1e-4, atol=1e-6)
  assert aligned[0] == 0  # no valid token


# Last layer ---------------------------------------------------------------------------------------


def last_layer_case(rank):
  shape = (ROWS, LENGTH)[:rank]
  hidden, kernel = draw(1, *shape, WIDTH), draw(2, WIDTH, VOCAB)
  labels = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, shape))
  base = jnp.asarray(np.random.default_rng(5).random(shape)) * (draw(6, *shape) > -0.5)
  return hidden, kernel, labels, base


@pytest.mark.parametrize('rank', [1, 2])
@pytest.mark.parametrize('with_base', [False, True])
def test_last_layer_norms_are_those_of_the_gradient(rank, with_base):
  hidden, kernel, labels, base = last_layer_case(rank)
  loss = jaxrw.losses.cross_entropy
  norm = lambda g: jnp.sqrt(jnp.sum(g**2))
  of_kernel = lambda h, y, b: norm(jax.grad(lambda k: jnp.sum(b * loss(h @ k, y)))(kernel))
  of_logits = lambda h, y, b: norm(jax.grad(lambda z: jnp.sum(b * loss(z, y)))(h @ kernel))
  given = base if with_base else None
  rows = (hidden, labels, base if with_base else jnp.ones_like(base))
  for oracle_of_row, h in ((of_kernel, hidden), (of_logits, None)):
    each = jax.vmap(oracle_of_row)
    if rank == 2 and not with_base:  # every token by itself
      each = jax.vmap(each)
    norms = jax.jit(gradients.last_layer_grad_norms)(hidden @ kernel, labels, h, given)
    np.testing.assert_allclose(norms, each(*rows), rtol=1e-5, atol=1e-6)


def test_last_layer_norms_ignore_what_is_not_valid():
  hidden, kernel, labels, base = last_layer_case(2)
  empty = base == 0
  assert empty.any()
  clean = gradients.last_layer_grad_norms(hidden @ kernel, labels, hidden, base)
  broken = jnp.where(empty[..., None], jnp.nan, hidden)
  np.testing.assert_allclose(
    gradients.last_layer_grad_norms(broken @ kernel, labels, broken, base), clean, rtol=1e-6
  )


def test_a_certain_and_right_prediction_has_no_gradient():
  logits = jnp.array([[50.0, 0, 0], [0, 50.0, 0]])
  norms = gradients.last_layer_grad_norms(logits, jnp.array([0, 0]))
  np.testing.assert_allclose(norms, [0, np.sqrt(2)], atol=1e-6)
