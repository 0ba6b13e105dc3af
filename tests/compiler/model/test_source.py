"""Names of models become folders; a GGUF file is converted once, whoever asks and however many at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pagegraph.compiler.model import source
from pagegraph.compiler.model.source import resolve_model
from tests.paths import MODELS, ROOT

GGUF = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files converted so far; the conversion itself is replaced by one that takes a moment."""
    done: list[Path] = []

    def convert(gguf: Path, folder: Path, keep_quantized: bool) -> None:
        folder.mkdir(parents=True)
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")
        done.append(gguf)

    monkeypatch.setattr(source, "_convert", convert)
    return done


def make_gguf(folder: Path, name: str = "tiny.gguf", content: bytes = b"GGUF") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), cache_dir=tmp_path / "cache") == tmp_path


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no JSON"),
        ("[]", "is not a JSON object"),
        ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_a_configuration_that_is_none_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        resolve_model(str(tmp_path), cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_to_is_read(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = make_gguf(tmp_path / "a"), tmp_path / "cache"
    folder = resolve_model(str(path), cache_dir=cache)
    shutil.rmtree(cache / "models" / "digests", ignore_errors=True)
    (cache / "models" / "digests").write_text("")  # nothing can be made in it, by whoever runs the tests
    monkeypatch.setattr(source, "SETTLED_NS", -1)
    assert resolve_model(str(path), cache_dir=cache) == folder
    assert len(conversions) == 1


def test_a_gguf_file_is_converted_once(tmp_path: Path, conversions: list[Path]) -> None:
    path, cache = make_gguf(tmp_path / "a"), tmp_path / "cache"
    folder = resolve_model(str(path), cache_dir=cache)
    assert folder.parent == cache / "models"
    assert folder.name.startswith("tiny-")
    assert resolve_model(str(path.parent), cache_dir=cache) == folder
    assert resolve_model(str(path.parent), gguf_file=path.name, cache_dir=cache) == folder
    assert conversions == [path]


def test_other_content_is_another_folder(tmp_path: Path, conversions: list[Path]) -> None:
    cache = tmp_path / "cache"
    first = resolve_model(str(make_gguf(tmp_path / "a")), cache_dir=cache)
    moved = resolve_model(str(make_gguf(tmp_path / "b")), cache_dir=cache)
    other = resolve_model(str(make_gguf(tmp_path / "c", content=b"GGUG")), cache_dir=cache)
    assert first == moved != other
    assert len(conversions) == 2


def swap(path: Path, content: bytes) -> None:
    """Write `content` over the file's own, of the same size, and set its times back."""
    stat = path.stat()
    assert len(content) == stat.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("settled", [True, False])
def test_a_file_replaced_in_place_is_another(
    settled: bool, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name, size, inode, modification time, first and last MiB are the old file's; what is between is not."""
    monkeypatch.setattr(source, "SETTLED_NS", -1 if settled else 10**18)
    size, cache = 3 << 20, tmp_path / "cache"
    path = make_gguf(tmp_path / "a", content=bytes(size))
    first = resolve_model(str(path), cache_dir=cache)
    assert resolve_model(str(path), cache_dir=cache) == first
    content = bytearray(size)
    content[size // 2] = 1
    time.sleep(0.02)  # of what a file system's clock ticks
    swap(path, bytes(content))
    other = resolve_model(str(path), cache_dir=cache)
    swap(path, bytes(size))
    assert other != first == resolve_model(str(path), cache_dir=cache)
    assert len(conversions) == 2


def test_content_is_read_once(tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a file that has not changed for a while costs no second reading; a conversion of another version
    is not taken.
    """
    monkeypatch.setattr(source, "SETTLED_NS", -1)
    path, cache, read = make_gguf(tmp_path / "a"), tmp_path / "cache", []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: read.append(1) or whole(*arguments))
    first = resolve_model(str(path), cache_dir=cache)
    assert (
        resolve_model(str(path), cache_dir=cache)
        == resolve_model(str(path), cache_dir=cache, keep_quantized=False)
        == first
    )
    assert len(read) == 1
    monkeypatch.setattr(source, "CONVERSION", source.CONVERSION + 1)
    assert resolve_model(str(path), cache_dir=cache) != first
    assert len(read) == len(conversions) == 2


def test_a_file_that_is_being_written_is_not_converted(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = make_gguf(tmp_path / "a"), hashlib.file_digest

    def digest(*arguments: object) -> object:
        with path.open("ab") as file:
            file.write(b"more")
        return whole(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    with pytest.raises(ValueError, match=r"tiny\.gguf changes while it is read"):
        resolve_model(str(path), cache_dir=tmp_path / "cache")
    assert not conversions


def test_a_file_replaced_while_it_is_converted_is_not_kept(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a rename, as downloads end: what was converted is not what the folder's name says."""
    path, cache, convert = make_gguf(tmp_path / "a"), tmp_path / "cache", source._convert

    def replaced(*arguments: Any) -> None:
        os.replace(make_gguf(tmp_path / "b", content=b"GGUG"), path)
        convert(*arguments)

    monkeypatch.setattr(source, "_convert", replaced)
    with pytest.raises(ValueError, match=r"tiny\.gguf changes while it is read"):
        resolve_model(str(path), cache_dir=cache)
    assert [one for one in (cache / "models").iterdir() if one.is_dir() and one.name.startswith("tiny")] == []
    monkeypatch.setattr(source, "_convert", convert)
    other = resolve_model(str(path), cache_dir=cache)
    os.replace(make_gguf(tmp_path / "b"), path)
    assert resolve_model(str(path), cache_dir=cache) != other
    assert len(conversions) == 3


@pytest.mark.parametrize(
    "damaged", [b"", b"0123456789abcde", b"0123456789abcdef\n", b"../../../../tmp/a", bytes(16), b"\xff" * 16]
)
def test_a_digest_that_is_none_is_made_anew(
    damaged: bytes, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SETTLED_NS", -1)
    path, cache = make_gguf(tmp_path / "a"), tmp_path / "cache"
    folder = resolve_model(str(path), cache_dir=cache)
    (digest,) = (cache / "models" / "digests").iterdir()
    whole = digest.read_bytes()
    digest.write_bytes(damaged)
    assert resolve_model(str(path), cache_dir=cache) == folder
    assert digest.read_bytes() == whole and len(conversions) == 1


def test_those_who_meet_wait_for_one_conversion(tmp_path: Path, conversions: list[Path]) -> None:
    path, found = make_gguf(tmp_path / "a"), []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model(str(path), cache_dir=tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(conversions) == 1


def test_an_interrupted_conversion_is_done_again(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = make_gguf(tmp_path / "a"), tmp_path / "cache"
    whole = source._convert

    def interrupted(gguf: Path, folder: Path, keep_quantized: bool) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(path), cache_dir=cache)
    monkeypatch.setattr(source, "_convert", whole)
    folder = resolve_model(str(path), cache_dir=cache)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_several_gguf_files_must_be_chosen_from(tmp_path: Path, conversions: list[Path]) -> None:
    make_gguf(tmp_path / "a", "one.gguf")
    two = make_gguf(tmp_path / "a", "two.gguf")
    with pytest.raises(ValueError, match=r"one\.gguf, two\.gguf.*gguf_file"):
        resolve_model(str(two.parent), cache_dir=tmp_path)
    assert resolve_model(str(two.parent), gguf_file="two.gguf", cache_dir=tmp_path).name.startswith("two-")


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "gone.gguf", "a/b/c"])
def test_missing_paths_are_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=name):
        resolve_model(name, cache_dir=tmp_path)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        resolve_model(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="another kind"):
        resolve_model(str(tmp_path / "model.bin"), cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        resolve_model(str(tmp_path), gguf_file="absent.gguf", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "config, base",
    [('{"base_model_name_or_path": "org/base"}', "into org/base"), ("{", "into the model it was trained on")],
)
def test_an_adapter_is_no_model(config: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"LoRA adapter and no model.*{base}"):
        resolve_model(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "config.json").write_text("{}")  # some trainers leave the model's beside it
    with pytest.raises(ValueError, match="LoRA adapter"):
        resolve_model(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path), cache_dir=tmp_path) == tmp_path


@pytest.mark.parametrize("trusted", [False, True])
def test_the_hub_gives_only_what_is_served(trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = resolve_model("owner/model", revision="abc", cache_dir=tmp_path, trust_remote_code=trusted)
    assert folder == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "abc")
    assert ("*.py" in asked["allow_patterns"]) is trusted
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in asked["allow_patterns"])


def test_without_weights_no_safetensors_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append(options["ignore_patterns"])
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve_model("org/model", cache_dir=tmp_path)
    resolve_model("org/model", cache_dir=tmp_path, weights=False)
    assert ["*.safetensors" in one for one in asked] == [False, True]


def test_what_the_hub_does_not_give_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="owner/model.*no connection"):
        resolve_model("owner/model", cache_dir=tmp_path)


def test_a_converted_model_is_found_without_torch(tmp_path: Path, conversions: list[Path]) -> None:
    path, cache = make_gguf(tmp_path / "a"), tmp_path / "cache"
    resolve_model(str(path), cache_dir=cache)
    program = (
        "import sys; from pathlib import Path; from pagegraph.compiler.model.source import resolve_model;"
        f"resolve_model({str(path)!r}, cache_dir=Path({str(cache)!r}));"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.skipif(not GGUF.is_file(), reason=f"{GGUF.name} is not in models/")
def test_converts_a_real_file(tmp_path: Path) -> None:
    """The converted model knows a fact, which it would not with rotary halves or biases in the wrong order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(str(GGUF), cache_dir=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"] == [0, 2]
    )
    assert (folder / "chat_template.jinja").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = model(prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
