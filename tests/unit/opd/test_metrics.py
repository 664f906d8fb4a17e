import asyncio
import time

from opd.metrics import OTHER_TENANTS, TeacherMetrics, TrainerMetrics, watch_loop_lag


def test_two_replicas_in_one_process_do_not_share_numbers() -> None:
    first, second = TeacherMetrics(), TeacherMetrics()
    first.count_tokens("math", 12)
    assert b'opd_teacher_tokens_total{tenant="math"} 12.0' in first.render()
    assert b"math" not in second.render()


def test_tenants_are_told_apart_up_to_a_bound() -> None:
    metrics = TeacherMetrics()
    for index in range(150):
        metrics.count_tokens(f"t{index}", 1)
    metrics.count_tokens("t3", 1)
    text = metrics.render().decode()
    assert text.count("opd_teacher_tokens_total{") == 101
    assert 'tenant="t3"} 2.0' in text and f'tenant="{OTHER_TENANTS}"}} 50.0' in text


def test_a_trainer_shows_the_latest_step_only() -> None:
    metrics = TrainerMetrics()
    metrics.publish(1, {"loss/reverse_kl": 0.5, "outcome/accuracy": 0.25})
    metrics.publish(2, {"loss/reverse_kl": 0.4})
    text = metrics.render().decode()
    assert 'opd_trainer_metric{name="loss/reverse_kl"} 0.4' in text and "opd_trainer_step 2.0" in text
    assert "accuracy" not in text


async def test_blocking_code_shows_up_as_lag() -> None:
    metrics = TeacherMetrics()
    task = asyncio.create_task(watch_loop_lag(metrics.loop_lag_seconds, 0.1))
    await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251
    await asyncio.sleep(0.03)
    task.cancel()
    lag = metrics.registry.get_sample_value("opd_teacher_loop_lag_seconds")
    assert lag is not None and 0.1 < lag < 5
