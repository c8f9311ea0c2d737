"""A mixture in the training program: its q reaches the planner on time, and survives everything."""

from __future__ import annotations

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from configs import common
from experiments import compiled, domain_reader, files, live_feed, metrics, mixing, train
from experiments.data import mixture as mixture_lib
from experiments.data import pipeline
from experiments.errors import UserError
from experiments.models import gpt2, lm
from jaxrw.mixtures import Planner
from tests.experiments import small

STEPS, LAG = 8, 3


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return small.write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('prepared')


@pytest.fixture
def make(corpus, root):
  """spec of a mixture -> a config of eight steps that uses it."""

  def config(spec):
    value = small.config(corpus, root, steps=STEPS)
    value.model.update(n_layer=1, scan=False)
    common.set_weighting(value, 'uniform')
    common.set_mixture(value, spec)
    return value

  return config


def run(config, workdir, devices=1):
  return train.train(config, workdir, devices=jax.devices()[:devices])


def records(workdir):
  found = metrics.read_jsonl(workdir / 'metrics.jsonl')
  return [{k: v for k, v in r.items() if k != 'wall'} for r in found]


def examples(workdir):
  return metrics.read_jsonl(workdir / 'examples.jsonl')


DGA = f'dga:rate=1:every=2:lag={LAG}:floor=0.1:normalize=cosine:target=hard'


@pytest.fixture(scope='module')
def finished(corpus, root, tmp_path_factory):
  """A run whose mixture moves by gradients; to compare others with."""
  value = small.config(corpus, root, steps=STEPS)
  value.model.update(n_layer=1, scan=False)
  common.set_weighting(value, 'uniform')
  common.set_mixture(value, DGA)
  workdir = tmp_path_factory.mktemp('finished')
  return value, workdir, run(value, workdir)


def test_q_of_a_step_draws_the_batch_lag_steps_later(finished):
  """The examples of the run are those of a planner that is told the logged q, `lag` steps late."""
  config, workdir, result = finished
  built = train.build(config, jax.devices()[:1])
  logged = [r['mixture']['proportions'] for r in records(workdir) if r['kind'] == 'train']
  q = np.array([[r[name] for name in built.corpus.domains] for r in logged])
  assert np.ptp(q[:, 0]) > 0.05, 'the mixture did not move, so this test shows nothing'
  np.testing.assert_array_equal(q[0], q[1])  # every=2
  planner = Planner(built.corpus.sizes('train'), config.batch_size, [0.5, 0.5], config.seed)
  state, offsets = planner.init(), built.corpus.offsets('train')
  for step, record in enumerate(examples(workdir)):
    drawn_by = np.array([0.5, 0.5]) if step < LAG else q[step - LAG].astype(np.float32)
    plan, state = planner.plan(state, drawn_by)
    assert record['example_id'] == (offsets[plan.domain] + plan.index).tolist()
    assert set(record['weight']) == {1.0}  # a mixture that samples leaves the loss alone
  last = records(workdir)[-1] if 'epochs' in records(workdir)[-1] else records(workdir)[-2]
  assert last['epochs'] == pytest.approx(result['epochs'])


def test_what_it_recommends_is_written_by_name(finished, make):
  _, workdir, _ = finished
  stored = files.read_json(workdir / mixing.FILE)
  last = [r for r in records(workdir) if r['kind'] == 'train'][-1]['mixture']['proportions']
  assert stored['weights'] == pytest.approx(last, rel=1e-5)
  assert stored['made_by']['method'] == 'dga'
  follower = make('')
  follower.data.mixture = str(workdir / mixing.FILE)
  built = train.build(follower, jax.devices()[:1])
  np.testing.assert_allclose(built.proportions, list(stored['weights'].values()), rtol=1e-6)


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch):
  """Also where the restart falls between two readings, and with another depth of prefetching."""
  config, workdir, result = finished
  with small.interrupted_after(4, monkeypatch):
    run(config, tmp_path)
  config = config.copy_and_resolve_references()
  config.data.prefetch = 0
  assert run(config, tmp_path)['final'] == result['final']
  assert records(tmp_path) == records(workdir)
  assert examples(tmp_path) == examples(workdir)
  assert files.read_json(tmp_path / mixing.FILE) == files.read_json(workdir / mixing.FILE)


@pytest.mark.slow
def test_eight_devices_draw_the_same_batches(finished, tmp_path):
  config, workdir, _ = finished
  run(config, tmp_path, devices=8)
  ids = lambda folder: [e['example_id'] for e in examples(folder)]
  assert ids(tmp_path) == ids(workdir)


@pytest.mark.slow
def test_weighing_multiplies_by_p_over_q(make, tmp_path):
  """q is what data.mixture says; p starts to act in the step whose losses moved it."""
  config = make('group_dro:mode=weigh:rate=0.5')
  config.data.mixture = 'easy=0.75,hard=0.25'
  run(config, tmp_path)
  built = train.build(config, jax.devices()[:1])
  q = {'easy': 0.75, 'hard': 0.25}
  logged = [r for r in records(tmp_path) if r['kind'] == 'train']
  for step, example in zip(logged, examples(tmp_path)):
    p = step['mixture']['objective']
    assert step['mixture']['proportions'] == pytest.approx(q)
    noise = sum(p[name] ** 2 / q[name] for name in q)
    assert step['mixture']['noise'] == pytest.approx(noise, rel=1e-4)
    for i, weight in zip(example['example_id'], example['weight']):
      name = built.corpus.domains[built.corpus.locate(i)[0]]
      assert weight == pytest.approx(p[name] / q[name], rel=1e-4)
  assert logged[-1]['mixture']['objective']['hard'] > 0.3


def test_a_limit_of_epochs_ends_in_an_error_before_training(make, tmp_path):
  config = make('')
  config.mixture.max_epochs, config.total_steps = 1, 2000
  with pytest.raises(UserError, match=r'config\.mixture\.max_epochs=1: .* records left'):
    run(config, tmp_path)
  assert not (tmp_path / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_nan_alignments_leave_the_mixture_as_it_was(make, tmp_path, monkeypatch):
  """The documented safe behaviour: one bad reading neither ends nor moves it."""
  read = domain_reader.DomainReader.__call__

  def broken(self, params, steps):
    found = read(self, params, steps)
    if steps == 2:
      found['domain_alignment'] = found['domain_alignment'].at[0].set(jnp.nan)
    return found

  monkeypatch.setattr(domain_reader.DomainReader, '__call__', broken)
  run(make(DGA), tmp_path)
  q = [r['mixture']['proportions']['easy'] for r in records(tmp_path) if r['kind'] == 'train']
  assert q[1] == q[2] == q[3] != q[4]
  assert np.all(np.isfinite(q))


EVERY_METHOD = (
  'temperature:tau=2', 'cooldown:switch_step=4', 'dense_cooldown:steps=4', 'unimax:epochs=2',
  'importance:target=hard', 'importance:target=hard:mode=weigh',
  'dga:rate=1', 'dga:rate=1:normalize=mean_norm', 'doge', 'doge:mode=weigh', 'group_dro:mode=weigh',
  'odm', 'ado', 'ado:mode=weigh',
  'aioli:rate=1:round_steps=20:rounds_of_bursts=1:burst_steps=2:share=0.75',
)  # fmt: skip


@pytest.mark.parametrize('spec', EVERY_METHOD)
def test_every_method_fits_into_the_step(make, spec):
  """Traced, not compiled: it is told what it needs, and the state keeps its shapes."""
  run = train.build(make(spec), jax.devices()[:1])
  batch = run.to_global(next(pipeline.eval_batches(run.corpus, split='train', batch_size=8)))
  state, record = jax.eval_shape(run.train_step, run.abstract_state, batch, run.signals(None))
  jax.tree.map(same_shape, state, run.abstract_state)
  assert record['mixture']['proportions'].shape == (2,)
  assert spec.partition(':')[0] in mixing.METHODS


def test_every_method_is_among_them():
  tested = {spec.partition(':')[0] for spec in EVERY_METHOD} | {'doremi'}  # which needs a reference
  assert tested == set(mixing.METHODS)


def same_shape(a, b):
  assert (a.shape, a.dtype) == (b.shape, b.dtype)


# Bad input


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('dgaa:rate=1', r"fn='dgaa': did you mean 'dga'"),
    ('dga:rat=1', 'args.rat: .dga. takes rate, basis, ema'),
    ('dga', "args of 'dga'.*rate"),
    ('dga:rate=-1', 'rate=-1 must be'),
    ('dga:rate=1:target=hart', "no domain 'hart'; did you mean 'hard'"),
    ('odm:mode=weigh', 'acts by sampling alone'),
    ('importance', "mixture.target is empty: 'importance' needs a target"),
    ('importance:target=hart', "no domain 'hart'; did you mean 'hard'"),
    ('dga:rate=1:basis=none.json', 'none.json'),
    ('odm:basis=none.json', 'none.json'),
    ('doremi', 'domain_excess.*config.reference'),
    ('temperature:tau=0', 'tau=0 must be'),
  ],
)
def test_a_mixture_that_cannot_be(make, spec, message):
  with pytest.raises(UserError, match=message) as error:
    train.build(make(spec), jax.devices()[:1])
  assert '\n' not in str(error.value)


def test_a_floor_would_bring_back_a_domain_that_is_left_out(make):
  config = make(DGA)
  config.data.mixture = 'easy=1'
  with pytest.raises(UserError, match='leaves some out'):
    train.build(config, jax.devices()[:1])


@pytest.mark.parametrize('spec', ['dga:rate', ':rate=1', 'dga:fn=odm', 'dga:every=often'])
def test_a_mixture_that_does_not_parse(make, spec):
  with pytest.raises(common.ConfigError):
    make(spec)


def test_a_target_smaller_than_its_batch_is_read_whole_every_time(make):
  config = make(DGA)
  config.mixture.update(target_rows=32, target_blocks=5)
  reader = train.build(config, jax.devices()[:1]).read_domains
  seen = [np.sort(reader.draw(n)[1]['example_id']).tolist() for n in range(3)]
  assert len(set(seen[0])) == 5
  assert seen[0] == seen[1] == seen[2]


# Mixtures that are found by a target, and mixtures of mixtures


@pytest.mark.slow
def test_importance_gives_the_target_the_domain_that_it_resembles(make, tmp_path):
  """A target that is not trained on: all of it resembles the one domain that is left."""
  config = make('importance:target=easy')
  config.data.mixture = 'uniform except easy'
  run(config, tmp_path)
  assert files.read_json(tmp_path / mixing.FILE)['weights'] == {'easy': 0.0, 'hard': 1.0}
  config = make('importance:target=hard:mode=weigh')
  built = train.build(config, jax.devices()[:1])
  state = built.mixture.init()
  np.testing.assert_allclose(built.mixture.proportions(state), [0.5, 0.5])
  assert built.mixture.objective(state)[1] > 0.9


@pytest.fixture
def basis(make, tmp_path):
  """Paths of two mixture files; `basis[0]` draws four blocks of five from 'easy'."""
  corpus = train.build(make(''), jax.devices()[:1]).corpus
  paths = [tmp_path / 'mostly_easy.json', tmp_path / 'hard.json']
  for path, weights in zip(paths, ([0.8, 0.2], [0.0, 1.0])):
    mixture_lib.write(path, corpus, weights, made_by={}, epochs={})
  return paths


@pytest.mark.slow
def test_dga_over_a_basis_moves_between_its_mixtures(make, basis, tmp_path):
  """It is told of the two mixtures, and recommends one of domains between them."""
  spec = f'dga:rate=2:every=2:normalize=cosine:target=hard:basis={basis[0]}+{basis[1]}'
  config = make(spec)
  config.mixture.rows = 5
  run(config, tmp_path / 'run')
  logged = [r['mixture'] for r in records(tmp_path / 'run') if r['kind'] == 'train']
  assert set(logged[0]['domain_alignment']) == {str(path) for path in basis}
  assert set(logged[0]['proportions']) == {'easy', 'hard'}
  hard = [r['proportions']['hard'] for r in logged]
  assert hard[0] >= 0.6  # half of each
  assert hard[-1] > hard[0]
  assert hard[-1] <= 1
  found = files.read_json(tmp_path / 'run' / mixing.FILE)['weights']
  assert found['hard'] == pytest.approx(hard[-1], rel=1e-4)


@pytest.mark.slow
def test_fewer_mixtures_than_domains_see_every_target(tmp_path):
  """Against explicit gradients: the target is the last of three domains, the basis has two rows."""
  folder = small.write_corpus(tmp_path / 'text')
  for split in ('train', 'validation'):
    text = (folder / f'easy.{split}.jsonl').read_text()
    (folder / f'zebra.{split}.jsonl').write_text(text.replace('the', 'zebra'))
  config = small.config(folder, tmp_path / 'data', steps=STEPS)
  config.model.update(n_layer=1, scan=False)
  common.set_weighting(config, 'uniform')
  corpus = train.build(config, jax.devices()[:1]).corpus
  paths = [tmp_path / 'a.json', tmp_path / 'b.json']
  for path, weights in zip(paths, ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5])):
    mixture_lib.write(path, corpus, weights, made_by={}, epochs={})
  spec = f'dga:rate=1:normalize=cosine:target=zebra:basis={paths[0]}+{paths[1]}'
  common.set_mixture(config, spec)
  config.mixture.update(rows=4, target_rows=4)
  built = train.build(config, jax.devices()[:1])
  params = built.init().params
  batch, target = built.read_domains.draw(0)
  found = built.read_domains(params, 0)
  assert set(np.asarray(target['domain_id'])) == {2}
  direction = mean_gradient(built, params, target, 2)
  assert jnp.linalg.norm(direction) > 0
  np.testing.assert_allclose(found['target_grad_norm'], jnp.linalg.norm(direction), rtol=1e-4)
  for row in (0, 1):
    g = mean_gradient(built, params, batch, row)
    np.testing.assert_allclose(found['domain_alignment'][row], g @ direction, rtol=1e-4)
    np.testing.assert_allclose(found['domain_grad_norms'][row], jnp.linalg.norm(g), rtol=1e-4)


def mean_gradient(built, params, batch, domain):
  """Of the mean loss of a domain's rows, flat: one reverse pass, nothing shared with the reader."""
  rows = np.flatnonzero(np.asarray(batch['domain_id']) == domain)
  part = {name: value[rows] for name, value in batch.items()}
  mean = lambda p: jnp.mean(
    jax.vmap(lambda losses, base: jnp.sum(losses * base) / jnp.sum(base))(
      lm.token_losses(p, part, built.model), part['base']
    )
  )
  return jax.flatten_util.ravel_pytree(jax.grad(mean)(params))[0]


def test_a_basis_is_read_on_blocks_that_its_mixtures_draw(make, basis):
  config = make(f'dga:rate=1:basis={basis[0]}+{basis[1]}')
  config.mixture.rows = 5
  one, eight = (train.build(config, jax.devices()[:n]) for n in (1, 8))
  easy = one.corpus.sizes('train')[0]
  for n in range(4):
    batch = one.read_domains.draw(n)[0]
    assert batch['domain_id'].tolist() == [0] * 5 + [1] * 5
    assert (np.asarray(batch['example_id'][:5]) < easy).sum() == 4
    assert (np.asarray(batch['example_id'][5:]) >= easy).all()
    assert eight.read_domains.draw(n)[0]['example_id'].tolist()[:10] == batch['example_id'].tolist()


def test_a_basis_must_fit_what_is_trained_on(make, basis):
  config = make(f'dga:rate=1:basis={basis[0]}+{basis[1]}')
  config.data.mixture = 'uniform except easy'
  with pytest.raises(UserError, match=r"draws 'easy', which .*='uniform except easy'"):
    train.build(config, jax.devices()[:1])
  config = make(f'dga:rate=1:mode=weigh:basis={basis[0]}')
  with pytest.raises(UserError, match=r'dga with a basis.* acts by sampling alone'):
    train.build(config, jax.devices()[:1])


# The reader


@pytest.mark.slow
def test_domains_are_read_on_new_blocks_each_time_and_alike_on_any_mesh(make):
  config = make('dga:rate=1')
  config.mixture.rows = 3
  one, eight = (train.build(config, jax.devices()[:n]) for n in (1, 8))
  first, second = (one.read_domains.draw(n)[0] for n in (0, 1))
  assert np.bincount(first['domain_id']).tolist() == [3, 3]
  assert not set(first['example_id'].tolist()) & set(second['example_id'].tolist())
  again = eight.read_domains.draw(0)[0]
  assert again['example_id'].tolist()[:6] == first['example_id'].tolist()
  params = one.init().params
  np.testing.assert_allclose(
    one.read_domains(params, 0)['domain_alignment'],
    eight.read_domains(eight.init().params, 0)['domain_alignment'],
    rtol=1e-3,
  )


@pytest.mark.slow
def test_readings_are_the_inner_products_of_explicit_gradients(make):
  """Against one gradient for each domain, taken apart, and vdot."""
  config = make('doge')
  config.mixture.rows = 3
  built = train.build(config, jax.devices()[:1])
  params = built.init().params
  batch, target = built.read_domains.draw(0)
  found = built.read_domains(params, 0)

  gradient = lambda batch, domain: mean_gradient(built, params, batch, domain)
  direction = (gradient(target, 0) + gradient(target, 1)) / 2
  for domain in (0, 1):
    g = gradient(batch, domain)
    np.testing.assert_allclose(found['domain_alignment'][domain], g @ direction, rtol=1e-4)
    np.testing.assert_allclose(found['domain_grad_norms'][domain], jnp.linalg.norm(g), rtol=1e-4)
  np.testing.assert_allclose(found['target_grad_norm'], jnp.linalg.norm(direction), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('num_domains', [7, 64])
def test_alignment_with_all_domains_costs_one_gradient(num_domains):
  """Exact FLOPs of the matmuls: K inner products against one gradient of the same rows."""
  model = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257, max_len=32)
  mesh = jax.make_mesh((1, 1), ('data', 'fsdp'), (jax.sharding.AxisType.Auto,) * 2)
  params = jax.eval_shape(lambda: lm.init(jax.random.key(0), model))
  rows = 64
  batch = {
    'tokens': jax.ShapeDtypeStruct((rows, 33), jnp.int32),
    'base': jax.ShapeDtypeStruct((rows, 32), jnp.float32),
    'domain_id': jax.ShapeDtypeStruct((rows,), jnp.int32),
  }
  read = domain_reader.make_read(model, mesh, num_domains)
  mean = lambda params, batch: jnp.mean(lm.token_losses(params, batch, model))
  flops = lambda f, *args: compiled.costs(jax.jit(f).lower(*args).compile()).matmul_flops
  gradient = flops(jax.grad(mean), params, batch)
  whole = flops(read, params, batch, batch)  # the target's gradient and the products
  assert (whole - gradient) / gradient < 1.05


# The feed


def test_the_feed_waits_for_the_step_it_needs_and_for_no_other():
  feed, got = live_feed.Live(lag=2), []
  feed.start(10, np.array([[0.1, 0.9], [0.2, 0.8]]))
  reader = threading.Thread(target=lambda: got.extend(feed(batch)[0] for batch in range(10, 14)))
  reader.start()
  reader.join(0.2)
  assert got == [0.1, 0.2]
  feed.publish(10, jnp.array([0.3, 0.7]))
  feed.publish(11, jnp.array([0.4, 0.6]))
  reader.join(10)
  np.testing.assert_allclose(got, [0.1, 0.2, 0.3, 0.4])


def test_closing_the_feed_ends_the_batches():
  feed = live_feed.Live(lag=1)
  plans = pipeline._Plans(Planner([4], 2, [1.0], 0), 'fingerprint', feed)
  reader = threading.Thread(target=lambda: list(plans))
  reader.start()
  feed.close()
  reader.join(10)
  assert not reader.is_alive()


def test_a_method_that_asks_for_the_impossible_is_one_line():
  feed = live_feed.Live(lag=1)
  feed.start(0, np.array([[np.nan, 1.0]]))
  plans = pipeline._Plans(Planner([4, 4], 2, [1.0, 1.0], 0), 'fingerprint', feed)
  with pytest.raises(UserError, match='proportions must be finite'):
    next(iter(plans))


def test_schedules_hold_for_the_batch_and_not_for_the_step_that_draws_it():
  """cooldown in mode 'sample': with a lag of 8 the state of step 11 is for batch 19."""
  config = types.SimpleNamespace(mixture=types.SimpleNamespace(fn='cooldown', args=None))
  config.mixture.args = types.SimpleNamespace(to_dict=lambda: {'switch_step': 20, 'tau_high': 2.0})
  run = mixing.Context(
    sizes=np.array([900, 100]),
    shares=np.array([0.5, 0.5]),
    rows=1000,
    learning_rate=lambda step: 0.1,
    mode='sample',
    lag=8,
    every=1,
    seed=0,
    resembled=lambda: np.array([0]),
    basis=None,
  )
  mixture = mixing.make_mixture(config, run)
  at = lambda step: mixture.proportions(mixture.update(mixture.init(), step=step))
  np.testing.assert_allclose(at(11), [0.75, 0.25], rtol=1e-6)
  np.testing.assert_allclose(at(12), [0.9, 0.1], rtol=1e-6)
  weighing = mixing.make_mixture(config, run._replace(mode='weigh'))
  p = weighing.objective(weighing.update(weighing.init(), step=19))
  np.testing.assert_allclose(p, [0.75, 0.25], rtol=1e-6)


def test_the_stage_of_a_mixture_comes_first_and_other_stages_normalize_under_it():
  """Domain weights x LinUpper: p/q moves the domains' mass, LinUpper keeps it."""
  stage = jaxrw.mixtures.mixing(jaxrw.mixtures.fixed([0.5, 0.5], [0.9, 0.1]), weigh=True)
  rw = jaxrw.chain(mixture=stage, loss=jaxrw.linupper(0.4))
  losses, ids = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0, 0, 1, 1])
  w, _ = rw.update(
    jnp.ones(4), rw.init(), losses=losses, group_ids=ids, sampling_prob=jnp.full(4, 0.5), step=0
  )
  p_over_q = np.array([1.8, 1.8, 0.2, 0.2])
  own = np.asarray(jaxrw.linupper_weights(losses, 0.4))
  np.testing.assert_allclose(w, p_over_q * own * p_over_q.sum() / (p_over_q * own).sum(), rtol=1e-5)
