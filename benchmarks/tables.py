"""Markdown tables, as in the documentation."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_lines"]


def markdown_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows, the header first, as the lines of a Markdown table; all columns but the first are right-aligned."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]
