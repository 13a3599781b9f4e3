"""The page, in a real headless Chromium."""

import asyncio
import shutil
import tempfile
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.front_door.doors import METRICS, with_front_door
from tests.verifier_svc.fake_engine import FakeEngine
from treeline.config import Config, ServerConfig

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
TIMEOUT_S = 15
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,1000",
)


@contextmanager
def browser():
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, Service(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def on_page(scenario, *engines, config=None):
    """Run `scenario(driver, wait)` in a thread on the opened page of a front door over fake verifiers."""

    async def run(s):
        def visit():
            with browser() as driver:
                driver.get(f"http://127.0.0.1:{s.door.http.port}/")
                wait = WebDriverWait(driver, TIMEOUT_S)
                seen = scenario(driver, lambda condition: wait.until(lambda _: condition()))
                noise = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
                return seen, noise

        return await asyncio.to_thread(visit)

    return with_front_door(run, *(engines or [FakeEngine()]), **({"config": config} if config else {}), timeout_s=60)


def count(driver, selector):
    return len(driver.find_elements(By.CSS_SELECTOR, selector))


def text(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector).text


def test_an_answer_streams_with_a_tree_for_every_step():
    def scenario(driver, wait):
        wait(lambda: "fake" in text(driver, "#model"))
        driver.find_element(By.ID, "prompt").clear()
        driver.find_element(By.ID, "prompt").send_keys("hello there")
        driver.find_element(By.ID, "tokens").clear()
        driver.find_element(By.ID, "tokens").send_keys("12")
        Select(driver.find_element(By.ID, "second")).select_by_value("off")
        driver.find_element(By.ID, "send").click()
        wait(lambda: count(driver, "#verdict"))
        fates = [count(driver, f".answer:first-of-type .node.{fate}") for fate in ("accepted", "rejected", "pruned")]
        return text(driver, ".answer pre"), count(driver, "svg"), fates, text(driver, "#verdict"), text(driver, "#live")

    engine = FakeEngine()
    (answer, trees, fates, verdict, live), noise = on_page(scenario, engine)
    assert b"hello there" in bytes(engine.requests[0].prompt_token_ids)
    assert answer.split() == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert (trees, fates) == (12, [6, 12, 6])
    assert "same" in verdict
    assert "tokens per second" in live
    assert not noise


def test_the_slider_adds_streams_and_takes_them_away():
    engine = FakeEngine(step_s=0.05)

    def scenario(driver, wait):
        wait(lambda: "fake" in text(driver, "#model"))
        slide = "const s = document.getElementById('load'); s.value = arguments[0]; s.onchange();"
        driver.execute_script(slide, 5)
        wait(lambda: len(engine.open) == 5)
        driver.execute_script(slide, 0)
        wait(lambda: not engine.open)
        return True

    assert on_page(scenario, engine)[0]


def test_errors_are_said_and_a_token_is_asked_for(tmp_path):
    (tmp_path / "tokens").write_text("letmein\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")

    def scenario(driver, wait):
        token = driver.find_element(By.ID, "token")
        wait(token.is_displayed)
        token.send_keys("letmein\t")
        wait(lambda: "fake" in text(driver, "#model"))
        driver.find_element(By.ID, "temperature").clear()
        driver.find_element(By.ID, "temperature").send_keys("-1")
        driver.find_element(By.ID, "send").click()
        wait(lambda: driver.find_element(By.ID, "problem").is_displayed())
        return text(driver, "#problem")

    assert "temperature" in on_page(scenario, config=Config(server=server, metrics=METRICS))[0]
