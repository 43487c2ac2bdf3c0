import os
import time
from concurrent.futures import ThreadPoolExecutor

import processes


def test_processes_of_several_threads_have_variables_of_their_own(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(processes.call, time.sleep, 1, first, {"TURBOQUANT_FIRST": "0"})
        while not first.exists():
            time.sleep(0.01)
        assert processes.call(os.getenv, "TURBOQUANT_FIRST", second, {}) is None
        running.result()
    assert processes.call(os.getenv, "TURBOQUANT_FIRST", first, {"TURBOQUANT_FIRST": "0"}) == "0"
