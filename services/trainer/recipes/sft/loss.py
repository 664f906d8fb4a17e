"""The loss of fine-tuning: minus the log-prob of each response token, prompts not counted."""

import torch
from torch import Tensor

from opd.errors import NonFiniteError, UnsupportedError
from opd.ops import support_logprobs
from services.trainer.recipes.sft.packing import PackedBatch, SftExample, attention_masks, build_packed_batch
from services.trainer.student import Student, output_head

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_PROBE_TOLERANCE = 1e-3


def token_losses(student: Student, batch: PackedBatch) -> Tensor:
    """-log p(response token) [T] in nats, with gradient, normalised over the student's defined ids at temperature 1.

    On CUDA the layers run under bf16 autocast; the output head and what follows stay in fp32. `NonFiniteError` when a
    loss is no number.
    """
    model = student.model
    # Recomputation of whole layers is tied to training mode; nothing else differs without dropout.
    model.train(model.is_gradient_checkpointing)
    config = model.config.get_text_config(decoder=True)
    on_cuda = student.device.type == "cuda"
    masks = attention_masks(batch, config, torch.bfloat16 if on_cuda else model.dtype)
    with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=on_cuda):
        output = model.base_model(
            input_ids=batch.input_ids_BS,
            position_ids=batch.position_ids_BS,
            attention_mask=masks,
            use_cache=False,
            return_dict=True,
        )
    hidden_TH = output.last_hidden_state.flatten(0, 1)[batch.hidden_index_T]
    logprobs_T1 = support_logprobs(
        hidden_TH,
        output_head(model),
        batch.target_ids_T[:, None],
        num_defined_ids=student.num_defined_ids,
        row_chunk=student.row_chunk,
    )
    losses_T = -logprobs_T1[:, 0]
    if not losses_T.detach().isfinite().all():
        raise NonFiniteError("the loss of a response token is not finite; lower sft.optim.lr or look at the examples")
    return losses_T


def check_packing(student: Student) -> None:
    """`UnsupportedError`, before anything is trained, for an architecture in which neighbours in a row would be seen.

    Two short examples are run side by side and one by one; their losses have to agree.
    """
    config = student.model.config.get_text_config(decoder=True)
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise UnsupportedError(
            f"model_type={config.model_type!r} has {', '.join(sorted(unknown))} layers, which cannot be packed; set "
            "sft.packing=false"
        )
    ids = tuple(range(min(6, student.num_defined_ids)))
    probes = [
        SftExample(name="0", prompt_token_ids=ids[:2], response_token_ids=ids[2:]),
        SftExample(name="1", prompt_token_ids=ids[:1], response_token_ids=ids[1:]),
    ]
    with torch.no_grad():
        packed_T = token_losses(student, build_packed_batch([probes], student.device))
        alone = [token_losses(student, build_packed_batch([[probe]], student.device)) for probe in probes]
    expected_T = torch.cat(alone)
    tolerance = _PROBE_TOLERANCE if student.device.type == "cpu" else 0.1
    worst = float((packed_T - expected_T).abs().max())
    if worst > tolerance * max(1.0, float(expected_T.abs().max())):
        raise UnsupportedError(
            f"model_type={config.model_type!r}: an example's loss changes by {worst:.3g} with its neighbour in a row; "
            "set sft.packing=false"
        )
