"""Llama with loss-based reweighting at the sizes of the paper, for pods; `tiny` runs on a laptop.

Command:  python -m experiments.main --workdir=runs/llama \\
            --config=configs/llama.py:size=1.4b,name=my_tokens:1.0.0
          python -m experiments.main --config=configs/llama.py:size=7b --compile_for=v5e:16x16
Cost:     a token costs 8.4 GFLOP at 1.4b and 41 GFLOP at 7b. 20 tokens a parameter are 0.23 ZFLOP
          at 1.4b: 22 hours on 16 v5p chips at 40% of their peak. `tiny` is 0.25M parameters:
          minutes on two cores. `quick` takes four tiny steps anywhere.
Expected: the paper reports faster convergence at 1.4b and 7b; nobody has run it with this program.
          The second command says whether a size fits a pod, without one.

The shapes are the paper's, with 32,000 tokens and an output layer of its own; 1b is a grouped-query
shape of common use. Ours: 2,048 positions, AdamW (.9, .95), 3e-4 to 3e-5 by a cosine after 2,000
warm-up steps, 0.5M tokens a step, bfloat16 compute, parameters cut over all chips of a slice.

Switches: size=tiny|1b|1.4b|7b, length, batch, fsdp, tensor, path, name, tokenizer, weighting,
mixture, seed, quick
"""

from configs import common

SIZES = {  # layers, heads, heads of keys and values, width, hidden width
  'tiny': (2, 4, 2, 96, 256),
  '1b': (22, 32, 4, 2048, 5632),
  '1.4b': (24, 16, 16, 2048, 5632),
  '7b': (32, 32, 32, 4096, 11_008),
}


def get_config(arg=''):
  switches = common.parse_arg(
    arg,
    size='tiny',
    length=0,
    batch=0,
    fsdp=0,
    tensor=1,
    path='',
    name='',
    tokenizer='byte',
    weighting='linupper:0.4',
    mixture='',
    seed=0,
    quick=False,
  )
  if switches.size not in SIZES:
    raise common.ConfigError(f'size={switches.size} is not one of {", ".join(SIZES)}')
  config = common.base_config()
  config.seed = switches.seed
  config.data.source = common.implied_source(switches)
  config.data.update(path=switches.path, name=switches.name, tokenizer=switches.tokenizer)
  layers, heads, kv_heads, width, hidden = SIZES[switches.size]
  config.model.update(name='llama', n_layer=layers, n_head=heads, n_kv_head=kv_heads)
  config.model.update(n_embd=width, d_ff=hidden)
  if switches.size != 'tiny':
    pretraining(config)
  config.data.seq_len = switches.length or config.data.seq_len
  config.batch_size = config.eval.batch_size = switches.batch or config.batch_size
  if switches.fsdp:
    config.mesh.update(data=1 if switches.fsdp == -1 else -1, fsdp=switches.fsdp)
  config.mesh.tensor = switches.tensor
  common.set_weighting(config, switches.weighting)
  common.set_mixture(config, switches.mixture)
  return common.quick(config) if switches.quick else config


def pretraining(config):
  """A pod's recipe, in place."""
  config.total_steps = 50_000
  config.batch_size = 256
  config.data.seq_len = 2048
  config.model.update(vocab_size=32_000, dtype='bfloat16', remat='full', loss_chunk=512)
  config.optim.update(lr=3e-4, warmup_steps=2_000, final_lr_ratio=0.1)
  config.w.loss.start = 2_000
  config.mesh.update(data=1, fsdp=-1)
  config.eval.update(every=1_000, max_blocks=2_048)
  config.checkpoint.every = 1_000
  config.log.update(every=50, examples_every=50)
