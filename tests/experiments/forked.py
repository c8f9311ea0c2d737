"""Programs as a user runs them, each in a process of its own that does not pay for the imports."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

# Imported once, in a process that starts no device; each program is a fork of it.
_SHARED = (
  'experiments.dry_run',
  'experiments.plots',
  'experiments.train',
  'experiments.data.builders',
  'experiments.data.prepared_tfds',
)
_TIMEOUT = 300  # seconds


class Done(NamedTuple):
  """How a program ended."""

  status: int
  stdout: str
  stderr: str


def run(module: str, *args: str, folder: Path, devices: int = 8) -> Done:
  """Runs `python -m module *args` in `folder`, on so many CPU devices."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(list(_SHARED))
  with tempfile.TemporaryDirectory() as outputs:
    streams = [str(Path(outputs, name)) for name in ('out', 'err')]
    process = context.Process(target=_program, args=(module, args, str(folder), devices, streams))
    process.start()
    process.join(_TIMEOUT)
    if process.is_alive():
      process.kill()
      raise TimeoutError(f'{module} {" ".join(args)}: no end after {_TIMEOUT} s')
    return Done(process.exitcode, *(Path(stream).read_text(errors='replace') for stream in streams))


def _program(
  module: str, args: Sequence[str], folder: str, devices: int, streams: Sequence[str]
) -> None:
  for fd, stream in enumerate(streams, start=1):
    os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), fd)
  os.chdir(folder)
  jax.config.update('jax_num_cpu_devices', devices)
  sys.argv = [module, *args]
  runpy.run_module(module, run_name='__main__', alter_sys=True)
