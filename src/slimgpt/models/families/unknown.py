"""Description of a model of an unknown family, for the error that refuses it."""

from __future__ import annotations

from torch import nn

HELP = "docs/adding-a-family.md"


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The module list that most likely holds the decoder layers: the one with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) and not _inside(name, lists)]
    if not lists:
        return None
    return max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def found_in(model: nn.Module) -> str:
    """The layers of a model as a tree of module names, types and weight shapes; layers of one kind are shown once."""
    named_layers = layers_of(model)
    if named_layers is None:
        return f"{type(model).__name__} has no list of layers"
    name, layers = named_layers
    indices_by_lines: dict[tuple[str, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        indices_by_lines.setdefault(tuple(_lines(layer)), []).append(index)
    text = []
    for lines, indices in indices_by_lines.items():
        numbers = f"{indices[0]}" if len(indices) == 1 else f"{indices[0]}..{indices[-1]} ({len(indices)} layers)"
        text += [f"{name}.{numbers}: {type(layers[indices[0]]).__name__}", *lines]
    return "\n".join(text)


def _lines(layer: nn.Module) -> list[str]:
    lines = []
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        shapes = ", ".join(f"{leaf} {tuple(tensor.shape)}" for leaf, tensor in own.items())
        if shapes:
            lines.append(f"    {name or '(the layer)'}: {type(module).__name__} {shapes}")
    return lines


def _inside(name: str, lists: list[tuple[str, nn.ModuleList]]) -> bool:
    return any(name.startswith(f"{other}.") for other, _ in lists)
