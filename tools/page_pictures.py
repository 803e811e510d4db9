"""Pictures of the registry's pages for the docs: serve a folder, open it in headless Chromium, photograph.

python tools/page_pictures.py FOLDER [--out docs/images]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def browser(folder: str, width: int, height: int, dark: bool = False) -> Any:
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = "/usr/bin/chromium"
    for argument in (*CHROMIUM, f"--user-data-dir={folder}", f"--window-size={width},{height}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    return driver


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        index = Path(work) / "index.sqlite"
        command = [sys.executable, "-m", "cairn", "serve", given.folder, "--port", "0", "--index", str(index), "--json"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = _address(server)
            _photograph(address, _places(index), given.out, work)
        finally:
            server.terminate()
            server.wait()


def _address(server: subprocess.Popen[str]) -> str:
    import json

    assert server.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        text += server.stdout.readline()
    return str(json.loads(text)["address"]).rstrip("/")


def _places(index: Path) -> dict[str, str]:
    """The richest run, its last checkpoint, and the newest checkpoint that several others led to."""
    from cairn.registry.index import Index

    with Index(index, readonly=True) as opened:
        (run,) = opened.rows("SELECT run AS key FROM checkpoints WHERE run IS NOT NULL GROUP BY run ORDER BY count(*) DESC LIMIT 1")
        rows = opened.rows("SELECT key FROM checkpoints WHERE run = ? ORDER BY step DESC", (run["key"],))
        merged = opened.rows("SELECT key FROM parents GROUP BY key ORDER BY count(*) DESC LIMIT 1")
        first, second = rows[0]["key"], rows[len(rows) // 2]["key"]
    return {
        "run": f"/run/{run['key']}",
        "checkpoint": f"/checkpoint/{first}",
        "lineage": f"/lineage/{merged[0]['key']}",
        "compare": f"/compare?c={first}&c={second}",
        "overview": "/",
    }


def _photograph(address: str, places: dict[str, str], out: Path, work: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shots = [("overview", 1100, 720, False), ("run", 1100, 900, False), ("checkpoint", 1100, 1000, False), ("lineage", 1100, 560, False)]
    shots += [("compare", 1100, 700, False), ("run", 1100, 900, True), ("checkpoint", 390, 844, False)]
    for number, (name, width, height, dark) in enumerate(shots):
        driver = browser(f"{work}/profile-{number}", width, height, dark)
        try:
            driver.get(address + places[name])
            suffix = "-dark" if dark else "-phone" if width < 600 else ""
            driver.save_screenshot(str(out / f"serve-{name}{suffix}.png"))
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
