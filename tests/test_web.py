#!/usr/bin/env python3
"""The web page in headless Chromium: it answers, remembers, stops, loads models from files, folders and addresses, says
what is wrong with bad ones, and can be used by keyboard, by screen readers, in the dark and on a phone.

    make test-web       builds the page (Emscripten) and runs this; both come from the system's packages
    tests/test_web.py --screenshot docs/web.png     also keeps a picture

All of it runs cross-origin isolated (threads), and what threads could change once more without (one thread)."""
import argparse
import os
import pathlib
import shutil
import struct
import subprocess
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
HAS_FMA = os.uname().machine == "aarch64" or " fma " in pathlib.Path("/proc/cpuinfo").read_text()


def check(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok   ' if ok else 'FAIL '} {name}{'' if ok else ': ' + str(detail)}", flush=True)


class Page:
    def __init__(self, browser, address):
        self.browser, self.js = browser, browser.execute_script
        browser.get(address)

    def find(self, name):
        return self.browser.find_element(By.ID, name)

    def wait(self, what, seconds=60):
        end = time.time() + seconds
        while time.time() < end:
            if what():
                return True
            time.sleep(0.02)
        return False

    def ready(self):
        return self.find("send").is_enabled() and not self.find("loading").is_displayed()

    def turns(self):
        return self.browser.find_elements(By.CSS_SELECTOR, ".turn")

    def answer(self):
        return self.turns()[-1].find_element(By.TAG_NAME, "span").get_attribute("textContent")

    def say(self, text):
        """Types a message and presses Enter; the answer's text."""
        self.find("message").send_keys(text, Keys.ENTER)
        self.wait(self.ready)
        return self.answer()

    def set_think(self, on):
        self.js("document.getElementById('think').checked = arguments[0]", on)

    def clear(self):
        """So that what comes next can be told from what was there."""
        self.js("document.getElementById('model').textContent = ''; document.getElementById('log').replaceChildren()")

    def loaded(self, seconds=30):
        return self.wait(lambda: self.error() or self.ready() and self.find("model").text, seconds) and not self.error()

    def open_settings(self):
        self.js("document.querySelector('details.settings').open = true")

    def open_files(self, paths):
        self.clear()
        self.open_settings()
        self.find("files").send_keys("\n".join(map(str, paths)))

    def drop(self, paths):
        """Files or folders, as if from the desktop."""
        self.clear()
        data = {"items": [], "files": [str(p) for p in paths], "dragOperationsMask": 1}
        for step in "dragEnter", "dragOver", "drop":
            self.browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": step, "x": 100, "y": 300, "data": data})

    def open_url(self, address):
        self.clear()
        self.open_settings()
        self.find("url").clear()
        self.find("url").send_keys(address)
        self.find("fetch").click()

    def progress(self):
        return float(self.find("progress").get_attribute("value") or 0)

    def error(self):
        found = self.browser.find_elements(By.CSS_SELECTOR, ".turn.bad span")
        return found[-1].text if found else ""


class Trickle(serve.Handler):
    """Weights come so slowly that there is time to cancel; below /unknown/ nobody says how long they are."""
    def copyfile(self, source, output):
        slow = self.path.endswith((".safetensors", ".gguf")) and "unknown" not in self.path
        try:
            while piece := source.read(1 << 18):
                output.write(piece)
                time.sleep(0.1 if slow else 0)
        except OSError:
            pass                        # the page has gone away

    def translate_path(self, path):
        return super().translate_path(path.replace("/unknown/", "/"))

    def send_header(self, name, value):
        if name != "Content-Length" or "unknown" not in self.path:
            super().send_header(name, value)

    def end_headers(self):
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Cross-Origin-Resource-Policy", "cross-origin")
        super().end_headers()


class Closed(serve.Handler):
    """A server that does not let other pages read."""


def start(server):
    server.handle_error = lambda *of: None      # connections that the page gives up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}/"
    return server


# ---- a conversation -------------------------------------------------------------------------------------------
def check_talk(page, kind, screenshot):
    answer = page.say("Hello, my name is Tamsin.")
    check(f"{kind}: it answers", "Tamsin" in answer, answer)
    page.js("""window.pieces = 0;
        new MutationObserver(() => window.pieces++).observe(document.getElementById('log'), {childList: true, subtree: true})""")
    answer = page.say("What is my name?")
    check(f"{kind}: it remembers the name", "Tamsin" in answer, answer)
    check(f"{kind}: text streams", page.js("return window.pieces") > 2, page.js("return window.pieces"))
    check(f"{kind}: speed is shown", "tokens" in page.find("state").text, page.find("state").text)
    page.set_think(True)
    page.say("I take two ropes and a brass lamp. What do I pay?")
    folds = page.browser.find_elements(By.CSS_SELECTOR, "details.thinking")
    thought = folds[-1].find_element(By.TAG_NAME, "div").get_attribute("textContent") if folds else ""
    check(f"{kind}: thinking is folded away", folds and not folds[-1].get_attribute("open") and thought.strip(), thought)
    check(f"{kind}: no tags in the answer", page.answer().strip() and "<think>" not in page.answer() + thought, page.answer())
    page.set_think(False)
    if screenshot:
        page.browser.save_screenshot(screenshot)
    page.js("document.getElementById('reset').click()")
    check(f"{kind}: a new conversation is empty", page.wait(lambda: not page.turns()))
    page.find("message").send_keys("Tell me all that you sell.")
    page.js("""document.getElementById('send').click();
        document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))""")   # before the answer can be over
    check(f"{kind}: stop ends the answer", page.wait(page.ready, 10) and "stopped" in page.find("state").text,
          page.find("state").text)
    answer = page.say("What does the rope cost?")
    check(f"{kind}: it goes on after a stop", "12" in answer, answer)


# ---- models from elsewhere ------------------------------------------------------------------------------------
def quantised(folder):
    """GGUF files of the demo, by the quantiser."""
    made = {}
    for name in "Q8_0", "Q4_K_M":
        made[name] = pathlib.Path(folder) / f"demo-{name}.gguf"
        subprocess.run([TOP / "build" / "quantize", TOP / "demo", made[name], name], check=True, stdout=subprocess.DEVNULL)
    return made


def peak_memory(reset=False):
    """Of the process that shows the page, in bytes."""
    peaks = [0]
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (process / "cmdline").read_bytes():
                if reset:
                    (process / "clear_refs").write_text("5")
                peaks += [int(line.split()[1]) << 10 for line in (process / "status").read_text().splitlines() if "VmHWM" in line]
        except OSError:
            pass
    return max(peaks)


def check_files(page, kind, made, folder):
    for name, path in made.items():
        page.drop([path])
        check(f"{kind}: a dropped {name} loads", page.loaded(), page.error())
        answer = page.say("Hello, my name is Odo.")
        check(f"{kind}: and answers", "Odo" in answer, answer)
    embedding = folder / "a model"      # as Hugging Face has it: with files of other kinds, and others' below it
    shutil.copytree(TOP / "demo", embedding)
    (embedding / "1_Pooling").mkdir()
    (embedding / "1_Pooling" / "config.json").write_text("{}")
    page.drop([embedding])
    check(f"{kind}: a dropped directory loads", page.loaded(), page.error())
    answer = page.say("Hello, my name is Odo.")
    check(f"{kind}: and answers", "Odo" in answer, answer)
    page.open_files(sorted(p for p in (TOP / "demo").iterdir() if p.suffix in (".json", ".safetensors", ".txt")))
    check(f"{kind}: opened files load", page.loaded(), page.error())
    large = folder / "large.gguf"       # with a tail that no tensor has
    shutil.copy(made["Q4_K_M"], large)
    os.truncate(large, 300 << 20)
    before = peak_memory(reset=True)
    page.drop([large])
    loads, grown = page.loaded(), peak_memory() - before
    check(f"{kind}: 300 MB load", loads, page.error())
    check(f"{kind}: and are not held twice", grown < 450 << 20, f"{grown >> 20} MB more in the process")


def check_addresses(page, kind, server, slow, made):
    shutil.copy(made["Q8_0"], TOP / "build" / "web" / "demo" / "demo.gguf")
    for what, address in ("an address", server.address + "demo"), ("a GGUF file's address", server.address + "demo/demo.gguf"), \
                         ("one of unknown length", slow.address + "unknown/demo.gguf"):
        page.open_url(address)
        check(f"{kind}: {what} loads", page.loaded(), page.error())
        answer = page.say("Hello, my name is Bram.")
        check(f"{kind}: and answers", "Bram" in answer, answer)
    for what, address in ("a directory", slow.address), ("a GGUF file", slow.address + "demo.gguf"):
        page.open_url(address)
        seen = set()
        page.wait(lambda: seen.add(page.progress()) or len([x for x in seen if 0 < x < 1]) > 2, 20)
        check(f"{kind}: {what} shows how far it is", len(seen) > 2, seen)
        check(f"{kind}: and in words", " of " in page.find("state").text and "MB" in page.find("state").text, page.find("state").text)
        page.find("cancel").click()
        check(f"{kind}: and can be cancelled", page.wait(lambda: "cancelled" in page.error(), 2), page.error())
        check(f"{kind}: then there is no model", page.find("model").text == "No model" and not page.find("send").is_enabled())
    page.open_url(slow.address + "demo.gguf")
    page.wait(lambda: 0 < page.progress() < 1, 20)
    page.open_url(server.address + "demo/demo.gguf")
    check(f"{kind}: another address takes over", page.loaded(), page.error())
    answer = page.say("Hello, my name is Bram.")
    check(f"{kind}: and answers", "Bram" in answer, answer)


# ---- what is wrong with bad files ----------------------------------------------------------------------------
def bad_files(folder, made):
    """(what, paths, parts of the message)"""
    def file(name, content):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path
    demo, gguf = TOP / "demo", made["Q4_K_M"].read_bytes()
    config, weights = (demo / "config.json").read_bytes(), (demo / "model.safetensors").read_bytes()
    start_of_weights = 8 + struct.unpack("<Q", weights[:8])[0]
    huge = file("huge.gguf", b"")
    os.truncate(huge, 5 << 30)
    return [
        ("a file of another kind", [file("notes.txt", b"hello")], ["notes.txt", "neither a GGUF file nor"]),
        ("text that is called GGUF", [file("text.gguf", b"<html>")], ["text.gguf", "not a GGUF file"]),
        ("an empty file", [file("empty.gguf", b"")], ["empty.gguf", "not a GGUF file"]),
        ("a GGUF file cut short", [file("cut.gguf", gguf[:1000000])], ["cut.gguf", "outside the file"]),
        ("a model of another kind", [file("llama.gguf", gguf.replace(b"qwen3", b"llama", 1))], ["llama.gguf", "'llama'", "'qwen3'"]),
        ("a file beyond the memory", [huge], ["huge.gguf", "does not fit", "4 GB"]),
        ("two models", list(made.values()), ["demo-Q8_0.gguf", "demo-Q4_K_M.gguf", "two models"]),
        ("a directory without weights", [file("bare/config.json", config).parent], ["model.safetensors"]),
        ("weights by themselves", [file("alone/model.safetensors", weights)], ["config.json"]),
        ("a broken config.json", [file("broken/config.json", config[:100]).parent], ["config.json", "byte"]),
        ("a truncated file", [demo / "config.json", demo / "tokenizer.json",
                              file("short/model.safetensors", weights[:start_of_weights + 1000])], ["model.safetensors"]),
    ]


def check_bad(page, kind, server, closed, folder, made):
    for what, paths, parts in bad_files(folder, made):
        page.drop(paths)
        page.loaded()
        check(f"{kind}: {what} is named", all(part in page.error() for part in parts), page.error())
    page.drop([made["Q8_0"]])
    check(f"{kind}: a good one loads after them", page.loaded(), page.error())
    for what, address, part in ("a missing address", server.address + "nowhere/", "404"), \
                               ("an address without a server", "http://127.0.0.1:1/x.gguf", "no server answers"), \
                               ("a server that refuses", closed.address + "demo.gguf", "CORS"), \
                               ("a web page", server.address + "index.html?of=a-model", "a web page"):
        page.open_url(address)
        page.loaded()
        check(f"{kind}: {what} is named", address[:20] in page.error() and part in page.error(), page.error())
    check(f"{kind}: the last model is still there", "Odo" in page.say("Hello, my name is Odo."), page.error())


# ---- keyboard, screen readers, colours, phones ----------------------------------------------------------------
CONTRAST = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = s => s.match(/[\\d.]+/g).map(Number);
function behind(e) {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
  return [255, 255, 255];
}
let worst = [99, ''];
for (const e of document.querySelectorAll('body *')) {
  const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches('textarea, input[type=url]');
  if (!text || e.disabled || !e.checkVisibility() || e.matches('.hidden, script, style')) continue;
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
}
return worst;"""

OUTSIDE = """
const small = [], outside = [];
for (const e of document.querySelectorAll('button, textarea, input[type=url], summary, .file')) {
  if (!e.checkVisibility()) continue;
  const r = e.getBoundingClientRect();
  if (r.left < 0 || r.right > innerWidth) outside.push(e.id || e.className);
  if (r.width < 24 || r.height < 24) small.push((e.id || e.className || e.textContent) + ' ' + r.width + ' x ' + r.height);
}
return [document.documentElement.scrollWidth > innerWidth, outside, small, innerWidth];"""


def check_keyboard(page, kind):
    page.js("document.querySelector('details.settings').open = false; document.body.tabIndex = -1; document.body.focus()")
    press = lambda key: webdriver.ActionChains(page.browser).send_keys(key).perform()  # noqa: E731
    seen = []
    press(Keys.TAB)
    for _ in range(20):
        focus = page.browser.switch_to.active_element
        name = focus.get_attribute("id") or focus.tag_name
        if name in seen or name == "body":
            break
        seen.append(name)
        if name == "summary":
            press(Keys.ENTER)                   # opens the settings
        outline = page.js("""const e = arguments[0], o = getComputedStyle(e.matches('.file input') ? e.parentElement : e);
            return [o.outlineStyle, parseFloat(o.outlineWidth)]""", focus)
        check(f"{kind}: focus is seen on {name}", outline[0] == "solid" and outline[1] >= 2, outline)
        press(Keys.TAB)
    wanted = ["summary", "files", "folder", "demo", "url", "fetch", "system", "think", "reset", "log", "message", "send"]
    check(f"{kind}: Tab reaches everything, in order", seen == wanted, seen)
    page.js("document.querySelector('details.settings').open = false")
    message = page.find("message")
    message.send_keys("Hello, my name", Keys.SHIFT + Keys.ENTER)
    check(f"{kind}: Shift+Enter begins a line", message.get_attribute("value") == "Hello, my name\n", message.get_attribute("value"))
    message.send_keys("is Odo.")
    page.find("send").send_keys(Keys.ENTER)
    check(f"{kind}: Send works by keyboard", page.wait(lambda: page.ready() and "Odo" in page.answer(), 20), page.answer())


def check_names(page, kind):
    """What a screen reader is told."""
    page.open_settings()
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.browser.execute_cdp_cmd("Accessibility.disable", {})
    parts = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n]
    used = ("button", "textbox", "checkbox", "progressbar", "log", "DisclosureTriangle", "link")
    unnamed = [role for role, name in parts if role in used and not name.strip()]
    check(f"{kind}: every control has a name", not unnamed, unnamed)
    for part in ("log", "Conversation"), ("textbox", "Your message"), ("checkbox", "Think before answering"), ("button", "Stop"), \
                ("heading", "qwen3.h"), ("status", ""), ("main", ""):
        check(f"{kind}: there is {part[0]} {part[1]}", any(p[0] == part[0] and p[1].startswith(part[1]) for p in parts), parts)
    check(f"{kind}: the language is said", page.js("return document.documentElement.lang") == "en")
    check(f"{kind}: the conversation is read out once it is complete",
          page.find("log").get_attribute("aria-live") == "polite" and page.find("log").get_attribute("aria-busy") == "false")


def check_looks(page, kind):
    page.open_url("http://127.0.0.1:1/x.gguf")         # so that an error is seen, too
    page.wait(page.error)
    page.say("Hello!")
    paper = set()
    for scheme in "light", "dark":
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        worst = page.js(CONTRAST)
        check(f"{kind}: {scheme} has contrast, {worst[0]:.1f} at least", worst[0] >= 4.5, worst)
        paper.add(page.js("return getComputedStyle(document.body).backgroundColor"))
    check(f"{kind}: light and dark differ", len(paper) == 2, paper)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for width in 320, 360, 768:
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                     {"width": width, "height": 640, "deviceScaleFactor": 2, "mobile": True})
        scrolls, outside, small, seen = page.js(OUTSIDE)
        check(f"{kind}: {width} wide, nothing sticks out", not scrolls and not outside and seen == width, (scrolls, outside, seen))
        check(f"{kind}: {width} wide, all can be hit by a finger", not small, small)
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def check_page(browser, isolated, made, screenshot):
    servers = [start(s) for s in (serve.server(0, isolated), serve.server(0, isolated, Trickle, "demo"),
                                  serve.server(0, False, Closed, "demo"))]
    server, slow, closed = servers
    kind = "isolated" if isolated else "one thread"
    page = Page(browser, server.address)
    try:
        check(f"{kind}: isolation is as wanted", page.js("return crossOriginIsolated") == isolated)
        check(f"{kind}: the demo loads", page.loaded(60), page.error())
        threads = f"{os.cpu_count()} threads" if isolated and os.cpu_count() > 1 else "1 thread"
        said = page.find("model").text
        simd = "WebAssembly relaxed SIMD" if HAS_FMA else "WebAssembly SIMD"
        check(f"{kind}: it says what it loaded", all(part in said for part in ("million", "MB", threads, simd)), said)
        check_talk(page, kind, screenshot)
        with tempfile.TemporaryDirectory() as folder:
            check_files(page, kind, made, pathlib.Path(folder))
        check_addresses(page, kind, server, slow, made)
        if isolated:
            with tempfile.TemporaryDirectory() as folder:
                check_bad(page, kind, server, closed, pathlib.Path(folder), made)
            check_keyboard(page, kind)
            check_names(page, kind)
            check_looks(page, kind)
    finally:
        for s in servers:
            s.shutdown()


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
        with tempfile.TemporaryDirectory() as folder:
            made = quantised(folder)
            for isolated in (True, False):
                check_page(browser, isolated, made, args.screenshot if isolated else None)
    finally:
        browser.quit()
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
