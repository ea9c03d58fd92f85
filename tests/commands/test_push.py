"""The command ``push``, and ``Predictor`` as a class of the hub, against a stand-in of the hub."""

import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors import safe_open

from segformer_pl.analysis.comparison import miou_interval
from segformer_pl.analysis.report.model_card import Dataset, Training, model_card
from segformer_pl.analysis.run import Run
from segformer_pl.checkpoints.hub import upload
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer
from segformer_pl.normalization import Normalization
from tests.local_hub import LocalHub
from tests.tiny_network import TINY_SEGFORMER

FOR_TRANSFORMERS = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub at which `ada` is logged in; huggingface_hub has read its environment already."""
    server = LocalHub()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()
    yield server
    close_session()
    server.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The best checkpoint of a run of two steps with a test-time protocol of its own."""
    folder = tmp_path_factory.mktemp("run")
    shapes.generate(folder / "data", {"train": 2, "validation": 3})
    settings = {
        "model.network": json.dumps(TINY_SEGFORMER),
        "model.inference.window": "[64,64]",
        "data.path": folder / "data",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": folder,
        "trainer.callbacks+": "EffectiveReceptiveField",
        "trainer.callbacks.num_images": 1,
    }
    main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    (file,) = folder.rglob("best.ckpt")
    return file


@pytest.fixture
def push(capsys):
    """Function that runs `push` and returns its output."""

    def call(*arguments):
        main(["push", *map(str, arguments)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def predictor():
    """A predictor of a tiny network that transformers does not have, with random weights."""
    network = TINY_SEGFORMER["init_args"]
    encoder = MixTransformer(**network["encoder"]["init_args"], kv_border="keep", norm_eps=1e-3)
    return Predictor(
        SegFormer(encoder, num_classes=2, decoder_dim=16),
        ["sky|*dark* _is_ a_b", "<b>road</b>\n# no heading"],
        [[1, 2, 3], [4, 5, 6]],
        Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        Inference(window=(64, 64), flip=True),
    )


def class_maps(predictor):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return predictor.network(images)


def agree(here, there):
    """Whether two predictors are the same in all respects, and compute the same to the last bit."""
    facts = [json.loads(json.dumps(predictor.facts)) for predictor in (here, there)]
    return facts[0] == facts[1] and torch.equal(class_maps(here), class_maps(there))


@pytest.mark.slow
def test_a_pushed_run_is_read_back(hub, push, checkpoint, tmp_path):
    said = push(checkpoint.parents[1], "ada/shapes", "--license", "apache-2.0")
    repository = hub.repositories["ada/shapes"]
    assert repository.files.keys() == FOR_TRANSFORMERS | {"receptive_fields.png"}
    assert not repository.private
    assert repository.messages[-1] == "SegFormer, step 2"
    pinned = f"ada/shapes@{repository.head}"
    assert f"pushed {checkpoint} (step 2) to ada/shapes, for segformer_pl and transformers" in said
    assert f"predict --weights {pinned}" in said
    here = Predictor.load(checkpoint)
    for there in (Predictor.from_pretrained("ada/shapes"), Predictor.load(pinned)):
        assert agree(here, there)
        assert there.protocol.window in ([64, 64], (64, 64))
    Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)).save(
        tmp_path / "photo.png"
    )
    for option, source in (("--ckpt", checkpoint), ("--weights", pinned)):
        out = tmp_path / option
        main(["predict", option, str(source), "--input", str(tmp_path), "--output", str(out)])
    masks = [
        np.array(Image.open(tmp_path / o / "masks/photo.png")) for o in ("--ckpt", "--weights")
    ]
    assert np.array_equal(*masks)
    with pytest.raises(UserError, match="the hub has no 'ada/other', or does not grant access"):
        Predictor.from_pretrained("ada/other")
    with pytest.raises(UserError, match="'no/such/folder' cannot be the name"):
        Predictor.from_pretrained("no/such/folder")


@pytest.mark.slow
def test_transformers_opens_a_pushed_run(hub, push, checkpoint, tmp_path, monkeypatch):
    from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

    push(checkpoint, "ada/shapes")
    here = Predictor.load(checkpoint)
    there = SegformerForSemanticSegmentation.from_pretrained("ada/shapes").eval()
    assert list(there.config.id2label.values()) == here.class_names
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    processed = AutoImageProcessor.from_pretrained("ada/shapes")(pixels, return_tensors="pt")
    images = here.normalization(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(processed["pixel_values"], images, rtol=0, atol=1e-6)
    with torch.inference_mode():
        expected = here.network(images)
        # transformers' LayerNorms have another epsilon.
        torch.testing.assert_close(there(images).logits, expected, rtol=0, atol=1e-3)
    # What the card shows runs.
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels).save("photo.jpg")
    card = hub.repositories["ada/shapes"].files["README.md"].decode()
    masks = []
    for block in re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE):
        names = {}
        exec(block, names)
        masks.append(np.asarray(names["mask"]))
    assert masks[0].shape == masks[1].shape == (64, 96)
    assert (masks[0] == masks[1]).mean() > 0.8  # transformers has no windows


@pytest.mark.slow
def test_the_card_states_what_the_run_states(hub, push, checkpoint):
    push(checkpoint, "ada/shapes", "--license", "mit")
    files = hub.repositories["ada/shapes"].files
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.license == "mit"
    evaluation = Run(checkpoint.parents[1]).last_evaluation()
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["mean_iou"].metric_value == pytest.approx(evaluation.miou, abs=1e-4)
    assert results["accuracy"].metric_value == pytest.approx(evaluation.aacc, abs=1e-4)
    assert results["mean_iou"].dataset_split == "validation"
    low, high = (f"{100 * bound:.1f} %" for bound in miou_interval(evaluation))
    text = card.text
    assert f"| mIoU | {100 * evaluation.miou:.1f} % (95 % CI {low} to {high}) |" in text
    assert "mean boundary IoU" in text
    assert "Validation split, 3 images, after 2 training steps; test-time protocol: window" in text
    assert "chosen among those of its run by `val/miou`" in text
    for name in evaluation.class_names:
        assert re.search(rf"^\| {name} \| [\d.–]+", text, re.MULTILINE), name
    assert "there is no published recipe for it" in text
    assert "| initial weights | random |" in text
    assert "![Effective receptive fields" in text
    assert files["receptive_fields.png"].startswith(b"\x89PNG")
    assert "Xie et al." in text
    (part,) = Run(checkpoint.parents[1]).parts
    assert f"  - hardware: {part.hardware.split()[0]}" in text
    assert f"torch {part.versions['torch'].split('+')[0]}" in text
    place = str(checkpoint.parents[2]).encode()  # nobody else's business
    assert [name for name, content in files.items() if place in content] == []


def test_a_network_that_transformers_lacks_is_read_back(hub, predictor):
    predictor.push_to_hub("ada/other", private=True)
    repository = hub.repositories["ada/other"]
    assert repository.private
    assert repository.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert agree(predictor, Predictor.from_pretrained("ada/other"))
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.library_name == "segformer_pl"
    assert "transformers has no such network" in card.text
    assert "None is stated" in card.text
    assert card.data.license is None


def test_the_card_states_departures_and_no_folders(predictor):
    config = {
        "model": {
            "network": {"class_path": "segformer_pl.models.segformer_b0", "init_args": {}},
            "encoder_weights": "/home/ada/secret/mit_b0.pth",
            "lr": 0.5,
        },
        "data": {"dataset": "cityscapes", "crop_size": [512, 512]},
        "trainer": {},
    }
    dataset = Dataset("cityscapes", "Cityscapes", "Cordts et al.", "owner/cityscapes", "a" * 40)
    training = Training(dataset, 7, "window [8, 8]", config=config)
    card = model_card(predictor.network, predictor.class_names, None, training, "ada/x", "mit")
    assert "| model.lr | 6e-05 | 0.5 |" in card.text
    assert "| data.crop_size | \\[1024, 1024\\] | \\[512, 512\\] |" in card.text
    assert "secret" not in card.text
    assert card.data.datasets == ["owner/cityscapes"]
    assert card.data.base_model is None
    config["model"]["encoder_weights"] = "nvidia/mit-b0@" + "b" * 40
    card = model_card(predictor.network, predictor.class_names, None, training)
    assert card.data.base_model == "nvidia/mit-b0"


def test_class_names_are_no_markup(predictor):
    text = predictor.generate_model_card().text
    assert r"- 0: sky\|\*dark\* \_is\_ a_b" in text
    assert r"- 1: \<b\>road\</b\>\\n\# no heading" in text


def test_a_folder_is_read_back(predictor, tmp_path):
    predictor.save_pretrained(tmp_path / "folder")
    assert agree(predictor, Predictor.from_pretrained(tmp_path / "folder"))
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["segformer_pl"])["weight_constants"]["norm_eps"] == 1e-3
    predictor.save_pretrained(tmp_path / "folder")  # as in transformers, a folder is overwritten
    with pytest.raises(UserError, match="the predictor that optimize"):
        predictor.optimize().save_pretrained(tmp_path / "folded")


def test_files_of_an_earlier_upload_do_not_stay(hub, predictor, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("preprocessor_config.json", "model.safetensors", "notes.txt"):
        (folder / name).write_text("earlier")
    upload(folder, "ada/mine", "ada", private=False, message="by hand")
    for file in folder.iterdir():
        file.unlink()
    predictor.save_pretrained(folder)
    commit = upload(folder, "ada/mine", "ada", private=False, message="native")
    repository = hub.repositories["ada/mine"]
    assert commit == repository.head
    assert repository.messages[1:] == ["by hand", "native"]
    # A preprocessor_config.json would change the normalisation.
    assert repository.files.keys() == {
        "README.md", "config.json", "model.safetensors", "notes.txt"
    }  # fmt: skip
    assert agree(predictor, Predictor.from_pretrained("ada/mine"))


@pytest.mark.slow
def test_output_uploads_nothing(hub, push, checkpoint, fail, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    said = push(checkpoint, "ada/shapes", "--output", tmp_path / "folder")
    assert f"to '{tmp_path / 'folder'}'" in said
    assert "nothing is uploaded" in said
    assert "no licence" in said
    assert hub.requests == []
    written = {file.name for file in (tmp_path / "folder").iterdir()}
    assert written == FOR_TRANSFORMERS | {"receptive_fields.png"}
    message = fail("push", checkpoint, "ada/shapes", "--output", tmp_path / "folder")
    assert "exists already" in message
    assert agree(Predictor.load(checkpoint), Predictor.load(tmp_path / "folder"))


@pytest.mark.slow
def test_a_moved_checkpoint_is_pushed_without_metrics(push, checkpoint, tmp_path):
    (tmp_path / "moved.ckpt").write_bytes(checkpoint.read_bytes())
    said = push(tmp_path / "moved.ckpt", "ada/shapes", "--output", tmp_path / "folder")
    assert "no metrics" in said
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.eval_results is None
    assert "holds no evaluation after 2 training steps" in card.text


def test_a_missing_run_is_named_before_the_hub_is_asked(hub, fail, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    for source in (tmp_path / "nothing", tmp_path / "none.ckpt"):
        message = fail("push", source, "ada/shapes")
        assert f"SOURCE: there is no run folder or checkpoint '{source}'; give one" in message
    assert "holds no checkpoints/best.ckpt" in fail("push", tmp_path, "ada/shapes")
    (tmp_path / "damaged.ckpt").write_bytes(b"x")
    assert "damaged.ckpt" in fail("push", tmp_path / "damaged.ckpt", "ada/shapes")
    assert hub.requests == []


@pytest.mark.slow
def test_what_cannot_be_pushed_is_one_sentence(hub, checkpoint, fail, monkeypatch, tmp_path):
    def refused(*options, name="ada/shapes"):
        return fail("push", checkpoint, name, *options)

    for name in ("shapes", "ada/b/c", "ada/a b", "ada/a--b", "ada/shapes@main"):
        message = refused(name=name)
        assert f"{name!r} cannot be the name of a hub repository" in message
    assert hub.requests == []

    assert "status 400" not in (message := refused("--license", "gpl"))
    assert "the hub refuses the model card" in message
    assert '"license" must be one of' in message
    hub.repositories["ada/shapes"].private = False
    assert "exists and is public" in refused("--private")
    message = refused(name="ben/shapes")
    assert "the token of ada may not write to 'ben/shapes'" in message
    assert "ada/shapes" in message
    monkeypatch.setenv("HF_TOKEN", "old")
    assert "the hub does not accept the token" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "there is none; run `hf auth login`" in refused()
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached for 'ada/shapes' (ConnectError)" in refused()
    assert len(hub.repositories["ada/shapes"].commits) == 1  # nothing was uploaded
