"""Predict masks with a trained network, its classes, normalisation and test-time protocol."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from PIL import Image, ImageOps
from torch import Tensor

from segformer_pl.checkpoints import hub
from segformer_pl.checkpoints.changed_network import changed_network
from segformer_pl.checkpoints.conversion import save_pretrained, transformers_class
from segformer_pl.checkpoints.facts import INFERENCE
from segformer_pl.checkpoints.networks import load_network
from segformer_pl.checkpoints.sources import Weights, WeightsSource, read_weights
from segformer_pl.data.decoding import EncodedImage, NumBands
from segformer_pl.errors import UserError
from segformer_pl.inference.engine import (
    ClassMaps,
    PixelPredictions,
    predict_classes,
    predict_pixels,
    probability_bands,
)
from segformer_pl.inference.protocol import Inference
from segformer_pl.models.forward_check import class_maps_of
from segformer_pl.models.segmenter import Network, Output, Segmenter
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization

ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor
Mask = npt.NDArray[np.uint8 | np.uint16]


class Predictor(ModelHubMixin):
    """A segmenter, the normalisation of its images, its classes and the test-time protocol.

    Example::

        predictor = Predictor.load("runs/demo/version_0/checkpoints/best.ckpt")
        mask = predictor("photo.jpg")  # (H, W), class indices
        Image.fromarray(mask)
        predictor.class_names[mask[0, 0]]

        predictor.push_to_hub("owner/name")
        Predictor.from_pretrained("owner/name")

    ``save_pretrained`` and ``push_to_hub`` are those of ``huggingface_hub.ModelHubMixin``. They
    write safetensors, in the layout of transformers where it has such a network, and a short model
    card; ``python -m segformer_pl push`` writes the one of a run.

    Args:
        network: A segmenter (:class:`segformer_pl.models.segmenter.Segmenter`). It is put into
            evaluation mode.
        class_names: Name of every class, in the order of the class indices.
        palette: Colour of every class, RGB in 0 to 255. None: unknown.
        normalization: Mean and standard deviation of the network's images. Default: ImageNet's.
        protocol: Resizing, windows, scales and flips. Default: the whole image in one pass.

    Raises:
        UserError: The number of names differs from that of the network's classes, or the number of
            values in the normalisation from that of its input channels.
    """

    def __init__(
        self,
        network: Any,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]] | None = None,
        normalization: Normalization | None = None,
        protocol: Inference | None = None,
    ) -> None:
        self.network = network.eval()
        self.class_names = list(class_names)
        self.palette = None if palette is None else [list(color) for color in palette]
        self.normalization = Normalization() if normalization is None else normalization
        self.protocol = Inference() if protocol is None else protocol
        if len(self.class_names) != network.num_classes:
            raise UserError(
                f"the network has {network.num_classes} classes, but there are "
                f"{len(self.class_names)} class names; give one for each"
            )
        num_channels = {len(self.normalization.mean), len(self.normalization.std)}
        if num_channels != {network.in_channels}:
            raise UserError(
                f"the network takes {network.in_channels} channels, but its images are normalised "
                f"with mean {list(self.normalization.mean)} and standard deviation "
                f"{list(self.normalization.std)}; give one value of each for every channel"
            )

    _is_optimized = False

    @classmethod
    def load(
        cls,
        source: WeightsSource,
        state: str | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a network with the facts that its source states about it, on the CPU.

        Defaults replace facts that the source does not state: ImageNet's normalisation, the names
        ``"class 0"``, ``"class 1"``, ..., and the whole image in one pass. Weights of 16 bits
        become float32.

        Args:
            source: A run's checkpoint, a native file (``.safetensors``), a folder written by
                transformers, a hub name ``owner/name@commit``, or any other weights that
                :func:`~segformer_pl.checkpoints.load_network` builds a network for.
            state: Name of the copy to read from a file that holds several, such as an average
                (EMA) beside the weights.
            changes: Arguments of the network, or of its encoder, to change at equal weights, such
                as ``{"merged_queries": (0.5, 0.5, 0.5, 0.5)}``. ``test_time`` measures what a
                change costs.

        Raises:
            UserError: The source cannot be read, does not state enough to build its network,
                contradicts itself, or holds no segmenter; or a change is impossible, or needs
                training.
        """
        return cls.from_weights(read_weights(source, state), changes)

    @classmethod
    def from_weights(cls, weights: Weights, changes: Mapping[str, Any] | None = None) -> Self:
        """Build a predictor like :meth:`load` from weights that were read already."""
        network, _ = load_network(weights)
        if changes:
            name = f"{weights.name} with {dict(changes)}"
            network = changed_network(network, weights, changes, name)
        if next(network.parameters()).dtype in (torch.float16, torch.bfloat16):
            network.float()  # images are float32, and a CPU computes fast with nothing shorter
        if not isinstance(network, Segmenter):
            raise UserError(
                f"{weights.name} holds an encoder and no decode head, so it cannot predict; give a "
                "whole segmenter"
            )
        facts = weights.task
        names = facts.get("class_names") or [f"class {n}" for n in range(network.num_classes)]
        protocol = _protocol(facts.get("inference"), weights.name)
        try:
            return cls(network, names, facts.get("palette"), normalization_of(weights), protocol)
        except UserError as error:
            raise UserError(f"{weights.name}: {error}") from error

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load a folder that ``save_pretrained`` wrote, or a repository of the hub.

        Unlike :meth:`load`, this takes the current commit of a repository, whose weights can
        change, unless ``revision`` pins one.

        Args:
            pretrained_model_name_or_path: Path of the folder, or name of the repository
                ``owner/name``.
            force_download: Whether to download files that are in the cache already.
            token: Token of the hub; None or True: that of ``hf auth login`` or ``HF_TOKEN``.
            cache_dir: Folder of the cache. Default: that of ``huggingface_hub``.
            local_files_only: Whether to take the repository from the cache alone.
            revision: Commit, branch or tag of the repository.

        Raises:
            UserError: There is no such folder or repository, or it cannot be loaded.
        """
        source = pretrained_model_name_or_path
        if not os.path.isdir(source):
            hub.check_name(str(source))
            source = hub.download(
                str(source),
                revision,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        return cls.load(source)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about classes, images and protocol, in the form in which files state them."""
        return {
            "class_names": self.class_names,
            "palette": self.palette,
            "image_mean": list(self.normalization.mean),
            "image_std": list(self.normalization.std),
            "inference": {"class_path": INFERENCE, "init_args": asdict(self.protocol)},
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        if self._is_optimized:
            raise UserError(
                "an optimised network has other tensors than files of weights; save or push the "
                "predictor that optimize() was called on"
            )
        save_pretrained(self.network, save_directory, self.facts)

    def generate_model_card(self) -> ModelCard:
        """Return a model card that states the network, its classes and how to use it."""
        from segformer_pl.analysis.report.model_card import model_card  # imports Matplotlib

        return model_card(self.network, self.class_names, transformers_class(self.network))

    def optimize(self, compile: bool = False) -> Self:
        """Return a predictor with a copy of the network that is folded for inference.

        This predictor and its network stay as they are. Class maps agree to 1e-5 of their largest
        magnitude in float32, so a mask differs at most where two classes are equally likely. The
        network determines what is folded, see
        :meth:`~segformer_pl.models.segmenter.Network.for_inference`.

        Args:
            compile: Whether ``torch.compile`` compiles the network, once for each of the first
                sizes of images; it serves few sizes.
        """
        network = self.network.for_inference()
        if compile:
            # With symbolic sizes, Inductor of torch 2.15 fails on SegFormer ("Invalid ranges").
            network.compile(dynamic=False)
        arguments = self.class_names, self.palette, self.normalization, self.protocol
        optimized = type(self)(network, *arguments)
        optimized._is_optimized = True
        return optimized

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move the network to a device; return the predictor itself."""
        self.network.to(device)
        return self

    def __call__(self, image: ImageSource) -> Mask:
        """Predict the class of every pixel.

        Args:
            image: Path of a file, a Pillow image, an array (H, W, in_channels) of uint8, or a
                tensor (in_channels, H, W), uint8 or floating-point in 0 to 1. Files and Pillow
                images are decoded like those of data sets: rotated by their EXIF data, to 8-bit
                RGB; for a network of four channels they need four bands
                (:class:`~segformer_pl.data.decoding.EncodedImage`).

        Returns:
            Class indices, (H, W): uint8, or uint16 if there are more than 256 classes.

        Raises:
            UserError: The file cannot be read, the image has another type or other channels than
                the network, or the network's output holds nan or infinity.
        """
        network, images = self._prepare(image)
        with torch.inference_mode():
            mask = predict_classes(
                network,
                images,
                (images.shape[2], images.shape[3]),
                self.protocol,
                self._normalize_bytes,
                torch.uint8 if self._mask_dtype is np.uint8 else torch.uint16,
            )
        network.check_finite()
        return mask[0].cpu().numpy()

    def probabilities(self, image: ImageSource) -> tuple[Mask, npt.NDArray[np.float16]]:
        """Predict the class of every pixel and the probabilities of all classes.

        Args:
            image: See :meth:`__call__`.

        Returns:
            The mask of :meth:`__call__`, and the probabilities, (num_classes, H, W) float16.
        """
        network, images = self._prepare(image)
        height, width = images.shape[2:]
        mask: Mask = np.empty((height, width), self._mask_dtype)
        probabilities = np.empty((len(self.class_names), height, width), np.float16)
        with torch.inference_mode():
            for rows, band in probability_bands(
                network, images, (height, width), self.protocol, self._normalize_bytes
            ):
                mask[rows] = band[0].argmax(dim=2).cpu().numpy()
                probabilities[:, rows] = band[0].permute(2, 0, 1).half().cpu().numpy()
        network.check_finite()
        return mask, probabilities

    def confidence(self, image: ImageSource) -> tuple[Mask, npt.NDArray[np.float16]]:
        """Predict the class of every pixel and the probability of that class.

        It needs less memory than :meth:`probabilities`, which returns those of all classes.

        Args:
            image: See :meth:`__call__`.

        Returns:
            The mask of :meth:`__call__`, and the probabilities, (H, W) float16.
        """
        network, images = self._prepare(image)
        height, width = images.shape[2:]
        mask: Mask = np.empty((height, width), self._mask_dtype)
        confidence = np.empty((height, width), np.float16)
        with torch.inference_mode():
            for rows, band in probability_bands(
                network, images, (height, width), self.protocol, self._normalize_bytes
            ):
                highest = band[0].max(dim=2)
                mask[rows] = highest.indices.cpu().numpy()
                confidence[rows] = highest.values.half().cpu().numpy()
        network.check_finite()
        return mask, confidence

    @torch.inference_mode()
    def predict_batch(self, images: Tensor) -> Tensor:
        """Predict the class of every pixel of a batch of images.

        Args:
            images: Images in 0 to 1, (B, in_channels, H, W), on any device.

        Returns:
            Class indices, (B, H, W) int64, on the network's device.

        Raises:
            UserError: The network's output holds nan or infinity.
        """
        network = _FiniteCheck(self.network)
        size = (images.shape[2], images.shape[3])
        on_device = images.to(self.device)
        pred = predict_classes(network, on_device, size, self.protocol, self.normalization)
        network.check_finite()
        return pred

    @torch.inference_mode()
    def predict_pixels(self, images: Tensor, target: Tensor, ignore_index: int) -> PixelPredictions:
        """Predict the class of every pixel of a batch, with its confidence and loss.

        Args:
            images: See :meth:`predict_batch`.
            target: Class indices, (B, H', W') int64, on any device. The result has their size.
            ignore_index: Class index of the pixels whose loss is 0.

        Raises:
            UserError: The network's output holds nan or infinity.
        """
        network = _FiniteCheck(self.network)
        pixels = predict_pixels(
            network,
            images.to(self.device),
            target.to(self.device),
            ignore_index,
            self.protocol,
            self.normalization,
        )
        network.check_finite()
        return pixels

    @property
    def _mask_dtype(self) -> type[np.uint8 | np.uint16]:
        return np.uint8 if len(self.class_names) <= 256 else np.uint16

    def _prepare(self, image: ImageSource) -> tuple["_FiniteCheck", Tensor]:
        if isinstance(image, Tensor):
            pixels = _checked(image, self.network.in_channels)
        else:
            pixels = torch.from_numpy(_pixels(image, self.network)).permute(2, 0, 1)
        # Images stay in 8 bits. _normalize_bytes converts one window after the other.
        return _FiniteCheck(self.network), pixels[None].to(self.device)

    def _normalize_bytes(self, part: Tensor) -> Tensor:
        return self.normalization(part if part.is_floating_point() else part / 255)


def num_bands_of(network: Network, name: str) -> NumBands:
    """Return the number of bands that a network's images are read with from files.

    Args:
        network: The network.
        name: Option or source that gave the network, for the message.

    Raises:
        UserError: Its ``in_channels`` are neither 3 nor 4.
    """
    for num_bands in get_args(NumBands):
        if network.in_channels == num_bands:
            return num_bands
    raise UserError(
        f"{name}: the network takes images of {network.in_channels} channels, but files are read "
        "with 3 (RGB) or 4; give a network with in_channels 3 or 4"
    )


def check_takes_rgb(network: Network, name: str, what: str) -> None:
    """Refuse a network whose images have other channels than RGB.

    Args:
        network: The network.
        name: Option or source that gave the network, for the message.
        what: What is read as RGB, such as ``"a video"``.

    Raises:
        UserError: Its ``in_channels`` are not 3.
    """
    if network.in_channels != 3:
        raise UserError(
            f"{name}: the network takes images of {network.in_channels} channels, and {what} has 3 "
            "(RGB); give a network with in_channels 3"
        )


def normalization_of(weights: Weights) -> Normalization:
    """Return the normalisation that a source states, ImageNet's if it states none."""
    mean, std = (
        tuple(weights.task.get(key, default))
        for key, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
    )
    return Normalization(mean, std)


class _FiniteCheck:
    """A network whose outputs are checked: their shape at once, and later whether they are finite.

    The records stay on the device until :meth:`check_finite`, so that windows do not wait for each
    other on a GPU.
    """

    def __init__(self, network: ClassMaps) -> None:
        self.network = network
        self.num_classes: int = network.num_classes
        self.output: Output = network.output
        self.is_finite: list[Tensor] = []  # one scalar for each window

    def __call__(self, images: Tensor) -> Tensor:
        class_maps = class_maps_of(self.network, images)
        self.is_finite.append(class_maps.isfinite().all())
        return class_maps

    def check_finite(self) -> None:
        """Raise a UserError if an output held nan or infinity."""
        if not all(self.is_finite):
            raise UserError(
                "the network's outputs hold nan or infinity, so there is no mask; give another "
                "checkpoint"
            )


def _checked(image: Tensor, channels: int) -> Tensor:
    """Return an image (channels, H, W) after a check of its form, uint8 or float32 in 0 to 1."""
    is_image = image.ndim == 3 and len(image) == channels
    if not is_image or not (image.dtype == torch.uint8 or image.is_floating_point()):
        dtype = str(image.dtype).removeprefix("torch.")
        raise UserError(
            f"an image cannot be a {dtype} tensor of shape {tuple(image.shape)}; give one "
            f"({channels}, H, W), uint8 or floating-point in 0 to 1 (predict_batch takes a batch)"
        )
    if image.dtype == torch.uint8:
        return image
    low, high = (value.item() for value in image.aminmax())
    if not (low >= 0 and high <= 1):  # nan compares as false
        raise UserError(
            f"the image holds values from {low:.4g} to {high:.4g}; give a tensor in 0 to 1, before "
            "normalisation, or one of uint8"
        )
    return image.float()


def _pixels(
    image: str | os.PathLike[str] | Image.Image | Any, network: Network
) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image, (H, W, in_channels)."""
    channels = network.in_channels
    if isinstance(image, str | os.PathLike):
        return EncodedImage.read(Path(image), num_bands_of(network, f"'{image}'")).decode()
    if isinstance(image, Image.Image):
        if num_bands_of(network, "a Pillow image") == 4:
            if image.mode != "RGBA":
                raise UserError(
                    f"the network takes 4 channels, and a Pillow image of mode {image.mode} has "
                    "others; give one of mode RGBA"
                )
            return np.array(ImageOps.exif_transpose(image))
        if image.mode.startswith(("I", "F")):
            raise UserError(
                f"an image of mode {image.mode} holds numbers without a known range; give an image "
                "of 8 bits per channel, or its file"
            )
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (channels,):
        return np.ascontiguousarray(image)
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        kind = f"{image.dtype} array of shape {image.shape}"
    raise UserError(
        f"an image cannot be a {kind}; give a file, a Pillow image, an array (H, W, {channels}) of "
        f"uint8, or a tensor ({channels}, H, W)"
    )


def _protocol(stated: Any, name: str) -> Inference:
    """Build the protocol that a checkpoint states, the default if it states none."""
    if stated is None:
        return Inference()
    if not isinstance(stated, Mapping) or stated.get("class_path") != INFERENCE:
        raise UserError(
            f"{name} states its inference protocol as {str(stated)[:60]}; its class_path has to be "
            f"{INFERENCE}"
        )
    try:
        return Inference(**stated.get("init_args") or {})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} states an inference protocol that cannot be used here ({error})"
        ) from error
