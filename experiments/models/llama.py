"""Llama: rotary positions, RMS norms, a gated hidden layer, no biases, an output layer of its own.

The architecture alone; what is done with it is in lm.py. Several query heads may share a head of
keys and values (grouped-query attention). Rotary pairs are the halves of a head, as in published
weights converted for the Hugging Face library, not neighboring entries.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.errors import UserError
from experiments.models import lm


class RMSNorm(nnx.RMSNorm):
  """x / rms(x) * scale in float32, output in the dtype of the input, [..., D]."""

  def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
    super().__init__(cfg.n_embd, epsilon=cfg.norm_eps, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x):
    return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
  """Causal grouped-query self-attention with rotary positions, [B, T, D] -> [B, T, D]."""

  def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
    self.head = cfg.n_embd // cfg.n_head
    linear = _linear(cfg, rngs)
    self.q = linear(cfg.n_embd, cfg.n_embd)
    self.k = linear(cfg.n_embd, cfg.kv_heads * self.head)
    self.v = linear(cfg.n_embd, cfg.kv_heads * self.head)
    self.out = linear(cfg.n_embd, cfg.n_embd, kernel_init=lm.normal(lm.residual_scale(cfg)))
    self.cfg = cfg

  def __call__(self, x):
    b, t, d = x.shape
    q, k, v = (layer(x).reshape(b, t, -1, self.head) for layer in (self.q, self.k, self.v))
    q, k = rotate(q, self.cfg.rope_theta), rotate(k, self.cfg.rope_theta)
    return self.out(lm.attend(q, k, v, self.cfg).reshape(b, t, d))


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x)), [B, T, D] -> [B, T, D]."""

  def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
    linear = _linear(cfg, rngs)
    self.gate, self.up = linear(cfg.n_embd, cfg.hidden), linear(cfg.n_embd, cfg.hidden)
    self.down = linear(cfg.hidden, cfg.n_embd, kernel_init=lm.normal(lm.residual_scale(cfg)))

  def __call__(self, x):
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Pre-norm transformer block, [B, T, D] -> [B, T, D] in the dtype of its input."""

  def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
    self.ln_1, self.attn = RMSNorm(cfg, rngs=rngs), Attention(cfg, rngs=rngs)
    self.ln_2, self.mlp = RMSNorm(cfg, rngs=rngs), MLP(cfg, rngs=rngs)
    self.dropout = cfg.dropout

  def __call__(self, x, key=None, probe=None):
    x = x + lm.dropout(self.attn(self.ln_1(x)), key, 0, self.dropout)
    return x + lm.dropout(self.mlp(self.ln_2(x)), key, 1, self.dropout)


class Ends(nnx.Module):
  """What is outside the blocks: token table, last norm, and the output layer."""

  def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
    table = functools.partial(nnx.Embed, cfg.vocab_size, cfg.n_embd, embedding_init=lm.normal())
    self.wte, self.head = table(rngs=rngs), table(rngs=rngs)
    self.ln_f = RMSNorm(cfg, rngs=rngs)
    self.dtype = jnp.dtype(cfg.dtype)

  def embed(self, tokens, probe=None):
    """i32[B, T] -> (cfg.dtype[B, T, D], None)."""
    return self.wte.embedding[...][tokens].astype(self.dtype), None

  def norm(self, x, probe=None):
    """The last norm, [..., D]."""
    return self.ln_f(x)


def _linear(cfg: LlamaConfig, rngs: nnx.Rngs):
  dtype = jnp.dtype(cfg.dtype)
  return functools.partial(
    nnx.Linear, use_bias=False, dtype=dtype, kernel_init=lm.normal(), rngs=rngs
  )


def rotate(x: jax.Array, theta: float) -> jax.Array:
  """Rotary positions, [B, T, H, d]: entries i and i + d/2 of position t turn by t theta^(-2i/d).

  Angles, sines and the turn are float32; the output has the dtype of x. (Su et al., RoFormer, 2021)
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# Config -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LlamaConfig(lm.ModelConfig):
  """A Llama; see `lm.ModelConfig` for what it shares with other models.

  Attributes:
    d_ff: 0 means 8/3 D, rounded up to a multiple of 256.
    n_kv_head: heads of keys and values, a divisor of n_head; 0 means n_head.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in the norms.
  """

  n_kv_head: int = 0
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5

  ends, block = Ends, Block
  # `tensor` cuts heads, the hidden layer and the vocabulary; `fsdp` the other axis of each matrix.
  sharding_rules = (
    (r'blocks/.*/(q|k|v|gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'blocks/.*/(out|down)/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(wte|head)/embedding$', P('tensor', 'fsdp')),
  )

  @classmethod
  def from_config(cls, model, *, vocab_size: int, seq_len: int) -> LlamaConfig:
    made = super().from_config(model, vocab_size=vocab_size, seq_len=seq_len)
    if made.n_head % made.kv_heads:
      raise UserError(
        f'model.n_kv_head={made.n_kv_head} does not divide model.n_head={made.n_head}: '
        'use 0 for as many, or a divisor'
      )
    if made.n_embd // made.n_head % 2:
      raise UserError(
        f'model.n_embd={made.n_embd} over model.n_head={made.n_head} is an odd size of a head, '
        'which rotary positions cannot halve: change one of them'
      )
    return made

  @property
  def kv_heads(self) -> int:
    """K, the heads of keys and values."""
    return self.n_kv_head or self.n_head

  @property
  def hidden(self) -> int:
    """F, the width inside a block."""
    return self.d_ff or -(-8 * self.n_embd // 3 // 256) * 256

  def num_params(self) -> int:
    """2 V D + L (2 D^2 + 2 D K d + 3 D F + 2 D) + D."""
    d = self.n_embd
    return 2 * self.vocab_size * d + self.n_layer * (self.block_matmul_params() + 2 * d) + d

  def block_matmul_params(self) -> int:
    """2 D^2 + 2 D K d + 3 D F."""
    d = self.n_embd
    kv = self.kv_heads * d // self.n_head
    return 2 * d * d + 2 * d * kv + 3 * d * self.hidden
