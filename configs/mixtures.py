"""Live mixtures on one board: does anything beat reading every domain alike?

Command:  python -m experiments.compare --config=configs/mixtures.py \\
            --lrs=3e-3,5e-3 --seeds=3 --tune_seeds=3 --workdir=runs/mixtures
          python -m experiments.compare --config=configs/mixtures.py:path=my/text,steps=1465 \\
            --lrs=3e-3,5e-3 --seeds=3 --tune_seeds=3 --workdir=runs/mixtures_text
Cost:     1M tokens through 0.3M parameters for each of 66 runs: three quarters of an hour on two
          cores with --jobs=2. `quick` takes four tiny steps.
Expected: at this size, nothing that is better than equal shares in the average; docs/results says
          what came out.

The arms that it brings: stratified (every domain alike, the baseline), natural (by size),
group_dro, odm, dga and doge (towards the mean of all domains), ado, aioli; and the combination of
the core paper, domain weights x example weights: linupper, linupper_group_dro, linupper_doge.
DoReMi needs a reference and a second model: `experiments.doremi`. Aioli's bursts must fit into a
fifth of the run: at least 40 (domains + 2) steps.

Switches: path (a folder of text; empty: the embedded corpus), steps, batch, lr, temperature (of
LinUpper), seed, quick
"""

from configs import common, lm

_SWITCHES = dict(path='', steps=500, batch=16, lr=3e-3, temperature=1.0, seed=0, quick=False)


def get_config(arg=''):
  switches = common.parse_arg(arg, **_SWITCHES)
  shared = ('path', 'steps', 'batch', 'lr', 'seed')
  config = lm.get_config(','.join(f'{name}={switches[name]}' for name in shared))
  config.eval.every = max(1, switches.steps // 2)
  config.checkpoint.every = max(1, switches.steps // 2)
  return common.quick(config) if switches.quick else config


def get_arms(arg=''):
  switches = common.parse_arg(arg, **_SWITCHES)
  steps = switches.steps
  reads = 'every=10:rows=2:target_rows=16'
  group_dro = 'group_dro:mode=weigh:rate=0.01'
  doge = f'doge:mode=weigh:{reads}'
  tenth = max(1, steps // 10)
  ado = f'ado:start_step={3 * steps // 10}:fit_every={tenth}:ignore={tenth}:thinning=2'
  # Five rounds; each domain's bursts, together, take most of one.
  aioli = (
    f'aioli:rate=1.0:round_steps={steps // 5}:rounds_of_bursts=1:burst_steps=8:share=0.75:ema=0.1:'
    'rows=8'
  )
  linupper = f'linupper:{switches.temperature:g}'
  return {
    'stratified': 'uniform',
    'natural': 'uniform@data.mixture=natural',
    'group_dro': f'uniform@mixture={group_dro}',
    'odm': 'uniform@mixture=odm',
    'dga': f'uniform@mixture=dga:rate=0.2:{reads}:normalize=cosine',
    'doge': f'uniform@mixture={doge}',
    'ado': f'uniform@mixture={ado}',
    'aioli': f'uniform@mixture={aioli}',
    'linupper': linupper,
    'linupper_group_dro': f'{linupper}@mixture={group_dro}',
    'linupper_doge': f'{linupper}@mixture={doge}',
  }
