"""Exactly what the assistant says, and that it ends, is a target: whatever the template does around it."""

from __future__ import annotations

import pytest

from halfbyte.data import ChatTemplate, Record, Rendered
from halfbyte.data.encode import encode
from halfbyte.errors import DataError

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and sys %}{% set content = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Mistral 7B v0.3: the system text stands before the LAST user turn, so a prompt is no prefix of the conversation
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.index0 >= rest | length - 2 and sys is defined %}"
    "{{ '[INST] ' + sys + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Qwen3: thinking is shown after the last user turn only, and there even if it is empty
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n')"
    " + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# DeepSeek R1: the generation prompt opens the thinking, the rendered conversation drops it
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Phi-3: EOS after the whole conversation, another token after a turn
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def render(tokenizer, messages, **kwargs) -> Rendered:
    return ChatTemplate(tokenizer).render(Record(line=1, messages=tuple(messages), **kwargs), "data.jsonl:1")


def targets_of(rendered: Rendered) -> list[str]:
    return [piece for piece, is_target in rendered.spans if is_target]


def decoded_targets(tokenizer, rendered: Rendered) -> list[str]:
    """The runs of target tokens, decoded."""
    ((ids, targets),) = encode(tokenizer, [rendered])
    runs, last = [], False
    for token, target in zip(ids.tolist(), targets.tolist(), strict=True):
        if target and not last:
            runs.append([])
        if target:
            runs[-1].append(token)
        last = target
    return [tokenizer.decode(run) for run in runs]


TALK = ("What is the answer?", "four", "I think so, and you?", "  I think\nso \n")
CASES = {
    # name: (template, bos, eos, system works, targets of TALK)
    "chatml": (None, None, "<|im_end|>", True, ["four<|im_end|>", "  I think\nso \n<|im_end|>"]),
    "generation": (GENERATION, None, "<|im_end|>", True, ["four<|im_end|>", "I think\nso \n<|im_end|>"]),
    "llama2": (LLAMA2, "<s>", "</s>", True, [" four </s>", " I think\nso </s>"]),
    "mistral": (MISTRAL, "<s>", "</s>", True, [" four</s>", "   I think\nso \n</s>"]),
    "qwen3": (
        QWEN3, None, "<|im_end|>", True,
        ["four<|im_end|>", "<think>\n\n</think>\n\n  I think\nso \n<|im_end|>"],
    ),
    "deepseek": (DEEPSEEK, "<s>", "</s>", False, ["four</s>", "I think\nso \n</s>"]),
    "gemma": (GEMMA, "<s>", "</s>", False, ["four<end_of_turn>", "I think\nso<end_of_turn>"]),
    "phi3": (PHI3, "<s>", "</s>", True, ["four<|end|>", "  I think\nso \n<|end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
@pytest.mark.parametrize("name", CASES)
def test_targets_are_what_the_assistant_says(make_tokenizer, chat, name, system, trim_offsets) -> None:
    template, bos, eos, system_works, expected = CASES[name]
    options = {} if template is None else {"template": template}
    tokenizer = make_tokenizer(bos=bos, eos=eos, trim_offsets=trim_offsets, **options)
    if system and not system_works:
        assert "system" not in ChatTemplate(tokenizer).roles
        return
    if name == "mistral" and system:  # no prompt of an earlier turn is a prefix: there the content itself is left
        expected = [expected[0].lstrip(), expected[1]]
    messages = chat(*TALK, system=system)
    rendered = render(tokenizer, messages)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(piece for piece, _ in rendered.spans) == rendered.text
    assert targets_of(rendered) == expected
    assert not rendered.add_eos
    # a token with the space before the first word belongs to that word
    assert [run.lstrip() for run in decoded_targets(tokenizer, rendered)] == [run.lstrip() for run in expected]
    ((ids, _),) = encode(tokenizer, [rendered])
    assert ids.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def test_thinking_of_earlier_turns_is_not_in_the_text(make_tokenizer, chat) -> None:
    tokenizer = make_tokenizer(QWEN3, bos=None, eos="<|im_end|>")
    first, last = "<think>\nthe first\n</think>\n\nfour", "<think>\nthe last\n</think>\n\nso"
    rendered = render(tokenizer, chat("What?", first, "and you?", last))
    assert "the first" not in rendered.text
    assert targets_of(rendered) == ["four<|im_end|>", last + "<|im_end|>"]


def test_llama2_with_metaspace_supervises_the_first_word_and_the_end(make_tokenizer, chat) -> None:
    tokenizer = make_tokenizer(LLAMA2, metaspace=True)
    rendered = render(tokenizer, chat("What is the answer?", "The answer is four.", "and you?", "I think so"))
    assert [run.strip() for run in decoded_targets(tokenizer, rendered)] == [
        "The answer is four. </s>", "I think so </s>",
    ]  # fmt: skip


def test_a_template_without_end_token_gets_eos_and_teaches_what_precedes_it(make_tokenizer, chat) -> None:
    tokenizer = make_tokenizer(NO_END)
    rendered = render(tokenizer, chat("What?", "four", "and you?", "so"))
    assert rendered.add_eos
    assert targets_of(rendered) == ["four", "so\n"]
    assert decoded_targets(tokenizer, rendered) == [" four", " so\n</s>"]  # the space is part of the first token


def test_assistant_turns_in_the_prompt_are_context(chatml, chat) -> None:
    assert targets_of(render(chatml, chat("What?", "four", "and you?", "so"), first_target=3)) == ["so<|im_end|>"]


def test_an_empty_turn_or_a_repeated_answer_confuses_nothing(chatml, chat) -> None:
    messages = chat("assistant\nfour", "four", "four<|im_end|>\n<|im_start|>assistant\nfour", "assistant\nfour")
    assert targets_of(render(chatml, messages)) == ["four<|im_end|>", "assistant\nfour<|im_end|>"]


def test_private_use_characters_of_the_data_stay(chatml, chat) -> None:
    answer = "\ue000a\ue001b\ue002c\ue003d"
    assert targets_of(render(chatml, chat("\ue004", answer))) == [answer + "<|im_end|>"]


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "a<s></s><|im_end|>b", "<|im_end|>" * 3]
)
def test_special_token_text_of_the_author_stays_text(make_tokenizer, chat, text) -> None:
    tokenizer = make_tokenizer()
    rendered = render(tokenizer, chat(f"What is {text}?", text, "and?", f"the {text} answer"))
    assert targets_of(rendered) == [f"{text}<|im_end|>", f"the {text} answer<|im_end|>"]
    ((ids, _),) = encode(tokenizer, [rendered])
    assert tokenizer.decode(ids) == rendered.text
    plain = render(tokenizer, chat("What is x?", "x", "and?", "the x answer"))
    ((plain_ids, _),) = encode(tokenizer, [plain])

    def control(ids) -> list[int]:
        return [token for token in ids.tolist() if token < 11]  # the special tokens come first

    assert control(ids) == control(plain_ids)
    assert decoded_targets(tokenizer, rendered) == targets_of(rendered)


def test_special_token_text_with_metaspace_gains_no_space(make_tokenizer, chat) -> None:
    tokenizer = make_tokenizer(LLAMA2, metaspace=True)
    rendered = render(tokenizer, chat("What is </s>?", "the </s> is</s>so"))
    ((ids, _),) = encode(tokenizer, [rendered])
    assert ids.tolist().count(tokenizer.eos_token_id) == 1
    assert "the </s> is</s>so </s>" in tokenizer.decode(ids)


def test_a_tokenizer_that_cannot_keep_special_text_as_text_says_so(chat) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"<unk>": 0, "</s>": 1, "what": 2}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = NO_END
    with pytest.raises(DataError, match=r"^data\.jsonl:1: cannot encode '</s>' as text: the tokenizer makes"):
        encode(tokenizer, [render(tokenizer, chat("what </s> ?", "what"))])


def test_known_roles_are_probed(make_tokenizer) -> None:
    assert ChatTemplate(make_tokenizer(GEMMA)).roles == ("user", "assistant", "tool")
    assert ChatTemplate(make_tokenizer(DEEPSEEK)).roles == ("user", "assistant")
    assert ChatTemplate(make_tokenizer(LLAMA2)).roles == ("system", "user", "assistant")
    assert ChatTemplate(make_tokenizer()).roles == ("system", "user", "assistant", "tool")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_END.replace("m['content']", "m['content'] | upper"), None),
        (NO_END.replace("m['content']", "m['content'][:3]"), "cannot tell what the assistant says"),
        (NO_END.replace("m['content']", "'...'"), "cannot tell what the assistant says"),
        (NO_END + "{{ raise_exception('not\\ntoday') }}", "template refuses the conversation: not today"),
        (NO_END + "{{ messages.__class__.__mro__ }}", "template refuses the conversation"),
        (NO_END + "{{ messages.append(1) }}", "template refuses the conversation"),
    ],
)
def test_templates_that_do_not_verify_are_refused(make_tokenizer, chat, template, message) -> None:
    tokenizer = make_tokenizer(template)
    if message is None:
        assert targets_of(render(tokenizer, chat("What?", "four"))) == ["FOUR\n"]
        return
    with pytest.raises(DataError, match=rf"^data\.jsonl:1: .*{message}"):
        render(tokenizer, chat("What?", "four"))


def test_without_a_template_only_strings_can_be_rendered(make_tokenizer, chat) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(DataError, match=r"no chat template\. Take the instruct variant"):
        render(tokenizer, chat("What?", "four"))
    rendered = render(tokenizer, chat("What? ", "four"), needs_template=False)
    assert rendered.spans == [("What? ", False), ("four", True)]
    assert decoded_targets(tokenizer, rendered) == [" four</s>"]


def test_bos_is_added_to_text_only_and_only_if_the_tokenizer_does(make_tokenizer, chat) -> None:
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(LLAMA2, adds_bos=adds_bos)
        ((text_ids, targets),) = encode(tokenizer, [ChatTemplate(tokenizer).render(Record(line=1, text="four"), "")])
        ((chat_ids, _),) = encode(tokenizer, [render(tokenizer, chat("What?", "four"))])
        assert text_ids.tolist().count(tokenizer.bos_token_id) == int(adds_bos)
        assert targets.tolist()[int(adds_bos) :] == [True] * (len(text_ids) - int(adds_bos))
        assert chat_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_ids_and_targets_on_real_text_with_a_real_tokenizer(smollm2, docstring_rows) -> None:
    template = ChatTemplate(smollm2)
    records = [Record(line=1, messages=tuple(row["messages"])) for row in docstring_rows]
    rendered = [template.render(record, "") for record in records]
    whole = smollm2([r.text for r in rendered], add_special_tokens=False)["input_ids"]
    for row, text_ids, (ids, targets) in zip(docstring_rows, whole, encode(smollm2, rendered), strict=True):
        assert ids.tolist() == text_ids
        assert smollm2.decode(ids[targets]) == row["messages"][-1]["content"] + "<|im_end|>"
        # the ids before the first target are those of the prompt at inference: training and use agree
        prompt = smollm2.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert ids[: targets.argmax()].tolist() == prompt


def test_segments_stand_as_they_are(chatml) -> None:
    """No template, no BOS or EOS of ours; special tokens that the author wrote are those; labelled text is learned."""
    segments = (("<|im_start|>What", False), (" is", True), (" the", False), (" answer<|im_end|>", True))
    rendered = ChatTemplate(chatml).render(Record(line=1, segments=segments), "x")
    assert rendered.text == "<|im_start|>What is the answer<|im_end|>"
    assert rendered.spans == [("<|im_start|>What", False), (" is", True), (" the", False), (" answer<|im_end|>", True)]
    ((ids, targets),) = encode(chatml, [rendered])
    assert ids.tolist() == chatml(rendered.text, add_special_tokens=False)["input_ids"]
    assert chatml.decode(ids[targets]) == " is answer<|im_end|>"
