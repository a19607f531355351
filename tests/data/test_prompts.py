"""The requests of a predict run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from lightning import LightningModule, Trainer

from sdmodule.data.prompts import PromptDataModule
from sdmodule.errors import SettingsError
from sdmodule.sampling.requests import SampleRequest, build_requests


def test_images_are_listed_prompt_by_prompt_with_consecutive_seeds() -> None:
    requests = build_requests(["a", "b"], num_images_per_prompt=2, seed=7)
    assert requests == [
        SampleRequest(0, "a", "", 7),
        SampleRequest(1, "a", "", 8),
        SampleRequest(2, "b", "", 9),
        SampleRequest(3, "b", "", 10),
    ]


def test_an_empty_prompt_is_unconditional() -> None:
    assert build_requests("") == [SampleRequest(0, "", "", 0)]


@pytest.mark.parametrize(("negative", "expected"), [(None, ["", ""]), ("n", ["n", "n"]), (["m", "n"], ["m", "n"])])
def test_a_negative_prompt_is_for_all_or_one_per_prompt(negative: str | list[str] | None, expected: list[str]) -> None:
    assert [r.negative_prompt for r in build_requests(["a", "b"], negative_prompt=negative)] == expected


def test_a_txt_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a red circle\n\n  a blue square \n")
    assert [r.prompt for r in build_requests(prompts=str(file))] == ["a red circle", "a blue square"]


def test_jsonl_lines_may_have_their_own_negative_prompt_and_seed(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "own", "seed": 100}\n')
    requests = build_requests(prompts=str(file), negative_prompt="all", num_images_per_prompt=2, seed=5)
    assert [(r.negative_prompt, r.seed) for r in requests] == [("all", 5), ("all", 6), ("own", 100), ("own", 101)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "prompt: missing"),
        ({"prompt": "a", "prompts": "b.txt"}, "exclude each other"),
        ({"prompt": []}, r"^prompt=\[\]"),
        ({"prompt": 3}, "^prompt=3"),
        ({"prompt": ["a", 3]}, "put numbers in quotes"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x", "y", "z"]}, "3 texts for 2 prompts"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"prompt": "a", "seed": -1}, "seed=-1"),
        ({"prompt": "a", "seed": 2**64 - 1, "num_images_per_prompt": 2}, "have seed 18446744073709551616"),
        ({"prompt": "a red \ud83d circle"}, "unpaired surrogate"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: not found"),
        ({"prompts": "prompts.csv"}, r"must be a \.txt"),
    ],
)
def test_wrong_settings_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_requests(**settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n\n", "is empty"),
        ("p.jsonl", "", "is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{oops', "line 2 is not JSON"),
        ("p.jsonl", '["a"]', "line 1"),
        ("p.jsonl", '\n{"text": "a"}', "line 2"),
        ("p.jsonl", '{"prompt": 1}', "prompt=1"),
        ("p.jsonl", r'{"prompt": "a red \ud83d circle"}', "unpaired surrogate"),
        ("p.jsonl", '{"prompt": "a", "seed": 18446744073709551616}', "seed=18446744073709551616"),
        ("p.jsonl", '{"prompt": "a", "seed": "x"}', "seed='x'"),
        (
            "p.jsonl",
            '{"prompt": "a", "sead": 1}',
            "'sead'; use negative_prompt, negative_prompt_2, prompt",
        ),
    ],
)
def test_errors_in_files_name_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(SettingsError, match=message):
        build_requests(prompts=str(file))


class Recorder(LightningModule):
    """Records the requests it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[SampleRequest]] = []

    def predict_step(self, batch: list[SampleRequest]) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_trainer_passes_lists_of_requests(tmp_path: Path, precision: Literal["32-true", "bf16-true"]) -> None:
    model = Recorder()
    data = PromptDataModule(["a", "b"], num_images_per_prompt=2, batch_size=3)
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False, default_root_dir=tmp_path)
    trainer.predict(model, data, return_predictions=False)
    assert [len(batch) for batch in model.batches] == [3, 1]
    assert [request for batch in model.batches for request in batch] == data.requests
