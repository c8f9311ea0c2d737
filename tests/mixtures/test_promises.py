"""What every mixture that follows a run promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw.mixtures import odm, online
from tests.mixtures.following import G, run, same, simplex, traced


def counted(rng, name):
  counts = rng.integers(0, 3, G)
  counts[0] = 1
  return {name: rng.gamma(2.0, 1.0, G), 'domain_counts': counts}


def measured(rng):
  return {
    'domain_alignment': rng.normal(size=G),
    'domain_grad_norms': rng.gamma(2.0, 1.0, G),
    'target_grad_norm': np.float32(1.5),
  }


# name: (factory, signals of a step)
METHODS = {
  'dga': (lambda n, **k: online.dga(n, 0.5, ema=0.4, every=2, **k), measured),
  'dga cosine': (
    lambda n, **k: online.dga(n, 0.5, normalize='cosine', ema=0.3, ema_feedback=False, **k),
    measured,
  ),
  'dga mean_norm': (lambda n, **k: online.dga(n, 0.5, normalize='mean_norm', **k), measured),
  'doge': (lambda n, **k: online.doge(n, lambda step: 0.1 / (1 + step), **k), measured),
  'doremi': (
    lambda n, **k: online.doremi(n, 0.3, **{'smoothing': 0.01, **k}),
    lambda rng: counted(rng, 'domain_excess'),
  ),
  'group dro': (
    lambda n, **k: online.group_dro_mixture(n, 0.3, **k),
    lambda rng: counted(rng, 'domain_losses'),
  ),
  'odm': (lambda n: odm(n), lambda rng: counted(rng, 'domain_losses')),
}
USED = {
  'dga': ('domain_alignment',),
  'dga mean_norm': ('domain_alignment', 'domain_grad_norms'),
  'doge': ('domain_alignment', 'domain_grad_norms'),
}
METHOD_CASES = pytest.mark.parametrize('name', METHODS)
FOLLOWS_ALPHA = pytest.mark.parametrize('name', [name for name in METHODS if name != 'odm'])


@functools.cache
def built(name, size=G):
  return METHODS[name][0](size)


def drawn(name, steps, seed=20):
  rng = np.random.default_rng(seed)
  return [METHODS[name][1](rng) for _ in range(steps)]


def driver(signals):
  return next(iter(signals))


@METHOD_CASES
def test_a_restored_state_continues_bit_for_bit(name):
  mixture, signals = built(name), drawn(name, 8)
  whole = run(mixture, signals)
  on_host = jax.tree.map(np.asarray, whole[2])
  restored = jax.tree.map(jnp.asarray, on_host)
  same(run(mixture, signals[3:], restored, first=3)[-1], whole[-1])
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(whole[-1]))


@METHOD_CASES
def test_every_state_is_on_the_simplex_and_moves(name):
  mixture = built(name)
  states = [mixture.init(), *run(mixture, drawn(name, 8))]
  for state in states:
    for view in (mixture.proportions, mixture.objective):
      shares = view(state)
      assert (shares.shape, shares.dtype) == ((G,), jnp.float32)
      assert np.all(np.asarray(shares) >= 0)
      np.testing.assert_allclose(np.sum(shares), 1, rtol=1e-5)
  np.testing.assert_allclose(mixture.objective(states[0]), 1 / G, rtol=1e-6)
  assert np.max(np.abs(mixture.objective(states[-1]) - 1 / G)) > 1e-3


@METHOD_CASES
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_bad_signal_leaves_the_state_as_it_was(name, bad):
  mixture, signals = built(name), drawn(name, 4)
  states = run(mixture, signals)
  for key in set(signals[0]) - {'domain_counts'}:
    if key not in USED.get(name, signals[0]):
      continue
    spoiled = {k: np.array(v, np.float32) for k, v in signals[2].items()}
    spoiled[key].flat[0] = bad  # domain 0 is never absent
    same(run(mixture, [spoiled], states[1], first=2)[0], states[1])
  assert np.all(np.isfinite(mixture.objective(states[1])))


@METHOD_CASES
def test_compiled_and_eager_agree_and_compile_once(name):
  mixture, signals = built(name), drawn(name, 4)
  state = mixture.init()
  for step, values in enumerate(signals):
    values = {k: jnp.asarray(v) for k, v in values.items()}
    state = mixture.update(state, step=step, a_signal_of_others=None, **values)
  run(mixture, signals[:1])
  before = traced[mixture]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, state, run(mixture, signals)[-1])
  assert traced[mixture] == before


@METHOD_CASES
def test_the_order_of_domains_does_not_matter(name):
  mixture, signals = built(name), drawn(name, 5)
  order = np.array([2, 0, 3, 1])
  permuted = [{k: v[order] if np.ndim(v) else v for k, v in s.items()} for s in signals]
  plain, other = run(mixture, signals)[-1], run(mixture, permuted)[-1]
  np.testing.assert_allclose(mixture.objective(other), mixture.objective(plain)[order], rtol=1e-5)


@METHOD_CASES
def test_one_domain_has_everything(name):
  mixture = built(name, 1)
  signals = [{k: v[:1] if np.ndim(v) else v for k, v in s.items()} for s in drawn(name, 3)]
  for state in run(mixture, signals):
    np.testing.assert_allclose(mixture.objective(state), [1.0], rtol=1e-6)


@METHOD_CASES
def test_a_state_can_be_donated(name):
  """Leaves that share a buffer could not."""
  leaves = jax.tree.leaves(built(name).init())
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@FOLLOWS_ALPHA
def test_alpha_acts_through_sampling_or_through_the_loss(name):
  q, signals = simplex(21), drawn(name, 3)
  modes = {'sample': {}, 'weigh': {'sampled': q}}
  own = 'sample' if name.startswith('dga') else 'weigh'  # the default
  made = {mode: METHODS[name][0](G, mode=mode, **k) for mode, k in modes.items()}
  state = run(built(name), signals)[-1]
  (other,) = set(modes) - {own}
  same(run(made[other], signals)[-1], state)
  same(made['sample'].proportions(state), made['weigh'].objective(state))
  same(made['sample'].proportions(state), made['sample'].objective(state))
  same(built(name).objective(state), made['sample'].objective(state))
  np.testing.assert_allclose(made['weigh'].proportions(state), q, rtol=1e-6)
  expected = np.full(G, 1 / G) if own == 'weigh' else made['sample'].proportions(state)
  np.testing.assert_allclose(built(name).proportions(state), expected, rtol=1e-6)


@FOLLOWS_ALPHA
def test_a_domain_that_starts_at_zero_is_out_and_its_signal_does_not_matter(name):
  smoothing = {'smoothing': 0.0} if name == 'doremi' else {}
  mixture = METHODS[name][0](G, start=[0.5, 0.0, 0.25, 0.25], **smoothing)
  signals = drawn(name, 3)
  for values in signals:
    values[driver(values)][1] = np.nan
  first, *_, last = (np.asarray(mixture.objective(s)) for s in run(mixture, signals))
  assert first[1] == last[1] == 0
  assert np.all(last[[0, 2, 3]] > 0)
  assert np.max(np.abs(last - [0.5, 0, 0.25, 0.25])) > 1e-3


@METHOD_CASES
def test_errors_name_the_signal(name):
  mixture, signals = built(name), drawn(name, 1)[0]
  signals = {k: jnp.asarray(v) for k, v in signals.items()}
  key = driver(signals)
  with pytest.raises(TypeError, match=key):
    mixture.update(mixture.init(), step=0, **{k: v for k, v in signals.items() if k != key})
  with pytest.raises(TypeError, match='step'):
    mixture.update(mixture.init(), **signals)
  with pytest.raises(ValueError, match=rf'{key} has shape \(2,\); expected \({G},\)'):
    mixture.update(mixture.init(), step=0, **{**signals, key: jnp.ones(2)})


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: online.dga(3, -1.0), 'rate=-1.0 must be finite and at least 0'),
    (lambda: online.dga(3, 1.0, ema=1.5), 'ema=1.5 must be from 0 to 1'),
    (lambda: online.dga(3, 1.0, every=0), 'every=0 must be at least 1'),
    (lambda: online.dga(3, 1.0, floor=-0.1), r'floor=-0\.1'),
    (lambda: online.dga(3, 1.0, normalize='l2'), "normalize='l2' must be"),
    (lambda: online.dga(3, 1.0, mode='both'), "mode='both'"),
    (lambda: online.dga(3, 1.0, sampled=[1, 1, 1]), "sampled is what mode='weigh' draws with"),
    (lambda: online.dga(3, 1.0, start=[0.5, 0.5]), 'start has 2 entries'),
    (lambda: online.dga(3, 1.0, start=[1.0, -1.0, 1.0]), 'start holds -1'),
    (lambda: online.dga(0, 1.0), 'num_domains=0 must be at least 1'),
    (lambda: online.doge(3, -0.1), 'learning_rate=-0.1'),
    (lambda: online.doge(3, 0.1, mu=0), 'mu=0 must be greater than 0'),
    (lambda: online.doge(3, 0.1, clip=-1.0), 'clip=-1.0 must be greater than 0'),
    (lambda: online.doge(3, 0.1, sampled=[0.5, 0.5, 0.0]), r'sampled\[2\]=0'),
    (lambda: online.doremi(3, smoothing=2.0), 'smoothing=2.0'),
    (lambda: online.doremi(3, sampled=[1, 0, 0], start=[1, 0, 0]), r'sampled\[1\]=0'),
    (lambda: online.group_dro_mixture(3, np.nan), 'rate=nan'),
    (lambda: online.group_dro_mixture(0), 'num_domains=0'),
    (lambda: odm(0), 'num_domains=0'),
    (lambda: odm(3, decay=1.2), 'decay=1.2'),
    (lambda: odm(3, gain=0.0), 'gain=0.0'),
  ],
)
def test_factories_refuse(make, message):
  with pytest.raises(ValueError, match=message):
    make()
