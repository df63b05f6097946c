"""Layers that a thread reads ahead are those that are read when they are asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from slimgpt.errors import OutputError
from slimgpt.models.build import empty_model
from slimgpt.models.read_ahead import ReadAhead, look
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weight_conversion import ConvertedFiles
from slimgpt.pipeline.journal_sink import JournalSink
from slimgpt.runtime.distributed import Ranks
from tests.models.families import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("pinned", [False, True])
def test_layers_are_the_same_in_any_order(family, pinned, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(model.config, ConvertedFiles(tmp_path, empty_model(model.config)), torch.float32)
    streamed.read_ahead(torch.device("cuda" if pinned else "cpu"))
    for index in (0, 1, 2, 3, 0, 2, 1, 3):
        layer = streamed.layer(index)
        for name, tensor in model.model.layers[index].state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor), name


def test_the_next_layer_is_read_by_another_thread_and_an_error_comes_when_it_is_asked_for():
    threads, tensors = set(), {"a": torch.ones(3), "b": torch.ones(2)}

    def read(name):
        threads.add(threading.current_thread().name)
        if name == "gone":
            raise OSError("the disk is gone")
        return tensors[name]

    ahead = ReadAhead(read, lambda _: True, CPU)
    ahead.start(["a", "b"])
    assert ahead.take(["a", "b"]) == {}  # they are used where they are mapped
    assert all(name.startswith("read-ahead") for name in threads)
    ahead.start(["gone"])
    assert ahead.take(["a"]) == {}
    ahead.start(["gone"])
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(["gone"])


def test_layers_are_read_ahead_in_the_direction_in_which_they_are_asked_for(tmp_path, monkeypatch):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    streamed, started = StreamedModel(model.config, ConvertedFiles(tmp_path, empty_model(model.config))), []
    streamed.read_ahead(CPU)
    monkeypatch.setattr(streamed.ahead, "start", lambda names: started.append(int(names[0].split(".")[2])))
    for index in (0, 1, 2, 3, 2, 1, 0, 1):
        streamed.layer(index)
    assert started == [1, 2, 3, 1, 0, 2]


def test_what_nobody_has_taken_is_not_read_and_memory_that_cannot_be_pinned_is_done_without(monkeypatch):
    begun, go, reads = threading.Event(), threading.Event(), []

    def read(name):
        reads.append(name)
        begun.set()
        go.wait(10)
        return torch.ones(1)

    ahead = ReadAhead(read, lambda _: True, CPU)
    for names in (["a"], ["b"], ["c"]):
        ahead.start(names)
        begun.wait(10)
    go.set()
    assert ahead.take(["c"]) == {}
    assert reads == ["a", "c"]

    def refuse(_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    ahead = ReadAhead(read, lambda _: True, torch.device("cuda"))
    ahead.start(["a", "b"])
    assert ahead.take(["a", "b"]) == {}


def test_every_page_is_looked_at():
    assert look(torch.ones(3 * 4096 + 1, dtype=torch.uint8)) == 4
    assert look(torch.zeros(0)) == 0


def test_a_layer_that_could_not_be_written_ends_the_run_at_the_next_one():
    class Full:
        def write(self, layer):
            if layer == "second":
                raise OutputError("the disk is full")

    sink = JournalSink(None, Full(), None, Ranks(), Ranks())
    sink.write("first")
    sink.write("second")
    with pytest.raises(OutputError, match="the disk is full"):
        sink.write("third")
    sink.close_layers()


def test_an_interrupt_while_a_layer_is_written_does_not_leave_it_to_itself():
    begun, go, written = threading.Event(), threading.Event(), []

    class Slow:
        def write(self, layer):
            begun.set()
            go.wait(10)
            written.append(layer)

    def interrupted(*_):
        raise KeyboardInterrupt

    sink = JournalSink(None, Slow(), None, Ranks(), Ranks())
    sink.write("first")
    begun.wait(10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink.writing, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sink.write("second")
    go.set()
    sink.close_layers()
    assert written == ["first"]
