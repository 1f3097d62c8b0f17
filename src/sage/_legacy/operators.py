"""Ready-made operators of old RAG programs, each configured by a dict, under their old names and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from sage._compositions import printing
from sage._extras import load
from sage._legacy.functions import BatchFunction, MapFunction, SinkFunction, SourceFunction
from sage.errors import GraphError, hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage.services.models.openai import OpenAILLM


Config = dict[str, Any]
"""The settings of an operator as a file has them: text, numbers, lists and further ones of these."""


def load_config(path: str | Path = "config.yaml") -> Config:
    """Return the content of a YAML or JSON file as a dict.

    Raises:
        GraphError: the file holds something else.
    """
    text = Path(path).read_text(encoding="utf-8")
    config = json.loads(text) if str(path).endswith(".json") else load("yaml", "rag").safe_load(text)
    if not isinstance(config, dict):
        raise hint(GraphError(f'config "{path}" holds {type(config).__name__}'), "Write a mapping of names to values.")
    return config


def get_sage_paths(project_root: str | Path | None = None) -> SimpleNamespace:
    """Return the folders that old programs write to, `.sage` and those in it; nothing is created."""
    root = Path(project_root or Path.cwd())
    folder = root / ".sage"
    named = {f"{name}_dir": folder / name for name in ("logs", "output", "temp", "cache", "states", "reports")}
    return SimpleNamespace(project_root=root, sage_dir=folder, **named)


class FileSource(SourceFunction):
    """Reads a text file line by line and waits for more at its end.

    Args:
        config: "data_path", the file; "loop_reading" begins again at the end.
    """

    def __init__(self, config: Config, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._path = Path(config["data_path"])
        self._loops = bool(config.get("loop_reading", False))
        self._file: IO[str] | None = None

    def open(self) -> None:
        self._file = self._path.open(encoding="utf-8")

    def execute(self) -> str | None:
        """Return the next line without its end, or None if there is not one yet."""
        assert self._file is not None
        line = self._file.readline()
        if not line and self._loops:
            self._file.seek(0)
        return line.strip() if line else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class JSONLBatch(BatchFunction):
    """Reads a file of JSON Lines to its end.

    Args:
        config: "data_path", the file.
    """

    def __init__(self, config: Config, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._path = Path(config["data_path"])
        self._lines: Iterator[str] | None = None

    def execute(self) -> object:
        """Return the value of the next line that is not blank, or None at the end."""
        if self._lines is None:
            self._lines = (line for line in self._path.read_text(encoding="utf-8").splitlines() if line.strip())
        line = next(self._lines, None)
        return None if line is None else json.loads(line)


def question_and_answer(data: object) -> tuple[object, object] | None:
    """Return question and answer of a record, or None if it has no such parts."""
    if isinstance(data, dict) and "query" in data:
        return data["query"], data.get("generated", data.get("answer", data.get("response")))
    if isinstance(data, list | tuple) and len(data) == 2:
        return data[0], data[1]
    return None


class TerminalSink(SinkFunction):
    """Prints question and answer, or else the record."""

    def __init__(self, config: Config | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.config = config or {}

    def execute(self, data: object) -> None:
        pair = question_and_answer(data)
        print(data if pair is None else f"[Q] Question :{pair[0]}\n[A] Answer :{pair[1]}")


class PrintSink(SinkFunction):
    """Prints each record after a prefix, which is dimmed on a terminal if it is to be colored."""

    def __init__(self, prefix: str = "", separator: str = " | ", colored: bool = True, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._print = printing(prefix, separator, colored)

    def execute(self, data: object) -> None:
        self._print(data)


class FileSink(SinkFunction):
    """Writes question and answer, or else the record, to a text file.

    Args:
        config: "file_path", the file, which is overwritten.
    """

    def __init__(self, config: Config | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._path = Path((config or {}).get("file_path", "qa_output.txt"))
        self._file: IO[str] | None = None

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")

    def execute(self, data: object) -> None:
        assert self._file is not None
        pair = question_and_answer(data)
        self._file.write(f"{data}\n" if pair is None else f"[Q] Question: {pair[0]}\n[A] Answer  : {pair[1]}\n\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


CONTEXTS = ("refining_results", "retrieval_results", "results", "external_corpus", "context")
INSTRUCTION = (
    "Answer the question with the help of the passages below. Give only the answer.\n\nPassages for this question:\n{}"
)


class QAPromptor(MapFunction):
    """Builds the messages of a chat model from a question and its passages.

    A record is a pair of question and passages, or a dict with "query" and one of "refining_results",
    "retrieval_results" and "results". The result is a list of two: the question or the dict, and the messages.

    Args:
        config: "prompt_template", a text with one `{}` for the passages, if you want your own.
    """

    def __init__(self, config: Config | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._template = str((config or {}).get("prompt_template", INSTRUCTION))

    def execute(self, data: Any) -> list[object]:
        """Return question or dict, and the messages."""
        query: object = data
        passages: Any = []
        if isinstance(data, dict):
            query, passages = data.get("query", ""), next((data[name] for name in CONTEXTS if data.get(name)), [])
        elif isinstance(data, list | tuple) and len(data) == 2:
            query, passages = data
        found = [passages] if isinstance(passages, str) else passages
        texts = [str(one.get("text", one) if isinstance(one, dict) else one) for one in found]
        system = self._template.format("\n".join(texts)) if texts else "Answer the question. Give only the answer."
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Question: {query}"}]
        return [data if isinstance(data, dict) else query, messages]


class OpenAIGenerator(MapFunction):
    """Asks a chat model that speaks the OpenAI protocol.

    A record is the list that `QAPromptor` returns. The result is a pair of question and answer, or the dict with the
    answer as "generated".

    Args:
        config: "model_name", "base_url", "api_key" (OPENAI_API_KEY by default) and "seed".
    """

    def __init__(self, config: Config, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._config = config
        self._model: OpenAILLM | None = None

    def open(self) -> None:
        from sage.services.models.openai import OpenAILLM

        extra = {name: self._config[name] for name in ("seed",) if self._config.get(name) is not None}
        key = self._config.get("api_key") or None
        address = {"base_url": self._config["base_url"]} if self._config.get("base_url") else {}
        self._model = OpenAILLM(self._config["model_name"], api_key=key, extra=extra, **address)
        self._model.setup()

    def execute(self, data: Any) -> object:
        from sage.services.models.llm import Message

        asked, messages = data if isinstance(data, list | tuple) and len(data) == 2 else (data, data)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        assert self._model is not None
        answer = self._model.generate([Message(one["role"], one["content"]) for one in messages]).text
        return {**asked, "generated": answer} if isinstance(asked, dict) else (asked, answer)

    def close(self) -> None:
        if self._model is not None:
            self._model.cleanup()


class CharacterSplitter(MapFunction):
    """Cuts a text into pieces of characters that overlap.

    Args:
        config: "chunk_size" and "overlap", in characters.
    """

    def __init__(self, config: Config | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        settings = config or {}
        self._size = int(settings.get("chunk_size", 512))
        self._overlap = int(settings.get("overlap", 128))
        if not 0 <= self._overlap < self._size:
            raise GraphError(f"CharacterSplitter: overlap {self._overlap} does not fit into chunk_size {self._size}")

    def execute(self, data: object) -> list[str]:
        """Return the pieces of a text, or of the "content" of a dict."""
        text = str(data.get("content", "") if isinstance(data, dict) else data)
        step = self._size - self._overlap
        return [text[start : start + self._size] for start in range(0, max(1, len(text) - self._overlap), step)]


class TextLoader(MapFunction):
    """Reads a text file as a dict of "content" and "metadata".

    Args:
        filepath: the file; by default each record is the path of one.
        encoding: how its characters are encoded.
    """

    def __init__(self, filepath: str | None = None, encoding: str = "utf-8", **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._path = filepath
        self._encoding = encoding

    def load(self) -> dict[str, object]:
        """Return the document."""
        return self.execute(None)

    def execute(self, data: Any) -> dict[str, object]:
        path = self._path or data
        return {"content": Path(path).read_text(encoding=self._encoding), "metadata": {"source": str(path)}}
