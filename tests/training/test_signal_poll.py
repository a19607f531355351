"""How often devices ask each other whether a signal came."""

from types import SimpleNamespace

import torch

from sdmodule.training import signal_guard
from sdmodule.training.signal_guard import SignalPoll
from tests.fake_cuda import fake_cuda


def test_gpus_ask_every_two_seconds_by_the_pace_of_the_slowest(monkeypatch):
    other = [0.0, 0.0]  # the vote of another device: whether it had a signal, and its seconds per step
    now = iter(x / 4 for x in range(1000))  # two readings at each question, so 0.25 seconds for 5 steps below
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda votes, op: votes.copy_(votes.max(torch.tensor(other).to(votes)))
    )
    monkeypatch.setattr(signal_guard, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    poll = SignalPoll()
    trainer = SimpleNamespace(world_size=2, global_step=1, strategy=None)
    with fake_cuda():
        trainer.strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
        assert poll.due(trainer) and not poll.ask(trainer, False)  # the pace is not known yet
        trainer.global_step = 6
        assert poll.due(trainer) and not poll.ask(trainer, False)  # 0.05 seconds a step
        trainer.global_step = 6 + 38
        assert not poll.due(trainer)
        trainer.global_step += 1
        other[1] = 0.5  # the other one is slower
        assert poll.due(trainer) and not poll.ask(trainer, False)
        trainer.global_step += 3
        assert not poll.due(trainer)
        trainer.global_step += 1
        assert poll.due(trainer)
        other[0] = 1.0
        assert poll.ask(trainer, False)


def test_devices_of_a_cpu_ask_after_every_step():
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce_boolean_decision=lambda vote, all: vote)
    trainer = SimpleNamespace(world_size=2, global_step=3, strategy=strategy)
    poll = SignalPoll()
    assert poll.due(trainer) and poll.ask(trainer, True) and not poll.ask(trainer, False) and poll.due(trainer)
