"""The mixture of a run: which method, what it is told of the run, and what it recommends."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxrw
from experiments import config as config_lib
from experiments.data import mixture as mixture_lib
from experiments.data import readers, resemblance
from experiments.data.corpus import Corpus
from experiments.errors import UserError
from jaxrw import mixtures

STAGE = 'mixture'  # of the chain, and of its state
FILE = 'mixture.json'  # what a run recommends, in its directory


class Context(NamedTuple):
  """What a run offers to its method."""

  sizes: np.ndarray  # blocks of each domain; 0 for those that data.mixture leaves out
  shares: np.ndarray  # what data.mixture says
  rows: int  # of the whole run
  learning_rate: Callable[[Any], Any]
  mode: str
  lag: int
  every: int
  seed: int
  # The domain with a share that each block of the target set resembles most; read when called.
  resembled: Callable[[], np.ndarray]
  basis: np.ndarray | None  # rows on the simplex over the domains; see `read_basis`

  @property
  def num_domains(self) -> int:
    return self.sizes.size

  @property
  def acts(self) -> dict[str, Any]:
    """The arguments `mode` and `sampled` of a method that may act either way."""
    return {'mode': self.mode} | ({'sampled': self.shares} if self.mode == 'weigh' else {})

  def ahead(self, schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A schedule told at a step what holds for the batch that is drawn by it."""
    return (lambda step: schedule(step + self.lag)) if self.mode == 'sample' else schedule


def temperature(run: Context, tau: float) -> mixtures.Mixture:
  """sizes^(1 / tau): 1 is proportional, large is uniform."""
  return mixtures.scheduled(run.sizes, tau, **run.acts)


def cooldown(
  run: Context, switch_step: int, tau_high: float = 5.0, tau_low: float = 1.0
) -> mixtures.Mixture:
  """`temperature`, high before a step and low from it on."""
  return mixtures.scheduled(
    run.sizes, run.ahead(mixtures.cooldown(switch_step, tau_high, tau_low)), **run.acts
  )


def dense_cooldown(
  run: Context, steps: int, tau_high: float = 5.0, tau_low: float = 1.0, begin: int = 0
) -> mixtures.Mixture:
  """`temperature`, falling from high to low over `steps` steps."""
  schedule = mixtures.dense_cooldown(steps, tau_high, tau_low, begin=begin)
  return mixtures.scheduled(run.sizes, run.ahead(schedule), **run.acts)


def unimax(run: Context, epochs: float) -> mixtures.Mixture:
  """As uniform as a number of epochs allows."""
  _sampling_only(run, 'unimax')
  return mixtures.fixed(mixtures.unimax_probs(run.sizes, run.rows, epochs))


def importance(run: Context) -> mixtures.Mixture:
  """As often as a domain is the one that a block of the target resembles most."""
  p = mixtures.importance_mixture(run.resembled(), run.num_domains)
  return mixtures.fixed(p) if run.mode == 'sample' else mixtures.fixed(run.shares, p)


def dga(run: Context, rate: float, basis: str = '', **arguments: Any) -> mixtures.Mixture:
  """Towards the domains, or mixtures of them, whose gradient agrees with that of the target."""
  if run.basis is None:
    return mixtures.dga(run.num_domains, rate, start=run.shares, **run.acts, **arguments)
  _sampling_only(run, 'dga with a basis')
  return mixtures.on_basis(mixtures.dga(len(run.basis), rate, **arguments), run.basis)


def doge(run: Context, **arguments: Any) -> mixtures.Mixture:
  """Towards the domains whose gradient lowers the loss of the target domains."""
  return mixtures.doge(
    run.num_domains, run.learning_rate, start=run.shares, **run.acts, **arguments
  )


def doremi(run: Context, **arguments: Any) -> mixtures.Mixture:
  """Towards the domains that are furthest above config.reference."""
  return mixtures.doremi(run.num_domains, start=run.shares, **run.acts, **arguments)


def group_dro(run: Context, **arguments: Any) -> mixtures.Mixture:
  """Towards the domains of largest loss."""
  return mixtures.group_dro_mixture(run.num_domains, start=run.shares, **run.acts, **arguments)


def odm(run: Context, **arguments: Any) -> mixtures.Mixture:
  """The Exp3 bandit, whose reward is the loss."""
  _sampling_only(run, 'odm')
  return mixtures.odm(run.num_domains, **arguments)


def ado(run: Context, lowest_loss: float = 0.05, **arguments: Any) -> mixtures.Mixture:
  """By the losses' power laws: towards the domains whose loss still falls fastest.

  The official wall under a law's floor is 1.65 nats, which a loss per byte can fall below.
  """
  _every_step(run, 'ado')
  low, high = mixtures.WALLS
  walls = low._replace(log_floor=math.log(lowest_loss)), high
  return mixtures.ado(run.num_domains, run.shares, walls=walls, **run.acts, **arguments)


def aioli(run: Context, **arguments: Any) -> mixtures.Mixture:
  """By short bursts on single domains, which measure how domains help each other."""
  _sampling_only(run, 'aioli')
  _every_step(run, 'aioli')
  # Losses are read before a step, so the stage's step s is told what holds after step s - 1.
  arguments.setdefault('seed', run.seed)
  own = mixtures.aioli(run.num_domains, lag=run.lag + 1, start=run.shares, **arguments)
  update = lambda state, *, step, **signals: own.update(state, step=step - 1, **signals)
  return own._replace(update=update)


def aioli_measures(config: Any, num_domains: int) -> Callable[[int], bool]:
  """(finished steps) -> whether `aioli` wants to know the losses before the next step."""
  names = ('round_steps', 'rounds_of_bursts', 'burst_steps', 'warmup_steps')
  schedule = {name: config.mixture.args[name] for name in names if name in config.mixture.args}
  lag = config.mixture.lag + 1
  return lambda steps: bool(mixtures.aioli_measures(steps - 1, num_domains, lag=lag, **schedule))


METHODS: dict[str, Callable[..., mixtures.Mixture]] = {
  method.__name__: method
  for method in (
    temperature,
    cooldown,
    dense_cooldown,
    unimax,
    importance,
    dga,
    doge,
    doremi,
    group_dro,
    odm,
    ado,
    aioli,
  )
}


def make_mixture(config: Any, run: Context) -> mixtures.Mixture | None:
  """The method that `config.mixture.fn` names, or None.

  Raises:
    UserError: no such method, arguments that it refuses, or a floor that would bring back a domain
      which data.mixture leaves out.
  """
  name, arguments = config.mixture.fn, config.mixture.args.to_dict()
  if not name:
    return None
  check_method(name, arguments)
  left_out = np.any(run.shares == 0) and run.basis is None  # whose floor is over its mixtures
  spreads = arguments.get('floor') if name != 'ado' else 0
  if left_out and (name in ('odm', 'aioli') or spreads or arguments.get('smoothing')):
    raise UserError(
      f'config.mixture.fn={name!r} gives every domain a share, but data.mixture leaves some out: '
      'leave them out with data.domains as well, or set the floor (smoothing) to 0'
    )
  if name == 'doremi' and left_out:
    arguments.setdefault('smoothing', 0.0)
  try:
    return METHODS[name](run, **arguments)
  except (TypeError, ValueError, ArithmeticError) as error:
    raise UserError(f'config.mixture.args of {name!r}: {config_lib.one_line(error)}') from error


def check_method(name: str, arguments: dict[str, Any]) -> None:
  """What can be known without data.

  Raises:
    UserError: no such method, or an argument that it does not take.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, 1)
    hint = f'did you mean {near[0]!r}? ' if near else ''
    raise UserError(f'config.mixture.fn={name!r}: {hint}known: {", ".join(METHODS)}')
  takes = _arguments(name)
  for argument in arguments:
    if argument not in takes:
      raise UserError(
        f'config.mixture.args.{argument}: {name!r} takes {", ".join(takes) or "no arguments"}'
      )


def _arguments(name: str) -> list[str]:
  """What the user may set; the rest comes from the run."""
  method = inspect.signature(METHODS[name]).parameters
  names = [n for n, p in method.items() if n != 'run' and p.kind is not p.VAR_KEYWORD]
  if any(p.kind is p.VAR_KEYWORD for p in method.values()):
    factory = getattr(mixtures, {'group_dro': 'group_dro_mixture'}.get(name, name))
    filled_in = (
      'num_domains',
      'learning_rate',
      'every',
      'mode',
      'sampled',
      'start',
      'prior',
      'lag',
      'walls',
    )
    own = inspect.signature(factory).parameters
    names += [n for n in own if n not in (*filled_in, *names)]
  return names


def _every_step(run: Context, name: str) -> None:
  if run.every != 1:
    raise UserError(f'config.mixture.every={run.every}: {name!r} has a schedule of its own: use 1')


def _sampling_only(run: Context, name: str) -> None:
  if run.mode != 'sample':
    raise UserError(f"config.mixture.mode={run.mode!r}: {name!r} acts by sampling alone: 'sample'")


def context(
  config: Any, corpus: Corpus, shares: np.ndarray, learning_rate: Callable[[Any], Any]
) -> Context:
  """What the run of a config offers to its method."""
  return Context(
    sizes=corpus.sizes('train') * (shares > 0),
    shares=shares,
    rows=config.total_steps * config.batch_size,
    learning_rate=learning_rate,
    mode=config.mixture.mode,
    lag=config.mixture.lag,
    every=config.mixture.every,
    seed=config.seed,
    resembled=lambda: _resembled(config, corpus, shares),
    basis=read_basis(config, corpus, shares),
  )


def basis_files(config: Any) -> list[str]:
  """The mixture files that the method chooses among instead of domains; none as a rule."""
  return [path for path in str(config.mixture.args.get('basis', '')).split('+') if path]


def read_basis(config: Any, corpus: Corpus, shares: np.ndarray) -> np.ndarray | None:
  """The mixtures of `basis_files`, float64[N, G], or None where there are none.

  Raises:
    UserError: a file that does not fit the corpus, or draws a domain that data.mixture leaves out.
  """
  paths = basis_files(config)
  if not paths:
    return None
  basis = np.stack([mixture_lib.read_file(path, corpus) for path in paths])
  for path, row in zip(paths, basis):
    extra = np.flatnonzero((row > 0) & (shares == 0))
    if extra.size:
      raise UserError(
        f'config.mixture.args.basis: {path} draws {corpus.domains[extra[0]]!r}, which '
        f'data.mixture={config.data.mixture!r} leaves out: make the file with that mixture, too'
      )
  return basis


def target_set(config: Any, corpus: Corpus, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which domains are the target (bool[G]), and how many blocks of each to use (int64[G]).

  They are `config.mixture.target`, or all domains with a share. With `target_blocks`, a set is that
  many blocks spread over it: block i of n is `i * size // n`.

  Raises:
    UserError: an unknown target, or one without blocks.
  """
  target, sizes = config.mixture.target, corpus.sizes('train')
  for name in target:
    if name not in corpus.domains:
      raise UserError(
        f'config.mixture.target: no domain {name!r}; {readers.known_domains(name, corpus.domains)}'
      )
  chosen = np.isin(corpus.domains, target) if target else shares > 0
  empty = np.flatnonzero(chosen & (sizes < 1))
  if empty.size:
    raise UserError(
      f'config.mixture.target: the domain {corpus.domains[empty[0]]!r} has no training blocks'
    )
  if config.mixture.target_blocks:
    sizes = np.minimum(sizes, config.mixture.target_blocks)
  return chosen, sizes


def _resembled(config: Any, corpus: Corpus, shares: np.ndarray) -> np.ndarray:
  if not config.mixture.target:
    raise UserError(
      f"config.mixture.target is empty: {config.mixture.fn!r} needs a target, 'target=qa'"
    )
  chosen, used = target_set(config, corpus, shares)
  first, sizes = corpus.offsets('train'), corpus.sizes('train')
  ids = [first[g] + np.arange(used[g]) * sizes[g] // used[g] for g in np.flatnonzero(chosen)]
  return resemblance.nearest_domains(corpus, np.concatenate(ids), shares > 0)


def with_mixture(
  weighting: jaxrw.Weighting, mixture: mixtures.Mixture, config: Any
) -> jaxrw.Weighting:
  """The weighting of a run with the stage of its mixture before it."""
  stage = mixtures.mixing(
    mixture,
    lag=config.mixture.lag,
    every=config.mixture.every,
    weigh=config.mixture.mode == 'weigh',
  )
  return jaxrw.chain(**{STAGE: stage, 'weighting': weighting})


def summarize(mixture: mixtures.Mixture, state: mixtures.MixingState) -> dict[str, jax.Array]:
  """What the host wants to know of a mixture after a step.

  Returns:
    proportions, objective: float32[G], q and p; noise: float32[], the gradient noise of weighting
      to p what is drawn by q over that of drawing by p, if all domains' gradients are alike.
  """
  q, p = mixture.proportions(state.mixture), mixture.objective(state.mixture)
  return {'proportions': q, 'objective': p, 'noise': mixtures.second_moment_ratio(p, q)}


def answer(mixture: mixtures.Mixture, state: Any, mode: str) -> np.ndarray:
  """What the method recommends after a run, float64[G] with sum 1: the average over the run where
  the method says so, else its last mixture."""
  if isinstance(state, mixtures.AveragedState):
    found = mixtures.average_proportions(state)
  else:
    found = (mixture.objective if mode == 'weigh' else mixture.proportions)(state)
  found = np.asarray(found, np.float64)
  return found / found.sum()
