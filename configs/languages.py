"""Twelve languages, some with a hundredth of the text of others: sample small ones more, or weigh?

Command:  python -m experiments.carve --source=my/text --domain=multilingual --by=lang \\
            --keep=it=0.5,es=0.5,pt=0.2,sv=0.2,pl=0.1,cs=0.1,hu=0.05,uk=0.05,sl=0.02,sr=0.01 \\
            --out=my/languages
          python -m experiments.compare --config=configs/languages.py:path=my/languages \\
            --lrs=1e-3,2e-3,4e-3 --seeds=3 --tune_seeds=3 --workdir=runs/languages
Cost:     1M tokens through 0.3M parameters for each of 54 runs: three quarters of an hour on two
          cores with --jobs=2. `quick` takes four tiny steps.
Expected: the paper (NAACL 2025, arXiv 2410.04579) has sampling with a temperature ahead of the same
          weights in the loss, and Cooldown ahead of both; docs/results says what came out here.

The arms that it brings: stratified (every language alike, the baseline), natural (by size),
temperature (sizes^(1/tau), sampled), scalarization (the same in the loss, sampled by size),
cooldown (tau, by size from half of the run on), unimax (alike, but none more often than `epochs`).
Any folder of domains will do.

Switches: path, steps, batch, lr, tau, epochs, seed, quick
"""

from configs import common, lm

_SWITCHES = dict(path='', steps=1000, batch=8, lr=3e-3, tau=5.0, epochs=2.0, seed=0, quick=False)


def get_config(arg=''):
  switches = common.parse_arg(arg, **_SWITCHES)
  shared = ('path', 'steps', 'batch', 'lr', 'seed')
  config = lm.get_config(','.join(f'{name}={switches[name]}' for name in shared))
  config.eval.every = max(1, switches.steps // 4)
  config.checkpoint.every = max(1, switches.steps // 2)
  config.log.examples_every = 0
  common.set_weighting(config, 'uniform')
  return common.quick(config) if switches.quick else config


def get_arms(arg=''):
  switches = common.parse_arg(arg, **_SWITCHES)
  steps = 4 if switches.quick else switches.steps
  by_size = 'uniform@data.mixture=natural'
  tau, epochs = f'{switches.tau:g}', f'{switches.epochs:g}'
  return {
    'stratified': 'uniform',
    'natural': by_size,
    'temperature': f'{by_size}@mixture=temperature:tau={tau}',
    'scalarization': f'{by_size}@mixture=temperature:tau={tau}:mode=weigh',
    'cooldown': f'{by_size}@mixture=cooldown:switch_step={steps // 2}:tau_high={tau}',
    'unimax': f'{by_size}@mixture=unimax:epochs={epochs}',
  }
