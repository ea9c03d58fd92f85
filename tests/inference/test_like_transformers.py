"""Weights in transformers' layout give the masks of transformers' own pipeline."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.inference import Inference, Predictor, engine

pytestmark = pytest.mark.slow


def smooth_image(height, width):
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    noise = np.random.default_rng(1).integers(0, 64, (height, width, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) // 2 + noise


def test_the_mask_of_a_photograph_is_transformers(tmp_path, randomize, monkeypatch):
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
    )

    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        id2label=dict(enumerate("abcde")),
    )
    theirs = randomize(SegformerForSemanticSegmentation(config)).float().eval()
    processor = SegformerImageProcessor(
        size={"height": 128, "width": 96}, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1]
    )
    image = Image.fromarray(smooth_image(300, 420))
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():  # centre the logits, so that the image has several classes
        theirs.decode_head.classifier.bias -= theirs(**inputs).logits.mean((0, 2, 3))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = theirs(**inputs)
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(300, 420)])
    assert len(expected.unique()) > 2
    predictor = Predictor.load(tmp_path)
    assert predictor.class_names == list("abcde")
    agreement = (predictor(image) == expected.numpy()).mean()
    assert agreement > 0.98  # their image is rounded to 8 bits after it is resized
    # Planted faults: no antialiasing, and the image's own size.
    resize = engine._resize
    monkeypatch.setattr(engine, "_resize", lambda images, size, _: resize(images, size, False))
    assert (predictor(image) == expected.numpy()).mean() < 0.95
    predictor.protocol = Inference()
    assert (predictor(image) == expected.numpy()).mean() < 0.95
