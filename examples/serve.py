"""Answer prompts over HTTP with a packed model, one at a time: python examples/serve.py PACKED [--port 8000].

curl -d '{"prompt": "Once upon a time", "max_new_tokens": 20}' localhost:8000
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

from transformers import AutoTokenizer

import patch


def server(folder: str, port: int) -> HTTPServer:
    """A server of this machine alone; port 0 takes any free one."""
    model = patch.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = tokenizer(asked["prompt"], return_tensors="pt").to(model.device)
                most = int(asked.get("max_new_tokens", 64))
                if prompt["input_ids"].numel() == 0 or most < 1:
                    raise ValueError("nothing to read, or nothing to write")
            except (KeyError, TypeError, ValueError) as error:
                self.send_error(400, f'expected {{"prompt": TEXT}}, got {type(error).__name__}: {error}')
                return
            tokens = model.generate(**prompt, max_new_tokens=most, do_sample=False)
            text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"text": text}).encode())

    return HTTPServer(("localhost", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", help="folder of patch-llm export --format packed")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with server(options.packed, options.port) as running:
        print(f"listening on http://localhost:{running.server_port}", flush=True)
        running.serve_forever()


if __name__ == "__main__":
    main()
