import json

import pytest


@pytest.fixture(scope="session")
def keep(request):
    """Writes what was seen to NAME in the folder of --out, if one was given: objects as JSON."""
    folder = request.config.getoption("out")

    def write(name, seen):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(seen if isinstance(seen, str) else json.dumps(seen, indent=1))

    return write


@pytest.fixture(scope="session")
def figures(keep):
    """Takes figures by name, and writes them all to figures.json."""
    taken = {}

    def take(**named):
        taken.update(named)
        keep("figures.json", taken)

    return take
