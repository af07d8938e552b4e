"""Real processes that download the same entry: at once, and again after one was killed."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.helpers import fake_hub
from tests.helpers.fake_hub import BIG, TOY_FILES, Misbehaviour, Workplace
from weights import cache, transfer
from weights.catalog import Edition

workplace = fake_hub.workplace
PATIENCE_S = 60.0


def start(workplace: Workplace, output: Path) -> subprocess.Popen[bytes]:
    """A process that ensures the toy entry; stdout and stderr go to files named `output`.*"""
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fake_hub"],
            env=workplace.environment(),
            stdout=out,
            stderr=err,
        )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def test_two_processes_fetch_every_file_once(workplace: Workplace, tmp_path: Path):
    held = Misbehaviour(hold_after=100_000)
    workplace.hub.misbehave[BIG] = [held]
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = [start(workplace, output) for output in outputs]

    def errors_of() -> str:
        return "".join(output.with_suffix(".err").read_text() for output in outputs)

    try:
        wait_until(lambda: "Waiting for another process" in errors_of(), "one waits")
        held.release.set()
        assert [process.wait(PATIENCE_S) for process in processes] == [0, 0], errors_of()
    finally:
        held.release.set()
        for process in processes:
            process.kill()
            process.wait()
    folder = workplace.cache / "toy" / "main"
    assert [output.with_suffix(".out").read_text() for output in outputs] == [str(folder)] * 2
    assert len(workplace.hub.api_requests) == 2  # the commit, and its files
    for file, content in TOY_FILES.items():
        assert len(workplace.hub.served(file)) == 1, file
        assert (folder / file).read_bytes() == content


def test_a_killed_download_keeps_finished_files(workplace: Workplace, tmp_path: Path):
    held = Misbehaviour(hold_after=100_000)
    workplace.hub.misbehave[BIG] = [held]
    process = start(workplace, tmp_path / "killed")

    def parts() -> list[int]:
        found = workplace.cache.rglob("*.incomplete")
        return [path.stat().st_size for path in found if path.exists()]

    def only_the_big_one_is_missing() -> bool:
        staging = workplace.cache / "toy" / "main" / transfer.PARTIAL_FOLDER
        others = [staging / file for file in TOY_FILES if file != BIG]
        with suppress(FileNotFoundError):  # a part was renamed just now
            return all(path.exists() for path in others) and max(parts(), default=0) > 90_000
        return False

    try:
        wait_until(only_the_big_one_is_missing, "100,000 bytes arrive, and are written")
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        held.release.set()
    assert not cache.is_present("toy", Edition.FULL)
    assert not list(workplace.cache.rglob(Path(BIG).name))

    workplace.hub.forget()
    folder = cache.ensure("toy", Edition.FULL)
    assert {request.path for request in workplace.hub.requests} == {BIG}
    assert parts() == []  # huggingface_hub would leave what the killed process had
    assert {file: (folder / file).read_bytes() for file in TOY_FILES} == TOY_FILES


def test_a_warm_start_and_the_table_load_no_heavy_library():
    code = (
        "import sys; from weights import cache, __main__; __main__.table();"
        "print([m for m in ('torch', 'httpx', 'huggingface_hub', 'tqdm') if m in sys.modules])"
    )
    root = Path(cache.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
