"""Time SegFormer at equal weights: segformer_pl, transformers and segmentation_models_pytorch.

    python experiments/benchmarks/speed.py [--variants b0 b2] [--dtypes float32 bfloat16]
        [--tasks inference labels training file] [--modes eager] [--size H W] [--num_classes N]
        [--batch_size N] [--device cpu|cuda] [--threads N] [--rounds N] [--without_smp]
        [--output FILE.csv]

Question: how many times as fast is segformer_pl, with the same weights and the same outputs? Each
combination of task, data type and mode is a group. All implementations of a group are timed in
turns within one process, so that a change of load meets all of them, and the quoted speed is the
median over rounds of the ratio to transformers. Hardware: any; on two cores about a minute for each
group of B0 at 512x512 and five for B2.

Tasks, all on images of --size:

    inference  normalised images to logits of stride 4, without gradients
    labels     normalised images to a class index for every pixel, without gradients
    training   forward pass, cross-entropy at full resolution, backward pass, AdamW (fused)
    file       a JPEG file to a mask of its size: ours by Predictor, theirs by their image
               processor, network and post-processing (transformers only; batch of 1, eager)

In bfloat16 the weights of inference have that type; training uses autocast. Float32 is computed in
32 bits on a GPU, too, without TF32. Modes: eager; compile, which is torch.compile; graphs, which is
torch.compile with CUDA graphs ("reduce-overhead").

An implementation is timed only after its logits (in training, its loss; for a file, its mask) have
been compared: with those of transformers in float32, eager, or for smp, whose weights are its own,
with those of its own network, whose logits are compared with ours beforehand. If they differ by
more than 1e-4 (float32) or 5e-2 (bfloat16) of the largest value, or masks in more than 0.1 % of the
pixels, the group is named and not timed, and the exit status is 1.

Groups whose rows are in the file of --output already are left out, so that the same command goes on
where it was stopped.
"""

import argparse
import copy
import csv
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from tqdm import tqdm

from segformer_pl.checkpoints import load_weights
from segformer_pl.errors import UserError
from segformer_pl.inference import Predictor, predict_classes
from segformer_pl.losses import CrossEntropy
from segformer_pl.models import segformer
from segformer_pl.models.mit_block import NormEps

IGNORED = 255
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
LEAST_AGREEMENT = 0.999  # of the pixels of a mask
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compile": {},
    "graphs": {"mode": "reduce-overhead"},
}
# Calls before the first timed one; those of compiled networks compile, tune and record graphs.
WARM_UPS = {"eager": 1, "compile": 3, "graphs": 3}
GROUP = ("device", "variant", "task", "dtype", "mode", "batch", "height", "width", "classes")
Call = Callable[[], Any]


class Subject:
    """A library's network, and what its user calls for logits, labels and loss."""

    name: str
    network: nn.Module

    def compile(self, **options: Any) -> None:
        self.network.compile(**options)

    def logits(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def labels(self, images: Tensor) -> Tensor:
        full = F.interpolate(self.logits(images), images.shape[2:], mode="bilinear")
        return full.argmax(dim=1)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        full = F.interpolate(self.logits(images), target.shape[1:], mode="bilinear")
        return F.cross_entropy(full, target, ignore_index=IGNORED)


class Ours(Subject):
    def __init__(self, network: nn.Module) -> None:
        self.name, self.network, self.criterion = "segformer_pl", network, CrossEntropy("valid")

    def logits(self, images: Tensor) -> Tensor:
        return self.network(images)

    def labels(self, images: Tensor) -> Tensor:
        return predict_classes(self.network, images, (images.shape[2], images.shape[3]))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.network(images), target, IGNORED)


class Transformers(Subject):
    def __init__(self, network: nn.Module) -> None:
        self.name, self.network = "transformers", network

    def logits(self, images: Tensor) -> Tensor:
        return self.network(images).logits

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        return self.network(images, labels=target).loss


class Smp(Subject):
    """smp's network upsamples its logits itself, to the size of the images."""

    def __init__(self, network: nn.Module) -> None:
        self.name, self.network = "smp", network

    def compile(self, **options: Any) -> None:
        # ``logits`` calls the parts and not the network.
        for part in self.network.children():
            part.compile(**options)

    def logits(self, images: Tensor) -> Tensor:
        network = self.network
        return network.segmentation_head[0](network.decoder(network.encoder(images)))

    def labels(self, images: Tensor) -> Tensor:
        return self.network(images).argmax(dim=1)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), target, ignore_index=IGNORED)


def build(variant: str, num_classes: int, with_smp: bool) -> list[Subject]:
    """Return our network and its rivals, with the same weights, in float32 on the CPU."""
    ours = getattr(segformer, f"segformer_{variant}")(num_classes, drop_path_rate=0.0, dropout=0.0)
    arguments = ours.init_args()
    depths = arguments["encoder"]["init_args"]["depths"]
    embed_dims = arguments["encoder"]["init_args"]["embed_dims"]
    theirs = build_transformers(embed_dims, depths, arguments["decoder_dim"], num_classes)
    load_weights(ours, theirs.state_dict())
    ours.eval()
    subjects: list[Subject] = [Ours(ours), Transformers(theirs)]
    if with_smp:
        network = build_smp(variant, arguments["decoder_dim"], num_classes)
        twin = copy.deepcopy(ours)
        twin.encoder.norm_eps = NormEps(0.5, 0.5)  # smp's epsilons are read from its network
        load_weights(twin, network.state_dict())
        images = torch.randn(1, 3, 128, 128)
        with torch.no_grad():
            check(Smp(network).logits(images), twin.eval()(images), "float32", f"smp, {variant}")
        subjects.append(Smp(network))
    return subjects


def build_transformers(
    embed_dims: Sequence[int], depths: Sequence[int], decoder_dim: int, num_classes: int
) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=list(embed_dims),
        depths=list(depths),
        decoder_hidden_size=decoder_dim,
        num_labels=num_classes,
        semantic_loss_ignore_index=IGNORED,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    return randomize_statistics(SegformerForSemanticSegmentation(config)).eval()


def build_smp(variant: str, decoder_dim: int, num_classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    network = smp.Segformer(
        f"mit_{variant}",
        encoder_weights=None,
        decoder_segmentation_channels=decoder_dim,
        classes=num_classes,
    )
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return randomize_statistics(network).eval()


def randomize_statistics(network: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that are not those of an untrained network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return network


def check(result: Tensor, expected: Tensor, dtype: str, what: str) -> None:
    """Check that two outputs differ by no more than their data type explains.

    Raises:
        UserError: They differ by more, or one of them is nan.
    """
    difference = (result.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not difference <= TOLERANCE[dtype]:
        raise UserError(f"{what}: the outputs differ by {difference:.1e} of the largest value")


def check_labels(result: Any, expected: Any, what: str) -> None:
    """Check that two masks agree.

    Raises:
        UserError: They differ in more than 0.1 % of the pixels.
    """
    agreement = float((result == expected).mean())
    if agreement < LEAST_AGREEMENT:
        raise UserError(f"{what}: {agreement:.2%} of the pixels agree")


def on_device(subject: Subject, device: torch.device, dtype: torch.dtype, mode: str) -> Subject:
    """Return a copy in evaluation mode that is compiled when it is called, in some modes."""
    copied = type(subject)(copy.deepcopy(subject.network).to(device, dtype).eval())
    if (options := MODES[mode]) is not None:
        copied.compile(**options)
    return copied


def inference(
    subject: Subject, reference: Subject, task: str, dtype: str, mode: str, images: Tensor
) -> Call:
    """Return the call to be timed, after its output has been compared with the reference's."""
    measured = on_device(subject, images.device, getattr(torch, dtype), mode)
    inputs = images.to(getattr(torch, dtype))

    @torch.inference_mode()
    def call() -> Tensor:
        return measured.labels(inputs) if task == "labels" else measured.logits(inputs)

    reference = on_device(reference, images.device, torch.float32, "eager")
    what = f"{task}, {subject.name}, {dtype}, {mode}"
    with torch.inference_mode():
        check(measured.logits(inputs), reference.logits(images), dtype, what)
        if task == "labels" and dtype == "float32":  # bfloat16 decides near ties otherwise
            expected = reference.labels(images).cpu().numpy()
            check_labels(call().cpu().numpy(), expected, what)
    return call


def training(
    subject: Subject, reference: Subject, dtype: str, mode: str, images: Tensor, target: Tensor
) -> Call:
    """Return one training step as a call, after its first loss has been compared."""
    measured = on_device(subject, images.device, torch.float32, mode)  # statistics as loaded
    optimizer = torch.optim.AdamW(measured.network.parameters(), lr=1e-6, fused=True)

    def call() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = measured.loss(images, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    reference = on_device(reference, images.device, torch.float32, "eager")
    with torch.no_grad():
        expected = reference.loss(images, target)
    check(call(), expected, dtype, f"training, {subject.name}, {dtype}, {mode}")
    measured.network.train()
    return call


def from_file(subject: Subject, file: Path, num_classes: int, device: str) -> Call:
    """Return the call that makes a mask of a file, as each library documents it."""
    network = copy.deepcopy(subject.network).to(device).eval()
    if subject.name == "segformer_pl":
        predictor = Predictor(network, [f"class {n}" for n in range(num_classes)])
        return lambda: predictor(file)
    from transformers import SegformerImageProcessor

    processor = SegformerImageProcessor(do_resize=False)

    @torch.inference_mode()
    def call() -> Any:
        with Image.open(file) as image:
            image = image.convert("RGB")
            inputs = processor(image, return_tensors="pt").to(device)
            size = image.height, image.width
        outputs = network(**inputs)
        return (
            processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
            .cpu()
            .numpy()
        )

    return call


def write_image(file: Path, height: int, width: int) -> None:
    """Write a JPEG with about as many details as a photograph."""
    random = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for cells, weight in ((4, 80), (16, 40), (64, 20), (256, 10)):
        noise = random.random((cells, cells, 3))
        image = Image.fromarray((255 * noise).astype(np.uint8)).resize((width, height))
        pixels += weight / 150 * np.asarray(image)
    Image.fromarray(pixels.astype(np.uint8)).save(file, quality=90)


def peak_memory(call: Call, device: str) -> float:
    """Return the peak of torch's allocations during a call, in MB.

    On a CPU, what libraries such as oneDNN allocate for themselves is not included.
    """
    if device == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own steps
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        results = recorded.profiler.kineto_results
        sizes = (event.nbytes() for event in results.events() if event.name() == "[memory]")
        return max(accumulate(sizes), default=0) / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def time_in_turns(calls: dict[str, Call], rounds: int, threads: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each round."""
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads)
        for name, call in calls.items()
    }
    # CUDA calls of a millisecond are repeated to fill a tenth of a second.
    numbers = {
        name: max(1, min(50, round(0.1 / max(timer.timeit(2).mean, 1e-4))))
        for name, timer in timers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).mean)
    return times


def measure(group: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a group, one for each implementation.

    Raises:
        UserError: Outputs differ.
    """
    torch.manual_seed(0)
    task, dtype, mode, num_classes = (group[key] for key in ("task", "dtype", "mode", "classes"))
    height, width, batch_size = group["height"], group["width"], group["batch"]
    subjects = build(group["variant"], num_classes, not options.without_smp and task != "file")
    images = torch.randn(batch_size, 3, height, width).to(options.device)
    target = torch.randint(num_classes, (batch_size, height, width))
    target[:, :, : width // 10] = IGNORED
    target = target.to(options.device)
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.jpg")
        write_image(file, height, width)
        for subject in subjects:
            reference = subject if subject.name == "smp" else subjects[1]
            if task == "training":
                call = training(subject, reference, dtype, mode, images, target)
            elif task == "file":
                call = from_file(subject, file, num_classes, options.device)
            else:
                call = inference(subject, reference, task, dtype, mode, images)
            calls[subject.name] = call
            for _ in range(WARM_UPS[mode]):
                call()
        if task == "file":
            check_labels(calls["segformer_pl"](), calls["transformers"](), "file")
        memory = {name: peak_memory(call, options.device) for name, call in calls.items()}
        times = time_in_turns(calls, options.rounds, options.threads)
    return [
        group
        | {
            "library": name,
            "ms": 1e3 * statistics.median(seconds),
            "ms_min": 1e3 * min(seconds),
            "ms_max": 1e3 * max(seconds),
            "times_as_fast": statistics.median(
                theirs / ours for theirs, ours in zip(times["transformers"], seconds)
            ),
            "peak_mb": memory[name],
        }
        for name, seconds in times.items()
    ]


def stored_groups(file: Path) -> set[tuple[str, ...]]:
    """Return the groups of a file's rows, as text."""
    if not file.exists():
        return set()
    with file.open(newline="") as stream:
        return {tuple(row[key] for key in GROUP) for row in csv.DictReader(stream)}


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['variant']} {row['task']:9s} {row['dtype']:8s} {row['mode']:7s} "
        f"{row['library']:12s} {row['ms']:9.2f} ms ({row['ms_min']:.2f} to {row['ms_max']:.2f}), "
        f"{row['times_as_fast']:5.2f} x transformers, "
        f"peak {row['peak_mb']:,.0f} MB\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"], help="b0 to b5")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["inference", "labels", "training", "file"],
        choices=["inference", "labels", "training", "file"],
    )
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=list(MODES))
    parser.add_argument("--without_smp", action="store_true", help="compare with transformers only")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num_classes", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="CSV file, to which the rows are appended")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    height, width = options.size
    groups = [
        dict(
            zip(
                GROUP,
                (
                    *(device, variant, task, dtype, mode),
                    *(1 if task == "file" else options.batch_size, height, width),
                    options.num_classes,
                ),
            )
        )
        for variant in options.variants
        for task in options.tasks
        for dtype in options.dtypes
        for mode in options.modes
        if task != "file" or (dtype, mode) == ("float32", "eager")
    ]
    file = Path(options.output) if options.output else None
    done = set() if file is None else stored_groups(file)
    groups = [group for group in groups if tuple(map(str, group.values())) not in done]
    sys.stdout.write(
        f"batch {options.batch_size}, {options.num_classes} classes, {height}x{width}, {device}, "
        f"{options.threads} threads, torch {torch.__version__}\n"
    )
    failed = False
    for group in tqdm(groups, unit="group", leave=False):
        torch.compiler.reset()
        try:
            rows = measure(group, options)
        except UserError as error:
            failed = True
            with tqdm.external_write_mode():
                sys.stdout.write(f"not timed: {group['variant']}, {error}\n")
            continue
        with tqdm.external_write_mode():
            sys.stdout.writelines(map(line, rows))
            sys.stdout.flush()
        if file is not None:
            with file.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, rows[0])
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
