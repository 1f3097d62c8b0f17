"""Vector servers that want a token: `python token_gate.py chroma PORT URL` or `... milvus PORT FOLDER`.

Neither Chroma's server nor that of Milvus Lite can ask for one. Before Chroma stands a proxy, as one does in real life;
Milvus Lite gets the check that a Milvus server does.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import sys
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "root:open sesame 7/8"


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on that have the token."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    target = ""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b'{"error":"Unauthorized","message":"who are you?"}', "application/json")
            return
        connection = http.client.HTTPConnection(self.target)
        with contextlib.closing(connection):
            kept = {name: value for name, value in self.headers.items() if name != "Host"}
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            self._answer(answer.status, answer.read(), answer.headers.get("Content-Type", "application/json"))

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _pass_on
    do_PUT = do_DELETE = _pass_on

    def log_message(self, *_: Any) -> None:
        pass


def serve_proxy(port: int, url: str) -> None:
    Proxy.target = urllib.parse.urlsplit(url).netloc
    ThreadingHTTPServer(("127.0.0.1", port), Proxy).serve_forever()


def serve_milvus(port: int, folder: str) -> None:
    import grpc  # type: ignore[import-untyped]
    from milvus_lite.adapter.grpc.servicer import MilvusServicer  # type: ignore[import-untyped]
    from milvus_lite.db import MilvusLite  # type: ignore[import-untyped]
    from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server  # type: ignore[import-untyped]

    right = base64.b64encode(TOKEN.encode()).decode()

    def refuse(_: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure, please check api key is correct")

    class Check(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, continuation: Any, details: Any) -> Any:
            if dict(details.invocation_metadata).get("authorization") == right:
                return continuation(details)
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(4), interceptors=[Check()])
    add_MilvusServiceServicer_to_server(MilvusServicer(MilvusLite(folder)), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    kind, number, place = sys.argv[1:]
    {"chroma": serve_proxy, "milvus": serve_milvus}[kind](int(number), place)
