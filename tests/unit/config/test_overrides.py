"""A text on the command line stays that text, whatever Hydra's grammar would make of it.

Hydra's own settings and other trainers' names get a message with the key to write instead."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from torchprime.config.compose import compose_config
from torchprime.config.load import known_keys
from torchprime.config.other_names import ADVICE, SAME
from torchprime.config.overrides import in_full, quoted, text_keys
from torchprime.errors import ConfigError

QUICKSTART = ["--config-name", "quickstart"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((text, text) for text in ("1e3", "007", "on", "true", "1_000", "nan", "-5", ".5", "a#b",
                                    "a=b", "a (1)", "x(1)", "~x", "a@b", 'say "hi"', "50%")),
        ("'1e3'", "1e3"),
        (r"a\=b", "a=b"),
        ("null", None),
        ("NULL", None),
    ],
)  # fmt: skip
def test_a_run_is_called_what_was_typed(typed: str, meant: str | None) -> None:
    parsed = OverridesParser.create().parse_override(in_full(f"run_name={typed}"))
    value = parsed.value()
    assert (value if value is None else str(value)) == meant
    assert value is None or not isinstance(value, int | float)


def test_the_same_for_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    config = compose_config(
        [
            *QUICKSTART,
            "output_dir=~/runs=1",
            "+dataset.columns.question=2",
            "dataset.columns.answer=on",
            "dataset.split=7",
            "++model.tokenizer_name=0x1f",
            "resume=600",
            "run_name=1e3",
        ]
    )
    assert config.output_dir == "/users/me/runs=1"
    assert config.dataset.columns == {"question": "2", "answer": "on"}
    assert (config.dataset.split, config.model.tokenizer_name) == ("7", "0x1f")
    assert config.resume.source == "600" and config.run_name == "1e3"


def test_numbers_lists_and_choices_are_not_touched() -> None:
    assert "run_name" in text_keys() and "task.max_steps" not in text_keys()
    for text in ("task.max_steps=1e3", "run_name=${seed}", "run_name=[a]", "mesh=single",
                 "~run_name", "run_name", "+model.architecture.x=1e3"):  # fmt: skip
        assert in_full(text) == text
    assert in_full("run_name=007,b", many_runs=True) == 'run_name="007",b'
    assert in_full("run_name=choice(a,b)", many_runs=True) == "run_name=choice(a,b)"
    with pytest.raises(ConfigError, match="several values"):
        compose_config([*QUICKSTART, "run_name=a,b"])


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), min_size=1)


@given(ANY | st.text("aefilnrstu1._/:@%+-", min_size=1))
def test_quotes_keep_any_text(text: str) -> None:
    parsed = OverridesParser.create().parse_override(f"run_name={quoted(text)}")
    assert parsed.value() == text
    assert quoted("gs://b/x-1.y") == "gs://b/x-1.y"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hydra.run.dir=/tmp/x", "output_dir=FOLDER run_name=NAME"),
        ("hydra.sweep.dir=x", "For several runs add -m"),
        ("hydra.job.chdir=true", "where it was started"),
        ("hydra/launcher=joblib", "For several runs add -m"),
        ("hydra.verbose=true", "do nothing in one run"),
        ("report_to=wandb", "tensorboard --logdir outputs"),
        ("task.report_to=none", "tensorboard --logdir outputs"),
        ("per_device_train_batch_size=4", "task.global_batch_size"),
        ("max_seq_length=4096", "Here it is dataset.block_size."),
        ("gradient_checkpointing=true", "remat=full"),
    ],
)
def test_settings_from_elsewhere_are_explained(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:  # before any file is read
        compose_config([*QUICKSTART, override])
    assert str(caught.value).startswith(f"{override.partition('=')[0]}: given ")
    assert said in str(caught.value)


def test_other_names_lead_to_keys_that_are_there() -> None:
    assert set(SAME.values()) <= set(known_keys())
    assert not {*SAME, *ADVICE} & {key.rsplit(".", 1)[-1] for key in known_keys()}
