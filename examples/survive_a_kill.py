"""Kill a batch of paid calls in the middle, run it again, and count the rows."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from sage import Durable, LocalEnvironment
from sage.connectors import JsonLinesFiles

COUNT = 400


def run(calls_left: float) -> None:
    async def ask(number: int) -> dict[str, int]:
        nonlocal calls_left
        calls_left -= 1
        if calls_left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.02)
        return {"number": number, "answer": number * 2}

    env = LocalEnvironment("survive", durable=Durable("state", interval_s=0.05))
    env.from_batch(range(COUNT)).map_async(ask, concurrency=8, capacity=8).sink(JsonLinesFiles("out"))
    env.submit(autostop=True)


def main() -> None:
    with TemporaryDirectory() as folder:
        for calls in ("200", "inf"):
            program = subprocess.run([sys.executable, Path(__file__).absolute(), calls], cwd=folder)
            print("killed" if program.returncode == -signal.SIGKILL else "ended by itself")
        lines = [line for path in Path(folder, "out").glob("*.jsonl") for line in path.read_text().splitlines()]
        rows = {json.loads(line)["number"] for line in lines}
        print(len(lines), "lines,", len(rows), "different rows")


if __name__ == "__main__":
    run(float(sys.argv[1])) if len(sys.argv) > 1 else main()
