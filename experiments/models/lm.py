"""Decoder-only language models as pure functions: what GPT-2 and Llama have in common.

`init(key, cfg) -> params`, `apply(params, tokens, cfg) -> logits`, `token_losses(params, batch,
cfg)`: a family (gpt2.py, llama.py) brings a config and two flax modules, its `Block` and what is
outside the blocks, its `Ends`. Flax nnx describes the layers and nothing else: a module is split
once into a static description and its arrays, and merged again where it is called. Everything
outside sees plain nested dicts of float32 arrays, so `jax.jit`, `vmap`, `grad` and checkpoints need
to know nothing about flax.

Shapes: B rows, T positions, D = n_embd, H heads, L layers, V tokens of vocabulary. The L blocks
have one set of parameters stacked on a leading axis L, which `lax.scan` walks; compile time and
the size of the program then do not grow with depth. Matmuls run in `cfg.dtype`; parameters, norms,
softmax, logits and losses are float32 whatever it is.

A `probe` (see jaxrw.gradients) reads signals of the rows' gradients in the backward pass. Without
one, every layer is plain flax.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.errors import UserError
from experiments.mesh import ROWS, Rules, pin_rows, row_shards, tree_shardings
from jaxrw import gradients
from jaxrw.gradients import Probe
from jaxrw.losses import chunked_cross_entropy, cross_entropy
from jaxrw.steps import join_rows, split_rows

Params = dict[str, Any]

# What of a block is kept for its backward pass, by `cfg.remat`.
REMAT = ('none', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that fixes an architecture. Hashable, so that it can be a static argument.

  Attributes:
    vocab_size: V, rows of the token table.
    max_len: T may be anything up to it.
    n_layer, n_head, n_embd: L, H, D; D must be a multiple of H.
    d_ff: width of the blocks' hidden layer; 0 means what the family has (`GPT2Config`: 4 D).
    dropout: rate on the embeddings and on both residual branches (not on attention weights, which
      fused attention kernels do not expose). 0 needs no key.
    dtype: 'float32' or 'bfloat16', the dtype of matmuls and of the residual stream.
    scan: walk the blocks by `lax.scan`; False unrolls them. The numbers agree.
    remat: 'none' stores what the backward pass reads; 'dots' stores the products with parameters
      and computes attention again; 'full' stores the blocks' inputs and computes them again.
    attention: 'xla', 'cudnn' (16-bit, NVIDIA only), or 'auto': cudnn where it applies.
    loss_chunk: positions whose logits exist at a time in `token_losses`; 0 means all T of them.
  """

  vocab_size: int
  max_len: int
  n_layer: int
  n_head: int
  n_embd: int
  d_ff: int = 0
  dropout: float = 0.0
  dtype: str = 'float32'
  scan: bool = True
  remat: str = 'none'
  attention: str = 'auto'
  loss_chunk: int = 0

  # What a family brings: its modules, how its arrays lie on a mesh (see experiments.mesh), whether
  # its layers take a probe.
  ends: ClassVar[type[nnx.Module]]
  block: ClassVar[type[nnx.Module]]
  sharding_rules: ClassVar[Rules]
  takes_probe: ClassVar[bool] = False

  @classmethod
  def from_config(cls, model, *, vocab_size: int, seq_len: int) -> ModelConfig:
    """Builds the config of a run from `config.model`, the tokenizer's size and the data's T.

    Raises:
      UserError: one line that names the field, its value and the fix.
    """
    vocab, max_len = model.vocab_size or vocab_size, model.max_len or seq_len
    if vocab < vocab_size:
      raise UserError(
        f'model.vocab_size={vocab} is smaller than the tokenizer ({vocab_size} tokens): '
        f'use 0 or at least {vocab_size}'
      )
    if seq_len > max_len:
      raise UserError(
        f'data.seq_len={seq_len} is longer than the model (model.max_len={max_len}): '
        f'shorten data.seq_len or set model.max_len to 0 or at least {seq_len}'
      )
    if model.n_head < 1 or model.n_embd % model.n_head:
      raise UserError(
        f'model.n_embd={model.n_embd} is not a multiple of model.n_head={model.n_head}: '
        'change one of them'
      )
    if model.dtype not in ('float32', 'bfloat16'):
      raise UserError(f"model.dtype='{model.dtype}' is unknown: use 'float32' or 'bfloat16'")
    if model.attention not in ('auto', 'xla', 'cudnn'):
      raise UserError(
        f"model.attention='{model.attention}' is unknown: use 'auto', 'xla' or 'cudnn'"
      )
    if model.remat not in REMAT:
      raise UserError(f'model.remat={model.remat!r} is unknown: use one of {", ".join(REMAT)}')
    own = {field.name for field in dataclasses.fields(cls)} - {'vocab_size', 'max_len'}
    return cls(vocab_size=vocab, max_len=max_len, **{name: getattr(model, name) for name in own})

  def num_params(self) -> int:
    """Number of parameters, a tied output counted once; the family's formula."""
    raise NotImplementedError

  def block_matmul_params(self) -> int:
    """Parameters of one block that are factors of a matrix product."""
    raise NotImplementedError

  def flops_per_token(self, seq_len: int | None = None) -> int:
    """Useful matmul FLOPs to train on one token: forward 2 (L (P + T D) + D V), times 3.

    P are the matmul parameters of a block. This is the numerator of model FLOPs utilization:
    attention counts the causal half only, recomputation is not counted, and the backward pass costs
    two forwards.
    """
    d, t = self.n_embd, seq_len or self.max_len
    layers = self.n_layer * (self.block_matmul_params() + t * d)
    return 3 * 2 * (layers + d * self.vocab_size)


# What modules are made of -----------------------------------------------------------------------


def normal(scale: float = 1.0):
  """Initialization of a kernel."""
  return nnx.initializers.normal(0.02 * scale)


def residual_scale(cfg: ModelConfig) -> float:
  """2L branches add up in the residual stream; this keeps its variance independent of depth."""
  return (2 * cfg.n_layer) ** -0.5


def dropout(x, key, site: int, rate: float):
  """Inverted dropout on [B, T, D], one key a row: noise does not depend on the other rows."""
  if key is None or rate == 0.0:
    return x
  draw = lambda k: jax.random.bernoulli(jax.random.fold_in(k, site), 1 - rate, x.shape[1:])
  return jnp.where(jax.vmap(draw)(key), x / (1 - rate), 0).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Causal attention by the kernel that `cfg.attention` names: q [B, T, H, d] -> the same shape.

  Args:
    q: queries.
    k, v: [B, T, K, d]; H is a multiple of K, and each head of k and v serves H / K of q.
    cfg: the architecture.
  """
  if attention_kernel(cfg) == 'cudnn':
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  return causal_attention(*(x.transpose(0, 2, 1, 3) for x in (q, k, v))).transpose(0, 2, 1, 3)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(d), causal) v, a block of queries at a time: [B, H, T, d] of q's dtype.

  The numbers are those of `jax.nn.dot_product_attention`. A block reads the keys up to its own end
  only, so that of n blocks' matmuls and softmax just (n + 1) / 2n is computed: 5/8 for the four
  blocks used when T is a multiple of 4 and a block has 64 queries or more. On a CPU, attention's
  forward and backward pass took 0.83 of its time at T = 128 and 0.69 at T = 256.
  """
  t, scale = q.shape[2], q.shape[3] ** -0.5
  blocks = next((n for n in (4, 2) if t % n == 0 and t // n >= 64), 1)
  rows = []
  for end in range(t // blocks, t + 1, t // blocks):
    start = end - t // blocks
    keys, values = k[:, :, :end], v[:, :, :end]
    queries = q[:, :, start:end]
    scores = jnp.einsum('bhtd,bhsd->bhts', queries, keys, preferred_element_type=jnp.float32)
    future = jnp.arange(end) > jnp.arange(start, end)[:, None]
    # Added, not selected: a select would keep its mask for the backward pass, once per row.
    scores = scores * scale + jnp.where(future, jnp.finfo(jnp.float32).min / 2, 0)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    rows.append(jnp.einsum('bhts,bhsd->bhtd', weights, values))
  return jnp.concatenate(rows, axis=2)


def attention_kernel(cfg: ModelConfig) -> str:
  if cfg.attention != 'auto':
    return cfg.attention
  head = cfg.n_embd // cfg.n_head
  fits = cfg.dtype == 'bfloat16' and head % 8 == 0 and head <= 128
  # '9.0' on an H100; AMD devices say 'gfx...', CPUs and TPUs nothing.
  capability = str(getattr(jax.devices()[0], 'compute_capability', '')).split('.')[0]
  return 'cudnn' if fits and capability.isdigit() and int(capability) >= 8 else 'xla'


# Pure functions -------------------------------------------------------------------------------


@functools.cache
def _graphs(cfg: ModelConfig):
  """The static descriptions of `cfg.ends` and `cfg.block`, made without allocating an array."""
  abstract = lambda module: nnx.eval_shape(lambda: module(cfg, rngs=nnx.Rngs(0)))
  return nnx.split(abstract(cfg.ends))[0], nnx.split(abstract(cfg.block))[0]


def init(key: jax.Array, cfg: ModelConfig) -> Params:
  """Draws fresh float32 parameters: those of `cfg.ends`, and 'blocks', stacked on axis 0.

  GPT-2's scheme: normal(0.02), the two projections into the residual stream divided by
  sqrt(2 L), biases 0, norms 1.
  """
  ends_key, blocks_key = jax.random.split(key)
  arrays = lambda module, k: nnx.to_pure_dict(nnx.state(module(cfg, rngs=nnx.Rngs(k))))
  blocks = jax.vmap(functools.partial(arrays, cfg.block))(jax.random.split(blocks_key, cfg.n_layer))
  return {**arrays(cfg.ends, ends_key), 'blocks': blocks}


def abstract(cfg: ModelConfig, mesh: Mesh) -> Params:
  """The shapes, dtypes and shardings of what `init` returns, laid out over a mesh."""
  shapes = jax.eval_shape(lambda: init(jax.random.key(0), cfg))
  placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(placed, shapes, tree_shardings(shapes, mesh, cfg.sharding_rules))


def apply(
  params: Params,
  tokens: jax.Array,
  cfg: ModelConfig,
  *,
  key: jax.Array | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Next-token logits of every position: `logits` of `hidden`, whose arguments these are.

  Returns:
    f32[B, T, V]; position t depends on tokens 0..t only.
  """
  return logits(params, hidden(params, tokens, cfg, key=key, mesh=mesh))


def logits(params: Params, x: jax.Array) -> jax.Array:
  """The output layer: [B, T, D] -> f32[B, T, V].

  16-bit inputs when x is, but the products are summed in float32.
  """
  table = output_table(params).astype(x.dtype)
  return jnp.einsum('btd,vd->btv', x, table, preferred_element_type=jnp.float32)


def output_table(params: Params) -> jax.Array:
  """f32[V, D], a row for each token: a table of its own, or the one that embeds tokens."""
  return params.get('head', params['wte'])['embedding']


def hidden(
  params: Params,
  tokens: jax.Array,
  cfg: ModelConfig,
  *,
  key: jax.Array | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """What the output layer reads: the residual stream after the last norm.

  Args:
    params: as `init` returns them.
    tokens: i32[B, T], T <= cfg.max_len.
    cfg: the architecture.
    key: typed keys [B], one a row, for dropout; None leaves it out.
    mesh: where the batch lives; activations are then kept cut along its rows. The numbers are the
      same without it, but a mesh with fsdp > 1 spends far more on communication.

  Returns:
    cfg.dtype[B, T, D]; position t depends on tokens 0..t only.
  """
  return _hidden(params, tokens, cfg, key, mesh, None)[0]


def _hidden(params, tokens, cfg: ModelConfig, key, mesh: Mesh | None, probe: Probe | None):
  """(`hidden`, with a probe: the link from the token table as input to itself as output)."""
  if tokens.shape[1] > cfg.max_len:
    raise ValueError(f'{tokens.shape[1]} tokens in a row, but cfg.max_len is {cfg.max_len}')
  ends_graph, block_graph = _graphs(cfg)
  ends = nnx.merge(ends_graph, {name: params[name] for name in params if name != 'blocks'})

  def block(x, layer):
    index, arrays, directions = layer
    layer_probe = probe and probe.along(directions)
    layer_key = None if key is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(key)
    return pin_rows(nnx.merge(block_graph, arrays)(x, layer_key, layer_probe), mesh), None

  # Inside scan the loop itself keeps XLA from undoing a recomputation.
  checkpoint = functools.partial(jax.checkpoint, prevent_cse=not cfg.scan)
  policies = jax.checkpoint_policies
  if cfg.remat == 'full':
    block = checkpoint(block)
  elif cfg.remat == 'dots':
    block = checkpoint(block, policy=policies.dots_with_no_batch_dims_saveable)
  elif cfg.scan and attention_kernel(cfg) == 'xla':
    # Scan stores what the backward pass reads in one array per value and layer stack; without this
    # half of them are elementwise functions of the others, cheaper to compute than to store.
    block = checkpoint(block, policy=policies.checkpoint_dots)

  x, link = ends.embed(tokens, probe)
  x = pin_rows(dropout(x, key, cfg.n_layer, cfg.dropout), mesh)
  directions = probe.at('blocks').directions if probe else ()
  layers = (jnp.arange(cfg.n_layer), params['blocks'], directions)
  if cfg.scan:
    x, _ = jax.lax.scan(block, x, layers)
  else:
    for i in range(cfg.n_layer):
      x, _ = block(x, jax.tree.map(lambda leaf: leaf[i], layers))  # noqa: B023
  return ends.norm(x, probe), link


def token_losses(
  params: Params,
  batch: dict[str, jax.Array],
  cfg: ModelConfig,
  *,
  mesh: Mesh | None = None,
  probe: Probe | None = None,
) -> jax.Array:
  """Cross entropy of every next token, in nats, unmasked: f32[B, T].

  Args:
    batch: `tokens` i32[B, T + 1]; with cfg.dropout > 0 also `dropout_key`, typed keys [B].
    mesh: see `apply`.
    probe: reads the rows' gradients in the backward pass; the losses are the same.
  """
  x, link = _hidden(params, batch['tokens'][:, :-1], cfg, _dropout_key(batch, cfg), mesh, probe)
  if probe is not None:
    return _probed_head(params, x, link, batch['tokens'], cfg, probe)
  return _head(params, x, batch['tokens'][:, 1:], cfg, mesh)


def token_losses_and_hidden(
  params: Params, batch: dict[str, jax.Array], cfg: ModelConfig, *, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
  """(`token_losses`, the hidden states they come from, cfg.dtype[B, T, D]) in one forward pass."""
  x = hidden(params, batch['tokens'][:, :-1], cfg, key=_dropout_key(batch, cfg), mesh=mesh)
  return _head(params, x, batch['tokens'][:, 1:], cfg, mesh), x


def _dropout_key(batch, cfg: ModelConfig):
  return batch['dropout_key'] if cfg.dropout > 0 else None


def _head(params, x, labels, cfg: ModelConfig, mesh: Mesh | None) -> jax.Array:
  """Losses [B, T] of the labels from the last hidden states."""
  if cfg.loss_chunk == 0:
    return cross_entropy(logits(params, x), labels)
  head = functools.partial(chunked_cross_entropy, chunk=cfg.loss_chunk)
  if mesh is not None and row_shards(mesh) > 1 and x.shape[0] % row_shards(mesh) == 0:
    # Each device adds up its own chunks' gradients of the table, and all devices' are added once,
    # each keeping its part; the partitioner would send a whole table between devices for every
    # chunk.
    local, rows = head, P(ROWS)
    cut = cfg.n_embd % mesh.shape['fsdp'] == 0 and mesh.shape['fsdp'] > 1

    def head(x, table, labels):
      table = jax.lax.pcast(table, ('data',) if cut else ROWS, to='varying')
      if cut:
        table = jax.lax.all_gather(table, 'fsdp', axis=1, tiled=True)
      return local(x, table, labels)

    head = jax.shard_map(
      head,
      mesh=mesh,
      in_specs=(rows, P(None, 'fsdp') if cut else P(), rows),
      out_specs=rows,
      axis_names=set(ROWS),
    )
  return head(x, output_table(params), labels)


def _probed_head(params, x, link, tokens, cfg: ModelConfig, probe: Probe) -> jax.Array:
  """Losses [B, T] from the last hidden state; `loss_chunk` bounds the memory of logits here, too.

  A probe needs a row's logits together, so rows are taken a few at a time instead of positions.
  """
  table = output_table(params)

  def losses(rows):
    x, link, tokens, tap = rows
    part = dataclasses.replace(probe.at('wte'), tap=tap)
    return cross_entropy(gradients.tied_head(x, table, tokens[:, :-1], link, part), tokens[:, 1:])

  rows, (count, length, _) = (x, link, tokens, probe.tap), x.shape
  if cfg.loss_chunk == 0:
    return losses(rows)
  local = count // probe.shards
  enough = lambda parts: local % parts == 0 and parts * cfg.loss_chunk >= length
  parts = next(filter(enough, range(1, local + 1)), local)
  losses = jax.checkpoint(losses, prevent_cse=False)
  return join_rows(jax.lax.map(losses, split_rows(rows, parts)))


def example_loss(params: Params, example: dict[str, jax.Array], cfg: ModelConfig) -> jax.Array:
  """Mean loss of one example's valid targets, f32[]: the definition, for `vmap` and `grad` of it.

  Uses plain attention whatever `cfg.attention` says: fused kernels do not support forward-mode
  derivatives, nor every combination of vmap and grad.

  Args:
    example: one row of a batch, without its leading axis: `tokens` i32[T + 1], `base` f32[T].
  """
  one_row = {name: leaf[None] for name, leaf in example.items()}
  losses = token_losses(params, one_row, dataclasses.replace(cfg, attention='xla'))[0]
  base = example['base']
  return jnp.sum(jnp.where(base > 0, base * losses, 0.0)) / jnp.maximum(jnp.sum(base), 1.0)


def dropout_keys(key: jax.Array, step: jax.Array, example_ids: jax.Array) -> jax.Array:
  """Typed keys [B] that depend on (key, step, example id) alone, so on no device layout."""
  step_key = jax.random.fold_in(key, step)
  return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(example_ids)
