"""The names that published SegFormers give to their tensors, and ours for the same tensors.

Every code base names and packs the same network in its own way. A :class:`Layout` is the table of
one of them: its name of a module on the left, the *parts* that it holds on the right. Parts are
our own names, except that the joint key/value projection ``attn.kv`` is two parts, ``attn.k`` and
``attn.v``: some layouts store them apart, some together with the query. A row with several parts
holds them one after the other along the first dimension. So a state dict goes from any layout to
any other through its parts.

In the tables: ``{s}`` stage counted from 0, ``{i}`` stage counted from 1, ``{r}`` stage counted
down from 3, ``{b}`` block, ``{p}`` a parameter or buffer (``weight``, ``running_mean``, ...);
``.{p}`` is understood at the end of a name that has none.

Sources, all for their key names only: NVlabs/SegFormer @65fa8cf; transformers 4.x (on disk) and
5.23 (in memory); mmsegmentation 0.20 to 1.2.2; segmentation_models_pytorch 0.6.0.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Table = Mapping[str, tuple[str, ...]]

# What each code base computes with, wherever its weights came from.
REFERENCE_EPS = {"norm_eps": 1e-6, "conv_norm_eps": 1e-5}
# Its config.layer_norm_eps is never read.
TRANSFORMERS_EPS = {"norm_eps": 1e-5, "conv_norm_eps": 1e-5}
MMSEG_EPS = {"norm_eps": 1e-6, "conv_norm_eps": 1e-6}


@dataclass(frozen=True, eq=False)  # a layout is itself: hashed by identity
class Layout:
    """One code base's names.

    Attributes:
        name: What the user calls it.
        anchor: The encoder's first tensor, by which the layout is known.
        encoder_prefixes: What may stand before the encoder's names -> what such a file is; the
            first is that of a whole segmenter.
        encoder: Names inside its encoder -> parts inside ours.
        head: Names at its top level -> parts at our top level. Empty if its head is another
            network.
        constants: The LayerNorm epsilons that this code base computes with, under the names of
            :meth:`segformer_pl.models.segmenter.Network.weight_constants`. Empty: not fixed.
        dropped: Pattern of names that are left out on purpose -> why.
        other_head: Pattern of the names of a head that is another network than ours.
        open: Names that are in no row are parts themselves.
    """

    name: str
    anchor: str
    encoder_prefixes: Mapping[str, str]
    encoder: Table
    head: Table
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
)

TRANSFORMERS_DISK = Layout(
    name="transformers (names on disk)",
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

# save_pretrained writes, and from_pretrained reads, the names of version 4 above; only
# state_dict() shows these.
TRANSFORMERS_MEMORY = Layout(
    name="transformers (names in memory)",
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
        # 1x1 convolutions there, see to_parts
        "layers.{s}.1.{b}.ffn.layers.0": ("stages.{s}.blocks.{b}.mlp.fc1",),
        "layers.{s}.1.{b}.ffn.layers.1": ("stages.{s}.blocks.{b}.mlp.dwconv",),
        "layers.{s}.1.{b}.ffn.layers.4": ("stages.{s}.blocks.{b}.mlp.fc2",),
        "layers.{s}.2": ("stages.{s}.norm",),
    },
    head={},
    constants=MMSEG_EPS,
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

LAYOUTS = (NATIVE, NVLABS, TRANSFORMERS_DISK, TRANSFORMERS_MEMORY, MMSEG, SMP)


def detect(names: Mapping[str, object]) -> tuple[Layout, str, str] | None:
    """Find out whose names these are.

    Returns:
        Layout, encoder prefix, and what wraps the whole network (``"module."``, ``"network."``,
        usually nothing), or None if no layout fits.
    """
    candidates = [
        (len(prefix), layout, prefix, name.removesuffix(prefix + layout.anchor))
        for layout in LAYOUTS
        for prefix in layout.encoder_prefixes
        for name in names
        if name.endswith(prefix + layout.anchor)
    ]
    # A wrapper is a chain of attributes: "module.", not "xpatch_embed1". The longest prefix is
    # the one that explains most of the name: "backbone." is a segmenter's, not a wrapper.
    candidates = [c for c in candidates if c[3] == "" or c[3].endswith(".")]
    if not candidates:
        return None
    _, layout, prefix, wrapper = max(candidates, key=lambda c: (c[0], -len(c[3])))
    return layout, prefix, wrapper


def to_parts(
    layout: Layout, prefix: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Split a state dict of this layout into parts.

    Returns:
        Parts; names that were dropped on purpose -> why; names that the layout does not know.
    """
    parts: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if part_names := _part_names(layout, prefix, name):
            chunks = tensor.chunk(len(part_names)) if len(part_names) > 1 else (tensor,)
            for part, chunk in zip(part_names, chunks):
                is_pointwise = part.endswith(("mlp.fc1.weight", "mlp.fc2.weight"))
                parts[part] = chunk.flatten(1) if is_pointwise else chunk
        elif reason := _first_match(layout.dropped, name):
            dropped[name] = reason
        else:
            unknown.append(name)
    return parts, dropped, unknown


def from_parts(
    layout: Layout, prefix: str, parts: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Join parts to a state dict of this layout.

    Returns:
        The state dict; the parts that the layout has no name for.
    """
    chunks: dict[str, dict[int, Tensor]] = {}
    homeless = []
    for part, tensor in parts.items():
        for pattern, template, place in _patterns(layout, prefix)[1]:
            if variables := _match(pattern, part):
                chunks.setdefault(_fill(template, variables), {})[place] = tensor
                break
        else:
            if layout.open:
                chunks[part.removeprefix("" if prefix else "encoder.")] = {0: tensor}
            else:
                homeless.append(part)
    joined = {
        name: torch.cat([pieces[place] for place in sorted(pieces)])
        if len(pieces) > 1
        else pieces[0]
        for name, pieces in chunks.items()
    }
    return joined, homeless


def _part_names(layout: Layout, prefix: str, name: str) -> list[str]:
    for pattern, templates in _patterns(layout, prefix)[0]:
        if variables := _match(pattern, name):
            return [_fill(template, variables) for template in templates]
    return [name if prefix else f"encoder.{name}"] if layout.open else []


def _first_match(reasons: Mapping[str, str], name: str) -> str | None:
    return next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)


Rows = list[tuple[re.Pattern[str], tuple[str, ...]]]
Columns = list[tuple[re.Pattern[str], str, int]]


@cache
def _patterns(layout: Layout, prefix: str) -> tuple[Rows, Columns]:
    """The table read from left to right, and from right to left (with the part's place)."""
    table = dict(_templates(layout, prefix))
    rows = [(_pattern(template), parts) for template, parts in table.items()]
    columns = [
        (_pattern(part), template, place)
        for template, parts in table.items()
        for place, part in enumerate(parts)
    ]
    return rows, columns


def _templates(layout: Layout, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    inside = {
        prefix + name: tuple(f"encoder.{part}" for part in parts)
        for name, parts in layout.encoder.items()
    }
    for name, parts in (inside | dict(layout.head)).items():
        yield (
            name if "{p}" in name else name + ".{p}",
            tuple(part + ".{p}" for part in parts),
        )


def _pattern(template: str) -> re.Pattern[str]:
    for name, values in {"s": r"\d", "i": r"\d", "r": r"\d", "b": r"\d+", "p": r"\w+"}.items():
        template = template.replace(f"{{{name}}}", f"(?P<{name}>{values})")
    return re.compile(template.replace(".", r"\."))


def _match(pattern: re.Pattern[str], name: str) -> dict[str, str | int] | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    variables: dict[str, str | int] = dict(found.groupdict())
    stage = {"s": 0, "i": -1, "r": 3}
    for key, offset in stage.items():
        if key in variables:
            number = int(variables[key])
            variables["s"] = offset - number if key == "r" else number + offset
    return variables


def _fill(template: str, variables: Mapping[str, str | int]) -> str:
    stage = int(variables.get("s", 0))
    return template.format_map({**variables, "s": stage, "i": stage + 1, "r": 3 - stage})
