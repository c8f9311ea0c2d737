"""GPT-2: learned positions, layer norms with biases, gelu, and the token table as output layer.

The architecture alone; what is done with it is in lm.py. Its layers take a probe.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.models import lm
from jaxrw import gradients
from jaxrw.gradients import Probe

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
    self.qkv = linear(cfg.n_embd, 3 * cfg.n_embd, kernel_init=lm.normal())
    self.out = linear(cfg.n_embd, cfg.n_embd, kernel_init=lm.normal(lm.residual_scale(cfg)))
    self.cfg = cfg

  def __call__(self, x, probe: Probe | None = None):
    b, t, d = x.shape
    qkv = self.qkv(x, probe and probe.at('qkv'))
    q, k, v = (x.reshape(b, t, self.cfg.n_head, -1) for x in jnp.split(qkv, 3, axis=-1))
    y = lm.attend(q, k, v, self.cfg)
    return self.out(y.reshape(b, t, d), probe and probe.at('out'))


class MLP(nnx.Module):
  """Two layers with a gelu (tanh form, as GPT-2) between, [B, T, D] -> [B, T, D]."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
    self.up = linear(cfg.n_embd, cfg.hidden, kernel_init=lm.normal())
    self.down = linear(cfg.hidden, cfg.n_embd, kernel_init=lm.normal(lm.residual_scale(cfg)))

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
    x = x + lm.dropout(y, key, 0, self.dropout)
    y = self.mlp(self.ln_2(x, at('ln_2')), at('mlp'))
    return x + lm.dropout(y, key, 1, self.dropout)


class Ends(nnx.Module):
  """What is outside the blocks: token and position tables, and the last norm."""

  def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs):
    self.wte = nnx.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=lm.normal(), rngs=rngs)
    self.wpe = nnx.Embed(cfg.max_len, cfg.n_embd, embedding_init=lm.normal(), rngs=rngs)
    self.ln_f = LayerNorm(cfg, rngs=rngs)
    self.dtype = jnp.dtype(cfg.dtype)

  def embed(self, tokens, probe: Probe | None = None):
    """i32[B, T] -> (cfg.dtype[B, T, D], with a probe: its link to the output layer)."""
    words, positions = self.wte.embedding[...], self.wpe.embedding[...]
    if probe is None:
      return (words[tokens] + positions[: tokens.shape[1]]).astype(self.dtype), None
    x, link = gradients.tied_embedding(words, tokens, probe.at('wte'))
    return gradients.add_positions(x, positions, probe.at('wpe')).astype(self.dtype), link

  def norm(self, x, probe: Probe | None = None):
    """The last norm, [..., D]."""
    return self.ln_f(x, probe and probe.at('ln_f'))


# Config -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GPT2Config(lm.ModelConfig):
  """`max_len` is the length of the position table; see `lm.ModelConfig` for the rest."""

  takes_probe = True
  ends, block = Ends, Block
  # `fsdp` cuts the matrices and the token table, `tensor` the hidden layer; what is left is too
  # small for the gathers to be worth it. (Queries, keys and values are one matrix, so cutting its
  # columns would cut it elsewhere than between heads.)
  sharding_rules = (
    (r'blocks/mlp/up/kernel$', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'blocks/.*/kernel$', P(None, None, 'fsdp')),
    (r'wte/embedding$', P(None, 'fsdp')),
  )

  @property
  def hidden(self) -> int:
    """F, the width inside a block."""
    return self.d_ff or 4 * self.n_embd

  def num_params(self) -> int:
    """V D + max_len D + L (4 D^2 + 2 D F + 9 D + F) + 2 D, where F is `hidden`."""
    d, f = self.n_embd, self.hidden
    block = 4 * d * d + 2 * d * f + 9 * d + f
    return (self.vocab_size + self.max_len) * d + self.n_layer * block + 2 * d

  def block_matmul_params(self) -> int:
    """4 D^2 + 2 D F."""
    d, f = self.n_embd, self.hidden
    return 4 * d * d + 2 * d * f


def _gpt2(n_layer: int, n_head: int) -> GPT2Config:
  return GPT2Config(vocab_size=50257, max_len=512, n_layer=n_layer, n_head=n_head, n_embd=768)


PRESETS = {
  'tiny': GPT2Config(vocab_size=257, max_len=128, n_layer=2, n_head=4, n_embd=96),
  'gpt2_124m': _gpt2(12, 12),
  'gpt2_209m': _gpt2(24, 16),
  'gpt2_294m': _gpt2(36, 24),
}
