#!/usr/bin/env python3
"""Runs tools/download.sh against a small model hub on 127.0.0.1 that misbehaves.

    python3 tests/test_download.py
    TEST_SH="busybox sh" python3 tests/test_download.py      (another shell)

After every test, whatever it was about, each file with a final name must have
the right content: see tearDown().
"""

import collections
import hashlib
import http.server
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools", "download.sh")
SHELL = shlex.split(os.environ.get("TEST_SH", "sh"))
MODEL = "Qwen/Qwen3-Tiny"
REVISION = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
MIB = 1 << 20


def noise(size, seed):
    """Bytes that differ everywhere, so that a wrong offset cannot go unnoticed."""
    return hashlib.shake_128(seed.encode()).digest(size)


def git_blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# --- the hub ------------------------------------------------------------------
#
# A fault answers one request in place of the hub: fault(handler, data), where
# data is what the whole answer should have been.  hub.faults[name] is a list of
# them, used up one per request; None stands for a proper answer.


def cut_after(count):
    """Promises everything, sends the next count bytes, hangs up."""
    def fault(handler, data):
        handler.send_range(data, limit=count)
    return fault


def endless(handler, _):
    """No length, and bytes for as long as they are taken."""
    handler.send_response(200)
    handler.end_headers()
    block = b"[" * MIB
    for _ in range(2000):
        handler.wfile.write(block)
    raise AssertionError("2 GB were taken")


def http_error(status):
    def fault(handler, _):
        handler.send_error(status)
    return fault


def ignore_range(handler, data):
    handler.send_whole(data)


def ignore_range_and_cut_after(count):
    def fault(handler, data):
        handler.send_whole(data, limit=count)
    return fault


def wrong_bytes(handler, data):
    handler.send_range(bytes(byte ^ 1 for byte in data))


def short_file(handler, data):
    handler.send_whole(data[:-10])


def long_file(handler, data):
    handler.send_whole(data + bytes(2 * MIB))


def redirect_to(url):
    def fault(handler, _):
        body = b"Moved. " * 1000        # more than a small file has
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
    return fault


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server.hub
        hub.requests.append((self.path, self.headers))
        name = self.path.rpartition("/")[2].partition("?")[0]
        data = hub.answer(self.path)
        fault = hub.faults[name].pop(0) if hub.faults[name] else None
        try:
            if fault:
                fault(self, data)
            elif data is None:
                self.send_error(404)
            else:
                self.send_range(data)
        except ConnectionError:
            pass                        # the client was interrupted or had enough

    def send_range(self, data, limit=None):
        if "Range" not in self.headers:
            return self.send_whole(data, limit)
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_body(data[start:], limit)

    def send_whole(self, data, limit=None):
        self.send_response(200)
        self.send_body(data, limit)

    def send_body(self, data, limit):
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:limit])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_):
        raise


class Hub:
    def __init__(self):
        self.files = {
            ".gitattributes": noise(150, "attributes"),
            "README.md": noise(2000, "readme"),
            "config.json": noise(700, "config"),
            "generation_config.json": noise(200, "generation"),
            "tokenizer.json": noise(50000, "tokenizer"),
            "tokenizer_config.json": noise(9000, "tokenizer config"),
            "vocab.json": noise(3000, "vocab"),
            "merges.txt": noise(4000, "merges"),
            WEIGHTS: noise(300000, "weights"),
        }
        self.extra_entries = []         # listed as they are, as a hostile hub would
        self.info = {"id": MODEL, "tags": ['a "quoted" \\', "{[,:"], "sha": REVISION, "config": {"sha": "no"}}
        self.faults = collections.defaultdict(list)
        self.requests = []
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = "http://127.0.0.1:%d" % self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path):
        if path == f"/api/models/{MODEL}":
            return json.dumps(self.info).encode()
        if path == f"/api/models/{MODEL}/tree/{REVISION}?recursive=false":
            return json.dumps(self.listing(), indent=1).encode()
        root, _, name = path.rpartition("/")
        if root == f"/{MODEL}/resolve/{REVISION}":
            return self.files.get(name)
        return None

    def listing(self):
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "onnx"}]
        entries += [self.entry(name, data) for name, data in self.files.items()]
        return entries + self.extra_entries

    @staticmethod
    def entry(name, data):
        entry = {"type": "file", "oid": git_blob_id(data), "size": len(data), "path": name}
        if name.endswith(".safetensors") or name == "tokenizer.json":
            sha256 = hashlib.sha256(data).hexdigest()
            entry["oid"] = git_blob_id(sha256.encode())     # that of a pointer file
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 135}
        return entry

    def fetched(self):
        return [path.rpartition("/")[2] for path, _ in self.requests if "/resolve/" in path]

    def ranges(self, name):
        return [headers["Range"] for path, headers in self.requests if path.endswith("/" + name)]


# --- the tests ----------------------------------------------------------------


class DownloadTest(unittest.TestCase):
    NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}

    def setUp(self):
        self.hub = Hub()
        self.addCleanup(self.hub.close)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.dest = os.path.join(self.directory, "models", "Qwen3-Tiny")

    def tearDown(self):
        for name in self.present():
            if not name.endswith(".part"):
                self.assertEqual(self.read(name), self.hub.files[name], f"wrong content in {name}")

    def environment(self, extra):
        env = {key: value for key, value in os.environ.items()
               if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
        env.update(HF_ENDPOINT=self.hub.url, DOWNLOAD_RETRY_DELAY="0")
        env.update(extra)
        return env

    def start(self, *arguments, **env):
        return subprocess.Popen(
            [*SHELL, SCRIPT, *(arguments or [MODEL])], cwd=self.directory, env=self.environment(env),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
            start_new_session=True)

    def run_script(self, *arguments, **env):
        process = self.start(*arguments, **env)
        self.out, self.err = process.communicate(timeout=30)
        return process.returncode

    def assertDownloads(self, *arguments, **env):
        self.assertEqual(self.run_script(*arguments, **env), 0, self.err)
        self.assertIn("All files are there", self.out.splitlines()[-1])

    def assertFails(self, *messages, arguments=(), **env):
        self.assertEqual(self.run_script(*arguments, **env), 1, self.err)
        for message in messages:
            self.assertIn(message, self.err)
        self.assertNotIn("All files are there", self.out)

    def present(self):
        return set(os.listdir(self.dest)) if os.path.isdir(self.dest) else set()

    def read(self, name):
        with open(os.path.join(self.dest, name), "rb") as file:
            return file.read()

    def write(self, name, data):
        os.makedirs(self.dest, exist_ok=True)
        with open(os.path.join(self.dest, name), "wb") as file:
            file.write(data)

    def fake_tool(self, name, commands):
        """Returns a PATH where the commands stand in for that tool."""
        directory = os.path.join(self.directory, "tools")
        os.mkdir(directory)
        path = os.path.join(directory, name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n" + commands)
        os.chmod(path, 0o755)
        return directory + ":" + os.environ["PATH"]

    def wait_for_content(self, name):
        deadline = time.monotonic() + 10
        while not (name in self.present() and self.read(name)):
            self.assertLess(time.monotonic(), deadline, f"{name} does not appear")
            time.sleep(0.01)

    # What is downloaded

    def test_downloads_what_the_library_needs(self):
        self.assertDownloads()
        self.assertEqual(self.present(), self.NEEDED)
        self.assertEqual(self.err, "")
        self.assertTrue(self.out.endswith("Next: make run MODEL=models/Qwen3-Tiny\n"), self.out)

    def test_explicit_destination(self):
        self.dest = os.path.join(self.directory, "-some where")
        self.assertDownloads(MODEL, "-some where")
        self.assertEqual(self.present(), self.NEEDED)

    def test_vocabulary_in_two_files(self):
        del self.hub.files["tokenizer.json"]
        self.assertDownloads()
        self.assertEqual(self.present(), self.NEEDED - {"tokenizer.json"} | {"vocab.json", "merges.txt"})

    def test_shards_and_chat_template(self):
        del self.hub.files[WEIGHTS]
        names = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                 "model.safetensors.index.json", "chat_template.jinja"}
        for name in names:
            self.hub.files[name] = noise(5000, name)
        self.assertDownloads()
        self.assertEqual(self.present(), self.NEEDED - {WEIGHTS} | names)

    def test_one_file(self):
        name = "Qwen3-Tiny-Q8_0.gguf"
        for other in (name, "Qwen3-Tiny-Q4_K_M.gguf"):
            self.hub.files[other] = noise(5000, other)
        self.assertDownloads("-f", name, MODEL)
        self.assertEqual(self.present(), {name})
        self.assertTrue(self.out.endswith(f"Next: make run MODEL=models/Qwen3-Tiny/{name}\n"), self.out)

    def test_one_file_in_parts(self):
        names = [f"Tiny-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        for name in names:
            self.hub.files[name] = noise(5000, name)
        self.assertDownloads("-f", names[0], MODEL)
        self.assertEqual(self.present(), set(names))
        del self.hub.files[names[2]]
        self.assertFails(f"the hub has no {names[2]}", arguments=("-f", names[0], MODEL))
        self.hub.files[names[2]] = noise(5000, names[2])

    def test_file_that_is_none(self):
        self.assertFails("the hub has no x.gguf", arguments=("-f", "x.gguf", MODEL))
        for name in ("../x.gguf", "x.bin", "-x.gguf", "a/x.gguf", ""):
            self.assertFails("is not the name of a .gguf file", arguments=("-f", name, MODEL))
        self.assertEqual(self.hub.fetched(), [])

    def test_gguf_files_are_listed_where_none_was_named(self):
        del self.hub.files["config.json"]
        names = ["Tiny-Q4_K_M.gguf", "Tiny-Q8_0-00001-of-00002.gguf"]
        for name in (*names, "Tiny-Q8_0-00002-of-00002.gguf"):
            self.hub.files[name] = noise(5000, name)
        self.assertFails("the hub has no config.json", "FILE=NAME")
        self.assertTrue(self.err.endswith("".join(f"\n    {name}" for name in names) + "\n"), self.err)
        self.assertFails(f"\n    {names[0]}\n", arguments=("-f", "Tiny-Q9_9.gguf", MODEL))
        self.assertEqual(self.hub.fetched(), [])

    def test_missing_shard(self):
        del self.hub.files[WEIGHTS]
        for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
            self.hub.files[name] = noise(5000, name)
        self.assertFails("the hub has no model-00002-of-00002.safetensors")
        self.assertEqual(self.hub.fetched(), [])

    def test_no_weights(self):
        del self.hub.files[WEIGHTS]
        self.assertFails("no safetensors weights")

    def test_progress_bar_on_a_terminal(self):
        master, terminal = pty.openpty()
        self.addCleanup(os.close, master)
        result = subprocess.run([*SHELL, SCRIPT, MODEL], cwd=self.directory, env=self.environment({}),
                                stdout=subprocess.DEVNULL, stderr=terminal, timeout=30)
        os.close(terminal)
        self.assertEqual(result.returncode, 0)
        self.assertIn(b"100.0%", os.read(master, 65536))

    # What is there already

    def test_complete_files_are_not_downloaded_again(self):
        self.assertDownloads()
        self.hub.requests.clear()
        self.assertDownloads()
        self.assertEqual(self.hub.fetched(), [])
        self.assertIn(f"{WEIGHTS}: already there, checked", self.out)

    def test_damaged_file_is_replaced(self):
        self.assertDownloads()
        self.hub.requests.clear()
        self.write(WEIGHTS, self.hub.files[WEIGHTS][:-1] + b"?")
        self.assertDownloads()
        self.assertEqual(self.hub.fetched(), [WEIGHTS])
        self.assertIn("wrong SHA-256", self.out)

    def test_damaged_file_does_not_stay_when_the_download_fails(self):
        self.write(WEIGHTS, b"half a file")
        self.hub.faults[WEIGHTS] = [http_error(404)]
        self.assertFails("not found (HTTP 404)")
        self.assertNotIn(WEIGHTS, self.present())

    def test_part_of_the_file_is_resumed(self):
        self.write(WEIGHTS + ".part", self.hub.files[WEIGHTS][:100000])
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), ["bytes=100000-"])
        self.assertIn(f"{WEIGHTS}: resuming at 100.0 kB of 300.0 kB", self.out)

    def test_part_that_is_whole_needs_no_request(self):
        self.write(WEIGHTS + ".part", self.hub.files[WEIGHTS])
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), [])
        self.assertEqual(self.present(), self.NEEDED)

    def test_part_of_something_else_is_given_up(self):
        self.write(WEIGHTS + ".part", noise(100000, "an older revision"))
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), ["bytes=100000-", None])
        self.assertIn("wrong SHA-256", self.err)

    def test_part_that_is_too_large_is_given_up(self):
        self.write(WEIGHTS + ".part", noise(400000, "an older revision"))
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), [None])

    def test_symlink_to_a_damaged_file(self):
        elsewhere = os.path.join(self.directory, "elsewhere")
        with open(elsewhere, "wb") as file:
            file.write(b"not ours")
        os.makedirs(self.dest)
        os.symlink(elsewhere, os.path.join(self.dest, WEIGHTS))
        self.assertDownloads()
        with open(elsewhere, "rb") as file:
            self.assertEqual(file.read(), b"not ours")

    # Bad lines

    def test_cut_connection_is_resumed(self):
        self.hub.faults[WEIGHTS] = [cut_after(100000), cut_after(50000)]
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), [None, "bytes=100000-", "bytes=150000-"])
        self.assertIn("the connection was cut; trying again in 0 s", self.err)

    def test_cuts_do_not_count_while_there_is_progress(self):
        self.hub.files[WEIGHTS] = noise(8 * MIB, "large weights")
        self.hub.faults[WEIGHTS] = [cut_after(MIB)] * 7
        self.assertDownloads()

    def test_cuts_without_progress_end(self):
        self.hub.faults[WEIGHTS] = [cut_after(1000)] * 100
        self.assertFails("gave up after 5 tries")
        self.assertEqual(self.present(), self.NEEDED - {WEIGHTS} | {WEIGHTS + ".part"})

    def test_server_that_ignores_range(self):
        self.hub.faults[WEIGHTS] = [cut_after(100000), ignore_range]
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), [None, "bytes=100000-", None])
        self.assertIn("the server cannot resume", self.err)

    def test_server_that_ignores_range_and_cuts_ends(self):
        self.hub.files[WEIGHTS] = noise(4 * MIB, "large weights")
        self.hub.faults[WEIGHTS] = [ignore_range_and_cut_after(3 * MIB)] * 100
        self.assertFails("gave up after 5 tries")

    def test_resume_behind_a_redirect(self):
        other = Hub()
        self.addCleanup(other.close)
        self.hub.faults[WEIGHTS] = [redirect_to(f"{other.url}/{MODEL}/resolve/{REVISION}/{WEIGHTS}")] * 2
        other.faults[WEIGHTS] = [cut_after(100000)]
        self.assertDownloads()
        self.assertEqual(other.ranges(WEIGHTS), [None, "bytes=100000-"])

    def test_range_not_satisfiable(self):
        self.write(WEIGHTS + ".part", self.hub.files[WEIGHTS][:100000])
        self.hub.faults[WEIGHTS] = [http_error(416)]
        self.assertDownloads()
        self.assertEqual(self.hub.ranges(WEIGHTS), ["bytes=100000-", None])

    def test_server_error_is_retried(self):
        self.hub.faults["Qwen3-Tiny"] = [http_error(500)]
        self.hub.faults["main"] = self.hub.faults[REVISION] = [http_error(503)]
        self.hub.faults[WEIGHTS] = [http_error(500), http_error(429)]
        self.assertDownloads()
        for status in (500, 503, 429):
            self.assertIn(f"HTTP {status}; trying again", self.err)

    def test_server_error_for_ever(self):
        self.hub.faults[WEIGHTS] = [http_error(502)] * 100
        self.assertFails(f"/{WEIGHTS}: HTTP 502; gave up after 5 tries")
        self.assertEqual(self.hub.fetched().count(WEIGHTS), 5)

    def test_nobody_listens(self):
        self.hub.close()
        self.assertFails("cannot connect; gave up after 5 tries")

    @unittest.skipIf("busybox" in SHELL, "busybox has its own sleep")
    def test_back_off_doubles(self):
        tools = self.fake_tool("sleep", 'echo "$1" >>slept\n')
        self.hub.faults[WEIGHTS] = [http_error(500)] * 100
        self.assertFails("gave up", DOWNLOAD_RETRY_DELAY="20", PATH=tools)
        with open(os.path.join(self.directory, "slept")) as file:
            self.assertEqual(file.read().split(), ["20", "40", "60", "60"])

    def test_interrupted(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def stall(handler, data):
            handler.send_range(data, limit=100000)
            over.wait(10)

        self.hub.faults[WEIGHTS] = [stall]
        process = self.start()
        self.wait_for_content(WEIGHTS + ".part")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=10)
        self.assertNotEqual(process.returncode, 0)
        self.assertEqual(self.present(), self.NEEDED - {WEIGHTS} | {WEIGHTS + ".part"})
        self.assertDownloads()
        self.assertEqual(self.present(), self.NEEDED)

    # Wrong content

    def test_wrong_bytes_once(self):
        self.hub.faults[WEIGHTS] = [wrong_bytes]
        self.assertDownloads()
        self.assertIn("wrong SHA-256", self.err)
        self.assertEqual(self.hub.ranges(WEIGHTS), [None, None])

    def test_wrong_bytes_always(self):
        for name, algorithm in (("config.json", "SHA-1"), (WEIGHTS, "SHA-256")):
            with self.subTest(name):
                self.hub.faults[name] = [wrong_bytes] * 100
                self.assertFails(f"{name}: wrong {algorithm}", "what the server sends is not what the hub lists")
                self.assertEqual(self.hub.ranges(name), [None, None])
                self.assertFalse({name, name + ".part"} & self.present())
                self.hub.faults.clear()

    def test_short_file(self):
        self.hub.faults[WEIGHTS] = [short_file]
        self.assertDownloads()
        self.assertIn("wrong size (299990 bytes instead of 300000)", self.err)

    def test_short_file_always(self):
        self.hub.faults[WEIGHTS] = [short_file] * 100
        self.assertFails("wrong size (299990 bytes instead of 300000), again")
        self.assertFalse({WEIGHTS, WEIGHTS + ".part"} & self.present())

    def test_long_file(self):
        self.hub.faults[WEIGHTS] = [long_file] * 100
        self.assertFails("sends more than the listed 300000 bytes")
        self.assertNotIn(WEIGHTS, self.present())

    # Refusals

    def test_no_such_model(self):
        self.assertFails(f"not found (HTTP 404): {self.hub.url}/api/models/Qwen/Nothing;",
                         arguments=["Qwen/Nothing"])
        self.assertEqual(len(self.err.splitlines()), 1)
        self.assertEqual(os.listdir(self.directory), [])

    def test_no_such_file(self):
        self.hub.faults["tokenizer.json"] = [http_error(404)]
        self.assertFails(f"not found (HTTP 404): {self.hub.url}/{MODEL}/resolve/{REVISION}/tokenizer.json;")
        self.assertEqual(len(self.err.splitlines()), 1)

    def test_gated_model(self):
        for status in (401, 403):
            with self.subTest(status):
                self.hub.faults[WEIGHTS] = [http_error(status)]
                self.assertFails(f"access denied (HTTP {status})", "set HF_TOKEN")
                self.assertEqual(len(self.err.splitlines()), 1)

    def test_token_without_access(self):
        self.hub.faults["Qwen3-Tiny"] = [http_error(401)]
        self.assertFails("access denied (HTTP 401)", "owner of HF_TOKEN", HF_TOKEN="hf_secret")
        self.assertNotIn("hf_secret", self.out + self.err)

    def test_answers_that_are_no_hub(self):
        def page(handler, _):
            handler.send_whole(b'<html lang="en">Please log in</html>')

        def half_a_listing(handler, data):
            handler.send_whole(data[:-20])

        self.hub.faults["Qwen3-Tiny"] = [page]
        self.assertFails("is " + self.hub.url + " a model hub?")
        for fault in (page, half_a_listing):
            self.hub.faults[REVISION] = [fault]
            self.assertFails("the answer is not a list of files")
        self.assertEqual(self.hub.fetched(), [])

    # Answers without an end

    def test_listings_that_are_none(self):
        for answer in ({"1e300": {"type": "file"}}, {"99999999": {"type": "file"}}, {"x": {"type": "file"}}):
            with self.subTest(answer):
                self.hub.faults[REVISION] = [lambda handler, _: handler.send_whole(json.dumps(answer).encode())]
                self.assertFails("not a list of files")
        self.hub.faults[REVISION] = [lambda handler, _: handler.send_whole(b"[" * 100000)]
        self.assertFails("not a list of files")

    def test_answer_without_an_end(self):
        for name, reason in (("Qwen3-Tiny", "more than"), (REVISION, "more than"), ("config.json", "sends more than the listed 700")):
            with self.subTest(name):
                self.hub.faults[name] = [endless]
                self.assertFails(reason)

    # The token

    def test_token_is_sent_to_the_hub_but_is_no_argument(self):
        # curl wipes some arguments once it runs, so ps would not always tell.
        tools = self.fake_tool("curl", f'echo "$@" >>arguments\nexec {shutil.which("curl")} "$@"\n')
        self.assertDownloads(HF_TOKEN="hf_secret", PATH=tools)
        for path, headers in self.hub.requests:
            self.assertEqual(headers["Authorization"], "Bearer hf_secret", path)
        with open(os.path.join(self.directory, "arguments")) as file:
            arguments = file.read()
        self.assertIn(self.hub.url, arguments)
        self.assertNotIn("hf_secret", arguments)

    def test_token_is_not_sent_elsewhere(self):
        other = Hub()
        self.addCleanup(other.close)
        for name in (WEIGHTS, "config.json"):
            self.hub.faults[name] = [redirect_to(f"{other.url}/{MODEL}/resolve/{REVISION}/{name}")]
        self.assertDownloads(HF_TOKEN="hf_secret")
        self.assertEqual(sorted(other.fetched()), ["config.json", WEIGHTS])
        for path, headers in other.requests:
            self.assertIsNone(headers["Authorization"], path)

    def test_redirect_to_another_protocol(self):
        self.hub.faults["config.json"] = [redirect_to("file:///etc/hostname")]
        self.assertFails("curl error 1")
        self.assertEqual(self.present(), set())

    def test_malformed_token(self):
        self.assertFails("HF_TOKEN has a character", HF_TOKEN='x"\nurl = "http://127.0.0.1/')
        self.assertEqual(self.hub.requests, [])

    # Names

    def test_malicious_names_are_skipped(self):
        names = ["../x", "a/b", "-o", "..", "/tmp/config.json", "model-00001-of-../../x.safetensors",
                 "config.json\n", "\33[2J", 'x","path":"config.json']
        for name in names:
            self.hub.extra_entries.append(Hub.entry(name, b"malicious"))
        self.assertDownloads()
        self.assertEqual(self.present(), self.NEEDED)
        self.assertEqual(set(self.hub.fetched()), self.NEEDED)
        self.assertEqual(self.err.count("skipping a file with an unsafe name"), len(names))
        self.assertIn("unsafe name: ../x\n", self.err)
        self.assertNotIn("\33", self.err)

    def test_malicious_names_do_not_stand_in_for_weights(self):
        del self.hub.files[WEIGHTS]
        self.hub.extra_entries.append(Hub.entry("model-00001-of-00001/../../x.safetensors", b"malicious"))
        self.assertFails("no safetensors weights")
        self.assertEqual(self.hub.fetched(), [])

    def test_unusable_listing(self):
        good = Hub.entry(WEIGHTS, b"weights")
        for change in ({"size": -1}, {"size": 0}, {"size": "7 256 0"}, {"size": 10**15},
                       {"lfs": {"oid": "x y"}}, {"lfs": {"oid": "ab"}}):
            with self.subTest(change):
                self.hub.extra_entries = [dict(good, **change)]
                self.assertFails(f"no usable size and hash for {WEIGHTS}")
        self.assertEqual(self.hub.fetched(), [])

    def test_unusable_revision(self):
        for sha in ("../../x", "main", "", None):
            self.hub.info["sha"] = sha
            self.assertFails("names no commit")

    def test_bad_arguments(self):
        for model in ("", "Qwen3", "Qwen/", "/x", "a/b/c", "../x", "x/..", "-o/x", "a/-o", "a b/c",
                      "a/b?c", "a/b\nc"):
            with self.subTest(model):
                self.assertFails("not a model name", arguments=[model])
        self.assertFails("usage:", arguments=["a/b", "c", "d"])
        for endpoint in ("file:///etc", "ftp://x", "huggingface.co", "https://", "http://a b", 'http://"',
                         "http://user:password@x"):
            with self.subTest(endpoint):
                self.assertFails("HF_ENDPOINT", HF_ENDPOINT=endpoint)
        self.assertFails("DOWNLOAD_RETRY_DELAY", DOWNLOAD_RETRY_DELAY="1.5")
        self.assertEqual(self.hub.requests, [])

    # The disk

    def test_destination_cannot_be_created(self):
        with open(os.path.join(self.directory, "file"), "w"):
            pass
        self.assertFails("cannot create the directory file/x", arguments=[MODEL, "file/x"])

    @unittest.skipIf(os.geteuid() == 0, "root may write anywhere")
    def test_destination_is_read_only(self):
        os.makedirs(self.dest, mode=0o555)
        self.assertFails("cannot write to the directory")

    def test_not_enough_room(self):
        self.hub.extra_entries = [dict(Hub.entry(WEIGHTS, b"weights"), size=10**15 - 1)]
        self.assertFails("not enough room in models/Qwen3-Tiny: 1000000.00 GB to download")
        self.assertEqual(self.present(), set())

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_disk_full(self):
        os.makedirs(self.dest)
        os.symlink("/dev/full", os.path.join(self.dest, WEIGHTS + ".part"))
        self.assertFails(f"cannot write models/Qwen3-Tiny/{WEIGHTS}.part: disk full")
        os.unlink(os.path.join(self.dest, WEIGHTS + ".part"))

    def test_directory_in_the_way(self):
        os.makedirs(os.path.join(self.dest, WEIGHTS))
        self.assertFails(f"cannot remove models/Qwen3-Tiny/{WEIGHTS}")
        os.rmdir(os.path.join(self.dest, WEIGHTS))

    def test_two_downloads_at_once(self):
        os.makedirs(os.path.join(self.dest, ".download.lock"))
        self.assertFails("another download into models/Qwen3-Tiny is running")
        self.assertEqual(self.hub.fetched(), [])
        os.rmdir(os.path.join(self.dest, ".download.lock"))


if __name__ == "__main__":
    unittest.main()
