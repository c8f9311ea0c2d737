"""What a run writes about its steps: metrics, examples, progress, and why it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import files, hardware, ledger, metrics, mixing
from experiments.data.corpus import Corpus
from experiments.errors import NonFiniteError


class StepLog:
  """Writes what the steps return, one step late, so that the device never waits for the host.

  A step that is not finite stops the run here, before anything of it is saved.
  """

  def __init__(
    self,
    config: Any,
    corpus: Corpus,
    schedule: Callable[[int], Any],
    workdir: Path,
    start: int,
    flops_per_token: int,
    primary: bool,
  ):
    self._config, self._corpus, self._schedule = config, corpus, schedule
    self._workdir, self._primary = workdir, primary
    self._pending: tuple[int, Any, Sequence[int] | None] | None = None
    self._tokens_per_step = config.batch_size * corpus.seq_len
    resume = start or None
    self._examples = None
    if primary and config.log.examples_every:
      self._examples = metrics.JsonlFile(workdir / 'examples.jsonl', resume_step=resume)
    self._ledger = None
    if primary and config.log.ledger:
      self._ledger = ledger.Ledger(workdir / 'ledger', corpus, resume_step=start)
    self._metrics = metrics.MetricWriter(  # last, because it starts threads
      workdir,
      resume_step=resume,
      tensorboard=config.log.tensorboard,
      wandb=config.log.wandb,
      primary=primary,
    )
    chip = hardware.chip(jax.devices()[0].device_kind)
    self._progress = metrics.Progress(
      config.total_steps,
      start,
      tokens_per_step=self._tokens_per_step,
      flops_per_token=flops_per_token,
      peak=chip and chip.flops * jax.device_count(),
      enabled=config.log.progress and primary,
    )

  def __enter__(self) -> StepLog:
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      if kind is None:
        self._flush()
    finally:
      for sink in (self._progress, self._metrics, self._examples, self._ledger):
        if sink is not None:
          sink.close()

  def writes(self, step: int) -> bool:
    """Whether metrics of this step are kept."""
    return step % self._config.log.every == 0 or step == self._config.total_steps

  def step(self, step: int, record: Any, used: Sequence[int] | None) -> None:
    """Takes the record of a step that may still be running.

    Args:
      step: counted from 1.
      record: what the train step returned.
      used: blocks of each domain drawn so far, at the steps that `writes`.
    """
    self._flush()
    self._pending = step, record, used

  def evaluation(self, step: int, evaluated: dict[str, Any]) -> None:
    """Writes an evaluation."""
    self._metrics.write('eval', step, evaluated)
    self._progress.say(
      f'step {step}: bits per byte macro {evaluated["macro_bpb"]:.4f}, '
      f'worst {evaluated["worst_bpb"]:.4f} ({evaluated["worst_domain"]})'
    )

  @contextlib.contextmanager
  def pause(self):
    """Brings the log up to date, then stops the clock of the progress bar."""
    self._flush()
    with self._progress.paused():
      yield

  def commit(self) -> None:
    """Puts every step so far on disk; call it before their checkpoint is saved."""
    self._flush()
    if self._ledger is not None:
      self._ledger.flush()

  def _flush(self) -> None:
    pending, self._pending = self._pending, None
    if pending is None:
      return
    step, record, used = pending[0], jax.tree.map(np.asarray, pending[1]), pending[2]
    config, examples = self._config, record['examples']
    finite = np.isfinite(record['weighted_loss']) and np.isfinite(record['grad_norm'])
    if not finite and config.nonfinite == 'abort':
      self._abort(step, record)
    self._progress.update(step, loss=float(record['loss']))
    if self._examples is not None and step % config.log.examples_every == 0:
      rounded = {
        name: examples[name].tolist() if name == 'example_id' else _short(examples[name])
        for name in ('example_id', 'weight', 'loss')
      }
      self._examples.write({'step': step, **rounded})
    if self._ledger is not None:
      self._ledger.add(step, examples)
    if used is not None:
      self._metrics.write('train', step, self._train_values(step, record, used))

  def _train_values(self, step: int, record: Any, used: Sequence[int]) -> dict[str, Any]:
    base, losses, weights = record['domains'].T.astype(np.float64)
    present = [g for g in range(len(base)) if base[g] > 0]
    return {
      'loss': float(record['loss']),
      'weighted_loss': float(record['weighted_loss']),
      'lr': float(self._schedule(step - 1)),
      'grad_norm': float(record['grad_norm']),
      'tokens': step * self._tokens_per_step,
      'ess': float(record['effective_fraction']),
      'entropy': float(record['entropy']),
      'max_share': float(record['max_share']),
      'domain': {
        self._corpus.domains[g]: {
          'loss': losses[g] / base[g],
          'weight': weights[g] / base[g],
          'share': base[g] / base.sum(),
        }
        for g in present
      },
      **self._mixture_values(record, used),
      'wall': {
        'seconds': self._progress.seconds,
        'tokens_per_s': self._progress.tokens_per_second,
        'mfu': self._progress.mfu,
      },
    }

  def _mixture_values(self, record: Any, used: Sequence[int]) -> dict[str, Any]:
    """Epochs of each domain so far and, if the mixture changes, what it is and what it was told."""
    sizes, domains = self._corpus.sizes('train'), self._corpus.domains
    named = lambda names, values: {name: float(value) for name, value in zip(names, values)}
    written = {'epochs': named(domains, np.asarray(used) / np.maximum(sizes, 1))}
    mixture = record.get('mixture')
    if mixture is not None:
      # A method over a basis is told of its mixtures, not of the domains.
      told_of = {'proportions': domains, 'objective': domains}
      others = mixing.basis_files(self._config) or domains
      written['mixture'] = {
        name: named(told_of.get(name, others), value)
        for name, value in mixture.items()
        if np.ndim(value)
      }
      written['mixture']['noise'] = float(mixture['noise'])
    return written

  def _abort(self, step: int, record: Any) -> None:
    examples = record['examples']
    bad = ~(np.isfinite(examples['loss']) & np.isfinite(examples['weight']))
    rows = np.flatnonzero(bad) if bad.any() else np.arange(bad.size)
    report = {
      'step': step,
      'weighted_loss': str(record['weighted_loss']),
      'grad_norm': str(record['grad_norm']),
      'reason': 'examples with a loss or weight that is not finite'
      if bad.any()
      else 'the gradient is not finite although every loss is; all examples of the step',
      'examples': [
        {
          'example_id': int(examples['example_id'][i]),
          'loss': str(examples['loss'][i]),
          'weight': str(examples['weight'][i]),
          **self._corpus.describe(int(examples['example_id'][i])),
        }
        for i in rows
      ],
    }
    if self._primary:
      files.write_json(self._workdir / 'abort.json', report)
    raise NonFiniteError(
      f'step {step}: weighted loss {record["weighted_loss"]}, gradient norm '
      f'{record["grad_norm"]}; {self._workdir / "abort.json"} names the examples. '
      'Lower config.optim.lr, or set config.nonfinite=skip; checkpoints up to here are good'
    )


def _short(values: np.ndarray) -> list[float]:
  """Six significant digits: plenty for a picture, and the file stays small."""
  return [float(f'{x:.6g}') for x in values.tolist()]
