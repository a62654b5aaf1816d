"""A small web server with Range on loopback that misbehaves on order: a stand-in for an object store.

Plain HTTP, or with `s3` the part of the S3 protocol that reading needs: path-style addresses, signed requests, HEAD,
errors as XML.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

S3_KEY = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "eu-west-1"}
Fault = str  # "error", "short", "slow", "stalled", "flipped", "whole", "none"


class Store(ThreadingHTTPServer):
    """fault: what to do with the n-th request for a path (n from 0). requests: (path, start, end) in order. most: how
    many GETs were under way at once, at most. gathering: so many GETs wait for one another before any is answered
    (30 seconds at most, so that fewer are an answer too); 0: none waits."""

    daemon_threads = True
    request_queue_size = 128  # with the usual 5, connections made at once wait seconds for a second try

    def __init__(self, root: Path, fault: Callable[[str, int], Fault], s3: bool) -> None:
        super().__init__(("127.0.0.1", 0), _S3Handler if s3 else _Handler)
        self.root, self.fault = root, fault
        self.requests: list[tuple[str, int, int]] = []
        self.lock = threading.Condition()
        self.under_way = self.most = self.gathering = 0

    def enter(self) -> None:
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.lock.notify_all()
            self.lock.wait_for(lambda: self.most >= self.gathering, timeout=30)

    def leave(self) -> None:
        with self.lock:
            self.under_way -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that gave up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: Store
    left: bool  # whether the request that is being answered counts no longer

    def do_GET(self) -> None:
        self.left = False
        self.server.enter()
        self._get()
        self._leave()

    def _leave(self) -> None:
        """Before the end of the answer is sent: whoever has it may ask for the next thing at once."""
        if not self.left:
            self.left = True
            self.server.leave()

    def _get(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self._leave()
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(content))
        with self.server.lock:
            key = (self.path, start, end)
            earlier = self.server.requests.count(key)
            self.server.requests.append(key)
        self._answer(content, start, end, bool(asked), self.server.fault(path.name, earlier))

    def _answer(self, content: bytes, start: int, end: int, partial: bool, fault: Fault) -> None:
        if fault == "error":
            self._leave()
            self.send_error(503)
            return
        if fault == "stalled":
            time.sleep(10)
        if fault == "whole":
            start, end, partial = 0, len(content), False
        body = content[start:end]
        if fault == "flipped":
            body = bytes([body[0] ^ 0xFF]) + body[1:]
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if fault == "short":
            self._leave()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            part = 1 + len(body) // 4
            for place in range(0, len(body), part):
                time.sleep(0.01)
                if place + part >= len(body):
                    self._leave()
                self.wfile.write(body[place : place + part])
        else:
            self._leave()
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the terminal."""


class _S3Handler(_Handler):
    def do_GET(self) -> None:
        if self._is_signed():
            super().do_GET()

    def do_HEAD(self) -> None:
        if self._is_signed():
            super().do_HEAD()

    def _is_signed(self) -> bool:
        """Not whether the signature is right: that is the client library's business."""
        claim = f"AWS4-HMAC-SHA256 Credential={S3_KEY['AWS_ACCESS_KEY_ID']}/"
        signed = self.headers.get("Authorization", "").startswith(claim) and "x-amz-date" in self.headers
        if not signed:
            self.send_error(403)
        return signed

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        name = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}[code]
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{name}</Code><Message>{name}</Message></Error>'
        self.send_response(code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())


@contextmanager
def serve(
    root: Path, fault: Callable[[str, int], Fault] = lambda name, earlier: "none", s3: bool = False
) -> Iterator[Store]:
    store = Store(root, fault, s3)
    thread = threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
