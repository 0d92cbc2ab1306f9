"""A page to look at: one HTML file that holds a result, and needs no network and no server.

`report` writes it. The tables are plain HTML and readable without JavaScript; the tokens are drawn
by `page.js`, a screenful at a time, from numbers that the file carries.
"""

from jaxpattern.report.write import report as report

__all__ = ["report"]
