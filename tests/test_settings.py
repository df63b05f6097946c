"""A setting is one line of its dataclass: its keyword, its option, its help and its check follow from there."""

import inspect
import json
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import typer

import slimgpt
from slimgpt.cli import app
from slimgpt.config import PruneConfig, make_config
from slimgpt.errors import UsageError
from slimgpt.recovery.checks import make_recovery_config
from slimgpt.recovery.config import RecoverConfig
from slimgpt.runtime.settings import settings_of
from slimgpt.runtime.units import CacheTarget

ONE_MORE = """
import inspect, json
from dataclasses import dataclass
import typer
import slimgpt.config as pruning
import slimgpt.recovery.config as recovering
from slimgpt.runtime.setting_checks import check_at_least_one
from slimgpt.runtime.settings import documents_settings, setting

def extend(module, name, commands):
    @dataclass(frozen=True)
    class Extended(getattr(module, name)):
        __doc__ = "Settings.\\n\\n    Args:\\n        **settings: all.\\n"
        echo_layers: int = setting(3, "Layers to echo.", check=check_at_least_one, commands=commands)

    documents_settings(Extended)
    setattr(module, name, Extended)
    return Extended

extended = {
    "prune": extend(pruning, "PruneConfig", pruning.BOTH),
    "recover": extend(recovering, "RecoverConfig", ("recover",)),
}
import slimgpt
from slimgpt.cli import app
from slimgpt.recovery.checks import make_recovery_config

made = {command.name: {p.name: p for p in command.params} for command in typer.main.get_command(app).commands.values()}
for function, make, commands in (
    (slimgpt.prune, pruning.make_config, ("prune", "plan")), (slimgpt.recover, make_recovery_config, ("recover",))
):
    try:
        refused = make(echo_layers=0)
    except slimgpt.SlimGPTError as error:
        refused = str(error)
    chosen = [made[name]["echo_layers"] for name in commands]
    texts = (function.__doc__, extended[function.__name__].__doc__)
    print(json.dumps({
        "options": [(option.opts, option.default, option.help) for option in chosen],
        "keyword": str(inspect.signature(function).parameters["echo_layers"]),
        "documented": ["echo_layers: layers to echo." in text for text in texts],
        "value": make(echo_layers=5).echo_layers,
        "refused": refused,
    }))
"""

OWNERS = {"prune": PruneConfig, "recover": RecoverConfig}
FIELDS = [(command, entry.name) for command, owner in OWNERS.items() for entry in fields(owner)]


def options(command):
    return {p.name: p for p in typer.main.get_command(app).commands[command].params}


def test_one_more_field_is_an_option_a_keyword_and_a_line_of_documentation():
    """In one fresh process, as both kinds of settings must be extended before the commands are made."""
    done = subprocess.run([sys.executable, "-c", ONE_MORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    common = {
        "keyword": "echo_layers: int = 3",
        "documented": [True, True],
        "value": 5,
        "refused": "echo_layers is 0; it must be at least 1",
    }
    option = [["--echo-layers"], 3, "Layers to echo."]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"options": [option, option], **common},
        {"options": [option], **common},
    ]


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_every_setting_has_help_an_option_and_a_keyword(command, name):
    owner, function = OWNERS[command], getattr(slimgpt, command)
    setting = settings_of(owner)[name]
    assert setting.help.endswith(".")
    assert options(command)[name].help == setting.help
    keyword = inspect.signature(function).parameters[name]
    assert keyword.default == getattr(owner, name)
    for text in (owner.__doc__, function.__doc__):
        assert f"    {name}: " in text
        assert "**settings" not in text


def test_a_plan_has_the_options_that_decide_widths_or_their_cost():
    chosen = [name for name, setting in settings_of(PruneConfig).items() if "plan" in setting.commands]
    assert set(settings_of(PruneConfig)) & set(options("plan")) == set(chosen)
    assert {"ratio", "bytes", "seq_len"} <= set(chosen)
    assert "seed" not in chosen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": "many"}, "'many' is no number of parameters; give for example 1.0B"),
        ({"bytes": "8 apples"}, "'8 apples' is no size in bytes; give for example 800MB"),
        ({"kv_cache": "1GB"}, "'1GB' is no limit of a KV cache; give bytes and context"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; it must be below 2\*\*63; give a smaller number"),
        ({"schedule": ",,,"}, "schedule ',,,' is neither a name nor a list of numbers"),
        ({"method": "best"}, "method 'best' is unknown; choose slimgpt, paper"),
        ({"damping": float("nan")}, "damping is nan; it must be 0 or more"),
        ({"distill": "-1"}, "distill is -1; it must be auto, off, or a number of tokens"),
    ],
)
def test_settings_are_refused_when_they_are_made(settings, message):
    with pytest.raises(UsageError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method 'best' is unknown; choose lora, full, distill"),
        ({"schedule": "step"}, "schedule 'step' is unknown; choose cosine, linear or constant"),
        ({"shares": "4,a"}, "shares '4,a' is no list of numbers such as 4,1"),
        ({"max_length": 7}, "max_length is 7; an example needs at least 8 tokens"),
        ({"warmup": 1.0}, r"warmup is 1.0; it must be in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout is nan; it must be in \[0, 1\)"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be more than 0"),
        ({"held_out": -1}, "held_out is -1; it must be 0 or more"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; it must be below 2\*\*63; give a smaller number"),
        ({"batch_size": 6}, "batch_size 6 is no multiple of micro_batch 4"),
        ({"rnak": 3}, "recover has no setting 'rnak'; it has method, epochs"),
    ],
)
def test_settings_of_a_recovery_are_refused_when_they_are_made(settings, message):
    with pytest.raises(UsageError, match=message):
        make_recovery_config(**settings)


@pytest.mark.parametrize("shares", ["4,1", [4, 1], (4.0, 1.0)])
def test_shares_are_numbers_however_they_were_given(shares):
    assert make_recovery_config(shares=shares).shares == (4.0, 1.0)


def test_targets_are_read_once_and_kept_as_they_were_written():
    config = make_config(kv_cache="1GB@32k", bytes="1.5GiB")
    assert (config.param_limit, config.byte_limit) == (None, 3 * 2**29)
    assert config.cache_target is config.cache_target == CacheTarget(10**9, 32768)
    assert (asdict(config)["bytes"], asdict(config)["kv_cache"]) == ("1.5GiB", "1GB@32k")
    assert set(asdict(config)) == {entry.name for entry in fields(PruneConfig)}
    assert PruneConfig(**asdict(config)) == config


def test_settings_and_commands_import_neither_torch_nor_transformers():
    code = "import sys, slimgpt.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
