"""A file becomes samples whose counts add up; what cannot be learned from is dropped and said."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.config import DataConfig
from halfbyte.data import IGNORE_INDEX, count_overlap, load_data
from halfbyte.errors import DataError

BOTH = DataConfig()
TWO_BOS = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def decode(tokenizer: PreTrainedTokenizerFast, example) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE_INDEX])


def test_the_report_counts_everything(write, chatml, chat) -> None:
    rows = [
        {"messages": chat("What?", "four"), "id": 1},
        {"messages": chat("What?", "four"), "id": 2},
        "{oops",
        {"messages": chat("What is it?", "so " * 300)},
        {"messages": chat("and you?", "I think <|im_end|>", system="Be helpful.")},
        {"messages": chat("only a question")},
    ]
    path = write(rows)
    data = load_data(path, chatml, DataConfig(max_seq_len=100, on_bad_line="skip"))
    report = data.report
    assert (report.format, report.read, report.kept, len(data)) == ("messages", 6, 3, 3)
    assert report.dropped == {"not valid JSON": 1, "no assistant turn": 1, "longer than max_seq_len": 1}
    assert report.read == report.kept + sum(report.dropped.values())
    assert report.tokens == len(data.input_ids) == data.offsets[-1] == sum(len(e.input_ids) for e in data)
    assert report.supervised_tokens == sum((e.labels != IGNORE_INDEX).sum() for e in data)
    assert report.supervised_share == report.supervised_tokens / report.tokens
    assert report.longest == data.lengths.max()
    assert report.duplicates == 1
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.lines.tolist() == [1, 2, 5]
    notes = "\n".join(report.notes)
    for note in ("1 samples equal an earlier one", "1 samples hold the text of a special token", "not used: id",
                 "first dropped as 'not valid JSON': ", "data.jsonl:3:2"):  # fmt: skip
        assert note in notes
    assert report.to_dict()["supervised_share"] == pytest.approx(report.supervised_share, abs=1e-6)


def test_examples_have_aligned_labels(write, chatml, chat) -> None:
    data = load_data(write([{"messages": chat("What?", "four", "and?", "so")}]), chatml, BOTH)
    (example,) = data
    assert (example.input_ids.dtype, example.labels.dtype) == (np.int32, np.int64)
    targets = example.labels != IGNORE_INDEX
    assert not targets[0]
    assert (example.labels[targets] == example.input_ids[targets]).all()
    assert decode(chatml, example) == "four<|im_end|>so<|im_end|>"
    with pytest.raises(IndexError):
        data[1]


def test_end_of_turn_is_learned_although_pad_is_eos(write, chatml, chat) -> None:
    chatml.pad_token = chatml.eos_token
    (example,) = load_data(write([{"messages": chat("What?", "four")}]), chatml, BOTH)
    assert chatml.eos_token_id in example.labels


def test_without_mask_every_token_but_the_first_is_a_target(write, chatml, chat) -> None:
    (example,) = load_data(write([{"messages": chat("What?", "four")}]), chatml, DataConfig(mask_prompt=False))
    assert (example.labels != IGNORE_INDEX).sum() == len(example.labels) - 1
    assert example.labels[0] == IGNORE_INDEX


def test_text_is_learned_whole_and_ends_in_eos(write, make_tokenizer) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    (example,) = load_data(write([{"text": "The answer is four.</s>"}]), tokenizer, BOTH)
    ids = example.input_ids.tolist()
    assert tokenizer.decode(ids) == "<s>The answer is four.</s></s>"
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert decode(tokenizer, example) == "The answer is four.</s></s>"


def test_prompt_and_completion_with_and_without_template(write, make_tokenizer) -> None:
    path = write([{"prompt": "What?", "completion": " four"}])
    for template, expected in ((None, " four</s>"), (NO_END, " four\n</s>")):
        tokenizer = make_tokenizer(template)
        data = load_data(path, tokenizer, BOTH)
        assert decode(tokenizer, data[0]) == expected
        assert any("prompt and completion stand in" in note for note in data.report.notes) == (template is not None)


def test_no_end_token_is_mended_and_said(write, make_tokenizer, chat) -> None:
    tokenizer = make_tokenizer(NO_END)
    data = load_data(write([{"messages": chat("What?", "four")}]), tokenizer, BOTH)
    assert data[0].labels[-1] == tokenizer.eos_token_id
    assert "1 samples: the chat template ends in no end token, EOS is appended" in data.report.notes
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: the tokenizer has no EOS token: the model would not learn to stop\. Set"
    ):
        load_data(write([{"messages": chat("What?", "four")}]), tokenizer, BOTH)


def test_long_samples(write, chatml, chat) -> None:
    path = write([{"messages": chat("What?", "so " * 100)}, {"messages": chat("What " * 100, "so")}])
    with pytest.raises(DataError, match=r"data\.jsonl:1: a sample of \d+ tokens: max_seq_len is 64\. Raise data\.max"):
        load_data(path, chatml, DataConfig(max_seq_len=64, on_long="error"))
    data = load_data(path, chatml, DataConfig(max_seq_len=64, on_long="truncate"))
    assert data.report.dropped == {"no supervised tokens": 1}
    assert (len(data), data.report.longest) == (1, 64)
    assert any(note.startswith("2 samples truncated") for note in data.report.notes)
    with pytest.raises(DataError, match=r"data\.jsonl: no training samples: 2 read: 2 longer than max_seq_len"):
        load_data(path, chatml, DataConfig(max_seq_len=64))


def test_nothing_to_train_on(write, chatml, chat) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: no training samples: 0 read"):
        load_data(write(["", "  "], "empty.jsonl"), chatml, BOTH)
    bad = ["{", "}", {"messages": chat("What?", "")}]
    with pytest.raises(DataError, match=r"no training samples: 3 read: 2 not valid JSON, 1 empty text"):
        load_data(write(bad), chatml, DataConfig(format="messages", on_bad_line="skip"))


def test_tokenizers_that_do_not_fit(write, make_tokenizer, chatml, chat) -> None:
    path = write([{"messages": chat("What?", "four")}])
    with pytest.raises(DataError, match=r"data\.jsonl:1: two BOS tokens at the start: the chat template prints both"):
        load_data(path, make_tokenizer(TWO_BOS), BOTH)
    with pytest.raises(DataError, match=r"data\.jsonl:1: token '.+' has id \d+: .* vocabulary ends at 19"):
        load_data(path, chatml, BOTH, vocab_size=20)
    for on_bad_line in ("error", "skip"):
        with pytest.raises(DataError, match=r"data\.jsonl:1: the tokenizer has no chat template"):
            load_data(path, make_tokenizer(None), DataConfig(on_bad_line=on_bad_line))


def test_what_a_template_refuses_is_counted_when_skipping(write, make_tokenizer, chat) -> None:
    refuses = "{% if messages | length > 2 %}{{ raise_exception('one exchange only') }}{% endif %}" + NO_END
    path = write([{"messages": chat("What?", "four")}, {"messages": chat("What?", "four", "and?", "so")}])
    with pytest.raises(DataError, match=r":2: the chat template refuses the conversation: one exchange only"):
        load_data(path, make_tokenizer(refuses), BOTH)
    data = load_data(path, make_tokenizer(refuses), DataConfig(on_bad_line="skip"))
    assert data.report.dropped == {"the chat template refuses the conversation": 1}


def test_a_bos_of_the_template_is_not_doubled(write, make_tokenizer, chat) -> None:
    one_bos = TWO_BOS.replace("{{ bos_token }}", "", 1)
    tokenizer = make_tokenizer(one_bos, adds_bos=True)
    (example,) = load_data(write([{"messages": chat("What?", "four")}]), tokenizer, BOTH)
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_overlap_of_train_and_held_out(write, chatml, chat) -> None:
    rows = [{"messages": chat(f"What {i}?", "four")} for i in range(4)]
    train, held_out = write(rows[:3], "train.jsonl"), write(rows[2:], "eval.jsonl")
    assert count_overlap(load_data(train, chatml, BOTH), load_data(held_out, chatml, BOTH)) == 1


def test_samples_do_not_depend_on_their_neighbours(write, smollm2, docstring_rows) -> None:
    rows = docstring_rows[:300]
    rows[7] = {"messages": [*rows[7]["messages"][:1], {"role": "assistant", "content": "Write <|im_end|> so."}]}
    data = load_data(write(rows), smollm2, BOTH, vocab_size=49152)
    assert data.report.supervised_share > 0.3
    for i in range(0, len(data), 23):
        row = rows[data.lines[i] - 1]
        (alone,) = load_data(write([row], "one.jsonl"), smollm2, BOTH)
        assert (alone.input_ids == data[i].input_ids).all()
        assert decode(smollm2, alone) == row["messages"][-1]["content"] + "<|im_end|>"
