"""The report's looks and its standing caveats."""

LIMITS = (
  'The learning rate of every arm was picked by the number that is reported, on the same '
  'validation text and on seeds that are among the averaged ones. This flatters every arm a '
  'little, and alike.',
  'Each interval stands alone. With many arms and domains, about one in twenty excludes zero by '
  'chance.',
  'Intervals describe the spread over seeds (initialization and batch order). They say nothing '
  'about another corpus, model size, length of training or tokenizer.',
  'Reweighting by loss moves effort from what is already easy to what is still hard; it can help '
  'the worst domain and cost the average. Read both. Noisy or broken text also has high loss.',
  'The training loss under weights is not comparable between arms; everything here is the '
  'unweighted validation loss.',
)

CSS = """
:root { --paper: #fff; --ink: #1d2128; --soft: #5b6470; --line: #e1e4e8; --tint: #f5f6f8;
  --good: #005a8c; --bad: #a84300; --warn: #6b5200; --warn-bg: #fdf6e0; }
@media (prefers-color-scheme: dark) { :root { --paper: #1a1d23; --ink: #e8eaed; --soft: #a4acb8;
  --line: #353a43; --tint: #22262e; --good: #6cc1f2; --bad: #f5a06a; --warn: #f0d67c;
  --warn-bg: #332d18; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .1rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; overflow-wrap: anywhere; }
h4 { font-size: .9rem; margin: .9rem 0 .3rem; color: var(--soft); font-weight: 600; }
p { margin: .4rem 0; }
p, section > ul:not(.cards) > li { max-width: 48rem; }
p:empty { display: none; }
section { margin-top: 2.6rem; }
.kicker { color: var(--soft); letter-spacing: .06em; text-transform: uppercase; font-size: .78rem; }
.facts, .aside, figcaption { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tier { padding: .6rem .9rem; border-left: 4px solid var(--good); background: var(--tint); }
.tier.mechanics, .warning { color: var(--warn); background: var(--warn-bg);
  border-left: 4px solid var(--warn); padding: .6rem .9rem; }
.cards { list-style: none; padding: 0; display: grid; gap: .8rem; margin: 1rem 0; }
.cards li { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.badge { display: inline-block; font-size: .78rem; font-weight: 650; padding: .1rem .55rem;
  border-radius: 99px; border: 1.5px solid var(--soft); color: var(--soft); }
.badge.better { border-color: var(--good); color: var(--good); }
.badge.worse, .badge.diverged { border-color: var(--bad); color: var(--bad); }
.x { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  margin: .5rem 0 1.2rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th { font-weight: 600; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); }
td small { display: block; color: var(--soft); font-size: .76rem; line-height: 1.35; }
td b { font-weight: 600; }
b.better { color: var(--good); }
b.worse { color: var(--bad); }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings th { font-weight: 400; color: var(--soft); text-align: left; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .4rem; max-width: 48rem; }
.documents { padding-left: 1.4rem; font-size: .9rem; }
.documents li { margin-bottom: .6rem; overflow-wrap: anywhere; }
pre { background: var(--tint); border-radius: 6px; padding: .5rem .7rem; margin: .25rem 0 0;
  font: .78rem/1.45 ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 7.5rem; overflow: hidden; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--good); }
@media (max-width: 40rem) { main { padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.35rem; }
  figure img { max-width: none; } }
@media print { main { max-width: none; padding: 0; } section { break-inside: auto; }
  figure, .cards li, .documents li, tr { break-inside: avoid; } h2, h3, h4 { break-after: avoid; }
  body { font-size: 11pt; } .x { overflow: visible; } figure img { max-width: 100%; } }
"""
