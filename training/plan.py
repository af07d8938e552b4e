"""Every rule about a training, and the values that its empty inputs stand for. No torch here."""

import math
import re
import secrets
from dataclasses import dataclass, replace

from inputs import check
from training.config import (
    LoraFormat,
    Method,
    Optimizer,
    Prior,
    Schedule,
    TrainableSpec,
    TrainConfig,
)
from training.errors import InvalidTraining
from weights.trigger_words import has_trigger_word

SIDE_MULTIPLE = 8  # pixels per latent
HELD_OUT_FROM = 8  # examples; one in so many is held out
MAX_HELD_OUT = 4
VALIDATIONS = 10  # measurements of the held-out loss in a training
MAX_PROMPT_CHARACTERS = 1000
LEARNING_RATES = ("unet_learning_rate", "ti_lr", "lora_lr", "text_encoder_lr")


@dataclass(frozen=True, kw_only=True)
class TrainPlan(TrainConfig):
    """A config with every empty value filled in; `fit` carries it out."""

    seed: int
    method: Method
    resolution: int
    train_batch_size: int
    max_train_steps: int
    unet_learning_rate: float
    ti_lr: float
    lora_lr: float
    text_encoder_lr: float
    lora_rank: int
    lora_alpha: float
    lr_scheduler: Schedule
    lr_warmup_steps: int
    num_new_tokens: int
    snr_gamma: float
    caption_dropout: float
    pivot_step: int  # the steps before it train the token embeddings
    held_out: int  # examples
    validation_steps: int | None

    @property
    def lora_scaling(self) -> float:
        """alpha / rank (arXiv:2106.09685), or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    @property
    def placeholder_tokens(self) -> tuple[str, ...]:
        """<s0>, <s1> …: cog-sdxl's names."""
        return tuple(f"<s{i}>" for i in range(self.num_new_tokens))

    @property
    def trigger_words(self) -> dict[str, str]:
        """The trigger word → its placeholder tokens."""
        return {self.token_string: "".join(self.placeholder_tokens)}


def resolve(config: TrainConfig, spec: TrainableSpec, n_examples: int) -> TrainPlan:
    """Check every rule and fill in every empty value. Raises InvalidTraining."""
    check(config, InvalidTraining)
    method = _method(config)
    _check_resolution(config, spec)
    _check_words(config)
    _check_method(config, method)
    _check_prior(config, method)
    if n_examples < 1:
        raise InvalidTraining("there is nothing to train on; give at least one image")
    recipe = spec.recipes[method]
    if config.optimizer is Optimizer.PRODIGY:  # it finds the rate, and 1 leaves that as it is
        recipe = replace(
            recipe, unet_learning_rate=1.0, ti_lr=1.0, lora_lr=1.0, text_encoder_lr=1.0
        )
    given = {name: value for name, value in vars(config).items() if value is not None}
    settled = replace(recipe, **given)
    held_out = min(n_examples // HELD_OUT_FROM, MAX_HELD_OUT) if config.validation else 0
    steps = _steps(config, settled, n_examples - held_out)
    derived = {
        "seed": secrets.randbelow(2**32) if config.seed is None else config.seed,
        "method": method,
        "is_lora": method is Method.LORA,
        "max_train_steps": steps,
        "lr_warmup_steps": _warmup(config, recipe, steps),
        "lora_alpha": float(settled.lora_alpha or settled.lora_rank or 0),
        "pivot_step": _pivot_step(config, method, steps),
        "held_out": held_out,
        "validation_steps": max(1, steps // VALIDATIONS) if held_out else None,
    }
    return TrainPlan(**{**vars(settled), **derived})


def check_class_images(given: bool, prior: Prior) -> None:
    """Raise InvalidTraining where one of class images and their kind of prior lacks the other."""
    if given and prior is not Prior.CLASS_IMAGES:
        raise InvalidTraining(
            f"class_images is set and prior_preservation is {prior}, which does not use them; set"
            f" it to {Prior.CLASS_IMAGES}, or leave class_images out"
        )
    if not given and prior is Prior.CLASS_IMAGES:
        raise InvalidTraining(
            f"prior_preservation is {prior} and class_images is empty; send an archive of images"
            f" of the class, or set it to {Prior.TEACHER}, which needs none"
        )


def _method(config: TrainConfig) -> Method:
    if config.method is Method.LORA and not config.is_lora:
        raise InvalidTraining("method is lora and is_lora false: leave one of them out")
    return config.method or (Method.LORA if config.is_lora else Method.FULL)


def _steps(config: TrainConfig, settled: TrainConfig, n_examples: int) -> int:
    """Return the number of optimizer steps: the one given, that of the epochs, or the recipe's."""
    assert settled.max_train_steps is not None
    assert settled.train_batch_size is not None
    if config.max_train_steps is not None or config.num_train_epochs is None:
        return settled.max_train_steps
    per_step = settled.train_batch_size * config.gradient_accumulation_steps
    return math.ceil(config.num_train_epochs * n_examples / per_step)


def _warmup(config: TrainConfig, recipe: TrainConfig, steps: int) -> int:
    assert recipe.lr_warmup_steps is not None
    if config.lr_warmup_steps is None:
        return min(recipe.lr_warmup_steps, steps // 10)
    if config.lr_warmup_steps >= steps:
        raise InvalidTraining(
            f"lr_warmup_steps is {config.lr_warmup_steps}, and there are {steps} steps; it must be"
            " less"
        )
    return config.lr_warmup_steps


def _pivot_step(config: TrainConfig, method: Method, steps: int) -> int:
    """At least 1, however few the steps, unless pivot_fraction is 0."""
    if method is Method.TEXTUAL_INVERSION:
        return steps
    return max(1, round(config.pivot_fraction * steps)) if config.pivot_fraction else 0


def _check_resolution(config: TrainConfig, spec: TrainableSpec) -> None:
    side = config.resolution
    if side is None:
        return
    if not spec.min_side <= side <= spec.max_side:
        raise InvalidTraining(
            f"resolution is {side}; it must be from {spec.min_side} to {spec.max_side}"
        )
    if side % SIDE_MULTIPLE:
        nearest = round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE
        raise InvalidTraining(
            f"resolution is {side}; it must be a multiple of {SIDE_MULTIPLE}, such as {nearest}"
        )


def _check_words(config: TrainConfig) -> None:
    token = config.token_string
    if not re.fullmatch(r"\w[^\s,:/\\]{0,99}", token) or not token.isprintable():
        raise InvalidTraining(
            f"token_string is {token!r}; it must be one word of up to 100 letters, digits and signs"
            " other than comma, colon and slashes, beginning with a letter or digit, such as TOK"
        )
    if re.search(r"<s\d+>", token):
        raise InvalidTraining(
            f"token_string is {token!r}: <s0>, <s1> … are reserved for its embeddings; take a word"
        )
    for name, text in (
        ("class_prompt", config.class_prompt),
        ("token_initializer", config.token_initializer or ""),
    ):
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidTraining(
                f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
            )
    if config.preview_steps is not None and not config.preview_prompts:
        raise InvalidTraining(
            f"preview_steps is {config.preview_steps}, but there is nothing to generate; give"
            " preview_prompts"
        )


def _check_method(config: TrainConfig, method: Method) -> None:
    lora_only = ("lora_rank", "lora_alpha", "use_rslora", "use_dora", "train_text_encoder")
    given = [name for name in lora_only if getattr(config, name)]
    if method is not Method.LORA and given:
        raise InvalidTraining(
            f"{given[0]} is set, and method is {method}, which trains no LoRA; leave it out, or use"
            " method lora"
        )
    for name in ("use_dora", "train_text_encoder"):
        if getattr(config, name) and config.lora_format is LoraFormat.COG_SDXL:
            raise InvalidTraining(
                f"{name} is set, and cog-sdxl's format has no place for it; set lora_format to"
                " kohya"
            )
    if config.text_encoder_lr is not None and not config.train_text_encoder:
        raise InvalidTraining(
            f"text_encoder_lr is {config.text_encoder_lr}, and the text encoders are not trained;"
            " set train_text_encoder, or leave it out"
        )
    if config.optimizer is Optimizer.ADAFACTOR and method is not Method.FULL:
        raise InvalidTraining(
            "optimizer is adafactor, which is for training the whole UNet in less memory; with"
            f" method {method} use adamw"
        )
    for name in LEARNING_RATES:
        rate = getattr(config, name)
        if rate is not None and config.optimizer is Optimizer.PRODIGY and not 0.1 <= rate <= 10:
            raise InvalidTraining(
                f"{name} is {rate}; prodigy finds the rate by itself and takes a factor from 0.1 to"
                " 10: leave it empty"
            )
    if method is Method.TEXTUAL_INVERSION and config.ti_lr == 0:
        raise InvalidTraining("ti_lr is 0, and method textual_inversion trains nothing else")


def _check_prior(config: TrainConfig, method: Method) -> None:
    prior = config.prior_preservation
    if prior is Prior.OFF:
        if config.class_prompt:
            raise InvalidTraining(
                f"class_prompt is {config.class_prompt!r} and has no effect without"
                f" prior_preservation; set that to {Prior.TEACHER} or {Prior.CLASS_IMAGES}"
            )
        return
    if method is Method.TEXTUAL_INVERSION:
        raise InvalidTraining(
            f"prior_preservation is {prior}, and method textual_inversion does not change the"
            " model; leave it off"
        )
    if not config.class_prompt.strip():
        raise InvalidTraining(
            f"prior_preservation is {prior} and class_prompt empty; name the class of the concept,"
            " such as 'a dog'"
        )
    if has_trigger_word(config.class_prompt, config.token_string):
        raise InvalidTraining(
            f"class_prompt {config.class_prompt!r} contains the trigger word"
            f" {config.token_string!r}; name the class in words that the model knows"
        )
