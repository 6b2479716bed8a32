"""The loop around an engine of plain torch: what a step does, what is logged, and how it ends."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from madpo_ray.config import LossType, PolicyConfig
from madpo_ray.data.batching import MicroBatch, collate
from madpo_ray.data.order import StepPlace
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.training import loop
from madpo_ray.training.loop import TrainingRun, fit, measure_validation, train_step
from madpo_ray.training.objectives import PolicyObjective, SFTObjective
from madpo_ray.training.protocols import NonFiniteError, Notice, Objective, Terms
from madpo_ray.training.schedule import Progress, Schedule
from support.forwards import PAIRS
from support.models import make_model

# beta_dpo chooses its beta from the gaps of a batch, which the host computes.
WITHOUT_READS: tuple[LossType, ...] = ("madpo", "sigmoid", "ipo", "ipo_sum")


class TorchEngine:
    """Gradient descent."""

    device = torch.device("cpu")

    def __init__(self, dropout: float = 0.0) -> None:
        model = make_model(attention_dropout=dropout)
        self.module = ResponseLogps(model)
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=0.01)
        self.boundaries: list[bool] = []

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def __call__(self, batch: MicroBatch) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.module(batch)
        return outputs

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.boundaries.append(is_last)
        loss.backward()

    def step(self) -> float:
        norm = float(torch.nn.utils.get_total_norm(p.grad for p in self.module.parameters()))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def learning_rate(self) -> float:
        return 0.01


class Records:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.published: list[tuple[int, dict[str, float], bool]] = []

    def log(self, progress: Progress, metrics: dict[str, float]) -> None:
        self.logged.append((progress.step, metrics))

    def publish(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None:
        self.published.append((progress.step, metrics, save))

    def last_checkpoint(self) -> str:
        return "no checkpoint"


def make_run(
    total_steps: int,
    *,
    notices: tuple[Notice, ...] = (),
    measured: tuple[float, ...] = (),
    objective: Objective | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> TrainingRun:
    options = PolicyConfig(**{"logging_steps": 1, "save_steps": None, **settings})
    asked = itertools.chain(notices, itertools.repeat(Notice.NONE))
    losses = itertools.chain(measured, itertools.repeat(1.0))
    return TrainingRun(
        engine=TorchEngine(dropout),
        objective=objective or SFTObjective(),
        settings=options,
        schedule=Schedule(options, total_steps, steps_per_epoch=2),
        progress=Progress(),
        reporter=Records(),
        notice=lambda: next(asked),
        measure_validation=lambda: {"eval_loss": next(losses)},
        flops=lambda batch: 10.0,
        machine_flops=100.0,
    )


def records_of(run: TrainingRun) -> Records:
    assert isinstance(run.reporter, Records)
    return run.reporter


def batches(num_steps: int) -> Iterator[MicroBatch]:
    """Micro-batches of three, two and no pairs a step, read by their chosen responses."""
    for step in range(num_steps):
        tokens = sum(len(pair["chosen_ids"]) for pair in PAIRS)
        named = [{**pair, "pair_id": f"pair-{i}"} for i, pair in enumerate(PAIRS)]
        for pairs, is_last in ((named[:3], False), (named[3:], False), ([], True)):
            place = StepPlace(step, len(PAIRS), tokens, is_last)
            yield collate(pairs, packed=False, responses=["chosen_ids"], place=place)


def test_a_step_moves_by_the_gradient_of_the_mean() -> None:
    """Over all pairs, whatever the micro-batches."""
    run = make_run(1)
    plain = ResponseLogps(make_model())
    batch = collate(PAIRS, packed=False, responses=["chosen_ids"])
    loss = -plain(batch)["logps"].sum() / int(batch.response_lengths.sum())
    loss.backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in plain.parameters())

    assert fit(run, batches(1)) is Notice.NONE
    moved = dict(run.engine.module.named_parameters())
    for name, parameter in plain.named_parameters():
        expected = parameter - 0.01 * parameter.grad
        torch.testing.assert_close(moved[name], expected, rtol=1e-5, atol=1e-6)
    ((step, metrics),) = records_of(run).logged
    assert step == 1
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert run.engine.boundaries == [False, False, True]  # type: ignore[attr-defined]


def test_logs_what_a_step_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates by a clock that moves half a second whenever it is asked."""
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    run = make_run(3)
    fit(run, batches(3))
    tokens = sum(len(pair["prompt_ids"]) + len(pair["chosen_ids"]) for pair in PAIRS)
    steps = records_of(run).logged
    assert [step for step, _ in steps] == [1, 2, 3]
    for step, metrics in steps:
        elapsed_s = 0.5 if step == 1 else 1.0  # the pause takes a tick off again
        assert metrics["num_tokens"] == step * tokens
        assert metrics["epoch"] == step / 2
        assert metrics["learning_rate"] == 0.01
        assert metrics["peak_memory_bytes"] > 0
        assert metrics["pairs_per_second"] == 5 / elapsed_s
        assert metrics["tokens_per_second"] == tokens / elapsed_s
        assert metrics["mfu"] == pytest.approx(2 * 10 / elapsed_s / 100)
        assert not {"pairs", "flops", "skipped_steps"} & metrics.keys()


def test_evaluations_are_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of evaluation does not show in the rates."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = make_run(2, eval_steps=1)

    def an_hour() -> dict[str, float]:
        now[0] += 3600
        return {"eval_loss": 1.0}

    run.measure_validation = an_hour

    def a_second_per_step() -> Iterator[MicroBatch]:
        for batch in batches(2):
            now[0] += 1 / 3
            yield batch

    fit(run, a_second_per_step())
    rates = [metrics["pairs_per_second"] for _, metrics in records_of(run).logged]
    assert rates == pytest.approx([5.0, 5.0])


@pytest.mark.parametrize(
    ("notices", "steps", "ended_by"),
    [
        ((), 3, Notice.NONE),
        ((Notice.SAVE,), 3, Notice.NONE),
        ((Notice.TERMINATED,), 1, Notice.TERMINATED),
        ((Notice.NONE, Notice.OUT_OF_TIME), 2, Notice.OUT_OF_TIME),
        ((Notice.NONE, Notice.NONE, Notice.TERMINATED), 3, Notice.NONE),  # it is done anyway
    ],
)
def test_notices_save_and_may_end_a_run(
    notices: tuple[Notice, ...], steps: int, ended_by: Notice
) -> None:
    run = make_run(3, notices=notices)
    assert fit(run, batches(3)) is ended_by
    assert run.progress.step == steps
    saved = [step for step, _, save in records_of(run).published if save]
    asked = [step for step, notice in enumerate(notices, start=1) if notice is not Notice.NONE]
    assert saved == sorted({*asked, *([3] if steps == 3 else [])})


def test_patience_ends_a_run() -> None:
    settings = {"metric_for_best_model": "loss", "eval_steps": 1, "early_stopping_patience": 2}
    run = make_run(9, measured=(3.0, 2.0, 2.5, 2.5, 1.0), **settings)
    assert fit(run, batches(9)) is Notice.NONE
    assert (run.progress.step, run.progress.best_step) == (4, 2)
    assert [values["eval_loss"] for _, values, _ in records_of(run).published] == [3, 2, 2.5, 2.5]


class Modes(SFTObjective):
    """Remembers whether the module was in training mode, and what `training` said."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.seen: list[tuple[bool, bool]] = []

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        self.seen.append((self._engine.module.model.training, training))
        return super().__call__(outputs, batch, training=training)


def test_modes_of_training_and_evaluation() -> None:
    """transformers loads in evaluation mode; an evaluation leaves the module in training mode."""
    run = make_run(2)
    engine = run.engine
    assert isinstance(engine, TorchEngine)
    modes = Modes(engine)
    run.objective = modes
    run.measure_validation = lambda: measure_validation(engine, modes, batches(1))
    run.settings = run.settings.model_copy(update={"eval_steps": 1})
    run.schedule = Schedule(run.settings, 2, steps_per_epoch=2)
    fit(run, batches(2))
    training, evaluation = [(True, True)] * 3, [(False, False)] * 3
    assert modes.seen == [*training, *evaluation, *training, *evaluation]
    assert engine.module.model.training


class NoHostReads(TorchFunctionMode):
    """Fails where the host would wait for the device, to read a tensor."""

    READS: ClassVar = {
        Tensor.item,
        Tensor.cpu,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__bool__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__index__,
        Tensor.nonzero,
        torch.nonzero,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class ReadingInStepsOnly(TorchEngine):
    """Leaves the mode for the optimizer's step, which needs the gradient's norm."""

    def step(self) -> float:
        with torch._C.DisableTorchFunction():
            return super().step()


@pytest.mark.parametrize("loss_type", [*WITHOUT_READS, None])
def test_the_host_waits_once_a_step(loss_type: LossType | None) -> None:
    """Not for a loss, a metric or a shape: the device computes while the next batch is sent."""
    columns = ["margin", "ref_chosen_logps", "ref_rejected_logps"]
    pairs = [{**pair, **dict.fromkeys(columns, 0.5)} for pair in PAIRS]
    place = StepPlace(0, len(PAIRS), 100, True)
    if loss_type is None:  # SFT
        objective: Objective = SFTObjective()
        batch = collate(pairs, packed=True, responses=["chosen_ids"], place=place)
    else:
        objective = PolicyObjective(PolicyConfig(loss_type=loss_type), 0)
        batch = collate(pairs, packed=True, column_names=columns, place=place)
    run = make_run(1, objective=objective)
    run.engine = ReadingInStepsOnly()
    run.engine.train()
    with pytest.raises(AssertionError, match="item waits"), NoHostReads():
        torch.ones(()).item()
    with NoHostReads():
        step = train_step(run, [batch])
    assert step.grad_norm is not None


def test_an_evaluation_has_no_dropout_and_no_gradient() -> None:
    engine = TorchEngine(dropout=0.5)
    engine.train()
    one = measure_validation(engine, SFTObjective(), batches(1))
    assert one == measure_validation(engine, SFTObjective(), batches(1))
    assert one.keys() == {"eval_loss", "eval_entropy"}
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_refuses_data_that_do_not_belong_to_the_step() -> None:
    run = make_run(2)
    with pytest.raises(RuntimeError, match="the data ended at step 0 of 2"):
        train_step(run, [])
    with pytest.raises(RuntimeError, match="the data ended at step 0 of 2"):
        train_step(run, itertools.islice(batches(1), 1))
    with pytest.raises(RuntimeError, match="got pairs of step 1 at step 0"):
        train_step(run, itertools.islice(batches(2), 2, None))


class Summed(SFTObjective):
    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        terms = super().__call__(outputs, batch, training=training)
        return Terms(terms.loss.sum(), terms.metrics)


def test_refuses_a_loss_that_is_not_one_per_pair() -> None:
    with pytest.raises(RuntimeError, match=r"a loss of shape \(\) for 3 pairs"):
        fit(make_run(1, objective=Summed()), batches(1))


class SpoiledOnce(SFTObjective):
    """A loss that is NaN in the first micro-batch of the first step, and a count that is kept."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda loss: loss * math.nan) -> None:
        self._spoil = spoil
        self.state = 0

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        terms = super().__call__(outputs, batch, training=training)
        self.state += 1
        is_spoiled = batch.place.step == 0 and "pair-0" in batch.pair_ids
        return Terms(self._spoil(terms.loss) if is_spoiled else terms.loss, terms.metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state["state"]


def test_a_skipped_step_leaves_no_trace() -> None:
    """No weight moves, nothing is logged of it, and the objective does not count it."""
    objective = SpoiledOnce()
    run = make_run(2, objective=objective, skip_nonfinite=1)
    fit(run, batches(2))
    (_, first), (_, second) = records_of(run).logged
    assert "loss" not in first
    assert "grad_norm" not in first
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 1)
    assert math.isfinite(second["loss"])
    assert objective.state == 3


def endless_gradient(loss: Tensor) -> Tensor:
    """The loss, with the gradient of a square root at 0."""
    return loss + (loss - loss.detach()).sqrt()


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        (SpoiledOnce(), "loss of step 1 is nan"),
        (SpoiledOnce(endless_gradient), "gradient norm of step 1 is (nan|inf)"),
    ],
)
def test_the_last_allowed_skip_fails_and_names_the_pairs(objective: Objective, what: str) -> None:
    pairs = ", ".join(f"pair-{i}" for i in range(5))
    message = f"{what}; the optimizer has not moved. Pairs of the step: {pairs}.*no checkpoint"
    with pytest.raises(NonFiniteError, match=message):
        fit(make_run(2, objective=objective), batches(2))
