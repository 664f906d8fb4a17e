"""The testbed's tokenizer: byte-level BPE with 512 ids, every digit a token of its own.

The alphabet holds the 243 bytes that occur in UTF-8 and no others, so any text round-trips and every id can occur in
text. A word takes its leading space, and its trailing space in front of a digit, so that arithmetic stays short.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY_SIZE = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPLIT_PATTERN = r"\d| ?[A-Za-z]+(?: (?=\d))?|\s(?=\d)| ?[^\sA-Za-z\d]+(?: (?=\d))?|\s+"
# No UTF-8 text holds these bytes.
IMPOSSIBLE_BYTES = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_characters() -> dict[int, str]:
    """Byte value to the printable character that stands for it in byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(0x100) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(shifted)}


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the BPE merges on texts and wrap them with the special tokens and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [character for byte, character in byte_characters().items() if byte not in IMPOSSIBLE_BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def fragments_of(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Texts of all tokens that are text by themselves, in id order; parts of characters and special tokens are not."""
    texts = [tokenizer.decode([index]) for index in range(len(tokenizer)) if index not in tokenizer.all_special_ids]
    return tuple(text for text in texts if "\ufffd" not in text)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load from a model folder, the way any user of the models does."""
    return AutoTokenizer.from_pretrained(path)


def prompt_text(prompt: str) -> str:
    """The ChatML text of one user message and the opening of the assistant's turn, as the chat template writes it."""
    return f"{START}user\n{prompt}{END}\n{START}assistant\n"
