import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segformer_pl.checkpoints import export_weights, load_weights
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference
from segformer_pl.losses import CrossEntropy
from segformer_pl.models import segformer_b0
from segformer_pl.models.mit_block import NormEps
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny, make_task, make_trainer, samples


@pytest.mark.slow
def test_learns_two_samples_and_logs_the_documented_keys(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30)
    loader = DataLoader(samples(60), batch_size=2)
    trainer.fit(make_task(), loader, DataLoader(samples(), batch_size=2))
    logged = trainer.callback_metrics
    assert logged["val/miou"] > 0.9
    assert logged["val/aacc"] > 0.9
    assert logged["val/iou/left half"] > 0.9
    assert logged["val/iou/absent"].isnan()
    assert set(logged) == {
        "train/loss",
        *(f"val/{key}" for key in ("loss", "miou", "macc", "aacc", "fwiou", "boundary_iou", "ece")),
        *(f"val/iou/{name}" for name in NAMES),
    }


def test_validation_loss_is_the_mean_over_labelled_pixels_for_any_batch_size(tmp_path):
    task = make_task()
    mixed = samples(3)
    mixed[0]["label"] = torch.full_like(mixed[0]["label"], 255)
    mixed[1]["label"] = mixed[1]["label"].clone()
    mixed[1]["label"][:20] = 255
    values = []
    for batch_size in (1, 3):
        trainer = make_trainer(tmp_path)
        trainer.validate(task, DataLoader(mixed, batch_size=batch_size), verbose=False)
        values.append(trainer.callback_metrics["val/loss"])
    task.eval()
    with torch.no_grad():
        logits = task(torch.stack([sample["image"] for sample in mixed]))
        labels = torch.stack([sample["label"] for sample in mixed])
        upsampled = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(upsampled, labels, ignore_index=255)
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(values[1], expected)


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_training_loss(tmp_path):
    class Constant(nn.Module):
        def forward(self, logits, target, ignore_index):
            assert (logits.shape[2:], ignore_index) == ((8, 8), 255)
            return 0 * logits.sum() + 7

    values = []
    for loss in (None, Constant()):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, max_steps=1)
        loader = DataLoader(samples(2), batch_size=2)
        trainer.fit(make_task(loss=loss, lr=0.0, weight_decay=0.0), loader, loader)
        values.append(trainer.callback_metrics)
    assert values[1]["train/loss"] == 7
    assert values[0]["train/loss"] != 7
    # A step at learning rate 0 changes the statistics of BatchNorm only, in both runs alike.
    torch.testing.assert_close(values[0]["val/loss"], values[1]["val/loss"])


def test_a_single_class_can_be_validated(tmp_path):
    task = SegmentationTask(segformer_b0(1), ["thing"], [[0, 0, 0]])
    data = samples(2)
    for sample in data:
        sample["label"] = torch.where(sample["label"] == 1, 0, 255)
    trainer = make_trainer(tmp_path)
    trainer.validate(task, DataLoader(data, batch_size=2), verbose=False)
    assert trainer.callback_metrics["val/iou/thing"] == 1
    assert trainer.callback_metrics["val/loss"] == 0


def test_a_diverged_network_is_not_evaluated(tmp_path):
    task = make_task()
    torch.nn.init.constant_(task.network.head.classifier.bias, torch.nan)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="outputs for the val images hold nan or infinity"):
        trainer.validate(task, DataLoader(samples(2), batch_size=2), verbose=False)


@pytest.mark.parametrize("name", ["lr", "head_lr_mult", "weight_decay", "poly_power", "min_lr"])
def test_negative_and_non_finite_settings_are_refused(name):
    for value in (-1.0, float("nan"), float("inf")):
        message = f"model.{name} is {value}; give a finite number of at least 0"
        with pytest.raises(ValueError, match=message):
            make_task(**{name: value})


def test_a_loss_with_another_signature_is_refused():
    with pytest.raises(ValueError, match="CrossEntropyLoss cannot be called as loss"):
        make_task(loss=nn.CrossEntropyLoss())


def test_metrics_are_computed_at_the_size_of_the_label_maps():
    """A label map of another size than its image is neither resized nor refused."""
    task = make_task().eval()
    batch = {
        "image": torch.rand(2, 3, 32, 32),
        "label": torch.randint(0, 2, (2, 50, 41)),
        "id": ["a", "b"],
    }
    batch["label"][1] = 255
    output = task.validation_step(batch, 0)
    assert output["pred"].shape == (2, 50, 41)
    assert output["counts"].sum(1).tolist()[0][1] == 50 * 41
    assert output["counts"][1].sum() == 0
    assert output["loss"][0] > 0
    assert output["loss"][1].isnan()  # no labelled pixel
    # As in the reference: upsample to the size of the image, then to that of the label map.
    logits = task(batch["image"])
    for size in ((32, 32), (50, 41)):
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(logits[:1], batch["label"][:1])
    torch.testing.assert_close(output["loss"][0], expected.double(), rtol=1e-5, atol=0)


def test_the_inference_protocol_applies_to_metrics_and_predictions():
    network_sizes = []
    task = make_task(inference=Inference(resize_to=64, flip=True)).eval()
    task.network.register_forward_pre_hook(
        lambda module, inputs: network_sizes.append(tuple(inputs[0].shape[2:]))
    )
    batch = {"image": torch.rand(1, 3, 40, 70), "label": torch.zeros(1, 40, 70).long(), "id": ["a"]}
    assert task.predict_step(batch, 0).shape == (1, 40, 70)
    task.validation_step(batch, 0)
    assert network_sizes == [(64, 128)] * 4


def test_test_and_predict(tmp_path):
    task = make_task()
    trainer = make_trainer(tmp_path)
    trainer.test(task, DataLoader(samples(), batch_size=2), verbose=False)
    assert "test/miou" in trainer.callback_metrics
    batches = trainer.predict(task, DataLoader(samples(), batch_size=2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 32, 32)] * 2
    assert batches[0].dtype == torch.int64


def test_images_are_normalised_with_the_given_mean_and_std():
    task = make_task(image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 0.25))
    normalized = task.normalize(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(normalized[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert not any(key.startswith("image_") for key in task.state_dict())


class OwnLoss(Tiny):
    """A segmenter with its own training loss, as in mask classification."""

    takes_criterion = False

    def training_loss(self, images, target, criterion, ignore_index):
        assert (images.min().item(), images.max().item()) == (-1.0, 1.0)  # normalised
        assert (target.dtype, ignore_index) == (torch.int64, 255)
        return 0 * self(images).sum() + 7


def test_a_network_may_define_its_own_training_loss(tmp_path):
    palette = [[0, 0, 0]] * 3
    half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    trainer = make_trainer(tmp_path, max_steps=1)
    loader = DataLoader(samples(2), batch_size=2)
    trainer.fit(SegmentationTask(OwnLoss(), NAMES, palette, **half), loader, loader)
    assert trainer.callback_metrics["train/loss"] == 7
    assert 0 < trainer.callback_metrics["val/loss"] < 7  # cross-entropy, as for every network
    with pytest.raises(UserError, match="OwnLoss trains with a loss of its own; leave"):
        SegmentationTask(OwnLoss(), NAMES, palette, loss=CrossEntropy())


def test_a_network_may_apply_the_loss_to_several_outputs(tmp_path):
    class Auxiliary(Tiny):
        def training_loss(self, images, target, criterion, ignore_index):
            main = self(images)
            return criterion(main, target, ignore_index) + 2 * criterion(
                main[:, :, ::2, ::2], target, ignore_index
            )

    class Height(nn.Module):
        def forward(self, logits, target, ignore_index):
            return 0 * logits.sum() + logits.shape[2]

    trainer = make_trainer(tmp_path, max_steps=1)
    task = SegmentationTask(Auxiliary(), NAMES, [[0, 0, 0]] * 3, loss=Height())
    trainer.fit(task, DataLoader(samples(2), batch_size=2))
    assert trainer.callback_metrics["train/loss"] == 16 + 2 * 8


def test_the_training_loss_of_segformer_is_the_criterion_of_its_logits():
    task = make_task(head_lr_mult=1.0)
    batch = {"image": torch.rand(2, 3, 32, 32), "label": torch.randint(0, 3, (2, 32, 32))}
    torch.manual_seed(1)
    loss = task.training_loss(batch["image"], batch["label"])
    torch.manual_seed(1)
    assert torch.equal(loss, task.loss(task(batch["image"]), batch["label"], 255))


@pytest.mark.slow
def test_any_segmenter_can_be_trained(tmp_path):
    """The task relies on the contract, not on the model."""

    trainer = make_trainer(tmp_path, max_steps=2)
    task = SegmentationTask(Tiny(), NAMES, [[0, 0, 0]] * 3)
    trainer.fit(task, DataLoader(samples(), batch_size=2), DataLoader(samples(), batch_size=2))
    assert "val/miou" in trainer.callback_metrics


def make_checkpoint_source(tmp_path):
    """Weights file in NVIDIA's layout, and the weight of the encoder's last norm."""
    network = segformer_b0(len(NAMES), in_channels=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    export_weights(network, tmp_path / "weights.pth", "nvlabs")
    return tmp_path / "weights.pth", network.encoder.stages[3].norm.weight.detach().clone()


@pytest.mark.slow
def test_weights_are_read_when_fit_starts_and_never_with_a_checkpoint(tmp_path):
    file, expected = make_checkpoint_source(tmp_path)
    loader = DataLoader(samples(4), batch_size=2)
    task = make_task(encoder_weights=str(file), lr=0.0, weight_decay=0.0)
    task.network.encoder.norm_eps = NormEps(0.5, 0.5)
    norm = task.network.encoder.stages[3].norm
    assert not torch.equal(norm.weight, expected)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, loader)
    assert torch.equal(norm.weight, expected)
    assert task.network.encoder.norm_eps == (1e-6, 1e-5)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    # Fitting the same object again does not read the weights again.
    norm.weight.data.fill_(3.0)
    make_trainer(tmp_path, max_steps=1).fit(task, loader)
    assert torch.equal(norm.weight, torch.full_like(expected, 3.0))

    file.unlink()
    resumed = make_task(encoder_weights=str(file), lr=0.0, weight_decay=0.0)
    resumed.network.encoder.norm_eps = NormEps(0.5, 0.5)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(resumed, loader, ckpt_path=tmp_path / "run.ckpt")
    assert trainer.global_step == 2
    assert torch.equal(resumed.network.encoder.stages[3].norm.weight, expected)
    # The epsilons of the weights are kept in every checkpoint.
    assert resumed.network.encoder.norm_eps == (1e-6, 1e-5)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    network = segformer_b0(len(NAMES), norm_eps=0.5)
    again = SegmentationTask.load_from_checkpoint(
        tmp_path / "second.ckpt", network=network, weights_only=True
    )
    assert again.network.encoder.norm_eps == (1e-6, 1e-5)
    network = segformer_b0(len(NAMES), norm_eps=0.5)
    constants = {"norm_eps": 1e-6, "conv_norm_eps": 1e-5}
    assert load_weights(network, tmp_path / "second.ckpt").constants == constants


def test_weights_of_a_whole_network_can_be_evaluated_without_training(tmp_path):
    file, _ = make_checkpoint_source(tmp_path)
    task = make_task(weights=str(file))
    make_trainer(tmp_path).validate(task, DataLoader(samples(2), batch_size=2), verbose=False)
    expected = torch.load(file, weights_only=True)["state_dict"]["decode_head.linear_pred.bias"]
    assert torch.equal(task.network.head.classifier.bias, expected)


def test_epsilons_from_an_argument_are_not_stored_in_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(make_task(), DataLoader(samples(4), batch_size=2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    network = segformer_b0(len(NAMES), norm_eps=0.5)
    again = SegmentationTask.load_from_checkpoint(tmp_path / "run.ckpt", network=network)
    assert again.network.encoder.norm_eps.norm == 0.5


def test_the_copy_of_the_weights_can_be_chosen(tmp_path):
    source = make_task().network
    average = {key: 2 * tensor for key, tensor in source.state_dict().items()}
    torch.save({"state_dict": source.state_dict(), "ema": average}, tmp_path / "w.pth")
    name = "encoder.stages.0.norm.weight"
    for option in ("weights", "encoder_weights"):
        task = make_task(**{option: str(tmp_path / "w.pth"), "weights_state": "ema"})
        task.read_weights(task.network)
        assert torch.equal(task.network.state_dict()[name], average[name])
        task = make_task(**{option: str(tmp_path / "w.pth")})
        with pytest.raises(UserError, match=r"--model.weights_state ema, or state='ema' of"):
            task.read_weights(task.network)
    with pytest.raises(UserError, match=r"weights_state is 'ema', but neither model.weights nor"):
        make_task(weights_state="ema")


def test_weights_and_encoder_weights_exclude_each_other():
    with pytest.raises(
        ValueError, match=r"model\.weights and model\.encoder_weights are both given"
    ):
        make_task(weights="a.pth", encoder_weights="b.pth")


class SaveAfter(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


@pytest.mark.slow
def test_a_checkpoint_during_accumulation_has_the_state_of_the_step_before(tmp_path):
    """Including the running statistics, which were updated by a batch that will be repeated."""
    trainer = make_trainer(
        tmp_path, max_steps=2, accumulate_grad_batches=2, callbacks=[SaveAfter(tmp_path)]
    )
    trainer.fit(make_task(), DataLoader(samples(8), batch_size=2))
    after = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in range(4)]
    assert [state["global_step"] for state in after] == [0, 1, 1, 2]
    states = [state["state_dict"] for state in after]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    mean = "network.head.bn.running_mean"
    assert not torch.equal(states[1][mean], states[3][mean])
    assert not states[0][mean].any()


def test_a_network_that_does_not_fit_the_task_is_refused():
    network = segformer_b0(num_classes=3, in_channels=1)
    with pytest.raises(UserError, match="3 classes, but there are 2 class names"):
        SegmentationTask(network, ["a", "b"], [[0, 0, 0]] * 2)
    names, palette = ["a", "b", "c"], [[0, 0, 0]] * 3
    with pytest.raises(UserError, match=r"takes 1 channels, but model.image_mean has 3 values"):
        SegmentationTask(network, names, palette)
    task = SegmentationTask(network, names, palette, image_mean=(0.5,), image_std=(0.2,))
    with pytest.raises(UserError, match="the images have 3 channels, but the network takes 1"):
        task(torch.zeros(1, 3, 32, 32))
