"""kronfluence's answers; runs in its environment: kronfluence.py CASE IN.npz OUT.npz."""

import os
import sys
import tempfile
import time

import numpy as np


def ekfac(a):
  import torch
  from kronfluence.analyzer import Analyzer, prepare_model
  from kronfluence.arguments import FactorArguments, ScoreArguments
  from kronfluence.task import Task
  from torch import nn
  from torch.nn import functional as F
  from torch.utils.data import TensorDataset

  heads, layers = int(a['heads']), int(a['layers'])

  def linear(name):
    kernel, bias = a[f'{name}/kernel'], a[f'{name}/bias']
    layer = nn.Linear(*kernel.shape)
    layer.weight.data, layer.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
    return layer

  class Block(nn.Module):
    def __init__(self, i):
      super().__init__()
      self.qkv, self.out, self.up, self.down = (
        linear(f'blocks/{i}/{part}') for part in ('qkv', 'out', 'up', 'down')
      )

    def forward(self, x):
      b, t, d = x.shape
      split = lambda y: y.view(b, t, heads, -1).transpose(1, 2)
      q, k, v = map(split, self.qkv(F.layer_norm(x, (d,))).split(d, dim=2))
      y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
      return x + self.down(F.gelu(self.up(F.layer_norm(x, (d,))), approximate='tanh'))

  class GPT(nn.Module):
    def __init__(self):
      super().__init__()
      self.tokens, self.places = (torch.tensor(a[name]) for name in ('tokens', 'places'))
      self.blocks = nn.ModuleList(Block(i) for i in range(layers))
      self.head = linear('head')

    def forward(self, tokens):
      x = self.tokens[tokens] + self.places
      for block in self.blocks:
        x = block(x)
      return self.head(F.layer_norm(x, x.shape[-1:]))

  class Losses(Task):
    def compute_train_loss(self, batch, model, sample=False):
      (tokens,) = batch
      logits = model(tokens[:, :-1])
      return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction='sum')

    def compute_measurement(self, batch, model):
      return self.compute_train_loss(batch, model)

  train, queries = (TensorDataset(torch.tensor(a[k]).long()) for k in ('train', 'queries'))
  task = Losses()
  model = prepare_model(GPT(), task)
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    analyzer = Analyzer('run', model, task, cpu=True, disable_tqdm=True)
    begun = time.perf_counter()
    analyzer.fit_all_factors(
      'factors', train, per_device_batch_size=int(a['batch']),
      factor_args=FactorArguments(strategy='ekfac', use_empirical_fisher=True),
    )  # fmt: skip
    analyzer.compute_pairwise_scores(
      'scores', 'factors', queries, train, per_device_query_batch_size=len(queries),
      per_device_train_batch_size=int(a['batch']), score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    found = analyzer.load_pairwise_scores('scores')['all_modules']
  return {'values': found.numpy(), 'seconds': seconds}


if __name__ == '__main__':
  name, given, taken = sys.argv[1:]
  with np.load(given, allow_pickle=False) as arrays:
    np.savez(taken, **globals()[name](dict(arrays)))
