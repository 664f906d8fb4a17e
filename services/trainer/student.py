"""The trained student: its forward pass at a few ids per position, and its optimizer.

N tokens of a micro-batch, H hidden size, T response positions, K ids. Weights are the fp32 masters;
on CUDA the transformer runs under bf16 autocast while the output head and everything after it stays in fp32. Only the
hidden states of response positions go through the head, a chunk of rows at a time, so logits of a whole batch never
exist. Dropout is switched off: the loss is a divergence of the distribution that was sampled.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import CheckpointError, ConfigError, NonFiniteError
from opd.ops import (
    REVERSE_KL,
    FullVocabularyScores,
    OutputHead,
    RowStatistics,
    StudentScores,
    full_divergence,
    score_rows,
    student_scores,
    support_logits,
    top_k_rows,
)
from services.trainer.batch import DistillBatch
from services.trainer.config import OptimSettings
from services.trainer.distributed.sharding import ShardedDecoder, is_sharded, like, release, whole
from services.trainer.dropout import switch_dropout_off
from services.trainer.forward import DocumentForward
from services.trainer.packed_attention import recompute_contexts
from services.trainer.packing import PackedTokens

_HEAD_TOLERANCE = 1e-3
_MIN_DECAYED_DIMS = 2


class Student:
    """Log-probs with gradient of the model being trained."""

    def __init__(
        self,
        model: Any,
        *,
        num_defined_ids: int,
        temperature: float = 1.0,
        row_chunk: int = 256,
        gradient_checkpointing: bool = False,
    ) -> None:
        """`model` is a Hugging Face causal LM, which may be in shards; `ConfigError` when its head is of a form not
        known here."""
        self.model = model
        self._decoder: Callable[..., Any] = ShardedDecoder(model) if is_sharded(model) else model.base_model
        self.num_defined_ids = num_defined_ids
        self.temperature = temperature
        self.row_chunk = row_chunk
        self._gradient_checkpointing = gradient_checkpointing
        switch_dropout_off(model)
        if gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": recompute_contexts}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self._check_head()
        self._forward = DocumentForward(
            model, num_defined_ids=num_defined_ids, decoder=self._decoder, in_one_pass=is_sharded(model)
        )

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.model.parameters())
        return parameter.device

    def scores(
        self,
        batch: DistillBatch,
        ids_TK: Tensor,
        *,
        support_ids_TS: Tensor | None = None,
        wants_entropy: bool = False,
    ) -> StudentScores:
        """Log-probs [T, K] with gradient at `ids_TK`, at the student temperature, normalised over all defined ids.

        `support_ids_TS` asks for the mass outside these ids from the same pass.
        """
        return student_scores(
            self._response_hidden(batch),
            output_head(self.model),
            ids_TK,
            num_defined_ids=self.num_defined_ids,
            support_ids_TS=support_ids_TS,
            wants_entropy=wants_entropy,
            temperature=self.temperature,
            row_chunk=self.row_chunk,
        )

    def support_logits(self, batch: DistillBatch, ids_TK: Tensor) -> Tensor:
        """Tempered logits [T, K] with gradient at `ids_TK` alone: log-probs but for a constant per position."""
        return support_logits(
            self._response_hidden(batch),
            output_head(self.model),
            ids_TK,
            num_defined_ids=self.num_defined_ids,
            temperature=self.temperature,
        )

    def full_divergence(
        self,
        batch: DistillBatch,
        teacher_hidden_TG: Tensor,
        teacher_head: OutputHead,
        ids_TK: Tensor,
        *,
        teacher_temperature: float = 1.0,
        beta: float = REVERSE_KL,
        wants_entropy: bool = False,
    ) -> FullVocabularyScores:
        """The divergence over all defined ids with gradient, and log-probs at `ids_TK` from the same pass."""
        return full_divergence(
            self._response_hidden(batch),
            output_head(self.model),
            teacher_hidden_TG,
            teacher_head,
            ids_TK,
            num_defined_ids=self.num_defined_ids,
            student_temperature=self.temperature,
            teacher_temperature=teacher_temperature,
            beta=beta,
            wants_entropy=wants_entropy,
            row_chunk=self.row_chunk,
        )

    def row_statistics(
        self, tokens: PackedTokens, *, score_top_k: int = 0, temperature: float = 1.0, wants_entropy: bool = False
    ) -> RowStatistics:
        """What `opd.ops.score_rows` says of the rows that predict the response tokens; without a gradient."""
        self.model.eval()
        with torch.no_grad():
            return score_rows(
                self._hidden(tokens),
                output_head(self.model),
                num_defined_ids=self.num_defined_ids,
                sampled_ids_T=tokens.response_ids_T,
                score_top_k=score_top_k,
                temperature=temperature,
                wants_entropy=wants_entropy,
                row_chunk=self.row_chunk,
            )

    def top_k_ids(self, tokens: PackedTokens, score_top_k: int, *, temperature: float = 1.0) -> Tensor:
        """The ids [T, k] alone, as `row_statistics` gives them; `PAD_ID` in a row that is not finite."""
        self.model.eval()
        with torch.no_grad():
            return top_k_rows(
                self._hidden(tokens),
                output_head(self.model),
                num_defined_ids=self.num_defined_ids,
                score_top_k=score_top_k,
                temperature=temperature,
                row_chunk=self.row_chunk,
            )

    def idle_loss(self) -> Tensor:
        """Zero, from a pass that touches every weight: a rank's part in a round for which it has no micro-batch."""
        self.model.train(self._gradient_checkpointing)
        ids_2 = torch.zeros(2, dtype=torch.int64, device=self.device)
        hidden_1H = self._hidden(PackedTokens(input_ids_N=ids_2, lengths=(2,), hidden_index_T=ids_2[:1]))
        return 0.0 * support_logits(hidden_1H, output_head(self.model), ids_2[:1, None], num_defined_ids=1).sum()

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt that several rollouts begin with is computed once in a pass."""
        return self._forward.is_packed

    def num_places(self, tokens: PackedTokens) -> int:
        """At which attention is computed in a pass over these; `DocumentForward.num_places`."""
        return self._forward.num_places(tokens)

    def _response_hidden(self, batch: DistillBatch) -> Tensor:
        """[T, H] with gradient, of the positions that predict the response."""
        # Recomputation of whole layers is tied to training mode in transformers; nothing else differs without dropout.
        self.model.train(self._gradient_checkpointing)
        hidden_TH = self._hidden(batch.tokens)
        if hidden_TH.requires_grad:
            hidden_TH.register_hook(partial(_refuse_non_finite_gradient, batch))
        return hidden_TH

    def _hidden(self, tokens: PackedTokens) -> Tensor:
        """[T, H]"""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            return self._forward(tokens)[tokens.hidden_index_T]

    def _check_head(self) -> None:
        """Compares our reading of the output head with the model's own logits on a short probe."""
        self.model.eval()
        probe_BS = torch.arange(min(8, self.num_defined_ids), device=self.device)[None]
        with torch.no_grad():
            expected_TV = self.model(input_ids=probe_BS, use_cache=False).logits[0].float()
            hidden_TH = self._decoder(input_ids=probe_BS, use_cache=False).last_hidden_state[0]
            found_TV = output_head(self.model).logits(hidden_TH).float()
        worst = (found_TV - expected_TV).abs().max().item()
        # NaN weights compare false and are reported by the first rollout, with its name.
        if worst > _HEAD_TOLERANCE * max(1.0, expected_TV.abs().max().item()):
            raise ConfigError(
                f"student.model: {type(self.model).__name__} computes logits in a way not known here (off by "
                f"{worst:.2g}); use an architecture with a linear output head"
            )


def _refuse_non_finite_gradient(batch: DistillBatch, grad_TH: Tensor) -> None:
    """Here the positions can still be told apart; in the weights' gradient they are one sum."""
    finite_T = grad_TH.isfinite().all(dim=1)
    if not finite_T.all():
        row = int((~finite_T).nonzero()[0])
        raise NonFiniteError(f"the gradient at {batch.name_position(row)} is not finite: the step was not applied")


def output_head(model: Any) -> OutputHead:
    """The head of a Hugging Face causal LM, with the scale and soft-cap its configuration declares."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"student.model: {type(model).__name__} has no linear output head; use a causal language model"
        )
    config = model.config
    scaling = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1.0 / scaling if scaling else 1.0)
    return OutputHead(
        weight_VH=head.weight,
        bias_V=head.bias,
        logit_scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


class StudentOptimizer:
    """AdamW with clipping and linear warm-up; matrices decay, norms and biases do not."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimSettings,
        lr_factor: Callable[[int], float] | None = None,
        *,
        in_step: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`lr_factor` is what the learning rate is multiplied with at a step counted from 0, instead of the warm-up.

        `in_step` is entered where a student in shards waits for other ranks; see `Ranks.in_step`.
        """
        self._in_step = in_step
        self._settings = settings
        self._lr_factor = lr_factor or self._warmup_factor
        release(model)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        # Decay shrinks weights towards zero, which for a norm's gain or a bias is no simpler function.
        decayed = [(name, parameter) for name, parameter in named if parameter.dim() >= _MIN_DECAYED_DIMS]
        others = [(name, parameter) for name, parameter in named if parameter.dim() < _MIN_DECAYED_DIMS]
        self._named = [*decayed, *others]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [parameter for _, parameter in decayed], "weight_decay": settings.weight_decay},
                {"params": [parameter for _, parameter in others], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
        )

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def divide_gradient(self, total: int) -> None:
        """Makes the sum over a step the mean over `total`."""
        for _, parameter in self._named:
            if parameter.grad is not None:
                parameter.grad.div_(total)

    def clip(self) -> float:
        """Scales the gradient to at most `max_grad_norm`; returns its norm before that, finite or not."""
        parameters = [parameter for _, parameter in self._named]
        with self._in_step():
            return float(whole(nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm)))

    def step(self, step: int) -> float:
        """Applies the gradient; returns the learning rate used at `step` (counted from 0)."""
        lr = self._settings.lr * self._lr_factor(step)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        with self._in_step():
            self._adamw.step()
        return lr

    def _warmup_factor(self, step: int) -> float:
        warmup = self._settings.warmup_steps
        return min(1.0, (step + 1) / warmup) if warmup else 1.0

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything AdamW remembers, by `parameter name.slot`; in shards where the student is."""
        return {
            f"{name}.{slot}": value.detach()
            for name, parameter in self._named
            for slot, value in self._adamw.state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over whole tensors, as a checkpoint has them. `CheckpointError` when they belong to another model."""
        known = {name: index for index, (name, _) in enumerate(self._named)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, slot = key.rpartition(".")
            if name not in known:
                raise CheckpointError(f"optimizer state: {name} is no parameter of this student; resume with its model")
            state.setdefault(known[name], {})[slot] = value
        self._check_shapes(state)
        for index, slots in state.items():
            state[index] = {slot: like(value, self._named[index][1]) for slot, value in slots.items()}
        saved = self._adamw.state_dict()
        self._adamw.load_state_dict({"state": state, "param_groups": saved["param_groups"]})

    def _check_shapes(self, state: dict[int, dict[str, Tensor]]) -> None:
        for index, slots in state.items():
            name, parameter = self._named[index]
            wrong = [slot for slot, value in slots.items() if value.dim() and value.shape != parameter.shape]
            if wrong:
                raise CheckpointError(f"optimizer state: {name}.{wrong[0]} has another shape; resume with its model")
