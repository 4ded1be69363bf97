"""A report in Markdown as one HTML file, with its figures in it."""

from __future__ import annotations

import base64
import html
import pathlib
import re

import markdown_it

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: #f4f4f4; }
img { max-width: 100%; }
code { background: #f4f4f4; padding: 0 .2rem; }
h2 { border-bottom: 1px solid #ddd; margin-top: 2.5rem; }
"""


def page(text: str, title: str, folder: pathlib.Path) -> str:
  """Returns the HTML of a report; its PNG files lie in the folder."""
  # Nothing from data can be markup: the Markdown is escaped, and HTML in it is off.
  parser = markdown_it.MarkdownIt('commonmark', {'html': False}).enable('table')
  body = re.sub(
    r'src="([\w.-]+\.png)"',
    lambda match: f'src="data:image/png;base64,{_encoded(folder / match[1])}"',
    parser.render(text),
  )
  head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
  return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def _encoded(path: pathlib.Path) -> str:
  return base64.b64encode(path.read_bytes()).decode()
