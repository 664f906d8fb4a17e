"""The engine's environment: its rank's GPUs, and nothing of the launcher's."""

import pytest

from opd.errors import ConfigError
from services.trainer.rollout.vllm_environment import engine_devices, without_launcher


def devices(listed: str, local_rank: int, num_local: int, visible: str | None = None, *, on_cuda: bool = True) -> str:
    environ = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(num_local)}
    environ |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return engine_devices(listed, environ, num_ranks=8, on_cuda=on_cuda)


def test_ranks_of_a_machine_share_the_list_out() -> None:
    assert [devices("4,5,6,7", rank, 4) for rank in range(4)] == ["4", "5", "6", "7"]
    assert [devices("4, 5,6,7", rank, 2) for rank in range(2)] == ["4,5", "6,7"]
    # The list is of the machine's devices, whatever the trainer sees of them.
    assert devices("GPU-aa,GPU-bb", 1, 2, visible="0,1") == "GPU-bb"
    assert devices("0,1", 1, 2, on_cuda=False) == "1"


def test_without_a_list_an_engine_has_the_device_of_its_rank() -> None:
    assert [devices("", rank, 2) for rank in range(2)] == ["0", "1"]
    assert [devices("", rank, 2, visible="3, MIG-b") for rank in range(2)] == ["3", "MIG-b"]
    for visible in ("", "-1", "0"):
        assert devices("", 1, 2, visible=visible, on_cuda=False) == ""


def test_a_single_process_has_the_list_to_itself() -> None:
    for listed in ("", "1", "2,3"):
        assert engine_devices(listed, {}, num_ranks=1, on_cuda=True) == listed


@pytest.mark.parametrize(
    ("listed", "environ", "reason"),
    [
        (
            "1,2,3",
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            r"^rollout\.vllm\.cuda_devices=1,2,3: 3 devices do not",
        ),
        ("1", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, r"among the 2 processes .*; name as many for each"),
        ("4,5,", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, r"=4,5,: has a place without a name; write such as"),
        ("1,2", {"LOCAL_RANK": "0"}, r"^LOCAL_WORLD_SIZE=: .*; start with torchrun"),
        ("", {}, r"^LOCAL_RANK=: .*; start with torchrun"),
    ],
)
def test_a_list_that_cannot_be_shared_out_is_refused(listed: str, environ: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        engine_devices(listed, environ, num_ranks=2, on_cuda=True)


def test_nothing_of_the_launcher_reaches_the_engine() -> None:
    launcher = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "1",
    }
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "1", "TORCH_LOGS": "x"}
    assert without_launcher(launcher | kept) == kept
