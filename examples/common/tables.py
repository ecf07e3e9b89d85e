"""Tables in text: GitHub's Markdown, and columns of plain words."""

from collections.abc import Sequence

__all__ = ["aligned", "markdown"]

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows, sides: str = "l", *, padded: bool = False) -> str:
    """A table in GitHub's Markdown, without a newline at its end.

    Args:
        rows: of equally many cells, the header first.
        sides: "l" or "r" for each column: where its cells stand; the last holds for the rest.
        padded: whether the columns are aligned in the text too.

    Example:
        >>> print(markdown([("arm", "loss"), ("grown", "2.5")], "lr", padded=True))
        | arm   | loss |
        | ----- | ---: |
        | grown |  2.5 |
    """
    columns = []
    for cells, side in zip(
        zip(*rows, strict=True), sides.ljust(len(rows[0]), sides[-1]), strict=True
    ):
        rule = "---" if side == "l" else "---:"
        width = max(map(len, [*cells, rule])) if padded else 0
        place = str.ljust if side == "l" else str.rjust
        header, *body = (place(cell, width) for cell in cells)
        columns.append([header, rule.rjust(width, "-"), *body])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def aligned(rows: Rows) -> str:
    """Rows of cells as lines, the first column to the left and the others to the right.

    Args:
        rows: of equally many cells.

    Example:
        >>> print(aligned([("a", "b"), ("long", "22")]), end="")
        a      b
        long  22
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip() + "\n")
    return "".join(lines)
