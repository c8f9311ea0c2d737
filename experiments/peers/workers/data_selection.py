"""data-selection's log weights; runs in its environment: data_selection.py CASE IN.npz OUT.npz."""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def dsir(a):
  from data_selection import HashedNgramDSIR

  with tempfile.TemporaryDirectory() as folder:
    raw, target = Path(folder, 'raw.jsonl'), Path(folder, 'target.jsonl')
    ends = np.cumsum(a['sizes'])
    parts = [a['bytes'][i:j].tobytes() for i, j in zip(ends - a['sizes'], ends)]
    texts = [part.decode('utf8', 'surrogatepass') for part in parts]
    for path, chosen in ((raw, texts), (target, texts[: int(a['target'])])):
      path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in chosen))
    method = HashedNgramDSIR([str(raw)], [str(target)], cache_dir=f'{folder}/cache', num_proc=1)
    begun = time.perf_counter()
    method.fit_importance_estimator(num_tokens_to_fit='all')
    method.compute_importance_weights()
    seconds = time.perf_counter() - begun
    found = np.concatenate(
      [np.load(p) for p in sorted(method.log_importance_weights_dir.iterdir())]
    )
  return {'values': found, 'seconds': seconds}


dsir_large = dsir


if __name__ == '__main__':
  name, given, taken = sys.argv[1:]
  with np.load(given, allow_pickle=False) as arrays:
    np.savez(taken, **globals()[name](dict(arrays)))
