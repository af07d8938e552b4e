"""Whatever weights requests have named, and however they ended, the next one's picture is as fresh.

`--state-sequences N` tries N other sequences than those of the default run; `--state-seed` makes
those again that begin with this number.
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

from generation import adapters, engine, merging, replaceable
from generation.base_models import MINIATURE_SDXL
from generation.engine import Engine
from generation.errors import OutOfDeviceMemory
from tests import fake_web
from tests.comparison import nearly_equal
from tests.fake_web import FakeWeb, Page
from tests.miniature.isolation import (
    ERRORS,
    EVERY_MODEL,
    UNET,
    Cancelled,
    failing_at,
    failing_in,
    fingerprint,
    functions_of,
    pictures,
)
from tests.miniature.weights_pool import (
    FILES,
    NAMED,
    OPERATORS,
    REFUSED,
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
SHELF_BYTES = 8_000_000  # less than all of FILES: some are read again and again
MODULES = {module.__name__: module for module in (adapters, merging, replaceable, engine)}
FUNCTIONS = {name: functions_of(module) for name, module in MODULES.items()}
# What no request of these sequences runs, and what most run on their way out.
NEVER = {"set_up", "replace_base", "load", "_repaint", "_repaint_once", "__init__"}
NEVER |= {"_room_on_device"}
EVER = {f.rpartition(".")[2] for functions in FUNCTIONS.values() for f in functions} - NEVER
LEAVING = {"applied", "_become", "_same", "_take_back", "around", "time", "_explain_out_of_memory"}
LEAVING |= {"copy_all"}
LOOPS = 60  # so many times its own length may a function's part of a request be, in instructions
ACTIONS = ("make", "refused", "network cut", "failed", "failed, then struck", *["struck"] * 3)

Moment = tuple[str, str, int]  # module, function, and the instructions that it has run by then


@dataclass(frozen=True)
class Subject:
    """An engine, and what was so when it had done nothing."""

    engine: Engine
    operators: bool  # whether the operator has set up weights
    storages: dict[str, int]  # parameter → where it lies
    fingerprint: dict[str, str]


@dataclass
class World:
    """What the sequences share."""

    folder: Path
    fresh: dict[str, list[np.ndarray]]  # what processes made that have done nothing else
    web: FakeWeb
    numbers: Iterator[int] = field(default_factory=itertools.count)
    struck: set[str] = field(default_factory=set)  # functions in which something has happened
    # A server may keep what it has caught for a while, and all that hangs on its traceback.
    caught: list[BaseException] = field(default_factory=list)

    def make(self, subject: Subject, name: str, **other: object) -> list[np.ndarray]:
        changes = with_references(requests_of(subject.operators)[name], self.refer)
        with _letting_go(self.caught):
            return pictures(subject.engine, self.folder, **{**changes, **other})

    def refer(self, name: str) -> str:
        """A large file comes from the web, a small one in the request."""
        file = FILES[name][0]
        if (self.folder / file).stat().st_size < 1_000_000:
            return data_url(self.folder, name)
        return f"https://files.example/{file}"

    def is_fresh(self, subject: Subject, name: str, made: list[np.ndarray]) -> bool:
        return nearly_equal(made, self.fresh[reference_of(name, subject.operators)])


@contextmanager
def _letting_go(caught: list[BaseException]) -> Iterator[None]:
    """Forget these errors, and with them all of their frames, while the UNet is about to run."""
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
    command = [sys.executable, "-m", "tests.miniature.weights_pool", str(folder)]
    # One thread: a process that has started threads cannot be copied.
    own = {"WEIGHTS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr
    return {path.stem: list(np.load(path).values()) for path in folder.glob("*.npz")}


@pytest.fixture(scope="module")
def subjects(folder, fresh) -> dict[bool, Subject]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(replaceable, "MEMORY_BYTES", SHELF_BYTES)
        return {operators: _subject(folder, operators) for operators in (False, True)}


def _subject(folder: Path, operators: bool) -> Subject:
    made = Engine(Edition.MINIATURE, "cpu")
    made.load(str(folder / FILES[OPERATORS][0]) if operators else None)
    storages = _storages(made)
    known = json.loads((folder / f"fingerprint {operators}.json").read_text())
    return Subject(made, operators, storages, known)


def _storages(engine: Engine) -> dict[str, int]:
    parts = engine._store.load(MINIATURE_SDXL).parts
    return {
        f"{part}.{name}": parameter.data_ptr()
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, parameter in parts[part].named_parameters()
    }


def test_fresh_pictures_differ_but_where_the_weights_are_the_same(fresh):
    """So whatever is left of one request shows in the next."""
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


# Not by hypothesis: it makes five variants of each that it draws, and they hardly differ. What came
# before matters, so a failure could not be made smaller either.
def _draw_action(rng: random.Random, operators: bool) -> tuple:
    name, error = rng.choice(list(requests_of(operators))), rng.choice(list(ERRORS))
    match rng.choice(ACTIONS):
        case "make":
            return "make", name
        case "refused":
            return "refused", rng.choice(list(REFUSED)), rng.random() < 0.5
        case "network cut":
            return "network cut", rng.randint(0, 900_000), rng.random() < 0.5
        case "failed":
            return "failed", name, error, rng.randint(1, 6)
        case "struck":
            return "struck", name, error, _draw_moment(rng, EVER)
        case _:
            moment = _draw_moment(rng, LEAVING)
            return "failed, then struck", name, error, rng.randint(1, 4), moment


def _draw_moment(rng: random.Random, names: set[str]) -> Moment:
    module = rng.choice(["generation.adapters", *MODULES])
    functions = {f: n for f, n in FUNCTIONS[module].items() if f.rpartition(".")[2] in names}
    function, length = rng.choice(list(functions.items()))
    return module, function, rng.randint(1, round(length * LOOPS ** rng.random()))


def _check(world: World, subject: Subject, last: str) -> None:
    """A plain request, then one with weights, are as in a fresh process."""
    assert world.is_fresh(subject, "plain", world.make(subject, "plain"))
    assert fingerprint(subject.engine) == subject.fingerprint
    storages = _storages(subject.engine)
    if subject.operators:  # their words stay, and so do the embeddings that were made for them
        storages = {name: at for name, at in storages.items() if "token_embedding" not in name}
    assert storages.items() <= subject.storages.items()
    assert world.is_fresh(subject, last, world.make(subject, last))


def _act(world: World, subject: Subject, action: tuple) -> None:
    match action:
        case "make", name:
            assert world.is_fresh(subject, name, world.make(subject, name))
        case "refused", kind, alone:
            reference, error = REFUSED[kind]
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
    """The connection ends after so many bytes; then all others do, or the next goes on."""
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
    # Memory that runs out before or after the model is at work is reported as it is.
    except (RuntimeError, Cancelled, OutOfDeviceMemory) as error:
        world.caught.append(error)
    else:
        assert world.is_fresh(subject, name, made)  # it ended before that
    world.struck.update(struck or ())
