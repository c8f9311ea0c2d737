"""The page: honest words, escaped text, nothing from outside, and no file it cannot do without."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs import common
from experiments import board as board_lib
from experiments import compare, files, movers, plots, report, report_documents, verdict
from experiments.errors import UserError
from tests.experiments.fake_runs import DOMAINS, FakeTrain, write_jsonl

HOSTILE = '<script>alert(1)</script> & see https://example.org/x.png "quoted"'


def hostile(run, example_id):
  return {'domain': 'code', 'doc': f'<b>{example_id}</b>', 'text': HOSTILE}


def make_board(folder, weightings='uniform,linupper:1.0', lrs='1e-3,3e-3', seeds=2, **train):
  plan = compare.make_plan(common.base_config(), weightings, lrs, seeds, 'macro_bpb', str(folder))
  board = compare.compare(plan, FakeTrain(**train))
  files.write_json(folder / 'compare.json', compare.record(board))
  return board


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('board')
  make_board(folder)
  return report.write(board_lib.load_board([folder]), folder, hostile)


@pytest.fixture(scope='module')
def html(page):
  return page.read_text(encoding='utf-8')


class Checker(HTMLParser):
  """Collects tags and attributes, and that what opens also closes."""

  VOID = ('meta', 'img', 'source')

  def __init__(self):
    super().__init__()
    self.tags, self.attributes, self.open, self.text = [], [], [], []

  def handle_starttag(self, name, attrs):
    self.tags.append(name)
    self.attributes += attrs
    if name not in self.VOID:
      self.open.append(name)

  def handle_endtag(self, name):
    assert self.open.pop() == name

  def handle_data(self, data):
    self.text.append(data)


def parse(html: str) -> Checker:
  checker = Checker()
  checker.feed(html)
  assert checker.open == []
  return checker


def text_of(board, describe=hostile) -> str:
  """What the page says, without the seconds it takes to draw its figures."""
  return ' '.join(parse(report.build(board, [], describe)).text)


def test_nothing_is_loaded_from_outside(html):
  checker = parse(html)
  for name, value in checker.attributes:
    if name in ('src', 'srcset', 'href', 'poster', 'data', 'action'):
      assert value.startswith('data:'), (name, value[:60])
  assert not {'script', 'link', 'iframe', 'object', 'base'} & set(checker.tags)
  style = re.search(r'<style>(.*?)</style>', html, re.S)[1]
  assert 'url(' not in style
  assert '@import' not in style
  assert "default-src 'none'" in html


def test_documents_are_shown_and_escaped(html):
  checker = parse(html)
  assert any(HOSTILE in text for text in checker.text)  # as text, hence escaped in the source
  assert any('pushed down' in text for text in checker.text)
  assert 'b' in checker.tags
  assert '<b>0</b>' not in html


def test_arm_names_are_escaped(tmp_path):
  board = make_board(tmp_path, lrs='3e-3', seeds=1)
  arm = board_lib.Arm('<i>x</i>', board.arms[1].lr, board.arms[1].runs)
  text = report.build(board_lib.Board((board.baseline, arm)), [], hostile)
  assert '<i>' not in text
  assert '&lt;i&gt;' in text


def test_says_verdict_tier_floor_and_limits(html):
  text = ' '.join(parse(html).text)
  for phrase in (
    'Mechanics tier', 'ranks nothing', '95% interval', 'could have detected', 'byte-bigram model',
    'By domain it', 'Limits', 'What all runs shared', 'optim.lr', '0.10.2',
  ):  # fmt: skip
    assert phrase in text, phrase


def test_figures_are_written_beside_the_page(page):
  names = {path.stem for path in (page.parent / 'plots').glob('*.png')}
  # These arms cost the same and draw the same, and no alignment was read.
  assert names == set(plots.FIGURES) - {'frontier', 'mixtures', 'epochs', 'alignment'}
  for path in (page.parent / 'plots').glob('*.png'):
    assert path.read_bytes().startswith(b'\x89PNG')


def test_no_two_of_many_lines_look_alike():
  styles = [plots.style_of(i, plots.LIGHT) for i in range(28)]
  assert len({(s['color'], str(s['linestyle'])) for s in styles}) == 28


def test_labels_at_the_ends_of_lines_do_not_overlap_and_stay_where_there_is_room():
  """Nine lines end together at the top, one far below: only those that crowd move."""
  ax = Figure().subplots()
  ax.set_ylim(0, 1)
  plots.label_ends(ax, [(1, 0.1, 'low', 'k'), *[(1, 0.95, f'{i}', 'k') for i in range(9)]])
  heights = sorted(text.get_position()[1] for text in ax.texts)
  assert heights[0] == 0.1
  assert heights[-1] == 1
  assert np.diff(heights).min() >= 0.0749


def test_arms_of_different_cost_have_a_frontier(tmp_path):
  board = make_board(tmp_path)
  first, *others = board.arms
  arms = [dataclasses.replace(first, step_flops=3e9)]
  arms += [dataclasses.replace(arm, step_flops=2e9) for arm in others]
  board = board_lib.Board(tuple(arms), board.metric)
  assert plots.render(board, 'frontier', plots.LIGHT).startswith(b'\x89PNG')
  assert f'{others[0].name} 0.667' in ' '.join(verdict.board_text(board).split())


def test_pictures_of_mixtures(tmp_path):
  """Drawn where a mixture changed, where epochs differ and where an alignment was read."""
  board = make_board(tmp_path, lrs='1e-3')
  for arm, share in zip(board.arms, (0.25, 0.4)):
    for run in arm.runs:
      names = run.result['corpus']['domains']
      result = files.read_json(run.path / 'result.json')
      result['epochs'] = {name: share * (i + 1) for i, name in enumerate(names)}
      files.write_json(run.path / 'result.json', result)
      if share == 0.4:
        rows = run.lines('metrics.jsonl')
        vector = dict(zip(names, (0.4, 0.3, 0.2, 0.1)))
        for row in rows:
          if row['kind'] == 'train':
            row['mixture'] = {'proportions': vector, 'objective': vector, 'noise': 1.0}
        write_jsonl(run.path / 'metrics.jsonl', rows)
  cosines = [[1.0 if i == j else 0.3 for j in range(4)] for i in range(4)]
  read = {'domains': names, 'cosines': cosines, 'inner': cosines, 'blocks': 2, 'step': 10}
  files.write_json(board.arms[1].runs[0].path / board_lib.ALIGNMENT, read)
  board = board_lib.load_board([tmp_path])
  for name in ('mixtures', 'epochs', 'alignment'):
    for theme in (plots.LIGHT, plots.DARK):
      assert plots.render(board, name, theme).startswith(b'\x89PNG')
  text = report.write(board, tmp_path, hostile).read_text(encoding='utf-8')
  for title in ('How the mixture changed', 'Epochs consumed', 'Which domains pull alike'):
    assert title in text


def test_of_very_many_domains_those_are_shown_in_which_arms_differ_most(tmp_path, monkeypatch):
  """Tables, pictures and the sentence that says so; the record keeps all."""
  board = make_board(tmp_path)
  assert board.shown_domains == board.domains == DOMAINS
  assert verdict.shown_sentence(board) == ''
  monkeypatch.setattr(board_lib, 'MAX_DOMAINS', 2)
  monkeypatch.setattr(plots, 'MAX_DOMAINS', 2)
  monkeypatch.setattr(plots, 'NAMED_LINES', 2)
  board = board_lib.load_board([tmp_path])
  assert board.shown_domains == ('prose', 'tables')  # where the effects of linupper:1 are largest
  text = verdict.board_text(board)
  assert 'Of 4 domains the 2 in which the arms differ most are shown' in text
  assert 'prose' in text
  assert ' docs' not in verdict.means_table(board) + verdict.differences_table(board)
  assert 'bpb/docs' in compare.record(board)['arms'][0]['values']
  weights = plots.draw_domain_weights(board, plots.LIGHT)
  assert any('2 more domains' in ax.get_title() + ax.get_title('left') for ax in weights.axes)
  page = report.write(board, tmp_path).read_text(encoding='utf-8')
  assert 'Of 4 domains the 2 in which the arms differ most are shown' in page
  alone = dataclasses.replace(board, arms=board.arms[:1])
  assert alone.shown_domains == ('docs', 'prose')  # the worst of its own
  assert 'the 2 with most bits per byte' in verdict.shown_sentence(alone)


@pytest.mark.parametrize('missing', ['metrics.jsonl', 'examples.jsonl', 'config.json'])
def test_works_without_optional_files(tmp_path, missing):
  make_board(tmp_path, lrs='3e-3', seeds=1)
  for path in tmp_path.glob(f'runs/*/{missing}'):
    path.unlink()
  board = board_lib.load_board([tmp_path])
  assert 'Verdict' in text_of(board)
  plots.render(board, 'concentration', plots.LIGHT)


def test_works_without_the_prepared_text(tmp_path, monkeypatch):
  monkeypatch.setenv('JAXRW_DATA', str(tmp_path / 'nothing'))
  make_board(tmp_path, lrs='3e-3', seeds=1)
  text = text_of(board_lib.load_board([tmp_path]), report_documents.DocumentFinder())
  assert re.search(r'example \d+', text)


def test_loose_runs(tmp_path):
  board = make_board(tmp_path, weightings='linupper:1.0,uniform', lrs='3e-3', seeds=1)
  folders = [run.path for arm in board.arms for run in arm.runs]
  loose = board_lib.load_board(folders)
  assert [arm.name for arm in loose.arms] == ['uniform', 'linupper:1']
  one = board_lib.load_board(folders[:1])
  assert 'nothing to compare' in text_of(one)
  assert plots.render(one, 'differences', plots.LIGHT) is None


def test_unfinished_run_is_left_out_and_mentioned(tmp_path):
  board = make_board(tmp_path, lrs='3e-3', seeds=2)
  run = board.arms[1].runs[1].path
  (run / 'result.json').unlink()
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"kind": "train", "step"')  # torn by a kill
  board = board_lib.load_board([tmp_path])
  assert len(board.arms[1].values('macro_bpb')) == 1
  assert '1 run not finished' in text_of(board)
  assert plots.render(board, 'curves', plots.LIGHT)


def test_all_diverged(tmp_path):
  make_board(tmp_path, diverges=lambda *_: True)
  page = report.write(board_lib.load_board([tmp_path]), tmp_path / 'report')
  assert 'the baseline diverged' in page.read_text(encoding='utf-8')


def test_not_a_run(tmp_path):
  with pytest.raises(UserError, match='neither a comparison'):
    board_lib.load_board([tmp_path])
  (tmp_path / 'compare.json').write_text('{"arms": [')
  with pytest.raises(UserError, match='not valid JSON'):
    board_lib.load_board([tmp_path])


def test_movers_average_and_order():
  rows = [
    {'example_id': [1, 2], 'weight': [1.0, 1.0], 'loss': [9.0, 9.0]},  # burn-in: says nothing
    {'example_id': [1, 2], 'weight': [0.5, 1.5], 'loss': [1.0, 3.0]},
    {'example_id': [3, 1], 'weight': [1.5, 0.7], 'loss': [4.0, 2.0]},
  ]
  ordered = movers.movers(rows)
  assert ordered == [
    movers.Mover(1, pytest.approx(0.6), 1.5, 2),
    movers.Mover(2, 1.5, 3.0, 1),
    movers.Mover(3, 1.5, 4.0, 1),
  ]
  down, up = movers.extremes(ordered, 5)
  assert ([m.example_id for m in down], [m.example_id for m in up]) == ([1], [3])


def test_uniform_weights_move_nothing(tmp_path):
  write_jsonl(
    tmp_path / 'examples.jsonl', [{'example_id': [1, 2], 'weight': [1.0, 1.0], 'loss': [1.0, 2.0]}]
  )
  assert movers.movers(board_lib.Run(tmp_path).lines('examples.jsonl')) == []


@pytest.mark.parametrize(
  ('w', 'order', 'label'),
  [
    ({'loss': {'fn': 'uniform'}}, ['loss'], 'uniform'),
    ({'loss': {'fn': 'linupper', 'temperature': 0.4}}, ['loss'], 'linupper:0.4'),
    (
      {'loss': {'fn': 'row_shuffled', 'stage': {'fn': 'linupper', 'temperature': 1.0}}},
      ['loss'],
      'row_shuffled:linupper:1',
    ),
    (
      {'loss': {'fn': 'linupper', 'temperature': {'values': [1]}}, 'cap': {'fn': 'cap'}},
      ['loss', 'cap'],
      'linupper:scheduled+cap',
    ),
  ],
)
def test_weighting_label(w, order, label):
  assert board_lib.weighting_label(json.loads(json.dumps({'w': w, 'weighting': order}))) == label
