"""After any weights in requests, however these ended, the next image equals a fresh process's.

`--state-sequences N` tries N new random sequences; `--state-seed S` repeats those from number S on.
"""

import itertools
import json
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from generation import (
    delta_merge,
    engine,
    lora,
    sampling,
    stages,
    text_encoding,
    timings,
)
from generation.engine import Engine
from generation.errors import OutOfDeviceMemory
from tests.helpers import fake_web
from tests.helpers.comparison import nearly_equal
from tests.helpers.engines import base_model
from tests.helpers.fake_web import FakeWeb, Page
from tests.miniature.isolation import (
    ERRORS,
    EVERY_MODEL,
    UNET,
    Cancelled,
    failing_at,
    failing_in,
    fingerprint,
    functions_of,
    images_of,
)
from tests.miniature.request_pool import (
    FILES,
    NAMED,
    OPERATORS,
    REJECTED,
    data_url,
    reference_of,
    requests_of,
    with_references,
    write_files,
)
from weights.catalog import Edition
from weights.errors import TransferFailed
from weights.miniature.world import place, render

web = fake_web.web
certificate = fake_web.certificate

DEFAULT_SEQUENCES = 64
CACHE_BYTES = 8_000_000  # less than all of FILES: some are read several times
MERGING = (lora, delta_merge, engine)
MODULES = {m.__name__: m for m in (*MERGING, timings, stages, sampling, text_encoding)}
FUNCTIONS = {name: functions_of(module) for name, module in MODULES.items()}
# What no request of these sequences runs, and what most run at their end.
NEVER = {"set_operator_weights", "replace_base", "load", "_generate_control_maps", "__init__"}
NEVER |= {"_free_bytes", "restore", "editable"}
EVER = {f.rpartition(".")[2] for functions in FUNCTIONS.values() for f in functions} - NEVER
AT_THE_END = {"applied", "_switch_to", "_same", "_restore", "wrap", "measure", "copy_all"}
AT_THE_END |= {"_explain_out_of_memory"}
LOOPS = 60  # a function's share of a request is up to so many times its length in instructions
ACTIONS = ("make", "rejected", "network cut", "failed", "failed, then struck", *["struck"] * 3)

Moment = tuple[str, str, int]  # module, function, and the instructions that it has run by then


@dataclass(frozen=True)
class Subject:
    """An engine, and its state before it had done anything."""

    engine: Engine
    operators: bool  # whether it has the operator's weights
    storages: dict[str, int]  # parameter → address
    fingerprint: dict[str, str]


@dataclass
class World:
    """What the sequences share."""

    folder: Path
    fresh: dict[str, list[np.ndarray]]  # images of processes that have done nothing else
    web: FakeWeb
    numbers: Iterator[int] = field(default_factory=itertools.count)
    struck: set[str] = field(default_factory=set)  # functions in which an error was raised
    # A server may keep an error for a while, and with it the frames of its traceback.
    caught: list[BaseException] = field(default_factory=list)

    def make(self, subject: Subject, name: str, **other: object) -> list[np.ndarray]:
        changes = with_references(requests_of(subject.operators)[name], self.refer)
        with _releasing(self.caught):
            return images_of(subject.engine, self.folder, **{**changes, **other})

    def refer(self, name: str) -> str:
        """Return the address of a large file, or a small one as a data URL."""
        file = FILES[name][0]
        if (self.folder / file).stat().st_size < 1_000_000:
            return data_url(self.folder, name)
        return f"https://files.example/{file}"

    def is_fresh(self, subject: Subject, name: str, made: list[np.ndarray]) -> bool:
        return nearly_equal(made, self.fresh[reference_of(name, subject.operators)])


@contextmanager
def _releasing(caught: list[BaseException]) -> Iterator[None]:
    """Release these errors, and with them their frames, when the UNet is about to run."""
    handle = register_module_forward_pre_hook(
        lambda module, _: caught.clear() if type(module).__name__ in UNET else None
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_files(folder)
    scene = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
    render(scene, 64, 64).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def fresh(folder) -> dict[str, list[np.ndarray]]:
    command = [sys.executable, "-m", "tests.miniature.request_pool", str(folder)]
    # One thread: a process that has started threads cannot be copied.
    variables = {"WEIGHTS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return {path.stem: list(np.load(path).values()) for path in folder.glob("*.npz")}


@pytest.fixture(scope="module")
def subjects(folder, fresh) -> dict[bool, Subject]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lora, "MEMORY_BYTES", CACHE_BYTES)
        return {operators: _subject(folder, operators) for operators in (False, True)}


def _subject(folder: Path, operators: bool) -> Subject:
    made = Engine(Edition.MINIATURE, "cpu")
    made.load(str(folder / FILES[OPERATORS][0]) if operators else None)
    storages = _storages(made)
    known = json.loads((folder / f"fingerprint {operators}.json").read_text())
    return Subject(made, operators, storages, known)


def _storages(engine: Engine) -> dict[str, int]:
    return {
        f"{part}.{name}": parameter.data_ptr()
        for part, network in base_model(engine).components.adaptable().items()
        for name, parameter in network.named_parameters()
    }


def test_fresh_images_differ_unless_the_weights_are_the_same(fresh):
    """So whatever one request leaves behind shows in the next."""
    pairs = itertools.combinations(sorted(fresh), 2)
    assert [(a, b) for a, b in pairs if nearly_equal(fresh[a], fresh[b])] == [
        ("kohya", "stacked kohya"),
        ("kohya, nothing", "plain"),
        ("operator plain", "words"),
        ("operator plain, expert", "words, expert"),
        ("operator plain, image", "words, image"),
    ]


def test_no_sequence_of_weights_leaves_a_trace(pytestconfig, folder, fresh, subjects, web):
    world = World(folder, fresh, web)
    for file, _ in FILES.values():
        web.pages[f"/{file}"] = Page((folder / file).read_bytes())
    wanted, seed = map(pytestconfig.getoption, ("--state-sequences", "--state-seed"))
    first = seed if seed is not None else secrets.randbelow(2**32) if wanted else 0
    for number in range(first, first + (wanted or DEFAULT_SEQUENCES)):
        rng = random.Random(number)
        operators = rng.random() < 0.5
        actions = [_draw_action(rng, operators) for _ in range(rng.randint(1, 4))]
        last = rng.choice(list(NAMED))
        try:
            for action in actions:
                _act(world, subjects[operators], action)
            _check(world, subjects[operators], last)
        except BaseException as error:
            error.add_note(f"--state-seed {number}: {operators=}, {actions}, then {last!r}")
            raise
    assert wanted or len(world.struck) > 10


# Not by hypothesis: it tries five variants of each example, which hardly differ, and a failure that
# depends on what came before cannot be shrunk.
def _draw_action(rng: random.Random, operators: bool) -> tuple:
    name, error = rng.choice(list(requests_of(operators))), rng.choice(list(ERRORS))
    match rng.choice(ACTIONS):
        case "make":
            return "make", name
        case "rejected":
            return "rejected", rng.choice(list(REJECTED)), rng.random() < 0.5
        case "network cut":
            return "network cut", rng.randint(0, 900_000), rng.random() < 0.5
        case "failed":
            return "failed", name, error, rng.randint(1, 6)
        case "struck":
            return "struck", name, error, _draw_moment(rng, EVER)
        case _:
            moment = _draw_moment(rng, AT_THE_END)
            return "failed, then struck", name, error, rng.randint(1, 4), moment


def _draw_moment(rng: random.Random, names: set[str]) -> Moment:
    found = {
        module: [(f, n) for f, n in functions.items() if f.rpartition(".")[2] in names]
        for module, functions in FUNCTIONS.items()
    }
    modules = [
        *(module.__name__ for module in MERGING),
        lora.__name__,
        *MODULES,
    ]  # these more often
    module = rng.choice([module for module in modules if found[module]])
    function, length = rng.choice(found[module])
    return module, function, rng.randint(1, round(length * LOOPS ** rng.random()))


def _check(world: World, subject: Subject, last: str) -> None:
    """Check a plain request, then one with weights, against a fresh process."""
    assert world.is_fresh(subject, "plain", world.make(subject, "plain"))
    assert fingerprint(subject.engine) == subject.fingerprint
    storages = _storages(subject.engine)
    if subject.operators:  # their tokens stay, in new embeddings
        storages = {name: at for name, at in storages.items() if "token_embedding" not in name}
    assert storages.items() <= subject.storages.items()
    assert world.is_fresh(subject, last, world.make(subject, last))


def _act(world: World, subject: Subject, action: tuple) -> None:
    match action:
        case "make", name:
            assert world.is_fresh(subject, name, world.make(subject, name))
        case "rejected", kind, alone:
            reference, error = REJECTED[kind]
            reference = world.refer(reference) if reference in FILES else reference
            loras = (reference,) if alone else (world.refer("words"), reference)
            with pytest.raises(error):
                world.make(subject, "kohya", loras=loras, lora_scales=())
        case "network cut", at, for_good:
            _cut(world, subject, at, for_good)
        case "failed", name, kind, count:
            _fail(world, subject, name, failing_at(count, EVERY_MODEL, ERRORS[kind][0]))
        case "struck", name, kind, moment:
            _fail(world, subject, name, _striking(kind, moment))
        case "failed, then struck", name, kind, count, moment:
            failing = failing_at(count, EVERY_MODEL, Cancelled)
            _fail(world, subject, name, failing, _striking(kind, moment))
        case _:
            raise AssertionError(action)


def _cut(world: World, subject: Subject, at: int, for_good: bool) -> None:
    """Cut a download after so many bytes, and all that follow or only this one."""
    path = f"/{next(world.numbers)}/{FILES['kohya'][0]}"
    content = (world.folder / FILES["kohya"][0]).read_bytes()
    world.web.pages[path] = Page(content, cuts=[at, *([0] * 9 if for_good else [])])
    url = f"https://files.example{path}"
    if for_good:
        with pytest.raises(TransferFailed):
            world.make(subject, "kohya", replicate_weights=url)
    else:
        made = world.make(subject, "kohya", replicate_weights=url)
        assert world.is_fresh(subject, "kohya", made)


def _striking(kind: str, moment: Moment) -> AbstractContextManager[list[str]]:
    module, function, count = moment
    return failing_in(MODULES[module], function, count, ERRORS[kind][0])


def _fail(
    world: World, subject: Subject, name: str, *failures: AbstractContextManager[list[str] | None]
) -> None:
    try:
        with ExitStack() as stack:
            struck = [stack.enter_context(failure) for failure in failures][-1]
            made = world.make(subject, name)
    # Running out of memory before or after the models run is not explained.
    except (RuntimeError, Cancelled, OutOfDeviceMemory) as error:
        world.caught.append(error)
    else:
        assert world.is_fresh(subject, name, made)  # it ended before the error
    world.struck.update(struck or ())
