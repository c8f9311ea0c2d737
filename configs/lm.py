"""A small GPT on your own text: a folder, a prepared TFDS dataset, or the embedded corpus.

Command:  python -m experiments.main --config=configs/lm.py:path=my/text --workdir=runs/mine
          python -m experiments.main --config=configs/lm.py:path=my/text,layers=4,width=256 \\
            --config.data.domains=web --config.data.domains=code --workdir=runs/two_domains
Cost:     by default 1M tokens through 0.3M parameters: minutes on two CPU cores. Time grows with
          steps x batch x length x layers x width^2. `quick` takes four tiny steps.
Expected: bits per byte of each domain below its byte-bigram floor after about 1M tokens.

The folder holds `{domain}.{split}.jsonl[.gz|.zst]` with a `text` field, or `{domain}/*.txt`, or
shards `{split}/**/*.jsonl[.gz|.zst]` of lines that name their domain: SlimPajama is read as it is
with `--config.data.domain_key=meta.redpajama_set_name`.
Switches: source, path, name, tokenizer, length, layers, heads, width, batch, steps, lr, burn_in,
weighting (uniform, linupper:0.4, row_shuffled:linupper:0.4, ...), mixture
(dga:rate=1:every=50:target=qa, odm, ...), seed, quick. `path` and `name`
imply the source.
"""

from configs import common


def get_config(arg=''):
  switches = common.parse_arg(
    arg,
    source='',
    path='',
    name='',
    tokenizer='byte',
    length=128,
    layers=2,
    heads=4,
    width=96,
    batch=16,
    steps=500,
    lr=3e-3,
    burn_in=50,
    weighting='linupper:0.4',
    mixture='',
    seed=0,
    quick=False,
  )
  config = common.base_config()
  config.seed = switches.seed
  config.total_steps = switches.steps
  config.batch_size = switches.batch
  config.data.source = switches.source or common.implied_source(switches)
  config.data.update(path=switches.path, name=switches.name, tokenizer=switches.tokenizer)
  config.data.seq_len = switches.length
  config.model.update(n_layer=switches.layers, n_head=switches.heads, n_embd=switches.width)
  config.model.scan = switches.layers > 4  # unrolled is faster, but compiles longer with depth
  config.optim.update(lr=switches.lr, warmup_steps=min(50, switches.steps // 10))
  config.w.loss.start = switches.burn_in
  common.set_weighting(config, switches.weighting)
  common.set_mixture(config, switches.mixture)
  return common.quick(config) if switches.quick else config
