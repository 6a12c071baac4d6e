"""Studies are scripts: tests import them from their folder, as running them does."""

import contextlib
import importlib
import io
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.fixture(scope="session")
def study():
    """Imports a study, or what they share, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module


@pytest.fixture(scope="session")
def run_study(study, tmp_path_factory):
    """Runs a study; returns what `main` returned, what it printed, and the folder."""

    def run(name, *options):
        folder = tmp_path_factory.mktemp("figures") / "new" / "folder"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = study(name).main([*options, "--out", str(folder)])
        return result, printed.getvalue(), folder

    return run
