"""A finished run, opened to use its model."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from experiments import checkpoints, models
from experiments.data import corpus, tokenizers
from experiments.models import lm


class Finished(NamedTuple):
  """What a run left.

  Attributes:
    model: without dropout.
    params: of the chosen checkpoint.
  """

  config: Any
  tokenizer: tokenizers.Tokenizer
  model: lm.ModelConfig
  params: lm.Params


def open_run(workdir: str, config: Any, mesh: jax.sharding.Mesh, step: str = '') -> Finished:
  """Reads the model of a run onto a mesh.

  Args:
    workdir: the directory of the run.
    config: what it stores.
    mesh: where the parameters are to lie.
    step: which checkpoint; see `checkpoints.resolve_step`.

  Raises:
    UserError: the run has no such checkpoint that can be read.
  """
  which = checkpoints.resolve_step(config, step)
  tokenizer = open_tokenizer(config.data)
  sizes = {'vocab_size': tokenizer.vocab_size, 'seq_len': config.data.seq_len}
  model = dataclasses.replace(models.from_config(config.model, **sizes), dropout=0.0)
  params = checkpoints.restore_params(workdir, lm.abstract(model, mesh), which=which)
  return Finished(config, tokenizer, model, params)


def open_tokenizer(data_config: Any) -> tokenizers.Tokenizer:
  """The tokenizer of a run; one that was learned from the text lives with the prepared data."""
  if data_config.tokenizer.startswith('bpe:'):
    return corpus.open_corpus(data_config).tokenizer
  return tokenizers.load_tokenizer(data_config.tokenizer)
