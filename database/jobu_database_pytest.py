"""What pytest loads: the fixtures of `database.pytest_plugin`, without importing `database`.

The wheel holds this file as a top-level module, under a name that no project has. pytest loads plugins in every project of
an environment, also in those that have a `database.py` of their own: there `database.pytest_plugin` cannot be found; or, if
it is loaded before the project's folder is on the path, it stands in the way of the project's own module. So the file is
looked for beside the package and executed by its path, and the package itself is not imported before a fixture is used.
"""

import importlib.util
import sys
import warnings
from pathlib import Path


def _fixtures() -> "dict[str, object]":
    for folder in map(Path, sys.path):
        file = folder / "database" / "pytest_plugin.py"
        if file.is_file() and file.with_name("sandbox.py").is_file():
            spec = importlib.util.spec_from_file_location("_jobu_database_fixtures", file)
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return vars(module)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("jobu-database is not complete: its fixtures for pytest cannot be found", stacklevel=2)
    return {}


globals().update({name: value for name, value in _fixtures().items() if not name.startswith("__")})
