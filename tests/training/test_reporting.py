"""Notices between steps."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from madpo_ray.training import reporting
from madpo_ray.training.protocols import Notice
from madpo_ray.training.reporting import Noticeboard
from madpo_ray.training.sites import LocalSite
from support.ranks import MakeJob

CPU = torch.device("cpu")


class LeavingSite(LocalSite):
    """A place whose node is about to be taken away."""

    is_leaving = True

    def node_is_leaving(self) -> bool:
        return self.is_leaving


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reporting, "PREEMPTION_POLL_S", 0.0)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_leaving_node_is_saved_for_once(policy_job: MakeJob) -> None:
    job = policy_job("leaving")
    site = LeavingSite(job)
    board = Noticeboard(job, site, CPU)
    assert [board(), board()] == [Notice.SAVE, Notice.NONE]
    site.is_leaving = False
    assert board() is Notice.NONE
    site.is_leaving = True
    assert board() is Notice.SAVE  # another node


@pytest.mark.usefixtures("one_rank")
def test_stop_request_is_the_most_severe(policy_job: MakeJob) -> None:
    job = policy_job("stopping")
    assert Noticeboard(job, LocalSite(job), CPU)() is Notice.NONE
    hurried = dataclasses.replace(job, deadline=time.time())
    assert Noticeboard(hurried, LeavingSite(job), CPU)() is Notice.OUT_OF_TIME
    job.stop_file.parent.mkdir(parents=True)
    job.stop_file.write_text("")
    assert Noticeboard(job, LocalSite(job), CPU)() is Notice.NONE
    job.stop_file.write_text("SIGTERM")
    assert Noticeboard(hurried, LocalSite(job), CPU)() is Notice.TERMINATED
