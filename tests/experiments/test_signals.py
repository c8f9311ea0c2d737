"""Weightings that need more than losses, reached from a config alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from configs import common
from experiments import compare, dry_run, signals, train
from experiments.errors import UserError
from experiments.models import gpt2, lm
from tests.experiments import small


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return small.write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture
def config(corpus, tmp_path):
  return small.config(corpus, tmp_path / 'root', steps=2)


def _first_step(run):
  """(metrics of the library's step on some batch, the batch, the initial state)."""
  state, batch = run.init(), dry_run.any_batch(run)
  _, metrics = jax.jit(run.step)(state, batch, run.signals(state.params))
  return metrics, batch, state


def test_tables_take_their_size_from_the_corpus(config):
  config.weighting = ('groups', 'examples')
  config.w = dict(groups=dict(fn='group_dro', rate=0.1), examples=dict(fn='row_shuffled'))
  config.w.examples = dict(fn='row_shuffled', stage=dict(fn='group_dro'))
  weighting = signals.make_weighting(config, num_groups=5)
  assert all(leaf.shape == (5,) for leaf in jax.tree.leaves(weighting.init()))
  config.w.groups.num_groups = 3  # what the config says wins
  config.weighting, config.w = ('groups',), dict(groups=config.w.groups)
  weighting = signals.make_weighting(config, num_groups=5)
  assert jax.tree.leaves(weighting.init())[0].shape == (3,)


def test_group_dro_trains_resumes_and_saves_its_state(config, tmp_path):
  common.set_arm(config, 'group_dro:rate=0.5')
  config.w.loss.start = 0
  whole = train.train(config, tmp_path / 'whole')
  assert whole['status'] == 'done'
  run = train.build(config)
  saver = train.checkpoints_lib.Checkpoints(tmp_path / 'whole' / 'checkpoints')
  state, *_ = saver.restore(run.abstract_state)
  (log_q,) = jax.tree.leaves(state.weighting)
  assert log_q.shape == (2,)
  assert log_q[1] > log_q[0]  # the second domain is random letters
  saver.close()


@pytest.mark.slow
def test_the_reference_gives_its_losses(config, corpus, tmp_path):
  reference = small.config(corpus, tmp_path / 'root', steps=2)
  reference.model.n_embd, reference.seed = 16, 7  # another size, another start
  train.train(reference, tmp_path / 'reference')
  config.reference = str(tmp_path / 'reference')
  common.set_arm(config, 'token_topk:share=0.6')
  config.w.loss.start = 0
  run = train.build(config)
  metrics, batch, state = _first_step(run)
  theirs = gpt2.GPT2Config.from_config(
    reference.model, vocab_size=run.model.vocab_size, seq_len=config.data.seq_len
  )
  expected = jaxrw.token_topk_weights(
    lm.token_losses(state.params, batch, run.model),
    lm.token_losses(run.signals(state.params)['reference'], batch, theirs),
    0.6,
    base=metrics['base'],
  )
  agree = np.mean(np.isclose(metrics['weights'], expected, rtol=1e-3))
  assert agree > 0.99  # a token at the threshold may fall on either side of it
  assert 0.55 < np.mean(np.asarray(metrics['weights'])[np.asarray(metrics['base']) > 0] > 0) < 0.65
  assert train.train(config, tmp_path / 'run')['status'] == 'done'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'data.seq_len': 16}, r'data.seq_len is 32 there and 16 here'),
    ({'data.tokenizer': 'bpe:300'}, "data.tokenizer is 'byte' there and 'bpe:300' here"),
  ],
)
def test_a_reference_must_read_the_same_tokens(config, corpus, tmp_path, change, message):
  reference = small.config(corpus, tmp_path / 'root', steps=2)
  train.config_lib.write(tmp_path / 'reference', reference)
  config.reference = str(tmp_path / 'reference')
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    train.build(config)


@pytest.mark.parametrize(
  ('arm', 'message'),
  [
    ('token_topk:share=0.6', "missing .*'ref_losses'.*: set config.reference to a finished run"),
    ('adapt:0.1', "'representation'.*: set config.target.domain"),
    ('learning_to_reweight', "missing .*'alignment'"),
    ('hedge:num_terms=3:rate=0.1', 'does not fit language model training'),
    ('token_topk:share=2', r'share=2 must be in \(0, 1\]'),
    ('trimmed:portion=0.5', 'portion'),
    ('uniform@keep.rows=3@keep.groups=3', '8 rows does not split into groups=3'),
    ('uniform@keep.rows=9', 'rows=9 of each group, but a group has 8'),
    ('uniform@keep.rows=2@keep.groups=2', '2 is not a multiple of the 8 devices.*keep.groups=8'),
    ('uniform@keep.rows=4@keep.reuse=true@microbatches=2@batch_size=16', 'use reuse=False'),
  ],
)
def test_mistakes_are_one_line(config, arm, message):
  common.set_arm(config, arm)
  with pytest.raises(UserError, match=message) as raised:
    train.build(config)
  assert '\n' not in str(raised.value)


@pytest.mark.slow
def test_selective_backward_reaches_the_step(config):
  common.set_arm(config, 'trimmed:share=0.5@keep.rows=4')
  config.w.loss.start = 0
  metrics, *_ = _first_step(train.build(config, jax.devices()[:1]))
  assert metrics['overflow'] == 0
  assert jnp.sum(jnp.any(metrics['weights'] > 0, axis=1)) == 4
  common.set_arm(config, 'trimmed:share=0.75@keep.rows=4')
  config.w.loss.start = 0
  metrics, *_ = _first_step(train.build(config, jax.devices()[:1]))
  assert metrics['overflow'] == 2


@pytest.mark.slow
def test_the_target_is_read_in_the_backward_pass(config):
  config.target.update(domain='hard', blocks=4)
  run = train.build(config)
  metrics, batch, state = _first_step(run)
  direction = run.signals(state.params)['direction']
  losses = lambda params: jnp.mean(lm.token_losses(params, batch, run.model), axis=1)
  _, products = jax.jvp(losses, (state.params,), (direction,))
  mine = np.asarray(metrics['weights'])[:, 0] * products / config.batch_size
  np.testing.assert_allclose(metrics['row_alignment'], mine, rtol=2e-3, atol=1e-5)
  config.target.domain = 'herd'
  with pytest.raises(UserError, match=r"no domain 'herd'.*hard"):
    train.build(config)


@pytest.mark.slow
def test_adapt_reads_its_anchors_on_training_blocks_of_the_target(config, tmp_path):
  config.target.update(
    domain='hard', read='representation', blocks=3, every=2
  )  # 3: rows of padding
  common.set_arm(config, 'adapt:0.1')
  config.w.loss.start = 0
  run = train.build(config)
  metrics, batch, state = _first_step(run)

  def unit(tokens, base):
    """Unit vectors of float64 position-weighted means, by a loop."""
    hidden = np.asarray(lm.hidden(state.params, tokens[:, :-1], run.model), np.float64)
    for row, valid in zip(hidden, np.asarray(base) > 0):
      pooled = sum((t + 1) * h for t, h in enumerate(row[valid]))
      yield pooled / np.linalg.norm(pooled)

  first = run.corpus.domains.index('hard')
  size = int(run.corpus.sizes('train')[first])
  ids = [run.corpus.example_id(first, i * size // 3, 'train') for i in range(3)]
  blocks = run.corpus.rows('train', np.array(ids))
  anchor = np.mean(list(unit(blocks['tokens'], blocks['base'])), axis=0)
  np.testing.assert_allclose(run.signals(state.params)['anchor'], anchor, rtol=1e-4, atol=1e-6)
  cosine = np.array([phi @ anchor for phi in unit(batch['tokens'], batch['base'])])
  raw = 1 / (1 + np.exp(-cosine / 0.1))
  np.testing.assert_allclose(metrics['weights'][:, 0], raw / raw.mean(), rtol=1e-3)
  assert train.train(config, tmp_path / 'run')['status'] == 'done'


def test_arms_of_a_comparison_may_change_any_key(config, tmp_path):
  arms = 'uniform@keep.rows=4@keep.sampled=true,uniform@batch_size=4,trimmed:share=0.5@keep.rows=4'
  plan = compare.make_plan(config, arms, '1e-3', 1, 'macro_bpb', str(tmp_path / 'board'))
  names = [plan.unit_folder(arm, 1e-3, 0).name.split('__')[0] for arm in plan.weightings]
  assert names == [
    'uniform-keep.rows-4-keep.sampled-true',
    'uniform-batch-size-4',
    'trimmed-share-0.5-keep.rows-4',
  ]
  assert plan.unit_config(plan.weightings[1], 1e-3, 0).batch_size == 4
  with pytest.raises(UserError, match='rows=40'):
    compare.make_plan(config, 'uniform@keep.rows=40', None, 1, 'macro_bpb', str(tmp_path))
