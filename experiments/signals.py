"""What a weighting is told beyond losses: sizes for its tables, and a reference model's losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

import jaxrw
from experiments import checkpoints
from experiments import config as config_lib
from experiments.errors import UserError
from experiments.models import gpt2


def make_weighting(config: Any, *, num_groups: int = 1, num_examples: int = 1) -> jaxrw.Weighting:
  """The weighting of a config; arguments named like the sizes of the data are filled in.

  Args:
    config: `config.weighting` and `config.w` are read.
    num_groups: domains of the corpus.
    num_examples: training blocks of the corpus.

  Raises:
    UserError: the weighting cannot be built; one line.
  """
  sizes = {'num_groups': num_groups, 'num_examples': num_examples}
  specs = {name: _filled_in(spec, sizes) for name, spec in config.w.to_dict().items()}
  try:
    return jaxrw.from_config(config.weighting, specs)
  except ValueError as error:
    raise UserError(f'config.{config_lib.one_line(error)}') from error


def _filled_in(spec: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
  factory = getattr(jaxrw.weights, str(spec.get('fn')), None)
  takes = inspect.signature(factory).parameters if callable(factory) else ()
  filled = {name: size for name, size in sizes.items() if name in takes} | dict(spec)
  if isinstance(filled.get('stage'), Mapping):
    filled['stage'] = _filled_in(filled['stage'], sizes)
  return filled


def check_signals(weighting: jaxrw.Weighting, config: Any) -> None:
  """Traces the weighting alone, with the signals that a training run has, which takes no time.

  Raises:
    UserError: it needs a signal that nothing in the config provides.
  """
  shape = (config.batch_size, config.data.seq_len)
  rows = jax.ShapeDtypeStruct(shape[:1], 'int32')
  tokens = jax.ShapeDtypeStruct(shape, 'float32')
  told = {'losses': tokens, 'base': tokens, 'group_ids': rows, 'example_ids': rows}
  if config.reference:
    told['ref_losses'] = tokens
  step = jax.ShapeDtypeStruct((), 'int32')
  key = jax.eval_shape(lambda: jax.random.key(0))
  try:
    state = jax.eval_shape(weighting.init)
    jax.eval_shape(weighting.update, tokens, state, **told, step=step, key=key)
  except (TypeError, ValueError) as error:
    message = config_lib.one_line(error)
    hint = ': set config.reference to a finished run' if "'ref_losses'" in message else ''
    known = ', '.join([*told, 'step', 'key'])
    raise UserError(
      f'config.w does not fit language model training, whose signals are {known}: {message}{hint}'
    ) from error


def make_keep(config: Any) -> jaxrw.Keep | None:
  """Selective backward as the config asks for it, checked against the batch.

  Raises:
    UserError: rows or groups that do not fit the batch.
  """
  if not config.keep.rows:
    return None
  try:
    keep = jaxrw.Keep(**config.keep.to_dict())
    keep.check(config.batch_size, config.microbatches)
  except ValueError as error:
    raise UserError(f'config.{config_lib.one_line(error)}') from error
  return keep


def reference_model(
  config: Any, model: gpt2.GPT2Config, layout: Callable[[Any], Any]
) -> tuple[gpt2.GPT2Config, Any]:
  """(architecture, parameters) of the model of the run `config.reference`.

  Args:
    config: of the run that asks.
    model: its architecture; the reference must read the same tokens.
    layout: abstract parameters -> their shardings.

  Raises:
    UserError: the run is not finished, or its model reads other tokens.
  """
  path = config.reference
  theirs = config_lib.read(path)
  for key in ('tokenizer', 'seq_len'):
    if theirs.data[key] != config.data[key]:
      raise UserError(
        f'config.reference={path}: data.{key} is {theirs.data[key]!r} there and '
        f'{config.data[key]!r} here; train the reference with the same'
      )
  vocab_size = theirs.model.vocab_size or model.vocab_size
  reference = gpt2.GPT2Config.from_config(
    theirs.model, vocab_size=vocab_size, seq_len=config.data.seq_len
  )
  shapes = jax.eval_shape(lambda: gpt2.init(jax.random.key(0), reference))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout(shapes)
  )
  return reference, checkpoints.restore_params(path, abstract)
