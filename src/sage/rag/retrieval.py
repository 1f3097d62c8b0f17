"""Retrieval: the passages for a question, by keywords, by vectors, or by both fused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

from sage._arguments import check_count
from sage.errors import GraphError, hint, short
from sage.functions import MapFunction
from sage.rag.documents import Passage
from sage.rag.pieces import END, PASSAGE, START, excerpt, owners_of, pieces_of, tokens_in
from sage.services.vectors.contract import Hit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sage.rag.documents import Value
    from sage.rag.files import Indexed
    from sage.rag.keywords import KeywordIndex
    from sage.rag.splitters import Span
    from sage.service import ServiceHandle
    from sage.services.models.embeddings import EmbeddingService
    from sage.services.models.llm import Message
    from sage.services.vectors.contract import VectorStore
    from sage.services.vectors.filters import Where

    Keywords: TypeAlias = "ServiceHandle[KeywordIndex] | KeywordIndex"
    Vectors: TypeAlias = "ServiceHandle[VectorStore] | VectorStore"
    Embeddings: TypeAlias = "ServiceHandle[EmbeddingService] | EmbeddingService"
    Rerank: TypeAlias = "Callable[[Question, Sequence[Found]], Sequence[Found]]"

In = TypeVar("In")
Out = TypeVar("Out")

RANK_CONSTANT = 10
"""How slowly the weight of a rank falls. Cormack, Clarke and Buettcher (SIGIR 2009) took 60; 10 finds more for the
labelled questions in examples/rag."""

CANDIDATES = 50
K = 5

HITS_PER_PASSAGE = 4
"""How many vectors are looked up for each passage that is wanted, as several may be pieces of the same one."""

BEST_PIECES = (3, 1)
"""How many of its pieces a passage keeps in a budget, with their neighbours; the fewer if more do not fit."""

WHOLE_SHARE = 0.5
"""The weight of the ranking by the vectors of whole passages, as a fraction of that by their best vectors."""

OURS = "sage:"
"""The prefix of the names under which an index keeps the place and the origin of a passage, apart from its fields."""

PLACE = ("document", "start", "end", "heading")
"""The place of a passage; an index also keeps it under these names, unless a field of the document has the name."""

SHADOWED = f"{OURS}shadowed"
"""The names of `PLACE` that are fields of the document, in an index."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question.

    Attributes:
        text: the question.
        id: names it in results; empty if that does not matter.
        query: the text to search for, if it is not `text`: a follow-up does not name its subject.
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
    """
    scores: defaultdict[str, float] = defaultdict(float)
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, id_ in enumerate(ranking, 1):
            scores[id_] += weight / (constant + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


class Index(MapFunction):
    """Puts passages into a keyword index, a vector store, or both, and hands them on; in batches by `map_batches`.

    When the first passage of a document arrives, the earlier passages of that document are removed, so that indexing
    again does not leave an older version. It must therefore run in one task. If the program is killed, the next run
    repairs it: passages stored twice are stored once. Of passages with the same id, the later one counts. Of a batch,
    those are left out that a model or a store refuses, and the others are stored.

    Args:
        keywords: the keyword index.
        vectors: the vector store, with `embeddings`.
        embeddings: turn passages into vectors.
        piece_tokens: the size of the pieces of a passage that get vectors of their own beside that of the passage, so
            that a question about one sentence finds it; None leaves them out. By default the model decides, see
            `EmbeddingService.piece_tokens`.
        anew: whether everything that is stored there is removed before the first passage, so that a document is found
            no more if it does not come again. Until the job has ended, the index is not whole.
        indexed: knows the files that are in the index, and is informed of those with a passage that is refused.

    Raises:
        GraphError: there is nothing to put them into, or only one of `vectors` and `embeddings` is given.
    """

    def __init__(
        self,
        *,
        keywords: Keywords | None = None,
        vectors: Vectors | None = None,
        embeddings: Embeddings | None = None,
        piece_tokens: int | Literal["model"] | None = "model",
        anew: bool = False,
        indexed: Indexed | None = None,
    ) -> None:
        check_services("Index", keywords, vectors, embeddings)
        if piece_tokens not in (None, "model"):
            check_count("Index: piece_tokens is", piece_tokens)
        self._piece_tokens = piece_tokens
        self._keywords = keywords
        self._vectors = vectors
        self._embeddings = embeddings
        self._anew = anew
        self._indexed = indexed
        self._documents: set[str] = set()

    def open(self) -> None:
        """Remove everything, if the index is made anew."""
        if self._anew:
            self._remove({})

    @overload
    def execute(self, data: Passage) -> Passage: ...

    @overload
    def execute(self, data: Sequence[Passage]) -> Sequence[Passage | Exception]: ...

    def execute(self, data: Any) -> object:
        """Store a passage or a batch of them and return it, with an error in the place of each that is refused.

        Raises:
            ServiceError: a service cannot answer; the whole batch may be given again.
            ValueError: a single passage is refused.
        """
        if not _is_batch(data):
            data = [data]
            return self._stored(data)[0]
        stored = _each_of(self._stored, data)
        if self._indexed is not None:
            for passage, result in zip(data, stored, strict=True):
                if isinstance(result, Exception) and isinstance(passage, Passage):
                    self._indexed.failed(str(passage.origin.get("file", "")))
        return stored

    def _stored(self, passages: Sequence[Passage]) -> Sequence[Passage]:
        for passage in passages:
            if not isinstance(passage, Passage):
                wrong = TypeError(f"Index takes passages, not {short(passage)}")
                raise hint(wrong, "Documents become passages by SplitByStructure or SplitByTokens.")
        batch = list({passage.id: passage for passage in passages}.values())
        new = {passage.document for passage in batch} - self._documents
        if self._piece_tokens == "model":
            self._piece_tokens = None if self._embeddings is None else self._embeddings.piece_tokens()
        metadatas = [metadata_of(passage) for passage in batch]
        parts = [
            part
            for passage, metadata in zip(batch, metadatas, strict=True)
            for part in parts_of(passage, self._piece_tokens, metadata)
        ]
        # The vectors come first: a model that fails must not leave a document half removed.
        rows = None if self._embeddings is None else self._embeddings.embed([part.searchable for part in parts])
        if new:
            self._remove({f"{OURS}document": {"$in": sorted(new)}})
        if self._vectors is not None and rows is not None:
            ids, texts = [part.id for part in parts], [part.text for part in parts]
            self._vectors.upsert(ids, rows, documents=texts, metadatas=[part.metadata for part in parts])
        if self._keywords is not None:
            ids, texts = [passage.id for passage in batch], [passage.text for passage in batch]
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
        k: how many passages at most; 5 by default, or as many as fit into `budget_tokens`.
        keywords: the keyword index.
        vectors: the vector store, with `embeddings`.
        embeddings: turn questions into vectors, by the model of the index.
        where: a filter that passages must pass, see `sage.services.vectors.filters`.
        candidates: how many passages each way finds before they are fused and reranked.
        weights: of keywords and vectors when they are fused.
        rerank: gets the question and the candidates and returns them, or some of them, in a better order. A model that
            scores pairs of question and passage goes here.
        budget_tokens: how many tokens the texts of all passages may have together. Of a long passage, the part around
            its best pieces is taken, so that more passages fit.

    Raises:
        GraphError: there is nothing to search in, only one of `vectors` and `embeddings` is given, or `k` is below 1.
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        keywords: Keywords | None = None,
        vectors: Vectors | None = None,
        embeddings: Embeddings | None = None,
        where: Where | None = None,
        candidates: int = CANDIDATES,
        weights: tuple[float, float] = (1.0, 1.0),
        rerank: Rerank | None = None,
        budget_tokens: int | None = None,
    ) -> None:
        check_services("Retrieve", keywords, vectors, embeddings)
        if budget_tokens is not None:
            check_count("Retrieve: budget_tokens is", budget_tokens)
        k = (K if budget_tokens is None else candidates) if k is None else k
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
        self._budget_tokens = budget_tokens

    @overload
    def execute(self, data: str | Question) -> Retrieved: ...

    @overload
    def execute(self, data: Sequence[Question]) -> Sequence[Retrieved | Exception]: ...

    def execute(self, data: Any) -> object:
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
                raise ValueError("the question is empty")
        by_keywords: list[list[Hit]] = [[] for _ in queries]
        by_vectors: list[list[Hit]] = [[] for _ in queries]
        if self._keywords is not None:
            by_keywords = self._keywords.search_batch(queries, self._candidates, where=self._where)
        if self._vectors is not None and self._embeddings is not None:
            rows, count = self._embeddings.embed(queries), self._candidates * HITS_PER_PASSAGE
            by_vectors = self._vectors.search_batch(rows, count, where=self._where)
        return [self._answered(*each) for each in zip(questions, by_keywords, by_vectors, strict=True)]

    def _answered(self, question: Question, by_keywords: list[Hit], by_vectors: list[Hit]) -> Retrieved:
        """Return a question with the best of the passages that were found."""
        owners = owners_of(by_vectors)
        scores = self._scores(by_keywords, by_vectors, [owner.id for owner in owners])
        ids = list(scores)[: self._candidates if self._rerank is not None else self._k]
        known = {hit.id: passage_of(hit) for hit in (*by_keywords, *by_vectors) if PASSAGE not in hit.metadata}
        known.update(self._looked_up([id_ for id_ in ids if id_ not in known]))
        found: Sequence[Found] = [Found(known[id_], scores[id_]) for id_ in ids if id_ in known]
        if self._rerank is not None:
            found = self._rerank(question, found)[: self._k]
        if self._budget_tokens is not None:
            found = within(self._budget_tokens, found, {owner.id: owner.spans for owner in owners})
        return Retrieved(question, tuple(found))

    def _scores(self, by_keywords: list[Hit], by_vectors: list[Hit], best: list[str]) -> dict[str, float]:
        """Return the passages by their scores, the best first; only rankings of several ways are fused."""
        words, whole = ([hit.id for hit in hits if PASSAGE not in hit.metadata] for hits in (by_keywords, by_vectors))
        rankings = [(words, self._weights[0]), (best, self._weights[1])]
        if whole != best:
            rankings.append((whole, WHOLE_SHARE * self._weights[1]))
        used = [(ranking, weight) for ranking, weight in rankings if ranking]
        if len(used) == 1:
            return {hit.id: hit.score for hit in by_keywords or by_vectors}
        return fuse([ranking for ranking, _ in used], weights=[weight for _, weight in used])

    def _looked_up(self, ids: list[str]) -> dict[str, Passage]:
        """Return the passages of which only pieces were found."""
        entries = self._vectors.get(ids) if ids and self._vectors is not None else []
        return {entry.id: passage_of(Hit(entry.id, 0.0, entry.document, entry.metadata)) for entry in entries if entry}


def within(budget_tokens: int, found: Sequence[Found], spans: Mapping[str, Sequence[Span]]) -> list[Found]:
    """Return the passages that fit into a budget, the best first, each cut to the part around its best pieces."""
    kept: list[Found] = []
    for each in found:
        for pieces in BEST_PIECES:
            text = excerpt(each.passage.text, spans.get(each.passage.id, ()), best=pieces)
            count = tokens_in(text)
            if count <= budget_tokens:
                budget_tokens -= count
                kept.append(Found(replace(each.passage, text=text), each.score))
                break
    return kept


class Part(NamedTuple):
    """An entry of a vector store: a whole passage or one of its pieces."""

    id: str
    text: str
    searchable: str
    metadata: Mapping[str, Value]


def parts_of(passage: Passage, piece_tokens: int | None, metadata: Mapping[str, Value]) -> list[Part]:
    """Return a passage with its metadata, and its pieces, if it has several."""
    parts = [Part(passage.id, passage.text, passage.searchable, metadata)]
    for number, (start, end) in enumerate(pieces_of(passage, piece_tokens) if piece_tokens is not None else (), 1):
        piece = replace(passage, text=passage.text[start:end])
        place: dict[str, Value] = {PASSAGE: passage.id, START: start, END: end}
        parts.append(Part(f"{passage.id} piece {number}", piece.text, piece.searchable, {**metadata, **place}))
    return parts


def _is_batch(data: object) -> bool:
    """Return whether `map_batches` gave it, as a list or an array."""
    return isinstance(data, list | tuple) or (hasattr(data, "dtype") and hasattr(data, "__len__"))


def _each_of(
    call: Callable[[Sequence[In]], Sequence[Out]], records: Sequence[In]
) -> Sequence[Out] | Sequence[Out | Exception]:
    """Return a call's results for records, with an error in place of each refused one, found by halving."""
    try:
        return call(records)
    except (ValueError, TypeError) as error:  # services refuse their arguments with these
        if len(records) == 1:
            return [error]
        middle = len(records) // 2
        return [*_each_of(call, records[:middle]), *_each_of(call, records[middle:])]


def check_services(name: str, keywords: object, vectors: object, embeddings: object) -> None:
    """Refuse services that lead nowhere."""
    if (vectors is None) is not (embeddings is None):
        given, missing = ("embeddings", "vectors") if vectors is None else ("vectors", "embeddings")
        raise GraphError(f"{name}: {given} is given without {missing}")
    if keywords is None and vectors is None:
        error = GraphError(f"{name}: neither keywords nor vectors are given")
        raise hint(error, "Give keywords=, or vectors= with embeddings=, or all three.")


def question_of(data: str | Question) -> Question:
    """Return a question, which may be a mere text."""
    if isinstance(data, Question):
        return data
    if not isinstance(data, str):
        raise hint(TypeError(f"a question is a text or a Question, not {short(data)}"), 'Question("...") takes more.')
    return Question(data)


def metadata_of(passage: Passage) -> Mapping[str, Value]:
    """Return the metadata of a passage in an index: its fields under their names, and ours separately."""
    place: dict[str, Value] = {
        "document": passage.document,
        "start": passage.start,
        "end": passage.end,
        "heading": passage.heading,
    }
    ours = {f"{OURS}{name}": value for name, value in {**passage.origin, **place}.items()}
    if shadowed := [name for name in PLACE if name in passage.metadata]:
        ours[SHADOWED] = ",".join(shadowed)
    return {**place, **passage.metadata, **ours}


def passage_of(hit: Hit) -> Passage:
    """Return the passage that an index has found; unknown fields have a default."""
    metadata: Mapping[str, Any] = hit.metadata
    shadowed = str(metadata.get(SHADOWED, "")).split(",")
    place = {name: metadata.get(f"{OURS}{name}", metadata.get(name)) for name in PLACE}
    return Passage(
        hit.id,
        hit.document or "",
        str(place["document"] or ""),
        int(place["start"] or 0),
        int(place["end"] or 0),
        str(place["heading"] or ""),
        {
            name: value
            for name, value in metadata.items()
            if not name.startswith(OURS) and (name not in PLACE or name in shadowed)
        },
        {
            name.removeprefix(OURS): value
            for name, value in metadata.items()
            if name.startswith(OURS) and name != SHADOWED and name.removeprefix(OURS) not in PLACE
        },
    )
