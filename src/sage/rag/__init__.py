"""Answers from documents: load, split, index, retrieve, generate and check, each an operator of a stream."""

from sage._lazy import lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sage.rag.conversation import Converse as Converse
    from sage.rag.documents import Document as Document
    from sage.rag.documents import DocumentError as DocumentError
    from sage.rag.documents import Passage as Passage
    from sage.rag.evaluation import Evaluate as Evaluate
    from sage.rag.evaluation import Scores as Scores
    from sage.rag.generation import Answered as Answered
    from sage.rag.generation import CheckCitations as CheckCitations
    from sage.rag.generation import Generate as Generate
    from sage.rag.generation import GenerateAsync as GenerateAsync
    from sage.rag.indexed_files import IndexedFiles as IndexedFiles
    from sage.rag.indexed_files import Prune as Prune
    from sage.rag.keywords import KeywordIndex as KeywordIndex
    from sage.rag.loaders import Files as Files
    from sage.rag.loaders import Load as Load
    from sage.rag.prompts import Prompt as Prompt
    from sage.rag.retrieval import Index as Index
    from sage.rag.retrieval import Question as Question
    from sage.rag.retrieval import Retrieve as Retrieve
    from sage.rag.retrieval import Retrieved as Retrieved
    from sage.rag.splitters import SplitByStructure as SplitByStructure
    from sage.rag.splitters import SplitByTokens as SplitByTokens

__getattr__ = lazy(
    __name__,
    globals(),
    {
        "conversation": "Converse",
        "documents": "Document DocumentError Passage",
        "evaluation": "Evaluate Scores",
        "generation": "Answered CheckCitations Generate GenerateAsync",
        "indexed_files": "IndexedFiles Prune",
        "keywords": "KeywordIndex",
        "loaders": "Files Load",
        "prompts": "Prompt",
        "retrieval": "Index Question Retrieve Retrieved",
        "splitters": "SplitByStructure SplitByTokens",
    },
)
