"""The files that a graph is written to, one target each: how to write, run and describe them.

==============  ===============  ==================================  ====================
target          file             description is stored in            batch
==============  ===============  ==================================  ====================
torch-export    ``.pt2``         extra file ``segformer_pl.json``    one image
onnx            ``.onnx``        ``metadata_props``                  any number of images
openvino        ``.xml, .bin``   ``rt_info``, ``segformer_pl``       any number of images
aoti            ``.pt2``         package metadata                    one image
==============  ===============  ==================================  ====================

Every value of a description is JSON. torch's own targets take one image, because a graph of torch
is bound to a memory layout, and that of a channels-last batch depends on whether it has one image.
"""

import importlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from segformer_pl.errors import UserError, brief

OPSET = 18  # of ONNX, the oldest that torch writes without conversion
DESCRIPTION = "segformer_pl"  # where the description is stored, if it is one entry

Description = Mapping[str, str]


class OpenedGraph(NamedTuple):
    """A graph that was read from a file.

    Attributes:
        run: Function from the graph's input to its output, on the CPU.
        description: What the file states, name -> JSON.
    """

    run: Callable[[Tensor], Tensor]
    description: dict[str, str]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        suffixes: Suffixes of the files, the main one first.
        packages: Packages that it needs besides torch.
        any_batch: Whether its graph takes any number of images.
        write: Function (graph, path of the main file, description) that writes the files.
        open: Function that reads them.
        antialiases: Whether its runtime resizes with antialiasing as torch does.
    """

    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    any_batch: bool
    write: Callable[[ExportedProgram, Path, Description], None]
    open: Callable[[Path], OpenedGraph]
    antialiases: bool = True

    def check_packages(self, option: str) -> None:
        """Check that the packages are installed.

        Args:
            option: Option that chose the target, for the message.

        Raises:
            UserError: One is missing.
        """
        for name in self.packages:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(
                    f"{option} needs the package {name}, which cannot be imported "
                    f"({brief(error)}); install it with pip install 'segformer_pl[export]'"
                ) from error


def _write_torch_export(program: ExportedProgram, file: Path, description: Description) -> None:
    extra = {f"{DESCRIPTION}.json": json.dumps(dict(description))}
    torch.export.save(program, file, extra_files=extra)


def _open_torch_export(file: Path) -> OpenedGraph:
    extra = {f"{DESCRIPTION}.json": ""}
    module = torch.export.load(file, extra_files=extra).module()
    return OpenedGraph(module, json.loads(extra[f"{DESCRIPTION}.json"]))


def _write_onnx(program: ExportedProgram, file: Path, description: Description) -> None:
    (name,) = program.graph_signature.user_inputs
    images = next(node for node in program.graph.nodes if node.name == name).meta["val"]
    is_whole = images.dtype == torch.uint8
    names = ("batch", *(("height", "width", "") if is_whole else ("", "height", "width")))
    free = {dim: names[dim] for dim, size in enumerate(images.shape) if not isinstance(size, int)}
    # It reports every operator that it does not fold.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    converted = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["classes" if is_whole else "class_maps"],
        opset_version=OPSET,
        dynamic_shapes=(free,),
        verbose=False,
    )
    assert converted is not None
    converted.model.metadata_props.update(description)
    converted.save(file, external_data=False)


def _open_onnx(file: Path) -> OpenedGraph:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(images: Tensor) -> Tensor:
        (result,) = session.run(None, {given.name: images.numpy()})
        return torch.from_numpy(result)

    return OpenedGraph(run, dict(session.get_modelmeta().custom_metadata_map))


def _write_openvino(program: ExportedProgram, file: Path, description: Description) -> None:
    openvino = importlib.import_module("openvino")
    onnx_file = file.with_suffix(".onnx")
    _write_onnx(program, onnx_file, {})
    model = openvino.Core().read_model(onnx_file)
    for name, value in description.items():
        model.set_rt_info(value, [DESCRIPTION, name])
    openvino.save_model(model, file, compress_to_fp16=False)
    del model  # it may read weights from the file
    onnx_file.unlink()


def _open_openvino(file: Path) -> OpenedGraph:
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    model = core.read_model(file)
    stored = model.get_rt_info()[DESCRIPTION]
    # On some processors OpenVINO computes in bfloat16 by default.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return OpenedGraph(run, {name: value.astype(str) for name, value in stored.items()})


def _write_aoti(program: ExportedProgram, file: Path, description: Description) -> None:
    settings = {"aot_inductor.metadata": dict(description)}
    inductor = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)


def _open_aoti(file: Path) -> OpenedGraph:
    model = importlib.import_module("torch._inductor").aoti_load_package(str(file))
    # torch adds entries of its own, such as AOTI_DEVICE_KEY.
    stated = model.get_metadata().items()
    return OpenedGraph(model, {name: text for name, text in stated if not name.startswith("AOTI")})


TARGETS = {
    "torch-export": Target((".pt2",), (), False, _write_torch_export, _open_torch_export),
    "onnx": Target(
        (".onnx",), ("onnx", "onnxscript", "onnxruntime"), True, _write_onnx, _open_onnx
    ),
    "openvino": Target(
        (".xml", ".bin"),
        ("onnx", "onnxscript", "openvino"),
        True,
        _write_openvino,
        _open_openvino,
        antialiases=False,  # OpenVINO 2026.4 ignores `antialias` of ONNX's Resize
    ),
    "aoti": Target((".pt2",), (), False, _write_aoti, _open_aoti),
}
