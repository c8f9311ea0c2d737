"""Which training examples made the model what it is, and what it would be without them.

  | method                       | direction or derivative         | costs                         |
  |------------------------------|---------------------------------|-------------------------------|
  | tracin                       | gradient of the target          | 1 forward pass per checkpoint |
  | lookahead                    | none: a step on each, tried out | 1 step, 1 evaluation each     |
  | in_run_direction             | the same in every step, order 2 | 1 to 2 gradients a step       |
  | hessian_, gauss_newton_solve | inverse curvature, exact        | 2 gradients per iteration     |
  | ekfac, ekfac_solve           | inverse curvature by layers     | 2 passes over the data        |
  | projected_gradients, trak    | kernel of random projections    | 1 forward pass per dimension  |
  | metagradient                 | the whole run, differentiated   | 3 to 4 training runs          |

All but `lookahead` and the last two end in `influence`: one forward-mode pass gives the products of
all examples, or tokens, with the solved direction. Positive = helpful, everywhere; the scale is in
each docstring. `linear_products` does it for many directions at once.
"""

from jaxrw.attribution.ekfac import Factors, ekfac, ekfac_solve, layers, linear_products
from jaxrw.attribution.influence import (
  gauss_newton_solve,
  hessian_solve,
  in_run_direction,
  influence,
  lookahead,
  projected_gradients,
  tracin,
  trak,
)
from jaxrw.attribution.metagradients import add_up, metagradient, mixed_grad, replay
from jaxrw.attribution.unlearning import klom, match_loss, predicted

__all__ = [
  'Factors',
  'add_up',
  'ekfac',
  'ekfac_solve',
  'gauss_newton_solve',
  'hessian_solve',
  'in_run_direction',
  'influence',
  'klom',
  'layers',
  'linear_products',
  'lookahead',
  'match_loss',
  'metagradient',
  'mixed_grad',
  'predicted',
  'projected_gradients',
  'replay',
  'tracin',
  'trak',
]
