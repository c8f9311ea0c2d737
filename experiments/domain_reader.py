"""What a mixture is told beside the losses of the step: how the domains' gradients compare, or how
the model does on some blocks, the same each time.

Everything is read on blocks of the training split, because what decides the mixture must not be
tested on; they are drawn independently of the batches, which may hold the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrw
from experiments import mesh as mesh_lib
from experiments import mixing
from experiments.data import pipeline
from experiments.data.corpus import Corpus
from experiments.models import lm
from jaxrw import diagnostics, gradients, masked, mixtures

FOLLOW_GRADIENTS = ('dga', 'doge')  # methods
Batch = dict[str, Any]
Draw = Callable[[int], Batch]


@dataclasses.dataclass(frozen=True)
class DomainReader:
  """(params, finished steps) -> signals by domain; zeros at steps in between, which nothing uses.

  Attributes:
    read: (params, *batches) -> signals, jitted.
    draw: (finished steps) -> the batches of a reading, over all devices.
    due: (finished steps) -> whether there is a reading before the next step.
    shapes: of the signals.
  """

  read: Callable[..., dict[str, jax.Array]]
  draw: Callable[[int], tuple[Batch, ...]]
  due: Callable[[int], bool]
  shapes: dict[str, jax.ShapeDtypeStruct]

  def zeros(self) -> dict[str, jax.Array]:
    """What is told where nothing is read."""
    return {name: jnp.zeros(s.shape, s.dtype) for name, s in self.shapes.items()}

  def __call__(self, params: Any, steps: int) -> dict[str, jax.Array]:
    return self.read(params, *self.draw(steps)) if self.due(steps) else self.zeros()


def make_reader(
  config: Any, corpus: Corpus, run: mixing.Context, model: lm.ModelConfig, mesh: jax.sharding.Mesh
) -> DomainReader | None:
  """The reader that the method of `config.mixture` needs, or None.

  For methods that follow gradients, each domain with a share is read on `config.mixture.rows` new
  blocks every `config.mixture.every` steps, and the target on `config.mixture.target_rows`; with a
  basis (`mixing.read_basis`) its mixtures take the place of the domains. For
  aioli the domains' losses are read where its schedule says so, on the same blocks each time.

  Raises:
    UserError: an unknown target, or one without blocks.
  """
  name, rows, num_domains = config.mixture.fn, config.mixture.rows, len(corpus.domains)
  # Fused attention has no forward-mode derivative.
  model = dataclasses.replace(model, dropout=0.0, attention='xla')
  drawn, groups = _drawer(corpus, run.shares > 0, rows, config.seed, mesh), num_domains
  if run.basis is not None:
    drawn, groups = _basis_drawer(corpus, run.basis, rows, config.seed, mesh), len(run.basis)
  vector = jax.ShapeDtypeStruct((groups,), jnp.float32)
  if name == 'aioli':
    due = mixing.aioli_measures(config, num_domains)
    losses = domain_losses(model, mesh, num_domains)
    read = lambda params, batch: {'domain_eval_losses': losses(params, batch)}
    draw = lambda steps: (drawn(0),)
    shapes = {'domain_eval_losses': vector}
  elif name in FOLLOW_GRADIENTS:
    with_norms = name == 'doge' or 'normalize' in config.mixture.args
    target, every = _target_drawer(config, corpus, run.shares, mesh), config.mixture.every
    due = lambda steps: steps % every == 0
    read = make_read(model, mesh, num_domains, rows if with_norms else 0, groups=groups)
    draw = lambda steps: (drawn(steps // every), target(steps // every))
    shapes = {'domain_alignment': vector}
    if with_norms:
      scalar = jax.ShapeDtypeStruct((), jnp.float32)
      shapes |= {'domain_grad_norms': vector, 'target_grad_norm': scalar}
  else:
    return None
  return DomainReader(
    read=jax.jit(read, out_shardings=mesh_lib.replicated(mesh)),
    draw=lambda steps: tuple(mesh_lib.to_global(batch, mesh) for batch in draw(steps)),
    due=due,
    shapes=shapes,
  )


def domain_losses(
  model: lm.ModelConfig, mesh: jax.sharding.Mesh, num_domains: int
) -> Callable[[Any, Batch], jax.Array]:
  """(params, batch) -> mean loss of each domain's examples, float32[G]; 0 for an absent one."""

  def losses_of(params, batch):
    losses, base = _examples(params, batch, model, mesh)
    columns = jnp.stack([base * losses, base], axis=1)
    totals = diagnostics.group_sums(columns, batch['domain_id'], num_domains)
    return masked.divide(totals[:, 0], totals[:, 1])

  return losses_of


def make_read(
  model: lm.ModelConfig,
  mesh: jax.sharding.Mesh,
  num_domains: int,
  rows_for_norms: int = 0,
  *,
  groups: int | None = None,
) -> Callable[[Any, Batch, Batch], dict[str, jax.Array]]:
  """(params, batch of the domains, batch of the target) -> alignments, and norms if asked for.

  The alignments of all domains take one forward pass with its derivative along the target's
  gradient: the matmuls of one gradient of that batch, however many domains there are. Norms take
  as many again, one domain at a time.

  Args:
    model, mesh: of the run.
    num_domains: G, of the target's batch and, by default, of the other.
    rows_for_norms: 0 for no norms; else how many rows of each domain follow one another.
    groups: what `domain_id` of the first batch counts instead of the domains: mixtures of a basis.
  """
  groups = num_domains if groups is None else groups
  losses_of = domain_losses(model, mesh, groups)
  target_losses_of = domain_losses(model, mesh, num_domains)

  def target_loss(params, batch):
    """The mean over the target's domains, each counting alike."""
    real = jnp.any(batch['base'] > 0, axis=1).astype(jnp.float32)
    counts = diagnostics.group_sums(real[:, None], batch['domain_id'], num_domains)[:, 0]
    return masked.mean(target_losses_of(params, batch), (counts > 0).astype(jnp.float32))

  def norm(tree):
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))

  def read(params, batch, target):
    direction = gradients.target_direction(target_loss, params, target)
    of_params = lambda params: losses_of(params, batch)
    found = {'domain_alignment': gradients.alignment(of_params, params, direction)}
    if rows_for_norms:
      whole = batch['base'].shape[0] // rows_for_norms
      parts = jax.tree.map(
        lambda x: x[: whole * rows_for_norms].reshape(whole, rows_for_norms, *x.shape[1:]), batch
      )
      norms = jax.lax.map(
        lambda part: norm(
          jax.grad(lambda p: masked.mean(*_examples(p, part, model, mesh)))(params)
        ),
        parts,
      )
      # A domain's rows are of one part; parts of padding have norm 0.
      found['domain_grad_norms'] = jnp.zeros(groups).at[parts['domain_id'][:, 0]].add(norms)
      found['target_grad_norm'] = norm(direction)
    return found

  return read


def read_matrix(
  model: lm.ModelConfig, mesh: jax.sharding.Mesh, corpus: Corpus, blocks: int
) -> Callable[[Any], np.ndarray]:
  """(params) -> inner products of the domains' gradients, float64[G, G]; 0 for an empty domain.

  One domain's gradient at a time is the direction along which the losses of all are derived.
  """
  model = dataclasses.replace(model, dropout=0.0, attention='xla')
  sizes = corpus.sizes('train')
  batch = mesh_lib.to_global(_drawer(corpus, sizes > 0, blocks, 0, mesh)(0), mesh)
  losses_of = domain_losses(model, mesh, len(corpus.domains))

  @jax.jit
  def row(params, domain):
    direction = jax.grad(lambda params: losses_of(params, batch)[domain])(params)
    return gradients.alignment(lambda params: losses_of(params, batch), params, direction)

  return lambda params: np.array(
    [np.asarray(row(params, g), np.float64) for g in range(len(corpus.domains))]
  )


def _examples(params, batch: Batch, model: lm.ModelConfig, mesh: jax.sharding.Mesh):
  """(losses, base), both float32[B]."""
  losses = lm.token_losses(params, batch, model, mesh=mesh)
  return masked.example_level(losses, jaxrw.base_measure(batch['base'], losses))


def _target_drawer(
  config: Any, corpus: Corpus, shares: np.ndarray, mesh: jax.sharding.Mesh
) -> Draw:
  chosen, sizes = mixing.target_set(config, corpus, shares)
  # A set smaller than its batch is read whole every time, each of its blocks once.
  rows = max(1, config.mixture.target_rows // int(chosen.sum()))
  return _drawer(corpus, chosen, min(rows, int(sizes[chosen].min())), config.seed + 1, mesh, sizes)


def _basis_drawer(
  corpus: Corpus, basis: np.ndarray, rows: int, seed: int, mesh: jax.sharding.Mesh
) -> Draw:
  """(n) -> this process' part of the n-th batch of `rows` blocks drawn by each mixture of the
  basis, in order; `domain_id` says by which.

  Of a domain with share p there are `rows` p blocks up to one, and in expectation exactly.
  """
  sizes, offsets, ends = corpus.sizes('train'), corpus.offsets('train'), np.cumsum(basis, axis=1)
  drawn_by = np.repeat(np.arange(len(basis), dtype=np.int32), rows)

  def draw(n: int) -> Batch:
    rng = np.random.default_rng((seed, n))
    points = (rng.random((len(basis), 1)) + np.arange(rows)) / rows
    domain = np.concatenate([np.searchsorted(e / e[-1], p, 'right') for e, p in zip(ends, points)])
    ids = offsets[domain] + (rng.random(domain.size) * sizes[domain]).astype(np.int64)
    return pipeline.padded_rows(
      corpus,
      'train',
      ids,
      mesh_lib.row_shards(mesh),
      domain_ids=drawn_by,
      local_rows=mesh_lib.local_rows(mesh),
    )

  return draw


def _drawer(
  corpus: Corpus,
  chosen: np.ndarray,
  rows: int,
  seed: int,
  mesh: jax.sharding.Mesh,
  sizes: np.ndarray | None = None,
) -> Draw:
  """(n) -> this process' part of the n-th batch of `rows` blocks of each chosen domain, in order.

  Blocks come shuffled, none twice before all were used. The batch is a function of n
  alone, so a resumed run draws the same. With `sizes`, a domain is that many blocks spread over it.
  """
  have = corpus.sizes('train')
  sizes = have if sizes is None else sizes
  domain = np.repeat(np.flatnonzero(chosen), rows)
  first = corpus.offsets('train')[domain]

  def draw(n: int) -> Batch:
    position, size = n * rows + np.arange(domain.size) % rows, sizes[domain]
    index = mixtures.shuffled_index(position % size, size, seed, domain, position // size)
    return pipeline.padded_rows(
      corpus,
      'train',
      first + index * have[domain] // size,
      mesh_lib.row_shards(mesh),
      local_rows=mesh_lib.local_rows(mesh),
    )

  return draw
