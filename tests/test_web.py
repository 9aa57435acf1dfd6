#!/usr/bin/env python3
"""The web page in headless Chromium: it answers, remembers, stops, and says what is wrong with a bad file.

    make test-web       builds the page (Emscripten) and runs this; both come from the system's packages
    tests/test_web.py --screenshot docs/web.png     also keeps a picture

Each check runs twice: cross-origin isolated (threads) and not (one thread)."""
import argparse
import json
import os
import pathlib
import struct
import sys
import tempfile
import threading
import time

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "web"))
import serve  # noqa: E402

passed, failed = 0, 0


def check(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok   ' if ok else 'FAIL '} {name}{'' if ok else ': ' + str(detail)}", flush=True)


class Page:
    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)

    def find(self, name):
        return self.browser.find_element(By.ID, name)

    def wait(self, what, seconds=60):
        end = time.time() + seconds
        while time.time() < end:
            if what():
                return True
            time.sleep(0.05)
        return False

    def ready(self):
        return self.find("send").is_enabled() and not self.find("loading").is_displayed()

    def turns(self):
        return self.browser.find_elements(By.CSS_SELECTOR, ".turn")

    def say(self, text):
        """Types a message and presses Enter; the answer's text."""
        self.find("message").send_keys(text, Keys.ENTER)
        self.wait(self.ready)
        return self.turns()[-1].find_element(By.TAG_NAME, "span").get_attribute("textContent")

    def set_think(self, on):
        self.browser.execute_script("document.getElementById('think').checked = arguments[0]", on)

    def open_files(self, paths):
        self.browser.execute_script("document.querySelector('details.settings').open = true")
        self.find("files").send_keys("\n".join(map(str, paths)))

    def open_url(self, address):
        self.browser.execute_script("document.querySelector('details.settings').open = true")
        self.find("url").clear()
        self.find("url").send_keys(address)
        self.find("fetch").click()

    def progress(self):
        return float(self.find("progress").get_attribute("value"))

    def error(self):
        found = self.browser.find_elements(By.CSS_SELECTOR, ".turn.bad span")
        return found[-1].text if found else ""


class Trickle(serve.Handler):
    """The demo again, but its weights come so slowly that there is time to cancel."""
    def copyfile(self, source, output):
        slow = self.path.endswith(".safetensors")
        try:
            while piece := source.read(1 << 18):
                output.write(piece)
                time.sleep(0.3 if slow else 0)
        except OSError:
            pass                        # the page has gone away

    def end_headers(self):
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Cross-Origin-Resource-Policy", "cross-origin")
        super().end_headers()


def start(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}/"
    return server


def bad_file(folder, name, content):
    path = pathlib.Path(folder) / name
    path.write_bytes(content)
    return path


def check_page(browser, isolated, screenshot):
    server, slow = start(serve.server(0, isolated)), start(serve.server(0, isolated, Trickle, "demo"))
    kind = "isolated" if isolated else "one thread"
    page = Page(browser, server.address)
    try:
        check(f"{kind}: isolation is as wanted", browser.execute_script("return crossOriginIsolated") == isolated)
        check(f"{kind}: the demo loads", page.wait(page.ready), page.error())
        check(f"{kind}: it says what it loaded", "million" in page.find("model").text, page.find("model").text)
        answer = page.say("Hello, my name is Tamsin.")
        check(f"{kind}: it answers", "Tamsin" in answer, answer)
        answer = page.say("What is my name?")
        check(f"{kind}: it remembers the name", "Tamsin" in answer, answer)
        check(f"{kind}: speed is shown", "tokens" in page.find("state").text, page.find("state").text)
        page.set_think(True)
        page.say("I take two ropes and a brass lamp. What do I pay?")
        folds = browser.find_elements(By.CSS_SELECTOR, "details.thinking")
        thought = folds[-1].find_element(By.TAG_NAME, "div").get_attribute("textContent") if folds else ""
        check(f"{kind}: thinking is folded away", folds and not folds[-1].get_attribute("open") and thought.strip(), thought)
        shown = page.turns()[-1].find_element(By.TAG_NAME, "span").get_attribute("textContent")
        check(f"{kind}: no tags in the answer", shown.strip() and "<think>" not in shown + thought, shown)
        page.set_think(False)
        if screenshot:
            browser.save_screenshot(screenshot)
        browser.execute_script("document.getElementById('reset').click()")
        check(f"{kind}: a new conversation is empty", page.wait(lambda: not page.turns()))
        page.find("message").send_keys("Tell me all that you sell.")
        browser.execute_script("""document.getElementById('send').click();
            document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))""")   # before the answer can be over
        check(f"{kind}: stop ends the answer", page.wait(page.ready, 10) and "stopped" in page.find("state").text,
              page.find("state").text)
        answer = page.say("What does the rope cost?")
        check(f"{kind}: it goes on after a stop", "12" in answer, answer)
        with tempfile.TemporaryDirectory() as folder:
            page.open_files([bad_file(folder, "notes.txt", b"hello")])
            check(f"{kind}: a file of another kind is named", page.wait(lambda: "notes.txt" in page.error(), 10), page.error())
            demo = TOP / "demo"
            weights = bytearray((demo / "model.safetensors").read_bytes())
            size = struct.unpack("<Q", weights[:8])[0]
            short = bad_file(folder, "model.safetensors", bytes(weights[:8 + size + 1000]))
            page.open_files([demo / "config.json", demo / "tokenizer.json", short])
            check(f"{kind}: a truncated file is named", page.wait(lambda: "model.safetensors" in page.error(), 20), page.error())
            header = json.loads(bytes(weights[8:8 + size]))
            check(f"{kind}: the header was a header", "model.norm.weight" in header)
        page.open_files(sorted(p for p in (TOP / "demo").iterdir() if p.suffix in (".json", ".safetensors", ".txt")))
        check(f"{kind}: dropped files load", page.wait(lambda: page.ready() and not page.error(), 30), page.error())
        answer = page.say("Hello, my name is Odo.")
        check(f"{kind}: and answer", "Odo" in answer, answer)
        page.open_url(slow.address)
        check(f"{kind}: loading shows how far it is", page.wait(lambda: 0 < page.progress() < 1, 20), page.progress())
        page.find("cancel").click()
        check(f"{kind}: loading can be cancelled", page.wait(lambda: "cancelled" in page.error(), 10), page.error())
        page.open_url(server.address + "nowhere/")
        check(f"{kind}: a missing address is named", page.wait(lambda: "404" in page.error(), 10), page.error())
        page.open_url(server.address + "demo")
        check(f"{kind}: an address loads", page.wait(page.ready, 30), page.error())
        answer = page.say("Hello, my name is Bram.")
        check(f"{kind}: and answers", "Bram" in answer, answer)
    finally:
        server.shutdown()
        slow.shutdown()


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--screenshot")
    args = options.parse_args()
    chrome = webdriver.ChromeOptions()
    chrome.binary_location = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=420,900"):
        chrome.add_argument(flag)
    browser = webdriver.Chrome(service=Service(os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver")), options=chrome)
    try:
        for isolated in (True, False):
            check_page(browser, isolated, args.screenshot if isolated else None)
    finally:
        browser.quit()
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
