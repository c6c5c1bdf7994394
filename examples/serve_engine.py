"""Export an ONNX Runtime engine and serve it over HTTP: `python -m examples.serve_engine bundle` and POST JSON rows."""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

import moeopt
from examples.quickstart import TwoOfEight


def make(folder: Path) -> None:
    """Optimise, verify and save; the machine that serves needs neither this model's code nor its weights."""
    torch.manual_seed(0)
    moeopt.optimize(TwoOfEight().eval(), torch.randn(2, 16, 64), backend="onnxruntime").save(folder)


def server(folder: Path, port: int = 8000) -> HTTPServer:
    """An HTTP server that answers a POST of rows (batch, sequence, 64) with the engine's."""
    engine = moeopt.load(folder)  # tests itself on this machine first

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(engine(torch.tensor(rows)).tolist()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Say nothing for each request."""

    return HTTPServer(("127.0.0.1", port), Answer)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "bundle")
    if not folder.exists():
        make(folder)
    print("listening on http://127.0.0.1:8000")
    server(folder).serve_forever()
