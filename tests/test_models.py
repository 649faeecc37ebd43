"""Tokenizer, models and optimizer: how they are made, and which are refused, with the reason."""

import hashlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import (DATA, FEW_ROWS, TINY_RUN, config_of, copy_model, make_trainer, same_weights,
                      tiny_of)
from safetensors.torch import load_file, save_file
from transformers import (CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText,
                          AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel, RobertaConfig,
                          RobertaForCausalLM)

import engine.models
from engine.batches import Example, collate
from engine.forward import response_scores
from engine.models import (as_steps, fingerprint, learning_rate, load_end_ids, load_tokenizer, make_optimizer,
                           optimizer_names, train_tokenizer, update)
from engine.toy import toy

QUICK = [*TINY_RUN, f"eval_data={FEW_ROWS}"]


def small_llama(vocab_size, model_class=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    return model_class(LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=16,
                                   num_hidden_layers=1, num_attention_heads=2, **more))


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(sft_run):
    return AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")


# ---------------------------------------------------------------- tokenizers


def test_the_tiny_tokenizer_is_the_same_each_time():
    texts = [text for row in toy("test", False) for text in (row["prompt"], row["response"])]
    first, second = train_tokenizer(texts), train_tokenizer(iter(texts))
    assert first.get_vocab() == second.get_vocab()
    assert (first.eos_token_id, first.pad_token_id, first.bos_token_id) == (0, 1, None)
    text = "Review of Ünknown 漢字 \n"
    assert first.decode(first(text)["input_ids"]) == text
    assert len(first(" The acting was brilliant.")["input_ids"]) <= 6 < len(first("Xylophones!")["input_ids"])


def test_the_tiny_tokenizer_reads_chats_as_json():
    messages = [{"role": "user", "content": "é"}]
    texts = [messages], [json.dumps(messages, ensure_ascii=False)], ["é"]
    chat, same, other = (train_tokenizer(text).get_vocab() for text in texts)
    assert chat == same != other


def test_what_ends_a_response():
    """stories260K's generation config names </s>, 2, and <s>, 1, which begins the next story."""
    path = os.path.join(DATA, "stories260K")
    tokenizer, config = load_tokenizer(path, [], config_of()), AutoConfig.from_pretrained(path)
    assert load_end_ids(path, config, tokenizer) == [2, 1]
    tokenizer.eos_token = "<unk>"  # the tokenizer's comes first: it closes responses that have none
    assert load_end_ids(path, config, tokenizer) == [0, 2, 1]


def test_models_with_another_tokenizer_are_refused(sft_run, refused):
    other = train_tokenizer(["other words"])
    save("other", other, small_llama(len(other)))
    for loss, key in (("dpo", "reference"), ("kd", "reference"), ("dpo", "reward_model")):
        said = refused(*QUICK, f"loss={loss}", f"model={sft_run}/LATEST", f"{key}=other")
        assert f"{key}={os.path.realpath('other')} has another tokenizer than the model" in said
    # weights without a tokenizer are taken at their word
    save("bare", small_llama(1024))
    make_trainer("loss=dpo", f"model={sft_run}/LATEST", "reference=bare", f"eval_data={FEW_ROWS}")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tokenizer, refused):
    save("small", tokenizer, small_llama(len(tokenizer) - 1))
    assert f"the tokenizer has {len(tokenizer)} tokens, more than the embeddings of" in refused(
        *QUICK, "model=small")


# ---------------------------------------------------------------- models


def test_dropout_is_set_to_0(tokenizer, capsys):
    """Policy and reference, which are equal, would have other numbers: the loss would not be log 2."""
    save("dropping", tokenizer, small_llama(len(tokenizer), attention_dropout=0.5, initializer_range=0.5))
    settings = ["loss=dpo", "model=dropping", "dtype=float64", "compute_dtype=float64", "layout=separate",
                f"eval_data={FEW_ROWS}"]
    trainer = make_trainer(*settings)
    assert "attention_dropout was 0.5, set to 0" in capsys.readouterr().out
    assert trainer.train_step()["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert trainer.policy.training
    trainer = make_trainer(*settings, "exp_name=with")
    trainer.policy.model.layers[0].self_attn.attention_dropout = 0.5
    assert abs(trainer.train_step()["loss"] - math.log(2)) > 1e-3


def test_weights_that_are_missing_are_refused(sft_run, refused):
    copy_model(f"{sft_run}/LATEST", "part")
    weights = load_file("part/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, "part/model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing or of another shape, first model.layers.1.mlp.up_proj.weight" in refused(
        *QUICK, "model=part")
    with open("part/model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert f"the model {os.path.realpath('part')} cannot be loaded: " in refused(*QUICK, "model=part")


def test_a_model_that_looks_ahead_is_refused(tokenizer, refused):
    for name, is_decoder in (("ahead", False), ("causal", True)):
        config = RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, is_decoder=is_decoder, max_position_embeddings=600, initializer_range=1.0)
        torch.manual_seed(0)
        save(name, tokenizer, RobertaForCausalLM(config))
    assert "ahead is no causal language model, its predictions depend on later tokens" in refused(
        *QUICK, "model=ahead")
    make_trainer("model=causal", f"eval_data={FEW_ROWS}")


def test_a_fingerprint_is_of_every_weight():
    model = tiny_of("llama")
    prints = [fingerprint(model), fingerprint(model)]
    with torch.no_grad():
        model.model.norm.weight[-1] += 2**-20
    prints.append(fingerprint(model))
    prints.append(fingerprint(model.bfloat16()))
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_fingerprint_by_hand():
    """The sha256 of a line for each weight: name, type, shape and its own sha256; in the names' order."""
    model = tiny_of("llama")
    lines = [f"{name} {x.dtype} {tuple(x.shape)} {hashlib.sha256(x.numpy().tobytes()).hexdigest()}"
             for name, x in sorted(model.state_dict().items())]
    assert fingerprint(model) == "2-" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_attention_without_a_mask_is_a_gpus_default_in_bfloat16(sft_run, monkeypatch):
    """Where the model's own is sdpa; else it stays as it is, and on a CPU too."""
    def attention(*settings):
        return make_trainer(*QUICK, f"model={sft_run}/LATEST", *settings).policy.config._attn_implementation
    assert attention("compute_dtype=bfloat16") == "sdpa" and attention("attention=varlen") == "varlen"
    monkeypatch.setattr(engine.models, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, device: self)
    assert attention("compute_dtype=bfloat16") == "varlen" and attention() == "sdpa"
    assert attention("compute_dtype=bfloat16", "attention=eager") == "eager"


# ---------------------------------------------------------------- reward models


def test_a_reward_model_is_a_hugging_face_folder(rm_run):
    model = AutoModelForSequenceClassification.from_pretrained(f"{rm_run}/LATEST")
    tokenizer = AutoTokenizer.from_pretrained(f"{rm_run}/LATEST")
    assert model.config.num_labels == 1
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    prompt, end = "Review of The Silent Garden:", tokenizer.eos_token
    praise, blame = " The plot was superb." * 4, " The plot was awful." * 4
    batch = tokenizer([prompt + praise + end, prompt + blame + end, prompt + blame[:20] + end], padding=True,
                      return_tensors="pt")
    scores = model(**batch).logits[:, 0]
    assert scores[0] > scores[1] + 2
    # ours of the same tokens, as far as float32 goes: a score at another token is another by far
    policy = make_trainer("loss=rm", f"model={rm_run}/LATEST", f"eval_data={FEW_ROWS}").policy
    rows = [ids[mask == 1].numpy() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    start = len(tokenizer(prompt)["input_ids"])
    pair = Example("x", rows[0][:start], tuple(row[start:] for row in rows[:2]), {})
    assert response_scores(policy, collate([pair]))[:, 0].tolist() == pytest.approx(
        scores[:2].tolist(), abs=1e-4)


def test_a_tokenizer_whose_padding_is_its_end(sft_run, tokenizer):
    """The end token must count: transformers refuses batches of such a model, single texts are right."""
    tokenizer.pad_token = tokenizer.eos_token
    copy_model(f"{sft_run}/LATEST", "base")
    save("base", tokenizer)
    trainer = make_trainer("loss=rm", "model=base", f"eval_data={FEW_ROWS}")
    trainer.train_step()
    trainer.save()
    model = AutoModelForSequenceClassification.from_pretrained("runs/rm/LATEST")
    example = trainer.train_examples[0]
    ids = torch.tensor([[*example.prompt, *example.responses[0]]])
    assert ids[0, -1] == tokenizer.eos_token_id and model.config.pad_token_id is None
    ours = response_scores(trainer.policy, collate([example]))
    assert model(ids).logits.item() == pytest.approx(ours[0, 0].item(), abs=1e-4)
    assert model(ids[:, :-1]).logits.item() != pytest.approx(ours[0, 0].item(), abs=1e-3)


def test_a_reward_model_is_no_language_model(sft_run, tokenizer, refused):
    """With tied embeddings nothing would be missing: it must be refused as policy, reference and teacher."""
    save("judge", tokenizer, small_llama(
        len(tokenizer), LlamaForSequenceClassification, tie_word_embeddings=True, num_labels=1))
    for arguments in (["model=judge"], ["loss=dpo", f"model={sft_run}/LATEST", "reference=judge"],
                      ["loss=kd", f"model={sft_run}/LATEST", "reference=judge"]):
        assert "it is a reward model, without a language model's head" in refused(*QUICK, *arguments)


def test_a_language_model_is_no_reward_model(sft_run, refused):
    latest = f"{sft_run}/LATEST"
    assert "it is no reward model, it has no scalar head: train one by loss=rm" in refused(
        *QUICK, "loss=dpo", f"reward_model={latest}", f"model={latest}")


# ---------------------------------------------------------------- optimizer, learning rate, intervals


def test_fused_optimizers_where_torch_has_them():
    weights = [torch.nn.Parameter(torch.ones(2))]
    for settings, fused in ((["optimizer=AdamW"], True), (["optimizer=RMSprop"], None),
                            (["optimizer=AdamW", "optimizer_args.foreach=true"], None)):
        assert make_optimizer(weights, config_of(*settings)).defaults.get("fused") is fused


def test_every_offered_optimizer_can_be_made():
    names = optimizer_names()
    assert {"RMSprop", "Adam", "AdamW", "SGD", "Adafactor"} <= set(names)
    assert not {"LBFGS", "SparseAdam", "Optimizer"} & set(names)
    for name in names:
        config = SimpleNamespace(optimizer=name, optimizer_args={}, lr=1e-3)
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = make_optimizer([weight], config)
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert (weight < 1).all(), name


def test_an_optimizers_arguments_reach_it():
    # SGD without momentum, lr 0.5, gradient 1, decay 0.1 of the weight 2: 2 - 0.5 * (1 + 0.2)
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    config = config_of("optimizer=SGD", "optimizer_args.weight_decay=0.1", "lr=0.5")
    optimizer = make_optimizer([weight], config)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(1.4)


@pytest.mark.parametrize("schedule, expected", [
    # lr 1, 2 warmup steps, 6 in all: (t + 1) / 3 until t = 2, then over the 4 steps left
    ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
    ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 2 ** 0.5 / 4, 0.5, 0.5 - 2 ** 0.5 / 4]),
])
def test_schedules_by_hand(schedule, expected):
    config = SimpleNamespace(warmup_steps=2, lr_schedule=schedule, min_lr=0.0)
    assert [learning_rate(t, 6, 1.0, config) for t in range(6)] == pytest.approx(expected)
    assert [learning_rate(t, 6, 0.5, config) for t in range(6)] == pytest.approx([x / 2 for x in expected])
    config.warmup_steps = 0.3  # 1.8 of 6 steps, rounded up
    assert [learning_rate(t, 6, 1.0, config) for t in range(6)] == pytest.approx(expected)
    config.min_lr = 0.2  # the warmup is as it was, and what follows it ends there
    assert [learning_rate(t, 6, 1.0, config) for t in range(6)] == pytest.approx(
        [*expected[:3], *(x if schedule == "constant" else 0.2 + 0.8 * x for x in expected[3:])])


def test_what_bfloat16_rounds_away_is_said(capsys):
    """Of weights 1 and 2 with a gradient, of which a step of 0.003 moves the first alone; 3 has none."""
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    for is_first in (True, False):
        model.weight.grad = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.bfloat16)
        update(optimizer, model, is_first)
        assert ("50.0% of the weights, in bfloat16, did not move" in capsys.readouterr().out) is is_first
    assert model.weight[0, 0] < 1 and model.weight[0].tolist()[1:] == [2.0, 3.0]
    model = model.float()
    model.weight.grad = torch.ones(1, 3)
    update(torch.optim.SGD(model.parameters(), lr=0.003), model, True)
    assert model.weight[0, 1] < 2 and capsys.readouterr().out == ""


def test_warmup_longer_than_the_run():
    config = SimpleNamespace(warmup_steps=9, lr_schedule="linear", min_lr=0.0)
    assert [learning_rate(t, 3, 1.0, config) for t in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_intervals():
    """Of 100 rows, 12.5 steps: whole numbers are steps, and with a point a fraction of an epoch."""
    assert [as_steps(x, 100, 8) for x in (0, 1, 7, 0.5, 0.001, 1.0)] == [0, 1, 7, 6, 1, 12]


# ---------------------------------------------------------------- what ends a response, and what sees


def test_the_export_stops_where_samples_stop(sft_run, run):
    """A run whose tokenizer names another end token than the model: its checkpoint, and the next stage's."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    old, new = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("*")
    tokenizer.eos_token = "*"
    tokenizer.save_pretrained("other")
    copy_model(f"{sft_run}/LATEST", "model")
    assert GenerationConfig.from_pretrained("model").eos_token_id == [old]
    first = run(*TINY_RUN, "model=model", "tokenizer=other", "run_dir=first")
    second = run(*TINY_RUN, f"model={first}/LATEST", "loss=dpo", "run_dir=second")
    adapted = run(*TINY_RUN, "model=model", "tokenizer=other", "lora.rank=2", "run_dir=adapted")
    for folder in (f"{first}/LATEST", f"{second}/LATEST", f"{adapted}/LATEST", f"{adapted}/merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [new, old]


SEES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "num_position_embeddings": 16, "depth": 1, "num_heads": 2,
        "out_hidden_size": 32}


def save_seeing(model_type, sft_run, **more):
    """A tiny model with a vision tower, as a folder of that name; its weights."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
            "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](text_config=text | more, vision_config=SEES, image_token_id=5)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(model_type)
    tokenizer.save_pretrained(model_type)
    return load_file(f"{model_type}/model.safetensors")


@pytest.mark.parametrize("more", [["loss=dpo"], ["loss=rm"], ["loss=dpo", "lora.rank=2"]])
def test_a_model_that_sees_learns_from_text(more, sft_run, run, capsys):
    """Gemma 3, in shared rows: its tower is kept as it is, and a resumed run ends in the same bits."""
    before = save_seeing("gemma3", sft_run)
    settings = [*TINY_RUN, *more, "model=gemma3", "lr_schedule=constant", "lr=1e-2", "num_samples=0"]
    whole = run(*settings, "run_dir=whole")
    assert "layout     separate" not in capsys.readouterr().out
    run(*settings, "max_steps=2", "run_dir=half")
    run("resume=true", "run_dir=half", "max_steps=3")
    name = "merged" if "lora.rank=2" in more else "LATEST"
    assert same_weights(whole, "half", name)
    after = load_file(f"{whole}/{name}/model.safetensors")
    assert {*after} - {"score.weight"} == {*before}
    sees = {name for name in before if "vision_tower" in name or "multi_modal" in name}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert len(sees) > 15 and sees <= same and not any("_proj" in name for name in same - sees)


def test_what_of_a_model_is_left_out_is_said(sft_run, run, capsys):
    """Of Qwen 3.5 transformers gives the language model alone."""
    before = save_seeing("qwen3_5", sft_run, layer_types=["linear_attention", "full_attention"],
                         linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                         linear_value_head_dim=8)
    folder = run(*TINY_RUN, "model=qwen3_5")
    said = capsys.readouterr().out
    assert said.count("the language model of qwen3_5 alone: the rest, vision_config, is not saved") == 1
    left = {*before} - {*load_file(f"{folder}/LATEST/model.safetensors")}
    assert left and all("visual" in name for name in left)
    run(*TINY_RUN, f"model={folder}/LATEST", "run_dir=next")
    assert "alone" not in capsys.readouterr().out
