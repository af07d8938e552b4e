"""script/predict: flags to arguments, files to their place, and what it says when it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest

from script.tools import predict as tool
from script.tools.arguments import UsageError, parse_inputs
from script.tools.openapi import document
from script.tools.predict import main, place

ROOT = Path(__file__).parents[2]
SCHEMA = document(ROOT)
MADE_UP = {  # input kinds that predict.py does not have
    "components": {
        "schemas": {
            "Input": {
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "uri"},
                    "mask": {"type": "string", "format": "uri", "nullable": True, "default": None},
                    "refine": {"type": "boolean", "default": False},
                    "words": {"type": "array", "items": {"type": "string"}, "default": []},
                    "factor": {"allOf": [{"$ref": "#/components/schemas/factor"}], "default": 2},
                },
            },
            "factor": {"type": "integer", "enum": [2, 4]},
        }
    }
}


def parse(*flags):
    return parse_inputs(list(flags), SCHEMA, "Input", ROOT)


def refusal(*flags, schema=SCHEMA, directory=ROOT):
    with pytest.raises(UsageError) as raised:
        parse_inputs(list(flags), schema, "Input", directory)
    return str(raised.value)


def test_without_flags_every_input_has_its_default():
    assert parse() == {
        name: spec["default"]
        for name, spec in SCHEMA["components"]["schemas"]["Input"]["properties"].items()
    }
    assert parse()["num_outputs"] == 1
    assert parse()["seed"] is None


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("prompt=a red circle", "prompt", "a red circle"),
        ("prompt=1+1=2", "prompt", "1+1=2"),
        ("prompt=", "prompt", ""),
        ("prompt=12", "prompt", "12"),
        ("prompt=@home", "prompt", "@home"),
        ("seed=4294967295", "seed", 4294967295),
        ("guidance_scale=3", "guidance_scale", 3),
        ("guidance_scale=7.5", "guidance_scale", 7.5),
        ("num_inference_steps=2.0", "num_inference_steps", 2.0),
        ("scheduler=KarrasDPM", "scheduler", "KarrasDPM"),
    ],
)
def test_a_flag_becomes_a_value_of_the_inputs_type(flag, name, value):
    parsed = parse(flag)
    assert parsed == {**parse(), name: value}
    assert type(parsed[name]) is type(value)


def test_the_last_of_repeated_flags_counts():
    assert parse("seed=1", "seed=2")["seed"] == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("prompt", "-i 'prompt' has no value; write -i key=value"),
        ("promt=a", "there is no input 'promt'; the inputs are prompt, model,"),
        ("=a", "there is no input ''"),
        ("seed=one", "seed is 'one'; it must be of type integer"),
        ("seed=", "seed is ''; it must be of type integer"),
        ("seed=1.5", "seed: 1.5 is not of type 'integer'"),
        ("seed=true", "seed: True is not of type 'integer'"),
        ("seed=null", "seed: None is not of type 'integer'"),
        ("seed=-1", "seed: -1 is less than the minimum of 0"),
        ("num_outputs=99", "num_outputs: 99 is greater than the maximum of 16"),
        ('guidance_scale="7"', "guidance_scale: '7' is not of type 'number'"),
        ("scheduler=Euler b", "scheduler: 'Euler b' is not one of ['DDIM', "),
    ],
)
def test_what_the_server_would_refuse_is_refused_by_name(flag, message):
    assert refusal(flag).startswith(message)


def test_a_file_is_given_with_an_at_sign_relative_to_the_caller(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")
    parsed = parse_inputs(["image=@cat.png"], MADE_UP, "Input", tmp_path)
    assert parsed["image"] == tmp_path / "cat.png"
    assert parsed["mask"] is None
    absolute = parse_inputs([f"image=@{tmp_path}/cat.png"], MADE_UP, "Input", ROOT)
    assert absolute["image"] == tmp_path / "cat.png"
    assert "image: there is no file" in refusal(
        "image=@dog.png", schema=MADE_UP, directory=tmp_path
    )
    assert refusal("image=cat.png", schema=MADE_UP) == "image is a file: write -i image=@path"
    assert "'image' is required" in refusal("refine=true", schema=MADE_UP)


def test_the_other_kinds_are_json(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")
    flags = ["image=@cat.png", "refine=true", 'words=["a", "b"]', "factor=4"]
    parsed = parse_inputs(flags, MADE_UP, "Input", tmp_path)
    assert (parsed["refine"], parsed["words"], parsed["factor"]) == (True, ["a", "b"], 4)
    messages = {
        "refine=yes": "refine is 'yes'; it must be of type boolean",
        "words=[1]": "words: 1 is not of type 'string'",
        "factor=3": "factor: 3 is not one of [2, 4]",
    }
    for flag, message in messages.items():
        assert refusal("image=@cat.png", flag, schema=MADE_UP, directory=tmp_path) == message


def test_a_list_may_be_one_flag_for_each_item(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")
    flags = ["image=@cat.png", "words=a", "words=b, c", "words=@home"]
    assert parse_inputs(flags, MADE_UP, "Input", tmp_path)["words"] == ["a", "b, c", "@home"]
    assert parse("lora_scales=1", "lora_scales=-0.5")["lora_scales"] == [1, -0.5]
    assert refusal("lora_scales=x") == "lora_scales is 'x'; it must be of type number"


def test_a_text_may_be_a_file_that_is_there(tmp_path):
    (tmp_path / "my lora.tar").write_bytes(b"abc")
    url = "data:application/octet-stream;name=my%20lora.tar;base64,YWJj"
    parsed = parse_inputs(["replicate_weights=@my lora.tar"], SCHEMA, "Input", tmp_path)
    assert parsed["replicate_weights"] == url
    assert parse_inputs(["loras=@my lora.tar"], SCHEMA, "Input", tmp_path)["loras"] == [url]


@pytest.fixture
def made(tmp_path):
    """Makes the files of a prediction of so many pictures."""
    (tmp_path / "made").mkdir()

    def make(count: int) -> list[Path]:
        files = [tmp_path / "made" / f"out-{index}.png" for index in range(count)]
        for index, file in enumerate(files):
            file.write_bytes(bytes([index]))
        return files

    return make


@pytest.mark.parametrize(
    ("count", "output", "names"),
    [
        (1, "cat.png", ["cat.png"]),
        (1, "cat", ["cat"]),
        (3, "cat.png", ["cat.0.png", "cat.1.png", "cat.2.png"]),
        (2, "cat", ["cat.0.png", "cat.1.png"]),
        (1, None, ["output.0.png"]),
        (2, None, ["output.0.png", "output.1.png"]),
    ],
)
def test_files_go_where_they_were_asked(tmp_path, made, count, output, names):
    target = tmp_path / "target"
    target.mkdir()
    placed = place(made(count), None if output is None else target / output, target)
    assert [path.name for path in placed] == names
    assert sorted(path.name for path in target.iterdir()) == sorted(names)
    assert [path.read_bytes() for path in placed] == [bytes([index]) for index in range(count)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "promt=a"], "there is no input 'promt'"),
        (["-i", "seed=-1"], "seed: -1 is less than the minimum of 0"),
        (["-o", "nowhere/cat.png"], "there is no folder"),
        (["-o", "."], "is a folder; write -o"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(tool, "_predict", lambda *_: pytest.fail("a model would be loaded"))
    assert main(arguments, tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("script/predict: ")
    assert message in line


def test_right_usage_goes_on_with_paths_relative_to_the_caller(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tool, "_predict", lambda *arguments: calls.append(arguments) or 0)
    assert main(["-i", "seed=3", "-o", "cat.png"], tmp_path) == 0
    assert calls == [({**parse(), "seed": 3}, tmp_path / "cat.png", tmp_path)]


def test_wrong_usage_is_found_without_loading_torch():
    code = (
        "import sys; from pathlib import Path; from script.tools.predict import main;"
        "status = main(['-i', 'seed=x'], Path()); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 False\n"
    assert done.stderr == "script/predict: seed is 'x'; it must be of type integer\n"


class FakePredictor:
    """Stands for predict.Predictor: writes its files, and takes them away when told to."""

    folder: Path
    weights: list[str | None]
    inputs: dict[str, object]
    failure: Exception | None = None

    def __init__(self):
        self.folders = self

    def setup(self, weights):
        self.weights.append(weights)
        self.file = self.folder / "out-0.png"

    def predict(self, **inputs):
        self.inputs.update(inputs)
        self.file.write_bytes(b"picture")
        if self.failure:
            raise self.failure
        return [self.file]

    def remove(self):
        self.file.unlink()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    import predict

    (tmp_path / "own").mkdir()
    monkeypatch.setattr(predict, "Predictor", FakePredictor)
    monkeypatch.setattr(FakePredictor, "folder", tmp_path / "own", raising=False)
    monkeypatch.setattr(FakePredictor, "weights", [], raising=False)
    monkeypatch.setattr(FakePredictor, "inputs", {}, raising=False)
    return FakePredictor


def test_the_picture_is_placed_before_the_predictions_own_files_go(tmp_path, fake, capsys):
    assert main(["-o", "cat.png"], tmp_path) == 0
    assert (tmp_path / "cat.png").read_bytes() == b"picture"
    assert list(fake.folder.iterdir()) == []
    assert f"Wrote {tmp_path / 'cat.png'}" in capsys.readouterr().out


def test_a_failed_prediction_is_one_line_and_status_1(tmp_path, fake, monkeypatch, capsys):
    from generation.errors import InvalidRequest

    monkeypatch.setattr(fake, "failure", InvalidRequest("width is 100; take 104"))
    assert main(["-o", "cat.png"], tmp_path) == 1
    assert capsys.readouterr().err == "script/predict: width is 100; take 104\n"
    assert list(fake.folder.iterdir()) == []
    assert not (tmp_path / "cat.png").exists()


def test_cog_weights_and_secrets_reach_the_predictor_as_cog_gives_them(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("COG_WEIGHTS", "/weights.tar")
    assert main(["-i", "hf_api_token=hf_x", "-o", "cat.png"], tmp_path) == 0
    monkeypatch.setenv("COG_WEIGHTS", "")
    assert main(["-o", "cat.png"], tmp_path) == 0
    assert fake.weights == ["/weights.tar", None]
    assert fake.inputs["civitai_api_token"] is None


def test_a_token_is_masked_where_it_is_printed(fake, tmp_path):
    assert main(["-i", "hf_api_token=hf_x", "-o", "cat.png"], tmp_path) == 0
    token = fake.inputs["hf_api_token"]
    assert (str(token), token.get_secret_value()) == ("**********", "hf_x")
