"""The model as HTML: one template, everything escaped that is not a chart of ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from megarubric import __version__
from megarubric.observe.report.model import Report

_FOLDER = Path(__file__).parent / "templates"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja")


def page(report: Report) -> str:
    """The whole page. It loads nothing and runs nothing: its policy forbids scripts and every address."""
    style = Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))
    return _template().render(r=report, style=style, version=__version__)
