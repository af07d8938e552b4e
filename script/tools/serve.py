"""Start Cog's own HTTP server without Docker, for the targets that cog.yaml names.

The options are those of `cog.server.http`, such as --upload-url; $HOST and $PORT say where.
"""

import os
import sys
from pathlib import Path

import yaml

from script.tools import openapi

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", "5000"


def main(options: list[str], root: Path) -> None:
    """Become the server, or exit with one line that says why not."""
    try:
        targets = yaml.safe_load((root / "cog.yaml").read_text(encoding="utf-8"))
        text = (root / openapi.FILE).read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"script/serve: {error}")
    write_schema(root / ".cog" / "openapi_schema.json", text)
    environment = server_environment(targets["predict"], targets["train"])
    host = os.environ.get("HOST", DEFAULT_HOST)
    command = [sys.executable, "-m", "cog.server.http", "--host", host, *options]
    os.chdir(root)  # where the server looks for .cog/ and the worker for the targets
    os.execve(sys.executable, command, environment)


def write_schema(path: Path, text: str) -> None:
    """Write what the server reads at its start; whole at any moment, as others may be starting."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)


def server_environment(predict: str, train: str) -> dict[str, str]:
    """Return this process's environment, with what `cog build` bakes into an image."""
    environment = {"PORT": DEFAULT_PORT, **os.environ}
    # The server starts its worker as "python" from PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["COG_PREDICT_TYPE_STUB"] = predict
    environment["COG_TRAIN_TYPE_STUB"] = train
    return environment


if __name__ == "__main__":
    main(sys.argv[1:], ROOT)
