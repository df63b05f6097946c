"""A setting is one line of `PruneConfig`: its keyword, its option, its help and its check follow from there."""

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
from slimgpt.runtime.settings import settings_of
from slimgpt.runtime.units import CacheTarget

ONE_MORE = """
import inspect, json
from dataclasses import dataclass
import typer
import slimgpt.config as config
from slimgpt.runtime.settings import documents_settings, setting

@dataclass(frozen=True)
class Extended(config.PruneConfig):
    __doc__ = "Settings.\\n\\n    Args:\\n        **settings: all.\\n"
    echo_layers: int = setting(3, "Layers to echo.", check=config.check_at_least_one, commands=config.BOTH)

documents_settings(Extended)
config.PruneConfig = Extended
import slimgpt
from slimgpt.cli import app
made = {command.name: {p.name: p for p in command.params} for command in typer.main.get_command(app).commands.values()}
try:
    refused = config.make_config(echo_layers=0)
except config.UsageError as error:
    refused = str(error)
print(json.dumps({
    "options": [(made[name]["echo_layers"].opts, made[name]["echo_layers"].default, made[name]["echo_layers"].help)
                for name in ("prune", "plan")],
    "keyword": str(inspect.signature(slimgpt.prune).parameters["echo_layers"]),
    "documented": ["echo_layers: layers to echo." in text for text in (slimgpt.prune.__doc__, Extended.__doc__)],
    "value": config.make_config(echo_layers=5).echo_layers,
    "refused": refused,
}))
"""


def options(command):
    return {p.name: p for p in typer.main.get_command(app).commands[command].params}


def test_one_more_field_is_an_option_a_keyword_and_a_line_of_documentation():
    done = subprocess.run([sys.executable, "-c", ONE_MORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "options": [[["--echo-layers"], 3, "Layers to echo."]] * 2,
        "keyword": "echo_layers: int = 3",
        "documented": [True, True],
        "value": 5,
        "refused": "echo_layers is 0; it must be at least 1",
    }


@pytest.mark.parametrize("name", [entry.name for entry in fields(PruneConfig)])
def test_every_setting_has_help_an_option_and_a_keyword(name):
    setting = settings_of(PruneConfig)[name]
    assert setting.help.endswith(".")
    assert options("prune")[name].help == setting.help
    keyword = inspect.signature(slimgpt.prune).parameters[name]
    assert keyword.default == getattr(PruneConfig, name)
    for text in (PruneConfig.__doc__, slimgpt.prune.__doc__):
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
