"""The command line: help without torch, flags from the configuration, messages a user can act on."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pagegraph.runtime.cli import COMMANDS, main
from pagegraph.runtime.config import FIELDS, GROUPS, flag_of
from pagegraph.runtime.config_help import ARITHMETIC
from pagegraph.runtime.sampling_params import FROM_GENERATION_CONFIG
from tests.paths import ROOT

SMOLLM2 = str(ROOT / "configs" / "smollm2-cpu.yaml")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def cpu_seconds() -> float:
    """Of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_fast_and_imports_no_torch() -> None:
    code = """
import sys
from pagegraph.runtime import cli
try:
    cli.main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules or "yaml" in sys.modules)
"""

    def once() -> float:
        start = cpu_seconds()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(name in done.stdout for name in COMMANDS)
        return cpu_seconds() - start

    # CPU time, the best of three: what the command costs, not what else the machine does.
    assert min(once() for _ in range(3)) < 0.3


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("bench", "chat", "doctor")])
def test_every_command_has_every_key_as_a_flag(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert all(flag_of(key) in result.output for key in FIELDS)


def test_help_line_of_the_group_matches_the_command() -> None:
    assert COMMANDS["serve"][2] in run("--help").output


def test_unknown_command_and_flag_name_the_nearest() -> None:
    command, flag = run("serv"), run("config", SMOLLM2, "--max-num-seq", "4")
    assert command.exit_code == 2 and "did you mean serve?" in command.output
    assert flag.exit_code == 2 and "--max-num-seqs" in flag.output


def test_config_prints_values_and_sources() -> None:
    result = run("config", SMOLLM2, "--max-model-len", "2K", "--api-key", "s3cret")
    assert result.exit_code == 0, result.output
    rows = {
        line.split()[0]: line.split(None, 1)[1]
        for line in result.output.splitlines()
        if line and not line.startswith("#")
    }
    assert set(rows) == {*FIELDS, *FROM_GENERATION_CONFIG.values()}
    assert rows["max_model_len"].split() == ["2048", "#", "--max-model-len"]
    line = Path(SMOLLM2).read_text().splitlines().index("device: cpu") + 1
    assert rows["device"].endswith(f"smollm2-cpu.yaml:{line}")
    assert rows["block_size"].split() == ["16", "#", "default"]
    assert "s3cret" not in result.output


def test_config_says_how_requests_are_sampled_that_do_not_say(tmp_path: Path) -> None:
    def shown(*arguments: str) -> dict[str, list[str]]:
        result = run("config", str(tmp_path), *arguments)
        assert result.exit_code == 0, result.output
        section = result.output.partition("# sampling where a request does not say")[2]
        return {line.split()[0]: line.split()[1:] for line in section.splitlines()[1:]}

    (tmp_path / "config.json").write_text("{}")
    assert shown()["temperature"] == ["1", "#", "default"]
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "max_new_tokens": 2048, "eos_token_id": 2}')
    rows = shown()
    assert (rows["temperature"], rows["max_tokens"]) == (["0.6", "#", str(file)], ["2048", "#", str(file)])
    assert rows["top_p"] == ["1", "#", "default"]
    assert shown("--generation-config", "none")["temperature"] == ["1", "#", "default"]
    file.write_text('{"temperature": 7}')
    for command in (
        ["config", str(tmp_path)],
        ["serve", str(tmp_path)],
        ["generate", "--config", str(tmp_path), "--prompt", "a"],
    ):
        result = run(*command)
        assert result.exit_code == 1 and "temperature must be a number from 0 to 2" in result.output
    assert "before the model is loaded" in run("config", SMOLLM2).output


def test_the_yaml_spelling_of_a_key_is_a_flag_too() -> None:
    assert "max_num_seqs            7 " in run("config", SMOLLM2, "--max_num_seqs", "7").output


def test_config_lists_the_keys() -> None:
    result = run("config", "--keys")
    assert result.exit_code == 0 and all(key in result.output for key in FIELDS)
    assert run("config").exit_code == 2


@pytest.mark.parametrize(
    "command", [["config", SMOLLM2], ["serve", SMOLLM2], ["generate", "--config", SMOLLM2, "--prompt", "a"]]
)
def test_a_bad_value_is_one_line_and_status_1(command: list[str]) -> None:
    result = run(*command, "--block-size", "12")
    assert result.exit_code == 1
    assert result.output == "Error: block_size=12 is not a power of two of at least 8; 8 works\n"


@pytest.mark.parametrize(("flag", "value"), [("--stop", ""), ("--temperature", "nan")])
def test_generate_refuses_bad_sampling_before_it_loads(flag: str, value: str) -> None:
    result = run("generate", "--config", "org/model", "--prompt", "a", flag, value)
    assert result.exit_code == 1 and result.output.startswith(f"Error: {flag[2:]} must ")


@pytest.mark.parametrize(
    "command", [["serve", "/no/models/m.gguf"], ["generate", "--config", "/no/models/m.gguf", "--prompt", "a"]]
)
def test_a_missing_model_is_refused_before_anything_starts(command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 1 and "does not exist; `make model` fetches it" in result.output


def test_serve_imports_no_torch() -> None:
    code = """
import sys
import pagegraph.runtime.commands.generate, pagegraph.runtime.commands.serve, pagegraph.runtime.server.supervisor
from pagegraph import SamplingParams
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", ["explain", "tune", "verify"])
def test_torch_is_loaded_behind_the_spin_count_that_it_reads(command: str) -> None:
    """Else steps on a CPU beside another busy process take many times as long."""
    code = (
        "import os, sys\n"
        "class Spy:\n"
        "    def find_spec(name, *rest):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT')); sys.stdout.flush(); os._exit(0)\n"
        "sys.meta_path.insert(0, Spy)\n"
        "from pagegraph.runtime.cli import main\n"
        f"main([{command!r}, 'none'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1000", done.stderr


def test_help_of_a_key_has_its_arithmetic_with_the_figures_given() -> None:
    alone = run("serve", "--help=max-queue")
    assert alone.exit_code == 0 and "256 / 256 (max_num_seqs) = 1 times" in alone.output
    with_config = run("serve", "org/name", "--max_num_seqs", "8", "--max-queue", "64", "--help=max_queue")
    assert with_config.exit_code == 0 and "64 / 8 (max_num_seqs) = 8 times" in with_config.output
    assert "here     64  (--max-queue)" in with_config.output
    assert run("--help=max-queue").output == alone.output


def test_help_of_every_key_and_group_is_there() -> None:
    for group, keys in GROUPS.items():
        result = run("config", f"--help={group}")
        assert result.exit_code == 0, result.output
        keys = keys if group not in FIELDS else [group]  # a key of the same name comes first
        assert all(f"{key}  ({flag_of(key)};" in result.output for key in keys)
    assert ARITHMETIC.keys() <= FIELDS.keys()


def test_help_of_a_key_shows_no_api_key() -> None:
    result = run("serve", "org/name", "--api-key", "s3cret", "--help=api-key")
    assert result.exit_code == 0 and "s3cret" not in result.output and "here     ***  (--api-key)" in result.output


def test_help_of_what_is_no_key_names_those_that_may_be_meant() -> None:
    result = run("serve", "--help=seqs")
    assert result.exit_code == 2 and "no key seqs; did you mean max_num_seqs?" in result.output
    wrong = run("serve", "org/name", "--max-num-seqs", "many", "--help=max-num-seqs")
    assert wrong.exit_code == 1 and "max_num_seqs=many is not a whole number" in wrong.output
