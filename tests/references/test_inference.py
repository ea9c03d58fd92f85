"""Comparison of whole-image and sliding-window inference with mmsegmentation's EncoderDecoder."""

import pytest
import torch

from segformer_pl.inference import Inference, predict_classes, predict_probabilities

NUM_CLASSES = 5
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def segmenter(mmseg, randomize):
    """Function test_cfg -> mmsegmentation's SegFormer-B0 with random float64 parameters."""
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    norm = {"type": "BN", "requires_grad": True}

    def make(**test_cfg):
        torch.manual_seed(0)
        built = MODELS.build(
            {
                "type": "EncoderDecoder",
                "backbone": {
                    "type": "MixVisionTransformer",
                    "embed_dims": 32,
                    "num_layers": [2, 2, 2, 2],
                    "num_heads": [1, 2, 5, 8],
                    "patch_sizes": [7, 3, 3, 3],
                    "sr_ratios": [8, 4, 2, 1],
                    "out_indices": (0, 1, 2, 3),
                },
                "decode_head": {
                    "type": "SegformerHead",
                    "in_channels": [32, 64, 160, 256],
                    "in_index": [0, 1, 2, 3],
                    "channels": 64,
                    "dropout_ratio": 0.1,
                    "num_classes": NUM_CLASSES,
                    "norm_cfg": norm,
                    "align_corners": False,
                    "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False},
                },
                "test_cfg": ConfigDict(test_cfg),
            }
        )
        return randomize(built).eval()

    return make


def theirs(segmenter, images, size):
    """Return mmsegmentation's probabilities and labels at ``size``, and its input sizes."""
    from mmseg.structures import SegDataSample

    shapes = []
    hook = segmenter.backbone.register_forward_pre_hook(
        lambda module, inputs: shapes.append(tuple(inputs[0].shape[2:]))
    )
    samples = []
    for image in images:
        shape = tuple(image.shape[1:])
        meta = {"ori_shape": size, "img_shape": shape, "pad_shape": shape}
        samples.append(SegDataSample(metainfo=meta | {"padding_size": [0, 0, 0, 0]}))
    results = segmenter.predict(images, samples)
    hook.remove()
    logits = torch.stack([result.seg_logits.data for result in results])
    labels = torch.stack([result.pred_sem_seg.data[0] for result in results])
    return logits.softmax(1), labels, shapes


def ours(inference, segmenter, images, size):
    """Run segformer_pl on the same network, with the same results as :func:`theirs`."""
    shapes = []

    class Network:
        num_classes, output = NUM_CLASSES, "logits"

        def __call__(self, batch):
            shapes.append(tuple(batch.shape[2:]))
            return segmenter(batch, mode="tensor")

    network = Network()
    return (
        predict_probabilities(network, images, size, inference),
        predict_classes(network, images, size, inference),
        shapes[: len(shapes) // 2],
    )


CASES = {
    "whole": ({"mode": "whole"}, {}, (96, 128), (96, 128)),
    "whole, resized": ({"mode": "whole"}, {}, (96, 128), (70, 101)),
    "windows that fit": (((64, 64), (32, 64)), None, (96, 128), (96, 128)),
    "last window moved back": (((64, 80), (48, 53)), None, (97, 171), (97, 171)),
    "windows, resized": (((64, 64), (43, 43)), None, (100, 130), (151, 77)),
    "image smaller than the window": (((64, 128), (43, 85)), None, (48, 200), (48, 200)),
}


def settings(case):
    """Return mmsegmentation's test_cfg, arguments of Inference, image size and output size."""
    test_cfg, arguments, image_size, size = CASES[case]
    if arguments is None:
        window, stride = test_cfg
        test_cfg = {"mode": "slide", "crop_size": window, "stride": stride}
        arguments = {"window": window, "stride": stride}
    return test_cfg, arguments, image_size, size


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_probabilities_labels_and_windows(segmenter, case):
    test_cfg, arguments, image_size, size = settings(case)
    network = segmenter(**test_cfg)
    images = torch.randn(2, 3, *image_size, dtype=torch.float64)
    expected, expected_labels, expected_windows = theirs(network, images, size)
    probabilities, labels, windows = ours(Inference(**arguments), network, images, size)
    assert windows == expected_windows
    assert (probabilities - expected).abs().max() < TOLERANCE
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize(
    "fault",
    [
        {"window": (64, 80), "stride": (48, 54)},
        {"window": (64, 80), "stride": (48, 53), "window_weights": "hann"},
        {"window": (64, 80), "stride": (48, 53), "pad_to": 96},
        {},
    ],
    ids=str,
)
@torch.no_grad()
def test_planted_faults_are_detected(segmenter, fault):
    test_cfg, _, image_size, size = settings("last window moved back")
    network = segmenter(**test_cfg)
    images = torch.randn(1, 3, *image_size, dtype=torch.float64)
    expected, _, _ = theirs(network, images, size)
    probabilities, _, _ = ours(Inference(**fault), network, images, size)
    assert (probabilities - expected).abs().max() > 1000 * TOLERANCE


@torch.no_grad()
def test_align_corners_is_detected(segmenter):
    network = segmenter(mode="whole")
    images = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    network.align_corners = network.decode_head.align_corners = True
    expected, _, _ = theirs(network, images, (70, 101))
    network.align_corners = network.decode_head.align_corners = False
    probabilities, _, _ = ours(Inference(), network, images, (70, 101))
    assert (probabilities - expected).abs().max() > 1000 * TOLERANCE
