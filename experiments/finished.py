"""A finished run, opened to use its model."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from experiments import checkpoints, models
from experiments.data.tokenizers import Tokenizer
from experiments.models import lm
from experiments.sample import open_tokenizer


class Finished(NamedTuple):
  """What a run left.

  Attributes:
    model: without dropout.
    params: of the newest good checkpoint.
  """

  config: Any
  tokenizer: Tokenizer
  model: lm.ModelConfig
  params: lm.Params


def open_run(workdir: str, config: Any, mesh: jax.sharding.Mesh) -> Finished:
  """Reads the model of a run onto a mesh.

  Args:
    workdir: the directory of the run.
    config: what it stores.
    mesh: where the parameters are to lie.

  Raises:
    UserError: the run has no checkpoint that can be read.
  """
  tokenizer = open_tokenizer(config.data)
  sizes = {'vocab_size': tokenizer.vocab_size, 'seq_len': config.data.seq_len}
  model = dataclasses.replace(models.from_config(config.model, **sizes), dropout=0.0)
  params = checkpoints.restore_params(workdir, lm.abstract(model, mesh))
  return Finished(config, tokenizer, model, params)
