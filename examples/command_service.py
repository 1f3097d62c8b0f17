"""A program of any kind as a service: here the web server of Python; a database or a model server goes the same way."""

import sys
import urllib.request
from pathlib import Path

from sage import Http, LocalEnvironment


def main() -> None:
    env = LocalEnvironment("command service")
    web = env.register_command(
        "web",
        # A free port is chosen for {port}, and {folder} is a private folder that is removed in the end.
        [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", "{folder}"],
        ready=Http("/"),
    )

    def fetch(name: str) -> str:
        Path(web.folder or "", name).write_text(f"this is {name}")
        with urllib.request.urlopen(f"{web.url}/{name}") as answer:
            text: str = answer.read().decode()
            return text

    env.from_batch(["a.txt", "b.txt"]).map(fetch).print()
    report = env.run()
    print("web server:", report.service("web").state)


if __name__ == "__main__":
    main()
