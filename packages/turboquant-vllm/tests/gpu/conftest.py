import json
import shlex
import time
import urllib.error
import urllib.request

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


@pytest.fixture(scope="session")
def is_healthy():
    """Whether a server answers at a URL."""

    def ask(url):
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    return ask


@pytest.fixture(scope="session")
def wait_until():
    """Waits until servers are up; fails with the log of one that ended or took too long."""

    def wait(are_up, servers, limit_s):
        deadline = time.monotonic() + limit_s
        while not are_up():
            for process, log in servers:
                if process.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text(errors="replace")[-3000:]
                    pytest.fail(f"{shlex.join(process.args)} does not serve:\n{said}", pytrace=False)
            time.sleep(1)

    return wait
