"""What a training is asked to do, and every rule about it. Nothing here imports torch."""

import math
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from training.base_models import Method, Schedule, TrainableSpec
from training.errors import InvalidTraining

T = TypeVar("T")

SIDE_MULTIPLE = 8  # pixels per latent
SEEDS = 2**32
MAX_TOKENS = 8
MAX_RANK = 256
MAX_BATCH = 64
MAX_STEPS = 100_000
HELD_OUT_FROM = 8  # examples; one in so many is held out
MAX_HELD_OUT = 4
STEPS_PER_CHECK = 10  # the held-out loss is taken so often in one training
MAX_PROMPT_CHARACTERS = 1000


class Optimizer(StrEnum):
    """How parameters are moved."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PRODIGY = "prodigy"
    ADAFACTOR = "adafactor"


class Prior(StrEnum):
    """What keeps the model from forgetting what it knew of the class."""

    OFF = "off"
    TEACHER = "teacher"  # the base model's own answers
    CLASS_IMAGES = "class_images"  # pictures of the class


class LoraFormat(StrEnum):
    """Whose names the archive's LoRA has."""

    COG_SDXL = "cog_sdxl"
    KOHYA = "kohya"


@dataclass(frozen=True)
class TrainConfig:
    """What was asked. None leaves a value to the model's own default, or the seed to chance."""

    seed: int | None = None
    method: Method = Method.LORA
    resolution: int | None = None  # pixels: the side of the square whose area pictures have
    train_batch_size: int | None = None  # of all processes together
    gradient_accumulation_steps: int = 1  # batches for one step
    num_train_epochs: int | None = None  # in place of max_train_steps
    max_train_steps: int | None = None
    unet_learning_rate: float | None = None  # with method full
    ti_lr: float | None = None
    lora_lr: float | None = None
    text_encoder_lr: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None  # None: the rank
    use_rslora: bool = False
    use_dora: bool = False
    train_text_encoder: bool = False  # a LoRA on the text encoders' attention too
    optimizer: Optimizer = Optimizer.ADAMW
    lr_scheduler: Schedule | None = None
    lr_warmup_steps: int | None = None
    max_grad_norm: float = 1.0
    token_string: str = "TOK"  # the word that stands for the concept in captions
    n_tokens: int | None = None  # vectors that the word has
    token_initializer: str | None = None  # a word whose vector the new ones start from
    pivot_fraction: float = 0.5  # of the steps; afterwards the word's vectors stay as they are
    snr_gamma: float | None = None  # 0: every noise level counts the same
    noise_offset: float = 0.0
    caption_dropout: float | None = None  # share of captions that are left empty
    mask_floor: float = 0.1  # what pixels outside the mask count
    random_flip: bool = False  # show pictures mirrored half of the time
    prior_preservation: Prior = Prior.OFF
    prior_loss_weight: float = 1.0
    class_prompt: str = ""  # what the concept is one of
    gradient_checkpointing: bool | None = None  # None: where the device's memory is short
    compile_unet: bool = False  # minutes at the start for faster steps
    checkpointing_steps: int | None = None  # None: no checkpoints
    validation: bool = True  # with 8 examples or more, hold one in 8 out and measure on it
    preview_prompts: tuple[str, ...] = ()
    preview_steps: int | None = None  # None: only at the end
    lora_format: LoraFormat = LoraFormat.COG_SDXL
    exchange_files: bool = False  # also write what other programs read
    verbose: bool = True  # a progress bar


@dataclass(frozen=True)
class LoraPlan:
    """A LoRA's shape; it changes weights by `scaling` · up · down."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    text_encoder: bool

    @property
    def scaling(self) -> float:
        """alpha / rank (arXiv:2106.09685), or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class TrainPlan:
    """A config with every value settled; what `fit` carries out."""

    seed: int
    method: Method
    resolution: int
    train_batch_size: int
    gradient_accumulation_steps: int
    max_train_steps: int
    pivot_step: int  # the word's vectors learn in the steps before it
    unet_learning_rate: float
    ti_lr: float
    lora_lr: float
    text_encoder_lr: float
    lora: LoraPlan | None
    optimizer: Optimizer
    lr_scheduler: Schedule
    lr_warmup_steps: int
    max_grad_norm: float
    token_string: str
    n_tokens: int
    token_initializer: str | None
    snr_gamma: float
    noise_offset: float
    caption_dropout: float
    mask_floor: float
    random_flip: bool
    prior: Prior
    prior_loss_weight: float
    class_prompt: str
    gradient_checkpointing: bool | None
    compile_unet: bool
    checkpointing_steps: int | None
    held_out: int  # examples
    validation_steps: int | None
    preview_prompts: tuple[str, ...]
    preview_steps: int | None
    lora_format: LoraFormat
    exchange_files: bool
    verbose: bool

    @property
    def placeholder_tokens(self) -> tuple[str, ...]:
        """<s0>, <s1> …: cog-sdxl's names."""
        return tuple(f"<s{i}>" for i in range(self.n_tokens))

    @property
    def trigger_words(self) -> dict[str, str]:
        """The word → its placeholder tokens."""
        return {self.token_string: "".join(self.placeholder_tokens)}


def resolve(config: TrainConfig, spec: TrainableSpec, n_examples: int) -> TrainPlan:
    """Check every rule and settle every value. Raises InvalidTraining."""
    _check_ranges(config, spec)
    _check_words(config)
    _check_method(config)
    if n_examples < 1:
        raise InvalidTraining("there is no example to learn from; give at least one picture")
    recipe = spec.recipes[config.method]
    held_out = min(n_examples // HELD_OUT_FROM, MAX_HELD_OUT) if config.validation else 0
    batch = _or(config.train_batch_size, spec.train_batch_size)
    per_step = batch * config.gradient_accumulation_steps
    steps = _steps(config, recipe.max_train_steps, n_examples - held_out, per_step)
    warmup = _or(config.lr_warmup_steps, min(recipe.lr_warmup_steps, steps // 10))
    if warmup >= steps:
        raise InvalidTraining(
            f"lr_warmup_steps is {warmup}, and there are {steps} steps; it has to be less"
        )
    rate = _rates(config, spec, recipe.ti_lr)
    return TrainPlan(
        seed=secrets.randbelow(SEEDS) if config.seed is None else config.seed,
        method=config.method,
        resolution=_or(config.resolution, spec.native_size),
        train_batch_size=batch,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_train_steps=steps,
        pivot_step=_pivot_step(config, steps),
        unet_learning_rate=rate["unet_learning_rate"],
        ti_lr=rate["ti_lr"],
        lora_lr=rate["lora_lr"],
        text_encoder_lr=rate["text_encoder_lr"],
        lora=_lora(config, spec) if config.method is Method.LORA else None,
        optimizer=config.optimizer,
        lr_scheduler=_or(config.lr_scheduler, recipe.lr_scheduler),
        lr_warmup_steps=warmup,
        max_grad_norm=config.max_grad_norm,
        token_string=config.token_string,
        n_tokens=_or(config.n_tokens, spec.n_tokens),
        token_initializer=config.token_initializer,
        snr_gamma=_or(config.snr_gamma, spec.snr_gamma),
        noise_offset=config.noise_offset,
        caption_dropout=_or(config.caption_dropout, spec.caption_dropout),
        mask_floor=config.mask_floor,
        random_flip=config.random_flip,
        prior=config.prior_preservation,
        prior_loss_weight=config.prior_loss_weight,
        class_prompt=config.class_prompt,
        gradient_checkpointing=config.gradient_checkpointing,
        compile_unet=config.compile_unet,
        checkpointing_steps=config.checkpointing_steps,
        held_out=held_out,
        validation_steps=max(1, steps // STEPS_PER_CHECK) if held_out else None,
        preview_prompts=config.preview_prompts,
        preview_steps=config.preview_steps,
        lora_format=config.lora_format,
        exchange_files=config.exchange_files,
        verbose=config.verbose,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _steps(config: TrainConfig, default: int, n_examples: int, per_step: int) -> int:
    """Optimizer steps: as many as asked for, or as the epochs take, or the model's own."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    if config.num_train_epochs is not None:
        return math.ceil(config.num_train_epochs * n_examples / per_step)
    return default


def _pivot_step(config: TrainConfig, steps: int) -> int:
    """At least one step, however few there are: a word that never learns is not wanted."""
    if config.method is Method.TEXTUAL_INVERSION:
        return steps
    return max(1, round(config.pivot_fraction * steps)) if config.pivot_fraction else 0


def _rates(config: TrainConfig, spec: TrainableSpec, ti_lr: float) -> dict[str, float]:
    own = {
        "unet_learning_rate": spec.unet_learning_rate,
        "ti_lr": ti_lr,
        "lora_lr": spec.lora_lr,
        "text_encoder_lr": spec.text_encoder_lr,
    }
    if config.optimizer is Optimizer.PRODIGY:  # it finds the rate, and 1 leaves it as found
        own = dict.fromkeys(own, 1.0)
    return {name: _or(getattr(config, name), rate) for name, rate in own.items()}


def _lora(config: TrainConfig, spec: TrainableSpec) -> LoraPlan:
    rank = _or(config.lora_rank, spec.lora_rank)
    return LoraPlan(
        rank=rank,
        alpha=float(_or(config.lora_alpha, rank)),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        text_encoder=config.train_text_encoder,
    )


def _check_ranges(config: TrainConfig, spec: TrainableSpec) -> None:
    ranges: tuple[tuple[str, float, float], ...] = (
        ("seed", 0, SEEDS - 1),
        ("resolution", spec.min_side, spec.max_side),
        ("train_batch_size", 1, MAX_BATCH),
        ("gradient_accumulation_steps", 1, MAX_BATCH),
        ("num_train_epochs", 1, MAX_STEPS),
        ("max_train_steps", 1, MAX_STEPS),
        ("unet_learning_rate", 0, 10),
        ("ti_lr", 0, 10),
        ("lora_lr", 0, 10),
        ("text_encoder_lr", 0, 10),
        ("lora_rank", 1, MAX_RANK),
        ("lora_alpha", 1e-3, 10 * MAX_RANK),
        ("lr_warmup_steps", 0, MAX_STEPS),
        ("max_grad_norm", 1e-6, 1e6),
        ("n_tokens", 1, MAX_TOKENS),
        ("pivot_fraction", 0, 1),
        ("snr_gamma", 0, 1000),
        ("noise_offset", 0, 1),
        ("caption_dropout", 0, 0.99),
        ("mask_floor", 0, 1),
        ("prior_loss_weight", 0, 100),
        ("checkpointing_steps", 1, MAX_STEPS * 10),
        ("preview_steps", 1, MAX_STEPS * 10),
    )
    for name, low, high in ranges:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:  # not so for NaN either
            raise InvalidTraining(f"{name} is {value}; it has to be from {low} to {high}")
    if config.resolution is not None and config.resolution % SIDE_MULTIPLE:
        nearest = round(config.resolution / SIDE_MULTIPLE) * SIDE_MULTIPLE
        raise InvalidTraining(
            f"resolution is {config.resolution}; it has to be a multiple of {SIDE_MULTIPLE}, such"
            f" as {nearest}"
        )
    if config.num_train_epochs is not None and config.max_train_steps is not None:
        raise InvalidTraining(
            f"num_train_epochs is {config.num_train_epochs} and max_train_steps"
            f" {config.max_train_steps}: both say how long to train; leave one of them empty"
        )


def _check_words(config: TrainConfig) -> None:
    token = config.token_string
    if not re.fullmatch(r"\w[^\s,:/\\]{0,99}", token) or not token.isprintable():
        raise InvalidTraining(
            f"token_string is {token!r}; it has to be one word of up to 100 letters, digits and"
            " signs other than comma, colon and slashes, beginning with a letter or digit, as TOK"
        )
    if re.search(r"<s\d+>", token):
        raise InvalidTraining(
            f"token_string is {token!r}: <s0>, <s1> … are the names of its vectors; take a word"
        )
    for name in ("class_prompt", "token_initializer"):
        text = getattr(config, name) or ""
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidTraining(
                f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
            )
    if config.preview_steps is not None and not config.preview_prompts:
        raise InvalidTraining(
            f"preview_steps is {config.preview_steps}, but there is nothing to draw; give"
            " preview_prompts"
        )


def _check_method(config: TrainConfig) -> None:
    lora_only = {
        "lora_rank": config.lora_rank is not None,
        "lora_alpha": config.lora_alpha is not None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "train_text_encoder": config.train_text_encoder,
    }
    wrong = [name for name, given in lora_only.items() if given]
    if config.method is not Method.LORA and wrong:
        raise InvalidTraining(
            f"{wrong[0]} is set, and method is {config.method}, which trains no LoRA; leave it"
            " out, or use method lora"
        )
    extra = "use_dora" if config.use_dora else "train_text_encoder"
    if getattr(config, extra) and config.lora_format is LoraFormat.COG_SDXL:
        raise InvalidTraining(
            f"{extra} is set, and cog-sdxl's format has no place for it; set lora_format to kohya"
        )
    if config.optimizer is Optimizer.ADAFACTOR and config.method is not Method.FULL:
        raise InvalidTraining(
            "optimizer is adafactor, which saves memory where the whole UNet learns; with method"
            f" {config.method} use adamw"
        )
    for name in ("unet_learning_rate", "ti_lr", "lora_lr", "text_encoder_lr"):
        rate = getattr(config, name)
        if rate is not None and config.optimizer is Optimizer.PRODIGY and not 0.1 <= rate <= 10:
            raise InvalidTraining(
                f"{name} is {rate}; prodigy finds the rate by itself and takes a factor from 0.1 to"
                " 10: leave it empty"
            )
    if config.method is Method.TEXTUAL_INVERSION and config.ti_lr == 0:
        raise InvalidTraining("ti_lr is 0, and method textual_inversion trains nothing else")
    _check_prior(config)


def check_class_images(given: bool, prior: Prior) -> None:
    """Class images and their kind of prior belong together. Raises InvalidTraining."""
    if given and prior is not Prior.CLASS_IMAGES:
        raise InvalidTraining(
            f"class_images is set and prior_preservation is {prior}, which has no use for them; set"
            f" it to {Prior.CLASS_IMAGES}, or leave them out"
        )
    if not given and prior is Prior.CLASS_IMAGES:
        raise InvalidTraining(
            f"prior_preservation is {prior} and class_images is empty; send an archive of pictures"
            f" of the class, or set it to {Prior.TEACHER}, which needs none"
        )


def _check_prior(config: TrainConfig) -> None:
    prior = config.prior_preservation
    if prior is Prior.OFF:
        if config.class_prompt:
            raise InvalidTraining(
                f"class_prompt is {config.class_prompt!r} and has no use without"
                f" prior_preservation; set that to {Prior.TEACHER} or {Prior.CLASS_IMAGES}"
            )
        return
    if config.method is Method.TEXTUAL_INVERSION:
        raise InvalidTraining(
            f"prior_preservation is {prior}, and method textual_inversion changes nothing that the"
            " model knows; leave it off"
        )
    if not config.class_prompt.strip():
        raise InvalidTraining(
            f"prior_preservation is {prior} and class_prompt empty; say what the concept is one of,"
            " such as 'a dog'"
        )
    if re.search(rf"(?<!\w){re.escape(config.token_string)}(?!\w)", config.class_prompt):
        raise InvalidTraining(
            f"class_prompt {config.class_prompt!r} has the new word {config.token_string!r} in it;"
            " it is to say what the concept is one of, in words that the model knows"
        )
