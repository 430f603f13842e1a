"""Process that holds one variant of a model for benchmarks.studies.generate and answers requests one by one.

python -m benchmarks.studies.generate_worker MODULE THREADS

MODULE has `prepare`, the class `Engine`, and `NEEDS`, the packages to install: benchmarks.studies.generate_torch, or a
peer in benchmarks.rivals. A request is a line of JSON on stdin, {"call": name, ...arguments}, its answer a line on
stdout. torch is not imported here: the memory of a peer must not hold it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Protocol

SAMPLED_LOGITS = 1000  # of a vocabulary: enough to tell models apart


class Engine(Protocol):
    """One loaded variant, greedy decoding with a KV cache.

    start  a new generation: prompts (batch, tokens) of one length, and room for `length` tokens in all
    step   one token for each sequence
    Both return the next token of each sequence. mode is "eager" or "compile".
    """

    vocab_size: int

    def start(self, prompts: list[list[int]], length: int, mode: str) -> list[int]: ...
    def step(self, tokens: list[int]) -> list[int]: ...
    def logits(self, stride: int) -> list[float]:
        """Every stride-th logit of the newest token of the first sequence."""
        ...

    def facts(self) -> dict[str, Any]:
        """weights_bytes, linears_bytes, head_bytes where known, and version of the engine."""
        ...


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM (the peak) of this process; 0 on a system without /proc."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return 0


def random_prompts(batch: int, tokens: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(tokens)] for _ in range(batch)]


class Server:
    """Answers requests; one object a process. A request that fails is answered by {"error": one line}."""

    def __init__(self, module: str, threads: int) -> None:
        self.module_name, self.threads = module, threads
        self.engine: Engine | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(request)
        try:
            result = getattr(self, arguments.pop("call"))(**arguments)
        except Exception as error:  # the study goes on without this variant
            reason = " ".join(str(error).split())[:300]
            return {"error": f"{type(error).__name__}: {reason}"}
        return result | {"rss_bytes": resident_bytes("VmRSS"), "peak_bytes": resident_bytes("VmHWM")}

    def prepare(self, **arguments: Any) -> dict[str, Any]:
        module = importlib.import_module(self.module_name)
        try:
            return module.prepare(threads=self.threads, **arguments)
        except ModuleNotFoundError as error:
            needed = f"expected the packages {module.NEEDS}, got: {error}"
            raise RuntimeError(f"{needed}. Install them, or pass --no-peers.") from None

    def load(self, folder: str, **arguments: Any) -> dict[str, Any]:
        """Seconds from the files, which are in the page cache, to the first token of a prompt of one token."""
        module = importlib.import_module(self.module_name)
        for file in Path(folder).rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    while opened.read(1 << 24):
                        pass
        begin = time.perf_counter()
        engine = self.engine = module.Engine(folder, self.threads, **arguments)
        engine.start([[1]], 2, "eager")
        return {"seconds": time.perf_counter() - begin} | engine.facts()

    def generate(self, batch: int, prompt: int, new_tokens: int, mode: str) -> dict[str, Any]:
        """Seconds to the first token and of each further one, of all sequences at once."""
        engine = self._loaded()
        prompts = random_prompts(batch, prompt, engine.vocab_size)
        begin = time.perf_counter()
        tokens = engine.start(prompts, prompt + new_tokens, mode)
        first = time.perf_counter() - begin
        steps = []
        for _ in range(new_tokens - 1):
            begin = time.perf_counter()
            tokens = engine.step(tokens)
            steps.append(time.perf_counter() - begin)
        return {"first": first, "steps": steps}

    def follow(self, tokens: list[int], prompt: int, length: int, mode: str) -> dict[str, Any]:
        """What the engine makes of a given text: its choice and some of its logits after the prompt and each token."""
        engine = self._loaded()
        stride = max(engine.vocab_size // SAMPLED_LOGITS, 1)
        chosen = engine.start([tokens[:prompt]], length, mode)
        choices, logits, seconds = chosen, [engine.logits(stride)], []
        for token in tokens[prompt:]:
            begin = time.perf_counter()
            chosen = engine.step([token])
            seconds.append(time.perf_counter() - begin)
            choices, logits = choices + chosen, [*logits, engine.logits(stride)]
        return {"choices": choices, "logits": logits, "seconds": seconds}

    def _loaded(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("expected a loaded engine, got none. Send a load request first.")
        return self.engine


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    server = Server(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
