"""The task's optimiser: groups, schedules, resumption, clipping."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from segformer_pl.errors import UserError
from segformer_pl.optim import poly_factor
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny, make_task, make_trainer, samples


class Recorder(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.slow
def test_layer_decay_and_schedule_reach_the_optimiser(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    task = make_task(lr=0.01, warmup_steps=2, layer_decay=0.5, schedule="mmseg1")
    trainer.fit(task, DataLoader(samples(8), batch_size=2))
    rates = torch.tensor(recorder.rates)
    assert rates.shape == (4, 17)
    torch.testing.assert_close(rates[2, 0], torch.tensor(0.01 * 0.5**7))
    torch.testing.assert_close(rates[:, -1], 0.01 * torch.tensor([1e-6, 1.0, 1.0, 0.0]))


def test_learning_rates_follow_the_schedule_in_every_group(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[recorder])
    task = make_task(lr=0.01, head_lr_mult=10.0, warmup_steps=3)
    trainer.fit(task, DataLoader(samples(16), batch_size=2))
    base = torch.tensor([0.01, 0.01, 0.1])
    expected = torch.stack([base * poly_factor(step, 6, 3) for step in range(6)])
    torch.testing.assert_close(torch.tensor(recorder.rates), expected)


@pytest.mark.slow
def test_a_resumed_run_uses_its_own_optimiser_settings(tmp_path):
    """Lightning restores the checkpoint's learning rates; those of the run must replace them."""
    loader = DataLoader(samples(16), batch_size=2)
    first = make_trainer(tmp_path, max_steps=3)
    first.fit(make_task(lr=0.01), loader)
    checkpoint = tmp_path / "step3.ckpt"
    first.save_checkpoint(checkpoint)

    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[recorder])
    task = make_task(lr=0.002, weight_decay=0.5, head_lr_mult=3.0)
    trainer.fit(task, loader, ckpt_path=checkpoint, weights_only=False)
    base = torch.tensor([0.002, 0.002, 0.006])
    expected = torch.stack([base * poly_factor(step, 6, 2) for step in range(3, 6)])
    torch.testing.assert_close(torch.tensor(recorder.rates), expected)
    decays = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
    assert decays == [0.5, 0.0, 0.5]


SGD = {"optimizer": "sgd", "lr": 0.01, "warmup_steps": 0, "min_lr": 1e-3, "weight_decay": 0.1}


class Weights(pl.Callback):
    """Records the classifier after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.weights.append(task.network.classifier.weight.detach().clone())


def sgd_task(**arguments):
    torch.manual_seed(0)
    palette = [[0, 0, 0], [255, 255, 255], [9, 9, 9]]
    return SegmentationTask(Tiny(), NAMES, palette, **SGD | {"head_lr_mult": 10.0} | arguments)


def test_a_resumed_run_with_sgd_equals_an_uninterrupted_one(tmp_path):
    loader = DataLoader(samples(16), batch_size=2)
    whole, first, second = Weights(), Weights(), Weights()
    make_trainer(tmp_path, max_steps=6, callbacks=[whole]).fit(sgd_task(), loader)

    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "step3.ckpt")

    make_trainer(tmp_path, max_steps=6, callbacks=[first, StopAt()]).fit(sgd_task(), loader)
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[second])
    trainer.fit(sgd_task(), loader, ckpt_path=tmp_path / "step3.ckpt", weights_only=False)
    assert len(second.weights) == 3
    torch.testing.assert_close(second.weights, whole.weights[3:], rtol=0, atol=0)
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    # The momentum carries over: without the optimiser's state, the weights are others.
    content = torch.load(tmp_path / "step3.ckpt", weights_only=False)
    for state in content["optimizer_states"][0]["state"].values():
        state["momentum_buffer"].zero_()
    torch.save(content, tmp_path / "without.ckpt")
    third = Weights()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[third])
    trainer.fit(sgd_task(), loader, ckpt_path=tmp_path / "without.ckpt", weights_only=False)
    assert not torch.allclose(third.weights[-1], whole.weights[-1], rtol=1e-4)


@pytest.fixture
def sgd_checkpoint(tmp_path):
    """Content of a checkpoint after two steps of SGD."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(sgd_task(), DataLoader(samples(16), batch_size=2))
    trainer.save_checkpoint(tmp_path / "sgd.ckpt")
    return torch.load(tmp_path / "sgd.ckpt", weights_only=False)


def resume(content, tmp_path, **arguments):
    torch.save(content, tmp_path / "changed.ckpt")
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    loader = DataLoader(samples(16), batch_size=2)
    trainer.fit(
        sgd_task(**arguments), loader, ckpt_path=tmp_path / "changed.ckpt", weights_only=False
    )
    return trainer.optimizers[0].param_groups, recorder.rates


def test_a_resumed_run_uses_its_own_momentum_and_floor(sgd_checkpoint, tmp_path):
    groups, rates = resume(sgd_checkpoint, tmp_path, momentum=0.5, min_lr=0.004, lr=0.02)
    assert {group["momentum"] for group in groups} == {0.5}
    expected = [[(b - 0.004) * (1 - step / 4) + 0.004 for b in (0.2,)] for step in (2, 3)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_a_wrong_state_of_sgd_is_refused(sgd_checkpoint, tmp_path):
    with pytest.raises(UserError, match="was trained with sgd, whose state does not fit adamw; "):
        resume(sgd_checkpoint, tmp_path, optimizer="adamw")
    for change, message in (
        (lambda state: state[0].pop("momentum_buffer"), "has nothing as the optimiser's momentum"),
        (
            lambda state: state[0].update(momentum_buffer=torch.zeros(2)),
            r"has \(2,\) as the optimiser's momentum_buffer of parameter 0",
        ),
        (lambda state: state[0]["momentum_buffer"].fill_(torch.nan), "optimiser: nan or infinity"),
    ):
        content = copy.deepcopy(sgd_checkpoint)
        change(content["optimizer_states"][0]["state"])
        with pytest.raises(UserError, match=message):
            resume(content, tmp_path)
    sgd_checkpoint["optimizer_states"][0]["param_groups"][0]["momentum"] = "much"
    with pytest.raises(UserError, match=r"holds 'much' as group 0\.momentum"):
        resume(sgd_checkpoint, tmp_path)


def test_sgd_without_momentum_resumes_without_state(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(sgd_task(momentum=0.0), DataLoader(samples(16), batch_size=2))
    trainer.save_checkpoint(tmp_path / "sgd.ckpt")
    content = torch.load(tmp_path / "sgd.ckpt", weights_only=False)
    for momentum in (0.0, 0.9):
        groups, _ = resume(content, tmp_path, momentum=momentum)
        assert groups[0]["momentum"] == momentum


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_at_any_precision(optimizer, precision, tmp_path):
    """MaskFormer clips at 0.01. Lightning does not clip a fused optimiser under mixed precision."""
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer, task, optimizer):
            grads = [p.grad for p in task.network.parameters() if p.grad is not None]
            norms.extend([torch.cat([g.flatten() for g in grads]).norm().item()] if grads else [])

    settings = {"gradient_clip_val": 0.01, "precision": precision, "callbacks": [Norm()]}
    trainer = make_trainer(tmp_path, max_steps=2, **settings)
    trainer.fit(sgd_task(optimizer=optimizer), DataLoader(samples(8), batch_size=2))
    assert trainer.optimizers[0].param_groups[0]["fused"] == (precision == "32-true")
    assert norms
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_a_run_without_max_steps_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"give --trainer.max_steps N"):
        trainer.fit(make_task(), DataLoader(samples(), batch_size=2))
