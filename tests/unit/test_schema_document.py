"""The whole document and the script/schema command."""

import json

import pytest
from openapi_spec_validator import validate

from script.tools import schema
from script.tools.cog_config import ConfigError, read_config
from script.tools.cog_model import Mode
from script.tools.cog_rules import SchemaError
from script.tools.cog_source import read_signature
from script.tools.openapi import build_document, dump

PREDICT = """\
from typing import List, Optional

from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(default="a cat", description="What to draw", max_length=50),
        image: Path = Input(description="Start from this"),
        seed: Optional[int] = Input(default=None, description="Seed", ge=0),
        scheduler: str = Input(default="DDIM", choices=["DDIM", "PNDM"], description="Stepping"),
    ) -> List[Path]: ...
"""
TRAIN = """\
from cog import BaseModel, Input, Path


class TrainingOutput(BaseModel):
    weights: Path


def train(
    archive: Path = Input(description="Pictures"),
    optimizer: str = Input(default="adamw", choices=["adamw", "sgd"], description="Optimizer"),
) -> TrainingOutput: ...
"""
CONFIG = 'build:\n  sdk_version: "0.23.1"\npredict: "predict.py:Predictor"\n'


@pytest.fixture
def project(tmp_path):
    (tmp_path / "cog.yaml").write_text(CONFIG)
    (tmp_path / "predict.py").write_text(PREDICT)
    return tmp_path


def document(predict=PREDICT, train=None):
    predict_signature = read_signature(predict, "predict.py", "Predictor", Mode.PREDICT)
    train_signature = train and read_signature(train, "train.py", "train", Mode.TRAIN)
    return build_document(predict_signature, train_signature, "0.23.1")


def test_the_input_component_has_cogs_shape():
    schemas = document()["components"]["schemas"]
    assert schemas["Input"] == {
        "title": "Input",
        "type": "object",
        "required": ["image"],
        "properties": {
            "prompt": {"x-order": 0, "title": "Prompt", "type": "string", "default": "a cat",
                       "description": "What to draw", "maxLength": 50},
            "image": {"x-order": 1, "title": "Image", "type": "string", "format": "uri",
                      "description": "Start from this"},
            "seed": {"x-order": 2, "title": "Seed", "type": "integer", "default": None,
                     "nullable": True, "minimum": 0, "description": "Seed"},
            "scheduler": {"x-order": 3, "allOf": [{"$ref": "#/components/schemas/scheduler"}],
                          "default": "DDIM", "description": "Stepping"},
        },
    }  # fmt: skip
    assert schemas["scheduler"] == {
        "title": "scheduler",
        "description": "An enumeration.",
        "enum": ["DDIM", "PNDM"],
        "type": "string",
    }


@pytest.mark.parametrize("train", [None, TRAIN])
def test_the_document_is_valid_openapi(train):
    validate(json.loads(dump(document(train=train))))


def test_training_is_merged_beside_prediction():
    both = document(train=TRAIN)
    assert set(both["paths"]) == {
        "/",
        "/health-check",
        "/predictions",
        "/predictions/{prediction_id}/cancel",
        "/trainings",
        "/trainings/{training_id}/cancel",
    }
    assert both["paths"]["/trainings"]["post"]["operationId"] == "train_trainings_post"
    assert both["components"]["schemas"]["TrainingOutput"] == {
        "title": "Output",
        "type": "object",
        "properties": {"weights": {"title": "Weights", "type": "string", "format": "uri"}},
        "required": ["weights"],
    }


def test_streaming_is_announced():
    predict = PREDICT.replace("import BasePredictor", "import streaming, BasePredictor")
    predict = predict.replace("List[Path]", "Iterator[Path]").replace("List,", "Iterator,")
    predict = predict.replace("    def predict", "    @streaming\n    def predict")
    assert document(predict)["paths"]["/predictions"]["post"]["x-cog-streaming"] is True


def test_equal_choices_may_share_a_name_and_different_ones_may_not():
    same = TRAIN.replace("optimizer", "scheduler").replace("adamw", "DDIM").replace("sgd", "PNDM")
    assert document(train=same)["components"]["schemas"]["scheduler"]["enum"] == ["DDIM", "PNDM"]
    with pytest.raises(SchemaError, match="shared-choices"):
        document(train=TRAIN.replace("optimizer", "scheduler"))


def test_choices_may_not_take_the_name_of_a_component():
    with pytest.raises(SchemaError, match="component-clash"):
        document(PREDICT.replace("scheduler", "Status"))


def test_schema_writes_both_files_and_then_checks_clean(project, capsys):
    assert schema.main(["--check"], project) == 1
    assert "openapi.json is missing; remedy: run script/schema" in capsys.readouterr().err
    assert schema.main([], project) == 0
    written = (project / "openapi.json").read_text()
    assert (project / ".cog/openapi_schema.json").read_text() == written
    assert written == dump(document())
    assert schema.main(["--check"], project) == 0


def test_check_sees_a_stale_document(project, capsys):
    schema.main([], project)
    (project / "predict.py").write_text(PREDICT.replace("What to draw", "What to paint"))
    assert schema.main(["--check"], project) == 1
    assert "does not match the sources; remedy: run script/schema" in capsys.readouterr().err
    assert "What to draw" in (project / "openapi.json").read_text()


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("choices-not-literal", '["DDIM", "PNDM"]', "list(SCHEDULERS.keys())"),
        ("default-none", "seed: Optional[int]", "seed: int"),
        ("default-not-literal", '"a cat"', "PROMPT"),
        ("description-form", '"What to draw"', 'f"At most {50}"'),
    ],
)
def test_check_refuses_what_cog_would_drop(project, capsys, rule, old, new):
    schema.main([], project)
    extra = "from settings import DDIM, PROMPT\n\nSCHEDULERS = {'DDIM': DDIM}\n\n\nclass "
    changed = PREDICT.replace("class ", extra).replace(old, new)
    (project / "changed.py").write_text(changed)
    arguments = ["--check", "--source", str(project / "changed.py")]
    assert schema.main(arguments, project) == 1
    assert f"[{rule}]" in capsys.readouterr().err


def test_a_breaking_change_must_be_allowed(project, capsys):
    schema.main([], project)
    (project / "predict.py").write_text(PREDICT.replace("max_length=50", "max_length=40"))
    for arguments in (["--check"], []):
        assert schema.main(arguments, project) == 1
        assert "Input.prompt: maxLength tightened from 50 to 40" in capsys.readouterr().err
    assert schema.main(["--allow-breaking"], project) == 0
    assert schema.main(["--check"], project) == 0


def test_the_training_target_is_read_when_named(project, capsys):
    (project / "cog.yaml").write_text(CONFIG + 'train: "train.py:train"\n')
    assert schema.main([], project) == 1
    assert "train.py, the train target of cog.yaml, is unreadable" in capsys.readouterr().err
    (project / "train.py").write_text(TRAIN)
    assert schema.main([], project) == 0
    assert "TrainingInput" in (project / "openapi.json").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "not a mapping"),
        (CONFIG.replace("predict:", "run:"), "`run: predict.py:Predictor` is unknown"),
        (CONFIG.replace("predict.py:Predictor", "predict.py"), "predict is 'predict.py'"),
        (CONFIG.replace('"0.23.1"', "0.23"), "build.sdk_version is 0.23"),
    ],
)
def test_an_unusable_cog_yaml_is_explained(tmp_path, text, problem):
    (tmp_path / "cog.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_config(tmp_path)


def test_an_unreadable_committed_document_is_explained(project, capsys):
    (project / "openapi.json").write_text("<<<<<<< HEAD")
    assert schema.main(["--check"], project) == 1
    assert "remove it and run script/schema" in capsys.readouterr().err
