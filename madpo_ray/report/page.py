"""Runs as one HTML page that needs no network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment

import madpo_ray
from madpo_ray.atomic import write_text
from madpo_ray.errors import UserError
from madpo_ray.report.collect import collect
from madpo_ray.report.parts import Section, Table
from madpo_ray.report.sections import sections_of
from madpo_ray.stages.stage import Stage

# The version that Altair's specifications are of, such as 6.1.
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class _Placed:
    """A section with the numbers of its charts."""

    title: str
    anchor: str
    note: str
    tables: Sequence[Table]
    charts: Sequence[int]


def write_report(folders: Sequence[Path], stages: Sequence[Stage], file: Path) -> None:
    """Writes the report of one run, or of several side by side.

    Raises:
        UserError: a folder has no finished stage, two have the same name, or the page has no place.
    """
    runs = [collect(folder, stages) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"runs need different names: {', '.join(run.name for run in runs)}")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is not a folder: give --out a path in one")
    names = ", ".join(run.name for run in runs)
    subtitle = ", ".join(str(run.folder.resolve()) for run in runs)
    write_text(file, render(f"madpo-ray: {names}", subtitle, sections_of(runs)))


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page. All texts are escaped."""
    specs: list[dict[str, Any]] = []
    placed = []
    for section in sections:
        numbers = range(len(specs), len(specs) + len(section.charts))
        specs += [_responsive(chart) for chart in section.charts]
        anchor = section.title.lower().replace(" ", "-")
        tables = [table for table in section.tables if table.rows]
        placed.append(_Placed(section.title, anchor, section.note, tables, numbers))

    environment = Environment(autoescape=True)
    environment.filters["shown"] = _shown
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=placed,
        # `</script>` in a text would end the element.
        charts=json.dumps(specs, allow_nan=False).replace("<", "\\u003c"),
        library=_library(),
        footer=f"madpo_ray {madpo_ray.__version__}",
    )


def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    library: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return library.replace("</script", "<\\/script")


def _responsive(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart as wide as its place."""
    spec: dict[str, Any] = chart.to_dict()
    spec["width"] = "container"
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _shown(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}"
