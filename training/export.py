"""Trained weights → files."""

import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from training.config import LoraFormat, Method
from training.errors import DiskFull
from training.loop import Trained
from training.model import TrainableModel
from training.plan import TrainPlan
from weights.formats import write as formats
from weights.formats.read import POOLING_HEADER_KEY
from weights.formats.types import ModelShapes
from weights.messages import disk_full_raises

ARCHIVE = "trained_model.tar"  # replicate/cog-sdxl's name
EXCHANGE = "exchange.zip"
_ARCHITECTURE = "stable-diffusion-xl-v1-base"
_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class ExportedFiles:
    """Where the files are."""

    archive: Path  # for predictions
    exchange: tuple[Path, ...]  # for other programs


def write(
    trained: Trained,
    model: TrainableModel,
    n_images: int,
    folder: Path,
    report: str | None = None,
) -> ExportedFiles:
    """Write the archive, and with exchange_files the files for other programs, into `folder`.

    `report` is an HTML page for the archive. Raises DiskFull; no file stays then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        disk_full_raises(lambda: _disk_full(folder)),
        tempfile.TemporaryDirectory(dir=folder, prefix=".archive-") as name,
    ):
        partial = Path(name)
        lora_metadata = _lora_metadata(trained, model, n_images)
        archive = _write_archive(trained, model, partial, lora_metadata, report)
        exchange = []
        if trained.plan.exchange_files:
            exchange = _write_exchange(trained, model, partial, lora_metadata)
        # Each file has its name only once it is complete.
        return ExportedFiles(
            archive.replace(folder / ARCHIVE),
            tuple(path.replace(folder / path.name) for path in exchange),
        )


def bundle(files: ExportedFiles, folder: Path) -> Path | None:
    """Write the files for other programs into one zip, uncompressed; None if there are none.

    Raises DiskFull.
    """
    if not files.exchange:
        return None
    path = folder / EXCHANGE
    with disk_full_raises(lambda: _disk_full(folder)), zipfile.ZipFile(path, "w") as zipped:
        for file in files.exchange:
            zipped.write(file, file.name)
    return path


def _disk_full(folder: Path) -> DiskFull:
    return DiskFull(
        f"the trained weights do not fit into {folder}: the disk is full; free some room there and"
        " start again, with checkpointing_steps, so that little has to be done twice"
    )


def _write_archive(
    trained: Trained,
    model: TrainableModel,
    folder: Path,
    lora_metadata: dict[str, str],
    report: str | None,
) -> Path:
    weights, plan = trained.weights, trained.plan
    metadata = {POOLING_HEADER_KEY: str(weights.pooling)}
    shapes = ModelShapes.of(model.components.adaptable())
    main, embeddings = folder / "lora.safetensors", folder / "embeddings.pti"
    if plan.method is Method.FULL:
        main = folder / "unet.safetensors"
        formats.write_safetensors(main, formats.replaced_unet(weights), metadata)
    elif plan.lora_format is LoraFormat.KOHYA and weights.lora:
        _write_kohya(main, formats.kohya_lora(weights, shapes), lora_metadata)
    else:
        formats.write_safetensors(main, formats.cog_sdxl_lora(weights, shapes), lora_metadata)
    formats.write_safetensors(embeddings, formats.cog_sdxl_embeddings(weights), metadata)
    members: dict[str, Path | bytes] = {
        main.name: main,
        embeddings.name: embeddings,
        "special_params.json": formats.special_params(weights),
    }
    if report is not None:
        members["report.html"] = report.encode("utf-8")
    formats.write_tar(folder / ARCHIVE, members)
    return folder / ARCHIVE


def _write_exchange(
    trained: Trained, model: TrainableModel, folder: Path, lora_metadata: dict[str, str]
) -> list[Path]:
    """Write a textual inversion and kohya's LoRA, both named by the trigger word."""
    weights, word = trained.weights, trained.plan.token_string
    embedding = folder / f"{word}.safetensors"
    metadata = {POOLING_HEADER_KEY: str(weights.pooling)}
    metadata |= _model_spec(trained.plan, f"{_ARCHITECTURE}/textual-inversion")
    formats.write_safetensors(embedding, formats.clip_embeddings(weights), metadata)
    if not weights.lora:
        return [embedding]
    lora = folder / f"{word}_lora.safetensors"
    shapes = ModelShapes.of(model.components.adaptable())
    _write_kohya(lora, formats.kohya_lora(weights, shapes), lora_metadata)
    return [embedding, lora]


def _write_kohya(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    formats.write_safetensors(path, tensors, metadata | formats.hashes(tensors, metadata))


def _lora_metadata(trained: Trained, model: TrainableModel, n_images: int) -> dict[str, str]:
    """Return kohya's metadata about the training, of which A1111 needs ss_base_model_version."""
    plan = trained.plan
    values = {
        POOLING_HEADER_KEY: trained.weights.pooling,
        "ss_v2": False,
        "ss_base_model_version": model.spec.base_model_version,
        "ss_sd_model_name": model.spec.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": plan.lora_rank if plan.is_lora else 1,
        "ss_network_alpha": plan.lora_alpha if plan.is_lora else 1,
        "ss_output_name": plan.token_string,
        "ss_unet_lr": plan.lora_lr,
        "ss_text_encoder_lr": plan.text_encoder_lr if plan.train_text_encoder else None,
        "ss_learning_rate": plan.lora_lr,
        "ss_steps": plan.max_train_steps,
        "ss_num_train_images": n_images,
        "ss_total_batch_size": plan.train_batch_size,
        "ss_resolution": f"({plan.resolution}, {plan.resolution})",
        "ss_seed": plan.seed,
        "ss_min_snr_gamma": plan.snr_gamma or None,
        "ss_noise_offset": plan.noise_offset or None,
        "ss_optimizer": plan.optimizer,
        "ss_lr_scheduler": plan.lr_scheduler,
        "ss_lr_warmup_steps": plan.lr_warmup_steps,
        "ss_caption_dropout_rate": plan.caption_dropout,
        "ss_prior_loss_weight": plan.prior_loss_weight,
        "ss_network_args": json.dumps({"use_dora": True} if plan.use_dora else {}),
        "modelspec.prediction_type": "epsilon" if model.prediction_type == "epsilon" else "v",
    }
    texts = {key: str(value) for key, value in values.items()}
    return texts | _model_spec(plan, f"{_ARCHITECTURE}/lora")


def _model_spec(plan: TrainPlan, architecture: str) -> dict[str, str]:
    """Return Stability-AI/ModelSpec's metadata, without a date: same weights, same bytes."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": plan.token_string,
        "modelspec.resolution": f"{plan.resolution}x{plan.resolution}",
        "modelspec.trigger_phrase": plan.token_string,
    }
