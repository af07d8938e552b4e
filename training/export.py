"""What was learnt → files."""

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
from weights.formats import write as trained_export
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

    archive: Path  # what predictions take
    exchange: tuple[Path, ...]  # what other programs take


def write(
    trained: Trained,
    model: TrainableModel,
    n_images: int,
    folder: Path,
    report: str | None = None,
) -> ExportedFiles:
    """Write the archive, and what other programs read if the plan says so, into `folder`.

    `report` is an HTML page that travels in the archive. Raises DiskFull; nothing is left then.
    """
    with disk_full_raises(lambda: _disk_full(folder)):
        return _write(trained, model, n_images, folder, report)


def bundle(files: ExportedFiles, folder: Path) -> Path | None:
    """What other programs take, in one zip, without packing what does not shrink.

    None if there is nothing. Raises DiskFull.
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
        f"what was learnt does not fit into {folder}: the disk is full; free some room there and"
        " start again, with checkpointing_steps, so that little has to be done twice"
    )


def _write(
    trained: Trained,
    model: TrainableModel,
    n_images: int,
    folder: Path,
    report: str | None,
) -> ExportedFiles:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = ModelShapes.of(model.components.adaptable())
    weights, plan = trained.weights, trained.plan
    header = {POOLING_HEADER_KEY: str(weights.pooling)}
    lora_header = header | _lora_header(trained, model, n_images)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".archive-") as aside:
        parts = Path(aside)
        embeddings = parts / "embeddings.pti"
        main = parts / "lora.safetensors"
        if plan.method is Method.FULL:
            main = parts / "unet.safetensors"
            trained_export.write_safetensors(main, trained_export.replaced_unet(weights), header)
        elif plan.lora_format is LoraFormat.KOHYA and weights.lora:
            _write_kohya(main, trained_export.kohya_lora(weights, shapes), lora_header)
        else:
            tensors = trained_export.cog_sdxl_lora(weights, shapes)
            trained_export.write_safetensors(main, tensors, lora_header)
        trained_export.write_safetensors(
            embeddings, trained_export.cog_sdxl_embeddings(weights), header
        )
        members: dict[str, Path | bytes] = {
            main.name: main,
            embeddings.name: embeddings,
            "special_params.json": trained_export.special_params(weights),
        }
        if report is not None:
            members["report.html"] = report.encode("utf-8")
        trained_export.write_tar(parts / ARCHIVE, members)
        exchange = []
        if plan.exchange_files:
            exchange = _write_exchange(parts, trained, shapes, header, lora_header)
        # Each file has its name only once it is complete.
        return ExportedFiles(
            (parts / ARCHIVE).replace(folder / ARCHIVE),
            tuple(path.replace(folder / path.name) for path in exchange),
        )


def _write_exchange(
    folder: Path,
    trained: Trained,
    shapes: ModelShapes,
    header: dict[str, str],
    lora_header: dict[str, str],
) -> list[Path]:
    """kohya's LoRA, and the vectors in a file that is called like their word."""
    word = trained.plan.token_string
    architecture = f"{_ARCHITECTURE}/textual-inversion"
    written = [folder / f"{word}.safetensors"]
    trained_export.write_safetensors(
        written[0],
        trained_export.clip_embeddings(trained.weights),
        header | _model_spec(trained.plan, architecture),
    )
    if trained.weights.lora:
        written.append(folder / f"{word}_lora.safetensors")
        _write_kohya(written[1], trained_export.kohya_lora(trained.weights, shapes), lora_header)
    return written


def _write_kohya(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    trained_export.write_safetensors(path, tensors, header | trained_export.hashes(tensors, header))


def _lora_header(trained: Trained, model: TrainableModel, n_images: int) -> dict[str, str]:
    """What kohya's files say of their training; A1111 asks for ss_base_model_version."""
    plan = trained.plan
    values: dict[str, object] = {
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
    }
    arguments: dict[str, object] = {}
    if plan.use_dora:
        arguments["use_dora"] = True
    texts = {key: str(value) for key, value in values.items()}
    texts["ss_network_args"] = json.dumps(arguments)
    spec = _model_spec(plan, f"{_ARCHITECTURE}/lora")
    prediction = "epsilon" if model.prediction_type == "epsilon" else "v"
    return texts | spec | {"modelspec.prediction_type": prediction}


def _model_spec(plan: TrainPlan, architecture: str) -> dict[str, str]:
    """Stability-AI/ModelSpec; without a date, which would make the same weights other bytes."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": plan.token_string,
        "modelspec.resolution": f"{plan.resolution}x{plan.resolution}",
        "modelspec.trigger_phrase": plan.token_string,
    }
