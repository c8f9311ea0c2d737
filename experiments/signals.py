"""What a weighting is told beyond losses.

Sizes for its tables, a reference model's losses, and how examples compare with a target domain.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jaxrw
from experiments import checkpoints, models
from experiments import config as config_lib
from experiments import mesh as mesh_lib
from experiments.data import pipeline
from experiments.data.corpus import Corpus
from experiments.errors import UserError
from experiments.models import lm

FIXES = {
  'ref_losses': ': set config.reference to a finished run',
  'domain_excess': ': set config.reference to a finished run',
  'representation': ": set config.target.domain, and config.target.read='representation'",
}


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
  except (ValueError, OverflowError) as error:
    raise UserError(f'config.{config_lib.one_line(error)}') from error


def _filled_in(spec: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
  factory = getattr(jaxrw.weights, str(spec.get('fn')), None)
  takes = inspect.signature(factory).parameters if callable(factory) else ()
  filled = {name: size for name, size in sizes.items() if name in takes} | dict(spec)
  if isinstance(filled.get('stage'), Mapping):
    filled['stage'] = _filled_in(filled['stage'], sizes)
  return filled


def check_signals(
  weighting: jaxrw.Weighting, config: Any, extra: Mapping[str, Any] = types.MappingProxyType({})
) -> None:
  """Traces the weighting alone, with the signals that a training run has, which takes no time.

  Args:
    weighting: of the run.
    config: of the run.
    extra: signals of its own beside the reserved ones.

  Raises:
    UserError: it needs a signal that nothing in the config provides.
  """
  if config.scope == 'online' and weighting.log_weights is None:
    raise UserError(
      "config.scope='online' is for weightings of the softmax type (kl_dro, tilted, linupper_stale "
      "and their chains): use scope='global'"
    )
  shape = (config.batch_size, config.data.seq_len)
  rows = jax.ShapeDtypeStruct(shape[:1], 'int32')
  tokens = jax.ShapeDtypeStruct(shape, 'float32')
  told = {'losses': tokens, 'base': tokens, 'group_ids': rows, 'example_ids': rows}
  told['sampling_prob'] = jax.ShapeDtypeStruct(shape[:1], 'float32')
  if extra:
    told['extra'] = dict(extra)
  if config.reference:
    told['ref_losses'] = tokens
  if config.target.domain and config.target.read == 'representation':
    told['representation'] = jax.ShapeDtypeStruct((shape[0], config.model.n_embd), 'float32')
    told['anchor'] = jax.ShapeDtypeStruct((config.model.n_embd,), 'float32')
  step = jax.ShapeDtypeStruct((), 'int32')
  key = jax.eval_shape(lambda: jax.random.key(0))
  try:
    state = jax.eval_shape(weighting.init)
    jax.eval_shape(weighting.update, tokens, state, **told, step=step, key=key)
  except (TypeError, ValueError, OverflowError) as error:
    message = config_lib.one_line(error)
    hint = next((fix for name, fix in FIXES.items() if f"'{name}'" in message), '')
    known = ', '.join([*told, 'step', 'key'])
    raise UserError(
      f'config.w does not fit language model training, whose signals are {known}: {message}{hint}'
    ) from error


def make_keep(config: Any, devices: int = 1) -> jaxrw.Keep | None:
  """Selective backward as the config asks for it, checked against the batch and the devices.

  Raises:
    UserError: rows or groups that do not fit the batch, or groups that devices would have to split.
  """
  if not config.keep.rows:
    return None
  try:
    keep = jaxrw.Keep(**config.keep.to_dict())
    keep.check(config.batch_size, config.microbatches)
  except ValueError as error:
    raise UserError(f'config.{config_lib.one_line(error)}') from error
  if keep.groups % devices:
    fitting = math.lcm(keep.groups, devices)
    raise UserError(
      f'config.keep.groups={keep.groups} is not a multiple of the {devices} devices, so kept rows '
      f'would move between devices in every step: set config.keep.groups={fitting} (other groups '
      'keep other rows: use the same number wherever runs are to agree)'
    )
  return keep


def reference_model(
  config: Any, model: lm.ModelConfig, mesh: jax.sharding.Mesh
) -> tuple[lm.ModelConfig, Any]:
  """(architecture, parameters) of the model of the run `config.reference`.

  Args:
    config: of the run that asks.
    model: its architecture; the reference must read the same tokens.
    mesh: of the run that asks.

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
  reference = models.from_config(theirs.model, vocab_size=vocab_size, seq_len=config.data.seq_len)
  return reference, checkpoints.restore_params(path, lm.abstract(reference, mesh))


def represent(hidden: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
  """float32[B, D] of hidden states [B, T, D]: one vector per example; see `pool_positions`."""
  return jaxrw.weights.pool_positions(hidden, batch['base'])


def target_reader(
  config: Any, corpus: Corpus, model: lm.ModelConfig, mesh: jax.sharding.Mesh, layout: Any
) -> Callable[[Any], dict[str, Any]]:
  """(params) -> what `config.target` asks to read on some blocks of its domain, as step signals.

  Args:
    config: `config.target`, and `config.eval.split` for the gradient. Anchors are blocks of the
      training split: they decide weights, and what decides weights must not be tested on.
    layout: of a gradient, the shardings of the parameters.

  Raises:
    UserError: there is no such domain.
  """
  if not config.target.domain:
    return lambda params: {}
  anchored = config.target.read == 'representation'
  local = pipeline.domain_batch(
    corpus,
    config.target.domain,
    split='train' if anchored else config.eval.split,
    blocks=config.target.blocks,
    multiple=mesh_lib.row_shards(mesh),
    local_rows=mesh_lib.local_rows(mesh),
  )
  batch = mesh_lib.to_global(local, mesh)

  def anchor(params, batch):
    hidden = lm.hidden(params, batch['tokens'][:, :-1], model, mesh=mesh)
    mean = jaxrw.weights.anchor_mean(represent(hidden, batch))
    # Rows that only pad the batch have the representation 0; the mean is over the others.
    real = jnp.any(batch['base'] > 0, axis=1)
    return {'anchor': mean * real.size / jnp.sum(real)}

  def mean_loss(params, batch):
    return jaxrw.masked.mean(lm.token_losses(params, batch, model, mesh=mesh), batch['base'])

  def direction(params, batch):
    return {'direction': jaxrw.gradients.target_direction(mean_loss, params, batch)}

  if anchored:
    read = jax.jit(anchor, out_shardings=mesh_lib.replicated(mesh))
  else:
    read = jax.jit(direction, out_shardings={'direction': layout})
  return lambda params: read(params, batch)
