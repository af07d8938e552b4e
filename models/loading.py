"""Load models from folders in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from models.components import TOKENIZERS, ModelComponents
from weights import cache
from weights.catalog import Edition

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTokenizer

# Entries of a config that say nothing about what the network computes.
_IRRELEVANT_CONFIG = ("architectures", "dtype", "torch_dtype", "transformers_version")


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the UNet of a model folder."""
    import diffusers

    return _load(diffusers.UNet2DConditionModel, folder / "unet", dtype)


def load_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE of a model folder, or the VAE that the folder is."""
    import diffusers

    part = folder / "vae"
    return _load(diffusers.AutoencoderKL, part if part.is_dir() else folder, dtype)


def load_text_encoder(folder: Path, name: str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Load a text encoder of a model folder with the class that its model_index.json names."""
    import transformers

    _, class_name = read_model_index(folder)[name]
    return _load(getattr(transformers, class_name), folder / name, dtype)


def load_tokenizers(folder: Path) -> dict[str, CLIPTokenizer]:
    """Load the tokenizers of a model folder, by their text encoders' names."""
    from transformers import CLIPTokenizer

    return {
        encoder: CLIPTokenizer.from_pretrained(folder / tokenizer, local_files_only=True)
        for encoder, tokenizer in TOKENIZERS.items()
        if (folder / tokenizer).is_dir()
    }


def read_scheduler_config(folder: Path) -> dict[str, object]:
    """Read the scheduler config that a model was published with."""
    return _read_json(folder / "scheduler" / "scheduler_config.json")


def read_model_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's model_index.json: its components' classes and its settings."""
    return _read_json(folder / "model_index.json")


class ModelLoader:
    """Loads models of one edition; equal text encoders and VAEs of several are one network."""

    def __init__(self, edition: Edition, dtype: torch.dtype) -> None:
        self._edition, self._dtype = edition, dtype
        self._shared: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()

    def base_model(
        self, weights: str, components_from: Mapping[str, str], unshared: bool = False
    ) -> ModelComponents:
        """Load a base model; raises a WeightsError.

        Args:
            weights: its catalog entry.
            components_from: component → catalog entry that replaces the one in `weights`.
            unshared: share no network with other models, as this one will be changed for good.
        """
        import diffusers
        from transformers.utils import logging as transformers_logging

        # Theirs count parts of a model; a request's log has one for downloads and for denoising.
        diffusers.utils.logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        folder = cache.ensure(weights, self._edition)
        vae_folder = cache.ensure(components_from.get("vae", weights), self._edition)
        tokenizers = load_tokenizers(folder)
        return ModelComponents(
            unet=load_unet(folder, self._dtype),
            vae=self._load_shared(vae_folder, "vae", unshared),
            text_encoders={name: self._load_shared(folder, name, unshared) for name in tokenizers},
            tokenizers=tokenizers,
            scheduler_config=read_scheduler_config(folder),
            is_sdxl="text_encoder_2" in tokenizers,
        )

    def refiner(self, weights: str, base: ModelComponents) -> ModelComponents:
        """Load the UNet of SDXL's refiner; the rest is the base model's. Raises a WeightsError."""
        folder = cache.ensure(weights, self._edition)
        name = "text_encoder_2"
        return ModelComponents(
            unet=load_unet(folder, self._dtype),
            vae=base.vae,
            text_encoders={name: base.text_encoders[name]},
            tokenizers={name: base.tokenizers[name]},
            scheduler_config=read_scheduler_config(folder),
            is_sdxl=True,
            requires_aesthetics_score=bool(read_model_index(folder)["requires_aesthetics_score"]),
        )

    def controlnet(self, weights: str) -> ControlNetModel:
        """Load the ControlNet of this catalog entry, or the union of several."""
        import diffusers

        (config_file,) = cache.ensure(weights, self._edition).rglob("config.json")
        class_name = _read_json(config_file)["_class_name"]
        return _load(getattr(diffusers, class_name), config_file.parent, self._dtype)

    def _load_shared(self, folder: Path, name: str, unshared: bool) -> Any:  # noqa: ANN401
        """Load a component, or return the equal one of another model that is in memory."""
        key = _content_key(folder / name if (folder / name).is_dir() else folder, folder)
        network = None if unshared else self._shared.get(key)
        if network is None:
            if name == "vae":
                network = load_vae(folder, self._dtype)
            else:
                network = load_text_encoder(folder, name, self._dtype)
            if not unshared:
                self._shared[key] = network
        return network


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Load a network of a library class, in inference mode."""
    network = cls.from_pretrained(
        folder,
        variant="fp16" if any(folder.glob("*.fp16.safetensors")) else None,
        dtype=dtype,
        # Some were published as pickles only, of which the libraries read nothing but tensors.
        use_safetensors=any(folder.glob("*.safetensors")),
        local_files_only=True,
    )
    return network.eval()


def _content_key(part: Path, entry: Path) -> Hashable:
    """Return a key that is equal for equal networks: their weights' hashes and their config."""
    config = _read_json(part / "config.json")
    relevant = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in _IRRELEVANT_CONFIG
    }
    name = "" if part == entry else part.name
    return cache.digests(entry, name), json.dumps(relevant, sort_keys=True)


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
