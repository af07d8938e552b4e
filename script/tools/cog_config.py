"""What cog.yaml says about the targets and the SDK."""

from dataclasses import dataclass
from pathlib import Path

import yaml

EXAMPLE = 'predict: "predict.py:Predictor"'


class ConfigError(Exception):
    """cog.yaml cannot be used; the message says what to write."""


@dataclass(frozen=True)
class Target:
    """`file.py:Name`."""

    file: Path
    name: str


@dataclass(frozen=True)
class CogConfig:
    """The part of cog.yaml that shapes the schema."""

    predict: Target
    train: Target | None
    sdk_version: str


def read_config(root: Path) -> CogConfig:
    """cog.yaml in `root`; the files of the targets are made absolute."""
    path = root / "cog.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping; write at least `{EXAMPLE}`")
    if "run" in data:
        message = f"cog.yaml: `run: {data['run']}` is unknown to older versions of Cog"
        raise ConfigError(f"{message}; write `{EXAMPLE}`")
    predict = _target(root, "predict", data.get("predict"))
    train = _target(root, "train", data["train"]) if "train" in data else None
    build = data.get("build")
    version = build.get("sdk_version") if isinstance(build, dict) else None
    if not isinstance(version, str):
        message = f"cog.yaml: build.sdk_version is {version!r}, but it is the document's version"
        raise ConfigError(f'{message}; write it as a string, as in `sdk_version: "0.23.1"`')
    return CogConfig(predict, train, version)


def _target(root: Path, key: str, value: object) -> Target:
    file, separator, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (file and separator and name.isidentifier()):
        raise ConfigError(f"cog.yaml: {key} is {value!r}; write it as in `{EXAMPLE}`")
    return Target(root / file, name)
