import asyncio
import time

from opd.metrics import OTHER_TENANTS, TeacherMetrics, watch_loop_lag


def test_two_replicas_in_one_process_do_not_share_numbers() -> None:
    first, second = TeacherMetrics(), TeacherMetrics()
    first.count_usage("math", num_tokens=12, engine_s=0.5)
    assert b'opd_teacher_tokens_total{tenant="math"} 12.0' in first.render()
    assert b"math" not in second.render()


def test_tenants_are_told_apart_up_to_a_bound() -> None:
    metrics = TeacherMetrics()
    for index in range(150):
        metrics.count_usage(f"t{index}", num_tokens=1, engine_s=0.1)
    metrics.count_usage("t3", num_tokens=1, engine_s=0.1)
    text = metrics.render().decode()
    assert text.count("opd_teacher_tokens_total{") == 101
    assert 'tenant="t3"} 2.0' in text and f'tenant="{OTHER_TENANTS}"}} 50.0' in text


def test_only_known_tenants_are_told_apart_once_they_are_known() -> None:
    metrics = TeacherMetrics()
    metrics.know_tenants(["math", "code"])
    for tenant, num_tokens in (("math", 10), ("code", 20), ("stranger", 5), ("math", 10), ("other-stranger", 2)):
        metrics.count_usage(tenant, num_tokens=num_tokens, engine_s=0.25)
    text = metrics.render().decode()
    assert 'opd_teacher_tokens_total{tenant="math"} 20.0' in text
    assert 'opd_teacher_requests_total{tenant="math"} 2.0' in text
    assert 'opd_teacher_tenant_engine_seconds_total{tenant="math"} 0.5' in text
    assert f'opd_teacher_tokens_total{{tenant="{OTHER_TENANTS}"}} 7.0' in text and "stranger" not in text
    metrics.know_tenants(["math"])
    text = metrics.render().decode()
    assert "code" not in text.split("opd_teacher_errors")[0] and 'tenant="math"} 20.0' in text


def test_a_replica_says_what_it_serves_once_it_knows() -> None:
    metrics = TeacherMetrics()
    assert b"opd_teacher_info{" not in metrics.render()
    metrics.know_teacher("qwen", "0123abcd")
    assert b'opd_teacher_info{fingerprint="0123abcd",teacher="qwen"} 1.0' in metrics.render()


async def test_blocking_code_shows_up_as_lag() -> None:
    metrics = TeacherMetrics()
    task = asyncio.create_task(watch_loop_lag(metrics.loop_lag_seconds, 0.1))
    await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251
    await asyncio.sleep(0.03)
    task.cancel()
    lag = metrics.registry.get_sample_value("opd_teacher_loop_lag_seconds")
    assert lag is not None and 0.1 < lag < 5
