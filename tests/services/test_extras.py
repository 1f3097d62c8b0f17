"""Libraries that are loaded on use."""

from pathlib import Path

import pytest

from sage.errors import ServiceError
from sage.services.extras import MissingExtraError, load


def test_a_module_that_is_there_is_returned() -> None:
    assert load("json.decoder", "json").JSONDecoder().decode("[1]") == [1]


def test_a_missing_module_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError) as caught:
        load("no_such_library.client", "chroma")
    assert str(caught.value) == (
        "module \"no_such_library.client\" cannot be imported: No module named 'no_such_library'"
    )
    assert caught.value.__notes__ == ['Install it with: pip install "sage-dataflow[chroma]"']
    assert isinstance(caught.value, ServiceError)
    assert isinstance(caught.value, ImportError)


def test_a_module_that_lacks_a_name_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("from json import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match='"half_installed" cannot be imported: cannot import name'):
        load("half_installed", "vector")
