"""What each config value must satisfy, as a table. Never imports jax."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
  """What a value must satisfy, and the same in words: 'must be <text>'."""

  holds: Callable[[Any], bool]
  text: str


def at_least(low: float) -> Rule:
  return Rule(lambda x: math.isfinite(x) and x >= low, f'at least {low}')


def above(low: float) -> Rule:
  return Rule(lambda x: math.isfinite(x) and x > low, f'above {low}')


def one_of(*choices: str) -> Rule:
  return Rule(lambda x: x in choices, f'one of {", ".join(choices)}')


def are_names(names: tuple) -> bool:
  """Whether `names` are distinct, non-empty strings."""
  return all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)


def _is_tokenizer(spec: str) -> bool:
  kind, _, size = spec.partition(':')
  if kind == 'bpe':
    return size.isdigit() and int(size) > 256
  return spec == 'byte' or (spec.endswith('.json') and Path(spec).is_file())


def _is_mixture(spec: str) -> bool:
  kind, except_, left_out = spec.partition(' except ')
  if kind in ('uniform', 'natural'):
    return not except_ or all(left_out.split('+'))
  if spec.endswith('.json'):
    return Path(spec).is_file()
  try:
    shares = [float(item.rpartition('=')[2]) for item in spec.split(',')]
  except ValueError:
    return False
  return '=' in spec and all(0 <= s < math.inf for s in shares) and sum(shares) > 0


BELOW_ONE = Rule(lambda x: 0 <= x < 1, 'at least 0 and below 1')
TOKENIZER = "'byte', 'bpe:<vocabulary above 256>' or an existing tokenizer.json"
MIXTURE = (
  "'uniform', 'natural', 'uniform except qa+law', shares such as 'web=0.5,code=0.5' or an existing "
  'mixture.json'
)
MESH_AXIS = Rule(lambda x: x == -1 or x >= 1, 'at least 1, or -1 for all remaining devices')

RULES = {
  'total_steps': at_least(1),
  'batch_size': at_least(1),
  'microbatches': at_least(1),
  'scope': one_of('global', 'online', 'microbatch'),
  'example_base': one_of('any', 'tokens'),
  'nonfinite': one_of('abort', 'skip'),
  'reference': Rule(lambda x: not x or Path(x).is_dir(), 'an existing run directory'),
  'keep.rows': at_least(0),
  'keep.groups': at_least(1),
  'mixture.mode': one_of('sample', 'weigh'),
  'mixture.lag': at_least(1),
  'mixture.every': at_least(1),
  'mixture.rows': at_least(1),
  'mixture.target': Rule(are_names, 'distinct names of domains'),
  'mixture.target_rows': at_least(1),
  'mixture.target_blocks': at_least(0),
  'mixture.max_epochs': at_least(0),
  'target.read': one_of('gradient', 'representation'),
  'target.every': at_least(1),
  'target.blocks': at_least(1),
  'data.source': one_of('embedded', 'folder', 'tfds'),
  'data.domains': Rule(are_names, 'distinct names, one --config.data.domains=<name> each'),
  'data.tokenizer': Rule(_is_tokenizer, TOKENIZER),
  'data.mixture': Rule(_is_mixture, MIXTURE),
  'data.seq_len': at_least(1),
  'data.max_bytes_per_domain': at_least(0),
  'data.prefetch': at_least(0),
  'model.name': one_of('gpt2', 'llama'),
  'model.n_layer': at_least(1),
  'model.n_head': at_least(1),
  'model.n_embd': at_least(1),
  'model.d_ff': at_least(0),
  'model.n_kv_head': at_least(0),
  'model.rope_theta': above(0),
  'model.norm_eps': above(0),
  'model.remat': one_of('none', 'dots', 'full'),
  'model.max_len': at_least(0),
  'model.vocab_size': at_least(0),
  'model.dtype': one_of('float32', 'bfloat16'),
  'model.attention': one_of('auto', 'xla', 'cudnn'),
  'model.loss_chunk': at_least(0),
  'model.dropout': BELOW_ONE,
  'optim.lr': above(0),
  'optim.b1': BELOW_ONE,
  'optim.b2': BELOW_ONE,
  'optim.eps': above(0),
  'optim.weight_decay': at_least(0),
  'optim.clip': at_least(0),
  'optim.schedule': one_of('cosine', 'wsd', 'constant'),
  'optim.warmup_steps': at_least(0),
  'optim.final_lr_ratio': Rule(lambda x: 0 <= x <= 1, 'between 0 and 1'),
  'optim.decay_steps': at_least(0),
  'mesh.data': MESH_AXIS,
  'mesh.fsdp': MESH_AXIS,
  'mesh.tensor': MESH_AXIS,
  'eval.every': at_least(1),
  'eval.batch_size': at_least(1),
  'eval.max_blocks': at_least(0),
  'eval.split': Rule(bool, "the name of a split, such as 'validation'"),
  'checkpoint.every': at_least(1),
  'checkpoint.keep': at_least(1),
  'checkpoint.init_from': Rule(
    lambda x: not x or Path(x).is_dir(), 'an existing run directory or Hugging Face folder'
  ),
  'log.every': at_least(1),
  'log.examples_every': at_least(0),
}
