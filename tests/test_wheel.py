"""The wheel, installed in a virtual environment of its own, among packages of others that have our folders' names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.paths import ROOT

FOLDERS = ("compiler", "kernels", "runtime", "web")
PROJECT = ("pyproject.toml", "README.md", "LICENSE")
OLDEST_SETUPTOOLS = 77  # pyproject.toml's `requires`
HOSTILE = "raise RuntimeError('a package that is not ours was imported')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build leaves folders behind whose files the next build would take."""
    pytest.importorskip("pip", reason="this environment was made without pip")
    source = tmp_path_factory.mktemp("source")
    for name in PROJECT:
        shutil.copy(ROOT / name, source)
    for name in ("pagegraph", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    built = tmp_path_factory.mktemp("wheel")
    installed = int(metadata.version("setuptools").partition(".")[0])
    isolation = [] if installed < OLDEST_SETUPTOOLS else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", built, source, folder=source)
    (path,) = built.glob("pagegraph-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The virtual environment: our wheel, somebody's distribution `kernels`, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (packages / "kernels").mkdir()
    (packages / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    (packages / "kernels-0.0.1.dist-info").mkdir()
    (packages / "kernels-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n"
    )
    ours = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder that holds packages of our folders' names, none of which can be imported."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HOSTILE)
    return tmp_path


def run(*command: str | Path, folder: Path | None = None) -> str:
    """What a command writes; without this process's PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_files_are_in_the_wheel(wheel: Path) -> None:
    """C++ sources, and what the web serves beside Python."""
    paths = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {f"pagegraph/{path.relative_to(ROOT)}" for path in paths if "__pycache__" not in path.parts}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == wanted | {"pagegraph/__init__.py"}
    assert any(name.endswith(".cpp") for name in found)


def test_the_commands_answer(installed: Path, hostile: Path) -> None:
    assert "serve" in run(installed / "bin" / "runtime", "--help", folder=hostile)
    python = installed / "bin" / "python"
    shown = run(python, "-m", "pagegraph.runtime.cli", "config", "org/name", "--port", "7", folder=hostile)
    assert "org/name" in shown and "--port" in shown


def test_the_offline_api_and_the_kernels_are_ours(installed: Path, hostile: Path) -> None:
    code = """
    import sys
    from pagegraph import LLM, SamplingParams
    import pagegraph.kernels.ops
    sys.path.remove('')  # the folder, which -c puts first
    import kernels
    print(LLM.__module__, SamplingParams(max_tokens=3).max_tokens, kernels.whose, pagegraph.__file__)
    """
    told = run(installed / "bin" / "python", "-c", "\n".join(map(str.strip, code.splitlines())), folder=hostile).split()
    assert told[:3] == ["pagegraph.runtime.llm", "3", "theirs"] and Path(told[3]).is_relative_to(installed)


def test_a_servers_children_start(installed: Path, hostile: Path, tokenizer_folder: Path) -> None:
    """As the supervisor starts them: Python finds the engine's module, gunicorn its settings, the worker and the app."""
    settings = hostile / "settings.json"
    settings.write_text(json.dumps({
        "engine_addresses": [f"ipc://{hostile}/engine"], "model": str(tokenizer_folder), "served_model_name": "tiny",
        "threads": 8, "enough_threads": 8,
    }))  # fmt: skip
    code = f"""
    import subprocess
    from pagegraph.runtime.config import Config
    from pagegraph.runtime.server.child import child_environment, module_command
    from pagegraph.runtime.server.supervisor import WEB_COMMAND, web_arguments
    app = web_arguments(Config(model="tiny"), {str(settings)!r}, descriptor=0)
    for command in (module_command("pagegraph.runtime.config"), [*WEB_COMMAND, *app, "--check-config"]):
        subprocess.run(command, env=child_environment(), check=True)
    """
    script = hostile / "start.py"
    script.write_text("\n".join(line[4:] for line in code.splitlines()))
    run(installed / "bin" / "python", "-P", script, folder=hostile)
