"""What the commands of evaluation make of their arguments."""

import pytest
from typer.testing import CliRunner

from opd.errors import ConfigError
from services.cli import app
from services.eval_cli import chat_kwargs, whole_numbers


def test_chat_values_are_json_where_they_can_be() -> None:
    pairs = ["enable_thinking=false", "budget=12", "style=brief=yes", "empty="]
    assert chat_kwargs(pairs) == {"enable_thinking": False, "budget": 12, "style": "brief=yes", "empty": ""}
    assert chat_kwargs(None) == {}


@pytest.mark.parametrize("pair", ["enable_thinking", "=1"])
def test_a_chat_pair_without_key_or_value_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match=f"--chat {pair}: is not KEY=VALUE"):
        chat_kwargs([pair])


def test_depths_are_whole_numbers() -> None:
    assert whole_numbers("--depths", "16, 32,64") == [16, 32, 64]
    for text in ("", "16,x", "1.5"):
        with pytest.raises(ConfigError, match=f"--depths {text}: is no list of whole numbers"):
            whole_numbers("--depths", text)


@pytest.mark.parametrize("command", ["eval", "continuation", "auroc", "preflight", "demo"])
def test_a_seed_below_zero_is_refused_before_anything_runs(command: str) -> None:
    found = CliRunner().invoke(app, [command, "--seed", "-1"])
    assert found.exit_code == 2 and "--seed" in found.output and "equal to 0" in found.output
