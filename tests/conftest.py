"""Eight CPU devices, quick compilation and one cache of it, set before jax is imported anywhere."""

import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Tests compile much and compute little: machine code without optimization halves their time. The
# programs that XLA makes (what the counts are taken from) stay the same. XLA_FLAGS= turns it off.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

# Tests build the same tiny training step again and again, in this process and in others. xdist
# workers inherit the folder from the process that starts them.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _cache = tempfile.TemporaryDirectory(prefix='jaxrw-test-cache-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


_tests_run = 0


def pytest_runtest_teardown() -> None:
  """Frees compiled programs now and then: each takes several memory maps, of which Linux lets a
  process have 65,530; beyond them it crashes."""
  global _tests_run
  _tests_run += 1
  if _tests_run % 50 == 0 and os.path.exists('/proc/self/maps'):
    with open('/proc/self/maps') as maps:
      if sum(1 for _ in maps) > 20_000:
        import jax

        jax.clear_caches()
