"""Photographs a running service for the docs: its page at 1, 4 and 16 streams, and panels of its dashboard.

    python docs/screenshots.py --page http://127.0.0.1:8000 --prometheus http://127.0.0.1:9090

writes pictures to docs/pictures/. It needs chromium and chromedriver on PATH.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import matplotlib
import requests
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

matplotlib.use("agg")
import matplotlib.pyplot as plt

PICTURES = Path(__file__).with_name("pictures")
PROMPT = (
    "Summarise this text in two sentences: The harbour of Kilmory was built in 1823 for the herring fleet. At its "
    "height, two hundred boats landed their catch there each week, and the curing yards employed half of the town. "
    "When the herring left in 1911, the boats left with them, and the yards closed one by one."
)
"""Drafts of the answer are partly wrong, so the price tells: 3.7 nodes a step alone, 1.9 beside 3 streams, on a busy
machine. A text that repeats itself is worth verifying at any price, and a long list hides the trees."""
STREAMS = (1, 4, 16)  # the answer on show is one of them, the slider adds the others
SETTLE_S = 20  # the plan and the figures follow a load within a few seconds
ANSWER_S = 180  # 80 tokens beside 15 streams on a busy machine
WARM_ANSWERS = 2  # before the one on show: after an idle time the price is not that of the load yet
DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/dashboards/treeline.json"
PANELS = (
    "Requests running and waiting",
    "Tokens per second",
    "Price and goodput of a step",
    "Tree size",
    "Inter-token latency",
    "Estimated speed-up over plain decoding",
)
VARIABLES = {"$__rate_interval": "15s", "$replica": ".*"}  # 15 s, since a load stands for less than a minute


def photograph_page(address: str) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,940"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        for streams in STREAMS:
            driver.get(address)
            WebDriverWait(driver, SETTLE_S).until(lambda d: "context" in d.find_element(By.ID, "model").text)
            slide = "const s = document.getElementById('load'); s.value = arguments[0]; s.oninput(); s.onchange();"
            driver.execute_script(slide, streams - 1)
            for field, text in (("prompt", PROMPT), ("tokens", "80")):
                driver.find_element(By.ID, field).clear()
                driver.find_element(By.ID, field).send_keys(text)
            time.sleep(SETTLE_S)
            for _ in range(WARM_ANSWERS + 1):
                driver.find_element(By.ID, "send").click()
                done = WebDriverWait(driver, ANSWER_S)
                done.until(lambda d: " after " in d.find_element(By.CSS_SELECTOR, ".answer p").text)
            driver.save_screenshot(str(PICTURES / f"page-{streams}.png"))
    finally:
        driver.quit()


def plot_panels(prometheus: str, start_s: float, end_s: float) -> None:
    """One small plot a panel, over [start_s, end_s] of the wall clock. A line is named by its query's legend."""
    panels = {panel["title"]: panel for panel in json.loads(DASHBOARD.read_text())["panels"]}
    figure, places = plt.subplots(2, 3, figsize=(12.8, 6), sharex=True, layout="constrained")
    for place, title in zip(places.flat, PANELS, strict=True):
        for target in panels[title]["targets"]:
            name = target["legendFormat"].split("{{")[0].strip()
            for moments, values in series_of(prometheus, target["expr"], start_s, end_s):
                place.plot([at - start_s for at in moments], values, label=name)
        place.set_title(title, fontsize=10)
        place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        if len(panels[title]["targets"]) > 1:
            place.legend(fontsize=8)
    for place in places[-1]:
        place.set_xlabel("seconds")
    figure.savefig(PICTURES / "dashboard.png", dpi=100)


def series_of(prometheus: str, query: str, start_s: float, end_s: float) -> list[tuple[list[float], list[float]]]:
    """Moments (s) and values of each series that a dashboard's query finds."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    span = {"query": query, "start": start_s, "end": end_s, "step": 1}
    answer = requests.get(f"{prometheus}/api/v1/query_range", params=span, timeout=10)
    answer.raise_for_status()
    found = [series["values"] for series in answer.json()["data"]["result"]]
    return [([at for at, _ in values], [float(value) for _, value in values]) for values in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", required=True, help="address of the front door's HTTP port")
    parser.add_argument("--prometheus", required=True, help="address of a Prometheus that scrapes it")
    given = parser.parse_args()
    began_s = time.time()
    photograph_page(given.page)
    plot_panels(given.prometheus, began_s, time.time())
