"""The contract between a network and everything that trains, measures and stores it.

A network of this package is an :class:`Encoder` or a :class:`Segmenter`::

    images (B, C, H, W) --Encoder----> [(B, C_1, H_1, W_1), ..., (B, C_n, H_n, W_n)]
    images (B, C, H, W) --Segmenter--> (B, num_classes, h, w)

The rest of the package uses only the attributes and methods below, and tests for no architecture.
There are two exceptions: ``checkpoints`` knows the parameter names of SegFormer and MaskFormer, to
translate those of other code bases, and ``analysis/erf/head_units.py`` has a shortcut for
SegFormer's head.

A new network inherits from one of the two classes, sets the attributes and implements the abstract
methods::

    class Tiny(Segmenter):
        def __init__(self, num_classes: int, width: int = 8) -> None:
            super().__init__()
            self.in_channels, self.num_classes = 3, num_classes
            self.features = nn.Conv2d(3, width, 3, stride=4, padding=1)
            self.classifier = nn.Conv2d(width, num_classes, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.feature_maps(images)["features"])

        def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
            return {"features": self.features(images).relu()}

        def init_args(self) -> dict[str, Any]:
            return {
                "num_classes": self.num_classes,
                "width": self.classifier.in_channels,
            }

They are base classes and not protocols, because jsonargparse compares the annotations of a
protocol's methods, and ``nn.Module.__call__`` has none. A network that satisfies a protocol could
not be given on the command line.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from torch import Tensor, nn

from segformer_pl.errors import UserError, counted
from segformer_pl.models.folding import fold_batch_norms

Output = Literal["logits", "scores"]

# (class maps (B, num_classes, h, w), target (B, H, W) int64, ignore_index) -> scalar
Criterion = Callable[[Tensor, Tensor, int], Tensor]


class Network(nn.Module, ABC):
    """Base class of encoders and segmenters.

    Attributes:
        in_channels: Number of channels of the images.
        min_size: Smallest height and width of an image in pixels.
        training_arguments: Names of the constructor arguments that matter only in training, such as
            rates of dropout: whatever their values, equal weights compute the same. A comparison
            of networks ignores them.
        traces_any_size: Whether ``torch.export`` traces one graph for images of all sizes. If not,
            an exported graph has a fixed size.
    """

    in_channels: int
    min_size: int = 1
    traces_any_size: bool = True
    training_arguments: tuple[str, ...] = ()

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this network, as plain data.

        An argument that is itself a network is replaced by its ``spec()``. Checkpoints store these
        arguments, so that they open without the script that trained the network.
        """

    def spec(self) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": ...}``, as in an experiment file."""
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": self.init_args()}

    def parts(self) -> dict[str, str]:
        """Return the parts of the network for cost tables: name -> path of the submodule, in order.

        No path may lie inside another, and together they must hold every parameter.
        """
        return {name: name for name, _ in self.named_children()}

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of parameters for layer-wise learning rates: name -> 0, 1, 2, ...

        Layer 0 is next to the image. In a segmenter, parameters without an entry are the head,
        which trains at a multiple of the encoder's learning rate. By default no parameter has one.
        """
        return {}

    def encoder_parameters(self) -> set[str]:
        """Return the names of the encoder's parameters, which are loaded and counted apart.

        By default those in :meth:`layer_ids`.
        """
        return set(self.layer_ids())

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        return set()

    def weight_constants(self) -> dict[str, float]:
        """Return constants that trained weights depend on and that no tensor holds.

        The epsilons of LayerNorms are such constants. They are stored and loaded with the weights.
        """
        return {}

    def set_weight_constants(self, constants: Mapping[str, float]) -> None:
        """Set constants of the names that :meth:`weight_constants` returns. This class has none.

        Raises:
            UserError: The network has no constant of that name.
        """
        if constants:
            raise UserError(
                f"the weights state {', '.join(constants)}, which {type(self).__name__} does not "
                "have; give them to the network that they were trained in"
            )

    def for_inference(self) -> Self:
        """Return a copy in evaluation mode that computes the same with fewer operations.

        Its outputs differ by rounding. It has other parameters, which need no gradients: use it for
        ``forward`` and ``feature_maps``, and this network for training, storing and counting.
        """
        network = copy.deepcopy(self).eval().requires_grad_(False)
        network.fold()
        return network

    def fold(self) -> None:
        """Fold what is constant at inference, in place; :meth:`for_inference` calls it on a copy.

        By default every BatchNorm that follows a convolution in an ``nn.Sequential`` is folded into
        it. A network with more to fold extends this method. Folding twice changes nothing more.
        """
        fold_batch_norms(self)

    def paper_macs(self, height: int, width: int) -> int | None:
        """Return the multiply-adds of one image as the paper counts them, None if unknown.

        Papers and their tools differ in what they count.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        return None


@dataclass(frozen=True)
class AdaptedWeights:
    """Result of :meth:`Encoder.adapt_weights`.

    Attributes:
        tensors: Tensors by the keys of the encoder.
        left_out: Keys of the source that are not among them -> reason.
        resampled: Keys of the encoder whose tensors were changed -> rule.
        initialized: Keys of the encoder that the source never has, and that keep their initial
            values -> reason.
    """

    tensors: Mapping[str, Tensor]
    left_out: Mapping[str, str] = field(default_factory=dict)
    resampled: Mapping[str, str] = field(default_factory=dict)
    initialized: Mapping[str, str] = field(default_factory=dict)


class Encoder(Network):
    """Base class of backbones, whose output is a feature pyramid, finest map first.

    An encoder has no head, so :meth:`layer_ids` has an entry for every parameter.

    Attributes:
        out_channels: Channels C_i of every map.
        out_strides: Stride of every map in pixels of the image.
    """

    out_channels: tuple[int, ...]
    out_strides: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (B, C_i, H_i, W_i) of images (B, in_channels, H, W)."""

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter. By default there is a single layer, 0."""
        return {name: 0 for name, _ in self.named_parameters()}

    def out_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the size (H_i, W_i) of every map of an image of this height and width."""
        return [(math.ceil(height / s), math.ceil(width / s)) for s in self.out_strides]

    def own_key(self, key: str) -> str:
        """Return the encoder's key for a key of its classification network. By default the same.

        Args:
            key: Key of a file of the backbone alone, perhaps after a prefix such as ``module.``.
        """
        return key

    def adapt_weights(
        self, tensors: Mapping[str, Tensor], stated: Mapping[str, Any]
    ) -> AdaptedWeights:
        """Adapt weights of a similar backbone, such as a file of its classification network.

        They are loaded as far as their keys and shapes are the encoder's. A backbone whose files
        differ from it in other ways overrides this method. By default nothing is changed.

        Args:
            tensors: Tensors of the source by the keys of the encoder. Other keys may be among them.
            stated: ``init_args()`` of the encoder that they were trained in; empty if unknown.
        """
        return AdaptedWeights(tensors)


class Segmenter(Network):
    """Base class of semantic segmentation networks.

    Attributes:
        num_classes: Number of classes.
        output: Kind of the class maps. ``"logits"`` become probabilities by a softmax over the
            classes, ``"scores"`` (non-negative, such as MaskFormer's sum over queries) by division
            by their sum.
        classifier_paths: Paths of all submodules whose parameters have the classes as their first
            dimension, the main classifier first, then those of auxiliary heads. For weights of
            other classes their first ``num_classes`` rows are reordered, or the submodules are
            re-initialised by ``reset_parameters()`` of their modules. Further rows, such as
            MaskFormer's no-object class, keep their place.
        auxiliary_paths: Paths of the submodules that only :meth:`training_loss` uses, also of those
            that this network was built without. If it lacks one that weights hold, its tensors are
            left out.
        takes_criterion: Whether :meth:`training_loss` uses its ``criterion``. If not, the task
            refuses a configured loss.
        publication: Authors, title, venue and address of the paper, for model cards; empty if there
            is none.

    What the contract asks of a network's encoder is by default answered by its children that are
    :class:`Encoder`.
    """

    num_classes: int
    output: Output = "logits"
    classifier_paths: tuple[str, ...] = ()
    auxiliary_paths: tuple[str, ...] = ()
    takes_criterion: bool = True
    publication: str = ""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return class maps (B, num_classes, h, w) of images (B, in_channels, H, W).

        They have the network's own stride. The loss and inference upsample them to pixels.
        """

    @abstractmethod
    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return named intermediate maps (B, C_i, H_i, W_i) of images (B, in_channels, H, W).

        They are ordered from the image to the classifier, and the last one is the classifier's
        input. Effective receptive fields are measured on their units.
        """

    def training_loss(
        self, images: Tensor, target: Tensor, criterion: Criterion, ignore_index: int
    ) -> Tensor:
        """Return the training loss, a scalar.

        Args:
            images: Normalised images, (B, in_channels, H, W).
            target: Class indices, (B, H, W) int64.
            criterion: The configured loss. A network with auxiliary heads applies it to the output
                of each head.
            ignore_index: Class index of the pixels that do not contribute to the loss.
        """
        return criterion(self(images), target, ignore_index)

    def _encoders(self) -> list[tuple[str, Encoder]]:
        children = self.named_children()
        return [(f"{name}.", child) for name, child in children if isinstance(child, Encoder)]

    def parts(self) -> dict[str, str]:
        """Return the children that have parameters, encoders divided into their own parts."""
        encoders, parts = dict(self._encoders()), dict[str, str]()
        for name, child in self.named_children():
            if encoder := encoders.get(f"{name}."):
                parts |= {part: f"{name}.{path}" for part, path in encoder.parts().items()}
            elif any(True for _ in child.parameters()):
                parts[name] = name
        return parts

    def layer_ids(self) -> dict[str, int]:
        """Return the layers of the encoder's parameters. All other parameters are the head.

        Raises:
            UserError: The encoder leaves out some of its parameters.
        """
        layers: dict[str, int] = {}
        for path, encoder in self._encoders():
            of_encoder = encoder.layer_ids()
            _check_complete(encoder, of_encoder, dict(encoder.named_parameters()))
            layers |= {path + name: layer for name, layer in of_encoder.items()}
        return layers

    def encoder_parameters(self) -> set[str]:
        """Return the names of the encoder's parameters; those in `layer_ids()` if there is none.

        Other parameters may have a layer too, but a file of a backbone does not hold them.
        """
        names = {
            path + name
            for path, encoder in self._encoders()
            for name, _ in encoder.named_parameters()
        }
        return names or super().encoder_parameters()

    def no_weight_decay(self) -> set[str]:
        """Return those of the encoder."""
        return {
            path + name for path, encoder in self._encoders() for name in encoder.no_weight_decay()
        }

    def fold(self) -> None:
        """Fold this network and its encoders, in place; see :meth:`Network.fold`."""
        super().fold()
        for _, encoder in self._encoders():
            encoder.fold()

    def weight_constants(self) -> dict[str, float]:
        return {
            name: value
            for _, encoder in self._encoders()
            for name, value in encoder.weight_constants().items()
        }

    def set_weight_constants(self, constants: Mapping[str, float]) -> None:
        if not (encoders := self._encoders()):
            super().set_weight_constants(constants)
        for _, encoder in encoders:
            encoder.set_weight_constants(constants)


def check_segmenter(network: Any) -> None:
    """Check the parts of the contract that Python does not check when a network is built.

    Raises:
        UserError: The network is no :class:`Segmenter`, or one of its attributes or ``init_args()``
            is missing or of another kind.
    """
    name = type(network).__name__
    if not isinstance(network, Segmenter):
        raise UserError(
            f"the network is a {name}, which does not inherit from {Segmenter.__module__}."
            f"{Segmenter.__name__}; make that its base class"
        )
    for attribute in ("in_channels", "num_classes", "min_size"):
        value = getattr(network, attribute, None)
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"the network's {attribute} is {value}; let the constructor of {name} set it to an "
                "integer of at least 1"
            )
    if network.output not in get_args(Output):
        raise UserError(
            f"the network's output is {network.output!r}; let {name} choose one of "
            f"{', '.join(get_args(Output))}"
        )
    if not isinstance(network.init_args(), Mapping):
        raise UserError(
            f"init_args() of {name} returns a {type(network.init_args()).__name__}; let it return "
            "a dict of the constructor's arguments"
        )
    for attribute in ("classifier_paths", "auxiliary_paths"):
        paths = getattr(network, attribute)
        if not isinstance(paths, tuple) or not all(isinstance(path, str) for path in paths):
            raise UserError(
                f"the network's {attribute} are {paths!r}; let {name} set them to a tuple of paths"
            )
    _check_classifiers(network)
    _check_layers(network)


def _check_layers(network: Segmenter) -> None:
    layers = network.layer_ids()
    for path, module in network.named_modules():
        if isinstance(module, Encoder):
            names = [name for name, _ in module.named_parameters()]
            _check_complete(module, module.layer_ids(), names)
            _check_complete(network, layers, [f"{path}.{name}" for name in names])


def _check_complete(owner: Network, layers: Mapping[str, int], names: Iterable[str]) -> None:
    """Check that these parameters of an encoder have a layer.

    Raises:
        UserError: Some have none, so that they would train at the head's learning rate.
    """
    if missing := sorted(set(names) - layers.keys()):
        raise UserError(
            f"{type(owner).__name__}.layer_ids() leaves out {counted(len(missing), 'parameter')}, "
            "such as "
            f"{missing[0]}, which would train at the head's learning rate; give every parameter of "
            "an encoder a layer"
        )


def _check_classifiers(network: Segmenter) -> None:
    name, paths = type(network).__name__, network.classifier_paths
    modules = dict(network.named_modules())
    for path in paths:
        if path not in modules:
            raise UserError(
                f"the network's classifier_paths name {path!r}, and {name} has no such submodule; "
                "correct the path, or leave it out"
            )
        for key, tensor in modules[path].named_parameters():
            if not tensor.ndim or len(tensor) < network.num_classes:
                raise UserError(
                    f"the network's classifier_paths name {path!r}, whose {key} has no row for "
                    f"each of the {network.num_classes} classes; let {name} name only submodules "
                    "whose parameters have the classes as their first dimension"
                )
