"""The same model, batch, loss, weighting and optimizer in PyTorch, to time beside ours.

Written the way a PyTorch user would: modules, fused attention, AdamW with foreach kernels, gradient
clipping. The parameters are copied from ours, so both compute the same losses (a test holds them to
it) and no peer is slow because it does something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.models.gpt2 import GPT2Config


class Block(nn.Module):
  """Pre-norm transformer block."""

  def __init__(self, cfg: GPT2Config):
    super().__init__()
    d = cfg.n_embd
    self.n_head = cfg.n_head
    self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
    self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
    self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

  def forward(self, x):
    b, t, d = x.shape
    heads = lambda y: y.view(b, t, self.n_head, -1).transpose(1, 2)
    q, k, v = map(heads, self.qkv(self.ln_1(x)).split(d, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
    return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate='tanh'))


class GPT2(nn.Module):
  """GPT-2 with tied output; `forward` gives the losses of all tokens, [B, T]."""

  def __init__(self, cfg: GPT2Config):
    super().__init__()
    self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
    self.wpe = nn.Embedding(cfg.max_len, cfg.n_embd)
    self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
    self.ln_f = nn.LayerNorm(cfg.n_embd)

  def forward(self, tokens):
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    x = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
    for block in self.blocks:
      x = block(x)
    logits = self.ln_f(x) @ self.wte.weight.T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='none').view_as(labels)


def load(params: Any, cfg: GPT2Config, device: str) -> GPT2:
  """The model with our parameters."""
  model = GPT2(cfg)
  params = jax.tree.map(np.asarray, params)

  def copy(target, values):
    with torch.no_grad():
      target.copy_(torch.from_numpy(np.array(values, np.float32)))

  def norm(module, values):
    copy(module.weight, values['scale'])
    copy(module.bias, values['bias'])

  def linear(module, values):
    copy(module.weight, values['kernel'].T)
    copy(module.bias, values['bias'])

  copy(model.wte.weight, params['wte']['embedding'])
  copy(model.wpe.weight, params['wpe']['embedding'])
  norm(model.ln_f, params['ln_f'])
  for i, block in enumerate(model.blocks):
    layer = jax.tree.map(lambda x: x[i], params['blocks'])  # noqa: B023
    norm(block.ln_1, layer['ln_1'])
    norm(block.ln_2, layer['ln_2'])
    linear(block.qkv, layer['attn']['qkv'])
    linear(block.out, layer['attn']['out'])
    linear(block.up, layer['mlp']['up'])
    linear(block.down, layer['mlp']['down'])
  return model.to(device)


def linupper(losses, temperature: float):
  """LinUpper's multipliers of the examples [B], detached; uniform for an infinite temperature."""
  losses = losses.detach()
  low, high = losses.min(), losses.max()
  h = (2 * losses - low - high) / (high - low).clamp(min=1e-6)
  return torch.softmax(h.clamp(max=0) / temperature, dim=0) * losses.numel()


def make_step(
  params: Any, cfg: GPT2Config, optim: Any, temperature: float, *, device: str, compiled: bool
) -> Callable[[Any], float]:
  """`step(tokens) -> loss`: one optimizer step, finished when it returns.

  Args:
    params: ours, copied.
    cfg: architecture; 'bfloat16' runs under autocast.
    optim: `config.optim`; the learning rate is constant.
    temperature: of LinUpper; inf for the plain mean.
    device: 'cpu' or 'cuda'.
    compiled: use torch.compile.
  """
  model = load(params, cfg, device)
  matrices = [p for p in model.parameters() if p.ndim >= 2]
  others = [p for p in model.parameters() if p.ndim < 2]
  groups = [
    {'params': matrices, 'weight_decay': optim.weight_decay},
    {'params': others, 'weight_decay': 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps)
  forward = torch.compile(model) if compiled else model
  half = cfg.dtype == 'bfloat16'

  def step(tokens) -> float:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
      losses = forward(tokens).mean(dim=1)
    loss = (linupper(losses, temperature) * losses).mean()
    loss.backward()
    if optim.clip:
      torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
    optimizer.step()
    return loss.item()  # waits for the device

  return step
