import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import OverCapacityError
from opd.types import ScoreRequest
from services.teacher_server.batcher import BatchLimits, FairBatcher, Intake, Ticket


def request(tenant: str, num_tokens: int, name: str = "r") -> ScoreRequest:
    return ScoreRequest(
        rollout_id=name,
        tenant=tenant,
        teacher="tiny",
        prompt_token_ids=np.ones(1, np.int32),
        response_token_ids=np.ones(num_tokens - 1, np.int32),
    )


def admit(
    batcher: FairBatcher,
    tenant: str,
    num_tokens: int,
    *,
    name: str = "r",
    alone: bool = False,
    intake: Intake = Intake.QUEUE,
) -> Ticket:
    found = request(tenant, num_tokens, name)
    return batcher.admit(found, intake=intake, alone=alone, now_s=0.0, deadline_s=9.0)


def drain(batcher: FairBatcher) -> list[list[Ticket]]:
    batches = []
    while batch := batcher.next_batch():
        batches.append(batch)
    return batches


def test_a_batch_closes_at_the_token_budget_and_keeps_the_order() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=100))
    for index in range(5):
        admit(batcher, "a", 40, name=str(index))
    names = [[ticket.request.rollout_id for ticket in batch] for batch in drain(batcher)]
    assert names == [["0", "1"], ["2", "3"], ["4"]]


def test_a_batch_closes_at_the_number_of_requests() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_requests=3))
    for _ in range(7):
        admit(batcher, "a", 2)
    assert [len(batch) for batch in drain(batcher)] == [3, 3, 1]


def test_a_request_over_the_budget_has_a_batch_of_its_own() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=100, quantum_tokens=10))
    admit(batcher, "a", 500)
    admit(batcher, "b", 20)
    sizes = sorted([ticket.num_tokens for ticket in batch] for batch in drain(batcher))
    assert sizes == [[20], [500]]


def test_a_small_tenant_does_not_wait_behind_a_hog() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=1000, quantum_tokens=100))
    for _ in range(200):
        admit(batcher, "hog", 100)
    admit(batcher, "small", 50)
    assert "small" in {ticket.tenant for ticket in batcher.next_batch()}


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0.5), (3.0, 0.25)])
def test_shares_are_by_tokens_and_weight_however_requests_are_sized(weight: float, expected: float) -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=1000, quantum_tokens=100), {"large": weight})
    for _ in range(4000):
        admit(batcher, "small", 10)
    for _ in range(400):
        admit(batcher, "large", 170)
    served = {"small": 0, "large": 0}
    for _ in range(40):
        for ticket in batcher.next_batch():
            served[ticket.tenant] += ticket.num_tokens
    assert served["small"] / sum(served.values()) == pytest.approx(expected, abs=0.03)


def test_marked_requests_share_a_batch_with_nobody() -> None:
    batcher = FairBatcher(BatchLimits())
    for index in range(6):
        admit(batcher, "a", 10, name=str(index), alone=index in (0, 3))
    names = [[ticket.request.rollout_id for ticket in batch] for batch in drain(batcher)]
    assert names == [["0"], ["1", "2"], ["3"], ["4", "5"]]


def test_a_tenant_without_work_saves_no_grants() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=200, quantum_tokens=100))
    admit(batcher, "a", 10)
    drain(batcher)
    for _ in range(20):
        admit(batcher, "a", 100)
        admit(batcher, "b", 100)
    assert [ticket.tenant for ticket in batcher.next_batch()] == ["a", "b"]


def test_direct_callers_are_refused_over_either_cap_with_numbers_and_a_delay() -> None:
    batcher = FairBatcher(BatchLimits(max_tenant_tokens=100, max_direct_tokens=150))
    admit(batcher, "a", 80, intake=Intake.DIRECT)
    with pytest.raises(OverCapacityError, match="tenant a already hold 80 of 100") as caught:
        admit(batcher, "a", 30, intake=Intake.DIRECT)
    assert caught.value.retry_after_s == 1.0
    with pytest.raises(OverCapacityError, match="direct callers already hold 80 of 150"):
        admit(batcher, "b", 90, intake=Intake.DIRECT)
    admit(batcher, "b", 70, intake=Intake.DIRECT)


def test_the_queue_admits_by_its_own_cap() -> None:
    batcher = FairBatcher(BatchLimits(max_tenant_tokens=10, max_direct_tokens=10))
    admit(batcher, "a", 80)
    admit(batcher, "a", 80)
    admit(batcher, "a", 90, intake=Intake.DIRECT)
    assert batcher.held_tokens() == 250 and batcher.held_tokens(Intake.DIRECT) == 90


def test_delays_follow_the_measured_speed() -> None:
    batcher = FairBatcher(BatchLimits())
    admit(batcher, "a", 1000)
    batcher.record_speed(500, 1.0)
    assert batcher.retry_after_s() == pytest.approx(1.0)
    batcher.record_speed(10_000_000, 1.0)
    assert batcher.retry_after_s() == pytest.approx(0.05)


def test_tokens_are_held_until_settled_and_given_up_tickets_are_never_dealt() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=100))
    first, second, third = (admit(batcher, "a", 40, name=str(index)) for index in range(3))
    batcher.settle(second)
    batcher.settle(second)
    assert (batcher.num_waiting, batcher.held_tokens()) == (2, 80)
    assert batcher.next_batch() == [first, third]
    assert (batcher.num_waiting, batcher.held_tokens()) == (0, 80)
    for ticket in (first, third):
        batcher.settle(ticket)
    assert batcher.held_tokens() == 0 and batcher.next_batch() == []


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_ticket_is_lost_dealt_twice_or_reordered_within_its_tenant(data: st.DataObject) -> None:
    limits = BatchLimits(max_batch_tokens=60, max_batch_requests=5, quantum_tokens=7)
    batcher, admitted, dealt, gone = FairBatcher(limits, {"b": 2.5}), [], [], set()
    for index in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["admit", "admit", "deal", "give up"]))
        if action == "admit":
            tenant, size = data.draw(st.sampled_from("abc")), data.draw(st.integers(2, 90))
            admitted.append(admit(batcher, tenant, size, name=str(index), alone=data.draw(st.booleans())))
        elif action == "deal":
            dealt.append(batcher.next_batch())
        elif waiting := [t for t in admitted if t not in gone and not any(t in batch for batch in dealt)]:
            ticket = data.draw(st.sampled_from(waiting))
            batcher.settle(ticket)
            gone.add(ticket)
    dealt += drain(batcher)
    served = [ticket for batch in dealt for ticket in batch]
    assert sorted(map(id, served)) == sorted(id(ticket) for ticket in admitted if ticket not in gone)
    for tenant in "abc":
        names = [int(ticket.request.rollout_id) for ticket in served if ticket.tenant == tenant]
        assert names == sorted(names)
    for batch in dealt:
        assert len(batch) <= 1 or (sum(t.num_tokens for t in batch) <= 60 and not any(t.alone for t in batch))
    assert batcher.num_waiting == 0


def test_what_direct_callers_were_dealt_is_told_once() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=100))
    for tenant, intake in (("a", Intake.DIRECT), ("a", Intake.QUEUE), ("b", Intake.DIRECT), ("a", Intake.DIRECT)):
        batcher.admit(request(tenant, 20), intake=intake, alone=False, now_s=0.0, deadline_s=9.0)
    assert batcher.collect_direct_tokens() == {}
    drain(batcher)
    assert batcher.collect_direct_tokens() == {"a": 40, "b": 20}
    assert batcher.collect_direct_tokens() == {}


def test_shares_and_caps_change_while_tenants_wait() -> None:
    batcher = FairBatcher(BatchLimits(max_batch_tokens=60, max_tenant_tokens=12, quantum_tokens=12))

    def enter(tenant: str) -> None:
        batcher.admit(request(tenant, 12), intake=Intake.DIRECT, alone=False, now_s=0.0, deadline_s=9.0)

    enter("math")
    with pytest.raises(OverCapacityError, match="tenant math already hold 12 of 12"):
        enter("math")
    batcher.set_shares({"math": 3.0}, {"math": 1200, "code": 1200})
    for _ in range(40):
        enter("math")
        enter("code")
    dealt = [ticket.tenant for _ in range(8) for ticket in batcher.next_batch()]
    assert dealt.count("math") == 3 * dealt.count("code")
    batcher.set_shares({}, {})
    with pytest.raises(OverCapacityError, match="of 12 in-flight"):
        enter("math")
