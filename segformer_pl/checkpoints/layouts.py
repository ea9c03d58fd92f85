"""Key names of the published SegFormers, as tables that translate between them.

Every code base names and packs the tensors of the same network in its own way. A :class:`Layout`
is the table of one code base. Its left column holds the code base's module paths, its right column
the *canonical* paths. Canonical keys are our own, with one exception: our joint key/value
projection ``attn.kv`` is split into ``attn.k`` and ``attn.v``, because some layouts store the two
apart and others together with the query. Any layout translates to any other through the canonical
keys. In the first block of the first stage, leaving out ``.weight``::

    NVlabs             canonical                          transformers (on disk)
    block1.0.attn.q    encoder.stages.0.blocks.0.attn.q   block.0.0.attention.self.query
    block1.0.attn.kv   encoder.stages.0.blocks.0.attn.k   block.0.0.attention.self.key
      (k, then v)      encoder.stages.0.blocks.0.attn.v   block.0.0.attention.self.value

A row with several canonical paths holds their tensors concatenated along the first dimension.

Placeholders of the tables: ``{s}`` is the stage counted from 0, ``{i}`` the stage counted from 1,
``{r}`` the stage counted down from 3, ``{b}`` the block, ``{p}`` a parameter or buffer (``weight``,
``running_mean``, ...). A path without ``{p}`` is completed by ``.{p}``.

Sources, for their key names only: NVlabs/SegFormer @65fa8cf; transformers 4.x (on disk) and 5.23
(in memory); mmsegmentation 0.20 to 1.2.2; segmentation_models_pytorch 0.6.0.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

KeyTable = Mapping[str, tuple[str, ...]]

# LayerNorm epsilons that each code base computes with, whatever its weights were trained with.
REFERENCE_EPS = {"norm_eps": 1e-6, "conv_norm_eps": 1e-5}
# transformers never reads its config.layer_norm_eps.
TRANSFORMERS_EPS = {"norm_eps": 1e-5, "conv_norm_eps": 1e-5}
MMSEG_EPS = {"norm_eps": 1e-6, "conv_norm_eps": 1e-6}


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Layout:
    """The key names of one code base.

    Attributes:
        name: Name for messages and reports.
        anchor: Key of the encoder's first tensor, by which the layout is detected.
        encoder_prefixes: Possible prefix of the encoder's keys -> what a file with this prefix
            holds. The first one is that of a whole segmenter.
        encoder: Paths inside its encoder -> canonical paths inside ours.
        head: Paths at its top level -> canonical paths at our top level. Empty if its head is a
            different network from ours.
        constants: LayerNorm epsilons that this code base computes with, by the names of
            :meth:`segformer_pl.models.segmenter.Network.weight_constants`. Empty: not fixed.
        dropped: Pattern of keys that are left out on purpose -> reason.
        other_head: Pattern of the keys of a head that is a different network from ours.
        open: Whether keys that are in no row are canonical already.
    """

    name: str
    anchor: str
    encoder_prefixes: Mapping[str, str]
    encoder: KeyTable
    head: KeyTable
    constants: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    other_head: str | None = None
    open: bool = False


_NVLABS_ENCODER = {
    "patch_embed{i}.proj": ("stages.{s}.patch_embed.proj",),
    "patch_embed{i}.norm": ("stages.{s}.patch_embed.norm",),
    "block{i}.{b}.norm1": ("stages.{s}.blocks.{b}.norm1",),
    "block{i}.{b}.attn.q": ("stages.{s}.blocks.{b}.attn.q",),
    "block{i}.{b}.attn.kv": ("stages.{s}.blocks.{b}.attn.k", "stages.{s}.blocks.{b}.attn.v"),
    "block{i}.{b}.attn.proj": ("stages.{s}.blocks.{b}.attn.proj",),
    "block{i}.{b}.attn.sr": ("stages.{s}.blocks.{b}.attn.sr",),
    "block{i}.{b}.attn.norm": ("stages.{s}.blocks.{b}.attn.norm",),
    "block{i}.{b}.norm2": ("stages.{s}.blocks.{b}.norm2",),
    "block{i}.{b}.mlp.fc1": ("stages.{s}.blocks.{b}.mlp.fc1",),
    "block{i}.{b}.mlp.dwconv.dwconv": ("stages.{s}.blocks.{b}.mlp.dwconv",),
    "block{i}.{b}.mlp.fc2": ("stages.{s}.blocks.{b}.mlp.fc2",),
    "norm{i}": ("stages.{s}.norm",),
}

NATIVE = Layout(
    name="segformer_pl",
    anchor="stages.0.patch_embed.proj.weight",
    encoder_prefixes={"encoder.": "segmenter", "": "encoder"},
    encoder={
        "stages.{s}.blocks.{b}.attn.kv": (
            "stages.{s}.blocks.{b}.attn.k",
            "stages.{s}.blocks.{b}.attn.v",
        ),
    },
    head={},
    open=True,
)

NVLABS = Layout(
    name="NVlabs",
    anchor="patch_embed1.proj.weight",
    encoder_prefixes={"backbone.": "segmenter", "": "backbone"},
    encoder=_NVLABS_ENCODER,
    head={
        "decode_head.linear_c{i}.proj": ("head.projections.{s}",),
        "decode_head.linear_fuse.conv": ("head.fuse",),
        "decode_head.linear_fuse.bn": ("head.bn",),
        "decode_head.linear_pred": ("head.classifier",),
    },
    constants=REFERENCE_EPS,
    dropped={
        r"head\.(weight|bias)": "the classification head of the ImageNet training",
        r"decode_head\.conv_seg\.(weight|bias)": "built by the reference code and never used",
    },
    other_head=r"decode_head\..*",  # DAFormer's, for one
)

TRANSFORMERS_DISK = Layout(
    name="transformers",
    anchor="patch_embeddings.0.proj.weight",
    encoder_prefixes={"segformer.encoder.": "segmenter", "encoder.": "encoder", "": "encoder"},
    encoder={
        "patch_embeddings.{s}.proj": ("stages.{s}.patch_embed.proj",),
        "patch_embeddings.{s}.layer_norm": ("stages.{s}.patch_embed.norm",),
        "block.{s}.{b}.layer_norm_1": ("stages.{s}.blocks.{b}.norm1",),
        "block.{s}.{b}.attention.self.query": ("stages.{s}.blocks.{b}.attn.q",),
        "block.{s}.{b}.attention.self.key": ("stages.{s}.blocks.{b}.attn.k",),
        "block.{s}.{b}.attention.self.value": ("stages.{s}.blocks.{b}.attn.v",),
        "block.{s}.{b}.attention.output.dense": ("stages.{s}.blocks.{b}.attn.proj",),
        "block.{s}.{b}.attention.self.sr": ("stages.{s}.blocks.{b}.attn.sr",),
        "block.{s}.{b}.attention.self.layer_norm": ("stages.{s}.blocks.{b}.attn.norm",),
        "block.{s}.{b}.layer_norm_2": ("stages.{s}.blocks.{b}.norm2",),
        "block.{s}.{b}.mlp.dense1": ("stages.{s}.blocks.{b}.mlp.fc1",),
        "block.{s}.{b}.mlp.dwconv.dwconv": ("stages.{s}.blocks.{b}.mlp.dwconv",),
        "block.{s}.{b}.mlp.dense2": ("stages.{s}.blocks.{b}.mlp.fc2",),
        "layer_norm.{s}": ("stages.{s}.norm",),
    },
    head={
        "decode_head.linear_c.{s}.proj": ("head.projections.{s}",),
        "decode_head.linear_fuse": ("head.fuse",),
        "decode_head.batch_norm": ("head.bn",),
        "decode_head.classifier": ("head.classifier",),
    },
    constants=TRANSFORMERS_EPS,
    dropped={r"classifier\.(weight|bias)": "the classification head of the ImageNet training"},
)

# save_pretrained writes the keys of version 4 above, and from_pretrained reads them. The keys below
# appear only in state_dict().
TRANSFORMERS_MEMORY = Layout(
    name="transformers (keys in memory)",
    anchor="stages.0.patch_embeddings.proj.weight",
    encoder_prefixes={"segformer.": "segmenter", "": "encoder"},
    encoder={
        "stages.{s}.patch_embeddings.proj": ("stages.{s}.patch_embed.proj",),
        "stages.{s}.patch_embeddings.layer_norm": ("stages.{s}.patch_embed.norm",),
        "stages.{s}.blocks.{b}.layernorm_before": ("stages.{s}.blocks.{b}.norm1",),
        "stages.{s}.blocks.{b}.attention.q_proj": ("stages.{s}.blocks.{b}.attn.q",),
        "stages.{s}.blocks.{b}.attention.k_proj": ("stages.{s}.blocks.{b}.attn.k",),
        "stages.{s}.blocks.{b}.attention.v_proj": ("stages.{s}.blocks.{b}.attn.v",),
        "stages.{s}.blocks.{b}.attention.o_proj": ("stages.{s}.blocks.{b}.attn.proj",),
        "stages.{s}.blocks.{b}.attention.sequence_reduction.sequence_reduction": (
            "stages.{s}.blocks.{b}.attn.sr",
        ),
        "stages.{s}.blocks.{b}.attention.sequence_reduction.layer_norm": (
            "stages.{s}.blocks.{b}.attn.norm",
        ),
        "stages.{s}.blocks.{b}.layernorm_after": ("stages.{s}.blocks.{b}.norm2",),
        "stages.{s}.blocks.{b}.mlp.fc1": ("stages.{s}.blocks.{b}.mlp.fc1",),
        "stages.{s}.blocks.{b}.mlp.dwconv.dwconv": ("stages.{s}.blocks.{b}.mlp.dwconv",),
        "stages.{s}.blocks.{b}.mlp.fc2": ("stages.{s}.blocks.{b}.mlp.fc2",),
        "stages.{s}.layer_norm": ("stages.{s}.norm",),
    },
    head={
        "decode_head.linear_projections.{s}.proj": ("head.projections.{s}",),
        "decode_head.linear_fuse": ("head.fuse",),
        "decode_head.batch_norm": ("head.bn",),
        "decode_head.classifier": ("head.classifier",),
    },
    constants=TRANSFORMERS_EPS,
    dropped={r"classifier\.(weight|bias)": "the classification head of the ImageNet training"},
)

MMSEG = Layout(
    name="mmsegmentation",
    anchor="layers.0.0.projection.weight",
    encoder_prefixes={"backbone.": "segmenter", "": "backbone"},
    encoder={
        "layers.{s}.0.projection": ("stages.{s}.patch_embed.proj",),
        "layers.{s}.0.norm": ("stages.{s}.patch_embed.norm",),
        "layers.{s}.1.{b}.norm1": ("stages.{s}.blocks.{b}.norm1",),
        "layers.{s}.1.{b}.attn.attn.in_proj_{p}": (
            "stages.{s}.blocks.{b}.attn.q",
            "stages.{s}.blocks.{b}.attn.k",
            "stages.{s}.blocks.{b}.attn.v",
        ),
        "layers.{s}.1.{b}.attn.attn.out_proj": ("stages.{s}.blocks.{b}.attn.proj",),
        "layers.{s}.1.{b}.attn.sr": ("stages.{s}.blocks.{b}.attn.sr",),
        "layers.{s}.1.{b}.attn.norm": ("stages.{s}.blocks.{b}.attn.norm",),
        "layers.{s}.1.{b}.norm2": ("stages.{s}.blocks.{b}.norm2",),
        # mmsegmentation stores these as 1x1 convolutions, see to_canonical.
        "layers.{s}.1.{b}.ffn.layers.0": ("stages.{s}.blocks.{b}.mlp.fc1",),
        "layers.{s}.1.{b}.ffn.layers.1": ("stages.{s}.blocks.{b}.mlp.dwconv",),
        "layers.{s}.1.{b}.ffn.layers.4": ("stages.{s}.blocks.{b}.mlp.fc2",),
        "layers.{s}.2": ("stages.{s}.norm",),
    },
    head={},
    constants=MMSEG_EPS,
    # BatchNorm and ReLU on every projection, and the stages in the other order
    other_head=r"decode_head\..*",
)

SMP = Layout(
    name="segmentation_models_pytorch",
    anchor=NVLABS.anchor,
    encoder_prefixes={"encoder.": "segmenter"},
    encoder=_NVLABS_ENCODER,
    head={
        "decoder.mlp_stage.{r}.linear": ("head.projections.{s}",),
        "decoder.fuse_stage.0": ("head.fuse",),
        "decoder.fuse_stage.1": ("head.bn",),
        "segmentation_head.0": ("head.classifier",),
    },
    constants=REFERENCE_EPS,
)

KNOWN_LAYOUTS = (NATIVE, NVLABS, TRANSFORMERS_DISK, TRANSFORMERS_MEMORY, MMSEG, SMP)


def detect(keys: Mapping[str, object]) -> tuple[Layout, str, str] | None:
    """Detect the layout of a state dict from its keys.

    ::

        module.backbone.patch_embed1.proj.weight
        wrapper
               prefix ("backbone.": a segmenter)
                        anchor of NVLABS

    Returns:
        Layout, prefix of the encoder's keys, and wrapper: the prefix of the whole network
        (``"module."``, ``"network."``, usually ``""``). None if no layout fits.
    """
    candidates = [
        (len(prefix), layout, prefix, key.removesuffix(prefix + layout.anchor))
        for layout in KNOWN_LAYOUTS
        for prefix in layout.encoder_prefixes
        for key in keys
        if key.endswith(prefix + layout.anchor)
    ]
    # A wrapper is a chain of attributes: "module.", but not the "my_" of "my_patch_embed1".
    candidates = [c for c in candidates if c[3] == "" or c[3].endswith(".")]
    if not candidates:
        return None
    # The longest prefix explains most of the key: "backbone." belongs to a segmenter and is no
    # wrapper.
    _, layout, prefix, wrapper = max(candidates, key=lambda c: (c[0], -len(c[3])))
    return layout, prefix, wrapper


def to_canonical(
    layout: Layout, prefix: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Translate a state dict of a layout to canonical keys, splitting joint projections.

    Args:
        layout: Layout of the state dict.
        prefix: Prefix of the encoder's keys, one of ``layout.encoder_prefixes``.
        tensors: The state dict.

    Returns:
        Tensors by canonical key; keys that were dropped on purpose -> reason; keys that the layout
        does not have.
    """
    canonical: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if targets := _canonical_keys(layout, prefix, key):
            chunks = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
            for target, chunk in zip(targets, chunks):
                # A 1x1 convolution, as in mmsegmentation, becomes a Linear layer.
                is_pointwise = target.endswith(("mlp.fc1.weight", "mlp.fc2.weight"))
                canonical[target] = chunk.flatten(1) if is_pointwise else chunk
        elif reason := _first_match(layout.dropped, key):
            dropped[key] = reason
        else:
            unknown.append(key)
    return canonical, dropped, unknown


def from_canonical(
    layout: Layout, prefix: str, canonical: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Translate tensors with canonical keys to a state dict of a layout.

    Args:
        layout: Layout of the result.
        prefix: Prefix of the encoder's keys, one of ``layout.encoder_prefixes``.
        canonical: Tensors by canonical key.

    Returns:
        The state dict; canonical keys that the layout cannot express.
    """
    chunks: dict[str, dict[int, Tensor]] = {}
    inexpressible = []
    for source, tensor in canonical.items():
        for pattern, template, index in _patterns(layout, prefix)[1]:
            if variables := _match(pattern, source):
                chunks.setdefault(_fill(template, variables), {})[index] = tensor
                break
        else:
            if layout.open:
                chunks[source.removeprefix("" if prefix else "encoder.")] = {0: tensor}
            else:
                inexpressible.append(source)
    joined = {
        key: torch.cat([pieces[index] for index in sorted(pieces)])
        if len(pieces) > 1
        else pieces[0]
        for key, pieces in chunks.items()
    }
    return joined, inexpressible


def _canonical_keys(layout: Layout, prefix: str, key: str) -> list[str]:
    for pattern, templates in _patterns(layout, prefix)[0]:
        if variables := _match(pattern, key):
            return [_fill(template, variables) for template in templates]
    return [key if prefix else f"encoder.{key}"] if layout.open else []


def _first_match(reasons: Mapping[str, str], key: str) -> str | None:
    return next((why for pattern, why in reasons.items() if re.fullmatch(pattern, key)), None)


_ToCanonical = list[tuple[re.Pattern[str], tuple[str, ...]]]
_FromCanonical = list[tuple[re.Pattern[str], str, int]]


@cache
def _patterns(layout: Layout, prefix: str) -> tuple[_ToCanonical, _FromCanonical]:
    """Compile the table of a layout in both directions.

    Returns:
        (pattern of the layout's key, canonical templates) of every row; and (pattern of a canonical
        key, the layout's template, index among the row's chunks) of every canonical path.
    """
    table = dict(_templates(layout, prefix))
    forward = [(_pattern(template), targets) for template, targets in table.items()]
    backward = [
        (_pattern(target), template, index)
        for template, targets in table.items()
        for index, target in enumerate(targets)
    ]
    return forward, backward


def _templates(layout: Layout, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the rows of a layout's table with prefixes and ``{p}`` completed."""
    encoder = {
        prefix + path: tuple(f"encoder.{target}" for target in targets)
        for path, targets in layout.encoder.items()
    }
    for path, targets in (encoder | dict(layout.head)).items():
        yield (
            path if "{p}" in path else path + ".{p}",
            tuple(target + ".{p}" for target in targets),
        )


def _pattern(template: str) -> re.Pattern[str]:
    """Compile a template: each placeholder becomes a named group."""
    for name, values in {"s": r"\d", "i": r"\d", "r": r"\d", "b": r"\d+", "p": r"\w+"}.items():
        template = template.replace(f"{{{name}}}", f"(?P<{name}>{values})")
    return re.compile(template.replace(".", r"\."))


def _match(pattern: re.Pattern[str], key: str) -> dict[str, str | int] | None:
    """Return the values of a pattern's placeholders, with ``s`` derived from ``i`` or ``r``."""
    matched = pattern.fullmatch(key)
    if matched is None:
        return None
    variables: dict[str, str | int] = dict(matched.groupdict())
    stage = {"s": 0, "i": -1, "r": 3}
    for name, offset in stage.items():
        if name in variables:
            number = int(variables[name])
            variables["s"] = offset - number if name == "r" else number + offset
    return variables


def _fill(template: str, variables: Mapping[str, str | int]) -> str:
    stage = int(variables.get("s", 0))
    return template.format_map({**variables, "s": stage, "i": stage + 1, "r": 3 - stage})
