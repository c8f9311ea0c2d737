"""One small target domain that is never trained on: which of the others to read for its sake?

Command:  python -m experiments.carve --source=my/text --by=source --out=my/sources
          python -m experiments.compare \\
            --config=configs/specialise.py:path=my/sources,target=wiki --metric=bpb/wiki \\
            --lrs=2e-3,4e-3 --seeds=3 --tune_seeds=3 --workdir=runs/specialise
Cost:     1M tokens through 0.3M parameters for each of 30 runs: half an hour on two cores with
          --jobs=2. `quick` takes four tiny steps.
Expected: the paper (arXiv 2410.02498) has DGA ahead of importance sampling in language modelling,
          and importance sampling overfitting where domains are small; docs/results says what came
          out here.

The arms that it brings: stratified (all domains but the target alike, the baseline), and with a
`small` and a `large` number of the target's training blocks to go by: importance (as often as a
domain is the one that a block of the target resembles most, fixed) and dga (towards the domains
whose gradient agrees with the target's; ema below 1 averages over readings, which takes long).

Switches: path, target, small, large, steps, batch, lr, rate, ema, every, seed, quick
"""

from configs import common, lm

_SWITCHES = dict(
  path='',
  target='',
  small=16,
  large=2048,
  steps=1000,
  batch=8,
  lr=3e-3,
  rate=2.0,
  ema=1.0,
  every=20,
  seed=0,
  quick=False,
)


def _switches(arg):
  switches = common.parse_arg(arg, **_SWITCHES)
  if not switches.target:
    raise common.ConfigError('target is missing: name a domain, path=my/sources,target=wiki')
  return switches


def get_config(arg=''):
  switches = _switches(arg)
  shared = ('path', 'steps', 'batch', 'lr', 'seed')
  config = lm.get_config(','.join(f'{name}={switches[name]}' for name in shared))
  config.data.mixture = f'uniform except {switches.target}'
  config.eval.every = max(1, switches.steps // 2)
  config.checkpoint.every = max(1, switches.steps // 2)
  config.log.examples_every = 0
  common.set_weighting(config, 'uniform')
  return common.quick(config) if switches.quick else config


def get_arms(arg=''):
  switches = _switches(arg)
  arms = {'stratified': 'uniform'}
  for size in (switches.small, switches.large):
    target = f'target={switches.target}:target_blocks={size}'
    arms[f'importance_{size}'] = f'uniform@mixture=importance:{target}'
    arms[f'dga_{size}'] = (
      f'uniform@mixture=dga:rate={switches.rate:g}:ema={switches.ema:g}:normalize=cosine:'
      f'every={switches.every}:rows=1:target_rows=32:{target}'
    )
  return arms
