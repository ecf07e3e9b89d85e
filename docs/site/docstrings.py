"""Docstrings are reStructuredText, as Sphinx and editors know it; the site is Markdown."""

import re
import textwrap
from typing import Any

import griffe

__all__ = ["MarkdownDocstrings", "to_markdown"]

_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`(~?)([^`]+)`")
_MATH = re.compile(r"^( *)\.\. math::(.*)\n((?:(?:\1 +.*)?\n)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Turn directives, roles and literals into Markdown.

    Args:
        text: A docstring.
    """

    def display(match: re.Match[str]) -> str:
        indent, first, rest = match.groups()
        body = "\n".join((first.strip(), textwrap.dedent(rest).strip())).strip()
        if "&" in body or "\\\\" in body:
            body = f"\\begin{{align*}}\n{body}\n\\end{{align*}}"
        block = f"$$\n{body}\n$$\n"
        return textwrap.indent(block, indent) + "\n"

    text = _MATH.sub(display, text + "\n")
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = _ROLE.sub(_reference, text)
    text = _EXAMPLE.sub(r"\1Examples:", text)  # the name of the section whose code is shown as code
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _reference(match: re.Match[str]) -> str:
    """Link to what the site documents; of other names, show the name."""
    is_short, name = match.groups()
    shown = name.rpartition(".")[2] if is_short else name
    if not name.startswith("ars."):
        return f"`{shown}`"
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'


class MarkdownDocstrings(griffe.Extension):
    """Converts every docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of an object.

        Args:
            obj: A module, class, function or attribute.
        """
        if obj.docstring is not None:
            text = to_markdown(obj.docstring.value)
            if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
                text = text.replace("Args:\n", "Attributes:\n", 1)  # it has no __init__
            obj.docstring.value = text
