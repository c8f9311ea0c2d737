"""Language models: `from_config` chooses the family, `experiments.models.lm` does the rest."""

from __future__ import annotations

from typing import Any

from experiments.models.gpt2 import GPT2Config
from experiments.models.llama import LlamaConfig
from experiments.models.lm import ModelConfig

FAMILIES = {'gpt2': GPT2Config, 'llama': LlamaConfig}


def from_config(model: Any, *, vocab_size: int, seq_len: int) -> ModelConfig:
  """The architecture that `config.model` describes; see `ModelConfig.from_config`."""
  return FAMILIES[model.name].from_config(model, vocab_size=vocab_size, seq_len=seq_len)
