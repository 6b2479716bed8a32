"""Pages of the report for tests."""

import altair as alt

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
    folded = Table(("key",), [("x",)], title="All keys", folded=True)
    tables = [table, folded, Table(("empty",), [])]
    return render(EVIL, EVIL, [Section("A section", note=EVIL, tables=tables, charts=[chart])])
