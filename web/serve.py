#!/usr/bin/env python3
"""Serve build/web on this machine: python3 web/serve.py [PORT]. The two headers make the page cross-origin
isolated, which is what browsers ask for before threads may share memory; without them it runs on one thread."""
import functools
import http.server
import pathlib
import sys


class Handler(http.server.SimpleHTTPRequestHandler):
    isolated = True
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".wasm": "application/wasm"}

    def end_headers(self):
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *args):
        pass


def server(port=0, isolated=True, kind=Handler, below="."):
    folder = pathlib.Path(__file__).resolve().parent.parent / "build" / "web" / below
    handler = type("WebHandler", (kind,), {"isolated": isolated})
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(handler, directory=folder))


if __name__ == "__main__":
    s = server(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
    print(f"http://127.0.0.1:{s.server_address[1]}/   (Ctrl-C ends it)")
    try:
        s.serve_forever()
    except KeyboardInterrupt:
        pass
