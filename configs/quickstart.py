"""A byte-level GPT on the text that every Python installation carries; nothing to download.

Command:  python -m experiments.main --config=configs/quickstart.py --workdir=runs/quickstart
Cost:     about 1M tokens; a few minutes on two CPU cores. `:quick` takes four steps.
Expected: macro bits per byte on validation text below those of a byte-bigram model, which the run
          prints as its floor. At this size a difference between weightings ranks nothing: a pilot
          saw LinUpper lose a little in the macro average.

Its sweep: 3 weightings x 2 learning rates x 2 seeds, for experiments.launch.

Switches: weighting=uniform|linupper:0.4|..., mixture=odm|group_dro:mode=weigh:rate=0.1|..., seed=0,
quick
"""

from configs import common


def get_config(arg=''):
  switches = common.parse_arg(arg, weighting='linupper:0.4', mixture='', seed=0, quick=False)
  config = common.base_config()
  config.seed = switches.seed
  config.total_steps = 500  # x 16 blocks x 128 bytes = 1.02M
  config.batch_size = 16
  config.data.seq_len = 128
  config.model.update(n_layer=2, n_head=4, n_embd=96, scan=False)
  config.optim.update(lr=3e-3, warmup_steps=50)
  common.set_weighting(config, switches.weighting)
  common.set_mixture(config, switches.mixture)
  return common.quick(config) if switches.quick else config


def sweep(add):
  axes = {'arm': ('uniform', 'linupper:1.0', 'linupper:0.4'), 'optim.lr': (1e-3, 3e-3)}
  for unit in common.seeds(common.grid(axes), 2):
    add(**unit)
