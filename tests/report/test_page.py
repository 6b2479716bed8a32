"""The page: complete, small, and safe with any text."""

import json
from html.parser import HTMLParser

from support.pages import EVIL, page_with_any_text


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_texts_stay_texts() -> None:
    parsed = Tags()
    parsed.feed(page_with_any_text())
    names = [name for name, _ in parsed.found]
    assert names.count("script") == 3  # the library, the charts, and what draws and sorts
    assert "img" not in names
    assert parsed.text.count(EVIL) == 6


def test_needs_no_network_and_is_small() -> None:
    page = page_with_any_text()
    parsed = Tags()
    parsed.feed(page)
    links = [
        value
        for _, attributes in parsed.found
        for key, value in attributes.items()
        if key in ("src", "href")
    ]
    assert links == ["#a-section"]
    assert len(page.encode()) < 5 * 10**6


def test_charts_are_as_wide_as_their_place() -> None:
    page = page_with_any_text()
    start = page.index('id="charts">') + len('id="charts">')
    (chart,) = json.loads(page[start : page.index("</script>", start)])
    assert chart["width"] == "container"
    assert chart["data"]["values"][0]["b"] == EVIL


def test_numbers_are_short_and_sort_by_their_value() -> None:
    page = page_with_any_text()
    assert '<td class="number" data-value="0.123456">0.1235</td>' in page
    assert '<td class="number" data-value="10">10</td>' in page
    assert "<summary>All keys</summary>" in page
    assert ">empty<" not in page
