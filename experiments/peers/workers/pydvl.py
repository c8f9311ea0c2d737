"""pyDVL's answers; runs in its environment: pydvl.py CASE IN.npz OUT.npz."""

import sys
import time
import warnings

import numpy as np


def knn_shapley(a):
  from pydvl.valuation import Dataset, KNNShapleyValuation
  from sklearn.neighbors import KNeighborsClassifier

  train, test = Dataset(a['x'], a['y']), Dataset(a['test_x'], a['test_y'])
  model = KNeighborsClassifier(n_neighbors=int(a['neighbors']))
  begun = time.perf_counter()
  found = KNNShapleyValuation(model, test, progress=False).fit(train).result
  return {'values': in_order(found), 'seconds': time.perf_counter() - begun}


def tmc_shapley(a):
  from pydvl.valuation import (
    Dataset,
    MinUpdates,
    ModelUtility,
    PermutationSampler,
    ShapleyValuation,
    SupervisedScorer,
  )
  from pydvl.valuation.samplers.truncation import NoTruncation, RelativeTruncation
  from sklearn.linear_model import LogisticRegression

  class Counted(LogisticRegression):
    fits = 0

    def fit(self, *args, **kwargs):
      Counted.fits += 1
      return super().fit(*args, **kwargs)

  train, test = Dataset(a['x'], a['y']), Dataset(a['test_x'], a['test_y'])
  scorer = SupervisedScorer('accuracy', test, default=0.0, range=(0, 1))
  utility = ModelUtility(Counted(), scorer, show_warnings=False)
  truncation = RelativeTruncation(float(a['truncation'])) if a['truncation'] else NoTruncation()
  sampler = PermutationSampler(truncation, seed=0)
  method = ShapleyValuation(utility, sampler, is_done=MinUpdates(int(a['permutations'])))
  begun = time.perf_counter()
  found = method.fit(train).result
  seconds = time.perf_counter() - begun
  return {'values': in_order(found), 'seconds': seconds, 'calls': Counted.fits}


tmc_shapley_truncated = tmc_shapley


def in_order(result):
  values = np.zeros(len(result.values))
  values[result.indices] = result.values
  return values


if __name__ == '__main__':
  warnings.simplefilter('ignore')
  name, given, taken = sys.argv[1:]
  with np.load(given, allow_pickle=False) as arrays:
    np.savez(taken, **globals()[name](dict(arrays)))
