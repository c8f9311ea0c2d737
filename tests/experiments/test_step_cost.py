"""The exact half of the step-cost benchmark: what a weighting adds to the compiled step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from experiments import dry_run, plots
from experiments.bench import arms, mixture_cost, step_cost
from experiments.errors import UserError
from experiments.models import lm
from tests.experiments import small


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  base = tmp_path_factory.mktemp('cost')
  return small.config(small.write_corpus(base / 'corpus'), base / 'prepared')


def test_linupper_adds_two_tiny_collectives_and_no_matmul(config):
  uniform, same, linupper = step_cost.count(
    config, ['uniform', 'uniform', 'linupper:0.4'], jax.devices()[:8]
  )
  assert {**uniform, 'build_seconds': 0} == {**same, 'build_seconds': 0}
  assert linupper['matmul_flops'] == uniform['matmul_flops'] > 0
  assert [(c['kind'], c['bytes'], c['count']) for c in linupper['extra']] == [
    ('all-reduce', 8, 1),  # max of the pair (l, -l)
    ('all-reduce', 8, 1),  # the sums that normalize
  ]


@pytest.mark.slow
def test_accumulation_costs_a_forward_pass_unless_one_pass_will_do(config):
  rows = step_cost.count_accumulation(config, ['linupper_stale:0.4'], 2, jax.devices()[:1])
  flops = {(row['microbatches'], row['scope']): row['matmul_flops'] for row in rows}
  whole = flops[1, 'global']
  assert flops[2, 'microbatch'] == flops[2, 'online'] == whole
  assert flops[2, 'global'] / whole == pytest.approx(4 / 3, rel=0.02)
  assert 'linupper_stale:0.4    2  online' in step_cost.format_accumulation(rows)


@pytest.mark.slow
def test_growth_is_linear_in_the_batch_and_shared_by_devices(config):
  rows = step_cost.count_growth(config, ['uniform'], jax.devices()[:2])
  flops = {(r['batch_size'], r['seq_len'], r['devices']): r['matmul_flops'] for r in rows}
  batch, length = config.batch_size, config.data.seq_len
  assert flops[2 * batch, length, 1] == 2 * flops[batch, length, 1]
  assert flops[batch, length // 2, 1] < flops[batch, length, 1] / 2  # attention is quadratic
  assert flops[batch, length, 2] == flops[batch, length, 1] / 2
  assert len(step_cost.format_growth(rows).splitlines()) == 2 + len(rows)


@pytest.mark.slow
def test_times_come_with_intervals(config):
  rows = step_cost.measure(config, ['uniform', 'linupper:0.4'], 3, jax.devices()[:1])
  assert rows[0]['ratio'] == 1.0
  assert rows[1]['low'] < rows[1]['ratio'] < rows[1]['high']
  assert rows[0]['tokens_per_s'] > 0
  assert f'[{rows[1]["low"]:.4f}, {rows[1]["high"]:.4f}]' in step_cost.format_times(rows)


def _record(flops=2e6, ratio=1.01):
  counts = {'devices': 8, 'matmul_flops': flops, 'temp_bytes': 3e6, 'collectives': 5}
  extra = {'kind': 'all-reduce', 'bytes': 8, 'count': 1, 'name': 'reduce_max'}
  times = {'rounds': 9, 'low': ratio - 0.02, 'ratio': ratio, 'high': ratio + 0.02}
  names = ('uniform', 'linupper:0.4')
  return {
    'counts': [
      {'weighting': n, 'extra': [extra] * i, 'build_seconds': 1.0, **counts}
      for i, n in enumerate(names)
    ],
    'times': [{'weighting': n, **times} for n in names],
  }


def test_the_table_names_what_is_extra():
  assert '1 x all-reduce of 8 B (reduce_max)' in step_cost.format_counts(_record()['counts'])


def test_many_collectives_are_summed_up():
  many = [{'kind': 'all-gather', 'bytes': 64, 'count': 1, 'name': 'x'}] * 9
  many += [{'kind': 'all-reduce', 'bytes': 5000, 'count': 2, 'name': 'y' * 99}]
  text = step_cost.describe_extra(many)
  assert text.startswith('2 x all-reduce of 5,000 B')
  assert text.endswith('... 11 in all, 10,576 B')
  assert len(text) < 200


def test_a_baseline_shows_what_changed():
  text, grew = step_cost.compare(_record(), _record())
  assert not grew
  assert 'no exact count grew' in text
  assert '1.0100 -> 1.0100, same within the intervals' in text
  text, grew = step_cost.compare(_record(flops=3e6, ratio=1.2), _record())
  assert grew
  assert 'linupper:0.4 8: matmul_flops 2,000,000.0 -> 3,000,000.0' in text
  assert '1.0100 -> 1.2000, differs' in text
  text, grew = step_cost.compare(_record(flops=1e6), _record())
  assert not grew
  assert '2,000,000.0 -> 1,000,000.0' in text
  assert step_cost.compare(_record(), {})[0].count('new') == 2


def test_the_plot_is_a_picture():
  grown = [
    {
      **{'weighting': 'uniform', 'batch_size': rows, 'seq_len': 32, 'devices': devices},
      **{'matmul_flops': 1e6 * rows / devices, 'temp_bytes': 1e5 * rows},
    }
    for rows, devices in ((8, 1), (16, 1), (8, 2))
  ]
  for record in (_record(), _record() | {'growth': grown}):
    draw = lambda: plots.draw_step_cost(record, plots.LIGHT)  # noqa: B023
    assert plots.draw_png(draw, plots.LIGHT).startswith(b'\x89PNG')
  ratios, growth = plots.draw_step_cost(record, plots.LIGHT).subfigs
  assert all(ax.get_xlim()[0] <= 0.95 and ax.get_xlim()[1] >= 1.05 for ax in ratios.axes)
  panel = growth.axes[0]
  assert panel.lines[0].get_xydata().tolist() == [[8, 8], [16, 16]]  # rows, MFLOP


def test_the_peer_is_the_same_model(config):
  torch = pytest.importorskip('torch')
  from experiments.bench import torch_peer

  run = arms.build(config, 'linupper:0.4', jax.devices()[:1])
  batch, state = dry_run.any_batch(run), run.init()
  tokens = torch.from_numpy(np.array(batch['tokens'], np.int64))
  with torch.no_grad():
    theirs = torch_peer.load(state.params, run.model, 'cpu')(tokens).numpy()
  ours = lm.token_losses(state.params, batch, run.model)
  np.testing.assert_allclose(theirs, ours, rtol=1e-4)
  losses = torch.from_numpy(theirs.mean(1))
  np.testing.assert_allclose(
    torch_peer.linupper(losses, 0.4).numpy(),
    jaxrw.linupper_weights(jnp.asarray(losses.numpy()), 0.4),
    rtol=1e-4,
  )
  # One step of both from the same parameters; the batch is full, so the mean is the mean.
  step = torch_peer.make_step(
    state.params, run.model, run.config.optim, 0.4, device='cpu', compiled=False
  )
  weights = np.asarray(jaxrw.linupper_weights(jnp.mean(ours, axis=1), 0.4))
  assert step(tokens) == pytest.approx(float(np.mean(weights * np.mean(ours, axis=1))), rel=1e-4)


@pytest.mark.slow
def test_the_parts_of_a_mixture_are_timed_and_its_readings_counted(config):
  """The stage alone, and readings by how often there are any; FLOPs agree with the dry run."""
  specs = ['odm', 'dga:rate=1:every=4:rows=1:target_rows=2']
  config = config.copy_and_resolve_references()
  config.total_steps = 8
  milliseconds, (odm, dga) = mixture_cost.measure(config, specs, 3, jax.devices()[:1])
  assert milliseconds > 0
  assert odm.reading is None
  assert odm.reading_flops == 0
  for share in (odm.stage, dga.stage, dga.reading):
    assert 0 < share.low <= share.mean <= share.high
  run = arms.build(config, f'uniform@mixture={specs[1]}', jax.devices()[:1])
  found = dry_run.report(run)
  assert found['readings']['times'] == 2
  share = 2 * found['readings']['matmul_flops'] / (8 * dry_run.step_costs(run).matmul_flops)
  assert share == pytest.approx(dga.reading_flops)
  assert f'2 times in 8 steps: {dga.reading_flops:.2%}' in dry_run.describe(run, found)
  text = mixture_cost.format_costs(milliseconds, [odm, dga])
  assert f'{dga.reading_flops:.3%}' in text


@pytest.mark.slow
def test_a_mixture_that_never_reads_in_the_run(config):
  spec = 'aioli:rate=1:round_steps=40:rounds_of_bursts=1:burst_steps=2:share=0.75:warmup_steps=999'
  _, (aioli,) = mixture_cost.measure(config, [spec], 2, jax.devices()[:1])
  assert aioli.reading is None
  assert aioli.reading_flops == 0


def test_a_mixture_without_a_name_is_one_line(config):
  with pytest.raises(UserError, match='is not a mixture that changes'):
    mixture_cost.measure(config, [''], 2, jax.devices()[:1])
