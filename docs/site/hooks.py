"""What the site does beyond Markdown: formulas as MathML, and links into the repository.

Formulas are converted when the site is built, so a page needs no script and no other host.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_FORMULA = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the images that pages take from outside of docs/."""
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for is_image, _, target in _OUTSIDE.findall(page.content_string):
            name = f"assets/{Path(target).name}"
            if is_image and (ROOT / target).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point at these images; of other files of the repository keep the name."""
    up = "../" * page.file.src_uri.count("/")

    def inside(match: re.Match[str]) -> str:
        is_image, text, target = match.groups()
        if not (ROOT / target).exists():
            return match[0]
        return f"![{text}]({up}assets/{Path(target).name})" if is_image else text

    return _OUTSIDE.sub(inside, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML for every formula."""

    def formula(match: re.Match[str]) -> str:
        kind, body = match.groups()
        tex = html.unescape(body).strip()[2:-2].strip()  # between \( and \), or \[ and \]
        display = "block" if kind == "div" else "inline"
        return f'<{kind} class="formula">{convert(tex, display=display)}</{kind}>'

    return _FORMULA.sub(formula, content)
