"""Pages of the report for tests, and whether charts are drawn."""

import io
from collections.abc import Mapping

import altair as alt
from PIL import Image

from madpo_ray.evaluation.charts import picture
from madpo_ray.report.page import render
from madpo_ray.report.parts import Section, Table

EVIL = '</script><script>document.title = "evil"</script><img src=x onerror=alert(1)>'


def page_with_any_text() -> str:
    """A page whose texts would all be programs if they were not escaped."""
    chart = (
        alt.Chart(alt.Data(values=[{"a": 1, "b": EVIL}]))
        .mark_point()
        .encode(x="a:Q", y="b:N")
        .properties(height=100)
    )
    table = Table(("number", "text"), [(2, EVIL), (10, "b"), (0.123456, "a")], title=EVIL)
    folded = Table(("key",), [("x",)], title="All keys", is_folded=True)
    tables = [table, folded, Table(("empty",), [])]
    return render(EVIL, EVIL, [Section("A section", note=EVIL, tables=tables, charts=[chart])])


def require_drawn(found: Mapping[str, alt.TopLevelMixin]) -> None:
    """Each chart has more colours than a blank picture, and is the same each time."""
    for name, chart in found.items():
        drawn = picture(chart)
        assert drawn == picture(chart), name
        with Image.open(io.BytesIO(drawn)) as opened:
            colours = opened.convert("RGB").getcolors(maxcolors=10**6)
        assert colours is not None
        assert len(colours) > 20, name
