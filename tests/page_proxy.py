"""The server's page beside answers that a small model never gives: /v1/* goes to a stub, or to a server."""

from __future__ import annotations

import http.client
import http.server
import json
import pathlib

PAGE = pathlib.Path(__file__).parent.parent / "dsv2cli" / "serve" / "page.html"
DROPPED = {"host", "origin", "referer", "connection", "accept-encoding"}


class Proxy(http.server.BaseHTTPRequestHandler):
    server_address = ("127.0.0.1", 8177)
    stub = None  # a function (handler, request) -> True if it answered

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.split("?")[0] != "/":
            return None if self.stub and type(self).stub(self, None) else self.forward(None)
        self.head(200, "text/html; charset=utf-8")
        self.wfile.write(PAGE.read_bytes())

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not (self.stub and type(self).stub(self, json.loads(body))):
            self.forward(body)

    def head(self, status, kind):
        # HTTP/1.0: the end of the connection is the end of the answer.
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def forward(self, body):
        host, port = self.server_address
        headers = {k: v for k, v in self.headers.items() if k.lower() not in DROPPED}
        headers["Host"] = f"{host}:{port}"
        upstream = http.client.HTTPConnection(host, port)
        try:
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
        except OSError:
            self.head(502, "application/json")
            self.wfile.write(b'{"error": {"message": "The server behind the proxy is not running"}}')
            return
        try:
            self.head(answer.status, answer.headers.get("Content-Type", "text/plain"))
            while chunk := answer.read1(65536):
                self.wfile.write(chunk)
        except OSError:
            pass  # the page went away: closing upstream stops the answer there too
        finally:
            upstream.close()


def serve(port, server=("127.0.0.1", 8177), stub=None):
    handler = type("Handler", (Proxy,), {"server_address": server, "stub": stub})
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
