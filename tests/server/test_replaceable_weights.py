"""Weights of the operator and of requests, through the server.

What a picture should be is known from another request or another server: the same weights named in
another way, or a word of the model's own in a new word's place.
"""

import json

import pytest

from tests.helpers.fake_hub import COMMIT
from tests.helpers.fake_web import Page, running_web
from tests.helpers.hostile_files import UNFIT
from tests.helpers.user_weight_fixtures import data_uri, visible_lora, word_archive
from tests.server.conftest import are_alike, serving, wait_for
from tests.server.internet import hub_pages

PROMPT = "a large {} circle on a blue background"
QUICK = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 1}
PLAIN = {**QUICK, "prompt": PROMPT.format("red")}
LORA, OTHER_LORA = visible_lora(1), visible_lora(2)
FIRST, SECOND = data_uri(LORA), data_uri(OTHER_LORA)
ARCHIVE = word_archive("TOK", "yellow", LORA)
YELLOW, GREEN = (data_uri(word_archive("TOK", meaning)) for meaning in ("yellow", "green"))
SECRETS = {"hf_api_token": "hf_SECRETSECRET", "civitai_api_token": "civitai_SECRETSECRET"}


def ask(server, word="red", **inputs):
    return server.predict(**QUICK, prompt=PROMPT.format(word), **inputs)


# --- the operator's -------------------------------------------------------------------------------


def test_the_operators_file_is_every_requests_default(tmp_path, online_server):
    archive = tmp_path / "trained_model.tar"
    archive.write_bytes(ARCHIVE)
    own = {"replicate_weights": data_uri(ARCHIVE)}
    with serving(tmp_path, COG_WEIGHTS=str(archive)) as server:
        first = ask(server)
        assert are_alike(first, ask(online_server, **own))
        assert not are_alike(first, ask(online_server))
        for inputs in ({"lora_scale": -1}, {"loras": [SECOND]}, {"word": "TOK"}):
            assert are_alike(ask(server, **inputs), ask(online_server, **own, **inputs)), inputs
        assert are_alike(ask(server, "TOK", lora_scale=0), ask(online_server, "yellow"))

        others = {"replicate_weights": SECOND}
        assert are_alike(ask(server, **others), ask(online_server, **others))
        assert are_alike(ask(server), first)
        assert ask(server, replicate_weights="acme")["status"] == "failed"
        assert are_alike(ask(server), first)


def test_the_operators_file_may_be_at_an_address_of_his_own_network(tmp_path, online_server):
    with running_web(None) as web:
        web.pages["/lora.safetensors"] = Page(LORA)
        address = f"http://127.0.0.1:{web.port}/lora.safetensors"
        with serving(tmp_path, COG_WEIGHTS=address, HF_HUB_OFFLINE="0") as server:
            assert len(web.downloads()) == 1
            web.seen.clear()
            first = ask(server)
            assert are_alike(first, ask(online_server, replicate_weights=FIRST))
            over = ask(server, replicate_weights=SECOND, lora_scale=1)
            assert are_alike(over, ask(online_server, replicate_weights=SECOND, lora_scale=1))
            assert are_alike(ask(server), first)
            assert web.seen == []
            # What the operator may name, whoever sends requests may not.
            refused = ask(server, replicate_weights=address)
            assert "only https:// addresses are fetched" in refused["error"]


def test_a_file_of_the_operators_that_does_not_fit_ends_the_setup(tmp_path):
    content, fault = UNFIT["LoRA of Stable Diffusion 1.5"]
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    with serving(tmp_path, COG_WEIGHTS=str(file)) as server:
        health = server.health()
        assert health["status"] == "SETUP_FAILED"
        assert "BadWeights: COG_WEIGHTS is a LoRA" in health["setup"]["logs"]
        assert fault in health["setup"]["logs"]

        def traceback() -> bool:
            return any("lora.py" in message for _, message in server.log_lines())

        wait_for(traceback, "the traceback in the log", 30)


# --- a request's ----------------------------------------------------------------------------------


def test_weights_count_for_one_request(online_server):
    plain = ask(online_server)
    assert not are_alike(ask(online_server, replicate_weights=FIRST), plain)
    assert are_alike(ask(online_server), plain)


def test_lora_scale(online_server):
    def scaled(scale):
        return ask(online_server, replicate_weights=FIRST, lora_scale=scale)

    default = ask(online_server, replicate_weights=FIRST)
    assert are_alike(scaled(0.6), default)
    assert are_alike(scaled(0), ask(online_server))
    made = [default, scaled(1), scaled(-1), scaled(0)]
    assert not any(are_alike(a, b) for k, a in enumerate(made) for b in made[:k])


def test_loras_and_their_scales(online_server):
    both = ask(online_server, loras=[FIRST, SECOND])
    assert are_alike(both, ask(online_server, loras=[FIRST, SECOND], lora_scales=[1, 1]))
    assert not are_alike(both, ask(online_server, loras=[FIRST, SECOND], lora_scales=[1, -0.5]))
    assert not are_alike(both, ask(online_server, loras=[FIRST]))
    one = ask(online_server, loras=[FIRST, SECOND], lora_scales=[-0.5, 0])
    assert are_alike(one, ask(online_server, replicate_weights=FIRST, lora_scale=-0.5))
    mixed = ask(online_server, replicate_weights=FIRST, lora_scale=1, loras=[SECOND])
    assert are_alike(mixed, both)


def test_a_trigger_word_is_a_whole_word(online_server):
    assert are_alike(ask(online_server, "TOK", loras=[YELLOW]), ask(online_server, "yellow"))
    assert not are_alike(ask(online_server, "TOK"), ask(online_server, "yellow"))
    assert are_alike(ask(online_server, "TOKYO", loras=[YELLOW]), ask(online_server, "TOKYO"))


@pytest.mark.parametrize(
    ("inputs", "meaning"),
    [
        ({"loras": [YELLOW, GREEN]}, "yellow"),
        ({"loras": [GREEN, YELLOW]}, "green"),
        ({"replicate_weights": GREEN, "loras": [YELLOW]}, "green"),
    ],
)
def test_of_two_files_with_the_same_word_the_first_ones_counts(online_server, inputs, meaning):
    assert are_alike(ask(online_server, "TOK", **inputs), ask(online_server, meaning))


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        ({"loras": [FIRST], "lora_scales": [1, 2]}, 200, "lora_scales has 2 entries and loras 1"),
        ({"lora_scales": [1]}, 200, "lora_scales has 1 entries and loras 0"),
        ({"loras": [FIRST] * 9}, 200, "loras names 9 files; at most 8 can be combined"),
        ({"loras": [FIRST], "lora_scales": [-11]}, 200, "lora_scales[0] is -11; it must be from"),
        ({"loras": [FIRST, ""]}, 200, "loras[1]='': neither an address nor a repository"),
        ({"hf_api_token": "a b"}, 200, "hf_api_token is empty"),
        ({"lora_scale": 11}, 422, "11 is greater than the maximum of 10"),
        ({"loras": "acme/lora"}, 422, '"acme/lora" is not of type "array"'),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_values_that_make_no_sense_are_refused(online_server, inputs, status, message):
    worker = online_server.worker().pid
    response = online_server.post({**PLAIN, **inputs})
    assert response.status_code == status
    document = response.json()
    shown = document["error"] if status == 200 else document["detail"][0]["msg"]
    assert message in shown
    assert online_server.worker().pid == worker


# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture
def guarded_pages(internet):
    """Weights at the two places that tokens are for, a place that they are not for, and none."""
    pages = internet.web.pages
    pages |= hub_pages("acme/guarded", {"lora.safetensors": LORA}, COMMIT)
    cdn = (("Location", "https://cdn.example/guarded.safetensors"),)
    pages["/api/download/models/22"] = Page(status=307, headers=cdn)
    pages["/guarded.safetensors"] = Page(LORA)
    internet.web.seen.clear()
    return internet.web


def test_tokens_go_to_their_hosts_alone(online_server, guarded_pages):
    places = (
        "acme/guarded",
        "https://civitai.com/models/11?modelVersionId=22",
        "https://files.example/guarded.safetensors",
    )
    for place in places:
        result = ask(online_server, replicate_weights=place, **SECRETS)
        assert result["status"] == "succeeded", result["error"]
    # huggingface_hub asks the hub for one thing more, once, of its own accord.
    seen = [seen for seen in guarded_pages.seen if seen.path != "/api/agent-harnesses"]
    assert {(request.host, request.headers.get("authorization")) for request in seen} == {
        ("huggingface.co", "Bearer hf_SECRETSECRET"),
        ("civitai.com", "Bearer civitai_SECRETSECRET"),
        ("cdn.example", None),
        ("files.example", None),
    }


@pytest.mark.parametrize(
    ("place", "status"),
    [
        ("acme/guarded", "succeeded"),
        ("acme/no-such-thing", "failed"),
        ("https://civitai.com/models/404", "failed"),
        ("http://files.example/x", "failed"),
    ],
)
def test_no_token_is_told(online_server, guarded_pages, receiver, place, status):
    """Not by us. Cog's own answer to a PUT of a running prediction's name repeats its inputs."""
    inputs = {**PLAIN, "replicate_weights": place, **SECRETS}
    assert "SECRET" not in online_server.post(inputs).text
    name = f"token-{abs(hash(place))}"
    online_server.put(name, inputs, receiver.hook(name))
    assert receiver.outcome(name)["status"] == status
    assert "SECRET" not in json.dumps(receiver.states(name))
    assert "SECRET" not in json.dumps(online_server.health())
    assert "SECRET" not in online_server.log.read_text(encoding="utf-8")
