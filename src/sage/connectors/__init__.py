"""Sources and sinks for files, written as your own would be."""

from sage._lazy import lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sage.connectors.json_lines import JsonLines as JsonLines
    from sage.connectors.json_lines import JsonLinesFiles as JsonLinesFiles

__getattr__ = lazy(__name__, globals(), {"json_lines": "JsonLines JsonLinesFiles"})
