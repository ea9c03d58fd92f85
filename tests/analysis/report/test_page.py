"""The page shows the files of the run, escaped, and loads nothing from elsewhere."""

import json
import math
import re

import pytest
import yaml
from matplotlib.figure import Figure

from segformer_pl.analysis.report import summary, write_report
from segformer_pl.analysis.run import Run


def test_finished_run(folder):
    folder.finished([0.3, 0.8312, 0.7954])
    page = folder.page()
    assert write_report(folder.run) == folder.path / "report.html"
    assert "demo/version_0" in page.text
    assert "79.5 % last, at step 30 best 83.1 % at step 20" in page.text
    assert "mAcc 70.0 %" in page.text
    assert "aAcc 90.0 %" in page.text
    assert "val loss 0.432" in page.text
    assert "steps trained 30 of 30" in page.text
    assert "not finished" not in page.text
    assert summary(folder.run) == "mIoU 79.5 % (best 83.1 % at step 20)"


def test_the_tile_of_miou_states_each_fact_once(folder):
    folder.finished([0.3, 0.8312])
    assert "83.1 % last and best, at step 20 mAcc" in folder.page().text
    record = folder.evaluation(step=20, split_size=3)
    record.save(folder.path / "evaluation" / "val_step_0000020.npz")
    text = folder.page().text
    assert re.search(
        r"83\.1 % last and best, at step 20 95 % CI \S+ to \S+ % over all 3 images "
        r"\(bootstrap\) mAcc",
        text,
    )
    assert text.count("3 images") == 1


def test_nothing_is_loaded_from_elsewhere(folder):
    folder.finished([0.3, 0.8])
    page = folder.page()
    assert not page.has_foreign_scripts
    assert not page.all("link")
    assert not page.all("iframe")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


def test_headers_have_a_scope_and_no_external_links(page):
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)


def test_training_loss_that_became_nan(folder):
    rows = folder.training(9, lr=False)
    rows[5]["train/loss"] = math.nan
    folder.plant(rows)
    page = folder.page()
    assert "not finite, for the first time at step 6" in page.text


def test_last_figures_are_shown_and_first_ones_folded(folder):
    folder.finished([0.3, 0.8])
    for kind, steps in {"erf": [20], "predictions": [10, 15, 20]}.items():
        (folder.path / kind).mkdir()
        for step in steps:
            Figure(figsize=(1, 1)).savefig(folder.path / kind / f"step_{step:07d}.png")
    page = folder.page()
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        "Predictions at step 20",
        "Predictions at step 10",
        "Effective receptive field at step 20",
    ]
    assert all((image["src"] or "").startswith("data:image/png;base64,iVBOR") for image in images)
    assert page.text.count("First figure") == 1
    folds = [index for index, (tag, _) in enumerate(page.tags) if tag == "details"]
    shown = [index for index, (tag, _) in enumerate(page.tags) if tag == "img"]
    assert shown[0] < folds[0] < shown[1]
    assert all("open" not in attributes for attributes in page.all("details"))


def test_departures_from_the_recipe(folder):
    folder.finished([0.6])
    config = folder.config
    config["model"] |= {"lr": 0.003, "weight_decay": 0.01}
    folder.config = config
    page = folder.page()
    assert "The paper does not have the data set <script>alert(1)</script>" in page.text
    assert page.row("model.lr") == ["6e-05", "0.003", "reference,", "local_configs/segformer"]
    assert page.rows_of("model.weight_decay") == []
    assert "The reference trains unseeded" in page.text
    summaries = [n for n, (tag, _) in enumerate(page.tags) if tag == "summary"]
    assert page.text.index("Differences that are not settings") < page.text.index("trains unseeded")
    assert len(summaries) == 2  # remarks and configuration


def test_no_departures_without_a_configuration(folder):
    folder.finished([0.6])
    (folder.path / "config.yaml").unlink()
    assert "recipe" not in folder.page().text


@pytest.mark.parametrize("loss", [None, {"class_path": "segformer_pl.losses.CrossEntropy"}])
def test_loss_of_the_paper_is_not_named_in_the_legend(folder, loss):
    folder.plant(folder.training(7))
    config = folder.config
    config["model"]["loss"] = loss
    folder.config = config
    page = folder.page()
    assert "CrossEntropy, the training loss" in page.text
    assert "train:" not in page.text


def test_resumptions_are_marked_and_their_changes_listed(folder):
    folder.finished([0.3, 0.8])
    config = folder.config
    config["trainer"]["max_steps"] = 90
    config["ckpt_path"] = "last.ckpt"
    for step in (8, 15):
        resumed = folder.path / f"config_resumed_at_step_{step:07d}.yaml"
        resumed.write_text(yaml.safe_dump(config))
    page = folder.page()
    assert page.text.count("dotted: resumed at 8, 15") == 2
    assert page.row("8") == ["trainer.max_steps", "20", "90"]
    assert page.row("15") == ["no", "setting", "changed"]
    assert "steps trained 20 of 90: not finished" in page.text


def test_throughput_of_several_ranks_names_the_straggler(folder):
    folder.plant(folder.training(40))
    assert "Throughput" not in folder.page().text
    totals = {"images": 800, "batches": 100, "seconds": 50.0, "data_seconds": 1.0}
    ranks = [{"rank": i, **totals, "forward_seconds": 10.0 + 2 * (i == 70)} for i in range(100)]
    content = {"first_step": 20, "last_step": 40, "accumulate": 1, "ranks": ranks}
    (folder.path / "throughput.json").write_text(json.dumps(content))
    page = folder.page()
    assert "Throughput steps 21 to 40 1,600.0 images per second on 100 ranks" in page.text
    assert "Rank 70 computes longer than the median of the other ranks, by 12 % of" in page.text
    assert page.row("70") == ["16.0", "2.0", "%", "120.0"]
    assert "The 16 ranks of 100 whose data and computation take the longest" in page.text


def test_changed_arguments_of_callbacks_are_listed_one_by_one(folder):
    folder.finished([0.3])
    config = folder.config

    def callback(name, **arguments):
        return {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}

    ema = {"device": None, "decay": 0.99, "note": "x" * 500}
    config["trainer"]["callbacks"] = [callback("EMAWeightAveraging", **ema)]
    folder.config = config
    config["trainer"]["callbacks"] = [
        callback("LearningRateMonitor", logging_interval=None, log_momentum=False),
        callback("EMAWeightAveraging", **ema | {"decay": 0.9, "note": "y" * 500}),
    ]
    (folder.path / "config_resumed_at_step_0000008.yaml").write_text(yaml.safe_dump(config))
    changes = folder.run.resumptions[0].changes
    assert list(changes) == [
        "trainer.callbacks.EMAWeightAveraging.decay",
        "trainer.callbacks.EMAWeightAveraging.note",
        "trainer.callbacks.LearningRateMonitor",
    ]
    page = folder.page()
    assert "EMAWeightAveraging.decay 0.99 0.9" in page.text
    assert "x" * 50 not in page.text.split("config.yaml")[0]


def test_warnings_at_the_start_are_in_the_report(folder):
    folder.finished([0.3])
    (folder.path / "findings.json").write_text('["warm-up is <b>long</b>"]')
    assert "Warning at the start of training: warm-up is <b>long</b>." in folder.page().text


def test_options_are_not_broken_and_the_rest_is_escaped(folder):
    folder.finished([0.3])
    finding = "a <i>-- b, x--y; lower --trainer.log_every_n_steps (not --a.b=<c>)."
    (folder.path / "findings.json").write_text(json.dumps([finding]))
    page = folder.page()
    assert page.all("span").count({"class": "option"}) == 2
    assert (
        'a &lt;i&gt;-- b, x--y; lower <span class="option">--trainer.log_every_n_steps</span> '
        '(not <span class="option">--a.b</span>=&lt;c&gt;).'
    ) in page.source


PART = {
    "stage": "fit",
    "step": 0,
    "command": "python -m segformer_pl fit",
    "started": "2026-01-02T03:04:05+00:00",
    "seconds": 6.4,
    "is_ended": True,
    "hardware": "a CPU",
    "commit": "",
    "versions": {},
}


@pytest.mark.parametrize(
    ("part", "verdict", "fact"),
    [
        (
            {"end": "error: sample <b>'x'</b> is damaged", "last_step": 2},
            "Stopped at step 2 of 10: error: sample <b>'x'</b> is damaged.",
            "ended at step 2: error: sample <b>'x'</b> is damaged duration",
        ),
        (
            {"stage": "validate", "end": "SIGTERM", "last_step": 10},
            "The validation stopped: SIGTERM.",
            "ended SIGTERM duration",
        ),
        (
            {"is_ended": False, "end": "", "last_step": 5},
            "No end is recorded after step 5 of 10: the run was killed, as by SIGKILL, or still",
            "ended not yet when this report was written, or without a word, as by SIGKILL",
        ),
        ({"end": "finished", "last_step": 10}, None, "ended at step 10: finished"),
        ({}, None, "UTC+0000 duration"),  # from an earlier version
        ({"is_ended": False}, "No end is recorded: the run was killed", "ended not yet"),
    ],
)
def test_a_run_that_did_not_finish_says_how_it_ended(folder, part, verdict, fact):
    folder.finished([0.3])
    (folder.path / "provenance.json").write_text(json.dumps([PART | part]))
    page = folder.page()
    assert fact in page.text
    bad = [index for index, (_, a) in enumerate(page.tags) if a.get("class") == "card verdict bad"]
    assert len(bad) == (verdict is not None)
    if verdict is not None:
        assert verdict in page.text
        tiles = [index for index, (_, a) in enumerate(page.tags) if a.get("class") == "tiles"]
        assert bad[0] < tiles[0]


def test_only_the_last_part_of_a_run_decides_whether_it_finished(folder):
    folder.finished([0.3])
    killed = PART | {"is_ended": False, "end": "", "last_step": 5}
    last = PART | {"step": 5, "end": "finished", "last_step": 10}
    (folder.path / "provenance.json").write_text(json.dumps([killed, last]))
    page = folder.page()
    assert "card verdict bad" not in page.source
    assert "ended without a word, as by SIGKILL duration" in page.text
    assert page.text.index("ended at step 10: finished") < page.text.index("without a word")


def test_damaged_evaluation_is_named_and_the_rest_shown(folder):
    folder.evaluated()
    (folder.path / "evaluation" / "val_step_0000000.npz").write_bytes(b"PK cut short")
    page = folder.page()
    assert re.search(r"Left out .*val_step_0000000\.npz' is no evaluation .*damaged", page.text)
    assert "mIoU 80.0 %" in page.text


def test_damaged_configuration_is_named_and_the_rest_shown(folder):
    folder.evaluated()
    (folder.path / "config.yaml").write_text("a: [")
    page = folder.page()
    assert re.search(r"Left out .*config\.yaml' cannot be read as YAML", page.text)
    assert "mIoU 80.0 %" in page.text


def test_cell_that_is_not_a_number(folder):
    folder.plant(folder.training(2, lr=False))
    with (folder.path / "metrics.csv").open("a") as stream:
        stream.write("0,2,oops\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 4: expected numbers"):
        write_report(folder.run)


def test_missing_folder_and_missing_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder .*nowhere"):
        write_report(Run(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv in .*CSVLogger"):
        write_report(Run(tmp_path))
