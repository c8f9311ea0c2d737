"""Scores a finished run on tasks of the LM Evaluation Harness: pip install 'jaxrw[eval]'.

python -m experiments.harness --workdir=runs/mine --tasks=lambada_openai,piqa
python -m experiments.harness --workdir=runs/mine --tasks=mine --include_path=my/tasks --limit=9

Tasks that compare likelihoods or measure perplexity; none that writes text. The table that is
printed is in harness.json of the run directory, too. On several processes, each started with
--coordinator, --num_processes and --process_id, the first asks the questions and all compute.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from configs import common
from experiments import cli, files
from experiments import config as config_lib
from experiments.errors import UserError
from experiments.evaluate import open_config

FLAGS = flags.FLAGS
FILE = 'harness.json'
_PATIENCE = 24 * 3600  # seconds; a process that has died is noticed much earlier
Tokens = Sequence[int]


class Scorer:
  """Log-likelihoods of continuations, in batches that are cut over all devices.

  Batches have the same number of rows, and lengths are powers of two up to the window, so few
  programs are compiled. Of several processes the first calls `score` and in the end `stop`, while
  all others are in `follow`.

  Args:
    run: a run on a mesh; see `experiments.finished`.
    mesh: that mesh.
    batch_size: rows at a time; rounded up to what the mesh divides.
  """

  def __init__(self, run: Any, mesh: Any, batch_size: int):
    import jax
    import jax.numpy as jnp

    from experiments import mesh as mesh_lib
    from experiments.models import lm
    from jaxrw.losses import cross_entropy

    self.window = run.config.data.seq_len
    self._prefix = run.tokenizer.eot_id
    shards = mesh_lib.row_shards(mesh)
    self._rows = -(-batch_size // shards) * shards
    sharding = mesh_lib.batch_sharding(mesh)

    def step(params, tokens, scored):
      logits, targets = lm.apply(params, tokens[:, :-1], run.model, mesh=mesh), tokens[:, 1:]
      losses = jnp.where(scored, cross_entropy(logits, targets), 0.0)
      greedy = jnp.argmax(logits, axis=-1) == targets
      return -jnp.sum(losses, axis=1), jnp.all(greedy | ~scored, axis=1)

    step = jax.jit(step, out_shardings=mesh_lib.replicated(mesh))

    def compute(tokens, scored):
      put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
      return jax.device_get(step(run.params, put(tokens), put(scored)))

    self._compute = compute

  def score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether each token is the most likely one) of continuations.

    A context that does not fit loses its beginning; an empty one is the end of a document.

    Args:
      pairs: (context, continuation).

    Raises:
      UserError: a continuation is longer than the window.
    """
    rows = [self._joined(*pair) for pair in pairs]
    starts = range(0, len(rows), self._rows)
    if starts:
      _announce(len(starts))
    # The longest first: if the memory does not suffice, it shows at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for start in tqdm(starts, desc='scoring', disable=None):
      chosen = order[start : start + self._rows]
      tokens, scored = self._empty(self._length(len(rows[chosen[0]]) - 1))
      for row, i in enumerate(chosen):
        last = len(rows[i]) - 1
        tokens[row, : last + 1] = rows[i]
        scored[row, last - len(pairs[i][1]) : last] = True
      _tell(np.int32(scored.shape[1]))
      likelihoods, greedy = self._compute(*_tell((tokens, scored)))
      for row, i in enumerate(chosen):
        results[i] = float(likelihoods[row]), bool(greedy[row])
    return results

  def follow(self) -> None:
    """Computes what the first process scores, until it stops."""
    while batches := _announce(0):
      for _ in range(batches):
        self._compute(*_tell(self._empty(int(_tell(np.int32(0))))))

  def stop(self) -> None:
    """Lets the other processes go."""
    _announce(0)

  def _joined(self, context: Tokens, continuation: Tokens) -> list[int]:
    if len(continuation) > self.window:
      raise UserError(
        f'a continuation of {len(continuation)} tokens does not fit the {self.window} that the '
        'model sees: leave out the task, or train with a larger data.seq_len'
      )
    return [*(context or [self._prefix]), *continuation][-(self.window + 1) :]

  def _empty(self, length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((self._rows, length + 1), np.int32), np.zeros((self._rows, length), bool)

  def _length(self, needed: int) -> int:
    return min(self.window, max(32, 1 << (needed - 1).bit_length()))


def _announce(batches: int) -> int:
  """How many batches the first process has, on all of them, which may have waited long for it.

  A collective would not: devices give up on each other after a while.
  """
  from experiments import hosts

  hosts.barrier('the next batches', _PATIENCE)
  return int(_tell(np.int32(batches)))


def _tell(value: Any) -> Any:
  """What the first process says, on all of them."""
  from jax.experimental import multihost_utils

  return multihost_utils.broadcast_one_to_all(value)


def windows(tokens: Tokens, prefix: int, size: int) -> list[tuple[list[int], list[int]]]:
  """(context, continuation) pairs in which each token is in one continuation, after all that fits.

  Args:
    tokens: of a text.
    prefix: what precedes the text.
    size: tokens that the model reads, the last but one of a pair among them.
  """
  text, pairs = [prefix, *tokens], []
  for start in range(0, len(tokens), size):
    stop = min(start + size, len(tokens))
    pairs.append((text[max(0, stop - size) : start + 1], text[start + 1 : stop + 1]))
  return pairs


def make_model(scorer: Scorer, tokenizer: Any) -> Any:
  """The harness's view of a scorer."""
  from lm_eval.api.model import TemplateLM

  class Model(TemplateLM):
    eot_token_id = tokenizer.eot_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      return tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, **kwargs):
      return scorer.score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      texts = [self.tok_encode(request.args[0]) for request in requests]
      pairs = [windows(text, self.eot_token_id, scorer.window) for text in texts]
      scores = iter(scorer.score([pair for of_text in pairs for pair in of_text]))
      return [sum(next(scores)[0] for _ in of_text) for of_text in pairs]

    def generate_until(self, requests, disable_tqdm=False):
      raise UserError(
        '--tasks: one of them wants text written, which is not supported; choose tasks that '
        'compare likelihoods (output_type multiple_choice, loglikelihood or loglikelihood_rolling)'
      )

  return Model()


def evaluate(
  workdir: str, tasks: Sequence[str], *, include_path: str = '', limit: int = 0,
  num_fewshot: int = -1, batch_size: int = 16, fsdp: int = 1, tensor: int = 1,
  step: str = '', processes: tuple[str, int, int] = ('', 0, -1),
) -> dict[str, Any] | None:  # fmt: skip
  """Scores a checkpoint of a run: the newest, that of a step, or 'best'.

  Args:
    processes: see `experiments.hosts.initialize`.

  Returns:
    What the harness does; on all processes but the first, None.
  """
  if not tasks:
    raise UserError('--tasks is missing: name some, such as --tasks=lambada_openai,piqa')
  if include_path and not Path(include_path).is_dir():
    raise UserError(f'--include_path={include_path} is not a folder')
  if limit < 0 or batch_size < 1:
    raise UserError(f'--limit={limit}, --batch_size={batch_size}: must be at least 0 and 1')
  config = open_config(workdir)
  if importlib.util.find_spec('lm_eval') is None:
    raise UserError("lm-eval is not installed: pip install 'jaxrw[eval]'")

  from experiments import hosts

  hosts.initialize(*processes)
  import jax

  from experiments import finished
  from experiments.mesh import make_mesh

  with hosts.ending_together():
    mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    run = finished.open_run(workdir, config, mesh, step)
    scorer = Scorer(run, mesh, batch_size)
    if jax.process_index() > 0:
      return scorer.follow()
    model = make_model(scorer, run.tokenizer)
    results = _ask(model, tasks, include_path, limit, num_fewshot)
    scorer.stop()
    return results


def _ask(model, tasks, include_path, limit, num_fewshot) -> dict[str, Any]:
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=include_path or None)
  for task in tasks:
    if task not in manager.all_tasks:
      known = common.nearest(task, manager.all_tasks)
      raise UserError(f'--tasks: the harness has no task {task!r}{known}; see --include_path')
  try:
    return simple_evaluate(
      model=model,
      tasks=list(tasks),
      num_fewshot=None if num_fewshot < 0 else num_fewshot,
      limit=limit or None,
      task_manager=manager,
      log_samples=False,
    )
  except OSError as error:
    raise UserError(
      f'--tasks: their data cannot be read ({config_lib.one_line(error)}); fetch them where there '
      'is a network, or give files of your own with --include_path'
    ) from error


def define_flags() -> None:
  """The command line; defined only by the program that runs, so that others may import this."""
  flags.DEFINE_string('workdir', '', 'the directory of the run')
  flags.DEFINE_list('tasks', [], 'names of tasks or groups')
  flags.DEFINE_string('include_path', '', 'a folder with tasks of your own')
  flags.DEFINE_integer('limit', 0, 'questions of each task; 0: all')
  flags.DEFINE_integer('num_fewshot', -1, "solved questions in the context; -1: the task's number")
  flags.DEFINE_string('step', '', "which checkpoint: a step, or 'best'; empty: the newest")
  flags.DEFINE_integer('batch_size', 16, 'rows at a time, over all devices')
  flags.DEFINE_integer('fsdp', 1, 'devices that share the parameters, as config.mesh.fsdp')
  flags.DEFINE_integer('tensor', 1, 'devices that share each matrix, as config.mesh.tensor')
  flags.DEFINE_string('coordinator', '', "several processes: host:port of the first, or 'auto'")
  flags.DEFINE_integer('num_processes', 0, 'several processes: how many')
  flags.DEFINE_integer('process_id', -1, 'several processes: which one, from 0')


def main(_: list[str]) -> None:
  results = evaluate(
    FLAGS.workdir, FLAGS.tasks, include_path=FLAGS.include_path, limit=FLAGS.limit,
    num_fewshot=FLAGS.num_fewshot, batch_size=FLAGS.batch_size, fsdp=FLAGS.fsdp,
    tensor=FLAGS.tensor, step=FLAGS.step,
    processes=(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id),
  )  # fmt: skip
  if results is not None:
    from lm_eval.utils import make_table

    kept = {key: results[key] for key in ('results', 'n-samples', 'n-shot', 'versions')}
    files.write_json(Path(FLAGS.workdir) / FILE, kept)
    print(make_table(results))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
