"""What configs share: the schema with its defaults, the `file.py:arg` parser, the quick shrinker.

A config file defines `get_config(arg='')` and starts from `base_config()`, which holds every key
there is. Its docstring says the command, the cost and the expected result.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

PAPER_TEMPERATURE = 0.4  # five of the six published configs


class ConfigError(Exception):
  """A mistake in a config or its argument; programs print the message on one line."""


def base_config() -> ConfigDict:
  """Every key there is, with the default that a run on a small machine wants.

  `w` alone is open: `w.<stage>` holds `fn` and whatever that weighting takes. The order of the
  stages lives in the tuple `weighting`, because a ConfigDict sorts its keys.
  """
  config = ConfigDict()
  config.seed = 0
  config.total_steps = 500
  config.batch_size = 16  # rows in one optimizer step, over all devices
  config.microbatches = 1
  # Weights normalized over the whole step: 'global', or 'online' in one pass where the weighting
  # allows it; or over each 'microbatch'.
  config.scope = 'global'
  config.example_base = 'any'  # 'any': every block counts the same; 'tokens': every token does
  config.nonfinite = 'abort'  # or 'skip' the update

  config.data = ConfigDict(
    dict(
      source='embedded',  # text that the Python installation carries; or 'folder', 'tfds'
      # folder: where {domain}.{split}.jsonl[.gz|.zst] or {domain}/*.txt live, or shards
      # {split}/**/*.jsonl[.gz|.zst] whose lines name their domains under domain_key
      path='',
      name='',  # tfds: a prepared dataset, e.g. 'my_ds/config:1.0.0'
      tfds_dir='',
      text_key='text',
      domain_key='domain',  # dots go into nested objects: 'meta.redpajama_set_name'
      weight_key='weight',
      domains=(),  # a subset, by name; empty: all
      # or 'natural', 'uniform except qa+law', 'web=0.5,code=0.5', or a run's mixture.json
      mixture='uniform',
      tokenizer='byte',  # or 'bpe:4096', or a path that ends in tokenizer.json
      seq_len=128,
      root='',  # where prepared data are kept; empty: $JAXRW_DATA or ~/.cache/jaxrw
      max_bytes_per_domain=0,  # 0: everything
      prefetch=4,
    )
  )
  config.model = ConfigDict(
    dict(
      name='gpt2',  # or 'llama'
      n_layer=2,
      n_head=4,
      n_embd=96,
      d_ff=0,  # hidden width of the blocks; 0: 4 n_embd, llama: 8/3 of it
      n_kv_head=0,  # llama: heads of keys and values; 0: n_head
      rope_theta=10_000.0,
      norm_eps=1e-5,
      max_len=0,  # 0: data.seq_len
      vocab_size=0,  # 0: the tokenizer's
      dtype='float32',
      scan=True,
      # 'none', or compute again in the backward pass what is not a product with parameters ('dots')
      # or whole blocks ('full')
      remat='none',
      attention='auto',
      loss_chunk=0,  # positions whose logits exist at a time; 0: all. Less memory, +1/3 on the head
      dropout=0.0,
    )
  )
  config.optim = ConfigDict(
    dict(
      lr=3e-3,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      clip=1.0,
      schedule='cosine',
      warmup_steps=50,
      final_lr_ratio=0.1,
      decay_steps=0,  # wsd: 0 means the last 20%
    )
  )
  # What changes data.mixture as the model trains: fn names a method of experiments/mixing.py ('':
  # nothing does), args hold what it takes. mode 'sample': it decides what is drawn, `lag` steps
  # later, so that no step waits; 'weigh': data.mixture is drawn, and it decides what counts for how
  # much in the loss. It moves every `every` steps; methods that follow gradients read `rows` blocks
  # of each domain then, and target_rows of the `target` domains (empty: all), out of target_blocks
  # blocks spread over each (0: all). max_epochs: how often any block may be drawn; 0: no limit.
  config.mixture = ConfigDict(
    dict(
      fn='',
      mode='sample',
      lag=8,
      every=1,
      rows=4,
      target=(),
      target_rows=32,
      target_blocks=0,
      max_epochs=0,
      args=ConfigDict(),
    )
  )
  config.weighting = ('loss',)
  config.reference = ''  # a finished run whose model gives the signal ref_losses; one more forward
  # Selective backward (jaxrw.Keep): rows of each group with a gradient; 0 means all rows.
  config.keep = ConfigDict(dict(rows=0, groups=1, sampled=False, reuse=False))
  # A domain to compare every example with, read on `blocks` of its blocks every so many steps;
  # empty: none. read='gradient', on eval.split: how far each example pulls towards it, for the
  # ledger's target_dot; training does not see it. read='representation', on the training split: the
  # signals representation and anchor, from which `adapt` makes weights.
  config.target = ConfigDict(dict(domain='', read='gradient', every=50, blocks=32))
  config.w = ConfigDict(dict(loss=dict(fn='linupper', temperature=PAPER_TEMPERATURE, start=50)))
  # Copies of the model, shards of one, and shards of matrices; -1: all remaining devices.
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  # max_blocks counts per domain; 0 means all.
  config.eval = ConfigDict(dict(every=100, batch_size=32, max_blocks=64, split='validation'))
  # The `keep` newest checkpoints stay, those at multiples of keep_every (0: none) and the best, the
  # one with the lowest macro_bpb, or another metric of the evaluation ('': none). init_from: a run,
  # or a folder in the Hugging Face format; see docs/interchange.md.
  config.checkpoint = ConfigDict(dict(every=100, keep=2, keep_every=0, best='', init_from=''))
  # examples_every: how often each example's id, weight and loss are written; 0 means never.
  # ledger: the same of every step as Parquet for queries; see docs/ledger.md.
  # wandb: a project of Weights & Biases that gets the metrics as well; empty: none.
  config.log = ConfigDict(
    dict(every=10, tensorboard=True, wandb='', progress=True, examples_every=1, ledger=False)
  )
  return config


def parse_arg(arg: str, **defaults) -> ConfigDict:
  """Parses the part behind the colon of `--config=file.py:layers=4,quick`.

  Args:
    arg: comma-separated `name=value`; a bare `name` switches a bool on.
    **defaults: every switch this config has; a default's type is the switch's type.

  Returns:
    The defaults with `arg` applied, with attribute access.

  Raises:
    ConfigError: an unknown name or a value of the wrong type.
  """
  switches = ConfigDict(defaults)
  for item in filter(None, (part.strip() for part in arg.split(','))):
    name, equals, text = item.partition('=')
    if name not in defaults:
      known = ', '.join(defaults)
      raise ConfigError(
        f'unknown argument {name!r}{nearest(name, defaults)}; this config has {known}'
      )
    kind = type(defaults[name])
    if not equals and kind is not bool:
      raise ConfigError(f'argument {name!r} needs a value: {name}={defaults[name]}')
    switches[name] = parse_value(name, text if equals else 'true', kind)
  return switches


def parse_value(name: str, text: str, kind: type):
  """`text` as a value of type `kind`; `name` is for the error.

  Raises:
    ConfigError: it is none.
  """
  try:
    if kind is bool:
      return {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
    return kind(text)
  except (KeyError, ValueError):
    raise ConfigError(f'argument {name}={text} is not a valid {kind.__name__}') from None


def nearest(name: str, known) -> str:
  """' (did you mean ...?)' when a known name is close, else ''."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
  return f' (did you mean {close[0]!r}?)' if close else ''


def implied_source(switches: ConfigDict) -> str:
  """What `path` and `name` say of config.data.source: a folder, a TFDS dataset, or neither."""
  if switches.path:
    return 'folder'
  return 'tfds' if switches.name else 'embedded'


def set_weighting(config: ConfigDict, spec: str) -> None:
  """Makes `spec` the only weighting of `config`, in place; the burn-in `w.loss.start` stays unless
  the spec has its own.

  Args:
    config: a config in the shape of `base_config`; may be locked.
    spec: 'uniform'; a name with a temperature such as 'linupper:0.4' (without one: 0.4); a name
      with its arguments such as 'trimmed:share=0.5:side=low'; or the control
      'row_shuffled:<spec>', which computes the weights and deals them to the wrong rows.

  Raises:
    ConfigError: a spec that does not parse. Whether the name exists is checked when it is built.
  """
  stage = _weighting_stage(spec)
  if stage['fn'] != 'uniform' and 'start' in config.w.get('loss', {}):
    stage.setdefault('start', config.w.loss.start)
  with config.unlocked():
    config.weighting = ('loss',)
    config.w = ConfigDict(dict(loss=stage))


def set_arm(config: ConfigDict, arm: str) -> None:
  """A weighting and what else sets an arm of a comparison apart, in place.

  Args:
    config: a config in the shape of `base_config`; may be locked.
    arm: a weighting (see `set_weighting`), then any number of '@key=value' with keys of the config:
      'uniform@keep.rows=8@keep.sampled=true', 'uniform@batch_size=8'. '@mixture=' takes a method
      with its arguments: 'uniform@mixture=dga:rate=1.0:every=50' (see `set_mixture`).

  Raises:
    ConfigError: an arm that does not parse, an unknown key or a value of the wrong type.
  """
  spec, *changes = arm.split('@')
  set_weighting(config, spec)
  for change in changes:
    key, equals, text = change.partition('=')
    if key == 'mixture':
      set_mixture(config, text)
      continue
    *path, name = key.split('.')
    node = config
    for part in path:
      node = node.get(part, ConfigDict()) if isinstance(node, ConfigDict) else ConfigDict()
    known = isinstance(node, ConfigDict) and name in node
    if not equals or not known or isinstance(node[name], (ConfigDict, tuple)):
      raise ConfigError(f'arm {arm!r}: {change!r} is not a <key of the config>=<value>')
    with config.unlocked():
      node[name] = parse_value(key, text, type(node[name]))


def set_mixture(config: ConfigDict, spec: str) -> None:
  """Makes `spec` the mixture of `config`, in place.

  Args:
    config: a config in the shape of `base_config`; may be locked.
    spec: a method and its arguments, 'dga:rate=1.0:every=50:target=qa'; keys of config.mixture go
      there, the others to config.mixture.args. Several targets: 'target=qa+law'.

  Raises:
    ConfigError: a spec that does not parse. Whether the method exists is checked when it is built.
  """
  fn, *arguments = spec.split(':')
  with config.unlocked():
    config.mixture.fn, config.mixture.args = fn, ConfigDict()
    for argument in arguments:
      name, equals, text = argument.partition('=')
      if not fn or not equals or not text or not _is_name(name) or name in ('fn', 'args'):
        raise ConfigError(
          f"mixture {spec!r}: write a method and its arguments, 'dga:rate=1.0:every=50'"
        )
      if name == 'target':
        config.mixture.target = tuple(text.split('+'))
      elif name in config.mixture:
        config.mixture[name] = parse_value(name, text, type(config.mixture[name]))
      else:
        config.mixture.args[name] = _number_or_word(text, int)


def _is_name(text: str) -> bool:
  return text.isidentifier() and not text.startswith('_')


_TEMPERED = ('linupper', 'linupper_stale', 'quadratic', 'extremes', 'upper', 'kl_dro', 'adapt')


def _weighting_stage(spec: str) -> dict:
  name, *arguments = spec.split(':')
  if name == 'row_shuffled':
    if not arguments:
      raise ConfigError(
        f'weighting {spec!r} needs the weighting it shuffles: row_shuffled:linupper:0.4'
      )
    if arguments[0] == name:
      raise ConfigError(f'weighting {spec[:40]!r}: shuffle once, row_shuffled:linupper:0.4')
    return dict(fn=name, stage=_weighting_stage(spec.partition(':')[2]))
  if name == 'uniform' and arguments:
    raise ConfigError(f"weighting {spec!r}: uniform takes no temperature; write 'uniform'")
  stage = dict(fn=name)
  if not arguments and name in _TEMPERED:
    stage['temperature'] = PAPER_TEMPERATURE
  for argument in arguments:
    key, equals, text = argument.partition('=')
    key, text = (key, text) if equals else ('temperature', key)
    stage[key] = _number_or_word(text, int if key != 'temperature' else float)
  temperature = stage.get('temperature', 1)
  positive = not isinstance(temperature, str) and temperature > 0
  if '' in stage.values() or not all(map(_is_name, stage)) or not positive:
    raise ConfigError(
      f"weighting {spec!r}: write a name and a positive temperature, 'linupper:0.4', or a name and "
      "arguments, 'trimmed:share=0.5'"
    )
  return stage


def _number_or_word(text: str, *kinds: type) -> int | float | str:
  for kind in (*kinds, float):
    try:
      return kind(text)
    except ValueError:
      continue
  return text


def quick(config: ConfigDict) -> ConfigDict:
  """Shrinks `config` in place to a few tiny steps that take the same path; returns it."""
  config.total_steps = 4
  config.batch_size = 8
  config.microbatches = min(config.microbatches, 2)
  config.data.seq_len = 32
  config.data.max_bytes_per_domain = 50_000
  config.data.tokenizer = 'byte'
  config.model.update(n_layer=2, n_head=2, n_kv_head=0, n_embd=32, d_ff=0, max_len=0, vocab_size=0)
  config.optim.warmup_steps = 1
  config.optim.decay_steps = 0
  for stage in config.w.values():
    if 'start' in stage:
      stage.start = min(stage.start, 2)
  config.eval.update(every=2, batch_size=8, max_blocks=2)
  config.checkpoint.every = 2
  config.target.every = 2
  config.mixture.update(every=min(config.mixture.every, 2), rows=1, target_rows=2)
  config.log.every = 1
  return config


# Sweeps. A unit maps flat keys of the config, and perhaps 'arm' (see `set_arm`), to values. The
# `sweep(add)` of a config file calls `add(**unit)` for each unit that experiments.launch shall run.

Unit = dict[str, Any]
Sampler = Callable[[random.Random], Any]


def grid(axes: Mapping[str, Iterable[Any]]) -> Iterator[Unit]:
  """Every combination; the last key moves fastest. {'arm': ('uniform', 'upper'), 'seed': (0, 1)}
  is four units."""
  for values in itertools.product(*axes.values()):
    yield dict(zip(axes, values))


def paired(axes: Mapping[str, Sequence[Any]]) -> Iterator[Unit]:
  """The first values of all keys together, then the second ones, and so on.

  Raises:
    ConfigError: one key has more values than another.
  """
  if len({len(values) for values in axes.values()}) > 1:
    counts = ', '.join(f'{key} has {len(values)}' for key, values in axes.items())
    raise ConfigError(f'paired keys need equally many values; {counts}')
  for values in zip(*axes.values()):
    yield dict(zip(axes, values))


def sampled(axes: Mapping[str, Sampler], count: int, seed: int = 0) -> Iterator[Unit]:
  """`count` random units, the same for the same seed; see `uniform`, `log_uniform`, `choice`."""
  rng = random.Random(seed)
  for _ in range(count):
    yield {key: sampler(rng) for key, sampler in axes.items()}


def uniform(low: float, high: float) -> Sampler:
  """A number between two, to four digits."""
  return lambda rng: float(f'{rng.uniform(low, high):.4g}')


def log_uniform(low: float, high: float) -> Sampler:
  """A positive number between two, each factor as likely as any other, to four digits."""
  return lambda rng: float(f'{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}')


def choice(*values: Any) -> Sampler:
  """One of some values."""
  return lambda rng: rng.choice(values)


def seeds(units: Iterable[Unit], count: int, first: int = 0) -> Iterator[Unit]:
  """Every unit on `count` seeds from `first` on; seeds outside, for pairs that are soon whole."""
  units = list(units)
  for seed in range(first, first + count):
    for unit in units:
      yield {**unit, 'seed': seed}
