"""One training run, top to bottom: build, resume or start, step, evaluate, save, finish.

`build` turns a config into pure jitted functions and shardings without training anything; the dry
run, the benchmarks and the tests use it, too. `train` is the loop. Nothing here knows which
weighting runs: that is a pure function inside the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrw
from experiments import checkpoints as checkpoints_lib
from experiments import config as config_lib
from experiments import files, live_feed, mixing, models, optim, provenance, signals
from experiments import mesh as mesh_lib
from experiments.data import corpus as corpus_lib
from experiments.data import mixture as mixture_lib
from experiments.data import pipeline
from experiments.domain_reader import DomainReader, make_reader
from experiments.errors import StoppedError, UserError
from experiments.evaluators import language
from experiments.models import hf, lm
from experiments.step_log import StepLog
from experiments.stopping import StopRequest

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


@dataclasses.dataclass(frozen=True)
class Run:
  """What a config turns into on the devices at hand.

  Attributes:
    abstract_state: the train state's shapes, dtypes and shardings.
    init: () -> state, already laid out over the mesh.
    step: (state, batch, signals) -> (state, metrics), what `jaxrw.make_train_step` returned; not
      jitted.
    proportions: what `config.data.mixture` says, float64[G].
    mixture: what changes them, or None.
    signals: (params) -> what `train_step` takes beside state and batch: the reference's parameters,
      what is read on the target domain, or nothing; `config.target.every` steps apart.
    read_domains: (params, finished steps) -> what the mixture is told beside losses; or None.
    train_step: (state, batch, signals) -> (state, record), jitted; the state is donated.
    eval_step: (params, batch) -> float32[G, 3]; see `experiments.evaluators.language`.
  """

  config: Any
  corpus: corpus_lib.Corpus
  model: lm.ModelConfig
  mesh: jax.sharding.Mesh
  proportions: np.ndarray
  mixture: jaxrw.mixtures.Mixture | None
  weighting: jaxrw.Weighting
  schedule: optax.Schedule
  abstract_state: jaxrw.TrainState
  init: Callable[[], jaxrw.TrainState]
  step: Callable[..., Any]
  signals: Callable[[Any], dict[str, Any]]
  read_domains: DomainReader | None
  train_step: Callable[..., Any]
  eval_step: Callable[..., jax.Array]

  def to_global(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Rows of this process -> arrays over all devices."""
    return mesh_lib.to_global(dict(batch), self.mesh)


def build(config: Any, devices: Sequence[Any] | None = None) -> Run:
  """Opens the data and prepares the jitted functions; raises every error that needs no training."""
  mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
  mesh_lib.check_batch(config.batch_size, config.microbatches, mesh)
  mesh_lib.check_batch(config.eval.batch_size, 1, mesh, 'eval.batch_size')
  keep = signals.make_keep(config, mesh_lib.row_shards(mesh))
  signals.make_weighting(config)  # its mistakes before the data are opened
  tx, schedule = optim.make_optimizer(config.optim, config.total_steps, nonfinite=config.nonfinite)
  corpus = corpus_lib.open_corpus(config.data)
  corpus.sizes(config.eval.split)  # an unknown split, before training
  proportions = mixture_lib.proportions(config.data, corpus)
  context = mixing.context(config, corpus, proportions, schedule)
  mixture = mixing.make_mixture(config, context)
  model = models.from_config(
    config.model, vocab_size=corpus.tokenizer.vocab_size, seq_len=corpus.seq_len
  )
  weighting = signals.make_weighting(
    config, num_groups=len(corpus.domains), num_examples=int(corpus.sizes('train').sum())
  )
  whole_step: dict[str, Any] = {}
  if mixture is not None:
    weighting = mixing.with_mixture(weighting, mixture, config)
  read_domains = make_reader(config, corpus, context, model, mesh)
  if read_domains is not None:
    whole_step['extra'] = read_domains.zeros()
  signals.check_signals(weighting, config, whole_step.get('extra', {}))
  layout = lambda tree: mesh_lib.tree_shardings(tree, mesh, model.sharding_rules)
  row_signals = None
  if config.reference:
    reference, params = signals.reference_model(config, model, mesh)
    whole_step['reference'] = params

    def row_signals(params, batch, whole_step):
      ref_losses = lm.token_losses(whole_step['reference'], batch, reference, mesh=mesh)
      return {'ref_losses': ref_losses}

  batched_loss = lambda params, batch: lm.token_losses(params, batch, model, mesh=mesh)
  probed_loss = None
  if config.target.domain and config.target.read == 'gradient' and not model.takes_probe:
    raise UserError(
      f"config.target.read='gradient' reads gradients inside the layers, which those of "
      f"model.name={config.model.name!r} do not offer: use target.read='representation', or "
      "model.name='gpt2'"
    )
  if config.target.domain and config.target.read == 'gradient':
    probed_loss = lambda params, batch, probe: lm.token_losses(
      params, batch, model, mesh=mesh, probe=probe
    )
  elif config.target.domain:

    def batched_loss(params, batch):
      losses, hidden = lm.token_losses_and_hidden(params, batch, model, mesh=mesh)
      return losses, {'representation': signals.represent(hidden, batch)}

  def init():
    params = lm.init(jax.random.key(config.seed), model)
    return jaxrw.TrainState.create(params, tx, weighting)

  step = jaxrw.make_train_step(
    lambda params, example: lm.example_loss(params, example, model),
    tx,
    weighting,
    batched_loss=batched_loss,
    row_signals=row_signals,
    keep=keep,
    probed_loss=probed_loss,
    probe_shards=mesh_lib.row_shards(mesh),
    microbatches=config.microbatches,
    scope=config.scope,
    example_base=config.example_base,
    seed=config.seed,
  )

  def train_step(state, batch, whole_step):
    if model.dropout > 0:
      key = jax.random.key(config.seed)
      keys = lm.dropout_keys(key, state.step, batch['example_id'])
      batch = {**batch, 'dropout_key': keys}
    state, step_metrics = step(state, batch, whole_step)
    record = summarize_step(step_metrics, batch, len(corpus.domains))
    if mixture is not None:
      record['mixture'] = mixing.summarize(mixture, state.weighting[mixing.STAGE])
      record['mixture'] |= whole_step.get('extra', {})
    return state, record

  eval_model = dataclasses.replace(model, dropout=0.0)
  eval_step = language.make_eval_step(
    lambda params, batch: lm.token_losses(params, batch, eval_model, mesh=mesh),
    len(corpus.domains),
  )

  shapes = jax.eval_shape(init)
  read_target = signals.target_reader(config, corpus, eval_model, mesh, layout(shapes.params))
  read_signals = lambda params: {**whole_step, **read_target(params)}
  signal_shapes = jax.eval_shape(read_signals, shapes.params)
  shardings = layout(shapes)
  rows, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
  return Run(
    config=config,
    corpus=corpus,
    model=model,
    mesh=mesh,
    proportions=proportions,
    mixture=mixture,
    weighting=weighting,
    schedule=schedule,
    abstract_state=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    ),
    init=jax.jit(init, out_shardings=shardings),
    step=step,
    signals=read_signals,
    read_domains=read_domains,
    train_step=jax.jit(
      train_step,
      in_shardings=(shardings, rows, layout(signal_shapes)),
      out_shardings=(shardings, whole),
      donate_argnums=0,
    ),
    eval_step=jax.jit(eval_step, in_shardings=(shardings.params, rows), out_shardings=whole),
  )


def summarize_step(
  step_metrics: Mapping[str, jax.Array], batch: Mapping[str, jax.Array], num_domains: int
) -> dict[str, Any]:
  """What the host wants to know of a step; small, and the same on every device.

  Returns:
    loss, weighted_loss, grad_norm, effective_fraction, entropy, max_share: float32[];
    domains: float32[G, 3], sums of base, base * loss and base * weight;
    examples: example_id int32[B], loss and weight float32[B], in row order; target_dot float32[B]
      where the step reads it.
  """
  base = step_metrics['base']
  losses, example_base = jaxrw.masked.example_level(step_metrics['losses'], base)
  weights, _ = jaxrw.masked.example_level(step_metrics['weights'], base)
  rows = jnp.stack([jnp.ones_like(losses), losses, weights], axis=1) * example_base[:, None]
  summary = jaxrw.diagnostics.summarize(step_metrics['weights'], base)
  examples = {'example_id': batch['example_id'], 'loss': losses, 'weight': weights}
  if 'row_alignment' in step_metrics:
    examples['target_dot'] = step_metrics['row_alignment']
  return {
    'loss': jaxrw.masked.divide(step_metrics['loss_sum'], step_metrics['base_sum']),
    'weighted_loss': jaxrw.masked.divide(
      step_metrics['weighted_loss_sum'], step_metrics['base_sum']
    ),
    'grad_norm': step_metrics['grad_norm'],
    **summary._asdict(),
    'domains': jaxrw.diagnostics.group_sums(rows, batch['domain_id'], num_domains),
    'examples': examples,
  }


def train(
  config: Any,
  workdir: str | Path,
  *,
  devices: Sequence[Any] | None = None,
  origin: tuple[Mapping[str, Any], str] | None = None,
) -> dict:
  """Trains to `config.total_steps`, resuming whatever `workdir` already holds.

  Args:
    config: a checked config.
    workdir: the run directory.
    devices: None: all there are.
    origin: who set the values of the config; see `provenance.Session`.

  Returns:
    The content of `result.json`; for a run that was finished before, without doing anything.

  Raises:
    UserError: a mistake that the user can fix, before training where it can be seen there.
    NonFiniteError: a loss or gradient was not finite; `abort.json` names the examples.
    StoppedError: it was asked to stop, and has saved a checkpoint.
  """
  started = time.monotonic()
  workdir, primary = Path(workdir), jax.process_index() == 0
  config_lib.check_same_run(workdir, config)
  if (workdir / 'result.json').is_file():
    return files.read_json(workdir / 'result.json')
  run = build(config, devices)
  with (
    files.exclusive(workdir) if primary else contextlib.nullcontext(),
    provenance.Session(run, workdir, versions(), origin, primary) as session,
  ):
    result = _train(run, workdir, primary, session)
    result['seconds'] = time.monotonic() - started
    if primary:
      files.write_json(workdir / 'result.json', result)
  return result


def _train(run: Run, workdir: Path, primary: bool, session: provenance.Session) -> dict:
  """The loop, in a run directory that is this process's own."""
  config = run.config
  if primary:
    config_lib.write(workdir, config)
  for remark in remarks(run):
    say(f'note: {remark}')
  with (
    live_feed.live_feed(config) as live,
    checkpoints_lib.Checkpoints(
      workdir / 'checkpoints',
      keep=config.checkpoint.keep,
      keep_every=config.checkpoint.keep_every,
      best=config.checkpoint.best,
    ) as saver,
    contextlib.ExitStack() as stack,
  ):
    data = pipeline.train_iterator(
      run.corpus,
      batch_size=config.batch_size,
      seed=config.seed,
      proportions=run.proportions,
      live=live,
      max_epochs=config.mixture.max_epochs,
      local_rows=mesh_lib.local_rows(run.mesh),
      prefetch=config.data.prefetch,
    )
    state, start = resume_or_start(run, saver, data)
    session.resumed(start)
    if live is not None:
      live.start(start, state.weighting[mixing.STAGE].queue)
    log = stack.enter_context(
      StepLog(config, run.corpus, run.schedule, workdir, start, flops_per_token(run), primary)
    )
    stop = stack.enter_context(StopRequest())
    evaluated, signals_now = None, None
    for step in range(start + 1, config.total_steps + 1):
      if signals_now is None or (step - 1) % config.target.every == 0:
        signals_now = run.signals(state.params)
      if run.read_domains is not None:
        signals_now['extra'] = run.read_domains(state.params, step - 1)
      state, record = run.train_step(state, run.to_global(next(data)), signals_now)
      if live is not None:
        live.publish(step - 1, record['mixture']['proportions'])
      log.step(step, record, data.get_state()['used'] if log.writes(step) else None)
      last = step == config.total_steps
      evaluates = last or step % config.eval.every == 0
      if evaluates:
        with log.pause():
          evaluated = evaluate(run, state.params, config.eval.split, config.eval.max_blocks)
        log.evaluation(step, evaluated)
      # A resumed run reads its target at once, so a run that has one stops where it would read.
      stopping = stop.at(step) and not (config.target.domain and step % config.target.every)
      if last or stopping or step % config.checkpoint.every == 0:
        with log.pause():
          log.commit()  # which looks at every step before it: a broken state is never saved
          mesh_lib.check_same_everywhere(data.get_state()['used'], 'the plan of the batches')
          scores = evaluated if evaluates else None
          saver.save(step, state, data.get_state(), {'versions': versions()}, scores)
      if stopping and not last:
        saver.wait()
        raise StoppedError(f'saved after step {step}; the same command goes on from there')
    saver.wait()
    if evaluated is None:  # killed between the last checkpoint and result.json
      evaluated = evaluate(run, state.params, config.eval.split, config.eval.max_blocks)
    result = summarize_run(run, evaluated, data.get_state())
    if primary and run.mixture is not None:
      found = mixing.answer(run.mixture, state.weighting[mixing.STAGE].mixture, config.mixture.mode)
      made_by = {'method': config.mixture.fn, 'config_hash': result['config_hash']}
      path = workdir / mixing.FILE
      mixture_lib.write(path, run.corpus, found, made_by=made_by, epochs=result['epochs'])
  return result


def remarks(run: Run) -> list[str]:
  """What to know about the data of a run before it starts.

  Raises:
    UserError: it needs more data than `config.mixture.max_epochs` allows.
  """
  planned = mixture_lib.planned_examples(
    run.corpus,
    batch_size=run.config.batch_size,
    total_steps=run.config.total_steps,
    proportions=run.proportions,
    max_epochs=run.config.mixture.max_epochs,
  )
  return mixture_lib.remarks(run.config.data.mixture, planned)


def resume_or_start(
  run: Run, saver: checkpoints_lib.Checkpoints, data: Any
) -> tuple[jaxrw.TrainState, int]:
  """(state, finished steps): the newest good checkpoint, or `init_from`, or fresh parameters."""
  if saver.latest_step() is not None:
    state, data_state, _ = saver.restore(run.abstract_state)
    data.set_state(data_state)
    step = int(state.step)
    say(f'resuming after step {step}')
    return state, step
  state = run.init()
  if source := run.config.checkpoint.init_from:
    state = state._replace(params=None)  # so that there are never two sets of parameters
    if hf.is_folder(source):
      params = hf.load(source, run.model, run.abstract_state.params)
    else:
      params = checkpoints_lib.restore_params(source, run.abstract_state.params)
    state = state._replace(params=params)
    say(f'parameters from {source}')
  return state, 0


def evaluate(run: Run, params: Any, split: str, max_blocks: int = 0) -> dict[str, Any]:
  """Per-domain losses and bits per byte on held-out blocks; see `language.summarize`."""
  batches = pipeline.eval_batches(
    run.corpus,
    split=split,
    batch_size=run.config.eval.batch_size,
    max_blocks=max_blocks,
    local_rows=mesh_lib.local_rows(run.mesh),
  )
  return language.evaluate(run.eval_step, params, batches, run.to_global, run.corpus.domains)


def summarize_run(
  run: Run, evaluated: dict[str, Any], data_state: Mapping[str, Any]
) -> dict[str, Any]:
  """The content of `result.json`, but for the seconds it took."""
  corpus, config = run.corpus, run.config
  floor = corpus.meta['bigram_floor']
  sizes = corpus.sizes('train')
  return {
    'status': 'done',
    'steps': config.total_steps,
    'tokens': config.total_steps * config.batch_size * corpus.seq_len,
    'num_params': run.model.num_params(),
    'final': evaluated,
    'bigram_floor': floor,
    'bigram_floor_macro': float(np.mean(list(floor.values()))),
    'epochs': {
      name: float(used / max(size, 1))
      for name, used, size in zip(corpus.domains, data_state['used'], sizes)
    },
    'corpus': {
      'fingerprint': corpus.fingerprint,
      'domains': list(corpus.domains),
      'sizes': sizes.tolist(),
    },
    'config_hash': config_lib.config_hash(config),
    'versions': versions(),
    'devices': f'{run.mesh.devices.size} x {run.mesh.devices.flat[0].device_kind}',
  }


def versions() -> dict[str, str]:
  """Versions of what computes the numbers."""
  found = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'jaxrw': jaxrw.__version__, 'python': platform.python_version(), **found}


def flops_per_token(run: Run) -> int:
  """Useful FLOPs to train on one token, the numerator of MFU."""
  return run.model.flops_per_token(run.corpus.seq_len)


def say(message: str) -> None:
  """Prints on one process only."""
  if jax.process_index() == 0:
    print(message, flush=True)
