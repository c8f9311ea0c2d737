"""Scores against one request at a time; rolling windows; two processes; the harness itself."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import common
from experiments import config as config_lib
from experiments import finished, harness, train
from experiments.errors import UserError
from experiments.mesh import make_mesh
from experiments.models import gpt2, llama, lm
from tests.experiments import small

WINDOW, EOT = 40, 49
MODELS = {
  'gpt2': gpt2.GPT2Config(vocab_size=50, max_len=WINDOW, n_layer=2, n_head=4, n_embd=16),
  'llama': llama.LlamaConfig(
    vocab_size=50, max_len=WINDOW, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, d_ff=24
  ),
}


@functools.cache
def host_params(model):
  params = jax.jit(functools.partial(lm.init, cfg=model))(jax.random.key(0))
  noise = lambda leaf: 0.3 * np.random.default_rng(leaf.size).standard_normal(leaf.shape)
  return jax.tree.map(lambda leaf: np.asarray(leaf + noise(leaf), np.float32), params)


def scorer(model, mesh, batch_size=8):
  placed = lambda x, to: jax.make_array_from_callback(x.shape, to.sharding, lambda i: x[i])
  params = jax.tree.map(placed, host_params(model), lm.abstract(model, mesh))
  run = finished.Finished(
    config=SimpleNamespace(data=SimpleNamespace(seq_len=WINDOW)),
    tokenizer=SimpleNamespace(eot_id=EOT),
    model=model,
    params=params,
  )
  return harness.Scorer(run, mesh, batch_size)


@functools.cache
def program(model):
  return jax.jit(functools.partial(lm.apply, cfg=model))


def log_probs(model, tokens):
  """float64[n, V] of what follows each of n tokens, from a row of its own without padding."""
  padded = np.zeros(WINDOW, np.int32)  # behind the row: the model is causal
  padded[: len(tokens)] = tokens
  logits = np.asarray(program(model)(host_params(model), padded[None]), np.float64)[0]
  logits = logits[: len(tokens)]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def one_at_a_time(model, context, continuation):
  tokens = [*(context or [EOT])]
  total, greedy = 0.0, True
  whole = (tokens + list(continuation))[-(WINDOW + 1) :]
  rows = log_probs(model, whole[:-1])[len(whole) - 1 - len(continuation) :]
  for row, token in zip(rows, continuation, strict=True):
    total += row[token]
    greedy = greedy and token == row.argmax()
  return total, bool(greedy)


def most_likely(model, context, count):
  tokens = list(context)
  for _ in range(count):
    tokens.append(int(log_probs(model, tokens)[-1].argmax()))
  return tokens[len(context) :]


def requests(model):
  """Short and long ones, some with the most likely continuation, one off in its last token."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, EOT, n).tolist()
  pairs = [(draw(a), draw(b)) for a, b in [(3, 2), (1, 1), (0, 4), (20, 13), (30, 10), (39, 1)]]
  pairs += [(draw(60), draw(5)), (draw(200), draw(40)), ([], draw(40)), (draw(5), [])]
  for length in (2, 17, 30):
    context = draw(length)
    best = most_likely(model, context, 6)
    pairs += [(context, best), (context, [*best[:-1], (best[-1] + 1) % EOT])]
  return pairs


@pytest.mark.parametrize('sizes', [(1,), (2, 2, 2)], ids=str)
@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_scores_are_those_of_one_request_at_a_time(model, sizes):
  mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  pairs = requests(model)
  scores = scorer(model, mesh, batch_size=7).score(pairs)
  expected = [one_at_a_time(model, *pair) for pair in pairs]
  np.testing.assert_allclose(
    [total for total, _ in scores], [total for total, _ in expected], rtol=1e-5, atol=1e-4
  )
  assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
  assert [greedy for _, greedy in scores][-6:] == [True, False] * 3


def test_a_context_loses_its_beginning_and_an_empty_one_is_the_end_of_a_document():
  model = MODELS['gpt2']
  scores = scorer(model, make_mesh(devices=jax.devices()[:1])).score
  context, continuation = list(range(45)), [7, 8, 9]
  assert scores([(context, continuation)]) == scores([(context[-38:], continuation)])
  assert scores([(context, continuation)]) != scores([(context[-37:], continuation)])
  assert scores([([], continuation)]) == scores([([EOT], continuation)])


def test_few_programs_are_compiled(monkeypatch):
  one = scorer(MODELS['gpt2'], make_mesh(devices=jax.devices()[:1]))
  shapes, compute = set(), one._compute
  spy = lambda tokens, scored: shapes.add(tokens.shape) or compute(tokens, scored)
  monkeypatch.setattr(one, '_compute', spy)
  one.score([([1] * n, [2]) for n in range(1, 60)])
  assert shapes == {(8, 33), (8, 41)}


def test_a_continuation_that_does_not_fit():
  score = scorer(MODELS['gpt2'], make_mesh(devices=jax.devices()[:1])).score
  with pytest.raises(UserError, match='continuation of 41 tokens does not fit the 40'):
    score([([1], [2] * 41)])


@pytest.mark.parametrize('size', [1, 2, 7, 20])
@pytest.mark.parametrize('length', [0, 1, 6, 7, 8, 20, 21, 99])
def test_windows_score_every_token_once_after_all_that_fits(length, size):
  tokens = list(range(length))
  pairs = harness.windows(tokens, -1, size)
  assert [token for _, continuation in pairs for token in continuation] == tokens
  position = 0
  for context, continuation in pairs:
    assert len(context) + len(continuation) - 1 == min(size, position + len(continuation))
    assert context == [-1, *tokens][: position + 1][-len(context) :]
    position += len(continuation)


# Two processes ----------------------------------------------------------------------------------

TWO = """
import json, sys
from experiments import hosts
from experiments.mesh import make_mesh
index, port = int(sys.argv[1]), sys.argv[2]
hosts.initialize(f'127.0.0.1:{port}', 2, index)
from tests.experiments import test_harness as here
model = here.MODELS['llama']
scorer = here.scorer(model, make_mesh(data=2, fsdp=2))
if index:
  scorer.follow()
else:
  pairs = json.loads(sys.argv[3])
  print(json.dumps([scorer.score(pairs), scorer.score(pairs[:3])]))
  scorer.stop()
"""


@pytest.mark.slow
def test_two_processes_score_as_one_does():
  model = MODELS['llama']
  pairs = requests(model)
  expected = scorer(model, make_mesh(2, 2, devices=jax.devices()[:4])).score(pairs)
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': '2'}
  running = [
    subprocess.Popen(
      [sys.executable, '-c', TWO, str(i), str(port), json.dumps(pairs)],
      env=env,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  answers = json.loads(running[0].communicate(timeout=300)[0].splitlines()[-1])  # Gloo talks
  assert [process.wait(timeout=60) for process in running] == [0, 0]
  for scores, count in zip(answers, (len(pairs), 3), strict=True):
    np.testing.assert_allclose(
      [total for total, _ in scores], [total for total, _ in expected[:count]], rtol=1e-5, atol=1e-5
    )
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected[:count]]


# The program ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The directory of a run of two steps."""
  pytest.importorskip('lm_eval')
  root = tmp_path_factory.mktemp('harness')
  config = small.config(small.write_corpus(root / 'corpus'), root / 'data', steps=2)
  train.train(config, root / 'run')
  return root / 'run'


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'tasks': []}, '--tasks is missing'),
    ({'include_path': 'no/where'}, '--include_path=no/where is not a folder'),
    ({'limit': -1}, '--limit=-1'),
    ({'batch_size': 0}, '--batch_size=0'),
    ({'workdir': ''}, '--workdir is missing'),
    ({}, 'pip install'),
  ],
)
def test_mistakes(tmp_path, monkeypatch, changes, words):
  config_lib.write(tmp_path, common.base_config())
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=words):
    harness.evaluate(**{'workdir': str(tmp_path), 'tasks': ['piqa'], **changes})


CHOICES = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
"""


def questions():
  rng = np.random.default_rng(0)
  word = lambda: ''.join(rng.choice(list('abcdefgh '), rng.integers(3, 9)))
  return [
    {'question': word() * 6, 'choices': [' ' + word() for _ in range(3)], 'answer': i % 3}
    for i in range(20)
  ]


@pytest.fixture
def tasks(tmp_path):
  """A folder with three tasks of our own."""
  folder = tmp_path / 'tasks'
  folder.mkdir()
  for name, lines in (
    ('questions', questions()),
    ('texts', [{'text': q['question'] + ''.join(q['choices'])} for q in questions()[:4]]),
  ):
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  for name, text, data in (
    ('letters', CHOICES, 'questions'), ('text', PERPLEXITY, 'texts'),
    ('writing', WRITING, 'questions'),
  ):  # fmt: skip
    (folder / f'{name}.yaml').write_text(text % (tmp_path / f'{data}.jsonl'))
  return folder


def asked(run, tasks, names):
  """The program as a user runs it, without a network."""
  return subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.harness', f'--workdir={run}', f'--tasks={names}'),
      f'--include_path={tasks}',
    ],
    env={**os.environ, 'HF_HOME': str(tasks / 'cache'), 'HF_HUB_OFFLINE': '1'},
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )


def test_the_harness_counts_what_the_scores_say(run, tasks):
  done = asked(run, tasks, 'letters,text')
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((run / 'harness.json').read_text())['results']
  mesh = make_mesh(devices=jax.devices()[:1])
  opened = finished.open_run(str(run), harness.open_config(str(run)), mesh)
  score = harness.Scorer(opened, mesh, 8).score
  encode = lambda text: opened.tokenizer.encode(text).tolist()
  correct = [
    np.argmax([score([(encode(q['question'].rstrip()), encode(
      q['question'][len(q['question'].rstrip()) :] + choice))])[0][0] for choice in q['choices']])
    == q['answer']
    for q in questions()
  ]  # fmt: skip
  assert results['letters']['acc,none'] == np.mean(correct)
  assert 0 < np.mean(correct) < 1
  nats, size = 0.0, 0
  for q in questions()[:4]:
    tokens = encode(q['question'] + ''.join(q['choices']))
    size += len(tokens)  # one a byte
    pairs = harness.windows(tokens, opened.tokenizer.eot_id, opened.config.data.seq_len)
    assert len(pairs) > 1
    nats -= sum(total for total, _ in score(pairs))
  np.testing.assert_allclose(
    results['text']['bits_per_byte,none'], nats / size / np.log(2), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('names', 'words'), [('writing', 'wants text written'), ('lettres', "did you mean 'letters'")]
)
def test_tasks_that_cannot_be_asked(run, tasks, names, words):
  done = asked(run, tasks, names)
  assert done.returncode == 2, done.stderr[-2000:]
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: --tasks')
  assert words in last


def test_windows_are_those_of_the_harness():
  utils = pytest.importorskip('lm_eval.utils')
  for length in (0, 1, 6, 7, 8, 20, 21, 99):
    for size in (1, 2, 7, 20):
      theirs = utils.get_rolling_token_windows(list(range(length)), -1, size, 1)
      theirs = list(map(utils.make_disjoint_window, theirs))
      assert harness.windows(list(range(length)), -1, size) == theirs
