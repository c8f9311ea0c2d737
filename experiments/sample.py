"""Lets a finished run write text.

python -m experiments.sample --workdir=runs/quickstart --prompt='def ' --num_tokens=200
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from experiments import config as config_lib
from experiments.config_rules import is_text
from experiments.errors import UserError

FLAGS = flags.FLAGS


def generate(
  logits_fn: Any, params: Any, prompt: np.ndarray, *, window: int, num_tokens: int,
  temperature: float, top_k: int, seed: int,
) -> np.ndarray:  # fmt: skip
  """Draws tokens one after the other; a single compiled program of fixed shapes.

  The whole window is computed again for every token: slow for long texts, and short to read.

  Args:
    logits_fn: (params, i32[1, window]) -> f32[1, window, V]; causal: what it says at position t
      depends on the tokens up to t.
    params: passed on; an argument of the program, so that they are not compiled into it.
    prompt: i32[n], n >= 1; the last `window` of them are used.
    window: how many tokens the model sees.
    num_tokens: how many to draw.
    temperature: divides the logits; 0 takes the largest.
    top_k: draw among the k largest logits; 0 means all.
    seed: of the draws.

  Returns:
    i32[num_tokens].
  """
  import jax
  import jax.numpy as jnp

  def draw(logits, key):
    if temperature == 0:
      return jnp.argmax(logits)
    if top_k:
      smallest = jax.lax.top_k(logits, min(top_k, logits.size))[0][-1]
      logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return jax.random.categorical(key, logits / temperature)

  def one_token(params, carry, key):
    tokens, length = carry
    token = draw(logits_fn(params, tokens[None])[0, length - 1], key).astype(jnp.int32)
    full = length == window
    tokens = jnp.where(full, jnp.roll(tokens, -1), tokens)
    tokens = tokens.at[jnp.where(full, window - 1, length)].set(token)
    return (tokens, jnp.minimum(length + 1, window)), token

  @jax.jit
  def all_tokens(params, carry, keys):
    return jax.lax.scan(functools.partial(one_token, params), carry, keys)[1]

  prompt = np.asarray(prompt, np.int32)[-window:]
  # A causal model never sees the zeros behind the prompt.
  tokens = np.zeros(window, np.int32)
  tokens[: len(prompt)] = prompt
  keys = jax.random.split(jax.random.key(seed), num_tokens)
  return np.asarray(all_tokens(params, (tokens, np.int32(len(prompt))), keys))


def sample(
  workdir: str, prompt: str, *, num_tokens: int, temperature: float, top_k: int, seed: int,
  step: str = '',
) -> str:  # fmt: skip
  """What a checkpoint of a run (the newest, that of a step, or 'best') writes after `prompt`, up to
  the end of the document."""
  if not workdir:
    raise UserError('--workdir is missing: give the directory of a finished run')
  if num_tokens < 1:
    raise UserError(f'--num_tokens={num_tokens}: must be at least 1')
  if not 0 <= temperature < float('inf'):
    raise UserError(f'--temperature={temperature}: must be at least 0, such as 0.8')
  if top_k < 0:
    raise UserError(f'--top_k={top_k}: must be at least 0, which chooses among all tokens')
  if not is_text(prompt):
    raise UserError(f'--prompt={prompt!r}: must be UTF-8 text without NUL')
  if not 0 <= seed < 2**31:
    raise UserError(f'--seed={seed}: must be at least 0 and below 2147483648')
  config = config_lib.read(workdir)

  import dataclasses

  import jax

  from experiments import finished
  from experiments.mesh import make_mesh
  from experiments.models import lm

  run = finished.open_run(workdir, config, make_mesh(devices=jax.local_devices()[:1]), step)
  model, tokenizer = dataclasses.replace(run.model, attention='xla'), run.tokenizer

  def logits_fn(params, tokens):
    # A padded vocabulary has rows that no token stands for.
    return lm.apply(params, tokens, model)[..., : tokenizer.vocab_size]

  # Every document of the training text follows an end-of-text token.
  ids = np.concatenate([[tokenizer.eot_id], tokenizer.encode(prompt)])
  tokens = generate(
    logits_fn, run.params, ids, window=config.data.seq_len, num_tokens=num_tokens,
    temperature=temperature, top_k=top_k, seed=seed,
  )  # fmt: skip
  ends = np.flatnonzero(tokens == tokenizer.eot_id)
  return tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_string('workdir', '', 'the directory of the run')
  flags.DEFINE_string('prompt', '', 'how the text begins; empty: a new document')
  flags.DEFINE_integer('num_tokens', 200, 'how many tokens to write, at most')
  flags.DEFINE_float('temperature', 0.8, '0 always takes the most likely token')
  flags.DEFINE_integer('top_k', 0, 'choose among the k most likely tokens; 0: among all')
  flags.DEFINE_integer('seed', 0, 'equal seeds write equal text')
  flags.DEFINE_string('step', '', "which checkpoint: a step, or 'best'; empty: the newest")


def main(_: list[str]) -> None:
  text = sample(
    FLAGS.workdir, FLAGS.prompt, num_tokens=FLAGS.num_tokens, temperature=FLAGS.temperature,
    top_k=FLAGS.top_k, seed=FLAGS.seed, step=FLAGS.step,
  )  # fmt: skip
  print(FLAGS.prompt + text)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
