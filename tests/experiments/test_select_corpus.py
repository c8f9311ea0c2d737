"""Corpus selection: what is chosen, against a loop in memory; the same bytes however it is run."""

import gzip
import itertools
import json
import math
import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs import lm
from experiments import corpus_job, files
from experiments.data import readers
from experiments.errors import UserError
from experiments.select_corpus import jobs
from experiments.select_corpus import run as selecting
from jaxrw.scores import dsir
from tests.experiments.forked import run as run_program

TOPICS = ('moon star orbit comet sun', 'flour sugar oven yeast salt', 'goal ball team coach win')


def write(path: Path, texts, **more) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, 'wt') as out:
    for i, text in enumerate(texts):
      out.write(json.dumps({'text': text, 'id': f'{path.name}/{i}', **more}) + '\n')


def draw(rng, topic: int, words: int) -> str:
  """Mostly words of one topic."""
  own, all_ = TOPICS[topic].split(), ' '.join(TOPICS).split()
  return ' '.join(str(rng.choice(own if rng.random() < 0.7 else all_)) for _ in range(words))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Five raw shards of 40 documents, a tenth on the moon; two targets, moon and oven."""
  root, rng = tmp_path_factory.mktemp('corpus'), np.random.default_rng(0)
  for shard in range(5):
    topics = rng.choice(3, 40, p=[0.2, 0.3, 0.5])
    texts = [draw(rng, topic, int(rng.integers(20, 60))) for topic in topics]
    write(root / 'raw' / f'part{shard % 2}' / f'{shard}.jsonl.gz', [*texts, 'too short'])
  write(root / 'moon.jsonl.gz', [draw(rng, 0, 40) for _ in range(10)])
  write(root / 'oven.jsonl.gz', [draw(rng, 1, 40) for _ in range(20)])
  write(root / 'held.jsonl.gz', [draw(rng, 0, 40) for _ in range(5)])
  return root


def settings(corpus, out, **changes):
  given = {
    'raw': str(corpus / 'raw'), 'targets': [f'moon={corpus / "moon.jsonl.gz"}'], 'keep': 30.0,
    'min_words': 10, 'out': out,
  }  # fmt: skip
  return selecting.Settings(**(given | changes))


def select(corpus, out, **changes):
  return selecting.select(settings(corpus, out, **changes), corpus_job.local(1))


def written(out: Path, name: str = 'dsir') -> dict[str, list[str]]:
  """{shard: ids} that were chosen."""
  folder, found = out / 'train' / name, {}
  for path in sorted(folder.rglob('*.jsonl.gz')):
    found[path.relative_to(folder).as_posix()] = [record['id'] for record in records(path)]
  return found


def ids(found) -> set[str]:
  return {i for listed in found.values() for i in listed}


def everything(out: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(out)): path.read_bytes()
    for path in sorted(out.rglob('*'))
    if path.is_file() and path.relative_to(out).parts[0] in ('train', 'validation', 'result.json')
  }


def records(path: Path) -> list[dict]:
  with gzip.open(path, 'rt') as lines:
    return [json.loads(line) for line in lines]


def read(corpus) -> list[tuple[str, int, str, str]]:
  """(shard, line, id, text) of all raw documents."""
  root = corpus / 'raw'
  return [
    (path.relative_to(root).as_posix(), number, record['id'], record['text'])
    for path in sorted(root.rglob('*.jsonl.gz'))
    for number, record in enumerate(records(path), start=1)
  ]


def buckets(text: str) -> Counter:
  """By the formula, one n-gram after the other."""
  import hashlib

  words = re.findall(r'\w+|[^\w\s]+', text.lower())
  grams = words + [' '.join(pair) for pair in itertools.pairwise(words)]
  return Counter(int(hashlib.sha256(g.encode()).hexdigest(), 16) % 10_000 for g in grams)


def log_weights(corpus, target: str) -> dict[str, float]:
  """{id: log weight} by Python loops."""
  target_counts, raw_counts = Counter(), Counter()
  for record in records(corpus / target):
    target_counts += buckets(record['text'])
  documents = {i: buckets(text) for _, _, i, text in read(corpus)}
  for counts in documents.values():
    raw_counts += counts
  p, q = sum(target_counts.values()), sum(raw_counts.values())
  ratio = {
    j: math.log(target_counts[j] / p + 1e-8) - math.log(raw_counts[j] / q + 1e-8)
    for j in raw_counts
  }
  return {i: sum(n * ratio[j] for j, n in c.items()) for i, c in documents.items()}


def long_enough(corpus) -> set[str]:
  return {i for _, _, i, text in read(corpus) if len(text.split()) >= 10}


def test_without_noise_the_heaviest_are_taken(corpus, tmp_path):
  select(corpus, tmp_path, temperature=0.0)
  weights, candidates = log_weights(corpus, 'moon.jsonl.gz'), long_enough(corpus)
  best = sorted(candidates, key=lambda i: -weights[i])[:30]
  assert ids(written(tmp_path)) == set(best)


def test_noise_hangs_on_seed_shard_and_line(corpus, tmp_path):
  select(corpus, tmp_path, temperature=50.0, seed=3)
  weights, candidates, keys = log_weights(corpus, 'moon.jsonl.gz'), long_enough(corpus), {}
  for shard, line, i, _ in read(corpus):
    gumbel = jobs.noise(3, 0, jobs.shard_id(shard), np.array([line]))[0]
    keys[i] = weights[i] / 50 + gumbel
  best = sorted(candidates, key=lambda i: -keys[i])[:30]
  assert ids(written(tmp_path)) == set(best)


def test_noise_is_gumbel_and_not_shared():
  lines = np.arange(5000)
  one, two = (jobs.noise(0, 0, shard, lines) for shard in (7, 1 << 63))
  assert abs(one.mean() - 0.5772) < 4 * 1.28 / 5000**0.5
  assert abs(np.corrcoef(one, two)[0, 1]) < 0.06
  np.testing.assert_array_equal(one[4090:], jobs.noise(0, 0, 7, lines[4090:]))  # any chunk
  assert (jobs.noise(1, 0, 7, lines) != one).mean() > 0.99
  assert (jobs.noise(0, 1, 7, lines) != one).mean() > 0.99


def test_per_ngram_forgets_the_length(corpus, tmp_path):
  select(corpus, tmp_path, temperature=0.0, per_ngram=True)
  weights, texts = log_weights(corpus, 'moon.jsonl.gz'), {i: t for _, _, i, t in read(corpus)}
  mean = {i: weights[i] / (2 * len(texts[i].split()) - 1) for i in long_enough(corpus)}
  assert ids(written(tmp_path)) == set(sorted(mean, key=lambda i: -mean[i])[:30])


def test_several_targets_share_and_do_not_overlap(corpus, tmp_path):
  both = [f'{name}={corpus / name}.jsonl.gz' for name in ('moon', 'oven')]
  result = select(corpus, tmp_path, targets=both, temperature=0.0)
  moon, oven = (log_weights(corpus, f'{name}.jsonl.gz') for name in ('moon', 'oven'))
  candidates = long_enough(corpus)
  first = set(sorted(candidates, key=lambda i: -moon[i])[:10])  # a third of the target's n-grams
  second = set(sorted(candidates - first, key=lambda i: -oven[i])[:20])
  assert ids(written(tmp_path)) == first | second
  assert result['selections']['dsir']['documents'] == 30


def test_the_selection_is_nearer_to_the_target(corpus, tmp_path):
  result = select(corpus, tmp_path, validation=[f'moon={corpus / "held.jsonl.gz"}'])
  chosen, chance = (result['selections'][name] for name in ('dsir', 'random'))
  assert chosen['kl_reduction'] > 0.05 > chance['kl_reduction']
  # By hand, from what was written.
  hasher, texts = dsir.Hasher(), {i: t for _, _, i, t in read(corpus)}
  p = hasher.count(record['text'] for record in records(corpus / 'moon.jsonl.gz'))
  q = hasher.count(texts.values())
  kept = hasher.count(texts[i] for i in sorted(ids(written(tmp_path))))
  assert chosen['kl_reduction'] == pytest.approx(dsir.kl_reduction([p], q, kept))
  assert chosen['documents'] == chance['documents'] == 30
  assert chosen['bytes'] == sum(len(texts[i].encode()) for i in ids(written(tmp_path)))
  # What is printed at the end trains on it.
  config = lm.get_config(f'path={tmp_path}')
  config.data.domain_key = 'selection'
  source = readers.open_source(config.data)
  assert source.domains == ('dsir', 'moon', 'random')
  held_out = [len(list(source.documents('dsir', split))) for split in ('train', 'validation')]
  assert sum(held_out) == 30
  assert held_out[1] <= 6
  assert len(list(source.documents('moon', 'validation'))) == 5


def test_records_keep_their_fields(corpus, tmp_path):
  select(corpus, tmp_path)
  originals = {i: t for _, _, i, t in read(corpus)}
  for path in (tmp_path / 'train' / 'dsir').rglob('*.gz'):
    for record in records(path):
      whole = {'text': originals[record['id']], 'id': record['id'], 'selection': 'dsir'}
      assert record == whole


@pytest.mark.parametrize('kind', ['local', 'beam', 'hosts', 'slurm'])
def test_every_executor_writes_the_same_bytes(corpus, tmp_path, kind, request):
  select(corpus, tmp_path / 'serial', duplicates=0.8)
  out = tmp_path / 'other'
  given = settings(corpus, out, duplicates=0.8)
  if kind == 'hosts':
    run = lambda i: selecting.select(given, corpus_job.host(i, 2, wait=60))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  elif kind == 'slurm':
    request.getfixturevalue('slurm')
    selecting.select(given, corpus_job.slurm(2))
  else:
    if kind == 'beam':
      pytest.importorskip('apache_beam')
    selecting.select(given, {'local': lambda: corpus_job.local(2), 'beam': corpus_job.beam}[kind]())
  same, other = everything(tmp_path / 'serial'), everything(out)
  assert other == same
  assert len(same) > 8


def test_other_shards_do_not_change_a_documents_chance(corpus, tmp_path):
  """With weights out of the way, a document's place hangs on its own noise."""
  select(corpus, tmp_path / 'all', temperature=math.inf, keep=200.0)
  few = tmp_path / 'few'
  for path in (corpus / 'raw').rglob('[0-2].jsonl.gz'):
    to = few / 'raw' / path.relative_to(corpus / 'raw')
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(path.read_bytes())
  (few / 'moon.jsonl.gz').write_bytes((corpus / 'moon.jsonl.gz').read_bytes())
  select(few, tmp_path / 'part', temperature=math.inf, keep=30.0)
  shards = {p.relative_to(few / 'raw').as_posix() for p in (few / 'raw').rglob('*.gz')}
  keys = {
    i: jobs.noise(0, 0, jobs.shard_id(shard), np.array([line]))[0]
    for shard, line, i, text in read(corpus)
    if shard in shards and len(text.split()) >= 10
  }
  best = set(sorted(keys, key=lambda i: -keys[i])[:30])
  assert ids(written(tmp_path / 'part')) == best


def test_near_duplicates_count_once(tmp_path):
  rng = np.random.default_rng(1)
  fresh = lambda: ' '.join(f'w{rng.integers(10_000)}' for _ in range(80))
  copied, changed = fresh(), fresh()
  near = changed.replace(changed.split()[40], 'other', 1)
  write(tmp_path / 'raw' / 'a.jsonl.gz', [copied, fresh(), changed])
  write(tmp_path / 'raw' / 'b.jsonl.gz', [fresh(), copied, near, copied])
  job = jobs.Multiplicity('text', 0.7)
  parts = [job.map(n, tmp_path / 'raw' / n) for n in ('a.jsonl.gz', 'b.jsonl.gz')]
  for one, other in (parts, parts[::-1]):
    found = job.finish(job.merge(one, other))
    sizes = dict(zip(zip(found['shard'].tolist(), found['line'].tolist()), found['size'].tolist()))
    a, b = jobs.shard_id('a.jsonl.gz'), jobs.shard_id('b.jsonl.gz')
    assert [sizes[a, i] for i in (1, 2, 3)] == [3, 1, 2]
    assert [sizes[b, i] for i in (1, 2, 3, 4)] == [1, 3, 2, 3]


def test_duplicates_lose_their_share(tmp_path):
  """One of 40 documents is there 40 times: of the draws it gets as much as any other, not half."""
  rng = np.random.default_rng(2)
  fresh = lambda: ' '.join(f'w{rng.integers(10_000)}' for _ in range(30))
  twice = fresh()
  write(tmp_path / 'raw' / 'a.jsonl.gz', [fresh() for _ in range(39)] + [twice] * 40)
  write(tmp_path / 'moon.jsonl.gz', [fresh()])
  hits = {0.0: 0, 0.8: 0}
  for duplicates in hits:
    for seed in range(6):
      out = tmp_path / f'{duplicates} {seed}'
      select(tmp_path, out, duplicates=duplicates, seed=seed, keep=8.0, temperature=math.inf)
      for path in (out / 'train' / 'dsir').rglob('*.gz'):
        hits[duplicates] += sum(record['text'] == twice for record in records(path))
  assert hits[0.0] > 14  # of 48 draws half, and
  assert hits[0.8] <= 5  # one in forty


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'keep': 0.0}, '--keep=0 must be above 0'),
    ({'keep': math.nan}, '--keep'),
    ({'keep': 2.5}, 'a whole one'),
    ({'keep': 205.0}, 'asks for 205 of 205'),  # k = n
    ({'keep': 1000.0}, 'asks for 1,000 of 205'),
    ({'keep': 1e-4}, 'asks for 0 of 205'),
    ({'keep': 203.0}, 'have --min_words=10'),
    ({'temperature': -1.0}, '--temperature=-1'),
    ({'temperature': math.nan}, '--temperature'),
    ({'smoothing': -1.0}, '--smoothing'),
    ({'duplicates': 1.0}, '--duplicates=1'),
    ({'min_words': -1}, '--min_words'),
    ({'text_key': 'body'}, "no text under 'body'"),
    ({'targets': ['moon']}, 'must be NAME=file'),
    ({'targets': ['moon=/nowhere']}, 'holds no .jsonl'),
    ({'targets': ['dsir={root}/moon.jsonl.gz']}, 'is the name of a selection'),
    ({'validation': ['sea={root}/moon.jsonl.gz']}, "'sea' is not among"),
    ({'raw': '/nowhere'}, '--raw: /nowhere holds no'),
  ],
)
def test_bad_settings(corpus, tmp_path, changes, message):
  fill = lambda v: [t.format(root=corpus) for t in v] if isinstance(v, list) else v
  with pytest.raises(UserError, match=re.escape(message)):
    select(corpus, tmp_path, **{name: fill(value) for name, value in changes.items()})
  assert not (tmp_path / 'train').exists()


def test_an_empty_target(corpus, tmp_path):
  write(tmp_path / 'none.jsonl.gz', ['', '  '])
  with pytest.raises(UserError, match='moon has no words'):
    select(corpus, tmp_path / 'out', targets=[f'moon={tmp_path / "none.jsonl.gz"}'])


def test_two_shards_of_one_name(tmp_path):
  for ending in ('jsonl', 'jsonl.gz'):
    (tmp_path / f'a.{ending}').touch()
  with pytest.raises(UserError, match='rename one'):
    selecting.shards(tmp_path, '--raw')


def test_a_truncated_shard_stops_no_other_and_can_be_mended(corpus, tmp_path):
  raw = tmp_path / 'raw'
  for path in (corpus / 'raw').rglob('*.gz'):
    to = raw / path.relative_to(corpus / 'raw')
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(path.read_bytes())
  damaged = raw / 'part0' / '2.jsonl.gz'
  whole = damaged.read_bytes()
  damaged.write_bytes(whole[: len(whole) // 2])
  out = tmp_path / 'out'
  with pytest.raises(UserError, match=r'1 of 5 shards failed, the other 4 are done.*2\.jsonl\.gz'):
    select(corpus, out, raw=str(raw))
  done = {p: p.stat().st_mtime_ns for p in (out / 'work' / 'count').glob('*.npz')}
  assert len(done) == 4
  damaged.write_bytes(whole)
  select(corpus, out, raw=str(raw))
  assert all(p.stat().st_mtime_ns == then for p, then in done.items())
  select(corpus, tmp_path / 'fresh', raw=str(raw))
  assert everything(out) == everything(tmp_path / 'fresh')


def test_shards_of_raw_ones_that_have_gone_go_too(corpus, tmp_path):
  raw = tmp_path / 'raw'
  for path in (corpus / 'raw').rglob('*.gz'):
    to = raw / path.relative_to(corpus / 'raw')
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(path.read_bytes())
  select(corpus, tmp_path / 'out', raw=str(raw))
  (raw / 'part1' / '3.jsonl.gz').unlink()
  select(corpus, tmp_path / 'out', raw=str(raw))
  select(corpus, tmp_path / 'fresh', raw=str(raw))
  assert everything(tmp_path / 'out') == everything(tmp_path / 'fresh')


def test_a_written_shard_that_is_missing_is_named(corpus, tmp_path):
  select(corpus, tmp_path)
  path = next((tmp_path / 'train' / 'dsir').rglob('*.gz'))
  path.unlink()
  with pytest.raises(UserError, match=re.escape(f'{path} was written and is missing')):
    select(corpus, tmp_path)
  shutil.rmtree(tmp_path / 'work' / 'write')
  select(corpus, tmp_path)
  assert path.exists()


# The program --------------------------------------------------------------------------------------


def program(corpus, out, *more):
  return run_program(
    'experiments.select_corpus', f'--raw={corpus / "raw"}', f'--out={out}', '--jobs=1',
    f'--targets=moon={corpus / "moon.jsonl.gz"}', '--keep=30', '--min_words=10', *more,
    folder=Path.cwd(),
  )  # fmt: skip


def test_program(corpus, tmp_path):
  out, held = tmp_path / 'out', f'--validation=moon={corpus / "held.jsonl.gz"}'
  refused = program(corpus, out, held, '--keep=1000')
  assert refused.status == 2
  assert 'asks for 1,000 of 205' in refused.stderr  # and may be asked for less
  done = program(corpus, out, held)
  assert done.status == 0, done.stderr
  assert 'KL reduction' in done.stdout
  assert 'experiments.compare' in done.stdout
  select(corpus, tmp_path / 'other', validation=[held.removeprefix('--validation=')])
  assert everything(out) == everything(tmp_path / 'other')
  assert files.read_json(out / 'result.json')['selections']['dsir']['documents'] == 30
  other = program(corpus, out, held, '--seed=1')
  assert other.status == 2
  assert 'choose another --out' in other.stderr
