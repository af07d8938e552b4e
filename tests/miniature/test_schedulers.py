"""Schedulers come from the pristine config, whatever ran before."""

import json

import pytest

from generation.schedulers import SCHEDULERS, build_scheduler
from weights.miniature.evaluate import FOLDER

CONFIG = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))


def test_the_names_are_cog_sdxls():
    names = "DDIM DPMSolverMultistep HeunDiscrete KarrasDPM K_EULER_ANCESTRAL K_EULER PNDM"
    assert list(SCHEDULERS) == names.split()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_has_the_models_config_and_its_own_overrides(name):
    scheduler = build_scheduler(name, CONFIG)
    assert type(scheduler).__name__ == SCHEDULERS[name].class_name
    assert scheduler.config.beta_end == CONFIG["beta_end"]
    assert scheduler.config.timestep_spacing == "leading"
    assert scheduler.config.get("use_karras_sigmas", False) is (name == "KarrasDPM")


def test_nothing_of_one_scheduler_reaches_the_next():
    before = json.dumps(CONFIG)
    build_scheduler("KarrasDPM", CONFIG).set_timesteps(10)
    after = build_scheduler("DPMSolverMultistep", CONFIG)
    assert after.config.use_karras_sigmas is False
    assert json.dumps(CONFIG) == before
