"""Text rows: through the chat template and the tokenizer, as the teacher is to see them."""

import json
from pathlib import Path

from services.score_file.rows import RowReader, count_rows
from services.score_file.settings import ScoreFileSettings
from tests.unit.score_file.test_scoring import INFO
from tests.unit.trainer.tiny_training import tiny_tokenizer


def test_text_and_messages_become_ids(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "w5 w6", "response": "w7 <eos>"},
        {"prompt": [{"role": "user", "content": "w5 w6"}], "response": [7, 1]},
        {"prompt": [5, 6, 2], "response": "w7 <eos>"},
    ]
    source.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert count_rows(source) == 3
    settings = ScoreFileSettings(source=source, target=tmp_path / "out.parquet", score_top_k=2)
    found = list(RowReader(settings, tiny_tokenizer(), INFO).read())
    assert [row.request.prompt_token_ids.tolist() for row in found] == [[5, 6, 2]] * 3
    assert [row.request.response_token_ids.tolist() for row in found] == [[7, 1]] * 3
    # Equal content has an equal key, wherever it stands in the file.
    assert len({row.key for row in found}) == 1
