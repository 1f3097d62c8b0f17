"""Answers as real servers give them: each is read, and what is missing in it is None."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from services.models import KEY, opened, saying

from sage import ServiceError
from sage.services.models.completions import Completion, Events, told_in
from sage.services.models.endpoint import EndpointOptions, RefusedError
from sage.services.models.llm import Answer, Message, ToolCall
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM
from sage.testing import assert_clean

QUICK = EndpointOptions(timeout_s=20.0, retries_max=1, backoff_s=(0.01, 0.02))


@pytest.fixture(autouse=True)
def _nothing_is_left(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with assert_clean(within_s=5.0, ignore=["shared memory *"]):
        yield


def asked(server: str, *pieces: str, status: int = 200, stream: bool = False, **headers: str) -> Answer:
    """Return the answer to a question that the server answers with these pieces of a body."""
    model = saying(*pieces, status=status, **headers)
    llm = OpenAILLM(model, base_url=f"{server}/v1", api_key=KEY, request_options=QUICK)
    with opened(llm):
        if not stream:
            answer: Answer = llm.generate("hi")
            return answer
        read = llm.stream("hi")
        text = "".join(read)
        assert text == read.answer.text
        return read.answer


def completion(choice: Any, **others: Any) -> str:
    return json.dumps({"id": "1", "model": "m", "choices": [choice], **others})


def choice(content: Any, reason: str | None = "stop", **others: Any) -> dict[str, Any]:
    return {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **others}}


def events(*chunks: Any) -> str:
    return "".join(f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks)


def delta(reason: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"usage": {"total_tokens": 10}}, (None, None)),
        ({"usage": {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}}, (None, None)),
        ({"usage": {"prompt_tokens": 7, "completion_tokens": None}}, (7, None)),
        ({"usage": {"prompt_tokens": "many", "completion_tokens": -1}}, (None, None)),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": 3.0}}, (0, 3)),
        ({"usage": None}, (None, None)),
        ({"usage": []}, (None, None)),
        ({}, (None, None)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_count_that_is_not_given_is_not_known(
    server: str, usage: dict[str, Any], counts: tuple[Any, Any], stream: bool
) -> None:
    body = events(delta(content="yes"), {**delta("stop"), **usage}) if stream else completion(choice("yes"), **usage)
    answer = asked(server, body, stream=stream)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("yes", *counts)


def test_tokens_that_are_not_known_are_not_counted(server: str) -> None:
    model = saying(completion(choice("yes"), usage={"prompt_tokens": 7}))
    with opened(OpenAILLM(model, base_url=f"{server}/v1", api_key=KEY)) as llm:
        llm.generate("hi")
        assert llm.measures()["prompt_tokens"].items == 7
        assert "completion_tokens" not in llm.measures()


TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (completion(choice([{"type": "text", "text": "one "}, {"text": "two"}, "!"])), {"text": "one two!"}),
        (completion(choice({"type": "text", "text": "one"})), {"text": "one"}),
        (
            completion(choice([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "so"}])),
            {"text": "so", "reasoning": "hm"},
        ),
        (completion(choice([{"type": "refusal", "refusal": "no"}])), {"text": "", "refusal": "no"}),
        (completion(choice(None, refusal="I can't")), {"text": "", "refusal": "I can't"}),
        (completion(choice("", reasoning_content="first")), {"text": "", "reasoning": "first"}),
        (completion(choice("so", reasoning="then")), {"text": "so", "reasoning": "then"}),
        (completion(choice("so", None)), {"text": "so", "finish_reason": None}),
        (completion(choice("", "content_filter")), {"text": "", "finish_reason": "content_filter"}),
        (completion({"text": "bare"}), {"text": "bare", "finish_reason": None}),
        (completion({"message": {"content": "bare"}}), {"text": "bare", "finish_reason": None}),
        (completion(choice(None, tool_calls=[TOOL_CALL])), {"tool_calls": (ToolCall("c1", "add", '{"a": 1}'),)}),
        (
            completion(choice(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}] * 2)),
            {"tool_calls": (ToolCall("call_0", "add", '{"a": 1}'), ToolCall("call_1", "add", '{"a": 1}'))},
        ),
        (
            completion(choice(None, function_call={"name": "add", "arguments": "{}"})),
            {"tool_calls": (ToolCall("call_0", "add", "{}"),)},
        ),
        (json.dumps({"choices": [choice("yes")]}), {"text": "yes", "model": None}),
        ("\ufeff\n" + completion(choice("yes")), {"text": "yes"}),
        (events(delta(content="in "), delta("stop", content="pieces"), "[DONE]"), {"text": "in pieces"}),
    ],
)
def test_a_good_answer_is_read(server: str, body: str, expected: dict[str, Any]) -> None:
    answer = asked(server, body)
    if expected.get("model", "") is None:  # the name that was asked for
        assert answer.model == saying(body)
        del expected["model"]
    assert {name: getattr(answer, name) for name in expected} == expected


def test_several_answers_are_kept_apart(server: str) -> None:
    two = json.dumps({"choices": [{**choice("second"), "index": 1}, choice("first", "length")]})
    for stream, body in (
        (False, two),
        (True, two),
        (True, events(delta(index=1, content="sec"), delta(content="first"), delta(index=1, content="ond"), "[DONE]")),
    ):
        answer = asked(server, body, stream=stream)
        assert answer.text == "first"
        assert [other.text for other in answer.alternatives] == ["second"]


WITH_ROLE = delta(role="assistant", content="")


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([events(delta(content="a"), delta(content="b"), "[DONE]")], "ab"),
        ([events(WITH_ROLE, {"choices": [{"index": 0}]}, delta(content="a"), delta("stop"))], "a"),
        ([events({"choices": []}, {"choices": None}, {"prompt_filter_results": []}, delta("stop", content="a"))], "a"),
        ([events({"choices": [{"index": 0, "delta": None, "finish_reason": "content_filter"}]}, "[DONE]")], ""),
        ([": keep-alive\n\n", ": OPENROUTER PROCESSING\n\n", events(delta("stop", content="a")), ": bye\n\n"], "a"),
        ([events(delta(content="a"), delta("stop")).replace("\n", "\r\n")], "a"),
        ([events(delta(content="a"), delta("stop")).replace("\n", "\r")], "a"),
        ([events(delta(content="a"), delta("stop")).replace("data: ", "data:")], "a"),
        ([events(delta("stop", content="a")).rstrip()], "a"),
        (["id: 4\nretry: 10\nevent: chunk\n", events(delta("stop", content="a"))], "a"),
        (['data: {"choices": [{"delta":\n', 'data: {"content": "a"}, "finish_reason": "stop"}]}\n\n'], "a"),
        ([*json.dumps(delta("stop", content="no events"))], "no events"),
        ([completion(choice("whole"))], "whole"),
        ([json.dumps(json.loads(completion(choice("whole"))), indent=1)], "whole"),
        (["".join(json.dumps(delta(content=each)) + "\n" for each in "ab")], "ab"),
        ([events({"choices": [{"delta": {"content": [{"type": "text", "text": "a"}]}}]}, "[DONE]")], "a"),
        ([events(delta(content="line\u2028end"), "[DONE]").replace("\\u2028", "\u2028")], "line\u2028end"),
        ([*events(delta(content="\u00e9\U0001f600"), "[DONE]")], "\u00e9\U0001f600"),
    ],
)
def test_a_stream_is_read(server: str, pieces: list[str], text: str) -> None:
    assert asked(server, *pieces, stream=True).text == text


def test_all_that_is_not_text_is_on_the_answer_after_the_last_piece(server: str) -> None:
    def call(index: int | None, arguments: str, **others: Any) -> dict[str, Any]:
        return {"index": index, "function": {"arguments": arguments, "name": others.pop("name", None)}, **others}

    body = events(
        delta(reasoning_content="let me "),
        delta(reasoning_content="see"),
        delta(content="I add"),
        delta(tool_calls=[call(0, "", id="c1", name="add")]),
        delta(tool_calls=[call(0, '{"a":')]),
        delta(tool_calls=[call(1, "{}", id="c2", name="now"), call(0, " 1}")]),
        delta(tool_calls=[call(1, "", id="c3", name="now")]),
        delta("tool_calls", refusal="but"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        "[DONE]",
    )
    calls = (ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "now", "{}"), ToolCall("c3", "now", ""))
    answer = asked(server, body, stream=True)
    assert answer == Answer("I add", "m", "tool_calls", 3, 4, calls, "but", "let me see")
    assert answer.reasoning == "let me see"
    assert [call.values() for call in answer.tool_calls] == [{"a": 1}, {}, {}]
    assert answer.turn == Message("assistant", "I add", calls)


def test_the_tokens_of_a_stream_that_counts_in_each_chunk_are_those_of_its_end(server: str) -> None:
    def usage(count: int) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": 5, "completion_tokens": count}}

    model = saying(events({**delta(content="a"), **usage(1)}, {**delta("stop", content="b"), **usage(2)}, "[DONE]"))
    with opened(OpenAILLM(model, base_url=f"{server}/v1", api_key=KEY)) as llm:
        assert "".join(llm.stream("hi")) == "ab"
        assert llm.measures()["completion_tokens"].items == 2
        assert llm.measures()["prompt_tokens"].items == 5


def test_the_whole_answer_is_not_there_before_its_end(server: str) -> None:
    with opened(OpenAILLM("chat", base_url=f"{server}/v1", api_key=KEY)) as llm:
        pieces = llm.stream("hi")
        assert next(pieces) == "You"
        with pytest.raises(RuntimeError, match="the answer is not complete yet"):
            _ = pieces.answer
        pieces.close()


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([events(delta(content="a"), delta(content="b"))], "broke off, .*the stream ended before the answer did"),
        ([events({"choices": []}, "[DONE]")], "gave a malformed answer .*it has no choices"),
        (["<html>welcome</html>"], "gave a malformed answer .*it has no choices.*<html>welcome"),
        ([events(delta(content="a")), "data: {oops\n\n"], "gave a malformed answer"),
        ([events({"error": {"message": "out of memory", "code": 500}})], "in place of an answer .*: out of memory"),
        ([events(delta(content="a"), {"error": "the model crashed"})], "in place of an answer .*: the model crashed"),
        (['event: error\ndata: {"message": "no room"}\n\n'], "in place of an answer .*: no room"),
        (["event: error\ndata: no more\n\n"], "in place of an answer .*: no more"),
        (["event: error\n\n"], "in place of an answer .*: it does not say why"),
        (['{"error": {"message": "asleep"}}'], "in place of an answer .*: asleep"),
    ],
)
def test_a_stream_that_is_not_an_answer_says_so(server: str, pieces: list[str], text: str) -> None:
    with pytest.raises(ServiceError, match=text):
        asked(server, *pieces, stream=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"error": "the text"}', "the text"),
        ('{"error": {"message": "the text", "type": "x"}}', "the text"),
        ('{"error": {"message": null, "type": "server_busy"}}', "server_busy"),
        ('{"error": null, "message": "the text"}', "the text"),
        ('{"detail": "the text"}', "the text"),
        ('{"detail": [{"loc": ["body", "stop"], "msg": "not a list", "input": "secret"}]}', "body.stop: not a list"),
        ('["one", {"message": "two"}]', "one; two"),
        ("the text\n", "the text"),
        ("<html><style>p {}</style><h1>Bad Gateway</h1>\n<p>nginx</p></html>", "Bad Gateway nginx"),
        ('{"object": "error", "message": "the text", "code": 40303}', "the text"),
        ("", "it does not say why"),
        ("{}", "it does not say why"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_words_of_a_server_are_told(server: str, body: str, words: str, stream: bool) -> None:
    with pytest.raises(RefusedError) as caught:
        asked(server, body, status=400, stream=stream)
    assert str(caught.value).endswith(f": {words}")
    assert 'answered 400 for model "say/' in str(caught.value)


def test_an_error_with_a_status_of_success_is_an_error(server: str) -> None:
    for status, kind in ((400, RefusedError), (500, ServiceError)):
        with pytest.raises(ServiceError, match=r"gave an error in place of an answer .*: not today") as caught:
            asked(server, json.dumps({"error": {"message": "not today", "code": status}}))
        assert type(caught.value) is kind


def test_words_of_a_server_are_short_and_have_no_keys(server: str) -> None:
    long = f"key {KEY} and Bearer abc123def456 and sk-other-0123456789 at http://x/?api-key=hidden&a=1 " + "x" * 5000
    with pytest.raises(ServiceError) as caught:
        asked(server, json.dumps({"error": long}), status=400)
    words = str(caught.value).rpartition('": ')[2]
    assert len(words) <= 300
    assert words.startswith("key *** and Bearer *** and *** at http://x/?api-key=***&a=1 xxx")


def test_words_are_found_at_any_depth() -> None:
    assert told_in({"errors": [{"detail": {"reason": "deep"}}]}) == "deep"
    assert told_in({"input": "the text of a user"}) == ""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_stream_may_be_cut_anywhere(size: int) -> None:
    chunks = [delta(content="\u00e9"), delta(content="\r\n"), delta("stop", content="\u65e5\u672c")]
    for end in ("\n", "\r\n"):
        body = (": first\n\n" + events(*chunks, "[DONE]")).replace("\n", end).encode()
        found, completed = Events(), Completion("m")
        text = ""
        for start in range(0, len(body), size):
            text += "".join(completed.add(chunk) for chunk in found.feed(body[start : start + size]))
        text += "".join(completed.add(chunk) for chunk in found.end())
        assert (text, completed.is_done) == ("\u00e9\r\n\u65e5\u672c", True)


# --- embeddings -------------------------------------------------------------------------------------------------------


def rows(*vectors: Any, **others: Any) -> str:
    return json.dumps({"data": [{"embedding": vector} for vector in vectors], **others})


ONE, TWO = [3.0, 4.0], [0.0, 2.0]
PACKED = base64.b64encode(struct.pack("<2f", *ONE)).decode()


@pytest.mark.parametrize(
    "body",
    [
        rows(ONE, TWO),
        rows(ONE, TWO, usage={"total_tokens": 4}),
        rows(ONE, TWO, usage={"prompt_tokens": None}),
        rows(PACKED, TWO),
        json.dumps({"data": [{"embedding": TWO, "index": 1}, {"embedding": ONE, "index": 0}]}),
        json.dumps({"data": [{"embedding": TWO, "index": "1"}, {"embedding": ONE, "index": "0"}]}),
        json.dumps({"data": [{"embedding": ONE, "index": None}, {"embedding": TWO, "index": None}]}),
        json.dumps({"embeddings": [ONE, TWO]}),
        json.dumps([ONE, TWO]),
    ],
)
def test_vectors_are_read_in_the_order_of_the_texts(server: str, body: str) -> None:
    model = saying(body)
    with opened(OpenAIEmbeddings(model, dimension=2, base_url=f"{server}/v1", api_key=KEY)) as embeddings:
        # The shorter text is the first one of a request.
        np.testing.assert_allclose(embeddings.embed(["a", "bb"]), [[0.6, 0.8], [0.0, 1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (rows(ONE), "it has 1 vectors for 2 texts"),
        (rows(ONE, TWO, ONE), "it has 3 vectors for 2 texts"),
        (json.dumps({"data": [{"embedding": ONE, "index": 0}] * 2}), r"its vectors have the numbers \[0, 0\]"),
        (json.dumps({"data": [{"embedding": ONE, "index": 0}, {"embedding": TWO}]}), "malformed answer"),
        (rows(ONE, [None, 1.0]), "malformed answer"),
        (rows(ONE, "not base64"), "malformed answer"),
        (json.dumps({"data": None}), "it has no list of vectors"),
        (json.dumps({"error": "no such model"}), "in place of an answer .*: no such model"),
    ],
)
def test_vectors_that_cannot_be_told_apart_are_refused(server: str, body: str, text: str) -> None:
    model = saying(body)
    with (
        opened(OpenAIEmbeddings(model, dimension=2, base_url=f"{server}/v1", api_key=KEY)) as embeddings,
        pytest.raises(ServiceError, match=text),
    ):
        embeddings.embed(["a", "bb"])
