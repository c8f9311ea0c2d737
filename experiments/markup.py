"""HTML where text is escaped unless it was built here: `tag('p', text)` is safe for any text."""

from __future__ import annotations

import html


class Html(str):
  """Finished markup; nothing else goes into a page unescaped."""

  __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
  """`tag('td', '3 < 4', class_='n')` -> '<td class="n">3 &lt; 4</td>'. A trailing _ is dropped."""
  attrs = ''.join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
  return Html(f'<{name}{attrs}>{join(*children)}</{name}>')


def join(*children: str) -> Html:
  return Html(''.join(c if isinstance(c, Html) else html.escape(c) for c in children))


def table(header: list[str], rows: list[list[str]], **attributes: str) -> Html:
  """A table whose first column names the row; it scrolls sideways where it does not fit."""
  head = tag('tr', *(tag('th', cell, scope='col') for cell in header))
  body = (
    tag('tr', tag('th', row[0], scope='row'), *(tag('td', c) for c in row[1:])) for row in rows
  )
  return tag('div', tag('table', tag('thead', head), tag('tbody', *body), **attributes), class_='x')
