"""EK-FAC: the inverse curvature of linear layers, by their inputs and their outputs' gradients.

For a linear layer with inputs a (1 appended for the bias) and loss gradients d at its outputs, the
gradient of an example is dW = sum over its positions of a d^T. With A = E[a a^T] = U_A diag U_A^T
and S = E[d d^T] = U_S diag U_S^T,

  Lambda = E over examples of (U_A^T dW U_S)^2                              [D + 1, P]
  (F + damping)^-1 G  ~  U_A [ (U_A^T G U_S) / (Lambda + damping) ] U_S^T

where F is the Fisher matrix of one example's loss (the sum over its positions). Lambda is the best
diagonal in that basis; K-FAC has the products of the eigenvalues in its place. Layers are taken to
be independent of each other, and only linear ones have part: of the rest the solution is 0.

The model says where its linear layers are by calling them through an argument:

  def forward(params, layer, batch):                 # -> logits
    h = jax.nn.relu(layer('hidden', batch['x']))     # params['hidden']['kernel'], ['bias']
    return layer('head', h)

  logits = forward(params, attribution.layers(params), batch)      # the ordinary model
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrw.losses import cross_entropy

Layer = Callable[[str, jax.Array], jax.Array]
Forward = Callable[[Any, Layer, Mapping[str, jax.Array]], jax.Array]


class Factors(NamedTuple):
  """Of one layer: eigenvectors of inputs float[D(+1), D(+1)] and output gradients float[P, P], and
  the second moments `diagonal` float[D(+1), P] in their basis."""

  inputs: jax.Array
  outputs: jax.Array
  diagonal: jax.Array


def layers(params: Any) -> Layer:
  """(name, x) -> x @ kernel + bias, of the part of `params` that the name ('blocks/0/up') leads to.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> layer = attribution.layers({'head': {'kernel': jnp.ones((2, 1))}})
    >>> layer('head', jnp.array([1.0, 2.0]))
    Array([3.], dtype=float32)
  """

  def layer(name, x):
    part = _at(params, name)
    y = x @ part['kernel']
    return y + part['bias'] if 'bias' in part else y

  return layer


def ekfac(
  key: jax.Array,
  forward: Forward,
  params: Any,
  batches: Iterable[Mapping[str, jax.Array]],
  *,
  labels: Literal['sampled', 'given'] = 'sampled',
) -> dict[str, Factors]:
  """Factors of every linear layer, from two passes over the data.

  Args:
    key: draws labels.
    forward: (params, layer, batch) -> logits float[B, ..., V]; calls layer(name, x) once for each
      linear layer, outside of scans. Compiled once for each function object: define it once.
    params: a tree of nested mappings.
    batches: a sequence (it is read twice) of mappings with what `forward` reads; `base` float[B,
      ...] is 0 at padding, default ones; `labels` int[B, ...] if they are given.
    labels: 'sampled' from the model, which makes it the Fisher matrix; 'given', the empirical one.

  Returns:
    {layer's name: Factors}.

  Raises:
    ValueError: no batches; a layer called twice; concrete inputs or gradients that are not finite.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> params = {'head': {'kernel': jnp.zeros((3, 2))}}
    >>> forward = lambda params, layer, batch: layer('head', batch['x'])
    >>> batches = [{'x': jax.random.normal(jax.random.key(0), (8, 3))}]
    >>> factors = attribution.ekfac(jax.random.key(1), forward, params, batches)
    >>> factors['head'].diagonal.shape
    (3, 2)

  Source: George et al., EK-FAC, NeurIPS 2018; Grosse et al., Studying LLM Generalization with
    Influence Functions (arXiv 2308.03296), as recalled; conventions of the package `kronfluence`.
  """
  batches = list(batches)
  if not batches:
    raise ValueError('batches is empty: the factors are means over data')
  if labels not in ('sampled', 'given'):
    raise ValueError(f"labels={labels!r} must be 'sampled' or 'given'")

  keys = jax.random.split(key, len(batches))
  total = _summed(_moments(forward, labels, params, b, k) for b, k in zip(batches, keys))
  bases = {}
  for name, (aa, dd, number) in total.items():
    finite = jnp.isfinite(aa).all() & jnp.isfinite(dd).all()
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
      raise ValueError(f'inputs or gradients of layer {name!r} are not finite')
    bases[name] = jnp.linalg.eigh(aa / number)[1], jnp.linalg.eigh(dd / number)[1]
  total = _summed(_diagonals(forward, labels, params, bases, b, k) for b, k in zip(batches, keys))
  return {
    name: Factors(*bases[name], squares / number) for name, (squares, number) in total.items()
  }


def ekfac_solve(
  factors: Mapping[str, Factors], direction: Any, *, damping: float | None = None
) -> Any:
  """(F + damping)^-1 direction, layer by layer; zeros for parameters outside of the layers.

  Args:
    factors: from `ekfac`.
    direction: a tree like the parameters, e.g. the gradient of a target loss.
    damping: > 0, or None for a tenth of the mean of the layer's diagonal.

  Returns:
    A tree like `direction`, for `influence`.

  Raises:
    ValueError: a damping <= 0, a layer that the direction lacks.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> factors = {'head': attribution.Factors(jnp.eye(2), jnp.eye(1), jnp.array([[1.0], [3.0]]))}
    >>> direction = {'head': {'kernel': jnp.ones((2, 1))}}
    >>> attribution.ekfac_solve(factors, direction, damping=1.0)['head']['kernel'][:, 0]
    Array([0.5 , 0.25], dtype=float32)

  Source: conventions of the package `kronfluence`, its default damping included.
  """
  if damping is not None and not damping > 0:
    raise ValueError(f'damping={damping} must be greater than 0, or None')
  solved = jax.tree.map(jnp.zeros_like, direction)
  for name, (of_inputs, of_outputs, diagonal) in factors.items():
    try:
      part = _at(direction, name)
    except KeyError as e:
      raise ValueError(f'direction has no layer {name!r}') from e
    rows = (
      jnp.concatenate([part['kernel'], part['bias'][None]]) if 'bias' in part else part['kernel']
    )
    floor = 0.1 * jnp.mean(diagonal) if damping is None else damping
    turned = of_inputs.T @ rows @ of_outputs / (diagonal + floor)
    rows = of_inputs @ turned @ of_outputs.T
    new = {'kernel': rows[:-1], 'bias': rows[-1]} if 'bias' in part else {'kernel': rows}
    solved = _replaced(solved, name.split('/'), new)
  return solved


def linear_products(
  forward: Forward, params: Any, batch: Mapping[str, jax.Array], directions: Any
) -> jax.Array:
  """<g_i, v_q> of linear layers, of every example i with many directions q: `influence` for Q > 1.

  A layer's gradient of an example is a sum over positions of a d^T, so that its product with V is
  sum (a^T V) d: inputs and output gradients are computed once for all directions, and a direction
  costs one product with each layer's matrix. Other parameters have no part, as in `ekfac`.

  Args:
    forward, params: as in `ekfac`.
    batch: what `forward` reads, with `labels` and perhaps `base`; an example's loss is the sum over
      its positions.
    directions: a tree like `params` whose leaves have a leading axis Q, e.g.
      `jax.vmap(partial(ekfac_solve, factors))` of the gradients of Q targets.

  Returns:
    float[Q, B], positive = helpful; see `influence` for the scale.

  Raises:
    ValueError: a layer called twice.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> params = {'head': {'kernel': jnp.zeros((2, 2))}}
    >>> forward = lambda params, layer, batch: layer('head', batch['x'])
    >>> batch = {'x': jnp.eye(2), 'labels': jnp.array([0, 1])}
    >>> directions = {'head': {'kernel': -jnp.eye(2)[None]}}
    >>> attribution.linear_products(forward, params, batch, directions)
    Array([[0.5, 0.5]], dtype=float32)

  Source: how the package `kronfluence` computes pairwise scores; textbook form.
  """
  seen = _observed(forward, params, batch, jax.random.key(0), 'given')

  def one(direction):
    total = 0.0
    for name, (a, d, _) in seen.items():
      part = _at(direction, name)
      matrix = part['kernel']
      if 'bias' in part:
        matrix = jnp.concatenate([matrix, part['bias'][None]])
      total += jnp.sum((a @ matrix) * d, axis=tuple(range(1, a.ndim)))
    return total

  return jax.lax.map(one, directions)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(forward, labels, params, batch, key) -> dict[str, Any]:
  """{name: (sum of a a^T, sum of d d^T, number of positions)}."""
  sums = {}
  for name, (a, d, valid) in _observed(forward, params, batch, key, labels).items():
    a, d, valid = (x.reshape(-1, x.shape[-1]) for x in (a, d, valid[..., None]))
    a = jnp.where(valid, a, 0)
    sums[name] = (a.T @ a, d.T @ d, jnp.sum(valid))
  return sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _diagonals(forward, labels, params, bases, batch, key) -> dict[str, Any]:
  """{name: (sum over examples of squared gradients in the bases, number of examples)}."""
  sums = {}
  for name, (a, d, _) in _observed(forward, params, batch, key, labels).items():
    turned = a @ bases[name][0], d @ bases[name][1]
    turned = (x.reshape(len(x), -1, x.shape[-1]) for x in turned)
    each = jnp.einsum('btd,btp->bdp', *turned)
    sums[name] = (jnp.sum(each**2, axis=0), jnp.asarray(len(a)))
  return sums


def _observed(forward, params, batch, key, labels) -> dict[str, Any]:
  """{name: (inputs [B, ..., D(+1)], gradients at the outputs [B, ..., P], valid bool[B, ...])}."""
  plain, shapes = layers(params), {}

  def measuring(name, x):
    if name in shapes:
      raise ValueError(f'layer {name!r} is called twice; shared layers have no part in EK-FAC')
    y = plain(name, x)
    shapes[name] = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return y

  jax.eval_shape(lambda: forward(params, measuring, batch))

  def logits_of(taps):
    inputs = {}

    def layer(name, x):
      one = jnp.ones_like(x[..., :1])
      inputs[name] = jnp.concatenate([x, one], -1) if 'bias' in _at(params, name) else x
      return plain(name, x) + taps[name]

    return forward(params, layer, batch), inputs

  taps = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)
  logits, pull, seen = jax.vjp(logits_of, taps, has_aux=True)
  drawn = jax.random.categorical(key, logits) if labels == 'sampled' else batch['labels']
  base = batch.get('base', jnp.ones(drawn.shape, logits.dtype))
  loss = lambda z: jnp.sum(jnp.where(base > 0, base * cross_entropy(z, drawn), 0))
  (at_outputs,) = pull(jax.grad(loss)(logits))
  found = {}
  for name, a in seen.items():
    fits = a.shape[:-1] == base.shape
    found[name] = (a, at_outputs[name], base > 0 if fits else jnp.ones(a.shape[:-1], bool))
  return found


def _summed(parts: Iterable[Any]) -> Any:
  total = None
  for part in parts:
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total


def _at(tree: Any, name: str) -> Any:
  for key in name.split('/'):
    tree = tree[key]
  return tree


def _replaced(tree: Any, path: list[str], new: Mapping[str, jax.Array]) -> Any:
  """The tree with the entries of `new` at the path; other entries stay."""
  if not path:
    return {**tree, **new}
  return {**tree, path[0]: _replaced(tree[path[0]], path[1:], new)}
