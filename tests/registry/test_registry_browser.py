"""The pages in a real browser: a run followed as it trains, a lineage walked, a prompt answered, on a wide screen and on a phone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.page_pictures import browser

for need in ("/usr/bin/chromium", "/usr/bin/chromedriver"):
    if not Path(need).exists():
        pytest.skip(f"{need} is not on this machine", allow_module_level=True)
pytest.importorskip("uvicorn")
pytest.importorskip("selenium")
CSS, LINK, PART = "css selector", "link text", "partial link text"


@pytest.fixture(scope="module")
def served(zoo, tmp_path_factory):
    """A copy of the zoo, and the address of a server that shows it."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(zoo, folder / "zoo")
    command = [sys.executable, "-m", "cairn", "serve", folder / "zoo", "--port", "0", "--index", folder / "i.sqlite"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = re.match(r"(http://127\.0\.0\.1:\d+)/", server.stderr.readline())[1]
        yield folder / "zoo", address
    finally:
        server.terminate()
        assert server.wait(timeout=20) in (0, -15, 143)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    opened = browser(str(tmp_path_factory.mktemp("profile")), 1200, 900)
    yield opened
    opened.quit()


def until(driver, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    # An element of the page before may go while it is asked.
    return WebDriverWait(driver, 20, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException]).until(condition)


def find(driver, selector):
    return until(driver, lambda d: d.find_element(CSS, selector))


def test_search_open_walk_and_generate(served, driver):
    _, address = served
    driver.get(address)
    assert "What lies here" in driver.page_source
    box = find(driver, "input[type=search]")
    box.send_keys("act:slerp\n")
    until(driver, lambda d: d.find_elements(LINK, "mixed"))[0].click()
    until(driver, lambda d: d.find_elements(LINK, "Lineage"))[0].click()
    parents = until(driver, lambda d: d.find_elements(CSS, ".lineage a"))
    assert len(parents) == 7 and len(driver.find_elements(CSS, ".node.here")) == 1
    parents[0].click()
    until(driver, lambda d: d.find_element(CSS, "h1").text not in ("", "mixed"))
    until(driver, lambda d: d.find_elements(PART, "Open "))[0].click()
    prompt = find(driver, "textarea")
    prompt.clear()
    prompt.send_keys("the stone <b>")
    find(driver, "form.prompt button").click()
    written = find(driver, ".written").text
    assert written.startswith("the stone <b>") and len(written) > len("the stone <b>")
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_run_is_followed_as_it_trains_and_values_are_read_off(served, driver):
    tree, address = served
    driver.get(f"{address}/runs")
    until(driver, lambda d: d.find_elements(LINK, "run"))[0].click()
    chart = find(driver, ".chart")
    with (tree / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "tokens": 5200, "loss": 0.125, "learning_rate": 1e-3, "tokens_per_second": 9000.0}) + "\n")
    until(driver, lambda d: "0.125" in d.find_element(CSS, "[data-live]").text)
    chart = find(driver, ".chart")
    from selenium.webdriver import ActionChains

    ActionChains(driver).move_to_element(chart).perform()
    assert re.match(r"training [\d.]+ at [\d,]+ tokens", find(driver, ".told").text)


def test_two_are_chosen_and_compared(served, driver):
    _, address = served
    driver.get(f"{address}/checkpoints?q=run:run")
    boxes = until(driver, lambda d: d.find_elements(CSS, "input[name=c]"))
    for box in boxes[:2]:
        box.click()
    find(driver, "form.wide button").click()
    until(driver, lambda d: "Side by side" in d.find_element(CSS, "h1").text)  # the old page is there until the new one is
    assert "held-out, loss" in find(driver, "main").text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_of_it_in_light_and_dark(served, driver, dark):
    _, address = served
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    driver.get(f"{address}/checkpoints?q=mixed")
    addresses = [address, f"{address}/runs", find(driver, "td a").get_attribute("href")]
    for each in addresses:
        driver.get(each)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390, each
        ink, paper = (_luminance(driver.execute_script(f"return getComputedStyle(document.body).{part}")) for part in ("color", "backgroundColor"))
        assert (ink > paper) is dark and (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7


def _luminance(colour):
    """Relative luminance of a CSS colour, as the contrast rules define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
