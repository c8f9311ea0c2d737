"""Gradient signals of single examples, without a gradient of each: B numbers, not B x P.

Two ways, by what is asked for. With L_i the loss of example i, g_i its gradient:

  <g_i, direction>   one forward-mode pass gives all B of them: `alignment`. No change of the model;
                     the products are there *before* the gradient, so they can weigh the same step.
  ||g_i||^2 as well  read inside the ordinary backward pass: `Probe` and the layers below. No extra
                     matmul, but layers have to be called through this module, and the readings
                     come *with* the gradient: they serve the next step, attribution, or a log.

A positive product is helpful: a step along -g_i lowers the loss whose gradient `direction` is.

  first-order in-run Shapley value of example i in a step of plain SGD on sum_i L_i:
  phi_i = -lr <direction, g_i>, a change of the target loss, so negative phi is helpful

Source: Wang et al., "Data Shapley in One Training Run", arXiv 2406.11011 (the values); the forward
pass and the probe are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.steps import Batch, base_measure, join_rows

# Products by one forward-mode pass --------------------------------------------------------------


def alignment(
  losses_of_params: Callable[[Any], jax.Array], params: Any, direction: Any
) -> jax.Array:
  """Inner product of every loss's gradient with one direction: <grad L_i, direction>.

  The directional derivative of L_i is that product, so one `jax.jvp` gives them all. Its matmuls
  are those of one gradient of the same batch (each product once for the value, twice for the
  derivative), and it stores nothing for a backward pass.

  Args:
    losses_of_params: params -> float[B], [K] (losses of domains) or [B, T].
    params: where the gradients are taken.
    direction: a tree like `params`, e.g. from `target_direction`.

  Returns:
    float, the shape of the losses.

  Raises:
    TypeError: the losses use a function that has a reverse-mode rule only.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import gradients
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> gradients.alignment(lambda w: x @ w, jnp.zeros(2), jnp.array([3.0, 4.0]))
    Array([3., 8.], dtype=float32)
  """

  def products(params, direction):
    direction = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, params)
    return jax.jvp(losses_of_params, (params,), (direction,))[1]

  traced = jax.make_jaxpr(products)(params, direction)
  # What forward mode leaves of a custom_vjp; it fails only when the whole program is compiled.
  if 'custom_lin[' in str(traced):
    raise TypeError(
      'alignment differentiates forwards, and the losses use a function with a reverse-mode rule '
      'only (jax.custom_vjp: fused attention, a probed layer); use its plain form here'
    )
  return products(params, direction)


def target_direction(loss: Callable[[Any, Any], jax.Array], params: Any, target_batch: Any) -> Any:
  """The gradient of a target loss: the direction in which alignment is positive = helpful.

  Args:
    loss: (params, target_batch) -> scalar, e.g. the mean loss of held-out data.
    params: where it is taken.
    target_batch: whatever `loss` reads.

  Returns:
    A tree like `params`, constant for differentiation.
  """
  return jax.lax.stop_gradient(jax.grad(loss)(params, target_batch))


def alignment_signal(
  batched_loss: Callable[[Any, Batch], Any],
) -> Callable[[Any, Batch, Mapping[str, Any]], dict[str, jax.Array]]:
  """`row_signals` for `make_train_step`: the signal `alignment` from the step's `direction`.

  Costs one forward-mode pass a step, about the matmuls of one more gradient. How old the direction
  is, is the loop's decision, because it is an ordinary value handed to the step; a refresh every k
  steps costs one gradient of the target loss every k steps.

  Args:
    batched_loss: the step's own: (params, batch) -> losses [B] or [B, T], or (losses, signals). An
      example's loss is its base-mean over T.

  Returns:
    (params, batch, signals) -> {'alignment': float[B]}, with `signals['direction']` a tree like
    params.

  Example:
    In a loop that refreshes the direction every 10 steps:

    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import gradients
    >>> batched_loss = lambda w, batch: (batch['x'] @ w - batch['y']) ** 2
    >>> row_signals = gradients.alignment_signal(batched_loss)
    >>> target_loss = lambda w, target: jnp.mean(batched_loss(w, target))
    >>> refresh = jax.jit(lambda w, target: gradients.target_direction(target_loss, w, target))
    >>> w, batch = jnp.zeros(2), {'x': jnp.eye(2), 'y': jnp.array([1.0, -1.0])}
    >>> target = {'x': jnp.ones((1, 2)), 'y': jnp.ones(1)}
    >>> for i in range(20):
    ...   if i % 10 == 0:
    ...     direction = refresh(w, target)
    ...   signals = row_signals(w, batch, {'direction': direction})  # inside the step
    >>> signals['alignment']                                 # row 1 would raise the target's loss
    Array([ 4., -4.], dtype=float32)
  """

  def row_signals(params, batch, signals):
    def example_losses(params):
      out = batched_loss(params, batch)
      losses = out[0] if isinstance(out, tuple) else out
      return masked.example_level(losses, base_measure(batch.get('base'), losses))[0]

    return {'alignment': alignment(example_losses, params, signals['direction'])}

  return row_signals


# Closed forms of the last layer -----------------------------------------------------------------


def last_layer_grad_norms(
  logits: jax.Array,
  labels: jax.Array,
  hidden: jax.Array | None = None,
  base: jax.Array | None = None,
) -> jax.Array:
  """Gradient norms of softmax cross entropy at the end of the network, without differentiation.

  With e = softmax(logits) - onehot(label), the gradient with respect to the logits is e, and with
  respect to the matrix of a linear output layer the outer product of e and its input h:

    one prediction     ||e||, the importance-sampling (EL2N-like) score, or ||e|| ||h||
    a sequence         with loss sum_t base_t L_t: sqrt(sum_t base_t^2 ||e_t||^2), or
                       sqrt(sum_{t,t'} base_t base_t' <e_t, e_t'> <h_t, h_t'>)

  The double sum costs 2 B T^2 (V + D) matmul FLOPs. Where the batched loss has the logits at hand,
  return these norms beside the losses: `(losses, {'grad_norms': ...})`.

  Args:
    logits: float[B, V] or [B, T, V].
    labels: int[B] or [B, T].
    hidden: float[..., D], the input of the output layer; None gives the norms w.r.t. the logits.
    base: float, the shape of the labels: what each loss is multiplied by in its example's loss
      (`base_measure` gives the mean over tokens). None treats every token by itself.

  Returns:
    float32, per example `[B]` if base is given, else per prediction in the shape of the labels.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import gradients
    >>> gradients.last_layer_grad_norms(jnp.zeros((1, 2)), jnp.array([0]))
    Array([0.70710677], dtype=float32)

  Source: Katharopoulos and Fleuret, "Not All Samples Are Created Equal" (the upper bound by the
  last layer); Paul et al., "Deep Learning on a Data Diet" (EL2N). Reconstructed.
  """
  wide = jnp.promote_types(jnp.float32, logits.dtype)
  errors = jax.nn.softmax(logits.astype(wide)) - jax.nn.one_hot(
    labels, logits.shape[-1], dtype=wide
  )
  hidden = None if hidden is None else hidden.astype(wide)
  if base is not None:
    errors = jnp.where(base[..., None] != 0, base[..., None] * errors, 0)
  if base is not None and labels.ndim == 2:
    if hidden is None:
      return jnp.sqrt(jnp.sum(errors**2, axis=(1, 2)))
    hidden = jnp.where(base[..., None] != 0, hidden, 0)
    gram = lambda x: jnp.einsum('btd,bsd->bts', x, x)
    return jnp.sqrt(jnp.maximum(0, jnp.sum(gram(errors) * gram(hidden), axis=(1, 2))))
  norms = jnp.linalg.norm(errors, axis=-1)
  return norms if hidden is None else norms * jnp.linalg.norm(hidden, axis=-1)


# Readings inside the backward pass --------------------------------------------------------------


class Readings(NamedTuple):
  """What a probe read, of each row's own term in the objective that was differentiated.

  Attributes:
    squared_norms: float[B], ||grad term_i||^2.
    products: float[B, K], <grad term_i, direction_k>.
  """

  squared_norms: jax.Array
  products: jax.Array

  def per_loss(self, mass: jax.Array) -> Readings:
    """The same for the gradients of the rows' losses, when term_i = mass_i * loss_i.

    Args:
      mass: float[B], e.g. the sum over T of base * w, divided by sum(base) if the objective was. A
        row of mass 0 has no term, so nothing was read: it stays 0.
    """
    return Readings(
      masked.divide(self.squared_norms, mass**2), masked.divide(self.products, mass[:, None])
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('tap', 'directions'),
  meta_fields=('shards', 'chunks'),
)
@dataclasses.dataclass(frozen=True)
class Probe:
  """Zeros that travel through the model and come back, as their gradient, full of readings.

  A layer that takes a probe computes what it would compute without one. In the backward pass it
  forms its part of the gradient, sum_i G_i, row by row, which takes the same FLOPs as forming the
  sum; reads ||G_i||^2 and <G_i, direction_k> off; and returns them as the gradient of `tap`.
  Differentiation itself adds up what the layers return, through scans, remat and jit alike. Each
  parameter must be used by one probed layer (or by the pair `tied_embedding`, `tied_head`): the
  norms of two uses do not add up. Rows must not interact (no batch norm).

  Extra matmuls: 2 B T^2 D FLOPs for the token table, and for layers without positions (T = 1) one
  forward product per direction. Extra elementwise work: 1 + K passes over every G_i.

  Attributes:
    tap: zeros float32[B, 1 + K] (float64 under `jax.enable_x64`).
    directions: K trees like the parameters (of the whole model, or of where `at` has led).
    shards: number of devices the rows are cut over. Any other value gives the same numbers with
      more communication.
    chunks: in how many parts a layer walks its rows, a divisor of B / shards; None: see `_chunks`.
  """

  tap: jax.Array
  directions: tuple[Any, ...] = ()
  shards: int = 1
  chunks: int | None = None

  def at(self, name: str) -> Probe:
    """The probe for a part of the model: descends the directions by a key."""
    return self.along(tuple(d[name] for d in self.directions))

  def along(self, directions: tuple[Any, ...]) -> Probe:
    """The probe with other directions, e.g. one layer's slices of stacked ones in a scan."""
    return dataclasses.replace(self, directions=directions)


def make_probe(
  rows: int, directions: Sequence[Any] = (), *, shards: int = 1, chunks: int | None = None
) -> Probe:
  """A probe for a batch of `rows` examples; see `Probe` for the arguments."""
  if rows % shards or (chunks is not None and (chunks < 1 or rows // shards % chunks)):
    raise ValueError(
      f'rows={rows} do not split over shards={shards} devices in chunks={chunks} equal parts each'
    )
  return Probe(jnp.zeros((rows, 1 + len(directions))), tuple(directions), shards, chunks)


def probed_value_and_grad(
  objective: Callable[[Any, Probe], Any], *, has_aux: bool = False
) -> Callable[[Any, Probe], tuple[Any, Any, Readings]]:
  """`jax.value_and_grad` of `objective(params, probe)` that also returns what the probe read.

  Returns:
    (params, probe) -> (value, gradient, readings); value is (value, aux) with `has_aux`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import gradients
    >>> x, y = jnp.array([[[1.0, 2.0]], [[0.0, 1.0]]]), jnp.array([3.0, 4.0])
    >>> def objective(w, probe):
    ...   return jnp.sum(y * gradients.linear(x, w, None, probe)[:, 0, 0])
    >>> w = jnp.ones((2, 1))
    >>> probe = gradients.make_probe(2, [{'kernel': w}])
    >>> value, grad, readings = gradients.probed_value_and_grad(objective)(w, probe)
    >>> readings.squared_norms, readings.products[:, 0]
    (Array([45., 16.], dtype=float32), Array([9., 4.], dtype=float32))
    >>> grad[:, 0]
    Array([ 3., 10.], dtype=float32)
  """

  def tapped(params, tap, probe):
    return objective(params, dataclasses.replace(probe, tap=tap))

  def compute(params, probe):
    value, (gradient, tap) = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=has_aux)(
      params, probe.tap, probe
    )
    return value, gradient, Readings(tap[:, 0], tap[:, 1:])

  return compute


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, probe: Probe) -> jax.Array:
  """x @ kernel + bias in the dtype of x; directions {'kernel', 'bias'}.

  Args:
    x: float[B, ..., D].
    kernel: float[D, P].
    bias: float[P] or None.
    probe: of this layer.

  Returns:
    [B, ..., P].
  """
  y = _product(False, x, kernel, probe.at('kernel'), None, None)
  if bias is None:
    return y
  return _observed(_read_bias, y + bias.astype(y.dtype), probe.at('bias'), ())


def scale_bias(
  normed: jax.Array, scale: jax.Array, bias: jax.Array | None, probe: Probe
) -> jax.Array:
  """normed * scale + bias, the affine end of a norm; directions {'scale', 'bias'}.

  Args:
    normed: float[B, ..., D].
    scale: float[D].
    bias: float[D] or None.
    probe: of this layer.

  Returns:
    [B, ..., D].
  """
  y = _observed(_read_scale, normed * scale, probe.at('scale'), (normed,))
  return y if bias is None else _observed(_read_bias, y + bias, probe.at('bias'), ())


def add_positions(x: jax.Array, table: jax.Array, probe: Probe) -> jax.Array:
  """x[:, t] + table[t], [B, T, D]; directions {'embedding'} like `table` [>= T, D]."""
  return _observed(_read_positions, x + table[: x.shape[1]], probe.at('embedding'), ())


def embedding(table: jax.Array, tokens: jax.Array, probe: Probe) -> jax.Array:
  """table[tokens], int[B, T] -> [B, T, D]; directions {'embedding'} like `table` [V, D]."""
  return _observed(_read_embedding, table[tokens], probe.at('embedding'), (tokens,))


def tied_embedding(
  table: jax.Array, tokens: jax.Array, probe: Probe
) -> tuple[jax.Array, jax.Array]:
  """`embedding` of a table that is the output layer as well: (table[tokens], link).

  Hand `link` (zeros [B, T, D]) to `tied_head`. With E_i and H_i the table's gradient through input
  and output, ||E_i + H_i||^2 has a cross term. The head's backward pass runs first; it sends the
  rows of H_i that E_i can meet, those of the row's own tokens, back as the gradient of `link`.
  """
  x = embedding(table, tokens, probe)
  link = jnp.zeros(x.shape, jnp.promote_types(jnp.float32, x.dtype))
  return _linked(x, link, probe)


def tied_head(
  x: jax.Array, table: jax.Array, tokens: jax.Array, link: jax.Array, probe: Probe
) -> jax.Array:
  """x @ table.T, products in the dtype of x summed in float32; directions {'embedding'}.

  Args:
    x: float[B, T, D].
    table: float[V, D].
    tokens: int[B, T], the ones `tied_embedding` read.
    link: from `tied_embedding`.
    probe: of the table.

  Returns:
    float32[B, T, V].
  """
  return _product(True, x, table, probe.at('embedding'), tokens, link)


# How they are read ------------------------------------------------------------------------------


def _read(gradients: jax.Array, directions: Sequence[jax.Array]) -> jax.Array:
  """Rows of gradients [c, ...] -> [c, 1 + K]: squared norms, and products with each direction."""
  rows = lambda x: jnp.sum(x, axis=tuple(range(1, x.ndim)))
  return jnp.stack([rows(gradients**2), *(rows(gradients * u) for u in directions)], axis=1)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _over_positions(x: jax.Array) -> jax.Array:
  """[B, ..., P] summed to [B, P]."""
  return jnp.sum(_wide(x), axis=tuple(range(1, x.ndim - 1)))


def _read_bias(dy, directions):
  return _read(_over_positions(dy), directions)


def _read_scale(dy, directions, normed):
  return _read(_over_positions(_wide(dy) * normed), directions)


def _read_positions(dy, directions):
  return _read(_wide(dy), [u[: dy.shape[1]] for u in directions])


def _read_embedding(dy, directions, tokens):
  # The gradient of a row is dy added up by token. Its norm without the [V, D] table: positions of
  # the same token meet in one small product, sum_{t,t'} [token_t = token_t'] <dy_t, dy_t'>.
  same = (tokens[:, :, None] == tokens[:, None, :]).astype(dy.dtype)
  met = jnp.einsum('bts,bsd->btd', same, dy, preferred_element_type=_wide(dy).dtype)
  rows = lambda x: jnp.sum(x, axis=(1, 2))
  return jnp.stack([rows(dy * met), *(rows(dy * u[tokens]) for u in directions)], axis=1)


def _read_back(probe: Probe, readings: jax.Array) -> Probe:
  """Readings as the gradient of a probe."""
  return dataclasses.replace(
    probe, tap=readings.astype(probe.tap.dtype), directions=cast(Any, None)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed(read: Callable[..., jax.Array], y: jax.Array, probe: Probe, saved: tuple):
  """y; its backward pass reads `read(dy, directions, *saved)`."""
  return y


def _observed_fwd(read, y, probe, saved):
  return y, (probe, saved)


def _observed_bwd(read, residuals, dy):
  probe, saved = residuals
  return dy, _read_back(probe, read(dy, probe.directions, *saved)), None


_observed.defvjp(_observed_fwd, _observed_bwd)


@jax.custom_vjp
def _linked(x: jax.Array, link: jax.Array, probe: Probe):
  """(x, link); its backward pass reads the cross term of the tied table's norm."""
  return x, link


def _linked_bwd(probe, cotangents):
  dx, of_head = cotangents
  cross = 2 * jnp.sum(_wide(dx) * of_head, axis=(1, 2))
  readings = jnp.zeros_like(probe.tap).at[:, 0].set(cross)
  return dx, None, _read_back(probe, readings)


_linked.defvjp(lambda x, link, probe: ((x, link), probe), _linked_bwd)


def _multiply(transposed: bool, x, kernel):
  kernel = kernel.astype(x.dtype)
  if not transposed:
    return x @ kernel
  wide = jnp.promote_types(jnp.float32, x.dtype)
  return jnp.einsum('...d,vd->...v', x, kernel, preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(transposed: bool, x, kernel, probe, tokens, link):
  """x @ kernel, or x @ kernel.T in float32: a linear layer, or the tied output layer."""
  return _multiply(transposed, x, kernel)


def _product_fwd(transposed, x, kernel, probe, tokens, link):
  return _multiply(transposed, x, kernel), (x, kernel, probe, tokens)


def _product_bwd(transposed, residuals, dy):
  x, kernel, probe, tokens = residuals
  (dx,) = jax.linear_transpose(lambda x: _multiply(transposed, x, kernel), x)(dy)
  flat = lambda z: z.reshape(len(z), -1, z.shape[-1])
  gradient, readings, link = _sum_of_rows(transposed, flat(x), flat(dy), probe, tokens)
  return dx, gradient.astype(kernel.dtype), _read_back(probe, readings), None, link


_product.defvjp(_product_fwd, _product_bwd)


def _sum_of_rows(transposed: bool, x, dy, probe: Probe, tokens):
  """sum_i G_i with G_i = x_i^T dy_i (or its transpose), a few rows at a time.

  Args:
    x: [B, T, D].
    dy: [B, T, P].
    tokens: int[B, T] or None.

  Returns:
    (sum [D, P], readings [B, 1 + K], the rows G_i[tokens_i] as [B, T, ...] or None).
  """
  (rows, length, _), shards = x.shape, probe.shards
  wide = jnp.promote_types(jnp.float32, x.dtype)
  if length == 1 and not transposed:
    # G_i is an outer product: its norm and products need no G_i, only K more forward products.
    x, dy = x[:, 0], dy[:, 0]
    dot = lambda a, b: jnp.sum(_wide(a) * _wide(b), axis=1)
    products = [dot(jnp.dot(x, u, preferred_element_type=wide), dy) for u in probe.directions]
    readings = jnp.stack([dot(x, x) * dot(dy, dy), *products], axis=1)
    return jnp.einsum('bd,bp->dp', x, dy, preferred_element_type=wide), readings, None

  local = rows // shards
  chunks = math.gcd(local, probe.chunks or _chunks(local, length, max(x.shape[2], dy.shape[2])))
  # Row i is in chunk i mod n, so that a chunk has rows of every device; taken from [c, n, ...] by
  # slices, because a transposed copy would be another activation in memory.
  parts = [z.reshape(rows // chunks, chunks, *z.shape[1:]) for z in (x, dy)]
  parts += [] if tokens is None else [tokens.reshape(rows // chunks, chunks, -1)]
  form = 'ctd,ctp->cpd' if transposed else 'ctd,ctp->cdp'

  def step(total, i):
    x, dy, *tokens = (jax.lax.dynamic_index_in_dim(z, i, 1, keepdims=False) for z in parts)
    each = jnp.einsum(form, x, dy, preferred_element_type=wide)
    met = jax.vmap(lambda gradient, tokens: gradient[tokens])(each, *tokens) if tokens else None
    # One sum per device: the one over devices comes after the loop.
    total += jnp.sum(each.reshape(shards, -1, *each.shape[1:]), axis=1)
    return total, (_read(each, probe.directions), met)

  size = (x.shape[2], dy.shape[2])[:: -1 if transposed else 1]
  total = jnp.zeros((shards, *size), wide)
  total, (readings, met) = jax.lax.scan(step, total, jnp.arange(chunks))
  return jnp.sum(total, axis=0), join_rows(readings), join_rows(met)


def _chunks(rows: int, length: int, width: int) -> int:
  """Parts in which to walk `rows` rows of one device: the fewest, such that the c gradients [D, P]
  formed at a time are no larger than the smaller of the layer's activations, [B, T, min(D, P)]:

    c D P <= B T min(D, P)   <=>   B / c >= max(D, P) / T
  """
  return min((n for n in range(1, rows + 1) if rows % n == 0 and n * length >= width), default=rows)
