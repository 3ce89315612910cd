# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks real-rl` on a random model of a few thousand weights: it runs, goes on, and reports."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.tokenizer import byte_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import records
from benchmarks.models import word_start
from benchmarks.models.real_rl import __main__ as command
from benchmarks.models.real_rl.__main__ import fingerprint, last_line, parse
from benchmarks.models.real_rl.arms import ARMS, DECISIVE, adapter, shortest_right
from benchmarks.models.real_rl.report import KEY, TABLE, missing, reached, verdict, write_report
from benchmarks.models.real_rl.tasks import ASK, GSM8K, Words, make_task
from benchmarks.models.real_rl.worker import found_probe, measured, run
from benchmarks.models.word_problems import WordProblems
from benchmarks.models.word_start import (
    DIGIT_WEIGHT,
    SAVED,
    batches,
    bf16_is_fast,
    imitate,
    label_weights,
    make_start,
    padded,
    solution_loss,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer of bytes."""
    tokenizer, where = byte_tokenizer(), tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def loaded(folder):
    from sspo_ext.train.models import load_model

    return load_model(folder)


def settings(folder, **other):
    options = vars(parse(["--updates", "1", "--prompts", "2", "--num-generations", "2", "--accumulation", "2",
                          "--held-out", "4", "--budget-chains", "2", "--max-completion-length", "12", "--lora-r", "2",
                          "--save-steps", "1"]))  # fmt: skip
    return {**options, "name": "tiny", "model_path": str(folder), "weights": "0", "command": "", **other}


def test_the_upper_layers_get_an_adapter(folder):
    """Red: the lower half; the LM head too."""
    from peft import get_peft_model

    model = get_peft_model(loaded(folder)[0], adapter(loaded(folder)[0], 2, 0.5))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split("layers.")[1][0] for n in trained} == {"2", "3"}
    assert len(trained) == 2 * 7 * 2 and not any("lm_head" in n for n in trained)


def test_imitation_learns_and_goes_on(folder, tmp_path):
    """Red: a stopped run starts anew; the embeddings trained; the prompt scored."""
    model, tokenizer = loaded(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    whole = imitate(model, tokenizer, WordProblems(), tmp_path / "a", updates=6, lr=1e-2, batch_size=2, bf16=False)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert len(whole) == 6 and min(whole[3:]) < whole[0]
    again, _ = loaded(folder)
    state = torch.load(tmp_path / "a" / SAVED)
    assert state["losses"] == whole
    assert imitate(again, tokenizer, WordProblems(), tmp_path / "a", updates=6, batch_size=2) == whole
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_only_the_solution_is_scored(folder):
    model, tokenizer = loaded(folder)
    ids, labels = next(batches(tokenizer, WordProblems(), 16, 3, seed=0))
    for row, label in zip(ids, labels, strict=True):
        prompt, _, solution = tokenizer.decode(row).partition("\n")
        scored = tokenizer.decode([t for t in label.tolist() if t != -100])
        assert prompt.endswith(("?", "？")) and scored and solution.startswith(scored)
        assert scored.endswith("<eos>") and scored.count("<eos>") == 1 and "####" in scored
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    wanted = [-logits[b, t, labels[b, t + 1]] for b, t in (labels[:, 1:] != -100).nonzero().tolist()]
    torch.testing.assert_close(solution_loss(model, ids, labels), torch.stack(wanted).mean())
    assert padded([([5], [6, 7]), ([5], [6])], 0)[1].tolist() == [[-100, 6, 7], [-100, 6, -100]]


def test_digits_weigh_more(folder):
    """Red: every label weighs 1; the weights not normalised."""
    model, tokenizer = loaded(folder)
    weights = label_weights(tokenizer, len(tokenizer))
    assert {weights[k].item() for k in tokenizer("0 12 345", add_special_tokens=False).input_ids} == {1, DIGIT_WEIGHT}
    assert all(weights[k] == 1 for k in tokenizer("Tom has", add_special_tokens=False).input_ids)
    ids, labels = next(batches(tokenizer, WordProblems(), 16, 3, seed=0))
    logits, scored = model(input_ids=ids).logits[:, :-1].log_softmax(-1), labels[:, 1:] != -100
    losses = -logits[scored].gather(1, labels[:, 1:][scored][:, None])[:, 0]
    wanted = (losses * weights[labels[:, 1:][scored]]).sum() / weights[labels[:, 1:][scored]].sum()
    torch.testing.assert_close(solution_loss(model, ids, labels, weights), wanted)


def test_bfloat16_where_the_processor_has_it(monkeypatch):
    """Red: always; never."""
    for there in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda there=there: there, raising=False)
        assert bf16_is_fast("cpu") is there and bf16_is_fast("cuda")
        assert parse([]).bf16 is there and parse(["--no-bf16"]).bf16 is False and parse(["--bf16"]).bf16 is True


def test_a_start_model_is_made_whole(folder, tmp_path, monkeypatch):
    """Red: the share not looked at; measured once."""
    shares, seen = iter((0.1, 0.5)), []
    monkeypatch.setattr(word_start, "right_share", lambda *_: next(shares))
    monkeypatch.setattr(word_start, "imitate", lambda *_, updates, **__: seen.append(updates))
    made = make_start(str(folder), tmp_path / "start", tmp_path / "work", updates=2)
    assert made == 0.5 and seen == [2, 4]
    assert loaded(tmp_path / "start")[1].eos_token == "<eos>" and not (tmp_path / "start.part").exists()
    for share, times in ((0.1, 4), (0.9, 1)):
        seen.clear()
        monkeypatch.setattr(word_start, "right_share", lambda *_, share=share: share)
        with pytest.raises(SystemExit, match="--imitation: expected a model that is right in 40% to 80%, got"):
            make_start(str(folder), tmp_path / "other", tmp_path / "work", updates=2)
        assert len(seen) == times and not (tmp_path / "other").exists()


def test_right_share(folder, monkeypatch):
    """Red: a solution that is cut off counted."""
    model, tokenizer = loaded(folder)
    problems = WordProblems().problems(4, 1, held_out=True)

    class Knows:
        def complete(self, model, prompts, sampling, seeds):
            assert sampling.temperature == 1 and [tokenizer.decode(p) for p in prompts] == [p.prompt for p in problems]
            texts = [f"#### {p.answer}<eos>" for p in problems[:2]] + [f"#### {problems[2].answer}\n", "#### 99<eos>"]
            return [tokenizer(text).input_ids for text in texts]

    monkeypatch.setattr(word_start, "make_engine", lambda *_: Knows())
    assert word_start.right_share(model, tokenizer, WordProblems(), 4, 0) == 0.5


@pytest.mark.parametrize("arm", ("start", "rloo", "penalty-0.5", "short", "sspo-0", "sspo-0-shuffled", "shortest"))
def test_an_arm_runs(folder, tmp_path, arm):
    row = run(settings(folder), arm, 0, tmp_path)
    assert [row[k] for k in KEY] == ["tiny", "words", arm, 0]
    assert row["updates"] == (arm != "start") and row["groups"] == ["en", "zh", "en", "zh"]
    for how in ("greedy", "sampled"):
        assert all(len(row[how][key]) == 4 for key in ("correct", "tokens", "steps", "skipped"))
    assert row["budget"]["budgets"] == [0, 1, 2, 3, 4, 6, 7, 8, 9] and len(row["chains"]) == 4
    assert all(len(c["values"]) == len(c["advantages"]) + 1 == len(c["steps"]) + 1 for c in row["chains"])
    json.dumps(row)


def test_a_stopped_run_goes_on(folder, tmp_path, capsys):
    """Red: the checkpoint not looked for."""
    first = run(settings(folder), "rloo", 0, tmp_path)
    assert len(first["curves"]["tokens"]) == 1
    capsys.readouterr()
    more = run(settings(folder, updates=3), "rloo", 0, tmp_path)
    assert more["updates"] == 3 and more["curves"]["update"] == [1, 2, 3]
    assert [line[0] for line in capsys.readouterr().out.splitlines() if line[0].isdigit()] == ["2", "3"]
    assert more["curves"]["tokens"][0] == first["curves"]["tokens"][0]
    with pytest.raises(SystemExit, match=r"has checkpoints of other settings \(lr 0.001 and not 0.1\)"):
        run(settings(folder, lr=0.1), "rloo", 0, tmp_path)


def test_shortest_right_answers():
    """Red: the longest; a wrong one where none is right."""
    made = [
        SimpleNamespace(reward=r, completion_ids=[0] * n) for r, n in ((1, 5), (1, 3), (0, 1), (0, 2), (0, 1), (1, 9))
    ]
    assert shortest_right(made, 3) == [made[1], made[5]]
    assert shortest_right(made[2:5], 3) == []


def test_the_probe_is_found_once(folder, tmp_path):
    """Red: the file not read; the worst of the trials taken."""
    model, tokenizer = loaded(folder)
    task = SimpleNamespace(train=lambda seed: WordProblems().problems(2, 0, held_out=False), max_completion_length=6)
    options = settings(folder, probe_problems=2)
    found = found_probe(model, tokenizer, task, options, tmp_path / "a" / "probe.json")
    assert found["table"].splitlines()[2].split(" | ")[0] == f"| {found['probe']}"
    (tmp_path / "a" / "probe.json").write_text(json.dumps({**found, "probe": "Answer:"}))
    assert found_probe(model, tokenizer, task, options, tmp_path / "a" / "probe.json")["probe"] == "Answer:"


def fake(arm, seed, correct, tokens, updates=16):
    numbers = {"correct": correct, "tokens": tokens, "steps": [2] * 4, "skipped": [0, 0, 1, 0]}
    chain = {"prompt": "2+2=\n", "answer": "4", "reward": 1.0, "steps": ["a\n", "#### 4"], "values": [0.1, 0.9, 0.0],
             "advantages": [0.7, 0.1]}  # fmt: skip
    budget = {"by": "tokens", "budgets": [0, 10, 20], "accuracy": [0.0, 0.5, 1.0], "spent": [0.0, 10.0, 18.0]}
    shown = {
        "prompts": 8,
        "num_generations": 8,
        "lr": 1e-3,
        "lora_r": 16,
        "lora_share": 0.5,
        "device": "cpu",
        "threads": 1,
    }
    return {"name": "tiny", "data": "words", "command": "python -m benchmarks real-rl",
            "arm": arm, "seed": seed, "updates": updates if arm != "start" else 0,
            "settings": shown, "probe": "####", "hardware": {"cpu": "a cpu", "torch": "2"}, "cpu_seconds": 3.0,
            "sampled_tokens": 2000, "greedy": numbers, "sampled": numbers, "groups": ["en", "zh", "en", "zh"],
            "budget": {**budget, "area": 0.5}, "chains": [chain] * 4}  # fmt: skip


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [fake("start", 0, [1, 0, 1, 0], [100] * 4), fake("rloo", 0, [1, 1, 1, 0], [90] * 4),
            fake("rloo", 1, [1, 1, 1, 1], [90] * 4), fake("sspo-0", 0, [1, 1, 1, 1], [60] * 4)]  # fmt: skip
    records.write(tmp_path / TABLE, rows)
    text = write_report(tmp_path)
    assert (
        "Which probe" not in text and "`python -m benchmarks real-rl`" in text and "**This table is partial.**" in text
    )
    assert "| outcome only, RLOO | 2 | 16 | 0.875 ± 0.245 [0.750, 1.000] | 90.0 | 2.00 | 0.250 |" in text
    assert "| SSPO, lambda 0 | greedy | -40.0% | -33.3% | +0.125 ± 0.245" in text and "**reached**" in text
    for name in ("", "-budgets", "-en-before", "-en-after", "-zh-before", "-zh-after"):
        assert f"(tiny-words{name}.png)" in text and (tmp_path / f"tiny-words{name}.png").exists()
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == text
    records.write(tmp_path / TABLE, [{**row, "probe_table": "| probe | en |"} for row in rows])
    assert "### Which probe makes the model answer\n\n| probe | en |\n" in write_report(tmp_path)


def test_verdict():
    """Red: the aim at 10 %; a gap below the interval taken as right."""
    arms = {"start": [fake("start", 0, [1, 0, 1, 0], [100] * 4)], "rloo": [fake("rloo", 0, [1] * 4, [90] * 4)],
            "sspo-0": [fake("sspo-0", 0, [0] * 4, [60] * 4)]}  # fmt: skip
    assert reached(arms, "sspo-0", "greedy", -0.4) == "not reached: less accurate than RLOO"
    assert reached(arms, "sspo-0", "greedy", -0.2) == "not reached: not short enough and less accurate than RLOO"
    arms["sspo-0"] = [fake("sspo-0", 0, [1] * 4, [75] * 4)]
    assert "| -25.0% | -16.7% |" in verdict(arms) and "not reached: not short enough" in verdict(arms)
    assert reached(arms, "sspo-0", "greedy", -0.3) == "**reached**"
    assert verdict({"start": []}) == "There is no run of SSPO and of the start model yet."
    del arms["rloo"]
    assert "| -25.0% | - |" in verdict(arms)
    assert "open: RLOO was not run" in verdict(arms)


def test_missing():
    row = fake("rloo", 0, [1] * 4, [9] * 4)
    every = {name: [row] * 2 if ARMS[name].trains else [row] for name in ARMS}
    assert missing(every) == "Every arm was run."
    every["sspo-9"] = [row]
    assert missing(every) == "**This table is partial.** Arms with fewer than 2 seeds: SSPO, lambda 0.9 (1)."
    every["sspo-0-shuffled"] = [row]
    assert missing(every).endswith("Arms with fewer than 2 seeds: V shuffled (1); SSPO, lambda 0.9 (1).")
    del every["short"]
    assert "Arms that were not run: RLOO, short maximal length." in missing(every)


def test_the_same_command_goes_on(tmp_path, monkeypatch):
    """Red: recorded rows run again; rows with fewer updates not continued; the start model made twice."""
    asked = []

    def execute(jobs, logs, title, at_once, reached, threads=1, finished=None):
        asked.append((title, [job.name for job in jobs]))
        for job in jobs:
            if title == "start model":
                (tmp_path / "work" / "start").mkdir()
                continue
            arm, seed = job.name.rsplit("-", 1)
            made = json.loads((tmp_path / "work" / "settings.json").read_text())
            row = {"name": made["name"], "data": "words", "arm": arm, "seed": int(seed), "updates": made["updates"],
                   "settings": made}  # fmt: skip
            records.write(tmp_path / "runs" / f"words-{job.name}.json", [row])
            finished()

    monkeypatch.setattr(command, "execute", execute)
    monkeypatch.setattr(command, "write_report", lambda folder: "")
    monkeypatch.setattr(command, "model_folder", lambda name: name)
    arguments = [
        "--output",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
        "--updates",
        "2",
        "--arms",
        "start",
        "rloo",
    ]
    command.main(arguments)
    assert asked == [("start model", ["start"]), ("runs", []), ("runs", ["start-0", "rloo-0", "rloo-1"])]
    asked.clear()
    command.main([*arguments, "sspo-0"])
    assert asked == [("runs", []), ("runs", ["sspo-0-0", "sspo-0-1"])]
    asked.clear()
    command.main([*arguments, "--updates", "3", "--seeds", "1"])
    assert asked == [("runs", []), ("runs", ["rloo-0"])]
    with pytest.raises(SystemExit, match="rloo-0 is recorded with runs of other settings"):
        command.main([*arguments, "--lr", "0.1"])
    with pytest.raises(SystemExit, match="start-0 is recorded with runs of other settings .held_out 96 and not 9"):
        command.main([*arguments, "--held-out", "9"])
    (tmp_path / "work" / "start" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SystemExit, match="start-0 is recorded with runs of other settings .weights None and not '01db"):
        command.main(arguments)
    (tmp_path / "work" / "start" / "model.safetensors").unlink()
    (tmp_path / "work" / "runs" / "rloo-0").mkdir(parents=True)
    asked.clear()
    command.main([*arguments, "--lr", "0.1", "--redo", "--seeds", "1"])
    assert asked == [("runs", []), ("runs", ["start-0", "rloo-0"])]
    assert not (tmp_path / "work" / "runs" / "rloo-0").exists()
    assert len(records.read(tmp_path / TABLE)) == 5 and not list((tmp_path / "runs").iterdir())


def test_fingerprint(folder, tmp_path):
    """Red: the names alone; the first file alone."""
    assert fingerprint("a/name") is None and fingerprint(str(tmp_path)) is None
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert fingerprint(str(tmp_path)) == hashlib.sha256(b"onetwo").hexdigest()[:16]
    assert len(fingerprint(str(folder)) or "") == 16


def test_defaults():
    words, gsm8k = parse([]), parse(["--data", "gsm8k", "--device", "cuda"])
    assert words.arms == list(DECISIVE) and words.seeds == 2 and words.jobs == 2 and words.engine == "compact"
    assert gsm8k.arms == ["start", "rloo", "sspo-0"] and gsm8k.seeds == 1 and gsm8k.jobs == 1
    assert (words.prompts, words.held_out, gsm8k.prompts, gsm8k.held_out) == (5, 96, 8, 200)
    assert parse(["--prompts", "3", "--held-out", "0"]).prompts == 3 and parse(["--held-out", "0"]).held_out == 0
    assert parse(["--arms", "all"]).arms == list(ARMS)


def test_last_line(tmp_path):
    (tmp_path / "log").write_text("bar: 1%|  |\r3 0.500 80.00\nmeasured greedy\n")
    assert last_line(tmp_path / "log") == (3, "0.500 80.00")
    (tmp_path / "log").write_text("")
    assert last_line(tmp_path / "log") == (0, "")


def test_gsm8k(tmp_path):
    """Red: the comma of 1,200 kept; the human solution taken as the answer."""
    pytest.importorskip("math_verify")
    for split, answer in (("train", "1,200"), ("test", "5")):
        records.write(tmp_path / f"{split}.jsonl", [{"question": "How many?", "answer": f"2 + 3\n#### {answer}"}])
    chat = make_task("gsm8k", str(tmp_path), SimpleNamespace(chat_template="{{ messages }}"))
    assert chat.train(0)[0].prompt == [{"role": "user", "content": "How many?" + ASK}]
    assert chat.train(0)[0].answer == "1200" and chat.held_out(3)[0].answer == "5"
    plain = GSM8K(str(tmp_path), chat=False)
    (problem,) = plain.held_out(3)
    assert problem.prompt == "How many?" + ASK + "\n"
    assert plain.review(problem, "2 + 3 = 5\n\n#### 5").correct
    assert plain.review(problem, "2 + 3 = 5\n\n#### 5").steps == 2
    assert not plain.review(problem, "#### 6").correct
    with pytest.raises(SystemExit, match="--gsm8k: expected a folder"):
        GSM8K(str(tmp_path / "none"), chat=False).train(0)
    assert isinstance(make_task("words", None, None), Words)


def test_a_solution_that_is_cut_off_is_wrong():
    """Red: `ended` not looked at."""
    (problem,) = WordProblems(("en",)).problems(1, 1, held_out=True)
    text = f"#### {problem.answer}"
    made = [SimpleNamespace(text=text, ended=ended, completion_ids=[0, 0], steps=[[0, 0]]) for ended in (True, False)]
    trainer = SimpleNamespace(roll_out=lambda rows, seeds, temperature: made)
    numbers, _ = measured(trainer, WordProblems(), [problem] * 2, 0.0, 0)  # type: ignore[arg-type]
    assert numbers["correct"] == [1, 0] and numbers["tokens"] == [2, 2] and numbers["steps"] == [1, 1]
