"""GPT-2 with the published recipe of loss-based reweighting (arXiv 2502.06733), on your own text.

Command:  python -m experiments.main --workdir=runs/gpt2 \\
            --config=configs/gpt2.py:size=124m,path=my/text
          python -m experiments.main --workdir=runs/evidence \\
            --config=configs/gpt2.py:evidence,path=my/text
Cost:     the recipe is 20,000 steps of 48 blocks of 512 tokens, 0.49B tokens: about 0.37 EFLOP at
          124M parameters, 0.62 at 209M and 0.87 at 294M; hours on one GPU. `evidence` is 25M
          parameters and 105M bytes, 0.016 EFLOP: minutes on a GPU. `quick` takes four tiny steps
          anywhere.
Expected: the claim under test is that LinUpper lowers the macro average against `weighting=uniform`
          at the same learning rate, and more so at 294M than at 124M. Compare with paired seeds and
          a learning rate tuned for each arm (`python -m experiments.compare`) before believing it.

From the paper's code: 512 positions, AdamW (.9, .999), 5e-4 to 1e-4 by a cosine after 500 warm-up
steps, decay .01, clip 1, batch 48, 1,000 uniform steps, then temperature 0.4. Ours: bfloat16
compute, and a BPE of GPT-2's size trained on the data at hand instead of GPT-2's own.

Switches: size=124m|209m|294m, evidence, path, name, tokenizer, weighting, mixture, seed, quick
"""

from configs import common

SIZES = {  # layers, heads; every width is 768
  '124m': (12, 12),
  '209m': (24, 16),
  '294m': (36, 24),
}


def get_config(arg=''):
  switches = common.parse_arg(
    arg,
    size='124m',
    evidence=False,
    path='',
    name='',
    tokenizer='',
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
  config.data.update(path=switches.path, name=switches.name, seq_len=512)
  config.model.dtype = 'bfloat16'
  if switches.evidence:
    evidence(config)
  else:
    paper(config, *SIZES[switches.size])
  config.data.tokenizer = switches.tokenizer or config.data.tokenizer
  if config.data.tokenizer == 'byte':
    config.model.vocab_size = 0
  common.set_weighting(config, switches.weighting)
  common.set_mixture(config, switches.mixture)
  return common.quick(config) if switches.quick else config


def paper(config, n_layer, n_head):
  """The recipe of the paper's GPT-2 experiments, in place."""
  config.total_steps = 20_000
  config.batch_size = 48
  config.data.tokenizer = 'bpe:50257'
  config.model.update(n_layer=n_layer, n_head=n_head, n_embd=768, vocab_size=50_257)
  config.optim.update(lr=5e-4, final_lr_ratio=0.2, warmup_steps=500)
  config.optim.update(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip=1.0)
  config.w.loss.start = 1_000
  config.eval.update(every=1_000, batch_size=48, max_blocks=2_000)
  config.checkpoint.every = 1_000
  config.log.update(every=50, examples_every=50)


def evidence(config):
  """The smallest size whose comparison counts as evidence: 25M parameters, 105M bytes; in place."""
  config.total_steps = 3_200  # x 64 blocks x 512 bytes
  config.batch_size = 64
  config.data.tokenizer = 'byte'
  config.model.update(n_layer=8, n_head=8, n_embd=512)
  config.optim.update(lr=1e-3, warmup_steps=200)
  config.w.loss.start = 200
  config.eval.update(every=400, batch_size=64, max_blocks=256)
  config.checkpoint.every = 800
  config.log.update(every=50, examples_every=10)
