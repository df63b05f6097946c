"""Log-likelihoods of many continuations of few contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.losses.chunked import log_probabilities
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.lookup import check_ids, text_config

Ids = Sequence[int]
Group = tuple[Ids, list[int]]
"""A context and the numbers of the requests that continue it."""

MAX_LOGITS = 1 << 25
"""Logits of one forward pass: they are the largest thing there is, so a batch's stay under about this many."""


def batch_tokens(model: PreTrainedModel) -> int:
    """Tokens per forward pass: as many as keep the device busy."""
    return 2048 if model.device.type == "cpu" else 16384


@torch.no_grad()
@in_eval_mode
def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[tuple[Ids, Ids]],
    max_length: int,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """For every context and continuation: the log-probability of the continuation, and whether it is the greedy one.

    The answers to one question share its context, which therefore goes through the model once. Requests of like
    length go together, and logits are computed only where a continuation is predicted.

    Args:
        requests: token ids of contexts and continuations, neither empty.
        max_length: what is longer loses tokens at the left.
        progress: called with the number of requests that have been answered since the last call.
    """
    used = {token for pair in requests for ids in pair for token in ids}
    check_ids(torch.tensor(sorted(used)), text_config(model.config).vocab_size, "a question of a task")
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    if not _shareable(model):
        for number, (context, continuation) in enumerate(requests):
            room = max(max_length + 1 - len(continuation), 0)
            results[number] = _score_alone(model, [*context[len(context) - min(room, len(context)) :]], continuation)
            if progress:
                progress(1)
        return results
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        room = max_length + 1 - len(continuation)
        groups.setdefault(tuple(context[-room:] if room > 0 else context[:0]), []).append(number)
    for batch in _batches(model, list(groups.items()), requests):
        numbers = [number for _, members in batch for number in members]
        for number, result in zip(numbers, _score(model, batch, [requests[n][1] for n in numbers])):
            results[number] = result
        if progress:
            progress(len(numbers))
    return results


ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose cache holds every token by itself."""


def _shareable(model: PreTrainedModel) -> bool:
    """Whether contexts may be padded and their cache copied: a recurrent state mixes all tokens, padding too."""
    kinds = getattr(text_config(model.config), "layer_types", None) or ATTENTION
    return not getattr(model, "_is_stateful", False) and all(kind in ATTENTION for kind in kinds)


def _score_alone(model: PreTrainedModel, context: list[int], continuation: Ids) -> tuple[float, bool]:
    """The answer to one request, in a pass of its own without cache and padding."""
    ids = torch.tensor([[*context, *continuation]], device=model.device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(continuation) :]
    targets = ids[0, -len(continuation) :]
    values = log_probabilities(logits, targets[:, None])[:, 0]
    return _answer(values.cpu(), logits.argmax(-1).eq(targets).cpu())


def _batches(model: PreTrainedModel, groups: list[Group], requests: Sequence[tuple[Ids, Ids]]) -> Iterator[list[Group]]:
    """Groups of like shape, the longest first: what does not fit shows at once, and the time left is not too short."""

    def longest(group: Group) -> int:
        return max(len(requests[number][1]) for number in group[1])

    tokens, logits = batch_tokens(model), MAX_LOGITS // text_config(model.config).vocab_size
    batch: list[Group] = []
    rows = long = longer = 0
    for group in sorted(groups, key=lambda g: (-len(g[0]), -longest(g), g[1][0])):
        context, rest = max(long, len(group[0])), max(longer, longest(group))
        num_tokens = (len(batch) + 1) * context + (rows + len(group[1])) * rest
        if batch and (num_tokens > tokens or (rows + len(group[1])) * rest > logits):
            yield batch
            batch, rows, context, rest = [], 0, len(group[0]), longest(group)
        batch.append(group)
        rows, long, longer = rows + len(group[1]), context, rest
    if batch:
        yield batch


def _score(model: PreTrainedModel, batch: list[Group], continuations: list[Ids]) -> Iterator[tuple[float, bool]]:
    """The answers to the requests of a batch, in order.

    Contexts are padded at the left, so that all of them end, and all continuations begin, at the same place.
    """
    device = model.device
    rows = torch.tensor([row for row, (_, members) in enumerate(batch) for _ in members], device=device)
    longest = max(len(context) for context, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (context, _) in enumerate(batch):
        ids[row, longest - len(context) :] = torch.tensor(context)
        mask[row, longest - len(context) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    width = max(map(len, continuations))
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=width > 1,
        logits_to_keep=1,
    )
    parts = [output.logits[rows]]  # (requests, 1, vocabulary)
    targets = torch.zeros(len(continuations), width, dtype=torch.long)
    for row, continuation in enumerate(continuations):
        targets[row, : len(continuation)] = torch.tensor(continuation)
    targets = targets.to(device)
    if width > 1:
        cache = output.past_key_values
        cache.batch_select_indices(rows)
        steps = torch.arange(width - 1, device=device)
        more = model(
            input_ids=targets[:, :-1],
            attention_mask=torch.cat([mask[rows], torch.ones_like(targets[:, :-1])], 1),
            position_ids=mask.sum(1)[rows, None] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(more.logits)
    best = torch.cat([logits.argmax(-1) for logits in parts], 1).eq(targets)
    chosen = torch.cat(
        [
            log_probabilities(logits.flatten(0, 1), labels.reshape(-1, 1)).view(labels.shape)
            for logits, labels in zip(parts, targets.split([1, width - 1], 1))
        ],
        1,
    )  # (requests, width)
    for continuation, values, same in zip(continuations, chosen.cpu(), best.cpu()):
        yield _answer(values[: len(continuation)], same[: len(continuation)])


def _answer(values: Tensor, same: Tensor) -> tuple[float, bool]:
    return float(values.sum()), bool(same.all())
