"""The board's data, readers, learner and verdicts; the runs themselves are in docs/results."""

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import plots, stats
from experiments.classify import board, learner, model, sources, tasks
from experiments.classify.arms import ARMS
from experiments.errors import UserError
from tests.line import main_of

REAL = Path(os.environ.get('JAXRW_DATA', Path(__file__).parents[3] / 'shared' / 'data'))
