"""AdamW with a clipped gradient, and the learning rate as a plain function of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.errors import UserError

Schedule = Callable[[Any], jax.Array]

# apply_if_finite gives up, and lets a bad update through, after this many in a row. A run that is
# told to skip must never do that.
_NEVER = 2**31 - 1


def make_optimizer(
  config, total_steps: int, *, nonfinite: str = 'abort'
) -> tuple[optax.GradientTransformation, Schedule]:
  """Clip by the global norm, Adam, decoupled weight decay on matrices, scheduled learning rate.

  Args:
    config: `config.optim` (lr, b1, b2, eps, weight_decay, clip, schedule, warmup_steps,
      final_lr_ratio, decay_steps). clip=0 leaves clipping out.
    total_steps: optimizer steps of the whole run.
    nonfinite: 'skip' leaves parameters and moments as they were when an update is not finite (and
      counts it in the optimizer state); 'abort' leaves that decision to the loop.

  Returns:
    (the optax transformation, the schedule: step -> f32[] learning rate of that step's update).
  """
  schedule = make_schedule(config, total_steps)
  adamw = optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  clip = optax.clip_by_global_norm(config.clip) if config.clip > 0 else optax.identity()
  tx = optax.chain(clip, adamw)
  if nonfinite == 'skip':
    tx = optax.apply_if_finite(tx, max_consecutive_errors=_NEVER)
  return tx, schedule


def make_schedule(config, total_steps: int) -> Schedule:
  """The learning rate of step s = 0, 1, ..., total_steps - 1, as lr times a factor in (0, 1].

  Warm-up, s < W = warmup_steps: (s + 1) / W, so that the first update already moves.
  After it, with r = final_lr_ratio:
    constant: 1.
    cosine:   r + (1 - r) (1 + cos(pi p)) / 2,  p = (s - W) / (total_steps - W).
    wsd:      1 until the last D steps, then 1 - (1 - r) (s - (total_steps - D)) / D, where
              D = decay_steps, or a fifth of total_steps when that is 0.
  At s = total_steps, one past the end, cosine and wsd reach exactly r.

  Raises:
    UserError: an unknown schedule, or phases that do not fit into total_steps.
  """
  warmup, ratio = config.warmup_steps, config.final_lr_ratio
  decay = 0
  if config.schedule == 'wsd':
    decay = config.decay_steps or max(1, total_steps // 5)
  if warmup + decay > total_steps:
    decay_part = f' + decay_steps={decay}' if decay else ''
    raise UserError(
      f'optim.warmup_steps={warmup}{decay_part} exceeds total_steps={total_steps}: '
      f'shorten the warm-up or train longer'
    )

  def constant(_):
    return 1.0

  def cosine(step):
    progress = (step - warmup) / max(1, total_steps - warmup)
    return ratio + (1 - ratio) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))

  def wsd(step):
    progress = (step - (total_steps - decay)) / decay
    return 1 - (1 - ratio) * jnp.clip(progress, 0, 1)

  shapes = {'constant': constant, 'cosine': cosine, 'wsd': wsd}
  if config.schedule not in shapes:
    raise UserError(
      f"optim.schedule='{config.schedule}' is unknown: use {', '.join(sorted(shapes))}"
    )
  shape = shapes[config.schedule]

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    rising = (step + 1) / max(1, warmup)
    return config.lr * jnp.where(step < warmup, rising, shape(step))

  return schedule


def decay_mask(params: Any) -> Any:
  """True for the arrays that weight decay shrinks: matrices and the two embedding tables.

  Goes by name, because stacked blocks give biases two axes. The token table is decayed as the
  output layer that it also is; biases and the scales of norms are not.
  """
  decayed = lambda path, _: path[-1].key in ('kernel', 'embedding')
  return jax.tree_util.tree_map_with_path(decayed, params)
