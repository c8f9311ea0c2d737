"""GPT-2 as pure functions: `init(key, cfg) -> params` and `apply(params, tokens, cfg) -> logits`.

Flax nnx describes the layers and nothing else: a module is split once into a static description
and its arrays, and merged again where it is called. Everything outside sees plain nested dicts of
float32 arrays, so `jax.jit`, `vmap`, `grad` and checkpoints need to know nothing about flax.

Shapes: B rows, T positions, D = n_embd, H heads, L layers, V tokens of vocabulary. The L blocks
have one set of parameters stacked on a leading axis L, which `lax.scan` walks; compile time and
the size of the program then do not grow with depth. Matmuls run in `cfg.dtype`; parameters, layer
norms, softmax, logits and losses are float32 whatever it is.

A `probe` (see jaxrw.gradients) reads signals of the rows' gradients in the backward pass. Without
one, every layer is plain flax.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.errors import UserError
from experiments.mesh import AXES, pin_rows
from jaxrw import gradients
from jaxrw.gradients import Probe
from jaxrw.losses import chunked_cross_entropy, cross_entropy
from jaxrw.steps import join_rows, split_rows

Params = dict[str, Any]

# Path pattern -> how an array is laid out on the mesh (see experiments.mesh). `fsdp` cuts the
# matrices and the token table; what is left is too small for the gathers to be worth it.
SHARDING_RULES = (
  (r'blocks/.*/kernel$', P(None, None, 'fsdp')),
  (r'wte/embedding$', P(None, 'fsdp')),
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """Everything that fixes the architecture. Hashable, so that it can be a static argument.

  Attributes:
    vocab_size: V, rows of the token table, which is also the output layer (tied).
    max_len: positions of the learned position table; T may be anything up to it.
    n_layer, n_head, n_embd: L, H, D; D must be a multiple of H.
    dropout: rate on the embeddings and on both residual branches (not on attention weights, which
      fused attention kernels do not expose). 0 needs no key.
    dtype: 'float32' or 'bfloat16', the dtype of matmuls and of the residual stream.
    scan: walk the blocks by `lax.scan`; False unrolls them. The numbers agree.
    remat: recompute each block in the backward pass instead of storing its activations.
    attention: 'xla', 'cudnn' (16-bit, NVIDIA only), or 'auto': cudnn where it applies.
    loss_chunk: positions whose logits exist at a time in `token_losses`; 0 means all T of them.
  """

  vocab_size: int
  max_len: int
  n_layer: int
  n_head: int
  n_embd: int
  dropout: float = 0.0
  dtype: str = 'float32'
  scan: bool = True
  remat: bool = False
  attention: str = 'auto'
  loss_chunk: int = 0

  @classmethod
  def from_config(cls, model, *, vocab_size: int, seq_len: int) -> GPT2Config:
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
    return cls(
      vocab_size=vocab,
      max_len=max_len,
      n_layer=model.n_layer,
      n_head=model.n_head,
      n_embd=model.n_embd,
      dropout=model.dropout,
      dtype=model.dtype,
      scan=model.scan,
      remat=model.remat,
      attention=model.attention,
      loss_chunk=model.loss_chunk,
    )


def _gpt2(n_layer: int, n_head: int) -> GPT2Config:
  return GPT2Config(vocab_size=50257, max_len=512, n_layer=n_layer, n_head=n_head, n_embd=768)


PRESETS = {
  'tiny': GPT2Config(vocab_size=257, max_len=128, n_layer=2, n_head=4, n_embd=96),
  'gpt2_124m': _gpt2(12, 12),
  'gpt2_209m': _gpt2(24, 16),
  'gpt2_294m': _gpt2(36, 24),
}


# Modules --------------------------------------------------------------------------------------


class LayerNorm(nnx.LayerNorm):
  """Statistics, scale and bias in float32, output in the dtype of the input, [..., D]."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    super().__init__(cfg.n_embd, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x, probe: Probe | None = None):
    if probe is None:
      return super().__call__(x).astype(x.dtype)
    normed = jax.nn.standardize(x.astype(jnp.float32), epsilon=self.epsilon)
    return gradients.scale_bias(normed, self.scale[...], self.bias[...], probe).astype(x.dtype)


class Linear(nnx.Linear):
  """Affine map in `cfg.dtype`, [..., D] -> [..., P]."""

  def __call__(self, x, probe: Probe | None = None):
    if probe is None:
      return super().__call__(x)
    return gradients.linear(x, self.kernel[...], self.bias[...], probe)


class Attention(nnx.Module):
  """Causal multi-head self-attention, [B, T, D] -> [B, T, D]."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
    self.qkv = linear(cfg.n_embd, 3 * cfg.n_embd, kernel_init=_normal())
    self.out = linear(cfg.n_embd, cfg.n_embd, kernel_init=_normal(_residual_scale(cfg)))
    self.cfg = cfg

  def __call__(self, x, probe: Probe | None = None):
    b, t, d = x.shape
    qkv = self.qkv(x, probe and probe.at('qkv'))
    q, k, v = (x.reshape(b, t, self.cfg.n_head, -1) for x in jnp.split(qkv, 3, axis=-1))
    if _attention_kernel(self.cfg) == 'cudnn':
      y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')
    else:
      y = causal_attention(*(x.transpose(0, 2, 1, 3) for x in (q, k, v))).transpose(0, 2, 1, 3)
    return self.out(y.reshape(b, t, d), probe and probe.at('out'))


class MLP(nnx.Module):
  """Two layers with a gelu (tanh form, as GPT-2) between, [B, T, D] -> [B, T, D]."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
    self.up = linear(cfg.n_embd, 4 * cfg.n_embd, kernel_init=_normal())
    self.down = linear(4 * cfg.n_embd, cfg.n_embd, kernel_init=_normal(_residual_scale(cfg)))

  def __call__(self, x, probe: Probe | None = None):
    h = jax.nn.gelu(self.up(x, probe and probe.at('up')), approximate=True)
    return self.down(h, probe and probe.at('down'))


class Block(nnx.Module):
  """Pre-norm transformer block, [B, T, D] -> [B, T, D] in the dtype of its input."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    self.ln_1, self.attn = LayerNorm(cfg, rngs=rngs), Attention(cfg, rngs=rngs)
    self.ln_2, self.mlp = LayerNorm(cfg, rngs=rngs), MLP(cfg, rngs=rngs)
    self.dropout = cfg.dropout

  def __call__(self, x, key=None, probe: Probe | None = None):
    at = lambda name: probe and probe.at(name)
    y = self.attn(self.ln_1(x, at('ln_1')), at('attn'))
    x = x + _dropout(y, key, 0, self.dropout)
    y = self.mlp(self.ln_2(x, at('ln_2')), at('mlp'))
    return x + _dropout(y, key, 1, self.dropout)


class Ends(nnx.Module):
  """What is outside the blocks: token and position tables, and the last norm."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    self.wte = nnx.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=_normal(), rngs=rngs)
    self.wpe = nnx.Embed(cfg.max_len, cfg.n_embd, embedding_init=_normal(), rngs=rngs)
    self.ln_f = LayerNorm(cfg, rngs=rngs)
    self.dtype = jnp.dtype(cfg.dtype)

  def embed(self, tokens, probe: Probe | None = None):
    """i32[B, T] -> (cfg.dtype[B, T, D], with a probe: its link to the output layer)."""
    words, positions = self.wte.embedding[...], self.wpe.embedding[...]
    if probe is None:
      return (words[tokens] + positions[: tokens.shape[1]]).astype(self.dtype), None
    x, link = gradients.tied_embedding(words, tokens, probe.at('wte'))
    return gradients.add_positions(x, positions, probe.at('wpe')).astype(self.dtype), link


def _normal(scale: float = 1.0):
  return nnx.initializers.normal(0.02 * scale)


def _residual_scale(cfg: GPT2Config) -> float:
  # 2L branches add up in the residual stream; this keeps its variance independent of depth.
  return (2 * cfg.n_layer) ** -0.5


def _dropout(x, key, site: int, rate: float):
  """Inverted dropout on [B, T, D], one key a row: noise does not depend on the other rows."""
  if key is None or rate == 0.0:
    return x
  draw = lambda k: jax.random.bernoulli(jax.random.fold_in(k, site), 1 - rate, x.shape[1:])
  return jnp.where(jax.vmap(draw)(key), x / (1 - rate), 0).astype(x.dtype)


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


def _attention_kernel(cfg: GPT2Config) -> str:
  if cfg.attention != 'auto':
    return cfg.attention
  head = cfg.n_embd // cfg.n_head
  fits = cfg.dtype == 'bfloat16' and head % 8 == 0 and head <= 128
  # '9.0' on an H100; AMD devices say 'gfx...', CPUs and TPUs nothing.
  capability = str(getattr(jax.devices()[0], 'compute_capability', '')).split('.')[0]
  return 'cudnn' if fits and capability.isdigit() and int(capability) >= 8 else 'xla'


# Pure functions -------------------------------------------------------------------------------


@functools.cache
def _graphs(cfg: GPT2Config):
  """The static descriptions of `Ends` and `Block`, made without allocating an array."""
  abstract = lambda module: nnx.eval_shape(lambda: module(cfg, rngs=nnx.Rngs(0)))
  return nnx.split(abstract(Ends))[0], nnx.split(abstract(Block))[0]


def init(key: jax.Array, cfg: GPT2Config) -> Params:
  """Draws fresh float32 parameters: {'wte', 'wpe', 'ln_f', 'blocks'}, blocks stacked on axis 0.

  GPT-2's scheme: normal(0.02), the two projections into the residual stream divided by
  sqrt(2 L), biases 0, norms 1.
  """
  ends_key, blocks_key = jax.random.split(key)
  arrays = lambda module, k: nnx.to_pure_dict(nnx.state(module(cfg, rngs=nnx.Rngs(k))))
  blocks = jax.vmap(functools.partial(arrays, Block))(jax.random.split(blocks_key, cfg.n_layer))
  return {**arrays(Ends, ends_key), 'blocks': blocks}


def apply(
  params: Params,
  tokens: jax.Array,
  cfg: GPT2Config,
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
  """The output layer, which is the token table: [B, T, D] -> f32[B, T, V].

  16-bit inputs when x is, but the products are summed in float32.
  """
  table = params['wte']['embedding'].astype(x.dtype)
  return jnp.einsum('btd,vd->btv', x, table, preferred_element_type=jnp.float32)


def hidden(
  params: Params,
  tokens: jax.Array,
  cfg: GPT2Config,
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


def _hidden(params, tokens, cfg: GPT2Config, key, mesh: Mesh | None, probe: Probe | None):
  """(`hidden`, with a probe: the link from the token table as input to itself as output)."""
  if tokens.shape[1] > cfg.max_len:
    raise ValueError(f'{tokens.shape[1]} tokens in a row, but cfg.max_len is {cfg.max_len}')
  ends_graph, block_graph = _graphs(cfg)
  ends = nnx.merge(ends_graph, {name: params[name] for name in ('wte', 'wpe', 'ln_f')})

  def block(x, layer):
    index, arrays, directions = layer
    layer_probe = probe and probe.along(directions)
    layer_key = None if key is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(key)
    return pin_rows(nnx.merge(block_graph, arrays)(x, layer_key, layer_probe), mesh), None

  if cfg.remat:
    # Inside scan the loop itself keeps XLA from undoing the recomputation.
    block = jax.checkpoint(block, prevent_cse=not cfg.scan)
  elif cfg.scan and _attention_kernel(cfg) == 'xla':
    # Scan stores what the backward pass reads in one array per value and layer stack; without this
    # half of them are elementwise functions of the others, cheaper to compute than to store.
    policy = jax.checkpoint_policies.checkpoint_dots
    block = jax.checkpoint(block, prevent_cse=False, policy=policy)

  x, link = ends.embed(tokens, probe)
  x = pin_rows(_dropout(x, key, cfg.n_layer, cfg.dropout), mesh)
  directions = probe.at('blocks').directions if probe else ()
  layers = (jnp.arange(cfg.n_layer), params['blocks'], directions)
  if cfg.scan:
    x, _ = jax.lax.scan(block, x, layers)
  else:
    for i in range(cfg.n_layer):
      x, _ = block(x, jax.tree.map(lambda leaf: leaf[i], layers))  # noqa: B023
  return ends.ln_f(x, probe and probe.at('ln_f')), link


def token_losses(
  params: Params,
  batch: dict[str, jax.Array],
  cfg: GPT2Config,
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
  params: Params, batch: dict[str, jax.Array], cfg: GPT2Config, *, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
  """(`token_losses`, the hidden states they come from, cfg.dtype[B, T, D]) in one forward pass."""
  x = hidden(params, batch['tokens'][:, :-1], cfg, key=_dropout_key(batch, cfg), mesh=mesh)
  return _head(params, x, batch['tokens'][:, 1:], cfg, mesh), x


def _dropout_key(batch, cfg: GPT2Config):
  return batch['dropout_key'] if cfg.dropout > 0 else None


def _head(params, x, labels, cfg: GPT2Config, mesh: Mesh | None) -> jax.Array:
  """Losses [B, T] of the labels from the last hidden states."""
  if cfg.loss_chunk == 0:
    return cross_entropy(logits(params, x), labels)
  head = functools.partial(chunked_cross_entropy, chunk=cfg.loss_chunk)
  if mesh is not None and x.shape[0] % mesh.size == 0:
    # Each device adds up its own chunks' gradients of the table, and all devices' are added once;
    # the partitioner would send a whole table between devices for every chunk.
    local, rows = head, P(AXES)
    head = jax.shard_map(
      lambda x, table, labels: local(x, jax.lax.pcast(table, AXES, to='varying'), labels),
      mesh=mesh,
      in_specs=(rows, P(), rows),
      out_specs=rows,
    )
  return head(x, params['wte']['embedding'], labels)


def _probed_head(params, x, link, tokens, cfg: GPT2Config, probe: Probe) -> jax.Array:
  """Losses [B, T] from the last hidden state; `loss_chunk` bounds the memory of logits here, too.

  A probe needs a row's logits together, so rows are taken a few at a time instead of positions.
  """
  table = params['wte']['embedding']

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


def example_loss(params: Params, example: dict[str, jax.Array], cfg: GPT2Config) -> jax.Array:
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


# Sizes ----------------------------------------------------------------------------------------


def num_params(cfg: GPT2Config) -> int:
  """Number of parameters, tied output counted once: V D + max_len D + L (12 D^2 + 13 D) + 2 D."""
  d = cfg.n_embd
  return (cfg.vocab_size + cfg.max_len) * d + cfg.n_layer * (12 * d * d + 13 * d) + 2 * d


def flops_per_token(cfg: GPT2Config, seq_len: int | None = None) -> int:
  """Useful matmul FLOPs to train on one token: forward 2 (12 L D^2 + L T D + D V), times 3.

  This is the numerator of model FLOPs utilization. Attention counts the causal half only,
  recomputation is not counted, and the backward pass costs two forwards.
  """
  d, t = cfg.n_embd, seq_len or cfg.max_len
  return 3 * 2 * (12 * cfg.n_layer * d * d + cfg.n_layer * t * d + d * cfg.vocab_size)
