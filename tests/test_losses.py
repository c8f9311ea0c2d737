"""Losses against NumPy; the chunked form also against its own promises on memory and FLOPs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.compiled import costs
from jaxrw import losses

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 7, 5, 11


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
  labels = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
  return hidden, table, labels


def numpy_losses(hidden, table, labels):
  """(losses, softmax minus one-hot), one position after the other, in float64."""
  hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
  values, slopes = np.zeros(labels.shape), np.zeros((*labels.shape, len(table)))
  for place in np.ndindex(*labels.shape):
    logits = table @ hidden[place]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    values[place] = -np.log(shares[labels[place]])
    slopes[place] = shares
    slopes[place][labels[place]] -= 1
  return values, slopes


def numpy_gradients(hidden, table, labels, weights):
  """Gradients of sum(weights * losses) by hidden and by table."""
  slopes = weights[..., None] * numpy_losses(hidden, table, labels)[1]
  by_table = np.einsum('btv,btd->vd', slopes, np.asarray(hidden, np.float64))
  return slopes @ np.asarray(table, np.float64), by_table


def weighted_sum(hidden, table, labels, weights, chunk):
  return jnp.sum(weights * losses.chunked_cross_entropy(hidden, table, labels, chunk=chunk))


def test_cross_entropy(inputs):
  hidden, table, labels = inputs
  out = losses.cross_entropy(hidden @ table.T, labels)
  np.testing.assert_allclose(out, numpy_losses(*inputs)[0], rtol=1e-6, atol=1e-6)


# Chunks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('chunk', [1, 2, 3, 4, LENGTH, 100])
def test_chunks_of_any_size_give_the_plain_losses_and_gradients(inputs, chunk):
  weights = np.random.default_rng(1).normal(size=(ROWS, LENGTH)).astype(np.float32)
  out = jax.jit(partial(losses.chunked_cross_entropy, chunk=chunk))(*inputs)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, numpy_losses(*inputs)[0], rtol=1e-6, atol=1e-6)
  gradients = jax.jit(jax.grad(partial(weighted_sum, chunk=chunk), argnums=(0, 1)))(
    *inputs, weights
  )
  for gradient, expected in zip(gradients, numpy_gradients(*inputs, weights)):
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_one_row_and_no_positions(inputs):
  hidden, table, labels = inputs
  one = losses.chunked_cross_entropy(hidden[0], table, labels[0], chunk=3)
  np.testing.assert_allclose(one, numpy_losses(*inputs)[0][0], rtol=1e-6, atol=1e-6)
  none = losses.chunked_cross_entropy(hidden[:, :0], table, labels[:, :0], chunk=3)
  assert none.shape == (ROWS, 0)


def test_gradients_of_single_rows_and_forward_derivatives(inputs):
  """vmap of grad, and a jvp along a direction, against the closed form."""
  hidden, table, labels = inputs
  direction = np.random.default_rng(2).normal(size=table.shape).astype(np.float32)
  row_loss = lambda table, h, y: losses.chunked_cross_entropy(h, table, y, chunk=3).sum()
  per_row = jax.jit(jax.vmap(jax.grad(row_loss), (None, 0, 0)))(table, hidden, labels)
  _, slopes = numpy_losses(*inputs)
  np.testing.assert_allclose(
    per_row, np.einsum('btv,btd->bvd', slopes, hidden), rtol=1e-5, atol=1e-5
  )
  along = jax.jit(
    lambda t, d: jax.jvp(lambda t: weighted_sum(hidden, t, labels, 1.0, 3), (t,), (d,))[1]
  )
  expected = np.sum(numpy_gradients(*inputs, np.ones(labels.shape))[1] * direction)
  np.testing.assert_allclose(along(table, direction), expected, rtol=1e-5)


def test_a_second_derivative(inputs):
  """Forward over reverse, against a central difference of the closed-form gradient."""
  hidden, table, labels = inputs
  direction = np.random.default_rng(3).normal(size=table.shape)
  gradient = lambda t: jax.grad(weighted_sum, argnums=1)(hidden, t, labels, 1.0, 3)
  _, product = jax.jit(lambda t, d: jax.jvp(gradient, (t,), (d,)))(
    table, direction.astype(np.float32)
  )
  ones, h = np.ones(labels.shape), 1e-4
  ahead = numpy_gradients(hidden, table + h * direction, labels, ones)[1]
  behind = numpy_gradients(hidden, table - h * direction, labels, ones)[1]
  np.testing.assert_allclose(product, (ahead - behind) / (2 * h), rtol=1e-3, atol=1e-3)


def test_sixteen_bit_inputs_keep_float32_sums():
  """512 equal positions, one a chunk: added up in 16 bits, the gradient would stall at 256."""
  hidden = jnp.ones((1, 512, 1), jnp.bfloat16)
  table, labels = jnp.zeros((2, 1)), jnp.zeros((1, 512), jnp.int32)
  value, gradient = jax.jit(jax.value_and_grad(partial(weighted_sum, chunk=1), argnums=1))(
    hidden, table, labels, 1.0
  )
  np.testing.assert_allclose(value, 512 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient[:, 0], [-256, 256], rtol=1e-6)
  assert gradient.dtype == jnp.float32


def test_sixteen_bit_losses_are_those_of_the_rounded_inputs(inputs):
  hidden, table, labels = inputs
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  out = losses.chunked_cross_entropy(jnp.asarray(hidden, jnp.bfloat16), table, labels, chunk=3)
  expected, _ = numpy_losses(rounded(hidden), rounded(table), labels)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_rows_on_eight_devices_stay_there(inputs, kind):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
  hidden, table, labels = inputs
  rows, whole = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    function = jax.jit(partial(losses.chunked_cross_entropy, chunk=3))
    placed = jax.device_put((hidden, table, labels), (rows, whole, rows))
    out = function(*placed)
    program = costs(function.lower(*placed).compile())
  np.testing.assert_allclose(out, numpy_losses(*inputs)[0], rtol=1e-6, atol=1e-6)
  assert out.sharding.is_equivalent_to(rows, 2)
  assert program.collectives == ()


@pytest.mark.parametrize('chunk', [0, -1])
def test_a_chunk_of_nothing_is_an_error(inputs, chunk):
  with pytest.raises(ValueError, match=f'chunk={chunk}'):
    losses.chunked_cross_entropy(*inputs, chunk=chunk)


def test_a_quarter_of_the_memory_for_a_third_more_flops():
  """Losses, weights from them and the gradient; compiled only. 32 of 256 positions at a time."""
  struct = jax.ShapeDtypeStruct
  shapes = (
    struct((8, 256, 256), jnp.float32),
    struct((32768, 256), jnp.float32),
    struct((8, 256), jnp.int32),
  )

  def program(token_losses):
    def loss(hidden, table, labels):
      values = token_losses(hidden, table, labels)
      return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(values)) * values)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return costs(gradient.lower(*shapes).compile())

  whole = program(lambda hidden, table, labels: losses.cross_entropy(hidden @ table.T, labels))
  chunked = program(partial(losses.chunked_cross_entropy, chunk=32))
  assert whole.temp_bytes > 4 * 8 * 256 * 32768  # the logits themselves
  assert whole.temp_bytes > 4 * chunked.temp_bytes
  assert chunked.matmul_flops * 3 == whole.matmul_flops * 4


def test_bpr_is_the_logistic_loss_of_the_difference():
  rng = np.random.default_rng(0)
  positive, negative = rng.normal(size=(2, 6)).astype(np.float32)
  expected = [-np.log(1 / (1 + np.exp(-(float(p) - float(n))))) for p, n in zip(positive, negative)]
  np.testing.assert_allclose(losses.bpr(positive, negative), expected, rtol=1e-6)
  far = jnp.array([-500.0, 500.0])
  np.testing.assert_array_equal(losses.bpr(far, -far), [1000.0, 0.0])
  assert losses.bpr(far.astype(jnp.bfloat16), far).dtype == jnp.float32
