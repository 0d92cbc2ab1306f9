"""Reads what `report` wrote: its tables, its text, its numbers."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np


class Page(HTMLParser):
    """A page as a browser without JavaScript has it.

    `tables` maps a class to rows of texts; `text` is all text outside of scripts and styles.
    """

    def __init__(self, path):
        super().__init__()
        self.tables, self.text, self.tags = {}, "", []
        self._row, self._cell, self._raw = None, None, False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name == "table":
            self._rows = self.tables.setdefault(dict(attributes).get("class"), [])
        elif name == "tr":
            self._row = []
        elif name in ("td", "th"):
            self._cell = ""
        self._raw = name in ("script", "style")

    def handle_endtag(self, name):
        if name in ("td", "th"):
            self._row.append(self._cell.strip())
            self._cell = None
        elif name == "tr":
            self._rows.append(self._row)
        self._raw = False

    def handle_data(self, data):
        if self._raw:
            return
        self.text += data
        if self._cell is not None:
            self._cell += data

    @property
    def data(self):
        """What the program reads."""
        return json.loads(re.search(r'id="data">(.*?)</script>', self.source, re.DOTALL).group(1))


def unpacked(text, kind="<f4"):
    """Numbers of a page."""
    return np.frombuffer(base64.b64decode(text), kind)


def number(text):
    """(value, error) of `0.12 ± 0.03` or `(1.2 ± 0.3)e-05`, and how far rounding may move them."""
    inner, _, power = text.partition(")e")
    factor = 10.0 ** float(power or 0)
    value, error = (part.strip(" (") for part in inner.split("±"))
    place = [0.51 * 10.0 ** -len(x.partition(".")[2]) for x in (value, error)]
    return [factor * float(x) if x != "?" else np.nan for x in (value, error)], [
        factor * x for x in place
    ]
