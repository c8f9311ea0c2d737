"""The cases: input, our answer, and the peer's from its own environment."""

from __future__ import annotations

import functools
import gzip
import json
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import lm
from experiments import stats
from experiments.data import readers
from experiments.errors import UserError
from experiments.value import text
from jaxrw import attribution, valuation
from jaxrw.scores import dsir

WORKERS = Path(__file__).parent / 'workers'
# What pip installs for each peer. ragbooster declares torch and more for a part that is not used.
REQUIREMENTS = {
  'pydvl': ['pydvl==0.10.0'],
  # From 3.10 on nltk's words end before a superscript digit, as in m³.
  'data_selection': ['data-selection==1.0.3', 'nltk<3.10'],
  'ragbooster': ['--no-deps', 'ragbooster==0.1.1', 'numpy>=2,<3'],
  # dattri does not declare torch, which it needs.
  'dattri': ['dattri==0.3.0', 'torch==2.14.1'],
  'kronfluence': ['kronfluence==1.0.1', 'torch==2.14.1'],
}


class Case(NamedTuple):
  """A comparison.

  Attributes:
    peer: environment and worker, or None.
    inputs: corpus folder or None -> arrays.
    ours: arrays -> answer, a dict of arrays.
    difference: (ours, the peer's) -> number.
    note: what was compared.
  """

  peer: str | None
  inputs: Callable[[Path | None], dict[str, Any]]
  ours: Callable[[dict[str, Any]], dict[str, np.ndarray]]
  difference: Callable[[dict[str, Any], dict[str, Any]], float] | None
  note: Callable[[dict[str, Any], dict[str, Any], float], str]


def run(name: str, folder: Path, corpus: Path | None) -> dict[str, Any]:
  """Times of both and the difference of their answers."""
  case = CASES[name]
  inputs = case.inputs(corpus)
  seconds = []
  for _ in range(2):
    begun = time.perf_counter()
    answer = jax.block_until_ready(case.ours(inputs))
    seconds.append(time.perf_counter() - begun)
  answer = {key: np.asarray(value) for key, value in answer.items()}
  theirs, peer_seconds, difference = {}, None, None
  if case.peer:
    theirs, peer_seconds = run_peer(case.peer, name, inputs, folder)
    difference = case.difference(answer, theirs) if case.difference else None
  return {
    'peer': case.peer or 'none',
    'peer_s': peer_seconds,
    'first_s': seconds[0],
    'second_s': seconds[1],
    'difference': difference,
    'note': case.note(inputs, answer | {'peer': theirs}, seconds[1]),
  }


def run_peer(
  peer: str, case: str, inputs: dict[str, Any], folder: Path
) -> tuple[dict[str, np.ndarray], float]:
  """(answer, seconds) of a peer, from workers/PEER.py in its environment."""
  python = environment(peer, folder / 'environments' / peer)
  given, taken = folder / f'{case}.in.npz', folder / f'{case}.out.npz'
  np.savez(given, **inputs)
  # -P: the worker's folder has modules of the packages' names.
  command = [python, '-P', WORKERS / f'{peer}.py', case, given.resolve(), taken.resolve()]
  done = subprocess.run([*map(str, command)], capture_output=True, text=True)
  if done.returncode:
    raise UserError(f'{peer} failed on {case}:\n{done.stderr[-2000:]}')
  with np.load(taken, allow_pickle=False) as arrays:
    answer = dict(arrays)
  given.unlink()
  taken.unlink()
  return answer, float(answer.pop('seconds'))


def environment(peer: str, folder: Path) -> Path:
  """Python of the peer's virtual environment, which is made if it is missing."""
  python = folder / ('Scripts/python.exe' if sys.platform == 'win32' else 'bin/python')
  if not (folder / 'complete').exists():
    venv.create(folder, clear=True, with_pip=True)
    wanted = REQUIREMENTS[peer]
    command = [str(python), '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise UserError(f'cannot install {" ".join(wanted)}: {done.stderr.strip()[-500:]}')
    (folder / 'complete').touch()
  return python


# KNN-Shapley --------------------------------------------------------------------------------------


def neighbors_input(_: Path | None, n: int = 2000, m: int = 500) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  return {
    'x': rng.normal(size=(n, 16)), 'y': rng.integers(0, 2, n),
    'test_x': rng.normal(size=(m, 16)), 'test_y': rng.integers(0, 2, m),
    'neighbors': 5,
  }  # fmt: skip


def neighbors_ours(a: dict[str, Any]) -> dict[str, Any]:
  values = valuation.knn_shapley(
    *(jnp.asarray(a[key]) for key in ('x', 'y', 'test_x', 'test_y')), a['neighbors']
  )
  return {'values': values}


def few_neighbors_input(_: Path | None) -> dict[str, Any]:
  """A tenth of the test points: dattri's loops are in Python."""
  return neighbors_input(_, m=50)


# Truncated Monte Carlo ----------------------------------------------------------------------------


def points_input(_: Path | None, n: int = 80, m: int = 200) -> dict[str, Any]:
  """A fifth of the labels are flipped."""
  rng = np.random.default_rng(1)
  line = rng.normal(size=5)
  x, test_x = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
  flipped = rng.permutation(n) < n // 5
  label = lambda x: (x @ line > 0).astype(int)
  return {
    'x': x, 'y': np.where(flipped, 1 - label(x), label(x)), 'flipped': flipped,
    'test_x': test_x, 'test_y': label(test_x), 'permutations': 12, 'truncation': 0.0,
  }  # fmt: skip


def truncated_points_input(_: Path | None) -> dict[str, Any]:
  """Both give up an order at the first accuracy within 5% of that with all points."""
  return points_input(None) | {'truncation': 0.05}


def points_ours(a: dict[str, Any]) -> dict[str, Any]:
  found = valuation.permutation_values(
    jax.random.key(0), _game(), len(a['x']), permutations=a['permutations'],
    truncation=a['truncation'], patience=0, together=a['permutations'],
    chunk=8 if a['truncation'] else 80,
  )  # fmt: skip
  return {'values': found.mean, 'calls': np.asarray(found.calls)}


@functools.cache
def _game() -> valuation.Utility:
  """One function for all calls, which is compiled once."""
  a = points_input(None)
  arrays = [jnp.asarray(a[k], jnp.float32) for k in ('x', 'y', 'test_x', 'test_y')]
  return functools.partial(logistic_accuracy, *arrays)


def points_note(a: dict[str, Any], answer: dict[str, Any], _: float) -> str:
  ours, peer = (stats.auc(-r['values'], a['flipped']) for r in (answer, answer['peer']))
  return (
    f'{int(answer["calls"])} fits, AUC of flipped {ours:.3f}; '
    f'of the peer {int(answer["peer"]["calls"])} fits, {peer:.3f}'
  )


def logistic_accuracy(x, y, test_x, test_y, present) -> jax.Array:
  """Test accuracy of scikit-learn's LogisticRegression() on the points that are present, by eight
  steps of Newton's method; 0 with fewer than two classes."""
  design = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
  penalty = (
    jnp.ones(design.shape[1]).at[-1].set(1e-6)
  )  # of the intercept: none, but for the inverse

  def step(w, _):
    p = jax.nn.sigmoid(design @ w)
    slope = design.T @ (present * (p - y)) + penalty * w
    curve = (design * (present * p * (1 - p))[:, None]).T @ design + jnp.diag(penalty)
    return w - jnp.linalg.solve(curve, slope), None

  w, _ = jax.lax.scan(step, jnp.zeros(design.shape[1]), length=8)
  right = ((test_x @ w[:-1] + w[-1] > 0) == (test_y > 0.5)).mean()
  both = (jnp.sum(present * y) > 0) & (jnp.sum(present * (1 - y)) > 0)
  return jnp.where(both, right, 0.0)


# DSIR ---------------------------------------------------------------------------------------------


def documents(folder: Path) -> Iterator[str]:
  found = sorted([*folder.glob('*.jsonl'), *folder.glob('*.jsonl.gz')])
  if not found:
    raise UserError(f'--corpus={folder} has no .jsonl or .jsonl.gz files')
  for path in found:
    with gzip.open(path, 'rt') if path.suffix == '.gz' else path.open() as lines:
      yield from (json.loads(line)['text'] for line in lines if line.strip())


def corpus_input(folder: Path | None, megabytes: float = 4.2) -> dict[str, Any]:
  """Every so manyth document of the folder, or drawn ones with Zipf's law over 50,000 words."""
  if folder:
    texts = list(documents(folder))
    texts = texts[:: max(1, round(sum(map(len, texts)) / (megabytes * 1e6)))]
  else:
    rng = np.random.default_rng(2)
    words = [''.join(rng.choice(list('etaoinshrdlu'), rng.integers(2, 11))) for _ in range(50_000)]
    draw = lambda: ' '.join(words[min(i, 50_000) - 1] for i in rng.zipf(1.2, 500)) + '.'
    texts = [draw() for _ in range(round(megabytes * 1e6 / 3500))]
  parts = [t.encode('utf8', 'surrogatepass') for t in texts]
  return {
    'bytes': np.frombuffer(b''.join(parts), np.uint8), 'sizes': np.array([*map(len, parts)]),
    'target': max(1, len(texts) // 20),
  }  # fmt: skip


def large_corpus_input(folder: Path | None) -> dict[str, Any]:
  return corpus_input(folder, megabytes=84)


def corpus_ours(a: dict[str, Any]) -> dict[str, Any]:
  ends = np.cumsum(a['sizes'])
  parts = [a['bytes'][i:j].tobytes() for i, j in zip(ends - a['sizes'], ends)]
  texts = [part.decode('utf8', 'surrogatepass') for part in parts]
  hasher = dsir.Hasher(remembered=1 << 24 if len(a['bytes']) > 5e7 else 1 << 22)
  raw = hasher.hash(texts)
  ratio = dsir.log_ratio(hasher.count(texts[: a['target']]), raw.count())
  return {'values': raw.score(ratio).log_weights}


def corpus_note(a: dict[str, Any], answer: dict[str, Any], seconds: float) -> str:
  size = len(a['bytes']) / 1e6
  return f'{size:.1f} MB; both steps {size / seconds:.1f} MB/s, nothing remembered before'


# Retrieval ----------------------------------------------------------------------------------------


def lists_input(_: Path | None, queries: int = 20_000, sources: int = 100_000) -> dict[str, Any]:
  rng = np.random.default_rng(3)
  return {
    'ids': rng.integers(0, sources, (queries, 100), dtype=np.int32),
    'utilities': rng.integers(0, 2, (queries, 100), dtype=np.int8),
    'sources': sources, 'neighbors': 20, 'rate': 100.0, 'steps': 1,
  }  # fmt: skip


def lists_ours(a: dict[str, Any]) -> dict[str, Any]:
  presence = valuation.learn_importance(
    jnp.asarray(a['ids']), jnp.asarray(a['utilities'], float), a['sources'], a['neighbors'],
    rate=a['rate'], steps=a['steps'],
  )  # fmt: skip
  return {'values': presence}


def large_input(_: Path | None) -> dict[str, Any]:
  return lists_input(None, 1_000_000, 1_000_000) | {'steps': 10}


# EK-FAC -------------------------------------------------------------------------------------------

_GPT = text.Settings(width=64, heads=4, layers=2, length=48, examples=512, steps=96, batch=64)


def gpt_input(_: Path | None, queries: int = 20) -> dict[str, Any]:
  """A small GPT, trained for a minute on the embedded corpus, and pieces of text."""
  data = text.read(readers.open_source(lm.get_config().data), _GPT)
  trainer = text.Trainer(_GPT, data)
  path = trainer.run(0, trainer.rows(0), jnp.ones(_GPT.examples))
  leaves = jax.tree_util.tree_leaves_with_path(path)
  params = {'/'.join(k.key for k in keys): np.asarray(leaf[-1]) for keys, leaf in leaves}
  held = data.targets.reshape(-1, data.targets.shape[-1])
  return params | {
    'train': data.train, 'queries': held[:: len(held) // queries][:queries],
    'heads': _GPT.heads, 'layers': _GPT.layers, 'batch': _GPT.batch,
  }  # fmt: skip


def gpt_ours(a: dict[str, Any]) -> dict[str, Any]:
  params: dict[str, Any] = {}
  for name, value in a.items():
    *folders, leaf = name.split('/')
    if folders or leaf in ('tokens', 'places'):
      functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, params)[leaf] = value
  params = jax.tree.map(lambda value: jnp.asarray(value, float), params)
  tokens = jnp.asarray(a['train'])
  batches = [
    {'tokens': t, 'labels': t[:, 1:]} for t in jnp.split(tokens, len(tokens) // a['batch'])
  ]
  factors = attribution.ekfac(jax.random.key(0), gpt_forward, params, batches, labels='given')
  return {'values': _pairs(factors, params, tokens, jnp.asarray(a['queries']))}


def gpt_forward(params, layer, batch) -> jax.Array:
  return text.forward(_GPT, params, layer, batch)


@jax.jit
def _pairs(factors, params, tokens, queries) -> jax.Array:
  """Influence of every training piece on every query, float[M, n]; losses are sums over bytes."""
  total = lambda p, t: _GPT.length * text.example_losses(_GPT, p, t)[0]
  slopes = jax.lax.map(lambda q: jax.grad(total)(params, q[None]), queries)
  solved = jax.vmap(functools.partial(attribution.ekfac_solve, factors))(slopes)
  batch = {'tokens': tokens, 'labels': tokens[:, 1:]}
  return attribution.linear_products(gpt_forward, params, batch, solved)


def gpt_note(a: dict[str, Any], answer: dict[str, Any], seconds: float) -> str:
  pairs = zip(answer['values'], answer['peer']['values'])
  ranks = [stats.rank_correlation(one, other) for one, other in pairs]
  return f'difference of the largest score; rank correlation {min(ranks):.5f} or more'


def _relative(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
  return _largest(ours, theirs) / float(np.abs(theirs['values']).max())


def answer_type() -> str:
  """float32, or float64 with JAX_ENABLE_X64=1."""
  return str(jnp.zeros(()).dtype)


def _largest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
  return float(np.abs(ours['values'] - theirs['values']).max())


CASES = {
  'knn_shapley': Case(
    'pydvl',
    neighbors_input,
    neighbors_ours,
    _largest,
    lambda *_: f'{answer_type()} against float64',
  ),
  'knn_shapley_slice': Case(
    'dattri',
    few_neighbors_input,
    neighbors_ours,
    _largest,
    lambda *_: f'{answer_type()} against float32',
  ),
  'tmc_shapley': Case('pydvl', points_input, points_ours, None, points_note),
  'tmc_shapley_truncated': Case('pydvl', truncated_points_input, points_ours, None, points_note),
  'dsir': Case('data_selection', corpus_input, corpus_ours, _largest, corpus_note),
  'dsir_large': Case('data_selection', large_corpus_input, corpus_ours, _largest, corpus_note),
  'retrieval': Case(
    'ragbooster', lists_input, lists_ours, _largest, lambda *_: f'{answer_type()} against float64'
  ),
  'ekfac': Case('kronfluence', gpt_input, gpt_ours, _relative, gpt_note),
  'retrieval_large': Case(None, large_input, lists_ours, None, lambda *_: '100M items, 10 steps'),
}
