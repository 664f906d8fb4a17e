"""The layers keep what they say and nothing else; that scores stay the same is test_sibling_scores' to show."""

import torch

from services.teacher_server.engines.cache_layers import PromptsLayer, SharedLayer


def states(num_sequences: int, num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(num_sequences, 2, num_tokens, 4, generator=torch.Generator().manual_seed(seed))


def test_prompts_are_copied_out_of_the_rectangle_which_is_not_kept() -> None:
    keys, values = states(3, 9, 0), states(3, 9, 1)
    layer = PromptsLayer({0: 4, 2: 9})
    found = layer.update(keys, values)
    assert found[0] is keys and found[1] is values
    assert set(layer.prompts) == {0, 2} and layer.get_seq_length() == 0
    for row, size in ((0, 4), (2, 9)):
        for kept, whole in zip(layer.prompts[row], (keys, values), strict=True):
            assert torch.equal(kept, whole[row : row + 1, :, :size])
            assert kept.untyped_storage().nbytes() == 4 * kept.numel()


def test_a_shared_prompt_stands_before_every_sequence_and_stays_as_it_is() -> None:
    prompt, own = (states(1, 5, 2), states(1, 5, 3)), (states(3, 2, 4), states(3, 2, 5))
    layer = SharedLayer(*prompt)
    for _ in range(2):
        for found, before, after in zip(layer.update(*own), prompt, own, strict=True):
            assert torch.equal(found, torch.cat([before.repeat(3, 1, 1, 1), after], dim=-2))
        assert layer.get_seq_length() == 5 and layer.keys is prompt[0] and layer.values is prompt[1]
