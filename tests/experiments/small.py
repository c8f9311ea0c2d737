"""A corpus of two small domains and a config that trains on it in seconds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from experiments import checkpoints

WORDS = 'the weight of a loss is one number on every device and survives kill'.split()


def write_corpus(folder: Path, documents: int = 60) -> Path:
  """`{domain}.{split}.jsonl` for an easy domain (four words) and a hard one (random letters)."""
  rng = random.Random(0)
  folder.mkdir(parents=True, exist_ok=True)
  texts = {
    'easy': lambda: ' '.join(rng.choices(WORDS[:4], k=40)),
    'hard': lambda: ''.join(rng.choices('abcdefghijklmnopqrstuvwxyz ,.', k=200)),
  }
  for domain, text in texts.items():
    for split, count in (('train', documents), ('validation', documents // 6)):
      lines = [json.dumps({'id': f'{domain}-{split}-{i}', 'text': text()}) for i in range(count)]
      (folder / f'{domain}.{split}.jsonl').write_text('\n'.join(lines) + '\n')
  return folder


def config(corpus: Path, root: Path, steps: int = 6):
  """A two-layer GPT of width 32 on `write_corpus`; a checkpoint every other step."""
  value = common.quick(common.base_config())
  value.total_steps = steps
  value.data.update(source='folder', path=str(corpus), root=str(root))
  value.log.update(tensorboard=False, progress=False)
  common.set_weighting(value, 'linupper:0.4')
  return value


@contextlib.contextmanager
def interrupted_after(step, monkeypatch):
  """Whoever trains inside is stopped once the checkpoint of `step` is there."""
  save = checkpoints.Checkpoints.save

  def save_then_stop(self, saved, *rest):
    save(self, saved, *rest)
    if saved == step:
      self.wait()
      raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(checkpoints.Checkpoints, 'save', save_then_stop)
    yield


def program(module: str, corpus: Path, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
  """Runs a program on four tiny steps of `write_corpus`, as a user does."""
  return called(
    module,
    workdir,
    f'--workdir={workdir}',
    f'--config=configs/lm.py:path={corpus},quick',
    *('--noconfig.model.scan', *flags),
  )


def called(module: str, workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
  """Runs a program on one device, with the prepared data of the run in `workdir`."""
  return subprocess.run(
    [sys.executable, '-m', module, *arguments],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'JAXRW_DATA': f'{workdir}-data'},
    capture_output=True,
    text=True,
  )
