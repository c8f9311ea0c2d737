"""What each config value must satisfy, as a table. Never imports jax."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

_INT32 = 2**31 - 1  # what counts steps and examples
_SIZE = 2**20  # far above any sensible one, far below what exhausts the memory at once


class Rule(NamedTuple):
  """What a value must satisfy, and the same in words: 'must be <text>'."""

  holds: Callable[[Any], bool]
  text: str


def at_least(low: float) -> Rule:
  return Rule(lambda x: low <= x < math.inf, f'at least {low}')


def above(low: float) -> Rule:
  return Rule(lambda x: low < x < math.inf, f'above {low}')


def count(low: int, high: int = _INT32) -> Rule:
  return Rule(lambda x: low <= x <= high, f'at least {low} and at most {high}')


def size(low: int) -> Rule:
  return count(low, _SIZE)


def one_of(*choices: str) -> Rule:
  return Rule(lambda x: x in choices, f'one of {", ".join(choices)}')


def are_names(names: tuple) -> bool:
  """Whether `names` are distinct, non-empty strings."""
  return all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)


def is_text(value: str) -> bool:
  """Whether a string can be stored and printed, and handed to the system as a path."""
  return '\0' not in value and not any('\ud800' <= c <= '\udfff' for c in value)


def is_installed(package: str) -> bool:
  """Whether a package can be imported, without importing it; a mere folder of its name is none."""
  spec = importlib.util.find_spec(package)
  return spec is not None and spec.origin is not None


def _is_tokenizer(spec: str) -> bool:
  kind, _, size = spec.partition(':')
  if kind == 'bpe':
    return size.isdecimal() and len(size) <= 7 and 256 < int(size) <= 1_000_000
  return spec == 'byte' or (spec.endswith('.json') and os.path.isfile(spec))


def _is_mixture(spec: str) -> bool:
  kind, except_, left_out = spec.partition(' except ')
  if kind in ('uniform', 'natural'):
    return not except_ or all(left_out.split('+'))
  if spec.endswith('.json'):
    return os.path.isfile(spec)
  try:
    shares = [float(item.rpartition('=')[2]) for item in spec.split(',')]
  except ValueError:
    return False
  return '=' in spec and all(0 <= s < math.inf for s in shares) and sum(shares) > 0


BELOW_ONE = Rule(lambda x: 0 <= x < 1, 'at least 0 and below 1')
TOKENIZER = "'byte', 'bpe:<vocabulary of 257 to 1000000>' or an existing tokenizer.json"
MIXTURE = (
  "'uniform', 'natural', 'uniform except qa+law', shares such as 'web=0.5,code=0.5' or an existing "
  'mixture.json'
)
METRICS = ('macro_bpb', 'micro_bpb', 'worst_bpb', 'macro_loss', 'micro_loss')
MESH_AXIS = Rule(
  lambda x: x == -1 or 1 <= x <= _INT32, 'at least 1, or -1 for all remaining devices'
)
RUN = Rule(lambda x: not x or os.path.isdir(x), 'an existing run directory')
WANDB = Rule(
  lambda x: not x or is_installed('wandb'),
  "'' where wandb is not installed: pip install wandb, or leave it out",
)


RULES = {
  'seed': count(0),
  'total_steps': count(1),
  'batch_size': size(1),
  'microbatches': size(1),
  'scope': one_of('global', 'online', 'microbatch'),
  'example_base': one_of('any', 'tokens'),
  'nonfinite': one_of('abort', 'skip'),
  'reference': RUN,
  'keep.rows': size(0),
  'keep.groups': size(1),
  'mixture.mode': one_of('sample', 'weigh'),
  'mixture.lag': count(1),
  'mixture.every': count(1),
  'mixture.rows': size(1),
  'mixture.target': Rule(are_names, 'distinct names of domains'),
  'mixture.target_rows': size(1),
  'mixture.target_blocks': size(0),
  'mixture.max_epochs': count(0),
  'target.read': one_of('gradient', 'representation'),
  'target.every': count(1),
  'target.blocks': size(1),
  'data.source': one_of('embedded', 'folder', 'tfds'),
  'data.domains': Rule(are_names, 'distinct names, one --config.data.domains=<name> each'),
  'data.tokenizer': Rule(_is_tokenizer, TOKENIZER),
  'data.mixture': Rule(_is_mixture, MIXTURE),
  'data.seq_len': size(1),
  'data.max_bytes_per_domain': at_least(0),
  'data.prefetch': count(0, 1024),
  'model.name': one_of('gpt2', 'llama'),
  'model.n_layer': size(1),
  'model.n_head': size(1),
  'model.n_embd': size(1),
  'model.d_ff': size(0),
  'model.n_kv_head': size(0),
  'model.rope_theta': above(0),
  'model.norm_eps': above(0),
  'model.remat': one_of('none', 'dots', 'full'),
  'model.max_len': size(0),
  'model.vocab_size': size(0),
  'model.dtype': one_of('float32', 'bfloat16'),
  'model.attention': one_of('auto', 'xla', 'cudnn'),
  'model.loss_chunk': size(0),
  'model.dropout': BELOW_ONE,
  'optim.lr': above(0),
  'optim.b1': BELOW_ONE,
  'optim.b2': BELOW_ONE,
  'optim.eps': above(0),
  'optim.weight_decay': at_least(0),
  'optim.clip': at_least(0),
  'optim.schedule': one_of('cosine', 'wsd', 'constant'),
  'optim.warmup_steps': count(0),
  'optim.final_lr_ratio': Rule(lambda x: 0 <= x <= 1, 'between 0 and 1'),
  'optim.decay_steps': count(0),
  'mesh.data': MESH_AXIS,
  'mesh.fsdp': MESH_AXIS,
  'mesh.tensor': MESH_AXIS,
  'eval.every': count(1),
  'eval.batch_size': size(1),
  'eval.max_blocks': count(0),
  'eval.split': one_of('train', 'validation', 'test'),
  'checkpoint.every': count(1),
  'checkpoint.keep': count(1),
  'checkpoint.keep_every': count(0),
  'checkpoint.best': Rule(lambda x: not x or x in METRICS, f"'' or one of {', '.join(METRICS)}"),
  'checkpoint.init_from': Rule(
    lambda x: not x or os.path.isdir(x), 'an existing run directory or Hugging Face folder'
  ),
  'log.every': count(1),
  'log.examples_every': count(0),
  'log.wandb': WANDB,
}
