"""Checkpoints: whole or not there, readable by anyone, exact for a resume."""

import json
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.errors import CheckpointError
from services.trainer.checkpoint import CheckpointStore, TrainerState
from services.trainer.config import OptimSettings
from services.trainer.student import StudentOptimizer
from tests.unit.trainer.tiny_training import NUM_IDS, Setup, tiny_model, tiny_tokenizer


def state(step: int) -> TrainerState:
    return TrainerState(step=step, seed=7, prompts_digest="d", config={"optim": {"lr": 0.1}})


def save(store: CheckpointStore, step: int, model: Any = None, num_words: int = NUM_IDS) -> Path:
    model = model or tiny_model(1)
    tensors = StudentOptimizer(model, OptimSettings()).state_tensors()
    return store.save(model, tiny_tokenizer(num_words), tensors, state(step))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_a_folder_any_hugging_face_tool_loads(tmp_path: Path) -> None:
    model = tiny_model(1)
    folder = save(CheckpointStore(tmp_path, keep_last=2), 10, model)
    assert folder.name == "step-000010"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(2, 12)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert next(loaded.parameters()).dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == NUM_IDS
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5 w2"
    assert (folder / "generation_config.json").is_file()
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja"}


def test_the_record_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.latest() is None
    save(store, 3)
    save(store, 12)
    found = store.latest()
    assert found is not None
    assert found.state == state(12)
    assert found.folder == tmp_path / "step-000012"


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2, 10):
        save(store, step)
    assert [folder.name for folder in store.folders()] == ["step-000002", "step-000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1, tiny_model(1))
    save(store, 1, tiny_model(2))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-000001")
    assert torch.equal(loaded.lm_head.weight, tiny_model(2).lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_has_no_record_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    (tmp_path / ".partial-step-000009").mkdir()
    (tmp_path / "step-000009").mkdir()
    assert [folder.name for folder in store.folders()] == ["step-000001"]


def test_random_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    np.random.standard_normal()
    random.gauss(0, 1)
    save(store, 1)
    expected = (torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random())
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    found = store.latest()
    assert found is not None
    found.restore_random_state()
    assert (
        torch.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
        random.gauss(0, 1),
        random.random(),
    ) == expected


def test_a_broken_record_names_the_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    folder = save(store, 1)
    (folder / "trainer/state.json").write_text("{", encoding="utf-8")
    message = r"^none of the 1 checkpoints .*step-000001/trainer/state\.json: cannot be read"
    with pytest.raises(CheckpointError, match=message):
        store.latest()
    record = {"format": 99, "step": 1, "seed": 0, "prompts_digest": "", "config": {}}
    (folder / "trainer/state.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is of another format than 1; resume with the version it is of"):
        store.latest()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        lambda folder: (folder / "trainer/optimizer.safetensors").write_bytes(b""),
        lambda folder: (folder / "trainer/random.safetensors").unlink(),
        lambda folder: (folder / "trainer/state.json").write_text("{", encoding="utf-8"),
        lambda folder: flip_a_bit(folder / "tokenizer.json"),
    ],
    ids=["a bit of the weights", "an empty file", "a missing file", "half a record", "the tokenizer"],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object]
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    folders = [save(store, step) for step in (1, 2)]
    spoil(folders[1])
    found = store.latest()
    assert found is not None and found.folder == folders[0]
    assert "checkpoint" in caplog.text and str(folders[1]) in caplog.text and "it is passed over" in caplog.text
    spoil(folders[0])
    with pytest.raises(CheckpointError, match=r"^none of the 2 checkpoints in .* can be used; the oldest: checkpoint"):
        store.latest()
    # Taking the step again replaces what was damaged.
    save(store, 2)
    again = store.latest()
    assert again is not None and again.state.step == 2


def test_a_damaged_later_one_is_no_reason_to_let_go_of_a_sound_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(CheckpointStore(tmp_path, keep_last=2), 1)
    flip_a_bit(save(CheckpointStore(tmp_path, keep_last=2), 9) / "model.safetensors")
    save(store, 3)
    found = store.latest()
    assert found is not None and found.state.step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000009"]


def test_a_record_from_before_there_were_digests_is_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    path = save(store, 3) / "trainer/state.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["record_sha256"]
    assert set(record.pop("sha256")) > {"model.safetensors", "trainer/optimizer.safetensors", "tokenizer.json"}
    path.write_text(json.dumps(record), encoding="utf-8")
    found = store.latest()
    assert found is not None and found.state.step == 3


def test_a_bit_of_the_record_is_as_good_as_one_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever it is: the record can then not be read, or not be believed, or says what it did."""
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 9)
    path = save(store, 10) / "trainer/state.json"
    written = path.read_bytes()
    step_at = written.index(b'"step": 10') + len('"step": 1')
    for place in [step_at, *range(0, len(written), 7)]:
        spoilt = bytearray(written)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        caplog.clear()
        found = store.latest()
        assert found is not None and found.state == state(found.state.step)
        assert found.state.step == (9 if caplog.records else 10), spoilt[max(0, place - 20) : place + 20]
        if place == step_at:
            assert "state.json: is not what was written, the disk has damaged it; it is passed over" in caplog.text


@pytest.mark.parametrize("has_digests", [True, False], ids=["with digests", "without"])
def test_a_record_of_another_step_than_its_folders_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_digests: bool
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    path = save(store, 2) / "trainer/state.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["record_sha256"]
    if not has_digests:
        del record["sha256"]
    path.write_text(json.dumps(record | {"step": 3}), encoding="utf-8")
    found = store.latest()
    assert found is not None and found.state.step == 1
    assert "step-000002/trainer/state.json: is of step 3, which is not the folder's" in caplog.text
    # Whole and untouched, under another name.
    (tmp_path / "step-000001").rename(tmp_path / "step-000004")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"step-000004/trainer/state\.json: is of step 1"):
        store.latest()


def test_what_a_killed_write_has_left_is_cleared_away(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    left_over = tmp_path / ".partial-step-000001"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"x")
    assert store.latest() is None
    save(store, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """No file may grow beyond this; Python ignores the signal that comes with it, so writing fails with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit_bytes", [400, 20_000, 100_000], ids=["configuration", "weights", "tokenizer"])
def test_a_file_that_cannot_grow_leaves_what_was_there(tmp_path: Path, limit_bytes: int) -> None:
    """The limits stop the writing in one kind of file after the other."""
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as caught, file_size_limit(limit_bytes):
        save(store, 2, num_words=20_000)
    message = caught.value.message
    assert message.startswith(f"checkpoint {tmp_path}/step-000002: cannot be written (")
    assert "File too large" in message and "\n" not in message
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    store = CheckpointStore(small_disk, keep_last=1)
    save(store, 1)
    before = contents(small_disk)
    with pytest.raises(CheckpointError) as caught:
        save(store, 2)
    message = caught.value.message
    assert message.startswith(f"checkpoint {small_disk}/step-000002: cannot be written (")
    assert "No space left on device" in message and "earlier checkpoints are untouched" in message
    assert "\n" not in message
    assert contents(small_disk) == before


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"file/step-000001: cannot be written \(Not a directory\)"):
        save(CheckpointStore(tmp_path / "file", keep_last=1), 1)


def losses(setup: Setup) -> list[float]:
    found: list[float] = []
    setup.loop().run(lambda record: found.append(record.losses["loss/objective"].value))
    return found


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = losses(Setup(num_steps=6))
    first = Setup(num_steps=3)
    begun = losses(first)
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(first.student_model, tiny_tokenizer(), first.optimizer.state_tensors(), state(3))

    found = store.latest()
    assert found is not None
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    second = Setup(num_steps=6, student_model=model, first_step=found.state.step)
    second.optimizer.load_state_tensors(found.optimizer_tensors())
    found.restore_random_state()
    assert begun + losses(second) == whole
    assert len(whole) == 6
