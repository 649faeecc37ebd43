#!/usr/bin/env python3
# ruff: noqa
"""Makes the small tokenizers and models that cases.jsonl needs: python make_tokenizers.py FOLDER

Each variant becomes a folder of its own with a tokenizer (one of ../models, more tokens, a chat template) and a Llama
of random weights (hidden 32, 2 layers, float32, seed 0), so that FOLDER/<name> is a whole model. Needs torch and
transformers, no network.
"""
import pathlib, sys

MODELS = pathlib.Path(__file__).resolve().parents[1] / "models"
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
IM = ["<|im_start|>", "<|im_end|>"]

# One that reads thinking: taken out of the content, dropped in all turns but the last, an empty block where there is none;
# tool calls as <tool_call> blocks, arguments as text or as an object.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + call.function.name + ' ' }}"
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{ '\n</tool_call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + END)

# Generation opens a thought; answers are written without theirs.
OPENS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")

# Arguments of tool calls item by item: they must be an object.
ARGUMENTS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
             "{% for call in m.tool_calls or [] %}[{{ call.function.name }}"
             "{% for key, value in call.function.arguments | items %} {{ key }}={{ value }}{% endfor %}]{% endfor %}"
             "<|im_end|>\n{% endfor %}" + END)

INST = ("{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('the turns must alternate, beginning with the user') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")

# name: base, template, tokens that are special, tokens that are not, end (the tokenizer's), ends (the generation config's
# others), begin, flags of all added special tokens
VARIANTS = {
    "plain": dict(base="hh_bpe8k"),  # the tokenizer as it is, with HH's template
    "bare": dict(base="hh_bpe8k", template=None),
    "chatml": dict(base="hh_bpe8k", template=CHATML + END, special=IM, other=["<think>", "</think>"], end="<|im_end|>"),
    "tail": dict(base="hh_bpe8k", special=IM, end="<|endoftext|>", ends=["<|im_end|>"],
                 template=CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"),
    "bos": dict(base="hh_bpe8k", special=[*IM, "<|bos|>"], end="<|im_end|>", begin="<|bos|>", template="{{ bos_token }}" + CHATML + END),
    "content": dict(base="hh_bpe8k", special=[*IM, "<think>", "</think>", "<tool_call>", "</tool_call>"], end="<|im_end|>",
                    template=CHATML + END),
    "thinking": dict(base="hh_bpe8k", special=[*IM, "<think>", "</think>", "<tool_call>", "</tool_call>"], end="<|im_end|>", template=THINKING),
    "opens": dict(base="hh_bpe8k", special=IM, other=["<think>", "</think>"], end="<|im_end|>", template=OPENS),
    "dated": dict(base="hh_bpe8k", special=IM, end="<|im_end|>",
                  template="<|im_start|>system\nToday is {{ strftime_now('%Y-%m-%d') }}.<|im_end|>\n" + CHATML + END),
    "strip": dict(base="hh_bpe8k", special=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], flags=dict(rstrip=True),
                  end="<|endoftext|>", ends=["<|end|>"], template="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
                  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"),
    "marks": dict(base="hh_bpe8k", special=["<|stop|>"], other=["<|asks|>", "<|answers|>"], end="<|stop|>",
                  template="{% for m in messages %}{% if m.role == 'user' %}<|asks|>{{ m.content }}{% else %}<|answers|>{{ m.content }}{{ eos_token }}"
                  "{% endif %}{% endfor %}{% if add_generation_prompt %}<|answers|>{% endif %}"),
    "unended": dict(base="hh_bpe8k", template="{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"),
    "named": dict(base="hh_bpe8k", special=IM, end="<|im_end|>", template={"brief": CHATML + END, "full": CHATML + END}),
    "arguments": dict(base="hh_bpe8k", special=IM, end="<|im_end|>", template=ARGUMENTS),
    "broken": dict(base="hh_bpe8k", special=IM, end="<|im_end|>", template="{% for tool in tools %}{{ tool.name }}{% endfor %}" + CHATML + END),
    "inst": dict(base="stories260K", template=INST),
}


def make(folder, variants=VARIANTS):
    import torch
    from transformers import AddedToken, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    for name, v in variants.items():
        t = AutoTokenizer.from_pretrained(MODELS / v["base"])
        t.add_tokens([AddedToken(x, special=True, normalized=False, **v.get("flags", {})) for x in v.get("special", [])], special_tokens=True)
        t.add_tokens([AddedToken(x, special=False, normalized=False, **v.get("other_flags", {})) for x in v.get("other", [])])
        if "end" in v:
            t.eos_token = v["end"]
        if "begin" in v:
            t.bos_token = v["begin"]
        if "template" in v:
            t.chat_template = v["template"]
        ends = [t.eos_token_id, *t.convert_tokens_to_ids(v.get("ends", []))]
        ids = dict(bos_token_id=t.bos_token_id, eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=t.pad_token_id)
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(t), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, initializer_range=0.3, tie_word_embeddings=False, **ids))  # large, so that each token shows
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(pathlib.Path(folder) / name)
        t.save_pretrained(pathlib.Path(folder) / name)


if __name__ == "__main__":
    make(sys.argv[1])
