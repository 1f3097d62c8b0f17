"""Retrieval: the passages for a question, by keywords, by vectors, or by both fused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from sage._arguments import check_count
from sage.errors import GraphError, hint, short
from sage.functions import MapFunction
from sage.rag.documents import Passage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sage.rag.documents import Value
    from sage.rag.keywords import KeywordIndex
    from sage.service import ServiceHandle
    from sage.services.embeddings import EmbeddingService
    from sage.services.filters import Where
    from sage.services.llm import Message
    from sage.services.vector_store import Hit, VectorStore

    Keywords: TypeAlias = "ServiceHandle[KeywordIndex] | KeywordIndex"
    Vectors: TypeAlias = "ServiceHandle[VectorStore] | VectorStore"
    Embeddings: TypeAlias = "ServiceHandle[EmbeddingService] | EmbeddingService"
    Rerank: TypeAlias = "Callable[[Question, Sequence[Found]], Sequence[Found]]"

In = TypeVar("In")
Out = TypeVar("Out")

RANK_CONSTANT = 60
"""How slowly the weight of a rank falls: the value of Cormack, Clarke and Buettcher (SIGIR 2009)."""

CANDIDATES = 50

PLACE = ("document", "start", "end", "heading")
"""What a passage adds to the metadata of its document in an index."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        text: the question.
        id: names it in results; empty where that does not matter.
        query: what is searched for, where that is not the text: a follow-up names nothing by itself.
        history: the conversation before it, the oldest message first.
        expected: ids of the passages that answer it, for evaluation.
        reference: a right answer, for evaluation.
    """

    text: str
    id: str = ""
    query: str = ""
    history: tuple[Message, ...] = ()
    expected: frozenset[str] = frozenset()
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A passage with its score, which is comparable with those of the same question only; higher is better."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A question with the passages that were found for it, the best first."""

    question: Question
    found: tuple[Found, ...] = field(default=())


def fuse(
    rankings: Sequence[Sequence[str]], *, weights: Sequence[float] | None = None, constant: float = RANK_CONSTANT
) -> dict[str, float]:
    """Return ids with their scores by reciprocal rank fusion, the best first.

    An id scores the sum of weight / (constant + rank) over the rankings that have it, so scores of different kinds need
    not be compared. Of equal ones, the one that was met first is first.

    Args:
        rankings: ids in their order, without repetition.
        weights: of the rankings, 1 each by default.
        constant: a higher one lets low ranks count for more.
    """
    scores: defaultdict[str, float] = defaultdict(float)
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, id_ in enumerate(ranking, 1):
            scores[id_] += weight / (constant + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


class Index(MapFunction):
    """Puts passages into a keyword index, a vector store, or both, and hands them on; in batches by `map_batches`.

    When the first passage of a document arrives, what was stored of that document before is removed, so that indexing
    again leaves nothing of an older version. It must therefore run in one task. If the program is killed, the next run
    makes good for it: what is stored twice is stored once. Of passages with the same id, the later one counts. Of a
    batch, those are left out that a model or a store refuses, and the others are stored.

    Args:
        keywords: the keyword index.
        vectors: the vector store, with `embeddings`.
        embeddings: turn passages into vectors.
        anew: whether everything that is stored there is removed before the first passage, so that a document is found
            no more if it does not come again. Until the job has ended, the index is not whole.

    Raises:
        GraphError: there is nothing to put them into, or only one of `vectors` and `embeddings` is given.
    """

    def __init__(
        self,
        *,
        keywords: Keywords | None = None,
        vectors: Vectors | None = None,
        embeddings: Embeddings | None = None,
        anew: bool = False,
    ) -> None:
        check_services("Index", keywords, vectors, embeddings)
        self._keywords = keywords
        self._vectors = vectors
        self._embeddings = embeddings
        self._anew = anew
        self._documents: set[str] = set()

    def open(self) -> None:
        """Remove everything, if the index is made anew."""
        if self._anew:
            self._remove({})

    @overload
    def execute(self, data: Passage) -> Passage: ...

    @overload
    def execute(self, data: Sequence[Passage]) -> Sequence[Passage | Exception]: ...

    def execute(self, data: Any) -> Any:
        """Store a passage or a batch of them and return it, with an error in the place of each that is refused.

        Raises:
            ServiceError: a service cannot answer; the whole batch may be given again.
            ValueError: a single passage is refused.
        """
        if _is_batch(data):
            return _each_of(self._stored, data)
        return self._stored([data])[0]

    def _stored(self, passages: Sequence[Passage]) -> Sequence[Passage]:
        for passage in passages:
            if not isinstance(passage, Passage):
                wrong = TypeError(f"Index takes passages, not {short(passage)}")
                raise hint(wrong, "Documents become passages by SplitByStructure or SplitByTokens.")
        batch = list({passage.id: passage for passage in passages}.values())
        new = {passage.document for passage in batch} - self._documents
        ids = [passage.id for passage in batch]
        texts = [passage.text for passage in batch]
        metadatas = [metadata_of(passage) for passage in batch]
        # The vectors come first: a model that fails must not leave a document half removed.
        rows = None if self._embeddings is None else self._embeddings.embed([passage.searchable for passage in batch])
        if new:
            self._remove({"document": {"$in": sorted(new)}})
        if self._vectors is not None and rows is not None:
            self._vectors.upsert(ids, rows, documents=texts, metadatas=metadatas)
        if self._keywords is not None:
            self._keywords.upsert(ids, texts, metadatas=metadatas)
        self._documents |= new
        return passages

    def _remove(self, where: Where) -> None:
        for store in (self._keywords, self._vectors):
            if store is not None:
                store.delete(where=where)


class Retrieve(MapFunction):
    """Finds the passages for questions: by keywords, by vectors, or, with both, by reciprocal rank fusion of the two.

    Records are questions, as text or `Question`, or in `map_batches` batches of them, which saves calls of services.

    Args:
        k: how many passages at most.
        keywords: the keyword index.
        vectors: the vector store, with `embeddings`.
        embeddings: turn questions into vectors, by the model of the index.
        where: a filter that passages must pass, see `sage.services.filters`.
        candidates: how many passages each way finds before they are fused and reranked.
        weights: of keywords and vectors when they are fused.
        rerank: gets the question and the candidates and returns them, or some of them, in a better order.

    Raises:
        GraphError: there is nothing to search in, only one of `vectors` and `embeddings` is given, or `k` is below 1.
    """

    def __init__(
        self,
        k: int = 5,
        *,
        keywords: Keywords | None = None,
        vectors: Vectors | None = None,
        embeddings: Embeddings | None = None,
        where: Where | None = None,
        candidates: int = CANDIDATES,
        weights: tuple[float, float] = (1.0, 1.0),
        rerank: Rerank | None = None,
    ) -> None:
        check_services("Retrieve", keywords, vectors, embeddings)
        check_count("Retrieve: k is", k)
        check_count("Retrieve: candidates is", candidates)
        self._k = k
        self._keywords = keywords
        self._vectors = vectors
        self._embeddings = embeddings
        self._where = where
        self._candidates = max(candidates, k)
        self._weights = weights
        self._rerank = rerank

    @overload
    def execute(self, data: str | Question) -> Retrieved: ...

    @overload
    def execute(self, data: Sequence[Question]) -> Sequence[Retrieved | Exception]: ...

    def execute(self, data: Any) -> Any:
        """Return a question, or each of a batch, with its passages; an error in the place of each that has none.

        Raises:
            ServiceError: a service cannot answer; the whole batch may be given again.
            ValueError: a single question is blank.
        """
        return _each_of(self._retrieved, data) if _is_batch(data) else self._retrieved([data])[0]

    def _retrieved(self, asked: Sequence[str | Question]) -> list[Retrieved]:
        questions = [question_of(one) for one in asked]
        queries = [question.query or question.text for question in questions]
        for query in queries:
            if not query.strip():
                raise ValueError("the question is blank")
        # Where nothing is fused or reranked, more than k would be thrown away.
        both = self._keywords is not None and self._vectors is not None
        count = self._candidates if both or self._rerank is not None else self._k
        ways: list[list[list[Hit]]] = []
        if self._keywords is not None:
            ways.append(self._keywords.search_batch(queries, count, where=self._where))
        if self._vectors is not None and self._embeddings is not None:
            ways.append(self._vectors.search_batch(self._embeddings.embed(queries), count, where=self._where))
        answers = []
        for place, question in enumerate(questions):
            found = self._fused([way[place] for way in ways])
            if self._rerank is not None:
                found = list(self._rerank(question, found))
            answers.append(Retrieved(question, tuple(found[: self._k])))
        return answers

    def _fused(self, rankings: list[list[Hit]]) -> list[Found]:
        if len(rankings) == 1:
            return [Found(passage_of(hit), hit.score) for hit in rankings[0]]
        known = {hit.id: hit for ranking in reversed(rankings) for hit in ranking}
        scores = fuse([[hit.id for hit in ranking] for ranking in rankings], weights=self._weights)
        return [Found(passage_of(known[id_]), score) for id_, score in scores.items()]


def _is_batch(data: object) -> bool:
    """Return whether `map_batches` gave it, as a list or an array."""
    return isinstance(data, list | tuple) or (hasattr(data, "dtype") and hasattr(data, "__len__"))


def _each_of(
    call: Callable[[Sequence[In]], Sequence[Out]], records: Sequence[In]
) -> Sequence[Out] | Sequence[Out | Exception]:
    """Return what a call gives for records, with an error in the place of each that is refused, found by halving."""
    try:
        return call(records)
    except (ValueError, TypeError) as error:  # services say with these that they cannot take what they are given
        if len(records) == 1:
            return [error]
        middle = len(records) // 2
        return [*_each_of(call, records[:middle]), *_each_of(call, records[middle:])]


def check_services(name: str, keywords: object, vectors: object, embeddings: object) -> None:
    """Refuse services that lead nowhere.

    Raises:
        GraphError: neither `keywords` nor `vectors` is given, or only one of `vectors` and `embeddings`.
    """
    if (vectors is None) is not (embeddings is None):
        given, missing = ("embeddings", "vectors") if vectors is None else ("vectors", "embeddings")
        raise GraphError(f"{name}: {given} is given without {missing}")
    if keywords is None and vectors is None:
        error = GraphError(f"{name}: neither keywords nor vectors are given")
        raise hint(error, "Give keywords=, or vectors= with embeddings=, or all three.")


def question_of(data: str | Question) -> Question:
    """Return a question, which may be a mere text.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(data, Question):
        return data
    if not isinstance(data, str):
        raise hint(TypeError(f"a question is a text or a Question, not {short(data)}"), 'Question("...") takes more.')
    return Question(data)


def metadata_of(passage: Passage) -> Mapping[str, Value]:
    """Return what an index keeps of a passage beside its text."""
    place: dict[str, Value] = {
        "document": passage.document,
        "start": passage.start,
        "end": passage.end,
        "heading": passage.heading,
    }
    return {**passage.metadata, **place}


def passage_of(hit: Hit) -> Passage:
    """Return the passage that an index has found; what is not known of it has a default."""
    metadata = hit.metadata
    return Passage(
        hit.id,
        hit.document or "",
        str(metadata.get("document", "")),
        int(metadata.get("start", 0)),
        int(metadata.get("end", 0)),
        str(metadata.get("heading", "")),
        {name: value for name, value in metadata.items() if name not in PLACE},
    )
