"""Processes that train one model: they find each other, wait for each other, and end together.

Where one cannot be found or has died, jax ends the others from C++: a screen of log, then SIGABRT.
Here that becomes one last line that says what to do, and an exit status of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # its client has the only barrier with a timeout
from jax.experimental import multihost_utils

from experiments.errors import HostLostError, StoppedError, UserError

BARRIER_SECONDS = 600  # one process reads the checkpoints while the others wait
_LEAVING_SECONDS = 5
_LOST = (
  'another process of this run died or cannot be reached{}; start all of them again with the same '
  'command: they go on from the newest checkpoint'
)
_numbers = itertools.count()
_handler: Any = None  # what C calls must not be collected


def initialize(
  coordinator: str = '',
  num_processes: int = 0,
  process_id: int = -1,
  *,
  join_timeout: int = 300,
  host_timeout: int = 60,
) -> None:
  """Joins this process to the others; call it before anything else touches jax.

  Args:
    coordinator: 'host:port' of process 0, the same in every process. '' with the other arguments
      at their defaults means a single process and does nothing; 'auto' asks the cluster (SLURM,
      Open MPI, TPU pods, Kubernetes) for all three.
    num_processes: how many processes take part.
    process_id: which one this is, from 0.
    join_timeout: seconds to wait for the others.
    host_timeout: seconds without a sign of life after which a process counts as dead, and the
      others end.

  Raises:
    UserError: arguments that do not fit, no cluster, or a port that cannot be used. When the others
      do not come, the process ends here, with the same exit status.
  """
  if min(join_timeout, host_timeout) < 1:
    raise UserError(
      f'join_timeout={join_timeout}, host_timeout={host_timeout}: both must be at least 1 second'
    )
  if coordinator and coordinator != 'auto':
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdecimal() and int(port) < 2**16):
      raise UserError(
        f"coordinator={coordinator!r}: must be 'auto', or host:port of process 0, 10.0.0.1:1234"
      )
    if not 0 <= process_id < num_processes:
      raise UserError(
        f'process_id={process_id} does not fit num_processes={num_processes}: '
        f'give each of the {num_processes} processes its own number, from 0'
      )
    if process_id == 0:
      _check_port(int(port))
  elif not coordinator:
    if num_processes > 1:
      raise UserError(
        f'num_processes={num_processes} without a coordinator: give host:port of process 0'
      )
    return
  given = (None, None, None) if coordinator == 'auto' else (coordinator, num_processes, process_id)
  with _silent_stderr() as stderr:
    _when_aborted(
      lambda: f'error: {_why_not_joined(join_timeout)}', UserError.exit_status, to=stderr
    )
    try:
      jax.distributed.initialize(
        *given,
        initialization_timeout=join_timeout,
        heartbeat_timeout_seconds=host_timeout,
        shutdown_timeout_seconds=host_timeout,
      )
    except Exception as e:  # each cluster has its own
      raise UserError(
        f'coordinator={coordinator} cannot be used ({e}): start every process with srun or mpirun, '
        'on a TPU pod or in a Kubernetes job, or give --coordinator=host:port, --num_processes and '
        '--process_id'
      ) from e
  where = "; jax's lines above say what it noticed"
  _when_aborted(lambda: f'lost: {_LOST.format(where)}', HostLostError.exit_status)


def _check_port(port: int) -> None:
  """jax shares a port that is in use, or crashes over it."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    socket.create_server(('', port), family=family, dualstack_ipv6=both).close()
  except OSError as e:
    raise UserError(
      f'coordinator: process 0 cannot listen at port {port} ({os.strerror(e.errno)}); choose a '
      'free port, the same for all processes'
    ) from e


def _why_not_joined(seconds: int) -> str:
  state = distributed.global_state
  host, _, port = state.coordinator_address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
    why = (
      'not all of them came: check that each was started, with the same --num_processes and a '
      '--process_id of its own'
    )
  except OSError as e:
    why = (
      f'nothing answers there ({e.strerror or e}): check that process 0 runs, that this is its '
      'address, and that no firewall closes the port'
    )
  return (
    f'process {state.process_id} could not join the others at {state.coordinator_address} within '
    f'{seconds} seconds; {why}'
  )


@contextlib.contextmanager
def _silent_stderr() -> Iterator[int]:
  """What C++ logs is dropped; yields a descriptor of the real stderr."""
  sys.stderr.flush()
  real, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield real
  finally:
    os.dup2(real, 2)
    os.close(real)
    os.close(nowhere)


def _when_aborted(message: Callable[[], str], status: int, to: int = 2) -> None:
  """From now on abort() ends this process with `message` and `status`.

  The handler is a C function: one of Python's waits for the main thread, which waits for a device.
  """
  global _handler

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def handler(_):
    os.write(to, f'{message()}\n'.encode())
    os._exit(status)

  set_handler = ctypes.CDLL(None).signal
  set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
  _handler = handler


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
  """Returns when every process is here; nothing with one process. All must call the same barriers.

  Raises:
    HostLostError: names the barrier and who did not arrive in time.
  """
  count, client = jax.process_count(), distributed.global_state.client
  if count == 1:
    return
  if client is None:  # a pod that jax joined by itself
    multihost_utils.sync_global_devices(name)
    return
  key = f'barrier/{next(_numbers)}'
  client.key_value_set(f'{key}/{jax.process_index()}', '')
  try:
    client.wait_at_barrier(key, round(seconds * 1000))
  except jax.errors.JaxRuntimeError as e:
    arrived = {int(path.rpartition('/')[2]) for path, _ in client.key_value_dir_get(f'{key}/')}
    absent = sorted(set(range(count)) - arrived)
    raise HostLostError(
      f'{_processes(absent)} of {count} did not arrive at {name!r} within {seconds:g} seconds; '
      'look at the output there, then start all of them again with the same command'
    ) from e


def _processes(indices: list[int]) -> str:
  names = ', '.join(map(str, indices[:8])) + (', ...' if len(indices) > 8 else '')
  return f'process{"es" * (len(indices) != 1)} {names}'


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """An error inside ends this process without waiting for the others, which then end, too.

  Without it a process that fails alone waits at its exit for others that wait for it.

  Raises:
    HostLostError: in the place of what a collective raises when a process at its other end is gone.
  """
  try:
    yield
  except StoppedError:
    raise  # they all stop
  except BaseException as e:
    if jax.process_count() > 1:
      lost = _speaks_of_a_lost_process(e)
      status = 130 if isinstance(e, KeyboardInterrupt) else getattr(e, 'exit_status', 1)
      atexit.register(_leave, HostLostError.exit_status if lost else status)
      if lost:
        raise HostLostError(_LOST.format(f' ({str(e).splitlines()[0]})')) from e
    raise


def _speaks_of_a_lost_process(error: BaseException) -> bool:
  words = r'Gloo|NCCL|UNAVAILABLE|heartbeat|Connection (reset|closed|refused)|Socket closed'
  return isinstance(error, (RuntimeError, ValueError)) and bool(re.search(words, str(error)))


def _leave(status: int) -> None:
  """Ends this process after those that fail alike have had the time to say so themselves."""
  with contextlib.suppress(Exception):
    distributed.global_state.client.wait_at_barrier('leaving', _LEAVING_SECONDS * 1000)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
