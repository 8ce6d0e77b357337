"""``python select.py …``: score a candidate pool and write its coreset, the same as ``trim-select …``.

Python puts this folder first on its path, so ``import select`` in any module (``subprocess``, ``asyncio`` and
``socket`` need it) may find this file in place of the standard library's. Imported under that name, the file
hands over to the real module. It imports nothing at the top that could need ``select`` itself.
"""

from __future__ import annotations

import sys
from importlib.machinery import BuiltinImporter, ExtensionFileLoader, ModuleSpec, PathFinder
from importlib.util import module_from_spec


def _library_spec() -> ModuleSpec:
    """Find the standard library's ``select``, which is built in or compiled and never a source file.

    Raises:
        ImportError: if this Python has none.
    """
    spec = BuiltinImporter.find_spec("select")
    if spec is not None:
        return spec
    # one entry at a time: the path finder stops at the first match, which is this file
    for entry in sys.path:
        spec = PathFinder.find_spec("select", [entry])
        # passes over this folder under any spelling, other checkouts, and folders named select
        if spec is not None and isinstance(spec.loader, ExtensionFileLoader):
            return spec
    raise ImportError("this Python has no standard-library module named select", name="select")


def _hand_over() -> None:
    """Load the standard library's ``select`` and give it the name that this file was imported under."""
    spec = _library_spec()
    module = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    # a thread that imports select at this very moment is given this file's module: it must serve as well
    globals().update({name: value for name, value in vars(module).items() if not name.startswith("__")})
    sys.modules["select"] = module


if __name__ == "__main__":
    from trim_lightning.cli.hydra_app import select_main

    sys.exit(select_main())
elif __name__ == "select":
    _hand_over()
