"""A start that fails says why in one sentence, before anything is loaded if possible; our faults keep a traceback."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pagegraph.compiler.profile.kv_budget import DoesNotFit
from pagegraph.runtime.cli import main
from pagegraph.runtime.config import Config
from pagegraph.runtime.server import engine_process
from pagegraph.runtime.server.engine_settings import EngineSettings
from pagegraph.runtime.server.start_errors import REASON_FILE, sentence


def start_engine(tmp_path: Path, **options: object) -> Path:
    """Run an engine process's start for a configuration; the file that it leaves its reason in."""
    told = EngineSettings(
        config=Config(**options),
        engine_address="ipc:///nowhere",
        drain_flag=tmp_path / "draining",
        pulse=tmp_path / "pulse",
    )
    (tmp_path / "settings.json").write_text(told.to_json())
    with pytest.raises(SystemExit) as end:
        engine_process.main(str(tmp_path / "settings.json"))
    assert end.value.code == 1
    return tmp_path / REASON_FILE


def generate(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["generate", "--config", str(folder), "--prompt", "hello", *arguments])


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pagegraph.compiler.build", "pagegraph.runtime.server.engine_process"):
        monkeypatch.setattr(f"{module}.build_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A model folder without weights and without a chat template."""
    copy = Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))
    (copy / "config.json").write_text("{}")
    (copy / "tokenizer_config.json").write_text("{}")
    return copy


def test_foreseen_errors_are_one_line() -> None:
    assert sentence(DoesNotFit("too\n  long")) == "too long"
    assert sentence(FileNotFoundError("gone")) == "gone"
    assert "too little memory" in sentence(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"))
    assert sentence(KeyError("x")) is None and sentence(AssertionError()) is None


@pytest.mark.usefixtures("nothing_is_built")
def test_the_engine_leaves_its_reason_before_it_loads(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in start_engine(tmp_path, model=str(folder)).read_text()
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    reason = start_engine(tmp_path, model=str(folder)).read_text()
    assert "holds a LoRA adapter" in reason and "\n" not in reason
    assert "Traceback" not in caplog.text


def test_the_engine_keeps_the_traceback_of_our_faults(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("pagegraph.runtime.server.engine_process.build_model", broken)
    (tmp_path / "settings.json").write_text(json.dumps({"config": dataclasses.asdict(Config(model=str(folder)))}))
    with pytest.raises(KeyError):
        engine_process.main(str(tmp_path / "settings.json"))
    assert not (tmp_path / REASON_FILE).exists()


@pytest.mark.usefixtures("nothing_is_built")
def test_a_chat_without_a_template_is_refused_before_it_loads(folder: Path) -> None:
    result = generate(folder, "--chat")
    assert result.exit_code == 1
    assert result.output == f"Error: {folder} has no chat template; leave --chat out to complete the prompt as it is\n"


def test_what_does_not_load_is_one_line(folder: Path) -> None:
    """A configuration that names no kind of model; the traceback stays for log level debug."""
    result = generate(folder)
    assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert isinstance(result.exception, SystemExit)
    assert isinstance(generate(folder, "--log-level", "debug").exception, ValueError)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(rope_parameters=dict(rope_type="yarn")), "'factor'"),
        (dict(vocab_size="x"), "'vocab_size'"),
        (dict(hidden_act="no such"), "no such"),
    ],
)
def test_a_faulty_configuration_is_one_line(folder: Path, tmp_path: Path, wrong: dict[str, object], named: str) -> None:
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama", pad_token_id=0) | wrong))
    result = generate(folder)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert "config.json" in result.output and named in result.output
    reason = start_engine(tmp_path, model=str(folder), device="cpu").read_text()
    assert f"Error: {reason.strip()}" == result.output.strip()
