"""ragbooster's weights; runs in its environment: ragbooster.py CASE IN.npz OUT.npz."""

import sys
import sysconfig
import time
from importlib import machinery, util
from pathlib import Path

import numpy as np


def retrieval(a):
  # The compiled module alone: the package around it imports torch.
  (path,) = Path(sysconfig.get_paths()['platlib'], 'ragbooster').glob('ragbooster*.so')
  loader = machinery.ExtensionFileLoader('ragbooster', str(path))
  module = util.module_from_spec(util.spec_from_loader('ragbooster', loader))
  loader.exec_module(module)
  ids = a['ids']
  names, renamed = np.unique(ids, return_inverse=True)  # it wants numbers without gaps
  lists = [
    {'retrieved': r, 'utility_contributions': u}
    for r, u in zip(renamed.reshape(ids.shape).tolist(), a['utilities'].astype(float).tolist())
  ]
  begun = time.perf_counter()
  v = module.learn_importance(
    lists, int(a['neighbors']), float(a['rate']), int(a['steps']), n_jobs=1
  )
  seconds = time.perf_counter() - begun
  values = np.full(int(a['sources']), 0.5)
  values[names] = v
  return {'values': values, 'seconds': seconds}


if __name__ == '__main__':
  name, given, taken = sys.argv[1:]
  with np.load(given, allow_pickle=False) as arrays:
    np.savez(taken, **globals()[name](dict(arrays)))
