"""The engine with which the evaluations generate images."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from generation.engine import Engine
from tests.helpers.request import REQUEST
from weights.catalog import Edition


class Harness:
    """Generates images for measurements, with one engine and files in one folder."""

    def __init__(self, engine: Engine, folder: Path, **always: object) -> None:
        """`always` are inputs of every request that does not set them."""
        self.engine = engine
        self._folder = folder
        self._request = replace(REQUEST, **always)  # type: ignore[arg-type]
        self._count = itertools.count()

    def make(
        self, image: Image.Image | None = None, mask: Image.Image | None = None, **changes: object
    ) -> list[Image.Image]:
        """Generate the images of the default request with these changes."""
        folder = self._folder / str(next(self._count))
        folder.mkdir()
        for name, source in (("image", image), ("mask", mask)):
            if source is not None:
                source.save(folder / f"{name}.png")
                changes[name] = folder / f"{name}.png"
        files = self.engine.generate(replace(self._request, **changes), folder).files
        return [Image.open(file).convert("RGB") for file in files]


@contextlib.contextmanager
def open_harness() -> Iterator[Harness]:
    """Yield a harness with the miniature edition on the CPU."""
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    with tempfile.TemporaryDirectory() as folder:
        yield Harness(engine, Path(folder))
