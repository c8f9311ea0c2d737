"""Drawing from known logits; `sample` and `evaluate` on a real run; their errors."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import evaluate, report_documents, sample
from experiments.errors import UserError
from tests.experiments import small

V, WINDOW = 6, 8


def next_is_plus_one(tokens):
  """A 'model' that is almost certain of (last token + 1) mod V."""
  import jax

  return 20.0 * jax.nn.one_hot((tokens + 1) % V, V)


def generate(logits_fn=next_is_plus_one, prompt=(0,), **changes):
  settings = dict(window=WINDOW, num_tokens=12, temperature=0.0, top_k=0, seed=0)
  without_params = lambda params, tokens: logits_fn(tokens)
  return sample.generate(without_params, (), np.array(prompt), **{**settings, **changes})


def test_continues_past_the_window():
  assert generate().tolist() == [(1 + i) % V for i in range(12)]
  assert generate(prompt=range(11), num_tokens=3).tolist() == [5, 0, 1]  # only the last 8 are seen


def test_sees_the_prompt_in_order_and_nothing_behind_it():
  import jax
  import jax.numpy as jnp

  def count_nonzero(tokens):  # causal: position t counts the tokens up to t that are not 0
    return 20.0 * jax.nn.one_hot(jnp.cumsum(tokens != 0, axis=1) % V, V)

  assert generate(count_nonzero, prompt=(1, 0, 1), num_tokens=3).tolist() == [2, 3, 4]


def test_equal_seeds_draw_equal_tokens():
  import jax.numpy as jnp

  flat = lambda tokens: jnp.zeros((*tokens.shape, V))
  draw = lambda seed: generate(flat, temperature=1.0, num_tokens=40, seed=seed).tolist()
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)


def fixed(tokens):
  import jax.numpy as jnp

  logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]))
  return jnp.broadcast_to(logits, (*tokens.shape, V))


def test_frequencies_follow_temperature():
  drawn = generate(fixed, temperature=1.0, num_tokens=4000)
  np.testing.assert_allclose(
    np.bincount(drawn, minlength=V)[:3] / 4000, [0.5, 0.25, 0.125], atol=0.04
  )
  # At temperature 0.5 probabilities are squared and normalized: 0.5^2 / (sum of squares) = 0.748.
  drawn = generate(fixed, temperature=0.5, num_tokens=4000)
  assert np.mean(drawn == 0) == pytest.approx(0.25 / 0.334, abs=0.04)


def test_top_k_draws_among_k():
  assert set(generate(fixed, temperature=1.0, num_tokens=500, top_k=2).tolist()) == {0, 1}
  assert set(generate(fixed, temperature=1.0, num_tokens=50, top_k=1).tolist()) == {0}
  assert len(set(generate(fixed, temperature=1.0, num_tokens=500, top_k=99).tolist())) > 2


GOOD = dict(num_tokens=5, temperature=1.0, top_k=0, seed=0)


@pytest.mark.parametrize(
  ('change', 'field'),
  [
    ({'num_tokens': 0}, '--num_tokens=0'),
    ({'temperature': -0.1}, '--temperature=-0.1'),
    ({'temperature': float('nan')}, '--temperature=nan'),
    ({'top_k': -1}, '--top_k=-1'),
  ],
)
def test_sample_names_the_wrong_argument(tmp_path, change, field):
  with pytest.raises(UserError, match=field):
    sample.sample(str(tmp_path), '', **{**GOOD, **change})


def test_not_a_run_directory(tmp_path):
  for workdir, message in (('', '--workdir is missing'), (str(tmp_path), 'not a run directory')):
    with pytest.raises(UserError, match=message):
      sample.sample(workdir, '', **GOOD)
    with pytest.raises(UserError, match=message):
      evaluate.evaluate(workdir, split='validation', max_blocks=0)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(config, workdir, result) of a run of four tiny steps."""
  import jax

  from experiments import train

  folder = tmp_path_factory.mktemp('finished')
  config = small.config(small.write_corpus(folder / 'text'), folder / 'prepared', steps=4)
  workdir = str(folder / 'run')
  return config, workdir, train.train(config, workdir, devices=jax.devices()[:1])


def test_evaluating_again_gives_the_same_numbers(finished):
  config, workdir, result = finished
  summary, fingerprint = evaluate.evaluate(
    workdir, split='validation', max_blocks=config.eval.max_blocks
  )
  assert fingerprint == result['corpus']['fingerprint']
  assert summary['bpb'] == pytest.approx(result['final']['bpb'], rel=1e-6)
  everything, _ = evaluate.evaluate(workdir, split='validation', max_blocks=0)
  assert everything['tokens'] > summary['tokens']


def test_unknown_split(finished):
  with pytest.raises(UserError, match='tset'):
    evaluate.evaluate(finished[1], split='tset', max_blocks=1)


def test_a_run_writes_the_same_text_for_the_same_seed(finished):
  write = lambda seed: sample.sample(
    finished[1], 'the ', **{**GOOD, 'num_tokens': 20, 'seed': seed}
  )
  assert write(1) == write(1)
  assert write(1) != write(2)


def test_the_report_finds_the_text_that_a_run_was_trained_on(finished):
  config, _, result = finished
  corpus = report_documents.find_corpus(result['corpus']['fingerprint'], config.data.root)
  assert corpus.describe(0)['domain'] == 'easy'
  assert report_documents.find_corpus('another', config.data.root) is None


def test_summary_table_has_a_row_for_every_domain():
  summary = {
    'bpb': {'code': 2.0, 'docs': 3.0}, 'loss': {'code': 1.4, 'docs': 2.1},
    'ppl': {'code': 4.06, 'docs': 8.17}, 'macro_bpb': 2.5, 'micro_bpb': 2.4,
    'macro_loss': 1.75, 'micro_loss': 1.7,
  }  # fmt: skip
  lines = evaluate.summary_table(summary, {'code': 3.0, 'docs': 4.0}).splitlines()
  assert lines[2].split() == ['code', '2.0000', '3.0000', '1.4000', '4.06']
  assert lines[4].split() == ['macro', 'average', '2.5000', '3.5000', '1.7500']
  assert len(lines) == 6
