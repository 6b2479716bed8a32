"""The report in a real Chromium, without a screen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from madpo_ray.config import Config
from support.pages import EVIL, page_with_any_text

pytestmark = pytest.mark.browser

Run = tuple[Config, list[str]]
DESKTOP = (1280, 900)
PHONE = (390, 800)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def show(browser: webdriver.Chrome, file: Path, size: tuple[int, int]) -> None:
    """Opens a page and waits for its charts."""
    browser.set_window_size(*size)
    browser.get(file.as_uri())
    charts = browser.find_elements(By.CLASS_NAME, "chart")
    assert charts

    def are_drawn(driver: webdriver.Chrome) -> bool:
        return len(driver.find_elements(By.CSS_SELECTOR, ".chart svg")) == len(charts)

    WebDriverWait(browser, 30).until(are_drawn)


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_report_of_a_run(
    finished_run: Run, browser: webdriver.Chrome, size: tuple[int, int]
) -> None:
    """Every chart is drawn, nothing is wider than the screen, and the console is silent."""
    show(browser, finished_run[0].run.folder / "report.html", size)
    marks = browser.find_elements(By.CSS_SELECTOR, ".chart svg .mark-symbol, .chart svg .mark-line")
    assert len(marks) > 10
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    content, screen = browser.execute_script(widths)
    assert content <= screen
    assert browser.get_log("browser") == []


def test_table_is_sorted_by_its_headings(browser: webdriver.Chrome, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page_with_any_text())
    show(browser, file, DESKTOP)

    def column(place: int) -> list[str]:
        cells = browser.find_elements(By.CSS_SELECTOR, f"table:first-of-type td:nth-child({place})")
        return [cell.text for cell in cells[:3]]

    numbers, texts = browser.find_elements(By.CSS_SELECTOR, "th button")[:2]
    numbers.click()
    assert column(1) == ["0.1235", "2", "10"]
    numbers.click()
    assert column(1) == ["10", "2", "0.1235"]
    texts.click()
    assert column(2)[1:] == ["a", "b"]


def test_texts_are_not_run(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """A model's output with a script in it stays text."""
    file = tmp_path / "page.html"
    file.write_text(page_with_any_text())
    show(browser, file, DESKTOP)
    assert browser.title == EVIL
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert EVIL in browser.find_element(By.CSS_SELECTOR, "td + td").text
    assert browser.get_log("browser") == []
