"""A self-contained HTML page: headings, text, tables, line charts and picture grids, images embedded."""
import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runtime import png, storage

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #8884 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; font-size: .88rem;
  display: block; overflow-x: auto }
th, td { padding: .25rem .55rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
.best { font-weight: 700 }
figure { display: inline-block; margin: .4rem 1rem .4rem 0; vertical-align: top }
figcaption { font-size: .85rem; opacity: .75; max-width: 34rem }
img.grid { image-rendering: pixelated } img.chart { background: #fff; border-radius: 4px; max-width: 100% }
p.note { opacity: .75; font-size: .9rem; max-width: 60rem }
"""


def format_value(value: object, digits: int = 3) -> str:
    if value is None:
        return '–'
    return f'{value:.{digits}g}' if isinstance(value, float) and abs(value) < 1000 else (
        f'{value:,.0f}' if isinstance(value, float) else str(value))


def with_spread(value: float, spread: float) -> str:
    """"value ± spread", both to the second digit of the spread."""
    decimals = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
    return f'{value:.{decimals}f} ± {spread:.{decimals}f}'


def rows_with_spread(rows: Mapping[str, Mapping[str, Any]], headings: Mapping[str, str] = {}) -> list[dict[str, Any]]:
    """Table rows in which `x` and `x_std` have become one column "x ± std".

    `headings`: of columns, where they differ from the name by more than underscores.
    """
    out = []
    for name, row in rows.items():
        line = {'': name}
        for key, value in row.items():
            if not key.endswith('_std'):
                spread = row.get(f'{key}_std')
                text = with_spread(value, spread) if value is not None and spread else format_value(value)
                line[headings.get(key, key.replace('_', ' '))] = text
        out.append(line)
    return out


def markdown(rows: Sequence[Mapping[str, object]], digits: int = 3) -> str:
    """The rows of `Report.table` as a table in Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ['---'] * len(columns)]
    cells += [[format_value(row.get(column), digits) for column in columns] for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in cells)


class Report:
    """Collects sections and writes them with `save`."""

    def __init__(self, title: str, lead: str = ''):
        self._title = title
        self._parts = [f'<h1>{html.escape(title)}</h1>']
        if lead:
            self.text(lead)

    def heading(self, text: str) -> None:
        self._parts.append(f'<h2>{html.escape(text)}</h2>')

    def text(self, text: str) -> None:
        self._parts.append(f'<p class=note>{html.escape(text)}</p>')

    def table(self, rows: Sequence[Mapping[str, object]], *, best: Mapping[str, str] | None = None,
              digits: int = 3) -> None:
        """One row a mapping; columns in the order of first appearance. `best`: column -> 'min' | 'max' to set in
        bold."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        winners = {}
        for column, direction in (best or {}).items():
            values = [row[column] for row in rows if isinstance(row.get(column), (int, float))]
            if values:
                winners[column] = min(values) if direction == 'min' else max(values)
        cells = ['<tr>' + ''.join(f'<th>{html.escape(c)}</th>' for c in columns) + '</tr>']
        for row in rows:
            cells.append('<tr>' + ''.join(
                f'<td{" class=best" if column in winners and row.get(column) == winners[column] else ""}>'
                f'{html.escape(format_value(row.get(column), digits))}</td>' for column in columns) + '</tr>')
        self._parts.append('<table>' + ''.join(cells) + '</table>')

    def images(self, images: np.ndarray, columns: int, caption: str, *, scale: int = 1) -> None:
        """A grid of uint8 [N, H, W, C], each pixel shown `scale` times as large."""
        grid = png.grid(images, columns)
        buffer = io.BytesIO()
        png.save(buffer, grid)
        self._figure(buffer, caption, f'class=grid width={grid.shape[1] * scale}')

    def lines(self, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], caption: str, *, x: str = 'step',
              y: str = '', log_y: bool = False, styles: Mapping[str, str] | None = None,
              bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None) -> None:
        """A line chart of {label: (xs, ys)}.

        Args:
            styles: label -> matplotlib's format ('o--', '^', ...); lines if not.
            bands: label -> (lowest, highest) at each of its xs, shaded behind the line.
        """
        try:
            from matplotlib.figure import Figure  # deferred: most commands draw nothing
        except ModuleNotFoundError:  # the tables and pictures of a long run are not lost for want of a chart
            self.text(f'{caption}: not drawn; pip install matplotlib and run again')
            return
        figure = Figure(figsize=(5.2, 3.1), dpi=110)
        axes = figure.subplots()
        for label, (xs, ys) in curves.items():
            line, = axes.plot(xs, ys, (styles or {}).get(label, '-'), label=label, linewidth=1.4, markersize=4)
            if bands and label in bands:
                axes.fill_between(xs, *bands[label], color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if log_y:
            axes.set_yscale('log')
        if len(curves) > 5:  # beneath the chart: inside it they would hide the lines
            axes.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(0, -0.17))
        elif len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='PNG', bbox_inches='tight')
        self._figure(buffer, caption, 'class=chart')

    def _figure(self, buffer: io.BytesIO, caption: str, attributes: str) -> None:
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(f'<figure><img {attributes} alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                           f'<figcaption>{html.escape(caption)}</figcaption></figure>')

    def save(self, path: str | os.PathLike) -> None:
        page = (f'<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(self._title)}</title>'
                f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>'
                + '\n'.join(self._parts) + '</html>\n')
        with storage.write_whole(path) as file:
            file.write(page.encode())
