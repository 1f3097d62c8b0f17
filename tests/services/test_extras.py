"""Libraries that are loaded on use."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from sage._extras import MissingExtraError, load
from sage.errors import ServiceError


def test_a_module_that_is_there_is_returned() -> None:
    assert load("json.decoder", "json").JSONDecoder().decode("[1]") == [1]


def test_a_missing_module_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError) as caught:
        load("no_such_library.client", "chroma")
    said = 'module "no_such_library.client" of the extra "chroma" cannot be imported: No module named'
    assert str(caught.value) == f"{said} 'no_such_library'"
    assert caught.value.__notes__ == ['Install it with: pip install "sage-dataflow[chroma]"']
    assert isinstance(caught.value, ServiceError)
    assert isinstance(caught.value, ImportError)


def test_a_module_that_lacks_a_name_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("from json import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match='"half_installed" of the extra "vector" cannot be imported: cannot'):
        load("half_installed", "vector")


def test_modules_that_import_each_other_are_loaded_by_two_services_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread would wait for what the other one is importing, and Python lets one of them see half a module."""
    folder = tmp_path / "sage_circle"
    folder.mkdir()
    wait = "import sys\ngate = sys.modules['sage_gate']\n"
    (folder / "__init__.py").write_text("from sage_circle.one import ONE\n", "utf-8")
    one = f"{wait}ONE = 1\ngate.one.set()\ngate.two.wait(0.5)\ngate.pause()\nfrom sage_circle.two import TWO\n"
    (folder / "one.py").write_text(one, "utf-8")
    (folder / "two.py").write_text(f"{wait}gate.two.set()\nfrom sage_circle.one import ONE\nTWO = ONE + 1\n", "utf-8")
    gate = ModuleType("sage_gate")
    one_begun, two_begun = threading.Event(), threading.Event()
    vars(gate).update(one=one_begun, two=two_begun, pause=lambda: time.sleep(0.05))
    monkeypatch.setitem(sys.modules, "sage_gate", gate)
    monkeypatch.syspath_prepend(str(tmp_path))

    def second() -> int:
        assert one_begun.wait(10)
        return int(load("sage_circle.two", "circle").TWO)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: int(load("sage_circle", "circle").ONE))
        assert (threads.submit(second).result(30), first.result(30)) == (2, 1)
    for name in [name for name in sys.modules if name.startswith("sage_circle")]:
        del sys.modules[name]
