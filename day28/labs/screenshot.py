"""Day 28: a person's look at the chat page - headless Chromium asks the served model and takes pictures.

    sudo apt-get install chromium chromium-driver
    python day28/labs/screenshot.py runs/capstone/tiny/export

Expect two PNG files: the page in a window and in the dark on a narrow screen, each after two questions.
Source: https://www.selenium.dev/documentation/webdriver/ (selenium 4.51); flags of a browser in a container.
"""

import argparse
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from capstone.serve.client import running_server
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir, show_path

FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "disable-features=BackForwardCache"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day28"), help="folder for the pictures")
    parser.add_argument("model", type=Path, help="folder that capstone.export wrote")
    return parser.parse_args()


@contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window and without a past."""
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        raise UserError("Chromium is not installed: sudo apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            browser.set_window_size(900, 760)
            yield browser
        finally:
            browser.quit()


def give_key(browser: webdriver.Chrome, key: str) -> None:
    field = browser.find_element(By.ID, "key")
    field.clear()
    field.send_keys(key, Keys.TAB)


def say(browser: webdriver.Chrome, text: str) -> str:
    """Type it, wait for the whole answer, return it."""
    browser.find_element(By.ID, "text").send_keys(text, Keys.ENTER)
    send, field = browser.find_element(By.ID, "send"), browser.find_element(By.ID, "text")
    WebDriverWait(browser, 60).until(lambda _: send.is_enabled() and not field.get_attribute("value"))
    return browser.find_elements(By.CSS_SELECTOR, "#log .assistant")[-1].text


def main() -> None:
    args, key = parse_args(), secrets.token_urlsafe(24)
    folder = Path(args.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with running_server(args.model, key, "--drain_s", "0") as (url, _), open_browser() as browser:
        browser.get(url)
        give_key(browser, key)
        for text in ("The whale", "The people of the United States"):
            print(f"{text!r} -> {say(browser, text)!r}")
        browser.save_screenshot(str(folder / "page.png"))
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        browser.set_window_size(500, 760)
        browser.save_screenshot(str(folder / "page_dark.png"))
    print(f"pictures: {show_path(folder)}/page.png and page_dark.png")


if __name__ == "__main__":
    with clear_errors():
        main()
