"""How many tokens a second a server writes for one client, and for many at once.

    python benchmarks/serving.py [MODEL] [--clients 32] [--tokens 64] [--slots 16] [--rounds 3]

Prints JSON: of each round both rates in tokens/s and their ratio, and the medians.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def complete(port: int, number: int, tokens: int) -> int:
    """Ask for one text, and tell how many tokens it has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    asked = {"prompt": f"Once upon a time, {number} years ago", "max_tokens": tokens}
    asked |= {"seed": number, "temperature": 1.0, "repetition_penalty": 1.0, "min_p": 0.0}
    connection.request("POST", "/v1/completions", json.dumps(asked))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["usage"]["completion_tokens"]


def rate(port: int, clients: int, requests: int, tokens: int) -> float:
    """Tokens a second over some requests, so many at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(pool.map(lambda number: complete(port, number, tokens), range(requests)))
    return made / (time.perf_counter() - began)


def main() -> None:
    """Start a server, ask it, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tales")
    for name, default in (("clients", 32), ("tokens", 64), ("slots", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    command = [sys.executable, ROOT / "run.py", "serve", args.model, "--port", "0"]
    command += ["--slots", str(args.slots)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as server:
        assert server.stderr is not None
        port = None
        while port is None:
            line = server.stderr.readline()
            if not line:
                sys.exit("the server did not start")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            port = int(found[1]) if found else None
        with ThreadPoolExecutor(1) as reader:
            reader.submit(server.stderr.read)  # or its log would fill the pipe
            rate(port, 1, 1, args.tokens)
            rounds = []
            for _ in range(args.rounds):
                one = rate(port, 1, 4, args.tokens)
                many = rate(port, args.clients, args.clients * 2, args.tokens)
                rounds.append({"one": one, "many": many, "ratio": many / one})
            server.terminate()
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    print(json.dumps({"load": load, "clients": args.clients, **medians, "rounds": rounds}))


if __name__ == "__main__":
    main()
