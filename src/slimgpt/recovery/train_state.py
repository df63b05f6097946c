"""A training run's state as safetensors and JSON, so that nothing is pickled and a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import TrainerState

from slimgpt.checkpoint.kept_files import check_file, file_checksums, read_values, reading, write_values
from slimgpt.errors import OutputError, ResumeError
from slimgpt.io.tensors import ordered_tensors, write_tensors
from slimgpt.recovery.sharding import full_tensor, is_sharded, sharded_like

WEIGHTS, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "trainer_state.json"
SCALARS = "scalars.json"
CHECKSUMS = "checksums.json"
FILES = (WEIGHTS, OPTIMIZER, STATE, SCALARS)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are being trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def send_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Give this process's rows to the one that calls :func:`write_state`, where a model is divided."""
    tensors, _ = _split(optimizer)
    for group in (trainable(model), tensors):
        for _, tensor in ordered_tensors(group):
            full_tensor(tensor.detach())


def write_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    state: TrainerState,
) -> Path:
    """Save the state after ``state.global_step`` steps as a folder that appears whole or not at all.

    Of a divided model one tensor at a time is gathered, while the other processes call :func:`send_state`.

    Raises:
        OutputError: the disk is full; earlier states are kept.
    """
    target = folder / f"step-{state.global_step:08d}"
    draft = folder / f".draft-{state.global_step:08d}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        tensors, scalars = _split(optimizer)
        write_tensors(trainable(model), draft / WEIGHTS, whole=_copied if is_sharded(model) else full_tensor)
        generators = {f"rng.{device}": numbers for device, numbers in _generators().items()}
        write_tensors({**tensors, **generators}, draft / OPTIMIZER, whole=full_tensor)
        scalars["scheduler"] = scheduler.state_dict() if scheduler is not None else {}
        (draft / SCALARS).write_text(json.dumps(scalars), encoding="utf-8")
        state.save_to_json(str(draft / STATE))
        write_values(draft / CHECKSUMS, file_checksums(draft / name for name in FILES))
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OutputError(f"writing {target} failed: {error}; free some space, then go on with --resume") from error
    return target


def states(folder: Path) -> list[Path]:
    """The saved states, oldest first."""
    return sorted(folder.glob("step-*"))


def keep_only(folder: Path, steps: set[int]) -> None:
    """Remove the states of other steps."""
    for path in states(folder):
        if int(path.name.removeprefix("step-")) not in steps:
            shutil.rmtree(path, ignore_errors=True)


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a state's weights into the parameters being trained.

    Raises:
        ResumeError: the files are damaged or of another model.
    """
    with _checked(path, WEIGHTS):
        weights = load_file(path / WEIGHTS)
    own = trainable(model)
    if weights.keys() != own.keys():
        raise ResumeError(f"{path} holds other weights than this run trains; start anew with --overwrite")
    with torch.no_grad(), reading(path / WEIGHTS):
        for name, parameter in own.items():
            parameter.copy_(sharded_like(parameter, weights[name]))


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any, learning_rate: float) -> None:
    """Put a state into the optimizer and the scheduler; the learning rate may be another one than before.

    Raises:
        ResumeError: the files are damaged.
    """
    with _checked(path, OPTIMIZER):
        tensors = load_file(path / OPTIMIZER)
    with _checked(path, SCALARS):
        scalars = json.loads((path / SCALARS).read_text(encoding="utf-8"))
        optimizer.load_state_dict(_divided(_joined(tensors, scalars), optimizer))
        scheduler.load_state_dict(scalars["scheduler"])
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]
    for group, factor in zip(optimizer.param_groups, _factors(scheduler)):
        group["initial_lr"], group["lr"] = learning_rate, learning_rate * factor
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def load_generators(path: Path) -> None:
    """Set the random number generators to a state's.

    Raises:
        ResumeError: the file is damaged.
    """
    with _checked(path, OPTIMIZER):
        tensors = load_file(path / OPTIMIZER)
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])


def load_progress(path: Path) -> TrainerState:
    """Progress of a saved state.

    Raises:
        ResumeError: the file is damaged.
    """
    with _checked(path, STATE):
        return TrainerState.load_from_json(str(path / STATE))


def _copied(tensor: Tensor) -> Tensor:
    """All rows, in memory of their own: NumPy, through which tensors are written, would keep FSDP from freeing what it
    has gathered."""
    return full_tensor(tensor) if isinstance(tensor, DTensor) else tensor.detach().clone()


@contextmanager
def _checked(path: Path, name: str) -> Iterator[None]:
    """Read a file of a state, if it is as it was written.

    Raises:
        ResumeError: it is not.
    """
    checksums = read_values(path / CHECKSUMS)
    with reading(path / CHECKSUMS):
        checksum = checksums[name]
    check_file(path / name, checksum)
    with reading(path / name):
        yield


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _factors(scheduler: Any) -> list[float]:
    """The schedule's factor of the learning rate for every group at its step."""
    return [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]


def _split(optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors with flat names, and the rest as JSON values."""
    state = optimizer.state_dict() if optimizer is not None else {}
    tensors, rest = {}, {}
    for number, values in state.get("state", {}).items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                rest[f"{number}.{name}"] = value
    return tensors, {"state": rest, "groups": state.get("param_groups", [])}


def _joined(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    numbers = {name: value for name, value in tensors.items() if not name.startswith("rng.")}
    for key, value in {**numbers, **scalars["state"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    return {"state": state, "param_groups": scalars["groups"]}


def _divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state with moments divided as the parameters of ``optimizer`` are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: sharded_like(parameters[number], value) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
